//! On a real node: load makes 1 → 3 replicas, silence makes 3 → 1, a new revision replaces the old
//! one, a slower one is rolled back, `kubectl scale` works; not one request fails.
#![cfg(feature = "lab")]

use std::time::Duration;

use e2e::{Cluster, eventually};

mod node;
use node::{Load, Model, Retries, manifest, wait_ready, wait_ready_pods};

const AUTOSCALING: &str = "autoscaling:
  minReplicas: 1
  maxReplicas: 3
  targets:
    queuedRequestsPerReplica: 1
    kvCacheUtilizationPercent: 80
  stabilization:
    scaleUpSeconds: 0
    scaleDownSeconds: 10";

#[test]
fn load_scales_out_silence_scales_in_and_no_request_fails() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("scaling").expect("a namespace");
    let name = &namespace.name;
    cluster
        .apply(name, &manifest("elastic", AUTOSCALING))
        .expect("applied");
    wait_ready(&cluster, name, "elastic");
    let model = Model::of(&cluster, name, "elastic");

    // Four run at once in a replica; twenty-four clients keep a queue.
    let load = Load::start(&model.base_url, "elastic", 24, Retries::None);
    wait_ready_pods(&cluster, name, "elastic", 3, Duration::from_secs(180));
    let answered = load.answered();
    eventually("three replicas answer", Duration::from_secs(30), || {
        let now = load.answered();
        if now > answered {
            Ok(())
        } else {
            Err(format!("{now} answers"))
        }
    });
    // Half the load keeps going while replicas leave.
    let trickle = Load::start(&model.base_url, "elastic", 1, Retries::None);
    let heavy = load.finish();
    wait_ready_pods(&cluster, name, "elastic", 1, Duration::from_secs(180));
    let light = trickle.finish();
    println!("{heavy} answers under load, {light} while scaling in, none failed");
    let described = cluster
        .kubectl(&["describe", "mdep", "elastic", "-n", name])
        .expect("kubectl describe");
    assert!(
        described.contains("queued"),
        "no reason for scaling in:\n{described}"
    );
}

#[test]
fn a_new_revision_replaces_every_pod_without_a_failed_request() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("rollout").expect("a namespace");
    let name = &namespace.name;
    let first = manifest("rolling", "replicas: 2");
    cluster.apply(name, &first).expect("applied");
    wait_ready(&cluster, name, "rolling");
    let model = Model::of(&cluster, name, "rolling");
    let before = revisions(&cluster, name);
    let load = Load::start(&model.base_url, "rolling", 3, Retries::None);
    cluster
        .apply(name, &first.replace("maxTokens: 512", "maxTokens: 640"))
        .expect("applied");
    eventually(
        "only the new revision is left",
        Duration::from_secs(180),
        || {
            let now = revisions(&cluster, name);
            let pods = cluster
                .engine_pods(name, "rolling")
                .map_err(|e| e.to_string())?;
            let ready = pods.iter().filter(|pod| node::is_ready(pod)).count();
            if ready >= 2 && now.iter().all(|r| !before.contains(r)) {
                Ok(())
            } else {
                Err(format!(
                    "{ready} ready, revisions {now:?}, before {before:?}"
                ))
            }
        },
    );
    println!("{} answers during the rollout, none failed", load.finish());
}

#[test]
fn a_revision_whose_first_tokens_come_late_is_rolled_back_without_a_failed_request() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("regression").expect("a namespace");
    let name = &namespace.name;
    let first = manifest("rolling", "replicas: 2").replace(
        "drainTimeoutSeconds: 30",
        "drainTimeoutSeconds: 30
    steps: [{percent: 50, holdSeconds: 600}]
    analysis: {maxTtftIncreasePercent: 50, minRequests: 20}",
    );
    cluster.apply(name, &first).expect("applied");
    wait_ready(&cluster, name, "rolling");
    let model = Model::of(&cluster, name, "rolling");
    let before = revisions(&cluster, name);
    let load = Load::start(&model.base_url, "rolling", 8, Retries::None);
    // Requests that found a place at once now wait for the one before them.
    let slow = first.replace("maxConcurrentSequences: 4", "maxConcurrentSequences: 1");
    cluster.apply(name, &slow).expect("applied");
    eventually("it is rolled back", Duration::from_secs(180), || {
        let object = cluster
            .get(name, "mdep", "rolling")
            .map_err(|e| e.to_string())?
            .ok_or("no object")?;
        match e2e::cluster::condition(&object, "Degraded") {
            Some(("True", "RolledBack", message))
                if message.contains("mean time to first token is") =>
            {
                Ok(())
            }
            other => Err(format!(
                "{other:?}, rollout {}",
                object["status"]["rollout"]
            )),
        }
    });
    eventually("all run the old revision", Duration::from_secs(120), || {
        let now = revisions(&cluster, name);
        if now.len() == 2 && now.iter().all(|revision| before.contains(revision)) {
            Ok(())
        } else {
            Err(format!("revisions {now:?}, before {before:?}"))
        }
    });
    println!(
        "{} answers on the way there and back, none failed",
        load.finish()
    );
}

#[test]
fn kubectl_scale_changes_the_number_of_replicas() {
    let cluster = Cluster::from_environment().expect("a cluster");
    let namespace = cluster.namespace("scale").expect("a namespace");
    let name = &namespace.name;
    cluster
        .apply(name, &manifest("manual", "replicas: 1"))
        .expect("applied");
    wait_ready(&cluster, name, "manual");
    cluster
        .kubectl(&["scale", "mdep/manual", "--replicas=2", "-n", name])
        .expect("kubectl scale");
    wait_ready_pods(&cluster, name, "manual", 2, Duration::from_secs(120));
    cluster
        .kubectl(&["scale", "mdep/manual", "--replicas=0", "-n", name])
        .expect("kubectl scale");
    wait_ready_pods(&cluster, name, "manual", 0, Duration::from_secs(120));
}

fn revisions(cluster: &Cluster, namespace: &str) -> Vec<String> {
    let pods = cluster
        .engine_pods(namespace, "rolling")
        .expect("the API answers");
    let label = |pod: &serde_json::Value| {
        pod["metadata"]["labels"]["cachalot.dev/revision"]
            .as_str()
            .map(str::to_owned)
    };
    pods.iter().filter_map(label).collect()
}
