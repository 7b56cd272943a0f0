//! What a user asks for.
//!
//! Rules that one field can state are schema (`minimum`, `pattern`), rules across fields are CEL.
//! All of them are checked again by `operator_core::validate`, which also knows what this version
//! does not serve yet.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Toleration;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::quantity::Quantity;
use crate::status::ModelDeploymentStatus;
use crate::template::PodTemplate;

/// A fleet of replicas that serve one model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "cachalot.dev",
    version = "v1alpha1",
    kind = "ModelDeployment",
    plural = "modeldeployments",
    singular = "modeldeployment",
    shortname = "mdep",
    namespaced,
    status = "ModelDeploymentStatus",
    derive = "PartialEq",
    doc = "A fleet of replicas that serve one language model through an OpenAI-compatible API.",
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.ready",
        description = "Replicas that answer, of those wanted"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase",
        description = "Where the deployment is"),
    printcolumn(name = "GPUs", type_ = "integer", json_path = ".status.plan.gpus",
        description = "GPUs planned for all wanted replicas"),
    printcolumn(name = "Tok/s", type_ = "number", json_path = ".status.performance.tokensPerSecond",
        description = "Tokens generated per second over all replicas"),
    printcolumn(name = "Model", type_ = "string", json_path = ".spec.model.source", priority = 1),
    printcolumn(name = "Revision", type_ = "string", json_path = ".status.revision", priority = 1),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.message", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new("size(self.metadata.name) <= 40 && self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')")
        .message("metadata.name must be at most 40 lower case letters, digits and '-', starting with a letter: it names a Service and, with a suffix, pods"),
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("has(self.replicas) != has(self.autoscaling)")
        .message("set exactly one of spec.replicas (a fixed number) and spec.autoscaling (a range)"),
    validation = Rule::new("!has(self.accelerator.mig) || self.accelerator.mig != 'only' || !has(self.parallelism) || ((!has(self.parallelism.tensor) || self.parallelism.tensor == 1) && (!has(self.parallelism.expert) || self.parallelism.expert == 1))")
        .message("nothing connects MIG devices, so a replica on them is one device; remove spec.parallelism or set accelerator.mig to allowed or never"),
    validation = Rule::new("!has(self.accelerator.claim) || !has(self.placement.binding) || self.placement.binding != 'direct'")
        .message("kube-scheduler allocates resource claims; set placement.binding to scheduler or remove accelerator.claim"),
    validation = Rule::new("self.quantization == 'none' || (self.precision != 'float32' && self.accelerator.type == 'cpu')")
        .message("spec.quantization makes integers on the cpu accelerator, with precision auto or bfloat16; set it to none or change those"),
    validation = Rule::new("!has(self.context.kvCacheDtype) || self.context.kvCacheDtype != 'fp8' || self.accelerator.type == 'nvidia'")
        .message("context.kvCacheDtype fp8 is computed on GPUs; set it to auto or choose accelerator type nvidia")
)]
pub struct ModelDeploymentSpec {
    /// The model to serve and where it comes from.
    pub model: Model,

    /// What the replicas compute on.
    #[serde(default)]
    pub accelerator: Accelerator,

    /// How one replica is split over devices. Absent or empty: the smallest number of devices of
    /// one node on which the memory plan fits. On the processors each rank is a pod of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<Parallelism>,

    /// Number format the engine computes in; `auto` keeps the format of the weights where the
    /// device can.
    #[serde(default)]
    pub precision: Precision,

    /// Integers that the large matrices are made into when the weights are loaded, on the processors.
    #[serde(default)]
    pub quantization: Quantization,

    /// How much context and how many sequences one replica holds.
    #[serde(default)]
    pub context: Context,

    /// Tokens that are drafted and verified together. Answers stay the same.
    #[serde(default, skip_serializing_if = "Speculation::is_off")]
    pub speculation: Speculation,

    /// Fixed number of replicas; written by `kubectl scale` and by a HorizontalPodAutoscaler.
    /// Excludes `autoscaling`. 0 stops the model and keeps its Service.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub replicas: Option<i32>,

    /// Range of replicas that follows demand. Excludes `replicas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscaling: Option<Autoscaling>,

    /// How replicas are exchanged when anything changes that forces new pods.
    #[serde(default)]
    pub rollout: Rollout,

    /// Which nodes may be used.
    #[serde(default)]
    pub placement: Placement,

    /// Narrow overrides for the engine pods.
    #[serde(default)]
    pub pod_template: PodTemplate,
}

/// The model to serve and where it comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.revision) || self.source.startsWith('hf://')")
        .message("model.revision names a branch, tag or commit of an hf:// source; pin other sources with model.digest"),
    validation = Rule::new("!has(self.secretRef) || self.source.startsWith('hf://') || self.source.startsWith('s3://')")
        .message("model.secretRef holds credentials for hf:// and s3:// sources; remove it for file:// and pvc://"),
    validation = Rule::new("!(has(self.digest) && has(self.configMapRef))")
        .message("model.digest is checked by the inspection that model.configMapRef skips; remove one of them")
)]
pub struct Model {
    /// Where the weights are: `hf://org/name`, `s3://bucket/prefix`, `pvc://claim/path` or
    /// `file:///path` inside the engine image. `oci://` is not served yet.
    #[schemars(length(min = 1, max = 1024))]
    #[x_kube(
        validation = Rule::new("self.matches('^(hf|s3|pvc|file|oci)://.+$')")
            .message("model.source must begin with hf://, s3://, pvc:// or file://"),
        validation = Rule::new("!self.startsWith('oci://')")
            .message("model.source oci:// is not served yet; use hf://, s3://, pvc:// or file://"),
        validation = Rule::new("!self.startsWith('file://') || self.startsWith('file:///')")
            .message("model.source file:// needs an absolute path: file:///models/name"),
        validation = Rule::new("!self.startsWith('hf://') || self.matches('^hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*$')")
            .message("model.source hf:// needs an organisation and a name: hf://org/name; a branch, tag or commit goes into model.revision"),
        validation = Rule::new("!self.matches('(^|/)\\\\.\\\\.(/|$)')")
            .message("model.source must not contain '..' as a path segment")
    )]
    pub source: String,

    /// Branch, tag or commit of an `hf://` source. Defaults to `main`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 128),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")
    )]
    pub revision: Option<String>,

    /// `sha256:` digest that the inspection must find (see `status.digest`); anything else is
    /// refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: Option<String>,

    /// Name under which clients ask for the model. Defaults to the ModelDeployment's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(
        length(min = 1, max = 253),
        regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._:/-]*$")
    )]
    pub served_name: Option<String>,

    /// Secret in the same namespace with credentials for the source: keys `HF_TOKEN`,
    /// `HF_ENDPOINT`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_SESSION_TOKEN`,
    /// `AWS_REGION`, `AWS_ENDPOINT_URL`. The operator never reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret_ref: Option<SecretReference>,

    /// Config map in the same namespace whose key `config.json` is the model's published config:
    /// the inspection is skipped and the plan is made from it, without touching weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map_ref: Option<ConfigMapReference>,
}

/// A secret in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretReference {
    /// Name of the secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// A config map in the same namespace.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapReference {
    /// Name of the config map.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Kind of device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum AcceleratorType {
    /// NVIDIA GPUs, found by the labels of gpu-feature-discovery and the resource
    /// `nvidia.com/gpu`.
    #[default]
    Nvidia,
    /// No accelerator: the engine computes on the node's processors.
    Cpu,
}

/// Whether parts of GPUs are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mig {
    /// Whole GPUs alone.
    #[default]
    Never,
    /// The smallest device on which the memory plan fits, MIG devices included.
    Allowed,
    /// MIG devices alone.
    Only,
}

/// What the replicas compute on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.type != 'cpu' || !has(self.products)")
        .message("accelerator.products names GPUs; remove it or choose accelerator type nvidia"),
    validation = Rule::new("self.type != 'cpu' || !has(self.minMemory)")
        .message("accelerator.minMemory is the memory of one GPU; remove it or choose accelerator type nvidia"),
    validation = Rule::new("self.type != 'cpu' || !has(self.mig)")
        .message("accelerator.mig is about parts of GPUs; remove it or choose accelerator type nvidia"),
    validation = Rule::new("!has(self.migProfiles) || (has(self.mig) && self.mig != 'never')")
        .message("accelerator.migProfiles needs accelerator.mig allowed or only"),
    validation = Rule::new("self.type != 'cpu' || !has(self.claim)")
        .message("accelerator.claim is about GPUs; remove it or choose accelerator type nvidia"),
    validation = Rule::new("!has(self.claim) || !has(self.mig) || self.mig == 'never'")
        .message("accelerator.claim gives out whole GPUs; remove it or set accelerator.mig to never")
)]
pub struct Accelerator {
    /// Kind of device: `nvidia` or `cpu`.
    #[serde(rename = "type", default)]
    pub kind: AcceleratorType,

    /// Prefixes of GPU products (label `nvidia.com/gpu.product`) in order of preference, for
    /// example `NVIDIA-H200`. Absent: any product.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(
            length(min = 1, max = 63),
            regex(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
        )
    )]
    pub products: Vec<String>,

    /// Least memory of one GPU, for example `80Gi`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_memory: Option<Quantity>,

    /// Whether MIG devices, parts of a GPU, are used: `never` (the default), `allowed` beside whole
    /// GPUs, or `only`. A replica on one is one device: nothing connects two of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mig: Option<Mig>,

    /// Profiles of MIG devices that may be used, for example `3g.71gb`. Absent: any on which the
    /// memory plan fits.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 16),
        inner(
            length(min = 1, max = 32),
            regex(pattern = r"^[1-9]g\.[1-9][0-9]{0,3}gb(\.me|\.me\.all|\.gfx|-me)?$")
        )
    )]
    pub mig_profiles: Vec<String>,

    /// Ask for GPUs by resource claims (dynamic resource allocation, `resource.k8s.io/v1`) and not by
    /// `nvidia.com/gpu`. The operator must run with `--resource-claims`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<AcceleratorClaim>,
}

/// How GPUs are claimed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AcceleratorClaim {
    /// DeviceClass of the claims. Defaults to `gpu.nvidia.com`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub device_class_name: Option<String>,
}

/// How one replica is split over devices.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.pipeline) || self.pipeline == 1")
    .message("parallelism.pipeline above 1 is not served: each device holds a part of every layer; use parallelism.tensor"))]
pub struct Parallelism {
    /// Devices that share every layer (tensor parallelism).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub tensor: Option<i32>,

    /// Devices over which whole experts are spread: the same as `tensor`, which is also the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub expert: Option<i32>,

    /// Stages that hold consecutive layers. Only 1 is served yet.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 64))]
    pub pipeline: Option<i32>,

    /// Secret in the same namespace whose key `secret` (16 to 4096 bytes) the pods of a replica prove to each other that
    /// they know; others cannot join. For replicas of several pods. The operator never reads it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group_secret_ref: Option<SecretReference>,
}

/// Number format the engine computes in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// As the weights are stored, where the device can.
    #[default]
    Auto,
    /// 32-bit floating point.
    Float32,
    /// 16-bit brain floating point.
    Bfloat16,
}

/// Integers that weights are made into.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quantization {
    /// As the weights are stored.
    #[default]
    None,
    /// Eight bits, a scale for each output row.
    Int8,
    /// Four bits, a scale for each 64 columns.
    Int4,
}

/// How much context and how many sequences one replica holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Context {
    /// Longest sequence, prompt and answer together, in tokens. Defaults to the model's own limit,
    /// at most 8192.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 16777216))]
    pub max_tokens: Option<i32>,

    /// Most sequences computed at the same time by one replica. Defaults to 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_concurrent_sequences: Option<i32>,

    /// What keys and values are kept as. `fp8` holds almost twice the context of DeepSeek-V2, V3 and R1 in the same
    /// memory, on GPUs.
    #[serde(default, skip_serializing_if = "KvCacheDtype::is_auto")]
    pub kv_cache_dtype: KvCacheDtype,
}

/// What keys and values are kept as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum KvCacheDtype {
    /// As the model computes.
    #[default]
    Auto,
    /// 8-bit floating point with a scale for each 128 latents.
    Fp8,
}

impl KvCacheDtype {
    /// Whether nothing is asked for.
    pub fn is_auto(&self) -> bool {
        *self == Self::Auto
    }
}

/// Tokens that are drafted and verified together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Speculation {
    /// Tokens that the model's own prediction layer (MTP of DeepSeek-V3 and R1) drafts for each sequence and step.
    /// 0, the default, drafts none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 8))]
    pub draft_tokens: Option<i32>,
}

impl Speculation {
    /// Whether nothing is asked for.
    pub fn is_off(&self) -> bool {
        self.draft_tokens.unwrap_or(0) == 0
    }
}

/// Range of replicas that follows demand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.minReplicas <= self.maxReplicas")
    .message("autoscaling.minReplicas must not be above autoscaling.maxReplicas"))]
pub struct Autoscaling {
    /// Fewest replicas. Scaling to zero on its own is not served yet, so at least 1.
    #[schemars(range(min = 1, max = 10000))]
    pub min_replicas: i32,

    /// Most replicas.
    #[schemars(range(min = 1, max = 10000))]
    pub max_replicas: i32,

    /// What the number of replicas is steered by.
    #[serde(default)]
    pub targets: AutoscalingTargets,

    /// How long demand must last before it is followed.
    #[serde(default)]
    pub stabilization: Stabilization,
}

/// What the number of replicas is steered by; the target that asks for most replicas wins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscalingTargets {
    /// Requests waiting per replica. Defaults to 2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub queued_requests_per_replica: Option<i32>,

    /// Share of the KV cache in use, in percent, as a mean over replicas. Defaults to 75.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub kv_cache_utilization_percent: Option<i32>,
}

/// How long demand must last before it is followed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Stabilization {
    /// Seconds demand must be above before replicas are added. Defaults to 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 3600))]
    pub scale_up_seconds: Option<i32>,

    /// Seconds demand must be below before replicas are removed. Defaults to 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 86400))]
    pub scale_down_seconds: Option<i32>,
}

/// How replicas are exchanged when anything changes that forces new pods.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!(has(self.maxSurge) && self.maxSurge == 0) || (has(self.maxUnavailable) && self.maxUnavailable > 0)")
    .message("rollout.maxSurge 0 needs rollout.maxUnavailable of at least 1, or no replica could ever be exchanged"))]
#[x_kube(validation = Rule::new("!(has(self.partition) && self.partition > 0 && has(self.steps))")
    .message("rollout.partition and rollout.steps both say how many replicas may run the new revision; remove one of them"))]
pub struct Rollout {
    /// Replicas that may run beyond the wanted number while exchanging. Defaults to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub max_surge: Option<i32>,

    /// Wanted replicas that may be missing while exchanging, and during voluntary disruptions.
    /// Defaults to 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub max_unavailable: Option<i32>,

    /// Seconds a replica may take to finish its requests before it is removed. Defaults to 120.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub drain_timeout_seconds: Option<i32>,

    /// Stops exchanging replicas where it is. Replicas that fail are still replaced.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub paused: Option<bool>,

    /// Replicas that keep the revision before; the others are exchanged. Defaults to 0. Excludes
    /// `steps`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub partition: Option<i32>,

    /// Shares of the replicas that run the new revision one after another, each for a while, before
    /// all do. The Service spreads requests evenly, so a share of replicas is a share of requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub steps: Vec<RolloutStep>,

    /// Seconds a replica of a new revision may take until it answers before the revision counts as
    /// failed. Defaults to 7200: weights of a terabyte take a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 604800))]
    pub progress_deadline_seconds: Option<i32>,

    /// What happens when a new revision fails: `Rollback` to the revision before, or `Halt` where
    /// it is. Defaults to `Rollback`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub on_failure: Option<OnFailure>,

    /// Compares the new revision with the one before while both serve. Absent: it is not compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub analysis: Option<RolloutAnalysis>,

    /// Failures in a row after which a replica is not started again. Defaults to 10. A replica that
    /// answered for ten minutes starts counting anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub restart_budget: Option<i32>,

    /// Raise it to try a failed revision once more, and replicas whose restart budget is used up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000000))]
    pub attempt: Option<i32>,
}

/// A share of the replicas that runs the new revision for a while.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutStep {
    /// Share of the wanted replicas, rounded up.
    #[schemars(range(min = 1, max = 100))]
    pub percent: i32,

    /// Seconds for which all of them must answer before the next step. Defaults to 300.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 604800))]
    pub hold_seconds: Option<i32>,
}

/// What happens when a new revision fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum OnFailure {
    /// All replicas return to the revision before.
    #[default]
    Rollback,
    /// The rollout stops where it is.
    Halt,
}

/// How much worse than the revision before a new one may be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct RolloutAnalysis {
    /// Mean time to first token above that of the revision before, in percent of it. Defaults to
    /// 100: twice as long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10000))]
    pub max_ttft_increase_percent: Option<i32>,

    /// Share of requests answered with an error of the server, in percentage points above that of
    /// the revision before. Defaults to 5.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub max_error_increase_percent: Option<i32>,

    /// Requests that each revision must have answered before they are compared. Defaults to 50.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000000))]
    pub min_requests: Option<i32>,
}

/// Which nodes may be used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Placement {
    /// Labels a node must carry.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub node_selector: BTreeMap<String, String>,

    /// Taints that are accepted, as in a pod. The taint `nvidia.com/gpu` is accepted by itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,

    /// How replicas are spread.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<Topology>,

    /// Prefers spot nodes, once enough replicas run on others. Absent: no node is preferred for its
    /// price.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spot: Option<Spot>,

    /// Priority class of the pods. Where a replica fits nowhere, replicas of ModelDeployments of
    /// lower priority are drained to make room, unless the class says `preemptionPolicy: Never`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,

    /// Who binds pods to nodes: `scheduler` or `direct`. Defaults to `scheduler`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub binding: Option<Binding>,
}

/// Use of spot nodes: cheaper, and taken away at short notice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
pub struct Spot {
    /// Replicas that are placed on nodes that are not spot; only those beyond go to spot nodes.
    /// Defaults to 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 10000))]
    pub on_demand_min: Option<i32>,
}

/// Who binds pods to nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Binding {
    /// kube-scheduler, among the nodes of the plan: everything else in the cluster is respected.
    #[default]
    Scheduler,
    /// The operator, by writing the node into the pod: faster, for pools that belong to cachalot
    /// alone. Other schedulers, and priorities of pods that are not cachalot's, do not count then.
    Direct,
}

/// How replicas are spread, and how the pods of one are kept together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("has(self.spreadBy) || has(self.keepWithin)")
    .message("placement.topology needs spreadBy or keepWithin; set one of them or remove it"))]
pub struct Topology {
    /// Node label over whose values replicas are spread as evenly as room allows, for example
    /// `topology.kubernetes.io/zone`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 317))]
    pub spread_by: Option<String>,

    /// Node labels, the narrowest first. The pods of one replica are kept on nodes with one value of the first of them
    /// under which there is room for all. Absent: the labels of NVLink domains and networks that clouds and NVIDIA
    /// publish, then zones. Empty: pods of a replica may be anywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 8), inner(length(min = 1, max = 317)))]
    pub keep_within: Option<Vec<String>>,
}
