//! Choosing a token from logits, seeded by position.
//!
//! The token at a position is the argmax of `(x - max x) / temperature + noise(seed, position,
//! token)` over the tokens that truncation left, where `x` are the logits after bias and penalties and
//! the noise is Gumbel's: exact sampling from the softmax (the Gumbel-max trick), yet a function of
//! its arguments alone.  All arithmetic is in doubles, in an order that is fixed and written
//! down here, with `libm` for `exp` and `ln`, so that every platform chooses the same token.

use std::cell::RefCell;

use pyo3::prelude::*;

use crate::buffers::{integer, vector};
use crate::choice::{argmax, Choice, Truncation};
use crate::philox::Noise;
use crate::problem::{check_logits, check_tokens, Problem};
use crate::select::best;

/// Penalties beyond this are refused, so that no logit can overflow.
const MAX_PENALTY: f64 = 1e9;

/// How many of the likeliest tokens may be runners-up where nothing is truncated.
const LIKELY: usize = 256;

/// What shapes the choice.
pub struct Params<'a> {
    pub seed: u64,
    pub temperature: f64,
    pub top_k: usize,
    pub top_p: f64,
    pub min_p: f64,
    pub repetition_penalty: f64,
    pub frequency_penalty: f64,
    pub presence_penalty: f64,
    pub bias_tokens: &'a [i32],
    pub bias_values: &'a [f32],
}

impl Params<'_> {
    /// Check every field that has a range of its own.
    fn check(&self) -> Result<(), Problem> {
        let ranges = [
            ("temperature", self.temperature, 0.0, f64::MAX),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            (
                "repetition_penalty",
                self.repetition_penalty,
                1.0 / MAX_PENALTY,
                MAX_PENALTY,
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                -MAX_PENALTY,
                MAX_PENALTY,
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                -MAX_PENALTY,
                MAX_PENALTY,
            ),
        ];
        for (name, value, low, high) in ranges {
            if !(low..=high).contains(&value) {
                return Err(Problem::Range {
                    name,
                    value,
                    low,
                    high,
                });
            }
        }
        let (tokens, values) = (self.bias_tokens.len(), self.bias_values.len());
        if tokens != values {
            return Err(Problem::BiasLengths { tokens, values });
        }
        Ok(())
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0
            || self.frequency_penalty != 0.0
            || self.presence_penalty != 0.0
    }
}

/// Working memory that is kept between calls: a fresh half megabyte costs as much as the sampling.
#[derive(Default)]
struct Scratch {
    /// The logits as doubles, then with bias and penalties.
    x: Vec<f64>,
    /// How often each token is in the history; all zero between calls.
    counts: Vec<u32>,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::default();
}

/// Bias, then repetition, frequency and presence penalties, on the logits in `scratch.x`.
///
/// The repetition penalty divides a positive logit and multiplies another one, once for each distinct
/// token of the history; the frequency penalty is taken off once for each occurrence, the presence
/// penalty once for each distinct token.
fn shape(scratch: &mut Scratch, history: &[i32], params: &Params<'_>) -> Result<(), Problem> {
    let n = scratch.x.len();
    check_tokens("bias_tokens", params.bias_tokens, n)?;
    check_tokens("history", history, n)?;
    for (index, (token, value)) in params
        .bias_tokens
        .iter()
        .zip(params.bias_values)
        .enumerate()
    {
        if value.is_nan() || *value == f32::INFINITY {
            return Err(Problem::BiasValue {
                index,
                value: *value,
            });
        }
        scratch.x[*token as usize] += f64::from(*value);
    }
    if !params.penalises() {
        return Ok(());
    }
    if scratch.counts.len() < n {
        scratch.counts.resize(n, 0);
    }
    for token in history {
        let count = &mut scratch.counts[*token as usize];
        *count = count.saturating_add(1);
    }
    for token in history {
        let token = *token as usize;
        let count = std::mem::take(&mut scratch.counts[token]);
        if count > 0 {
            let x = scratch.x[token];
            let x = if x > 0.0 {
                x / params.repetition_penalty
            } else {
                x * params.repetition_penalty
            };
            let x = x - f64::from(count) * params.frequency_penalty;
            // Adding zero turns a negative zero into a positive one: they must rank alike.
            scratch.x[token] = (x - params.presence_penalty) + 0.0;
        }
    }
    Ok(())
}

/// Choose the token at `position`.
pub fn choose(
    logits: &[f32],
    history: &[i32],
    position: u64,
    params: &Params<'_>,
) -> Result<u32, Problem> {
    check_logits(logits)?;
    params.check()?;
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.x.clear();
        scratch.x.extend(logits.iter().map(|x| f64::from(*x) + 0.0));
        shape(scratch, history, params)?;
        let x = scratch.x.as_slice();
        let (likeliest, max) = argmax(x);
        if max == f64::NEG_INFINITY {
            return Err(Problem::NothingLeft);
        }
        if params.temperature == 0.0 {
            return Ok(likeliest);
        }
        let choice = Choice {
            x,
            max,
            temperature: params.temperature,
        };
        let noise = Noise::new(params.seed, position);
        let limits = Truncation {
            top_k: params.top_k,
            top_p: params.top_p,
            min_p: params.min_p,
        };
        Ok(match choice.truncate(&limits) {
            // Truncation always leaves the likeliest token.
            Some(kept) => choice.among(&kept, noise).unwrap_or(likeliest),
            None => choice.among_all(likeliest, noise),
        })
    })
}

/// The tokens that come next after the chosen one at `position`, `count` in all with that one.
///
/// Where nothing is truncated only the [`LIKELY`] likeliest are looked at for others than the chosen
/// one.
pub fn runners_up(
    logits: &[f32],
    history: &[i32],
    position: u64,
    params: &Params<'_>,
    count: usize,
) -> Result<Vec<u32>, Problem> {
    let chosen = choose(logits, history, position, params)?;
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.x.clear();
        scratch.x.extend(logits.iter().map(|x| f64::from(*x) + 0.0));
        shape(scratch, history, params)?;
        let x = scratch.x.as_slice();
        let choice = Choice {
            x,
            max: argmax(x).1,
            temperature: params.temperature,
        };
        let mut ranked = if params.temperature == 0.0 {
            best(choice.all(), count).iter().map(|c| c.token).collect()
        } else {
            let limits = Truncation {
                top_k: params.top_k,
                top_p: params.top_p,
                min_p: params.min_p,
            };
            let kept = choice
                .truncate(&limits)
                .unwrap_or_else(|| best(choice.all(), LIKELY));
            choice.ranked(&kept, Noise::new(params.seed, position), count)
        };
        ranked.retain(|token| *token != chosen);
        ranked.insert(0, chosen);
        ranked.truncate(count);
        Ok(ranked)
    })
}

/// Log-probabilities of the model's own distribution, of `tokens`.
fn logprobs_of(logits: &[f32], tokens: &[u32]) -> Vec<(u32, f64)> {
    let (first, _) = logprobs(logits, tokens[0], 0);
    let x = |token: u32| f64::from(logits[token as usize]);
    // of the same sum: what they differ by is what the logits differ by
    let logprob = |token: &u32| (*token, first + (x(*token) - x(tokens[0])));
    tokens.iter().map(logprob).collect()
}

/// Log-probabilities of the model's own distribution: of `token`, and of the `top` likeliest tokens.
pub fn logprobs(logits: &[f32], token: u32, top: usize) -> (f64, Vec<(u32, f64)>) {
    SCRATCH.with_borrow_mut(|scratch| {
        scratch.x.clear();
        scratch.x.extend(logits.iter().map(|x| f64::from(*x) + 0.0));
        let choice = Choice {
            x: &scratch.x,
            max: argmax(&scratch.x).1,
            temperature: 1.0,
        };
        let sum = choice.x.iter().fold(0.0, |sum, x| sum + choice.weight(*x));
        let normaliser = libm::log(sum);
        let logprob = |x: f64| (x - choice.max) - normaliser;
        let likeliest = best(choice.all(), top);
        (
            logprob(choice.x[token as usize]),
            likeliest
                .iter()
                .map(|c| (c.token, logprob(c.value)))
                .collect(),
        )
    })
}

/// A token, its log-probability, and the likeliest tokens with theirs.
type Chosen = (u32, f64, Vec<(u32, f64)>);

/// Choose a token; see the typed stub for the meaning of every argument.
#[pyfunction]
#[pyo3(signature = (
    logits, history, position, *, seed, temperature, top_k, top_p, min_p, repetition_penalty,
    frequency_penalty, presence_penalty, bias_tokens, bias_values, top_logprobs, noisy = false
))]
#[allow(clippy::too_many_arguments)]
pub fn sample(
    py: Python<'_>,
    logits: &Bound<'_, PyAny>,
    history: &Bound<'_, PyAny>,
    position: &Bound<'_, PyAny>,
    seed: &Bound<'_, PyAny>,
    temperature: f64,
    top_k: &Bound<'_, PyAny>,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
    frequency_penalty: f64,
    presence_penalty: f64,
    bias_tokens: &Bound<'_, PyAny>,
    bias_values: &Bound<'_, PyAny>,
    top_logprobs: &Bound<'_, PyAny>,
    noisy: bool,
) -> PyResult<Chosen> {
    let logits = vector::<f32>("logits", logits)?;
    let history = vector::<i32>("history", history)?;
    let bias_tokens = vector::<i32>("bias_tokens", bias_tokens)?;
    let bias_values = vector::<f32>("bias_values", bias_values)?;
    let position: u64 = integer("position", position)?;
    let top_logprobs = match top_logprobs.extract::<i8>() {
        Ok(-1) => None,
        _ => Some(integer::<u32>("top_logprobs (or -1)", top_logprobs)? as usize),
    };
    let params = Params {
        seed: integer("seed", seed)?,
        temperature,
        top_k: integer::<u32>("top_k", top_k)? as usize,
        top_p,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        bias_tokens: bias_tokens.as_slice()?,
        bias_values: bias_values.as_slice()?,
    };
    let (logits, history) = (logits.as_slice()?, history.as_slice()?);
    py.detach(|| {
        if let (Some(count), true) = (top_logprobs, noisy) {
            let ranked = runners_up(logits, history, position, &params, count.max(1))?;
            let top = logprobs_of(logits, &ranked);
            return Ok((top[0].0, top[0].1, top));
        }
        let token = choose(logits, history, position, &params)?;
        let (logprob, top) = match top_logprobs {
            Some(top) => logprobs(logits, token, top),
            None => (f64::NAN, Vec::new()),
        };
        Ok((token, logprob, top))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Params<'_> = Params {
        seed: 7,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        min_p: 0.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        bias_tokens: &[],
        bias_values: &[],
    };

    #[test]
    fn ties_go_to_the_lowest_token() {
        let greedy = Params {
            temperature: 0.0,
            ..PLAIN
        };
        assert_eq!(choose(&[1.0, 3.0, 3.0], &[], 0, &greedy), Ok(1));
        assert_eq!(choose(&[-0.0, 0.0], &[], 0, &greedy), Ok(0));
        assert_eq!(choose(&[f32::NEG_INFINITY, -1.0], &[], 0, &greedy), Ok(1));
    }

    #[test]
    fn runners_up_are_those_that_win_without_the_ones_before_them() {
        let mut logits = [0.3, 2.0, 1.5, 1.9, -4.0, 0.0, 1.0];
        for temperature in [0.0, 0.7] {
            let params = Params {
                temperature,
                presence_penalty: 0.4,
                ..PLAIN
            };
            for position in 0..100 {
                let kept = logits;
                let ranked = runners_up(&logits, &[2, 2], position, &params, 4).unwrap();
                assert_eq!(ranked.len(), 4);
                for token in ranked {
                    assert_eq!(choose(&logits, &[2, 2], position, &params), Ok(token));
                    logits[token as usize] = f32::NEG_INFINITY;
                }
                logits = kept;
            }
        }
    }

    #[test]
    fn counts_are_clean_after_a_call() {
        let params = Params {
            temperature: 0.0,
            presence_penalty: 1.5,
            ..PLAIN
        };
        assert_eq!(choose(&[1.0, 2.0], &[1, 1], 0, &params), Ok(0));
        assert_eq!(choose(&[1.0, 2.0], &[], 0, &params), Ok(1));
    }

    #[test]
    fn a_zero_top_p_leaves_the_likeliest() {
        let params = Params {
            top_p: 0.0,
            ..PLAIN
        };
        for position in 0..50 {
            assert_eq!(choose(&[1.0, 2.0, 2.0], &[], position, &params), Ok(1));
        }
    }
}
