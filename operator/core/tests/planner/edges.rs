//! Each rule at the edge where it begins to hold: one step before nothing happens, one step after it does.
//!
//! What stands here was found by breaking the rules of the core one by one: no other test saw these broken.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::common::*;
use engine_spec::LoadReport;
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::Pod;
use operator_core::snapshot::{PodView, QuotaView, Scheduled, Terminated};
use operator_core::{
    Action, Contest, Flaw, Kind, Object, Plan, PriorityClassView, Rival, check, names, replicas,
};
use serde_json::{Value, json};

fn busy(running: u32, waiting: u32) -> LoadReport {
    LoadReport {
        running,
        waiting,
        ..LoadReport::default()
    }
}

fn of(spec: Value) -> Story {
    story(deployment("m", spec))
        .on([node("a", "8", "16Gi"), node("b", "8", "16Gi")])
        .inspected()
}

fn three() -> Story {
    of(json!({"replicas": 3}))
}

fn nothing() -> Vec<String> {
    Vec::new()
}

fn pods(plan: &Plan) -> Vec<&Pod> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&**pod),
        _ => None,
    });
    pods.collect()
}

fn first_nodes(plan: &Plan) -> Vec<String> {
    let pods = pods(plan).into_iter();
    pods.filter_map(|pod| {
        operator_core::objects::preferred_nodes(pod)
            .first()
            .cloned()
    })
    .collect()
}

#[test]
fn requests_that_wait_count_as_busy() {
    let story = three().running().load(0, busy(0, 5)).load(1, busy(1, 0));
    let story = story.load(2, busy(0, 9)).edited(json!({"replicas": 2}));
    assert_eq!(
        pod_actions(&story.plan()),
        ["patch Pod m-1-0 cachalot.dev/serving=false"]
    );
}

#[test]
fn of_those_that_do_not_answer_as_many_leave_as_are_too_many() {
    let story = three().running();
    let story = story.replica(0, |pod| pod.ready = false);
    let both = story.clone().replica(1, |pod| pod.ready = false);
    let both = both.edited(json!({"replicas": 2}));
    assert_eq!(pod_actions(&both.plan()), ["delete Pod m-1-0"]);
    // Also where one that answers could be spared.
    let one = story.edited(json!({"replicas": 2, "rollout": {"maxUnavailable": 1}}));
    assert_eq!(pod_actions(&one.plan()), ["delete Pod m-0-0"]);
}

#[test]
fn the_first_look_at_a_drain_is_when_endpoints_have_forgotten_it() {
    let plan = three().running().edited(json!({"replicas": 2})).plan();
    assert_eq!(plan.wake_after.map(|after| after.as_secs()), Some(5));
}

/// What pods, nodes and engines tell wakes. Only that something did not happen has to be looked for.
#[test]
fn a_fleet_is_looked_at_as_often_as_silence_means_something() {
    let looks_after = |story: &Story| story.plan().wake_after.map(|after| after.as_secs());
    let silent = three().running();
    assert_eq!(looks_after(&silent), None);
    let told = silent.clone().load(0, busy(0, 1));
    assert_eq!(looks_after(&told), Some(15));
    let starting = silent.clone().replica(0, |pod| pod.ready = false);
    assert_eq!(looks_after(&starting), Some(15));
    let failing = starting.replica(0, |pod| fails(pod, ago(1)));
    assert!(looks_after(&failing).is_some_and(|after| after <= 15));
    // Neither is a node known that has just joined.
    let unknown = silent.clone().replica(0, |pod| {
        pod.node = Some("joins".into());
        pod.created = Some(ago(1));
    });
    assert_eq!(looks_after(&unknown), Some(15));
    let draining = silent.edited(json!({"replicas": 2}));
    let draining = draining.after(&draining.plan(), |_| ()).later(6);
    assert_eq!(looks_after(&draining), Some(1));
}

#[test]
fn a_drain_ends_by_a_sample_taken_after_endpoints_forgot_it_that_shows_no_request() {
    let story = three().running().edited(json!({"replicas": 2}));
    let story = story.after(&story.plan(), |_| ());
    let early = story.clone().later(3).load(2, busy(0, 0)).later(2);
    assert_eq!(pod_actions(&early.plan()), nothing());
    let waiting = story.clone().later(6).load(2, busy(0, 1));
    assert_eq!(pod_actions(&waiting.plan()), nothing());
    let idle = story.later(6).load(2, busy(0, 0));
    assert_eq!(pod_actions(&idle.plan()), ["delete Pod m-2-0"]);
}

#[test]
fn a_pod_taken_out_of_the_service_by_hand_drains_from_its_creation_on() {
    let spec = json!({"replicas": 3, "rollout": {"drainTimeoutSeconds": 30}});
    let story = of(spec).running();
    let story = story.replica(1, |pod| pod.labels.insert(names::SERVING, "false".into()));
    let created = story.snapshot.now - SignedDuration::from_secs(30);
    let old = story.replica(1, |pod| pod.created = Some(created));
    let plan = old.load(1, busy(1, 0)).plan();
    assert_eq!(pod_actions(&plan), ["delete Pod m-1-0", "create Pod m-3-0"]);
}

/// Replicas 0 and 1 on demand, 2 on spot, one to stay on demand.
fn priced() -> Story {
    let spot = json!({"metadata": {"labels": {"karpenter.sh/capacity-type": "spot"}}});
    let spec = json!({"replicas": 3, "placement": {"spot": {"onDemandMin": 1}}});
    let story = story(deployment("m", spec))
        .on([node("a", "8", "16Gi"), with(node("s", "8", "16Gi"), spot)])
        .inspected()
        .running();
    let on = |node: &str| {
        let node = node.to_owned();
        move |pod: &mut PodView| pod.node = Some(node)
    };
    let story = story.replica(0, on("a")).replica(1, on("a"));
    story.replica(2, on("s")).edited(json!({"replicas": 2}))
}

#[test]
fn the_dearest_that_can_be_spared_leaves_first_but_after_those_that_do_not_answer() {
    assert_eq!(
        pod_actions(&priced().plan()),
        ["patch Pod m-1-0 cachalot.dev/serving=false"]
    );
    let silent = priced().replica(2, |pod| pod.ready = false);
    let silent = silent.edited(json!({"rollout": {"maxUnavailable": 1}}));
    assert_eq!(pod_actions(&silent.plan()), ["delete Pod m-2-0"]);
}

#[test]
fn replicas_of_one_plan_go_to_different_nodes_though_one_has_more_memory() {
    let story = story(deployment("m", json!({"replicas": 2})))
        .on([node("a", "8", "64Gi"), node("b", "8", "16Gi")])
        .inspected();
    assert_eq!(first_nodes(&story.plan()), ["a", "b"]);
}

#[test]
fn a_refused_pod_waits_for_a_node_that_fits_and_moves_after_fifteen_seconds() {
    let story = story(r1(json!({"replicas": 1}))).on([h200x8("a"), h200x8("b")]);
    let refused = story.after(&story.plan(), |pod| {
        pod.node = None;
        pod.scheduled = Scheduled::Refused {
            since: Some(now()),
            message: "0/2 nodes are available".into(),
        };
        pod.annotations.insert(names::PLANNED_NODES, "a".into());
    });
    // What it asks for is counted on its node, and is not in its own way.
    assert_eq!(pod_actions(&refused.clone().later(60).plan()), nothing());
    let taken = refused.taken("a", 8);
    assert_eq!(pod_actions(&taken.clone().later(14).plan()), nothing());
    assert_eq!(
        pod_actions(&taken.later(15).plan()),
        ["delete Pod r1-0-0", "create Pod r1-1-0"]
    );
}

#[test]
fn the_restart_budget_counts_failures_until_the_attempt_is_raised() {
    let story = of(json!({"replicas": 1, "rollout": {"restartBudget": 1}})).running();
    let at = story.snapshot.now;
    let story = story.replica(0, |pod| fails(pod, at)).later(5);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod m-0-1", "delete Pod m-0-0"]);
    let at = story.snapshot.now;
    let spent = story.after(&plan, |pod| fails(pod, at)).swept().later(600);
    let plan = spent.plan();
    assert_eq!(pod_actions(&plan), nothing());
    assert_eq!(condition(&plan, "Degraded").1, "RestartBudgetExhausted");
    // What a kubelet would not take says nothing about the revision.
    let refused = spent
        .clone()
        .replica(0, |pod| pod.reason = "OutOfcpu".into());
    let again = ["create Pod m-0-2", "delete Pod m-0-1"];
    assert_eq!(pod_actions(&refused.plan()), again);
    let raised = spent.edited(json!({"rollout": {"attempt": 1}}));
    assert_eq!(pod_actions(&raised.plan()), again);
}

/// It carries the count of failures.
#[test]
fn a_failed_pod_stays_while_its_successor_has_no_place() {
    let story = story(r1(json!({"replicas": 1})))
        .on([h200x8("a")])
        .running();
    let at = story.snapshot.now;
    let story = story.replica(0, |pod| fails(pod, at)).later(5);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), nothing());
    assert_eq!(condition(&plan, "Planned").1, "NoNodeFits");
}

#[test]
fn a_successor_begins_elsewhere_though_its_node_would_be_the_first_choice() {
    let node = |name| gpu_node(name, "NVIDIA-H200", 143_771, 16);
    let story = story(r1(json!({"replicas": 1}))).on([node("a"), node("b")]);
    let story = story.running();
    let at = story.snapshot.now;
    let failed = story.replica(0, |pod| fails(pod, at)).later(5);
    assert_eq!(first_nodes(&failed.plan()), ["b"]);
}

#[test]
fn eight_nodes_that_refused_a_replica_are_remembered_the_latest_last() {
    let story = of(json!({"replicas": 1})).running();
    let at = story.snapshot.now;
    let known: Vec<String> = (1..=8).map(|index| format!("n{index}")).collect();
    let story = story.replica(0, |pod| {
        fails(pod, at);
        pod.reason = "OutOfcpu".into();
        pod.annotations
            .insert(names::REFUSED_NODES, known.join(","));
    });
    let node = story.snapshot.pods.last().unwrap().node.clone().unwrap();
    let plan = story.later(5).plan();
    let view = PodView::of(pods(&plan)[0]);
    let expected = [&known[1..], &[node]].concat();
    assert_eq!(view.refused_nodes(), expected);
}

#[test]
fn a_silent_node_has_fifteen_seconds() {
    let story = three().running();
    let since = story.snapshot.now - SignedDuration::from_secs(14);
    let silent = json!({"status": {"conditions": [
        {"type": "Ready", "status": "Unknown", "lastTransitionTime": since.to_string()}]}});
    let story = story.on([with(node("b", "8", "16Gi"), silent)]);
    assert_eq!(pod_actions(&story.plan()), nothing());
    assert_eq!(
        pod_actions(&story.later(1).plan()),
        ["delete Pod m-1-0", "create Pod m-3-0"]
    );
}

#[test]
fn a_node_that_is_not_known_yet_has_fifteen_seconds() {
    let story = three().running();
    let created = story.snapshot.now - SignedDuration::from_secs(14);
    let story = story.replica(1, |pod| {
        pod.node = Some("new".into());
        pod.created = Some(created);
    });
    assert_eq!(pod_actions(&story.plan()), nothing());
    assert_eq!(
        pod_actions(&story.later(1).plan()),
        ["delete Pod m-1-0", "create Pod m-3-0"]
    );
}

#[test]
fn the_second_restart_in_place_is_failing() {
    let mut story = of(json!({"replicas": 1})).running();
    for (restarts, is_failing) in [(1, false), (2, true)] {
        story = story.replica(0, |pod| {
            pod.ready = false;
            pod.container.restarts = restarts;
            pod.container.terminated = Some(Box::new(Terminated::default()));
        });
        let all = replicas::observe(&story.snapshot);
        let state = &all[0].state;
        assert_eq!(
            matches!(state, replicas::State::Failing { .. }),
            is_failing,
            "{restarts}"
        );
    }
}

#[test]
fn a_configuration_that_someone_changed_is_written_again() {
    let mut story = of(json!({"replicas": 1})).running();
    for map in &mut story.snapshot.config_maps {
        let map = Arc::make_mut(map);
        let data = map.data.iter().map(|(key, value)| match key {
            names::ENGINE_JSON => (key.to_owned(), "{}".to_owned()),
            _ => (key.to_owned(), value.to_owned()),
        });
        map.data = (&data.collect::<BTreeMap<_, _>>()).into();
    }
    let written = actions(&story.plan());
    assert_eq!(written.len(), 1, "{written:?}");
    assert!(written[0].starts_with("apply ConfigMap m-"), "{written:?}");
}

#[test]
fn a_status_is_of_the_generation_that_was_decided_on() {
    let story = three().running().edited(json!({"replicas": 2}));
    let generation = story.snapshot.deployment.metadata.generation;
    assert_eq!(generation, Some(2));
    assert_eq!(story.plan().status.observed_generation, generation);
}

/// The scheduler would refuse it, and others would see a pod that is due where none can be.
#[test]
fn a_pod_that_takes_a_place_is_held_back_until_the_place_is_free() {
    let spec = json!({"replicas": 1, "placement": {"priorityClassName": "high"}});
    let mut story = story(r1(spec)).on([h200x8("a")]).taken("a", 8);
    let high = json!({"metadata": {"name": "high"}, "value": 1000});
    let high = PriorityClassView::of(&serde_json::from_value(high).unwrap());
    let lower = json!({
        "metadata": {"name": "other-0", "uid": "u",
            "labels": {names::MODEL_DEPLOYMENT: "other", names::COMPONENT: names::ENGINE}},
        "spec": {"nodeName": "a", "containers": [
            {"name": "engine", "resources": {"requests": {"nvidia.com/gpu": "8"}}}]},
    });
    let lower = PodView::of(&serde_json::from_value(lower).unwrap());
    let lower = Rival::of("default".into(), Arc::new(lower));
    let classes = vec![Arc::new(high)];
    story.snapshot.contest = Contest::of(("default", "r1"), Some("high"), classes, [lower], |_| 0);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-0-0"]);
    let waiting = story.after(&plan, |pod| pod.node = None).plan();
    assert_eq!(actions(&waiting), nothing());
    assert_eq!(condition(&waiting, "Planned").1, "Preempting");
}

/// Changes the first pod that a plan creates.
fn change(plan: &mut Plan, change: impl FnOnce(&mut Pod)) {
    let mut pods = plan.actions.iter_mut().filter_map(|action| match action {
        Action::Create(Object::Pod(pod)) => Some(&mut **pod),
        _ => None,
    });
    change(pods.next().unwrap());
}

/// Adds the first pod of a plan once more under another name, as replica `index`.
fn twin(plan: &mut Plan, index: &str) {
    let mut pod = pods(plan)[0].clone();
    pod.metadata.name = Some("m-twin".into());
    let labels = pod.metadata.labels.as_mut().unwrap();
    labels.insert(names::REPLICA.into(), index.into());
    plan.actions
        .push(Action::Create(Object::Pod(Box::new(pod))));
}

/// The planner makes none of these plans; the linter has to see them without its help.
#[test]
fn a_plan_that_breaks_a_rule_is_told_of() {
    type Break = fn(&mut Plan);
    let broken: [(&str, Break); 10] = [
        ("is written twice", |plan| {
            let first = plan.actions[0].clone();
            plan.actions.push(first);
        }),
        ("was not observed", |plan| {
            plan.actions.push(Action::Delete {
                kind: Kind::Pod,
                name: "m-9".into(),
                uid: "other".into(),
                if_silent: None,
            });
        }),
        ("replica 0 would have two pods", |plan| twin(plan, "0")),
        ("4 pods, 3 are allowed", |plan| twin(plan, "7")),
        ("node a is overbooked", |plan| {
            change(plan, |pod| {
                let container = &mut pod.spec.as_mut().unwrap().containers[0];
                let resources = container.resources.as_mut().unwrap();
                let cpu = serde_json::from_value(json!("100")).unwrap();
                resources
                    .requests
                    .as_mut()
                    .unwrap()
                    .insert("cpu".into(), cpu);
            });
        }),
        ("takes the place of one that is not", |plan| {
            change(plan, |pod| {
                let annotations = pod.metadata.annotations.get_or_insert_default();
                annotations.insert(names::PREEMPTS.into(), "default/other/uid".into());
            });
        }),
        ("is malformed", |plan| {
            change(plan, |pod| pod.metadata.owner_references = None);
        }),
        ("is not restricted", |plan| {
            change(plan, |pod| {
                pod.spec.as_mut().unwrap().host_network = Some(true)
            });
        }),
        ("condition Valid is wrong", |plan| {
            let first = plan.status.conditions[0].clone();
            plan.status.conditions.push(first);
        }),
        ("condition Valid is wrong", |plan| {
            plan.status.conditions[0].reason = "Nonsense".into();
        }),
    ];
    let story = of(json!({"replicas": 3, "rollout": {"maxSurge": 0, "maxUnavailable": 1}}));
    for (expected, harm) in broken {
        let mut plan = story.plan();
        harm(&mut plan);
        let flaws = check(&plan, &story.snapshot, &settings());
        assert!(
            flaws.iter().any(|flaw| flaw.to_string().contains(expected)),
            "{expected}: {flaws:?}"
        );
    }
}

#[test]
fn a_plan_that_takes_too_many_away_is_told_of() {
    let story = three().running();
    let mut plan = story.clone().edited(json!({"replicas": 0})).plan();
    plan.status = story.plan().status;
    let flaws = check(&plan, &story.snapshot, &settings());
    assert_eq!(
        flaws,
        [Flaw::TooFew {
            ready: 0,
            promised: 3
        }]
    );
}

#[test]
fn a_plan_beyond_a_quota_is_told_of() {
    let mut story = story(r1(json!({"replicas": 1}))).on([h200x8("a")]);
    let plan = story.plan();
    let quota = |most: &str| {
        let quota = json!({"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.nvidia.com/gpu": most}}});
        Arc::new(QuotaView::of(&serde_json::from_value(quota).unwrap()).unwrap())
    };
    story.snapshot.quotas = vec![quota("8")];
    assert_eq!(check(&plan, &story.snapshot, &settings()), []);
    story.snapshot.quotas = vec![quota("7")];
    assert_eq!(
        check(&plan, &story.snapshot, &settings()),
        [Flaw::OverQuota("gpus".into())]
    );
}
