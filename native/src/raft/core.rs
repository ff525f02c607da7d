//! The Python class around a [`Node`].

use std::panic::{catch_unwind, AssertUnwindSafe};

use pyo3::create_exception;
use pyo3::exceptions::{PyException, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyTuple};
use raft::eraftpb::HardState;

use super::node::{Fault, Node};
use super::start::Start;
use super::types::{snapshot_tuple, RaftConf, RaftEntry, RaftReady, RaftStatus};

create_exception!(
    pyagent_node.native,
    RaftRefused,
    PyValueError,
    "A message or a proposal that is wrong in itself."
);
create_exception!(
    pyagent_node.native,
    RaftDropped,
    PyException,
    "It cannot be done now, and may be tried again later or elsewhere."
);

impl From<Fault> for PyErr {
    fn from(fault: Fault) -> Self {
        match fault {
            Fault::Refused(why) => RaftRefused::new_err(why),
            Fault::Dropped(why) => RaftDropped::new_err(why),
            Fault::Value(why) => PyValueError::new_err(why),
            Fault::Order(why) => PyRuntimeError::new_err(why),
        }
    }
}

/// One node of a Raft group, without I/O, clock or randomness.
#[pyclass(module = "pyagent_node.native")]
pub struct RaftCore {
    node: Node,
    failure: Option<String>,
}

/// Run something that must not panic; what it panicked with, should it.
fn caught<T>(what: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(what)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
        text.unwrap_or("no reason was given").to_string()
    })
}

fn failed(why: &str) -> PyErr {
    PyRuntimeError::new_err(format!("the Raft core failed and must not go on: {why}"))
}

impl RaftCore {
    fn run<T>(&mut self, what: impl FnOnce(&mut Node) -> Result<T, Fault>) -> PyResult<T> {
        if let Some(why) = &self.failure {
            return Err(failed(why));
        }
        match caught(|| what(&mut self.node)) {
            Ok(outcome) => Ok(outcome?),
            Err(why) => {
                let error = failed(&why);
                self.failure = Some(why);
                Err(error)
            }
        }
    }
}

#[pymethods]
impl RaftCore {
    #[new]
    #[pyo3(signature = (
        node_id, *, conf, term, vote, commit, snapshot_index, snapshot_term, snapshot_data,
        entries, heartbeat_ticks, election_ticks, max_message_bytes, max_inflight,
        max_uncommitted_bytes
    ))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>,
        node_id: u64,
        conf: &RaftConf,
        term: u64,
        vote: u64,
        commit: u64,
        snapshot_index: u64,
        snapshot_term: u64,
        snapshot_data: &[u8],
        entries: Vec<PyRef<'_, RaftEntry>>,
        heartbeat_ticks: usize,
        election_ticks: usize,
        max_message_bytes: u64,
        max_inflight: usize,
        max_uncommitted_bytes: u64,
    ) -> PyResult<Self> {
        let start = Start {
            id: node_id,
            conf: conf.state(),
            hard_state: HardState {
                term,
                vote,
                commit,
                ..HardState::default()
            },
            snapshot_index,
            snapshot_term,
            snapshot_data: snapshot_data.to_vec().into(),
            entries: entries.iter().map(|entry| entry.entry(py)).collect(),
            heartbeat_ticks,
            election_ticks,
            max_message_bytes,
            max_inflight,
            max_uncommitted_bytes,
        };
        let node = caught(|| Node::new(start)).map_err(|why| failed(&why))??;
        Ok(Self {
            node,
            failure: None,
        })
    }

    #[getter]
    fn node_id(&self) -> u64 {
        self.node.id()
    }

    #[getter]
    fn term(&self) -> u64 {
        self.node.term()
    }

    #[getter]
    fn role(&self) -> &'static str {
        self.node.role()
    }

    #[getter]
    fn leader(&self) -> u64 {
        self.node.leader()
    }

    #[getter]
    fn snapshot_wanted(&self) -> bool {
        self.node.snapshot_wanted()
    }

    fn tick(&mut self) -> PyResult<()> {
        self.run(Node::tick)
    }

    fn set_election_ticks(&mut self, ticks: usize) -> PyResult<()> {
        self.run(|node| node.set_election_ticks(ticks))
    }

    fn campaign(&mut self) -> PyResult<()> {
        self.run(Node::campaign)
    }

    #[pyo3(signature = (sender, message, trust = 2))]
    fn step(&mut self, sender: u64, message: &[u8], trust: u8) -> PyResult<()> {
        self.run(|node| node.step(sender, message, trust))
    }

    #[pyo3(signature = (data, context = None), text_signature = "($self, data, context=b\"\")")]
    fn propose(&mut self, data: &[u8], context: Option<&[u8]>) -> PyResult<(u64, u64)> {
        self.run(|node| node.propose(data, context.unwrap_or_default()))
    }

    #[pyo3(
        signature = (voters, learners, context = None),
        text_signature = "($self, voters, learners, context=b\"\")"
    )]
    fn propose_conf(
        &mut self,
        voters: Vec<u64>,
        learners: Vec<u64>,
        context: Option<&[u8]>,
    ) -> PyResult<Option<(u64, u64)>> {
        self.run(|node| node.propose_conf(&voters, &learners, context.unwrap_or_default()))
    }

    fn read_index(&mut self, context: &[u8]) -> PyResult<()> {
        self.run(|node| node.read_index(context))
    }

    fn transfer(&mut self, to: u64) -> PyResult<()> {
        self.run(|node| node.transfer(to))
    }

    fn has_ready(&self) -> bool {
        self.failure.is_none() && self.node.has_ready()
    }

    fn ready(&mut self, py: Python<'_>) -> PyResult<RaftReady> {
        let work = self.run(Node::ready)?;
        RaftReady::from_work(py, &work)
    }

    fn advance(&mut self, py: Python<'_>) -> PyResult<RaftReady> {
        let work = self.run(Node::advance)?;
        RaftReady::from_work(py, &work)
    }

    fn advance_apply(&mut self, index: u64) -> PyResult<()> {
        self.run(|node| node.advance_apply(index))
    }

    fn apply_conf(&mut self, entry: &RaftEntry) -> PyResult<RaftConf> {
        let (index, term) = entry.place();
        self.run(|node| node.apply_conf(index, term))
            .map(RaftConf::from)
    }

    fn snapshot<'py>(
        &mut self,
        py: Python<'py>,
        index: u64,
        data: &Bound<'_, PyBytes>,
    ) -> PyResult<Bound<'py, PyTuple>> {
        let data = data.as_bytes().to_vec().into();
        let snapshot = self.run(|node| node.snapshot(index, data))?;
        snapshot_tuple(py, &snapshot)
    }

    fn compact(&mut self, index: u64) -> PyResult<()> {
        self.run(|node| node.compact(index))
    }

    fn report_unreachable(&mut self, node_id: u64) -> PyResult<()> {
        self.run(|node| node.report_unreachable(node_id))
    }

    fn report_snapshot(&mut self, node_id: u64, ok: bool) -> PyResult<()> {
        self.run(|node| node.report_snapshot(node_id, ok))
    }

    fn status(&self, py: Python<'_>) -> PyResult<RaftStatus> {
        RaftStatus::of(py, &self.node)
    }

    fn take_log(&self) -> Vec<(&'static str, String)> {
        self.node.take_lines()
    }
}

#[cfg(test)]
mod tests {
    use super::caught;

    #[test]
    fn a_panic_is_caught_with_its_reason() {
        assert_eq!(caught(|| 7), Ok(7));
        assert_eq!(
            caught(|| panic!("reason {}", 1)),
            Err::<(), _>("reason 1".into())
        );
        assert_eq!(caught(|| panic!("reason")), Err::<(), _>("reason".into()));
        let other = || std::panic::panic_any(7);
        assert_eq!(caught(other), Err::<(), _>("no reason was given".into()));
    }
}
