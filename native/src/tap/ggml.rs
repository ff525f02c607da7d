//! What the tap takes from ggml: functions, by their addresses, and names.

use std::ffi::{c_char, c_void, CString};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::buffers::integer;

pub type GetName = unsafe extern "C" fn(tensor: *const c_void) -> *const c_char;
pub type NumBytes = unsafe extern "C" fn(tensor: *const c_void) -> usize;
pub type TensorGet =
    unsafe extern "C" fn(tensor: *const c_void, data: *mut c_void, offset: usize, size: usize);
pub type TensorSet =
    unsafe extern "C" fn(tensor: *const c_void, data: *const c_void, offset: usize, size: usize);
pub type GetData = unsafe extern "C" fn(tensor: *const c_void) -> *mut c_void;

/// ggml's ways to the contents of a tensor.
#[derive(Clone, Copy)]
pub struct Access {
    pub get: TensorGet,
    pub set: Option<TensorSet>,
    /// Where a tensor lies, for memory of this process.
    pub data: Option<GetData>,
}

/// The longest tensor name that ggml keeps, with its terminating zero (`GGML_MAX_NAME`).
const MAX_NAME: usize = 64;

/// A tensor's name as ggml has it; `what` is the argument it came in.
pub fn tensor_name(what: &str, name: &str) -> PyResult<CString> {
    if name.is_empty() || name.len() >= MAX_NAME {
        return Err(PyValueError::new_err(format!(
            "{what} has {} bytes; a tensor's name has 1 to {}",
            name.len(),
            MAX_NAME - 1
        )));
    }
    CString::new(name).map_err(|_| {
        PyValueError::new_err(format!("{what} holds a zero byte, which ends a C string"))
    })
}

/// Turn the address of a C function into the function.
pub fn function<F: Copy>(what: &str, address: &Bound<'_, PyAny>) -> PyResult<F> {
    let address = usize::try_from(integer::<u64>(what, address)?)?;
    assert_eq!(size_of::<F>(), size_of::<usize>());
    if address == 0 {
        return Err(PyValueError::new_err(format!(
            "{what} is 0; it must be a function's address"
        )));
    }
    // SAFETY: `F` is a function pointer type, which has the size of an address; that the function
    // behind it is the one it claims to be is the caller's word.
    Ok(unsafe { std::mem::transmute_copy::<usize, F>(&address) })
}
