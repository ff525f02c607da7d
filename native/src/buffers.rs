//! Views of Python buffers and NumPy arrays, without copying, and with errors that name the argument.

use numpy::{
    Element, PyArray1, PyArrayMethods, PyReadonlyArray1, PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::buffer::PyUntypedBuffer;
use pyo3::exceptions::{PyOverflowError, PyTypeError, PyValueError};
use pyo3::prelude::*;

/// Below this many bytes, giving the interpreter lock away costs more than the work.
pub const DETACH_FROM: usize = 16 * 1024;

/// A contiguous buffer of any object that has one, as bytes; the exporter stays locked while it lives.
pub struct Bytes(PyUntypedBuffer);

impl Bytes {
    /// Borrow the buffer of `object`; `TypeError` if it has none, `ValueError` if it has holes.
    pub fn new(name: &str, object: &Bound<'_, PyAny>) -> PyResult<Self> {
        let Ok(buffer) = PyUntypedBuffer::get(object) else {
            return Err(PyTypeError::new_err(format!(
                "{name} must be bytes or another buffer, not {}",
                type_name(object)
            )));
        };
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err(format!(
                "{name} must be a contiguous buffer"
            )));
        }
        Ok(Self(buffer))
    }

    /// The bytes. The caller of the Python function must not change them during the call.
    pub fn as_slice(&self) -> &[u8] {
        let length = self.0.len_bytes();
        if length == 0 {
            return &[];
        }
        // SAFETY: the buffer is contiguous, `length` bytes long, and exported (so neither moved nor
        // freed) while `self` lives.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast::<u8>(), length) }
    }
}

/// View `object` as a one-dimensional contiguous array of `T`, naming the argument when it is not.
pub fn vector<'py, T: Element>(
    name: &str,
    object: &Bound<'py, PyAny>,
) -> PyResult<PyReadonlyArray1<'py, T>> {
    let py = object.py();
    let Ok(array) = object.cast::<PyArray1<T>>() else {
        let wanted = T::get_dtype(py);
        let found = match object.cast::<PyUntypedArray>() {
            Ok(array) => {
                format!("a {}-dimensional array of {}", array.ndim(), array.dtype())
            }
            Err(_) => type_name(object),
        };
        return Err(PyTypeError::new_err(format!(
            "{name} must be a 1-dimensional NumPy array of {wanted}, not {found}"
        )));
    };
    // An element that is not aligned would be as undefined as one that is not there.
    if !array.is_c_contiguous() || !array.data().is_aligned() {
        return Err(PyValueError::new_err(format!(
            "{name} must be contiguous and aligned in memory; pass numpy.ascontiguousarray({name})"
        )));
    }
    array
        .try_readonly()
        .map_err(|_| PyValueError::new_err(format!("{name} is being written to by another call")))
}

/// Take `object` as an integer of type `T`; `ValueError` (not `OverflowError`) when it is out of range.
pub fn integer<'py, T>(name: &str, object: &Bound<'py, PyAny>) -> PyResult<T>
where
    T: Bounds + for<'a> FromPyObject<'a, 'py, Error = PyErr>,
{
    object.extract::<T>().map_err(|error| {
        if error.is_instance_of::<PyOverflowError>(object.py()) {
            let (low, high) = T::BOUNDS;
            PyValueError::new_err(format!("{name} must lie between {low} and {high}"))
        } else {
            PyTypeError::new_err(format!(
                "{name} must be an integer, not {}",
                type_name(object)
            ))
        }
    })
}

/// An unsigned integer type with its range, for [`integer`].
pub trait Bounds {
    /// The smallest and the largest value.
    const BOUNDS: (u64, u64);
}

impl Bounds for u32 {
    const BOUNDS: (u64, u64) = (0, u32::MAX as u64);
}

impl Bounds for u64 {
    const BOUNDS: (u64, u64) = (0, u64::MAX);
}

/// The name of an object's type, for messages.
pub fn type_name(object: &Bound<'_, PyAny>) -> String {
    object
        .get_type()
        .name()
        .map_or_else(|_| "an object".to_owned(), |name| name.to_string())
}
