//! Packing signs, and comparing many sketches with one query.
//!
//! The query stays in floats and only the stored vectors are cut down to signs (asymmetric
//! comparison): the score of a sketch is the sum of the query's coordinates, each with the sketch's
//! sign. It is read off one table of 256 sums a byte, always in the same order, so the same
//! arguments give the same bits on every machine.

use crate::select::{best, Candidate};

/// Pack signs; the length is a multiple of 8.
pub fn pack(values: &[f32]) -> Vec<u8> {
    let byte = |eight: &[f32]| {
        let bits = eight.iter().enumerate();
        bits.fold(0_u8, |byte, (i, value)| {
            byte | (u8::from(*value > 0.0) << i)
        })
    };
    values.chunks_exact(8).map(byte).collect()
}

/// For each byte of a sketch, the part of the score that each of its values gives.
fn tables(query: &[f32]) -> Vec<[f32; 256]> {
    let table = |eight: &[f32]| {
        let mut sums = [0.0_f32; 256];
        sums[0] = -eight.iter().sum::<f32>();
        for value in 1..256_usize {
            sums[value] = sums[value & (value - 1)] + 2.0 * eight[value.trailing_zeros() as usize];
        }
        sums
    };
    query.chunks_exact(8).map(table).collect()
}

/// The score of one sketch.
#[inline(always)]
fn score(sketch: &[u8], tables: &[[f32; 256]]) -> f32 {
    // Four sums at a time do not wait for each other.
    let mut sums = [0.0_f32; 4];
    let whole = sketch.len() & !3;
    for (bytes, four) in sketch[..whole].chunks_exact(4).zip(tables.chunks_exact(4)) {
        for lane in 0..4 {
            sums[lane] += four[lane][usize::from(bytes[lane])];
        }
    }
    for (byte, table) in sketch[whole..].iter().zip(&tables[whole..]) {
        sums[0] += table[usize::from(*byte)];
    }
    (sums[0] + sums[1]) + (sums[2] + sums[3])
}

/// The best `count` sketches by score times weight; of equal ones the first come first.
pub fn scan(
    sketches: &[u8],
    query: &[f32],
    weights: Option<&[f32]>,
    count: usize,
) -> Vec<Candidate> {
    let tables = tables(query);
    let scores = sketches
        .chunks_exact(query.len() / 8)
        .enumerate()
        .map(|(row, sketch)| {
            let value = score(sketch, &tables) * weights.map_or(1.0, |weights| weights[row]);
            Candidate {
                token: row as u32,
                // Adding zero makes a negative zero positive: `best` orders them apart.
                value: f64::from(value) + 0.0,
            }
        });
    best(scores, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_score_is_the_sum_with_the_signs() {
        let query: Vec<f32> = (1..=40).map(|i| i as f32).collect();
        let vectors: Vec<f32> = (0..40 * 7)
            .map(|i| if (i * i) % 7 < 3 { 1.0 } else { -1.0 })
            .collect();
        let packed = pack(&vectors);
        let found = scan(&packed, &query, None, 7);
        assert_eq!(found.len(), 7);
        for hit in &found {
            let row = &vectors[hit.token as usize * 40..][..40];
            let expected: f32 = row.iter().zip(&query).map(|(a, b)| a * b).sum();
            assert_eq!(hit.value, f64::from(expected));
        }
        assert!(found.windows(2).all(|two| two[0].value >= two[1].value));
    }
}
