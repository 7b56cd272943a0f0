//! What makes a pod one rank of a group: its host name, and the engine's place among the others.
//!
//! The address of the first rank is a function of names, so that every pod of a group can be made before
//! any of them has an address.

use k8s_openapi::api::core::v1::Container;

use super::pod::{STARTUP_SECONDS, Slot, port, probe};
use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::validate::ValidDeployment;

/// One rank of a group.
pub(super) struct Member {
    /// Name of the pod, and its host name.
    pub(super) name: String,
    rank: u32,
    ranks: u32,
    /// Where the first rank waits.
    leader: String,
}

impl Member {
    /// The rank of a slot; none where a replica is one pod.
    pub(super) fn of(
        valid: &ValidDeployment,
        layout: &Layout,
        revision: &Revision,
        slot: &Slot,
    ) -> Option<Self> {
        let name = |rank| names::rank_pod(&valid.name, slot.replica, revision, slot.attempt, rank);
        (layout.pods > 1).then(|| Self {
            name: name(slot.rank),
            rank: slot.rank,
            ranks: layout.pods,
            leader: names::leader_address(&valid.name, &valid.namespace, &name(0)),
        })
    }

    /// Tells the engine its place. Ranks after the first answer only `/livez`, `/readyz` and
    /// `/metrics`: they are ready once the group is complete and its weights are loaded.
    pub(super) fn join(&self, container: &mut Container) {
        let command = container.command.get_or_insert_default();
        for (flag, value) in [
            ("--rank", self.rank.to_string()),
            ("--world-size", self.ranks.to_string()),
            ("--leader", self.leader.clone()),
        ] {
            command.extend([flag.to_owned(), value]);
        }
        if self.rank == 0 {
            let ports = container.ports.get_or_insert_default();
            ports.push(port("ranks", names::LEADER_PORT));
        } else {
            container.startup_probe = Some(probe("/livez", 1, STARTUP_SECONDS));
        }
    }
}
