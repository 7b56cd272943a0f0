//! `engine pack` as a user runs it.

// A helper is no test, and may unwrap all the same.
#![allow(clippy::unwrap_used)]

mod process;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Instant;

use process::{Engine, PATIENCE};
use serde_json::json;

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/models/tiny-r1")
}

fn engine(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(arguments)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn packed() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let (from, to) = (model(), dir.path());
    let arguments = [
        "pack",
        "--model",
        from.to_str().unwrap(),
        "--output",
        to.to_str().unwrap(),
    ];
    let output = engine(&[&arguments[..], &["--quantization", "int8"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    dir
}

#[test]
fn a_packed_directory_plans_and_inspects_like_the_model_it_came_from() {
    let dir = packed();
    let packed = dir.path().to_str().unwrap();
    assert!(dir.path().join("tokenizer.json").is_file());
    assert!(!dir.path().join("model.safetensors").exists());
    let plan = |arguments: &[&str]| {
        let output = engine(
            &[
                &["plan", "--device", "cpu", "--output", "json", "--model"],
                arguments,
            ]
            .concat(),
        );
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let from = model();
    let from = from.to_str().unwrap();
    let expected = plan(&[from, "--quantization", "int8"]);
    assert_eq!(plan(&[packed]), expected);
    assert_ne!(plan(&[from]), expected);
    let output = engine(&["inspect", "--model", packed]);
    assert!(output.status.success());
    assert!(
        text(&output.stdout).contains("\"quantization\":\"int8\""),
        "{}",
        text(&output.stdout)
    );
}

#[test]
fn a_flipped_byte_is_found_by_verify_and_by_nothing_else() {
    let dir = packed();
    let packed = dir.path().to_str().unwrap();
    let output = engine(&["pack", "--verify", packed]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(text(&output.stdout).contains("all digests right"));
    let path = dir.path().join("model.packed");
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let output = engine(&["pack", "--verify", packed]);
    assert!(!output.status.success());
    assert!(
        text(&output.stderr).contains("has the digest"),
        "{}",
        text(&output.stderr)
    );
}

/// A disk that fails under the mapping looks the same.
#[test]
fn a_packed_file_that_is_cut_off_while_it_is_served_ends_the_engine_with_the_reason() {
    let dir = packed();
    let mut engine = Engine::start(&["--model", dir.path().to_str().unwrap()]);
    assert!(!engine.text(&[1, 2, 3], 4).is_empty());
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(dir.path().join("model.packed"))
        .unwrap();
    file.set_len(4096).unwrap();
    let request = json!({"prompt": [1, 2, 3], "max_tokens": 4});
    let (status, _) = engine.ask("POST", "/v1/completions", "", Some(&request));
    assert_eq!(status, 0, "nobody can answer");
    let deadline = Instant::now() + PATIENCE;
    let ended = loop {
        if let Some(ended) = engine.child.try_wait().unwrap() {
            break ended;
        }
        assert!(Instant::now() < deadline, "it goes on");
        std::thread::yield_now();
    };
    assert_eq!(ended.code(), Some(74));
    let log = engine.rest_of_log();
    assert!(
        log.contains("could not be read where it is mapped"),
        "{log}"
    );
}

#[test]
fn mistakes_are_named() {
    let dir = packed();
    let packed = dir.path().to_str().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let other = elsewhere.path().to_str().unwrap();
    for (arguments, expected) in [
        (
            &["pack", "--model", packed, "--output", other][..],
            "is packed already",
        ),
        (&["pack", "--verify", other], "cannot read"),
        (&["pack", "--model", packed], "--output"),
        (
            &["plan", "--device", "cuda", "--model", packed],
            "packed for the CPU",
        ),
    ] {
        let output = engine(arguments);
        assert!(!output.status.success());
        assert!(
            text(&output.stderr).contains(expected),
            "{}",
            text(&output.stderr)
        );
    }
    let from = model();
    let from = from.to_str().unwrap();
    let output = engine(&[
        "plan",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--quantization",
        "int4",
        "--model",
        from,
    ]);
    assert!(text(&output.stderr).contains("quantization = int4: must be none with dtype float32"));
}
