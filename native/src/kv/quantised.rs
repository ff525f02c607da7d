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
use super::octaves::{median, quarters, scale, size_quarters, sum, whole};
use super::plane::{class_from, class_of, steps, Plane, SIDE};
use super::turn::Turn;
use super::{Problem, Shape, MAX_TOKENS};

/// Means are told in this part of a step.
const MEAN_PARTS: f32 = 2.0;
/// A token whose squared deviation is this many times the median is kept apart.
const FAR: f32 = 4.0;
/// A step is at least this part of the largest number.
const FINEST: f32 = 1.0 / 4096.0;

/// The steps of a level, in parts of the root mean square.
#[derive(Clone, Copy)]
pub struct Steps {
    /// Of a head's keys, less their means.
    pub keys: f32,
    /// Of a token's values in a head.
    pub values: f32,
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
