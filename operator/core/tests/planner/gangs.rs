//! Replicas of several pods: laid out, placed, made, drained and replaced whole, or not at all.

use crate::common::*;
use k8s_openapi::api::core::v1::Pod;
use operator_api::ModelDeployment;
use operator_core::replicas::observe;
use operator_core::snapshot::{PodPhase, Scheduled};
use operator_core::{Action, Object, Plan, check, names};
use serde_json::{Value, json};

/// Two ranks on the processors, each a pod.
fn pair(spec: Value) -> ModelDeployment {
    let mut whole = json!({"parallelism": {"tensor": 2}});
    merge(&mut whole, spec);
    deployment("m", whole)
}

fn pair_on(spec: Value, nodes: usize) -> Story {
    let nodes = (0..nodes).map(|index| node(&format!("n{index}"), "4", "8Gi"));
    story(pair(spec)).inspected().on(nodes.collect::<Vec<_>>())
}

/// Sixteen GPUs a replica, on nodes of eight.
fn wide(spec: Value) -> ModelDeployment {
    let mut whole = json!({"parallelism": {"tensor": 16, "expert": 16}});
    merge(&mut whole, spec);
    r1(whole)
}

fn created(plan: &Plan) -> Vec<Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some((**pod).clone()),
        _ => None,
    });
    pods.collect()
}

/// Pods without revision: `m-0-0-1` is rank 1 of the first attempt of replica 0.
fn moves(plan: &Plan) -> Vec<String> {
    let verbs = ["create Pod", "delete Pod", "patch Pod"];
    actions(plan)
        .into_iter()
        .filter(|action| verbs.iter().any(|verb| action.starts_with(verb)))
        .map(|action| {
            let words = action
                .split(' ')
                .filter(|word| !word.contains("drain-since"));
            let words: Vec<String> = words
                .map(|word| {
                    let parts = word.split('-').filter(|part| part.len() != 8);
                    parts.collect::<Vec<_>>().join("-")
                })
                .collect();
            words.join(" ")
        })
        .collect()
}

fn name(story: &Story, replica: u32, rank: u32) -> String {
    let pods = &story.snapshot.pods;
    let found = pods.iter().find(|pod| {
        pod.label(names::REPLICA) == replica.to_string() && pod.rank() == rank && !pod.deleting
    });
    found.unwrap().name.clone()
}

fn first_nodes(plan: &Plan) -> Vec<String> {
    let pods = created(plan);
    let nodes = pods.iter().map(operator_core::objects::preferred_nodes);
    nodes
        .map(|nodes| {
            assert_eq!(nodes.len(), 1, "each rank is planned for one node");
            nodes[0].clone()
        })
        .collect()
}

fn clique(name: &str, clique: &str) -> k8s_openapi::api::core::v1::Node {
    with(
        h100x8(name),
        json!({"metadata": {"labels": {"nvidia.com/gpu.clique": clique}}}),
    )
}

#[test]
fn ranks_on_processors_share_nodes_and_those_on_gpus_fill_them() {
    let given = deployment("m", json!({"parallelism": {"tensor": 2}}));
    let plan = story(given).inspected().on([node("a", "4", "8Gi")]).plan();
    // One node may take several ranks on the processors.
    assert_eq!(first_nodes(&plan), ["a", "a"]);
    // Sixteen GPUs on nodes of eight.
    let wide = r1(json!({"parallelism": {"tensor": 16, "expert": 16}}));
    let plan = story(wide)
        .of_config(R1_CONFIG)
        .on([h100x8("a"), h100x8("b")])
        .plan();
    assert_eq!(first_nodes(&plan), ["a", "b"]);
    for pod in created(&plan) {
        let container = &pod.spec.unwrap().containers[0];
        let limits = container.resources.clone().unwrap().limits.unwrap();
        assert_eq!(limits["nvidia.com/gpu"].0, "8");
        let command = container.command.clone().unwrap().join(" ");
        assert!(command.contains("--world-size 2 "), "{command}");
    }
}

#[test]
fn each_rank_on_the_processors_is_a_pod_that_knows_its_leader() {
    let plan = pair_on(json!({}), 2).plan();
    assert_eq!(moves(&plan), ["create Pod m-0-0-0", "create Pod m-0-0-1"]);
    assert!(actions(&plan).contains(&"apply Service m-ranks".to_owned()));
    let pods = created(&plan);
    let leader = pods[0].metadata.name.clone().unwrap();
    for (rank, pod) in pods.iter().enumerate() {
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.hostname, pod.metadata.name);
        assert_eq!(spec.subdomain.as_deref(), Some("m-ranks"));
        let command = spec.containers[0].command.clone().unwrap().join(" ");
        let told =
            format!("--rank {rank} --world-size 2 --leader {leader}.m-ranks.default.svc:8001");
        assert!(command.ends_with(&told), "{command}");
        let labels = pod.metadata.labels.clone().unwrap();
        // Only the first rank is behind the Service.
        assert_eq!(labels.contains_key(names::SERVING), rank == 0);
        let probe = spec.containers[0].startup_probe.clone().unwrap();
        let path = probe.http_get.unwrap().path.unwrap();
        assert_eq!(path, ["/startupz", "/livez"][rank]);
    }
    let mut nodes = first_nodes(&plan);
    nodes.sort();
    assert_eq!(nodes, ["n0", "n1"]);
    let (_, reason, _) = condition(&plan, "Planned");
    assert_eq!(reason, "FitFound");
    let summary = plan.status.plan.unwrap();
    assert_eq!(summary.parallelism, "TP 2, EP 2 over 2 pods");
}

#[test]
fn the_pods_of_one_replica_have_one_revision() {
    let plan = pair_on(json!({"replicas": 2}), 2).plan();
    let revisions: std::collections::BTreeSet<_> = created(&plan)
        .iter()
        .map(|pod| pod.metadata.labels.clone().unwrap()[names::REVISION].clone())
        .collect();
    assert_eq!(revisions.len(), 1);
    assert_eq!(plan.status.revision, revisions.into_iter().next());
}

#[test]
fn a_replica_answers_when_every_rank_does() {
    let mut story = pair_on(json!({}), 2).running();
    assert_eq!(story.plan().status.ready.as_deref(), Some("1/1"));
    let follower = name(&story, 0, 1);
    story.pod(&follower, |pod| pod.ready = false);
    assert_eq!(story.plan().status.ready.as_deref(), Some("0/1"));
    assert_eq!(story.plan().status.replicas, Some(1));
}

#[test]
fn all_ranks_have_a_place_or_none_has() {
    let one_node = story(wide(json!({}))).on([h100x8("a")]);
    let plan = one_node.plan();
    assert!(created(&plan).is_empty());
    let story = one_node.on([h100x8("b"), node("cpu", "64", "512Gi")]);
    let plan = story.plan();
    assert_eq!(first_nodes(&plan), ["a", "b"]);
    let gpus: Vec<u64> = created(&plan)
        .iter()
        .map(|pod| operator_core::Resources::of_pod(pod.spec.as_ref().unwrap()).gpus)
        .collect();
    assert_eq!(gpus, [8, 8]);
    let plan = story.taken("b", 1).plan();
    assert!(created(&plan).is_empty());
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "NoNodeFits");
    let why = "1 node: can take a rank, but a replica needs places for 2 and 1 have one";
    assert!(message.contains(why), "{message}");
}

/// How many pods a replica has is seen on pods only; between two of them the budget stays as it was.
#[test]
fn the_budget_is_not_rewritten_while_there_are_no_pods() {
    let writes = |plan: &Plan| {
        let actions = actions(plan);
        let budgets = actions.iter().filter(|a| a.contains("PodDisruptionBudget"));
        budgets.count()
    };
    let story = pair_on(json!({"replicas": 2}), 4);
    let first = story.plan();
    let story = story.after(&first, |_| {});
    let second = story.plan();
    assert_eq!((writes(&first), writes(&second)), (1, 1));
    let mut story = story.after(&second, |_| {});
    assert_eq!(writes(&story.plan()), 0);
    story.snapshot.pods.clear();
    assert_eq!(writes(&story.plan()), 0);
}

#[test]
fn several_nodes_are_used_only_where_no_one_node_would_do() {
    let automatic = || r1(json!({}));
    let plan = story(automatic()).on([h100x8("a"), h100x8("b")]).plan();
    assert_eq!(
        plan.status.plan.as_ref().unwrap().parallelism,
        "TP 16, EP 16 over 2 pods"
    );
    let plan = story(automatic())
        .on([h100x8("a"), h100x8("b"), h200x8("c")])
        .taken("c", 1)
        .plan();
    // The single node that would do is taken; a group is no way around that.
    assert!(created(&plan).is_empty(), "{plan}");
}

#[test]
fn a_group_stays_within_one_nvlink_domain() {
    let nodes = [
        clique("a", "x"),
        clique("b", "y"),
        clique("c", "y"),
        clique("d", "z"),
    ];
    let plan = story(wide(json!({}))).on(nodes).plan();
    assert_eq!(first_nodes(&plan), ["b", "c"]);
    // Where no domain has room for all, it may span them.
    let nodes = [clique("a", "x"), clique("b", "y"), clique("c", "y")];
    let plan = story(wide(json!({}))).on(nodes).taken("c", 8).plan();
    assert_eq!(first_nodes(&plan), ["a", "b"]);
}

#[test]
fn a_pass_cut_short_is_completed() {
    let story = pair_on(json!({}), 2);
    let plan = story.plan();
    let mut cut = plan.clone();
    cut.actions.pop();
    let story = story.after(&cut, starts);
    assert_eq!(created(&story.plan()).len(), 1);
    assert_eq!(moves(&story.plan()), ["create Pod m-0-0-1"]);
    let node = first_nodes(&story.plan());
    assert_ne!(story.snapshot.pods[0].node.as_ref(), node.first());
}

#[test]
fn a_group_that_cannot_be_completed_is_taken_back() {
    let nodes = [h100x8("a"), h100x8("b")];
    let story = story(wide(json!({}))).on(nodes);
    let mut cut = story.plan();
    cut.actions.pop();
    let story = story.after(&cut, starts).taken("b", 8);
    assert_eq!(moves(&story.plan()), ["delete Pod r1-0-0-0"]);
}

#[test]
fn a_group_that_loses_a_rank_is_replaced_whole() {
    let story = pair_on(json!({}), 2).running();
    let follower = name(&story, 0, 1);
    let mut lost = story.clone();
    lost.snapshot.pods.retain(|pod| pod.name != follower);
    // No pod of the next group before the last of this one is gone: another index is used.
    assert_eq!(
        moves(&lost.plan()),
        [
            "delete Pod m-0-0-0",
            "create Pod m-1-0-0",
            "create Pod m-1-0-1"
        ]
    );
}

#[test]
fn a_failed_rank_takes_its_group_with_it_and_counts_once() {
    let mut story = pair_on(json!({}), 2).running();
    let follower = name(&story, 0, 1);
    let at = story.snapshot.now;
    story.pod(&follower, |pod| fails(pod, at));
    let plan = story.plan();
    assert_eq!(moves(&plan), ["delete Pod m-0-0-0"]);
    // While the first rank still runs nothing takes their place, whatever the pause says.
    let story = story.after(&plan, answers).later(30);
    assert_eq!(moves(&story.plan()), Vec::<String>::new());
    assert_ne!(condition(&story.plan(), "Planned").1, "PlanRejected");
    let plan = story.swept().plan();
    assert_eq!(
        moves(&plan),
        [
            "create Pod m-0-1-0",
            "create Pod m-0-1-1",
            "delete Pod m-0-0-1"
        ]
    );
    for pod in created(&plan) {
        assert_eq!(pod.metadata.annotations.unwrap()[names::FAILURES], "1");
    }
}

#[test]
fn a_silent_node_costs_the_whole_group() {
    let mut story = pair_on(json!({}), 2).running();
    let follower = name(&story, 0, 1);
    story.pod(&follower, |pod| pod.node = Some("gone".into()));
    let plan = story.later(60).plan();
    let deletes: Vec<(&str, bool)> = plan
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Delete {
                name, if_silent, ..
            } => Some((name.as_str(), if_silent.is_some())),
            _ => None,
        })
        .collect();
    // The node is read once more before anything is given up.
    assert_eq!(deletes.len(), 2, "{plan}");
    assert_eq!(deletes[0], (follower.as_str(), true));
    assert!(!deletes[1].1);
}

#[test]
fn a_group_drains_by_its_first_rank_and_leaves_whole() {
    let story = pair_on(json!({"replicas": 2}), 2).running();
    let story = story.edited(json!({"replicas": 1}));
    let plan = story.plan();
    assert_eq!(
        moves(&plan),
        ["patch Pod m-1-0-0 cachalot.dev/serving=false"]
    );
    let story = story.after(&plan, answers).later(6);
    let mut story = story;
    let leader = name(&story, 1, 0);
    let at = story.snapshot.now;
    let samples = story.snapshot.samples.entry(leader).or_default();
    samples.take_load(operator_core::LoadSample {
        at,
        report: engine_spec::LoadReport::default(),
    });
    let plan = story.plan();
    assert_eq!(moves(&plan), ["delete Pod m-1-0-0", "delete Pod m-1-0-1"]);
}

#[test]
fn a_first_rank_that_someone_ends_finishes_before_the_others_go() {
    let mut story = pair_on(json!({}), 2).running();
    let leader = name(&story, 0, 0);
    story.pod(&leader, |pod| pod.deleting = true);
    let deletes = |story: &Story| {
        let mut all = moves(&story.plan());
        all.retain(|action| action.starts_with("delete"));
        all
    };
    assert_eq!(deletes(&story), Vec::<String>::new());
    assert_eq!(deletes(&story.swept()), ["delete Pod m-0-0-1"]);
}

#[test]
fn a_group_that_is_refused_in_part_gives_its_part_back() {
    let refused = |story: &mut Story, seconds| {
        let follower = name(story, 0, 1);
        let since = ago(seconds);
        story.pod(&follower, |pod| {
            pod.node = None;
            pod.phase = PodPhase::Pending;
            pod.scheduled = Scheduled::Refused {
                since: Some(since),
                message: "no".into(),
            };
        });
    };
    let story = story(wide(json!({}))).on([h100x8("a"), h100x8("b")]);
    let story = story.after(&story.plan(), starts);
    let mut taken = story.clone().taken("b", 8);
    refused(&mut taken, 10);
    assert_eq!(moves(&taken.plan()), Vec::<String>::new());
    refused(&mut taken, 20);
    assert_eq!(
        moves(&taken.plan()),
        ["delete Pod r1-0-0-0", "delete Pod r1-0-0-1"]
    );
    // For a reason that the planner does not see it waits longer, but not for ever.
    let mut unseen = story;
    refused(&mut unseen, 290);
    assert_eq!(moves(&unseen.plan()), Vec::<String>::new());
    refused(&mut unseen, 310);
    assert_eq!(
        moves(&unseen.plan()),
        ["delete Pod r1-0-0-0", "delete Pod r1-0-0-1"]
    );
}

/// A group that waits for one pod is looked at late, but not after the grace of a node is over.
#[test]
fn a_refused_group_on_a_silent_node_is_looked_at_when_its_grace_is_over() {
    let mut story = story(wide(json!({}))).on([h100x8("a"), h100x8("b")]);
    story = story.after(&story.plan(), starts);
    let follower = name(&story, 0, 1);
    story.pod(&follower, |pod| {
        pod.node = None;
        pod.phase = PodPhase::Pending;
        pod.scheduled = Scheduled::Refused {
            since: Some(ago(1)),
            message: "no".into(),
        };
    });
    let looks_after = |story: &Story| story.plan().wake_after.unwrap().as_secs();
    assert_eq!(looks_after(&story), 299);
    let silent = json!({"status": {"conditions": [
        {"type": "Ready", "status": "Unknown", "lastTransitionTime": ago(5).to_string()}]}});
    let silent = story.on([with(h100x8("a"), silent)]);
    assert_eq!(looks_after(&silent), 15);
}

#[test]
fn of_a_group_the_pod_that_failed_first_speaks_and_one_that_is_deleted_last() {
    let mut story = pair_on(json!({}), 2).running();
    let (first, second) = (name(&story, 0, 0), name(&story, 0, 1));
    story.pod(&first, |pod| fails(pod, ago(10)));
    story.pod(&second, |pod| fails(pod, ago(20)));
    assert_eq!(observe(&story.snapshot)[0].pod.name, second);
    story.pod(&second, |pod| pod.deleting = true);
    assert_eq!(observe(&story.snapshot)[0].pod.name, first);
}

#[test]
fn a_group_that_a_quota_leaves_incomplete_is_taken_back() {
    let mut story = story(wide(json!({}))).on([h100x8("a"), h100x8("b")]);
    let mut cut = story.plan();
    cut.actions.pop();
    story = story.after(&cut, starts);
    assert_eq!(moves(&story.plan()), ["create Pod r1-0-0-1"]);
    let quota = serde_json::from_value(json!({
        "metadata": {"name": "gpus", "namespace": "default"},
        "spec": {"hard": {"requests.nvidia.com/gpu": "15"}},
        "status": {"used": {"requests.nvidia.com/gpu": "8"}},
    }));
    let quota = operator_core::QuotaView::of(&quota.unwrap()).unwrap();
    story.snapshot.quotas = vec![std::sync::Arc::new(quota)];
    assert_eq!(moves(&story.plan()), ["delete Pod r1-0-0-0"]);
}

/// It counted as off spot nodes while it was incomplete, and its last rank came to one.
#[test]
fn the_rest_of_a_group_stays_off_spot_nodes_as_the_group_does() {
    let spot = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    let nodes = [node("d", "4", "8Gi"), with(node("s", "4", "64Gi"), spot)];
    let spec = json!({"replicas": 2, "placement": {"spot": {"onDemandMin": 1}}});
    let story = story(pair(spec)).inspected().on(nodes);
    let plan = story.plan();
    assert_eq!(first_nodes(&plan), ["d", "d", "s", "s"]);
    let mut cut = plan;
    cut.actions.truncate(cut.actions.len() - 3);
    let mut story = story.after(&cut, starts);
    // Once it is whole it counts, and the other one goes where it is cheaper.
    assert_eq!(first_nodes(&story.plan()), ["d", "s", "s"]);
    // With one rank on a spot node it never counts.
    let first = name(&story, 0, 0);
    story.pod(&first, |pod| pod.node = Some("s".into()));
    assert_eq!(first_nodes(&story.plan()), ["d", "d", "d"]);
}

#[test]
fn rollouts_and_budgets_count_replicas() {
    let story = pair_on(json!({"replicas": 2}), 3).running();
    let budget = story.snapshot.disruption_budget.clone().unwrap();
    let least = budget.spec.as_ref().unwrap().min_available.clone().unwrap();
    // Four pods; one eviction breaks one replica.
    assert_eq!(serde_json::json!(least), json!(3));
    let rolled = story.edited(json!({"context": {"maxTokens": 256}}));
    // One replica more than wanted, in two pods.
    assert_eq!(created(&rolled.plan()).len(), 2);
}

#[test]
fn a_quota_counts_all_ranks() {
    let quota = |gpus: u64| {
        let quota = serde_json::from_value(json!({
            "metadata": {"name": "gpus", "namespace": "default"},
            "spec": {"hard": {"requests.nvidia.com/gpu": gpus.to_string()}},
        }));
        std::sync::Arc::new(operator_core::QuotaView::of(&quota.unwrap()).unwrap())
    };
    let mut story = story(wide(json!({}))).on([h100x8("a"), h100x8("b")]);
    story.snapshot.quotas = vec![quota(15)];
    assert_eq!(condition(&story.plan(), "Planned").1, "GpuQuotaExceeded");
    story.snapshot.quotas = vec![quota(16)];
    assert_eq!(created(&story.plan()).len(), 2);
}

#[test]
fn a_foreign_service_of_the_ranks_name_is_told_of() {
    let mut story = pair_on(json!({}), 2);
    let service = serde_json::from_value(json!({"metadata": {"name": "m-ranks"}}));
    story.snapshot.ranks_service = Some(std::sync::Arc::new(service.unwrap()));
    let plan = story.plan();
    assert_eq!(condition(&plan, "Planned").1, "NameTaken");
    assert!(created(&plan).is_empty());
}

#[test]
fn part_of_a_group_is_no_plan() {
    let story = pair_on(json!({}), 2);
    let mut plan = story.plan();
    plan.actions.pop();
    let flaws = check(&plan, &story.snapshot, &story.settings);
    assert_eq!(flaws, [operator_core::Flaw::PartGroup(0)]);
    let story = story.running();
    let mut plan = story.clone().edited(json!({"replicas": 0})).plan();
    let pod = observe(&story.snapshot)[0].mates[0];
    plan.actions = vec![Action::Delete {
        kind: operator_core::Kind::Pod,
        name: pod.name.clone(),
        uid: pod.uid.clone(),
        if_silent: None,
    }];
    let flaws = check(&plan, &story.snapshot, &story.settings);
    assert!(
        flaws.contains(&operator_core::Flaw::PartGroup(0)),
        "{flaws:?}"
    );
}

/// Of the old group only the last of four ranks is left, so that no rank of the new one meets its like.
#[test]
fn two_groups_of_one_index_are_no_plan() {
    let mut story = pair_on(json!({}), 2);
    let plan = story.plan();
    let mut left = operator_core::PodView::of(&created(&plan)[0]);
    left.name = "m-0-0ldrev1s-0-3".into();
    left.labels.insert(names::REVISION, "0ldrev1s".into());
    left.labels.insert(names::RANK, "3".into());
    left.annotations.insert(names::RANKS, "4".into());
    story.snapshot.pods.push(std::sync::Arc::new(left));
    let flaws = check(&plan, &story.snapshot, &story.settings);
    assert!(
        flaws.contains(&operator_core::Flaw::PartGroup(0)),
        "{flaws:?}"
    );
}
