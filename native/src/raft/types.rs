//! The Python values that go in and out of the core.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};

use protobuf::Message as _;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList, PyTuple};
use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType};

use super::conf;
use super::node::{Node, Work};

/// Who votes and who follows.
#[pyclass(frozen, eq, hash, skip_from_py_object, module = "pyagent_node.native")]
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct RaftConf {
    voters: Vec<u64>,
    learners: Vec<u64>,
    voters_outgoing: Vec<u64>,
    learners_next: Vec<u64>,
    #[pyo3(get)]
    auto_leave: bool,
}

impl From<ConfState> for RaftConf {
    fn from(conf: ConfState) -> Self {
        Self {
            voters: conf.voters,
            learners: conf.learners,
            voters_outgoing: conf.voters_outgoing,
            learners_next: conf.learners_next,
            auto_leave: conf.auto_leave,
        }
    }
}

impl RaftConf {
    /// It as the crate has it.
    pub fn state(&self) -> ConfState {
        ConfState {
            voters: self.voters.clone(),
            learners: self.learners.clone(),
            voters_outgoing: self.voters_outgoing.clone(),
            learners_next: self.learners_next.clone(),
            auto_leave: self.auto_leave,
            ..ConfState::default()
        }
    }
}

#[pymethods]
impl RaftConf {
    #[new]
    #[pyo3(
        signature = (
            voters = Vec::new(),
            learners = Vec::new(),
            voters_outgoing = Vec::new(),
            learners_next = Vec::new(),
            auto_leave = false,
        ),
        text_signature = "(voters=(), learners=(), voters_outgoing=(), learners_next=(), auto_leave=False)"
    )]
    fn new(
        voters: Vec<u64>,
        learners: Vec<u64>,
        voters_outgoing: Vec<u64>,
        learners_next: Vec<u64>,
        auto_leave: bool,
    ) -> PyResult<Self> {
        let conf = Self {
            voters,
            learners,
            voters_outgoing,
            learners_next,
            auto_leave,
        };
        conf::checked(conf.state())
            .map(Self::from)
            .map_err(PyValueError::new_err)
    }

    #[getter]
    fn voters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.voters)
    }

    #[getter]
    fn learners<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.learners)
    }

    #[getter]
    fn voters_outgoing<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.voters_outgoing)
    }

    #[getter]
    fn learners_next<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, &self.learners_next)
    }

    #[getter]
    fn joint(&self) -> bool {
        !self.voters_outgoing.is_empty()
    }

    fn __repr__(&self) -> String {
        format!(
            "RaftConf(voters={:?}, learners={:?}, voters_outgoing={:?}, learners_next={:?}, \
             auto_leave={})",
            self.voters,
            self.learners,
            self.voters_outgoing,
            self.learners_next,
            if self.auto_leave { "True" } else { "False" },
        )
    }
}

/// One entry of the log.
#[pyclass(frozen, module = "pyagent_node.native")]
pub struct RaftEntry {
    #[pyo3(get)]
    index: u64,
    #[pyo3(get)]
    term: u64,
    #[pyo3(get)]
    kind: u8,
    #[pyo3(get)]
    data: Py<PyBytes>,
    #[pyo3(get)]
    context: Py<PyBytes>,
}

impl RaftEntry {
    fn from_entry(py: Python<'_>, entry: &Entry) -> Self {
        Self {
            index: entry.index,
            term: entry.term,
            kind: u8::from(entry.get_entry_type() != EntryType::EntryNormal),
            data: PyBytes::new(py, &entry.data).unbind(),
            context: PyBytes::new(py, &entry.context).unbind(),
        }
    }

    /// It as the crate has it.
    pub fn entry(&self, py: Python<'_>) -> Entry {
        Entry {
            entry_type: if self.kind == 0 {
                EntryType::EntryNormal
            } else {
                EntryType::EntryConfChangeV2
            },
            term: self.term,
            index: self.index,
            data: self.data.as_bytes(py).to_vec().into(),
            context: self.context.as_bytes(py).to_vec().into(),
            ..Entry::default()
        }
    }

    /// Its index and term.
    pub fn place(&self) -> (u64, u64) {
        (self.index, self.term)
    }
}

#[pymethods]
impl RaftEntry {
    #[new]
    #[pyo3(
        signature = (index, term, kind, data, context = None),
        text_signature = "(index, term, kind, data, context=b\"\")"
    )]
    fn new(
        py: Python<'_>,
        index: u64,
        term: u64,
        kind: u8,
        data: Py<PyBytes>,
        context: Option<Py<PyBytes>>,
    ) -> PyResult<Self> {
        if kind > 1 {
            return Err(PyValueError::new_err(format!(
                "kind is {kind}; it must be 0 or 1"
            )));
        }
        let context = context.unwrap_or_else(|| PyBytes::new(py, b"").unbind());
        Ok(Self {
            index,
            term,
            kind,
            data,
            context,
        })
    }

    fn __eq__(&self, py: Python<'_>, other: &Bound<'_, PyAny>) -> bool {
        let Ok(other) = other.cast::<Self>() else {
            return false;
        };
        let other = other.get();
        (self.index, self.term, self.kind) == (other.index, other.term, other.kind)
            && self.data.as_bytes(py) == other.data.as_bytes(py)
            && self.context.as_bytes(py) == other.context.as_bytes(py)
    }

    fn __hash__(&self, py: Python<'_>) -> u64 {
        let mut hasher = DefaultHasher::new();
        (self.index, self.term, self.kind).hash(&mut hasher);
        self.data.as_bytes(py).hash(&mut hasher);
        self.context.as_bytes(py).hash(&mut hasher);
        hasher.finish()
    }

    fn __repr__(&self, py: Python<'_>) -> String {
        // What is in an entry does not belong into logs.
        format!(
            "<RaftEntry {} of term {}, kind {}, {} bytes>",
            self.index,
            self.term,
            self.kind,
            self.data.as_bytes(py).len(),
        )
    }
}

/// What has to be done next.
#[pyclass(frozen, get_all, module = "pyagent_node.native")]
pub struct RaftReady {
    messages: Py<PyList>,
    persisted_messages: Py<PyList>,
    entries: Py<PyList>,
    hard_state: Option<(u64, u64, u64)>,
    must_sync: bool,
    snapshot: Option<Py<PyTuple>>,
    committed: Py<PyList>,
    read_states: Py<PyList>,
}

fn kind_of(message: &Message) -> &'static str {
    match message.get_msg_type() {
        MessageType::MsgAppend => "append",
        MessageType::MsgAppendResponse => "append_response",
        MessageType::MsgRequestVote => "vote",
        MessageType::MsgRequestVoteResponse => "vote_response",
        MessageType::MsgRequestPreVote => "prevote",
        MessageType::MsgRequestPreVoteResponse => "prevote_response",
        MessageType::MsgHeartbeat => "heartbeat",
        MessageType::MsgHeartbeatResponse => "heartbeat_response",
        MessageType::MsgSnapshot => "snapshot",
        MessageType::MsgTimeoutNow => "timeout_now",
        MessageType::MsgReadIndex => "read_index",
        MessageType::MsgReadIndexResp => "read_index_response",
        _ => "other",
    }
}

fn message_list<'py>(py: Python<'py>, messages: &[Message]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for message in messages {
        let bytes = message
            .write_to_bytes()
            .map_err(|problem| PyValueError::new_err(problem.to_string()))?;
        list.append((message.to, kind_of(message), PyBytes::new(py, &bytes)))?;
    }
    Ok(list)
}

fn entry_list<'py>(py: Python<'py>, entries: &[Entry]) -> PyResult<Bound<'py, PyList>> {
    let list = PyList::empty(py);
    for entry in entries {
        list.append(RaftEntry::from_entry(py, entry))?;
    }
    Ok(list)
}

/// A snapshot as Python sees it.
pub fn snapshot_tuple<'py>(
    py: Python<'py>,
    snapshot: &raft::eraftpb::Snapshot,
) -> PyResult<Bound<'py, PyTuple>> {
    let metadata = snapshot.get_metadata();
    let conf = RaftConf::from(
        conf::checked(metadata.get_conf_state().clone()).map_err(PyValueError::new_err)?,
    );
    let data = PyBytes::new(py, &snapshot.data);
    (metadata.index, metadata.term, conf, data).into_pyobject(py)
}

impl RaftReady {
    /// Make the Python values.
    pub fn from_work(py: Python<'_>, work: &Work) -> PyResult<Self> {
        let read_states = PyList::empty(py);
        for (index, context) in &work.read_states {
            read_states.append((*index, PyBytes::new(py, context)))?;
        }
        let snapshot = work.snapshot.as_ref();
        let snapshot = snapshot.map(|snapshot| snapshot_tuple(py, snapshot));
        Ok(Self {
            messages: message_list(py, &work.messages)?.unbind(),
            persisted_messages: message_list(py, &work.persisted_messages)?.unbind(),
            entries: entry_list(py, &work.entries)?.unbind(),
            hard_state: work
                .hard_state
                .as_ref()
                .map(|hard| (hard.term, hard.vote, hard.commit)),
            must_sync: work.must_sync,
            snapshot: snapshot.transpose()?.map(Bound::unbind),
            committed: entry_list(py, &work.committed)?.unbind(),
            read_states: read_states.unbind(),
        })
    }
}

/// A core's view of itself.
#[pyclass(frozen, get_all, module = "pyagent_node.native")]
pub struct RaftStatus {
    term: u64,
    vote: u64,
    leader: u64,
    role: &'static str,
    commit: u64,
    applied: u64,
    last_index: u64,
    first_index: u64,
    conf: Py<RaftConf>,
    pending_conf: bool,
    transferee: u64,
    uncommitted_bytes: usize,
    progress: Vec<(u64, u64, bool, &'static str)>,
}

impl RaftStatus {
    /// The status of a node.
    pub fn of(py: Python<'_>, node: &Node) -> PyResult<Self> {
        let followers = node.followers().into_iter();
        Ok(Self {
            term: node.term(),
            vote: node.vote(),
            leader: node.leader(),
            role: node.role(),
            commit: node.commit(),
            applied: node.applied(),
            last_index: node.last_index(),
            first_index: node.first_index(),
            conf: Py::new(py, RaftConf::from(node.conf()))?,
            pending_conf: node.pending_conf(),
            transferee: node.transferee(),
            uncommitted_bytes: node.uncommitted_bytes(),
            progress: followers
                .map(|peer| (peer.id, peer.matched, peer.active, peer.state))
                .collect(),
        })
    }
}
