//! The decision as plain data: what to write, what to report, when to look again.
//!
//! Actions are carried out in order, up to the first that fails, and each may be repeated: a create that meets "already
//! exists", a delete that meets "not found" and a patch that changes nothing all count as done.

use std::fmt;
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use operator_api::ModelDeploymentStatus;
use std::collections::BTreeMap;

use crate::node_cache::NodeCache;

/// The operator's own configuration, the same for every deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Image of engine and inspection pods unless a podTemplate names another.
    pub engine_image: String,
    /// `Always`, `IfNotPresent` or `Never`.
    pub image_pull_policy: String,
    /// Where the replicas of a node share fetched weights; each fetches its own without it.
    pub node_cache: Option<NodeCache>,
    /// Whether groups get a network policy of their own.
    pub network_policies: bool,
}

/// What follows from a snapshot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Plan {
    /// Writes, in order.
    pub actions: Vec<Action>,
    /// The status that should be stored; compare with the stored one before writing.
    pub status: ModelDeploymentStatus,
    /// What to tell people, once.
    pub events: Vec<Event>,
    /// When to plan again although nothing changed; none when only a change matters.
    pub wake_after: Option<Duration>,
}

/// One API write.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Create; "already exists" counts as done. Only pods are created this way.
    Create(Object),
    /// Server-side apply, with force.
    Apply(Object),
    /// Merge labels and annotations into a pod of that uid.
    PatchPod {
        /// Name.
        name: String,
        /// Uid it must have.
        uid: String,
        /// Labels to set.
        labels: BTreeMap<String, String>,
        /// Annotations to set, or to remove where none.
        annotations: BTreeMap<String, Option<String>>,
    },
    /// Let kube-scheduler bind a pod of that uid: those whose place it takes have left it.
    Release {
        /// Name.
        name: String,
        /// Uid it must have.
        uid: String,
    },
    /// Make a ModelDeployment the controller of an object of that uid that nothing controls.
    Adopt {
        /// Kind.
        kind: Kind,
        /// Name.
        name: String,
        /// Uid it must have.
        uid: String,
        /// The ModelDeployment.
        owner: Box<OwnerReference>,
    },
    /// Delete the object of that uid; "not found" counts as done.
    Delete {
        /// Kind.
        kind: Kind,
        /// Name.
        name: String,
        /// Uid it must have.
        uid: String,
        /// Node that must be found silent by a fresh read right before; else nothing is done. What
        /// is seen of a node may be old, and a replica that answers again must not be taken away.
        if_silent: Option<String>,
    },
}

/// An object to write.
#[derive(Clone, Debug, PartialEq)]
pub enum Object {
    /// A pod.
    Pod(Box<Pod>),
    /// A config map.
    ConfigMap(Box<ConfigMap>),
    /// A service.
    Service(Box<Service>),
    /// A pod disruption budget.
    PodDisruptionBudget(Box<PodDisruptionBudget>),
    /// A template of resource claims.
    ResourceClaimTemplate(Box<ResourceClaimTemplate>),
    /// A network policy.
    NetworkPolicy(Box<NetworkPolicy>),
}

/// Kind of an object that is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// Pod.
    Pod,
    /// ConfigMap.
    ConfigMap,
    /// Service.
    Service,
    /// PodDisruptionBudget.
    PodDisruptionBudget,
    /// ResourceClaimTemplate.
    ResourceClaimTemplate,
    /// NetworkPolicy.
    NetworkPolicy,
}

impl Kind {
    /// The word Kubernetes uses.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pod => "Pod",
            Self::ConfigMap => "ConfigMap",
            Self::Service => "Service",
            Self::PodDisruptionBudget => "PodDisruptionBudget",
            Self::ResourceClaimTemplate => "ResourceClaimTemplate",
            Self::NetworkPolicy => "NetworkPolicy",
        }
    }
}

impl Object {
    /// Its kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Pod(_) => Kind::Pod,
            Self::ConfigMap(_) => Kind::ConfigMap,
            Self::Service(_) => Kind::Service,
            Self::PodDisruptionBudget(_) => Kind::PodDisruptionBudget,
            Self::ResourceClaimTemplate(_) => Kind::ResourceClaimTemplate,
            Self::NetworkPolicy(_) => Kind::NetworkPolicy,
        }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        let metadata = match self {
            Self::Pod(object) => &object.metadata,
            Self::ConfigMap(object) => &object.metadata,
            Self::Service(object) => &object.metadata,
            Self::PodDisruptionBudget(object) => &object.metadata,
            Self::ResourceClaimTemplate(object) => &object.metadata,
            Self::NetworkPolicy(object) => &object.metadata,
        };
        metadata.name.as_deref().unwrap_or_default()
    }
}

impl Action {
    /// Kind and name of the object that is written.
    pub fn target(&self) -> (Kind, &str) {
        match self {
            Self::Create(object) | Self::Apply(object) => (object.kind(), object.name()),
            Self::PatchPod { name, .. } | Self::Release { name, .. } => (Kind::Pod, name),
            Self::Adopt { kind, name, .. } | Self::Delete { kind, name, .. } => (*kind, name),
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Create(object) => {
                write!(f, "create {} {}", object.kind().as_str(), object.name())
            }
            Self::Apply(object) => write!(f, "apply {} {}", object.kind().as_str(), object.name()),
            Self::PatchPod {
                name,
                labels,
                annotations,
                ..
            } => {
                write!(f, "patch Pod {name}")?;
                for (key, value) in labels {
                    write!(f, " {key}={value}")?;
                }
                for (key, value) in annotations {
                    write!(f, " {key}:{}", value.as_deref().unwrap_or("-"))?;
                }
                Ok(())
            }
            Self::Release { name, .. } => write!(f, "release Pod {name}"),
            Self::Adopt { kind, name, .. } => write!(f, "adopt {} {name}", kind.as_str()),
            Self::Delete { kind, name, .. } => write!(f, "delete {} {name}", kind.as_str()),
        }
    }
}

/// Whether an event is good news.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum EventKind {
    /// All is well.
    Normal,
    /// Someone may want to look.
    Warning,
}

/// Something that happened to a deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// Good or bad.
    pub kind: EventKind,
    /// PascalCase word from a closed set: a condition's reason, or what was done.
    pub reason: &'static str,
    /// For people: field, value, way out. At most 1024 bytes, which is Kubernetes' limit.
    pub note: String,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} {}: {}", self.kind, self.reason, self.note)
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for action in &self.actions {
            writeln!(f, "{action}")?;
        }
        for condition in &self.status.conditions {
            writeln!(
                f,
                "{}={} {}: {}",
                condition.type_, condition.status, condition.reason, condition.message
            )?;
        }
        for event in &self.events {
            writeln!(f, "event {event}")?;
        }
        match self.wake_after {
            Some(after) => writeln!(f, "look again after {} s", after.as_secs()),
            None => writeln!(f, "look again when something changes"),
        }
    }
}
