//! Replicas that share weights on their node: which nodes are remembered, and what that counts for.

use crate::common::*;
use k8s_openapi::api::core::v1::{Node, Pod};
use operator_api::{ModelDeployment, NodeCacheStatus};
use operator_core::explain::Standing;
use operator_core::inspect::source_hash;
use operator_core::{Action, Flaw, Inventory, NodeCache, Object, Plan, check, explain, names};
use proptest::prelude::*;
use serde_json::{Value, json};

fn cache() -> NodeCache {
    NodeCache::new("/var/lib/cachalot", "500Gi").unwrap()
}

/// A story whose operator has a directory for weights on each node.
fn shared(deployment: ModelDeployment) -> Story {
    let mut story = story(deployment);
    story.settings.node_cache = Some(cache());
    story
}

/// A model on a hub, on processors.
fn on_hub(spec: Value) -> ModelDeployment {
    let mut whole = json!({"model": {"source": "hf://org/small"}});
    merge(&mut whole, spec);
    deployment("m", whole)
}

/// Nodes are remembered for the deployment's model.
fn remembering(deployment: ModelDeployment, nodes: &[&str]) -> ModelDeployment {
    let valid = operator_core::validate(&deployment).unwrap();
    let known = NodeCacheStatus {
        model: source_hash(&valid),
        nodes: nodes.iter().map(|node| (*node).to_owned()).collect(),
    };
    with(
        deployment,
        json!({"status": {"nodeCache": known, "conditions": []}}),
    )
}

fn remembered(plan: &Plan) -> Vec<&str> {
    let known = plan.status.node_cache.iter();
    known
        .flat_map(|known| &known.nodes)
        .map(String::as_str)
        .collect()
}

fn created(plan: &Plan) -> impl Iterator<Item = &Pod> {
    plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    })
}

/// Nodes that the first new pod is offered, best first.
fn offered(plan: &Plan) -> String {
    let pod = created(plan).next().unwrap();
    pod.metadata.annotations.as_ref().unwrap()[names::PLANNED_NODES].clone()
}

fn labelled(node: Node, key: &str, value: &str) -> Node {
    with(node, json!({"metadata": {"labels": {key: value}}}))
}

#[test]
fn nodes_that_hold_the_weights_come_after_every_rule_and_before_packing() {
    let spot = |name| labelled(h200x8(name), "karpenter.sh/capacity-type", "spot");
    let zone = |name, zone| labelled(h200x8(name), "zone", zone);
    let untainted = json!({"spec": {"taints": []}});
    let cordoned = json!({"spec": {"unschedulable": true}});
    let four = json!({"parallelism": {"tensor": 4}, "context": {"maxTokens": 512}});
    let plain = json!({});
    let spread = json!({"replicas": 2, "placement": {"topology": {"spreadBy": "zone"}}});
    let priced = json!({"placement": {"spot": {"onDemandMin": 0}}});
    let h200 = || vec![h200x8("a"), h200x8("b"), h200x8("c")];
    // What is asked for, the nodes, GPUs taken of them, those that hold the weights, and what is offered.
    type Case<'a> = (
        &'a str,
        &'a Value,
        Vec<Node>,
        &'a [(&'a str, u64)],
        &'a [&'a str],
        &'a str,
    );
    let cases: [Case<'_>; 9] = [
        ("nothing is known", &plain, h200(), &[], &[], "a,b,c"),
        ("it comes first", &plain, h200(), &[], &["c"], "c,a,b"),
        ("all that hold", &plain, h200(), &[], &["c", "b"], "b,c,a"),
        ("no room there", &plain, h200(), &[("c", 1)], &["c"], "a,b"),
        (
            "cordoned",
            &plain,
            vec![h200x8("a"), with(h200x8("b"), cordoned)],
            &[],
            &["b"],
            "a",
        ),
        (
            "tainted",
            &plain,
            vec![with(h200x8("a"), untainted), h200x8("b")],
            &[],
            &["b"],
            "a,b",
        ),
        (
            "price",
            &priced,
            vec![spot("s"), h200x8("a"), h200x8("b")],
            &[],
            &["b"],
            "s,b,a",
        ),
        ("packing", &four, h200(), &[("a", 4)], &["c"], "c,a,b"),
        (
            "spread",
            &spread,
            vec![zone("a", "x"), zone("b", "x"), zone("c", "y")],
            &[],
            &["b"],
            "b,a,c",
        ),
    ];
    for (name, spec, nodes, taken, holding, expected) in cases {
        let is_small = *spec == four;
        let mut story = shared(remembering(r1(spec.clone()), holding)).on(nodes);
        if is_small {
            story = story.of_config(SMALL_CONFIG);
        }
        for (node, gpus) in taken {
            story = story.taken(node, *gpus);
        }
        let plan = story.plan();
        assert_eq!(offered(&plan), expected, "{name}: {plan}");
        // The second replica goes to the other zone, whoever holds the weights.
        if name == "spread" {
            let second = created(&plan).nth(1).unwrap();
            let annotations = second.metadata.annotations.as_ref().unwrap();
            assert!(
                annotations[names::PLANNED_NODES].starts_with("c,"),
                "{plan}"
            );
        }
    }
}

#[test]
fn on_processors_replicas_stay_apart_and_then_prefer_the_weights() {
    let nodes = || ["a", "b", "c"].map(|name| node(name, "8", "32Gi"));
    let start = shared(remembering(on_hub(json!({})), &["c"])).on(nodes());
    let plan = start.inspected().plan();
    assert_eq!(offered(&plan), "c,a,b");
    let twice = shared(remembering(on_hub(json!({"replicas": 2})), &["c"])).on(nodes());
    let plan = twice.inspected().plan();
    let places: Vec<String> = created(&plan)
        .map(|pod| pod.metadata.annotations.as_ref().unwrap()[names::PLANNED_NODES].clone())
        .collect();
    assert_eq!(places, ["c,a,b", "a,b,c"]);
}

#[test]
fn what_answered_is_remembered_until_its_node_is_gone_or_the_model_changes() {
    let nodes = || ["a", "b", "c"].map(|name| node(name, "8", "32Gi"));
    let fresh = shared(on_hub(json!({"replicas": 2})))
        .on(nodes())
        .inspected();
    let starting = fresh.after(&fresh.plan(), starts).later(5);
    assert_eq!(remembered(&starting.plan()), Vec::<&str>::new());
    let running = fresh.running();
    assert_eq!(remembered(&running.plan()), ["a", "b"]);
    // Said again it is the same.
    assert_eq!(
        running.plan().status,
        running.after(&running.plan(), |_| ()).plan().status
    );
    // Without pods, and for an operator that has just started.
    let mut status = running.plan().status;
    let again = |status: &operator_api::ModelDeploymentStatus, spec: Value, nodes: Vec<Node>| {
        let mut deployment = on_hub(spec);
        deployment.status = Some(status.clone());
        shared(deployment).on(nodes).inspected()
    };
    let zero = again(&status, json!({"replicas": 0}), nodes().into());
    assert_eq!(remembered(&zero.plan()), ["a", "b"]);
    let without_a = again(&status, json!({"replicas": 0}), nodes()[1..].into());
    assert_eq!(remembered(&without_a.plan()), ["b"]);
    let other = json!({"replicas": 0, "model": {"revision": "v2"}});
    assert_eq!(
        remembered(&again(&status, other, nodes().into()).plan()),
        Vec::<&str>::new()
    );
    let mut off = again(&status, json!({"replicas": 0}), nodes().into());
    off.settings.node_cache = None;
    assert_eq!(off.plan().status.node_cache, None);
    // While the facts are not known nothing is forgotten.
    let unknown = again(&status, json!({"replicas": 0}), nodes().into());
    let mut unknown = unknown;
    unknown.snapshot.config_maps.clear();
    assert_eq!(remembered(&unknown.plan()), ["a", "b"]);
    // Those where one answers come first.
    status.node_cache.as_mut().unwrap().nodes = vec!["b".into(), "c".into()];
    let mut both = running.clone();
    both.snapshot.deployment = with(
        (*both.snapshot.deployment).clone(),
        json!({"status": status}),
    )
    .into();
    assert_eq!(remembered(&both.plan()), ["a", "b", "c"]);
}

#[test]
fn only_replicas_that_fetch_with_the_operators_image_share() {
    let volume = |pod: &Pod| {
        let volumes = pod.spec.as_ref().unwrap().volumes.as_ref().unwrap();
        let cache = volumes.iter().find(|volume| volume.name == "cache");
        cache.map(|cache| (cache.host_path.clone(), cache.empty_dir.is_some()))
    };
    let command = |pod: &Pod| {
        let container = &pod.spec.as_ref().unwrap().containers[0];
        container.command.clone().unwrap().join(" ")
    };
    for (spec, is_shared) in [
        (json!({}), true),
        (json!({"model": {"source": "s3://bucket/small"}}), true),
        (json!({"model": {"source": "file:///models/small"}}), false),
        (json!({"model": {"source": "pvc://claim/small"}}), false),
        (json!({"podTemplate": {"image": "mine:1"}}), false),
    ] {
        let nodes = || [node("a", "8", "32Gi"), node("b", "8", "32Gi")];
        let deployment = remembering(on_hub(spec.clone()), &["b"]);
        let fresh = shared(deployment.clone()).on(nodes());
        let inspection = fresh.plan();
        let pod = created(&inspection).next().unwrap();
        // It reads no weights and keeps nothing.
        assert_eq!(volume(pod), None, "{spec}");
        let known = fresh.inspected();
        let plan = known.plan();
        let pod = created(&plan).next().unwrap();
        let (host, is_own) = volume(pod).unwrap();
        assert_eq!((host.is_some(), is_own), (is_shared, !is_shared), "{spec}");
        assert_eq!(
            command(pod).contains("--cache-limit 536870912000"),
            is_shared
        );
        assert_eq!(
            offered(&plan),
            if is_shared { "b,a" } else { "a,b" },
            "{spec}"
        );
        if let Some(host) = host {
            assert_eq!(host.path, "/var/lib/cachalot");
            assert_eq!(host.type_.as_deref(), Some("DirectoryOrCreate"));
            // Another directory than the operator's is nobody's to mount.
            let mut other = known.settings.clone();
            other.node_cache = Some(NodeCache::new("/var/lib/other", "").unwrap());
            let flaws = check(&plan, &known.snapshot, &other);
            assert!(matches!(flaws[..], [Flaw::Unrestricted(_)]), "{flaws:?}");
        }
        let mut off = known.clone();
        off.settings.node_cache = None;
        let plan = off.plan();
        let pod = created(&plan).next().unwrap();
        assert_eq!(volume(pod), Some((None, true)));
        assert!(!command(pod).contains("--cache-limit"));
        assert_eq!(offered(&plan), "a,b");
    }
}

#[test]
fn replicas_of_another_models_revision_make_no_holder() {
    let nodes = ["a", "b", "c"].map(|name| node(name, "8", "32Gi"));
    let spec = json!({"replicas": 2, "rollout": {"partition": 1}});
    let running = shared(on_hub(spec)).on(nodes).inspected().running();
    assert_eq!(remembered(&running.plan()), ["a", "b"]);
    let moved = running
        .edited(json!({"model": {"revision": "v2"}}))
        .inspected()
        .running();
    let plan = moved.plan();
    let pods = moved.snapshot.pods.iter().filter(|pod| pod.ready);
    let target = plan.status.revision.clone().unwrap();
    let on_target: Vec<&str> = pods
        .clone()
        .filter(|pod| pod.label(names::REVISION) == target)
        .map(|pod| pod.node.as_deref().unwrap())
        .collect();
    assert!(on_target.len() == 1 && pods.count() > 1, "{plan}");
    assert_eq!(remembered(&plan), on_target);
}

#[test]
fn at_most_so_many_nodes_are_remembered() {
    let names: Vec<String> = (0..100).map(|index| format!("n{index:03}")).collect();
    let nodes = names.iter().map(|name| node(name, "8", "32Gi"));
    let known: Vec<&str> = names.iter().rev().map(String::as_str).collect();
    let deployment = remembering(on_hub(json!({"replicas": 0})), &known);
    let plan = shared(deployment).on(nodes).inspected().plan();
    assert_eq!(remembered(&plan), known[..64]);
}

#[test]
fn an_explanation_tells_who_holds_the_weights_and_takes_the_settings_from_pods() {
    let nodes = ["a", "b", "c"].map(|name| node(name, "8", "32Gi"));
    let deployment = remembering(on_hub(json!({})), &["c"]);
    let story = shared(deployment.clone()).on(nodes.clone()).inspected();
    let plan = story.plan();
    let explanation = explain(&story.snapshot, &story.settings, &plan);
    let groups: Vec<(Standing, &[String])> = explanation
        .nodes
        .iter()
        .map(|group| (group.standing, &group.nodes[..]))
        .collect();
    let names = |names: &[&str]| {
        names
            .iter()
            .map(|name| (*name).to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        groups,
        [
            (Standing::Holds, &names(&["c"])[..]),
            (Standing::Fits, &names(&["a", "b"])[..])
        ]
    );
    // `kubectl cachalot plan` has no flag of the operator; it sees what the operator made.
    let pods: Vec<Pod> = created(&plan).cloned().collect();
    let seen = |pods: Vec<Pod>| {
        let inventory = Inventory {
            nodes: nodes.clone().into(),
            deployments: vec![deployment.clone()],
            pods,
            ..Inventory::default()
        };
        inventory.settings()
    };
    assert_eq!(seen(pods), Some(story.settings.clone()));
    let mut own = story.clone();
    own.settings.node_cache = None;
    let pods: Vec<Pod> = created(&own.plan()).cloned().collect();
    assert_eq!(seen(pods), Some(own.settings));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Who holds the weights changes the order of nodes and not which are offered; it decides only among nodes that are
    /// alike by every rule before it, and there it decides.
    #[test]
    fn holding_the_weights_decides_among_equals_only(
        nodes in prop::collection::vec((1..5u64, 0..2u8, 0..4u64, any::<bool>(), any::<bool>(), any::<bool>()), 1..12),
        is_priced in any::<bool>(),
        is_spread in any::<bool>(),
    ) {
        let spec = json!({
            "accelerator": {"type": "nvidia"},
            "parallelism": {"tensor": 1},
            "placement": {
                "topology": is_spread.then(|| json!({"spreadBy": "zone"})),
                "spot": is_priced.then(|| json!({"onDemandMin": 0})),
            },
        });
        let name_of = |index: usize| format!("n{index:02}");
        let holders: Vec<String> = nodes.iter().enumerate().filter(|(_, node)| node.3).map(|(index, _)| name_of(index)).collect();
        let holders: Vec<&str> = holders.iter().map(String::as_str).collect();
        let build = |holders: &[&str]| {
            let mut story = shared(remembering(on_hub(spec.clone()), holders));
            for (index, (gpus, zone, taken, _, is_spot, is_tainted)) in nodes.iter().enumerate() {
                let name = name_of(index);
                let mut node = labelled(gpu_node(&name, "NVIDIA-H200", 143_771, *gpus), "zone", &zone.to_string());
                if *is_spot {
                    node = labelled(node, "cloud.google.com/gke-spot", "true");
                }
                // All carry the GPUs' own taint, so that tells nothing.
                let taints = if *is_tainted { json!([{"key": "old", "effect": "PreferNoSchedule"}]) } else { json!([]) };
                node = with(node, json!({"spec": {"taints": taints}}));
                story = story.on([node]).taken(&name, *taken);
            }
            story.inspected()
        };
        let order = |holders: &[&str]| -> Vec<String> {
            let plan = build(holders).plan();
            match created(&plan).next() {
                Some(_) => offered(&plan).split(',').map(str::to_owned).collect(),
                None => Vec::new(),
            }
        };
        let (with_holders, without) = (order(&holders), order(&[]));
        let mut sorted = [with_holders.clone(), without.clone()];
        sorted.iter_mut().for_each(|names| names.sort());
        prop_assert_eq!(&sorted[0], &sorted[1]);
        // With no replica yet all zones are alike.
        let rules = |name: &String| {
            let (_, _, _, _, is_spot, is_tainted) = nodes[name[1..].parse::<usize>().unwrap()];
            (is_priced && !is_spot, is_tainted)
        };
        let holds = |name: &String| holders.contains(&name.as_str());
        for pair in with_holders.windows(2) {
            prop_assert!(rules(&pair[0]) <= rules(&pair[1]), "{with_holders:?}");
            let is_passed_over = rules(&pair[0]) == rules(&pair[1]) && !holds(&pair[0]) && holds(&pair[1]);
            prop_assert!(!is_passed_over, "{with_holders:?}, {holders:?} hold");
        }
        // Among those that hold, and among those that do not, the order is as it was.
        for kept in [true, false] {
            let only = |names: &[String]| names.iter().filter(|name| holds(name) == kept).cloned().collect::<Vec<_>>();
            prop_assert_eq!(only(&with_holders), only(&without));
        }
    }

    /// Whatever the status and the pods: only nodes that are there, each once, no more than the limit, and said again
    /// it is the same.
    #[test]
    fn what_is_remembered_is_there_and_bounded(
        known in prop::collection::vec(0..90usize, 0..80),
        there in 1..80usize,
        replicas in 0..6i32,
    ) {
        let name_of = |index: usize| format!("n{index:02}");
        let known: Vec<String> = known.into_iter().map(name_of).collect();
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        let nodes = (0..there).map(|index| node(&name_of(index), "8", "32Gi"));
        let deployment = remembering(on_hub(json!({"replicas": replicas})), &known);
        let running = shared(deployment).on(nodes).inspected().running();
        let plan = running.plan();
        let found = remembered(&plan);
        prop_assert!(found.len() <= 64);
        let mut once = found.clone();
        once.sort();
        once.dedup();
        prop_assert_eq!(once.len(), found.len());
        prop_assert!(found.iter().all(|name| running.snapshot.cluster.nodes.contains_key(*name)));
        prop_assert_eq!(&running.after(&plan, |_| ()).plan().status.node_cache, &plan.status.node_cache);
    }
}
