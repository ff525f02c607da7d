//! Puts entries for one node into as few messages as may be.
//!
//! The crate can do that itself (`batch_append`), but 0.7.0 adds entries to an empty message
//! whatever place in the log that is for, and bounds the result by nothing.

use raft::eraftpb::{Entry, Message, MessageType};

use super::wire::MAX_ENTRIES;

fn size_of(entry: &Entry) -> usize {
    entry.data.len() + entry.context.len()
}

/// Whether `next` goes on in the log where `message` ends.
fn follows(message: &Message, next: &Message) -> bool {
    let (index, term) = message
        .entries
        .last()
        .map_or((message.index, message.log_term), |last| {
            (last.index, last.term)
        });
    message.get_msg_type() == MessageType::MsgAppend
        && message.term == next.term
        && (index, term) == (next.index, next.log_term)
}

/// Join the appends for one node that go on where the last one ends, and cut those that are too
/// long; no message gets more than `max_bytes` of entries (but one entry always fits), none
/// overtakes another one for the same node.
pub fn pack(messages: Vec<Message>, max_bytes: usize) -> Vec<Message> {
    let mut packed: Vec<Message> = Vec::with_capacity(messages.len());
    for mut message in messages {
        let last = packed.iter().rposition(|other| other.to == message.to);
        let joins = message.get_msg_type() == MessageType::MsgAppend
            && last.is_some_and(|last| follows(&packed[last], &message));
        let entries: Vec<Entry> = message.take_entries().into();
        let commit = message.commit;
        let mut current = match last {
            Some(last) if joins => {
                packed[last].commit = packed[last].commit.max(commit);
                last
            }
            _ => {
                packed.push(message);
                packed.len() - 1
            }
        };
        let mut size: usize = packed[current].entries.iter().map(size_of).sum();
        for entry in entries {
            let count = packed[current].entries.len();
            if count > 0 && (count == MAX_ENTRIES || size + size_of(&entry) > max_bytes) {
                let mut next = packed[current].clone();
                let (index, term) = next
                    .take_entries()
                    .last()
                    .map_or((0, 0), |last| (last.index, last.term));
                next.index = index;
                next.log_term = term;
                packed.push(next);
                current = packed.len() - 1;
                size = 0;
            }
            size += size_of(&entry);
            packed[current].mut_entries().push(entry);
        }
    }
    packed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn append(to: u64, index: u64, terms: &[u64], commit: u64) -> Message {
        let entries: Vec<Entry> = (index + 1..)
            .zip(terms)
            .map(|(index, term)| Entry {
                index,
                term: *term,
                data: vec![0; 10].into(),
                ..Entry::default()
            })
            .collect();
        Message {
            msg_type: MessageType::MsgAppend,
            to,
            term: 3,
            index,
            log_term: 3,
            commit,
            entries: entries.into(),
            ..Message::default()
        }
    }

    fn shape(messages: &[Message]) -> Vec<(u64, u64, u64, usize, u64)> {
        let one = |m: &Message| (m.to, m.index, m.log_term, m.entries.len(), m.commit);
        messages.iter().map(one).collect()
    }

    #[test]
    fn joins_what_goes_on() {
        let messages = vec![
            append(1, 5, &[3], 4),
            append(2, 5, &[3], 4),
            append(1, 6, &[3, 3], 5),
            append(1, 8, &[], 6),
        ];
        let packed = pack(messages, 1000);
        assert_eq!(shape(&packed), [(1, 5, 3, 3, 6), (2, 5, 3, 1, 4)]);
    }

    #[test]
    fn leaves_apart_what_does_not_go_on() {
        let gap = vec![append(1, 7, &[], 4), append(1, 5, &[3], 4)];
        assert_eq!(pack(gap.clone(), 1000), gap);
        let heartbeat = Message {
            to: 1,
            msg_type: MessageType::MsgHeartbeat,
            ..Message::default()
        };
        let between = vec![append(1, 5, &[3], 4), heartbeat, append(1, 6, &[3], 4)];
        assert_eq!(pack(between.clone(), 1000), between);
    }

    #[test]
    fn cuts_what_is_too_long() {
        let packed = pack(vec![append(1, 5, &[1, 1, 2, 3, 3], 9)], 20);
        assert_eq!(
            shape(&packed),
            [(1, 5, 3, 2, 9), (1, 7, 1, 2, 9), (1, 9, 3, 1, 9)]
        );
        let single = pack(vec![append(1, 5, &[3, 3], 9)], 5);
        assert_eq!(shape(&single), [(1, 5, 3, 1, 9), (1, 6, 3, 1, 9)]);
        let many = pack(vec![append(1, 5, &vec![3; MAX_ENTRIES + 1], 9)], 1 << 30);
        assert_eq!(many.len(), 2);
    }
}
