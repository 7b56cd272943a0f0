//! On a real node: an engine that dies, an operator that dies; clients that retry see no wrong answer, and nothing is
//! created twice.
#![cfg(feature = "lab")]

use std::collections::BTreeSet;
use std::time::Duration;

use e2e::{Cluster, eventually};

mod node;
use node::{Load, Model, Retries, manifest, wait_ready, wait_ready_pods};

#[test]
fn a_killed_engine_and_a_killed_operator_are_replaced_under_load() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("kill").expect("a namespace");
    let name = &namespace.name;
    cluster
        .apply(name, &manifest("hardy", "replicas: 2"))
        .expect("applied");
    wait_ready(&cluster, name, "hardy");
    wait_ready_pods(&cluster, name, "hardy", 2, Duration::from_secs(60));
    let model = Model::of(&cluster, name, "hardy");
    let load = Load::start(&model.base_url, "hardy", 4, Retries::UntilAnswered);

    let pods = cluster.engine_pods(name, "hardy").expect("the API answers");
    let text = |field: &str| {
        pods[0]["metadata"][field]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    // The successor of a killed pod may carry its name again; only the uid tells them apart.
    let (victim, uid) = (text("name"), text("uid"));
    cluster
        .kubectl(&[
            "delete",
            "pod",
            &victim,
            "-n",
            name,
            "--grace-period=0",
            "--force",
        ])
        .expect("the engine pod is killed");
    kill_operator(&cluster);
    eventually(
        "two pods again, without the killed one",
        Duration::from_secs(180),
        || {
            let uids = uids(&cluster, name);
            let pods = cluster
                .engine_pods(name, "hardy")
                .map_err(|e| e.to_string())?;
            let ready = pods.iter().filter(|pod| node::is_ready(pod)).count();
            if uids.len() == 2 && ready == 2 && !uids.contains(&uid) {
                Ok(())
            } else {
                Err(format!("{ready} ready of {uids:?}"))
            }
        },
    );
    println!(
        "{} right answers while engine and operator were killed",
        load.finish()
    );
}

#[test]
fn a_restarted_operator_changes_nothing_that_is_right() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("restart").expect("a namespace");
    let name = &namespace.name;
    cluster
        .apply(name, &manifest("steady", "replicas: 2"))
        .expect("applied");
    wait_ready(&cluster, name, "steady");
    wait_ready_pods(&cluster, name, "steady", 2, Duration::from_secs(60));
    let before = uids(&cluster, name);
    kill_operator(&cluster);
    wait_operator(&cluster);
    // The new leader has to act on a change, so that we know it has looked at everything.
    cluster
        .kubectl(&["scale", "mdep/steady", "--replicas=3", "-n", name])
        .expect("kubectl scale");
    wait_ready_pods(&cluster, name, "steady", 3, Duration::from_secs(120));
    let after = uids(&cluster, name);
    assert!(after.is_superset(&before), "{before:?} became {after:?}");
}

fn uids(cluster: &Cluster, namespace: &str) -> BTreeSet<String> {
    let pods = cluster
        .list(namespace, "pods", "cachalot.dev/component=engine")
        .expect("the API answers");
    pods.iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null())
        .filter_map(|pod| pod["metadata"]["uid"].as_str().map(str::to_owned))
        .collect()
}

fn kill_operator(cluster: &Cluster) {
    cluster
        .kubectl(&[
            "delete",
            "pod",
            "-n",
            "cachalot-system",
            "-l",
            "app.kubernetes.io/name=cachalot-operator",
            "--grace-period=0",
            "--force",
        ])
        .expect("the operator is killed");
}

fn wait_operator(cluster: &Cluster) {
    eventually("the operator runs again", Duration::from_secs(120), || {
        let pods = cluster
            .list(
                "cachalot-system",
                "pods",
                "app.kubernetes.io/name=cachalot-operator",
            )
            .map_err(|e| e.to_string())?;
        if pods.iter().any(node::is_ready) {
            Ok(())
        } else {
            Err(format!("{} pods", pods.len()))
        }
    });
}
