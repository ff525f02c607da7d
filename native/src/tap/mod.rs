//! The llama.cpp tensor tap: a `ggml_backend_sched_eval_callback` that copies one tensor out.
//!
//! Here is what Python has of it; what runs inside a graph is in `callback`.
//!
//! It can copy the queries of some rows of every layer, too (see `queries`), beside what it is armed
//! for.
//!
//! A tap can also watch for tensors by the beginnings of their names and hold on to them
//! (see `held`): that is how the memory of the KV cache is found.

mod callback;
mod ggml;
mod held;
mod queries;

use std::sync::Mutex;

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::{integer, type_name, vector};
use callback::{locked, on_tensor, Shared, Target, ARMED, EARLY, IDLE, SKIP};
use ggml::{function, tensor_name, Access};
use held::Watch;
use queries::Queries;

pub use held::HeldTensor;

/// The array that is to be filled, and how many floats it has.
fn room<'a, 'py>(out: &'a Bound<'py, PyAny>) -> PyResult<(&'a Bound<'py, PyArrayDyn<f32>>, usize)> {
    let Ok(array) = out.cast::<PyArrayDyn<f32>>() else {
        let found = match out.cast::<PyUntypedArray>() {
            Ok(array) => format!("an array of {}", array.dtype()),
            Err(_) => type_name(out),
        };
        return Err(PyTypeError::new_err(format!(
            "out must be a NumPy array of float32, not {found}"
        )));
    };
    if !array.is_c_contiguous() || !array.data().is_aligned() {
        return Err(PyValueError::new_err(
            "out must be contiguous and aligned in memory",
        ));
    }
    if array.try_readwrite().is_err() {
        return Err(PyValueError::new_err(
            "out must be writable and not in use elsewhere",
        ));
    }
    Ok((array, array.len()))
}

/// Copies one named tensor of 32-bit floats out of every graph that runs while it is armed.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct TensorTap {
    // In a box, so that its address stays the same for the life of the tap.
    shared: Box<Shared>,
    capacity: usize,
    array: Mutex<Option<Py<PyArrayDyn<f32>>>>,
    query_array: Mutex<Option<Py<PyArrayDyn<f32>>>>,
}

#[pymethods]
impl TensorTap {
    #[new]
    #[pyo3(signature = (name, capacity, *, get_name, nbytes, tensor_get, tensor_set=None, early=None, get_data=None))]
    #[allow(clippy::too_many_arguments)] // ggml's functions, by keyword
    fn new(
        name: &str,
        capacity: &Bound<'_, PyAny>,
        get_name: &Bound<'_, PyAny>,
        nbytes: &Bound<'_, PyAny>,
        tensor_get: &Bound<'_, PyAny>,
        tensor_set: Option<&Bound<'_, PyAny>>,
        early: Option<&str>,
        get_data: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let capacity = usize::try_from(integer::<u64>("capacity", capacity)?)?;
        if capacity == 0 {
            return Err(PyValueError::new_err(
                "capacity is 0; the tap must hold at least one float",
            ));
        }
        let shared = Shared::new(
            tensor_name("name", name)?,
            early.map(|name| tensor_name("early", name)).transpose()?,
            function("get_name", get_name)?,
            function("nbytes", nbytes)?,
            Access {
                get: function("tensor_get", tensor_get)?,
                set: tensor_set
                    .map(|address| function("tensor_set", address))
                    .transpose()?,
                data: get_data
                    .map(|address| function("get_data", address))
                    .transpose()?,
            },
        );
        Ok(Self {
            shared: Box::new(shared),
            capacity,
            array: Mutex::new(None),
            query_array: Mutex::new(None),
        })
    }

    /// The address of the callback, for `cb_eval`.
    #[getter]
    fn callback(&self) -> usize {
        on_tensor as *const () as usize
    }

    /// The address to give as `cb_eval_user_data`; the tap must outlive the context that has it.
    #[getter]
    fn user_data(&self) -> usize {
        &raw const *self.shared as usize
    }

    /// The most floats that an armed array may hold.
    #[getter]
    fn capacity(&self) -> usize {
        self.capacity
    }

    /// Send what the tap sees from now on into `out`, from its start.
    #[pyo3(signature = (out, /, *, early=false))]
    fn arm(&self, out: &Bound<'_, PyAny>, early: bool) -> PyResult<()> {
        let py = out.py();
        if early && !self.shared.has_early() {
            return Err(PyValueError::new_err(
                "the tap was made without an early tensor",
            ));
        }
        let (array, floats) = room(out)?;
        if floats == 0 || floats > self.capacity {
            return Err(PyValueError::new_err(format!(
                "out holds {floats} floats; this tap takes 1 to {}",
                self.capacity
            )));
        }
        let target = Target::new(array.data(), floats);
        // The reference keeps the array alive, and NumPy then refuses to resize it.
        let kept = array.clone().unbind();
        py.detach(|| {
            let mut owner = locked(&self.array);
            self.shared
                .aim(Some(target), if early { EARLY } else { ARMED });
            owner.replace(kept)
        });
        Ok(())
    }

    /// Disarm; how many floats were written since `arm`, or -1 if some tensor did not fit.
    fn collect(&self, py: Python<'_>) -> PyResult<i64> {
        let (target, _array) = py.detach(|| {
            let mut owner = locked(&self.array);
            (self.shared.aim(None, IDLE), owner.take())
        });
        let target = target.ok_or_else(|| {
            PyValueError::new_err("the tap is not armed; call arm() before collect()")
        })?;
        target
            .written()
            .map_or(Ok(-1), |floats| Ok(i64::try_from(floats)?))
    }

    /// Send the queries of some rows of the next call into `out`.
    #[pyo3(signature = (prefix, out, rows, /, *, layers, call_rows))]
    fn query(
        &self,
        prefix: &str,
        out: &Bound<'_, PyAny>,
        rows: &Bound<'_, PyAny>,
        layers: &Bound<'_, PyAny>,
        call_rows: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let py = out.py();
        let prefix = tensor_name("prefix", prefix)?.into_bytes();
        let layers = usize::try_from(integer::<u64>("layers", layers)?)?;
        let call_rows = usize::try_from(integer::<u64>("call_rows", call_rows)?)?;
        let rows = vector::<i32>("rows", rows)?;
        let picked: Vec<usize> = rows
            .as_slice()?
            .iter()
            .filter_map(|&row| usize::try_from(row).ok())
            .filter(|&row| row < call_rows)
            .collect();
        if picked.is_empty() || picked.len() != rows.as_slice()?.len() {
            return Err(PyValueError::new_err(format!(
                "rows must be some of the {call_rows} of the call"
            )));
        }
        let (array, floats) = room(out)?;
        let parts = layers.saturating_mul(picked.len());
        if parts == 0 || floats == 0 || floats % parts != 0 {
            return Err(PyValueError::new_err(format!(
                "out holds {floats} floats, which is no row for each of {} rows in {layers} layers",
                picked.len()
            )));
        }
        let width = floats / parts;
        let queries = Queries::new(prefix, array.data(), layers, picked, call_rows, width);
        let kept = array.clone().unbind();
        py.detach(|| {
            let mut owner = locked(&self.query_array);
            self.shared.ask(Some(queries));
            owner.replace(kept)
        });
        Ok(())
    }

    /// Stop taking queries; whether those of every layer came.
    fn queried(&self, py: Python<'_>) -> PyResult<bool> {
        let (queries, _array) = py.detach(|| {
            let mut owner = locked(&self.query_array);
            (self.shared.ask(None), owner.take())
        });
        queries
            .map(|queries| queries.complete())
            .ok_or_else(|| PyValueError::new_err("the tap takes no queries; call query() first"))
    }

    /// From now on, note tensors whose names begin with `prefix`.
    #[pyo3(signature = (prefix, /, *, tensor_bytes))]
    fn watch(&self, prefix: &str, tensor_bytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = usize::try_from(integer::<u64>("tensor_bytes", tensor_bytes)?)?;
        let prefix = tensor_name("prefix", prefix)?;
        let watch = Watch::new(prefix.into_bytes(), bytes)?;
        self.shared.watch(Some(watch));
        Ok(())
    }

    /// Stop watching; what was found, by name.
    fn found(&self) -> Vec<HeldTensor> {
        self.shared.watch(None)
    }

    /// From now on, leave every graph at its first node, or let them run again.
    #[pyo3(signature = (on, /))]
    fn skip(&self, py: Python<'_>, on: bool) {
        py.detach(|| {
            let mut owner = locked(&self.array);
            self.shared.aim(None, if on { SKIP } else { IDLE });
            owner.take()
        });
    }
}
