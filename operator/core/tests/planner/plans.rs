//! What is decided in the situations users meet, each told as a short story.

use crate::common::*;
use engine_spec::LoadReport;
use operator_core::snapshot::{PodView, Scheduled, Terminated};
use operator_core::{Action, Plan, names, replicas};
use serde_json::json;

fn busy(running: u32, waiting: u32) -> LoadReport {
    LoadReport {
        running,
        waiting,
        ..LoadReport::default()
    }
}

fn three() -> Story {
    story(deployment("m", json!({"replicas": 3})))
        .on([node("a", "8", "16Gi"), node("b", "8", "16Gi")])
        .inspected()
}

#[test]
fn an_unknown_model_is_inspected_before_anything_is_planned() {
    let story = story(deployment("m", json!({}))).on([node("a", "8", "16Gi")]);
    let plan = story.plan();
    let written = actions(&plan);
    assert_eq!(written.len(), 3, "{written:?}");
    assert!(
        written[0].starts_with("create Pod m-inspect-"),
        "{written:?}"
    );
    assert_eq!(
        written[1..],
        ["apply Service m", "apply PodDisruptionBudget m"]
    );
    assert_eq!(condition(&plan, "ModelInspected").1, "Inspecting");
    assert_eq!(condition(&plan, "Planned").1, "WaitingForFacts");
    assert_eq!(plan.status.phase.unwrap().as_str(), "Inspecting");

    // The pod's report becomes a config map, the fleet is planned in the same pass.
    let story = story.after(&plan, answers);
    let plan = story.plan();
    let written = actions(&plan);
    assert!(
        written[0].starts_with("apply ConfigMap m-facts-"),
        "{written:?}"
    );
    assert_eq!(pod_actions(&plan), ["create Pod m-0-0"]);
    // Then it has done its duty.
    let plan = story.after(&plan, answers).plan();
    assert!(
        pod_actions(&plan)[0].starts_with("delete Pod m-inspect-"),
        "{plan}"
    );
}

#[test]
fn a_failed_inspection_names_its_fault_and_is_repeated_after_a_pause() {
    let missing = r#"{"error":{"reason":"WeightsTruncated","message":"model-2.safetensors: 10 bytes of 20"}}"#;
    let story = story(deployment("m", json!({}))).on([node("a", "8", "16Gi")]);
    let story = story.after(&story.plan(), |pod| {
        fails(pod, now());
        pod.container.terminated.as_mut().unwrap().message = missing.into();
    });
    let plan = story.plan();
    let (status, reason, message) = condition(&plan, "ModelInspected");
    assert_eq!(
        (status.as_str(), reason.as_str()),
        ("False", "WeightsTruncated")
    );
    assert!(
        message.contains("file:///models/small: model-2.safetensors: 10 bytes of 20"),
        "{message}"
    );
    assert_eq!(plan.status.phase.unwrap().as_str(), "Failed");
    assert!(
        plan.events
            .iter()
            .any(|event| event.reason == "WeightsTruncated"),
        "{plan}"
    );
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    assert_eq!(plan.wake_after.map(|after| after.as_secs()), Some(30));

    // Ten minutes later it is tried again; the next attempt exists before the old one goes.
    let plan = story.after(&plan, |_| ()).later(601).plan();
    let written = pod_actions(&plan);
    assert!(
        written[0].starts_with("create Pod m-inspect-") && written[0].ends_with("-1"),
        "{written:?}"
    );
    assert!(
        written[1].starts_with("delete Pod m-inspect-"),
        "{written:?}"
    );
}

#[test]
fn a_changed_source_is_inspected_anew_while_the_old_fleet_serves() {
    let story = three()
        .running()
        .edited(json!({"model": {"source": "file:///models/other"}}));
    let plan = story.plan();
    let written = pod_actions(&plan);
    assert_eq!(written.len(), 1, "{written:?}");
    assert!(written[0].starts_with("create Pod m-inspect-"));
    assert_eq!(condition(&plan, "Ready").0, "False");
    assert_eq!(condition(&plan, "Available").0, "True");
    assert_eq!(plan.status.phase.unwrap().as_str(), "Running");
}

#[test]
fn a_digest_that_does_not_match_is_refused() {
    let digest = format!("sha256:{}", "b".repeat(64));
    let spec = json!({"model": {"digest": digest}});
    let plan = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected()
        .plan();
    assert_eq!(condition(&plan, "ModelInspected").1, "DigestMismatch");
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
}

#[test]
fn an_invalid_spec_is_reported_with_field_value_and_way_out_and_changes_nothing() {
    let story = three()
        .running()
        .edited(json!({"rollout": {"maxSurge": 0}}));
    let plan = story.plan();
    assert!(plan.actions.is_empty());
    let (status, reason, message) = condition(&plan, "Valid");
    assert_eq!((status.as_str(), reason.as_str()), ("False", "SpecInvalid"));
    assert!(
        message.starts_with("spec.rollout.maxSurge = 0: needs spec.rollout.maxUnavailable"),
        "{message}"
    );
    assert_eq!(condition(&plan, "Available").0, "True");
    assert_eq!(plan.status.phase.unwrap().as_str(), "Degraded");
}

#[test]
fn replicas_spread_over_cpu_nodes() {
    let plan = three().plan();
    assert_eq!(
        pod_actions(&plan),
        ["create Pod m-0-0", "create Pod m-1-0", "create Pod m-2-0"]
    );
    let story = three().after(&plan, starts);
    let nodes: Vec<_> = story
        .snapshot
        .pods
        .iter()
        .filter_map(|pod| pod.node.clone())
        .collect();
    assert_eq!(nodes, ["a", "b", "a"]);
}

#[test]
fn a_first_start_is_told_of_once_when_it_begins_and_once_when_all_answer() {
    let reasons = |plan: &Plan| -> Vec<&str> {
        let events = plan.events.iter();
        events.map(|event| event.reason).collect()
    };
    let wish = json!({"replicas": 3, "rollout": {"maxUnavailable": 1}});
    let story = story(deployment("m", wish)).on([node("a", "8", "16Gi")]);
    let story = story.inspected();
    let first = story.plan();
    assert_eq!(reasons(&first), ["FitFound", "ReplicasCreated"]);
    let starting = story.after(&first, starts);
    let second = starting.plan();
    assert_eq!(reasons(&second), Vec::<&str>::new());
    let starting = starting.after(&second, |_| ());
    let most = starting.replica(0, answers).replica(1, answers);
    assert_eq!(reasons(&most.plan()), ["MinimumReplicasReady"]);
    let all = most.replica(2, answers);
    assert_eq!(reasons(&all.plan()), ["AllReplicasReady"]);
}

#[test]
fn a_running_fleet_is_left_alone() {
    let story = three().running();
    let plan = story.plan();
    assert!(plan.actions.is_empty() && plan.events.is_empty(), "{plan}");
    assert_eq!(condition(&plan, "Ready").1, "AllReplicasReady");
    assert_eq!(plan.status.ready.as_deref(), Some("3/3"));
    assert_eq!(plan.status.phase.unwrap().as_str(), "Running");
    assert_eq!(
        Some(&plan.status),
        story.snapshot.deployment.status.as_ref()
    );
}

#[test]
fn nothing_is_created_for_a_deployment_that_is_being_deleted() {
    let mut story = three().running().replica(1, |pod| pod.deleting = true);
    let mut deployment = (*story.snapshot.deployment).clone();
    deployment.metadata.deletion_timestamp =
        serde_json::from_value(json!("2026-11-24T12:00:00Z")).unwrap();
    story.snapshot.deployment = deployment.into();
    let plan = story.plan();
    assert!(plan.actions.is_empty() && plan.events.is_empty(), "{plan}");
    assert_eq!(
        Some(&plan.status),
        story.snapshot.deployment.status.as_ref()
    );
}

#[test]
fn a_service_that_someone_changed_is_mended() {
    let mut story = three().running();
    let mut service = (**story.snapshot.service.as_ref().unwrap()).clone();
    service
        .spec
        .as_mut()
        .unwrap()
        .selector
        .as_mut()
        .unwrap()
        .remove("cachalot.dev/serving");
    story.snapshot.service = Some(service.into());
    assert_eq!(actions(&story.plan()), ["apply Service m"]);
}

#[test]
fn a_service_of_someone_else_is_not_taken_over() {
    let mut story = three();
    story.snapshot.service = Some(std::sync::Arc::new(
        serde_json::from_value(json!({"metadata": {"name": "m"}})).unwrap(),
    ));
    let plan = story.plan();
    assert!(plan.actions.is_empty(), "{plan}");
    assert_eq!(condition(&plan, "Planned").1, "NameTaken");
}

#[test]
fn a_rollout_with_surge_never_goes_below_the_wanted_number() {
    let mut story = three()
        .running()
        .edited(json!({"context": {"maxTokens": 256}}));
    let mut fewest = 3;
    for _ in 0..60 {
        let plan = story.plan();
        if plan.actions.is_empty() && condition(&plan, "Ready").0 == "True" {
            assert_eq!(fewest, 3);
            let revision = plan.status.revision.clone().unwrap();
            assert!(
                story
                    .snapshot
                    .pods
                    .iter()
                    .all(|pod| pod.name.contains(&revision))
            );
            return;
        }
        story = story.after(&plan, answers).swept();
        let serving = story.snapshot.pods.iter().filter(|pod| {
            pod.ready && pod.label("cachalot.dev/serving") == "true" && !pod.deleting
        });
        fewest = fewest.min(serving.count());
        assert!(story.snapshot.pods.len() <= 4, "surge is one");
        story = story.later(6);
        let indices: Vec<u32> = story
            .snapshot
            .pods
            .iter()
            .filter_map(|pod| pod.label("cachalot.dev/replica").parse().ok())
            .collect();
        for index in indices {
            story = story.load(index, LoadReport::default());
        }
    }
    panic!("the rollout does not end: {}", story.plan());
}

#[test]
fn a_failing_revision_halts_and_the_old_one_keeps_serving() {
    let story = three()
        .running()
        .edited(json!({"context": {"maxTokens": 256}, "rollout": {"onFailure": "Halt"}}));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod m-3-0"]);
    let story = story.after(&plan, |pod| {
        starts(pod);
        pod.container.restarts = 4;
        pod.container.terminated = Some(Box::new(Terminated {
            exit_code: 1,
            reason: "Error".into(),
            message: "planned 10 bytes, found 20".into(),
            finished: Some(now()),
        }));
    });
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    let (_, reason, message) = condition(&plan, "Degraded");
    assert_eq!(reason, "RolloutHalted");
    assert!(message.contains("planned 10 bytes, found 20"), "{message}");
    assert_eq!(condition(&plan, "Progressing").1, "RolloutHalted");
    assert_eq!(condition(&plan, "Available").0, "True");
    // Reverting the spec removes the failing replica and touches nothing else.
    let story = story
        .after(&plan, |_| ())
        .edited(json!({"context": {"maxTokens": 512}}));
    assert_eq!(pod_actions(&story.plan()), ["delete Pod m-3-0"]);
}

#[test]
fn scaling_down_drains_the_emptiest_replica_and_waits_for_its_requests() {
    let story = three().running();
    let story = story
        .load(0, busy(2, 0))
        .load(1, busy(0, 0))
        .load(2, busy(3, 1));
    let story = story.edited(json!({"replicas": 2}));
    let plan = story.plan();
    assert_eq!(
        pod_actions(&plan),
        ["patch Pod m-1-0 cachalot.dev/serving=false"]
    );
    let draining = story.after(&plan, |_| ()).later(6).load(1, busy(1, 0));
    assert_eq!(
        pod_actions(&draining.plan()),
        Vec::<String>::new(),
        "a request still runs"
    );
    let idle = draining.later(2).load(1, busy(0, 0));
    let plan = idle.plan();
    assert_eq!(pod_actions(&plan), ["delete Pod m-1-0"]);
    assert!(
        plan.events
            .iter()
            .any(|e| e.note.contains("finished its requests")),
        "{plan}"
    );
}

#[test]
fn a_drain_ends_with_its_timeout() {
    let spec = json!({"replicas": 2, "rollout": {"drainTimeoutSeconds": 30}});
    let story = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected()
        .running();
    let story = story.edited(json!({"replicas": 1}));
    let story = story
        .after(&story.plan(), |_| ())
        .later(29)
        .load(1, busy(1, 0));
    assert_eq!(pod_actions(&story.plan()), Vec::<String>::new());
    assert_eq!(pod_actions(&story.later(2).plan()), ["delete Pod m-1-0"]);
}

#[test]
fn a_draining_replica_that_is_wanted_again_is_taken_back() {
    let story = three().running().edited(json!({"replicas": 2}));
    let story = story
        .after(&story.plan(), |_| ())
        .edited(json!({"replicas": 3}));
    assert_eq!(
        pod_actions(&story.plan()),
        ["patch Pod m-2-0 cachalot.dev/serving=true cachalot.dev/drain-since:-"]
            .map(|s| s.replace(" cachalot.dev/drain-since:-", ""))
    );
}

#[test]
fn zero_replicas_keep_the_service() {
    let story = three().running().edited(json!({"replicas": 0}));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan).len(), 3, "{plan}");
    assert_eq!(plan.status.phase.unwrap().as_str(), "ScaledToZero");
    assert!(
        !actions(&plan)
            .iter()
            .any(|action| action.contains("delete Service"))
    );
}

#[test]
fn a_fleet_can_be_stopped_while_its_new_model_is_unknown() {
    let story = three()
        .running()
        .edited(json!({"model": {"source": "file:///models/other"}}));
    let story = story
        .after(&story.plan(), starts)
        .edited(json!({"replicas": 0}));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan).len(), 3, "{plan}");
    let mut story = story.after(&plan, |_| ()).later(6);
    for index in 0..3 {
        story = story.load(index, LoadReport::default());
    }
    let deleted = pod_actions(&story.plan());
    assert_eq!(
        deleted,
        ["delete Pod m-0-0", "delete Pod m-1-0", "delete Pod m-2-0"]
    );
}

#[test]
fn a_deleted_pod_is_replaced_at_once_under_another_index() {
    let story = three().running().replica(1, |pod| pod.deleting = true);
    assert_eq!(pod_actions(&story.plan()), ["create Pod m-3-0"]);
}

#[test]
fn a_failed_pod_is_replaced_after_a_pause_that_grows() {
    let story = three().running();
    let at = story.snapshot.now;
    let story = story.replica(1, |pod| fails(pod, at));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new(), "not at once");
    assert_eq!(condition(&plan, "Degraded").1, "ReplicasFailing");
    let story = story.after(&plan, |_| ()).later(5);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod m-1-1", "delete Pod m-1-0"]);
    // The second failure in a row waits twice as long.
    let at = story.snapshot.now;
    let story = story.after(&plan, |pod| fails(pod, at)).swept();
    assert_eq!(pod_actions(&story.plan()), Vec::<String>::new());
    let story = story.later(9);
    assert_eq!(pod_actions(&story.plan()), Vec::<String>::new());
    assert_eq!(
        pod_actions(&story.later(1).plan()),
        ["create Pod m-1-2", "delete Pod m-1-1"]
    );
}

#[test]
fn pauses_double_up_to_five_minutes() {
    let pauses: Vec<u64> = (1..10)
        .map(operator_core::replicas::pause_seconds)
        .collect();
    assert_eq!(pauses, [5, 10, 20, 40, 80, 160, 300, 300, 300]);
    assert_eq!(operator_core::replicas::pause_seconds(u32::MAX), 300);
}

#[test]
fn replicas_of_a_silent_node_are_replaced_elsewhere() {
    let silent = with(
        node("b", "8", "16Gi"),
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-11-24T11:59:00Z"}
        ]}}),
    );
    let story = three().running();
    assert_eq!(
        story
            .snapshot
            .pods
            .iter()
            .filter(|pod| pod.node.as_deref() == Some("b"))
            .count(),
        1
    );
    let story = story.on([silent]);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["delete Pod m-1-0", "create Pod m-3-0"]);
    assert_eq!(condition(&plan, "Degraded").1, "NodeLost");
    let story = story.after(&plan, starts);
    assert_eq!(
        story.snapshot.pods.last().unwrap().node.as_deref(),
        Some("a")
    );
}

/// The node may answer again by now; who carries the delete out asks it once more.
#[test]
fn a_silent_node_is_read_again_before_its_replica_is_given_up() {
    let silent = with(
        node("b", "8", "16Gi"),
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2026-11-24T11:59:00Z"}
        ]}}),
    );
    let plan = three().running().on([silent]).plan();
    let conditions: Vec<Option<String>> = plan
        .actions
        .iter()
        .filter_map(|action| match action {
            Action::Delete { if_silent, .. } => Some(if_silent.clone()),
            _ => None,
        })
        .collect();
    assert_eq!(conditions, [Some("b".to_owned())], "{plan}");
}

#[test]
fn failures_count_anew_after_ten_healthy_minutes() {
    let story = three().running();
    let mut pod = PodView::clone(&story.snapshot.pods[0]);
    let created = story.snapshot.now;
    pod.created = Some(created);
    pod.annotations.insert(names::FAILURES, "4".to_owned());
    let after = |seconds| created + jiff::SignedDuration::from_secs(seconds);
    assert_eq!(replicas::failures_of(&pod, after(599)), 5);
    assert_eq!(replicas::failures_of(&pod, after(600)), 1);
}

#[test]
fn a_refused_pod_moves_only_when_another_node_has_room() {
    let story = story(r1(json!({"replicas": 1}))).on([h200x8("a"), h200x8("b")]);
    let plan = story.plan();
    let refuse = |pod: &mut operator_core::PodView| {
        pod.node = None;
        pod.scheduled = Scheduled::Refused {
            since: Some(now()),
            message: "0/2 nodes are available".into(),
        };
        pod.annotations
            .insert("cachalot.dev/planned-nodes", "a".into());
    };
    let full = story.after(&plan, refuse).taken("a", 8).later(20);
    assert_eq!(
        pod_actions(&full.plan()),
        ["delete Pod r1-0-0", "create Pod r1-1-0"],
        "b has room"
    );
    let full = full.taken("b", 1);
    let plan = full.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new(), "nowhere to go");
    assert_eq!(condition(&plan, "Planned").1, "NoNodeFits");
}

#[test]
fn autoscaling_follows_the_queue_up_at_once_and_down_after_the_window() {
    let spec = json!({"replicas": null, "autoscaling": {
        "minReplicas": 1, "maxReplicas": 3,
        "targets": {"queuedRequestsPerReplica": 2},
        "stabilization": {"scaleDownSeconds": 60}}});
    let story = story(deployment("m", spec))
        .on([node("a", "8", "16Gi")])
        .inspected()
        .running();
    assert_eq!(story.snapshot.pods.len(), 1);
    let story = story.load(0, busy(4, 12));
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod m-1-0", "create Pod m-2-0"]);
    assert_eq!(condition(&plan, "ScalingActive").1, "ScalingUp");
    // Starting replicas are counted: the same queue asks for nothing more.
    let story = story.after(&plan, starts);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    assert_eq!(condition(&plan, "ScalingActive").1, "LimitedByMax");
    let mut story = story
        .after(&plan, |_| ())
        .replica(1, answers)
        .replica(2, answers);
    // Silence: nothing for a minute, then back to one.
    for second in 0..=60 {
        story = story
            .later(1)
            .load(0, busy(0, 0))
            .load(1, busy(0, 0))
            .load(2, busy(0, 0));
        let plan = story.plan();
        let expected = if second < 60 { 0 } else { 2 };
        assert_eq!(
            pod_actions(&plan).len(),
            expected,
            "after {second} s: {plan}"
        );
        story = story.after(&plan, |_| ());
    }
    assert_eq!(condition(&story.plan(), "ScalingActive").1, "LimitedByMin");
}
