//! Who binds, what a namespace may take, and nodes whose GPUs are at fault: a table or property for
//! each rule.

use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::{Node, ResourceQuota};
use operator_core::placement::{self, Offers, Room, Wish};
use operator_core::quota::QuotaLimit;
use operator_core::snapshot::{PodPhase, PodView, QuotaView};
use operator_core::{Action, Object, Plan, fit, names, objects};
use proptest::prelude::*;
use serde_json::{Value, json};

fn direct(spec: Value) -> operator_api::ModelDeployment {
    let mut whole = json!({"placement": {"binding": "direct"}});
    merge(&mut whole, spec);
    r1(whole)
}

/// Node and planned nodes of each pod that is created.
fn created(plan: &Plan) -> Vec<(Option<String>, bool, String)> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(pod),
        _ => None,
    });
    pods.map(|pod| {
        let spec = pod.spec.as_ref().unwrap();
        let annotations = pod.metadata.annotations.as_ref().unwrap();
        (
            spec.node_name.clone(),
            spec.affinity.is_some(),
            annotations[names::PLANNED_NODES].clone(),
        )
    })
    .collect()
}

#[test]
fn kube_scheduler_binds_unless_the_operator_is_asked_to() {
    let nodes = || [h200x8("a"), h200x8("b")];
    let by_scheduler = story(r1(json!({}))).on(nodes()).plan();
    assert_eq!(created(&by_scheduler), [(None, true, "a,b".into())]);
    let by_us = story(direct(json!({}))).on(nodes()).plan();
    assert_eq!(created(&by_us), [(Some("a".into()), false, "a".into())]);
    // Who binds is no reason to replace a pod.
    assert_eq!(by_scheduler.status.revision, by_us.status.revision);
}

#[test]
fn pods_that_are_bound_by_the_operator_do_not_share_gpus() {
    let story = story(direct(json!({"replicas": 3}))).on([h200x8("a"), h200x8("b"), h200x8("c")]);
    let mut nodes: Vec<_> = created(&story.plan())
        .into_iter()
        .map(|(node, ..)| node)
        .collect();
    nodes.sort();
    nodes.dedup();
    assert_eq!(nodes.len(), 3);
}

fn refuses(pod: &mut PodView) {
    pod.phase = PodPhase::Failed;
    pod.reason = "OutOfnvidia.com/gpu".into();
    pod.message = "Node didn't have enough resource: nvidia.com/gpu".into();
}

#[test]
fn a_node_that_refuses_a_pod_is_left_out_after_a_pause_and_remembered() {
    let first = story(direct(json!({}))).on([h200x8("a"), h200x8("b"), h200x8("c")]);
    let plan = first.plan();
    let refused = first.after(&plan, refuses).later(1);
    assert!(
        pod_actions(&refused.plan()).is_empty(),
        "no pause: {}",
        refused.plan()
    );
    let second = refused.later(10);
    let plan = second.plan();
    assert_eq!(created(&plan)[0].0.as_deref(), Some("b"));
    // The next refusal leaves out both: the memory is in the pod, not in the operator.
    let third = second.after(&plan, refuses).swept().later(30);
    let plan = third.plan();
    assert_eq!(created(&plan)[0].0.as_deref(), Some("c"));
    // When all have refused, the first is tried again rather than none.
    let fourth = third.after(&plan, refuses).swept().later(60);
    assert_eq!(created(&fourth.plan())[0].0.as_deref(), Some("a"));
}

#[test]
fn a_pod_that_failed_otherwise_does_not_blame_its_node() {
    let first = story(direct(json!({}))).on([h200x8("a"), h200x8("b")]);
    let plan = first.plan();
    let failed = first.after(&plan, |pod| fails(pod, now())).later(10);
    let Some(Action::Create(Object::Pod(pod))) = failed
        .plan()
        .actions
        .into_iter()
        .find(|action| matches!(action, Action::Create(_)))
    else {
        panic!("no successor");
    };
    assert!(
        !pod.metadata
            .annotations
            .unwrap()
            .contains_key(names::REFUSED_NODES)
    );
}

fn quota(hard: u64, used: u64) -> Arc<QuotaView> {
    quota_on("nvidia.com/gpu", hard, used)
}

fn quota_on(resource: &str, hard: u64, used: u64) -> Arc<QuotaView> {
    let limit = QuotaLimit { most: hard, used };
    Arc::new(QuotaView {
        name: "gpus".into(),
        limits: [(resource.to_owned(), limit)].into(),
    })
}

#[test]
fn a_quota_on_gpus_is_a_condition_and_not_a_refused_pod() {
    let mut story = story(r1(json!({"replicas": 3}))).on((0..4).map(|i| h200x8(&format!("n{i}"))));
    story.snapshot.quotas = vec![quota(20, 0)];
    let plan = story.plan();
    assert_eq!(created(&plan).len(), 2);
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", "GpuQuotaExceeded")
    );
    assert!(
        message.contains("ResourceQuota gpus allows 20 GPUs in namespace default and 16 are asked for already; a replica needs 8"),
        "{message}"
    );
    story.snapshot.quotas = vec![quota(24, 0)];
    assert_eq!(condition(&story.plan(), "Planned").1, "FitFound");
}

#[test]
fn a_quota_on_gpus_does_not_stop_replicas_without() {
    let mut story = story(deployment("m", json!({"replicas": 2})))
        .on([node("a", "4", "8Gi")])
        .inspected();
    story.snapshot.quotas = vec![quota(0, 0)];
    assert_eq!(created(&story.plan()).len(), 2);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn no_plan_asks_for_more_gpus_than_the_quota_leaves(
        replicas in 0..6i32,
        hard in 0..50u64,
        used in 0..50u64,
        binding in prop::sample::select(vec!["scheduler", "direct"]),
    ) {
        let spec = json!({"replicas": replicas, "placement": {"binding": binding}});
        let mut story = story(r1(spec)).on((0..8).map(|i| h200x8(&format!("n{i}"))));
        story.snapshot.quotas = vec![quota(hard, used), quota(1000, 0)];
        let asked = 8 * created(&story.plan()).len() as u64;
        prop_assert!(asked <= hard.saturating_sub(used), "{asked} of {hard} - {used}");
        // And no fewer than it leaves.
        let left = hard.saturating_sub(used) / 8;
        prop_assert_eq!(asked / 8, left.min(replicas as u64));
    }
}

#[test]
fn a_quota_object_is_read_as_kubernetes_counts() {
    let of = |value: Value| {
        let quota: ResourceQuota = serde_json::from_value(value).unwrap();
        let view = QuotaView::of(&quota)?;
        let limit = view.limits.into_values().next()?;
        Some((limit.most, limit.used))
    };
    let key = "requests.nvidia.com/gpu";
    let mig = "requests.nvidia.com/mig-3g.71gb";
    assert_eq!(
        of(json!({"spec": {"hard": {mig: "4"}}, "status": {"used": {mig: "1"}}})),
        Some((4, 1))
    );
    assert_eq!(
        of(json!({"spec": {"hard": {"requests.nvidia.com/x": "4"}}})),
        None
    );
    assert_eq!(
        of(json!({"spec": {"hard": {key: "16", "pods": "9"}}, "status": {"used": {key: "8"}}})),
        Some((16, 8))
    );
    assert_eq!(of(json!({"spec": {"hard": {key: "16"}}})), Some((16, 0)));
    assert_eq!(of(json!({"spec": {"hard": {"pods": "9"}}})), None);
    // For some pods only: Kubernetes alone knows for which.
    assert_eq!(
        of(json!({"spec": {"hard": {key: "16"}, "scopes": ["BestEffort"]}})),
        None
    );
}

fn sick(node: Node, patch: Value) -> Node {
    with(node, patch)
}

fn condition_true(kind: &str) -> Value {
    json!({"status": {"conditions": [
        {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"},
        {"type": kind, "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"},
    ]}})
}

#[test]
fn every_way_a_node_says_that_its_gpus_are_at_fault_is_understood() {
    let ways = [
        condition_true("GpuMemWatch"),
        // As some releases spell it.
        condition_true("GpuNvLinkWatch"),
        condition_true("SysLogsXIDError"),
        json!({"metadata": {"labels": {"dgxc.nvidia.com/nvsentinel-state": "quarantined"}}}),
        json!({"spec": {"taints": [{"key": "nvidia.com/gpu-xid-error", "value": "true", "effect": "NoSchedule"}]}}),
    ];
    for way in ways {
        let before = story(r1(json!({})))
            .on([h200x8("a"), h200x8("b")])
            .running();
        let node = before.snapshot.pods[0].node.clone().unwrap();
        let story = before.on([sick(h200x8(&node), way.clone())]);
        let plan = story.plan();
        let other = if node == "a" { "b" } else { "a" };
        assert_eq!(created(&plan).len(), 1, "{way}: {plan}");
        assert_eq!(created(&plan)[0].2, other, "{way}");
        let (status, reason, message) = condition(&plan, "Degraded");
        assert_eq!(
            (status.as_str(), reason.as_str()),
            ("True", "GpuFault"),
            "{way}"
        );
        assert!(
            message.contains(&format!("node {node} reports")),
            "{message}"
        );
    }
    for harmless in [
        condition_true("DiskPressure"),
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "True", "lastTransitionTime": "2026-11-24T00:00:00Z"},
            {"type": "GpuMemWatch", "status": "False"},
        ]}}),
        json!({"metadata": {"labels": {"dgxc.nvidia.com/nvsentinel-state": "remediation-succeeded"}}}),
    ] {
        let before = story(r1(json!({})))
            .on([h200x8("a"), h200x8("b")])
            .running();
        let node = before.snapshot.pods[0].node.clone().unwrap();
        let plan = before.on([sick(h200x8(&node), harmless.clone())]).plan();
        assert!(created(&plan).is_empty(), "{harmless}: {plan}");
    }
}

#[test]
fn a_replica_on_sick_gpus_serves_until_another_answers_and_is_then_drained() {
    let before = story(r1(json!({})))
        .on([h200x8("a"), h200x8("b")])
        .running();
    let node = before.snapshot.pods[0].node.clone().unwrap();
    let story = before.on([sick(h200x8(&node), condition_true("GpuMemWatch"))]);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-1-0"]);
    let story = story.after(&plan, starts).later(5);
    assert!(pod_actions(&story.plan()).is_empty(), "{}", story.plan());
    let story = story.replica(1, answers).later(5);
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["patch Pod r1-0-0 cachalot.dev/serving=false"]
    );
}

#[test]
fn without_room_elsewhere_a_replica_on_sick_gpus_goes_on() {
    let before = story(r1(json!({}))).on([h200x8("a")]).running();
    let story = before.on([sick(h200x8("a"), condition_true("GpuMemWatch"))]);
    let plan = story.plan();
    assert!(pod_actions(&plan).is_empty(), "{plan}");
    assert_eq!(condition(&plan, "Degraded").1, "GpuFault");
    assert_eq!(condition(&plan, "Available").0, "True");
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "NoNodeFits");
    assert!(message.contains("GPU fault GpuMemWatch"), "{message}");
}

#[test]
fn a_replica_on_the_cpu_does_not_care_about_gpus() {
    let before = story(deployment("m", json!({})))
        .inspected()
        .on([node("a", "4", "8Gi")])
        .running();
    let plan = before
        .on([sick(node("a", "4", "8Gi"), condition_true("GpuMemWatch"))])
        .plan();
    assert!(pod_actions(&plan).is_empty(), "{plan}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Small replicas on large nodes are packed: as many nodes as can stay whole do.
    #[test]
    fn small_replicas_leave_whole_nodes_free(replicas in 1..20i32, tensor in prop::sample::select(vec![1, 2, 4])) {
        let spec = json!({
            "replicas": replicas,
            "accelerator": {"type": "nvidia"},
            "parallelism": {"tensor": tensor},
        });
        let story = story(deployment("m", spec)).inspected().on((0..10).map(|i| h200x8(&format!("n{i}"))));
        let nodes: Vec<String> = created(&story.plan())
            .into_iter()
            .map(|(_, _, planned)| planned.split(',').next().unwrap().to_owned())
            .collect();
        prop_assert_eq!(nodes.len(), replicas as usize);
        let used: std::collections::BTreeSet<&String> = nodes.iter().collect();
        let least = (replicas * tensor + 7) / 8;
        prop_assert_eq!(used.len(), least as usize);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Offers that are kept while replicas take nodes are those that a fresh look gives, and the
    /// order is that of a plain sort over all nodes.
    #[test]
    fn offers_that_are_kept_are_those_of_a_fresh_look(
        nodes in prop::collection::vec((1..9u64, 0..3u8, 0..9u64), 1..30),
        tensor in prop::sample::select(vec![1, 2, 4]),
        is_spread in any::<bool>(),
        refused in prop::collection::vec(0..30usize, 0..3),
    ) {
        let topology = is_spread.then(|| json!({"spreadBy": "zone"}));
        let spec = json!({
            "accelerator": {"type": "nvidia"},
            "parallelism": {"tensor": tensor},
            "placement": {"topology": topology},
        });
        let mut story = story(deployment("m", spec));
        for (index, (gpus, zone, taken)) in nodes.iter().enumerate() {
            let name = format!("n{index:02}");
            let zone = json!({"metadata": {"labels": {"zone": zone.to_string()}}});
            story = story
                .on([with(gpu_node(&name, "NVIDIA-H200", 143_771, *gpus), zone)])
                .taken(&name, *taken);
        }
        let valid = operator_core::validate(&story.snapshot.deployment).unwrap();
        let cluster = &story.snapshot.cluster;
        let Ok(layouts) = fit::layouts(&valid, &facts_of(SMALL_CONFIG), cluster) else {
            return Ok(());
        };
        let mut wish = Wish {
            layout: &layouts[0],
            requests: objects::engine_requests(&valid, &layouts[0]),
            placement: &valid.placement,
            own: Default::default(),
            avoid: Vec::new(),
            holders: Default::default(),
        };
        let refused: Vec<String> = refused.iter().map(|index| format!("n{index:02}")).collect();
        let mut room = Room::new(cluster);
        let mut kept = Offers::new(&wish, &room);
        loop {
            let best = kept.best(&refused, None);
            prop_assert_eq!(&best, &Offers::new(&wish, &room).best(&refused, None));
            let zone_of = |name: &str| cluster.nodes[name].label("zone").to_owned();
            let count = |node: &str| match is_spread {
                false => 0,
                true => wish
                    .own
                    .iter()
                    .filter(|(other, _)| zone_of(other) == zone_of(node))
                    .map(|(_, own)| own)
                    .sum::<usize>(),
            };
            let mut sorted: Vec<_> = room
                .nodes()
                .filter(|node| placement::why_not(node, &wish, &room).is_none())
                .map(|node| {
                    let last = refused.contains(&node.name);
                    let rank = placement::rank(node, &wish, &room);
                    (last, count(&node.name), rank, node.name.clone())
                })
                .collect();
            sorted.sort();
            sorted.truncate(placement::OFFERED_NODES_MAX);
            let sorted: Vec<String> = sorted.into_iter().map(|(.., name)| name).collect();
            let Ok(best) = best else {
                prop_assert!(sorted.is_empty());
                break;
            };
            prop_assert_eq!(&best, &sorted);
            let node = best[0].clone();
            let before = placement::rank(&cluster.nodes[&node], &wish, &room);
            room.take(&node, wish.requests);
            *wish.own.entry(node.clone()).or_insert(0) += 1;
            kept.take(&node, &before, &wish, &room);
        }
    }
}

fn spot(name: &str) -> Node {
    let label = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    with(h200x8(name), label)
}

/// Nodes of live engine pods, in order.
fn nodes_of(story: &Story) -> Vec<String> {
    let pods = story.snapshot.pods.iter();
    let engines =
        pods.filter(|pod| pod.label("cachalot.dev/component") == "engine" && !pod.deleting);
    let mut nodes: Vec<String> = engines.filter_map(|pod| pod.node.clone()).collect();
    nodes.sort();
    nodes
}

/// One replica takes a whole node; two nodes are on demand and four are spot.
fn on_spot(spec: Value) -> Story {
    let nodes = ["s0", "s1", "s2", "s3"].map(spot).into_iter();
    story(r1(spec)).on(nodes.chain([h200x8("d0"), h200x8("d1")]))
}

#[test]
fn every_cloud_says_in_its_own_words_that_a_node_is_spot() {
    for (key, value, expected) in [
        ("karpenter.sh/capacity-type", "spot", true),
        ("karpenter.sh/capacity-type", "on-demand", false),
        ("eks.amazonaws.com/capacityType", "SPOT", true),
        ("eks.amazonaws.com/capacityType", "ON_DEMAND", false),
        ("cloud.google.com/gke-spot", "true", true),
        ("cloud.google.com/gke-preemptible", "true", true),
        ("cloud.google.com/gke-provisioning", "standard", false),
        ("kubernetes.azure.com/scalesetpriority", "spot", true),
    ] {
        let node = with(h200x8("a"), json!({"metadata": {"labels": {key: value}}}));
        let view = operator_core::NodeView::of(&node);
        assert_eq!(
            operator_core::spot::is_spot(&view),
            expected,
            "{key}={value}"
        );
    }
}

#[test]
fn so_many_replicas_as_asked_stay_off_spot_nodes_and_the_others_prefer_them() {
    let spec = |least: i32| json!({"replicas": 4, "placement": {"spot": {"onDemandMin": least}}});
    assert_eq!(
        nodes_of(&on_spot(spec(0)).running()),
        ["s0", "s1", "s2", "s3"]
    );
    assert_eq!(
        nodes_of(&on_spot(spec(1)).running()),
        ["d0", "s0", "s1", "s2"]
    );
    // Without the field price does not matter.
    assert_eq!(
        nodes_of(&on_spot(json!({"replicas": 4})).running()),
        ["d0", "d1", "s0", "s1"]
    );
    // No room on demand: the others are placed, and the reason says what is missing.
    let plan = on_spot(spec(3)).plan();
    let (status, reason, message) = condition(&plan, "Planned");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "NoNodeFits"));
    assert!(
        message.contains(
            "4 nodes: spot, and spec.placement.spot.onDemandMin = 3 replicas belong on other nodes"
        ),
        "{message}"
    );
}

#[test]
fn neither_a_rollout_nor_a_smaller_number_takes_the_replicas_off_demand_nodes() {
    let story = on_spot(
        json!({"replicas": 3, "placement": {"spot": {"onDemandMin": 1}},
        "rollout": {"maxSurge": 2}}),
    )
    .running();
    assert_eq!(nodes_of(&story), ["d0", "s0", "s1"]);
    let rolled = story
        .clone()
        .edited(json!({"context": {"maxTokens": 8192}}));
    let mut rolled = rolled;
    for _ in 0..40 {
        let plan = rolled.plan();
        rolled = rolled.after(&plan, answers).swept().later(130);
    }
    assert_eq!(condition(&rolled.plan(), "Ready").1, "AllReplicasReady");
    let on_demand = nodes_of(&rolled)
        .iter()
        .filter(|node| node.starts_with('d'))
        .count();
    assert_eq!((on_demand, nodes_of(&rolled).len()), (1, 3));

    let mut fewer = story.edited(json!({"replicas": 1}));
    for _ in 0..10 {
        let plan = fewer.plan();
        fewer = fewer.after(&plan, answers).swept().later(130);
    }
    assert_eq!(nodes_of(&fewer), ["d0"]);
}
