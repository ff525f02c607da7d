//! The callback, and what it shares with the tap that it belongs to.
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
//! The callback runs on the thread that called `llama_decode`, usually with the interpreter lock
//! given away, and never touches the interpreter.

use std::ffi::{c_void, CStr, CString};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::ggml::{Access, GetName, NumBytes};
use super::held::{HeldTensor, Watch};
use super::queries::Queries;

/// Nothing is copied.
pub const IDLE: u8 = 0;
/// The tapped tensor is copied.
pub const ARMED: u8 = 1;
/// The early tensor is copied, and its graph ends there.
pub const EARLY: u8 = 2;
/// Every graph ends at its first node.
pub const SKIP: u8 = 3;

/// What is behind a mutex; nothing here panics with a lock in hand.
pub fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where the tapped floats go.
pub struct Target {
    start: *mut f32,
    floats: usize,
    written: usize,
    overflow: bool,
}

impl Target {
    /// `start` must point at room for so many floats for as long as this is a tap's target.
    pub fn new(start: *mut f32, floats: usize) -> Self {
        Self {
            start,
            floats,
            written: 0,
            overflow: false,
        }
    }

    /// How many floats were written, `None` if some tensor did not fit.
    pub fn written(&self) -> Option<usize> {
        (!self.overflow).then_some(self.written)
    }
}

// SAFETY: the pointer is used only under the mutex, and `TensorTap` owns the array behind it.
unsafe impl Send for Target {}

/// What the callback sees through `user_data`.
pub struct Shared {
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
    pub fn new(
        name: CString,
        early: Option<CString>,
        get_name: GetName,
        nbytes: NumBytes,
        access: Access,
    ) -> Self {
        Self {
            name,
            early,
            get_name,
            nbytes,
            access,
            state: AtomicU8::new(IDLE),
            watching: AtomicBool::new(false),
            querying: AtomicBool::new(false),
            target: Mutex::new(None),
            queries: Mutex::new(None),
            watch: Mutex::new(None),
        }
    }

    /// Whether there is a tensor that ends its graph.
    pub fn has_early(&self) -> bool {
        self.early.is_some()
    }

    /// Go into `state` with this target; returns the one before.
    pub fn aim(&self, target: Option<Target>, state: u8) -> Option<Target> {
        let mut guard = locked(&self.target);
        self.state.store(state, Ordering::Release);
        std::mem::replace(&mut *guard, target)
    }

    /// Take these queries from now on; returns those before.
    pub fn ask(&self, queries: Option<Queries>) -> Option<Queries> {
        let mut guard = locked(&self.queries);
        self.querying.store(queries.is_some(), Ordering::Release);
        std::mem::replace(&mut *guard, queries)
    }

    /// Watch for these tensors from now on; returns those of before that were seen.
    pub fn watch(&self, watch: Option<Watch>) -> Vec<HeldTensor> {
        let mut guard = locked(&self.watch);
        self.watching.store(watch.is_some(), Ordering::Release);
        std::mem::replace(&mut *guard, watch)
            .map_or_else(Vec::new, |watch| watch.finish(self.access))
    }

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
        let mut guard = locked(&self.queries);
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
        let mut guard = locked(&self.watch);
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
        let mut guard = locked(&self.target);
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
pub unsafe extern "C" fn on_tensor(
    tensor: *const c_void,
    ask: bool,
    user_data: *mut c_void,
) -> bool {
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
