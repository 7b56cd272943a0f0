//! Replicas over time, on simulated nodes: GPUs at fault, a node that is drained, one that falls silent, spot nodes, a rollout that stops at its
//! partition, and one whose revision never answers.
//!
//! Where nothing but the operator takes replicas away, every look also asks for the promise of a rollout: never fewer
//! replicas that answer than are wanted.
#![cfg(feature = "lab")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use e2e::{Cluster, eventually};
use serde_json::Value;

mod control_plane;
use control_plane::{SOON, Stand, config_of_r1, fleet, is_true, wait_condition};

const MINUTE: Duration = Duration::from_secs(60);
const REVISION: &str = "cachalot.dev/revision";

/// A lab with nodes and an operator that leads.
fn stand(nodes: usize) -> (Stand, control_plane::Operator) {
    let stand = Stand::start();
    stand.simulate("gpu", nodes);
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    stand
        .cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    (stand, operator)
}

/// Applies `manifest` and waits until all of it answers.
fn serve(cluster: &Cluster, manifest: &str) {
    cluster.apply("default", manifest).expect("applied");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
}

fn node(pod: &Value) -> String {
    pod["spec"]["nodeName"].as_str().unwrap_or("").to_owned()
}

fn pods(cluster: &Cluster) -> Result<Vec<Value>, String> {
    cluster
        .engine_pods("default", "r1")
        .map_err(|error| error.to_string())
}

/// Ready pods by node, as long as there are at least `least` of them.
fn serving(cluster: &Cluster, least: usize) -> Result<Vec<Value>, String> {
    let mut pods = pods(cluster)?;
    pods.retain(|pod| is_true(pod, "Ready"));
    assert!(
        pods.len() >= least,
        "{} replicas answer, {least} are promised",
        pods.len()
    );
    Ok(pods)
}

/// How many pods run each revision.
fn revisions(pods: &[Value]) -> BTreeMap<String, usize> {
    let mut revisions = BTreeMap::new();
    for pod in pods {
        let revision = pod["metadata"]["labels"][REVISION].as_str().unwrap_or("?");
        *revisions.entry(revision.to_owned()).or_default() += 1;
    }
    revisions
}

#[test]
fn a_replica_on_gpus_at_fault_is_replaced_elsewhere_before_it_leaves() {
    let (stand, _operator) = stand(3);
    let cluster = &stand.cluster;
    let rollout = "  rollout: {drainTimeoutSeconds: 1}\n";
    serve(cluster, &fleet("r1", &format!("  replicas: 2\n{rollout}")));
    let sick = node(&pods(cluster).expect("pods")[0]);
    cluster
        .kubectl(&[
            "taint",
            "node",
            &sick,
            "nvidia.com/gpu-xid-error=79:NoSchedule",
        ])
        .expect("tainted");
    eventually("the replica runs elsewhere", MINUTE, || {
        let nodes: Vec<String> = serving(cluster, 2)?.iter().map(node).collect();
        match nodes.len() == 2 && !nodes.contains(&sick) && pods(cluster)?.len() == 2 {
            true => Ok(()),
            false => Err(format!("{nodes:?}, {sick} is at fault")),
        }
    });
    let events = cluster
        .kubectl(&["describe", "mdep", "r1"])
        .expect("described");
    assert!(events.contains(&sick), "{events}");

    // It is used again once it is repaired.
    cluster
        .kubectl(&["taint", "node", &sick, "nvidia.com/gpu-xid-error-"])
        .expect("repaired");
    cluster
        .kubectl(&["scale", "mdep", "r1", "--replicas=3"])
        .expect("scaled");
    eventually("three replicas", MINUTE, || {
        let nodes: Vec<String> = serving(cluster, 2)?.iter().map(node).collect();
        match nodes.len() == 3 && nodes.contains(&sick) {
            true => Ok(()),
            false => Err(format!("{nodes:?}")),
        }
    });
}

#[test]
fn a_drain_ends_and_the_only_replica_of_a_model_is_never_missed() {
    let (stand, _operator) = stand(2);
    let cluster = &stand.cluster;
    serve(
        cluster,
        &fleet("r1", "  replicas: 1\n  rollout: {drainTimeoutSeconds: 1}\n"),
    );
    let closed = node(&pods(cluster).expect("pods")[0]);
    let drained = std::thread::scope(|scope| {
        let drain = scope.spawn(|| {
            cluster.kubectl(&[
                "drain",
                &closed,
                "--ignore-daemonsets",
                "--delete-emptydir-data",
                "--timeout=120s",
            ])
        });
        while !drain.is_finished() {
            serving(cluster, 1).expect("pods");
            std::thread::sleep(Duration::from_millis(100));
        }
        drain.join().expect("no panic")
    });
    drained.expect("the drain ends");
    let nodes: Vec<String> = serving(cluster, 1)
        .expect("pods")
        .iter()
        .map(node)
        .collect();
    assert!(nodes.len() == 1 && nodes[0] != closed, "{nodes:?}");
    let words = cluster
        .kubectl(&["describe", "mdep", "r1"])
        .expect("described");
    assert!(
        words.contains("Evacuating") && words.contains("is cordoned"),
        "{words}"
    );

    // The other one is closed as well: it stays, and says what is in the way.
    let last = nodes[0].clone();
    cluster.kubectl(&["cordon", &last]).expect("cordoned");
    let told = format!("though node {last} is cordoned: 2 nodes: cordoned");
    eventually("it says that it stays", MINUTE, || {
        let model = cluster
            .get("default", "mdep", "r1")
            .map_err(|error| error.to_string())?
            .ok_or("gone")?;
        let (_, reason, message) =
            e2e::cluster::condition(&model, "Progressing").ok_or("no condition")?;
        match reason == "RolloutComplete" && message.contains(&told) {
            true => Ok(()),
            false => Err(format!("{reason}: {message}")),
        }
    });
    assert_eq!(serving(cluster, 1).expect("pods").len(), 1);
}

#[test]
fn a_replica_on_a_node_that_falls_silent_is_given_up_and_placed_elsewhere() {
    let (stand, operator) = stand(3);
    let cluster = &stand.cluster;
    serve(cluster, &fleet("r1", "  replicas: 2\n"));
    let before = pods(cluster).expect("pods");
    let (silent, lost) = (node(&before[0]), before[0]["metadata"]["uid"].clone());
    // What the node lifecycle controller writes when a kubelet is no longer heard; nobody plays it any more.
    cluster
        .kubectl(&["annotate", "node", &silent, "kubelab/silent="])
        .expect("annotated");
    let unknown = r#"{"status":{"conditions":[{"type":"Ready","status":"Unknown","reason":"NodeStatusUnknown"}]}}"#;
    cluster
        .kubectl(&[
            "patch",
            "node",
            &silent,
            "--subresource=status",
            "--type=strategic",
            "-p",
            unknown,
        ])
        .expect("silent");
    eventually("another node has the replica", 2 * MINUTE, || {
        let pods = pods(cluster)?;
        let elsewhere = pods
            .iter()
            .filter(|pod| node(pod) != silent && is_true(pod, "Ready"))
            .count();
        match elsewhere == 2 && pods.iter().all(|pod| pod["metadata"]["uid"] != lost) {
            true => Ok(()),
            false => Err(format!("{elsewhere} of 2 elsewhere")),
        }
    });
    // The one that did not fall silent was left alone.
    let kept = before[1]["metadata"]["uid"].clone();
    let now = pods(cluster).expect("pods");
    assert!(
        now.iter().any(|pod| pod["metadata"]["uid"] == kept),
        "{}",
        operator.log()
    );
}

#[test]
fn spot_nodes_take_what_is_above_the_floor_on_other_nodes() {
    let (stand, _operator) = stand(5);
    let cluster = &stand.cluster;
    // There is room for all three replicas on spot nodes, so only the floor sends two elsewhere.
    for node in ["gpu-0001", "gpu-0002", "gpu-0003"] {
        cluster
            .kubectl(&["label", "node", node, "karpenter.sh/capacity-type=spot"])
            .expect("labelled");
    }
    let others = ["gpu-0004", "gpu-0005"];
    let manifest = fleet("r1", "  replicas: 3\n").replace(
        "  placement:\n",
        "  placement:\n    spot: {onDemandMin: 2}\n",
    );
    serve(cluster, &manifest);
    let on_spot = |pods: &[Value]| -> Vec<String> {
        let nodes = pods.iter().map(node);
        nodes.filter(|n| !others.contains(&n.as_str())).collect()
    };
    let pods = pods(cluster).expect("pods");
    let first = on_spot(&pods);
    assert_eq!((pods.len(), first.len()), (3, 1), "{first:?}");

    // That spot node is taken away: its replica goes to another one, the others stay where they are.
    cluster
        .kubectl(&["delete", "node", &first[0]])
        .expect("deleted");
    eventually("three replicas without it", 2 * MINUTE, || {
        // The one that was taken away is missed, no other.
        let pods = serving(cluster, 2)?;
        let now = on_spot(&pods);
        match (pods.len(), now.len()) == (3, 1) && now != first {
            true => Ok(()),
            false => Err(format!("{now:?} of {} on spot nodes", pods.len())),
        }
    });
}

#[test]
fn a_rollout_stops_at_its_partition_and_goes_on_when_it_is_lifted() {
    let (stand, _operator) = stand(4);
    let cluster = &stand.cluster;
    let spec = |partition: u32, variable: &str| {
        let rollout = format!("  rollout: {{partition: {partition}, drainTimeoutSeconds: 1}}\n");
        let template = format!("  podTemplate: {{env: [{{name: NOTE, value: {variable}}}]}}\n");
        fleet("r1", &format!("  replicas: 3\n{rollout}{template}"))
    };
    serve(cluster, &spec(0, "first"));
    let old = revisions(&pods(cluster).expect("pods"));
    let (old, _) = old.first_key_value().expect("a revision");

    cluster
        .apply("default", &spec(2, "second"))
        .expect("applied");
    let is_shared = |number: usize| {
        let serving = serving(cluster, 3)?;
        let revisions = revisions(&serving);
        let kept = revisions.get(old).copied().unwrap_or(0);
        match serving.len() == 3 && kept == number && pods(cluster)?.len() == 3 {
            true => Ok(()),
            false => Err(format!("{revisions:?}")),
        }
    };
    eventually("one replica is of the new revision", MINUTE, || {
        is_shared(2)
    });
    // There it stays: looked at for longer than a replica takes.
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        is_shared(2).expect("the partition holds");
        std::thread::sleep(Duration::from_millis(500));
    }
    cluster
        .apply("default", &spec(0, "second"))
        .expect("applied");
    eventually("all are of the new revision", MINUTE, || is_shared(0));
    wait_condition(cluster, "default", "r1", "Ready", "True", SOON);
}

#[test]
fn a_revision_that_never_answers_is_rolled_back_and_no_replica_was_missed() {
    let (stand, operator) = stand(4);
    let cluster = &stand.cluster;
    let spec = |template: &str| {
        let rollout = "  rollout: {progressDeadlineSeconds: 10, drainTimeoutSeconds: 1}\n";
        fleet("r1", &format!("  replicas: 3\n{rollout}{template}"))
    };
    serve(cluster, &spec(""));
    let before = pods(cluster).expect("pods");
    let good = revisions(&before);

    let stuck = "  podTemplate: {annotations: {kubelab/never-ready: \"\"}}\n";
    cluster.apply("default", &spec(stuck)).expect("applied");
    eventually("the new revision is tried", MINUTE, || {
        serving(cluster, 3)?;
        let revisions = revisions(&pods(cluster)?);
        match revisions.len() == 2 {
            true => Ok(()),
            false => Err(format!("{revisions:?}")),
        }
    });
    eventually("it is rolled back", MINUTE, || {
        serving(cluster, 3)?;
        let revisions = revisions(&pods(cluster)?);
        match revisions == good {
            true => Ok(()),
            false => Err(format!("{revisions:?}, {good:?} served")),
        }
    });
    // The replicas that served were never touched, and it is said why.
    let uids = |pods: &[Value]| {
        let mut uids: Vec<String> = pods
            .iter()
            .map(|pod| pod["metadata"]["uid"].to_string())
            .collect();
        uids.sort();
        uids
    };
    assert_eq!(uids(&pods(cluster).expect("pods")), uids(&before));
    let described = cluster
        .kubectl(&["describe", "mdep", "r1"])
        .expect("described");
    assert!(
        described.contains("progressDeadlineSeconds"),
        "{described}\n{}",
        operator.log()
    );

    // Mended, it is rolled out.
    let mended = "  podTemplate: {annotations: {mended: \"yes\"}}\n";
    cluster.apply("default", &spec(mended)).expect("applied");
    eventually("the mended revision serves", 2 * MINUTE, || {
        serving(cluster, 3)?;
        let revisions = revisions(&pods(cluster)?);
        match revisions.len() == 1 && revisions != good {
            true => Ok(()),
            false => Err(format!("{revisions:?}")),
        }
    });
}
