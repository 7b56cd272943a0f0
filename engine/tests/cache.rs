//! Engines that share one cache directory: one fetches, the others wait or take over, and what is in use stays.

#![allow(missing_docs, clippy::unwrap_used)]

#[path = "../load/tests/support/hub.rs"]
mod hub;
mod process;

use std::collections::HashMap;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hub::{COMMIT, Mood, Server};
use process::{Engine, PATIENCE};
use serde_json::Value;

const PROMPT: [u32; 6] = [5, 17, 40, 3, 88, 21];
const WEIGHTS: &str = "/model.safetensors";

/// A hub with a model that can be served, and the bytes of its files.
fn hub(mood: Mood) -> (Server, u64) {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/models/tiny-r1");
    let files: HashMap<String, Vec<u8>> = [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    .map(|name| (name.to_owned(), std::fs::read(model.join(name)).unwrap()))
    .into();
    let bytes = files.values().map(|file| file.len() as u64).sum();
    (Server::start(mood, files), bytes)
}

fn begin(hub: &Server, cache: &Path, more: &[&str]) -> Engine {
    let cache = ["--cache-dir", cache.to_str().unwrap()];
    let arguments = [&["--model", "hf://org/one"], &cache[..], more].concat();
    Engine::begin_with(&[("HF_ENDPOINT", &hub.address)], &arguments)
}

/// The report of its start, once it fetches and has `bytes`.
fn fetched(engine: &Engine, bytes: impl Fn(u64) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, report) = engine.ask("GET", "/startupz", "", None);
        let done = report["bytesLoaded"].as_u64().unwrap_or(0);
        if report["phase"] == "fetching" && bytes(done) {
            return report;
        }
        assert!(Instant::now() < deadline, "{report} {}", engine.log());
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn two_engines_that_start_together_fetch_once_and_both_tell_how_far_it_is() {
    let (hub, total) = hub(Mood::Waits);
    let cache = tempfile::tempdir().unwrap();
    let mut first = begin(&hub, cache.path(), &[]);
    fetched(&first, |bytes| bytes > total / 3);
    let mut second = begin(&hub, cache.path(), &[]);
    let report = fetched(&second, |bytes| bytes > total / 3);
    assert_eq!(report["bytesTotal"], total, "{report}");
    assert!(report["bytesLoaded"].as_u64() < Some(total), "{report}");
    hub.open();
    first.wait_ready();
    second.wait_ready();
    assert_eq!(hub.count(WEIGHTS), 1);
    assert_eq!(first.text(&PROMPT, 8), second.text(&PROMPT, 8));
    // A third finds it there.
    begin(&hub, cache.path(), &[]).wait_ready();
    assert_eq!(hub.count(WEIGHTS), 1);
}

#[test]
fn the_next_engine_continues_where_a_killed_one_was() {
    let (hub, total) = hub(Mood::Waits);
    let cache = tempfile::tempdir().unwrap();
    let mut first = begin(&hub, cache.path(), &[]);
    fetched(&first, |bytes| bytes > total / 3);
    let mut second = begin(&hub, cache.path(), &[]);
    fetched(&second, |bytes| bytes > total / 3);
    assert_eq!(hub.count(WEIGHTS), 1);
    let folder = format!("hf--org--one--{COMMIT}");
    let part = cache.path().join(folder).join("model.safetensors.part");
    // SIGKILL: nothing is cleaned up.
    first.child.kill().unwrap();
    first.child.wait().unwrap();
    let there = part.metadata().unwrap().len();
    hub.open();
    second.wait_ready();
    assert!(there > 0 && !part.exists());
    assert_eq!(hub.count(&format!("bytes={there}-")), 1);
    assert_eq!(hub.count(WEIGHTS), 2);
    assert_eq!(second.text(&PROMPT, 8).len(), 8);
}

#[test]
fn a_model_makes_room_only_when_no_engine_serves_it() {
    let (hub, bytes) = hub(Mood::Good);
    let cache = tempfile::tempdir().unwrap();
    let limit = format!("{}", bytes + bytes / 2);
    let mut engine = begin(&hub, cache.path(), &["--cache-limit", &limit]);
    engine.wait_ready();
    let other = || {
        let cache = cache.path().to_str().unwrap();
        let limited = ["--cache-dir", cache, "--cache-limit", limit.as_str()];
        let model = ["--model", "hf://org/two", "--failure-linger-seconds", "0"];
        let address = [("HF_ENDPOINT", hub.address.as_str())];
        Engine::begin_with(&address, &[&model[..], &limited].concat())
    };
    let one = cache.path().join(format!("hf--org--one--{COMMIT}"));
    let mut refused = other();
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        match refused.child.try_wait().unwrap() {
            Some(ended) => break ended,
            None => assert!(Instant::now() < deadline, "{}", refused.log()),
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let text = refused.rest_of_log();
    assert!(
        !ended.success() && text.contains("raise the limit"),
        "{text}"
    );
    assert!(one.join("model.safetensors").is_file());
    assert_eq!(engine.text(&PROMPT, 8).len(), 8);
    drop(engine);
    other().wait_ready();
    assert!(!one.exists() && !one.with_added_extension("lock").exists());
}

#[test]
fn a_limit_is_bytes_with_a_unit_or_without() {
    for (limit, is_right) in [
        ("1000000", true),
        ("500Gi", true),
        ("2T", true),
        ("0", false),
        ("1.5Gi", false),
        ("500 Gi", false),
        ("Gi", false),
        ("500GB", false),
        ("99999999999Ti", false),
    ] {
        let arguments = ["plan", "--model", "/nowhere", "--cache-limit", limit];
        let (succeeded, text) = process::run(&arguments);
        assert!(!succeeded);
        let refused = text.contains("such as 500Gi");
        assert_eq!(refused, !is_right, "{limit}: {text}");
    }
}

#[test]
fn an_inspection_fetches_and_keeps_no_weights() {
    let (hub, total) = hub(Mood::Good);
    let cache = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(["inspect", "--model", "hf://org/one"])
        .env("ENGINE_CACHE_DIR", cache.path())
        .env("HF_ENDPOINT", &hub.address)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["facts"]["shards"], 1, "{report}");
    assert_eq!(std::fs::read_dir(cache.path()).unwrap().count(), 0);
    assert!(total > 1 << 20);
    assert_eq!((hub.count(WEIGHTS), hub.count("bytes=0-262143")), (1, 1));
}
