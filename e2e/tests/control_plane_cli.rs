//! The kubectl plugin against a real API server: it plans what the operator then does, explains what does not fit, and
//! writes nothing.
#![cfg(feature = "lab")]

use std::path::PathBuf;
use std::process::{Command, Output};
use std::time::Duration;

use e2e::eventually;
use serde_json::Value;

mod control_plane;
use control_plane::{Stand, children, config_of_r1, fleet, wait_condition};

const MINUTE: Duration = Duration::from_secs(60);

/// The plugin's binary: given by `$KUBECTL_CACHALOT`, else the newest that cargo built.
fn plugin() -> PathBuf {
    if let Some(given) = std::env::var_os("KUBECTL_CACHALOT") {
        return given.into();
    }
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| e2e::root().join("target"), PathBuf::from);
    ["release", "debug"]
        .map(|profile| target.join(profile).join("kubectl-cachalot"))
        .into_iter()
        .filter(|path| path.is_file())
        .max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok())
        .expect("the plugin is not built: cargo build -p kubectl-cachalot, or set KUBECTL_CACHALOT")
}

fn run(stand: &Stand, arguments: &[&str]) -> Output {
    Command::new(plugin())
        .args(arguments)
        .arg("--kubeconfig")
        .arg(stand.cluster.kubeconfig())
        .output()
        .expect("the plugin starts")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn what_is_planned_is_what_the_operator_does() {
    let stand = Stand::start();
    let cluster = &stand.cluster;
    stand.simulate("gpu", 3);
    cluster
        .apply("default", &config_of_r1())
        .expect("the config");
    let folder = tempfile::tempdir().expect("a folder");
    let manifest = folder.path().join("r1.yaml");
    std::fs::write(&manifest, fleet("r1", "  replicas: 2\n")).expect("written");
    let manifest = manifest.to_str().expect("UTF-8");

    // The config map is found in the cluster, the ModelDeployment only in the file.
    let image = "--engine-image=localhost/cachalot-engine:dev";
    let planned = run(&stand, &["plan", "-f", manifest, "-o", "json", image]);
    assert_eq!(planned.status.code(), Some(0), "{planned:?}");
    let plan = &json(&planned)[0];
    assert_eq!(plan["fits"], true, "{plan}");
    assert!(
        children(cluster, "default", "r1").is_empty(),
        "a plan wrote something"
    );
    let mut pods: Vec<String> = plan["places"]
        .as_array()
        .expect("places")
        .iter()
        .map(|place| place["pod"].as_str().expect("a name").to_owned())
        .collect();
    pods.sort();

    let operator = stand.operator("only", &[]);
    operator.wait_leading();
    cluster
        .apply("default", &fleet("r1", "  replicas: 2\n"))
        .expect("applied");
    wait_condition(cluster, "default", "r1", "Ready", "True", MINUTE);
    let mut made: Vec<String> = cluster
        .engine_pods("default", "r1")
        .expect("pods")
        .iter()
        .map(|pod| pod["metadata"]["name"].as_str().expect("a name").to_owned())
        .collect();
    made.sort();
    assert_eq!(
        made, pods,
        "the operator did something else than was planned"
    );

    // Now nothing is left to do, without being told the image: the pods show it.
    let settled = run(&stand, &["plan", "-f", manifest, "-o", "json"]);
    let plan = &json(&settled)[0];
    assert_eq!(plan["actions"], serde_json::json!([]), "{plan}");

    cluster
        .kubectl(&["scale", "mdep", "r1", "--replicas=4"])
        .expect("scaled");
    wait_condition(cluster, "default", "r1", "Planned", "False", MINUTE);
    let explained = run(&stand, &["explain", "mdep/r1"]);
    assert_eq!(explained.status.code(), Some(3), "{explained:?}");
    let words = String::from_utf8_lossy(&explained.stdout).into_owned();
    for expected in ["3 nodes: in use by this ModelDeployment", "NoNodeFits"] {
        assert!(words.contains(expected), "{expected} is not in\n{words}");
    }

    // The plan is told before what there is room for answers.
    eventually("three of four answer", MINUTE, || {
        let status = run(&stand, &["status", "r1"]);
        let words = String::from_utf8_lossy(&status.stdout).into_owned();
        match words.contains("3/4 ready") {
            true => Ok(()),
            false => Err(words),
        }
    });
    let top = run(&stand, &["top", "-A", "-o", "json"]);
    assert_eq!(top.status.code(), Some(0), "{top:?}");
    assert_eq!(json(&top)[0]["name"], "r1");
}

#[test]
fn without_rights_it_names_the_list_that_was_refused() {
    let stand = Stand::start();
    let restricted = stand.service_account();
    let output = Command::new(plugin())
        .args(["explain", "mdep/r1", "--context", "none", "--kubeconfig"])
        .arg(&restricted)
        .output()
        .expect("the plugin starts");
    assert_eq!(output.status.code(), Some(1));
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(words.contains("none"), "{words}");

    // The operator's own rights suffice: it may list everything that a plan needs.
    let output = Command::new(plugin())
        .args(["explain", "mdep/r1", "--kubeconfig"])
        .arg(&restricted)
        .output()
        .expect("the plugin starts");
    let words = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        words.contains("there is no ModelDeployment r1 in namespace default"),
        "{words}"
    );
}
