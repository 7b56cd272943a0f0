//! The house rules that a machine can check: who may import whom, file lengths, banned words,
//! links between documents.
//!
//! The import rules are the architecture: a pure crate that gains a client or a clock is a
//! different program. `docs/architecture.md` explains them; this file enforces them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Lines a source file may have; longer ones are split by meaning.
const LINES_MAX: usize = 700;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the workspace")
        .to_path_buf()
}

/// Normal (not dev, not build) dependencies of each workspace crate.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--format-version",
            "1",
            "--no-deps",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .expect("cargo metadata runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo metadata is JSON");
    let packages = metadata["packages"].as_array().expect("packages");
    packages
        .iter()
        .map(|package| {
            let names = package["dependencies"].as_array().expect("dependencies");
            let normal = names
                .iter()
                .filter(|d| d["kind"].is_null())
                .map(|d| d["name"].as_str().unwrap_or_default().to_owned())
                .collect();
            (
                package["name"].as_str().unwrap_or_default().to_owned(),
                normal,
            )
        })
        .collect()
}

/// Files that git knows, with the given endings, relative to the root.
fn files(endings: &[&str]) -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter(|name| endings.iter().any(|ending| name.ends_with(ending)))
        .map(PathBuf::from)
        .filter(|path| root().join(path).is_file())
        .collect()
}

#[test]
fn crates_import_only_what_the_architecture_allows() {
    // (crate, forbidden dependencies): a name ending in `-` forbids the prefix.
    let client = ["kube-", "tokio", "hyper", "axum", "ureq"];
    let pure = [
        "kube",
        "kube-",
        "tokio",
        "hyper",
        "axum",
        "ureq",
        "tracing",
        "libc",
        "rand",
        "jiff",
        "llguidance",
        "engine-text",
    ];
    let rules: &[(&str, &[&str])] = &[
        ("engine-spec", &pure),
        ("engine-memory", &pure),
        ("engine-core", &pure),
        (
            "engine-text",
            &[
                "kube",
                "tokio",
                "hyper",
                "axum",
                "ureq",
                "libc",
                "rand",
                "engine-core",
            ],
        ),
        ("engine-model", &pure),
        (
            "operator-core",
            &[
                "kube", "kube-", "tokio", "hyper", "axum", "ureq", "tracing", "rand",
            ],
        ),
        ("operator-api", &client),
        (
            "operator-k8s",
            &[
                "engine-core",
                "engine-cpu",
                "engine-cuda",
                "engine-load",
                "engine-model",
                "engine-server",
                "engine-text",
                "kernels",
            ],
        ),
        (
            "operator",
            &[
                "engine-core",
                "engine-cpu",
                "engine-cuda",
                "engine-load",
                "engine-model",
                "engine-server",
                "engine-text",
                "kernels",
            ],
        ),
        (
            "kubectl-cachalot",
            &["kube", "engine-", "axum", "hyper", "ureq"],
        ),
        (
            "engine-group",
            &[
                "kube",
                "kube-",
                "axum",
                "hyper",
                "tokio",
                "operator-",
                "engine-load",
                "engine-cpu",
                "engine-cuda",
                "engine-server",
                "kernels",
            ],
        ),
        ("engine-cpu", &["kube", "axum", "tokio", "operator-"]),
        ("engine-cuda", &["kube", "axum", "tokio", "operator-"]),
        (
            "kernels",
            &["engine-", "operator-", "kube", "tokio", "axum", "hyper"],
        ),
        ("engine-load", &["kube", "axum", "tokio", "operator-"]),
        (
            "engine-server",
            &["kube", "operator-", "engine-cpu", "engine-cuda", "kernels"],
        ),
        ("bench-report", &["engine-", "operator-", "kube", "tokio"]),
        ("engine-bench", &["kube", "axum", "tokio", "operator-"]),
        (
            "engine-fuzz",
            &["kube", "operator-", "engine-cpu", "engine-cuda", "kernels"],
        ),
        ("engine", &["kube", "operator-"]),
    ];
    let actual = dependencies();
    for (name, forbidden) in rules {
        let used = actual
            .get(*name)
            .unwrap_or_else(|| panic!("crate {name} is gone: update the rules"));
        for dependency in used {
            let bad = forbidden
                .iter()
                .any(|f| dependency == f || (f.ends_with('-') && dependency.starts_with(f)));
            assert!(
                !bad,
                "{name} must not depend on {dependency}: see docs/architecture.md"
            );
        }
    }
    // Device code has one user; everything else computes through the backend's interface.
    for (name, used) in &actual {
        assert!(
            name == "engine-cuda" || !used.contains("kernels"),
            "{name} must not depend on kernels: see docs/architecture.md"
        );
    }
}

#[test]
fn no_file_is_longer_than_a_reader_bears() {
    for path in files(&[".rs", ".go", ".py", ".sh"]) {
        let text = std::fs::read_to_string(root().join(&path)).expect("source is UTF-8");
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{} has {lines} lines; split it by meaning",
            path.display()
        );
    }
}

#[test]
fn no_unfinished_work_is_left_in_the_code() {
    // Spelled in halves so that this file does not find itself.
    let banned = [
        concat!("todo", "!("),
        concat!("unimplemented", "!("),
        concat!("FIX", "ME"),
        concat!("XX", "X:"),
        concat!("dbg", "!("),
    ];
    for path in files(&[".rs", ".go", ".py", ".sh", "Makefile"]) {
        let text = std::fs::read_to_string(root().join(&path)).expect("source is UTF-8");
        for (number, line) in text.lines().enumerate() {
            for word in banned {
                assert!(
                    !line.contains(word),
                    "{}:{}: {word}",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for path in files(&[".md"]) {
        let text = std::fs::read_to_string(root().join(&path)).expect("documents are UTF-8");
        // Code spans hold patterns such as `[a-z](…)` that only look like links.
        let text: String = text.split('`').step_by(2).collect();
        let folder = root().join(&path).parent().expect("a folder").to_path_buf();
        for target in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = target.split('#').next().unwrap_or_default();
            let outside =
                target.is_empty() || target.contains("://") || target.starts_with("mailto:");
            if !outside && !folder.join(target).exists() {
                broken.push(format!("{}: {target}", path.display()));
            }
        }
    }
    assert!(broken.is_empty(), "broken links:\n{}", broken.join("\n"));
}

#[test]
fn every_crate_says_what_it_is_for() {
    for path in files(&["src/lib.rs", "src/main.rs"]) {
        let text = std::fs::read_to_string(root().join(&path)).expect("source is UTF-8");
        assert!(
            text.starts_with("//!"),
            "{} does not open with its purpose",
            path.display()
        );
    }
}
