//! GPUs that engines reported at fault: remembered first, then left, then avoided until they are repaired.

use std::sync::Arc;

use crate::common::*;
use engine_spec::{EndReport, GpuFault};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use operator_api::{GpuFaultStatus, ModelDeploymentStatus};
use operator_core::snapshot::{PodPhase, PodView, Terminated};
use operator_core::{Flaw, Plan, check, explain, objects};
use serde_json::{Value, json};

const UUID: &str = "GPU-5fd4f087-86f3-7a43-b711-4771313afc50";
const DAY: i64 = 24 * 3600;

/// A node that was booted.
fn booted(name: &str, uid: &str, boot_id: &str) -> Node {
    let info: Value = [
        "architecture",
        "containerRuntimeVersion",
        "kernelVersion",
        "kubeProxyVersion",
        "kubeletVersion",
        "machineID",
        "operatingSystem",
        "osImage",
        "systemUUID",
    ]
    .map(|field| (field.to_owned(), json!("")))
    .into_iter()
    .collect::<serde_json::Map<_, _>>()
    .into();
    let mut patch = json!({"metadata": {"uid": uid}, "status": {"nodeInfo": info}});
    merge(
        &mut patch,
        json!({"status": {"nodeInfo": {"bootID": boot_id}}}),
    );
    with(h200x8(name), patch)
}

fn node_a() -> Node {
    booted("a", "uid-a", "boot-1")
}

/// The engine ended with `message` and was started again in place.
fn ended(pod: &mut PodView, message: &str, at: Timestamp) {
    pod.phase = PodPhase::Running;
    pod.ready = false;
    pod.container.restarts += 1;
    pod.container.terminated = Some(Box::new(Terminated {
        exit_code: 1,
        reason: "Error".into(),
        message: message.into(),
        finished: Some(at),
    }));
}

fn report(error: &str) -> String {
    let report = EndReport {
        gpu_fault: Some(GpuFault {
            uuid: UUID.into(),
            error: error.into(),
        }),
        message: format!("{UUID} is at fault: cuStreamSynchronize failed with {error}"),
    };
    report.to_message()
}

fn ecc() -> String {
    report("CUDA_ERROR_ECC_UNCORRECTABLE (214)")
}

/// One replica on node a, and what else is there.
fn on_a(others: impl IntoIterator<Item = Node>) -> Story {
    let running = story(r1(json!({}))).on([node_a()]).running();
    assert_eq!(running.snapshot.pods[0].node.as_deref(), Some("a"));
    running.on(others)
}

/// The same, where the engine has just reported its GPU, and that is remembered.
fn remembered(others: impl IntoIterator<Item = Node>) -> Story {
    let story = on_a(others);
    let at = story.snapshot.now;
    let story = story.replica(0, |pod| ended(pod, &ecc(), at)).later(1);
    let plan = story.plan();
    story.after(&plan, starts).later(1)
}

/// Nodes that new pods may be bound to.
fn places(plan: &Plan) -> Vec<String> {
    let pods = plan.actions.iter().filter_map(|action| match action {
        operator_core::Action::Create(operator_core::Object::Pod(pod)) => Some(pod),
        _ => None,
    });
    pods.flat_map(|pod| objects::preferred_nodes(pod)).collect()
}

fn faults(plan: &Plan) -> Vec<(&str, &str, &str)> {
    let faults = plan.status.gpu_faults.iter();
    faults
        .map(|fault| (&*fault.node, &*fault.uuid, &*fault.boot_id))
        .collect()
}

fn events(plan: &Plan) -> Vec<&str> {
    plan.events.iter().map(|event| event.reason).collect()
}

#[test]
fn a_replica_whose_engine_reports_its_gpu_is_replaced_on_another_node_once_that_is_remembered() {
    let story = on_a([booted("b", "uid-b", "boot-1")]);
    let at = story.snapshot.now;
    let story = story.replica(0, |pod| ended(pod, &ecc(), at)).later(1);
    let plan = story.plan();
    // What is not stored would be lost with the pod.
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    assert_eq!(faults(&plan), [("a", UUID, "boot-1")]);
    assert_eq!(plan.wake_after.unwrap().as_secs(), 1);
    let told = plan
        .events
        .iter()
        .find(|it| it.reason == "GpuFaultRemembered");
    let note = &told.unwrap().note;
    assert!(note.contains("node a") && note.contains(UUID), "{note}");
    let story = story.after(&plan, starts).later(1);
    let plan = story.plan();
    assert_eq!(places(&plan), ["b"]);
    // It does not answer, so that nobody misses it.
    assert_eq!(
        pod_actions(&plan),
        ["create Pod r1-1-0", "delete Pod r1-0-0"]
    );
    let (_, reason, message) = condition(&plan, "Degraded");
    assert_eq!(reason, "GpuFault");
    assert!(
        message.contains(UUID) && message.contains("(214)"),
        "{message}"
    );
    assert!(!events(&plan).contains(&"GpuFaultRemembered"));
}

#[test]
fn one_that_answers_again_serves_until_another_one_does() {
    let story = remembered([booted("b", "uid-b", "boot-1")]).replica(0, answers);
    let plan = story.plan();
    assert_eq!(pod_actions(&plan), ["create Pod r1-1-0"]);
    let story = story.after(&plan, starts).replica(1, answers).later(5);
    assert_eq!(
        pod_actions(&story.plan()),
        ["patch Pod r1-0-0 cachalot.dev/serving=false"]
    );
}

#[test]
fn without_room_elsewhere_it_goes_on() {
    for surge in [1, 0] {
        let spec = json!({"rollout": {"maxSurge": surge, "maxUnavailable": 1}});
        let story = remembered([]).edited(spec);
        let plan = story.plan();
        assert_eq!(pod_actions(&plan), Vec::<String>::new(), "surge {surge}");
        assert_eq!(condition(&plan, "Degraded").1, "GpuFault");
        // Nobody can replace it, which is told whether surge lets one be asked for or not.
        assert_eq!(condition(&plan, "Planned").1, "NoNodeFits", "surge {surge}");
        let story = story.after(&plan, starts).replica(0, answers).later(60);
        let plan = story.plan();
        assert_eq!(pod_actions(&plan), Vec::<String>::new(), "surge {surge}");
        assert_eq!(condition(&plan, "Available").0, "True");
        // Room appears.
        let plan = story.on([booted("b", "uid-b", "boot-1")]).plan();
        assert_ne!(pod_actions(&plan), Vec::<String>::new(), "surge {surge}");
    }
}

#[test]
fn one_that_fails_again_and_again_is_told_of_by_its_gpu() {
    let story = remembered([]).replica(0, |pod| pod.container.restarts = 7);
    let (_, reason, message) = condition(&story.plan(), "Degraded");
    assert_eq!(reason, "GpuFault");
    assert!(message.contains(UUID), "{message}");
}

#[test]
fn what_is_remembered_outlives_the_pod_and_the_operator() {
    let story = remembered([booted("b", "uid-b", "boot-1")]);
    let story = story.after(&story.plan(), answers).swept().later(60);
    assert_eq!(story.snapshot.pods.len(), 1, "the sick one is gone");
    // Another operator knows what is stored and nothing else.
    let mut story = story.edited(json!({"replicas": 2}));
    let mut deployment = (*story.snapshot.deployment).clone();
    let text = serde_json::to_string(&deployment.status).unwrap();
    deployment.status = serde_json::from_str::<Option<ModelDeploymentStatus>>(&text).unwrap();
    story.snapshot.deployment = Arc::new(deployment);
    let plan = story.plan();
    assert_eq!(places(&plan), Vec::<String>::new());
    assert_eq!(faults(&plan), [("a", UUID, "boot-1")]);
    let (_, reason, message) = condition(&plan, "Planned");
    assert_eq!(reason, "NoNodeFits");
    for word in [UUID, "rebooted or replaced", "2026-11-25T12:00:"] {
        assert!(message.contains(word), "{message}");
    }
    let explained = explain(&story.snapshot, &story.settings, &plan);
    let group = explained.nodes.iter().find(|group| group.nodes == ["a"]);
    let group = group.unwrap();
    assert!(group.why.as_ref().unwrap().contains(UUID), "{group:?}");
    let remedy = group.remedy.as_ref().unwrap();
    assert!(remedy.contains("reboot the node"), "{remedy}");
}

#[test]
fn a_node_is_used_again_when_it_was_booted_or_replaced_or_a_day_is_over() {
    // The pod is gone.
    let after_it = |node| {
        let mut story = story(r1(json!({}))).on([node]);
        story.snapshot.deployment = remembered([]).snapshot.deployment;
        story
    };
    let unrepaired = after_it(node_a());
    let repaired = [
        after_it(booted("a", "uid-a", "boot-2")),
        after_it(booted("a", "uid-other", "boot-1")),
        unrepaired.clone().later(DAY + 10),
    ];
    for story in repaired {
        let plan = story.plan();
        assert_eq!(places(&plan), ["a"], "{plan}");
        assert_eq!(faults(&plan), []);
        assert!(events(&plan).contains(&"GpuFaultForgotten"));
    }
    // And not before.
    for story in [unrepaired.clone(), unrepaired.later(DAY - 10)] {
        assert_eq!(places(&story.plan()), Vec::<String>::new());
    }
}

#[test]
fn a_report_from_before_the_repair_is_no_news() {
    let story = remembered([booted("b", "uid-b", "boot-1")]);
    // The pod is still there, and shows the end of its engine from before the boot.
    let story = story
        .on([booted("a", "uid-a", "boot-2")])
        .replica(0, answers);
    let plan = story.plan();
    assert_eq!(faults(&plan), [("a", UUID, "boot-1")]);
    let again = story.after(&plan, starts).later(60);
    let plan = again.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    assert_eq!(condition(&plan, "Degraded").1, "AsExpected");
    assert_eq!(faults(&plan), [("a", UUID, "boot-1")]);
    // A report of a later end is.
    let at = again.snapshot.now;
    let again = again.replica(0, |pod| ended(pod, &ecc(), at));
    assert_eq!(faults(&again.plan()), [("a", UUID, "boot-2")]);
}

#[test]
fn errors_that_a_program_can_cause_restart_the_engine_and_nothing_else() {
    let software = EndReport {
        gpu_fault: None,
        message: "cuLaunchKernel failed with CUDA_ERROR_ILLEGAL_ADDRESS (700)".into(),
    };
    for message in [software.to_message(), "the end of a log".into()] {
        let story = on_a([booted("b", "uid-b", "boot-1")]);
        let at = story.snapshot.now;
        let story = story.replica(0, |pod| ended(pod, &message, at)).later(1);
        let plan = story.plan();
        assert_eq!(pod_actions(&plan), Vec::<String>::new());
        assert_eq!(faults(&plan), []);
        // In words, and not in JSON.
        let failing = story.replica(0, |pod| pod.container.restarts = 3).plan();
        let (_, reason, words) = condition(&failing, "Degraded");
        assert_eq!(reason, "ReplicasFailing");
        assert!(!words.contains("{"), "{words}");
    }
}

#[test]
fn what_others_remember_keeps_new_replicas_away_and_leaves_those_that_run() {
    let fault = GpuFaultStatus {
        node: "a".into(),
        node_uid: "uid-a".into(),
        boot_id: "boot-1".into(),
        uuid: UUID.into(),
        error: "CUDA_ERROR_ECC_UNCORRECTABLE (214)".into(),
        pod: "other-0-12345678-0".into(),
        since: k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()),
    };
    let spec = json!({"accelerator": {"type": "nvidia"}, "parallelism": {"tensor": 4}});
    let mut running = story(deployment("m", spec))
        .inspected()
        .on([node_a()])
        .running();
    running.snapshot.gpu_faults = vec![fault.clone()];
    let plan = running.plan();
    assert_eq!(pod_actions(&plan), Vec::<String>::new());
    // Whoever remembers it stores it.
    assert_eq!(faults(&plan), []);
    let more = running.clone().edited(json!({"replicas": 2}));
    assert_eq!(places(&more.plan()), Vec::<String>::new());
    let mut more = more.on([booted("b", "uid-b", "boot-1")]);
    assert_eq!(places(&more.plan()), ["b"]);
    more.snapshot.gpu_faults[0].boot_id = "boot-0".into();
    assert!(places(&more.plan()).contains(&"a".into()));
    // Replicas that need no GPU do not care.
    let tolerations = json!([{"key": "nvidia.com/gpu", "operator": "Exists"}]);
    let spec = json!({"placement": {"tolerations": tolerations}});
    let mut cpu = story(deployment("c", spec)).inspected().on([node_a()]);
    cpu.snapshot.gpu_faults = vec![fault];
    assert_eq!(places(&cpu.plan()), ["a"]);
}

#[test]
fn the_linter_sees_a_plan_that_uses_a_sick_gpu() {
    let mut sound = story(r1(json!({}))).on([node_a()]);
    let plan = sound.plan();
    assert_eq!(places(&plan), ["a"]);
    sound.snapshot.deployment = remembered([]).snapshot.deployment;
    let flaws = check(&plan, &sound.snapshot, &sound.settings);
    let is_it = |flaw: &Flaw| matches!(flaw, Flaw::SickGpu(pod) if pod.starts_with("r1-0-"));
    assert!(flaws.iter().any(is_it), "{flaws:?}");
    // As it is on another node.
    let elsewhere = sound.on([booted("a", "uid-a", "boot-2")]);
    assert_eq!(check(&plan, &elsewhere.snapshot, &elsewhere.settings), []);
}
