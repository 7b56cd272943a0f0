//! Seeded stories of faults; a failing seed is printed and shows the same story again:
//! `SIM_SEED=123 cargo test -p operator-core --test simulation`. `SIM_STORIES` sets how many are told.

#![allow(clippy::unwrap_used)] // helpers of tests

mod common;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::fleets::story_of;
use common::{deployment, h200x8, node, r1, settings, small_report};
use operator_core::Inventory;
use operator_core::sim::{Broken, Faults, Happening, Outcome, Pace, Story, replay, run};
use serde_json::json;

/// Stories told by `cargo test`.
const STORIES: u64 = 10_000;

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var_os(variable)?;
    let number = text.to_string_lossy().parse();
    Some(number.unwrap_or_else(|_| panic!("{variable} = {text:?}: give a whole number")))
}

fn tell(broken: &Broken) -> String {
    format!(
        "{}\n{}\nshow it again: SIM_SEED={} cargo test -p operator-core --test simulation",
        broken.what,
        broken.story.join("\n"),
        broken.seed
    )
}

#[test]
fn whatever_happens_every_rule_holds_and_it_settles() {
    if let Some(seed) = number("SIM_SEED") {
        let outcome = run(story_of(seed));
        println!("seed {seed}: {outcome:?}");
        if let Err(broken) = outcome {
            panic!("{}", tell(&broken));
        }
        return;
    }
    let stories = number("SIM_STORIES").unwrap_or(STORIES);
    let next = AtomicU64::new(0);
    let failed: Mutex<Vec<Box<Broken>>> = Mutex::new(Vec::new());
    let (plans, writes) = (AtomicU64::new(0), AtomicU64::new(0));
    let threads = std::thread::available_parallelism().map_or(2, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    // Some failures say more than one; all of them say no more.
                    if seed >= stories || failed.lock().unwrap().len() >= 5 {
                        return;
                    }
                    match run(story_of(seed)) {
                        Ok(outcome) => {
                            plans.fetch_add(outcome.plans as u64, Ordering::Relaxed);
                            writes.fetch_add(outcome.writes as u64, Ordering::Relaxed);
                        }
                        Err(broken) => failed.lock().unwrap().push(broken),
                    }
                }
            });
        }
    });
    let failed = failed.into_inner().unwrap();
    let seeds: Vec<u64> = failed.iter().map(|broken| broken.seed).collect();
    if let Some(first) = failed.first() {
        panic!("seeds {seeds:?} fail; the first: {}", tell(first));
    }
    println!("{stories} stories, {plans:?} plans, {writes:?} writes");
    // Stories in which nothing is done would prove nothing.
    assert!(writes.into_inner() > 20 * stories);
}

fn quiet(deployment: operator_api::ModelDeployment, nodes: usize) -> Outcome {
    let nodes = (0..nodes).map(|i| node(&format!("node-{i}"), "4", "8Gi"));
    let outcome = run(Story {
        seed: 1,
        inventory: Inventory {
            nodes: nodes.collect(),
            deployments: vec![deployment],
            ..Inventory::default()
        },
        report: small_report(),
        settings: settings(),
        faults: Faults::default(),
        steps: 100,
    });
    outcome.unwrap_or_else(|broken| panic!("{}", tell(&broken)))
}

#[test]
fn without_faults_it_settles_at_once() {
    let outcome = quiet(deployment("m", json!({"replicas": 3})), 1);
    // Service, budget, inspection pod and its removal, facts, configuration, three pods.
    assert_eq!(outcome.writes, 9);
    assert_eq!(outcome.settled_seconds, 0, "{outcome:?}");
}

#[test]
fn the_same_seed_tells_the_same_story() {
    for seed in [7, 8, 9] {
        let once = || run(story_of(seed)).unwrap_or_else(|broken| panic!("{}", tell(&broken)));
        assert_eq!(once(), once());
    }
}

#[test]
fn a_told_story_shows_each_plan_and_its_cause() {
    let inventory = Inventory {
        nodes: vec![h200x8("a"), h200x8("b"), h200x8("c")],
        deployments: vec![r1(json!({"model": {"configMapRef": null}, "replicas": 2}))],
        ..Inventory::default()
    };
    let facts = common::facts_of(common::R1_CONFIG);
    let report = engine_spec::InspectReport::Facts(Box::new(facts)).to_message();
    let happenings: Vec<Happening> = [
        json!({"afterSeconds": 120, "nodeSilent": "a"}),
        json!({"afterSeconds": 120, "nodeBack": "a"}),
        json!({"scale": {"name": "r1", "replicas": 4}}),
        json!({"afterSeconds": 60, "nodesJoin": {"like": "a"}}),
    ]
    .into_iter()
    .map(|value| Happening::parse(value).unwrap())
    .collect();
    let plans = replay(inventory, report, &settings(), Pace::default(), &happenings).unwrap();
    let text: String = plans
        .iter()
        .map(|plan| {
            let because: String = plan
                .because
                .iter()
                .map(|b| format!("  because {b}\n"))
                .collect();
            let actions: String = plan.actions.iter().map(|a| format!("  {a}\n")).collect();
            let news: String = plan
                .conditions
                .iter()
                .map(|c| format!("  {}={} {}\n", c.kind, c.status, c.reason))
                .collect();
            format!(
                "{} s {}\n{because}{actions}{news}",
                plan.at_seconds, plan.deployment
            )
        })
        .collect();
    insta::assert_snapshot!("told_story", text);
}

#[test]
fn a_happening_that_makes_no_sense_says_why() {
    for (value, expected) in [
        (json!("nodeSilent"), "must be an object"),
        (json!({}), "exactly one"),
        (json!({"nodeSilent": "a", "nodeBack": "a"}), "exactly one"),
        (json!({"nodeSings": "a"}), "nodeSings"),
        (json!({"afterSeconds": -1, "wait": {}}), "afterSeconds = -1"),
        (json!({"scale": {"name": "m"}}), "replicas"),
    ] {
        let why = Happening::parse(value.clone()).unwrap_err();
        assert!(why.contains(expected), "{value}: {why}");
    }
    let nowhere = Happening::parse(json!({"nodeSilent": "z"})).unwrap();
    let why = replay(
        Inventory::default(),
        small_report(),
        &settings(),
        Pace::default(),
        &[nowhere],
    )
    .unwrap_err();
    assert_eq!(why, "happening 1: there is no node z");
}
