//! Gumbel noise from a counter-based generator: any token's noise at any position, in any order.
//!
//! The generator is Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as
//! easy as 1, 2, 3" (SC 2011). Its key is the seed (low word first). Its counter is
//! `(token / 2, position low, position high, 0)`; an even token takes the first two words of the
//! output, an odd one the last two, as one number with the first word on top. Its upper 52
//! bits `b` give `u = (b + 0.5) / 2^52`, and the noise is `-ln(-ln(u))` with `libm`'s `ln`.

use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::integer;

/// The largest noise there is: `-ln(-ln(1 - 2^-53))` is 36.7368.
pub const MAX_NOISE: f64 = 36.75;

/// Bits of a draw.
pub const DRAW_BITS: u32 = 52;

/// Counters worked on together, so that the compiler can use vector registers.
const LANES: usize = 8;

/// Draws made together by [`Noise::draws`].
pub const GROUP: usize = 2 * LANES;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Philox4x32-10 of `N` counters at once; the four words of counter `i` are `words[0..4][i]`.
fn philox<const N: usize>(mut words: [[u32; N]; 4], mut key: [u32; 2]) -> [[u32; N]; 4] {
    for round in 0..ROUNDS {
        if round > 0 {
            key[0] = key[0].wrapping_add(WEYL[0]);
            key[1] = key[1].wrapping_add(WEYL[1]);
        }
        let [c0, c1, c2, c3] = words;
        for lane in 0..N {
            let product0 = u64::from(MULTIPLIERS[0]) * u64::from(c0[lane]);
            let product1 = u64::from(MULTIPLIERS[1]) * u64::from(c2[lane]);
            words[0][lane] = (product1 >> 32) as u32 ^ c1[lane] ^ key[0];
            words[1][lane] = product1 as u32;
            words[2][lane] = (product0 >> 32) as u32 ^ c3[lane] ^ key[1];
            words[3][lane] = product0 as u32;
        }
    }
    words
}

/// The noise of one seed at one position.
#[derive(Clone, Copy)]
pub struct Noise {
    key: [u32; 2],
    position: [u32; 2],
}

/// The low and the high word.
fn halves(value: u64) -> [u32; 2] {
    [value as u32, (value >> 32) as u32]
}

/// The upper [`DRAW_BITS`] bits of two words.
fn draw(high: u32, low: u32) -> u64 {
    ((u64::from(high) << 32) | u64::from(low)) >> (64 - DRAW_BITS)
}

/// The Gumbel noise that a draw stands for; it grows with the draw.
pub fn gumbel_of_draw(draw: u64) -> f64 {
    // Exact: a draw and its half bit fill the 53 bits of a double.
    let uniform = (draw as f64 + 0.5) / (1_u64 << DRAW_BITS) as f64;
    -libm::log(-libm::log(uniform))
}

impl Noise {
    /// The noise of `seed` at `position`.
    pub fn new(seed: u64, position: u64) -> Self {
        Self {
            key: halves(seed),
            position: halves(position),
        }
    }

    /// The draws of the tokens `GROUP * group` and after.
    pub fn draws(&self, group: u32) -> [u64; GROUP] {
        let mut counters = [[0_u32; LANES]; 4];
        for (lane, counter) in counters[0].iter_mut().enumerate() {
            *counter = group * LANES as u32 + lane as u32;
        }
        counters[1] = [self.position[0]; LANES];
        counters[2] = [self.position[1]; LANES];
        let words = philox(counters, self.key);
        let mut draws = [0; GROUP];
        for lane in 0..LANES {
            draws[2 * lane] = draw(words[0][lane], words[1][lane]);
            draws[2 * lane + 1] = draw(words[2][lane], words[3][lane]);
        }
        draws
    }

    /// The Gumbel noise of one token.
    pub fn gumbel(&self, token: u32) -> f64 {
        let words = philox(
            [[token / 2], [self.position[0]], [self.position[1]], [0]],
            self.key,
        );
        let [[a], [b], [c], [d]] = words;
        gumbel_of_draw(if token % 2 == 0 {
            draw(a, b)
        } else {
            draw(c, d)
        })
    }
}

/// The largest vocabulary: many times those of today, and few enough to fit into memory.
pub const MAX_TOKENS: usize = 1 << 24;

/// The Gumbel noise of tokens `0..n`.
#[pyfunction]
pub fn gumbel<'py>(
    py: Python<'py>,
    seed: &Bound<'py, PyAny>,
    position: &Bound<'py, PyAny>,
    n: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<f64>>> {
    let noise = Noise::new(integer("seed", seed)?, integer("position", position)?);
    let n = integer::<u32>("n", n)? as usize;
    if n > MAX_TOKENS {
        return Err(PyValueError::new_err(format!(
            "n is {n}; it may be at most {MAX_TOKENS}"
        )));
    }
    let values: Vec<f64> = py.detach(|| {
        let draws = (0..n.div_ceil(GROUP) as u32).flat_map(|group| noise.draws(group));
        draws.take(n).map(gumbel_of_draw).collect()
    });
    Ok(values.into_pyarray(py))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The known answers that the authors publish with Random123 (`kat_vectors`).
    #[test]
    fn philox_gives_the_published_answers() {
        let run = |counter: [u32; 4], key| philox(counter.map(|word| [word]), key).map(|[w]| w);
        assert_eq!(
            run([0; 4], [0; 2]),
            [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]
        );
        assert_eq!(
            run([u32::MAX; 4], [u32::MAX; 2]),
            [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]
        );
        assert_eq!(
            run(
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0]
            ),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn one_token_alone_has_the_noise_it_has_in_a_group() {
        let noise = Noise::new(0x0123_4567_89ab_cdef, 1 << 40);
        for group in [0, 1, 1000] {
            for (offset, draw) in noise.draws(group).into_iter().enumerate() {
                let token = group * GROUP as u32 + offset as u32;
                assert_eq!(
                    noise.gumbel(token).to_bits(),
                    gumbel_of_draw(draw).to_bits()
                );
            }
        }
    }

    #[test]
    fn the_noise_stays_within_its_bounds() {
        let last = (1 << DRAW_BITS) - 1;
        assert!((-3.61..-3.60).contains(&gumbel_of_draw(0)));
        assert!((MAX_NOISE - 0.02..MAX_NOISE).contains(&gumbel_of_draw(last)));
    }
}
