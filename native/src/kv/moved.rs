//! Keys at another place: rotated on by how far they were moved (RoPE: Su et al., arXiv:2104.09864).
//!
//! A key at position p is turned by p times the angle of its pair, so one that was computed at p and
//! is to stand at q is turned on by q - p.  Values do not know their position.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::half;
use crate::buffers::{integer, Bytes};

/// The largest head that can be.
const MAX_WIDTH: usize = 1 << 16;

/// Write `keys` (f16, heads of `width` numbers) to `out`, turned on by `delta` positions.
///
/// Angles are computed in f64 and applied in f32, so what is lost is the rounding to f16 alone.
fn turn(keys: &[u8], out: &mut [u8], width: usize, base: f64, halves: bool, delta: f64) {
    let pairs = width / 2;
    let angles: Vec<(f32, f32)> = (0..pairs)
        .map(|pair| {
            let angle = delta * libm::pow(base, -(pair as f64) / pairs as f64);
            (libm::cos(angle) as f32, libm::sin(angle) as f32)
        })
        .collect();
    let mut head = vec![0.0_f32; width];
    for (from, to) in keys
        .chunks_exact(2 * width)
        .zip(out.chunks_exact_mut(2 * width))
    {
        for (number, bytes) in head.iter_mut().zip(from.chunks_exact(2)) {
            *number = half::widen(u16::from_le_bytes([bytes[0], bytes[1]]));
        }
        if halves {
            let (first, second) = head.split_at_mut(pairs);
            for ((a, b), (c, s)) in first.iter_mut().zip(second).zip(&angles) {
                (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
            }
        } else {
            for (pair, (c, s)) in head.chunks_exact_mut(2).zip(&angles) {
                (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
            }
        }
        for (number, bytes) in head.iter().zip(to.chunks_exact_mut(2)) {
            bytes.copy_from_slice(&half::narrow(*number).to_le_bytes());
        }
    }
}

/// Return rows of keys as they are `delta` positions further on.
#[pyfunction]
#[pyo3(signature = (keys, delta, *, width, rope_base, rope_halves = false))]
pub fn kv_moved<'py>(
    py: Python<'py>,
    keys: &Bound<'py, PyAny>,
    delta: i32,
    width: &Bound<'py, PyAny>,
    rope_base: f64,
    rope_halves: bool,
) -> PyResult<Bound<'py, PyBytes>> {
    let width = integer::<u32>("width", width)? as usize;
    let keys = Bytes::new("keys", keys)?;
    let rows = keys.as_slice();
    if width == 0 || width % 2 != 0 || width > MAX_WIDTH {
        return Err(PyValueError::new_err("width must be even, up to 65536"));
    }
    if !(rope_base.is_finite() && rope_base > 0.0) {
        return Err(PyValueError::new_err("rope_base must be a positive number"));
    }
    if rows.len() % (2 * width) != 0 {
        return Err(PyValueError::new_err(format!(
            "{} bytes are no heads of {width} numbers in f16",
            rows.len()
        )));
    }
    let mut out = vec![0_u8; rows.len()];
    py.detach(|| {
        turn(
            rows,
            &mut out,
            width,
            rope_base,
            rope_halves,
            f64::from(delta),
        );
    });
    Ok(PyBytes::new(py, &out))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(numbers: &[f32]) -> Vec<u8> {
        let halves = numbers.iter().map(|number| half::narrow(*number));
        halves.flat_map(u16::to_le_bytes).collect()
    }

    fn numbers(bytes: &[u8]) -> Vec<f32> {
        let pairs = bytes.chunks_exact(2);
        pairs
            .map(|pair| half::widen(u16::from_le_bytes([pair[0], pair[1]])))
            .collect()
    }

    #[test]
    fn the_first_pair_turns_by_one_radian_a_position() {
        let keys = bytes(&[1.0, 0.0, 1.0, 0.0]);
        let mut out = vec![0; keys.len()];
        turn(&keys, &mut out, 4, 1e4, false, 2.0);
        let found = numbers(&out);
        let slow = 2.0_f32 * 0.01;
        for (found, wanted) in
            found
                .iter()
                .zip([2.0_f32.cos(), 2.0_f32.sin(), slow.cos(), slow.sin()])
        {
            assert!((found - wanted).abs() < 1e-3, "{found} for {wanted}");
        }
        turn(&bytes(&[1.0, 1.0, 0.0, 0.0]), &mut out, 4, 1e4, true, 2.0);
        let turned = numbers(&out);
        assert!((turned[0] - 2.0_f32.cos()).abs() < 1e-3);
        assert!((turned[2] - 2.0_f32.sin()).abs() < 1e-3);
    }

    #[test]
    fn no_way_changes_no_bit() {
        let keys = bytes(&[0.1, -3.0, 7.5, 65504.0, 6e-8, 0.0]);
        let mut out = vec![0; keys.len()];
        turn(&keys, &mut out, 2, 1e5, false, 0.0);
        assert_eq!(out, keys);
    }
}
