//! Configurations: who votes and who follows.

use std::collections::BTreeSet;

use raft::eraftpb::{
    ConfChangeSingle, ConfChangeTransition, ConfChangeType, ConfChangeV2, ConfState,
};

/// The most nodes of one configuration.
pub const MAX_NODES: usize = 256;

fn set_of(name: &str, ids: &[u64]) -> Result<BTreeSet<u64>, String> {
    let set: BTreeSet<u64> = ids.iter().copied().collect();
    if set.len() < ids.len() {
        return Err(format!("{name} names a node twice"));
    }
    if set.contains(&0) {
        return Err(format!("{name} has the id 0, which is no node's"));
    }
    Ok(set)
}

/// The same configuration with its ids sorted; what contradicts itself is refused.
pub fn checked(mut conf: ConfState) -> Result<ConfState, String> {
    let voters = set_of("voters", &conf.voters)?;
    let learners = set_of("learners", &conf.learners)?;
    let outgoing = set_of("voters_outgoing", &conf.voters_outgoing)?;
    let next = set_of("learners_next", &conf.learners_next)?;
    let nodes = voters.len() + learners.len() + outgoing.len();
    if voters.is_empty() && (nodes > 0 || !next.is_empty() || conf.auto_leave) {
        return Err("there are no voters".into());
    }
    if nodes > 2 * MAX_NODES {
        return Err(format!("there are more than {} nodes", 2 * MAX_NODES));
    }
    if !learners.is_disjoint(&voters) || !learners.is_disjoint(&outgoing) {
        return Err("a learner votes".into());
    }
    if outgoing.is_empty() && conf.auto_leave {
        return Err("auto_leave is set without outgoing voters".into());
    }
    if !next.is_subset(&outgoing) || !next.is_disjoint(&voters) {
        return Err("learners_next must be outgoing voters and no incoming ones".into());
    }
    conf.voters = voters.into_iter().collect();
    conf.learners = learners.into_iter().collect();
    conf.voters_outgoing = outgoing.into_iter().collect();
    conf.learners_next = next.into_iter().collect();
    Ok(conf)
}

/// Whether nobody is in it yet.
pub fn is_empty(conf: &ConfState) -> bool {
    conf.voters.is_empty()
}

/// The change that leads from `now` (not joint) to these voters and learners; `None` for none.
///
/// One changed node is changed at once, several by joint consensus that ends by itself.
pub fn plan(
    now: &ConfState,
    voters: &[u64],
    learners: &[u64],
) -> Result<Option<ConfChangeV2>, String> {
    let new_voters = set_of("voters", voters)?;
    let new_learners = set_of("learners", learners)?;
    if new_voters.is_empty() {
        return Err("there must be a voter".into());
    }
    if let Some(id) = new_voters.intersection(&new_learners).next() {
        return Err(format!("node {id} is named as a voter and as a learner"));
    }
    if new_voters.len() + new_learners.len() > MAX_NODES {
        return Err(format!("there may be at most {MAX_NODES} nodes"));
    }
    let mut changes = Vec::new();
    let mut change = |node_id: u64, change_type: ConfChangeType| {
        changes.push(ConfChangeSingle {
            change_type,
            node_id,
            ..ConfChangeSingle::default()
        });
    };
    for id in &new_voters {
        if !now.voters.contains(id) {
            change(*id, ConfChangeType::AddNode);
        }
    }
    for id in &new_learners {
        if !now.learners.contains(id) {
            change(*id, ConfChangeType::AddLearnerNode);
        }
    }
    for id in now.voters.iter().chain(&now.learners) {
        if !new_voters.contains(id) && !new_learners.contains(id) {
            change(*id, ConfChangeType::RemoveNode);
        }
    }
    if changes.is_empty() {
        return Ok(None);
    }
    let transition = if changes.len() == 1 {
        ConfChangeTransition::Auto
    } else {
        ConfChangeTransition::Implicit
    };
    Ok(Some(ConfChangeV2 {
        transition,
        changes: changes.into(),
        ..ConfChangeV2::default()
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(voters: &[u64], learners: &[u64], outgoing: &[u64], next: &[u64]) -> ConfState {
        ConfState {
            voters: voters.to_vec(),
            learners: learners.to_vec(),
            voters_outgoing: outgoing.to_vec(),
            learners_next: next.to_vec(),
            ..ConfState::default()
        }
    }

    #[test]
    fn contradictions_are_refused() {
        for bad in [
            conf(&[], &[1], &[], &[]),
            conf(&[1, 1], &[], &[], &[]),
            conf(&[0], &[], &[], &[]),
            conf(&[1], &[1], &[], &[]),
            conf(&[1], &[2], &[2], &[]),
            conf(&[1], &[], &[], &[2]),
            conf(&[1, 2], &[], &[2], &[2]),
            conf(&[1], &(2..600).collect::<Vec<_>>(), &[], &[]),
        ] {
            assert!(checked(bad).is_err());
        }
        let joint = checked(conf(&[3, 1], &[9, 4], &[2, 1], &[2])).unwrap();
        assert_eq!(joint.voters, [1, 3]);
        assert_eq!(joint.learners, [4, 9]);
        assert!(checked(ConfState::default()).is_ok());
        let mut lonely = conf(&[1], &[], &[], &[]);
        lonely.auto_leave = true;
        assert!(checked(lonely).is_err());
    }

    #[test]
    fn one_change_is_simple_and_more_are_joint() {
        let now = conf(&[1, 2], &[3], &[], &[]);
        assert!(plan(&now, &[2, 1], &[3]).unwrap().is_none());
        let promote = plan(&now, &[1, 2, 3], &[]).unwrap().unwrap();
        assert!(promote.enter_joint().is_none() && !promote.leave_joint());
        let swap = plan(&now, &[1, 3], &[2]).unwrap().unwrap();
        assert_eq!(swap.enter_joint(), Some(true));
        assert_eq!(swap.changes.len(), 2);
        for (voters, learners) in [
            (&[][..], &[1][..]),
            (&[1], &[1]),
            (&[0], &[]),
            (&[1, 1], &[]),
        ] {
            assert!(plan(&now, voters, learners).is_err());
        }
    }
}
