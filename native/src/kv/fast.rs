//! The same code compiled for wider vector registers, used where the processor has them.
//!
//! No fused operations: the results are the same bits everywhere.

use super::quantised::{self, Steps};
use super::{Problem, Shape};

/// See [`quantised::encode`].
pub fn encode(steps: Steps, keys: &[u8], values: &[u8], shape: (&Shape, usize), out: &mut Vec<u8>) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
        unsafe fn wide(
            steps: Steps,
            keys: &[u8],
            values: &[u8],
            shape: (&Shape, usize),
            out: &mut Vec<u8>,
        ) {
            quantised::encode(steps, keys, values, shape, out);
        }
        if wide_registers() {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { wide(steps, keys, values, shape, out) };
        }
    }
    quantised::encode(steps, keys, values, shape, out);
}

/// See [`quantised::decode`].
pub fn decode(steps: Steps, shape: &Shape, payload: &[u8]) -> Result<Vec<u8>, Problem> {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,bmi1,bmi2,lzcnt")]
        unsafe fn wide(steps: Steps, shape: &Shape, payload: &[u8]) -> Result<Vec<u8>, Problem> {
            quantised::decode(steps, shape, payload)
        }
        if wide_registers() {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { wide(steps, shape, payload) };
        }
    }
    quantised::decode(steps, shape, payload)
}

#[cfg(target_arch = "x86_64")]
fn wide_registers() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("bmi1")
        && is_x86_feature_detected!("bmi2")
        && is_x86_feature_detected!("lzcnt")
}
