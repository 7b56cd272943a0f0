//! The `ModelDeployment` custom resource: what a user wishes, what the operator reports.
//!
//! Types only: no client, no decisions. Every doc comment becomes the text of `kubectl explain`,
//! every `x_kube` rule is enforced by the API server and has a twin in
//! `operator_core::validate`, because a stored object may predate a rule.

pub mod condition;
mod crd;
pub mod quantity;
pub mod spec;
pub mod status;
pub mod template;

pub use condition::{ConditionStatus, ConditionType, EventReason, Reason};
pub use crd::crd;
pub use quantity::Quantity;
pub use spec::{
    Accelerator, AcceleratorClaim, AcceleratorType, Autoscaling, AutoscalingTargets, Binding,
    ConfigMapReference, Context, KvCacheDtype, Mig, Model, ModelDeployment, ModelDeploymentSpec,
    OnFailure, Parallelism, Placement, Precision, Quantization, Rollout, RolloutAnalysis,
    RolloutStep, SecretReference, Spot, Stabilization, Topology,
};
pub use status::{
    AutoscalingStatus, GpuFaultStatus, LoadProgress, ModelDeploymentStatus, NodeCacheStatus,
    PendingScale, Performance, Phase, PlanSummary, RankBytes, RolloutFailure, RolloutStatus,
};
pub use template::{
    ConfigMapVolume, EmptyDirVolume, EnvVar, EnvVarSource, KeyReference, LocalReference,
    PersistentVolumeClaimVolume, PodTemplate, Resources, SecretVolume, Volume,
};

/// API group of the custom resource.
pub const GROUP: &str = "cachalot.dev";
/// Served and stored version.
pub const VERSION: &str = "v1alpha1";
/// Kind of the custom resource.
pub const KIND: &str = "ModelDeployment";
