//! The queries of some rows of a graph, layer by layer, as the tensor tap sees them.
//!
//! llama.cpp names a layer's queries `Qcur-<layer>` three times over: as they are computed, with their
//! bias or shaped into heads, and turned by their position. The last one counts, so each overwrites
//! what the one before left.

use std::ffi::c_void;

use super::ggml::TensorGet;

/// Where the queries of the wanted rows go.
pub struct Queries {
    prefix: Vec<u8>,
    start: *mut f32,
    layers: usize,
    /// The wanted rows, of as many as the call has.
    rows: Vec<usize>,
    call_rows: usize,
    /// Floats of a row.
    width: usize,
    seen: Vec<bool>,
    misfit: bool,
}

// SAFETY: the pointer is used only under the tap's mutex, and the tap owns the array behind it.
unsafe impl Send for Queries {}

impl Queries {
    /// Wait for queries of `layers` layers in a call of `call_rows` rows of `width` floats.
    ///
    /// `start` must point at room for `layers * rows.len() * width` floats; rows lie below
    /// `call_rows`.
    pub fn new(
        prefix: Vec<u8>,
        start: *mut f32,
        layers: usize,
        rows: Vec<usize>,
        call_rows: usize,
        width: usize,
    ) -> Self {
        Self {
            prefix,
            start,
            layers,
            rows,
            call_rows,
            width,
            seen: vec![false; layers],
            misfit: false,
        }
    }

    /// The layer whose queries a tensor of this name holds.
    pub fn layer(&self, name: &[u8]) -> Option<usize> {
        let number = name.strip_prefix(self.prefix.as_slice())?;
        if number.is_empty() || number.len() > 4 || !number.iter().all(u8::is_ascii_digit) {
            return None;
        }
        let layer = number
            .iter()
            .fold(0, |sum, digit| 10 * sum + usize::from(digit - b'0'));
        (layer < self.layers).then_some(layer)
    }

    /// Copy the wanted rows of a layer's tensor of `bytes` bytes, or note that it has other rows.
    ///
    /// # Safety
    /// `tensor` must be a live, computed and contiguous `ggml_tensor` of so many bytes of f32, and
    /// `get` ggml's function.
    pub unsafe fn copy(
        &mut self,
        layer: usize,
        tensor: *const c_void,
        bytes: usize,
        get: TensorGet,
    ) {
        let row_bytes = self.width * size_of::<f32>();
        if bytes != self.call_rows * row_bytes {
            self.misfit = true;
            return;
        }
        for (index, row) in self.rows.iter().enumerate() {
            // SAFETY: `layer < layers`, so the target lies in the array; the row lies in the tensor.
            unsafe {
                let to = self
                    .start
                    .add((layer * self.rows.len() + index) * self.width);
                get(tensor, to.cast::<c_void>(), row * row_bytes, row_bytes);
            }
        }
        self.seen[layer] = true;
    }

    /// Whether every layer came, in the size that was expected.
    pub fn complete(&self) -> bool {
        !self.misfit && self.seen.iter().all(|&seen| seen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_layers_of_the_slice_are_queries() {
        let mut room = [0.0_f32; 4];
        let queries = Queries::new(b"Qcur-".to_vec(), room.as_mut_ptr(), 12, vec![0], 1, 4);
        assert_eq!(queries.layer(b"Qcur-0"), Some(0));
        assert_eq!(queries.layer(b"Qcur-11"), Some(11));
        for name in [
            "Qcur-12",
            "Qcur-",
            "Qcur-1 (view)",
            "Kcur-1",
            "Qcur-99999",
            "Qcur-+1",
        ] {
            assert_eq!(queries.layer(name.as_bytes()), None, "{name}");
        }
    }
}
