//! What the watches count and whom they wake, from lists and events of an API server.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Value, json};

use super::*;
use crate::standin::{Answer, Asked, Log, api_server, list};

/// An API server's objects by plural, and what its watches have not told yet.
#[derive(Default)]
struct Cluster {
    objects: HashMap<&'static str, Vec<Value>>,
    news: HashMap<String, Vec<Value>>,
    version: u64,
    /// A kind whose list never comes.
    silent: &'static str,
}

struct Following {
    world: Arc<World>,
    cluster: Arc<Mutex<Cluster>>,
    log: Arc<Log>,
    _tasks: JoinSet<()>,
}

/// Pods are watched twice: ours, and those of others.
fn kind_of(asked: &Asked) -> String {
    let plural = asked.path.rsplit('/').next().unwrap_or_default();
    match plural {
        "pods" if asked.query.contains("fieldSelector") => "others".into(),
        other => other.into(),
    }
}

impl Following {
    async fn of(cluster: Cluster, namespace: Option<&str>) -> Self {
        let cluster = Arc::new(Mutex::new(cluster));
        let kept = Arc::clone(&cluster);
        let (client, log) = api_server(move |_, asked| {
            let mut cluster = lock(&kept);
            let kind = kind_of(asked);
            if !asked.query.contains("watch=true") {
                if kind == cluster.silent {
                    return Answer::Silence;
                }
                let none = Vec::new();
                return list("1", "", cluster.objects.get(&*kind).unwrap_or(&none));
            }
            let news = cluster.news.remove(&kind).unwrap_or_default();
            Answer::Late(
                Duration::from_millis(100),
                Box::new(Answer::Says(200, news)),
            )
        });
        let world = World::new();
        let mut tasks = JoinSet::new();
        world.follow(&mut tasks, &client, namespace);
        world.follow_claims(&mut tasks, &client, namespace);
        let following = Following {
            world,
            cluster,
            log,
            _tasks: tasks,
        };
        following.pass().await;
        following
    }

    async fn pass(&self) {
        tokio::time::sleep(Duration::from_secs(1)).await;
    }

    /// The names of those who are woken by news.
    async fn woken(&self, kind: &str, event: &str, mut object: Value) -> Vec<String> {
        self.world.take_woken();
        {
            let mut cluster = lock(&self.cluster);
            cluster.version += 1;
            object["metadata"]["resourceVersion"] = json!((100 + cluster.version).to_string());
            let news = cluster.news.entry(kind.to_owned()).or_default();
            news.push(json!({"type": event, "object": object}));
        }
        self.pass().await;
        let woken = self.world.take_woken();
        woken.into_iter().map(|key| key.name.to_string()).collect()
    }
}

fn named(name: &str) -> Value {
    json!({"name": name, "namespace": "d", "uid": "u", "resourceVersion": "1"})
}

fn child(name: &str, deployment: &str) -> Value {
    let mut metadata = named(name);
    metadata["labels"] = json!({
        "app.kubernetes.io/managed-by": "cachalot", "cachalot.dev/model-deployment": deployment});
    metadata
}

fn wish(name: &str, replicas: u32) -> Value {
    json!({"apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment", "metadata": named(name),
        "spec": {"model": {"source": "hf://a/b"}, "replicas": replicas}})
}

fn pod(metadata: Value, gpus: u32, phase: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "status": {"phase": phase},
        "spec": {"nodeName": "n1", "containers": [
            {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": gpus.to_string()}}}]}})
}

fn node(gpus: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "resourceVersion": "1"},
        "status": {"allocatable": {"nvidia.com/gpu": gpus.to_string()}}})
}

fn quota(namespace: &str, most: u32) -> Value {
    json!({"apiVersion": "v1", "kind": "ResourceQuota",
        "metadata": {"name": "q", "namespace": namespace, "resourceVersion": "1"},
        "spec": {"hard": {"requests.nvidia.com/gpu": most.to_string()}}})
}

/// A model `m` with a pod on node `n1`, a model `hungry` that waits for room, and a pod of someone else on that node.
fn cluster() -> Cluster {
    Cluster {
        objects: HashMap::from([
            ("modeldeployments", vec![wish("hungry", 1), wish("m", 1)]),
            ("pods", vec![pod(child("m-0-abc-0", "m"), 2, "Running")]),
            ("others", vec![pod(named("x"), 3, "Running")]),
            ("nodes", vec![node(8)]),
            ("resourcequotas", vec![quota("d", 4), quota("e", 4)]),
        ]),
        ..Cluster::default()
    }
}

async fn following() -> Following {
    let following = Following::of(cluster(), None).await;
    following
        .world
        .waits_for_room(&Key::new("d", "hungry"), true);
    following
}

#[tokio::test(start_paused = true)]
async fn nobody_plans_before_every_list_is_complete() {
    let silent = Cluster {
        silent: "resourcequotas",
        ..cluster()
    };
    let following = Following::of(silent, None).await;
    assert_eq!(following.world.waiting_for(), ["ResourceQuota"]);
    // Preemption and claims are for those who ask for them.
    for silent in ["priorityclasses", "resourceslices"] {
        let silent = Cluster {
            silent,
            ..cluster()
        };
        let following = Following::of(silent, None).await;
        assert!(following.world.waiting_for().is_empty());
    }
}

#[tokio::test(start_paused = true)]
async fn everyone_is_woken_at_once_when_the_first_list_names_them() {
    let following = Following::of(cluster(), None).await;
    let woken = following.world.take_woken();
    assert_eq!(woken.len(), 2, "{woken:?}");
    let wakes = tokio::time::timeout(Duration::from_secs(1), following.world.woken());
    assert!(wakes.await.is_ok(), "and the controller is told");
}

#[tokio::test(start_paused = true)]
async fn what_happens_to_a_child_wakes_its_owner_and_no_other() {
    let following = following().await;
    let plain =
        |kind: &str, metadata| json!({"apiVersion": "v1", "kind": kind, "metadata": metadata});
    for (kind, object) in [
        ("modeldeployments", wish("m", 2)),
        ("pods", pod(child("m-0-abc-0", "m"), 2, "Pending")),
        ("configmaps", plain("ConfigMap", child("m-abc", "m"))),
        ("services", plain("Service", child("m", "m"))),
        ("services", plain("Service", child("m-ranks", "m"))),
        (
            "poddisruptionbudgets",
            plain("PodDisruptionBudget", child("m", "m")),
        ),
    ] {
        let woken = following.woken(kind, "MODIFIED", object.clone()).await;
        assert_eq!(woken, ["m"], "{kind}");
        let woken = following.woken(kind, "MODIFIED", object).await;
        assert!(woken.is_empty(), "{kind}: told again, nothing is new");
    }
}

#[tokio::test(start_paused = true)]
async fn room_wakes_those_who_wait_for_it() {
    let following = following().await;
    let class = json!({"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 5,
        "metadata": {"name": "high", "resourceVersion": "1"}});
    let slice = json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
        "metadata": {"name": "s", "resourceVersion": "1"},
        "spec": {"driver": "gpu.nvidia.com", "nodeName": "n1",
            "pool": {"name": "n1", "generation": 1, "resourceSliceCount": 1}}});
    let finished = pod(child("m-0-abc-0", "m"), 2, "Succeeded");
    for (kind, event, object, wakes) in [
        ("nodes", "MODIFIED", node(16), &["hungry", "m"][..]),
        ("resourcequotas", "MODIFIED", quota("d", 9), &["hungry"]),
        ("priorityclasses", "ADDED", class, &["hungry"]),
        ("resourceslices", "ADDED", slice, &["hungry"]),
        ("pods", "MODIFIED", finished, &["hungry", "m"]),
        (
            "others",
            "DELETED",
            pod(named("x"), 3, "Running"),
            &["hungry"],
        ),
    ] {
        assert_eq!(following.woken(kind, event, object).await, wakes, "{kind}");
    }
    following
        .world
        .waits_for_room(&Key::new("d", "hungry"), false);
    assert_eq!(following.woken("nodes", "MODIFIED", node(8)).await, ["m"]);
}

#[tokio::test(start_paused = true)]
async fn each_pod_is_counted_where_it_is_as_long_as_it_takes_something() {
    let following = following().await;
    let used = || following.world.used_gpus("n1");
    assert_eq!(used(), 5);
    following
        .woken(
            "pods",
            "MODIFIED",
            pod(child("m-0-abc-0", "m"), 2, "Failed"),
        )
        .await;
    assert_eq!(used(), 3);
    following
        .woken("pods", "ADDED", pod(child("m-1-abc-0", "m"), 4, "Pending"))
        .await;
    assert_eq!(used(), 7);
    following
        .woken("others", "DELETED", pod(named("x"), 3, "Running"))
        .await;
    assert_eq!(used(), 4);
    let nodes = || following.world.cluster().nodes.len();
    assert_eq!(nodes(), 1);
    following.woken("nodes", "DELETED", node(8)).await;
    assert_eq!(nodes(), 0);
}

#[tokio::test(start_paused = true)]
async fn no_more_is_asked_for_than_is_needed() {
    for namespace in [None, Some("d")] {
        let following = Following::of(cluster(), namespace).await;
        let asked = following.log.all();
        let of = |kind: &str| {
            let asked = asked.iter().find(|asked| kind_of(asked) == kind);
            asked.expect("it was asked for")
        };
        let ours = "labelSelector=app.kubernetes.io%2Fmanaged-by%3Dcachalot%2Ccachalot.dev%2Fmodel-deployment";
        for kind in ["pods", "configmaps", "resourceclaimtemplates"] {
            assert!(of(kind).query.contains(ours), "{}", of(kind).query);
            assert_eq!(
                of(kind).path.contains("/namespaces/d/"),
                namespace.is_some()
            );
        }
        let others = of("others");
        assert!(
            others.query.contains("spec.nodeName%21%3D"),
            "{}",
            others.query
        );
        let not_ours = others.query.contains("managed-by%21%3Dcachalot");
        // Pods of another operator, in a namespace that is not ours, take what they take.
        assert_eq!(
            (not_ours, others.path.as_str()),
            (namespace.is_none(), "/api/v1/pods")
        );
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_has_the_children_and_quotas_of_one_model() {
    let mut cluster = cluster();
    let mut elsewhere = pod(child("m-0-abc-0", "m"), 1, "Running");
    elsewhere["metadata"]["namespace"] = json!("e");
    let pods = vec![
        pod(child("m-0-abc-0", "m"), 2, "Running"),
        pod(child("m-big-0-abc-0", "m-big"), 1, "Running"),
        elsewhere,
    ];
    cluster.objects.insert("pods", pods);
    let following = Following::of(cluster, None).await;
    let key = Key::new("d", "m");
    let wish = following.world.deployment(&key).expect("it is there");
    let wish = wish.expect("it parses");
    let seen = Observations::default();
    let snapshot = following.world.snapshot(&key, wish, seen, crate::now());
    assert_eq!(snapshot.pods.len(), 1);
    assert_eq!(snapshot.quotas.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_has_the_sick_gpus_that_others_remember() {
    let sick = |name: &str, uuid: &str| {
        let mut wish = wish(name, 1);
        wish["status"] = json!({"gpuFaults": [{"node": "n1", "nodeUid": "u", "bootId": "b", "uuid": uuid,
            "error": "e", "pod": "p", "since": "2026-11-24T12:00:00Z"}]});
        wish
    };
    let mut cluster = cluster();
    let wishes = vec![sick("hungry", "GPU-1"), sick("m", "GPU-2")];
    cluster.objects.insert("modeldeployments", wishes);
    let following = Following::of(cluster, None).await;
    let told = || {
        let key = Key::new("d", "m");
        let wish = following.world.deployment(&key).expect("it is there");
        let wish = wish.expect("it parses");
        let seen = Observations::default();
        let snapshot = following.world.snapshot(&key, wish, seen, crate::now());
        let faults = snapshot.gpu_faults.into_iter();
        faults.map(|fault| fault.uuid).collect::<Vec<_>>()
    };
    assert_eq!(told(), ["GPU-1"]);
    let healed = wish("hungry", 1);
    following
        .woken("modeldeployments", "MODIFIED", healed)
        .await;
    assert_eq!(told(), [""; 0]);
}

#[tokio::test(start_paused = true)]
async fn claims_are_known_when_all_three_lists_are() {
    let mut silent = Vec::new();
    for (plural, kind) in [
        ("resourceslices", "ResourceSlice"),
        ("resourceclaims", "ResourceClaim"),
        ("resourceclaimtemplates", "ResourceClaimTemplate"),
    ] {
        let silent_cluster = Cluster {
            silent: plural,
            ..cluster()
        };
        let following = Following::of(silent_cluster, None).await;
        silent.push((format!("{:?}", following.world.claims.news()), kind));
    }
    for (news, kind) in silent {
        assert!(news.contains("Unread") && news.contains(kind), "{news}");
    }
    let following = Following::of(cluster(), None).await;
    assert_eq!(format!("{:?}", following.world.claims.news()), "Known");
}

#[tokio::test(start_paused = true)]
async fn gpus_that_claims_may_ask_for_come_and_go_with_their_slices() {
    let following = following().await;
    let slice = json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice",
        "metadata": {"name": "s", "resourceVersion": "1"},
        "spec": {"driver": "gpu.nvidia.com", "nodeName": "n1",
            "pool": {"name": "n1", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "capacity": {"memory": {"value": "80Gi"}},
                "attributes": {"type": {"string": "gpu"}, "productName": {"string": "NVIDIA H100"}}}]}});
    let claim = json!({"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": named("c"), "spec": {},
        "status": {"allocation": {"devices": {"results": [
            {"request": "r", "driver": "gpu.nvidia.com", "pool": "n1", "device": "gpu-0"}]}}}});
    let seen = || {
        let cluster = following.world.cluster();
        let known = format!("{:?}", cluster.claims);
        let used = cluster.used.get("n1").map_or(0, |used| used.claimed);
        (known, cluster.nodes["n1"].allocatable.claimed, used)
    };
    assert_eq!(seen(), ("Known".into(), 0, 0));
    following
        .woken("resourceslices", "ADDED", slice.clone())
        .await;
    assert_eq!(seen(), ("Known".into(), 1, 0));
    following.woken("resourceclaims", "ADDED", claim).await;
    assert_eq!(seen(), ("Known".into(), 1, 1));
    // What the node says of itself does not make them forgotten.
    following.woken("nodes", "MODIFIED", node(16)).await;
    assert_eq!(seen(), ("Known".into(), 1, 1));
    following.woken("resourceslices", "DELETED", slice).await;
    assert_eq!(seen(), ("Known".into(), 0, 0));
}

#[test]
fn an_answer_to_a_write_that_tells_more_wakes_whom_the_watch_would() {
    let world = World::new();
    let (m, hungry) = (Key::new("d", "m"), Key::new("d", "hungry"));
    let read = |value: Value| serde_json::from_value::<Pod>(value).expect("a pod");
    let name = || child("m-0-abc-0", "m");
    world.waits_for_room(&hungry, true);
    world.wrote_pod(read(pod(name(), 2, "Running")));
    assert!(world.take_woken().is_empty(), "what we made we know");
    let mut labelled = name();
    labelled["labels"]["a"] = json!("b");
    world.wrote_pod(read(pod(labelled.clone(), 2, "Running")));
    assert!(world.take_woken().is_empty(), "what we patched we know");
    world.wrote_pod(read(pod(labelled, 2, "Failed")));
    assert_eq!(world.take_woken(), BTreeSet::from([hungry, m]));
}

#[test]
fn a_node_that_is_read_because_it_was_silent_wakes_those_who_wait_for_room() {
    let world = World::new();
    let hungry = Key::new("d", "hungry");
    let read = |ready: &str| -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n1"},
            "status": {"conditions": [{"type": "Ready", "status": ready}]}}))
        .expect("a node")
    };
    world.read_node(read("Unknown"));
    world.waits_for_room(&hungry, true);
    world.take_woken();
    world.read_node(read("Unknown"));
    assert!(world.take_woken().is_empty());
    world.read_node(read("True"));
    assert_eq!(world.take_woken(), BTreeSet::from([hungry]));
}

#[test]
fn a_spec_that_comes_with_the_answer_to_a_status_is_looked_at() {
    let world = World::new();
    let read = |value: Value| serde_json::from_value(value).expect("a wish");
    world.wrote_deployment(read(wish("m", 1)));
    world.take_woken();
    let mut reported = wish("m", 1);
    reported["status"] = json!({"observedGeneration": 1});
    reported["metadata"]["resourceVersion"] = json!("2");
    world.wrote_deployment(read(reported));
    assert!(world.take_woken().is_empty(), "our own status is no news");
    let mut edited = wish("m", 2);
    edited["status"] = json!({"observedGeneration": 1});
    edited["metadata"]["resourceVersion"] = json!("4");
    world.wrote_deployment(read(edited));
    assert_eq!(world.take_woken(), BTreeSet::from([Key::new("d", "m")]));
}

#[test]
fn what_is_counted_is_what_is_in_the_mirror_and_not_what_a_slow_thread_saw() {
    let world = World::new();
    let read = |value: Value| serde_json::from_value::<Pod>(value).expect("a pod");
    let old = read(pod(child("m-0-abc-0", "m"), 2, "Running"));
    let key = Key::new("d", "m-0-abc-0");
    let seen = child_pod(old).expect("a pod").map(|pod| Ok(Arc::new(pod)));
    world.wrote_pod(read(pod(child("m-0-abc-0", "m"), 2, "Failed")));
    assert_eq!(world.used_gpus("n1"), 0);
    // The watch had put the older one, and comes to count it only now.
    world.pod_changed(Change {
        key: &key,
        before: None,
        after: seen.as_ref(),
    });
    assert_eq!(world.used_gpus("n1"), 0);
}
