//! On a real node: the quick start answers, a user's tools see it, deletion leaves nothing.
#![cfg(feature = "lab")]

use std::time::Duration;

use e2e::cluster::condition;
use e2e::{Cluster, chat, eventually};

mod node;
use node::{Model, wait_ready};

#[test]
fn the_quick_start_streams_right_answers_and_leaves_nothing_behind() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("serving").expect("a namespace");
    let quickstart = std::fs::read_to_string(e2e::root().join("docs/guide/quickstart.yaml"))
        .expect("the quick start is there");
    cluster
        .apply(&namespace.name, &quickstart)
        .expect("applied");
    wait_ready(&cluster, &namespace.name, "tiny-r1");
    let model = Model::of(&cluster, &namespace.name, "tiny-r1");

    for (question, expected) in [
        ("What is 123 + 456?", "579"),
        ("What is 17 - 99?", "-82"),
        ("What is 36 * 7?", "252"),
        ("How many r in \"strawberry\"?", "3"),
    ] {
        let answer = chat::ask(&model.base_url, "tiny-r1", question).expect(question);
        assert_eq!(answer.boxed(), Some(expected), "{question}: {answer:?}");
        assert_eq!(answer.finish_reason, "stop");
    }

    let row = cluster
        .kubectl(&["get", "mdep", "tiny-r1", "-n", &namespace.name])
        .expect("kubectl get");
    for column in ["READY", "PHASE", "GPUS", "TOK/S", "AGE", "1/1", "Running"] {
        assert!(row.contains(column), "{column} is not in:\n{row}");
    }
    let (status, metrics) = chat::get(&format!("{}/metrics", model.root_url)).expect("metrics");
    assert_eq!(status, 200);
    assert!(
        metrics.contains("vllm:generation_tokens_total"),
        "{metrics}"
    );

    cluster
        .kubectl(&["delete", "mdep", "tiny-r1", "-n", &namespace.name])
        .expect("deleted");
    eventually(
        "nothing of the model is left",
        Duration::from_secs(90),
        || {
            let left = cluster
                .list(
                    &namespace.name,
                    "pods,services,configmaps,poddisruptionbudgets",
                    "app.kubernetes.io/managed-by=cachalot",
                )
                .map_err(|e| e.to_string())?;
            let names: Vec<String> = left
                .iter()
                .map(|o| format!("{} {}", o["kind"], o["metadata"]["name"]))
                .collect();
            if names.is_empty() {
                Ok(())
            } else {
                Err(names.join(", "))
            }
        },
    );
}

#[test]
fn a_model_that_is_not_there_is_said_in_a_condition_and_an_event() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("missing").expect("a namespace");
    let manifest =
        node::manifest("ghost", "replicas: 1").replace("/models/tiny-r1", "/models/ghost");
    cluster.apply(&namespace.name, &manifest).expect("applied");
    let message = eventually("the fault is reported", Duration::from_secs(90), || {
        let object = cluster
            .get(&namespace.name, "mdep", "ghost")
            .map_err(|e| e.to_string())?
            .ok_or("no object")?;
        match condition(&object, "ModelInspected") {
            Some(("False", "ModelNotFound", message)) => Ok(message.to_owned()),
            other => Err(format!("{other:?}")),
        }
    });
    assert!(message.contains("/models/ghost"), "{message}");
    let described = cluster
        .kubectl(&["describe", "mdep", "ghost", "-n", &namespace.name])
        .expect("kubectl describe");
    assert!(described.contains("ModelNotFound"), "{described}");
    assert!(
        cluster
            .engine_pods(&namespace.name, "ghost")
            .expect("pods")
            .is_empty()
    );
}

#[test]
fn the_official_python_client_streams_a_correct_sum() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("python").expect("a namespace");
    let python = node::python_with_openai();
    cluster
        .apply(&namespace.name, &node::manifest("sums", "replicas: 1"))
        .expect("applied");
    wait_ready(&cluster, &namespace.name, "sums");
    let model = Model::of(&cluster, &namespace.name, "sums");
    let output = std::process::Command::new(python)
        .arg(e2e::root().join("e2e/sdk/ask.py"))
        .args([&model.base_url, "sums", "What is 250 + 375?"])
        .output()
        .expect("python runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(text.contains("\\boxed{625}"), "{text}");
}
