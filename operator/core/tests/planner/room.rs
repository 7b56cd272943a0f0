//! What counts as room, to the byte, and which of the nodes that have it comes first.

use crate::common::*;
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Toleration};
use operator_core::placement::tolerates;
use operator_core::snapshot::{PodView, Taint, TaintEffect};
use operator_core::{Action, Object, Plan, Resources};
use serde_json::{Value, json};

fn pods(plan: &Plan) -> Vec<&Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    });
    pods.collect()
}

/// Nodes that the first pod of a plan is offered; none when it has no place.
fn offered(story: &Story) -> Vec<String> {
    let plan = story.plan();
    let nodes = pods(&plan)
        .first()
        .map(|pod| operator_core::objects::preferred_nodes(pod));
    nodes.unwrap_or_default()
}

fn small(spec: Value, nodes: impl IntoIterator<Item = Node>) -> Story {
    story(deployment("m", spec)).on(nodes).inspected()
}

#[test]
fn a_node_with_exactly_what_is_asked_for_fits_and_one_with_less_does_not() {
    let plan = small(json!({}), [node("a", "8", "16Gi")]).plan();
    let Resources {
        cpu_millis,
        memory_bytes,
        ..
    } = PodView::of(pods(&plan)[0]).requests;
    for (cpu, memory, count, fits) in [
        (cpu_millis, memory_bytes, 1, true),
        (cpu_millis - 1, memory_bytes, 1, false),
        (cpu_millis, memory_bytes - 1, 1, false),
        (cpu_millis, memory_bytes, 0, false),
    ] {
        let exact = node("a", &format!("{cpu}m"), &memory.to_string());
        let count = json!({"status": {"allocatable": {"pods": count.to_string()}}});
        let story = small(json!({}), [with(exact, count)]);
        assert_eq!(!offered(&story).is_empty(), fits, "{cpu} {memory}");
    }
}

#[test]
fn what_users_and_nodes_say_of_each_other_is_obeyed() {
    let taint =
        |effect| json!({"spec": {"taints": [{"key": "team", "value": "x", "effect": effect}]}});
    let gpu = json!({"spec": {"taints": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]}});
    let accepts = json!({"placement": {"tolerations": [{"key": "team", "value": "x"}]}});
    let wants = json!({"placement": {"nodeSelector": {"disk": "fast"}}});
    let fast = json!({"metadata": {"labels": {"disk": "fast"}}});
    let slow = json!({"metadata": {"labels": {"disk": "slow"}}});
    for (spec, patch, fits) in [
        (json!({}), taint("NoSchedule"), false),
        (json!({}), taint("NoExecute"), false),
        (json!({}), taint("PreferNoSchedule"), true),
        (accepts, taint("NoSchedule"), true),
        (json!({}), gpu, false),
        (wants.clone(), fast, true),
        (wants, slow, false),
        (json!({}), json!({"spec": {"unschedulable": true}}), false),
    ] {
        let story = small(spec, [with(node("a", "8", "16Gi"), patch.clone())]);
        assert_eq!(!offered(&story).is_empty(), fits, "{patch}");
    }
}

#[test]
fn a_toleration_accepts_what_kubernetes_says_it_does() {
    let taint = Taint {
        key: "team".into(),
        value: "x".into(),
        effect: TaintEffect::NoSchedule,
    };
    for (toleration, accepts) in [
        (json!({"key": "team", "value": "x"}), true),
        (json!({"key": "team", "value": "y"}), false),
        (json!({"key": "other", "value": "x"}), false),
        (
            json!({"key": "team", "value": "x", "effect": "NoSchedule"}),
            true,
        ),
        (
            json!({"key": "team", "value": "x", "effect": "NoExecute"}),
            false,
        ),
        (json!({"key": "team", "operator": "Exists"}), true),
        (json!({"key": "other", "operator": "Exists"}), false),
        (json!({"operator": "Exists"}), true),
        (json!({"value": "x"}), false),
    ] {
        let parsed: Toleration = serde_json::from_value(toleration.clone()).unwrap();
        assert_eq!(tolerates(&parsed, &taint), accepts, "{toleration}");
    }
}

#[test]
fn sixteen_nodes_are_offered_at_most_in_all_zones_together() {
    let nodes = (0..20).map(|index| {
        let zone = json!({"metadata": {"labels": {"zone": (index % 2).to_string()}}});
        with(node(&format!("n{index:02}"), "8", "16Gi"), zone)
    });
    let spread = json!({"placement": {"topology": {"spreadBy": "zone"}}});
    assert_eq!(offered(&small(spread, nodes)).len(), 16);
}

#[test]
fn a_replica_on_the_cpu_goes_where_most_is_free_and_away_from_gpus_and_taints() {
    let untainted = |name| with(h200x8(name), json!({"spec": {"taints": null}}));
    let avoided = json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}});
    let story = small(
        json!({}),
        [
            with(node("a", "8", "64Gi"), avoided),
            untainted("b"),
            node("c", "8", "16Gi"),
            node("d", "8", "32Gi"),
        ],
    );
    assert_eq!(offered(&story), ["d", "c", "b", "a"]);
    // Those that run count, not only those of the same plan.
    let story = small(json!({}), [node("a", "8", "64Gi"), node("b", "8", "16Gi")]);
    let story = story.running().edited(json!({"replicas": 2}));
    assert_eq!(offered(&story), ["b", "a"]);
}

#[test]
fn a_gpu_that_is_just_good_enough_and_not_shared_is_used() {
    let label = |key: &str, value: &str| {
        let label = json!({"metadata": {"labels": {format!("nvidia.com/gpu.{key}"): value}}});
        offered(&story(r1(json!({}))).on([with(h200x8("a"), label)]))
    };
    let nothing: [&str; 0] = [];
    assert_eq!(label("compute.major", "8"), ["a"]);
    assert_eq!(label("compute.major", "7"), nothing);
    assert_eq!(label("sharing-strategy", "none"), ["a"]);
    assert_eq!(label("sharing-strategy", "mps"), nothing);
    assert_eq!(label("product", "NVIDIA-H200-SHARED"), nothing);
    let least = |memory: &str| {
        let spec = json!({"accelerator": {"minMemory": memory}});
        offered(&story(r1(spec)).on([h200x8("a")]))
    };
    assert_eq!(least("143771Mi"), ["a"]);
    assert_eq!(least("143772Mi"), nothing);
}

#[test]
fn a_pod_is_counted_as_the_scheduler_counts_it() {
    let container = |cpu: &str| json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
    let sidecar = |cpu: &str| with(container(cpu), json!({"restartPolicy": "Always"}));
    let of = |spec: Value| Resources::of_pod(&serde_json::from_value::<PodSpec>(spec).unwrap());
    for (spec, millis) in [
        (
            json!({"containers": [container("1"), container("2")]}),
            3000,
        ),
        (
            json!({"containers": [container("1")], "initContainers": [container("4")]}),
            4000,
        ),
        (
            json!({"containers": [container("1")], "initContainers": [sidecar("4")]}),
            5000,
        ),
        (
            json!({"containers": [container("1")], "overhead": {"cpu": "250m"}}),
            1250,
        ),
    ] {
        assert_eq!(of(spec.clone()).cpu_millis, millis, "{spec}");
    }
    let limit = json!({"resources": {"limits": {"nvidia.com/gpu": "2", "cpu": "9"}}});
    let limited = of(json!({"containers": [with(json!({"name": "c"}), limit)]}));
    assert_eq!((limited.gpus, limited.cpu_millis), (2, 0));
}

#[test]
fn a_pod_takes_room_from_its_plan_to_its_end() {
    let plan = small(json!({}), [node("a", "8", "16Gi")]).plan();
    let mut pod = PodView::of(pods(&plan)[0]);
    assert_eq!(pod.claim().unwrap().node, "a");
    fails(&mut pod, now());
    assert_eq!(pod.claim(), None);
}

/// Nodes of the ranks of a pair.
fn ranks(spec: Value, nodes: impl IntoIterator<Item = Node>) -> Vec<String> {
    let mut whole = json!({"parallelism": {"tensor": 2}});
    merge(&mut whole, spec);
    let plan = small(whole, nodes).plan();
    let pods = pods(&plan).into_iter();
    pods.map(|pod| operator_core::objects::preferred_nodes(pod)[0].clone())
        .collect()
}

#[test]
fn ranks_of_a_group_stay_off_spot_nodes_as_replicas_do() {
    let spot = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    let nodes = [with(node("s", "8", "64Gi"), spot), node("a", "8", "16Gi")];
    let on_demand = json!({"placement": {"spot": {"onDemandMin": 1}}});
    assert_eq!(ranks(on_demand, nodes), ["a", "a"]);
}

#[test]
fn a_node_takes_as_many_ranks_as_it_has_room_for() {
    let plan = small(
        json!({"parallelism": {"tensor": 2}}),
        [node("a", "8", "16Gi")],
    )
    .plan();
    let Resources { cpu_millis, .. } = PodView::of(pods(&plan)[0]).requests;
    let of = |millis: u64| node("a", &format!("{millis}m"), "16Gi");
    assert_eq!(ranks(json!({}), [of(cpu_millis * 2)]), ["a", "a"]);
    assert!(ranks(json!({}), [of(cpu_millis * 2 - 1)]).is_empty());
}
