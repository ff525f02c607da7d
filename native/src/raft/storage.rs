//! The log after the last compaction, in memory, as the raft crate reads it.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::util::limit_size;
use raft::{GetEntriesContext, RaftState, Storage, StorageError};

/// Entries, the snapshot to send to those that lag behind, and what the node started from.
pub struct MemoryLog {
    start: RaftState,
    /// Entry `i` has the index `before.0 + 1 + i`.
    entries: Vec<Entry>,
    /// Index and term of the entry before the first one.
    before: (u64, u64),
    snapshot: Snapshot,
    wanted: AtomicBool,
}

/// A snapshot as the crate has it.
pub fn make_snapshot(index: u64, term: u64, conf: ConfState, data: Bytes) -> Snapshot {
    let mut snapshot = Snapshot {
        data,
        ..Snapshot::default()
    };
    let metadata = snapshot.mut_metadata();
    metadata.index = index;
    metadata.term = term;
    metadata.set_conf_state(conf);
    snapshot
}

impl MemoryLog {
    /// A log that holds `entries` after `snapshot`; they must follow on it without gaps.
    pub fn new(hard_state: HardState, snapshot: Snapshot, entries: Vec<Entry>) -> Self {
        let metadata = snapshot.get_metadata();
        Self {
            start: RaftState::new(hard_state, metadata.get_conf_state().clone()),
            entries,
            before: (metadata.index, metadata.term),
            snapshot,
            wanted: AtomicBool::new(false),
        }
    }

    /// Whether a follower needs a newer snapshot than there is.
    pub fn snapshot_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    /// The newest snapshot.
    pub fn snapshot_index(&self) -> u64 {
        self.snapshot.get_metadata().index
    }

    fn last(&self) -> u64 {
        self.before.0 + self.entries.len() as u64
    }

    fn term_at(&self, index: u64) -> Result<u64, StorageError> {
        if index < self.before.0 {
            return Err(StorageError::Compacted);
        }
        if index == self.before.0 {
            return Ok(self.before.1);
        }
        self.entries
            .get((index - self.before.0 - 1) as usize)
            .map_or(Err(StorageError::Unavailable), |entry| Ok(entry.term))
    }

    /// Put entries in the place of everything from the first one's index on.
    ///
    /// Panics when there would be a gap, or compacted entries would be replaced.
    pub fn append(&mut self, entries: Vec<Entry>) {
        let Some(first) = entries.first() else {
            return;
        };
        assert!(
            first.index > self.before.0 && first.index <= self.last() + 1,
            "entries from {} on do not follow on a log of {} to {}",
            first.index,
            self.before.0 + 1,
            self.last(),
        );
        let keep = (first.index - self.before.0 - 1) as usize;
        self.entries.truncate(keep);
        self.entries.extend(entries);
    }

    /// Begin anew after a snapshot that a leader sent.
    pub fn install(&mut self, snapshot: Snapshot) {
        let metadata = snapshot.get_metadata();
        self.before = (metadata.index, metadata.term);
        self.entries.clear();
        self.snapshot = snapshot;
    }

    /// Keep a snapshot of this node's own.
    pub fn keep(&mut self, snapshot: Snapshot) {
        self.snapshot = snapshot;
        self.wanted.store(false, Ordering::Relaxed);
    }

    /// Drop the entries up to `index`, which is at most the snapshot's.
    pub fn compact(&mut self, index: u64) {
        if index <= self.before.0 {
            return;
        }
        let count = (index - self.before.0) as usize;
        let term = self.entries[count - 1].term;
        self.entries.drain(..count);
        self.entries.shrink_to(2 * self.entries.len());
        self.before = (index, term);
    }
}

impl Storage for MemoryLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        Ok(self.start.clone())
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low <= self.before.0 {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 || low > high {
            return Err(StorageError::Unavailable.into());
        }
        let range = (low - self.before.0 - 1) as usize..(high - self.before.0 - 1) as usize;
        // Not the whole range is cloned when only its beginning is wanted.
        let max_size = max_size.into();
        let mut size = 0;
        let mut count = 0;
        for entry in &self.entries[range.clone()] {
            if count > 0 && max_size.is_some_and(|most| size > most) {
                break;
            }
            size += (entry.data.len() + entry.context.len()) as u64;
            count += 1;
        }
        let mut entries = self.entries[range.start..range.start + count].to_vec();
        limit_size(&mut entries, max_size);
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        Ok(self.term_at(index)?)
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.before.0 + 1)
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        let metadata = self.snapshot.get_metadata();
        let conf = metadata.get_conf_state();
        // A node takes no snapshot whose configuration it is not in.
        let known = [&conf.voters, &conf.learners, &conf.voters_outgoing]
            .iter()
            .any(|ids| ids.contains(&to));
        if metadata.index == 0 || metadata.index < request_index || !known {
            self.wanted.store(true, Ordering::Relaxed);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(self.snapshot.clone())
    }
}
