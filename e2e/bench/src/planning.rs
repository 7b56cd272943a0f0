//! Pure plans at the size of a large fleet: no cluster, no clock but the stopwatch.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use operator_api::ModelDeployment;
use operator_core::{Action, Cluster, Inventory, Object, Plan, PodView, Settings, Snapshot};
use serde_json::json;

use crate::objects::NAMESPACE;
use bench_report::{Figure, Row};

/// ModelDeployments over which the replicas of the last row are spread.
const DEPLOYMENTS: u32 = 100;

/// The rows of the pure part.
pub fn rows(nodes: u32, replicas: u32, runs: usize) -> Result<Vec<Row>> {
    let gpus = u64::from(nodes) * 8;
    let mut inventory = Inventory {
        nodes: (0..nodes).map(node).collect::<Result<_>>()?,
        config_maps: vec![Shape::DeepSeekR1.config()?],
        ..Inventory::default()
    };
    let empty = Arc::new(inventory.cluster());
    let whole = snapshot(&inventory, deployment("fleet", replicas)?, &empty);
    let (millis, plan) = timed(&whole, runs);
    ensure!(
        pods(&plan) == replicas,
        "{} of {replicas} pods planned",
        pods(&plan)
    );
    let mut rows = vec![Row::below(
        &format!("plan of {replicas} replicas on {nodes} nodes ({gpus} GPUs)"),
        millis,
        "ms",
        100.0,
    )];
    // All of them are there and ready: what a look costs that changes nothing.
    let settled = inventory_with(&plan, &inventory)?;
    let cluster = Arc::new(settled.cluster());
    let mut looked = snapshot(&settled, deployment("fleet", replicas)?, &cluster);
    let told = operator_core::plan(&looked, &settings()).status;
    let mut wish = deployment("fleet", replicas)?;
    wish.status = Some(told);
    looked.deployment = Arc::new(wish);
    let (millis, nothing) = timed(&looked, runs);
    ensure!(
        nothing.actions.is_empty(),
        "something is left to do: {:?}",
        nothing.actions.first()
    );
    rows.push(Row::plain(
        &format!("look at {replicas} replicas that are all ready, on {nodes} nodes"),
        millis,
        "ms",
    ));
    // The same replicas as a hundred ModelDeployments, all placed; then one of them grows.
    let each = replicas / DEPLOYMENTS;
    let mut cluster = inventory.cluster();
    for index in 0..DEPLOYMENTS {
        let wish = deployment(&format!("m{index}"), each)?;
        let before = snapshot(&inventory, wish, &Arc::new(cluster.clone()));
        let plan = operator_core::plan(&before, &settings());
        cluster.take(&plan);
        inventory
            .pods
            .extend(plan.actions.into_iter().filter_map(|action| match action {
                Action::Create(Object::Pod(pod)) => Some(*pod),
                _ => None,
            }));
    }
    let cluster = Arc::new(cluster);
    let changed = snapshot(&inventory, deployment("m7", each + 1)?, &cluster);
    let (millis, plan) = timed(&changed, runs);
    ensure!(
        pods(&plan) == 1,
        "{} pods planned instead of one",
        pods(&plan)
    );
    rows.push(Row::below(
        &format!("plan of one changed ModelDeployment among {DEPLOYMENTS}, {gpus} GPUs"),
        millis,
        "ms",
        10.0,
    ));
    Ok(rows)
}

/// What is there when a plan has been carried out and its pods run.
fn inventory_with(plan: &Plan, before: &Inventory) -> Result<Inventory> {
    let mut inventory = before.clone();
    for action in &plan.actions {
        let (Action::Create(object) | Action::Apply(object)) = action else {
            continue;
        };
        match object.clone() {
            Object::Pod(pod) => inventory.pods.push(running(*pod)?),
            Object::ConfigMap(map) => inventory.config_maps.push(*map),
            Object::Service(service) => inventory.services.push(*service),
            Object::PodDisruptionBudget(budget) => inventory.budgets.push(*budget),
            Object::NetworkPolicy(policy) => inventory.network_policies.push(*policy),
            Object::ResourceClaimTemplate(template) => inventory.claim_templates.push(*template),
        }
    }
    Ok(inventory)
}

/// A pod as the API server shows it once it is ready on the first node that was planned for it.
fn running(mut pod: Pod) -> Result<Pod> {
    let name = pod.metadata.name.clone().unwrap_or_default();
    let node = PodView::of(&pod)
        .planned_nodes()
        .first()
        .map(|node| (*node).to_owned());
    pod.metadata.uid = Some(format!("uid-{name}"));
    pod.metadata.creation_timestamp = Some(serde_json::from_value(json!("2026-01-01T00:00:00Z"))?);
    pod.spec.get_or_insert_default().node_name = node;
    pod.status = Some(serde_json::from_value(json!({
        "phase": "Running",
        "podIP": "10.0.0.1",
        "startTime": "2026-01-01T00:00:01Z",
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:09Z"},
        ],
        "containerStatuses": [{"name": "engine", "ready": true, "restartCount": 0, "image": "", "imageID": "", "state": {"running": {"startedAt": "2026-01-01T00:00:02Z"}}}],
    }))?);
    Ok(pod)
}

fn timed(snapshot: &Snapshot, runs: usize) -> (Figure, Plan) {
    let settings = settings();
    let mut plan = operator_core::plan(snapshot, &settings);
    let mut millis = Vec::new();
    for _ in 0..runs {
        let start = Instant::now();
        plan = operator_core::plan(snapshot, &settings);
        millis.push(start.elapsed().as_secs_f64() * 1000.0);
    }
    (millis.into_iter().collect(), plan)
}

fn pods(plan: &Plan) -> u32 {
    let created = plan
        .actions
        .iter()
        .filter(|action| matches!(action, Action::Create(_)));
    u32::try_from(created.count()).unwrap_or(u32::MAX)
}

fn snapshot(inventory: &Inventory, wish: ModelDeployment, cluster: &Arc<Cluster>) -> Snapshot {
    inventory.snapshot(wish, Arc::clone(cluster), operator_k8s::now())
}

fn settings() -> Settings {
    Settings {
        engine_image: "cachalot-engine".into(),
        image_pull_policy: "IfNotPresent".into(),
        node_cache: None,
        network_policies: true,
    }
}

fn node(index: u32) -> Result<Node> {
    let name = format!("gpu-{index:04}");
    Ok(serde_json::from_value(json!({
        "metadata": {"name": name, "labels": {
            "kubernetes.io/hostname": name,
            "nvidia.com/gpu.product": "NVIDIA-H200",
            "nvidia.com/gpu.memory": "143771",
            "nvidia.com/gpu.compute.major": "9",
        }},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {
            "allocatable": {"cpu": "192", "memory": "2048Gi", "pods": "110", "nvidia.com/gpu": "8"},
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }))?)
}

/// What a model looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// DeepSeek-R1: eight GPUs a replica.
    DeepSeekR1,
    /// The model of `make bench-engine`: one GPU a replica.
    Small,
}

impl Shape {
    fn source(self) -> &'static str {
        match self {
            Self::DeepSeekR1 => "hf://deepseek-ai/DeepSeek-R1",
            Self::Small => "hf://cachalot/bench",
        }
    }

    fn config_name(self) -> &'static str {
        match self {
            Self::DeepSeekR1 => "deepseek-r1-config",
            Self::Small => "bench-config",
        }
    }

    /// The config map that a ModelDeployment of this shape names.
    pub fn config(self) -> Result<ConfigMap> {
        let read =
            |file: &str| std::fs::read_to_string(e2e::root().join(file)).context(file.to_owned());
        let mut map: ConfigMap = match self {
            Self::DeepSeekR1 => {
                let text = read("docs/guide/gpu-fleet.yaml")?;
                let first = text.split("\n---\n").next().unwrap_or_default();
                serde_yaml::from_str(first).context("docs/guide/gpu-fleet.yaml")?
            }
            Self::Small => serde_json::from_value(json!({
                "data": {"config.json": read("engine/bench/model/config.json")?},
            }))?,
        };
        map.metadata.name = Some(self.config_name().into());
        map.metadata.namespace = Some(NAMESPACE.into());
        Ok(map)
    }
}

/// A ModelDeployment to be created.
pub fn wish(name: &str, replicas: u32, shape: Shape) -> Result<ModelDeployment> {
    Ok(serde_json::from_value(json!({
        "apiVersion": "cachalot.dev/v1alpha1",
        "kind": "ModelDeployment",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {
            "model": {
                "source": shape.source(),
                "configMapRef": {"name": shape.config_name()},
            },
            "context": {"maxTokens": 32768, "maxConcurrentSequences": 16},
            "replicas": replicas,
            "placement": {"tolerations": [{"key": "kwok.x-k8s.io/node", "operator": "Exists"}]},
        },
    }))?)
}

/// A ModelDeployment of DeepSeek-R1 as the API server would show it.
fn deployment(name: &str, replicas: u32) -> Result<ModelDeployment> {
    let mut wish = wish(name, replicas, Shape::DeepSeekR1)?;
    wish.metadata.uid = Some(format!("uid-{name}"));
    wish.metadata.generation = Some(1);
    Ok(wish)
}
