//! Blocks of KV: the keys and values of one layer for up to 64 tokens, in few bytes.

mod header;
mod python;
mod shape;

use header::{open, seal, Header, HEADER};
use shape::{Problem, Shape};

pub use python::{kv_decode, kv_encode};

/// The level that keeps every bit.
const EXACT: u8 = 0;

/// Make a block of the rows `keys` and `values`.
fn encode(level: u8, keys: &[u8], values: &[u8], shape: Shape) -> Result<Vec<u8>, Problem> {
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
        _ => return Err(Problem::Level(level)),
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
        level => Err(Problem::Level(level)),
    }
}
