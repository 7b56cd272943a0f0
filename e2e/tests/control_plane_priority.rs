//! Priority among ModelDeployments on a real API server and scheduler: a place is reserved by a gated pod, those of lower
//! priority leave it, and they come back when there is room.
#![cfg(feature = "lab")]

use std::time::Duration;

use e2e::{Cluster, eventually};
use serde_json::Value;

mod control_plane;
use control_plane::{Stand, config_of_r1, fleet, is_true, wait_condition};

const MINUTE: Duration = Duration::from_secs(60);
const CLASS: &str = "apiVersion: scheduling.k8s.io/v1\nkind: PriorityClass\nmetadata: {name: production}\nvalue: 1000\n";

fn pods(cluster: &Cluster, name: &str) -> Result<Vec<Value>, String> {
    cluster
        .engine_pods("default", name)
        .map_err(|error| error.to_string())
}

fn ready(cluster: &Cluster, name: &str, wanted: usize) {
    eventually(&format!("{wanted} of {name}"), 2 * MINUTE, || {
        let pods = pods(cluster, name)?;
        let ready = pods.iter().filter(|pod| is_true(pod, "Ready")).count();
        match ready == wanted && pods.len() == wanted {
            true => Ok(()),
            false => Err(format!("{ready} of {} answer", pods.len())),
        }
    });
}

#[test]
fn a_model_of_higher_priority_takes_a_place_whoever_binds_and_gives_it_back() {
    let stand = Stand::start();
    stand.simulate("gpu", 2);
    let cluster = &stand.cluster;
    cluster.apply("default", CLASS).expect("a class");
    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let drain = "  rollout: {drainTimeoutSeconds: 1}\n";
    cluster
        .apply(
            "default",
            &fleet("small", &format!("  replicas: 2\n{drain}")),
        )
        .expect("applied");
    wait_condition(cluster, "default", "small", "Ready", "True", MINUTE);

    for binding in ["scheduler", "direct"] {
        let placement =
            format!("  placement:\n    priorityClassName: production\n    binding: {binding}\n");
        let big =
            fleet("big", &format!("  replicas: 1\n{drain}")).replace("  placement:\n", &placement);
        cluster.apply("default", &big).expect("applied");
        ready(cluster, "big", 1);
        ready(cluster, "small", 1);
        let pod = &pods(cluster, "big").expect("pods")[0];
        assert_eq!(pod["spec"]["priority"], 1000, "{pod}");
        assert!(pod["spec"]["schedulingGates"].is_null(), "{pod}");
        wait_condition(cluster, "default", "big", "Ready", "True", MINUTE);
        let told = wait_condition(cluster, "default", "small", "Planned", "False", MINUTE);
        assert!(told.contains("higher priority"), "{told}");
        let events = cluster
            .kubectl(&["describe", "mdep", "small"])
            .expect("described");
        assert!(events.contains("it gives way to default/big"), "{events}");

        cluster
            .kubectl(&["delete", "mdep", "big"])
            .expect("deleted");
        ready(cluster, "small", 2);
        wait_condition(cluster, "default", "small", "Planned", "True", MINUTE);
    }
}
