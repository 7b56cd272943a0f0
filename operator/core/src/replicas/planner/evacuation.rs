//! Replicas on nodes that are being emptied: cordoned, as `kubectl drain` begins, or about to be removed by an autoscaler.
//!
//! Such a replica moves as in a rollout, within surge and what may be missing, and finishes its requests; but only where another
//! node has a place for it: it answers, and is better than none. The surprise: one that came for it makes one more than
//! wanted, and would be taken for too many as soon as the last free place is gone. So as many move as are too many already,
//! whatever room is left.

use super::{Offers, Planner};
use crate::gang::{self, Asked};
use crate::placement::{self, Room};
use crate::replicas::{Moves, Replica, State};

/// Seconds between looks for a place elsewhere.
const LOOK_SECONDS: u64 = 30;

impl<'a> Planner<'a> {
    /// Chooses who moves off nodes that are being emptied; who stays for want of a place is told of.
    pub(in crate::replicas) fn evacuate(&mut self, moves: &mut Moves) {
        let there: Vec<(&'a Replica<'a>, usize, String)> = self
            .replicas
            .iter()
            .filter_map(|replica| self.closing(replica))
            .collect();
        if there.is_empty() {
            return;
        }
        let wanted = self.given.wanted;
        // Replicas of a revision that is being replaced came for nobody.
        let present = self.count(|replica| self.is_current(replica));
        let mut beyond = present.saturating_sub(wanted);
        let mut more = match present {
            present if present < wanted => 0,
            _ => self
                .given
                .valid
                .rollout
                .surge_max
                .max(1)
                .saturating_sub(beyond),
        };
        let mut room = self.room.clone();
        let mut asked = vec![0; self.given.sides.len()];
        for (replica, side, why) in there {
            let pod = &replica.pod.name;
            // One that drains already counts as gone: it is wanted back only where it cannot be replaced.
            let is_due = if matches!(replica.state, State::Draining { .. }) {
                present >= wanted || self.finds(replica, side, &mut asked, &mut room).is_ok()
            } else if beyond > 0 {
                beyond -= 1;
                true
            } else if more == 0 {
                continue;
            } else {
                more -= 1;
                match self.finds(replica, side, &mut asked, &mut room) {
                    Ok(()) => true,
                    Err(obstacle) => {
                        moves
                            .stuck
                            .push(format!("pod {pod} stays, though {why}: {obstacle}"));
                        moves.wake(LOOK_SECONDS);
                        false
                    }
                }
            };
            if is_due {
                self.evacuated.insert(pod);
                if replica.is_ready() {
                    moves
                        .evacuated
                        .push(format!("{why}; pod {pod} is replaced elsewhere"));
                }
            }
        }
    }

    /// A replica that answers from a node that is being emptied, its side, and what says so.
    fn closing(&self, replica: &'a Replica<'a>) -> Option<(&'a Replica<'a>, usize, String)> {
        let answers = replica.is_ready() || matches!(replica.state, State::Draining { .. });
        let side = self.side(replica)?;
        if !answers || self.gone.contains(replica.pod.name.as_str()) || self.gives_way(replica) {
            return None;
        }
        let placement = &self.given.sides[side].valid.placement;
        let why = replica.pods().find_map(|pod| {
            let node = self.given.snapshot.cluster.nodes.get(pod.node.as_ref()?)?;
            placement::closing(node, placement)
        })?;
        self.fault(replica)
            .is_none()
            .then_some((replica, side, why))
    }

    /// Takes a place for one more replica of a side out of `room`; `asked` have been taken before.
    ///
    /// # Errors
    /// What is in the way, in words.
    fn finds(
        &self,
        replica: &Replica<'_>,
        side: usize,
        asked: &mut [u64],
        room: &mut Room<'a>,
    ) -> Result<(), String> {
        let wish = &self.wishes[side];
        let pods = wish.layout.pods;
        if let Some(words) = self.over_quota(side, u64::from(pods) * (asked[side] + 1)) {
            return Err(words);
        }
        let least = self.given.valid.placement.on_demand_min;
        let on_demand_min = least.filter(|_| self.stands_on_demand(replica));
        let found = if pods == 1 {
            let best = Offers::new(wish, room).best(&[], on_demand_min);
            best.map(|nodes| nodes.into_iter().take(1).collect())
        } else {
            let ranks = Asked {
                ranks: pods,
                on_demand_min,
                ..Asked::default()
            };
            gang::place(wish, room, &ranks)
        };
        let nodes = found.map_err(placement::grouped)?;
        for node in nodes {
            room.take(&node, wish.requests);
        }
        asked[side] += 1;
        Ok(())
    }
}
