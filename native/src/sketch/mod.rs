//! Sketches and LSH buckets of vectors: the signs of a vector's coordinates along chosen axes.
//!
//! The axes are the caller's (`sharding/context/sketches.py` learns them). Here the signs are packed,
//! many sketches are compared with one query, and the buckets near a query are listed in the order
//! of their likelihood.

mod probe;
mod scan;

use numpy::{IntoPyArray, PyArray1};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::{integer, vector};

/// The most bits of a sketch.
const MAX_BITS: usize = 4096;

/// The most sketches in one scan: their numbers are 32 bits wide.
const MAX_SKETCHES: usize = u32::MAX as usize;

/// The largest number: sums of products of two stay far from infinity.
const MAX_VALUE: f32 = 1e15;

/// Check that `values` are numbers of a size to calculate with.
fn finite(name: &str, values: &[f32]) -> PyResult<()> {
    let bad = |value: &f32| value.is_nan() || value.abs() > MAX_VALUE;
    match values.iter().position(bad) {
        Some(at) => Err(PyValueError::new_err(format!(
            "{name}[{at}] is {}; it must be finite and at most {MAX_VALUE:e}",
            values[at]
        ))),
        None => Ok(()),
    }
}

/// Check a number of bits.
fn check_bits(bits: usize) -> PyResult<()> {
    if bits == 0 || bits > MAX_BITS || bits % 8 != 0 {
        return Err(PyValueError::new_err(format!(
            "bits is {bits}; it must be a multiple of 8 up to {MAX_BITS}"
        )));
    }
    Ok(())
}

/// Pack the signs of rows of `bits` values: bit `i % 8` of byte `i / 8` says that value `i` is positive.
#[pyfunction]
#[pyo3(signature = (values, bits, /))]
pub fn sketch_pack<'py>(
    py: Python<'py>,
    values: &Bound<'py, PyAny>,
    bits: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArray1<u8>>> {
    let bits = integer::<u32>("bits", bits)? as usize;
    check_bits(bits)?;
    let values = vector::<f32>("values", values)?;
    let values = values.as_slice()?;
    if values.len() % bits != 0 {
        return Err(PyValueError::new_err(format!(
            "values has {} entries, which is not a multiple of {bits}",
            values.len()
        )));
    }
    let packed = py.detach(|| finite("values", values).map(|()| scan::pack(values)))?;
    Ok(packed.into_pyarray(py))
}

/// What a scan gives: rows and their scores, best first.
type Found<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<f32>>);

/// The `count` sketches that agree best with a query kept in floats.
#[pyfunction]
#[pyo3(signature = (sketches, query, count, /, weights = None))]
pub fn sketch_scan<'py>(
    py: Python<'py>,
    sketches: &Bound<'py, PyAny>,
    query: &Bound<'py, PyAny>,
    count: &Bound<'py, PyAny>,
    weights: Option<&Bound<'py, PyAny>>,
) -> PyResult<Found<'py>> {
    let count = integer::<u32>("count", count)? as usize;
    let query = vector::<f32>("query", query)?;
    let query = query.as_slice()?;
    check_bits(query.len())?;
    finite("query", query)?;
    let sketches = vector::<u8>("sketches", sketches)?;
    let sketches = sketches.as_slice()?;
    let bytes = query.len() / 8;
    let rows = sketches.len() / bytes;
    if sketches.len() % bytes != 0 || rows > MAX_SKETCHES {
        return Err(PyValueError::new_err(format!(
            "sketches has {} bytes; it must hold whole sketches of {bytes} bytes, at most {MAX_SKETCHES}",
            sketches.len()
        )));
    }
    let weights = weights
        .map(|weights| vector::<f32>("weights", weights))
        .transpose()?;
    let weights = match &weights {
        Some(weights) => {
            let weights = weights.as_slice()?;
            if weights.len() != rows {
                return Err(PyValueError::new_err(format!(
                    "weights has {} entries for {rows} sketches",
                    weights.len()
                )));
            }
            Some(weights)
        }
        None => None,
    };
    let found = py.detach(|| {
        if let Some(weights) = weights {
            finite("weights", weights)?;
        }
        Ok::<_, PyErr>(scan::scan(sketches, query, weights, count))
    })?;
    let rows: Vec<u32> = found.iter().map(|one| one.token).collect();
    let scores: Vec<f32> = found.iter().map(|one| one.value as f32).collect();
    Ok((rows.into_pyarray(py), scores.into_pyarray(py)))
}

/// What probing gives: buckets and their costs, cheapest first.
type Probes<'py> = (Bound<'py, PyArray1<u32>>, Bound<'py, PyArray1<f64>>);

/// The `count` buckets nearest to a query, its own first.
#[pyfunction]
#[pyo3(signature = (query, count, /))]
pub fn lsh_probes<'py>(
    py: Python<'py>,
    query: &Bound<'py, PyAny>,
    count: &Bound<'py, PyAny>,
) -> PyResult<Probes<'py>> {
    let count = integer::<u32>("count", count)? as usize;
    let query = vector::<f32>("query", query)?;
    let query = query.as_slice()?;
    if query.is_empty() || query.len() > probe::MAX_BITS {
        return Err(PyValueError::new_err(format!(
            "query has {} entries; it must have 1 to {}",
            query.len(),
            probe::MAX_BITS
        )));
    }
    finite("query", query)?;
    let (buckets, costs) = py
        .detach(|| probe::probes(query, count))
        .into_iter()
        .unzip();
    let (buckets, costs): (Vec<u32>, Vec<f64>) = (buckets, costs);
    Ok((buckets.into_pyarray(py), costs.into_pyarray(py)))
}
