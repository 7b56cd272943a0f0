//! The binary from a model directory to served tokens, for every family: the answers are those of transformers.

#![allow(clippy::unwrap_used)] // helpers of tests

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use engine_spec::{InspectReport, ModelFault};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Models of the CPU backend's golden vectors, one of each family.
const MODELS: [(&str, &str); 6] = [
    ("v2-lite", "deepseek_v2"),
    ("v3-groups", "deepseek_v3"),
    ("qwen2", "qwen2"),
    ("llama", "llama"),
    ("qwen3", "qwen3"),
    ("qwen3-moe", "qwen3_moe"),
];
/// Longest a test waits for something that must happen.
const PATIENCE: Duration = Duration::from_secs(60);
/// The golden models' tokens after the two special ones are the printable characters of ASCII.
const FIRST_CHARACTER: u8 = b'!';

fn golden(model: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("cpu/tests/golden")
        .join(model)
}

fn run(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(arguments)
        .output()
        .unwrap();
    let text = if output.stdout.is_empty() {
        output.stderr
    } else {
        output.stdout
    };
    (output.status.success(), String::from_utf8(text).unwrap())
}

/// A tokenizer with a character for each of the models' 96 tokens.
fn tokenizer() -> Value {
    let mut vocab: serde_json::Map<String, Value> = (FIRST_CHARACTER..=b'~')
        .map(char::from)
        .zip(2..)
        .map(|(character, id): (char, u32)| (character.to_string(), id.into()))
        .collect();
    let specials = ["<s>", "</s>"];
    let mut added = Vec::new();
    for (id, content) in specials.into_iter().enumerate() {
        vocab.insert(content.into(), id.into());
        added.push(json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true}));
    }
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// A golden model with a tokenizer beside it.
fn directory(model: &str) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(golden(model)).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    dir
}

/// A running engine; it ends with the test.
struct Engine {
    child: Child,
    port: u16,
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Engine {
    fn start(arguments: &[&str]) -> Self {
        // Free a moment ago; nothing else on this machine asks for it in between.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .unwrap()
            .port();
        let child = Command::new(env!("CARGO_BIN_EXE_engine"))
            .args(["serve", "--host", "127.0.0.1", "--port", &port.to_string()])
            .args(arguments)
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut engine = Self { child, port };
        let deadline = Instant::now() + PATIENCE;
        while engine
            .ask("GET", "/readyz", None)
            .is_none_or(|(status, _)| status != 200)
        {
            assert!(Instant::now() < deadline, "the engine did not become ready");
            assert_eq!(engine.child.try_wait().unwrap(), None, "the engine ended");
            std::thread::sleep(Duration::from_millis(20));
        }
        engine
    }

    /// Status and body, when someone listens.
    fn ask(&self, method: &str, path: &str, body: Option<&Value>) -> Option<(u16, String)> {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let body = body.map(Value::to_string).unwrap_or_default();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        )
        .ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        let status = answer.split(' ').nth(1)?.parse().ok()?;
        let (_, body) = answer.split_once("\r\n\r\n")?;
        Some((status, body.to_owned()))
    }

    fn complete(&self, prompt: &Value, max_tokens: usize) -> String {
        let request =
            json!({"model": "m", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0});
        let (status, body) = self.ask("POST", "/v1/completions", Some(&request)).unwrap();
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }
}

fn characters(tokens: &Value) -> String {
    let ids = tokens
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap());
    ids.filter_map(|id| {
        Some(char::from(
            FIRST_CHARACTER + u8::try_from(id.checked_sub(2)?).ok()?,
        ))
    })
    .collect()
}

#[test]
fn served_tokens_are_those_of_transformers() {
    for (model, _) in MODELS {
        let dir = directory(model);
        let path = dir.path().to_str().unwrap();
        let engine = Engine::start(&[
            "--model",
            path,
            "--served-model-name",
            "m",
            "--dtype",
            "float32",
        ]);
        let text = std::fs::read_to_string(golden(model).join("golden.json")).unwrap();
        let vectors: Value = serde_json::from_str(&text).unwrap();
        for prompt in vectors["prompts"].as_array().unwrap() {
            let expected = &prompt["greedy"];
            let count = expected.as_array().unwrap().len();
            for asked in [
                prompt["tokens"].clone(),
                characters(&prompt["tokens"]).into(),
            ] {
                assert_eq!(
                    engine.complete(&asked, count),
                    characters(expected),
                    "{model}: {asked}"
                );
            }
        }
    }
}

#[test]
fn drafts_leave_the_served_tokens_alone_and_are_counted() {
    let dir = directory("v3-mtp");
    let path = dir.path().to_str().unwrap();
    let drafting = [
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--num-speculative-tokens",
        "3",
    ];
    let common = ["--model", path, "--served-model-name", "m"];
    let engine = Engine::start(&[&common[..], &drafting[..]].concat());
    let text = std::fs::read_to_string(golden("v3-mtp").join("golden.json")).unwrap();
    let vectors: Value = serde_json::from_str(&text).unwrap();
    for prompt in vectors["prompts"].as_array().unwrap() {
        let expected = &prompt["greedy"];
        let count = expected.as_array().unwrap().len();
        assert_eq!(
            engine.complete(&prompt["tokens"], count),
            characters(expected)
        );
    }
    let (_, metrics) = engine.ask("GET", "/metrics", None).unwrap();
    let count = |name: &str| -> f64 {
        let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    let drafted = count("vllm:spec_decode_num_draft_tokens_total");
    assert!(drafted > 20.0 && count("vllm:spec_decode_num_accepted_tokens_total") < drafted);
}

#[test]
fn drafts_are_in_the_plan_and_refused_where_there_is_no_layer() {
    let weights = |more: &[&str]| {
        let path = golden("v3-mtp");
        let arguments = [
            "plan",
            "--device",
            "cpu",
            "--output",
            "json",
            "--model",
            path.to_str().unwrap(),
        ];
        let (is_planned, text) = run(&[&arguments[..], more].concat());
        assert!(is_planned, "{text}");
        let plan: Value = serde_json::from_str(&text).unwrap();
        (
            plan["perRank"]["weightsBytes"].as_u64().unwrap(),
            plan["draftTokens"].clone(),
        )
    };
    let (off, none) = weights(&[]);
    let (on, two) = weights(&["--num-speculative-tokens", "2"]);
    assert!(on > off);
    assert_eq!((none, two), (Value::Null, 2.into()));

    let refusal = |model: &str, count: &str| {
        let path = golden(model);
        let arguments = ["plan", "--device", "cpu", "--model", path.to_str().unwrap()];
        let (is_planned, text) =
            run(&[&arguments[..], &["--num-speculative-tokens", count]].concat());
        assert!(!is_planned, "{text}");
        text
    };
    let text = refusal("v2-lite", "1");
    assert!(
        text.contains("deepseek_v2 models have no prediction layer (num_nextn_predict_layers"),
        "{text}"
    );
    let text = refusal("v3-mtp", "9");
    assert!(
        text.contains("numSpeculativeTokens = 9: must be between 0 (no drafts) and 8"),
        "{text}"
    );
}

#[test]
fn inspect_reports_facts_and_plan_prints_bytes() {
    for (model, family) in MODELS {
        let dir = golden(model);
        let path = dir.to_str().unwrap();
        let (is_served, text) = run(&["inspect", "--model", path]);
        let InspectReport::Facts(facts) = InspectReport::from_message(text.trim()).unwrap() else {
            panic!("{model}: {text}");
        };
        assert!(is_served);
        assert_eq!(facts.config.architecture.as_str(), family);
        assert_eq!(facts.parameters, facts.config.parameters(), "{model}");
        let (is_planned, text) = run(&["plan", "--model", path, "--output", "json"]);
        let plan: Value = serde_json::from_str(&text).unwrap();
        assert!(
            is_planned && plan["perRank"]["weightsBytes"].as_u64() > Some(0),
            "{text}"
        );
    }
}

#[test]
fn a_config_alone_is_served_with_random_weights_of_its_seed() {
    let dir = tempfile::tempdir().unwrap();
    let config = json!({"model_type": "qwen3_moe", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "rope_theta": 10000.0});
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let answer = |seed: &str| {
        let path = dir.path().to_str().unwrap();
        let engine = Engine::start(&[
            "--model",
            path,
            "--served-model-name",
            "m",
            "--load-format",
            "dummy",
            "--seed",
            seed,
        ]);
        let from_ids = engine.complete(&json!([104, 105]), 64);
        assert_eq!(engine.complete(&"hi".into(), 64), from_ids);
        from_ids
    };
    let first = answer("1");
    assert_eq!(answer("1"), first);
    assert_ne!(answer("2"), first);
}

#[test]
fn a_family_that_is_not_served_is_refused_with_those_that_are() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), r#"{"model_type": "mamba"}"#).unwrap();
    let (is_served, text) = run(&["inspect", "--model", dir.path().to_str().unwrap()]);
    let InspectReport::Error(error) = InspectReport::from_message(text.trim()).unwrap() else {
        panic!("{text}");
    };
    assert!(!is_served);
    assert_eq!(error.reason, ModelFault::UnsupportedArchitecture);
    assert!(error.message.contains("qwen3_moe"), "{}", error.message);
}

fn tiny_r1() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../e2e/models/tiny-r1")
}

/// The names in a weight file.
fn tensors(file: &Path) -> Vec<String> {
    let bytes = std::fs::read(file).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: serde_json::Map<String, Value> =
        serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let names = header.into_iter().map(|(name, _)| name);
    names.filter(|name| name != "__metadata__").collect()
}

/// tiny-r1 with its prediction layer beside it, as a checkpoint of two files.
fn tiny_r1_that_predicts() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut map = serde_json::Map::new();
    for (from, to) in [
        ("model.safetensors", "trunk.safetensors"),
        ("prediction/layer.safetensors", "layer.safetensors"),
    ] {
        std::fs::copy(tiny_r1().join(from), dir.path().join(to)).unwrap();
        map.extend(
            tensors(&dir.path().join(to))
                .into_iter()
                .map(|name| (name, to.into())),
        );
    }
    let write = |name: &str, value: Value| {
        std::fs::write(dir.path().join(name), value.to_string()).unwrap();
    };
    write("model.safetensors.index.json", json!({"weight_map": map}));
    let text = std::fs::read_to_string(tiny_r1().join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["num_nextn_predict_layers"] = 1.into();
    write("config.json", config);
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ] {
        std::fs::copy(tiny_r1().join(name), dir.path().join(name)).unwrap();
    }
    dir
}

#[test]
fn a_trained_layer_foresees_most_tokens_and_changes_none() {
    let dir = tiny_r1_that_predicts();
    let questions = [
        "What is 123 + 456?",
        "What is 12 - 345?",
        "What is 37 * 6?",
        "How many r in \"strawberry\"?",
    ];
    let answers = |more: &[&str]| {
        let common = [
            "--model",
            dir.path().to_str().unwrap(),
            "--served-model-name",
            "m",
            "--device",
            "cpu",
        ];
        let engine = Engine::start(&[&common[..], more].concat());
        let mut answers = Vec::new();
        for question in questions {
            for temperature in [0.0, 0.6, 1.5] {
                let request = json!({"model": "m", "temperature": temperature, "seed": 11, "max_tokens": 200,
                    "messages": [{"role": "user", "content": question}], "logprobs": true, "top_logprobs": 2});
                let (status, body) = engine
                    .ask("POST", "/v1/chat/completions", Some(&request))
                    .unwrap();
                assert_eq!(status, 200, "{body}");
                let answer: Value = serde_json::from_str(&body).unwrap();
                answers.push((
                    answer["choices"].clone(),
                    answer["usage"]["completion_tokens"].clone(),
                ));
            }
        }
        let (_, metrics) = engine.ask("GET", "/metrics", None).unwrap();
        (answers, metrics)
    };
    let (expected, _) = answers(&[]);
    let content = expected[0].0[0]["message"]["content"].as_str().unwrap();
    assert!(content.contains("579"), "{content}");
    for drafts in ["1", "3"] {
        let (found, metrics) = answers(&["--num-speculative-tokens", drafts]);
        assert_eq!(found, expected, "{drafts} drafts");
        let count = |name: &str| -> f64 {
            let line = metrics.lines().find(|line| line.starts_with(name)).unwrap();
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        let steps = count("vllm:spec_decode_num_drafts_total");
        let accepted = count("vllm:spec_decode_num_accepted_tokens_total");
        println!(
            "{drafts} drafts: {:.2} accepted in each of {steps} steps",
            accepted / steps
        );
        assert!(accepted > 0.5 * steps, "{accepted} of {steps}");
    }
}
