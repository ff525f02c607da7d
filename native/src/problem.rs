//! What can be wrong with the sampler's arguments.

use std::fmt;

use pyo3::exceptions::PyValueError;
use pyo3::PyErr;

use crate::philox::MAX_TOKENS;

/// Why no token can be chosen.
#[derive(Debug, PartialEq)]
pub enum Problem {
    /// There are no logits.
    Empty,
    /// There are more logits than a vocabulary may have.
    TooMany(usize),
    /// A logit is NaN or plus infinity.
    NotFinite { token: usize, value: f32 },
    /// Every logit is minus infinity.
    NothingLeft,
    /// A parameter is out of its range.
    Range {
        name: &'static str,
        value: f64,
        low: f64,
        high: f64,
    },
    /// A token id lies outside the vocabulary.
    Token {
        name: &'static str,
        index: usize,
        token: i32,
        n_vocab: usize,
    },
    /// The tokens and the values of the bias do not pair up.
    BiasLengths { tokens: usize, values: usize },
    /// A bias is NaN or plus infinity.
    BiasValue { index: usize, value: f32 },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "logits is empty; there is no token to choose"),
            Self::TooMany(n) => {
                write!(
                    f,
                    "logits has {n} entries; there may be at most {MAX_TOKENS} tokens"
                )
            }
            Self::NotFinite { token, value } => {
                write!(
                    f,
                    "logits[{token}] is {value}; a logit must be finite or -inf"
                )
            }
            Self::NothingLeft => write!(f, "every token has the logit -inf; none can be chosen"),
            Self::Range {
                name,
                value,
                low,
                high,
            } => {
                write!(f, "{name} is {value}; it must lie between {low} and {high}")
            }
            Self::Token {
                name,
                index,
                token,
                n_vocab,
            } => {
                write!(
                    f,
                    "{name}[{index}] is {token}; tokens run from 0 to {}",
                    n_vocab - 1
                )
            }
            Self::BiasLengths { tokens, values } => {
                write!(
                    f,
                    "bias_tokens has {tokens} entries and bias_values {values}"
                )
            }
            Self::BiasValue { index, value } => {
                write!(
                    f,
                    "bias_values[{index}] is {value}; a bias must be finite or -inf"
                )
            }
        }
    }
}

impl From<Problem> for PyErr {
    fn from(problem: Problem) -> Self {
        PyValueError::new_err(problem.to_string())
    }
}

/// Check that token ids lie in the vocabulary.
pub fn check_tokens(name: &'static str, tokens: &[i32], n_vocab: usize) -> Result<(), Problem> {
    let outside = |token: &i32| usize::try_from(*token).map_or(true, |token| token >= n_vocab);
    match tokens.iter().position(outside) {
        Some(index) => Err(Problem::Token {
            name,
            index,
            token: tokens[index],
            n_vocab,
        }),
        None => Ok(()),
    }
}

/// Check that the logits are finite or minus infinity, and that there are some.
pub fn check_logits(logits: &[f32]) -> Result<(), Problem> {
    if logits.is_empty() {
        return Err(Problem::Empty);
    }
    if logits.len() > MAX_TOKENS {
        return Err(Problem::TooMany(logits.len()));
    }
    // Without a branch in the loop it runs in vector registers.
    let bad = |value: f32| value.is_nan() || value == f32::INFINITY;
    if logits.iter().fold(false, |any, value| any | bad(*value)) {
        let token = logits.iter().position(|value| bad(*value)).unwrap_or(0);
        return Err(Problem::NotFinite {
            token,
            value: logits[token],
        });
    }
    Ok(())
}
