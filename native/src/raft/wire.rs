//! A strict look at the encoding of a message before it is decoded.
//!
//! The decoder of `protobuf` 2 takes anything that can somehow be read: it recurses into unknown
//! groups without end (RUSTSEC-2024-0437), keeps unknown fields and makes objects of a hundred
//! bytes out of two.  What passes here has known fields only, each at most once, with values in
//! their range.

use std::fmt;

/// The most entries of one message; the sender cuts its messages accordingly.
pub const MAX_ENTRIES: usize = 1 << 14;
/// The most node ids in one list.
pub const MAX_IDS: usize = 1 << 10;

/// What a field holds.
enum Kind {
    /// A number up to this one.
    Number(u64),
    /// A list of at most this many numbers, packed or not.
    Numbers(usize),
    /// Bytes.
    Bytes,
    /// At most this many messages.
    Messages(usize, &'static [Field]),
}

/// A field of a message.
struct Field {
    number: u64,
    name: &'static str,
    kind: Kind,
}

const fn field(number: u64, name: &'static str, kind: Kind) -> Field {
    Field { number, name, kind }
}

const ANY: Kind = Kind::Number(u64::MAX);
const FLAG: Kind = Kind::Number(1);

const ENTRY: &[Field] = &[
    field(1, "entry_type", Kind::Number(2)),
    field(2, "term", ANY),
    field(3, "index", ANY),
    field(4, "data", Kind::Bytes),
    field(5, "sync_log", FLAG),
    field(6, "context", Kind::Bytes),
];
const CONF_STATE: &[Field] = &[
    field(1, "voters", Kind::Numbers(MAX_IDS)),
    field(2, "learners", Kind::Numbers(MAX_IDS)),
    field(3, "voters_outgoing", Kind::Numbers(MAX_IDS)),
    field(4, "learners_next", Kind::Numbers(MAX_IDS)),
    field(5, "auto_leave", FLAG),
];
const METADATA: &[Field] = &[
    field(1, "conf_state", Kind::Messages(1, CONF_STATE)),
    field(2, "index", ANY),
    field(3, "term", ANY),
];
const SNAPSHOT: &[Field] = &[
    field(1, "data", Kind::Bytes),
    field(2, "metadata", Kind::Messages(1, METADATA)),
];
const MESSAGE: &[Field] = &[
    field(1, "msg_type", Kind::Number(18)),
    field(2, "to", ANY),
    field(3, "from", ANY),
    field(4, "term", ANY),
    field(5, "log_term", ANY),
    field(6, "index", ANY),
    field(7, "entries", Kind::Messages(MAX_ENTRIES, ENTRY)),
    field(8, "commit", ANY),
    field(9, "snapshot", Kind::Messages(1, SNAPSHOT)),
    field(10, "reject", FLAG),
    field(11, "reject_hint", ANY),
    field(12, "context", Kind::Bytes),
    field(13, "request_snapshot", ANY),
    field(14, "deprecated_priority", ANY),
    field(15, "commit_term", ANY),
    field(16, "priority", ANY),
];
const CHANGE: &[Field] = &[
    field(1, "change_type", Kind::Number(2)),
    field(2, "node_id", ANY),
];
const CONF_CHANGE: &[Field] = &[
    field(1, "transition", Kind::Number(2)),
    field(2, "changes", Kind::Messages(MAX_IDS, CHANGE)),
    field(3, "context", Kind::Bytes),
];

/// What is wrong with an encoding.
#[derive(Debug, PartialEq, Eq)]
pub enum Malformed {
    /// It ends in the middle of something.
    Short,
    /// A number has more than 64 bits.
    Number,
    /// There is no such field, or not of this type.
    Field(u64),
    /// A field has a value out of its range.
    Value(&'static str),
    /// A field comes too often.
    Count(&'static str),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Short => write!(f, "it is cut off"),
            Self::Number => write!(f, "a number in it has more than 64 bits"),
            Self::Field(tag) => write!(f, "it has an unknown field (tag {tag})"),
            Self::Value(name) => write!(f, "its {name} is out of range"),
            Self::Count(name) => write!(f, "it has too many of {name}"),
        }
    }
}

fn take_number(data: &mut &[u8]) -> Result<u64, Malformed> {
    let mut number = 0_u64;
    for shift in (0..).step_by(7) {
        let (&byte, rest) = data.split_first().ok_or(Malformed::Short)?;
        *data = rest;
        let bits = u64::from(byte & 0x7f);
        if shift > 63 || (bits << shift) >> shift != bits {
            return Err(Malformed::Number);
        }
        number |= bits << shift;
        if byte < 0x80 {
            return Ok(number);
        }
    }
    Err(Malformed::Number)
}

fn take_bytes<'a>(data: &mut &'a [u8]) -> Result<&'a [u8], Malformed> {
    let length = take_number(data)?;
    let length = usize::try_from(length).map_err(|_| Malformed::Short)?;
    if length > data.len() {
        return Err(Malformed::Short);
    }
    let (bytes, rest) = data.split_at(length);
    *data = rest;
    Ok(bytes)
}

fn check(mut data: &[u8], fields: &'static [Field]) -> Result<(), Malformed> {
    const NUMBER: u64 = 0;
    const BYTES: u64 = 2;
    let mut seen = [0_usize; 16];
    while !data.is_empty() {
        let tag = take_number(&mut data)?;
        let place = fields.iter().position(|field| field.number == tag >> 3);
        let place = place.ok_or(Malformed::Field(tag))?;
        let field = &fields[place];
        let mut count = 1;
        let most = match (&field.kind, tag & 7) {
            (Kind::Number(most), NUMBER) => {
                if take_number(&mut data)? > *most {
                    return Err(Malformed::Value(field.name));
                }
                1
            }
            (Kind::Numbers(most), NUMBER) => {
                take_number(&mut data)?;
                *most
            }
            (Kind::Numbers(most), BYTES) => {
                let mut numbers = take_bytes(&mut data)?;
                count = 0;
                while !numbers.is_empty() {
                    take_number(&mut numbers)?;
                    count += 1;
                }
                *most
            }
            (Kind::Bytes, BYTES) => {
                take_bytes(&mut data)?;
                1
            }
            (Kind::Messages(most, fields), BYTES) => {
                check(take_bytes(&mut data)?, fields)?;
                *most
            }
            _ => return Err(Malformed::Field(tag)),
        };
        seen[place] += count;
        if seen[place] > most {
            return Err(Malformed::Count(field.name));
        }
    }
    Ok(())
}

/// Check the encoding of a Raft message.
pub fn check_message(data: &[u8]) -> Result<(), Malformed> {
    check(data, MESSAGE)
}

/// Check the encoding of a change of the configuration.
pub fn check_conf_change(data: &[u8]) -> Result<(), Malformed> {
    check(data, CONF_CHANGE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use protobuf::Message as _;
    use raft::eraftpb::{ConfChangeV2, Entry, Message};

    #[test]
    fn takes_what_the_library_writes() {
        let mut message = Message {
            to: u64::MAX,
            priority: -1,
            ..Message::default()
        };
        message.mut_entries().push(Entry {
            index: 7,
            data: b"command".as_slice().into(),
            ..Entry::default()
        });
        let conf = message.mut_snapshot().mut_metadata().mut_conf_state();
        conf.voters = vec![1, 2, u64::MAX];
        conf.auto_leave = true;
        assert_eq!(check_message(&message.write_to_bytes().unwrap()), Ok(()));
        assert_eq!(check_message(b""), Ok(()));
        assert_eq!(check_conf_change(b""), Ok(()));
        let change = ConfChangeV2::default().write_to_bytes().unwrap();
        assert_eq!(check_conf_change(&change), Ok(()));
    }

    #[test]
    fn refuses_groups_unknown_fields_and_repetitions() {
        // Field 20 as a group, which the library would recurse into.
        assert_eq!(
            check_message(&[0xa3, 1, 0xa3, 1]),
            Err(Malformed::Field(0xa3))
        );
        assert_eq!(check_message(&[2 << 3 | 3]), Err(Malformed::Field(19)));
        assert_eq!(check_message(&[16, 1, 16, 1]), Err(Malformed::Count("to")));
        assert_eq!(check_message(&[8, 19]), Err(Malformed::Value("msg_type")));
        assert_eq!(check_message(&[16]), Err(Malformed::Short));
        assert_eq!(check_message(&[7 << 3 | 2, 5, 0]), Err(Malformed::Short));
        let long = [16, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2];
        assert_eq!(check_message(&long), Err(Malformed::Number));
        let longer = [
            16, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0,
        ];
        assert_eq!(check_message(&longer), Err(Malformed::Number));
    }

    #[test]
    fn counts_entries_and_ids() {
        let entries: Vec<u8> = [7 << 3 | 2, 0].repeat(MAX_ENTRIES + 1);
        assert_eq!(check_message(&entries[2..]), Ok(()));
        assert_eq!(check_message(&entries), Err(Malformed::Count("entries")));
        let ids: Vec<u8> = [2 << 3, 1].repeat(MAX_IDS + 1);
        assert_eq!(check(&ids, CONF_STATE), Err(Malformed::Count("learners")));
    }
}
