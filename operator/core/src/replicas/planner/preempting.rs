//! Both sides of preemption: the replica that takes a place, and those that give way.
//!
//! The one that takes a place, of a group all of its pods, is made at once and held back by a scheduling gate: its pod is the
//! reservation, counted on its node by every plan, so that nobody takes the room that becomes free.
//! Those who give way are drained by their own plan and come back where there is room. The gate goes
//! when the room is there. Where room appears elsewhere meanwhile, the place is left to those who
//! have it.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use super::{Planner, Side};
use crate::gang::{self, Asked};
use crate::names;
use crate::objects::Slot;
use crate::placement::{self, Offers, Room};
use crate::plan::Action;
use crate::preemption::{self, Ask, Places, Taking};
use crate::priority::{Contest, Priority, Rival, Victim};
use crate::replicas::{Moves, Replica, SETTLE_SECONDS, State, created_indices, drain};
use crate::resources::Resources;
use crate::snapshot::{PodView, Snapshot};

/// Failures of a revision's replicas after which they take nobody's place any more: they would disturb
/// others again and again and serve nobody.
const FAILURES_MAX: u32 = 2;
/// Pods that give way to one group at most: each of its pods names all of them.
const VICTIMS_MAX: usize = 256;

/// Takes replicas out of the Service that another ModelDeployment of higher priority takes the place
/// of, and removes those that do not answer anyway.
pub(in crate::replicas) fn give_way<'a>(
    snapshot: &Snapshot,
    replicas: impl Iterator<Item = &'a Replica<'a>>,
    moves: &mut Moves,
) {
    for replica in replicas {
        let Some(why) = snapshot.contest.claimed(replica.pods()) else {
            continue;
        };
        moves.preempted.push(format!("{}: {why}", replica.pod.name));
        if replica.is_ready() {
            moves.actions.push(drain(replica.pod, snapshot.now));
            moves.drained.push(replica.pod.name.clone());
            moves.wake(SETTLE_SECONDS);
        } else if replica.is_live() {
            moves.remove_all(replica, &why);
        }
    }
}

/// Uids of pods that give way to a replica that may not be disturbed: one of this ModelDeployment, or
/// one that is worth as much.
pub(super) fn spoken_for(
    contest: &Contest,
    own: Priority,
    replicas: &[Replica<'_>],
) -> BTreeSet<String> {
    let waiting = replicas
        .iter()
        .filter(|replica| replica.state == State::Waiting);
    let others = contest.reservations.iter().map(|rival| &*rival.pod);
    waiting
        .flat_map(Replica::pods)
        .chain(others.filter(|pod| pod.priority >= own.value))
        .flat_map(|pod| pod.victims().map(|victim| victim.uid.to_owned()))
        .collect()
}

/// What the pods of a replica wait for.
pub(super) fn waiting_words<'a>(pods: impl IntoIterator<Item = &'a PodView>) -> String {
    let pods: Vec<&PodView> = pods.into_iter().collect();
    let names: Vec<&str> = pods.iter().map(|pod| pod.name.as_str()).collect();
    let owners = pods.first().map(|pod| crate::explain::owners(pod));
    let nodes: BTreeSet<&str> = pods.iter().flat_map(|pod| pod.planned_nodes()).collect();
    let nodes: Vec<&str> = nodes.into_iter().collect();
    format!(
        "{} {} until replicas of {}, of lower priority, have left node {}",
        names.join(", "),
        if pods.len() == 1 { "waits" } else { "wait" },
        owners.unwrap_or_default().join(", "),
        nodes.join(", ")
    )
}

/// The pods of a replica that hold a place which others have not left yet.
fn reserving<'a>(replica: &Replica<'a>) -> impl Iterator<Item = &'a PodView> {
    replica.pods().filter(|pod| pod.is_reserving())
}

impl<'a> Planner<'a> {
    /// What the pods of a side are worth.
    pub(super) fn priority(side: &Side, contest: &Contest) -> Priority {
        Priority::of(
            side.valid.placement.priority_class.as_deref(),
            &contest.classes,
        )
    }

    /// Whether another one takes the place of a replica.
    pub(super) fn gives_way(&self, replica: &Replica<'_>) -> bool {
        let contest = &self.given.snapshot.contest;
        contest.claimant_of(replica.pods()).is_some()
    }

    /// Replicas whose place another one takes leave.
    pub(in crate::replicas) fn give_way(&mut self, moves: &mut Moves) {
        let staying = self
            .replicas
            .iter()
            .filter(|replica| !self.gone.contains(replica.pod.name.as_str()));
        give_way(self.given.snapshot, staying, moves);
        for replica in self.replicas {
            if self.gives_way(replica) {
                self.gone.insert(&replica.pod.name);
            }
        }
    }

    /// Replicas that wait for a place get it when it is free, give it up when it will not be or when
    /// there is room elsewhere, and wait on otherwise.
    pub(in crate::replicas) fn settle_waiting(&mut self, moves: &mut Moves) {
        let waiting: Vec<(&'a Replica<'a>, usize)> = self
            .live()
            .filter(|replica| replica.state == State::Waiting)
            .filter_map(|replica| Some((replica, self.side(replica)?)))
            .collect();
        // None of them is there yet: what they are counted for is free, until one gets it.
        for pod in waiting.iter().flat_map(|(replica, _)| reserving(replica)) {
            if let Some(node) = pod.planned_nodes().first() {
                self.room.give_back(node, pod.requests);
            }
        }
        let (now, later): (Vec<_>, Vec<_>) = waiting
            .into_iter()
            .partition(|(replica, side)| self.gets_place(replica, *side));
        for pod in now.iter().flat_map(|(replica, _)| reserving(replica)) {
            moves.actions.push(Action::Release {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
            });
        }
        for (replica, side) in later {
            self.wait_on(moves, replica, side);
        }
    }

    /// Whether all places of a replica are free now; then they are taken.
    fn gets_place(&mut self, replica: &Replica<'_>, side: usize) -> bool {
        let mut room = self.room.clone();
        let is_free = self.fits(replica, side, &mut room);
        if is_free {
            self.room = room;
        }
        is_free
    }

    /// Whether `room` has all places of a replica; they are taken.
    fn fits(&self, replica: &Replica<'_>, side: usize, room: &mut Room<'_>) -> bool {
        let wish = &self.wishes[side];
        replica.missing_ranks().is_empty()
            && reserving(replica).all(|pod| {
                let planned = pod.planned_nodes();
                let node = planned.first().and_then(|name| room.node(name));
                let node = node.filter(|node| placement::why_not(node, wish, room).is_none());
                if let Some(node) = node {
                    room.take(&node.name, pod.requests);
                }
                node.is_some()
            })
    }

    fn wait_on(&mut self, moves: &mut Moves, replica: &'a Replica<'a>, side: usize) {
        let mut then = self.room.clone();
        let nodes: BTreeSet<&str> = reserving(replica)
            .filter_map(|pod| pod.planned_nodes().first().copied())
            .collect();
        for node in nodes {
            then.give_back(node, self.leaving(node));
        }
        self.gone.insert(&replica.pod.name);
        let will_fit = self.fits(replica, side, &mut then.clone());
        if !will_fit && !self.take_more(moves, replica, side, then) {
            moves.remove_all(replica, "its place was taken by others meanwhile");
            return;
        }
        if self.is_room_elsewhere(replica, side) {
            moves.remove_all(replica, "there is room elsewhere, and nobody has to leave");
            return;
        }
        self.gone.remove(replica.pod.name.as_str());
        for pod in reserving(replica) {
            if let Some(node) = pod.planned_nodes().first() {
                self.room.take(node, pod.requests);
            }
        }
        moves.waiting.push(waiting_words(reserving(replica)));
    }

    /// Others of lower priority that came to the places of a replica since it waits are to leave too; false where that does
    /// not help. `then` is the room once those have left that leave already.
    fn take_more(
        &mut self,
        moves: &mut Moves,
        replica: &Replica<'_>,
        side: usize,
        mut then: Room<'_>,
    ) -> bool {
        let nodes: BTreeSet<&str> = reserving(replica).filter_map(PodView::place).collect();
        let rivals = self.given.snapshot.contest.rivals.iter();
        let mut newcomers: Vec<&Rival> = rivals
            .filter(|rival| !rival.is_among(&self.spoken_for))
            .filter(|rival| !rival.nodes().is_disjoint(&nodes))
            .collect();
        newcomers.sort_by_key(|rival| (rival.pod.priority, Reverse(rival.pod.created)));
        let mut more: Vec<Rival> = Vec::new();
        let mut will_fit = false;
        for rival in newcomers {
            for pod in rival.pods() {
                if let Some(node) = pod.place() {
                    then.give_back(node, pod.requests);
                }
            }
            more.push(rival.clone());
            will_fit = self.fits(replica, side, &mut then.clone());
            if will_fit {
                break;
            }
        }
        let words: Vec<String> = more.iter().flat_map(Victim::words).collect();
        if !will_fit || replica.pod.victims().count() + words.len() > VICTIMS_MAX {
            return false;
        }
        for pod in reserving(replica) {
            let known = pod.annotations.get(names::PREEMPTS).unwrap_or_default();
            let all = format!("{known},{}", words.join(","));
            moves.actions.push(Action::PatchPod {
                name: pod.name.clone(),
                uid: pod.uid.clone(),
                labels: Default::default(),
                annotations: [(names::PREEMPTS.to_owned(), Some(all))].into(),
            });
        }
        let pods = more.iter().flat_map(Rival::pods);
        self.spoken_for.extend(pods.map(|pod| pod.uid.clone()));
        true
    }

    /// Whether a replica that waits would find room by itself, as close together as the places that it waits for. A group
    /// of which some got their place keeps it.
    fn is_room_elsewhere(&self, replica: &Replica<'_>, side: usize) -> bool {
        let (wish, on_demand_min) = (&self.wishes[side], self.lacks_on_demand());
        if replica.pod.ranks() == 1 {
            return Offers::new(wish, &self.room)
                .best(&[], on_demand_min)
                .is_ok();
        }
        let asked = Asked {
            ranks: replica.pod.ranks(),
            on_demand_min,
            ..Asked::default()
        };
        if !replica.pods().all(PodView::is_reserving) {
            return false;
        }
        let places = replica.pods().filter_map(PodView::place);
        let reserved = gang::width(places, wish, &self.room);
        gang::place(wish, &self.room, &asked).is_ok_and(|found| {
            gang::width(found.iter().map(String::as_str), wish, &self.room) <= reserved
        })
    }

    /// What those take that leave a node for one of ours, or for one that is worth as much.
    fn leaving(&self, node: &str) -> Resources {
        let rivals = self.given.snapshot.contest.rivals.iter();
        rivals
            .filter(|rival| rival.is_among(&self.spoken_for))
            .fold(Resources::default(), |sum, rival| sum + rival.on(node))
    }

    /// Whether a replica is missing that nothing of ours is about to make room for. What a rollout
    /// adds for a while takes nobody's place.
    fn is_missing(&self, moves: &Moves) -> bool {
        let nodes = &self.given.snapshot.cluster.nodes;
        let answers = |node: &String| nodes.get(node).is_some_and(|node| node.ready);
        let leaving = self.replicas.iter().filter(|replica| match replica.state {
            State::Draining { .. } => true,
            State::Leaving => replica.pod.node.as_ref().is_some_and(answers),
            _ => false,
        });
        let created = u32::try_from(created_indices(moves).len()).unwrap_or(u32::MAX);
        let leaving = u32::try_from(leaving.count()).unwrap_or(u32::MAX);
        let there = self.count(|_| true).saturating_add(leaving);
        there.saturating_add(created) < self.given.wanted
    }

    /// Finds a place that others of lower priority have to leave first; false when there is none.
    pub(super) fn preempt(&mut self, moves: &Moves, index: usize, slot: &mut Slot) -> bool {
        let taking = self.ask(moves, index).and_then(preemption::choose);
        let Some(Taking { node, victims }) = taking else {
            return false;
        };
        slot.nodes = vec![node];
        self.speak_for(slot, &victims);
        true
    }

    /// The same for all ranks of a group; the node of each.
    pub(super) fn preempt_for_group(
        &mut self,
        moves: &Moves,
        index: usize,
        slot: &mut Slot,
        ranks: usize,
    ) -> Option<Vec<String>> {
        let ask = self.ask(moves, index)?;
        let Places { nodes, victims } = preemption::choose_for_group(ask, ranks)?;
        let pods = victims.iter().flat_map(Rival::pods).count();
        if pods > VICTIMS_MAX {
            return None;
        }
        self.speak_for(slot, &victims);
        Some(nodes)
    }

    /// What a place is looked for with; none where nobody's may be taken.
    fn ask(&self, moves: &Moves, index: usize) -> Option<Ask<'_>> {
        let contest = &self.given.snapshot.contest;
        let may = Self::priority(&self.given.sides[index], contest).preempts
            && !contest.rivals.is_empty()
            && self.failures_on(index) <= FAILURES_MAX
            && self.is_missing(moves);
        may.then(|| Ask {
            wish: &self.wishes[index],
            room: &self.room,
            contest,
            spoken_for: &self.spoken_for,
            on_demand_only: self.lacks_on_demand().is_some(),
        })
    }

    /// Failures in a row of the replicas of a side that do not answer, all together.
    fn failures_on(&self, index: usize) -> u32 {
        let silent = self
            .replicas
            .iter()
            .filter(|replica| self.side(replica) == Some(index) && !replica.is_ready());
        let failures = silent.map(|replica| match replica.state {
            State::Failed { at, .. } => self.failures(replica.pod, at),
            // The one before it stands for them while it waits.
            State::Waiting => 0,
            _ => replica.pod.number(names::FAILURES),
        });
        failures.fold(0, u32::saturating_add)
    }

    /// Names in a slot those who have to leave.
    fn speak_for(&mut self, slot: &mut Slot, victims: &[Rival]) {
        slot.preempts = victims.iter().flat_map(Victim::words).collect();
        let pods = victims.iter().flat_map(Rival::pods);
        self.spoken_for.extend(pods.map(|pod| pod.uid.clone()));
    }
}
