//! Many texts in a bounded amount of memory; the oldest are forgotten.

use std::collections::VecDeque;

use pyo3::prelude::*;

use crate::suffix::automaton::{Automaton, Context, ROOT, SEPARATOR};
use crate::suffix::trust::{Guess, Trust, Wish};
use crate::suffix::{between, token_list, unzip, wish};

/// Automata are closed at this part of the memory, so one may double once more within a quarter.
const PART: usize = 8;
/// How many of the last tokens are looked for.
const TAIL: usize = 64;
/// How many tokens of a document are in two automata when it is cut.
const OVERLAP: usize = 16;
const EMPTY: Context = Context {
    state: ROOT,
    length: 0,
};

/// Documents in automata of their own: nothing can be taken out of an automaton, so whole ones go.
struct Corpus {
    closed: VecDeque<Automaton>,
    open: Automaton,
    max_bytes: usize,
    trust: Trust,
}

impl Corpus {
    fn bytes(&self) -> usize {
        self.closed.iter().map(Automaton::bytes).sum::<usize>() + self.open.bytes()
    }

    fn tokens(&self) -> usize {
        self.closed.iter().map(Automaton::tokens).sum::<usize>() + self.open.tokens()
    }

    fn add(&mut self, document: &[u32]) {
        for (at, token) in document.iter().enumerate() {
            if self.open.bytes() >= self.max_bytes / PART {
                self.close();
                // What follows the cut must be found by what came before it.
                let begin = at.saturating_sub(OVERLAP);
                document[begin..at].iter().for_each(|t| self.open.push(*t));
            }
            self.open.push(*token);
        }
        self.open.push(SEPARATOR);
    }

    fn close(&mut self) {
        let mut full = std::mem::replace(&mut self.open, Automaton::new());
        full.shrink();
        self.closed.push_back(full);
        let held =
            |closed: &VecDeque<Automaton>| -> usize { closed.iter().map(Automaton::bytes).sum() };
        while held(&self.closed) > self.max_bytes - 2 * self.max_bytes / PART {
            self.closed.pop_front();
        }
    }

    /// What followed the longest suffix of `tail` in any document; of equals, in the newest.
    fn guesses(&self, tail: &[u32], wish: Wish) -> Vec<Guess> {
        let tail = &tail[tail.len().saturating_sub(TAIL)..];
        let mut best: Option<(&Automaton, Context)> = None;
        for automaton in self.closed.iter().chain([&self.open]) {
            let context = tail
                .iter()
                .fold(EMPTY, |context, token| automaton.advance(context, *token));
            let Some(found) = automaton.continuation(context) else {
                continue;
            };
            if best.is_none_or(|(_, context)| found.context.length >= context.length) {
                best = Some((automaton, found.context));
            }
        }
        best.map_or_else(Vec::new, |(automaton, context)| {
            self.trust.guesses(automaton, context, wish)
        })
    }
}

/// The texts of past sessions, and what may come next by them.
#[pyclass(module = "pyagent_node.native")]
pub struct SuffixCorpus(Corpus);

#[pymethods]
impl SuffixCorpus {
    #[new]
    #[pyo3(signature = (max_bytes))]
    fn new(max_bytes: &Bound<'_, PyAny>) -> PyResult<Self> {
        let max_bytes = between("max_bytes", max_bytes, 1 << 16, 1 << 31)?;
        Ok(Self(Corpus {
            closed: VecDeque::new(),
            open: Automaton::new(),
            max_bytes: max_bytes as usize,
            trust: Trust::default(),
        }))
    }

    /// Add a text.
    #[pyo3(signature = (tokens))]
    fn add(&mut self, py: Python<'_>, tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let tokens = token_list("tokens", tokens)?;
        py.detach(|| self.0.add(&tokens));
        Ok(())
    }

    /// Guess what comes after `tail`, the last tokens of another text.
    #[pyo3(signature = (tail, limit, min_match, floor = 0.0))]
    fn propose(
        &self,
        tail: &Bound<'_, PyAny>,
        limit: &Bound<'_, PyAny>,
        min_match: &Bound<'_, PyAny>,
        floor: f64,
    ) -> PyResult<(Vec<u32>, Vec<f64>)> {
        let tail = token_list("tail", tail)?;
        Ok(unzip(self.0.guesses(&tail, wish(limit, min_match, floor)?)))
    }

    /// How many tokens are remembered.
    fn __len__(&self) -> usize {
        self.0.tokens()
    }

    /// The memory that is reserved for it, in bytes.
    #[getter]
    fn nbytes(&self) -> usize {
        self.0.bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: Wish = Wish {
        limit: 3,
        floor: 0.0,
        min_match: 2,
    };

    fn corpus(max_bytes: usize) -> Corpus {
        Corpus {
            closed: VecDeque::new(),
            open: Automaton::new(),
            max_bytes,
            trust: Trust::default(),
        }
    }

    fn tokens(guesses: &[Guess]) -> Vec<u32> {
        guesses.iter().map(|guess| guess.token).collect()
    }

    #[test]
    fn memory_is_bounded_and_the_oldest_go() {
        let mut corpus = corpus(1 << 16);
        corpus.add(&[1, 2, 3, 4]);
        assert_eq!(tokens(&corpus.guesses(&[9, 1, 2], ANY)), [3, 4]);
        let mut seed = 1_u64;
        for document in 0..200_u32 {
            let text: Vec<u32> = (0..100)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    10 + ((seed >> 33) % 40) as u32
                })
                .collect();
            corpus.add(&text);
            assert!(corpus.bytes() <= 1 << 16, "{document}: {}", corpus.bytes());
            let tail = &text[90..97];
            assert_eq!(tokens(&corpus.guesses(tail, ANY)), text[97..]);
        }
        assert!(corpus.closed.len() > 1);
        assert!(corpus.guesses(&[9, 1, 2], ANY).is_empty());
    }

    #[test]
    fn a_guess_ends_with_its_document() {
        let mut corpus = corpus(1 << 20);
        corpus.add(&[1, 2, 3]);
        corpus.add(&[4, 5, 6]);
        assert_eq!(tokens(&corpus.guesses(&[1, 2], ANY)), [3]);
    }
}
