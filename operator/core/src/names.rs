//! Names, labels and annotations of everything the operator creates.
//!
//! Names are functions of what was observed, never of chance: a plan made twice from the same
//! snapshot names the same objects, so a repeated create meets "already exists" instead of making
//! a twin.

use std::collections::BTreeMap;
use std::fmt;

use sha2::{Digest, Sha256};

/// Field manager of every write.
pub const FIELD_MANAGER: &str = "cachalot";
/// Who manages an object.
pub const MANAGED_BY: &str = "app.kubernetes.io/managed-by";
/// What an object is part of.
pub const APP_NAME: &str = "app.kubernetes.io/name";
/// The ModelDeployment an object belongs to.
pub const MODEL_DEPLOYMENT: &str = "cachalot.dev/model-deployment";
/// `engine` or `inspect`.
pub const COMPONENT: &str = "cachalot.dev/component";
/// Revision of an engine pod.
pub const REVISION: &str = "cachalot.dev/revision";
/// Whether the Service sends requests to an engine pod.
pub const SERVING: &str = "cachalot.dev/serving";
/// Index of the replica an engine pod is.
pub const REPLICA: &str = "cachalot.dev/replica";
/// Rank of an engine pod in its group; absent where a replica is one pod.
pub const RANK: &str = "cachalot.dev/rank";
/// Tells endpoint pickers which metric names to read.
pub const ENGINE_TYPE: &str = "llm-d.ai/engine-type";

/// Annotation: how many pods the group of an engine pod has; absent where a replica is one pod.
pub const RANKS: &str = "cachalot.dev/ranks";
/// Annotation: how many pods this replica had before.
pub const ATTEMPT: &str = "cachalot.dev/attempt";
/// Annotation: how many of them failed in a row.
pub const FAILURES: &str = "cachalot.dev/failures";
/// Annotation: `rollout.attempt` when the pod was made.
pub const ROLLOUT_ATTEMPT: &str = "cachalot.dev/rollout-attempt";
/// Annotation: nodes the pod was planned for, in order of preference, comma separated.
pub const PLANNED_NODES: &str = "cachalot.dev/planned-nodes";
/// Annotation: nodes whose kubelet refused the pods before this one, comma separated.
pub const REFUSED_NODES: &str = "cachalot.dev/refused-nodes";
/// Annotation: hash of all that an inspection pod depends on.
pub const INSPECT_INPUTS: &str = "cachalot.dev/inspect-inputs";
/// Annotation: since when a pod finishes its requests before it leaves.
pub const DRAIN_SINCE: &str = "cachalot.dev/drain-since";

/// Annotation: pods whose place this one takes once they have left, `namespace/deployment/uid`, comma
/// separated.
pub const PREEMPTS: &str = "cachalot.dev/preempts";

/// Value of [`COMPONENT`] for pods that serve.
pub const ENGINE: &str = "engine";
/// Value of [`COMPONENT`] for pods that read a model's facts.
pub const INSPECT: &str = "inspect";
/// Key of the engine's configuration in its config map.
pub const ENGINE_JSON: &str = "engine.json";
/// Key of what made a revision, in the config map of its engine's configuration.
pub const REVISION_JSON: &str = "revision.json";
/// Key of a model's facts in their config map.
pub const FACTS_JSON: &str = "facts.json";
/// Key of a model's published config in a config map that the user gives.
pub const CONFIG_JSON: &str = "config.json";
/// Port the engine listens on.
pub const ENGINE_PORT: i32 = 8000;
/// Port on which the first rank of a group waits for the others.
pub const LEADER_PORT: i32 = 8001;
/// Port of the Service.
pub const SERVICE_PORT: i32 = 80;

/// Hash of everything that forces new pods: eight hexadecimal digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Revision(String);

impl Revision {
    /// The revision of some canonical text.
    pub fn of(text: &str) -> Self {
        Self(short_hash(text))
    }

    /// The eight digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// JSON with its keys in order. Without this a hash would depend on whether the operator was built together with a crate
/// that lets serde_json keep the order of insertion, and another build would replace every pod.
pub fn canonical(mut value: serde_json::Value) -> String {
    value.sort_all_objects();
    value.to_string()
}

/// The first eight hexadecimal digits of SHA-256.
pub fn short_hash(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes())[..4])
}

/// All 64 hexadecimal digits of SHA-256.
pub fn long_hash(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Name of an engine pod.
pub fn engine_pod(deployment: &str, replica: u32, revision: &Revision, attempt: u32) -> String {
    format!("{deployment}-{replica}-{revision}-{attempt}")
}

/// Name of one pod of a group, and its host name.
pub fn rank_pod(
    deployment: &str,
    replica: u32,
    revision: &Revision,
    attempt: u32,
    rank: u32,
) -> String {
    let group = engine_pod(deployment, replica, revision, attempt);
    format!("{group}-{rank}")
}

/// Name of what all groups of a deployment share: the headless Service that gives their pods host names, and the
/// network policy that keeps others from them.
pub fn ranks(deployment: &str) -> String {
    format!("{deployment}-ranks")
}

/// The deployment whose groups would share an object of that name.
pub fn owner_of_ranks(name: &str) -> Option<&str> {
    name.strip_suffix("-ranks")
}

/// Where the ranks of a group find the first: known before any of them exists.
pub fn leader_address(deployment: &str, namespace: &str, leader: &str) -> String {
    let service = ranks(deployment);
    format!("{leader}.{service}.{namespace}.svc:{LEADER_PORT}")
}

/// Name of an inspection pod; `hash` is of the source and revision it reads.
pub fn inspect_pod(deployment: &str, hash: &str, attempt: u32) -> String {
    if attempt == 0 {
        format!("{deployment}-inspect-{hash}")
    } else {
        format!("{deployment}-inspect-{hash}-{attempt}")
    }
}

/// Name of the config map with a revision's engine configuration.
pub fn engine_config_map(deployment: &str, revision: &Revision) -> String {
    format!("{deployment}-{revision}")
}

/// Name of the config map with a model's facts.
pub fn facts_config_map(deployment: &str, hash: &str) -> String {
    format!("{deployment}-facts-{hash}")
}

/// Labels that every child carries.
pub fn labels(deployment: &str, component: &str) -> BTreeMap<String, String> {
    [
        (MANAGED_BY, "cachalot"),
        (APP_NAME, "engine"),
        (MODEL_DEPLOYMENT, deployment),
        (COMPONENT, component),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// Selector of a deployment's engine pods, as text for the scale subresource.
pub fn selector(deployment: &str) -> String {
    format!("{MODEL_DEPLOYMENT}={deployment},{COMPONENT}={ENGINE}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_deployment_name_still_gives_valid_pod_names() {
        let name = "a".repeat(40);
        let revision = Revision::of("x");
        let pod = engine_pod(&name, 9999, &revision, 99_999);
        assert!(pod.len() <= 63, "{pod} has {} characters", pod.len());
        // A host name is one label of at most 63 characters as well.
        let rank = rank_pod(&name, 9999, &revision, 99_999, 63);
        assert!(rank.len() <= 63, "{rank} has {} characters", rank.len());
        assert!(ranks(&name).len() <= 63);
        assert!(inspect_pod(&name, &short_hash("x"), 99).len() <= 63);
        assert!(facts_config_map(&name, &short_hash("x")).len() <= 63);
    }
}
