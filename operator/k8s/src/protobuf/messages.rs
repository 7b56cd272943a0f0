//! Pods and nodes as protobuf messages, of which only what this operator keeps is read.
//!
//! Numbers and types are those of Kubernetes' `generated.proto` files of `core/v1`, `meta/v1`, `runtime` and `resource`; what is
//! not named here is passed over as it is read. Each message is made an object of `k8s-openapi`, so that a name that does not
//! exist there does not compile. Invariant: what `PodView::of`, `Claim::of` and `NodeView::of` ask for is named here.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as QuantityText;
use k8s_openapi::apimachinery::pkg::apis::meta::v1 as meta;
use kube::core::Status as StatusObject;
use kube::core::response::{StatusDetails as Details, StatusSummary};

/// What the API server wraps every object in, after four bytes that say so.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Unknown {
    #[prost(message, optional, tag = "1")]
    pub(super) type_meta: Option<TypeMeta>,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) raw: prost::bytes::Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TypeMeta {
    #[prost(string, tag = "1")]
    pub(super) api_version: String,
    #[prost(string, tag = "2")]
    pub(super) kind: String,
}

/// One event of a watch.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct WatchEvent {
    #[prost(string, tag = "1")]
    pub(super) kind: String,
    #[prost(message, optional, tag = "2")]
    pub(super) object: Option<RawExtension>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct RawExtension {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) raw: prost::bytes::Bytes,
}

/// Why a call was refused, or a watch ends.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Status {
    #[prost(string, tag = "2")]
    status: String,
    #[prost(string, tag = "3")]
    message: String,
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(message, optional, tag = "5")]
    details: Option<StatusDetails>,
    #[prost(int32, tag = "6")]
    code: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct StatusDetails {
    #[prost(int32, tag = "5")]
    retry_after_seconds: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct ObjectMeta {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, tag = "3")]
    namespace: String,
    #[prost(string, tag = "5")]
    uid: String,
    #[prost(string, tag = "6")]
    resource_version: String,
    #[prost(int64, tag = "7")]
    generation: i64,
    #[prost(message, optional, tag = "8")]
    creation_timestamp: Option<Time>,
    #[prost(message, optional, tag = "9")]
    deletion_timestamp: Option<Time>,
    #[prost(btree_map = "string, string", tag = "11")]
    labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "12")]
    annotations: BTreeMap<String, String>,
    #[prost(message, repeated, tag = "13")]
    owner_references: Vec<OwnerReference>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct OwnerReference {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "3")]
    name: String,
    #[prost(string, tag = "4")]
    uid: String,
    #[prost(bool, optional, tag = "6")]
    controller: Option<bool>,
}

/// Seconds since 1970; zero stands for no time, as in Kubernetes, which sends no parts of seconds.
#[derive(Clone, PartialEq, prost::Message)]
struct Time {
    #[prost(int64, tag = "1")]
    seconds: i64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Quantity {
    #[prost(string, tag = "1")]
    text: String,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Pod {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<ObjectMeta>,
    #[prost(message, optional, tag = "2")]
    spec: Option<PodSpec>,
    #[prost(message, optional, tag = "3")]
    status: Option<PodStatus>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodSpec {
    #[prost(message, repeated, tag = "2")]
    containers: Vec<Container>,
    #[prost(string, tag = "10")]
    node_name: String,
    #[prost(message, repeated, tag = "20")]
    init_containers: Vec<Container>,
    #[prost(int32, optional, tag = "25")]
    priority: Option<i32>,
    #[prost(btree_map = "string, message", tag = "32")]
    overhead: BTreeMap<String, Quantity>,
    #[prost(message, repeated, tag = "39")]
    resource_claims: Vec<PodResourceClaim>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Container {
    #[prost(message, optional, tag = "8")]
    resources: Option<Resources>,
    #[prost(string, optional, tag = "24")]
    restart_policy: Option<String>,
}

/// An API server has put limits that stand alone into the requests when it took the pod in.
#[derive(Clone, PartialEq, prost::Message)]
struct Resources {
    #[prost(btree_map = "string, message", tag = "2")]
    requests: BTreeMap<String, Quantity>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodResourceClaim {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(string, optional, tag = "4")]
    template: Option<String>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PodStatus {
    #[prost(string, tag = "1")]
    phase: String,
    #[prost(message, repeated, tag = "2")]
    conditions: Vec<Condition>,
    #[prost(string, tag = "3")]
    message: String,
    #[prost(string, tag = "4")]
    reason: String,
    #[prost(string, tag = "6")]
    pod_ip: String,
    #[prost(message, repeated, tag = "8")]
    container_statuses: Vec<ContainerStatus>,
}

/// Of a pod or a node; their fields have the same numbers.
#[derive(Clone, PartialEq, prost::Message)]
struct Condition {
    #[prost(string, tag = "1")]
    kind: String,
    #[prost(string, tag = "2")]
    status: String,
    #[prost(message, optional, tag = "4")]
    last_transition_time: Option<Time>,
    #[prost(string, tag = "5")]
    reason: String,
    #[prost(string, tag = "6")]
    message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerStatus {
    #[prost(message, optional, tag = "2")]
    state: Option<ContainerState>,
    #[prost(message, optional, tag = "3")]
    last_state: Option<ContainerState>,
    #[prost(int32, tag = "5")]
    restart_count: i32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ContainerState {
    #[prost(message, optional, tag = "1")]
    waiting: Option<Waiting>,
    #[prost(message, optional, tag = "3")]
    terminated: Option<Terminated>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Waiting {
    #[prost(string, tag = "1")]
    reason: String,
    #[prost(string, tag = "2")]
    message: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Terminated {
    #[prost(int32, tag = "1")]
    exit_code: i32,
    #[prost(string, tag = "3")]
    reason: String,
    #[prost(string, tag = "4")]
    message: String,
    #[prost(message, optional, tag = "6")]
    finished_at: Option<Time>,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Node {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<ObjectMeta>,
    #[prost(message, optional, tag = "2")]
    spec: Option<NodeSpec>,
    #[prost(message, optional, tag = "3")]
    status: Option<NodeStatus>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NodeSpec {
    #[prost(bool, tag = "4")]
    unschedulable: bool,
    #[prost(message, repeated, tag = "5")]
    taints: Vec<Taint>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Taint {
    #[prost(string, tag = "1")]
    key: String,
    #[prost(string, tag = "2")]
    value: String,
    #[prost(string, tag = "3")]
    effect: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NodeStatus {
    #[prost(btree_map = "string, message", tag = "2")]
    allocatable: BTreeMap<String, Quantity>,
    #[prost(message, repeated, tag = "4")]
    conditions: Vec<Condition>,
    #[prost(message, optional, tag = "7")]
    node_info: Option<NodeInfo>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct NodeInfo {
    #[prost(string, tag = "3")]
    boot_id: String,
}

/// A text that JSON leaves out where it is empty.
fn text(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn time(time: Option<Time>) -> Option<meta::Time> {
    let seconds = time?.seconds;
    let known = (seconds != 0).then(|| jiff::Timestamp::from_second(seconds));
    known?.ok().map(meta::Time)
}

/// A map that JSON leaves out where it is empty.
fn marks(marks: BTreeMap<String, String>) -> Option<BTreeMap<String, String>> {
    (!marks.is_empty()).then_some(marks)
}

fn quantities(list: BTreeMap<String, Quantity>) -> Option<BTreeMap<String, QuantityText>> {
    if list.is_empty() {
        return None;
    }
    let list = list.into_iter();
    Some(
        list.map(|(key, value)| (key, QuantityText(value.text)))
            .collect(),
    )
}

/// A list that JSON leaves out where it is empty.
fn list<T, K: From<T>>(list: Vec<T>) -> Option<Vec<K>> {
    (!list.is_empty()).then(|| list.into_iter().map(K::from).collect())
}

impl From<Status> for StatusObject {
    fn from(status: Status) -> Self {
        Self {
            status: match status.status.as_str() {
                "Success" => Some(StatusSummary::Success),
                "Failure" => Some(StatusSummary::Failure),
                _ => None,
            },
            code: status.code.try_into().unwrap_or(0),
            message: status.message,
            reason: status.reason,
            metadata: None,
            details: status.details.map(|details| Details {
                retry_after_seconds: details.retry_after_seconds.try_into().unwrap_or(0),
                name: String::new(),
                group: String::new(),
                kind: String::new(),
                uid: String::new(),
                causes: Vec::new(),
            }),
        }
    }
}

impl From<ObjectMeta> for meta::ObjectMeta {
    fn from(metadata: ObjectMeta) -> Self {
        Self {
            name: text(metadata.name),
            namespace: text(metadata.namespace),
            uid: text(metadata.uid),
            resource_version: text(metadata.resource_version),
            generation: (metadata.generation != 0).then_some(metadata.generation),
            creation_timestamp: time(metadata.creation_timestamp),
            deletion_timestamp: time(metadata.deletion_timestamp),
            labels: marks(metadata.labels),
            annotations: marks(metadata.annotations),
            owner_references: list(metadata.owner_references),
            ..Self::default()
        }
    }
}

impl From<OwnerReference> for meta::OwnerReference {
    fn from(owner: OwnerReference) -> Self {
        Self {
            kind: owner.kind,
            name: owner.name,
            uid: owner.uid,
            controller: owner.controller,
            ..Self::default()
        }
    }
}

impl From<Pod> for core::Pod {
    fn from(pod: Pod) -> Self {
        Self {
            metadata: pod.metadata.map(Into::into).unwrap_or_default(),
            spec: pod.spec.map(Into::into),
            status: pod.status.map(Into::into),
        }
    }
}

impl From<PodSpec> for core::PodSpec {
    fn from(spec: PodSpec) -> Self {
        Self {
            containers: spec.containers.into_iter().map(Into::into).collect(),
            init_containers: list(spec.init_containers),
            node_name: text(spec.node_name),
            priority: spec.priority,
            overhead: quantities(spec.overhead),
            resource_claims: list(spec.resource_claims),
            ..Self::default()
        }
    }
}

impl From<Container> for core::Container {
    fn from(container: Container) -> Self {
        Self {
            resources: container
                .resources
                .map(|resources| core::ResourceRequirements {
                    requests: quantities(resources.requests),
                    ..Default::default()
                }),
            restart_policy: container.restart_policy,
            ..Self::default()
        }
    }
}

impl From<PodResourceClaim> for core::PodResourceClaim {
    fn from(claim: PodResourceClaim) -> Self {
        Self {
            name: claim.name,
            resource_claim_template_name: claim.template,
            ..Self::default()
        }
    }
}

impl From<PodStatus> for core::PodStatus {
    fn from(status: PodStatus) -> Self {
        Self {
            phase: text(status.phase),
            conditions: list(status.conditions),
            message: text(status.message),
            reason: text(status.reason),
            pod_ip: text(status.pod_ip),
            container_statuses: list(status.container_statuses),
            ..Self::default()
        }
    }
}

impl From<Condition> for core::PodCondition {
    fn from(condition: Condition) -> Self {
        Self {
            type_: condition.kind,
            status: condition.status,
            last_transition_time: time(condition.last_transition_time),
            reason: text(condition.reason),
            message: text(condition.message),
            ..Self::default()
        }
    }
}

impl From<ContainerStatus> for core::ContainerStatus {
    fn from(status: ContainerStatus) -> Self {
        Self {
            state: status.state.map(Into::into),
            last_state: status.last_state.map(Into::into),
            restart_count: status.restart_count,
            ..Self::default()
        }
    }
}

impl From<ContainerState> for core::ContainerState {
    fn from(state: ContainerState) -> Self {
        Self {
            running: None,
            waiting: state.waiting.map(|waiting| core::ContainerStateWaiting {
                reason: text(waiting.reason),
                message: text(waiting.message),
            }),
            terminated: state
                .terminated
                .map(|terminated| core::ContainerStateTerminated {
                    exit_code: terminated.exit_code,
                    reason: text(terminated.reason),
                    message: text(terminated.message),
                    finished_at: time(terminated.finished_at),
                    ..Default::default()
                }),
        }
    }
}

impl From<Node> for core::Node {
    fn from(node: Node) -> Self {
        Self {
            metadata: node.metadata.map(Into::into).unwrap_or_default(),
            spec: node.spec.map(|spec| core::NodeSpec {
                unschedulable: spec.unschedulable.then_some(true),
                taints: list(spec.taints),
                ..Default::default()
            }),
            status: node.status.map(|status| core::NodeStatus {
                allocatable: quantities(status.allocatable),
                conditions: list(status.conditions),
                node_info: status.node_info.map(|info| core::NodeSystemInfo {
                    boot_id: info.boot_id,
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }
    }
}

impl From<Taint> for core::Taint {
    fn from(taint: Taint) -> Self {
        Self {
            key: taint.key,
            value: text(taint.value),
            effect: taint.effect,
            time_added: None,
        }
    }
}

impl From<Condition> for core::NodeCondition {
    fn from(condition: Condition) -> Self {
        Self {
            type_: condition.kind,
            status: condition.status,
            last_transition_time: time(condition.last_transition_time),
            ..Self::default()
        }
    }
}
