//! Where rows of a llama.cpp graph attended: softmax over the keys in the KV cache.
//!
//! The graph computes attention in one fused step that keeps no weights. Queries come from the tensor
//! tap (`queries`), keys from the cache's own memory (`held`), and the weights are computed from both
//! once more, in f32, for the rows that somebody wants to know about.

use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{integer, vector};
use crate::kv::half;
use crate::tap::HeldTensor;

/// Numbers of a head that are multiplied at once.
const LANES: usize = 8;

/// More than any model has heads, or numbers in one.
const MAX_HEADS: usize = 1 << 16;

/// The heads of a layer: `heads` for queries, which share `kv_heads` for keys, of `width` numbers.
#[derive(Clone, Copy)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    width: usize,
    scale: f32,
}

/// What the rows of one call gave, summed over them.
struct Sums {
    /// For each layer and cell, the mean over the heads.
    mass: Vec<f32>,
    /// For each cell, the most in any head of any layer.
    peak: Vec<f32>,
    /// For each layer, in nats, the mean over the heads.
    entropy: Vec<f64>,
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0.0_f32; LANES];
    let (left, right) = (a.chunks_exact(LANES), b.chunks_exact(LANES));
    let rest: f32 = left
        .remainder()
        .iter()
        .zip(right.remainder())
        .map(|(x, y)| x * y)
        .sum();
    for (x, y) in left.zip(right) {
        for (sum, (x, y)) in sums.iter_mut().zip(x.iter().zip(y)) {
            *sum += x * y;
        }
    }
    sums.iter().sum::<f32>() + rest
}

/// Turn scores into weights that sum to one; their entropy.
#[inline(always)]
fn softmax(scores: &mut [f32]) -> f64 {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let (mut sum, mut moment) = (0.0_f64, 0.0_f64);
    for score in scores.iter_mut() {
        let below = *score - most;
        *score = below.exp();
        sum += f64::from(*score);
        moment += f64::from(*score * below);
    }
    let part = (1.0 / sum) as f32;
    for score in scores.iter_mut() {
        *score *= part;
    }
    // -sum(w ln w) with w = e^below / sum
    sum.ln() - moment / sum
}

/// Add what the rows of one layer attended to.
///
/// `keys` are `n` rows of f16, `queries` rows of f32, of which row `r` sees the first `limits[r]`
/// cells; `peaks` has `n` numbers a row. The entropy is returned.
#[inline(always)]
fn attend(
    keys: &[u8],
    queries: &[f32],
    limits: &[usize],
    shape: Heads,
    mass: &mut [f32],
    peaks: &mut [f32],
) -> f64 {
    let (n, width) = (mass.len(), shape.width);
    let key_row = 2 * shape.kv_heads * width;
    let group = shape.heads / shape.kv_heads;
    let part = 1.0 / shape.heads as f32;
    let mut block = vec![0.0_f32; n * width];
    let mut scores = vec![0.0_f32; n];
    let mut entropy = 0.0;
    for kv_head in 0..shape.kv_heads {
        for (row, out) in keys
            .chunks_exact(key_row)
            .zip(block.chunks_exact_mut(width))
        {
            let head = &row[2 * kv_head * width..2 * (kv_head + 1) * width];
            for (pair, number) in head.chunks_exact(2).zip(out) {
                *number = half::widen(u16::from_le_bytes([pair[0], pair[1]]));
            }
        }
        for (row, &limit) in limits.iter().enumerate() {
            for head in kv_head * group..(kv_head + 1) * group {
                let at = (row * shape.heads + head) * width;
                let query = &queries[at..at + width];
                let scores = &mut scores[..limit];
                for (score, key) in scores.iter_mut().zip(block.chunks_exact(width)) {
                    *score = dot(query, key) * shape.scale;
                }
                entropy += softmax(scores) * f64::from(part);
                let peaks = &mut peaks[row * n..row * n + limit];
                for ((weight, sum), peak) in scores.iter().zip(mass.iter_mut()).zip(peaks) {
                    *sum += weight * part;
                    *peak = peak.max(*weight);
                }
            }
        }
    }
    entropy
}

/// See [`attend`]: the same code for wider vector registers, where the processor has them.
///
/// No fused operations: the results are the same bits everywhere.
fn attend_fast(
    keys: &[u8],
    queries: &[f32],
    limits: &[usize],
    shape: Heads,
    mass: &mut [f32],
    peaks: &mut [f32],
) -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2")]
        unsafe fn wide(
            keys: &[u8],
            queries: &[f32],
            limits: &[usize],
            shape: Heads,
            mass: &mut [f32],
            peaks: &mut [f32],
        ) -> f64 {
            attend(keys, queries, limits, shape, mass, peaks)
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has what the function was compiled for.
            return unsafe { wide(keys, queries, limits, shape, mass, peaks) };
        }
    }
    attend(keys, queries, limits, shape, mass, peaks)
}

/// Do it for all layers, whose keys `read` gives.
fn measure(
    layers: usize,
    n: usize,
    queries: &[f32],
    limits: &[usize],
    shape: Heads,
    mut read: impl FnMut(usize, &mut [u8]),
) -> Sums {
    let each = limits.len() * shape.heads * shape.width;
    let mut keys = vec![0_u8; n * 2 * shape.kv_heads * shape.width];
    let mut peaks = vec![0.0_f32; limits.len() * n];
    let mut sums = Sums {
        mass: vec![0.0; layers * n],
        peak: vec![0.0; n],
        entropy: Vec::with_capacity(layers),
    };
    for layer in 0..layers {
        read(layer, &mut keys);
        sums.entropy.push(attend_fast(
            &keys,
            &queries[layer * each..(layer + 1) * each],
            limits,
            shape,
            &mut sums.mass[layer * n..(layer + 1) * n],
            &mut peaks,
        ));
    }
    for row in peaks.chunks_exact(n) {
        for (sum, peak) in sums.peak.iter_mut().zip(row) {
            *sum += peak;
        }
    }
    sums
}

type Measured<'py> = (
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<f64>>,
);

/// A number of heads, or of their numbers.
fn count(name: &str, object: &Bound<'_, PyAny>) -> PyResult<usize> {
    let value = usize::try_from(integer::<u64>(name, object)?)?;
    if value == 0 || value > MAX_HEADS {
        return Err(PyValueError::new_err(format!(
            "{name} is {value}; it must lie between 1 and {MAX_HEADS}"
        )));
    }
    Ok(value)
}

/// Weights of rows over the keys of cells in tensors of the KV cache, summed over the rows.
#[pyfunction]
#[pyo3(signature = (keys, first, queries, limits, /, *, heads, kv_heads, width, scale))]
#[allow(clippy::too_many_arguments)] // what a layer is made of, by keyword
pub fn attention_rows<'py>(
    py: Python<'py>,
    keys: Vec<Bound<'py, HeldTensor>>,
    first: &Bound<'py, PyAny>,
    queries: &Bound<'py, PyAny>,
    limits: &Bound<'py, PyAny>,
    heads: &Bound<'py, PyAny>,
    kv_heads: &Bound<'py, PyAny>,
    width: &Bound<'py, PyAny>,
    scale: f32,
) -> PyResult<Measured<'py>> {
    let first = usize::try_from(integer::<u64>("first", first)?)?;
    let shape = Heads {
        heads: count("heads", heads)?,
        kv_heads: count("kv_heads", kv_heads)?,
        width: count("width", width)?,
        scale,
    };
    if shape.heads % shape.kv_heads != 0 || !scale.is_finite() {
        return Err(PyValueError::new_err(format!(
            "{} heads cannot share {} for keys, or the scale {scale} is no number",
            shape.heads, shape.kv_heads
        )));
    }
    let queries = vector::<f32>("queries", queries)?;
    let limits = vector::<i32>("limits", limits)?;
    let (queries, limits) = (queries.as_slice()?, limits.as_slice()?);
    let each = limits.len() * shape.heads * shape.width;
    if each == 0 || keys.is_empty() || queries.len() != keys.len() * each {
        return Err(PyValueError::new_err(format!(
            "{} queries are not {} layers of {} rows",
            queries.len(),
            keys.len(),
            limits.len()
        )));
    }
    let seen: Vec<usize> = limits
        .iter()
        .map(|&limit| usize::try_from(limit).unwrap_or(0))
        .collect();
    let n = seen.iter().copied().max().unwrap_or(0);
    if seen.contains(&0) {
        return Err(PyValueError::new_err("every row sees a cell, its own"));
    }
    let row_bytes = 2 * shape.kv_heads * shape.width;
    let start = first.checked_mul(row_bytes);
    for key in &keys {
        match start {
            Some(start) => key.get().check(start, n * row_bytes)?,
            None => return Err(PyValueError::new_err("first is in no tensor")),
        }
    }
    let tensors: Vec<&HeldTensor> = keys.iter().map(Bound::get).collect();
    let start = start.unwrap_or(0);
    let sums = py.detach(|| {
        measure(tensors.len(), n, queries, &seen, shape, |layer, out| {
            // SAFETY: the range was checked, and the memory lives by the promise of the one who made
            // the tap; `out` has that many bytes.
            unsafe { tensors[layer].copy_out(start, out) }
        })
    });
    Ok((
        sums.mass.into_pyarray(py),
        sums.peak.into_pyarray(py),
        sums.entropy.into_pyarray(py),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: Heads = Heads {
        heads: 2,
        kv_heads: 1,
        width: 2,
        scale: 1.0,
    };

    #[test]
    fn weights_and_peaks_are_those_of_a_softmax() {
        let keys: Vec<u8> = [1.0_f32, 0.0, 0.0, 1.0]
            .iter()
            .flat_map(|number| half::narrow(*number).to_le_bytes())
            .collect();
        // the first head looks at both cells alike, the second at the first one
        let queries = [0.0, 0.0, 3.0_f32.ln(), 0.0];
        let sums = measure(1, 2, &queries, &[2], SHAPE, |_, out| {
            out.copy_from_slice(&keys);
        });
        for (found, wanted) in sums.mass.iter().zip([0.625_f32, 0.375]) {
            assert!((found - wanted).abs() < 1e-6);
        }
        assert!((sums.peak[0] - 0.75).abs() < 1e-6 && (sums.peak[1] - 0.5).abs() < 1e-6);
        let second = -(0.75_f64 * 0.75_f64.ln() + 0.25 * 0.25_f64.ln());
        assert!((sums.entropy[0] - (2.0_f64.ln() + second) / 2.0).abs() < 1e-6);
    }

    #[test]
    fn a_row_sees_no_cell_behind_it() {
        let keys = vec![0_u8; 3 * 4];
        let queries = [1.0_f32; 2 * 4];
        let sums = measure(1, 3, &queries, &[1, 3], SHAPE, |_, out| {
            out.copy_from_slice(&keys);
        });
        for (found, wanted) in sums.mass.iter().zip([4.0_f32 / 3.0, 1.0 / 3.0, 1.0 / 3.0]) {
            assert!((found - wanted).abs() < 1e-6);
        }
    }
}
