//! The lossy levels: what is predictable is taken away, the rest rounded to steps and entropy coded.
//!
//! A uniform step with entropy coding needs a quarter of a bit a number more than any code could
//! (Gish & Pierce, "Asymptotically efficient quantizing", 1968), whatever the distribution, so there
//! is nothing to clip and no rotation to spread outliers is needed (as in QuaRot, arXiv:2404.00456,
//! and TurboQuant, arXiv:2504.19874): a channel with a small deviation simply costs fewer bits.
//! What to divide by goes by KIVI (arXiv:2402.02750) and KVQuant (arXiv:2401.18079), which found that
//! keys differ by channel, before their rotation, and values by token:
//!
//! * Keys are turned back (`turn`); of each channel the mean over the block is taken away; a head has
//!   one step.
//! * Values have a step for each token and head: tokens with small values are often looked at most.
//! * The first tokens of a text, which attention rests on (Xiao et al., arXiv:2309.17453), and those
//!   whose keys are far from all others get finer steps and are kept out of means and deviations.
//!
//! Each channel's deviation picks the class (`tables`) that its numbers are coded with.

use super::half::{narrow, widen};
use super::numbers::{take, Reader, Streams, Writer};
use super::tables::NARROWEST;
use super::turn::Turn;
use super::{Problem, Shape, MAX_TOKENS};

/// The class of numbers about numbers: a deviation of four.
const SIDE: i32 = 8;
/// Means are told in this part of a step.
const MEAN_PARTS: f32 = 2.0;
/// A token whose squared deviation is this many times the median is kept apart.
const FAR: f32 = 4.0;
/// So much finer are the steps of tokens that are kept apart.
const FINER: f32 = 8.0;
/// A step is at least this part of the largest number.
const FINEST: f32 = 1.0 / 4096.0;
/// What counts as the size of numbers that are all zero.
const SMALLEST: f32 = 1e-9;
/// The widest class that a block may tell.
const WIDEST_TOLD: i32 = 100;
/// Adding and subtracting it rounds to an integer.
const ROUND: f32 = 12_582_912.0;

/// The steps of a level, in parts of the root mean square.
#[derive(Clone, Copy)]
pub struct Steps {
    /// Of a head's keys, less their means.
    pub keys: f32,
    /// Of a token's values in a head.
    pub values: f32,
}

/// log2 in quarters, rounded, of a positive number that is not subnormal.
fn quarters(value: f32) -> i32 {
    /// 2^(1/8), 2^(3/8), 2^(5/8), 2^(7/8): where rounding goes up.
    const BOUNDS: [f32; 4] = [1.090_507_7, 1.296_839_6, 1.542_210_8, 1.834_008_1];
    let bits = value.to_bits();
    let power = (bits >> 23 & 0xff) as i32 - 127;
    let part = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    4 * power + BOUNDS.iter().filter(|bound| part > **bound).count() as i32
}

/// The sum, in eight parts, so that it runs in vector registers.
#[inline(always)]
fn sum(numbers: &[f32]) -> f32 {
    let mut parts = [0.0_f32; 8];
    let mut chunks = numbers.chunks_exact(8);
    for chunk in &mut chunks {
        for (part, number) in parts.iter_mut().zip(chunk) {
            *part += number;
        }
    }
    for (part, number) in parts.iter_mut().zip(chunks.remainder()) {
        *part += number;
    }
    let [a, b, c, d, e, f, g, h] = parts;
    ((a + e) + (b + f)) + ((c + g) + (d + h))
}

/// 2^(quarters / 4).
fn scale(quarters: i32) -> f32 {
    const PARTS: [f32; 4] = [1.0, 1.189_207_1, std::f32::consts::SQRT_2, 1.681_792_8];
    let power = (quarters >> 2).clamp(-100, 100);
    f32::from_bits(((127 + power) as u32) << 23) * PARTS[(quarters & 3) as usize]
}

/// The nearest integer; `value` is far below 2^22.
#[inline(always)]
fn whole(value: f32) -> i32 {
    let sum = value.clamp(-4e6, 4e6) + ROUND;
    sum.to_bits() as i32 - ROUND.to_bits() as i32
}

/// The middle one of some positive numbers (the lower of two).
fn median(numbers: &[f32]) -> f32 {
    let mut sorted = [0.0; MAX_TOKENS];
    let sorted = &mut sorted[..numbers.len()];
    sorted.copy_from_slice(numbers);
    *sorted
        .select_nth_unstable_by((numbers.len() - 1) / 2, f32::total_cmp)
        .1
}

/// One head, channel by channel: `numbers[channel * tokens + place]`.
///
/// `order` are the tokens by place: first those that are coded by channel, `kept` of them, then those
/// that are kept apart.
struct Plane {
    numbers: Vec<f32>,
    width: usize,
    order: [usize; MAX_TOKENS],
    tokens: usize,
    kept: usize,
}

impl Plane {
    fn new(shape: &Shape) -> Self {
        let mut plane = Self {
            numbers: vec![0.0; shape.width * shape.tokens],
            width: shape.width,
            order: [0; MAX_TOKENS],
            tokens: shape.tokens,
            kept: 0,
        };
        plane.part(0);
        plane
    }

    /// Keep the tokens of a set of bits apart.
    fn part(&mut self, apart: u64) {
        let is_apart = |token: &usize| apart >> token & 1 == 1;
        let kept = (0..self.tokens).filter(|token| !is_apart(token));
        let order = kept.chain((0..self.tokens).filter(is_apart));
        for (place, token) in self.order.iter_mut().zip(order) {
            *place = token;
        }
        self.kept = self.tokens - apart.count_ones() as usize;
    }

    #[inline(always)]
    fn load(&mut self, rows: &[f32], shape: &Shape, head: usize) {
        for (place, token) in self.order[..self.tokens].iter().enumerate() {
            let row = &rows[token * shape.row() + head * shape.width..][..shape.width];
            for (channel, value) in self.numbers.chunks_exact_mut(self.tokens).zip(row) {
                channel[place] = *value;
            }
        }
    }

    #[inline(always)]
    fn store(&self, rows: &mut [f32], shape: &Shape, head: usize) {
        for (place, token) in self.order[..self.tokens].iter().enumerate() {
            let row = &mut rows[token * shape.row() + head * shape.width..][..shape.width];
            for (channel, value) in self.numbers.chunks_exact(self.tokens).zip(row) {
                *value = channel[place];
            }
        }
    }

    #[inline(always)]
    fn means(&self) -> Vec<f32> {
        let share = 1.0 / self.kept.max(1) as f32;
        self.numbers
            .chunks_exact(self.tokens)
            .map(|channel| sum(&channel[..self.kept]) * share)
            .collect()
    }

    /// The mean square of each token's distance from `means`, by place.
    #[inline(always)]
    fn powers(&self, means: &[f32]) -> [f32; MAX_TOKENS] {
        let mut powers = [0.0; MAX_TOKENS];
        for (channel, mean) in self.numbers.chunks_exact(self.tokens).zip(means) {
            for (power, value) in powers.iter_mut().zip(channel) {
                *power += (value - mean) * (value - mean);
            }
        }
        powers.map(|power| power / self.width as f32)
    }

    /// Round what is left of each number after its mean, in steps of its token, and write it.
    #[inline(always)]
    fn write(&self, means: &[f32], steps: &[f32; MAX_TOKENS], centre: i32, writer: &mut Writer) {
        let mut inverses = [0.0; MAX_TOKENS];
        for (inverse, step) in inverses.iter_mut().zip(steps) {
            *inverse = 1.0 / step;
        }
        let share = 1.0 / self.kept.max(1) as f32;
        let mut classes = Vec::with_capacity(self.width);
        let mut all = vec![0; self.numbers.len()];
        for ((run, channel), mean) in all
            .chunks_exact_mut(self.tokens)
            .zip(self.numbers.chunks_exact(self.tokens))
            .zip(means)
        {
            let mut scaled = [0.0; MAX_TOKENS];
            for ((scaled, value), inverse) in scaled.iter_mut().zip(channel).zip(&inverses) {
                *scaled = (value - mean) * inverse;
            }
            for (number, scaled) in run.iter_mut().zip(&scaled) {
                *number = whole(*scaled);
            }
            let squares = scaled.map(|scaled| scaled * scaled);
            classes.push(class_of(sum(&squares[..self.kept]) * share) - centre);
        }
        writer.put(&classes, SIDE);
        for (run, class) in all.chunks_exact(self.tokens).zip(&classes) {
            writer.put(&run[..self.kept], class + centre);
        }
        for place in self.kept..self.tokens {
            let run: Vec<i32> = all
                .iter()
                .skip(place)
                .step_by(self.tokens)
                .copied()
                .collect();
            let sum: f32 = run.iter().map(|n| *n as f32 * *n as f32).sum();
            let class = class_of(sum / self.width as f32);
            writer.put(&[class - centre], SIDE);
            writer.put(&run, class);
        }
    }

    /// Read what [`Plane::write`] wrote.
    #[inline(always)]
    fn read(
        &mut self,
        means: &[f32],
        steps: &[f32; MAX_TOKENS],
        centre: i32,
        reader: &mut Reader<'_>,
    ) -> Result<(), Problem> {
        let mut classes = vec![0; self.width];
        reader.get(&mut classes, SIDE)?;
        let mut run = [0; MAX_TOKENS];
        for ((channel, mean), class) in self
            .numbers
            .chunks_exact_mut(self.tokens)
            .zip(means)
            .zip(&classes)
        {
            reader.get(&mut run[..self.kept], class_from(*class, centre)?)?;
            for ((value, number), step) in channel.iter_mut().zip(&run).zip(steps) {
                *value = mean + *number as f32 * step;
            }
        }
        let mut run = vec![0; self.width];
        for place in self.kept..self.tokens {
            let mut class = [0];
            reader.get(&mut class, SIDE)?;
            reader.get(&mut run, class_from(class[0], centre)?)?;
            for ((channel, number), mean) in self
                .numbers
                .chunks_exact_mut(self.tokens)
                .zip(&run)
                .zip(means)
            {
                channel[place] = mean + *number as f32 * steps[place];
            }
        }
        Ok(())
    }
}

/// The class of a mean square, in steps.
fn class_of(power: f32) -> i32 {
    quarters(power.sqrt().max(1e-2)).clamp(NARROWEST, WIDEST_TOLD)
}

/// The class that was told as a difference.
fn class_from(told: i32, centre: i32) -> Result<i32, Problem> {
    match told.checked_add(centre) {
        Some(class @ NARROWEST..=WIDEST_TOLD) => Ok(class),
        _ => Err(Problem::Damaged("a channel is impossibly wide")),
    }
}

/// log2 in quarters of a size; zero counts as very small.
fn size_quarters(size: f32) -> i32 {
    quarters(size.max(SMALLEST))
}

/// Steps of all places: `size` by place, in parts of `step`, finer for those kept apart.
fn steps(plane: &Plane, step: f32, size: impl Fn(usize) -> i32) -> [f32; MAX_TOKENS] {
    let mut steps = [1.0; MAX_TOKENS];
    for (place, found) in steps[..plane.tokens].iter_mut().enumerate() {
        let finer = if place < plane.kept { 1.0 } else { 1.0 / FINER };
        *found = step * finer * scale(size(place));
    }
    steps
}

/// Write the keys of a head; the plane's tokens are then parted.
#[inline(always)]
fn write_keys(
    plane: &mut Plane,
    rows: &[f32],
    (shape, head): (&Shape, usize),
    (step, first): (f32, usize),
    (side, writer): (&mut Vec<u8>, &mut Writer),
) {
    plane.part(0);
    plane.load(rows, shape, head);
    let powers = plane.powers(&plane.means());
    let limit = FAR * median(&powers[..plane.tokens]);
    let mut apart = 0;
    for (token, power) in powers[..plane.tokens].iter().enumerate() {
        if token < first || *power > limit {
            apart |= 1_u64 << token;
        }
    }
    if apart.count_ones() as usize == plane.tokens {
        apart = 0;
    }
    if apart != 0 {
        plane.part(apart);
        plane.load(rows, shape, head);
    }
    let means = plane.means();
    let powers = plane.powers(&means);
    let (mut power, mut largest) = ([0.0_f32; MAX_TOKENS], [0.0_f32; MAX_TOKENS]);
    for channel in plane.numbers.chunks_exact(plane.tokens) {
        for ((power, largest), value) in power.iter_mut().zip(&mut largest).zip(channel) {
            *power += value * value;
            *largest = if value.abs() > *largest {
                value.abs()
            } else {
                *largest
            };
        }
    }
    let power = sum(&power) / plane.numbers.len() as f32;
    let largest = largest.iter().fold(0.0_f32, |most, value| most.max(*value));
    let size = median(&powers[..plane.kept])
        .min(power)
        .sqrt()
        .max(largest * FINEST);
    let size = size_quarters(size);
    let part = step * scale(size) / MEAN_PARTS;
    let told: Vec<i32> = means.iter().map(|mean| whole(mean / part)).collect();
    let spread = told.iter().map(|m| *m as f32 * *m as f32).sum::<f32>() / plane.width as f32;
    let class = class_of(spread);
    side.extend_from_slice(&apart.to_le_bytes());
    side.extend_from_slice(&(size as i16).to_le_bytes());
    side.push(class as i8 as u8);
    writer.put(&told, class);
    let means: Vec<f32> = told.iter().map(|mean| *mean as f32 * part).collect();
    plane.write(
        &means,
        &steps(plane, step, |_| size),
        -quarters(step),
        writer,
    );
}

#[inline(always)]
fn read_keys(
    plane: &mut Plane,
    step: f32,
    (side, reader): (&mut &[u8], &mut Reader<'_>),
) -> Result<(), Problem> {
    let mut apart = [0; 8];
    apart.copy_from_slice(take(side, 8)?);
    let apart = u64::from_le_bytes(apart);
    if plane.tokens < MAX_TOKENS && apart >> plane.tokens != 0 {
        return Err(Problem::Damaged("tokens are kept apart that are not there"));
    }
    plane.part(apart);
    let told = take(side, 3)?;
    let size = i32::from(i16::from_le_bytes([told[0], told[1]]));
    let class = class_from(i32::from(told[2] as i8), 0)?;
    let part = step * scale(size) / MEAN_PARTS;
    let mut means = vec![0; plane.width];
    reader.get(&mut means, class)?;
    let means: Vec<f32> = means.iter().map(|mean| *mean as f32 * part).collect();
    plane.read(
        &means,
        &steps(plane, step, |_| size),
        -quarters(step),
        reader,
    )
}

/// Write the values of a head, whose tokens are parted as its keys are.
#[inline(always)]
fn write_values(
    plane: &mut Plane,
    rows: &[f32],
    (shape, head): (&Shape, usize),
    step: f32,
    (side, writer): (&mut Vec<u8>, &mut Writer),
) {
    plane.load(rows, shape, head);
    let zeros = vec![0.0; plane.width];
    let powers = plane.powers(&zeros);
    let base = size_quarters(median(&powers[..plane.tokens]).sqrt());
    let told: Vec<i32> = powers[..plane.tokens]
        .iter()
        .map(|power| size_quarters(power.sqrt()) - base)
        .collect();
    side.extend_from_slice(&(base as i16).to_le_bytes());
    writer.put(&told, SIDE);
    let steps = steps(plane, step, |place| told[place] + base);
    plane.write(&zeros, &steps, -quarters(step), writer);
}

#[inline(always)]
fn read_values(
    plane: &mut Plane,
    step: f32,
    (side, reader): (&mut &[u8], &mut Reader<'_>),
) -> Result<(), Problem> {
    let told = take(side, 2)?;
    let base = i32::from(i16::from_le_bytes([told[0], told[1]]));
    let mut told = vec![0; plane.tokens];
    reader.get(&mut told, SIDE)?;
    let steps = steps(plane, step, |place| told[place].saturating_add(base));
    plane.read(&vec![0.0; plane.width], &steps, -quarters(step), reader)
}

#[inline(always)]
fn widen_all(bytes: &[u8], numbers: &mut [f32]) {
    for (pair, number) in bytes.chunks_exact(2).zip(numbers) {
        *number = widen(u16::from_le_bytes([pair[0], pair[1]]));
    }
}

#[inline(always)]
fn narrow_all(numbers: &[f32], bytes: &mut [u8]) {
    for (pair, number) in bytes.chunks_exact_mut(2).zip(numbers) {
        pair.copy_from_slice(&narrow(*number).to_le_bytes());
    }
}

/// Bytes of side notes for each head: tokens apart, size and class of the keys; size of the values.
const SIDE_BYTES: usize = 8 + 3 + 2;

/// Append the rows, which are finite, to `out`; the first `first` tokens are kept apart.
#[inline(always)]
pub fn encode(
    steps: Steps,
    keys: &[u8],
    values: &[u8],
    (shape, first): (&Shape, usize),
    out: &mut Vec<u8>,
) {
    let mut key_rows = vec![0.0; shape.tokens * shape.row()];
    let mut value_rows = key_rows.clone();
    widen_all(keys, &mut key_rows);
    widen_all(values, &mut value_rows);
    if let Some(turn) = Turn::new(shape) {
        turn.rows(&mut key_rows, shape.row(), true);
    }
    let mut side = Vec::with_capacity(shape.heads * SIDE_BYTES);
    let mut writer = Writer::new(2 * key_rows.len());
    let mut plane = Plane::new(shape);
    for head in 0..shape.heads {
        let at = (shape, head);
        write_keys(
            &mut plane,
            &key_rows,
            at,
            (steps.keys, first),
            (&mut side, &mut writer),
        );
        write_values(
            &mut plane,
            &value_rows,
            at,
            steps.values,
            (&mut side, &mut writer),
        );
    }
    out.extend_from_slice(&side);
    writer.finish(out);
}

/// Give the rows back, keys and then values.
#[inline(always)]
pub fn decode(steps: Steps, shape: &Shape, mut payload: &[u8]) -> Result<Vec<u8>, Problem> {
    let mut side = take(&mut payload, shape.heads * SIDE_BYTES)?;
    let streams = Streams::split(payload)?;
    let mut reader = streams.reader()?;
    let mut key_rows = vec![0.0; shape.tokens * shape.row()];
    let mut value_rows = key_rows.clone();
    let mut plane = Plane::new(shape);
    for head in 0..shape.heads {
        read_keys(&mut plane, steps.keys, (&mut side, &mut reader))?;
        plane.store(&mut key_rows, shape, head);
        read_values(&mut plane, steps.values, (&mut side, &mut reader))?;
        plane.store(&mut value_rows, shape, head);
    }
    reader.finish()?;
    if let Some(turn) = Turn::new(shape) {
        turn.rows(&mut key_rows, shape.row(), false);
    }
    let mut rows = vec![0; 2 * shape.bytes()];
    let (keys, values) = rows.split_at_mut(shape.bytes());
    narrow_all(&key_rows, keys);
    narrow_all(&value_rows, values);
    Ok(rows)
}
