//! Engine pods and inspection pods.
//!
//! Both obey the "restricted" pod security standard. The place of an engine pod is a required node
//! affinity on the nodes the planner offers, so that kube-scheduler binds it and everything else
//! in the cluster is respected.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, ConfigMapKeySelector, ConfigMapVolumeSource, Container, ContainerPort,
    EmptyDirVolumeSource, EnvVar, EnvVarSource, HTTPGetAction, HostPathVolumeSource, Lifecycle,
    LifecycleHandler, LocalObjectReference, NodeAffinity, NodeSelector, NodeSelectorRequirement,
    NodeSelectorTerm, PersistentVolumeClaimVolumeSource, Pod, PodSchedulingGate,
    PodSecurityContext, PodSpec, PreferredSchedulingTerm, Probe, ResourceClaim,
    ResourceRequirements, SeccompProfile, SecretKeySelector, SecretVolumeSource, SecurityContext,
    SleepAction, Toleration, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use operator_api::Binding;

use super::rank::Member;
use crate::devices;
use crate::fit::Layout;
use crate::names::{self, Revision};
use crate::node_cache::NodeCache;
use crate::plan::Settings;
use crate::priority::GATE;
use crate::resources::{NVIDIA_GPU, Resources};
use crate::validate::{Source, ValidDeployment};

/// User of our images.
const USER: i64 = 65532;
/// Seconds a pod goes on serving after it is told to stop, so that endpoints forget it first.
const PRE_STOP_SECONDS: i64 = 5;
/// Seconds beyond the drain timeout before a pod is killed.
const KILL_MARGIN_SECONDS: i64 = 10;
/// Seconds a replica may take to load its weights: 1.3 TB at 100 MB/s.
pub(super) const STARTUP_SECONDS: i32 = 4 * 3600;
/// Keys that may be taken from the model's secret.
const SECRET_KEYS: &[&str] = &[
    "HF_TOKEN",
    "HF_ENDPOINT",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_ENDPOINT_URL",
];
/// Processor time a CPU replica asks for. A floor, no limit: the engine takes what is idle.
const CPU_REPLICA_MILLIS: u64 = 250;
/// Processor time per GPU: one thread that feeds it and its share of the HTTP side.
const CPU_PER_GPU_MILLIS: u64 = 2000;
/// Host memory of a GPU replica, and for each of its GPUs the pinned buffers that weights pass
/// through.
const GPU_HOST_BYTES: u64 = 4 << 30;
const GPU_HOST_BYTES_EACH: u64 = 4 << 30;
/// Memory beyond the plan before the kernel kills a CPU replica, in percent: the allocator's
/// fragmentation is not in the plan.
const LIMIT_MARGIN_PERCENT: u64 = 10;
const LIMIT_MARGIN_BYTES: u64 = 64 << 20;
/// Of the offered nodes that a pod prefers, best first. The order of the others is kube-scheduler's affair, and a term for each
/// made lists of pods longer by a seventh.
const PREFERRED_WEIGHTS: &[i32] = &[100, 50, 25, 12];

/// What the engine is told the limit of its cache with.
const CACHE_LIMIT: &str = "--cache-limit";

/// A pod to be: which replica it is, and where it may run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Index of the replica.
    pub replica: u32,
    /// Rank in its group; 0 where a replica is one pod.
    pub rank: u32,
    /// Pods this replica had before.
    pub attempt: u32,
    /// How many of them failed in a row.
    pub failures: u32,
    /// `rollout.attempt` of the spec.
    pub rollout_attempt: u32,
    /// Nodes, best first.
    pub nodes: Vec<String>,
    /// Nodes whose kubelet refused the pods before.
    pub refused: Vec<String>,
    /// Pods that have to leave the node first; nobody may bind the new one before.
    pub preempts: Vec<String>,
}

/// What an engine pod asks for, as the planner counts it.
pub fn engine_requests(valid: &ValidDeployment, layout: &Layout) -> Resources {
    Resources::of_pod(&PodSpec {
        resource_claims: devices::pod_claim(layout, "").map(|claim| vec![claim]),
        containers: vec![Container {
            resources: Some(engine_resources(valid, layout)),
            ..Container::default()
        }],
        ..PodSpec::default()
    })
}

fn engine_resources(valid: &ValidDeployment, layout: &Layout) -> ResourceRequirements {
    let gpus = u64::from(layout.gpus_per_pod());
    let planned = layout.memory.total_bytes();
    let (cpu_millis, memory, memory_limit) = if gpus == 0 {
        let limit = planned + planned / 100 * LIMIT_MARGIN_PERCENT + LIMIT_MARGIN_BYTES;
        (CPU_REPLICA_MILLIS, planned, limit)
    } else {
        let host = GPU_HOST_BYTES + gpus * GPU_HOST_BYTES_EACH;
        (gpus * CPU_PER_GPU_MILLIS, host, host)
    };
    let mebibytes = |bytes: u64| Quantity(format!("{}Mi", bytes.div_ceil(1 << 20)));
    let mut requests = BTreeMap::from([
        ("cpu".to_owned(), Quantity(format!("{cpu_millis}m"))),
        ("memory".to_owned(), mebibytes(memory)),
    ]);
    let mut limits = BTreeMap::from([("memory".to_owned(), mebibytes(memory_limit))]);
    if let Some(given) = &valid.template.resources {
        for (key, limit) in &given.limits {
            limits.insert(key.clone(), Quantity(limit.0.clone()));
            // A request above its limit is refused by Kubernetes; a given limit wins.
            let above = requests
                .get(key)
                .and_then(|request| operator_api::quantity::parse_millis(&request.0))
                .zip(limit.millis())
                .is_some_and(|(request, limit)| request > limit);
            if above {
                requests.insert(key.clone(), Quantity(limit.0.clone()));
            }
        }
        for (key, request) in &given.requests {
            requests.insert(key.clone(), Quantity(request.0.clone()));
            let above = limits
                .get(key)
                .and_then(|limit| operator_api::quantity::parse_millis(&limit.0))
                .zip(request.millis())
                .is_some_and(|(limit, request)| request > limit);
            if above {
                limits.insert(key.clone(), Quantity(request.0.clone()));
            }
        }
    }
    if let Some(resource) = layout.kind.resource() {
        let count = Quantity(gpus.to_string());
        requests.insert(resource.clone(), count.clone());
        limits.insert(resource, count);
    }
    ResourceRequirements {
        requests: Some(requests),
        limits: Some(limits),
        claims: devices::pod_claim(layout, "").map(|claim| {
            vec![ResourceClaim {
                name: claim.name,
                request: None,
            }]
        }),
    }
}

/// A pod that serves.
pub fn engine_pod(
    valid: &ValidDeployment,
    layout: &Layout,
    settings: &Settings,
    revision: &Revision,
    slot: &Slot,
) -> Pod {
    let member = Member::of(valid, layout, revision, slot);
    let name = match &member {
        None => names::engine_pod(&valid.name, slot.replica, revision, slot.attempt),
        Some(member) => member.name.clone(),
    };
    let mut metadata = super::metadata(valid, name, names::ENGINE);
    let labels = metadata.labels.get_or_insert_default();
    labels.insert(names::REVISION.into(), revision.to_string());
    labels.insert(names::REPLICA.into(), slot.replica.to_string());
    if member.is_some() {
        labels.insert(names::RANK.into(), slot.rank.to_string());
    }
    // The first rank takes the requests of its group.
    if slot.rank == 0 {
        labels.insert(names::SERVING.into(), "true".into());
    }
    labels.insert(names::ENGINE_TYPE.into(), "vllm".into());
    labels.extend(valid.template.labels.clone());
    let mut annotations = valid.template.annotations.clone();
    for (key, value) in [
        ("prometheus.io/scrape", "true".to_owned()),
        ("prometheus.io/port", names::ENGINE_PORT.to_string()),
        ("prometheus.io/path", "/metrics".to_owned()),
    ] {
        annotations.entry(key.into()).or_insert(value);
    }
    if member.is_some() {
        annotations.insert(names::RANKS.into(), layout.pods.to_string());
    }
    annotations.insert(names::ATTEMPT.into(), slot.attempt.to_string());
    annotations.insert(names::FAILURES.into(), slot.failures.to_string());
    if slot.rollout_attempt > 0 {
        annotations.insert(
            names::ROLLOUT_ATTEMPT.into(),
            slot.rollout_attempt.to_string(),
        );
    }
    annotations.insert(names::PLANNED_NODES.into(), slot.nodes.join(","));
    if !slot.refused.is_empty() {
        annotations.insert(names::REFUSED_NODES.into(), slot.refused.join(","));
    }
    // Bound by us, a pod names its node; kube-scheduler then leaves it alone. One that waits for a
    // place cannot name it yet: its kubelet would refuse it.
    let waits = !slot.preempts.is_empty();
    if waits {
        annotations.insert(names::PREEMPTS.into(), slot.preempts.join(","));
    }
    let bound = match valid.placement.binding {
        Binding::Direct if !waits => slot.nodes.first().cloned(),
        Binding::Direct | Binding::Scheduler => None,
    };
    metadata.annotations = Some(annotations);

    let node_cache = NodeCache::of(valid, settings);
    let mut volumes = common_volumes(valid);
    volumes.push(cache_volume(node_cache));
    volumes.push(Volume {
        name: "config".into(),
        config_map: Some(ConfigMapVolumeSource {
            name: names::engine_config_map(&valid.name, revision),
            ..ConfigMapVolumeSource::default()
        }),
        ..Volume::default()
    });
    let mut mounts = common_mounts(valid);
    mounts.push(mount("cache", "/cache", false));
    mounts.push(mount("config", "/etc/cachalot", true));
    if layout.gpus_per_pod() > 1 {
        volumes.push(Volume {
            name: "shm".into(),
            empty_dir: Some(EmptyDirVolumeSource {
                medium: Some("Memory".into()),
                ..EmptyDirVolumeSource::default()
            }),
            ..Volume::default()
        });
        mounts.push(mount("shm", "/dev/shm", false));
    }
    let mut command = vec!["/engine", "serve", "--config", "/etc/cachalot/engine.json"];
    let limit = node_cache.and_then(|cache| cache.limit_bytes);
    let limit = limit.map(|bytes| bytes.to_string());
    if let Some(limit) = &limit {
        command.extend([CACHE_LIMIT, limit]);
    }
    let mut container = Container {
        name: names::ENGINE.into(),
        command: words(&command),
        ports: Some(vec![port("http", names::ENGINE_PORT)]),
        startup_probe: Some(probe("/startupz", 1, STARTUP_SECONDS)),
        readiness_probe: Some(probe("/readyz", 2, 2)),
        liveness_probe: Some(probe("/livez", 10, 6)),
        lifecycle: Some(Lifecycle {
            pre_stop: Some(LifecycleHandler {
                sleep: Some(SleepAction {
                    seconds: PRE_STOP_SECONDS,
                }),
                ..LifecycleHandler::default()
            }),
            ..Lifecycle::default()
        }),
        resources: Some(engine_resources(valid, layout)),
        volume_mounts: Some(mounts),
        ..container(valid, settings)
    };
    if let Some(member) = &member {
        member.join(&mut container);
        volumes.extend(member.volume());
    }
    let drain = i64::from(valid.rollout.drain_timeout_seconds);
    Pod {
        metadata,
        spec: Some(PodSpec {
            containers: vec![container],
            resource_claims: {
                let template = names::engine_config_map(&valid.name, revision);
                devices::pod_claim(layout, &template).map(|claim| vec![claim])
            },
            volumes: Some(volumes),
            restart_policy: Some("Always".into()),
            termination_grace_period_seconds: Some(drain + PRE_STOP_SECONDS + KILL_MARGIN_SECONDS),
            affinity: match bound {
                None => affinity(&slot.nodes),
                Some(_) => None,
            },
            node_name: bound,
            scheduling_gates: waits.then(|| vec![PodSchedulingGate { name: GATE.into() }]),
            node_selector: node_selector(valid),
            tolerations: tolerations(valid, layout.gpus() > 0),
            hostname: member.as_ref().map(|member| member.name.clone()),
            subdomain: member.map(|_| names::ranks(&valid.name)),
            ..pod_spec(valid)
        }),
        status: None,
    }
}

pub(super) fn port(name: &str, number: i32) -> ContainerPort {
    ContainerPort {
        name: Some(name.into()),
        container_port: number,
        protocol: Some("TCP".into()),
        ..ContainerPort::default()
    }
}

/// Parts that both kinds of pod share.
pub(super) fn pod_spec(valid: &ValidDeployment) -> PodSpec {
    let secrets = &valid.template.image_pull_secrets;
    PodSpec {
        automount_service_account_token: Some(false),
        enable_service_links: Some(false),
        service_account_name: valid.template.service_account_name.clone(),
        priority_class_name: valid.placement.priority_class.clone(),
        image_pull_secrets: (!secrets.is_empty()).then(|| {
            secrets
                .iter()
                .map(|secret| LocalObjectReference {
                    name: secret.name.clone(),
                })
                .collect()
        }),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(USER),
            run_as_group: Some(USER),
            fs_group: Some(USER),
            // A large volume would otherwise be walked file by file at every start.
            fs_group_change_policy: Some("OnRootMismatch".into()),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".into(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        ..PodSpec::default()
    }
}

pub(super) fn container(valid: &ValidDeployment, settings: &Settings) -> Container {
    let image = valid
        .template
        .image
        .as_ref()
        .unwrap_or(&settings.engine_image);
    Container {
        image: Some(image.clone()),
        image_pull_policy: Some(settings.image_pull_policy.clone()),
        env: Some(environment(valid)),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            read_only_root_filesystem: Some(true),
            run_as_non_root: Some(true),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".into()]),
                add: None,
            }),
            ..SecurityContext::default()
        }),
        ..Container::default()
    }
}

fn environment(valid: &ValidDeployment) -> Vec<EnvVar> {
    let given: Vec<&str> = valid
        .template
        .env
        .iter()
        .map(|env| env.name.as_str())
        .collect();
    let secret_env = |(secret, key): (&String, &&str)| EnvVar {
        name: (*key).to_owned(),
        value_from: Some(EnvVarSource {
            secret_key_ref: Some(SecretKeySelector {
                name: secret.clone(),
                key: (*key).to_owned(),
                optional: Some(true),
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    };
    let from_secret = valid.secret.iter().flat_map(|secret| {
        SECRET_KEYS
            .iter()
            .filter(|key| !given.contains(key))
            .map(move |key| secret_env((secret, key)))
    });
    let from_template = valid.template.env.iter().map(|env| EnvVar {
        name: env.name.clone(),
        value: env.value.clone(),
        value_from: env.value_from.as_ref().map(|source| EnvVarSource {
            secret_key_ref: source.secret_key_ref.as_ref().map(|r| SecretKeySelector {
                name: r.name.clone(),
                key: r.key.clone(),
                optional: None,
            }),
            config_map_key_ref: source
                .config_map_key_ref
                .as_ref()
                .map(|r| ConfigMapKeySelector {
                    name: r.name.clone(),
                    key: r.key.clone(),
                    optional: None,
                }),
            ..EnvVarSource::default()
        }),
    });
    from_secret.chain(from_template).collect()
}

fn scratch(name: &str) -> Volume {
    Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource::default()),
        ..Volume::default()
    }
}

/// Where fetched weights are kept.
fn cache_volume(node_cache: Option<&NodeCache>) -> Volume {
    match node_cache {
        None => scratch("cache"),
        Some(cache) => Volume {
            name: "cache".into(),
            host_path: Some(HostPathVolumeSource {
                path: cache.path.clone(),
                type_: Some("DirectoryOrCreate".into()),
            }),
            ..Volume::default()
        },
    }
}

pub(super) fn common_volumes(valid: &ValidDeployment) -> Vec<Volume> {
    let mut volumes = vec![scratch("tmp")];
    if let Source::Claim { claim, .. } = &valid.source {
        volumes.push(claim_volume("models", claim, true));
    }
    for volume in &valid.template.volumes {
        let name = volume.name.clone();
        volumes.push(if let Some(claim) = &volume.persistent_volume_claim {
            claim_volume(&name, &claim.claim_name, !volume.writable)
        } else if let Some(config_map) = &volume.config_map {
            Volume {
                name,
                config_map: Some(ConfigMapVolumeSource {
                    name: config_map.name.clone(),
                    ..ConfigMapVolumeSource::default()
                }),
                ..Volume::default()
            }
        } else if let Some(secret) = &volume.secret {
            Volume {
                name,
                secret: Some(SecretVolumeSource {
                    secret_name: Some(secret.secret_name.clone()),
                    ..SecretVolumeSource::default()
                }),
                ..Volume::default()
            }
        } else {
            let limit = volume
                .empty_dir
                .as_ref()
                .and_then(|v| v.size_limit.as_ref());
            Volume {
                name,
                empty_dir: Some(EmptyDirVolumeSource {
                    size_limit: limit.map(|limit| Quantity(limit.0.clone())),
                    ..EmptyDirVolumeSource::default()
                }),
                ..Volume::default()
            }
        });
    }
    volumes
}

fn claim_volume(name: &str, claim: &str, read_only: bool) -> Volume {
    Volume {
        name: name.to_owned(),
        persistent_volume_claim: Some(PersistentVolumeClaimVolumeSource {
            claim_name: claim.to_owned(),
            read_only: Some(read_only),
        }),
        ..Volume::default()
    }
}

pub(super) fn common_mounts(valid: &ValidDeployment) -> Vec<VolumeMount> {
    let mut mounts = vec![mount("tmp", "/tmp", false)];
    if matches!(valid.source, Source::Claim { .. }) {
        mounts.push(mount("models", crate::validate::CLAIM_MOUNT, true));
    }
    for volume in &valid.template.volumes {
        let read_only = volume.config_map.is_some()
            || volume.secret.is_some()
            || (volume.persistent_volume_claim.is_some() && !volume.writable);
        mounts.push(mount(&volume.name, &volume.mount_path, read_only));
    }
    mounts
}

pub(super) fn mount(name: &str, path: &str, read_only: bool) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        read_only: Some(read_only),
        ..VolumeMount::default()
    }
}

pub(super) fn probe(path: &str, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.to_owned()),
            port: IntOrString::String("http".into()),
            scheme: Some("HTTP".into()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(2),
        success_threshold: Some(1),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}

pub(super) fn words(words: &[&str]) -> Option<Vec<String>> {
    Some(words.iter().map(|word| (*word).to_owned()).collect())
}

pub(super) fn node_selector(valid: &ValidDeployment) -> Option<BTreeMap<String, String>> {
    let selector = &valid.placement.node_selector;
    (!selector.is_empty()).then(|| selector.clone())
}

pub(super) fn tolerations(valid: &ValidDeployment, on_gpus: bool) -> Option<Vec<Toleration>> {
    let mut tolerations = valid.placement.tolerations.clone();
    if on_gpus {
        tolerations.push(Toleration {
            key: Some(NVIDIA_GPU.to_owned()),
            operator: Some("Exists".into()),
            ..Toleration::default()
        });
    }
    (!tolerations.is_empty()).then_some(tolerations)
}

/// Required affinity on the offered nodes, by node name, and a preference for the best of them. Weights halve: the scorers of
/// kube-scheduler that like emptier nodes (at most 100 points each; the first leads by as many) seldom move a pod from the node it
/// is counted on, which would take the place that another is counted on.
fn affinity(nodes: &[String]) -> Option<Affinity> {
    if nodes.is_empty() {
        return None;
    }
    let term = |node: &String| NodeSelectorTerm {
        match_fields: Some(vec![NodeSelectorRequirement {
            key: "metadata.name".into(),
            operator: "In".into(),
            values: Some(vec![node.clone()]),
        }]),
        ..NodeSelectorTerm::default()
    };
    let preferred = nodes
        .iter()
        .zip(PREFERRED_WEIGHTS)
        .map(|(node, &weight)| PreferredSchedulingTerm {
            weight,
            preference: term(node),
        })
        .collect();
    Some(Affinity {
        node_affinity: Some(NodeAffinity {
            required_during_scheduling_ignored_during_execution: Some(NodeSelector {
                node_selector_terms: nodes.iter().map(term).collect(),
            }),
            preferred_during_scheduling_ignored_during_execution: (nodes.len() > 1)
                .then_some(preferred),
        }),
        ..Affinity::default()
    })
}

/// The cache that an engine pod shares with others of its node; none where it has its own.
pub fn node_cache(pod: &Pod) -> Option<NodeCache> {
    let spec = pod.spec.as_ref()?;
    let mut volumes = spec.volumes.iter().flatten();
    let cache = volumes.find(|volume| volume.name == "cache")?;
    let command = spec.containers.first()?.command.as_ref()?;
    let mut words = command.iter().skip_while(|word| *word != CACHE_LIMIT);
    Some(NodeCache {
        path: cache.host_path.as_ref()?.path.clone(),
        limit_bytes: words.nth(1).and_then(|bytes| bytes.parse().ok()),
    })
}

/// The node a pod is bound to, or those its affinity names, best first.
pub fn preferred_nodes(pod: &Pod) -> Vec<String> {
    offered_nodes(pod).map(str::to_owned).collect()
}

/// The same, without a copy.
pub(crate) fn offered_nodes(pod: &Pod) -> impl Iterator<Item = &str> {
    let spec = pod.spec.as_ref();
    let bound = spec.and_then(|spec| spec.node_name.as_deref());
    let terms = spec
        .filter(|_| bound.is_none())
        .and_then(|spec| {
            let affinity = spec.affinity.as_ref()?.node_affinity.as_ref()?;
            let required = affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()?;
            Some(&required.node_selector_terms)
        })
        .into_iter()
        .flatten();
    let fields = terms.flat_map(|term| term.match_fields.iter().flatten());
    let named = fields.flat_map(|field| field.values.iter().flatten());
    bound.into_iter().chain(named.map(String::as_str))
}
