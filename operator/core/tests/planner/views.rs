//! From Kubernetes' objects to the views that decisions are made on.

use crate::common::*;
use k8s_openapi::api::core::v1::Pod;
use operator_core::Resources;
use operator_core::snapshot::{Claim, NodeView, PodPhase, PodView, Scheduled, TaintEffect};
use serde_json::{Value, json};

fn pod(value: Value) -> Pod {
    serde_json::from_value(value).expect("a pod")
}

#[test]
fn a_crash_loop_shows_its_last_words() {
    let view = PodView::of(&pod(json!({
        "metadata": {"name": "m-0", "uid": "u", "creationTimestamp": "2026-11-24T11:00:00Z",
            "annotations": {"cachalot.dev/failures": "3", "example.com/x": "y"}},
        "spec": {"nodeName": "a", "containers": []},
        "status": {
            "phase": "Running", "podIP": "10.0.0.1",
            "conditions": [
                {"type": "PodScheduled", "status": "True"},
                {"type": "Ready", "status": "False", "lastTransitionTime": "2026-11-24T11:30:00Z"}],
            "containerStatuses": [{"name": "engine", "image": "", "imageID": "", "ready": false, "restartCount": 7,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 5m0s"}},
                "lastState": {"terminated": {"exitCode": 1, "reason": "Error", "message": "shard 3 is short",
                    "finishedAt": "2026-11-24T11:30:00Z"}}}]},
    })));
    assert_eq!((view.phase, view.ready), (PodPhase::Running, false));
    assert_eq!(view.scheduled, Scheduled::Bound);
    assert_eq!(view.container.restarts, 7);
    assert_eq!(
        view.container.terminated.unwrap().message,
        "shard 3 is short"
    );
    assert_eq!(view.container.waiting.unwrap().0, "CrashLoopBackOff");
    assert_eq!(view.annotations.len(), 1, "only ours are kept");
    assert_eq!(
        (view.address.as_deref(), view.node.as_deref()),
        (Some("10.0.0.1"), Some("a"))
    );
}

#[test]
fn requests_are_summed_as_the_scheduler_does() {
    let pod = pod(json!({
        "metadata": {"name": "x"},
        "spec": {
            "nodeName": "a",
            "overhead": {"memory": "10Mi"},
            "initContainers": [
                {"name": "big", "resources": {"requests": {"memory": "1Gi"}}},
                {"name": "sidecar", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}}],
            "containers": [
                {"name": "one", "resources": {"requests": {"cpu": "1", "memory": "100Mi"}, "limits": {"nvidia.com/gpu": "2"}}},
                {"name": "two", "resources": {"requests": {"cpu": "500m"}, "limits": {"cpu": "4", "memory": "4Gi"}}}],
        },
    }));
    let claim = Claim::of(&pod).unwrap();
    let expected = Resources {
        cpu_millis: 1600,
        memory_bytes: (1024 + 10) << 20,
        gpus: 2,
        pods: 1,
        ..Resources::default()
    };
    assert_eq!((claim.node.as_str(), claim.requests), ("a", expected));
}

#[test]
fn a_pod_claims_room_from_plan_to_end() {
    let planned = json!({"metadata": {"name": "x", "annotations": {"cachalot.dev/planned-nodes": "b,c"}},
        "spec": {"containers": []}});
    assert_eq!(Claim::of(&pod(planned.clone())).unwrap().node, "b");
    let ended = with(pod(planned), json!({"status": {"phase": "Failed"}}));
    assert_eq!(Claim::of(&ended), None);
    let unknown = json!({"metadata": {"name": "x"}, "spec": {"containers": []}});
    assert_eq!(
        Claim::of(&pod(unknown)),
        None,
        "nobody knows where it will go"
    );
}

#[test]
fn a_node_shows_what_placement_needs() {
    let node = with(
        h200x8("a"),
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "True"},
            {"type": "GpuMemWatch", "status": "True"},
            {"type": "GpuNvlinkWatch", "status": "False"}]}}),
    );
    let view = NodeView::of(&node);
    assert!(view.ready && !view.unschedulable);
    assert_eq!(view.faults, ["GpuMemWatch"]);
    assert_eq!(view.taints[0].effect, TaintEffect::NoSchedule);
    assert_eq!(view.allocatable.gpus, 8);
    assert_eq!(view.allocatable.memory_bytes, 1 << 40);
}

#[test]
fn a_faulty_gpu_node_takes_no_replica() {
    let faulty = with(
        h200x8("a"),
        json!({"status": {"conditions": [
            {"type": "Ready", "status": "True"}, {"type": "SysLogsXIDError", "status": "True"}]}}),
    );
    let plan = story(r1(json!({}))).on([faulty]).plan();
    assert!(
        condition(&plan, "Planned")
            .2
            .contains("1 node: GPU fault SysLogsXIDError")
    );
}

#[test]
fn a_malformed_report_of_an_engine_is_an_error_and_changes_nothing() {
    let mut samples = operator_core::PodSamples::default();
    assert!(samples.record_load(now(), "<html>").is_err());
    assert!(samples.record_startup("{\"phase\":\"dreaming\"}").is_err());
    assert_eq!(samples, operator_core::PodSamples::default());
}
