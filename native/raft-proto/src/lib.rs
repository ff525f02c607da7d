//! The messages of the raft crate, and the few functions about them that it calls.
//!
//! The published `raft-proto` generates the same messages with `protoc`, of which it brings no
//! build for some systems (macOS on arm64 among them) and takes no current release.  This crate
//! has its name and interface, generates with a generator in plain Rust, and is put in its place
//! by `[patch.crates-io]` in the workspace.

use std::borrow::Cow;
use std::collections::BTreeSet;

#[allow(missing_docs, nonstandard_style, unused, bare_trait_objects, clippy::all)]
#[allow(unknown_lints, mismatched_lifetime_syntaxes)]
#[rustfmt::skip]
pub mod eraftpb {
    include!(concat!(env!("OUT_DIR"), "/eraftpb.rs"));
}

use eraftpb::{
    ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState,
    Snapshot,
};

/// Everything that the raft crate hands on.
pub mod prelude {
    pub use crate::eraftpb::{
        ConfChange, ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2,
        ConfState, Entry, EntryType, HardState, Message, MessageType, Snapshot, SnapshotMetadata,
    };
}

/// A change of one node.
#[must_use]
pub fn new_conf_change_single(node_id: u64, change_type: ConfChangeType) -> ConfChangeSingle {
    ConfChangeSingle {
        change_type,
        node_id,
        ..ConfChangeSingle::default()
    }
}

/// Whether two configurations are the same, in whatever order their nodes are listed.
#[must_use]
pub fn conf_state_eq(left: &ConfState, right: &ConfState) -> bool {
    let sets = |conf: &ConfState| {
        [
            &conf.voters,
            &conf.learners,
            &conf.voters_outgoing,
            &conf.learners_next,
        ]
        .map(|ids| ids.iter().copied().collect::<BTreeSet<u64>>())
    };
    left.auto_leave == right.auto_leave && sets(left) == sets(right)
}

/// A change of the configuration in its old (one node) or its present form.
pub trait ConfChangeI {
    /// It in the present form.
    fn into_v2(self) -> ConfChangeV2;
    /// It in the present form, without a copy where it has it already.
    fn as_v2(&self) -> Cow<'_, ConfChangeV2>;
    /// It in the old form, if it has that.
    fn as_v1(&self) -> Option<&ConfChange>;
}

impl ConfChangeI for ConfChange {
    fn into_v2(self) -> ConfChangeV2 {
        let change = new_conf_change_single(self.node_id, self.change_type);
        ConfChangeV2 {
            changes: vec![change].into(),
            context: self.context,
            ..ConfChangeV2::default()
        }
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Owned(self.clone().into_v2())
    }

    fn as_v1(&self) -> Option<&ConfChange> {
        Some(self)
    }
}

impl ConfChangeI for ConfChangeV2 {
    fn into_v2(self) -> ConfChangeV2 {
        self
    }

    fn as_v2(&self) -> Cow<'_, ConfChangeV2> {
        Cow::Borrowed(self)
    }

    fn as_v1(&self) -> Option<&ConfChange> {
        None
    }
}

impl ConfChangeV2 {
    /// Whether it needs joint consensus, and then whether that ends by itself.
    #[must_use]
    pub fn enter_joint(&self) -> Option<bool> {
        match self.transition {
            ConfChangeTransition::Auto if self.changes.len() <= 1 => None,
            ConfChangeTransition::Auto | ConfChangeTransition::Implicit => Some(true),
            ConfChangeTransition::Explicit => Some(false),
        }
    }

    /// Whether it ends a joint configuration.
    #[must_use]
    pub fn leave_joint(&self) -> bool {
        self.transition == ConfChangeTransition::Auto && self.changes.is_empty()
    }
}

impl Snapshot {
    /// Whether it is no snapshot at all.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.get_metadata().index == 0
    }
}
