//! Both charts are installed, upgraded and removed on a real API server, with Helm 4 and Helm 3.
//!
//! There is no node, so the operator's pod stays pending; that it runs is for the tests on a real node.
#![cfg(feature = "lab")]

use std::process::Command;

use e2e::{Cluster, Lab};

fn helm(name: &str, cluster: &Cluster, arguments: &[&str]) -> Result<String, String> {
    let home = tempfile::tempdir().expect("a folder");
    let output = Command::new(e2e::tool(name))
        .args(arguments)
        .args(["--namespace", "cachalot-system", "--kubeconfig"])
        .arg(cluster.kubeconfig())
        .env("HELM_CACHE_HOME", home.path())
        .env("HELM_CONFIG_HOME", home.path())
        .env("HELM_DATA_HOME", home.path())
        .current_dir(e2e::root())
        .output()
        .expect("helm runs; `make tools` installs it");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

fn install_upgrade_remove(name: &str) {
    let lab = Lab::start().expect("a lab");
    let cluster = lab.cluster();
    let run = |arguments: &[&str]| {
        helm(name, &cluster, arguments)
            .unwrap_or_else(|error| panic!("{name} {arguments:?}: {error}"))
    };

    let notes = run(&[
        "upgrade",
        "--install",
        "cachalot",
        "charts/cachalot",
        "--create-namespace",
    ]);
    assert!(
        notes.contains("ATTENTION") && notes.contains("cachalot-crds"),
        "no word about the missing CRD: {notes}"
    );
    run(&[
        "upgrade",
        "--install",
        "cachalot-crds",
        "charts/cachalot-crds",
    ]);
    let notes = run(&["upgrade", "--install", "cachalot", "charts/cachalot"]);
    assert!(!notes.contains("ATTENTION"), "{notes}");
    cluster
        .kubectl(&["get", "deployment", "cachalot", "-n", "cachalot-system"])
        .expect("the operator's Deployment");

    // What people do between two upgrades must not stop the next one.
    cluster
        .kubectl(&[
            "scale",
            "deployment",
            "cachalot",
            "-n",
            "cachalot-system",
            "--replicas=0",
        ])
        .expect("scaled");
    cluster
        .kubectl(&[
            "rollout",
            "restart",
            "deployment",
            "cachalot",
            "-n",
            "cachalot-system",
        ])
        .expect("restarted");
    run(&[
        "upgrade",
        "cachalot",
        "charts/cachalot",
        "--set",
        "log.level=debug",
    ]);
    let deployment = cluster
        .get("cachalot-system", "deployment", "cachalot")
        .expect("an answer")
        .expect("there");
    let arguments = deployment["spec"]["template"]["spec"]["containers"][0]["args"].to_string();
    assert!(arguments.contains("--log-level=debug"), "{arguments}");
    run(&[
        "upgrade",
        "cachalot",
        "charts/cachalot",
        "--values",
        "charts/tests/lab.yaml",
        "--set",
        "replicas=2",
    ]);
    run(&["upgrade", "cachalot-crds", "charts/cachalot-crds"]);

    // The operator's rights: what it needs and not what it does not.
    let may = |verb: &str, what: &str| {
        // kubectl reads "pods/exec" as the pod called exec.
        let (resource, subresource) = what.split_once('/').unwrap_or((what, ""));
        let subresource = format!("--subresource={subresource}");
        let who = "--as=system:serviceaccount:cachalot-system:cachalot";
        let arguments = [
            "auth",
            "can-i",
            verb,
            resource,
            &subresource,
            "-n",
            "default",
            who,
        ];
        cluster
            .kubectl(&arguments)
            .is_ok_and(|answer| answer.trim() == "yes")
    };
    for (verb, what) in [
        ("create", "pods"),
        ("watch", "nodes"),
        ("patch", "modeldeployments/status"),
        ("create", "events.events.k8s.io"),
    ] {
        assert!(may(verb, what), "cannot {verb} {what}");
    }
    for (verb, what) in [
        ("get", "secrets"),
        ("list", "secrets"),
        ("create", "pods/exec"),
        ("patch", "modeldeployments"),
        ("delete", "nodes"),
        ("update", "leases"),
        ("create", "clusterroles"),
    ] {
        assert!(!may(verb, what), "can {verb} {what}");
    }

    // A wish outlives the charts: the definition is kept.
    cluster
        .kubectl(&[
            "apply",
            "-f",
            e2e::root()
                .join("docs/guide/quickstart.yaml")
                .to_str()
                .expect("UTF-8"),
        ])
        .expect("applied");
    run(&["uninstall", "cachalot"]);
    run(&["uninstall", "cachalot-crds"]);
    cluster
        .kubectl(&["get", "mdep", "tiny-r1"])
        .expect("the ModelDeployment is still there");
    for kind in ["clusterroles", "clusterrolebindings"] {
        let left = cluster
            .list("", kind, "app.kubernetes.io/part-of=cachalot")
            .expect("a list");
        assert!(left.is_empty(), "{kind}: {left:?}");
    }
    let left = cluster.list(
        "cachalot-system",
        "deployments,services,serviceaccounts,roles",
        "app.kubernetes.io/part-of=cachalot",
    );
    assert!(left.expect("a list").is_empty());

    // Installed anew over the definition that was kept.
    run(&[
        "upgrade",
        "--install",
        "cachalot-crds",
        "charts/cachalot-crds",
    ]);
}

#[test]
fn the_charts_install_upgrade_and_leave_with_helm_4() {
    install_upgrade_remove("helm");
}

#[test]
fn the_charts_install_upgrade_and_leave_with_helm_3() {
    install_upgrade_remove("helm3");
}
