//! The llama.cpp tensor tap: a `ggml_backend_sched_eval_callback` that copies one tensor out.
//!
//! While a graph runs, the scheduler calls the callback twice over: with `ask` set, for every node
//! ("shall I stop after this one for you to see it?"), and without it for the nodes that were asked
//! for, once they are computed.  Returning false from the second call abandons the rest of that
//! part of the graph *and still reports success*, so this callback never does.
//!
//! The callback runs on the thread that called `llama_decode`, usually with the interpreter lock
//! given away, and never touches the interpreter.

use std::ffi::{c_char, c_void, CStr, CString};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::{integer, type_name};

type GetName = unsafe extern "C" fn(tensor: *const c_void) -> *const c_char;
type NumBytes = unsafe extern "C" fn(tensor: *const c_void) -> usize;
type TensorGet =
    unsafe extern "C" fn(tensor: *const c_void, data: *mut c_void, offset: usize, size: usize);

/// The longest tensor name that ggml keeps, with its terminating zero (`GGML_MAX_NAME`).
const MAX_NAME: usize = 64;

/// Where the tapped floats go.
struct Target {
    start: *mut f32,
    floats: usize,
    written: usize,
    overflow: bool,
}

// SAFETY: the pointer is used only under the mutex, and `TensorTap` owns the array behind it.
unsafe impl Send for Target {}

/// What the callback sees through `user_data`.
struct Shared {
    name: CString,
    get_name: GetName,
    nbytes: NumBytes,
    tensor_get: TensorGet,
    armed: AtomicBool,
    target: Mutex<Option<Target>>,
}

impl Shared {
    /// Whether `tensor` is the tapped one.
    ///
    /// # Safety
    /// `tensor` must be a live `ggml_tensor`.
    unsafe fn wants(&self, tensor: *const c_void) -> bool {
        if !self.armed.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: `get_name` is ggml's function, which gives a zero-terminated name in the tensor.
        let name = unsafe { (self.get_name)(tensor) };
        // SAFETY: as above; a null pointer is turned away first.
        !name.is_null() && unsafe { CStr::from_ptr(name) } == self.name.as_c_str()
    }

    /// Append the tensor's floats to the target, or note that they do not fit.
    ///
    /// # Safety
    /// `tensor` must be a live, computed `ggml_tensor` of 32-bit floats.
    unsafe fn copy(&self, tensor: *const c_void) {
        let mut guard = self.target.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(target) = guard.as_mut() else { return };
        // SAFETY: `nbytes` is ggml's function.
        let bytes = unsafe { (self.nbytes)(tensor) };
        let floats = bytes / size_of::<f32>();
        if bytes % size_of::<f32>() != 0 || floats > target.floats - target.written {
            target.overflow = true;
            return;
        }
        // SAFETY: `written + floats <= floats of the target`, so both the pointer and the copy stay
        // inside the array; `tensor_get` is ggml's function and copies exactly `bytes` bytes.
        unsafe {
            let to = target.start.add(target.written);
            (self.tensor_get)(tensor, to.cast::<c_void>(), 0, bytes);
        }
        target.written += floats;
    }
}

/// The callback itself.
///
/// # Safety
/// Called by ggml with a live tensor and the `user_data` of a `TensorTap` that is still alive.
unsafe extern "C" fn on_tensor(tensor: *const c_void, ask: bool, user_data: *mut c_void) -> bool {
    if tensor.is_null() || user_data.is_null() {
        return !ask;
    }
    // SAFETY: by the contract above it points at the tap's `Shared`, which is only ever shared.
    let shared = unsafe { &*user_data.cast::<Shared>() };
    if ask {
        // SAFETY: the tensor is live.
        return unsafe { shared.wants(tensor) };
    }
    // The scheduler may also show a node that was asked for by another question; look again.
    // SAFETY: the tensor is live and computed.
    unsafe {
        if shared.wants(tensor) {
            shared.copy(tensor);
        }
    }
    true
}

/// Copies one named tensor of 32-bit floats out of every graph that runs while it is armed.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct TensorTap {
    // In a box, so that its address stays the same for the life of the tap.
    shared: Box<Shared>,
    capacity: usize,
    array: Mutex<Option<Py<PyArrayDyn<f32>>>>,
}

impl TensorTap {
    fn set_target(&self, target: Option<Target>) -> Option<Target> {
        let armed = target.is_some();
        let mut guard = self
            .shared
            .target
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.armed.store(armed, Ordering::Release);
        std::mem::replace(&mut *guard, target)
    }
}

/// Turn the address of a C function into the function.
fn function<F: Copy>(what: &str, address: &Bound<'_, PyAny>) -> PyResult<F> {
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

#[pymethods]
impl TensorTap {
    #[new]
    #[pyo3(signature = (name, capacity, *, get_name, nbytes, tensor_get))]
    fn new(
        name: &str,
        capacity: &Bound<'_, PyAny>,
        get_name: &Bound<'_, PyAny>,
        nbytes: &Bound<'_, PyAny>,
        tensor_get: &Bound<'_, PyAny>,
    ) -> PyResult<Self> {
        if name.is_empty() || name.len() >= MAX_NAME {
            return Err(PyValueError::new_err(format!(
                "name has {} bytes; a tensor's name has 1 to {}",
                name.len(),
                MAX_NAME - 1
            )));
        }
        let capacity = usize::try_from(integer::<u64>("capacity", capacity)?)?;
        if capacity == 0 {
            return Err(PyValueError::new_err(
                "capacity is 0; the tap must hold at least one float",
            ));
        }
        let name = CString::new(name)
            .map_err(|_| PyValueError::new_err("name holds a zero byte, which ends a C string"))?;
        let shared = Shared {
            name,
            get_name: function("get_name", get_name)?,
            nbytes: function("nbytes", nbytes)?,
            tensor_get: function("tensor_get", tensor_get)?,
            armed: AtomicBool::new(false),
            target: Mutex::new(None),
        };
        Ok(Self {
            shared: Box::new(shared),
            capacity,
            array: Mutex::new(None),
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
    #[pyo3(signature = (out, /))]
    fn arm(&self, out: &Bound<'_, PyAny>) -> PyResult<()> {
        let py = out.py();
        let Ok(array) = out.cast::<PyArrayDyn<f32>>() else {
            let found = match out.cast::<PyUntypedArray>() {
                Ok(array) => format!("an array of {}", array.dtype()),
                Err(_) => type_name(out),
            };
            return Err(PyTypeError::new_err(format!(
                "out must be a NumPy array of float32, not {found}"
            )));
        };
        let floats = array.len();
        if floats == 0 || floats > self.capacity {
            return Err(PyValueError::new_err(format!(
                "out holds {floats} floats; this tap takes 1 to {}",
                self.capacity
            )));
        }
        let start = array.data();
        if !array.is_c_contiguous() || !start.is_aligned() {
            return Err(PyValueError::new_err(
                "out must be contiguous and aligned in memory",
            ));
        }
        if array.try_readwrite().is_err() {
            return Err(PyValueError::new_err(
                "out must be writable and not in use elsewhere",
            ));
        }
        let target = Target {
            start,
            floats,
            written: 0,
            overflow: false,
        };
        // The reference keeps the array alive, and NumPy then refuses to resize it.
        let kept = array.clone().unbind();
        py.detach(|| {
            let mut owner = self.array.lock().unwrap_or_else(PoisonError::into_inner);
            self.set_target(Some(target));
            owner.replace(kept)
        });
        Ok(())
    }

    /// Disarm; how many floats were written since `arm`, or -1 if some tensor did not fit.
    fn collect(&self, py: Python<'_>) -> PyResult<i64> {
        let (target, _array) = py.detach(|| {
            let mut owner = self.array.lock().unwrap_or_else(PoisonError::into_inner);
            (self.set_target(None), owner.take())
        });
        match target {
            None => Err(PyValueError::new_err(
                "the tap is not armed; call arm() before collect()",
            )),
            Some(target) if target.overflow => Ok(-1),
            Some(target) => Ok(i64::try_from(target.written)?),
        }
    }
}
