//! The Kubernetes objects of a deployment, from valid values to complete objects. Infallible.
//!
//! What a pod contains, apart from its place and its name, decides the revision: two pods of the
//! same revision are interchangeable.

mod inspection;
mod pod;
mod rank;
mod record;

use std::collections::BTreeMap;

use engine_spec::ModelFacts;
use k8s_openapi::api::core::v1::{ConfigMap, Service, ServicePort, ServiceSpec};
use k8s_openapi::api::networking::v1::{
    NetworkPolicy, NetworkPolicyIngressRule, NetworkPolicyPeer, NetworkPolicyPort,
    NetworkPolicySpec,
};
use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::Serialize;

use crate::devices;
use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::ownership;
use crate::plan::Settings;
use crate::validate::ValidDeployment;

pub use inspection::{inspect_inputs, inspect_pod};
pub(crate) use pod::offered_nodes;
pub use pod::{Slot, engine_pod, engine_requests, node_cache, preferred_nodes};
pub use record::{record, recorded};

/// Hash of all that forces new pods: the engine's configuration and the pod without its place.
pub fn revision(valid: &ValidDeployment, layout: &Layout, settings: &Settings) -> Revision {
    let slot = Slot::default();
    let unknown = Revision::of("");
    let pod = engine_pod(valid, layout, settings, &unknown, &slot);
    let engine = names::canonical(serde_json::json!(layout.engine));
    let labels = spelled(&valid.template.labels);
    let annotations = spelled(&valid.template.annotations);
    let mut text = format!("[{engine},{},[{labels},{annotations}]", spelled(&pod.spec));
    if let Some(claim) = devices::claim_spec(valid, layout) {
        text.push(',');
        text.push_str(&spelled(&claim));
    }
    text.push(']');
    Revision::of(&text)
}

/// The canonical text of a Kubernetes object, a part of one or a map: their fields are spelled in the order of their names as it is,
/// and a pass of a ModelDeployment spells several.
fn spelled(object: &impl Serialize) -> String {
    // They are plain data with string keys: writing them cannot fail.
    serde_json::to_string(object).unwrap_or_default()
}

/// Metadata of a child: name, labels, owner.
fn metadata(valid: &ValidDeployment, name: String, component: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name),
        namespace: Some(valid.namespace.clone()),
        labels: Some(names::labels(&valid.name, component)),
        owner_references: Some(vec![ownership::owner_reference(&valid.name, &valid.uid)]),
        ..ObjectMeta::default()
    }
}

/// The engine's configuration as it is told.
pub fn engine_json(layout: &Layout) -> String {
    // EngineConfig is plain data with string keys: writing it cannot fail.
    serde_json::to_string_pretty(&layout.engine).unwrap_or_default()
}

/// The config map with a revision's engine configuration and its [`record`].
pub fn engine_config_map(
    valid: &ValidDeployment,
    engine: String,
    revision: &Revision,
    record: String,
) -> ConfigMap {
    let name = names::engine_config_map(&valid.name, revision);
    let mut metadata = metadata(valid, name, names::ENGINE);
    if let Some(labels) = &mut metadata.labels {
        labels.insert(names::REVISION.to_owned(), revision.to_string());
    }
    ConfigMap {
        metadata,
        data: Some(BTreeMap::from([
            (names::ENGINE_JSON.to_owned(), engine),
            (names::REVISION_JSON.to_owned(), record),
        ])),
        ..ConfigMap::default()
    }
}

/// The template of the claims of a revision's pods; none when its devices are not claimed.
pub fn claim_template(
    valid: &ValidDeployment,
    layout: &Layout,
    revision: &Revision,
) -> Option<ResourceClaimTemplate> {
    let name = names::engine_config_map(&valid.name, revision);
    let metadata = metadata(valid, name, names::ENGINE);
    devices::claim_template(valid, layout, revision, metadata)
}

/// The config map that keeps a model's facts over restarts.
pub fn facts_config_map(valid: &ValidDeployment, hash: &str, facts: &ModelFacts) -> ConfigMap {
    let name = names::facts_config_map(&valid.name, hash);
    let text = serde_json::to_string(facts).unwrap_or_default();
    ConfigMap {
        metadata: metadata(valid, name, names::INSPECT),
        data: Some(BTreeMap::from([(names::FACTS_JSON.to_owned(), text)])),
        ..ConfigMap::default()
    }
}

/// The Service in front of the pods that serve.
pub fn service(valid: &ValidDeployment) -> Service {
    let selector = [
        (names::MODEL_DEPLOYMENT, valid.name.as_str()),
        (names::COMPONENT, names::ENGINE),
        (names::SERVING, "true"),
    ];
    Service {
        metadata: metadata(valid, valid.name.clone(), names::ENGINE),
        spec: Some(ServiceSpec {
            selector: Some(owned(selector)),
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                port: names::SERVICE_PORT,
                target_port: Some(IntOrString::String("http".into())),
                protocol: Some("TCP".into()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// The headless Service by which the ranks of a group find the first, long before it is ready.
pub fn ranks_service(valid: &ValidDeployment) -> Service {
    let selector = [
        (names::MODEL_DEPLOYMENT, valid.name.as_str()),
        (names::COMPONENT, names::ENGINE),
    ];
    Service {
        metadata: metadata(valid, names::ranks(&valid.name), names::ENGINE),
        spec: Some(ServiceSpec {
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            selector: Some(owned(selector)),
            ports: Some(vec![ServicePort {
                name: Some("ranks".into()),
                port: names::LEADER_PORT,
                protocol: Some("TCP".into()),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// Lets everyone reach the HTTP port of the pods of groups, and only pods of the same deployment any other: what ranks tell
/// each other is neither encrypted nor signed, and ranks after the first listen at ports that the system chooses.
pub fn ranks_policy(valid: &ValidDeployment) -> NetworkPolicy {
    let selector = LabelSelector {
        match_labels: Some(owned([
            (names::MODEL_DEPLOYMENT, valid.name.as_str()),
            (names::COMPONENT, names::ENGINE),
        ])),
        ..LabelSelector::default()
    };
    let anyone = NetworkPolicyIngressRule {
        ports: Some(vec![NetworkPolicyPort {
            port: Some(IntOrString::Int(names::ENGINE_PORT)),
            protocol: Some("TCP".into()),
            ..NetworkPolicyPort::default()
        }]),
        ..NetworkPolicyIngressRule::default()
    };
    let ranks = NetworkPolicyIngressRule {
        from: Some(vec![NetworkPolicyPeer {
            pod_selector: Some(selector.clone()),
            ..NetworkPolicyPeer::default()
        }]),
        ..NetworkPolicyIngressRule::default()
    };
    NetworkPolicy {
        metadata: metadata(valid, names::ranks(&valid.name), names::ENGINE),
        spec: Some(NetworkPolicySpec {
            pod_selector: Some(selector),
            policy_types: Some(vec!["Ingress".into()]),
            ingress: Some(vec![anyone, ranks]),
            ..NetworkPolicySpec::default()
        }),
    }
}

/// The budget for evictions that are not ours; a replica has `ranks` pods. Each eviction may break
/// another group, so as many pods may be evicted as replicas may be missing.
pub fn disruption_budget(valid: &ValidDeployment, wanted: u32, ranks: u32) -> PodDisruptionBudget {
    let selector = [
        (names::MODEL_DEPLOYMENT, valid.name.as_str()),
        (names::COMPONENT, names::ENGINE),
    ];
    // With zero disruptions allowed a node could never be drained; the operator replaces an
    // evicted replica at once and preStop keeps its requests, so one at a time is always allowed
    // when there are several.
    let unavailable = valid.rollout.unavailable_max.max(u32::from(wanted > 1));
    PodDisruptionBudget {
        metadata: metadata(valid, valid.name.clone(), names::ENGINE),
        spec: Some(PodDisruptionBudgetSpec {
            min_available: Some(IntOrString::Int(
                i32::try_from(wanted.saturating_mul(ranks).saturating_sub(unavailable))
                    .unwrap_or(i32::MAX),
            )),
            selector: Some(LabelSelector {
                match_labels: Some(owned(selector)),
                ..LabelSelector::default()
            }),
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

fn owned<const N: usize>(pairs: [(&str, &str); N]) -> BTreeMap<String, String> {
    pairs
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Whether `actual` has everything that `desired` states; what others added does not matter.
pub fn covers(actual: &serde_json::Value, desired: &serde_json::Value) -> bool {
    use serde_json::Value;
    match (actual, desired) {
        (Value::Object(actual), Value::Object(desired)) => desired
            .iter()
            .all(|(key, value)| actual.get(key).is_some_and(|found| covers(found, value))),
        (Value::Array(actual), Value::Array(desired)) => {
            actual.len() >= desired.len()
                && desired
                    .iter()
                    .all(|value| actual.iter().any(|found| covers(found, value)))
        }
        _ => actual == desired,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_others_added_is_no_difference() {
        let desired = json!({"ports": [{"port": 80}], "selector": {"a": "b"}});
        let defaulted = json!({"ports": [{"port": 80, "protocol": "TCP"}], "selector": {"a": "b"}, "clusterIP": "10.0.0.1"});
        assert!(covers(&defaulted, &desired));
        for changed in [
            json!({"ports": [{"port": 81}], "selector": {"a": "b"}}),
            json!({"ports": [], "selector": {"a": "b"}}),
            json!({"ports": [{"port": 80}], "selector": {"a": "c"}}),
        ] {
            assert!(!covers(&changed, &desired), "{changed}");
        }
    }
}
