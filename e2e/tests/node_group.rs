//! On a real node: two pods, each with half of the model, serve it as one replica; losing one replaces both.
#![cfg(feature = "lab")]

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::{Cluster, chat, eventually};
use serde_json::Value;

mod node;
use node::{Model, is_ready, wait_ready};

const SPEC: &str = "replicas: 1
parallelism: {tensor: 2, groupSecretRef: {name: ranks}}
podTemplate:
  resources:
    requests: {cpu: 250m}";

fn uids(pods: &[Value]) -> BTreeSet<String> {
    let uids = pods.iter().map(|pod| pod["metadata"]["uid"].to_string());
    uids.collect()
}

/// The pods of the model once both are ready and none of `others` is left.
fn both(cluster: &Cluster, namespace: &str, others: &BTreeSet<String>) -> Vec<Value> {
    let mut found = Vec::new();
    eventually("two ranks are ready", Duration::from_secs(180), || {
        found = cluster
            .engine_pods(namespace, "pair")
            .map_err(|error| error.to_string())?;
        let is_whole = found.len() == 2 && found.iter().all(is_ready);
        match is_whole && uids(&found).is_disjoint(others) {
            true => Ok(()),
            false => Err(format!("{} pods", found.len())),
        }
    });
    found
}

#[test]
fn two_pods_serve_one_replica_and_a_lost_one_replaces_both() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("group").expect("a namespace");
    let secret = "apiVersion: v1
kind: Secret
metadata: {name: ranks}
stringData: {secret: what-the-two-ranks-know}";
    cluster
        .apply(&namespace.name, secret)
        .expect("a secret is made");
    cluster
        .apply(&namespace.name, &node::manifest("pair", SPEC))
        .expect("applied");
    wait_ready(&cluster, &namespace.name, "pair");
    let model = Model::of(&cluster, &namespace.name, "pair");
    let ask = |question: &str, expected: &str| {
        let answer = chat::ask(&model.base_url, "pair", question).expect(question);
        assert_eq!(answer.boxed(), Some(expected), "{question}: {answer:?}");
    };
    ask("What is 123 + 456?", "579");
    let before = both(&cluster, &namespace.name, &BTreeSet::new());
    let row = cluster
        .kubectl(&["get", "mdep", "pair", "-n", &namespace.name])
        .expect("kubectl get");
    assert!(
        row.contains("1/1"),
        "replicas are counted, not pods:\n{row}"
    );

    // Requests reach the first rank only.
    let leader = before
        .iter()
        .find(|pod| {
            pod["metadata"]["name"]
                .as_str()
                .is_some_and(|name| name.ends_with("-0"))
        })
        .expect("rank 0");
    let slices = cluster
        .list(
            &namespace.name,
            "endpointslices",
            "kubernetes.io/service-name=pair",
        )
        .expect("endpoint slices");
    let addresses: Vec<&Value> = slices
        .iter()
        .flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten())
        .flat_map(|endpoint| endpoint["addresses"].as_array().into_iter().flatten())
        .collect();
    assert_eq!(addresses, [&leader["status"]["podIP"]]);

    // A rank is lost: what is left of the group cannot answer, so another group takes its place.
    let lost = before
        .iter()
        .find(|pod| pod["metadata"]["uid"] != leader["metadata"]["uid"])
        .and_then(|pod| pod["metadata"]["name"].as_str())
        .expect("rank 1");
    cluster
        .kubectl(&[
            "delete",
            "pod",
            lost,
            "-n",
            &namespace.name,
            "--grace-period=0",
            "--force",
        ])
        .expect("deleted");
    both(&cluster, &namespace.name, &uids(&before));
    wait_ready(&cluster, &namespace.name, "pair");
    ask("What is 36 * 7?", "252");

    // What groups shared goes with the last of them.
    let shared = || {
        let all = ["get", "services,networkpolicies", "-o", "name", "-n"];
        let found = cluster.kubectl(&[&all[..], &[&namespace.name]].concat());
        let found = found.expect("kubectl get");
        let names = found.lines().filter(|name| name.ends_with("/pair-ranks"));
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let made = [
        "networkpolicy.networking.k8s.io/pair-ranks",
        "service/pair-ranks",
    ];
    let mut found = shared();
    found.sort();
    assert_eq!(found, made);
    let alone = r#"{"spec": {"parallelism": {"tensor": 1}}}"#;
    cluster
        .kubectl(&[
            "patch",
            "mdep",
            "pair",
            "-n",
            &namespace.name,
            "--type=merge",
            "-p",
            alone,
        ])
        .expect("patched");
    eventually(
        "nothing is shared",
        Duration::from_secs(180),
        || match shared() {
            left if left.is_empty() => Ok(()),
            left => Err(left.join(", ")),
        },
    );
    ask("What is 20 + 22?", "42");
}
