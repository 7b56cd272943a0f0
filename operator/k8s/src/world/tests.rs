//! What is counted and who is woken, change by change.

use super::*;
use operator_core::PodView;

fn pod(name: &str, deployment: &str, node: &str, gpus: &str) -> Pod {
    serde_json::from_value(serde_json::json!({
        "metadata": {"name": name, "namespace": "d", "labels": {
            "app.kubernetes.io/managed-by": "cachalot", "cachalot.dev/model-deployment": deployment}},
        "spec": {"nodeName": node, "containers": [{"name": "engine", "resources": {"requests": {"nvidia.com/gpu": gpus}}}]},
    }))
    .expect("a pod")
}

impl World {
    /// GPUs of a node that are counted as taken.
    pub(crate) fn used_gpus(&self, node: &str) -> u64 {
        let used = &lock(&self.ledger).cluster.used;
        used.get(node).map_or(0, |used| used.gpus)
    }
}

#[test]
fn a_deployment_is_kept_whole_and_what_others_ask_of_it_lies_open() {
    let world = World::new();
    let mut wish: ModelDeployment = serde_json::from_value(serde_json::json!({
        "apiVersion": "cachalot.dev/v1alpha1", "kind": "ModelDeployment",
        "metadata": {"name": "m", "namespace": "d", "uid": "u", "generation": 3, "resourceVersion": "7",
            "creationTimestamp": "2026-11-24T00:00:00Z", "annotations": {"team": "a"},
            "managedFields": [{"manager": "kubectl"}]},
        "spec": {"model": {"source": "hf://a/b"}, "replicas": 4, "rollout": {"maxUnavailable": 1}},
        "status": {"observedGeneration": 3, "conditions": [{"type": "Planned", "status": "True", "reason": "Fits",
            "message": "", "observedGeneration": 3, "lastTransitionTime": "2026-11-24T00:00:00Z"}]},
    }))
    .expect("a ModelDeployment");
    world.wrote_deployment(wish.clone());
    let key = Key::new("d", "m");
    wish.metadata.managed_fields = None;
    wish.metadata.resource_version = None;
    let json = |wish: &ModelDeployment| serde_json::to_value(wish).expect("JSON");
    let kept = world.deployment(&key).expect("it is known");
    assert_eq!(json(&kept.expect("it parses")), json(&wish));
    let open = world.deployments.get(&key).expect("it is known");
    let open = open.expect("it parses");
    assert_eq!((open.scales, open.floor), (false, 3));
    assert!(world.deployment(&Key::new("d", "n")).is_none());
}

#[test]
fn the_ledger_counts_each_pod_once_however_it_hears_of_it() {
    let world = World::new();
    let key = Key::new("d", "m-0");
    world.assume("d", &pod("m-0", "m", "n1", "8"));
    assert_eq!(world.used_gpus("n1"), 8);
    world.wrote_pod(pod("m-0", "m", "n1", "8"));
    let child = child_pod(pod("m-0", "m", "n1", "8"))
        .expect("a pod")
        .map(|child| Ok(Arc::new(child)));
    world.pod_changed(Change {
        key: &key,
        before: None,
        after: child.as_ref(),
    });
    assert_eq!(world.used_gpus("n1"), 8);
    world.pods.forget_all();
    world.pod_changed(Change {
        key: &key,
        before: child.as_ref(),
        after: None,
    });
    assert_eq!(world.used_gpus("n1"), 0);
}

#[test]
fn what_was_assumed_for_a_pod_that_was_not_made_is_given_back() {
    let world = World::new();
    world.assume("d", &pod("m-0", "m", "n1", "8"));
    world.unassume("d", "m-0");
    assert_eq!(world.used_gpus("n1"), 0);
}

#[test]
fn a_pod_is_kept_as_it_was_and_what_is_asked_of_all_pods_lies_open() {
    let told = serde_json::json!({
        "metadata": {"name": "m-0-abc-0", "namespace": "d", "uid": "u", "creationTimestamp": "2026-11-24T00:00:00Z",
            "labels": {names::MODEL_DEPLOYMENT: "m", names::COMPONENT: names::ENGINE},
            "annotations": {names::DRAIN_SINCE: "2026-11-24T00:00:00Z", names::PLANNED_NODES: "n1,n2"}},
        "spec": {"nodeName": "n1", "priority": -7, "containers": [{"name": "engine",
            "resources": {"requests": {"cpu": "1500m", "nvidia.com/gpu": "2", "nvidia.com/mig-3g.71gb": "1"}}}]},
        "status": {"phase": "Running", "podIP": "fd00::1", "reason": "R", "message": "M", "conditions": [
                {"type": "PodScheduled", "status": "False", "message": "0/3 nodes",
                    "lastTransitionTime": "2026-11-24T00:00:01Z"}],
            "containerStatuses": [{"name": "engine", "image": "i", "imageID": "i", "ready": false, "restartCount": 3,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
                "lastState": {"terminated": {"exitCode": 137, "reason": "OOMKilled",
                    "finishedAt": "2026-11-24T00:00:02Z"}}}]},
    });
    let pod: Pod = serde_json::from_value(told).expect("a pod");
    let view = PodView::of(&pod);
    let world = World::new();
    world.wrote_pod(pod);
    let kept = world.pods.get(&Key::new("d", "m-0-abc-0"));
    let kept = kept.and_then(Result::ok).expect("it is ours");
    assert_eq!(kept.view(), Some(view));
    assert!(kept.drains && kept.is_asked && !kept.reserves);
    assert_eq!((kept.priority, kept.node.as_deref()), (-7, Some("n1")));
}

#[test]
fn children_are_those_of_the_name_and_not_of_a_longer_name() {
    let world = World::new();
    for (name, deployment) in [
        ("m-0-abc-0", "m"),
        ("m-big-0-abc-0", "m-big"),
        ("other-0", "other"),
        ("m", "m"),
    ] {
        world.wrote_pod(pod(name, deployment, "n1", "1"));
    }
    let found = children(&world.pods, &Key::new("d", "m"), |_, pod| {
        let view = pod.view()?;
        (view.label(names::MODEL_DEPLOYMENT) == "m").then_some(view.name)
    });
    assert_eq!(found, ["m-0-abc-0"]);
}

#[test]
fn room_wakes_those_who_wait_for_it_and_no_others() {
    let world = World::new();
    let (waiting, content) = (Key::new("d", "waiting"), Key::new("d", "content"));
    world.waits_for_room(&waiting, true);
    world.waits_for_room(&content, false);
    world.node_changed(Change {
        key: &Key::new("", "n1"),
        before: None,
        after: None,
    });
    assert_eq!(world.take_woken(), BTreeSet::from([waiting]));
    assert!(world.take_woken().is_empty());
}

#[test]
fn pods_of_others_count_and_ours_are_left_to_their_own_watch() {
    let foreign: Pod = serde_json::from_value(serde_json::json!({
        "metadata": {"name": "x", "namespace": "d"}, "spec": {"nodeName": "n1", "containers": []}}))
    .expect("a pod");
    assert!(other_claim(&foreign, None).is_some());
    let ours = pod("m-0", "m", "n1", "1");
    assert!(other_claim(&ours, None).is_none());
    assert!(other_claim(&ours, Some("d")).is_none());
    // Another operator's, in a namespace that is not ours.
    assert!(other_claim(&ours, Some("e")).is_some());
}
