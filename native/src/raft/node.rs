//! One Raft node: the crate's `RawNode` with its log, kept from what would make it panic.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, HardState, Message, MessageType};
use raft::{Error, RawNode, Ready, SnapshotStatus, StateRole, INVALID_ID};

use super::checks::{self, Verdict};
use super::conf;
use super::lines::Lines;
use super::pack::pack;
use super::start::Start;
use super::storage::{make_snapshot, MemoryLog};

/// The most reads that wait on a leader.
const MAX_READS: usize = 1024;

/// Why something was not done; nothing has changed then.
#[derive(Debug)]
pub enum Fault {
    /// It is wrong in itself.
    Refused(String),
    /// It cannot be done now.
    Dropped(String),
    /// The caller's arguments contradict what happened before.
    Value(String),
    /// It is not the time for this call.
    Order(&'static str),
}

pub(super) type Outcome<T> = Result<T, Fault>;

/// A [`Fault::Dropped`].
pub(super) fn dropped<T>(why: impl Into<String>) -> Outcome<T> {
    Err(Fault::Dropped(why.into()))
}

/// What has to be done; see the Python class.
#[derive(Default)]
pub struct Work {
    pub messages: Vec<Message>,
    pub persisted_messages: Vec<Message>,
    pub entries: Vec<Entry>,
    pub hard_state: Option<HardState>,
    pub must_sync: bool,
    pub snapshot: Option<raft::eraftpb::Snapshot>,
    pub committed: Vec<Entry>,
    pub read_states: Vec<(u64, Bytes)>,
}

struct Pending {
    ready: Ready,
    entries: Vec<Entry>,
    snapshot: Option<raft::eraftpb::Snapshot>,
}

/// A Raft node without I/O, clock or randomness.
pub struct Node {
    pub(super) raw: RawNode<MemoryLog>,
    pub(super) lines: Lines,
    pub(super) election_ticks: usize,
    timeout: usize,
    max_message_bytes: usize,
    pending: Option<Pending>,
    pub(super) ticks: u64,
    /// The tick at which each node of the configuration was last heard of.
    pub(super) heard: BTreeMap<u64, u64>,
    /// The last entry that was handed out to be applied.
    handed_out: u64,
    /// Changes of the configuration that were handed out and not applied.
    pub(super) due: VecDeque<Entry>,
    /// Configurations with the index from which each holds, oldest first.
    pub(super) confs: VecDeque<(u64, ConfState)>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

impl Node {
    /// Start a node from what it has kept.
    pub fn new(start: Start) -> Outcome<Self> {
        start.check().map_err(Fault::Value)?;
        let config = start.config();
        let conf = conf::checked(start.conf).map_err(Fault::Value)?;
        let mut hard_state = start.hard_state;
        hard_state.commit = hard_state.commit.max(start.snapshot_index);
        let snapshot = make_snapshot(
            start.snapshot_index,
            start.snapshot_term,
            conf.clone(),
            start.snapshot_data,
        );
        let lines = Lines::default();
        let log = MemoryLog::new(hard_state, snapshot, start.entries);
        let raw = RawNode::new(&config, log, &lines.logger())
            .map_err(|problem| Fault::Value(problem.to_string()))?;
        let mut node = Self {
            raw,
            lines,
            election_ticks: start.election_ticks,
            timeout: start.election_ticks,
            max_message_bytes: start.max_message_bytes as usize,
            pending: None,
            ticks: 0,
            heard: BTreeMap::new(),
            handed_out: start.snapshot_index,
            due: VecDeque::new(),
            confs: VecDeque::from([(start.snapshot_index, conf)]),
        };
        node.settle();
        Ok(node)
    }

    /// Put the election timeout in the place of the one that the crate has drawn at random.
    pub(super) fn settle(&mut self) {
        self.raw.raft.set_randomized_election_timeout(self.timeout);
    }

    /// Do something that may change the node, unless a ready is pending.
    pub(super) fn change<T>(&mut self, what: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        if self.pending.is_some() {
            return Err(Fault::Order("advance() must follow ready() first"));
        }
        let outcome = what(self);
        self.settle();
        outcome
    }

    /// Whether an election would be won before the log is durable, which the crate takes amiss.
    fn hasty(&self) -> bool {
        let raft = &self.raw.raft;
        raft.prs().is_singleton() && raft.raft_log.last_index() != raft.raft_log.persisted
    }

    pub fn tick(&mut self) -> Outcome<()> {
        self.change(|node| {
            node.ticks += 1;
            if node.raw.raft.state == StateRole::Leader || !node.hasty() {
                node.raw.tick();
            }
            Ok(())
        })
    }

    pub fn set_election_ticks(&mut self, ticks: usize) -> Outcome<()> {
        let low = self.election_ticks;
        if !(low..2 * low).contains(&ticks) {
            return Err(Fault::Value(format!(
                "ticks is {ticks}; it must lie between {low} and {}",
                2 * low - 1
            )));
        }
        self.timeout = ticks;
        self.settle();
        Ok(())
    }

    pub fn campaign(&mut self) -> Outcome<()> {
        self.change(|node| {
            if node.raw.raft.promotable() && !node.hasty() {
                // On a leader, or with a change of the configuration to apply, nothing happens.
                node.step_raw(|raw| raw.campaign())?;
            }
            Ok(())
        })
    }

    pub(super) fn step_raw(
        &mut self,
        step: impl FnOnce(&mut RawNode<MemoryLog>) -> raft::Result<()>,
    ) -> Outcome<()> {
        match step(&mut self.raw) {
            // An answer to what was asked before its sender left the configuration.
            Ok(()) | Err(Error::StepPeerNotFound) => Ok(()),
            Err(Error::ProposalDropped) => dropped("the log has no room for it now"),
            Err(problem) => panic!("the raft crate cannot go on: {problem}"),
        }
    }

    pub fn step(&mut self, sender: u64, bytes: &[u8], trust: u8) -> Outcome<()> {
        self.change(|node| {
            let message = checks::decode(node.id(), sender, bytes).map_err(Fault::Refused)?;
            if node.raw.raft.prs().get(sender).is_some() {
                node.heard.insert(sender, node.ticks);
            }
            let kind = message.get_msg_type();
            let verdict = checks::judge(&node.raw.raft, &message, trust).map_err(Fault::Refused)?;
            let full = kind == MessageType::MsgReadIndex
                && node.raw.raft.pending_read_count() >= MAX_READS;
            let hasty = kind == MessageType::MsgTimeoutNow && node.hasty();
            if verdict == Verdict::Ignore || full || hasty {
                return Ok(());
            }
            node.step_raw(|raw| raw.step(message))
        })
    }

    pub(super) fn require_leader(&self) -> Outcome<()> {
        if self.raw.raft.state != StateRole::Leader {
            return dropped("this node is not the leader");
        }
        if self.raw.raft.lead_transferee.is_some() {
            return dropped("the leadership is being handed over");
        }
        Ok(())
    }

    pub(super) fn require_size(&self, data: &[u8], context: &[u8]) -> Outcome<()> {
        let size = data.len() + context.len();
        if size > self.max_message_bytes {
            return Err(Fault::Refused(format!(
                "the proposal has {size} bytes; at most {} fit into a message",
                self.max_message_bytes
            )));
        }
        Ok(())
    }

    pub(super) fn place(&self) -> (u64, u64) {
        (self.raw.raft.raft_log.last_index(), self.raw.raft.term)
    }

    pub fn propose(&mut self, data: &[u8], context: &[u8]) -> Outcome<(u64, u64)> {
        self.change(|node| {
            if data.is_empty() {
                return Err(Fault::Refused("the proposal is empty".into()));
            }
            node.require_size(data, context)?;
            node.require_leader()?;
            node.step_raw(|raw| raw.propose(context.to_vec(), data.to_vec()))?;
            Ok(node.place())
        })
    }

    pub fn read_index(&mut self, context: &[u8]) -> Outcome<()> {
        self.change(|node| {
            if !(1..=checks::MAX_READ_CONTEXT).contains(&context.len()) {
                return Err(Fault::Refused(format!(
                    "the context has {} bytes; it must have 1 to {}",
                    context.len(),
                    checks::MAX_READ_CONTEXT
                )));
            }
            let raft = &node.raw.raft;
            if raft.leader_id == INVALID_ID {
                return dropped("there is no leader");
            }
            if raft.state == StateRole::Leader && !raft.commit_to_current_term() {
                return dropped("this node has just become the leader");
            }
            if raft.pending_read_count() >= MAX_READS {
                return dropped("too many reads are pending");
            }
            let context = checks::read_context(node.id(), context);
            node.raw.read_index(context);
            Ok(())
        })
    }

    pub fn transfer(&mut self, to: u64) -> Outcome<()> {
        self.change(|node| {
            if !node.conf().voters.contains(&to) {
                return Err(Fault::Refused(format!("node {to} is no voter")));
            }
            if node.raw.raft.state != StateRole::Leader {
                return dropped("this node is not the leader");
            }
            node.raw.transfer_leader(to);
            Ok(())
        })
    }

    pub fn report_unreachable(&mut self, id: u64) -> Outcome<()> {
        self.change(|node| {
            node.raw.report_unreachable(id);
            Ok(())
        })
    }

    pub fn report_snapshot(&mut self, id: u64, ok: bool) -> Outcome<()> {
        self.change(|node| {
            let status = if ok {
                SnapshotStatus::Finish
            } else {
                SnapshotStatus::Failure
            };
            node.raw.report_snapshot(id, status);
            Ok(())
        })
    }

    pub fn has_ready(&self) -> bool {
        self.pending.is_none() && self.raw.has_ready()
    }

    fn hand_out(&mut self, committed: &[Entry]) {
        if let Some(last) = committed.last() {
            self.handed_out = last.index;
        }
        let changes = committed
            .iter()
            .filter(|entry| entry.get_entry_type() == EntryType::EntryConfChangeV2);
        self.due.extend(changes.cloned());
    }

    pub fn ready(&mut self) -> Outcome<Work> {
        if self.pending.is_some() {
            return Err(Fault::Order("advance() must follow ready() first"));
        }
        let mut ready = self.raw.ready();
        let entries = ready.take_entries();
        let snapshot = Some(ready.snapshot())
            .filter(|snapshot| !snapshot.is_empty())
            .cloned();
        if let Some(snapshot) = &snapshot {
            self.handed_out = snapshot.get_metadata().index;
            self.due.clear();
        }
        let read_states = ready.take_read_states();
        let most = self.max_message_bytes;
        let work = Work {
            messages: pack(ready.take_messages(), most),
            persisted_messages: pack(ready.take_persisted_messages(), most),
            entries: entries.clone(),
            hard_state: ready.hs().cloned(),
            must_sync: ready.must_sync(),
            snapshot: snapshot.clone(),
            committed: ready.take_committed_entries(),
            read_states: read_states.into_iter().filter_map(own_read).collect(),
        };
        self.hand_out(&work.committed);
        self.pending = Some(Pending {
            ready,
            entries,
            snapshot,
        });
        Ok(work)
    }

    pub fn advance(&mut self) -> Outcome<Work> {
        let Some(pending) = self.pending.take() else {
            return Err(Fault::Order("ready() must come before advance()"));
        };
        let store = self.raw.mut_store();
        let installed = pending.snapshot.map(|snapshot| {
            let metadata = snapshot.get_metadata().clone();
            store.install(snapshot);
            metadata
        });
        store.append(pending.entries);
        let mut light = self.raw.advance_append(pending.ready);
        if let Some(metadata) = installed {
            self.confs = VecDeque::from([(metadata.index, metadata.get_conf_state().clone())]);
            self.raw.advance_apply_to(metadata.index);
        }
        let hard_state = light.commit_index().map(|_| self.raw.raft.hard_state());
        let work = Work {
            messages: pack(light.take_messages(), self.max_message_bytes),
            hard_state,
            committed: light.take_committed_entries(),
            ..Work::default()
        };
        self.hand_out(&work.committed);
        self.settle();
        Ok(work)
    }

    pub fn advance_apply(&mut self, index: u64) -> Outcome<()> {
        self.change(|node| {
            let applied = node.applied();
            if !(applied..=node.handed_out).contains(&index) {
                return Err(Fault::Value(format!(
                    "index is {index}; entries up to {applied} are applied and up to {} were \
                     handed out",
                    node.handed_out
                )));
            }
            if let Some(entry) = node.due.front().filter(|entry| entry.index <= index) {
                return Err(Fault::Value(format!(
                    "entry {} changes the configuration; apply_conf must see it first",
                    entry.index
                )));
            }
            let last = node.raw.raft.raft_log.last_index();
            node.raw.advance_apply_to(index);
            if node.raw.raft.raft_log.last_index() > last {
                // The entry that ends a joint change: the crate leaves it lying until something
                // else is sent.
                node.raw.raft.bcast_append();
            }
            Ok(())
        })
    }
}

/// The place and the caller's context of a read of this node.
fn own_read(state: raft::ReadState) -> Option<(u64, Bytes)> {
    let (_, context) = checks::split_read_context(&state.request_ctx)?;
    Some((state.index, Bytes::copy_from_slice(context)))
}
