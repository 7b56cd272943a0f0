//! How much of a fleet the operator keeps in memory, object by object.
//!
//! This file holds a single test, since the counter counts for the whole process.

// The interface of a global allocator is unsafe.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used)] // helpers of tests

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use operator_api::ModelDeployment;
use operator_core::{Action, Inventory, Object, Plan, Settings};
use operator_k8s::world::World;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        BYTES.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Objects of which a mean is taken.
const MANY: usize = 100;

/// Bytes that stay of each of [`MANY`] objects that are read as `text` says and taken in.
fn kept<T: DeserializeOwned>(text: impl Fn(usize) -> Value, take: impl Fn(T)) -> usize {
    kept_after(&[&text], take)
}

/// The same of objects that are taken in once for each of `ages`: each age of all before the next of any.
fn kept_after<T: DeserializeOwned>(ages: &[&dyn Fn(usize) -> Value], take: impl Fn(T)) -> usize {
    let read = |text: &dyn Fn(usize) -> Value, index| {
        take(serde_json::from_value(text(index)).expect("an object"));
    };
    // What is made once, such as names that objects share, is not one object's.
    read(ages[0], MANY);
    let before = BYTES.load(Ordering::Relaxed);
    for text in ages {
        (0..MANY).for_each(|index| read(text, index));
    }
    (BYTES.load(Ordering::Relaxed) - before) / MANY
}

fn node(name: &str) -> Value {
    let labels = json!({
        "beta.kubernetes.io/arch": "amd64", "beta.kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
        "kubernetes.io/os": "linux", "kubernetes.io/hostname": name, "node.kubernetes.io/instance-type": "p5.48xlarge",
        "topology.kubernetes.io/region": "us-east-1", "topology.kubernetes.io/zone": "us-east-1a",
        "nvidia.com/cuda.driver-version.full": "580.65.06", "nvidia.com/cuda.runtime-version.full": "13.0",
        "nvidia.com/gfd.timestamp": "1764150000", "nvidia.com/gpu.compute.major": "9", "nvidia.com/gpu.compute.minor": "0",
        "nvidia.com/gpu.count": "8", "nvidia.com/gpu.family": "hopper", "nvidia.com/gpu.machine": "HGX",
        "nvidia.com/gpu.memory": "143771", "nvidia.com/gpu.mode": "compute", "nvidia.com/gpu.product": "NVIDIA-H200",
        "nvidia.com/gpu.replicas": "1", "nvidia.com/gpu.sharing-strategy": "none", "nvidia.com/mig.capable": "true",
        "nvidia.com/mig.strategy": "single", "nvidia.com/gpu.present": "true",
    });
    json!({
        "metadata": {"name": name, "uid": format!("7d1f4c1e-0000-4000-8000-{name:0>12}"), "labels": labels},
        "spec": {"taints": [{"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}]},
        "status": {
            "allocatable": {"cpu": "192", "memory": "2048Gi", "pods": "110", "nvidia.com/gpu": "8"},
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"}],
        },
    })
}

/// A ModelDeployment of ten small replicas, planned on two nodes of eight GPUs.
fn planned() -> (ModelDeployment, Plan) {
    let config = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../engine/bench/model/config.json"
    );
    let config = std::fs::read_to_string(config).expect("the config of a model");
    let wish = json!({
        "apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "model-00", "namespace": "default", "uid": "1b4e28ba-2fa1-41d2-883f-0016d3cca427",
            "generation": 1, "creationTimestamp": "2026-11-24T00:00:00Z"},
        "spec": {
            "model": {"source": "hf://cachalot/bench", "configMapRef": {"name": "config"}},
            "context": {"maxTokens": 32768, "maxConcurrentSequences": 16},
            "replicas": 10,
        },
    });
    let wish: ModelDeployment = serde_json::from_value(wish).expect("a ModelDeployment");
    let inventory = Inventory {
        nodes: ["a", "b"].map(|name| serde_json::from_value(node(name)).expect("a node")).into(),
        config_maps: vec![serde_json::from_value(json!({
            "metadata": {"name": "config", "namespace": "default"}, "data": {"config.json": config}}))
            .expect("a config map")],
        ..Inventory::default()
    };
    let now = operator_k8s::now();
    let snapshot = inventory.snapshot(wish.clone(), Arc::new(inventory.cluster()), now);
    let settings = Settings {
        engine_image: "registry.example/cachalot-engine:1.0.0".into(),
        image_pull_policy: "IfNotPresent".into(),
        node_cache: None,
        network_policies: true,
    };
    let plan = operator_core::plan(&snapshot, &settings);
    (wish, plan)
}

/// The object as it was before.
fn earlier(mut object: Value) -> Value {
    object["metadata"]["resourceVersion"] = json!("123455");
    object
}

/// An object under another name, with what the API server adds.
fn stored(object: impl Serialize, name: &str, status: &Value) -> Value {
    let mut object = serde_json::to_value(object).expect("JSON");
    object["metadata"]["name"] = json!(name);
    object["metadata"]["uid"] = json!(format!("3f2504e0-4f89-41d3-9a0c-{name:0>12}"));
    object["metadata"]["resourceVersion"] = json!("123456");
    object["metadata"]["creationTimestamp"] = json!("2026-11-24T00:00:00Z");
    if !status.is_null() {
        object["status"] = status.clone();
    }
    object
}

#[test]
fn objects_are_kept_small() {
    let (wish, plan) = planned();
    let world = World::new();
    let nodes = kept(
        |index| node(&format!("n{index}")),
        |node: Node| world.read_node(node),
    );
    let status = json!({
        "phase": "Running", "podIP": "10.1.2.3", "hostIP": "10.0.0.3", "startTime": "2026-11-24T00:00:00Z",
        "conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"},
            {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"}],
        "containerStatuses": [{"name": "engine", "image": "i", "imageID": "i", "ready": true, "restartCount": 0,
            "state": {"running": {"startedAt": "2026-11-24T00:00:00Z"}}}],
    });
    let objects = || {
        plan.actions.iter().filter_map(|action| match action {
            Action::Create(object) | Action::Apply(object) => Some(object),
            _ => None,
        })
    };
    let pod = objects().find_map(|object| match object {
        Object::Pod(pod) => Some(pod),
        _ => None,
    });
    let mut pod = (**pod.expect("a pod")).clone();
    pod.spec.as_mut().expect("a spec").node_name = Some("n7".into());
    let name = |index| format!("model-00-{index}-abcdefgh-0");
    let running = |index| stored(&pod, &name(index), &status);
    // As it comes back from its create; and this first, as with an operator that saw the fleet grow.
    let mut made = pod.clone();
    made.spec.as_mut().expect("a spec").node_name = None;
    let made = |index| earlier(stored(&made, &name(index), &json!({"phase": "Pending"})));
    let grown = World::new();
    let pods_grown = kept_after(&[&made, &running], |pod: Pod| grown.wrote_pod(pod));
    let pods = kept(running, |pod: Pod| world.wrote_pod(pod));
    let mut models = 0;
    for object in objects() {
        let of = |index| format!("model-{index:02}");
        let (kind, bytes) = match object {
            Object::ConfigMap(map) => (
                "config map",
                kept(
                    |index| stored(map, &format!("{}-abcdefgh", of(index)), &Value::Null),
                    |map: ConfigMap| world.wrote_config_map(map),
                ),
            ),
            Object::Service(service) => (
                "Service",
                kept(
                    |index| stored(service, &of(index), &json!({"loadBalancer": {}})),
                    |service: Service| world.wrote_service(service),
                ),
            ),
            Object::PodDisruptionBudget(budget) => (
                "budget",
                kept(
                    |index| {
                        stored(
                            budget,
                            &of(index),
                            &json!({
                        "currentHealthy": 10, "desiredHealthy": 9, "disruptionsAllowed": 1, "expectedPods": 10}),
                        )
                    },
                    |budget: PodDisruptionBudget| world.wrote_budget(budget),
                ),
            ),
            _ => continue,
        };
        println!("of a model its {kind}: {bytes} bytes");
        models += bytes;
    }
    let status = serde_json::to_value(&plan.status).expect("JSON");
    let new = |index| earlier(stored(&wish, &format!("model-{index:02}"), &Value::Null));
    let told = |index| stored(&wish, &format!("model-{index:02}"), &status);
    let wishes_grown = kept_after(&[&new, &told], |wish: ModelDeployment| {
        grown.wrote_deployment(wish);
    });
    let wishes = kept(told, |wish: ModelDeployment| world.wrote_deployment(wish));
    println!(
        "as it grew: a pod {pods_grown} (listed: {pods}), a ModelDeployment {wishes_grown} (listed: {wishes})"
    );
    models += wishes;
    let fleet = 1250 * nodes + 10_000 * pods + 1000 * models;
    println!("a node {nodes}, a pod {pods}, a model with its objects {models} bytes");
    println!(
        "1,250 nodes, 10,000 pods and 1,000 models: {:.1} MB",
        fleet as f64 / 1e6
    );
    // Measured: 1723, 425, 1103. As plain structures they were 3848, 1419, 12184.
    assert!(nodes < 1900 && pods < 480 && models < 1250);
    // Measured: 437 and 607, of a hundred; 437 and 1310 while what had grown was packed like what it had been.
    assert!(pods_grown < 480 && wishes_grown < 800);
}
