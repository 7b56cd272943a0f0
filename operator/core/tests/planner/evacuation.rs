//! Nodes that are being emptied: what answers there moves where there is room, without being missed, and stays where there is
//! none.

use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::Node;
use operator_core::{Plan, QuotaView};
use serde_json::{Value, json};

fn cordoned(name: &str) -> Node {
    with(h200x8(name), json!({"spec": {"unschedulable": true}}))
}

fn tainted(name: &str, key: &str) -> Node {
    let taint = json!({"key": key, "effect": "NoSchedule"});
    with(h200x8(name), json!({"spec": {"taints": [taint]}}))
}

/// One replica that fills node a.
fn on_a(spec: Value) -> Story {
    let running = story(r1(spec)).on([h200x8("a")]).running();
    assert_eq!(running.snapshot.pods[0].node.as_deref(), Some("a"));
    running
}

fn node_of(story: &Story, index: u32) -> String {
    let name = story.name_of(index);
    let mut pods = story.snapshot.pods.iter();
    let pod = pods.find(|pod| pod.name == name);
    pod.and_then(|pod| pod.node.clone()).unwrap()
}

fn quota(most: u32, used: u32) -> Arc<QuotaView> {
    let gpus = |count: u32| json!({"requests.nvidia.com/gpu": count.to_string()});
    let quota = serde_json::from_value(json!({
        "metadata": {"name": "gpus", "namespace": "default"},
        "spec": {"hard": gpus(most)},
        "status": {"hard": gpus(most), "used": gpus(used)},
    }));
    Arc::new(QuotaView::of(&quota.unwrap()).unwrap())
}

fn idle(story: Story, index: u32) -> Story {
    story.later(6).load(index, Default::default())
}

fn reasons(plan: &Plan) -> Vec<&str> {
    plan.events.iter().map(|event| event.reason).collect()
}

const NOTHING: [&str; 0] = [];

#[test]
fn a_replica_leaves_a_cordoned_node_when_its_successor_answers() {
    let story = on_a(json!({})).renewed(cordoned("a")).on([h200x8("b")]);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-1-0"]);
    let told = condition(&plan, "Progressing");
    assert_eq!((&*told.0, &*told.1), ("True", "Evacuating"));
    let pod = story.name_of(0);
    assert_eq!(
        told.2,
        format!("node a is cordoned; pod {pod} is replaced elsewhere")
    );
    assert!(reasons(&plan).contains(&"Evacuating"), "{plan}");
    // It answers all along, and nothing is wrong.
    assert_eq!(condition(&plan, "Ready").0, "True");
    assert_eq!(condition(&plan, "Planned").0, "True");
    assert_eq!(condition(&plan, "Degraded").0, "False");

    // The last place is taken now: that is no reason to think again.
    let story = story.after(&plan, starts).later(60);
    assert_eq!(node_of(&story, 1), "b");
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), NOTHING);
    assert_eq!(condition(&plan, "Progressing").1, "Evacuating");
    assert!(!reasons(&plan).contains(&"Evacuating"), "told once");

    let story = story.after(&plan, starts).replica(1, answers).later(1);
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["patch Pod r1-0-0 cachalot.dev/serving=false"]
    );
    let story = idle(story.after(&plan, answers), 0);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["delete Pod r1-0-0"]);
    let story = story.after(&plan, answers).swept().later(1);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), NOTHING);
    assert_eq!(condition(&plan, "Progressing").1, "RolloutComplete");
}

#[test]
fn without_a_place_elsewhere_it_stays_and_says_so() {
    let stays = |story: Story, obstacle: &str| {
        let plan = story.plan();
        assert_eq!(pod_actions(&plan), NOTHING);
        let (status, reason, message) = condition(&plan, "Progressing");
        assert_eq!((&*status, &*reason), ("False", "RolloutComplete"));
        let pod = story.name_of(0);
        let words = format!("pod {pod} stays, though node a is cordoned: ");
        assert!(
            message.contains(&words) && message.contains(obstacle),
            "{message}"
        );
        // All that was asked for answers and has its place.
        assert_eq!(condition(&plan, "Planned").0, "True");
        assert_eq!(condition(&plan, "Ready").0, "True");
        assert!(plan.wake_after.unwrap().as_secs() <= 30);
    };
    let alone = on_a(json!({})).renewed(cordoned("a"));
    stays(alone.clone(), "1 node: cordoned");
    stays(alone.clone().on([h200x8("b")]).taken("b", 1), "GPU");
    stays(alone.clone().on([cordoned("b")]), "2 nodes: cordoned");
    let mut full = alone.clone().on([h200x8("b")]);
    full.snapshot.quotas = vec![quota(8, 8)];
    stays(full, "ResourceQuota gpus allows 8 GPUs");
    // Nothing is to be told of one that does not answer: it may be evicted, and comes back elsewhere.
    let plan = alone.clone().replica(0, |pod| pod.ready = false).plan();
    assert_eq!(pod_actions(&plan), NOTHING);
    assert_eq!(condition(&plan, "Progressing").1, "ReplicasStarting");
    let loading = alone.on([h200x8("b")]).replica(0, |pod| pod.ready = false);
    assert_eq!(pod_actions(&loading.plan()), NOTHING);
}

#[test]
fn a_node_that_an_autoscaler_removes_is_left_unless_that_is_tolerated() {
    for key in ["ToBeDeletedByClusterAutoscaler", "karpenter.sh/disrupted"] {
        let plan = on_a(json!({}))
            .renewed(tainted("a", key))
            .on([h200x8("b")])
            .plan();
        assert_eq!(pod_actions(&plan), ["create Pod r1-1-0"], "{key}");
        let (_, reason, message) = condition(&plan, "Progressing");
        assert_eq!(reason, "Evacuating");
        assert!(
            message.starts_with(&format!("node a has the taint {key}; ")),
            "{message}"
        );
        let tolerant = json!({"placement": {"tolerations": [{"key": key, "operator": "Exists"}]}});
        let story = on_a(tolerant).renewed(tainted("a", key)).on([h200x8("b")]);
        assert_eq!(pod_actions(&story.plan()), NOTHING, "{key}");
    }
    // Other taints keep new pods away and say nothing about those that run.
    let story = on_a(json!({}))
        .renewed(tainted("a", "dedicated"))
        .on([h200x8("b")]);
    assert_eq!(pod_actions(&story.plan()), NOTHING);
}

#[test]
fn without_surge_one_at_a_time_is_missing_and_not_taken_back() {
    let spec = json!({"rollout": {"maxSurge": 0, "maxUnavailable": 1}});
    let story = on_a(spec).renewed(cordoned("a")).on([h200x8("b")]);
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["patch Pod r1-0-0 cachalot.dev/serving=false"]
    );
    let story = story.after(&plan, answers).later(1);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), NOTHING, "it drains");
    assert_eq!(condition(&plan, "Progressing").1, "ReplicasStarting");
    // The place is gone: better the old one than none.
    let back = story.clone().taken("b", 1).plan();
    assert_eq!(
        pod_actions(&back),
        ["patch Pod r1-0-0 cachalot.dev/serving=true"]
    );
    let story = idle(story, 0);
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["delete Pod r1-0-0", "create Pod r1-1-0"]
    );
    let story = story.after(&plan, answers).swept().later(1);
    assert_eq!(node_of(&story, 1), "b");
    assert_eq!(pod_actions(&story.plan()), NOTHING);
}

#[test]
fn as_many_move_at_once_as_surge_and_room_allow() {
    let two = json!({"replicas": 2, "rollout": {"maxSurge": 2}});
    let running = story(r1(two)).on([h200x8("a"), h200x8("b")]).running();
    let closed = running.renewed(cordoned("a")).renewed(cordoned("b"));
    let one = closed.clone().on([h200x8("c")]).plan();
    assert_eq!(pod_actions(&one), ["create Pod r1-2-0"]);
    assert_eq!(condition(&one, "Planned").0, "True");
    let both = closed.on([h200x8("c"), h200x8("d")]).plan();
    assert_eq!(
        pod_actions(&both),
        ["create Pod r1-2-0", "create Pod r1-3-0"]
    );
    let message = condition(&both, "Progressing").2;
    assert!(message.ends_with(", and 1 more"), "{message}");
}

#[test]
fn one_after_the_other_moves_where_surge_allows_no_more() {
    let running = story(r1(json!({"replicas": 2})))
        .on([h200x8("a"), h200x8("b")])
        .running();
    let closed = running.renewed(cordoned("a")).renewed(cordoned("b"));
    let story = closed.on(["c", "d"].map(h200x8));
    let first = story.plan();
    assert_eq!(pod_actions(&first), ["create Pod r1-2-0"]);
    let second = story.after(&first, starts).later(1).plan();
    for plan in [first, second] {
        let message = condition(&plan, "Progressing").2;
        assert!(message.ends_with("is replaced elsewhere"), "{message}");
    }
}

/// The old replica that a rollout has yet to replace came for nobody, and its place is not free yet.
#[test]
fn in_a_rollout_nobody_moves_who_has_no_place() {
    let spec = json!({"replicas": 2});
    let running = story(r1(spec)).on(["a", "b", "c"].map(h200x8)).running();
    let story = running.edited(json!({"context": {"maxTokens": 8192}}));
    let story = story.after(&story.plan(), answers).later(1);
    let new = story
        .snapshot
        .pods
        .iter()
        .max_by_key(|pod| pod.created)
        .unwrap();
    let place = new.node.clone().unwrap();
    let name = new.name.clone();
    let closed = story.renewed(cordoned(&place));
    let plan = closed.plan();
    assert!(
        !plan.actions.iter().any(|it| it.to_string().contains(&name)),
        "{plan}"
    );
    assert_ne!(condition(&plan, "Progressing").1, "Evacuating");
}

#[test]
fn gpus_at_fault_are_the_better_reason() {
    let taint = json!({"key": "nvidia.com/gpu-xid-error", "value": "79", "effect": "NoSchedule"});
    let both = with(cordoned("a"), json!({"spec": {"taints": [taint]}}));
    let plan = on_a(json!({})).renewed(both).plan();
    assert_eq!(condition(&plan, "Degraded").1, "GpuFault");
    let message = condition(&plan, "Progressing").2;
    assert!(!message.contains("stays"), "{message}");
}

#[test]
fn an_opened_node_keeps_its_replica() {
    let story = on_a(json!({})).renewed(cordoned("a")).on([h200x8("b")]);
    let story = story.after(&story.plan(), starts).later(1);
    let opened = story.renewed(h200x8("a"));
    assert_eq!(pod_actions(&opened.plan()), ["delete Pod r1-1-0"]);
}

#[test]
fn a_group_leaves_whole() {
    let spec = json!({"parallelism": {"tensor": 16, "expert": 16}});
    let running = story(r1(spec)).on(["a", "b"].map(h200x8)).running();
    let closed = running.renewed(cordoned("b"));
    assert_eq!(
        pod_actions(&closed.clone().on([h200x8("c")]).plan()),
        NOTHING
    );
    let story = closed.on(["c", "d"].map(h200x8));
    let plan = story.plan();
    assert_eq!(plan.actions.len(), 2, "{plan}");
    let story = story.after(&plan, answers).later(1);
    let plan = story.plan();
    assert_eq!(
        plan.actions.len(),
        1,
        "its first rank takes the requests: {plan}"
    );
    assert_eq!(
        plan.events
            .iter()
            .filter(|it| it.reason == "ReplicasDraining")
            .count(),
        1
    );
}

#[test]
fn off_spot_nodes_stays_off_spot_nodes() {
    let label = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    let spot = with(h200x8("b"), label);
    let floor = json!({"placement": {"spot": {"onDemandMin": 1}}});
    let story = on_a(floor).renewed(cordoned("a")).on([spot.clone()]);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), NOTHING);
    assert_eq!(condition(&plan, "Planned").0, "True");
    assert_eq!(
        pod_actions(&story.on([h200x8("c")]).plan()),
        ["create Pod r1-1-0"]
    );
    // Without a floor one is as good as the other.
    let story = on_a(json!({})).renewed(cordoned("a")).on([spot]);
    assert_eq!(pod_actions(&story.plan()), ["create Pod r1-1-0"]);
}

#[test]
fn a_quota_has_room_for_as_many_as_move_at_once() {
    let two = json!({"replicas": 2, "rollout": {"maxSurge": 2}});
    let running = story(r1(two)).on([h200x8("a"), h200x8("b")]).running();
    let mut story = running
        .renewed(cordoned("a"))
        .renewed(cordoned("b"))
        .on(["c", "d"].map(h200x8));
    story.snapshot.quotas = vec![quota(24, 16)];
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-2-0"]);
    assert_eq!(condition(&plan, "Planned").0, "True");
}

#[test]
fn while_one_is_missing_nobody_moves() {
    let two = json!({"replicas": 2});
    let running = story(r1(two)).on([h200x8("a"), h200x8("b")]).running();
    let mut story = running.renewed(cordoned("a")).on([h200x8("c")]);
    let on_b = story
        .snapshot
        .pods
        .iter()
        .find(|pod| pod.node.as_deref() == Some("b"));
    let gone = on_b.unwrap().name.clone();
    story.pod(&gone, |pod| pod.deleting = true);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan).len(), 1, "{plan}");
    assert_ne!(condition(&plan, "Progressing").1, "Evacuating");
}
