//! What Python sees of the codec.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::{Problem, Shape};
use crate::buffers::{integer, Bytes};

impl From<Problem> for PyErr {
    fn from(problem: Problem) -> Self {
        PyValueError::new_err(problem.to_string())
    }
}

/// Make a block of the rows of one layer.
#[pyfunction]
#[pyo3(signature = (level, keys, values, *, tokens, heads, width, rope_base = 0.0, rope_halves = false, first = 0))]
#[allow(clippy::too_many_arguments)] // by keyword, in Python
pub fn kv_encode<'py>(
    py: Python<'py>,
    level: &Bound<'py, PyAny>,
    keys: &Bound<'py, PyAny>,
    values: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
    heads: &Bound<'py, PyAny>,
    width: &Bound<'py, PyAny>,
    rope_base: f32,
    rope_halves: bool,
    first: usize,
) -> PyResult<Bound<'py, PyBytes>> {
    let level = u8::try_from(integer::<u32>("level", level)?).unwrap_or(u8::MAX);
    let shape = Shape {
        tokens: integer::<u32>("tokens", tokens)? as usize,
        heads: integer::<u32>("heads", heads)? as usize,
        width: integer::<u32>("width", width)? as usize,
        rope_base,
        halves: rope_halves,
    };
    let keys = Bytes::new("keys", keys)?;
    let values = Bytes::new("values", values)?;
    let (keys, values) = (keys.as_slice(), values.as_slice());
    let block = py.detach(|| super::encode(level, keys, values, shape, first))?;
    Ok(PyBytes::new(py, &block))
}

/// What a block holds: `(level, tokens, heads, width, keys, values)`.
type Decoded<'py> = (
    u8,
    usize,
    usize,
    usize,
    Bound<'py, PyBytes>,
    Bound<'py, PyBytes>,
);

/// Give the rows of a block back.
#[pyfunction]
#[pyo3(signature = (block, /))]
pub fn kv_decode<'py>(py: Python<'py>, block: &Bound<'py, PyAny>) -> PyResult<Decoded<'py>> {
    let block = Bytes::new("block", block)?;
    let bytes = block.as_slice();
    let (header, rows) = py.detach(|| super::decode(bytes))?;
    let shape = header.shape;
    let (keys, values) = rows.split_at(shape.bytes());
    Ok((
        header.level,
        shape.tokens,
        shape.heads,
        shape.width,
        PyBytes::new(py, keys),
        PyBytes::new(py, values),
    ))
}
