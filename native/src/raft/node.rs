//! One Raft node: the crate's `RawNode` with its log, kept from what would make it panic.

use std::collections::VecDeque;
use std::fmt;

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Entry, EntryType, HardState, Message, MessageType};
use raft::{
    Config, Error, ProgressState, RawNode, ReadOnlyOption, Ready, SnapshotStatus, StateRole,
    INVALID_ID,
};

use super::checks::{self, Verdict};
use super::conf;
use super::lines::Lines;
use super::pack::pack;
use super::storage::{make_snapshot, MemoryLog};

/// The most reads that wait on a leader.
const MAX_READS: usize = 1024;
/// Committed entries are handed out in portions of about this many bytes.
const COMMITTED_BYTES: u64 = 8 << 20;

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

type Outcome<T> = Result<T, Fault>;

fn dropped<T>(why: impl Into<String>) -> Outcome<T> {
    Err(Fault::Dropped(why.into()))
}

/// What a node starts from.
pub struct Start {
    pub id: u64,
    pub conf: ConfState,
    pub hard_state: HardState,
    pub snapshot_index: u64,
    pub snapshot_term: u64,
    pub snapshot_data: Bytes,
    pub entries: Vec<Entry>,
    pub heartbeat_ticks: usize,
    pub election_ticks: usize,
    pub max_message_bytes: u64,
    pub max_inflight: usize,
    pub max_uncommitted_bytes: u64,
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

/// A follower as its leader sees it.
pub struct Follower {
    pub id: u64,
    pub matched: u64,
    pub active: bool,
    pub state: &'static str,
}

struct Pending {
    ready: Ready,
    entries: Vec<Entry>,
    snapshot: Option<raft::eraftpb::Snapshot>,
}

/// A Raft node without I/O, clock or randomness.
pub struct Node {
    raw: RawNode<MemoryLog>,
    lines: Lines,
    election_ticks: usize,
    timeout: usize,
    max_message_bytes: usize,
    pending: Option<Pending>,
    /// The last entry that was handed out to be applied.
    handed_out: u64,
    /// Changes of the configuration that were handed out and not applied.
    due: VecDeque<Entry>,
    /// Configurations with the index from which each holds, oldest first.
    confs: VecDeque<(u64, ConfState)>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Node").finish_non_exhaustive()
    }
}

fn check_start(start: &Start) -> Result<(), String> {
    let say = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
    let hard = &start.hard_state;
    say(start.id != INVALID_ID, "node_id must not be 0")?;
    say(
        start.heartbeat_ticks > 0
            && start.election_ticks > start.heartbeat_ticks
            && start.election_ticks <= 1 << 20,
        "election_ticks must be above heartbeat_ticks, and both above 0",
    )?;
    say(
        (1..=1 << 16).contains(&start.max_inflight),
        "max_inflight must lie between 1 and 65536",
    )?;
    say(
        (1 << 10..=1 << 30).contains(&start.max_message_bytes)
            && start.max_uncommitted_bytes >= start.max_message_bytes,
        "max_message_bytes must lie between 1024 and 2**30, max_uncommitted_bytes not below it",
    )?;
    say(
        (start.snapshot_index == 0) == (start.snapshot_term == 0),
        "snapshot_index and snapshot_term must be 0 together",
    )?;
    say(
        start.snapshot_index <= checks::MAX_NUMBER && hard.term <= checks::MAX_NUMBER,
        "an index or a term is too large",
    )?;
    let mut last = (start.snapshot_index, start.snapshot_term);
    for entry in &start.entries {
        say(
            entry.index == last.0 + 1 && entry.term >= last.1.max(1),
            "entries do not follow on the snapshot and on each other",
        )?;
        checks::check_entry(entry)?;
        last = (entry.index, entry.term);
    }
    say(hard.term >= last.1, "term is below that of the last entry")?;
    say(
        hard.commit <= last.0,
        "commit is beyond the last entry: entries are missing",
    )?;
    say(
        hard.vote == INVALID_ID || hard.term > 0,
        "there is a vote without a term",
    )
}

impl Node {
    /// Start a node from what it has kept.
    pub fn new(start: Start) -> Outcome<Self> {
        check_start(&start).map_err(Fault::Value)?;
        let conf = conf::checked(start.conf).map_err(Fault::Value)?;
        let mut hard_state = start.hard_state;
        hard_state.commit = hard_state.commit.max(start.snapshot_index);
        let snapshot = make_snapshot(
            start.snapshot_index,
            start.snapshot_term,
            conf.clone(),
            start.snapshot_data,
        );
        let config = Config {
            id: start.id,
            election_tick: start.election_ticks,
            heartbeat_tick: start.heartbeat_ticks,
            min_election_tick: start.election_ticks,
            max_election_tick: 2 * start.election_ticks,
            applied: start.snapshot_index,
            max_size_per_msg: start.max_message_bytes,
            max_inflight_msgs: start.max_inflight,
            max_uncommitted_size: start.max_uncommitted_bytes,
            max_committed_size_per_ready: COMMITTED_BYTES,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            ..Config::default()
        };
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
            handed_out: start.snapshot_index,
            due: VecDeque::new(),
            confs: VecDeque::from([(start.snapshot_index, conf)]),
        };
        node.settle();
        Ok(node)
    }

    /// Put the election timeout in the place of the one that the crate has drawn at random.
    fn settle(&mut self) {
        self.raw.raft.set_randomized_election_timeout(self.timeout);
    }

    /// Do something that may change the node, unless a ready is pending.
    fn change<T>(&mut self, what: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
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

    fn step_raw(
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

    pub fn step(&mut self, sender: u64, bytes: &[u8]) -> Outcome<()> {
        self.change(|node| {
            let message = checks::decode(node.id(), sender, bytes).map_err(Fault::Refused)?;
            let kind = message.get_msg_type();
            let verdict = checks::judge(&node.raw.raft, &message).map_err(Fault::Refused)?;
            let full = kind == MessageType::MsgReadIndex
                && node.raw.raft.pending_read_count() >= MAX_READS;
            let hasty = kind == MessageType::MsgTimeoutNow && node.hasty();
            if verdict == Verdict::Ignore || full || hasty {
                return Ok(());
            }
            node.step_raw(|raw| raw.step(message))
        })
    }

    fn require_leader(&self) -> Outcome<()> {
        if self.raw.raft.state != StateRole::Leader {
            return dropped("this node is not the leader");
        }
        if self.raw.raft.lead_transferee.is_some() {
            return dropped("the leadership is being handed over");
        }
        Ok(())
    }

    fn require_size(&self, data: &[u8], context: &[u8]) -> Outcome<()> {
        let size = data.len() + context.len();
        if size > self.max_message_bytes {
            return Err(Fault::Refused(format!(
                "the proposal has {size} bytes; at most {} fit into a message",
                self.max_message_bytes
            )));
        }
        Ok(())
    }

    fn place(&self) -> (u64, u64) {
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

    pub fn propose_conf(
        &mut self,
        voters: &[u64],
        learners: &[u64],
        context: &[u8],
    ) -> Outcome<Option<(u64, u64)>> {
        self.change(|node| {
            node.require_size(&[], context)?;
            let now = node.conf();
            let change = conf::plan(&now, voters, learners).map_err(Fault::Refused)?;
            node.require_leader()?;
            if !now.voters_outgoing.is_empty() || node.pending_conf() {
                return dropped("another change of the configuration is under way");
            }
            let Some(change) = change else {
                return Ok(None);
            };
            node.step_raw(|raw| raw.propose_conf_change(context.to_vec(), change))?;
            Ok(Some(node.place()))
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

    pub fn apply_conf(&mut self, index: u64, term: u64) -> Outcome<ConfState> {
        self.change(|node| {
            let wanted = node.due.front().map(|entry| (entry.index, entry.term));
            if wanted != Some((index, term)) {
                return Err(Fault::Value(match wanted {
                    Some((due, _)) => format!("entry {index} is not due; entry {due} is"),
                    None => format!("entry {index} is not due; no change is"),
                }));
            }
            let Some(entry) = node.due.pop_front() else {
                return Ok(node.conf());
            };
            if node.raw.raft.raft_log.unstable_snapshot().is_some() {
                // A snapshot has come meanwhile, whose configuration holds already.
                return Ok(node.conf());
            }
            let change =
                ConfChangeV2::parse_from_bytes(&entry.data).map_err(|problem| problem.to_string());
            let applied = change.and_then(|change| {
                let outcome = node.raw.apply_conf_change(&change);
                outcome.map_err(|problem| problem.to_string())
            });
            if let Err(problem) = applied {
                // Every node has the same configuration here, so every node comes to this.
                node.lines.warn(format!(
                    "the change of the configuration in entry {index} is impossible: {problem}"
                ));
            }
            let conf = node.conf();
            node.confs.push_back((index, conf.clone()));
            node.leave_office();
            Ok(conf)
        })
    }

    /// Step down when the configuration takes this leader's vote away.
    ///
    /// The crate would go on as the leader, and panic at the next commit.
    fn leave_office(&mut self) {
        let raft = &mut self.raw.raft;
        if raft.state != StateRole::Leader || raft.promotable() {
            return;
        }
        let last = raft.raft_log.last_index();
        let heir = raft
            .prs()
            .iter()
            .filter(|(id, progress)| {
                raft.prs().conf().voters().contains(**id) && progress.matched == last
            })
            .map(|(id, _)| *id)
            .min();
        if let Some(id) = heir {
            raft.send_timeout_now(id);
        }
        let term = raft.term;
        raft.become_follower(term, INVALID_ID);
    }

    pub fn snapshot(&mut self, index: u64, data: Bytes) -> Outcome<raft::eraftpb::Snapshot> {
        self.change(|node| {
            let last = node.raw.store().snapshot_index();
            let applied = node.applied();
            if !(last..=applied).contains(&index) || index == 0 {
                return Err(Fault::Value(format!(
                    "index is {index}; it must lie between the last snapshot ({last}) and what \
                     is applied ({applied})"
                )));
            }
            let term = node.raw.raft.raft_log.term(index);
            let term = term.map_err(|problem| Fault::Value(problem.to_string()))?;
            while node.confs.get(1).is_some_and(|(from, _)| *from <= index) {
                node.confs.pop_front();
            }
            let conf = node.confs.front().map(|(_, conf)| conf.clone());
            let snapshot = make_snapshot(index, term, conf.unwrap_or_default(), data);
            node.raw.mut_store().keep(snapshot.clone());
            Ok(snapshot)
        })
    }

    pub fn compact(&mut self, index: u64) -> Outcome<()> {
        self.change(|node| {
            let last = node.raw.store().snapshot_index();
            if index > last {
                return Err(Fault::Value(format!(
                    "index is {index}; the last snapshot is of entry {last}"
                )));
            }
            node.raw.mut_store().compact(index);
            Ok(())
        })
    }

    pub fn snapshot_wanted(&self) -> bool {
        self.raw.store().snapshot_wanted()
    }

    pub fn id(&self) -> u64 {
        self.raw.raft.id
    }

    pub fn term(&self) -> u64 {
        self.raw.raft.term
    }

    pub fn vote(&self) -> u64 {
        self.raw.raft.vote
    }

    pub fn leader(&self) -> u64 {
        self.raw.raft.leader_id
    }

    pub fn role(&self) -> &'static str {
        let raft = &self.raw.raft;
        match raft.state {
            StateRole::Leader => "leader",
            StateRole::Candidate => "candidate",
            StateRole::PreCandidate => "precandidate",
            StateRole::Follower if raft.promotable() => "follower",
            StateRole::Follower => "learner",
        }
    }

    pub fn commit(&self) -> u64 {
        self.raw.raft.raft_log.committed
    }

    pub fn applied(&self) -> u64 {
        self.raw.raft.raft_log.applied
    }

    pub fn first_index(&self) -> u64 {
        self.raw.raft.raft_log.first_index()
    }

    pub fn last_index(&self) -> u64 {
        self.raw.raft.raft_log.last_index()
    }

    pub fn conf(&self) -> ConfState {
        let mut conf = self.raw.raft.prs().conf().to_conf_state();
        conf.voters.sort_unstable();
        conf.learners.sort_unstable();
        conf.voters_outgoing.sort_unstable();
        conf.learners_next.sort_unstable();
        conf
    }

    pub fn pending_conf(&self) -> bool {
        self.raw.raft.state == StateRole::Leader && self.raw.raft.has_pending_conf()
    }

    pub fn transferee(&self) -> u64 {
        self.raw.raft.lead_transferee.unwrap_or(INVALID_ID)
    }

    pub fn uncommitted_bytes(&self) -> usize {
        if self.raw.raft.state == StateRole::Leader {
            self.raw.raft.uncommitted_size()
        } else {
            0
        }
    }

    pub fn followers(&self) -> Vec<Follower> {
        let raft = &self.raw.raft;
        if raft.state != StateRole::Leader {
            return Vec::new();
        }
        let mut followers: Vec<Follower> = raft
            .prs()
            .iter()
            .map(|(id, progress)| Follower {
                id: *id,
                matched: progress.matched,
                active: *id == raft.id || progress.recent_active,
                state: match progress.state {
                    ProgressState::Probe => "probe",
                    ProgressState::Replicate => "replicate",
                    ProgressState::Snapshot => "snapshot",
                },
            })
            .collect();
        followers.sort_unstable_by_key(|follower| follower.id);
        followers
    }

    pub fn take_lines(&self) -> Vec<(&'static str, String)> {
        self.lines.take()
    }
}

/// The place and the caller's context of a read of this node.
fn own_read(state: raft::ReadState) -> Option<(u64, Bytes)> {
    let (_, context) = checks::split_read_context(&state.request_ctx)?;
    Some((state.index, Bytes::copy_from_slice(context)))
}
