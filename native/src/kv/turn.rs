//! Undoing the rotation of keys by position (RoPE: Su et al., arXiv:2104.09864), and doing it again.
//!
//! A rotated key is the sum of a rotated constant and a rotated difference; turned back, the constant
//! is the same for all tokens and costs nothing to tell again.  Only differences of position matter,
//! so the block's place in the text is not needed.

use super::Shape;

/// Angles of the next token's pairs, for [`Turn::rows`].
pub struct Turn {
    /// Cosine and sine of a step, one of each a pair.
    step: Vec<(f32, f32)>,
    halves: bool,
    width: usize,
}

impl Turn {
    /// The rotation of `shape`, or `None` when it is not known.
    pub fn new(shape: &Shape) -> Option<Self> {
        if !shape.turns() {
            return None;
        }
        let pairs = shape.width / 2;
        let base = f64::from(shape.rope_base);
        let step = (0..pairs)
            .map(|pair| {
                let angle = libm::pow(base, -(pair as f64) / pairs as f64);
                (libm::cos(angle) as f32, libm::sin(angle) as f32)
            })
            .collect();
        Some(Self {
            step,
            halves: shape.halves,
            width: shape.width,
        })
    }

    /// Rotate each row of `rows` by its number; backwards with `back`.
    #[inline(always)]
    pub fn rows(&self, rows: &mut [f32], row: usize, back: bool) {
        let pairs = self.step.len();
        let mut cosines = vec![1.0_f32; pairs];
        let mut sines = vec![0.0_f32; pairs];
        for row in rows.chunks_exact_mut(row) {
            for head in row.chunks_exact_mut(self.width) {
                if self.halves {
                    let (first, second) = head.split_at_mut(pairs);
                    for (((a, b), c), s) in first.iter_mut().zip(second).zip(&cosines).zip(&sines) {
                        (*a, *b) = (*a * c - *b * s, *a * s + *b * c);
                    }
                } else {
                    for ((pair, c), s) in head.chunks_exact_mut(2).zip(&cosines).zip(&sines) {
                        (pair[0], pair[1]) = (pair[0] * c - pair[1] * s, pair[0] * s + pair[1] * c);
                    }
                }
            }
            for ((c, s), (step_c, step_s)) in cosines.iter_mut().zip(&mut sines).zip(&self.step) {
                let step_s = if back { -step_s } else { *step_s };
                (*c, *s) = (*c * step_c - *s * step_s, *c * step_s + *s * step_c);
            }
        }
    }
}
