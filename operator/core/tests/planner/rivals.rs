//! Who may be asked to leave and for whom, and where the ranks of a group go beside others.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::common::*;
use k8s_openapi::api::core::v1::Node;
use operator_core::gang::{self, Asked};
use operator_core::placement::{Room, Wish};
use operator_core::preemption::{self, Ask};
use operator_core::priority::floor;
use operator_core::{
    Cluster, Contest, NodeView, PodView, PriorityClassView, Rival, fit, names, objects, validate,
};
use serde_json::{Value, json};

/// An engine pod of another ModelDeployment, of no priority, changed by a patch.
fn rival(patch: Value) -> Rival {
    let pod = json!({
        "metadata": {"name": "p", "uid": "u",
            "labels": {names::MODEL_DEPLOYMENT: "other", names::COMPONENT: names::ENGINE}},
        "spec": {"nodeName": "n", "priority": 0, "containers": []},
    });
    let pod = serde_json::from_value(with(pod, patch)).unwrap();
    Rival::of("d".into(), Arc::new(PodView::of(&pod)))
}

fn contest(pods: Vec<Rival>) -> Contest {
    let high = json!({"metadata": {"name": "high"}, "value": 1000});
    let high = PriorityClassView::of(&serde_json::from_value(high).unwrap());
    Contest::of(
        ("d", "own"),
        Some("high"),
        vec![Arc::new(high)],
        pods,
        |_| 0,
    )
}

#[test]
fn whole_replicas_of_others_that_are_worth_less_may_be_asked_to_leave() {
    let label = |key: &str, value: &str| json!({"metadata": {"labels": {key: value}}});
    for (patch, may_leave) in [
        (json!({}), true),
        (json!({"spec": {"priority": 999}}), true),
        (json!({"spec": {"priority": 1000}}), false),
        (json!({"spec": {"nodeName": null}}), false),
        (json!({"status": {"phase": "Failed"}}), false),
        (label(names::MODEL_DEPLOYMENT, "own"), false),
        (label(names::COMPONENT, names::INSPECT), false),
        (
            json!({"metadata": {"annotations": {names::RANKS: "2"}}}),
            true,
        ),
    ] {
        let found = contest(vec![rival(patch.clone())]).rivals.len();
        assert_eq!(found == 1, may_leave, "{patch}");
    }
}

/// It leaves whole: one rival, counted on every node that it holds.
#[test]
fn the_pods_of_a_group_are_one_rival() {
    let rank = |rank: &str, index: &str, node: &str| {
        rival(json!({
            "metadata": {"uid": format!("u{index}{rank}"), "annotations": {names::RANKS: "2"},
                "labels": {names::RANK: rank, names::REPLICA: index}},
            "spec": {"nodeName": node},
        }))
    };
    let pods = vec![
        rank("1", "0", "b"),
        rank("0", "1", "c"),
        rank("0", "0", "a"),
    ];
    let contest = contest(pods);
    let found: Vec<_> = contest
        .rivals
        .iter()
        .map(|rival| {
            (
                &*rival.pod.uid,
                rival.nodes().into_iter().collect::<Vec<_>>(),
            )
        })
        .collect();
    assert_eq!(found, [("u00", vec!["a", "b"]), ("u10", vec!["c"])]);
}

#[test]
fn nobody_gives_way_to_an_equal_that_names_it() {
    let claimant = rival(json!({
        "metadata": {"uid": "c", "annotations": {names::PREEMPTS: "d/other/u"}},
        "spec": {"nodeName": null, "priority": 1000},
    }));
    let contest = contest(vec![claimant]);
    let gives_way = |priority: i32| {
        let pod = rival(json!({"spec": {"priority": priority}})).pod;
        contest.claimant(&pod).is_some()
    };
    assert_eq!((gives_way(999), gives_way(1000)), (true, false));
}

#[test]
fn what_is_promised_is_what_may_not_be_missing() {
    let range = json!({"minReplicas": 2, "maxReplicas": 5});
    for (spec, least) in [
        (json!({"replicas": 3}), 3),
        (json!({"replicas": 3, "rollout": {"maxUnavailable": 1}}), 2),
        (json!({"replicas": 1, "rollout": {"maxUnavailable": 2}}), 0),
        (json!({"replicas": null, "autoscaling": range}), 2),
    ] {
        assert_eq!(floor(&deployment("m", spec.clone()).spec), least, "{spec}");
    }
}

/// Nodes for some ranks of sixteen GPUs, beside what is there.
fn placed(spec: Value, nodes: Vec<Node>, own: &[(&str, usize)], asked: &Asked<'_>) -> Vec<String> {
    let mut whole = json!({"parallelism": {"tensor": 16, "expert": 16}});
    merge(&mut whole, spec);
    let story = story(r1(whole)).on(nodes);
    let valid = validate(&story.snapshot.deployment).unwrap();
    let cluster = &story.snapshot.cluster;
    let layouts = fit::layouts(&valid, &facts_of(R1_CONFIG), cluster).unwrap();
    let own = own.iter().map(|(node, count)| ((*node).to_owned(), *count));
    let wish = Wish {
        layout: &layouts[0],
        requests: objects::engine_requests(&valid, &layouts[0]),
        placement: &valid.placement,
        own: own.collect::<BTreeMap<_, _>>(),
        avoid: Vec::new(),
        holders: Default::default(),
    };
    gang::place(&wish, &Room::new(cluster), asked).unwrap_or_default()
}

fn labelled(name: &str, key: &str, value: &str) -> Node {
    with(h100x8(name), json!({"metadata": {"labels": {key: value}}}))
}

#[test]
fn a_missing_rank_goes_to_the_domain_of_the_others_and_not_to_their_node() {
    let clique = |name, value| labelled(name, "nvidia.com/gpu.clique", value);
    let asked = Asked {
        ranks: 1,
        beside: vec!["c"],
        ..Asked::default()
    };
    let nodes = vec![clique("a", "x"), clique("b", "y"), clique("c", "y")];
    assert_eq!(placed(json!({}), nodes, &[], &asked), ["b"]);
    let nodes = vec![clique("a", "x"), clique("c", "y")];
    assert_eq!(placed(json!({}), nodes, &[], &asked), ["a"]);
}

#[test]
fn ranks_go_last_to_nodes_that_refused_them_and_first_to_where_fewest_are() {
    let nodes = || vec![h100x8("a"), h100x8("b"), h100x8("c")];
    let refused = ["a".to_owned()];
    let asked = Asked {
        ranks: 2,
        refused: &refused,
        ..Asked::default()
    };
    assert_eq!(placed(json!({}), nodes(), &[], &asked), ["b", "c"]);
    let zone = "topology.kubernetes.io/zone";
    let nodes = vec![
        labelled("a", zone, "1"),
        labelled("c", zone, "2"),
        labelled("d", zone, "2"),
    ];
    let asked = Asked {
        ranks: 1,
        ..Asked::default()
    };
    let spread = json!({"placement": {"topology": {"spreadBy": zone}}});
    assert_eq!(placed(spread, nodes, &[("a", 1)], &asked), ["c"]);
}

/// GPUs of one pod of a rival, and the number of its node.
type Part = (usize, u64);

/// Nodes of eight GPUs that rivals hold: the priority and the parts of each; those of several parts are groups.
struct Held {
    cluster: Cluster,
    contest: Contest,
    spoken_for: BTreeSet<String>,
    on_demand_only: bool,
}

fn held(nodes: Vec<Node>, rivals: &[(i32, &[Part])]) -> Held {
    let mut pods = Vec::new();
    let mut claims = Vec::new();
    for (index, (priority, parts)) in rivals.iter().enumerate() {
        for (rank, (node, gpus)) in parts.iter().enumerate() {
            let name = format!("{index}-{rank}");
            let pod = rival(json!({
                "metadata": {"name": name, "uid": name, "annotations": {names::RANKS: parts.len().to_string()},
                    "labels": {names::RANK: rank.to_string(), names::REPLICA: index.to_string()}},
                "spec": {"nodeName": format!("n{node}"), "priority": priority, "containers": [
                    {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": gpus.to_string()}}}]},
            }));
            claims.extend(pod.pod.claim());
            pods.push(pod);
        }
    }
    let views = nodes.iter().map(|node| Arc::new(NodeView::of(node)));
    Held {
        cluster: Cluster::new(views, &claims),
        contest: contest(pods),
        spoken_for: BTreeSet::new(),
        on_demand_only: false,
    }
}

impl Held {
    /// Asks for places for a replica of four GPUs in so many pods.
    fn asked<T>(&self, pods: u32, ask: impl FnOnce(Ask<'_>) -> T) -> T {
        let spec = json!({"accelerator": {"type": "nvidia"}, "parallelism": {"tensor": 4}});
        let valid = validate(&deployment("own", spec)).unwrap();
        let layouts = fit::layouts(&valid, &facts_of(SMALL_CONFIG), &self.cluster).unwrap();
        let layout = layouts[0].clone().over(pods);
        let wish = Wish {
            layout: &layout,
            requests: objects::engine_requests(&valid, &layout),
            placement: &valid.placement,
            own: Default::default(),
            avoid: Vec::new(),
            holders: Default::default(),
        };
        ask(Ask {
            wish: &wish,
            room: &Room::new(&self.cluster),
            contest: &self.contest,
            spoken_for: &self.spoken_for,
            on_demand_only: self.on_demand_only,
        })
    }

    /// The node for a replica of four GPUs.
    fn node(&self) -> Option<String> {
        Some(self.asked(1, preemption::choose)?.node)
    }

    /// The nodes of two ranks of two GPUs, and the rivals that leave.
    fn pair(&self) -> (Vec<String>, Vec<String>) {
        let places = self.asked(2, |ask| preemption::choose_for_group(ask, 2));
        places.map_or_else(Default::default, |places| {
            let names = places.victims.iter().map(|rival| rival.pod.name.clone());
            (places.nodes, names.collect())
        })
    }
}

fn spot(name: &str) -> Node {
    let label = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    with(h200x8(name), label)
}

#[test]
fn no_place_is_taken_on_a_node_out_of_use_or_on_spot_where_it_must_not_be() {
    let both: [(i32, &[Part]); 2] = [(0, &[(0, 8)]), (5, &[(1, 8)])];
    let of = |first: Node, on_demand_only: bool| {
        let held = held(vec![first, h200x8("n1")], &both);
        Held {
            on_demand_only,
            ..held
        }
    };
    let cordoned = with(h200x8("n0"), json!({"spec": {"unschedulable": true}}));
    assert_eq!(of(h200x8("n0"), true).node().unwrap(), "n0");
    assert_eq!(of(cordoned, false).node().unwrap(), "n1");
    assert_eq!(of(spot("n0"), false).node().unwrap(), "n0");
    assert_eq!(of(spot("n0"), true).node().unwrap(), "n1");
    // A group takes no spot node either, though it is free.
    let rivals: [(i32, &[Part]); 2] = [(0, &[(1, 8)]), (0, &[(2, 8)])];
    let nodes = vec![spot("n0"), h200x8("n1"), h200x8("n2")];
    let free = held(nodes, &rivals);
    assert_eq!(free.pair().0, ["n0", "n1"]);
    let strict = Held {
        on_demand_only: true,
        ..free
    };
    assert_eq!(strict.pair().0, ["n1", "n2"]);
}

#[test]
fn who_leaves_anyway_goes_before_one_that_is_worth_less() {
    let both: [(i32, &[Part]); 2] = [(0, &[(0, 8)]), (5, &[(1, 8)])];
    let mut all = held(vec![h200x8("n0"), h200x8("n1")], &both);
    assert_eq!(all.node().unwrap(), "n0");
    all.spoken_for = ["1-0".to_owned()].into();
    assert_eq!(all.node().unwrap(), "n1");
    all.spoken_for.clear();
    let second = &mut all.contest.rivals[1];
    Arc::make_mut(&mut second.pod).deleting = true;
    assert_eq!(all.node().unwrap(), "n1");
}

/// The first leaves both nodes when it leaves one, and gives its GPUs on the other once only.
#[test]
fn a_group_that_leaves_for_one_rank_is_not_counted_again_for_the_next() {
    let rivals: [(i32, &[Part]); 2] = [(0, &[(0, 8), (1, 1)]), (5, &[(1, 7)])];
    let all = held(vec![h200x8("n0"), h200x8("n1")], &rivals);
    let (nodes, leaving) = all.pair();
    assert_eq!(nodes, ["n0", "n1"]);
    assert_eq!(leaving, ["0-0", "1-0"]);
}

/// Two GPUs each, and a node has eight.
#[test]
fn ranks_on_gpus_have_a_node_each_however_small_they_are() {
    let both: [(i32, &[Part]); 2] = [(0, &[(0, 8)]), (0, &[(1, 8)])];
    let nodes = || vec![h200x8("n0"), h200x8("n1")];
    assert_eq!(held(nodes(), &both).pair().0, ["n0", "n1"]);
    let asked = Asked {
        ranks: 2,
        ..Asked::default()
    };
    let free = held(nodes(), &[]);
    let found = free.asked(2, |ask| gang::place(ask.wish, ask.room, &asked));
    assert_eq!(found, Ok(vec!["n0".to_owned(), "n1".to_owned()]));
}
