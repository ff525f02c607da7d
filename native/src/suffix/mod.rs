//! Guessing the next tokens of a text from what followed the same tokens earlier.

mod automaton;
mod corpus;
mod graph;
mod trust;

use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::{integer, type_name};
use automaton::{Automaton, Context, SEPARATOR};
use trust::{Guess, Trust, Wish};

pub use corpus::SuffixCorpus;

/// The most tokens that one automaton may be asked to hold.
const MAX_TOKENS: u32 = 1 << 26;
/// The most guesses at once.
const MAX_GUESSES: u32 = 1 << 16;

/// A text's own past: what followed the longest suffix of it that has occurred before.
struct Index {
    automaton: Automaton,
    text: Vec<u32>,
    max_tokens: usize,
    trust: Trust,
}

impl Index {
    fn push(&mut self, token: u32, weight: f64) {
        if weight > 0.0 {
            if let Some(found) = self.automaton.continuation(self.automaton.context()) {
                self.trust.learn(&found, found.token == token, weight);
            }
        }
        self.text.push(token);
        if self.text.len() > self.max_tokens {
            // Nothing can be taken out of an automaton: begin again with the newer half, which is
            // constant time a token over the whole text.
            self.text.drain(..self.text.len() - self.max_tokens / 2 - 1);
            self.automaton = Automaton::new();
            for token in &self.text {
                self.automaton.push(*token);
            }
        } else {
            self.automaton.push(token);
        }
    }

    fn context(&self, ahead: &[u32]) -> Context {
        ahead
            .iter()
            .fold(self.automaton.context(), |context, token| {
                self.automaton.advance(context, *token)
            })
    }

    fn guesses(&self, ahead: &[u32], wish: Wish) -> Vec<Guess> {
        self.trust
            .guesses(&self.automaton, self.context(ahead), wish)
    }

    /// Up to `wish.limit` tokens for the same place.
    fn alternatives(&self, ahead: &[u32], wish: Wish) -> Vec<Guess> {
        let context = self.context(ahead);
        let found = self
            .automaton
            .alternatives(context, wish.limit, wish.min_match);
        let mut left = 1.0;
        let mut guesses = Vec::new();
        for other in &found {
            // each one only counts where those before it are wrong
            let confidence = left * self.trust.confidence(other);
            if confidence < wish.floor {
                break;
            }
            left -= confidence;
            guesses.push(Guess {
                token: other.token,
                confidence,
            });
        }
        guesses
    }
}

/// The tokens of a session, and what may come next by them.
#[pyclass(module = "pyagent_node.native")]
pub struct SuffixIndex(Index);

#[pymethods]
impl SuffixIndex {
    #[new]
    #[pyo3(signature = (max_tokens))]
    fn new(max_tokens: &Bound<'_, PyAny>) -> PyResult<Self> {
        let max_tokens = between("max_tokens", max_tokens, 2, MAX_TOKENS)?;
        Ok(Self(Index {
            automaton: Automaton::new(),
            text: Vec::new(),
            max_tokens: max_tokens as usize,
            trust: Trust::default(),
        }))
    }

    /// Add tokens to the text.
    #[pyo3(signature = (tokens, weight = 1.0))]
    fn extend(&mut self, tokens: &Bound<'_, PyAny>, weight: f64) -> PyResult<()> {
        let tokens = token_list("tokens", tokens)?;
        if !(0.0..=1.0).contains(&weight) {
            return Err(PyValueError::new_err(format!(
                "weight is {weight}; it must lie between 0 and 1"
            )));
        }
        for token in tokens {
            self.0.push(token, weight);
        }
        Ok(())
    }

    /// Guess what comes after the text and `ahead`.
    #[pyo3(signature = (ahead, limit, min_match, floor = 0.0))]
    fn propose(
        &self,
        ahead: &Bound<'_, PyAny>,
        limit: &Bound<'_, PyAny>,
        min_match: &Bound<'_, PyAny>,
        floor: f64,
    ) -> PyResult<(Vec<u32>, Vec<f64>)> {
        let ahead = token_list("ahead", ahead)?;
        Ok(unzip(
            self.0.guesses(&ahead, wish(limit, min_match, floor)?),
        ))
    }

    /// Guess the token after the text and `ahead` in several ways.
    #[pyo3(signature = (ahead, limit, min_match, floor = 0.0))]
    fn alternatives(
        &self,
        ahead: &Bound<'_, PyAny>,
        limit: &Bound<'_, PyAny>,
        min_match: &Bound<'_, PyAny>,
        floor: f64,
    ) -> PyResult<(Vec<u32>, Vec<f64>)> {
        let ahead = token_list("ahead", ahead)?;
        Ok(unzip(
            self.0.alternatives(&ahead, wish(limit, min_match, floor)?),
        ))
    }

    /// How many of the last tokens have occurred in the same order earlier.
    #[getter]
    fn matched(&self) -> u32 {
        self.0.automaton.context().length
    }

    /// How many tokens are remembered.
    fn __len__(&self) -> usize {
        self.0.automaton.tokens()
    }

    /// The memory that is reserved for it, in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.automaton.bytes() + self.0.text.capacity() * size_of::<u32>()
    }
}

fn unzip(guesses: Vec<Guess>) -> (Vec<u32>, Vec<f64>) {
    guesses.iter().map(|g| (g.token, g.confidence)).unzip()
}

fn wish(limit: &Bound<'_, PyAny>, min_match: &Bound<'_, PyAny>, floor: f64) -> PyResult<Wish> {
    if floor.is_nan() {
        return Err(PyValueError::new_err("floor is not a number"));
    }
    Ok(Wish {
        limit: between("limit", limit, 0, MAX_GUESSES)? as usize,
        floor,
        min_match: between("min_match", min_match, 1, MAX_TOKENS)?,
    })
}

/// Take an integer from a range.
fn between(name: &str, object: &Bound<'_, PyAny>, low: u32, high: u32) -> PyResult<u32> {
    let value = integer::<u32>(name, object)?;
    if (low..=high).contains(&value) {
        return Ok(value);
    }
    Err(PyValueError::new_err(format!(
        "{name} is {value}; it must lie between {low} and {high}"
    )))
}

/// Take a sequence of tokens; none may be the separator's number.
fn token_list(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let items = object.try_iter().map_err(|_| {
        PyTypeError::new_err(format!(
            "{name} must be a sequence of tokens, not {}",
            type_name(object)
        ))
    })?;
    let mut tokens = Vec::with_capacity(object.len().unwrap_or(0));
    for item in items {
        let token = integer::<u32>(name, &item?)?;
        if token == SEPARATOR {
            return Err(PyValueError::new_err(format!(
                "{name} holds {token}, which is no token"
            )));
        }
        tokens.push(token);
    }
    Ok(tokens)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(max_tokens: usize) -> Index {
        Index {
            automaton: Automaton::new(),
            text: Vec::new(),
            max_tokens,
            trust: Trust::default(),
        }
    }

    const ANY: Wish = Wish {
        limit: 8,
        floor: 0.0,
        min_match: 1,
    };

    #[test]
    fn the_older_half_is_forgotten() {
        let mut index = index(8);
        for token in 0..100 {
            index.push(token, 1.0);
            assert!(index.text.len() <= 8);
            assert_eq!(index.automaton.tokens(), index.text.len());
        }
        assert_eq!(index.text.last(), Some(&99));
        assert!(index.guesses(&[3], ANY).is_empty());
    }

    #[test]
    fn it_goes_on_as_before() {
        let mut index = index(1000);
        for token in [5, 6, 7, 8, 9, 1, 5, 6] {
            index.push(token, 0.0);
        }
        let tokens = |guesses: Vec<Guess>| guesses.iter().map(|g| g.token).collect::<Vec<_>>();
        assert_eq!(tokens(index.guesses(&[], ANY))[..4], [7, 8, 9, 1]);
        assert_eq!(tokens(index.guesses(&[7, 8], ANY))[..2], [9, 1]);
        assert!(index.guesses(&[4], ANY).is_empty());
    }
}
