//! The states and edges of an automaton, and how an edge is found.

use std::collections::HashMap;

/// No state, or no edge.
pub const NONE: u32 = u32::MAX;
/// States with more edges than this are looked up by hash.
const WIDE: u32 = 8;

/// A state: strings that end at the same places.
#[derive(Clone, Copy)]
pub struct State {
    /// The length of the longest string of the state.
    pub len: u32,
    /// The state of its longest suffix that ends at more places; [`NONE`] of the root.
    pub link: u32,
    /// The head of its list of edges.
    pub first_edge: u32,
    /// The edge that was taken most often, the most recent one of equals.
    pub best_edge: u32,
    /// How often a token came after it.
    pub followed: u32,
    /// How many edges it has.
    pub degree: u32,
}

/// What a token after a state leads to.
#[derive(Clone, Copy)]
pub struct Edge {
    /// The token.
    pub token: u32,
    /// The state that it leads to.
    pub target: u32,
    /// How often it came.
    pub count: u32,
    /// The next edge of the same state.
    pub next: u32,
}

/// States, and the edges between them.
#[derive(Default)]
pub struct Graph {
    /// All states; the first one is the root.
    pub states: Vec<State>,
    /// All edges.
    pub edges: Vec<Edge>,
    wide: HashMap<u64, u32>,
}

impl Graph {
    /// How many bytes it has reserved, about.
    pub fn bytes(&self) -> usize {
        // A hash table keeps an eighth of its slots free and one byte of notes for each.
        let slot = size_of::<(u64, u32)>() + 1;
        self.states.capacity() * size_of::<State>()
            + self.edges.capacity() * size_of::<Edge>()
            + self.wide.capacity() * slot * 8 / 7
    }

    /// Give back what is reserved beyond need.
    pub fn shrink(&mut self) {
        self.states.shrink_to_fit();
        self.edges.shrink_to_fit();
        self.wide.shrink_to_fit();
    }

    /// Add a state; return its number.
    pub fn add_state(&mut self, state: State) -> u32 {
        let index = self.states.len() as u32;
        self.states.push(state);
        index
    }

    /// Add an edge; return its number.
    pub fn add_edge(&mut self, from: u32, token: u32, target: u32, count: u32) -> u32 {
        let index = self.edges.len() as u32;
        let state = &mut self.states[from as usize];
        self.edges.push(Edge {
            token,
            target,
            count,
            next: state.first_edge,
        });
        state.first_edge = index;
        state.degree += 1;
        if state.degree > WIDE + 1 {
            self.wide.insert(key(from, token), index);
        } else if state.degree == WIDE + 1 {
            let mut at = index;
            while at != NONE {
                let edge = self.edges[at as usize];
                self.wide.insert(key(from, edge.token), at);
                at = edge.next;
            }
        }
        index
    }

    /// The edge of a token.
    pub fn find(&self, from: u32, token: u32) -> Option<u32> {
        let state = &self.states[from as usize];
        if state.degree > WIDE {
            return self.wide.get(&key(from, token)).copied();
        }
        let mut at = state.first_edge;
        while at != NONE {
            let edge = &self.edges[at as usize];
            if edge.token == token {
                return Some(at);
            }
            at = edge.next;
        }
        None
    }
}

fn key(state: u32, token: u32) -> u64 {
    u64::from(state) << 32 | u64::from(token)
}
