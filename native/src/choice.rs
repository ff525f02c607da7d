//! The search for the winning token: truncation, and the argmax of logits and noise.

use crate::philox::{gumbel_of_draw, Noise, DRAW_BITS, GROUP, MAX_NOISE};
use crate::select::{best, Candidate};

/// How many of the likeliest tokens are first looked at to fill `top_p`, and the factor for more.
const NUCLEUS_START: usize = 64;
const NUCLEUS_GROWTH: usize = 8;

/// The largest value and the first token that has it.
pub fn argmax(x: &[f64]) -> (u32, f64) {
    // The maximum in eight strands, so that the additions of one do not wait for the other.
    let mut strands = [f64::NEG_INFINITY; 8];
    let parts = x.chunks_exact(8);
    for (i, value) in parts.remainder().iter().enumerate() {
        strands[i] = *value;
    }
    for part in parts {
        for (strand, value) in strands.iter_mut().zip(part) {
            *strand = if *value > *strand { *value } else { *strand };
        }
    }
    let max = strands.into_iter().fold(f64::NEG_INFINITY, f64::max);
    let token = x.iter().position(|value| *value == max).unwrap_or(0);
    (token as u32, max)
}

/// A distribution to choose from.
pub struct Choice<'a> {
    /// The logits, without a NaN or a negative zero.
    pub x: &'a [f64],
    /// The largest of them, which is finite.
    pub max: f64,
    /// What they are divided by; above zero.
    pub temperature: f64,
}

/// Which tokens may be chosen at all.
pub struct Truncation {
    /// Only that many of the likeliest; 0 for all.
    pub top_k: usize,
    /// Only the fewest likeliest with that share of the weight; 1 for all.
    pub top_p: f64,
    /// Only those with at least that share of the likeliest one's weight; 0 for all.
    pub min_p: f64,
}

impl Choice<'_> {
    /// The logarithm of a token's weight, relative to the likeliest token's.
    fn log_weight(&self, x: f64) -> f64 {
        (x - self.max) / self.temperature
    }

    /// A token's weight: its probability, relative to the likeliest token's.
    pub fn weight(&self, x: f64) -> f64 {
        libm::exp(self.log_weight(x))
    }

    /// Every token with its logit.
    pub fn all(&self) -> impl Iterator<Item = Candidate> + '_ {
        (0_u32..).zip(self.x).map(|(token, value)| Candidate {
            token,
            value: *value,
        })
    }

    /// The tokens that top-k, top-p and min-p leave, or `None` if they leave all.
    pub fn truncate(&self, limits: &Truncation) -> Option<Vec<Candidate>> {
        let mut kept = None;
        if limits.top_k > 0 && limits.top_k < self.x.len() {
            kept = Some(best(self.all(), limits.top_k));
        }
        if limits.top_p < 1.0 {
            kept = Some(self.nucleus(kept, limits.top_p));
        }
        if limits.min_p > 0.0 {
            kept = Some(match kept {
                Some(mut kept) => {
                    kept.retain(|candidate| self.weight(candidate.value) >= limits.min_p);
                    kept
                }
                None => {
                    // Only near the threshold is the exponential needed.
                    let certain_loss = libm::log(limits.min_p) - 1e-6;
                    self.all()
                        .filter(|candidate| {
                            self.log_weight(candidate.value) >= certain_loss
                                && self.weight(candidate.value) >= limits.min_p
                        })
                        .collect()
                }
            });
        }
        kept
    }

    /// The shortest run of the likeliest tokens whose weights add up to `top_p` of the whole.
    ///
    /// The whole is summed in ascending order of token, the run in descending order of likelihood.
    fn nucleus(&self, kept: Option<Vec<Candidate>>, top_p: f64) -> Vec<Candidate> {
        let whole: f64 = match &kept {
            Some(kept) => {
                let mut by_token = kept.clone();
                by_token.sort_unstable_by_key(|candidate| candidate.token);
                by_token
                    .iter()
                    .fold(0.0, |sum, candidate| sum + self.weight(candidate.value))
            }
            None => self.x.iter().fold(0.0, |sum, x| sum + self.weight(*x)),
        };
        let goal = top_p * whole;
        let shortest = |ranked: &[Candidate]| {
            let mut sum = 0.0;
            ranked.iter().position(|candidate| {
                sum += self.weight(candidate.value);
                sum >= goal
            })
        };
        if let Some(mut kept) = kept {
            if let Some(last) = shortest(&kept) {
                kept.truncate(last + 1);
            }
            return kept;
        }
        let mut count = NUCLEUS_START;
        loop {
            let mut ranked = best(self.all(), count);
            if let Some(last) = shortest(&ranked) {
                ranked.truncate(last + 1);
                return ranked;
            }
            if ranked.len() < count {
                return ranked;
            }
            count = count.saturating_mul(NUCLEUS_GROWTH);
        }
    }

    /// The winner among `candidates` once each has its noise.
    pub fn among(&self, candidates: &[Candidate], noise: Noise) -> Option<u32> {
        let mut winner: Option<(u32, f64)> = None;
        for Candidate { token, value } in candidates {
            let score = self.log_weight(*value) + noise.gumbel(*token);
            if winner.is_none_or(|(lead, high)| score > high || (score == high && *token < lead)) {
                winner = Some((*token, score));
            }
        }
        winner.map(|(token, _)| token)
    }

    /// The first `count` of `candidates` once each has its noise, best first.
    pub fn ranked(&self, candidates: &[Candidate], noise: Noise, count: usize) -> Vec<u32> {
        let mut scores: Vec<Candidate> = candidates
            .iter()
            .map(|Candidate { token, value }| Candidate {
                token: *token,
                value: self.log_weight(*value) + noise.gumbel(*token),
            })
            .collect();
        scores.sort_unstable_by_key(|candidate| candidate.token);
        best(scores.into_iter(), count)
            .iter()
            .map(|candidate| candidate.token)
            .collect()
    }

    /// The winner among all tokens, without computing the noise of those that cannot win.
    ///
    /// A token whose log-weight lies `gap` below the best score so far needs a noise of at least
    /// `gap`, so a draw of at least some threshold; a table of thresholds for whole gaps turns nearly all
    /// tokens away before the two logarithms.  The table errs on the safe side: the result is
    /// that of the plain search, bit for bit.
    pub fn among_all(&self, likeliest: u32, noise: Noise) -> u32 {
        let mut lead = likeliest;
        let mut high = self.log_weight(self.max) + noise.gumbel(likeliest);
        let thresholds = thresholds();
        let inverse = 1.0 / self.temperature;
        for (group, values) in (0_u32..).zip(self.x.chunks(GROUP)) {
            let mut rows = [0_usize; GROUP];
            let mut possible = false;
            for (row, x) in rows.iter_mut().zip(values) {
                let gap = high - (*x - self.max) * inverse;
                *row = table_row(gap);
                possible |= *row < LAST_ROW;
            }
            if !possible {
                continue;
            }
            let draws = noise.draws(group);
            for (lane, x) in values.iter().enumerate() {
                if draws[lane] < thresholds[rows[lane]] {
                    continue;
                }
                let token = group * GROUP as u32 + lane as u32;
                let score = self.log_weight(*x) + gumbel_of_draw(draws[lane]);
                if score > high || (score == high && token < lead) {
                    (lead, high) = (token, score);
                }
            }
        }
        lead
    }
}

/// The gap that the first row of the table stands for; no gap is smaller.
const FIRST_GAP: f64 = -4.0;

/// The row of the gaps that no noise can bridge.
const LAST_ROW: usize = 41;

const _: () = assert!(LAST_ROW as f64 + FIRST_GAP > MAX_NOISE);

/// The row of a gap: that of the whole number below it. A gap that is not a number goes to row 0.
fn table_row(gap: f64) -> usize {
    let offset = gap - FIRST_GAP;
    if offset >= LAST_ROW as f64 {
        LAST_ROW
    } else {
        // Truncation, with negative and undefined offsets at 0.
        offset as i32 as u32 as usize
    }
}

/// For each row, a draw below which the noise is certainly less than the gap.
fn thresholds() -> [u64; LAST_ROW + 1] {
    let scale = (1_u64 << DRAW_BITS) as f64;
    std::array::from_fn(|row| {
        if row == LAST_ROW {
            return 1 << DRAW_BITS;
        }
        // The noise reaches `gap` when 1 - u is at most 1 - exp(-exp(-gap)); with some room for the
        // rounding of the gap and of the logarithms.
        let gap = FIRST_GAP + row as f64 - 1e-6;
        let reach = -libm::expm1(-libm::exp(-gap)) * (1.0 + 1e-6) + 1e-13;
        (scale * (1.0 - reach)).max(0.0) as u64
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(n: u32) -> Vec<f32> {
        (0..n)
            .map(|i| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 1e6 - 8.0)
            .collect()
    }

    #[test]
    fn leaving_noise_out_changes_nothing() {
        let x: Vec<f64> = logits(4099).iter().map(|x| f64::from(*x)).collect();
        let (likeliest, max) = argmax(&x);
        for temperature in [1e-320, 1e-3, 0.3, 0.8, 2.0, 1e300] {
            let choice = Choice {
                x: &x,
                max,
                temperature,
            };
            let all: Vec<Candidate> = choice.all().collect();
            for position in 0..200 {
                let noise = Noise::new(42, position);
                assert_eq!(
                    Some(choice.among_all(likeliest, noise)),
                    choice.among(&all, noise),
                    "temperature {temperature}, position {position}"
                );
            }
        }
    }

    #[test]
    fn every_draw_under_a_threshold_falls_short_of_the_gap() {
        for (row, threshold) in thresholds().into_iter().enumerate() {
            let gap = FIRST_GAP + row as f64;
            if threshold > 0 {
                assert!(gumbel_of_draw(threshold - 1) < gap - 5e-7, "row {row}");
            }
            assert_eq!(table_row(gap), row);
            assert_eq!(table_row(gap + 0.999), row);
        }
        assert_eq!(table_row(f64::NAN), 0);
        assert_eq!(table_row(f64::INFINITY), LAST_ROW);
    }
}
