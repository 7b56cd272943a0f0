//! The moves of replicas that are groups of pods: made whole, completed, given back, torn down whole.
//!
//! Invariant: no pod of a group is created while one of the group before it may still run, and none while
//! the others have no place. Two groups that each hold a part of what both need do not wait for each other:
//! the one whose pod is refused gives its part back.

use super::{Moves, Planner, REFUSED_SECONDS, Replica, Slot, State, push_pod, seconds_between};
use crate::gang::{self, Asked};
use crate::names;
use crate::placement;
use crate::replicas::PARTLY_SECONDS;
use crate::snapshot::{PodView, Scheduled, Snapshot};

/// Why the rest of a group leaves.
pub(in crate::replicas) const TORN: &str = "its group lost a rank";

/// What is left of a group that lost a rank, and is to leave; nothing for other replicas.
pub(in crate::replicas) fn torn<'a>(
    replica: &Replica<'a>,
    snapshot: &Snapshot,
) -> Vec<&'a PodView> {
    let is_failed = match replica.state {
        State::Leaving => false,
        State::Failed { .. } => true,
        _ => return Vec::new(),
    };
    if replica.pod.ranks() == 1 {
        return Vec::new();
    }
    let answers = |pod: &PodView| {
        let node = pod.node.as_ref();
        let node = node.and_then(|node| snapshot.cluster.nodes.get(node));
        node.is_some_and(|node| node.ready)
    };
    // A first rank that someone ends still finishes its requests, and needs the others for it.
    let finishes = |pod: &PodView| pod.rank() == 0 && pod.deleting && pod.ready && answers(pod);
    if !is_failed && replica.missing_ranks().is_empty() && replica.pods().any(finishes) {
        return Vec::new();
    }
    // The failed pod stays until its successor exists: it carries the count of failures.
    let stays = |pod: &&PodView| is_failed && pod.name == replica.pod.name;
    let is_ours = |pod: &&PodView| !pod.deleting && !snapshot.is_foreign(pod);
    let all = replica.pods().filter(is_ours);
    all.filter(|pod| !stays(pod)).collect()
}

impl<'a> Planner<'a> {
    /// Removes what is left of groups that lost a rank.
    pub(in crate::replicas) fn tear(&mut self, moves: &mut Moves) {
        for replica in self.replicas {
            for pod in torn(replica, self.given.snapshot) {
                moves.remove(pod, TORN);
            }
        }
    }

    /// Creates the pods that groups still lack because a pass was cut short; a group that cannot be
    /// completed is taken back.
    pub(in crate::replicas) fn complete(&mut self, moves: &mut Moves) {
        for side in 0..self.given.sides.len() {
            let present = self.count(|replica| self.is_current_on(side, replica));
            if present > self.given.sides[side].wanted {
                // One of them is removed; it need not be completed first.
                continue;
            }
            for replica in self.replicas {
                let missing = replica.missing_ranks();
                let is_gone = self.gone.contains(replica.pod.name.as_str());
                // One that waits for its places was looked at already.
                let is_due = replica.is_live()
                    && replica.state != State::Waiting
                    && self.is_current_on(side, replica);
                if missing.is_empty() || is_gone || !is_due {
                    continue;
                }
                let beside: Vec<&str> = replica.pods().filter_map(PodView::place).collect();
                let slot = Slot {
                    replica: replica.index().unwrap_or(0),
                    attempt: replica.pod.number(names::ATTEMPT),
                    failures: replica.pod.number(names::FAILURES),
                    rollout_attempt: replica.pod.number(names::ROLLOUT_ATTEMPT),
                    refused: super::refused_before(replica.pod),
                    ..Slot::default()
                };
                let pods = u64::try_from(missing.len()).unwrap_or(u64::MAX);
                let is_over = self.over_quota(side, pods).is_some();
                if is_over || !self.create_ranks(moves, side, slot, &missing, &beside) {
                    self.remove(moves, replica, "there is no room for the rest of its group");
                }
            }
        }
    }

    /// Creates the pods of some ranks of one group, each for a node of its own choice; all or none.
    pub(super) fn create_ranks(
        &mut self,
        moves: &mut Moves,
        index: usize,
        slot: Slot,
        ranks: &[u32],
        beside: &[&str],
    ) -> bool {
        let asked = Asked {
            ranks: u32::try_from(ranks.len()).unwrap_or(u32::MAX),
            beside: beside.to_vec(),
            refused: &slot.refused,
            on_demand_min: self.lacks_on_demand(),
        };
        let nodes = match gang::place(&self.wishes[index], &self.room, &asked) {
            Ok(nodes) => nodes,
            Err(why_not) => {
                moves.why_not = why_not;
                return false;
            }
        };
        self.push_ranks(moves, index, &slot, ranks, nodes, beside);
        true
    }

    /// A whole group: where there is room, or where others of lower priority have to leave first.
    pub(super) fn create_group(&mut self, moves: &mut Moves, index: usize, mut slot: Slot) -> bool {
        let ranks: Vec<u32> = (0..self.given.sides[index].layout.pods).collect();
        let before = std::mem::take(&mut moves.why_not);
        if self.create_ranks(moves, index, slot.clone(), &ranks, &[]) {
            moves.why_not = before;
            return true;
        }
        let Some(nodes) = self.preempt_for_group(moves, index, &mut slot, ranks.len()) else {
            return false;
        };
        moves.why_not = before;
        self.push_ranks(moves, index, &slot, &ranks, nodes, &[]);
        true
    }

    /// Creates the pods of ranks, each for its node; those that the group has already are on the nodes `beside`.
    fn push_ranks(
        &mut self,
        moves: &mut Moves,
        index: usize,
        slot: &Slot,
        ranks: &[u32],
        nodes: Vec<String>,
        beside: &[&str],
    ) {
        let side = &self.given.sides[index];
        let count = u64::try_from(ranks.len()).unwrap_or(u64::MAX);
        self.grant(index, count);
        let mut all = beside
            .iter()
            .copied()
            .chain(nodes.iter().map(String::as_str));
        self.on_demand += u32::from(all.all(|node| self.is_on_demand(node)));
        for (rank, node) in ranks.iter().zip(nodes) {
            self.take(index, &node);
            let slot = Slot {
                rank: *rank,
                nodes: vec![node.clone()],
                ..slot.clone()
            };
            push_pod(moves, side, &slot);
            moves.nodes.push(node);
        }
    }

    /// A group one of whose pods the scheduler refuses gives back what it holds: soon when the node
    /// that the pod was planned for is taken, and in any case after a while.
    pub(super) fn give_back_refused(&mut self, moves: &mut Moves, replica: &'a Replica<'a>) {
        let wish = &self.wishes[self.side(replica).unwrap_or(0)];
        let mut is_over = false;
        for pod in replica.pods() {
            let Scheduled::Refused { since, .. } = &pod.scheduled else {
                continue;
            };
            let since = since.or(pod.created).unwrap_or(self.now());
            let waited = seconds_between(since, self.now());
            let fits = pod.place().is_some_and(|name| {
                let room = self.room.without(name, pod.requests);
                let node = room.node(name);
                node.is_some_and(|node| placement::why_not(node, wish, &room).is_none())
            });
            let patience = if fits {
                PARTLY_SECONDS
            } else {
                REFUSED_SECONDS
            };
            is_over |= waited >= patience;
            if waited < patience {
                moves.wake(patience - waited);
            }
        }
        if is_over {
            self.remove(moves, replica, "not all of its group can be scheduled");
        }
    }
}
