//! Seeded stories of faults; a failing seed is printed and shows the same story again.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use common::{deployment, node, settings, small_report};
use operator_core::sim::{Faults, run};
use serde_json::json;

fn tell(seeds: std::ops::Range<u64>, faults: Faults, rollout: serde_json::Value) {
    for seed in seeds {
        let nodes = (0..4).map(|i| node(&format!("node-{i}"), "4", "8Gi"));
        let spec = json!({"replicas": 3, "rollout": rollout.clone()});
        let outcome = run(
            seed,
            deployment("m", spec),
            nodes.collect(),
            small_report(),
            settings(),
            faults,
            100,
        );
        if let Err(broken) = outcome {
            let story = broken.story.join("\n");
            panic!("seed {seed}: {}\n{story}", broken.what);
        }
    }
}

#[test]
fn without_faults_it_settles_at_once() {
    let nodes = vec![node("node-0", "4", "8Gi")];
    let deployment = deployment("m", json!({"replicas": 3}));
    let outcome = run(
        1,
        deployment,
        nodes,
        small_report(),
        settings(),
        Faults::default(),
        100,
    );
    let outcome = outcome.unwrap_or_else(|broken| panic!("{broken:?}"));
    // Service, budget, inspection pod and its removal, facts, configuration, three pods.
    assert_eq!(outcome.writes, 9);
    assert!(outcome.settled_seconds < 60, "{outcome:?}");
}

#[test]
fn it_settles_whatever_happens_with_surge() {
    tell(0..20, Faults::all(), json!({"maxSurge": 1}));
}

#[test]
fn it_settles_whatever_happens_without_surge() {
    tell(
        1000..1150,
        Faults::all(),
        json!({"maxSurge": 0, "maxUnavailable": 1}),
    );
}

#[test]
fn it_settles_when_writes_are_lost_all_the_time() {
    let faults = Faults {
        lost_write: 400,
        lost_answer: 200,
        restart: 200,
        revised: 10,
        rescaled: 20,
        ..Faults::default()
    };
    tell(2000..2010, faults, json!({}));
}

/// For a night: `cargo test -p operator-core --test simulation -- --ignored`.
#[test]
#[ignore = "takes minutes"]
fn it_settles_in_a_thousand_stories() {
    tell(
        10_000..11_000,
        Faults::all(),
        json!({"maxSurge": 2, "maxUnavailable": 1}),
    );
}

#[test]
fn the_same_seed_tells_the_same_story() {
    let once = || {
        let nodes = (0..3).map(|i| node(&format!("node-{i}"), "4", "8Gi"));
        let deployment = deployment("m", json!({"replicas": 2}));
        run(
            7,
            deployment,
            nodes.collect(),
            small_report(),
            settings(),
            Faults::all(),
            200,
        )
        .unwrap_or_else(|broken| panic!("{broken:?}"))
    };
    assert_eq!(once(), once());
}
