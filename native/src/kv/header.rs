//! The header of a block: what it holds, and a checksum over all of it.
//!
//! Little-endian, 36 bytes: magic "PKV1" | u8 level | u8 flags | u16 tokens | u16 heads |
//! u16 width of a head | f32 rope base | u32 bytes of payload | 16 bytes of BLAKE3 over the 20 bytes
//! before it and the payload.  The last character of the magic is the version.

use super::{Problem, Shape};

/// Bytes of a header.
pub const HEADER: usize = 36;
const CHECKED: usize = 20;
const MAGIC: [u8; 3] = *b"PKV";
const VERSION: u8 = b'1';
/// The rotation pairs the first half of a head with the second.
const FLAG_HALVES: u8 = 1;

/// What a header says.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Header {
    /// The number of the level.
    pub level: u8,
    /// The rows.
    pub shape: Shape,
}

fn digest(head: &[u8], payload: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(head);
    hasher.update(payload);
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}

/// Write the header of `block` into its first [`HEADER`] bytes; the payload follows them.
pub fn seal(header: &Header, block: &mut [u8]) -> Result<(), Problem> {
    let Some((head, payload)) = block.split_at_mut_checked(HEADER) else {
        return Err(Problem::Damaged("it is too short"));
    };
    let shape = &header.shape;
    let length = u32::try_from(payload.len()).map_err(|_| Problem::Shape("it is too large"))?;
    head[..3].copy_from_slice(&MAGIC);
    head[3] = VERSION;
    head[4] = header.level;
    head[5] = if shape.halves { FLAG_HALVES } else { 0 };
    head[6..8].copy_from_slice(&(shape.tokens as u16).to_le_bytes());
    head[8..10].copy_from_slice(&(shape.heads as u16).to_le_bytes());
    head[10..12].copy_from_slice(&(shape.width as u16).to_le_bytes());
    head[12..16].copy_from_slice(&shape.rope_base.to_le_bytes());
    head[16..20].copy_from_slice(&length.to_le_bytes());
    let sum = digest(&head[..CHECKED], payload);
    head[CHECKED..].copy_from_slice(&sum);
    Ok(())
}

/// Read and check a whole block; return what it holds and its payload.
pub fn open(block: &[u8]) -> Result<(Header, &[u8]), Problem> {
    let Some((head, payload)) = block.split_at_checked(HEADER) else {
        return Err(Problem::Damaged("it is shorter than a header"));
    };
    if head[..3] != MAGIC {
        return Err(Problem::Damaged("it does not begin like one"));
    }
    if head[3] != VERSION {
        return Err(Problem::Damaged("it is of another version"));
    }
    let short = |at: usize| usize::from(u16::from_le_bytes([head[at], head[at + 1]]));
    let four = |at: usize| [head[at], head[at + 1], head[at + 2], head[at + 3]];
    if u32::from_le_bytes(four(16)) as usize != payload.len() {
        return Err(Problem::Damaged("it is cut short, or something follows it"));
    }
    if head[CHECKED..] != digest(&head[..CHECKED], payload) {
        return Err(Problem::Damaged("its checksum is wrong"));
    }
    if head[5] & !FLAG_HALVES != 0 {
        return Err(Problem::Damaged("it has unknown flags"));
    }
    let shape = Shape {
        tokens: short(6),
        heads: short(8),
        width: short(10),
        rope_base: f32::from_le_bytes(four(12)),
        halves: head[5] & FLAG_HALVES != 0,
    };
    shape.check()?;
    Ok((
        Header {
            level: head[4],
            shape,
        },
        payload,
    ))
}
