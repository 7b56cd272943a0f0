//! Rules that matter together only: what is taken back while others start, whose place is taken, what stays off spot.
//!
//! As in `edges`, no other test saw these broken.

use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::{Node, Pod};
use operator_core::snapshot::PodView;
use operator_core::{Action, Contest, Object, Plan, PriorityClassView, Rival, names};
use serde_json::{Value, json};

fn on_processors(spec: Value) -> Story {
    story(deployment("m", spec))
        .on([node("a", "8", "16Gi"), node("b", "8", "16Gi")])
        .inspected()
}

fn nothing() -> Vec<String> {
    Vec::new()
}

fn first_nodes(plan: &Plan) -> Vec<String> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    });
    pods.map(|pod| operator_core::objects::preferred_nodes(pod)[0].clone())
        .collect()
}

/// The replica is of a revision that nobody asks for.
fn of_another(pod: &mut PodView) {
    pod.labels.insert(names::REVISION, "0ldrev1s".into());
}

/// An engine pod of another ModelDeployment, of no priority, on node `a`, changed by a patch.
fn other(patch: Value) -> Rival {
    let pod = json!({
        "metadata": {"name": "other-0", "uid": "v",
            "labels": {names::MODEL_DEPLOYMENT: "other", names::COMPONENT: names::ENGINE}},
        "spec": {"nodeName": "a", "priority": 0, "containers": [
            {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": "8"}}}]},
    });
    let pod: Pod = serde_json::from_value(with(pod, patch)).unwrap();
    Rival::of("d".into(), Arc::new(PodView::of(&pod)))
}

/// One that holds a place on `node` until the pod `uid` of `owner` has left.
fn reservation(owner: &str, uid: &str, node: &str, priority: i32) -> Rival {
    other(json!({
        "metadata": {"name": "claimant-0", "uid": "c", "labels": {names::MODEL_DEPLOYMENT: "claimant"},
            "annotations": {names::PREEMPTS: format!("{owner}/{uid}"), names::PLANNED_NODES: node}},
        "spec": {"nodeName": null, "priority": priority},
    }))
}

/// Who else wants the nodes, for a deployment of a priority of 1000.
fn contested(mut story: Story, rivals: Vec<Rival>) -> Story {
    let high = json!({"metadata": {"name": "high"}, "value": 1000});
    let high = PriorityClassView::of(&serde_json::from_value(high).unwrap());
    let metadata = &story.snapshot.deployment.metadata;
    let own = ("default", metadata.name.as_deref().unwrap());
    let class = story
        .snapshot
        .deployment
        .spec
        .placement
        .priority_class_name
        .clone();
    let classes = vec![Arc::new(high)];
    story.snapshot.contest = Contest::of(own, class.as_deref(), classes, rivals, |_| 0);
    story
}

#[test]
fn one_that_is_taken_back_is_not_made_anew_within_the_surge() {
    let story = on_processors(json!({"replicas": 4, "rollout": {"maxSurge": 2}})).running();
    let story = story.edited(json!({"replicas": 2}));
    let story = story.after(&story.plan(), |_| ());
    let back = story.replica(3, of_another).edited(json!({"replicas": 3}));
    assert_eq!(
        pod_actions(&back.plan()),
        ["patch Pod m-2-0 cachalot.dev/serving=true"]
    );
}

#[test]
fn one_that_is_taken_back_counts_among_those_that_are_there() {
    let story = on_processors(json!({"replicas": 4})).running();
    let story = story.edited(json!({"replicas": 3}));
    let story = story.after(&story.plan(), |_| ());
    let two_are_old = story.replica(0, of_another).replica(1, of_another);
    assert_eq!(
        pod_actions(&two_are_old.plan()),
        ["patch Pod m-3-0 cachalot.dev/serving=true"]
    );
}

/// Neither taken back nor replaced beyond the wanted number: it leaves, and then another one starts.
#[test]
fn one_that_gives_way_drains_to_its_end_and_is_replaced_then() {
    let story = on_processors(json!({"replicas": 1})).running();
    let pod = story.name_of(0);
    let uid = format!("uid-{pod}");
    let claimed = contested(story, vec![reservation("default/m", &uid, "a", 1000)]);
    let plan = claimed.plan();
    assert_eq!(
        pod_actions(&plan),
        ["patch Pod m-0-0 cachalot.dev/serving=false"]
    );
    let draining = claimed.after(&plan, |_| ()).later(1);
    assert_eq!(pod_actions(&draining.plan()), nothing());
    let mut gone = draining;
    gone.snapshot.pods.retain(|other| other.name != pod);
    assert_eq!(pod_actions(&gone.plan()), ["create Pod m-0-0"]);
}

/// Someone gave all three the same index.
#[test]
fn successors_and_new_replicas_get_an_index_each() {
    let story = on_processors(json!({"replicas": 3})).running();
    let at = story.snapshot.now;
    let meddled = |pod: &mut PodView| {
        fails(pod, at);
        pod.labels.insert(names::REPLICA, "0".into());
    };
    let story = story.replica(1, meddled).replica(2, meddled).later(5);
    let plan = story.edited(json!({"replicas": 4})).plan();
    let mut created = pod_actions(&plan);
    created.retain(|action| action.starts_with("create"));
    assert_eq!(
        created,
        ["create Pod m-1-1", "create Pod m-2-1", "create Pod m-3-0"]
    );
}

/// A replica that waits for another one to leave node `a`, and what it waits for.
fn waiting() -> Story {
    let spec = json!({"replicas": 1, "placement": {"priorityClassName": "high"}});
    let story = story(r1(spec)).on([h200x8("a")]).taken("a", 8);
    let story = contested(story, vec![other(json!({}))]);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-0-0"]);
    story.after(&plan, |pod| pod.node = None)
}

#[test]
fn one_that_gets_its_place_and_is_not_wanted_any_more_is_only_removed() {
    let waiting = waiting();
    let mut freed = story((*waiting.snapshot.deployment).clone()).on([h200x8("a")]);
    let cluster = freed.snapshot.cluster.clone();
    freed.snapshot = waiting.snapshot;
    freed.snapshot.cluster = cluster;
    let pods = |story: &Story| {
        let mut all = actions(&story.plan());
        all.retain(|action| action.contains(" Pod "));
        all
    };
    let name = freed.name_of(0);
    assert_eq!(pods(&freed), [format!("release Pod {name}")]);
    let unwanted = freed.edited(json!({"replicas": 0}));
    assert_eq!(pods(&unwanted), [format!("delete Pod {name}")]);
}

#[test]
fn a_place_on_a_node_that_is_cordoned_meanwhile_is_given_up() {
    let cordoned = with(h200x8("a"), json!({"spec": {"unschedulable": true}}));
    assert_eq!(pod_actions(&waiting().plan()), nothing());
    assert_eq!(
        pod_actions(&waiting().on([cordoned]).plan()),
        ["delete Pod r1-0-0"]
    );
}

#[test]
fn a_replica_that_failed_three_times_takes_nobodys_place() {
    for (before, expected) in [("1", vec!["create Pod r1-0-1"]), ("2", vec![])] {
        let spec = json!({"replicas": 1, "placement": {"priorityClassName": "high"},
            "rollout": {"restartBudget": 10}});
        let story = story(r1(spec)).on([h200x8("a")]);
        let story = story.after(&story.plan(), |pod| {
            fails(pod, now());
            pod.annotations.insert(names::FAILURES, before.into());
        });
        let story = contested(story.taken("a", 8), vec![other(json!({}))]);
        assert_eq!(pod_actions(&story.later(60).plan()), expected, "{before}");
    }
}

/// On `n1` one of priority 5 leaves for a claimant; on `n0` one of no priority would stay.
#[test]
fn who_leaves_for_an_equal_is_disturbed_by_nobody_else() {
    let first = |claimant: i32| {
        let spec = json!({"accelerator": {"type": "nvidia"}, "parallelism": {"tensor": 4},
            "placement": {"priorityClassName": "high"}});
        let story = story(deployment("m", spec))
            .on([h200x8("n0"), h200x8("n1")])
            .inspected()
            .taken("n0", 8)
            .taken("n1", 12);
        let four = json!([{"name": "engine", "resources": {"requests": {"nvidia.com/gpu": "4"}}}]);
        let stays = other(
            json!({"metadata": {"uid": "w"}, "spec": {"nodeName": "n0", "containers": four}}),
        );
        let leaves = other(json!({"spec": {"nodeName": "n1", "priority": 5}}));
        let claims = reservation("d/other", "v", "n1", claimant);
        let mut claimant = (*claims.pod).clone();
        claimant.requests = stays.pod.requests;
        let claims = Rival::of("d".into(), Arc::new(claimant));
        first_nodes(&contested(story, vec![stays, leaves, claims]).plan())
    };
    assert_eq!(first(1000), ["n1"]);
    // It may yet stay: the claimant is worth less than we are, and its place may be taken too.
    assert_eq!(first(500), ["n0"]);
}

fn spot(name: &str) -> Node {
    let label = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    with(h200x8(name), label)
}

#[test]
fn what_a_rollout_replaces_keeps_nothing_off_spot_nodes() {
    let placement = |least: i32| json!({"spot": {"onDemandMin": least}});
    let newer = json!({"context": {"maxTokens": 8192}});
    let story = |spec: Value, nodes: &[&str]| {
        let demand = nodes.iter().map(|name| h200x8(name));
        let story = story(r1(spec)).on(demand);
        // Spot nodes come when the others are taken.
        let story = story.running().on([spot("s0")]);
        story.edited(newer.clone())
    };
    let spec = json!({"replicas": 1, "placement": placement(1)});
    assert_eq!(first_nodes(&story(spec, &["d0", "d1"]).plan()), ["d1"]);
    // Of two that stay on demand one is to be replaced: its successor belongs there too.
    let spec = json!({"replicas": 2, "placement": placement(2), "rollout": {"partition": 1}});
    assert_eq!(
        first_nodes(&story(spec, &["d0", "d1", "d2"]).plan()),
        ["d2"]
    );
}

/// GPUs of which four do for a replica, so that they are the first choice.
fn large_gpus(name: &str) -> Node {
    gpu_node(name, "NVIDIA-B300", 275_040, 4)
}

#[test]
fn a_kind_of_gpu_with_room_comes_before_a_better_one_without() {
    let story = story(r1(json!({}))).on([large_gpus("a"), h200x8("b")]);
    assert_eq!(first_nodes(&story.plan()), ["a"]);
    assert_eq!(first_nodes(&story.taken("a", 1).plan()), ["b"]);
}

#[test]
fn a_better_kind_of_gpu_that_appears_moves_nobody() {
    let story = story(r1(json!({}))).on([h200x8("b")]).running();
    let story = story.on([large_gpus("a"), h200x8("c")]);
    // What runs says which kind is used, though the status was lost.
    let mut forgotten = story.clone();
    let deployment = with(
        (*story.snapshot.deployment).clone(),
        json!({"status": null}),
    );
    forgotten.snapshot.deployment = Arc::new(deployment);
    assert_eq!(pod_actions(&forgotten.plan()), nothing());
    // Where nothing runs, the status does.
    let mut empty = story;
    empty.snapshot.pods.clear();
    assert_eq!(first_nodes(&empty.plan()), ["c"]);
}

/// Not for a place, which more nodes might give: with what is there it can never fit.
#[test]
fn more_pods_than_there_are_nodes_are_no_layout() {
    let plan = story(r1(json!({}))).on([h100x8("a")]).plan();
    assert_eq!(condition(&plan, "Planned").1, "MemoryDoesNotFit");
    assert_eq!(plan.status.plan, None);
}

#[test]
fn a_fault_that_the_user_tolerates_is_none() {
    let key = "nvidia.com/gpu-xid-error";
    let faulty = |name| {
        let taint = json!({"key": key, "effect": "NoSchedule"});
        with(h200x8(name), json!({"spec": {"taints": [taint]}}))
    };
    for (tolerations, reason) in [
        (json!([{"key": key, "operator": "Exists"}]), "AsExpected"),
        (json!([]), "GpuFault"),
    ] {
        let spec = json!({"placement": {"tolerations": tolerations}});
        let story = story(r1(spec)).on([h200x8("a")]).running();
        let plan = story.on([faulty("a")]).plan();
        assert_eq!(condition(&plan, "Degraded").1, reason);
    }
}
