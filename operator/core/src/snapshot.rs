//! What was observed, trimmed to what decisions need, as plain values.
//!
//! A view is a projection of a Kubernetes object of some hundred bytes, so that a mirror of ten
//! thousand pods stays small. The projections are pure and live here, because what matters about
//! a pod is a decision of the core.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ConfigMap, ContainerStatus, Node, Pod, PodStatus, Service, Taint as NodeTaint,
};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use operator_api::{GpuFaultStatus, ModelDeployment};
use serde::{Deserialize, Serialize};

use crate::devices::{ClaimNews, NodeDevices};
use crate::fit::{DeviceKind, NodeGpus};
use crate::marks::Marks;
use crate::names;
use crate::ownership::Controller;
use crate::pairs::Pairs;
use crate::plan::{Action, Object, Plan};
use crate::priority::Contest;
pub use crate::quota::QuotaView;
use crate::resources::Resources;
pub use crate::samples::{Counters, LoadSample, PodSamples, Rates, Startup};
pub use crate::status::Refusal;

/// Everything one decision about one ModelDeployment may depend on.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The time the decision is made at.
    pub now: Timestamp,
    /// The wish, with the status as last read.
    pub deployment: Arc<ModelDeployment>,
    /// Pods in its namespace that carry its label, of every component.
    pub pods: Vec<Arc<PodView>>,
    /// Config maps in its namespace that carry its label.
    pub config_maps: Vec<Arc<ConfigMapView>>,
    /// The config map named by `spec.model.configMapRef`, when there is one.
    pub model_config: Option<Arc<ConfigMapView>>,
    /// Claim templates in its namespace that carry its label.
    pub claim_templates: Vec<Arc<ClaimTemplateView>>,
    /// The Service of its name, whoever made it.
    pub service: Option<Arc<Service>>,
    /// The headless Service of its groups, whoever made it.
    pub ranks_service: Option<Arc<Service>>,
    /// The network policy of its groups, whoever made it.
    pub ranks_policy: Option<Arc<NetworkPolicy>>,
    /// The PodDisruptionBudget of its name, whoever made it.
    pub disruption_budget: Option<Arc<PodDisruptionBudget>>,
    /// Quotas on GPUs in its namespace.
    pub quotas: Vec<Arc<QuotaView>>,
    /// Other ModelDeployments that want the same nodes, and priorities.
    pub contest: Contest,
    /// Nodes and what is taken on them.
    pub cluster: Arc<Cluster>,
    /// What engine pods said about themselves, by pod name.
    pub samples: BTreeMap<String, PodSamples>,
    /// Demand as a Prometheus server sees it, when one is configured and answered.
    pub demand: Option<Demand>,
    /// GPUs at fault that other ModelDeployments remember.
    pub gpu_faults: Vec<GpuFaultStatus>,
    /// What the API server refused in the pass before, until one succeeds.
    pub refusal: Option<Refusal>,
}

/// Phase of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PodPhase {
    /// Not all containers have started.
    #[default]
    Pending,
    /// Bound, and a container runs or restarts.
    Running,
    /// All containers ended well.
    Succeeded,
    /// It ended and will not be started again.
    Failed,
    /// The node cannot be asked.
    Unknown,
}

/// What the scheduler said.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scheduled {
    /// Nothing yet.
    #[default]
    NotYet,
    /// It has a node.
    Bound,
    /// No node takes it.
    Refused {
        /// Since when.
        since: Option<Timestamp>,
        /// Why.
        message: String,
    },
}

/// How a container ended.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminated {
    /// Exit code.
    pub exit_code: i32,
    /// `OOMKilled`, `Error`, `Completed`, …
    pub reason: String,
    /// Termination message.
    pub message: String,
    /// When.
    pub finished: Option<Timestamp>,
}

/// The pod's only container.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerView {
    /// Times it was started again in place.
    pub restarts: u32,
    /// Why it waits: `CrashLoopBackOff`, `ImagePullBackOff`, … with the message.
    pub waiting: Option<Box<(String, String)>>,
    /// How it ended: now, or the last time when it runs again.
    pub terminated: Option<Box<Terminated>>,
}

/// A pod of a ModelDeployment; its JSON form is for whoever keeps ten thousand of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodView {
    /// Name.
    pub name: String,
    /// Uid, a precondition of deletes and patches.
    pub uid: String,
    /// What controls it.
    pub controller: Controller,
    /// Labels that we gave.
    pub labels: Marks,
    /// Annotations that we gave.
    pub annotations: Marks,
    /// Creation time.
    pub created: Option<Timestamp>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Phase.
    pub phase: PodPhase,
    /// Reason of the pod as a whole: `Evicted`, `OutOfmemory`, …
    pub reason: String,
    /// Message of the pod as a whole.
    pub message: String,
    /// Node it is bound to.
    pub node: Option<String>,
    /// Its address, once it has one.
    pub address: Option<String>,
    /// Whether it is ready, and since when.
    pub ready: bool,
    /// When readiness last changed.
    pub ready_changed: Option<Timestamp>,
    /// What the scheduler said.
    pub scheduled: Scheduled,
    /// Its container.
    pub container: ContainerView,
    /// What it asks for.
    pub requests: Resources,
    /// Its priority, as the API server decided.
    pub priority: i32,
}

/// What a pod, whoever's it is, takes from a node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Claim {
    /// Node it is bound to, or the one it is planned for.
    pub node: String,
    /// What it takes.
    pub requests: Resources,
}

/// How strict a taint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TaintEffect {
    /// New pods stay away.
    NoSchedule,
    /// New pods stay away if they can.
    PreferNoSchedule,
    /// Running pods leave too.
    NoExecute,
}

/// A taint of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taint {
    /// Key.
    pub key: String,
    /// Value; empty when absent.
    pub value: String,
    /// Effect.
    pub effect: TaintEffect,
}

/// A node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeView {
    /// Name.
    pub name: String,
    /// Uid.
    pub uid: String,
    /// Made anew at each boot.
    pub boot_id: String,
    /// Labels.
    pub labels: Pairs,
    /// What they say of its GPUs.
    pub gpus: NodeGpus,
    /// What they say of its MIG devices, under the strategy `mixed`.
    pub mig: Box<[DeviceKind]>,
    /// Taints.
    pub taints: Vec<Taint>,
    /// Whether it is cordoned.
    pub unschedulable: bool,
    /// Whether its kubelet reports Ready.
    pub ready: bool,
    /// When that last changed.
    pub ready_changed: Option<Timestamp>,
    /// What reports its GPUs at fault.
    pub faults: Vec<String>,
    /// GPUs of it that engines reported, in words; see [`crate::gpu_faults::marked`].
    pub reported: Vec<String>,
    /// What pods may take in total.
    pub allocatable: Resources,
    /// Kind of its GPUs that claims may ask for.
    pub devices: Option<DeviceKind>,
}

/// A claim template of a revision.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClaimTemplateView {
    /// Name.
    pub name: String,
    /// Uid.
    pub uid: String,
    /// What controls it.
    pub controller: Controller,
}

/// All nodes, and what is taken on each. Who changes it while others read it copies one of its maps: the sums of a thousand
/// nodes, whose names are shared, for each pod that comes or goes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cluster {
    /// Nodes by name.
    pub nodes: Arc<BTreeMap<String, Arc<NodeView>>>,
    /// Sum of claims by node name.
    pub used: Arc<BTreeMap<Arc<str>, Resources>>,
    /// What is known of resource claims.
    pub claims: ClaimNews,
}

/// A config map.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ConfigMapView {
    /// Name.
    pub name: String,
    /// Uid.
    pub uid: String,
    /// What controls it.
    pub controller: Controller,
    /// Data.
    pub data: Pairs,
}

/// Demand on a whole deployment.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// When it was measured.
    pub at: Timestamp,
    /// Requests waiting, summed over replicas.
    pub queued_requests: f64,
    /// Share of the KV cache in use, mean over replicas, 0 to 1.
    pub kv_utilization: f64,
}

impl PodView {
    /// The view of a pod that belongs to a ModelDeployment.
    pub fn of(pod: &Pod) -> Self {
        let metadata = &pod.metadata;
        let status = pod.status.as_ref();
        let ready = condition(status, "Ready");
        Self {
            name: metadata.name.clone().unwrap_or_default(),
            uid: metadata.uid.clone().unwrap_or_default(),
            controller: Controller::of(metadata),
            labels: Marks::of(metadata.labels.as_ref()),
            annotations: Marks::of(metadata.annotations.as_ref()),
            created: metadata.creation_timestamp.as_ref().map(|time| time.0),
            deleting: metadata.deletion_timestamp.is_some(),
            phase: status.map_or(PodPhase::Pending, phase),
            reason: status.and_then(|s| s.reason.clone()).unwrap_or_default(),
            message: status.and_then(|s| s.message.clone()).unwrap_or_default(),
            node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
            address: status.and_then(|s| s.pod_ip.clone()),
            ready: ready.is_some_and(|c| c.status == "True"),
            ready_changed: ready.and_then(|c| c.last_transition_time.as_ref().map(|t| t.0)),
            scheduled: scheduled(status),
            container: status
                .and_then(|s| s.container_statuses.as_ref()?.first())
                .map(ContainerView::of)
                .unwrap_or_default(),
            requests: pod.spec.as_ref().map(Resources::of_pod).unwrap_or_default(),
            priority: pod.spec.as_ref().and_then(|s| s.priority).unwrap_or(0),
        }
    }

    /// A label's value, empty when absent.
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).unwrap_or_default()
    }

    /// An annotation read as a number, 0 when absent or malformed.
    pub fn number(&self, key: &str) -> u32 {
        self.annotations
            .get(key)
            .and_then(|text| text.parse().ok())
            .unwrap_or(0)
    }

    /// Nodes the pod was planned for, in order of preference.
    pub fn planned_nodes(&self) -> Vec<&str> {
        self.annotations
            .get(names::PLANNED_NODES)
            .map(|text| text.split(',').filter(|name| !name.is_empty()).collect())
            .unwrap_or_default()
    }

    /// Nodes whose kubelet refused the pods that came before this one in its place.
    pub fn refused_nodes(&self) -> Vec<&str> {
        self.annotations
            .get(names::REFUSED_NODES)
            .map(|text| text.split(',').filter(|name| !name.is_empty()).collect())
            .unwrap_or_default()
    }

    /// What it takes; none when it has ended or no node is known for it.
    pub fn claim(&self) -> Option<Claim> {
        let node = self.place().filter(|_| !self.is_finished())?;
        Some(Claim {
            node: node.to_owned(),
            requests: self.requests,
        })
    }

    /// Whether its node's kubelet would not take it: it had no room, or does not match.
    pub fn is_refused_by_kubelet(&self) -> bool {
        self.phase == PodPhase::Failed
            && (self.reason.starts_with("OutOf")
                || [
                    "UnexpectedAdmissionError",
                    "NodeAffinity",
                    "NodeName",
                    "TaintToleration",
                ]
                .contains(&self.reason.as_str()))
    }

    /// Whether it has ended for good.
    pub fn is_finished(&self) -> bool {
        matches!(self.phase, PodPhase::Succeeded | PodPhase::Failed)
    }
}

fn condition<'a>(
    status: Option<&'a PodStatus>,
    kind: &str,
) -> Option<&'a k8s_openapi::api::core::v1::PodCondition> {
    status?
        .conditions
        .as_ref()?
        .iter()
        .find(|c| c.type_ == kind)
}

fn phase(status: &PodStatus) -> PodPhase {
    match status.phase.as_deref() {
        Some("Running") => PodPhase::Running,
        Some("Succeeded") => PodPhase::Succeeded,
        Some("Failed") => PodPhase::Failed,
        Some("Unknown") => PodPhase::Unknown,
        _ => PodPhase::Pending,
    }
}

fn scheduled(status: Option<&PodStatus>) -> Scheduled {
    match condition(status, "PodScheduled") {
        None => Scheduled::NotYet,
        Some(c) if c.status == "True" => Scheduled::Bound,
        // Nobody has looked at it: a scheduling gate holds it back.
        Some(c) if c.reason.as_deref() == Some("SchedulingGated") => Scheduled::NotYet,
        Some(c) => Scheduled::Refused {
            since: c.last_transition_time.as_ref().map(|time| time.0),
            message: c.message.clone().unwrap_or_default(),
        },
    }
}

impl ContainerView {
    fn of(status: &ContainerStatus) -> Self {
        let state = status.state.as_ref();
        let ended = |state: Option<&k8s_openapi::api::core::v1::ContainerState>| {
            state.and_then(|s| s.terminated.as_ref()).map(|t| {
                Box::new(Terminated {
                    exit_code: t.exit_code,
                    reason: t.reason.clone().unwrap_or_default(),
                    message: t.message.clone().unwrap_or_default(),
                    finished: t.finished_at.as_ref().map(|time| time.0),
                })
            })
        };
        Self {
            restarts: u32::try_from(status.restart_count).unwrap_or(0),
            waiting: state.and_then(|s| s.waiting.as_ref()).map(|waiting| {
                let text = |text: &Option<String>| text.clone().unwrap_or_default();
                Box::new((text(&waiting.reason), text(&waiting.message)))
            }),
            terminated: ended(state).or_else(|| ended(status.last_state.as_ref())),
        }
    }
}

impl Claim {
    /// What a pod takes; none when it has ended or no node is known for it.
    pub fn of(pod: &Pod) -> Option<Self> {
        let ended = pod
            .status
            .as_ref()
            .is_some_and(|s| matches!(s.phase.as_deref(), Some("Succeeded" | "Failed")));
        if ended {
            return None;
        }
        let spec = pod.spec.as_ref()?;
        let planned = || {
            let nodes = pod
                .metadata
                .annotations
                .as_ref()?
                .get(names::PLANNED_NODES)?;
            Some(nodes.split(',').next()?.to_owned())
        };
        Some(Self {
            node: spec.node_name.clone().or_else(planned)?,
            requests: Resources::of_pod(spec),
        })
    }
}

impl NodeView {
    /// The view of a node.
    pub fn of(node: &Node) -> Self {
        let spec = node.spec.as_ref();
        let status = node.status.as_ref();
        let conditions = || status.iter().flat_map(|s| s.conditions.iter().flatten());
        let ready = conditions().find(|c| c.type_ == "Ready");
        let labels: Pairs = node
            .metadata
            .labels
            .as_ref()
            .map(Pairs::from)
            .unwrap_or_default();
        Self {
            gpus: NodeGpus::of(&labels),
            mig: crate::mig::mixed_kinds(&labels).into(),
            labels,
            name: node.metadata.name.clone().unwrap_or_default(),
            uid: node.metadata.uid.clone().unwrap_or_default(),
            boot_id: status
                .and_then(|status| status.node_info.as_ref())
                .map(|info| info.boot_id.clone())
                .unwrap_or_default(),
            taints: spec
                .iter()
                .flat_map(|s| s.taints.iter().flatten())
                .filter_map(Taint::of)
                .collect(),
            unschedulable: spec.is_some_and(|s| s.unschedulable == Some(true)),
            ready: ready.is_some_and(|c| c.status == "True"),
            ready_changed: ready.and_then(|c| c.last_transition_time.as_ref().map(|t| t.0)),
            faults: crate::health::faults(node),
            reported: Vec::new(),
            allocatable: status
                .and_then(|s| s.allocatable.as_ref())
                .map(Resources::of)
                .unwrap_or_default(),
            devices: None,
        }
    }

    /// The same node with the GPUs that claims may ask for.
    #[must_use]
    pub fn with_devices(mut self, devices: Option<&NodeDevices>) -> Self {
        self.allocatable.claimed = devices.map_or(0, |devices| devices.total);
        self.devices = devices.map(|devices| devices.kind.clone());
        self
    }

    /// A label's value, empty when absent.
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).unwrap_or_default()
    }
}

impl Taint {
    fn of(taint: &NodeTaint) -> Option<Self> {
        let effect = match taint.effect.as_str() {
            "NoSchedule" => TaintEffect::NoSchedule,
            "PreferNoSchedule" => TaintEffect::PreferNoSchedule,
            "NoExecute" => TaintEffect::NoExecute,
            _ => return None,
        };
        Some(Self {
            key: taint.key.clone(),
            value: taint.value.clone().unwrap_or_default(),
            effect,
        })
    }
}

impl Cluster {
    /// Nodes and the claims of all pods on them.
    pub fn new<'a>(
        nodes: impl IntoIterator<Item = Arc<NodeView>>,
        claims: impl IntoIterator<Item = &'a Claim>,
    ) -> Self {
        let nodes: BTreeMap<_, _> = nodes
            .into_iter()
            .map(|node| (node.name.clone(), node))
            .collect();
        let mut cluster = Self {
            nodes: Arc::new(nodes),
            ..Self::default()
        };
        for claim in claims {
            cluster.add(claim);
        }
        cluster
    }

    /// Counts a claim.
    pub fn add(&mut self, claim: &Claim) {
        let used = Arc::make_mut(&mut self.used);
        if let Some(sum) = used.get_mut(claim.node.as_str()) {
            *sum += claim.requests;
        } else {
            used.insert(claim.node.as_str().into(), claim.requests);
        }
    }

    /// Counts a claim no longer.
    pub fn remove(&mut self, claim: &Claim) {
        let used = Arc::make_mut(&mut self.used);
        if let Some(sum) = used.get_mut(claim.node.as_str()) {
            *sum = sum.minus(claim.requests);
            if *sum == Resources::default() {
                used.remove(claim.node.as_str());
            }
        }
    }

    /// Counts what the pods of a plan will take, each on the node it prefers.
    pub fn take(&mut self, plan: &Plan) {
        for action in &plan.actions {
            if let Action::Create(Object::Pod(pod)) = action
                && let Some(claim) = Claim::of(pod)
            {
                self.add(&claim);
            }
        }
    }

    /// What is free on a node.
    pub fn free(&self, node: &NodeView) -> Resources {
        let used = self.used.get(node.name.as_str());
        node.allocatable.minus(used.copied().unwrap_or_default())
    }
}

impl ClaimTemplateView {
    /// The view of a claim template.
    pub fn of(template: &ResourceClaimTemplate) -> Self {
        Self {
            name: template.metadata.name.clone().unwrap_or_default(),
            uid: template.metadata.uid.clone().unwrap_or_default(),
            controller: Controller::of(&template.metadata),
        }
    }
}

impl ConfigMapView {
    /// The view of a config map.
    pub fn of(config_map: &ConfigMap) -> Self {
        Self {
            name: config_map.metadata.name.clone().unwrap_or_default(),
            uid: config_map.metadata.uid.clone().unwrap_or_default(),
            controller: Controller::of(&config_map.metadata),
            data: config_map
                .data
                .as_ref()
                .map(Pairs::from)
                .unwrap_or_default(),
        }
    }
}
