//! Changes of the configuration, and the snapshots that carry it.

use bytes::Bytes;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeV2, ConfState, Snapshot};
use raft::{StateRole, INVALID_ID};

use super::conf;
use super::node::{dropped, Fault, Node, Outcome};
use super::storage::make_snapshot;

impl Node {
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
            let members = node.raw.raft.prs();
            node.heard.retain(|id, _| members.get(*id).is_some());
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

    pub fn snapshot(&mut self, index: u64, data: Bytes) -> Outcome<Snapshot> {
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
}
