//! How far a rollout goes, and what happens when the new revision fails.

use std::collections::BTreeMap;

use crate::common::*;
use engine_spec::LoadReport;
use jiff::SignedDuration;
use operator_core::snapshot::{PodView, Terminated};
use operator_core::{Plan, names};
use proptest::prelude::*;
use serde_json::{Value, json};

/// Four replicas that answer, of a revision that is stable, with these rules; then the user wants
/// another context.
fn four(rollout: Value) -> Story {
    let spec = json!({"replicas": 4, "rollout": rollout});
    let story = story(deployment("m", spec))
        .on((0..8).map(|index| node(&format!("n{index}"), "8", "16Gi")))
        .inspected()
        .running();
    assert!(stable(&story.plan()).is_some());
    story.edited(json!({"context": {"maxTokens": 256}}))
}

fn stable(plan: &Plan) -> Option<String> {
    plan.status.rollout.clone()?.stable_revision
}

/// Live engine pods by revision.
fn revisions(story: &Story) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pod in &story.snapshot.pods {
        if pod.label(names::COMPONENT) == names::ENGINE && !pod.deleting && !pod.is_finished() {
            *counts
                .entry(pod.label(names::REVISION).to_owned())
                .or_insert(0) += 1;
        }
    }
    counts
}

fn of(story: &Story, revision: &str) -> usize {
    revisions(story).get(revision).copied().unwrap_or(0)
}

/// Carries plans out for so many seconds; pods of `target` become what `shape` makes of them, all
/// others answer, and what drains is idle.
fn pass(mut story: Story, seconds: i64, target: &str, shape: impl Fn(&mut PodView)) -> Story {
    for _ in 0..seconds {
        let plan = story.plan();
        story = story.after(&plan, starts).swept().later(1);
        let now = story.snapshot.now;
        for pod in story.snapshot.pods.clone() {
            let is_target = pod.label(names::REVISION) == target;
            if pod.is_finished() {
                continue;
            }
            story.pod(
                &pod.name,
                |pod| if is_target { shape(pod) } else { answers(pod) },
            );
            let samples = story.snapshot.samples.entry(pod.name.clone()).or_default();
            samples.take_load(operator_core::LoadSample {
                at: now,
                report: LoadReport::default(),
            });
        }
    }
    story
}

fn target(story: &Story) -> String {
    story
        .plan()
        .status
        .rollout
        .unwrap()
        .target_revision
        .unwrap()
}

fn crashes(pod: &mut PodView) {
    starts(pod);
    pod.container.restarts += 1;
    pod.container.terminated = Some(Box::new(Terminated {
        exit_code: 1,
        reason: "Error".into(),
        message: "no such tensor".into(),
        finished: None,
    }));
}

#[test]
fn a_partition_keeps_replicas_on_the_revision_before_and_replaces_them_there() {
    let story = four(json!({"partition": 3}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let story = pass(story, 60, &new, answers);
    assert_eq!((of(&story, &old), of(&story, &new)), (3, 1));
    let plan = story.plan();
    assert_eq!(condition(&plan, "Ready").1, "PartitionReached");
    assert_eq!(condition(&plan, "Progressing").1, "PartitionReached");
    assert_eq!(condition(&plan, "Degraded").1, "AsExpected");
    assert_eq!(pod_actions(&plan), Vec::<String>::new());

    // One of the old dies: its successor is of the old revision, which the spec no longer makes.
    let mut story = story;
    let dead = story
        .snapshot
        .pods
        .iter()
        .find(|pod| pod.label(names::REVISION) == old)
        .unwrap()
        .name
        .clone();
    story.snapshot.pods.retain(|pod| pod.name != dead);
    let story = pass(story, 5, &new, answers);
    assert_eq!((of(&story, &old), of(&story, &new)), (3, 1));

    let story = pass(
        story.edited(json!({"rollout": {"partition": 0}})),
        60,
        &new,
        answers,
    );
    assert_eq!((of(&story, &old), of(&story, &new)), (0, 4));
    let plan = story.plan();
    assert_eq!(condition(&plan, "Ready").1, "AllReplicasReady");
    assert_eq!(stable(&plan), Some(new));
}

#[test]
fn steps_are_watched_for_as_long_as_they_say() {
    // A share is rounded up, so that a step is never empty.
    let steps = json!([{"percent": 20, "holdSeconds": 100}, {"percent": 50, "holdSeconds": 60}]);
    let story = four(json!({"steps": steps}));
    let new = target(&story);
    let story = pass(story, 30, &new, answers);
    assert_eq!(of(&story, &new), 1);
    let plan = story.plan();
    let (_, reason, message) = condition(&plan, "Progressing");
    assert_eq!(reason, "StepHolding");
    assert!(
        message.starts_with("step 1 of 2: 1 of 4 replicas run the new revision"),
        "{message}"
    );
    // A replica of the step that stops answering starts the watch anew.
    let story = pass(story, 1, &new, |pod| {
        starts(pod);
        pod.ready = false;
    });
    let story = pass(story, 90, &new, answers);
    assert_eq!(of(&story, &new), 1);
    let story = pass(story, 40, &new, answers);
    assert_eq!(of(&story, &new), 2);
    let story = pass(story, 150, &new, answers);
    assert_eq!(of(&story, &new), 4);
    assert_eq!(condition(&story.plan(), "Ready").1, "AllReplicasReady");
}

#[test]
fn a_pause_stops_where_it_is_and_failed_replicas_are_still_replaced() {
    let story = four(json!({}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let mut story = story;
    while of(&story, &new) < 2 {
        story = pass(story, 1, &new, answers);
    }
    let story = pass(
        story.edited(json!({"rollout": {"paused": true}})),
        60,
        &new,
        answers,
    );
    assert_eq!((of(&story, &old), of(&story, &new)), (2, 2));
    assert_eq!(condition(&story.plan(), "Progressing").1, "RolloutPaused");
    let story = pass(
        story.edited(json!({"rollout": {"paused": false}})),
        60,
        &new,
        answers,
    );
    assert_eq!((of(&story, &old), of(&story, &new)), (0, 4));
}

#[test]
fn a_revision_that_crashes_is_rolled_back_and_not_tried_again() {
    let story = four(json!({"maxSurge": 0, "maxUnavailable": 2}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let story = pass(story, 60, &new, crashes);
    assert_eq!((of(&story, &old), of(&story, &new)), (4, 0));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    for kind in ["Progressing", "Ready", "Degraded"] {
        let (_, reason, message) = condition(&plan, kind);
        assert_eq!(reason, "RolledBack", "{kind}");
        assert!(
            message.contains("no such tensor") && message.contains("spec.rollout.attempt"),
            "{message}"
        );
    }
    assert_eq!(condition(&plan, "Available").0, "True");
    // Scaling is no reason to try it again; asking for it is, and so is another spec.
    let story = pass(story.edited(json!({"replicas": 5})), 30, &new, crashes);
    assert_eq!((of(&story, &old), of(&story, &new)), (5, 0));
    let again = pass(
        story.clone().edited(json!({"rollout": {"attempt": 1}})),
        60,
        &new,
        answers,
    );
    assert_eq!((of(&again, &old), of(&again, &new)), (0, 5));
    let back = pass(
        story.edited(json!({"context": {"maxTokens": 512}})),
        30,
        &new,
        crashes,
    );
    assert_eq!(of(&back, &old), 5);
    assert_eq!(condition(&back.plan(), "Ready").1, "AllReplicasReady");
}

#[test]
fn three_failures_in_a_row_are_enough_but_not_those_that_kubernetes_has_a_reason_for() {
    let has_failed = |story: &Story| story.plan().status.rollout.unwrap().failure.is_some();
    for (reason, is_its_fault) in [("", true), ("Evicted", false)] {
        let story = four(json!({"restartBudget": 10}));
        let new = target(&story);
        let ends = |pod: &mut PodView| {
            fails(pod, ago(1000));
            pod.reason = reason.into();
        };
        let once = pass(story.clone(), 2, &new, ends).plan();
        let is_blamed = condition(&once, "Progressing").1 == "RolloutHalted";
        assert_eq!(is_blamed, is_its_fault, "{reason}");
        let story = pass(story, 6, &new, ends);
        assert_eq!(has_failed(&story), is_its_fault, "{reason}");
    }
    let story = four(json!({"restartBudget": 10}));
    let new = target(&story);
    let story = pass(story, 2, &new, crashes);
    assert!(!has_failed(&story));
    assert!(has_failed(&pass(story, 1, &new, crashes)));
}

#[test]
fn a_revision_that_does_not_answer_in_time_is_rolled_back() {
    let story = four(json!({"progressDeadlineSeconds": 50}));
    let new = target(&story);
    let story = pass(story, 40, &new, starts);
    assert_eq!(condition(&story.plan(), "Progressing").1, "RollingOut");
    let story = pass(story, 20, &new, starts);
    let plan = story.plan();
    assert_eq!(condition(&plan, "Progressing").1, "RolledBack");
    assert!(
        condition(&plan, "Degraded")
            .2
            .contains("progressDeadlineSeconds")
    );
    assert_eq!(of(&story, &new), 0);
}

#[test]
fn with_halt_the_rollout_stops_and_what_runs_is_kept() {
    let story = four(json!({"maxUnavailable": 1, "onFailure": "Halt"}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let story = pass(story, 60, &new, crashes);
    let plan = story.plan();
    assert_eq!(condition(&plan, "Progressing").1, "RolloutHalted");
    let before = (of(&story, &old), of(&story, &new));
    assert!(before.0 >= 3 && before.1 > 0, "{before:?}");
    let story = pass(story, 60, &new, crashes);
    assert_eq!((of(&story, &old), of(&story, &new)), before);
}

#[test]
fn a_halted_revision_that_answers_everywhere_after_all_is_the_stable_one() {
    let story = four(json!({
        "maxUnavailable": 4, "onFailure": "Halt", "progressDeadlineSeconds": 50
    }));
    let new = target(&story);
    let story = pass(story, 70, &new, starts);
    assert_eq!(condition(&story.plan(), "Progressing").1, "RolloutHalted");
    assert_eq!(of(&story, &new), 4);
    let story = pass(story, 10, &new, answers);
    let plan = story.plan();
    assert_eq!(condition(&plan, "Ready").1, "AllReplicasReady");
    assert_eq!(stable(&plan), Some(new));
    assert!(plan.status.rollout.unwrap().failure.is_none());
}

/// Its place is missing, not its answer.
#[test]
fn a_pod_that_waits_for_a_node_is_not_late() {
    let story = four(json!({"progressDeadlineSeconds": 50}));
    let new = target(&story);
    let story = pass(story, 80, &new, |pod| pod.node = None);
    assert!(of(&story, &new) > 0);
    assert_eq!(condition(&story.plan(), "Progressing").1, "RollingOut");
}

#[test]
fn a_revision_is_stable_when_all_answer_and_no_other_lives() {
    let spec = json!({"replicas": 3});
    let first = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected();
    let plan = first.plan();
    let first = first.after(&plan, answers);
    let few = first.clone().replica(2, |pod| pod.ready = false);
    assert_eq!(stable(&few.plan()), None);
    assert!(stable(&first.plan()).is_some());

    // Three of four answer and one has failed, so that all that live answer.
    let story = four(json!({"maxSurge": 4, "restartBudget": 10}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let story = story.after(&story.plan(), answers);
    let all = story.later(1);
    assert_eq!((of(&all, &old), of(&all, &new)), (4, 4));
    assert_eq!(stable(&all.plan()), Some(old.clone()));
    let mut alone = all;
    let is_new = |pod: &PodView| pod.label(names::REVISION) == new;
    alone.snapshot.pods.retain(|pod| is_new(pod));
    assert_eq!(stable(&alone.plan()), Some(new.clone()));
    let (last, now) = (alone.snapshot.pods[0].name.clone(), alone.snapshot.now);
    alone.pod(&last, |pod| fails(pod, now));
    assert_eq!(stable(&alone.plan()), Some(old));
}

#[test]
fn without_a_way_back_nothing_holds_a_rollout() {
    let without = |rollout: Value| {
        let mut story = four(rollout);
        let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
        let record = format!("m-{old}");
        let maps = &mut story.snapshot.config_maps;
        maps.retain(|map| map.name != record);
        (story, old, new)
    };
    let (story, old, new) = without(json!({"partition": 3, "paused": true}));
    let story = pass(story, 60, &new, answers);
    assert_eq!((of(&story, &old), of(&story, &new)), (0, 4));
    // Also not a failure, as far as the new ones answer.
    let (story, old, new) = without(json!({"progressDeadlineSeconds": 50}));
    let story = pass(story, 60, &new, starts);
    assert_eq!(condition(&story.plan(), "Progressing").1, "RolloutHalted");
    assert_eq!((of(&story, &old), of(&story, &new)), (4, 1));
    let story = pass(story, 60, &new, answers);
    assert_eq!((of(&story, &old), of(&story, &new)), (0, 4));
}

#[test]
fn the_way_back_stays_when_no_replica_of_it_is_left() {
    let story = four(json!({"maxUnavailable": 4, "maxSurge": 0, "progressDeadlineSeconds": 50}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let story = pass(story, 40, &new, starts);
    assert_eq!((of(&story, &old), of(&story, &new)), (0, 4));
    let story = pass(story, 30, &new, starts);
    assert_eq!((of(&story, &old), of(&story, &new)), (4, 0));
}

/// Two of four run neither revision; surge has room for one more, and each revision lacks one.
#[test]
fn what_the_first_revision_takes_of_the_surge_is_gone_for_the_second() {
    let story = four(json!({"partition": 2}));
    let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
    let mut story = pass(story, 60, &new, answers);
    for revision in [&old, &new] {
        let mut pods = story.snapshot.pods.iter();
        let pod = pods.find(|pod| pod.label(names::REVISION) == revision);
        let pod = pod.unwrap().name.clone();
        story.pod(&pod, |pod| {
            pod.labels.insert(names::REVISION, "0ldrev1s".into());
        });
    }
    let plan = story.plan();
    let created = pod_actions(&plan);
    let created = created.iter().filter(|action| action.starts_with("create"));
    assert_eq!(created.count(), 1);
}

/// What the engine of a revision answers after so many seconds: requests, errors, seconds to the
/// first token.
fn measured(seconds: i64, errors: u64, ttft: f64) -> LoadReport {
    let requests = u64::try_from(seconds).unwrap() * 10;
    LoadReport {
        requests_total: requests,
        request_errors_total: requests * errors / 100,
        first_tokens_total: requests,
        first_token_seconds_total: requests as f64 * ttft,
        ..LoadReport::default()
    }
}

/// The condition Progressing after both revisions served for a minute, half of the replicas each.
fn compared(analysis: Value, errors: u64, ttft: f64) -> (String, String, String) {
    let rollout = json!({"partition": 2, "analysis": analysis});
    let story = four(rollout);
    let new = target(&story);
    let mut story = pass(story, 60, &new, answers);
    for second in 1..60 {
        story.snapshot.now = story
            .snapshot
            .now
            .checked_add(SignedDuration::from_secs(1))
            .unwrap();
        for pod in story.snapshot.pods.clone() {
            let report = if pod.label(names::REVISION) == new {
                measured(second, errors, ttft)
            } else {
                measured(second, 1, 0.2)
            };
            let at = story.snapshot.now;
            let samples = story.snapshot.samples.entry(pod.name.clone()).or_default();
            samples.take_load(operator_core::LoadSample { at, report });
        }
    }
    condition(&story.plan(), "Progressing")
}

#[test]
fn a_revision_that_does_worse_than_the_one_before_is_rolled_back() {
    assert_eq!(compared(json!({}), 2, 0.3).1, "PartitionReached");
    let (_, reason, message) = compared(json!({}), 20, 0.2);
    assert_eq!(reason, "RolledBack");
    assert!(message.contains("20.0 % of"), "{message}");
    let (_, reason, message) = compared(json!({}), 1, 0.5);
    assert_eq!(reason, "RolledBack");
    assert!(message.contains("0.500 s over"), "{message}");
    // Within what the user allows, or measured too little, or not compared at all.
    assert_eq!(
        compared(json!({"maxTtftIncreasePercent": 200}), 1, 0.5).1,
        "PartitionReached"
    );
    assert_eq!(
        compared(json!({"minRequests": 1_000_000}), 20, 0.5).1,
        "PartitionReached"
    );
    assert_eq!(compared(Value::Null, 20, 0.5).1, "PartitionReached");
}

#[test]
fn a_crash_loop_is_given_up_after_its_budget_and_tried_again_when_asked() {
    let spec = json!({"replicas": 1, "rollout": {"restartBudget": 3}});
    let mut story = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected();
    let mut created = 0;
    let mut run = |mut story: Story, passes: usize| {
        for _ in 0..passes {
            let plan = story.plan();
            created += pod_actions(&plan)
                .iter()
                .filter(|action| action.starts_with("create"))
                .count();
            let now = story.snapshot.now;
            story = story.after(&plan, |pod| fails(pod, now)).swept().later(301);
        }
        (story, created)
    };
    (story, _) = run(story, 50);
    let (story, before) = run(story, 50);
    assert_eq!(before, 4, "the first, and three more");
    let plan = story.plan();
    let (status, reason, message) = condition(&plan, "Degraded");
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("True", "RestartBudgetExhausted")
    );
    assert!(
        message.contains("low on memory") && message.contains("spec.rollout.attempt"),
        "{message}"
    );
    assert_eq!(plan.status.phase.unwrap().as_str(), "Failed");
    let (_, after) = run(story.edited(json!({"rollout": {"attempt": 1}})), 50);
    assert_eq!(after, before + 4);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the rules, never more of the new revision than they allow, and never fewer that
    /// answer than promised.
    #[test]
    fn no_rollout_goes_further_than_its_rules(
        replicas in 1..7i32, partition in 0..4i32, surge in 0..3i32, unavailable in 0..3i32, is_bad: bool,
    ) {
        prop_assume!(surge + unavailable > 0);
        let rollout = json!({"partition": partition, "maxSurge": surge, "maxUnavailable": unavailable});
        let mut story = four(rollout).edited(json!({"replicas": replicas, "context": {"maxTokens": 512}})).running();
        story = story.edited(json!({"context": {"maxTokens": 256}}));
        let (old, new) = (stable(&story.plan()).unwrap(), target(&story));
        let wanted = usize::try_from(replicas).unwrap();
        let kept = usize::try_from(partition).unwrap().min(wanted);
        for _ in 0..80 {
            story = pass(story, 1, &new, if is_bad { crashes } else { answers });
            prop_assert!(of(&story, &new) <= wanted - kept);
            let serving = story.snapshot.pods.iter().filter(|pod| {
                pod.ready && !pod.deleting && pod.label(names::SERVING) == "true"
            });
            prop_assert!(serving.count() + usize::try_from(unavailable).unwrap() >= wanted);
        }
        let expected = if is_bad && kept < wanted { (wanted, 0) } else { (kept, wanted - kept) };
        prop_assert_eq!((of(&story, &old), of(&story, &new)), expected);
    }
}
