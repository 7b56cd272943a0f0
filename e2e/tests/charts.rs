//! The charts render to the committed goldens, pass `helm lint --strict`, and refuse values they do not know.
//!
//! Needs helm (3 or 4): from `$HELM`, `.lab/bin/helm` or the PATH. Without it each test says so and checks nothing.
//! `UPDATE_GOLDENS=1 cargo test -p e2e --test charts` writes the goldens anew.
//!
//! Helm 3 and 4 order and separate documents differently, so documents are compared one by one, sorted.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_path_buf()
}

/// The helm binaries to test with; empty when there is none.
fn helms() -> Vec<PathBuf> {
    let mut found = Vec::new();
    if let Some(given) = std::env::var_os("HELM") {
        found.push(PathBuf::from(given));
    } else {
        let lab = root().join(".lab/bin");
        found.extend(
            ["helm", "helm3"]
                .iter()
                .map(|name| lab.join(name))
                .filter(|path| path.is_file()),
        );
        if found.is_empty() && Command::new("helm").arg("version").output().is_ok() {
            found.push(PathBuf::from("helm"));
        }
    }
    if found.is_empty() {
        eprintln!(
            "SKIPPED: no helm in $HELM, .lab/bin or the PATH; `make up` installs it, or: go install helm.sh/helm/v4/cmd/helm@v4.2.4"
        );
    }
    found
}

fn helm(binary: &Path, arguments: &[&str]) -> Output {
    Command::new(binary)
        .args(arguments)
        .current_dir(root())
        .output()
        .expect("helm runs")
}

fn template(binary: &Path, chart: &str, more: &[&str]) -> Output {
    let chart = format!("charts/{chart}");
    let mut arguments = vec![
        "template",
        "cachalot",
        &chart,
        "--namespace",
        "cachalot-system",
        "--kube-version",
        "1.36.0",
    ];
    arguments.extend(more);
    helm(binary, &arguments)
}

/// The documents of a render, each trimmed, in the order of their text.
fn documents(rendered: &str) -> Vec<String> {
    let mut documents: Vec<String> = format!("\n{rendered}")
        .split("\n---")
        .map(|document| {
            document
                .trim()
                .lines()
                .map(str::trim_end)
                .collect::<Vec<_>>()
                .join("\n")
        })
        .filter(|document| !document.is_empty())
        .collect();
    documents.sort();
    documents
}

fn values_files() -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(root().join("charts/tests"))
        .expect("charts/tests")
        .map(|entry| entry.expect("entry").path())
        .filter(|path| {
            path.extension()
                .is_some_and(|extension| extension == "yaml")
        })
        .collect();
    files.sort();
    assert!(files.len() >= 4, "found {files:?}");
    files
}

#[test]
fn every_values_file_renders_to_its_golden() {
    for binary in helms() {
        for values in values_files() {
            let name = values
                .file_name()
                .and_then(|name| name.to_str())
                .expect("a name");
            let output = template(
                &binary,
                "cachalot",
                &["--values", values.to_str().expect("UTF-8")],
            );
            assert!(
                output.status.success(),
                "{name}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            let rendered = documents(&String::from_utf8(output.stdout).expect("UTF-8"));
            let golden = root().join("charts/tests/golden").join(name);
            if std::env::var_os("UPDATE_GOLDENS").is_some() {
                std::fs::write(&golden, format!("---\n{}\n", rendered.join("\n---\n")))
                    .expect("golden written");
            }
            let expected = std::fs::read_to_string(&golden).unwrap_or_default();
            for (ours, theirs) in rendered.iter().zip(documents(&expected)) {
                assert_eq!(
                    *ours,
                    theirs,
                    "{name} with {}; UPDATE_GOLDENS=1 accepts",
                    binary.display()
                );
            }
            assert_eq!(
                rendered.len(),
                documents(&expected).len(),
                "{name}: number of objects"
            );
        }
    }
}

#[test]
fn both_charts_pass_the_strict_lint_with_every_values_file() {
    for binary in helms() {
        let crds = helm(&binary, &["lint", "--strict", "charts/cachalot-crds"]);
        assert!(
            crds.status.success(),
            "{}",
            String::from_utf8_lossy(&crds.stdout)
        );
        for values in values_files() {
            let values = values.to_str().expect("UTF-8");
            let output = helm(
                &binary,
                &["lint", "--strict", "charts/cachalot", "--values", values],
            );
            assert!(
                output.status.success(),
                "{values}: {}",
                String::from_utf8_lossy(&output.stdout)
            );
        }
    }
}

#[test]
fn values_that_are_unknown_or_contradict_are_refused_by_name() {
    let cases = [
        (&["--set", "prometheus.adress=http://x"][..], "adress"),
        (&["--set", "replica=2"], "replica"),
        (&["--set", "replicas=0"], "replicas"),
        (&["--set", "log.format=xml"], "format"),
        (&["--set", "prometheus.url=prometheus:9090"], "url"),
        (&["--set", "image.digest=sha256:12"], "digest"),
        (
            &[
                "--set",
                "replicas=2",
                "--set",
                "leaderElection.enabled=false",
            ],
            "leaderElection",
        ),
        (
            &["--set", "serviceAccount.create=false"],
            "serviceAccount.name",
        ),
        (
            &[
                "--set",
                "metrics.serviceMonitor.enabled=true",
                "--set",
                "metrics.service.enabled=false",
            ],
            "metrics.service.enabled",
        ),
    ];
    for binary in helms() {
        for (arguments, named) in cases {
            let output = template(&binary, "cachalot", arguments);
            let message = String::from_utf8_lossy(&output.stderr);
            assert!(!output.status.success(), "{arguments:?} was accepted");
            assert!(message.contains(named), "{arguments:?}: {message}");
        }
    }
}

#[test]
fn the_operator_is_never_given_secrets_or_wildcards() {
    for values in values_files() {
        let golden = root()
            .join("charts/tests/golden")
            .join(values.file_name().expect("a name"));
        let rendered = std::fs::read_to_string(&golden).expect("a golden for each values file");
        for document in documents(&rendered)
            .iter()
            .filter(|text| text.contains("kind: ClusterRole\n") || text.contains("kind: Role\n"))
        {
            assert!(
                !document.contains("\"*\""),
                "{}: {document}",
                golden.display()
            );
            assert!(
                !document.contains("secrets"),
                "{}: {document}",
                golden.display()
            );
        }
    }
}
