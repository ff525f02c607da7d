//! How far a continuation can be trusted: by the length of its context and how sure that one is,
//! corrected by how often such continuations turned out right.

use crate::suffix::automaton::{Automaton, Context, Continuation};

/// Lengths of contexts from which the next group begins.
const LENGTHS: [u32; 9] = [2, 3, 4, 6, 8, 12, 16, 24, 48];
/// Kinds of counts; see [`kind`].
const KINDS: usize = 6;
/// What is believed beforehand weighs as much as this many outcomes.
const PRIOR: f64 = 4.0;
/// What is left of an outcome's weight after the next one of its kind: about the last 50 count.
const MEMORY: f64 = 0.98;
/// Of a context of one token that was seen once; see [`belief`].
const ODDS: f64 = 0.5;
const REPEATED: f64 = 1.5;
const DIVIDED: f64 = 1.7;
const LOWEST: f64 = 0.001;
const HIGHEST: f64 = 0.999;

/// A guessed token and the probability that it is right given that those before it are.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Guess {
    /// The token.
    pub token: u32,
    /// The probability.
    pub confidence: f64,
}

/// What to look for, and when to stop.
#[derive(Clone, Copy, Debug)]
pub struct Wish {
    /// The most guesses.
    pub limit: usize,
    /// Stop where all guesses together are less likely than this.
    pub floor: f64,
    /// Stop where less than this many tokens match.
    pub min_match: u32,
}

#[derive(Clone, Copy, Default)]
struct Cell {
    hits: f64,
    trials: f64,
}

/// What has been learnt about continuations.
#[derive(Clone, Default)]
pub struct Trust {
    cells: [[Cell; KINDS]; LENGTHS.len() + 1],
}

fn group(length: u32) -> usize {
    LENGTHS.iter().filter(|from| length >= **from).count()
}

/// Seen once; always the same, a few times or often; mostly, often or seldom the same.
fn kind(found: &Continuation) -> usize {
    let (count, total) = (u64::from(found.count), u64::from(found.total));
    match () {
        () if total <= 1 => 0,
        () if count == total => 1 + usize::from(total >= 4),
        () if count * 4 >= total * 3 => 3,
        () if count * 2 >= total => 4,
        () => 5,
    }
}

/// What is believed before anything was seen.
///
/// What has always been the same is right with odds that grow with the length of the context, and
/// faster with how often it was seen; of what went on in several ways the likeliest is right less
/// often than its share. Fitted by eye to answers of two models and to source code and documents: a
/// run of n tokens that was seen once goes on as before with odds of n to 2, whatever the text.
fn belief(found: &Continuation) -> f64 {
    let count = f64::from(found.count);
    if found.count == found.total {
        let odds = ODDS * f64::from(found.context.length) * count.powf(REPEATED);
        return odds / (odds + 1.0);
    }
    (count / f64::from(found.total)).powf(DIVIDED)
}

impl Trust {
    /// The probability that `found` is what comes.
    pub fn confidence(&self, found: &Continuation) -> f64 {
        let cell = self.cells[group(found.context.length)][kind(found)];
        let mean = (cell.hits + PRIOR * belief(found)) / (cell.trials + PRIOR);
        mean.clamp(LOWEST, HIGHEST)
    }

    /// Learn whether `found` was what came; an outcome of a weight below 1 counts for less.
    pub fn learn(&mut self, found: &Continuation, right: bool, weight: f64) {
        let cell = &mut self.cells[group(found.context.length)][kind(found)];
        cell.hits = cell.hits * MEMORY + if right { weight } else { 0.0 };
        cell.trials = cell.trials * MEMORY + weight;
    }

    /// Follow the likeliest continuations of `context`.
    pub fn guesses(&self, automaton: &Automaton, context: Context, wish: Wish) -> Vec<Guess> {
        let mut guesses = Vec::new();
        let mut context = context;
        let mut all = 1.0;
        while guesses.len() < wish.limit {
            let Some(found) = automaton.continuation(context) else {
                break;
            };
            if found.context.length < wish.min_match {
                break;
            }
            let confidence = self.confidence(&found);
            all *= confidence;
            if all < wish.floor {
                break;
            }
            guesses.push(Guess {
                token: found.token,
                confidence,
            });
            context = found.after();
        }
        guesses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &[u32]) -> Continuation {
        let mut automaton = Automaton::new();
        text.iter().for_each(|token| automaton.push(*token));
        automaton.continuation(automaton.context()).unwrap()
    }

    #[test]
    fn outcomes_outweigh_the_belief() {
        let mut trust = Trust::default();
        let seen = found(&[1, 2, 3, 9, 1, 2, 3]);
        assert_eq!(seen.token, 9);
        let before = trust.confidence(&seen);
        for _ in 0..60 {
            trust.learn(&seen, false, 1.0);
        }
        let wrong = trust.confidence(&seen);
        assert!(before > 0.4 && wrong < 0.1, "{before} {wrong}");
        for _ in 0..60 {
            trust.learn(&seen, true, 1.0);
        }
        assert!(trust.confidence(&seen) > 0.6);
    }

    #[test]
    fn longer_contexts_are_believed_more() {
        let trust = Trust::default();
        let short = trust.confidence(&found(&[1, 2, 5, 9, 2]));
        let long = trust.confidence(&found(&[1, 2, 5, 9, 1, 2]));
        assert!(long > short);
    }
}
