//! How one replica can be laid out: for each kind of device present, the smallest number of
//! devices on which the engine's own memory plan fits.
//!
//! The same [`engine_memory::memory_plan`] runs here and in the engine, so a fit is a proof and
//! not an estimate. Kinds of device come from what gpu-feature-discovery says about nodes: product
//! prefix and memory, never exact product names.

mod kind;

use std::collections::BTreeMap;

use engine_memory::{MemoryPlan, MemoryRequest, Misfit, memory_plan};
use engine_spec::{Device, EngineConfig, ModelFacts, Parallelism};
use operator_api::Reason;

use crate::devices::{ClaimNews, DRIVER};
use crate::gang;
use crate::resources::human_bytes;
use crate::snapshot::Cluster;
use crate::validate::{ValidAccelerator, ValidDeployment, ValidMig};
pub use kind::{DeviceKind, NodeGpus, offered_kinds};

/// Numbers of GPUs tried when parallelism is automatic.
const GPU_COUNTS: &[u32] = &[1, 2, 4, 8, 16];
/// Numbers of GPUs tried over several nodes when none alone will do.
const GPU_COUNTS_OVER_NODES: &[u32] = &[2, 4, 8, 16, 32, 64];
/// A layout of one replica that fits its devices.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// Kind of device.
    pub kind: DeviceKind,
    /// How it is split.
    pub parallelism: Parallelism,
    /// Pods of one replica.
    pub pods: u32,
    /// Its memory.
    pub memory: MemoryPlan,
    /// What the engine is told, `planned_bytes` included.
    pub engine: EngineConfig,
}

impl Layout {
    /// GPUs or MIG devices of one replica; 0 on processors.
    pub fn gpus(&self) -> u32 {
        match self.kind {
            DeviceKind::Cpu => 0,
            DeviceKind::Gpu { .. } | DeviceKind::Mig { .. } | DeviceKind::Claimed { .. } => {
                self.parallelism.ranks()
            }
        }
    }

    /// GPUs of one pod; 0 on processors.
    pub fn gpus_per_pod(&self) -> u32 {
        self.gpus() / self.pods.max(1)
    }

    /// The same in so many pods.
    #[must_use]
    pub fn over(self, pods: u32) -> Self {
        Self { pods, ..self }
    }
}

/// Why there is no layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NoLayout {
    /// Reason of the condition Planned.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

/// Every layout that fits, best first: products in the order asked for, then the fewest GPUs,
/// then the smallest.
///
/// # Errors
/// When none fits, with the numbers for each kind of device present.
pub fn layouts(
    valid: &ValidDeployment,
    facts: &ModelFacts,
    cluster: &Cluster,
) -> Result<Vec<Layout>, NoLayout> {
    if valid.draft_tokens > 0 && !facts.config.can_predict() {
        return Err(NoLayout {
            reason: Reason::NotServedYet,
            message: format!(
                "spec.speculation.draftTokens = {}: {} models have no prediction layer to draft with; remove it",
                valid.draft_tokens, facts.config.architecture
            ),
        });
    }
    if valid.accelerator == ValidAccelerator::Cpu {
        let parallelism = asked_for(valid, facts).unwrap_or_default();
        return layout_on(valid, facts, DeviceKind::Cpu, parallelism)
            .map(|layout| vec![layout])
            .map_err(|misfit| NoLayout {
                reason: Reason::MemoryDoesNotFit,
                message: format!("on the CPU: {misfit}"),
            });
    }
    let is_claimed = wants_claims(&valid.accelerator);
    if is_claimed && let Some(message) = claims_unknown(&cluster.claims) {
        return Err(NoLayout {
            reason: Reason::NoNodeFits,
            message,
        });
    }
    let mut kinds = gpu_kinds(cluster);
    kinds.retain(|kind, _| matches!(kind, DeviceKind::Claimed { .. }) == is_claimed);
    if kinds.is_empty() && is_claimed {
        return Err(NoLayout {
            reason: Reason::NoNodeFits,
            message: format!(
                "no node publishes GPUs of the driver {DRIVER} in ResourceSlices, with the attributes type and productName and the capacity memory; is the DRA driver running? Without it remove spec.accelerator.claim"
            ),
        });
    }
    if kinds.is_empty() {
        return Err(NoLayout {
            reason: Reason::NoNodeFits,
            message: format!(
                "no node offers NVIDIA GPUs with the labels nvidia.com/gpu.memory and nvidia.com/gpu.product; add GPU nodes with gpu-feature-discovery, or use spec.accelerator.type cpu. {}",
                without_gpus(cluster).join("; ")
            ),
        });
    }
    let mut fitting = Vec::new();
    let mut misfits = Vec::new();
    for (kind, present) in kinds {
        let nodes = format!(
            "{} with {} x {kind}",
            nodes(present.nodes),
            present.gpus_per_node
        );
        let rank = match preference(&kind, &valid.accelerator) {
            Ok(rank) => rank,
            Err(why) => {
                misfits.push(format!("{nodes}: {why}"));
                continue;
            }
        };
        match smallest_layout(valid, facts, &kind, present.gpus_per_node)
            .or_else(|why| layout_over_nodes(valid, facts, &kind, present, why))
        {
            Ok(layout) => fitting.push((rank, layout)),
            Err(why) => misfits.push(format!("{nodes}: {why}")),
        }
    }
    if fitting.is_empty() {
        misfits.extend(without_gpus(cluster));
        return Err(NoLayout {
            reason: Reason::MemoryDoesNotFit,
            message: misfits.join("; "),
        });
    }
    fitting.sort_by(|(left_rank, left), (right_rank, right)| {
        let key = |rank: &usize, layout: &Layout| {
            let bytes = layout.kind.usable_bytes();
            (layout.pods > 1, *rank, layout.gpus(), bytes)
        };
        key(left_rank, left)
            .cmp(&key(right_rank, right))
            .then_with(|| left.kind.cmp(&right.kind))
    });
    Ok(fitting.into_iter().map(|(_, layout)| layout).collect())
}

fn wants_claims(wanted: &ValidAccelerator) -> bool {
    matches!(wanted, ValidAccelerator::Nvidia { claim: Some(_), .. })
}

/// Why it is not known what claims may ask for.
fn claims_unknown(news: &ClaimNews) -> Option<String> {
    match news {
        ClaimNews::Known => None,
        ClaimNews::Off => Some(
            "spec.accelerator.claim needs an operator that watches resource.k8s.io/v1: set resourceClaims.enabled of the chart (--resource-claims), or remove the field to ask for nvidia.com/gpu".into(),
        ),
        ClaimNews::Unread(why) => Some(format!(
            "ResourceSlices and ResourceClaims of resource.k8s.io/v1 cannot be read yet: {why}. Kubernetes serves them since 1.34; the operator may read them with resourceClaims.enabled of the chart"
        )),
    }
}

/// How much of a kind of GPU there is.
#[derive(Clone, Copy, Debug, Default)]
struct Present {
    nodes: usize,
    /// The most that one node has.
    gpus_per_node: u32,
}

/// Kinds of GPU present.
fn gpu_kinds(cluster: &Cluster) -> BTreeMap<DeviceKind, Present> {
    let mut kinds: BTreeMap<DeviceKind, Present> = BTreeMap::new();
    for node in cluster.nodes.values() {
        for kind in offered_kinds(node) {
            let gpus = u32::try_from(kind.count_in(&node.allocatable)).unwrap_or(u32::MAX);
            if gpus == 0 {
                continue;
            }
            // A thousand nodes offer a handful of kinds.
            let more = |present: &mut Present| {
                present.nodes += 1;
                present.gpus_per_node = gpus.max(present.gpus_per_node);
            };
            match kinds.get_mut(kind) {
                Some(present) => more(present),
                None => more(kinds.entry(kind.clone()).or_default()),
            }
        }
    }
    kinds
}

/// Nodes that have no GPU to plan with, by why.
fn without_gpus(cluster: &Cluster) -> Vec<String> {
    let mut whys: BTreeMap<&str, usize> = BTreeMap::new();
    for node in cluster.nodes.values() {
        let mut offered = offered_kinds(node);
        let mut counts = offered.clone().map(|kind| kind.count_in(&node.allocatable));
        if counts.any(|count| count > 0) {
            continue;
        }
        let why = match &node.gpus {
            _ if offered.any(|kind| !kind.can_combine()) => {
                "MIG devices by their labels, but none to allocate; is the device plugin running with their strategy?"
            }
            NodeGpus::Usable(_) => {
                "GPUs by their labels, but no nvidia.com/gpu to allocate; is the device plugin running?"
            }
            NodeGpus::None => "no GPU",
            NodeGpus::Shared => "GPUs are shared by pods, which is not served",
            NodeGpus::Old { .. } => "GPUs of a compute capability below 8.0",
        };
        *whys.entry(why).or_default() += 1;
    }
    whys.into_iter()
        .map(|(why, count)| format!("{}: {why}", nodes(count)))
        .collect()
}

fn nodes(count: usize) -> String {
    format!("{count} {}", if count == 1 { "node" } else { "nodes" })
}

/// Rank of a kind in the order asked for.
///
/// # Errors
/// Why it is excluded.
fn preference(kind: &DeviceKind, wanted: &ValidAccelerator) -> Result<usize, &'static str> {
    let ValidAccelerator::Nvidia {
        products,
        memory_bytes_min,
        mig,
        claim: _,
    } = wanted
    else {
        return Ok(0);
    };
    match (kind, mig) {
        (DeviceKind::Mig { .. }, ValidMig::Never) => {
            return Err(
                "MIG devices are used when asked for: set spec.accelerator.mig to allowed or only",
            );
        }
        (
            DeviceKind::Mig { profile, .. },
            ValidMig::Allowed { profiles } | ValidMig::Only { profiles },
        ) if !profiles.is_empty() && !profiles.contains(profile) => {
            return Err("not asked for by spec.accelerator.migProfiles");
        }
        (DeviceKind::Gpu { .. }, ValidMig::Only { .. }) => {
            return Err("spec.accelerator.mig = only excludes whole GPUs");
        }
        _ => {}
    }
    let not_asked = "not asked for by spec.accelerator";
    if memory_bytes_min.is_some_and(|least| kind.memory_bytes().is_some_and(|has| has < least)) {
        return Err(not_asked);
    }
    if products.is_empty() {
        return Ok(0);
    }
    // Labels have dashes where the driver's attribute has spaces.
    let product = kind.product().unwrap_or_default().replace(' ', "-");
    products
        .iter()
        .position(|prefix| product.starts_with(prefix))
        .ok_or(not_asked)
}

/// So many ranks, which hold whole experts where there are some.
fn automatic(facts: &ModelFacts, tensor: u32) -> Parallelism {
    Parallelism {
        tensor,
        expert: facts.config.moe.as_ref().map_or(1, |_| tensor),
        pipeline: 1,
    }
}

/// The ranks that the specification asks for.
fn asked_for(valid: &ValidDeployment, facts: &ModelFacts) -> Option<Parallelism> {
    let given = valid.parallelism?;
    match given.expert {
        1 => Some(automatic(facts, given.tensor)),
        _ => Some(given),
    }
}

fn smallest_layout(
    valid: &ValidDeployment,
    facts: &ModelFacts,
    kind: &DeviceKind,
    gpus_per_node: u32,
) -> Result<Layout, String> {
    let capacity = kind.usable_bytes();
    if !kind.can_combine() {
        let given = asked_for(valid, facts).unwrap_or_default();
        if given.ranks() > 1 {
            return Err(format!(
                "spec.parallelism asks for {} devices, and nothing connects MIG devices: a replica on them is one device",
                given.ranks()
            ));
        }
        let fitted = layout(valid, facts, kind.clone(), given, capacity);
        return fitted.map_err(|misfit| {
            format!("one of them: it {misfit}; nothing connects MIG devices, so more of them do not help")
        });
    }
    if let Some(given) = asked_for(valid, facts) {
        if given.ranks() > gpus_per_node {
            return Err(format!(
                "too few GPUs: spec.parallelism asks for {}",
                given.ranks()
            ));
        }
        return layout(valid, facts, kind.clone(), given, capacity).map_err(|m| m.to_string());
    }
    let mut last = None;
    for tensor in GPU_COUNTS
        .iter()
        .copied()
        .filter(|count| *count <= gpus_per_node)
    {
        let parallelism = automatic(facts, tensor);
        match layout(valid, facts, kind.clone(), parallelism, capacity) {
            Ok(layout) => return Ok(layout),
            // A number that does not divide the model's heads says nothing about memory.
            Err(Misfit::Indivisible { .. }) if last.is_some() => {}
            Err(misfit) => last = Some(format!("with {tensor} of them it {misfit}")),
        }
    }
    Err(last.unwrap_or_else(|| "no whole GPU on any node".into()))
}

/// The smallest layout over several nodes, for what does not fit one: `alone` says why not.
///
/// # Errors
/// Why there is none.
fn layout_over_nodes(
    valid: &ValidDeployment,
    facts: &ModelFacts,
    kind: &DeviceKind,
    present: Present,
    alone: String,
) -> Result<Layout, String> {
    if !kind.can_combine() {
        return Err(alone);
    }
    let most = present.gpus_per_node;
    let given = asked_for(valid, facts);
    let counts = match given {
        Some(given) => vec![given],
        None => GPU_COUNTS_OVER_NODES
            .iter()
            .map(|tensor| automatic(facts, *tensor))
            .collect(),
    };
    let mut last = alone;
    for parallelism in counts.into_iter().filter(|wanted| wanted.ranks() > most) {
        let pods = gang::pods(parallelism.ranks(), most);
        if usize::try_from(pods).is_ok_and(|pods| pods > present.nodes) {
            break;
        }
        match layout(valid, facts, kind.clone(), parallelism, kind.usable_bytes()) {
            Ok(layout) => return Ok(layout.over(pods)),
            // What one node lacks says more than that more of them lack it too.
            Err(misfit) if given.is_some() => last = misfit.to_string(),
            Err(_) => {}
        }
    }
    Err(last)
}

/// The layout of one replica on a kind of device; on GPUs in one pod.
///
/// # Errors
/// Why it does not fit.
pub fn layout_on(
    valid: &ValidDeployment,
    facts: &ModelFacts,
    kind: DeviceKind,
    parallelism: Parallelism,
) -> Result<Layout, Misfit> {
    let limits = valid.template.resources.as_ref().map(|r| &r.limits);
    let capacity = match kind {
        DeviceKind::Cpu => limits.and_then(|limits| limits.get("memory")?.value()),
        DeviceKind::Gpu { .. } | DeviceKind::Mig { .. } | DeviceKind::Claimed { .. } => {
            kind.usable_bytes()
        }
    };
    layout(valid, facts, kind, parallelism, capacity)
}

fn layout(
    valid: &ValidDeployment,
    facts: &ModelFacts,
    kind: DeviceKind,
    parallelism: Parallelism,
    capacity_bytes: Option<u64>,
) -> Result<Layout, Misfit> {
    let mut engine = EngineConfig::for_source(valid.source.engine_uri());
    engine.model.revision.clone_from(&valid.model_revision);
    engine.served_model_name = Some(valid.served_name.clone());
    engine.device = match kind {
        DeviceKind::Cpu => Device::Cpu,
        DeviceKind::Gpu { .. } | DeviceKind::Mig { .. } | DeviceKind::Claimed { .. } => {
            Device::Nvidia
        }
    };
    engine.dtype = valid.dtype;
    engine.quantization = valid.quantization;
    engine.parallelism = parallelism;
    engine.max_model_len = valid.max_model_len;
    engine.max_num_seqs = valid.max_num_seqs;
    engine.kv_cache_dtype = valid.kv_cache;
    engine.num_speculative_tokens = valid.draft_tokens;
    // One token per sequence must fit into a step.
    engine.max_num_batched_tokens = engine.max_num_batched_tokens.max(valid.max_num_seqs);
    engine.drain_timeout_seconds = valid.rollout.drain_timeout_seconds;
    let request = MemoryRequest::from_engine_config(&engine, capacity_bytes);
    let memory = memory_plan(&facts.config, &request)?;
    engine.max_model_len = Some(memory.max_model_len);
    engine.planned_bytes = Some(memory.total_bytes());
    let pods = match kind {
        DeviceKind::Cpu => parallelism.ranks(),
        DeviceKind::Gpu { .. } | DeviceKind::Mig { .. } | DeviceKind::Claimed { .. } => 1,
    };
    Ok(Layout {
        kind,
        parallelism,
        pods,
        memory,
        engine,
    })
}

/// Parallelism in words.
pub fn parallelism_words(layout: &Layout) -> String {
    let Parallelism {
        tensor,
        expert,
        pipeline,
    } = layout.parallelism;
    let mut words = format!("TP {tensor}");
    if expert > 1 {
        words.push_str(&format!(", EP {expert}"));
    }
    if pipeline > 1 {
        words.push_str(&format!(", PP {pipeline}"));
    }
    if layout.pods > 1 {
        words.push_str(&format!(" over {} pods", layout.pods));
    }
    words
}

/// One line on a layout, for the condition Planned.
pub fn layout_words(layout: &Layout) -> String {
    let noun = layout.kind.noun();
    let per = match layout.gpus() {
        0 if layout.pods > 1 => format!("per rank, {} per replica", layout.pods),
        0 => format!("per {noun}"),
        gpus => format!("per {noun}, {gpus} x {} per replica", layout.kind),
    };
    format!(
        "{} {per}: weights {}, KV cache {} for {} tokens, workspace {}, runtime {}",
        human_bytes(layout.memory.total_bytes()),
        human_bytes(layout.memory.per_rank.weights_bytes),
        human_bytes(layout.memory.per_rank.kv_bytes),
        layout.memory.kv_tokens,
        human_bytes(layout.memory.per_rank.workspace_bytes),
        human_bytes(layout.memory.per_rank.runtime_bytes),
    )
}
