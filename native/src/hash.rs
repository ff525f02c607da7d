//! BLAKE3 of buffers, files and token chains.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::buffers::{integer, vector, Bytes, DETACH_FROM};

/// Bytes in a digest.
const DIGEST: usize = blake3::OUT_LEN;

/// Bytes read from a file at a time, and between two progress reports.
const READ_BYTES: usize = 1 << 20;

/// The largest chunk that may be asked for: beyond it a chunk is no unit of transfer.
const MAX_CHUNK_BYTES: u64 = 1 << 40;

/// Digests of the whole blocks of `tokens`, each over the digest before it and its own tokens.
fn chain(parent: [u8; DIGEST], tokens: &[i32], block: usize) -> Vec<u8> {
    let mut previous = parent;
    let mut out = Vec::with_capacity(tokens.len() / block * DIGEST);
    let mut bytes = Vec::with_capacity(block.min(tokens.len()) * 4);
    for tokens in tokens.chunks_exact(block) {
        bytes.clear();
        bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        let mut hasher = blake3::Hasher::new();
        hasher.update(&previous);
        hasher.update(&bytes);
        previous = hasher.finalize().into();
        out.extend_from_slice(&previous);
    }
    out
}

/// The most chunks that a file may have: their digests take 32 MiB.
const MAX_CHUNKS: usize = 1 << 20;

/// Why hashing a file stopped.
enum FileError<E> {
    Io(io::Error),
    TooManyChunks,
    Stopped(E),
}

/// The digest of a whole file, and the digests of its chunks, one after the other.
struct FileDigests {
    whole: [u8; DIGEST],
    chunks: Vec<u8>,
}

/// Hash `source` as a whole and by chunks; `progress` gets the bytes done so far after each read.
fn digest_reader<E>(
    mut source: impl Read,
    chunk_bytes: u64,
    mut progress: impl FnMut(u64) -> Result<(), E>,
) -> Result<FileDigests, FileError<E>> {
    let mut whole = blake3::Hasher::new();
    let mut chunk = blake3::Hasher::new();
    let mut chunks = Vec::new();
    let mut buffer = vec![0_u8; READ_BYTES];
    let mut done = 0_u64;
    loop {
        let count = match source.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(FileError::Io(error)),
        };
        let mut rest = &buffer[..count];
        whole.update(rest);
        while !rest.is_empty() {
            let room = chunk_bytes - chunk.count();
            let (now, later) =
                rest.split_at(rest.len().min(usize::try_from(room).unwrap_or(usize::MAX)));
            chunk.update(now);
            rest = later;
            if chunk.count() == chunk_bytes {
                if chunks.len() == MAX_CHUNKS * DIGEST {
                    return Err(FileError::TooManyChunks);
                }
                chunks.extend_from_slice(chunk.finalize().as_bytes());
                chunk.reset();
            }
        }
        done += count as u64;
        progress(done).map_err(FileError::Stopped)?;
    }
    if chunk.count() > 0 {
        chunks.extend_from_slice(chunk.finalize().as_bytes());
    }
    Ok(FileDigests {
        whole: whole.finalize().into(),
        chunks,
    })
}

/// Open a regular file; opening a pipe would wait for a writer, so that is refused first.
fn open_regular(path: &Path) -> io::Result<File> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not a regular file",
        ));
    }
    File::open(path)
}

/// An `OSError` (of the subclass that its number asks for) that carries the file's name.
fn os_error(error: &io::Error, path: &Path) -> PyErr {
    match error.raw_os_error() {
        Some(number) => PyOSError::new_err((number, error.to_string(), path.to_path_buf())),
        None => PyValueError::new_err(format!("{}: {error}", path.display())),
    }
}

/// The BLAKE3 digest (32 bytes) of a buffer.
#[pyfunction]
#[pyo3(name = "blake3", signature = (data, /))]
pub fn blake3_digest<'py>(
    py: Python<'py>,
    data: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let data = Bytes::new("data", data)?;
    let bytes = data.as_slice();
    let digest = if bytes.len() < DETACH_FROM {
        blake3::hash(bytes)
    } else {
        py.detach(|| blake3::hash(bytes))
    };
    Ok(PyBytes::new(py, digest.as_bytes()))
}

/// BLAKE3 of data that comes in pieces.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct Blake3 {
    hasher: Mutex<blake3::Hasher>,
}

impl Blake3 {
    fn finalize(&self) -> blake3::Hash {
        self.hasher
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .finalize()
    }
}

#[pymethods]
impl Blake3 {
    #[new]
    fn new() -> Self {
        Self {
            hasher: Mutex::new(blake3::Hasher::new()),
        }
    }

    /// Add the bytes of a buffer.
    #[pyo3(signature = (data, /))]
    fn update(&self, py: Python<'_>, data: &Bound<'_, PyAny>) -> PyResult<()> {
        let data = Bytes::new("data", data)?;
        let bytes = data.as_slice();
        // Never wait for the hasher while holding the interpreter: its owner may need it.
        py.detach(|| {
            self.hasher
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .update(bytes);
        });
        Ok(())
    }

    /// The digest (32 bytes) of everything added so far.
    fn digest<'py>(&self, py: Python<'py>) -> Bound<'py, PyBytes> {
        let digest = py.detach(|| self.finalize());
        PyBytes::new(py, digest.as_bytes())
    }

    /// The digest of everything added so far, as 64 hexadecimal digits.
    fn hexdigest(&self, py: Python<'_>) -> String {
        py.detach(|| self.finalize()).to_hex().to_string()
    }
}

/// The digest of a file and the concatenated digests of its chunks.
#[pyfunction]
#[pyo3(signature = (path, chunk_bytes, progress = None))]
pub fn hash_file<'py>(
    py: Python<'py>,
    path: PathBuf,
    chunk_bytes: &Bound<'py, PyAny>,
    progress: Option<Py<PyAny>>,
) -> PyResult<(Bound<'py, PyBytes>, Bound<'py, PyBytes>)> {
    let chunk_bytes = integer::<u64>("chunk_bytes", chunk_bytes)?;
    if !(1..=MAX_CHUNK_BYTES).contains(&chunk_bytes) {
        return Err(PyValueError::new_err(format!(
            "chunk_bytes is {chunk_bytes}; it must lie between 1 and {MAX_CHUNK_BYTES}"
        )));
    }
    let result = py.detach(|| {
        let file = open_regular(&path).map_err(FileError::Io)?;
        digest_reader(file, chunk_bytes, |done| {
            Python::attach(|py| {
                py.check_signals()?;
                match &progress {
                    Some(report) => report.call1(py, (done,)).map(|_| ()),
                    None => Ok(()),
                }
            })
        })
    });
    match result {
        Ok(digests) => Ok((
            PyBytes::new(py, &digests.whole),
            PyBytes::new(py, &digests.chunks),
        )),
        Err(FileError::Io(error)) => Err(os_error(&error, &path)),
        Err(FileError::TooManyChunks) => Err(PyValueError::new_err(format!(
            "{} has more than {MAX_CHUNKS} chunks of {chunk_bytes} bytes; use larger chunks",
            path.display()
        ))),
        Err(FileError::Stopped(error)) => Err(error),
    }
}

/// The hash chain of the whole blocks of `tokens`, as concatenated digests.
#[pyfunction]
pub fn hash_chain<'py>(
    py: Python<'py>,
    parent: &Bound<'py, PyAny>,
    tokens: &Bound<'py, PyAny>,
    block: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyBytes>> {
    let parent = Bytes::new("parent", parent)?;
    let Ok(parent) = <[u8; DIGEST]>::try_from(parent.as_slice()) else {
        return Err(PyValueError::new_err(format!(
            "parent has {} bytes; a digest has {DIGEST}",
            parent.as_slice().len()
        )));
    };
    let block = integer::<u32>("block", block)? as usize;
    if block == 0 {
        return Err(PyValueError::new_err(
            "block is 0; a block has at least 1 token",
        ));
    }
    let tokens = vector::<i32>("tokens", tokens)?;
    let slice = tokens.as_slice()?;
    let digests = py.detach(|| chain(parent, slice, block));
    Ok(PyBytes::new(py, &digests))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chain_links_whole_blocks_only() {
        let first =
            blake3::hash(&[[7_u8; 32].as_slice(), &[1, 0, 0, 0, 255, 255, 255, 255]].concat());
        let second =
            blake3::hash(&[first.as_bytes().as_slice(), &[2, 0, 0, 0, 3, 0, 0, 0]].concat());
        let expected = [first.as_bytes().as_slice(), second.as_bytes()].concat();
        assert_eq!(chain([7; 32], &[1, -1, 2, 3, 4], 2), expected);
        assert!(chain([7; 32], &[1, 2], 3).is_empty());
    }

    #[test]
    fn chunks_do_not_depend_on_how_reads_are_cut() {
        struct OneByOne<'a>(&'a [u8]);
        impl Read for OneByOne<'_> {
            fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                let Some((first, rest)) = self.0.split_first() else {
                    return Ok(0);
                };
                out[0] = *first;
                self.0 = rest;
                Ok(1)
            }
        }
        let data: Vec<u8> = (0..=255).collect();
        for chunk in [1, 7, 64, 255, 256, 257] {
            let expected: Vec<u8> = data
                .chunks(chunk)
                .flat_map(|part| *blake3::hash(part).as_bytes())
                .collect();
            let mut seen = 0;
            let Ok(digests) = digest_reader(OneByOne(&data), chunk as u64, |done| {
                seen = done;
                Ok::<(), ()>(())
            }) else {
                panic!("hashing memory failed")
            };
            assert_eq!(digests.chunks, expected);
            assert_eq!(&digests.whole, blake3::hash(&data).as_bytes());
            assert_eq!(seen, 256);
        }
    }

    #[test]
    fn a_stop_ends_the_reading() {
        let result = digest_reader(io::repeat(0), 16, |done| {
            if done > 4_000_000 {
                Err(done)
            } else {
                Ok(())
            }
        });
        assert!(matches!(result, Err(FileError::Stopped(done)) if done > 4_000_000));
    }
}
