//! Which buckets lie nearest to a query: flips of signs, in the order of the margins they cost.
//!
//! A bucket is the signs of a vector along a few axes. A neighbour of the query that is not in its
//! bucket is most likely across the planes that the query is closest to, so buckets are listed by
//! the sum of the squared distances to the planes crossed. The order is made one by one with a heap
//! (Lv, Josephson, Wang, Charikar and Li, "Multi-probe LSH", VLDB 2007).

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;

/// The most bits of a bucket's number.
pub const MAX_BITS: usize = 30;

/// A set of planes to cross, as bits in the order of their margins.
#[derive(PartialEq)]
struct Flips {
    cost: f64,
    set: u32,
}

impl Eq for Flips {}

impl Ord for Flips {
    fn cmp(&self, other: &Self) -> Ordering {
        self.cost
            .total_cmp(&other.cost)
            .then(self.set.cmp(&other.set))
    }
}

impl PartialOrd for Flips {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// The nearest `count` buckets with their costs, the query's own first.
pub fn probes(query: &[f32], count: usize) -> Vec<(u32, f64)> {
    let margin = |plane: usize| f64::from(query[plane]) * f64::from(query[plane]);
    let own = (0..query.len()).fold(0_u32, |own, i| own | (u32::from(query[i] > 0.0) << i));
    let mut planes: Vec<usize> = (0..query.len()).collect();
    planes.sort_by(|a, b| margin(*a).total_cmp(&margin(*b)).then(a.cmp(b)));
    let members = |set: u32| (0..planes.len()).filter(move |i| set >> i & 1 == 1);
    let flips = |set: u32| Flips {
        cost: members(set).map(|i| margin(planes[i])).sum(),
        set,
    };
    let count = count.min(1 << query.len());
    let mut found = Vec::with_capacity(count.min(1 << 16));
    let mut heap = BinaryHeap::from([Reverse(flips(0))]);
    while found.len() < count {
        let Some(Reverse(next)) = heap.pop() else {
            break;
        };
        let bucket = members(next.set).fold(own, |bucket, i| bucket ^ (1 << planes[i]));
        found.push((bucket, next.cost));
        // Every other set follows from exactly one set that costs no more: by adding the plane
        // after its last, or by putting that one in the place of its last.
        let after = (u32::BITS - next.set.leading_zeros()) as usize;
        if after < planes.len() {
            heap.push(Reverse(flips(next.set | 1 << after)));
            if after > 0 {
                heap.push(Reverse(flips(next.set ^ (3 << (after - 1)))));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bucket_comes_once_and_in_order() {
        let query = [0.5_f32, -0.1, 0.3, -0.4, 0.2, 0.0];
        let found = probes(&query, 1000);
        assert_eq!(found.len(), 64);
        assert_eq!(found[0], (0b01_0101, 0.0));
        assert!(found.windows(2).all(|two| two[0].1 <= two[1].1));
        let mut buckets: Vec<u32> = found.iter().map(|one| one.0).collect();
        buckets.sort_unstable();
        assert_eq!(buckets, (0..64).collect::<Vec<u32>>());
    }
}
