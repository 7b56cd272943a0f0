//! Who leaves: replicas of other revisions and those that are too many, as far as the others keep what is
//! promised.

use std::collections::BTreeMap;

use super::Planner;
use crate::gang::{self, Asked};
use crate::gpu_faults;
use crate::placement::{self, WhyNot};
use crate::replicas::{Moves, Replica, SETTLE_SECONDS, State, created_indices, drain};

impl<'a> Planner<'a> {
    /// Removes replicas of other revisions and those beyond the wanted number of their side.
    pub(in crate::replicas) fn retire(&mut self, moves: &mut Moves) {
        let wanted = self.given.wanted;
        let promised = wanted.saturating_sub(self.given.valid.rollout.unavailable_max);
        let serving = self.count(|replica| replica.is_ready());
        let mut spare = serving.saturating_sub(promised);
        let sides = self.given.sides.iter().enumerate();
        let mut excess: Vec<u32> = sides
            .map(|(index, side)| {
                let present = self.count(|replica| self.is_current_on(index, replica));
                present.saturating_sub(side.wanted)
            })
            .collect();
        let mut leaving: Vec<&'a Replica<'a>> = self.live().collect();
        leaving.sort_by_cached_key(|replica| self.retirement_order(replica));
        self.by_price(&mut leaving);
        let mut unreplaced = self.unreplaced(moves);
        for replica in leaving {
            let side = self.side(replica).filter(|_| self.is_current(replica));
            if side.is_some_and(|side| excess[side] == 0) {
                continue;
            }
            if unreplaced > 0 && self.may_go_on(replica) {
                unreplaced -= 1;
                continue;
            }
            let why = match side {
                Some(_) if self.given.is_rolling => "its revision is replaced",
                Some(_) => "fewer replicas are wanted",
                None if self.side(replica).is_some() => "the GPUs of its node are at fault",
                None => "its revision is replaced",
            };
            if replica.is_ready() {
                if spare == 0 {
                    continue;
                }
                spare -= 1;
                self.gone.insert(&replica.pod.name);
                moves.actions.push(drain(replica.pod, self.now()));
                moves.drained.push(replica.pod.name.clone());
                moves.wake(SETTLE_SECONDS);
            } else {
                self.remove(moves, replica, why);
            }
            if let Some(side) = side {
                excess[side] -= 1;
            }
        }
    }

    /// Whether a replica is as wanted but for a GPU that its engine reported: it answers, or may once it is started again,
    /// and is better than none.
    fn may_go_on(&self, replica: &Replica<'_>) -> bool {
        self.side(replica).is_some()
            && self.fault_of_node(replica).is_none()
            && gpu_faults::of_replica(replica, self.given.snapshot).is_some()
    }

    /// Wanted replicas that neither exist on sound GPUs nor have a place there. Without surge nobody asked for one yet, so it
    /// is told here that there is none.
    fn unreplaced(&self, moves: &mut Moves) -> u32 {
        if !self.live().any(|replica| self.may_go_on(replica)) {
            return 0;
        }
        let created = u32::try_from(created_indices(moves).len()).unwrap_or(u32::MAX);
        let present = self.count(|replica| self.is_current(replica));
        let missing = self.given.wanted.saturating_sub(present + created);
        if moves.unplaced == 0 && missing > 0 {
            let Err(why_not) = self.further_place() else {
                return 0;
            };
            moves.unplaced = missing;
            moves.why_not = why_not;
        }
        missing
    }

    /// Where a further replica has a place.
    ///
    /// # Errors
    /// Nowhere: why not, for each node.
    fn further_place(&self) -> Result<Vec<String>, Vec<WhyNot>> {
        let wish = &self.wishes[0];
        if wish.layout.pods == 1 {
            return placement::offer(wish, &self.room);
        }
        let asked = Asked {
            ranks: wish.layout.pods,
            ..Asked::default()
        };
        gang::place(wish, &self.room, &asked)
    }

    /// Who goes first: those that do not answer, then the emptiest, then the highest index.
    fn retirement_order(&self, replica: &Replica<'_>) -> (u8, u64, std::cmp::Reverse<u32>) {
        let rank = match replica.state {
            State::Refused { .. } => 0,
            State::Waiting => 1,
            State::Failing { .. } => 2,
            State::Starting => 3,
            _ => 4,
        };
        let samples = self.given.snapshot.samples.get(&replica.pod.name);
        let busy = samples
            .and_then(|samples| samples.latest.as_ref())
            .map_or(0, |sample| {
                u64::from(sample.report.running) + u64::from(sample.report.waiting)
            });
        (
            rank,
            busy,
            std::cmp::Reverse(replica.index().unwrap_or(u32::MAX)),
        )
    }

    /// Of the replicas in the order in which they leave: the ones that cost most first, where price
    /// matters, but none that keeps the least number off spot nodes before one that does not.
    fn by_price(&self, leaving: &mut [&'a Replica<'a>]) {
        let Some(least) = self.given.valid.placement.on_demand_min else {
            return;
        };
        let mut surplus = self.on_demand_there().saturating_sub(least);
        let mut order = BTreeMap::new();
        for replica in leaving.iter() {
            let rank = match (self.stands_on_demand(replica), surplus) {
                (true, 0) => 2,
                (true, _) => {
                    surplus -= 1;
                    0
                }
                (false, _) => 1,
            };
            order.insert(replica.pod.name.as_str(), rank);
        }
        // Stable: what does not answer still goes before what does.
        leaving.sort_by_key(|replica| {
            let rank = order.get(replica.pod.name.as_str()).copied();
            (replica.is_ready(), rank)
        });
    }
}
