//! Weights of a running engine are replaced by those of another checkpoint, or not at all.

#![allow(missing_docs, clippy::unwrap_used)]

mod process;

use std::path::Path;
use std::time::{Duration, Instant};

use kernels::emulation::{BuildError, Emulation};
use process::{Engine, PATIENCE, golden, shards, shuffle};
use serde_json::{Value, json};

const PROMPT: [u32; 6] = [5, 17, 40, 3, 88, 21];

const ON_CPU: &[&str] = &["--dtype", "float32"];

fn start(model: &Path, keys: &Path, device: &[&str]) -> Engine {
    let mut arguments = vec![
        "--model",
        model.to_str().unwrap(),
        "--admin-key-file",
        keys.to_str().unwrap(),
    ];
    arguments.extend_from_slice(device);
    Engine::start(&arguments)
}

/// What became of a replacement.
fn replace(engine: &Engine, body: &Value) -> Value {
    let head = "authorization: Bearer root\r\n";
    let (status, answer) = engine.ask("POST", "/v1/weights", head, Some(body));
    assert_eq!(status, 202, "{answer}");
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (_, report) = engine.ask("GET", "/v1/weights", "", None);
        if report["update"]["state"] == "done" || report["update"]["state"] == "failed" {
            return report;
        }
        assert!(Instant::now() < deadline, "{report}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn answers_are_those_of_an_engine_that_was_started_with_the_weights() {
    answers_of_both(&["v3-groups", "qwen2"], ON_CPU, 24);
}

#[test]
fn on_a_gpu_too() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    let driver = match Emulation::new(&folder).build() {
        Ok(path) => path,
        Err(error @ (BuildError::NoCompiler | BuildError::WrongMachine)) => {
            eprintln!("skipped: {error}");
            return;
        }
        Err(error) => panic!("the emulated driver does not build: {error}"),
    };
    let driver = driver.to_str().unwrap();
    // Few positions, because the emulator is slow.
    let device = [
        "--device",
        "cuda",
        "--cuda-driver",
        driver,
        "--max-model-len",
        "64",
        "--max-num-seqs",
        "2",
        "--max-num-batched-tokens",
        "64",
    ];
    answers_of_both(&["qwen2-cuda"], &device, 8);
}

fn answers_of_both(models: &[&str], device: &[&str], count: u32) {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "admin: root\n").unwrap();
    for model in models {
        let (old, new) = (golden(model), golden(model));
        shuffle(new.path());
        let (expected_old, expected_new) = (
            start(old.path(), keys.path(), device).text(&PROMPT, count),
            start(new.path(), keys.path(), device).text(&PROMPT, count),
        );
        assert_ne!(expected_old, expected_new);
        let engine = start(old.path(), keys.path(), device);
        assert_eq!(engine.text(&PROMPT, count), expected_old);

        let source = new.path().to_str().unwrap();
        let refused = |body: &Value, reason: &str, part: &str| {
            let report = replace(&engine, body);
            assert_eq!(report["update"]["state"], "failed", "{report}");
            assert_eq!(report["update"]["reason"], reason, "{report}");
            let message = report["update"]["message"].as_str().unwrap();
            assert!(message.contains(part), "{message}");
            assert_eq!(
                (&report["version"], &report["digest"]),
                (&json!(1), &Value::Null)
            );
            assert_eq!(engine.text(&PROMPT, count), expected_old);
        };
        refused(&json!({"source": "/nowhere"}), "ModelNotFound", "/nowhere");
        let other = golden("llama");
        let other = other.path().to_str().unwrap();
        refused(
            &json!({"source": other}),
            "ModelConfigInvalid",
            "of config.json is",
        );
        let digest = format!("sha256:{}", "0".repeat(64));
        let body = json!({"source": source, "digest": digest});
        refused(&body, "WeightsMismatch", "have sha256:");
        let whole = std::fs::read(&shards(new.path())[0]).unwrap();
        std::fs::write(&shards(new.path())[0], &whole[..whole.len() - 7]).unwrap();
        refused(
            &json!({"source": source}),
            "WeightsTruncated",
            "safetensors",
        );
        // Whole, but not numbers: found by the first answer.
        let header = u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize + 8;
        let mut broken = whole.clone();
        broken[header..].fill(0xff);
        std::fs::write(&shards(new.path())[0], &broken).unwrap();
        refused(&json!({"source": source}), "CanaryFailed", "not finite");
        std::fs::write(&shards(new.path())[0], &whole).unwrap();

        let report = replace(&engine, &json!({"source": source}));
        assert_eq!(
            (&report["update"]["state"], &report["version"]),
            (&json!("done"), &json!(2))
        );
        assert_eq!(engine.text(&PROMPT, count), expected_new, "{model}");
        // And back, by the digest that the engine itself computes.
        let digest = report["digest"].clone();
        let body = json!({"source": old.path(), "in_flight": "restart"});
        assert_eq!(replace(&engine, &body)["version"], 3);
        assert_eq!(engine.text(&PROMPT, count), expected_old);
        let body = json!({"source": source, "digest": digest});
        assert_eq!(replace(&engine, &body)["version"], 4);
        assert_eq!(engine.text(&PROMPT, count), expected_new);
    }
}

#[test]
fn random_weights_are_not_replaced() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "root\n").unwrap();
    let model = golden("qwen2");
    let path = model.path().to_str().unwrap();
    let keys = keys.path().to_str().unwrap();
    let engine = Engine::start(&[
        "--model",
        path,
        "--load-format",
        "dummy",
        "--admin-key-file",
        keys,
    ]);
    let head = "authorization: Bearer root\r\n";
    let body = json!({"source": path});
    let (status, answer) = engine.ask("POST", "/v1/weights", head, Some(&body));
    assert_eq!(status, 501, "{answer}");
}

#[test]
fn a_disk_that_fails_while_it_serves_is_not_missed() {
    let model = golden("v3-groups");
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "root\n").unwrap();
    let engine = start(model.path(), keys.path(), ON_CPU);
    let before = engine.text(&PROMPT, 24);
    for shard in shards(model.path()) {
        std::fs::File::options()
            .write(true)
            .open(shard)
            .unwrap()
            .set_len(100)
            .unwrap();
    }
    // The weights are in memory: no step reads a file, and a reload from it is refused.
    assert_eq!(engine.text(&PROMPT, 24), before);
    let report = replace(&engine, &json!({"source": model.path()}));
    assert_eq!(report["update"]["reason"], "WeightsTruncated", "{report}");
    assert_eq!(engine.text(&PROMPT, 24), before);
    assert_eq!(engine.ask("GET", "/livez", "", None).0, 200);
}
