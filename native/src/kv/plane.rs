//! One head of a block as the lossy levels code it: channel by channel, in steps by token.

use super::numbers::{Reader, Writer};
use super::octaves::{quarters, scale, sum, whole};
use super::tables::NARROWEST;
use super::{Problem, Shape, MAX_TOKENS};

/// The class of numbers about numbers: a deviation of four.
pub const SIDE: i32 = 8;
/// The widest class that a block may tell.
const WIDEST_TOLD: i32 = 100;
/// So much finer are the steps of tokens that are kept apart.
const FINER: f32 = 8.0;

/// One head, channel by channel: `numbers[channel * tokens + place]`.
///
/// `order` are the tokens by place: first those that are coded by channel, `kept` of them, then those
/// that are kept apart.
pub struct Plane {
    pub numbers: Vec<f32>,
    pub width: usize,
    order: [usize; MAX_TOKENS],
    pub tokens: usize,
    pub kept: usize,
}

impl Plane {
    pub fn new(shape: &Shape) -> Self {
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
    pub fn part(&mut self, apart: u64) {
        let is_apart = |token: &usize| apart >> token & 1 == 1;
        let kept = (0..self.tokens).filter(|token| !is_apart(token));
        let order = kept.chain((0..self.tokens).filter(is_apart));
        for (place, token) in self.order.iter_mut().zip(order) {
            *place = token;
        }
        self.kept = self.tokens - apart.count_ones() as usize;
    }

    #[inline(always)]
    pub fn load(&mut self, rows: &[f32], shape: &Shape, head: usize) {
        for (place, token) in self.order[..self.tokens].iter().enumerate() {
            let row = &rows[token * shape.row() + head * shape.width..][..shape.width];
            for (channel, value) in self.numbers.chunks_exact_mut(self.tokens).zip(row) {
                channel[place] = *value;
            }
        }
    }

    #[inline(always)]
    pub fn store(&self, rows: &mut [f32], shape: &Shape, head: usize) {
        for (place, token) in self.order[..self.tokens].iter().enumerate() {
            let row = &mut rows[token * shape.row() + head * shape.width..][..shape.width];
            for (channel, value) in self.numbers.chunks_exact(self.tokens).zip(row) {
                *value = channel[place];
            }
        }
    }

    #[inline(always)]
    pub fn means(&self) -> Vec<f32> {
        let share = 1.0 / self.kept.max(1) as f32;
        self.numbers
            .chunks_exact(self.tokens)
            .map(|channel| sum(&channel[..self.kept]) * share)
            .collect()
    }

    /// The mean square of each token's distance from `means`, by place.
    #[inline(always)]
    pub fn powers(&self, means: &[f32]) -> [f32; MAX_TOKENS] {
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
    pub fn write(
        &self,
        means: &[f32],
        steps: &[f32; MAX_TOKENS],
        centre: i32,
        writer: &mut Writer,
    ) {
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
    pub fn read(
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
pub fn class_of(power: f32) -> i32 {
    quarters(power.sqrt().max(1e-2)).clamp(NARROWEST, WIDEST_TOLD)
}

/// The class that was told as a difference.
pub fn class_from(told: i32, centre: i32) -> Result<i32, Problem> {
    match told.checked_add(centre) {
        Some(class @ NARROWEST..=WIDEST_TOLD) => Ok(class),
        _ => Err(Problem::Damaged("a channel is impossibly wide")),
    }
}

/// Steps of all places: `size` by place, in parts of `step`, finer for those kept apart.
pub fn steps(plane: &Plane, step: f32, size: impl Fn(usize) -> i32) -> [f32; MAX_TOKENS] {
    let mut steps = [1.0; MAX_TOKENS];
    for (place, found) in steps[..plane.tokens].iter_mut().enumerate() {
        let finer = if place < plane.kept { 1.0 } else { 1.0 / FINER };
        *found = step * finer * scale(size(place));
    }
    steps
}
