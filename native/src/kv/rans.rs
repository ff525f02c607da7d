//! Range coding with asymmetric numeral systems (Duda, arXiv:1311.2540), eight states in turn.
//!
//! Interleaving independent states hides the latency of each (Giesen, arXiv:1402.3392).  A state
//! lies in [2^16, 2^32) and gives or takes 16 bits at a time, so at most one word a symbol.

use std::sync::OnceLock;

use super::tables::{Table, PRECISION, SLOTS};
use super::Problem;

const STATES: usize = 8;
const LOW: u32 = 1 << 16;

/// ceil(2^64 / count), with which `x / count` is a multiplication for any 32-bit `x`; 0 for 1.
fn inverses() -> &'static [u64; SLOTS + 1] {
    static INVERSES: OnceLock<Box<[u64; SLOTS + 1]>> = OnceLock::new();
    INVERSES.get_or_init(|| {
        let mut inverses = Box::new([0; SLOTS + 1]);
        for (count, inverse) in inverses.iter_mut().enumerate().skip(2) {
            *inverse = u64::MAX / count as u64 + 1;
        }
        inverses
    })
}

#[inline(always)]
/// The words of `spans` (slots << 16 | first slot).
///
/// The decoder reads forwards what is written backwards.
pub fn encode(spans: &[u32]) -> Vec<u16> {
    let inverses = inverses();
    let mut states = [LOW; STATES];
    let mut words = vec![0; spans.len() + 2 * STATES];
    let mut at = words.len();
    let mut step = |state: &mut u32, span: u32| {
        let (start, count) = (span & 0xffff, span >> 16);
        let x = *state;
        // Whether a word is due is as good as random: without a branch there is none to guess.
        let due = u64::from(x) >= u64::from(count) << (32 - PRECISION);
        if let Some(word) = words.get_mut(at.wrapping_sub(1)) {
            *word = x as u16;
        }
        at -= usize::from(due);
        let x = if due { x >> 16 } else { x };
        let inverse = inverses[count as usize % (SLOTS + 1)];
        let quotient = ((u128::from(x) * u128::from(inverse)) >> 64) as u32;
        let quotient = if count == 1 { x } else { quotient };
        *state = (quotient << PRECISION) + (x - quotient * count) + start;
    };
    let mut chunks = spans.chunks_exact(STATES);
    for (state, span) in states.iter_mut().zip(chunks.remainder()).rev() {
        step(state, *span);
    }
    for chunk in chunks.by_ref().rev() {
        for (state, span) in states.iter_mut().zip(chunk).rev() {
            step(state, *span);
        }
    }
    let mut all = Vec::with_capacity(2 * STATES + words.len() - at);
    for state in states {
        all.push((state >> 16) as u16);
        all.push(state as u16);
    }
    all.extend_from_slice(&words[at..]);
    all
}

/// Gives the symbols back.
pub struct Decoder<'a> {
    states: [u32; STATES],
    words: &'a [u16],
    at: usize,
    /// Symbols read so far, modulo the number of states.
    turn: usize,
}

impl<'a> Decoder<'a> {
    /// Begin to read `words`.
    pub fn new(words: &'a [u16]) -> Result<Self, Problem> {
        let Some((first, words)) = words.split_at_checked(2 * STATES) else {
            return Err(Problem::Damaged("its symbols are cut short"));
        };
        let mut states = [0; STATES];
        for (state, pair) in states.iter_mut().zip(first.chunks_exact(2)) {
            *state = u32::from(pair[0]) << 16 | u32::from(pair[1]);
        }
        Ok(Self {
            states,
            words,
            at: 0,
            turn: 0,
        })
    }

    /// Read as many symbols of one table as `symbols` has room for.
    ///
    /// Beyond the end of the words come zeros; [`Decoder::finish`] tells.
    #[inline(always)]
    pub fn read(&mut self, table: &Table, symbols: &mut [i8]) {
        let Some(slots) = table.slots.first_chunk::<SLOTS>() else {
            return;
        };
        let mut states = self.states;
        let mut at = self.at;
        let mut step = |state: &mut u32, symbol: &mut i8| {
            let entry = slots[*state as usize % SLOTS];
            let x = (entry >> 20) * (*state >> PRECISION) + ((entry >> 8) & 0xfff);
            let word = u32::from(self.words.get(at).copied().unwrap_or(0));
            let more = x < LOW;
            *state = if more { x << 16 | word } else { x };
            at += usize::from(more);
            *symbol = entry as i8;
        };
        let mut rest = symbols;
        if self.turn == 0 {
            let mut chunks = rest.chunks_exact_mut(STATES);
            for chunk in &mut chunks {
                for (state, symbol) in states.iter_mut().zip(chunk) {
                    step(state, symbol);
                }
            }
            rest = chunks.into_remainder();
        }
        for symbol in rest {
            step(&mut states[self.turn], symbol);
            self.turn = (self.turn + 1) % STATES;
        }
        self.states = states;
        self.at = at;
    }

    /// Check that all words were read, no more, and that the states are where the encoder began.
    pub fn finish(&self) -> Result<(), Problem> {
        if self.at != self.words.len() || self.states != [LOW; STATES] {
            return Err(Problem::Damaged("its symbols do not end where they should"));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tables::{table, ESCAPE, NARROWEST, WIDEST};
    use super::*;

    /// Runs of symbols of several tables, some of a length that is no multiple of the states.
    fn runs() -> Vec<(i32, Vec<i8>)> {
        let mut seed = 1_u64;
        let mut random = move |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % below
        };
        (0..60)
            .map(|run| {
                let class = NARROWEST + run % (WIDEST - NARROWEST + 1);
                let reach = table(class).0.reach;
                let length = if run % 3 == 0 { 64 } else { random(70) };
                let any = |_| match random(2 * reach as u64 + 2) as i32 {
                    0 => ESCAPE,
                    symbol => (symbol - 1 - reach) as i8,
                };
                (class, (0..length).map(any).collect())
            })
            .collect()
    }

    fn words(runs: &[(i32, Vec<i8>)]) -> Vec<u16> {
        let spans: Vec<_> = runs
            .iter()
            .flat_map(|(class, symbols)| {
                let table = table(*class).0;
                symbols.iter().map(move |symbol| match *symbol {
                    ESCAPE => table.spans[2 * table.reach as usize + 1],
                    symbol => table.spans[(i32::from(symbol) + table.reach) as usize],
                })
            })
            .collect();
        encode(&spans)
    }

    #[test]
    fn symbols_come_back() -> Result<(), Problem> {
        let runs = runs();
        let words = words(&runs);
        let mut decoder = Decoder::new(&words)?;
        for (class, expected) in &runs {
            let mut symbols = vec![0; expected.len()];
            decoder.read(table(*class).0, &mut symbols);
            assert_eq!(&symbols, expected);
        }
        decoder.finish()
    }

    #[test]
    fn words_that_are_missing_or_left_over_are_noticed() {
        let runs = runs();
        let whole = words(&runs);
        let mut longer = whole.clone();
        longer.push(7);
        for words in [&whole[..whole.len() - 1], &whole[..20], &longer] {
            let Ok(mut decoder) = Decoder::new(words) else {
                panic!("the states are there");
            };
            for (class, expected) in &runs {
                decoder.read(table(*class).0, &mut vec![0; expected.len()]);
            }
            assert!(decoder.finish().is_err());
        }
        assert!(Decoder::new(&whole[..15]).is_err());
    }
}
