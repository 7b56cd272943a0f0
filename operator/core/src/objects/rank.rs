//! What makes a pod one rank of a group: its host name, and the engine's place among the others.
//!
//! The address of the first rank is a function of names, so that every pod of a group can be made before
//! any of them has an address.

use k8s_openapi::api::core::v1::{Container, KeyToPath, SecretVolumeSource, Volume};

use super::pod::{STARTUP_SECONDS, Slot, mount, port, probe};
use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::validate::ValidDeployment;

/// Name of the volume with what ranks prove to each other, and where it is mounted.
const SECRET: &str = "group-secret";
const SECRET_MOUNT: &str = "/etc/cachalot-group";
/// Key of the secret, and name of its file.
const SECRET_KEY: &str = "secret";

/// One rank of a group.
pub(super) struct Member {
    /// Name of the pod, and its host name.
    pub(super) name: String,
    rank: u32,
    ranks: u32,
    /// Where the first rank waits.
    leader: String,
    /// Name of the secret that all ranks know.
    secret: Option<String>,
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
            secret: valid.group_secret.clone(),
        })
    }

    /// The secret that all ranks know.
    pub(super) fn volume(&self) -> Option<Volume> {
        let secret = self.secret.clone()?;
        Some(Volume {
            name: SECRET.into(),
            secret: Some(SecretVolumeSource {
                secret_name: Some(secret),
                // Other keys are not the engine's, and without this one the kubelet says which is missing.
                items: Some(vec![KeyToPath {
                    key: SECRET_KEY.into(),
                    path: SECRET_KEY.into(),
                    mode: None,
                }]),
                // The engine reads it by the group of its volumes.
                default_mode: Some(0o440),
                ..SecretVolumeSource::default()
            }),
            ..Volume::default()
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
        if self.secret.is_some() {
            let file = format!("{SECRET_MOUNT}/{SECRET_KEY}");
            command.extend(["--group-secret-file".to_owned(), file]);
            let mounts = container.volume_mounts.get_or_insert_default();
            mounts.push(mount(SECRET, SECRET_MOUNT, true));
        }
        if self.rank == 0 {
            let ports = container.ports.get_or_insert_default();
            ports.push(port("ranks", names::LEADER_PORT));
        } else {
            container.startup_probe = Some(probe("/livez", 1, STARTUP_SECONDS));
        }
    }
}
