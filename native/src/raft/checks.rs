//! Whether a message can be what it says it is.
//!
//! The raft crate trusts its peers and panics on what cannot happen among sound ones (a commit
//! index beyond the log, entries that leave a gap, an empty proposal).  So nothing reaches it that
//! has not passed here.

use protobuf::Message as _;
use raft::eraftpb::{Entry, EntryType, Message, MessageType};
use raft::{Raft, StateRole, INVALID_ID};

use super::conf;
use super::storage::MemoryLog;
use super::wire;

/// No term or index is larger.
pub const MAX_NUMBER: u64 = 1 << 62;
/// How far ahead of the present one a term may be: nobody can use up the terms in one message.
const MAX_TERM_AHEAD: u64 = 1 << 32;
/// The longest context of a read, as its caller gives it.
pub const MAX_READ_CONTEXT: usize = 64;
/// What the crate puts into the vote requests of a leadership transfer.
const TRANSFER: &[u8] = b"CampaignTransfer";

/// How much the word of a sender counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trust {
    /// Answers and questions of this term or an earlier one: it follows the log and has no vote.
    Follower,
    /// The same, and answers of a later term, which end this one.
    Later,
    /// Everything: it has a vote, or leads.
    Voter,
}

impl Trust {
    /// Read the number that callers use.
    fn new(number: u8) -> Result<Self, String> {
        match number {
            0 => Ok(Self::Follower),
            1 => Ok(Self::Later),
            2 => Ok(Self::Voter),
            _ => Err(format!("there is no trust {number}")),
        }
    }

    /// Check that a message of `kind` and `term` may come from such a sender.
    fn check(self, kind: MessageType, term: u64, present: u64) -> Result<(), String> {
        use MessageType as T;
        let answers = matches!(
            kind,
            T::MsgAppendResponse
                | T::MsgHeartbeatResponse
                | T::MsgReadIndex
                | T::MsgRequestVoteResponse
                | T::MsgRequestPreVoteResponse
        );
        require(
            self == Self::Voter || answers,
            "only a voter says such a thing",
        )?;
        require(
            self != Self::Follower || term <= present,
            "only a voter ends a term",
        )
    }
}

/// What to do with a message that is sound.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Hand it to the crate.
    Take,
    /// It is out of date, or asks for something that only another node can do.
    Ignore,
}

fn require(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds {
        Ok(())
    } else {
        Err(otherwise.into())
    }
}

/// Decode a message and check that it is from `sender` to `me` and whole in itself.
pub fn decode(me: u64, sender: u64, bytes: &[u8]) -> Result<Message, String> {
    wire::check_message(bytes).map_err(|problem| format!("the message is malformed: {problem}"))?;
    let message = Message::parse_from_bytes(bytes)
        .map_err(|problem| format!("the message is malformed: {problem}"))?;
    require(message.from == sender, "it is not by its sender")?;
    require(message.to == me, "it is for another node")?;
    require(
        sender != INVALID_ID && sender != me,
        "its sender cannot send messages",
    )?;
    check_fields(&message)?;
    Ok(message)
}

/// The context of a read with the node that wants it in front, so that two nodes never use one.
pub fn read_context(node: u64, context: &[u8]) -> Vec<u8> {
    [&node.to_le_bytes(), context].concat()
}

/// Take the node off a read's context.
pub fn split_read_context(context: &[u8]) -> Option<(u64, &[u8])> {
    let (node, context) = context.split_first_chunk::<8>()?;
    let fits = (1..=MAX_READ_CONTEXT).contains(&context.len());
    fits.then_some((u64::from_le_bytes(*node), context))
}

/// Check that a message has the fields that its kind has, with values that can be.
fn check_fields(m: &Message) -> Result<(), String> {
    use MessageType as T;
    let kind = m.get_msg_type();
    let numbers = [
        m.term,
        m.log_term,
        m.index,
        m.commit,
        m.commit_term,
        m.reject_hint,
    ];
    require(
        numbers.iter().all(|number| *number <= MAX_NUMBER),
        "a number in it is too large",
    )?;
    require(
        m.request_snapshot == 0 && m.priority == 0 && m.deprecated_priority == 0,
        "it uses a field that is not used here",
    )?;
    require(
        (kind == T::MsgReadIndex) == (m.term == 0),
        "its term cannot be",
    )?;
    let with_entries = matches!(kind, T::MsgAppend | T::MsgReadIndex | T::MsgReadIndexResp);
    require(
        with_entries || m.entries.is_empty(),
        "its kind has no entries",
    )?;
    require(
        (kind == T::MsgSnapshot) == m.has_snapshot(),
        "its kind and its snapshot do not agree",
    )?;
    let context_fits = match kind {
        T::MsgRequestVote => m.context.is_empty() || m.context == TRANSFER,
        T::MsgHeartbeat | T::MsgHeartbeatResponse => {
            m.context.is_empty() || split_read_context(&m.context).is_some()
        }
        _ => m.context.is_empty(),
    };
    require(context_fits, "its context cannot be")?;
    // In the log an index and its term are 0 together.
    let place_fits = m.log_term <= m.term && (m.index == 0) == (m.log_term == 0);
    match kind {
        T::MsgAppend => {
            require(place_fits, "it follows on an entry that cannot be")?;
            check_entries(m)
        }
        T::MsgRequestVote | T::MsgRequestPreVote => require(
            place_fits && m.commit <= m.index && m.commit_term <= m.log_term,
            "its place in the log cannot be",
        ),
        T::MsgSnapshot => {
            let metadata = m.get_snapshot().get_metadata();
            require(
                (1..=MAX_NUMBER).contains(&metadata.index) && (1..=m.term).contains(&metadata.term),
                "its snapshot's place in the log cannot be",
            )?;
            let conf = conf::checked(metadata.get_conf_state().clone())?;
            require(
                !conf::is_empty(&conf),
                "its snapshot has an empty configuration",
            )
        }
        T::MsgReadIndex | T::MsgReadIndexResp => {
            let fits = |entry: &Entry| {
                entry.get_entry_type() == EntryType::EntryNormal
                    && entry.context.is_empty()
                    && split_read_context(&entry.data).is_some()
            };
            require(
                m.entries.len() == 1 && fits(&m.entries[0]),
                "it asks for a read that cannot be",
            )
        }
        T::MsgAppendResponse
        | T::MsgRequestVoteResponse
        | T::MsgRequestPreVoteResponse
        | T::MsgHeartbeat
        | T::MsgHeartbeatResponse
        | T::MsgTimeoutNow => Ok(()),
        _ => Err("its kind does not travel between nodes".into()),
    }
}

fn check_entries(m: &Message) -> Result<(), String> {
    let mut last = (m.index, m.log_term.max(1));
    for entry in m.get_entries() {
        require(
            entry.index == last.0 + 1 && (last.1..=m.term).contains(&entry.term),
            "its entries do not follow on each other",
        )?;
        check_entry(entry)?;
        last = (entry.index, entry.term);
    }
    Ok(())
}

/// Check what an entry holds.
pub fn check_entry(entry: &Entry) -> Result<(), String> {
    require(!entry.sync_log, "an entry uses a field that is not used")?;
    match entry.get_entry_type() {
        EntryType::EntryNormal => Ok(()),
        EntryType::EntryConfChange => Err("an entry is of a kind that is not used".into()),
        EntryType::EntryConfChangeV2 => wire::check_conf_change(&entry.data)
            .map_err(|problem| format!("a change of the configuration is malformed: {problem}")),
    }
}

/// Check a sound message against what this node knows, its sender included.
pub fn judge(raft: &Raft<MemoryLog>, m: &Message, trust: u8) -> Result<Verdict, String> {
    use MessageType as T;
    require(
        m.term <= raft.term.saturating_add(MAX_TERM_AHEAD),
        "its term is too far ahead",
    )?;
    let kind = m.get_msg_type();
    Trust::new(trust)?.check(kind, m.term, raft.term)?;
    let last_index = raft.raft_log.last_index();
    let present = m.term == raft.term;
    let by_leader = present && m.from == raft.leader_id;
    let ignore_unless = |take: bool| Ok(if take { Verdict::Take } else { Verdict::Ignore });
    match kind {
        T::MsgAppend | T::MsgHeartbeat | T::MsgSnapshot => {
            require(
                !present || raft.leader_id == INVALID_ID || by_leader,
                "its term has another leader",
            )?;
            if m.term < raft.term {
                return Ok(Verdict::Take);
            }
            if kind == T::MsgHeartbeat {
                require(
                    m.commit <= last_index,
                    "it says that entries are committed which this node does not have",
                )?;
            }
            if kind == T::MsgSnapshot {
                let metadata = m.get_snapshot().get_metadata();
                require(
                    metadata.index != raft.raft_log.committed
                        || raft.raft_log.match_term(metadata.index, metadata.term),
                    "its snapshot is not of this node's log",
                )?;
            }
            Ok(Verdict::Take)
        }
        T::MsgAppendResponse => {
            require(
                !(present && raft.state == StateRole::Leader && m.index > last_index),
                "it acknowledges entries that do not exist",
            )?;
            Ok(Verdict::Take)
        }
        T::MsgRequestVoteResponse | T::MsgRequestPreVoteResponse => {
            // A candidate asks for votes when its log is durable, so an answer cannot come before.
            ignore_unless(last_index == raft.raft_log.persisted)
        }
        T::MsgTimeoutNow => {
            require(
                !present || by_leader || raft.leader_id == INVALID_ID,
                "only the leader hands the leadership over",
            )?;
            ignore_unless(by_leader)
        }
        T::MsgReadIndex => {
            let (node, _) = split_read_context(&m.entries[0].data).unwrap_or_default();
            require(node == m.from, "it asks for a read of another node")?;
            ignore_unless(raft.state == StateRole::Leader)
        }
        T::MsgReadIndexResp => {
            let (node, _) = split_read_context(&m.entries[0].data).unwrap_or_default();
            require(node == raft.id, "it answers a read of another node")?;
            ignore_unless(by_leader && raft.state == StateRole::Follower)
        }
        _ => Ok(Verdict::Take),
    }
}
