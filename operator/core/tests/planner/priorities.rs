//! Priority and preemption among ModelDeployments: whose place is taken, by whom, and how.

use std::sync::Arc;

use crate::common::fleets::classes;
use crate::common::*;
use k8s_openapi::api::core::v1::{Node, Pod};
use operator_api::ModelDeployment;
use operator_core::placement::{self, Room, Wish};
use operator_core::preemption::{self, Ask};
use operator_core::priority::{Contest, PriorityClassView, Rival};
use operator_core::sim::{Faults, Happening, Pace, Story as Tale, replay, run};
use operator_core::{Action, Cluster, Inventory, NodeView, PodView, fit, names, objects, validate};
use proptest::prelude::*;
use serde_json::{Value, json};

/// A wish for whole nodes.
fn r1_of(name: &str, class: Option<&str>, spec: Value) -> ModelDeployment {
    let mut whole = json!({
        "model": {"configMapRef": null},
        "rollout": {"drainTimeoutSeconds": 60},
        "placement": {"priorityClassName": class},
    });
    merge(&mut whole, spec);
    with(
        r1(whole),
        json!({"metadata": {"name": name, "uid": format!("uid-of-{name}")}}),
    )
}

fn report() -> String {
    let facts = facts_of(R1_CONFIG);
    engine_spec::InspectReport::Facts(Box::new(facts)).to_message()
}

fn told(deployments: Vec<ModelDeployment>, nodes: Vec<Node>, happenings: &[Value]) -> Vec<String> {
    let inventory = Inventory {
        nodes,
        deployments,
        priority_classes: classes(),
        ..Inventory::default()
    };
    let happenings: Vec<Happening> = happenings
        .iter()
        .map(|value| Happening::parse(value.clone()).unwrap())
        .collect();
    let plans = replay(
        inventory,
        report(),
        &settings(),
        Pace::default(),
        &happenings,
    )
    .unwrap();
    let mut lines = Vec::new();
    for plan in plans {
        let pods = plan
            .actions
            .iter()
            .filter(|action| action.contains(" Pod ") && !action.contains("inspect"));
        lines.extend(pods.map(|action| {
            let words = action.split(" cachalot.dev/drain-since").next().unwrap();
            format!("{} {words}", plan.deployment)
        }));
        let news = plan.conditions.iter().filter(|c| c.kind == "Planned");
        lines
            .extend(news.map(|c| format!("{} Planned={} {}", plan.deployment, c.status, c.reason)));
    }
    // Revisions are of no interest here.
    lines
        .into_iter()
        .map(|line| {
            let words = line.split(' ').map(|word| {
                let parts: Vec<&str> = word.split('-').collect();
                match parts.as_slice() {
                    [name, index, revision, attempt] if revision.len() == 8 => {
                        format!("{name}-{index}-{attempt}")
                    }
                    [name, index, revision, attempt, rank] if revision.len() == 8 => {
                        format!("{name}-{index}-{attempt}-{rank}")
                    }
                    _ => word.to_owned(),
                }
            });
            words.collect::<Vec<_>>().join(" ")
        })
        .collect()
}

fn patch(name: &str, spec: Value) -> Value {
    json!({"afterSeconds": 300, "patch": {"name": name, "spec": spec}})
}

/// The whole course: reserved, drained, released, and the one that gave way comes back.
#[test]
fn a_replica_of_higher_priority_takes_the_place_of_a_lower_one_which_comes_back_when_there_is_room()
{
    for binding in ["scheduler", "direct"] {
        let spec = json!({"replicas": 0, "placement": {"binding": binding}});
        let lines = told(
            vec![
                r1_of("small", None, json!({"replicas": 2})),
                r1_of("big", Some("high"), spec),
            ],
            vec![h200x8("a"), h200x8("b")],
            &[
                json!({"afterSeconds": 300, "scale": {"name": "big", "replicas": 1}}),
                json!({"afterSeconds": 600, "scale": {"name": "big", "replicas": 0}}),
                json!({"afterSeconds": 600, "wait": {}}),
            ],
        );
        let from = lines.iter().position(|line| line.contains("big-0-0"));
        assert_eq!(
            lines[from.unwrap()..],
            [
                "default/big create Pod big-0-0",
                "default/big Planned=False Preempting",
                "default/small patch Pod small-0-0 cachalot.dev/serving=false",
                "default/small Planned=False Preempted",
                "default/small delete Pod small-0-0",
                "default/big release Pod big-0-0",
                "default/big Planned=True FitFound",
                "default/big patch Pod big-0-0 cachalot.dev/serving=false",
                "default/big delete Pod big-0-0",
                "default/small create Pod small-0-0",
                "default/small Planned=True FitFound",
            ],
            "{lines:#?}"
        );
    }
}

/// A group holds places on several nodes, and leaves all of them.
#[test]
fn a_group_of_lower_priority_leaves_whole_and_comes_back_whole() {
    let lines = told(
        vec![
            r1_of(
                "wide",
                None,
                json!({"replicas": 1, "parallelism": {"tensor": 16}}),
            ),
            r1_of("big", Some("high"), json!({"replicas": 0})),
        ],
        vec![h200x8("a"), h200x8("b")],
        &[
            json!({"afterSeconds": 300, "scale": {"name": "big", "replicas": 1}}),
            json!({"afterSeconds": 600, "scale": {"name": "big", "replicas": 0}}),
            json!({"afterSeconds": 600, "wait": {}}),
        ],
    );
    let from = lines.iter().position(|line| line.contains("big-0-0"));
    assert_eq!(
        lines[from.unwrap()..],
        [
            "default/big create Pod big-0-0",
            "default/big Planned=False Preempting",
            "default/wide patch Pod wide-0-0-0 cachalot.dev/serving=false",
            "default/wide Planned=False Preempted",
            "default/wide delete Pod wide-0-0-0",
            "default/wide delete Pod wide-0-0-1",
            "default/big release Pod big-0-0",
            "default/big Planned=True FitFound",
            "default/big patch Pod big-0-0 cachalot.dev/serving=false",
            "default/big delete Pod big-0-0",
            "default/wide create Pod wide-0-0-0",
            "default/wide create Pod wide-0-0-1",
            "default/wide Planned=True FitFound",
        ],
        "{lines:#?}"
    );
}

/// A group reserves all its places at once, and gets them when all are free.
#[test]
fn a_group_of_higher_priority_takes_places_on_several_nodes_or_none() {
    let tale = |nodes: Vec<Node>| {
        told(
            vec![
                r1_of("small", None, json!({"replicas": 2})),
                r1_of(
                    "wide",
                    Some("high"),
                    json!({"replicas": 0, "parallelism": {"tensor": 16}}),
                ),
            ],
            nodes,
            &[
                json!({"afterSeconds": 300, "scale": {"name": "wide", "replicas": 1}}),
                json!({"afterSeconds": 600, "wait": {}}),
            ],
        )
    };
    let lines = tale(vec![h200x8("a"), h200x8("b")]);
    let from = lines.iter().position(|line| line.contains("wide-0-0-0"));
    assert_eq!(
        lines[from.unwrap()..],
        [
            "default/wide create Pod wide-0-0-0",
            "default/wide create Pod wide-0-0-1",
            "default/wide Planned=False Preempting",
            "default/small patch Pod small-0-0 cachalot.dev/serving=false",
            "default/small patch Pod small-1-0 cachalot.dev/serving=false",
            "default/small Planned=False Preempted",
            "default/small delete Pod small-0-0",
            "default/small delete Pod small-1-0",
            "default/wide release Pod wide-0-0-0",
            "default/wide release Pod wide-0-0-1",
            "default/wide Planned=True FitFound",
        ],
        "{lines:#?}"
    );
    // One node of the two that it needs is nobody's to give: the other is left alone.
    let lines = tale(vec![h200x8("a"), h100x8("b")]);
    let moved = |line: &String| line.contains("serving=false") || line.contains("wide-0");
    assert!(!lines.iter().any(moved), "{lines:#?}");
}

/// What is free is taken first; of the domains that would do, the one that costs others least.
#[test]
fn a_group_disturbs_as_few_as_it_can_within_one_domain() {
    let clique = |name: &str, value: &str| {
        with(
            h200x8(name),
            json!({"metadata": {"labels": {"nvidia.com/gpu.clique": value}}}),
        )
    };
    let nodes = ["a", "b", "c", "d"];
    let cliques = ["x", "x", "y", "y"];
    let nodes: Vec<Node> = nodes
        .iter()
        .zip(cliques)
        .map(|(n, c)| clique(n, c))
        .collect();
    // Both domains could be had: one has two replicas to disturb, the other one, and a free node.
    let tale = |class: Option<&str>| {
        let on = |key: &str, value: &str| json!({"placement": {"nodeSelector": {key: value}}});
        let mut alone = on("kubernetes.io/hostname", "c");
        merge(&mut alone, json!({"replicas": 1}));
        let mut small = on("nvidia.com/gpu.clique", "x");
        merge(&mut small, json!({"replicas": 2}));
        let wide = json!({"replicas": 0, "parallelism": {"tensor": 16}});
        let lines = told(
            vec![
                r1_of("alone", class, alone),
                r1_of("small", Some("low"), small),
                r1_of("wide", Some("high"), wide),
            ],
            nodes.clone(),
            &[
                json!({"afterSeconds": 300, "scale": {"name": "wide", "replicas": 1}}),
                json!({"afterSeconds": 600, "wait": {}}),
            ],
        );
        let seen = lines.into_iter().filter_map(|line| {
            let words = line.strip_prefix("default/")?;
            let is_news = words.contains("serving=false") || words.contains("release");
            is_news.then(|| words.replace(" cachalot.dev/serving=false", ""))
        });
        seen.collect::<Vec<_>>()
    };
    let released = ["wide release Pod wide-0-0-0", "wide release Pod wide-0-0-1"];
    assert_eq!(
        tale(Some("low")),
        [&["alone patch Pod alone-0-0"], &released[..]].concat()
    );
    // Two of the lowest priority rather than one above it; and what becomes free on the way does not tempt the group out
    // of its domain.
    let both = ["small patch Pod small-0-0", "small patch Pod small-1-0"];
    assert_eq!(tale(None), [&both[..], &released[..]].concat());
}

#[test]
fn nobody_gives_way_to_an_equal_or_to_a_class_that_never_preempts() {
    for (low, high) in [
        ("low", "low"),
        ("high", "high"),
        ("low", "meek"),
        ("high", "low"),
    ] {
        let lines = told(
            vec![
                r1_of("small", Some(low), json!({"replicas": 2})),
                r1_of("big", Some(high), json!({"replicas": 0})),
            ],
            vec![h200x8("a"), h200x8("b")],
            &[json!({"afterSeconds": 300, "scale": {"name": "big", "replicas": 1}})],
        );
        let moved = lines
            .iter()
            .any(|line| line.contains("serving=false") || line.contains("big-0"));
        assert!(!moved, "{low} before {high}: {lines:#?}");
        assert_eq!(
            lines.last().unwrap(),
            "default/big Planned=False NoNodeFits"
        );
    }
}

/// What a rollout adds for a while is not missing.
#[test]
fn the_surge_of_a_rollout_takes_nobodys_place() {
    let lines = told(
        vec![
            r1_of("small", None, json!({"replicas": 1})),
            r1_of(
                "big",
                Some("high"),
                json!({"replicas": 1, "rollout": {"maxSurge": 1}}),
            ),
        ],
        vec![h200x8("a"), h200x8("b")],
        &[patch("big", json!({"context": {"maxTokens": 8192}}))],
    );
    assert!(
        !lines.iter().any(|line| line.contains("small-0-0 ")),
        "{lines:#?}"
    );
    assert!(
        lines
            .iter()
            .any(|line| line == "default/big Planned=False NoNodeFits"),
        "{lines:#?}"
    );
}

/// A place that is waited for is left to those who have it once there is room elsewhere.
#[test]
fn those_who_leave_are_taken_back_when_room_appears_elsewhere() {
    let lines = told(
        vec![
            r1_of("small", None, json!({"replicas": 2})),
            r1_of("big", Some("high"), json!({"replicas": 0})),
        ],
        vec![h200x8("a"), h200x8("b")],
        &[
            json!({"afterSeconds": 300, "scale": {"name": "big", "replicas": 1}}),
            json!({"afterSeconds": 2, "nodesJoin": {"like": "a"}}),
        ],
    );
    let wanted = [
        "default/big delete Pod big-0-0",
        "default/big create Pod big-1-0",
        "default/small patch Pod small-0-0 cachalot.dev/serving=true",
    ];
    for line in wanted {
        assert!(
            lines.iter().any(|found| found == line),
            "no {line} in {lines:#?}"
        );
    }
    assert!(
        !lines.iter().any(|line| line.contains("delete Pod small")),
        "{lines:#?}"
    );
}

/// A spec that is not valid any more does not keep a place from one that comes first.
#[test]
fn replicas_give_way_also_when_their_spec_makes_no_sense() {
    let lines = told(
        vec![
            r1_of("small", None, json!({"replicas": 2})),
            r1_of("big", Some("high"), json!({"replicas": 0})),
        ],
        vec![h200x8("a"), h200x8("b")],
        &[
            patch("small", json!({"rollout": {"maxSurge": 0}})),
            json!({"afterSeconds": 60, "scale": {"name": "big", "replicas": 1}}),
        ],
    );
    assert!(
        lines
            .iter()
            .any(|line| line == "default/big release Pod big-0-0"),
        "{lines:#?}"
    );
}

/// The story of many: it settles, and no rule is broken on the way (see `sim::rules`).
#[test]
fn three_ranks_on_too_few_nodes_settle_with_the_highest_served() {
    let outcome = run(Tale {
        seed: 3,
        inventory: Inventory {
            nodes: (0..4).map(|i| h200x8(&format!("n{i}"))).collect(),
            deployments: vec![
                r1_of("least", Some("low"), json!({"replicas": 4})),
                r1_of("usual", None, json!({"replicas": 3})),
                r1_of(
                    "first",
                    Some("high"),
                    json!({"replicas": 2, "placement": {"binding": "direct"}}),
                ),
            ],
            priority_classes: classes(),
            ..Inventory::default()
        },
        report: report(),
        settings: settings(),
        faults: Faults::default(),
        steps: 200,
    });
    assert!(outcome.is_ok(), "{outcome:?}");
}

struct Fleet {
    cluster: Cluster,
    contest: Contest,
    deployment: ModelDeployment,
}

/// Nodes with eight GPUs; pods as (deployment, node, GPUs, priority, seconds of age).
fn fleet(nodes: usize, pods: &[(&str, usize, u64, i32, i64)], floors: &[(&str, u32)]) -> Fleet {
    let views = (0..nodes).map(|i| Arc::new(NodeView::of(&h200x8(&format!("n{i}")))));
    let pods: Vec<Pod> = pods
        .iter()
        .zip(0..)
        .map(|((owner, node, gpus, priority, age), index)| {
            serde_json::from_value(json!({
                "metadata": {"name": format!("{owner}-{index}"), "namespace": "d", "uid": format!("u{index}"),
                    "creationTimestamp": ago(*age),
                    "labels": {names::MODEL_DEPLOYMENT: owner, names::COMPONENT: names::ENGINE, names::SERVING: "true"}},
                "spec": {"nodeName": format!("n{node}"), "priority": priority, "containers": [
                    {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": gpus.to_string()}}}]},
                "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]},
            }))
            .unwrap()
        })
        .collect();
    let claims: Vec<_> = pods.iter().filter_map(operator_core::Claim::of).collect();
    let rivals = pods
        .iter()
        .map(|pod| Rival::of("d".into(), Arc::new(PodView::of(pod))));
    let classes = classes()
        .iter()
        .map(|class| Arc::new(PriorityClassView::of(class)))
        .collect();
    let contest = Contest::of(("d", "big"), Some("high"), classes, rivals, |(_, owner)| {
        let mut all = floors.iter();
        all.find(|(name, _)| name == owner)
            .map_or(0, |(_, least)| *least)
    });
    Fleet {
        cluster: Cluster::new(views, &claims),
        contest,
        deployment: deployment(
            "big",
            json!({"accelerator": {"type": "nvidia"}, "parallelism": {"tensor": 4}}),
        ),
    }
}

/// The node that is chosen for a replica of four GPUs, and who leaves it.
fn chosen(fleet: &Fleet) -> Option<(String, Vec<String>)> {
    let valid = validate(&fleet.deployment).unwrap();
    let layouts = fit::layouts(&valid, &facts_of(SMALL_CONFIG), &fleet.cluster).unwrap();
    let wish = Wish {
        layout: &layouts[0],
        requests: objects::engine_requests(&valid, &layouts[0]),
        placement: &valid.placement,
        own: Default::default(),
        avoid: Vec::new(),
        holders: Default::default(),
    };
    let room = Room::new(&fleet.cluster);
    assert!(placement::offer(&wish, &room).is_err(), "there is room");
    let taking = preemption::choose(Ask {
        wish: &wish,
        room: &room,
        contest: &fleet.contest,
        spoken_for: &Default::default(),
        on_demand_only: false,
    })?;
    let mut victims: Vec<String> = taking.victims.iter().map(|v| v.pod.name.clone()).collect();
    victims.sort();
    Some((taking.node, victims))
}

#[test]
fn the_place_that_costs_others_least_is_taken() {
    let of = |node: &str, victims: &[&str]| {
        Some((
            node.to_owned(),
            victims.iter().map(|v| (*v).to_owned()).collect::<Vec<_>>(),
        ))
    };
    // The lowest priority, though two have to leave for it.
    let pods = [
        ("a", 0, 8, 5, 0),
        ("b", 1, 4, 0, 0),
        ("b", 1, 2, 0, 0),
        ("b", 1, 2, 0, 0),
    ];
    assert_eq!(chosen(&fleet(2, &pods, &[])), of("n1", &["b-1"]));
    // The fewest: one of four GPUs and not two of two.
    let pods = [("a", 0, 2, 0, 0), ("a", 0, 2, 0, 0), ("a", 0, 4, 0, 0)];
    assert_eq!(chosen(&fleet(1, &pods, &[])), of("n0", &["a-2"]));
    // Two of two on one node, or one of four on the other.
    let pods = [
        ("a", 0, 2, 0, 0),
        ("a", 0, 2, 0, 0),
        ("c", 0, 4, 7, 0),
        ("b", 1, 4, 0, 0),
        ("c", 1, 4, 7, 0),
    ];
    assert_eq!(chosen(&fleet(2, &pods, &[])), of("n1", &["b-3"]));
    // One that its ModelDeployment promises to keep stays where another can be spared.
    let pods = [("a", 0, 8, 0, 0), ("b", 1, 8, 0, 0), ("b", 2, 8, 0, 0)];
    assert_eq!(
        chosen(&fleet(3, &pods, &[("a", 1), ("b", 1)])),
        of("n1", &["b-1"])
    );
    // The least left over: no node is opened that would stay half empty.
    let pods = [("a", 0, 8, 0, 0), ("b", 1, 4, 0, 0), ("c", 1, 4, 7, 0)];
    assert_eq!(chosen(&fleet(2, &pods, &[])), of("n1", &["b-1"]));
    // Of those that are alike the youngest.
    let pods = [("a", 0, 4, 0, 900), ("a", 0, 4, 0, 30)];
    assert_eq!(chosen(&fleet(1, &pods, &[("a", 1)])), of("n0", &["a-1"]));
    // Nobody of higher priority.
    assert_eq!(chosen(&fleet(1, &[("a", 0, 8, 1000, 0)], &[])), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whoever is chosen, is of lower priority; without them the replica fits; none leaves for nothing.
    #[test]
    fn those_who_leave_are_worth_less_and_all_of_them_are_needed(
        pods in prop::collection::vec((0..3usize, prop::sample::select(vec![1u64, 2, 4, 8]), -20..1500i32, 0..99i64), 1..14),
        others in prop::array::uniform3((-20..1500i32, 0..99i64)),
    ) {
        let mut left = [8u64; 3];
        let mut pods: Vec<_> = pods
            .into_iter()
            .filter(|(node, gpus, ..)| {
                let fits = left[*node] >= *gpus;
                left[*node] -= if fits { *gpus } else { 0 };
                fits
            })
            .map(|(node, gpus, priority, age)| ("a", node, gpus, priority, age))
            .collect();
        // Nowhere is room for the four that are asked for.
        for (node, (priority, age)) in others.into_iter().enumerate() {
            for _ in 0..left[node] / 4 {
                pods.push(("a", node, 4, priority, age));
            }
        }
        let fleet = fleet(3, &pods, &[]);
        let fits = |node: usize, without: &dyn Fn(usize, i32) -> bool| {
            let stay = pods.iter().enumerate().filter(|(index, pod)| pod.1 == node && !without(*index, pod.3));
            stay.map(|(_, pod)| pod.2).sum::<u64>() <= 4
        };
        let Some((node, victims)) = chosen(&fleet) else {
            for node in 0..3 {
                prop_assert!(!fits(node, &|_, priority| priority < 1000), "n{node} could be taken");
            }
            return Ok(());
        };
        let node: usize = node[1..].parse().unwrap();
        let indices: Vec<usize> = victims.iter().map(|name| name[2..].parse().unwrap()).collect();
        for index in &indices {
            prop_assert!(pods[*index].3 < 1000 && pods[*index].1 == node);
            prop_assert!(!fits(node, &|other, _| indices.contains(&other) && other != *index));
        }
        prop_assert!(fits(node, &|other, _| indices.contains(&other)));
        // No other node would do with a lower highest priority.
        let highest = indices.iter().map(|index| pods[*index].3).max().unwrap();
        for other in 0..3 {
            prop_assert!(!fits(other, &|_, priority| priority < highest));
        }
    }
}

#[test]
fn a_plan_that_takes_the_place_of_an_equal_is_refused() {
    let mut story =
        story(r1(json!({"placement": {"priorityClassName": "high"}}))).on([h200x8("a")]);
    let plan = story.plan();
    let mut plan = plan;
    let uid = |priority: i32| {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "x-0", "uid": "u", "labels": {names::MODEL_DEPLOYMENT: "x", names::COMPONENT: "engine"}},
            "spec": {"nodeName": "a", "priority": priority, "containers": []},
        }))
        .unwrap();
        Rival::of("default".into(), Arc::new(PodView::of(&pod)))
    };
    for action in &mut plan.actions {
        if let Action::Create(operator_core::Object::Pod(pod)) = action {
            let annotations = pod.metadata.annotations.as_mut().unwrap();
            annotations.insert(names::PREEMPTS.into(), "default/x/u".into());
        }
    }
    let classes = classes()
        .iter()
        .map(|class| Arc::new(PriorityClassView::of(class)))
        .collect();
    story.snapshot.contest = Contest {
        classes,
        ..Contest::default()
    };
    for (priority, flaws) in [(999, 0), (1000, 1)] {
        story.snapshot.contest.rivals = vec![uid(priority)];
        let found = operator_core::check(&plan, &story.snapshot, &story.settings);
        assert_eq!(found.len(), flaws, "{priority}: {found:?}");
    }
}
