//! What the operator reports. Absent means unknown; it never stands for zero.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What the operator found and did.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelDeploymentStatus {
    /// Generation of the spec that this status speaks about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,

    /// Engine pods that exist and are not leaving.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,

    /// Engine pods that answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,

    /// Engine pods of the current revision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub updated_replicas: Option<i32>,

    /// Replicas that are wanted now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted_replicas: Option<i32>,

    /// `answering/wanted`, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready: Option<String>,

    /// Where the deployment is, derived from the conditions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,

    /// The most important message of the conditions, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,

    /// Label selector of the engine pods, for the scale subresource.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,

    /// Hash of everything that forces new pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,

    /// Base URL inside the cluster; append `/v1`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,

    /// Digest of the model that inspection found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,

    /// The plan in short.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanSummary>,

    /// Progress of the replica that is furthest from being ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load: Option<LoadProgress>,

    /// What the replicas measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub performance: Option<Performance>,

    /// What the autoscaler decided.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<AutoscalingStatus>,

    /// Nodes that hold the weights, where the replicas of a node share them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node_cache: Option<NodeCacheStatus>,

    /// GPUs that an engine reported at fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64))]
    pub gpu_faults: Vec<GpuFaultStatus>,

    /// What the operator remembers of rollouts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollout: Option<RolloutStatus>,

    /// Independent judgements: Valid, ModelInspected, Planned, Progressing, Available, Ready,
    /// Degraded, ScalingActive.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["type".into()]))]
    pub conditions: Vec<Condition>,
}

/// Where a deployment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// Not looked at yet, or replicas wait for a place.
    Pending,
    /// The model's facts are being read.
    Inspecting,
    /// A plan is being made.
    Planning,
    /// Replicas are starting; none answers yet.
    Loading,
    /// The promised replicas answer.
    Running,
    /// Requests are answered, but fewer replicas than promised, or something is wrong.
    Degraded,
    /// Nothing answers and nothing will without a change.
    Failed,
    /// Zero replicas are wanted.
    ScaledToZero,
}

impl Phase {
    /// The word on the wire.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "Pending",
            Self::Inspecting => "Inspecting",
            Self::Planning => "Planning",
            Self::Loading => "Loading",
            Self::Running => "Running",
            Self::Degraded => "Degraded",
            Self::Failed => "Failed",
            Self::ScaledToZero => "ScaledToZero",
        }
    }
}

/// The plan in short.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlanSummary {
    /// GPUs for all wanted replicas; 0 on processors.
    pub gpus: i64,
    /// GPUs of one replica; 0 on processors.
    pub gpus_per_replica: i32,
    /// GPU product the plan is for; absent on processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub product: Option<String>,
    /// Parallelism in words, for example `TP 8, EP 8`.
    pub parallelism: String,
    /// Memory of one rank.
    pub rank_bytes: RankBytes,
    /// Tokens the KV cache of one replica holds.
    pub kv_tokens: i64,
    /// Longest sequence in tokens.
    pub max_tokens: i64,
    /// Most sequences at the same time in one replica.
    pub max_concurrent_sequences: i32,
    /// Nodes that replicas are on or planned for, at most eight.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub nodes: Vec<String>,
}

/// Memory of one rank in bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RankBytes {
    /// Weights.
    pub weights: i64,
    /// KV cache.
    pub kv_cache: i64,
    /// Activations and other scratch space.
    pub workspace: i64,
    /// The process and the device's own.
    pub runtime: i64,
    /// Sum.
    pub total: i64,
}

/// Progress of a replica that is starting.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct LoadProgress {
    /// The pod this is about.
    pub pod: String,
    /// What it does: fetching, loading, warming.
    pub phase: String,
    /// Bytes moved in this phase.
    pub bytes_loaded: i64,
    /// Bytes to move in this phase.
    pub bytes_total: i64,
    /// Mean rate.
    pub bytes_per_second: i64,
    /// Seconds left at that rate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<i64>,
    /// Progress of this phase, 0 to 100.
    pub percent: i32,
}

/// What the replicas measured, summed over those that answer.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Performance {
    /// Tokens generated per second.
    pub tokens_per_second: f64,
    /// Prompt tokens processed per second.
    pub prompt_tokens_per_second: f64,
    /// Sequences being computed.
    pub running_requests: i64,
    /// Requests waiting.
    pub queued_requests: i64,
    /// Share of the KV cache in use, mean over replicas.
    pub kv_cache_utilization_percent: i32,
    /// Replicas these figures come from.
    pub replicas_measured: i32,
}

/// What the autoscaler decided.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalingStatus {
    /// Replicas the autoscaler wants.
    pub desired_replicas: i32,
    /// When that number last changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scale_time: Option<Time>,
    /// A wish for more replicas that has not lasted long enough yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_up: Option<PendingScale>,
    /// A wish for fewer replicas that has not lasted long enough yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_down: Option<PendingScale>,
}

/// Nodes that hold the weights; kept here so that a restart forgets nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct NodeCacheStatus {
    /// Hash of the source and revision of the weights.
    pub model: String,
    /// Nodes where a replica has answered with them: those where one does now, then earlier ones.
    #[schemars(length(max = 64))]
    pub nodes: Vec<String>,
}

/// A GPU that an engine reported at fault; kept here so that a restart forgets nothing. No new replica is
/// placed on its node until the node is another one (`nodeUid`), was booted anew (`bootId`), or a day is over.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct GpuFaultStatus {
    /// Node of the GPU.
    pub node: String,
    /// Uid of that node.
    pub node_uid: String,
    /// Its boot ID when the fault was reported.
    pub boot_id: String,
    /// The GPU, as nvidia-smi prints it.
    pub uuid: String,
    /// Error that its driver gave.
    pub error: String,
    /// Pod whose engine reported it.
    pub pod: String,
    /// When that engine ended.
    pub since: Time,
}

/// What the operator remembers of rollouts; kept here so that a restart forgets nothing.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStatus {
    /// The last revision that every wanted replica ran and answered with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable_revision: Option<String>,
    /// The revision of the spec, which the fields below are about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_revision: Option<String>,
    /// Index of the step that is under way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step: Option<i32>,
    /// Since when all replicas of that step answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub step_since: Option<Time>,
    /// Why the revision of the spec was given up; absent while it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<RolloutFailure>,
}

/// Why a revision was given up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutFailure {
    /// When.
    pub at: Time,
    /// `rollout.attempt` at that time; another value there tries the revision once more.
    pub attempt: i32,
    /// What happened, for people.
    pub message: String,
}

/// A wish that has to last before it is followed; kept here so that a restart forgets nothing.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct PendingScale {
    /// Since when.
    pub since: Time,
    /// The most cautious number wished for since then.
    pub replicas: i32,
}
