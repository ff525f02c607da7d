//! Tensors that stay readable after the graph in which they were seen.
//!
//! The nodes of a graph are rebuilt for every call, but a view of the KV cache points at memory that
//! stays where it is for the life of the context.  A view is kept as a copy of its bytes - how many a
//! tensor has, ggml says itself (`ggml_tensor_overhead`), so nothing here knows the struct - and read
//! and written through `ggml_backend_tensor_get` and `_set`, which work on memory of devices, too.

use std::collections::BTreeMap;
use std::ffi::c_void;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use super::ggml::Access;
use crate::buffers::{integer, Bytes, DETACH_FROM};
use crate::pages;

/// More than any tensor takes, and more than any model has tensors of one kind.
const MAX_TENSOR_BYTES: usize = 4096;
const MAX_HELD: usize = 4096;

/// A tensor's bytes, aligned as a struct of pointers needs it.
type Copy = Box<[u64]>;

/// Which tensors to hold on to, and those seen so far: the largest of each name.
pub struct Watch {
    prefix: Vec<u8>,
    tensor_bytes: usize,
    seen: BTreeMap<Vec<u8>, (usize, Copy)>,
}

impl Watch {
    /// Watch for names that begin with `prefix`, of tensors that take `tensor_bytes` of memory.
    pub fn new(prefix: Vec<u8>, tensor_bytes: usize) -> PyResult<Self> {
        if tensor_bytes == 0 || tensor_bytes > MAX_TENSOR_BYTES || tensor_bytes % 8 != 0 {
            return Err(PyValueError::new_err(format!(
                "tensor_bytes is {tensor_bytes}; a tensor takes a multiple of 8 up to \
                 {MAX_TENSOR_BYTES}"
            )));
        }
        Ok(Self {
            prefix,
            tensor_bytes,
            seen: BTreeMap::new(),
        })
    }

    /// Hold on to `tensor` if its name is right and it is larger than others of that name.
    ///
    /// A view has the name of what it is a view of, and words in brackets behind a space.
    ///
    /// # Safety
    /// `tensor` must point at `tensor_bytes` readable bytes.
    pub unsafe fn see(&mut self, name: &[u8], bytes: usize, tensor: *const c_void) {
        if !name.starts_with(&self.prefix) {
            return;
        }
        let base = name.split(|&byte| byte == b' ').next().unwrap_or(name);
        let known = self.seen.get(base);
        let larger = known.map_or(self.seen.len() < MAX_HELD, |(most, _)| bytes > *most);
        if !larger {
            return;
        }
        let mut copy = vec![0_u64; self.tensor_bytes / 8].into_boxed_slice();
        // SAFETY: the copy has `tensor_bytes` bytes, and so has the tensor.
        unsafe {
            std::ptr::copy_nonoverlapping(
                tensor.cast::<u8>(),
                copy.as_mut_ptr().cast::<u8>(),
                self.tensor_bytes,
            );
        }
        self.seen.insert(base.to_vec(), (bytes, copy));
    }

    /// What was seen, in the order of the names.
    pub fn finish(self, access: Access) -> Vec<HeldTensor> {
        self.seen
            .into_iter()
            .map(|(name, (nbytes, copy))| HeldTensor {
                name: String::from_utf8_lossy(&name).into_owned(),
                nbytes,
                copy,
                access,
            })
            .collect()
    }
}

/// A tensor that can be read for as long as the memory behind it lives.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct HeldTensor {
    /// The name of what it is a view of.
    #[pyo3(get)]
    name: String,
    /// How many bytes it has.
    #[pyo3(get)]
    nbytes: usize,
    copy: Copy,
    access: Access,
}

impl HeldTensor {
    /// Refuse what is not all in the tensor.
    pub fn check(&self, offset: usize, size: usize) -> PyResult<()> {
        if offset > self.nbytes || size > self.nbytes - offset {
            return Err(PyValueError::new_err(format!(
                "bytes {offset} and the next {size} are not in a tensor of {}",
                self.nbytes
            )));
        }
        Ok(())
    }

    /// Copy the bytes from `offset` on.
    ///
    /// # Safety
    /// The range must lie in the tensor (`check`), and the memory behind it must be alive.
    pub unsafe fn copy_out(&self, offset: usize, out: &mut [u8]) {
        // SAFETY: by the contract above.
        unsafe {
            (self.access.get)(
                self.copy.as_ptr().cast::<c_void>(),
                out.as_mut_ptr().cast::<c_void>(),
                offset,
                out.len(),
            );
        }
    }

    /// The address of a checked range, for which the tensor must lie in this process's memory.
    fn address(&self, offset: usize, size: usize) -> PyResult<usize> {
        self.check(offset, size)?;
        let Some(data) = self.access.data else {
            return Err(PyValueError::new_err(
                "the tap was made without get_data; it cannot tell where a tensor lies",
            ));
        };
        // SAFETY: `data` is ggml's function, which reads the tensor's own field.
        let start = unsafe { data(self.copy.as_ptr().cast::<c_void>()) } as usize;
        if start == 0 {
            return Err(PyValueError::new_err("the tensor has no memory of its own"));
        }
        Ok(start + offset)
    }
}

#[pymethods]
impl HeldTensor {
    /// Give the whole pages among bytes `[offset, offset + size)` back to the system.
    #[pyo3(signature = (offset, size, /))]
    fn release(
        &self,
        py: Python<'_>,
        offset: &Bound<'_, PyAny>,
        size: &Bound<'_, PyAny>,
    ) -> PyResult<Option<usize>> {
        let offset = usize::try_from(integer::<u64>("offset", offset)?)?;
        let size = usize::try_from(integer::<u64>("size", size)?)?;
        if self.access.set.is_none() {
            return Err(PyValueError::new_err(
                "the tap was made without tensor_set; it cannot give contents up",
            ));
        }
        let start = self.address(offset, size)?;
        // SAFETY: the range lies in the tensor, which is the caller's to write.
        py.detach(|| unsafe { pages::release(start, size) })
            .map_err(PyErr::from)
    }

    /// How many of bytes `[offset, offset + size)` are in memory now.
    #[pyo3(signature = (offset, size, /))]
    fn resident(
        &self,
        offset: &Bound<'_, PyAny>,
        size: &Bound<'_, PyAny>,
    ) -> PyResult<Option<usize>> {
        let offset = usize::try_from(integer::<u64>("offset", offset)?)?;
        let size = usize::try_from(integer::<u64>("size", size)?)?;
        let start = self.address(offset, size)?;
        pages::resident(start, size).map_err(PyErr::from)
    }

    /// Bytes `[offset, offset + size)`.
    #[pyo3(signature = (offset, size, /))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        offset: &Bound<'py, PyAny>,
        size: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let offset = usize::try_from(integer::<u64>("offset", offset)?)?;
        let size = usize::try_from(integer::<u64>("size", size)?)?;
        self.check(offset, size)?;
        PyBytes::new_with(py, size, |out| {
            if size == 0 {
                return Ok(());
            }
            // An address, because pointers may not be taken out of the interpreter's lock.
            let to = out.as_mut_ptr() as usize;
            // SAFETY: `out` has `size` bytes, and nobody else knows of it yet; the range lies in the
            // tensor, whose memory lives by the promise of the one who made the tap.
            let copy = || unsafe {
                (self.access.get)(
                    self.copy.as_ptr().cast::<c_void>(),
                    to as *mut c_void,
                    offset,
                    size,
                );
            };
            if size < DETACH_FROM {
                copy();
            } else {
                py.detach(copy);
            }
            Ok(())
        })
    }

    /// Put `data` at `offset`.
    #[pyo3(signature = (offset, data, /))]
    fn write(
        &self,
        py: Python<'_>,
        offset: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let offset = usize::try_from(integer::<u64>("offset", offset)?)?;
        let bytes = Bytes::new("data", data)?;
        let from = bytes.as_slice();
        self.check(offset, from.len())?;
        let Some(set) = self.access.set else {
            return Err(PyValueError::new_err(
                "the tap was made without tensor_set; it cannot write",
            ));
        };
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the range lies in the tensor, whose memory lives by the promise of the one who made
        // the tap, and `from` is that long.
        let copy = || unsafe {
            set(
                self.copy.as_ptr().cast::<c_void>(),
                from.as_ptr().cast::<c_void>(),
                offset,
                from.len(),
            );
        };
        if from.len() < DETACH_FROM {
            copy();
        } else {
            py.detach(copy);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCESS: Access = Access {
        get: nothing,
        set: None,
        data: None,
    };

    unsafe extern "C" fn nothing(_: *const c_void, _: *mut c_void, _: usize, _: usize) {}

    #[test]
    fn the_largest_view_of_each_name_is_held() {
        let mut watch = Watch::new(b"cache_".to_vec(), 16).unwrap();
        let tensors: [[u64; 2]; 4] = [[1, 2], [3, 4], [5, 6], [7, 8]];
        let names: [(&[u8], usize); 4] = [
            (b"cache_k_l1 (view)", 10),
            (b"cache_k_l1 (reshaped) (view)", 30),
            (b"cache_k_l1 (view) (permuted)", 20),
            (b"Qcur-1", 99),
        ];
        for (tensor, (name, bytes)) in tensors.iter().zip(names) {
            // SAFETY: a tensor here has 16 bytes.
            unsafe { watch.see(name, bytes, tensor.as_ptr().cast::<c_void>()) };
        }
        let held = watch.finish(ACCESS);
        assert_eq!(held.len(), 1);
        assert_eq!((held[0].name.as_str(), held[0].nbytes), ("cache_k_l1", 30));
        assert_eq!(*held[0].copy, [3, 4]);
    }

    #[test]
    fn sizes_that_no_tensor_has_are_refused() {
        for bytes in [0, 7, MAX_TENSOR_BYTES + 8] {
            assert!(Watch::new(b"x".to_vec(), bytes).is_err());
        }
    }
}
