//! Whatever pods are found, in whatever state: the plan keeps every rule, and never panics.

use std::sync::Arc;

use crate::common::*;
use engine_spec::LoadReport;
use operator_core::snapshot::{LoadSample, PodPhase, PodSamples, PodView, Scheduled};
use operator_core::{Action, Kind, names};
use proptest::prelude::*;
use serde_json::json;

/// (index, whether of the current revision, state, attempt, running requests)
type Found = (u32, bool, u8, u32, u32);

fn pod(found: Found, revision: &str) -> PodView {
    let (index, is_current, state, attempt, _) = found;
    let revision = if is_current { revision } else { "0ldrev1s" };
    let name = format!("m-{index}-{revision}-{attempt}");
    let mut pod = PodView {
        uid: format!("uid-{name}"),
        name,
        created: Some(ago(600)),
        node: Some("a".into()),
        ..PodView::default()
    };
    for (key, value) in [
        (names::COMPONENT, names::ENGINE),
        (names::REVISION, revision),
        (names::SERVING, "true"),
        (names::REPLICA, &index.to_string()),
    ] {
        pod.labels.insert(key, value.to_owned());
    }
    for (key, value) in [
        (names::ATTEMPT, attempt.to_string()),
        (names::FAILURES, attempt.to_string()),
        (names::PLANNED_NODES, "a,b".to_owned()),
    ] {
        pod.annotations.insert(key, value);
    }
    match state {
        0 | 1 => answers(&mut pod),
        2 => starts(&mut pod),
        3 => fails(&mut pod, ago(1)),
        4 => fails(&mut pod, ago(400)),
        5 => pod.deleting = true,
        6 => pod.node = Some("silent".into()),
        7 => {
            pod.node = None;
            pod.scheduled = Scheduled::Refused {
                since: Some(ago(30)),
                message: "no".into(),
            };
        }
        8 => {
            answers(&mut pod);
            pod.labels.insert(names::SERVING, "false".into());
            pod.annotations
                .insert(names::DRAIN_SINCE, ago(20).to_string());
        }
        _ => {
            // Labels that someone has broken.
            pod.labels.insert(names::REPLICA, "many".into());
            pod.phase = PodPhase::Unknown;
        }
    }
    pod
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn every_plan_keeps_every_rule(
        replicas in 0..7i32,
        surge in 0..3i32,
        unavailable in 0..3i32,
        found in prop::collection::vec((0..8u32, any::<bool>(), 0..10u8, 0..3u32, 0..4u32), 0..10),
    ) {
        let rollout = json!({"maxSurge": surge, "maxUnavailable": unavailable.max(i32::from(surge == 0))});
        let mut story = story(deployment("m", json!({"replicas": replicas, "rollout": rollout})))
            .on([node("a", "4", "8Gi"), node("b", "1", "1Gi"), with(node("silent", "8", "16Gi"), json!({
                "status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}))])
            .inspected();
        let revision = story.plan().status.revision.unwrap();
        for one in found {
            let pod = pod(one, &revision);
            if story.snapshot.pods.iter().any(|other| other.name == pod.name) {
                continue;
            }
            let report = LoadReport { running: one.4, ..LoadReport::default() };
            let sample = LoadSample { at: story.snapshot.now, report };
            story.snapshot.samples.insert(pod.name.clone(), PodSamples {
                latest: Some(sample),
                ..PodSamples::default()
            });
            story.snapshot.pods.push(Arc::new(pod));
        }
        // `plan()` of the story checks the rules.
        let plan = story.plan();
        let rejected = plan.status.conditions.iter().find(|c| c.reason == "PlanRejected");
        prop_assert!(rejected.is_none(), "{rejected:?}");
        // Requests are never cut off: an answering pod is drained first.
        for action in &plan.actions {
            if let Action::Delete { kind: Kind::Pod, name, .. } = action {
                let pod = story.snapshot.pods.iter().find(|pod| pod.name == *name).unwrap();
                let serves = pod.ready && pod.label(names::SERVING) == "true" && pod.node.as_deref() != Some("silent");
                prop_assert!(!serves || pod.is_finished(), "{name} is deleted while it serves");
            }
        }
    }
}
