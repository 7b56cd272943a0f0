//! Pods that serve one replica together, seen as one.
//!
//! Invariant: a replica of several pods answers only when every rank does, and is given up whole, since
//! none of its ranks can go on without the others. The surprise: a rank that has no pod means one of two
//! things. While no rank has run yet, the group is still being made, and the missing pod is created. Once
//! one has, a rank was lost, and what is left leaves.

use std::collections::BTreeMap;

use super::state::{Replica, State};
use crate::names;
use crate::snapshot::PodView;

/// Pods of one group at most: a larger number can only come from someone who meddled.
const RANKS_MAX: u32 = 64;

/// Index, revision and attempt of a replica.
pub(crate) type GroupKey<'a> = (&'a str, &'a str, u32);

impl PodView {
    /// Its rank; 0 where a replica is one pod.
    pub fn rank(&self) -> u32 {
        self.label(names::RANK).parse().unwrap_or(0)
    }

    /// Pods of its group; 1 where a replica is one pod.
    pub fn ranks(&self) -> u32 {
        self.number(names::RANKS).clamp(1, RANKS_MAX)
    }

    /// Node it is on, or planned for first.
    pub fn place(&self) -> Option<&str> {
        let planned = || self.planned_nodes().first().copied();
        self.node.as_deref().or_else(planned)
    }

    /// What the pods of one group have in common.
    pub(crate) fn group(&self) -> GroupKey<'_> {
        let (index, revision) = (self.label(names::REPLICA), self.label(names::REVISION));
        (index, revision, self.number(names::ATTEMPT))
    }

    /// Whether its container runs with the others of its group, or did.
    fn has_run(&self) -> bool {
        self.ready || self.container.restarts > 0
    }
}

/// The replicas that pods make up; those of one pod as they are.
pub(super) fn join<'a>(pods: impl Iterator<Item = (&'a PodView, State)>) -> Vec<Replica<'a>> {
    let mut replicas = Vec::new();
    let mut groups: BTreeMap<GroupKey<'a>, Vec<_>> = BTreeMap::new();
    for (pod, state) in pods {
        if pod.ranks() == 1 {
            replicas.push(Replica::alone(pod, state));
        } else {
            groups.entry(pod.group()).or_default().push((pod, state));
        }
    }
    replicas.extend(groups.into_values().filter_map(whole));
    replicas
}

fn whole(mut members: Vec<(&PodView, State)>) -> Option<Replica<'_>> {
    members.sort_by_key(|(pod, _)| pod.rank());
    let (speaker, state) = judged(&members)?;
    let (pod, _) = members.remove(speaker);
    Some(Replica {
        pod,
        mates: members.into_iter().map(|(pod, _)| pod).collect(),
        state,
    })
}

/// What a group is doing, and which of its pods that is about.
fn judged(members: &[(&PodView, State)]) -> Option<(usize, State)> {
    let first_of = |test: &dyn Fn(&State) -> bool| {
        let index = members.iter().position(|(_, state)| test(state))?;
        Some((index, members[index].1.clone()))
    };
    if let Some(lost) = first_of(&|state| matches!(state, State::Lost { .. })) {
        return Some(lost);
    }
    if let Some(failed) = failed_first(members) {
        return Some((failed, members[failed].1.clone()));
    }
    if let Some(leaving) = first_of(&|state| *state == State::Leaving) {
        return Some(leaving);
    }
    if let Some(waiting) = first_of(&|state| *state == State::Waiting) {
        return Some(waiting);
    }
    let (first, first_state) = members.first()?;
    let present = u32::try_from(members.len()).unwrap_or(u32::MAX);
    let is_complete = present >= first.ranks();
    if !is_complete && members.iter().any(|(pod, _)| pod.has_run()) {
        return Some((0, State::Leaving));
    }
    if matches!(first_state, State::Draining { .. }) {
        return Some((0, first_state.clone()));
    }
    if is_complete && members.iter().all(|(_, state)| *state == State::Ready) {
        return Some((0, State::Ready));
    }
    first_of(&|state| matches!(state, State::Refused { .. }))
        .or_else(|| first_of(&|state| matches!(state, State::Failing { .. })))
        .or(Some((0, State::Starting)))
}

/// The pod that failed first; one that is being deleted already speaks last.
fn failed_first(members: &[(&PodView, State)]) -> Option<usize> {
    let failed = members
        .iter()
        .enumerate()
        .filter_map(|(index, (pod, state))| match state {
            State::Failed { at, .. } => Some((pod.deleting, *at, index)),
            _ => None,
        });
    failed.min().map(|(_, _, index)| index)
}
