//! XSalsa20, the stream cipher of libp2p private networks.

use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use salsa20::cipher::{KeyIvInit, StreamCipher};

use crate::buffers::{Bytes, DETACH_FROM};

/// One direction of a connection: each call carries on in the key stream where the last one ended.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct XSalsa20 {
    cipher: Mutex<salsa20::XSalsa20>,
}

impl XSalsa20 {
    fn apply_to(&self, buffer: &mut [u8]) -> Result<(), salsa20::cipher::StreamCipherError> {
        let mut cipher = self.cipher.lock().unwrap_or_else(PoisonError::into_inner);
        cipher.try_apply_keystream(buffer)
    }
}

#[pymethods]
impl XSalsa20 {
    #[new]
    fn new(key: &Bound<'_, PyAny>, nonce: &Bound<'_, PyAny>) -> PyResult<Self> {
        let (key, nonce) = (Bytes::new("key", key)?, Bytes::new("nonce", nonce)?);
        // The lengths may be told, the bytes may not.
        let wrong = |what: &str, wanted: usize, found: usize| {
            PyValueError::new_err(format!("{what} has {found} bytes; XSalsa20 takes {wanted}"))
        };
        let key: &[u8; 32] = key
            .as_slice()
            .try_into()
            .map_err(|_| wrong("key", 32, key.as_slice().len()))?;
        let nonce: &[u8; 24] = nonce
            .as_slice()
            .try_into()
            .map_err(|_| wrong("nonce", 24, nonce.as_slice().len()))?;
        Ok(Self {
            cipher: Mutex::new(salsa20::XSalsa20::new(key.into(), nonce.into())),
        })
    }

    /// Encrypt or decrypt (the same thing) the next bytes of the stream.
    #[pyo3(signature = (data, /))]
    fn apply<'py>(
        &self,
        py: Python<'py>,
        data: &Bound<'py, PyAny>,
    ) -> PyResult<Bound<'py, PyBytes>> {
        let data = Bytes::new("data", data)?;
        let input = data.as_slice();
        PyBytes::new_with(py, input.len(), |output| {
            let mut work = || {
                output.copy_from_slice(input);
                self.apply_to(output)
            };
            let result = if input.len() < DETACH_FROM {
                work()
            } else {
                py.detach(work)
            };
            result.map_err(|_| PyValueError::new_err("the key stream has come to its end"))
        })
    }
}
