//! What a node starts from.

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, HardState};
use raft::{Config, ReadOnlyOption, INVALID_ID};

use super::checks;

/// Committed entries are handed out in portions of about this many bytes.
const COMMITTED_BYTES: u64 = 8 << 20;

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

impl Start {
    /// Check that it does not contradict itself.
    pub fn check(&self) -> Result<(), String> {
        let say = |holds: bool, what: &str| if holds { Ok(()) } else { Err(what.to_string()) };
        let hard = &self.hard_state;
        say(self.id != INVALID_ID, "node_id must not be 0")?;
        say(
            self.heartbeat_ticks > 0
                && self.election_ticks > self.heartbeat_ticks
                && self.election_ticks <= 1 << 20,
            "election_ticks must be above heartbeat_ticks, and both above 0",
        )?;
        say(
            (1..=1 << 16).contains(&self.max_inflight),
            "max_inflight must lie between 1 and 65536",
        )?;
        say(
            (1 << 10..=1 << 30).contains(&self.max_message_bytes)
                && self.max_uncommitted_bytes >= self.max_message_bytes,
            "max_message_bytes must lie between 1024 and 2**30, max_uncommitted_bytes not below it",
        )?;
        say(
            (self.snapshot_index == 0) == (self.snapshot_term == 0),
            "snapshot_index and snapshot_term must be 0 together",
        )?;
        say(
            self.snapshot_index <= checks::MAX_NUMBER && hard.term <= checks::MAX_NUMBER,
            "an index or a term is too large",
        )?;
        let mut last = (self.snapshot_index, self.snapshot_term);
        for entry in &self.entries {
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

    /// The crate's settings.
    pub fn config(&self) -> Config {
        // For so long a follower that hears its leader refuses its vote, and a leader holds out
        // without a quorum.  Were it the shortest election timeout, the first to stand for
        // election would often be refused by one whose ticks come a little later.
        let lease = self.election_ticks - self.heartbeat_ticks;
        Config {
            id: self.id,
            election_tick: lease.max(self.heartbeat_ticks + 1),
            heartbeat_tick: self.heartbeat_ticks,
            min_election_tick: lease.max(self.heartbeat_ticks + 1),
            max_election_tick: 2 * self.election_ticks,
            applied: self.snapshot_index,
            max_size_per_msg: self.max_message_bytes,
            max_inflight_msgs: self.max_inflight,
            max_uncommitted_size: self.max_uncommitted_bytes,
            max_committed_size_per_ready: COMMITTED_BYTES,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            ..Config::default()
        }
    }
}
