//! Blocks of KV: the keys and values of one layer for up to 64 tokens, in few bytes.

mod fast;
pub(crate) mod half;
mod header;
mod moved;
mod numbers;
mod octaves;
mod plane;
mod python;
mod quantised;
mod rans;
mod shape;
mod tables;
mod turn;

use header::{open, seal, Header, HEADER};
use quantised::Steps;
use shape::{Problem, Shape, MAX_TOKENS};

pub use moved::kv_moved;
pub use python::{kv_decode, kv_encode};

/// The level that keeps every bit.
const EXACT: u8 = 0;
/// The steps of the others, by number from 1.
const LOSSY: [Steps; 3] = [
    Steps {
        keys: 0.03,
        values: 0.03,
    },
    Steps {
        keys: 0.35,
        values: 0.35,
    },
    Steps {
        keys: 0.7,
        values: 0.7,
    },
];

fn steps(level: u8) -> Result<Steps, Problem> {
    let found = LOSSY.get(usize::from(level).wrapping_sub(1));
    found.copied().ok_or(Problem::Level(level))
}

/// Make a block of the rows `keys` and `values`.
fn encode(
    level: u8,
    keys: &[u8],
    values: &[u8],
    shape: Shape,
    first: usize,
) -> Result<Vec<u8>, Problem> {
    shape.check()?;
    for (name, rows) in [("keys", keys), ("values", values)] {
        if rows.len() != shape.bytes() {
            return Err(Problem::Length {
                name,
                found: rows.len(),
                wanted: shape.bytes(),
            });
        }
    }
    let mut block = vec![0; HEADER];
    match level {
        EXACT => {
            block.reserve_exact(keys.len() + values.len());
            block.extend_from_slice(keys);
            block.extend_from_slice(values);
        }
        _ => {
            let steps = steps(level)?;
            for (name, rows) in [("keys", keys), ("values", values)] {
                // without a way out of the loop it runs in vector registers
                let wild = rows.chunks_exact(2).fold(false, |any, pair| {
                    any | half::wild(u16::from_le_bytes([pair[0], pair[1]]))
                });
                if wild {
                    return Err(Problem::NotFinite(name));
                }
            }
            fast::encode(steps, keys, values, (&shape, first), &mut block);
        }
    }
    seal(&Header { level, shape }, &mut block)?;
    Ok(block)
}

/// Give the rows of a block back, keys and then values, with what its header says.
fn decode(block: &[u8]) -> Result<(Header, Vec<u8>), Problem> {
    let (header, payload) = open(block)?;
    let size = 2 * header.shape.bytes();
    match header.level {
        EXACT if payload.len() == size => Ok((header, payload.to_vec())),
        EXACT => Err(Problem::Damaged("it has another length than its rows")),
        level => {
            let rows = fast::decode(steps(level)?, &header.shape, payload)?;
            Ok((header, rows))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Shape = Shape {
        tokens: 37,
        heads: 2,
        width: 16,
        rope_base: 1e4,
        halves: false,
    };

    /// Rows whose channels have sizes of their own, with one token that is far from the others.
    fn rows(seed: u32) -> Vec<u8> {
        let mut state = seed;
        (0..SHAPE.tokens * SHAPE.row())
            .flat_map(|index| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let noise = (state >> 8) as f32 / (1 << 24) as f32 - 0.5;
                let far = if index / SHAPE.row() == 5 { 40.0 } else { 1.0 };
                half::narrow((noise + 0.3) * far * (1 + index % 7) as f32).to_le_bytes()
            })
            .collect()
    }

    fn numbers(bytes: &[u8]) -> Vec<f32> {
        let pairs = bytes.chunks_exact(2);
        pairs
            .map(|pair| half::widen(u16::from_le_bytes([pair[0], pair[1]])))
            .collect()
    }

    #[test]
    fn rows_come_back_within_the_steps_of_their_level() -> Result<(), Problem> {
        let (keys, values) = (rows(1), rows(2));
        for level in 0..=LOSSY.len() as u8 {
            let block = encode(level, &keys, &values, SHAPE, 4)?;
            let (header, found) = decode(&block)?;
            assert_eq!(
                header,
                Header {
                    level,
                    shape: SHAPE
                }
            );
            let part = steps(level).map_or(0.0, |steps| steps.keys.max(steps.values));
            let (found_keys, found_values) = found.split_at(SHAPE.bytes());
            for (found, wanted) in [(found_keys, &keys), (found_values, &values)] {
                let (found, wanted) = (numbers(found), numbers(wanted));
                let most = wanted
                    .iter()
                    .fold(0.0_f32, |most, value| most.max(value.abs()));
                for (a, b) in found.iter().zip(&wanted) {
                    assert!((a - b).abs() <= part * most, "level {level}: {a} for {b}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn whatever_is_forged_under_a_right_checksum_is_read_or_refused() -> Result<(), Problem> {
        let (keys, values) = (rows(3), rows(4));
        for level in 1..=LOSSY.len() as u8 {
            let block = encode(level, &keys, &values, SHAPE, 0)?;
            for at in (HEADER..block.len()).step_by(5) {
                let mut forged = block.clone();
                forged[at] = !forged[at];
                seal(
                    &Header {
                        level,
                        shape: SHAPE,
                    },
                    &mut forged,
                )?;
                if let Ok((_, rows)) = decode(&forged) {
                    assert!(rows
                        .chunks_exact(2)
                        .all(|pair| !half::wild(u16::from_le_bytes([pair[0], pair[1]]))));
                }
                forged.truncate(at);
                assert!(open(&forged).is_err());
                seal(
                    &Header {
                        level,
                        shape: SHAPE,
                    },
                    &mut forged,
                )?;
                assert!(decode(&forged).is_err());
            }
        }
        Ok(())
    }
}
