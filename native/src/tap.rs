//! The llama.cpp tensor tap: a `ggml_backend_sched_eval_callback` that copies one tensor out.
//!
//! While a graph runs, the scheduler calls the callback twice over: with `ask` set, for every node
//! ("shall I stop after this one for you to see it?"), and without it for the nodes that were asked
//! for, once they are computed.  Returning false from the second call abandons the rest of that
//! part of the graph *and still reports success*, so this callback does not.
//!
//! Unless it was asked to: an *early* tensor ends the graph once it is copied, for tests that need
//! the first layers only.
//!
//! Or the graph ends at its first node: llama.cpp has given its rows cells by then, and what belongs into
//! them is written by someone who has it already.
//!
//! It can copy the queries of some rows of every layer, too (see `queries`), beside what it is armed
//! for.
//!
//! A tap can also watch for tensors by the beginnings of their names and hold on to them
//! (see `held`): that is how the memory of the KV cache is found.
//!
//! The callback runs on the thread that called `llama_decode`, usually with the interpreter lock
//! given away, and never touches the interpreter.

use std::ffi::{c_char, c_void, CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, PoisonError};

use numpy::{PyArrayDyn, PyArrayMethods, PyUntypedArray, PyUntypedArrayMethods};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;

use crate::buffers::{integer, type_name, vector};
use crate::held::{HeldTensor, Watch};
use crate::queries::Queries;

type GetName = unsafe extern "C" fn(tensor: *const c_void) -> *const c_char;
type NumBytes = unsafe extern "C" fn(tensor: *const c_void) -> usize;
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

/// Nothing is copied.
const IDLE: u8 = 0;
/// The tapped tensor is copied.
const ARMED: u8 = 1;
/// The early tensor is copied, and its graph ends there.
const EARLY: u8 = 2;
/// Every graph ends at its first node.
const SKIP: u8 = 3;

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
    early: Option<CString>,
    get_name: GetName,
    nbytes: NumBytes,
    access: Access,
    state: AtomicU8,
    watching: AtomicBool,
    querying: AtomicBool,
    target: Mutex<Option<Target>>,
    queries: Mutex<Option<Queries>>,
    watch: Mutex<Option<Watch>>,
}

impl Shared {
    /// The name of `tensor`, if it has one.
    ///
    /// # Safety
    /// `tensor` must be a live `ggml_tensor`; the name lives as long.
    unsafe fn name_of<'a>(&self, tensor: *const c_void) -> Option<&'a CStr> {
        // SAFETY: `get_name` is ggml's function, which gives a zero-terminated name in the tensor.
        let name = unsafe { (self.get_name)(tensor) };
        // SAFETY: as above; a null pointer is turned away first.
        (!name.is_null()).then(|| unsafe { CStr::from_ptr(name) })
    }

    /// Whether `tensor` is the one to be copied now.
    ///
    /// # Safety
    /// `tensor` must be a live `ggml_tensor`.
    unsafe fn wants(&self, tensor: *const c_void) -> bool {
        let wanted = match self.state.load(Ordering::Acquire) {
            ARMED => Some(&self.name),
            EARLY => self.early.as_ref(),
            _ => None,
        };
        // SAFETY: the tensor is live.
        wanted.is_some_and(|wanted| unsafe { self.name_of(tensor) } == Some(wanted.as_c_str()))
    }

    /// Whether `tensor` holds queries that are wanted; if it is computed, take them.
    ///
    /// # Safety
    /// `tensor` must be a live `ggml_tensor`, computed if that is said.
    unsafe fn query(&self, tensor: *const c_void, computed: bool) -> bool {
        if !self.querying.load(Ordering::Acquire) {
            return false;
        }
        // SAFETY: the tensor is live.
        let Some(name) = (unsafe { self.name_of(tensor) }) else {
            return false;
        };
        let mut guard = self.queries.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queries) = guard.as_mut() else {
            return false;
        };
        let Some(layer) = queries.layer(name.to_bytes()) else {
            return false;
        };
        if computed {
            // SAFETY: the tensor is computed, `nbytes` and `get` are ggml's functions.
            unsafe {
                let bytes = (self.nbytes)(tensor);
                queries.copy(layer, tensor, bytes, self.access.get);
            }
        }
        true
    }

    /// Hold on to `tensor` if it is watched for.
    ///
    /// # Safety
    /// `tensor` must be a live `ggml_tensor`.
    unsafe fn look(&self, tensor: *const c_void) {
        if !self.watching.load(Ordering::Acquire) {
            return;
        }
        // SAFETY: the tensor is live, and `nbytes` is ggml's function.
        let (name, bytes) = unsafe { (self.name_of(tensor), (self.nbytes)(tensor)) };
        let mut guard = self.watch.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(watch), Some(name)) = (guard.as_mut(), name) {
            // SAFETY: the tensor is live, so as many bytes as a tensor has can be read from it.
            unsafe { watch.see(name.to_bytes(), bytes, tensor) };
        }
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
            (self.access.get)(tensor, to.cast::<c_void>(), 0, bytes);
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
    if shared.state.load(Ordering::Acquire) == SKIP {
        return ask;
    }
    if ask {
        // SAFETY: the tensor is live.
        return unsafe {
            shared.look(tensor);
            shared.wants(tensor) || shared.query(tensor, false)
        };
    }
    // The scheduler may also show a node that was asked for by another question; look again.
    // SAFETY: the tensor is live and computed.
    unsafe {
        if shared.wants(tensor) {
            shared.copy(tensor);
            return shared.state.load(Ordering::Acquire) != EARLY;
        }
        shared.query(tensor, true);
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
    query_array: Mutex<Option<Py<PyArrayDyn<f32>>>>,
}

impl TensorTap {
    fn set_target(&self, target: Option<Target>, state: u8) -> Option<Target> {
        let mut guard = self
            .shared
            .target
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.state.store(state, Ordering::Release);
        std::mem::replace(&mut *guard, target)
    }
}

impl TensorTap {
    fn set_queries(&self, queries: Option<Queries>) -> Option<Queries> {
        let mut guard = self
            .shared
            .queries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared
            .querying
            .store(queries.is_some(), Ordering::Release);
        std::mem::replace(&mut *guard, queries)
    }
}

/// A tensor's name as ggml has it; `what` is the argument it came in.
fn tensor_name(what: &str, name: &str) -> PyResult<CString> {
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
        let shared = Shared {
            name: tensor_name("name", name)?,
            early: early.map(|name| tensor_name("early", name)).transpose()?,
            get_name: function("get_name", get_name)?,
            nbytes: function("nbytes", nbytes)?,
            access: Access {
                get: function("tensor_get", tensor_get)?,
                set: tensor_set
                    .map(|address| function("tensor_set", address))
                    .transpose()?,
                data: get_data
                    .map(|address| function("get_data", address))
                    .transpose()?,
            },
            state: AtomicU8::new(IDLE),
            watching: AtomicBool::new(false),
            querying: AtomicBool::new(false),
            target: Mutex::new(None),
            queries: Mutex::new(None),
            watch: Mutex::new(None),
        };
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
        if early && self.shared.early.is_none() {
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
        let start = array.data();
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
            self.set_target(Some(target), if early { EARLY } else { ARMED });
            owner.replace(kept)
        });
        Ok(())
    }

    /// Disarm; how many floats were written since `arm`, or -1 if some tensor did not fit.
    fn collect(&self, py: Python<'_>) -> PyResult<i64> {
        let (target, _array) = py.detach(|| {
            let mut owner = self.array.lock().unwrap_or_else(PoisonError::into_inner);
            (self.set_target(None, IDLE), owner.take())
        });
        match target {
            None => Err(PyValueError::new_err(
                "the tap is not armed; call arm() before collect()",
            )),
            Some(target) if target.overflow => Ok(-1),
            Some(target) => Ok(i64::try_from(target.written)?),
        }
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
            let mut owner = self
                .query_array
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            self.set_queries(Some(queries));
            owner.replace(kept)
        });
        Ok(())
    }

    /// Stop taking queries; whether those of every layer came.
    fn queried(&self, py: Python<'_>) -> PyResult<bool> {
        let (queries, _array) = py.detach(|| {
            let mut owner = self
                .query_array
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            (self.set_queries(None), owner.take())
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
        let mut guard = self
            .shared
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *guard = Some(watch);
        self.shared.watching.store(true, Ordering::Release);
        Ok(())
    }

    /// Stop watching; what was found, by name.
    fn found(&self) -> Vec<HeldTensor> {
        let mut guard = self
            .shared
            .watch
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        self.shared.watching.store(false, Ordering::Release);
        guard
            .take()
            .map_or_else(Vec::new, |watch| watch.finish(self.shared.access))
    }

    /// From now on, leave every graph at its first node, or let them run again.
    #[pyo3(signature = (on, /))]
    fn skip(&self, py: Python<'_>, on: bool) {
        py.detach(|| {
            let mut owner = self.array.lock().unwrap_or_else(PoisonError::into_inner);
            self.set_target(None, if on { SKIP } else { IDLE });
            owner.take()
        });
    }
}
