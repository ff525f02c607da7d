//! Blocks of KV: the keys and values of one layer for up to 64 tokens, in few bytes.

mod fast;
mod half;
mod header;
mod numbers;
mod python;
mod quantised;
mod rans;
mod shape;
mod tables;
mod turn;

use header::{open, seal, Header, HEADER};
use quantised::Steps;
use shape::{Problem, Shape, MAX_TOKENS};

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
