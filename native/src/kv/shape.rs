//! The rows of a block, and what can be wrong with it.

use std::fmt;

/// The most tokens in a block.
pub const MAX_TOKENS: usize = 64;
/// The most numbers in a row of keys or of values.
pub const MAX_ROW: usize = 1 << 16;

/// Rows of keys and of values: for each token one of each, `heads * width` numbers in f16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shape {
    /// Rows of each.
    pub tokens: usize,
    /// Heads in a row.
    pub heads: usize,
    /// Numbers in a head.
    pub width: usize,
    /// The base of the rotation that the keys have been through; 0 when that is not known.
    pub rope_base: f32,
    /// The rotation turns number i together with number i + width / 2, not 2i with 2i + 1.
    pub halves: bool,
}

impl Shape {
    /// Numbers in a row.
    pub fn row(&self) -> usize {
        self.heads * self.width
    }

    /// Bytes of the keys, and of the values.
    pub fn bytes(&self) -> usize {
        self.tokens * self.row() * 2
    }

    /// Whether the keys can be turned back.
    pub fn turns(&self) -> bool {
        self.rope_base > 0.0
    }

    /// Check that every number is within its bounds.
    pub fn check(&self) -> Result<(), Problem> {
        if self.tokens == 0 || self.tokens > MAX_TOKENS {
            return Err(Problem::Shape("it must have 1 to 64 tokens"));
        }
        if self.heads == 0 || self.width == 0 || self.heads.saturating_mul(self.width) > MAX_ROW {
            return Err(Problem::Shape("a row must have 1 to 65536 numbers"));
        }
        if !self.rope_base.is_finite() || self.rope_base < 0.0 {
            return Err(Problem::Shape("the rope base must be finite and positive"));
        }
        if self.turns() && self.width % 2 != 0 {
            return Err(Problem::Shape("heads of odd width cannot be rotated"));
        }
        Ok(())
    }
}

/// Why a block cannot be made or read.
#[derive(Debug, PartialEq)]
pub enum Problem {
    /// The numbers of the shape are out of bounds.
    Shape(&'static str),
    /// The level is not known.
    Level(u8),
    /// The keys or values have another length than the shape says.
    Length {
        name: &'static str,
        found: usize,
        wanted: usize,
    },
    /// A number is NaN or infinite, at a level that has to compute with it.
    NotFinite(&'static str),
    /// The bytes are no whole, undamaged block.
    Damaged(&'static str),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Shape(what) => write!(f, "a block of another shape cannot be: {what}"),
            Self::Level(level) => write!(f, "there is no level number {level}"),
            Self::Length {
                name,
                found,
                wanted,
            } => write!(f, "{name} has {found} bytes; the shape needs {wanted}"),
            Self::NotFinite(name) => write!(f, "{name} is not all finite"),
            Self::Damaged(what) => write!(f, "no block of KV can be read from it: {what}"),
        }
    }
}
