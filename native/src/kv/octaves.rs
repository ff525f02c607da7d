//! Arithmetic of the lossy levels: sizes in quarters of an octave, rounding, sums.
//!
//! Nothing here depends on how it is compiled: the same bits everywhere.

use super::MAX_TOKENS;

/// What counts as the size of numbers that are all zero.
const SMALLEST: f32 = 1e-9;
/// Adding and subtracting it rounds to an integer.
const ROUND: f32 = 12_582_912.0;

/// log2 in quarters, rounded, of a positive number that is not subnormal.
pub fn quarters(value: f32) -> i32 {
    /// 2^(1/8), 2^(3/8), 2^(5/8), 2^(7/8): where rounding goes up.
    const BOUNDS: [f32; 4] = [1.090_507_7, 1.296_839_6, 1.542_210_8, 1.834_008_1];
    let bits = value.to_bits();
    let power = (bits >> 23 & 0xff) as i32 - 127;
    let part = f32::from_bits(bits & 0x007f_ffff | 0x3f80_0000);
    4 * power + BOUNDS.iter().filter(|bound| part > **bound).count() as i32
}

/// The sum, in eight parts, so that it runs in vector registers.
#[inline(always)]
pub fn sum(numbers: &[f32]) -> f32 {
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
pub fn scale(quarters: i32) -> f32 {
    const PARTS: [f32; 4] = [1.0, 1.189_207_1, std::f32::consts::SQRT_2, 1.681_792_8];
    let power = (quarters >> 2).clamp(-100, 100);
    f32::from_bits(((127 + power) as u32) << 23) * PARTS[(quarters & 3) as usize]
}

/// The nearest integer; `value` is far below 2^22.
#[inline(always)]
pub fn whole(value: f32) -> i32 {
    let sum = value.clamp(-4e6, 4e6) + ROUND;
    sum.to_bits() as i32 - ROUND.to_bits() as i32
}

/// log2 in quarters of a size; zero counts as very small.
pub fn size_quarters(size: f32) -> i32 {
    quarters(size.max(SMALLEST))
}

/// The middle one of some positive numbers (the lower of two).
pub fn median(numbers: &[f32]) -> f32 {
    let mut sorted = [0.0; MAX_TOKENS];
    let sorted = &mut sorted[..numbers.len()];
    sorted.copy_from_slice(numbers);
    *sorted
        .select_nth_unstable_by((numbers.len() - 1) / 2, f32::total_cmp)
        .1
}
