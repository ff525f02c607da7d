//! The best few of many values, without sorting them all.

use std::cmp::Ordering;

/// A token and its value.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// The token's id.
    pub token: u32,
    /// What it is ranked by; never a NaN.
    pub value: f64,
}

/// Higher values first; of equal ones the lower token first.
fn rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.value.total_cmp(&a.value).then(a.token.cmp(&b.token))
}

/// The first `count` candidates of `values` by value (descending) and token (ascending), in that order.
///
/// Tokens at minus infinity are left out. `values` must come in ascending order of token. A zero must
/// not be negative (the order is a total one), which [`crate::sampling`] sees to.
pub fn best(values: impl Iterator<Item = Candidate>, count: usize) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    // Keep up to twice as many as are asked for, and cut back to the best when that is full: every
    // value is looked at once, and almost all fail the comparison with the worst one kept.
    let room = count.saturating_mul(2).max(64);
    let mut kept: Vec<Candidate> = Vec::new();
    let mut floor = f64::NEG_INFINITY;
    for candidate in values {
        // Equal to the floor is too late: the tokens kept at that value are lower ones.
        if candidate.value > floor {
            kept.push(candidate);
            if kept.len() == room {
                let (_, last, _) = kept.select_nth_unstable_by(count - 1, rank);
                floor = last.value;
                kept.truncate(count);
            }
        }
    }
    kept.sort_unstable_by(rank);
    kept.truncate(count);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_are_those_of_a_full_sort() {
        let mut state = 1_u64;
        for size in [0_usize, 1, 2, 63, 64, 65, 1000] {
            let all: Vec<Candidate> = (0..size as u32)
                .map(|token| {
                    state = state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1);
                    let value = match (state >> 33) % 50 {
                        0 => f64::NEG_INFINITY,
                        value => value as f64,
                    };
                    Candidate { token, value }
                })
                .collect();
            let mut sorted: Vec<Candidate> = all
                .iter()
                .copied()
                .filter(|c| c.value > f64::NEG_INFINITY)
                .collect();
            sorted.sort_by(rank);
            for count in [0, 1, 2, 31, 32, 33, 64, 999, 2000] {
                let expected = &sorted[..count.min(sorted.len())];
                assert_eq!(
                    best(all.iter().copied(), count),
                    expected,
                    "{count} of {size}"
                );
            }
        }
    }
}
