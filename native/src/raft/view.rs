//! What can be seen of a node.

use raft::eraftpb::ConfState;
use raft::{ProgressState, StateRole, INVALID_ID};

use super::node::Node;

/// A follower as its leader sees it.
pub struct Follower {
    pub id: u64,
    pub matched: u64,
    pub active: bool,
    pub state: &'static str,
}

impl Node {
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
                active: *id == raft.id || self.recently_heard(*id),
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

    /// Whether a node was heard of within an election timeout.
    ///
    /// The crate's own mark is taken back each time it checks for a quorum.
    fn recently_heard(&self, id: u64) -> bool {
        let since = self.heard.get(&id).map(|tick| self.ticks - tick);
        since.is_some_and(|ticks| ticks <= self.election_ticks as u64)
    }

    pub fn take_lines(&self) -> Vec<(&'static str, String)> {
        self.lines.take()
    }
}
