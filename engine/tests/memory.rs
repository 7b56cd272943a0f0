//! The memory that the process takes is the memory that was planned.

#![allow(missing_docs, clippy::unwrap_used)]

mod process;

use process::{Engine, run};
use serde_json::{Value, json};
use std::path::Path;

const MAX_MODEL_LEN: u32 = 2048;
const BATCHED_TOKENS: usize = 512;
const SEQUENCES: u32 = 8;

/// A model with weights for `layers` layers of `hidden` channels.
fn config(layers: u32, hidden: u32) -> Value {
    json!({"model_type": "qwen3_moe", "vocab_size": 2048, "hidden_size": hidden, "intermediate_size": hidden * 2,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "rope_theta": 10000.0,
        "max_position_embeddings": MAX_MODEL_LEN})
}

fn arguments(dir: &Path) -> Vec<String> {
    let mut arguments = vec!["--model".to_owned(), dir.to_str().unwrap().to_owned()];
    for (flag, value) in [
        ("--max-model-len", MAX_MODEL_LEN.to_string()),
        ("--max-num-batched-tokens", BATCHED_TOKENS.to_string()),
        ("--max-num-seqs", SEQUENCES.to_string()),
        ("--dtype", "bfloat16".to_owned()),
    ] {
        arguments.extend([flag.to_owned(), value]);
    }
    arguments
}

/// Bytes of memory that no file backs.
fn anonymous(engine: &Engine) -> u64 {
    let path = format!("/proc/{}/smaps_rollup", engine.child.id());
    let text = std::fs::read_to_string(path).unwrap();
    let line = text
        .lines()
        .find(|line| line.starts_with("Anonymous:"))
        .unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib * 1024
}

struct Measured {
    weights: u64,
    kv: u64,
    workspace: u64,
    ready: u64,
    worked: u64,
}

fn plan(arguments: &[&str]) -> Value {
    let words = [&["plan", "--device", "cpu", "--output", "json"], arguments].concat();
    let (is_planned, text) = run(&words);
    assert!(is_planned, "{text}");
    serde_json::from_str(&text).unwrap()
}

fn measure(config: &Value) -> Measured {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let arguments = arguments(dir.path());
    let mut words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let plan = plan(&words);
    let bytes = |name: &str| plan["perRank"][name].as_u64().unwrap();
    words.extend(["--load-format", "dummy"]);
    let engine = Engine::start(&words);
    let ready = anonymous(&engine);
    // The largest step, and all sequences at once.
    let prompt: Vec<u32> = (0..BATCHED_TOKENS as u32 + 100)
        .map(|token| token % 2000)
        .collect();
    engine.complete(&prompt, json!({"max_tokens": 4, "n": SEQUENCES}));
    Measured {
        weights: bytes("weightsBytes"),
        kv: bytes("kvBytes"),
        workspace: bytes("workspaceBytes"),
        ready,
        worked: anonymous(&engine),
    }
}

/// What the process takes beside the plan (code, stacks, tokenizer, HTTP) does not depend on the model: it is measured
/// with the smallest one and subtracted. What is left is compared with the difference of the two plans.
#[test]
fn the_process_takes_what_was_planned() {
    let small = measure(&config(1, 64));
    let large = measure(&config(5, 640));
    let total = |m: &Measured| m.weights + m.kv + m.workspace;
    assert!(total(&large) > 200 << 20, "{}", total(&large));
    let check = |what: &str, planned: u64, taken: u64| {
        let deviation = (taken as f64 - planned as f64) / planned as f64;
        eprintln!(
            "{what}: planned {planned}, taken {taken}, {:+.3} %",
            deviation * 100.0
        );
        assert!(
            deviation.abs() <= 0.01,
            "{what}: planned {planned}, taken {taken}"
        );
    };
    // When it is ready, weights and cache are there to the last page: nothing is left to fail later.
    let ready = large.ready - small.ready;
    let least = large.weights + large.kv - small.weights - small.kv;
    eprintln!(
        "when ready: planned {least}, taken {ready}; beside the plan {}",
        small.ready - small.weights - small.kv
    );
    assert!(ready as f64 >= least as f64 * 0.995, "{ready} of {least}");
    check(
        "after load",
        total(&large) - total(&small),
        large.worked - small.worked,
    );
}

#[test]
fn a_model_that_does_not_fit_is_refused_before_it_is_loaded() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), config(5, 640).to_string()).unwrap();
    let arguments = arguments(dir.path());
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let plan = plan(&words);
    let bytes = |name: &str| plan["perRank"][name].as_u64().unwrap();
    // One longest sequence is the least; this is half a sequence less.
    let sequence = plan["kvBytesPerToken"].as_u64().unwrap() * u64::from(MAX_MODEL_LEN);
    let least = bytes("weightsBytes") + bytes("workspaceBytes") + bytes("runtimeBytes") + sequence;
    let file = dir.path().join("engine.json");
    let configuration = json!({"apiVersion": "engine.cachalot.dev/v1", "device": "cpu", "host": "127.0.0.1", "port": 0,
        "dtype": "bfloat16", "maxModelLen": MAX_MODEL_LEN, "maxNumBatchedTokens": BATCHED_TOKENS,
        "maxNumSeqs": SEQUENCES, "plannedBytes": least - sequence / 2, "model": {"source": dir.path()}});
    std::fs::write(&file, configuration.to_string()).unwrap();
    let file = file.to_str().unwrap();
    let (is_served, text) = run(&[
        "serve",
        "--config",
        file,
        "--load-format",
        "dummy",
        "--failure-linger-seconds",
        "0",
    ]);
    assert!(!is_served);
    for part in [
        "DoesNotFit: needs",
        "weights",
        "KV cache of one sequence",
        "it would fit with",
    ] {
        assert!(text.contains(part), "{part} in {text}");
    }
    assert!(
        !text.contains("random"),
        "the weights were made before: {text}"
    );
}
