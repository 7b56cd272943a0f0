//! Faults around the operator: an API server that dies, a model that is not there, a right that is missing. Each ends in
//! a condition or an event, nothing is created twice, nothing spins.
#![cfg(feature = "lab")]

use std::process::Command;
use std::time::{Duration, Instant};

use e2e::eventually;
use serde_json::json;

mod control_plane;
use control_plane::{SOON, Stand, children, config_of_r1, fleet, wait_condition};

const MINUTE: Duration = Duration::from_secs(60);

#[test]
fn an_api_server_that_is_killed_is_survived() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 3);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    cluster
        .apply("default", &fleet("r1", "  replicas: 2\n"))
        .expect("applied");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    let before = children(cluster, "default", "r1");

    let status = stand.lab.kubelab(&["status"]).expect("the lab's status");
    let line = status
        .lines()
        .find(|line| line.starts_with("kube-apiserver"))
        .expect("an API server");
    let pid = line.split_whitespace().nth(1).expect("its pid");
    assert!(
        Command::new("kill")
            .args(["-KILL", pid])
            .status()
            .expect("kill runs")
            .success()
    );
    let killed = Instant::now();
    eventually(
        "a change after the restart is carried out",
        2 * MINUTE,
        || {
            cluster
                .kubectl(&["scale", "mdep", "r1", "--replicas=3"])
                .map_err(|error| error.to_string())?;
            match cluster
                .engine_pods("default", "r1")
                .map_err(|error| error.to_string())?
                .len()
            {
                3 => Ok(()),
                pods => Err(format!("{pods} pods")),
            }
        },
    );
    println!(
        "scaled {:?} after the API server was killed",
        killed.elapsed()
    );
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    let after = children(cluster, "default", "r1");
    for child in &before {
        assert!(after.contains(child), "{child} was replaced: {after:?}");
    }
    assert_eq!(operator.get("/healthz").0, 200);
    let passes = operator
        .metric("cachalot_operator_reconcile_duration_seconds_count")
        .expect("counted");
    assert!(passes < 300.0, "{passes} passes");
}

#[test]
fn what_an_inspection_finds_becomes_a_condition_and_is_not_repeated_hot() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    let manifest = "apiVersion: cachalot.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: lost}\nspec: {model: {source: \
                    'file:///models/lost'}, accelerator: {type: cpu}, replicas: 1}\n";
    cluster.apply("default", manifest).expect("applied");
    let inspections = || {
        cluster.list(
            "default",
            "pods",
            "cachalot.dev/model-deployment=lost,cachalot.dev/component=inspect",
        )
    };
    let pod = eventually("an inspection pod", SOON, || {
        let pods = inspections().map_err(|error| error.to_string())?;
        pods.first()
            .and_then(|pod| pod["metadata"]["name"].as_str().map(str::to_string))
            .ok_or_else(|| "none".into())
    });
    let created = cluster
        .get("default", "pod", &pod)
        .expect("an answer")
        .expect("there");
    let created = created["metadata"]["creationTimestamp"].clone();
    // There is no kubelet in this lab; the test says what one would say.
    let report =
        json!({"error": {"reason": "ModelNotFound", "message": "/models/lost does not exist"}})
            .to_string();
    let ended = json!({"status": {"phase": "Failed", "containerStatuses": [{
        "name": "inspect", "image": "x", "imageID": "x", "ready": false, "restartCount": 0,
        "state": {"terminated": {"exitCode": 1, "reason": "Error", "message": report, "finishedAt": created}},
    }]}});
    cluster
        .kubectl(&[
            "patch",
            "pod",
            &pod,
            "-n",
            "default",
            "--subresource=status",
            "--type=merge",
            "-p",
            &ended.to_string(),
        ])
        .expect("patched");
    let why = wait_condition(cluster, "default", "lost", "ModelInspected", "False", SOON);
    assert!(why.contains("/models/lost"), "{why}");
    let described = cluster
        .kubectl(&["describe", "mdep", "lost"])
        .expect("described");
    assert!(described.contains("ModelNotFound"), "{described}");
    let created = inspections().expect("pods").len();
    std::thread::sleep(Duration::from_secs(5));
    assert!(
        inspections().expect("pods").len() <= created.max(1),
        "inspected again at once"
    );
    let passes = operator
        .metric("cachalot_operator_reconcile_duration_seconds_count")
        .expect("counted");
    assert!(passes < 60.0, "{passes} passes");
}

#[test]
fn a_right_that_is_missing_is_told_and_the_others_go_on_when_it_is_back() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 1);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    let role = cluster
        .kubectl(&["get", "clusterrole", "cachalot", "-o", "json"])
        .expect("the role");
    let without = role.replace("\"poddisruptionbudgets\"", "\"nothing\"");
    assert_ne!(role, without);
    cluster
        .with_input(
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            &strip(&without),
        )
        .expect("a right removed");
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    cluster
        .apply("default", &fleet("r1", "  replicas: 1\n"))
        .expect("applied");
    eventually("an event names the right", SOON, || {
        let events = cluster
            .kubectl(&["get", "events", "-o", "json"])
            .map_err(|error| error.to_string())?;
        if events.contains("CallRefused") && events.contains("poddisruptionbudgets") {
            Ok(())
        } else {
            Err(operator.log())
        }
    });
    let why = wait_condition(cluster, "default", "r1", "Degraded", "True", SOON);
    let words = "on poddisruptionbudgets (apiGroup \"policy\")";
    assert!(
        why.contains("Grant the operator the verb ") && why.contains(words),
        "{why}"
    );
    let errors =
        operator.metric("cachalot_operator_reconcile_errors_total{category=\"forbidden\"}");
    assert!(
        errors.is_some_and(|errors| (1.0..20.0).contains(&errors)),
        "{errors:?}"
    );
    cluster
        .with_input(
            &["apply", "--server-side", "--force-conflicts", "-f", "-"],
            &strip(&role),
        )
        .expect("the right is back");
    wait_condition(cluster, "default", "r1", "Ready", "True", 2 * MINUTE);
    wait_condition(cluster, "default", "r1", "Degraded", "False", SOON);
}

/// Without what only the API server may say.
fn strip(object: &str) -> String {
    let mut object: serde_json::Value = serde_json::from_str(object).expect("JSON");
    if let Some(metadata) = object["metadata"].as_object_mut() {
        metadata.retain(|field, _| field == "name" || field == "labels");
    }
    object.to_string()
}
