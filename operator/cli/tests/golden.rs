//! The plugin as a user runs it, without a cluster: committed node lists in, golden text and JSON out.

use std::path::Path;
use std::process::{Command, Output};

const FLEET: &str = "../../docs/guide/gpu-fleet.yaml";
const NODES: &str = "tests/inputs/nodes.json";
const PODS: &str = "tests/inputs/pods.json";

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubectl-cachalot"))
        .args(arguments)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        // Nothing here may find a cluster.
        .env("KUBECONFIG", "/nonexistent")
        .env("HOME", "/nonexistent")
        .output()
        .expect("the plugin starts")
}

/// What was printed, with the exit code first.
fn answer(arguments: &[&str]) -> String {
    let output = run(arguments);
    let stdout = String::from_utf8(output.stdout).expect("UTF-8");
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    assert_eq!(stderr, "", "{arguments:?}");
    let code = output.status.code().expect("an exit code");
    format!("exit code {code}\n{stdout}")
}

fn refusal(arguments: &[&str]) -> (i32, String) {
    let output = run(arguments);
    let stderr = String::from_utf8(output.stderr).expect("UTF-8");
    (output.status.code().expect("an exit code"), stderr)
}

#[test]
fn plan_names_places_writes_and_why_the_other_does_not_fit() {
    let text = answer(&["plan", "-f", FLEET, "--nodes", NODES, "--pods", PODS]);
    insta::assert_snapshot!("plan_text", text);
}

#[test]
fn plan_as_json_and_yaml_says_the_same() {
    let with = |form: &str| run(&["plan", "-f", FLEET, "--nodes", NODES, "-o", form]).stdout;
    let json: serde_json::Value = serde_json::from_slice(&with("json")).expect("JSON");
    let yaml: serde_json::Value = serde_yaml::from_slice(&with("yaml")).expect("YAML");
    assert_eq!(json, yaml);
    // As printed: a parsed value forgets the order of its keys in some builds.
    let printed = String::from_utf8(with("json")).expect("UTF-8");
    insta::assert_snapshot!("plan_json", printed);
}

#[test]
fn every_answer_is_the_same_as_json_and_as_yaml() {
    let stored = "tests/inputs/stored.json";
    let fleet = ["-f", FLEET, "--nodes", "tests/inputs/h200x8x8.json"];
    let happenings = ["--happenings", "tests/inputs/happenings.yaml"];
    // What each says of the first ModelDeployment.
    let cases: [(Vec<&str>, &str, &str); 4] = [
        (
            [&["explain", "mdep/deepseek-r1"], &fleet[..]].concat(),
            "/wanted",
            "2",
        ),
        (vec!["status", "-f", stored], "/0/ready", "\"1/2\""),
        (vec!["top", "-f", stored], "/0/queued", "3"),
        (
            [&["simulate"], &fleet[..], &happenings].concat(),
            "/0/atSeconds",
            "0",
        ),
    ];
    for (arguments, place, value) in cases {
        let with = |form| run(&[&arguments[..], &["-o", form]].concat()).stdout;
        let json: serde_json::Value = serde_json::from_slice(&with("json")).expect("JSON");
        let yaml: serde_json::Value = serde_yaml::from_slice(&with("yaml")).expect("YAML");
        assert_eq!(json, yaml, "{arguments:?}");
        let found = json.pointer(place).map(ToString::to_string);
        assert_eq!(found.as_deref(), Some(value), "{arguments:?}: {json}");
    }
}

#[test]
fn explain_judges_every_node() {
    let text = answer(&[
        "explain",
        "mdep/deepseek-r1",
        "-f",
        FLEET,
        "--nodes",
        NODES,
        "--pods",
        PODS,
    ]);
    insta::assert_snapshot!("explain_text", text);
}

#[test]
fn a_model_that_was_not_inspected_is_planned_from_its_config() {
    let folder = std::env::temp_dir().join(format!("kubectl-cachalot-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    let manifest = folder.join("m.yaml");
    std::fs::write(
        &manifest,
        "apiVersion: cachalot.dev/v1alpha1\nkind: ModelDeployment\nmetadata: {name: tiny}\nspec:\n  \
         model: {source: 'hf://org/tiny'}\n  accelerator: {type: cpu}\n  replicas: 1\n",
    )
    .expect("written");
    let manifest = manifest.to_str().expect("UTF-8");
    let unknown = answer(&["plan", "-f", manifest, "--nodes", NODES]);
    assert!(unknown.starts_with("exit code 3\n"), "{unknown}");
    assert!(unknown.contains("WaitingForFacts"), "{unknown}");
    let config = "../../e2e/models/tiny-r1/config.json";
    let known = answer(&[
        "plan",
        "-f",
        manifest,
        "--nodes",
        NODES,
        "--model-config",
        config,
    ]);
    std::fs::remove_dir_all(&folder).expect("removed");
    assert!(known.starts_with("exit code 0\n"), "{known}");
    assert!(
        known.contains("default/tiny: 1 replica wanted, it has a place"),
        "{known}"
    );
    assert!(!known.contains("inspect"), "{known}");
}

#[test]
fn status_and_top_read_what_was_stored() {
    let stored = "tests/inputs/stored.json";
    let text = [
        answer(&["status", "-f", stored]),
        answer(&["status", "mdep/deepseek-r1", "-f", stored]),
        answer(&["top", "-f", stored]),
    ];
    insta::assert_snapshot!("status_and_top", text.join("\n"));
}

#[test]
fn a_pod_is_lost_only_where_a_list_of_nodes_says_so() {
    let of = |arguments: &[&str]| {
        let target = [
            "status",
            "mdep/deepseek-r1",
            "-f",
            "tests/inputs/stored.json",
        ];
        answer(&[&target, arguments].concat())
    };
    let without = of(&[]);
    assert!(
        without.contains("deepseek-r1-0-14d21ea3-0   Ready     h200-0"),
        "{without}"
    );
    assert!(
        without.contains("Failing") && !without.contains("Lost"),
        "{without}"
    );
    assert_eq!(of(&["--nodes", NODES]), without);
    // Nodes that do not have the pods' nodes among them: those are gone.
    let elsewhere = of(&["--nodes", "tests/inputs/other-node.json"]);
    assert!(
        elsewhere.contains("node h200-0 does not answer"),
        "{elsewhere}"
    );
}

#[test]
fn simulate_tells_each_plan_and_its_cause() {
    let text = answer(&[
        "simulate",
        "-f",
        FLEET,
        "--nodes",
        "tests/inputs/h200x8x8.json",
        "--happenings",
        "tests/inputs/happenings.yaml",
    ]);
    insta::assert_snapshot!("simulate", text);
}

#[test]
fn what_cannot_be_done_says_why() {
    let cases: &[(&[&str], i32, &str)] = &[
        (
            &["plan", "-f", "nowhere.yaml", "--nodes", NODES],
            1,
            "nowhere.yaml",
        ),
        (
            &["plan", "-f", NODES, "--nodes", NODES],
            1,
            "no ModelDeployment in it",
        ),
        (&["plan", "-f", FLEET], 1, "--nodes FILE plans without one"),
        (&["plan", "-f", FLEET, "--pods", PODS], 2, "--nodes"),
        (&["plan", "--nodes", NODES], 2, "--filename"),
        (
            &["explain", "mdep/other", "-f", FLEET, "--nodes", NODES],
            1,
            "there is no ModelDeployment other in namespace default",
        ),
        (
            &["explain", "deploy/other", "-f", FLEET, "--nodes", NODES],
            1,
            "give mdep/NAME or NAME",
        ),
        (
            &[
                "simulate",
                "-f",
                FLEET,
                "--nodes",
                NODES,
                "--happenings",
                NODES,
            ],
            1,
            "must be a YAML list of happenings",
        ),
        (
            &[
                "plan",
                "-f",
                FLEET,
                "--nodes",
                NODES,
                "--model-config",
                NODES,
            ],
            1,
            "--model-config",
        ),
        (&["sing"], 2, "sing"),
    ];
    for (arguments, code, expected) in cases {
        let (found, words) = refusal(arguments);
        assert_eq!(found, *code, "{arguments:?}: {words}");
        assert!(words.contains(expected), "{arguments:?}: {words}");
    }
    assert!(Path::new(env!("CARGO_MANIFEST_DIR")).join(NODES).exists());
}
