//! A suffix automaton that grows token by token, and counts what followed what.
//!
//! Blumer et al., "The smallest automaton recognizing the subwords of a text" (1985): a state stands
//! for all substrings that end at the same places; its link leads to the longest suffix that ends at
//! more places. It has at most 2n states and 3n edges for n tokens. Each edge counts how often its
//! token came after its state, so the likeliest continuation of any context that has been seen is
//! known without looking at the text.

use crate::suffix::graph::{Graph, State, NONE};

/// A token that separates documents; nothing is counted across it and it is never proposed.
pub const SEPARATOR: u32 = u32::MAX;
/// The state of the empty string.
pub const ROOT: u32 = 0;

/// How many contexts, longest first, learn from one token: bounds the work where a text repeats itself.
const MAX_CONTEXTS: usize = 64;
/// How many contexts, and edges of each, are looked at for other continuations than the likeliest.
const SUFFIXES: usize = 6;
const EDGES: usize = 32;

/// A context: a state, and how many tokens of it really match.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Context {
    /// The state that the matching tokens lead to.
    pub state: u32,
    /// How many tokens match.
    pub length: u32,
}

/// What came after a context most often.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Continuation {
    /// The token.
    pub token: u32,
    /// How often it came.
    pub count: u32,
    /// How often anything came.
    pub total: u32,
    /// The context that knows it; it may be shorter than the one that was asked about.
    pub context: Context,
    target: u32,
}

impl Continuation {
    /// The context when the token is taken.
    pub fn after(&self) -> Context {
        Context {
            state: self.target,
            length: self.context.length.saturating_add(1),
        }
    }
}

/// The automaton of one text.
pub struct Automaton {
    graph: Graph,
    last: u32,
    tokens: usize,
}

impl Automaton {
    /// The automaton of the empty text.
    pub fn new() -> Self {
        let root = State {
            len: 0,
            link: NONE,
            first_edge: NONE,
            best_edge: NONE,
            followed: 0,
            degree: 0,
        };
        let mut graph = Graph::default();
        graph.add_state(root);
        Self {
            graph,
            last: ROOT,
            tokens: 0,
        }
    }

    /// How many tokens it holds.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// How many bytes it has reserved, about.
    pub fn bytes(&self) -> usize {
        self.graph.bytes()
    }

    /// Give back what is reserved beyond need.
    pub fn shrink(&mut self) {
        self.graph.shrink();
    }

    /// The longest suffix of the text that has also ended earlier.
    pub fn context(&self) -> Context {
        let link = self.graph.states[self.last as usize].link;
        let state = if link == NONE { ROOT } else { link };
        Context {
            state,
            length: self.graph.states[state as usize].len,
        }
    }

    /// The longest suffix of `context` and `token` that is in the text.
    pub fn advance(&self, context: Context, token: u32) -> Context {
        let Context {
            mut state,
            mut length,
        } = context;
        loop {
            if let Some(edge) = self.graph.find(state, token) {
                return Context {
                    state: self.graph.edges[edge as usize].target,
                    length: length.saturating_add(1),
                };
            }
            let link = self.graph.states[state as usize].link;
            if link == NONE {
                return Context {
                    state: ROOT,
                    length: 0,
                };
            }
            state = link;
            length = self.graph.states[link as usize].len;
        }
    }

    /// What came most often after the longest suffix of `context` that anything came after.
    pub fn continuation(&self, context: Context) -> Option<Continuation> {
        let Context {
            mut state,
            mut length,
        } = context;
        loop {
            let State {
                best_edge,
                followed,
                link,
                ..
            } = self.graph.states[state as usize];
            if best_edge != NONE {
                let edge = self.graph.edges[best_edge as usize];
                return Some(Continuation {
                    token: edge.token,
                    count: edge.count,
                    total: followed,
                    context: Context { state, length },
                    target: edge.target,
                });
            }
            if link == NONE {
                return None;
            }
            state = link;
            length = self.graph.states[link as usize].len;
        }
    }

    /// What came after the longest suffixes of `context`, up to `count` different tokens.
    ///
    /// Those of longer contexts come first, of one context those that came more often, or of equals
    /// more recently. Contexts shorter than `min_match` are not looked at, nor more than [`SUFFIXES`].
    pub fn alternatives(
        &self,
        context: Context,
        count: usize,
        min_match: u32,
    ) -> Vec<Continuation> {
        let mut found: Vec<Continuation> = Vec::new();
        let Context {
            mut state,
            mut length,
        } = context;
        for _ in 0..SUFFIXES {
            if length < min_match || found.len() >= count {
                break;
            }
            let State {
                first_edge,
                followed,
                link,
                ..
            } = self.graph.states[state as usize];
            let from = found.len();
            let mut at = first_edge;
            for _ in 0..EDGES {
                if at == NONE {
                    break;
                }
                let edge = self.graph.edges[at as usize];
                if edge.count > 0 && found.iter().all(|other| other.token != edge.token) {
                    found.push(Continuation {
                        token: edge.token,
                        count: edge.count,
                        total: followed,
                        context: Context { state, length },
                        target: edge.target,
                    });
                }
                at = edge.next;
            }
            found[from..].sort_by_key(|other| std::cmp::Reverse(other.count));
            if link == NONE {
                break;
            }
            state = link;
            length = self.graph.states[link as usize].len;
        }
        found.truncate(count);
        found
    }

    /// Append `token`, in constant time over the whole text.
    pub fn push(&mut self, token: u32) {
        let before = self.last;
        self.grow(token);
        self.tokens += 1;
        if token == SEPARATOR {
            return;
        }
        let mut state = before;
        for _ in 0..MAX_CONTEXTS {
            if state == NONE {
                break;
            }
            if let Some(edge) = self.graph.find(state, token) {
                self.count(state, edge);
            }
            state = self.graph.states[state as usize].link;
        }
    }

    fn count(&mut self, state: u32, edge: u32) {
        let best = self.graph.states[state as usize].best_edge;
        self.graph.edges[edge as usize].count =
            self.graph.edges[edge as usize].count.saturating_add(1);
        let state = &mut self.graph.states[state as usize];
        state.followed = state.followed.saturating_add(1);
        if best == NONE
            || self.graph.edges[edge as usize].count >= self.graph.edges[best as usize].count
        {
            state.best_edge = edge;
        }
    }

    /// Add the states and edges for the text with `token` at its end.
    fn grow(&mut self, token: u32) {
        let len = self.graph.states[self.last as usize].len + 1;
        let new = self.graph.add_state(State {
            len,
            link: ROOT,
            first_edge: NONE,
            best_edge: NONE,
            followed: 0,
            degree: 0,
        });
        let mut at = self.last;
        self.last = new;
        let shared = loop {
            if at == NONE {
                return;
            }
            match self.graph.find(at, token) {
                Some(edge) => break edge,
                None => {
                    self.graph.add_edge(at, token, new, 0);
                    at = self.graph.states[at as usize].link;
                }
            }
        };
        let old = self.graph.edges[shared as usize].target;
        let wanted = self.graph.states[at as usize].len + 1;
        if self.graph.states[old as usize].len == wanted {
            self.graph.states[new as usize].link = old;
            return;
        }
        let split = self.split(old, wanted);
        self.graph.states[new as usize].link = split;
        loop {
            match self.graph.find(at, token) {
                Some(edge) if self.graph.edges[edge as usize].target == old => {
                    self.graph.edges[edge as usize].target = split;
                }
                _ => return,
            }
            at = self.graph.states[at as usize].link;
            if at == NONE {
                return;
            }
        }
    }

    /// Give the strings of `old` that are at most `len` long a state of their own.
    fn split(&mut self, old: u32, len: u32) -> u32 {
        let State {
            link,
            first_edge,
            best_edge,
            followed,
            ..
        } = self.graph.states[old as usize];
        let split = self.graph.add_state(State {
            len,
            link,
            first_edge: NONE,
            best_edge: NONE,
            followed,
            degree: 0,
        });
        let mut at = first_edge;
        while at != NONE {
            let edge = self.graph.edges[at as usize];
            let copy = self
                .graph
                .add_edge(split, edge.token, edge.target, edge.count);
            if at == best_edge {
                self.graph.states[split as usize].best_edge = copy;
            }
            at = edge.next;
        }
        self.graph.states[old as usize].link = split;
        split
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The longest suffix of `text` that also ends earlier, by trying all.
    fn longest(text: &[u32]) -> usize {
        (0..text.len())
            .rev()
            .find(|n| (0..text.len() - n).any(|i| text[i..i + n] == text[text.len() - n..]))
            .unwrap_or(0)
    }

    fn followers(text: &[u32], context: &[u32]) -> Vec<u32> {
        (context.len()..text.len())
            .filter(|i| &text[i - context.len()..*i] == context)
            .map(|i| text[i])
            .collect()
    }

    #[test]
    fn contexts_and_counts_are_those_of_a_search() {
        let mut seed = 7_u64;
        for alphabet in [1_u64, 2, 3, 20] {
            let mut automaton = Automaton::new();
            let mut text = Vec::new();
            // Shorter than what bounds the counting, so that counts are exact.
            for _ in 0..60 {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let token = ((seed >> 33) % alphabet) as u32;
                automaton.push(token);
                text.push(token);
                let context = automaton.context();
                assert_eq!(context.length as usize, longest(&text));
                let Some(found) = automaton.continuation(context) else {
                    continue;
                };
                let n = found.context.length as usize;
                let all = followers(&text, &text[text.len() - n..]);
                let of = |token| all.iter().filter(|t| **t == token).count();
                assert_eq!(found.total as usize, all.len());
                assert_eq!(found.count as usize, of(found.token));
                assert!(all.iter().all(|t| of(*t) <= of(found.token)));
            }
        }
    }

    #[test]
    fn alternatives_come_from_longer_contexts_first() {
        let mut automaton = Automaton::new();
        for token in [1, 2, 3, 9, 2, 3, 8, 5, 3, 7, 5, 3, 7, 1, 2, 3] {
            automaton.push(token);
        }
        let context = automaton.context();
        assert_eq!(context.length, 3);
        let tokens = |count, min_match| {
            let found = automaton.alternatives(context, count, min_match);
            found.iter().map(|c| c.token).collect::<Vec<_>>()
        };
        assert_eq!(tokens(9, 1), [9, 8, 7]);
        assert_eq!(tokens(2, 1), [9, 8]);
        assert_eq!(tokens(9, 2), [9, 8]);
        assert_eq!(tokens(9, 3), [9]);
        assert!(tokens(0, 1).is_empty());
    }

    #[test]
    fn a_text_that_repeats_one_token_takes_no_longer() {
        let mut automaton = Automaton::new();
        for _ in 0..200_000 {
            automaton.push(3);
        }
        assert_eq!(automaton.tokens(), 200_000);
        assert_eq!(automaton.context().length, 199_999);
        assert!(automaton.bytes() < 200_000 * 200);
    }

    #[test]
    fn nothing_leads_over_a_separator() {
        let mut automaton = Automaton::new();
        for token in [1, 2, SEPARATOR, 2] {
            automaton.push(token);
        }
        let root = Context {
            state: ROOT,
            length: 0,
        };
        let two = automaton.advance(root, 2);
        assert_eq!(two.length, 1);
        let found = automaton.continuation(two);
        assert!(found.is_none_or(|c| c.context.length == 0 && c.token != SEPARATOR));
    }
}
