//! The native module under `pyagent_node.native`.
//!
//! Each area is one file: the plain Rust in it knows nothing of Python and is tested with
//! `cargo test`; the thin `#[pyfunction]` or `#[pyclass]` beside it checks the arguments, releases
//! the interpreter lock and maps errors to `ValueError`, `TypeError` and `OSError`.

mod attention;
mod buffers;
mod choice;
mod hash;
mod kv;
mod pages;
mod philox;
mod problem;
mod raft;
mod sampling;
mod select;
mod sketch;
mod suffix;
mod tap;
mod xsalsa;

use pyo3::prelude::*;

#[pymodule]
mod _native {
    #[pymodule_export]
    use super::attention::attention_rows;
    #[pymodule_export]
    use super::hash::{blake3_digest, hash_chain, hash_file, Blake3};
    #[pymodule_export]
    use super::kv::{kv_decode, kv_encode, kv_moved};
    #[pymodule_export]
    use super::philox::gumbel;
    #[pymodule_export]
    use super::raft::core::{RaftCore, RaftDropped, RaftRefused};
    #[pymodule_export]
    use super::raft::types::{RaftConf, RaftEntry, RaftReady, RaftStatus};
    #[pymodule_export]
    use super::sampling::sample;
    #[pymodule_export]
    use super::sketch::{lsh_probes, sketch_pack, sketch_scan};
    #[pymodule_export]
    use super::suffix::{SuffixCorpus, SuffixIndex};
    #[pymodule_export]
    use super::tap::{HeldTensor, TensorTap};
    #[pymodule_export]
    use super::xsalsa::XSalsa20;
}
