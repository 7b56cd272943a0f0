//! The real binary as a child process, and models for it.

#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

/// Longest a test waits for something that must happen.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A model of the CPU backend's golden vectors, with a tokenizer of the printable characters beside it.
pub fn golden(model: &str) -> TempDir {
    let from = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("cpu/tests/golden")
        .join(model);
    let dir = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    std::fs::write(dir.path().join("tokenizer.json"), tokenizer().to_string()).unwrap();
    dir
}

fn tokenizer() -> Value {
    let vocab: serde_json::Map<String, Value> = (b'!'..=b'~')
        .map(char::from)
        .zip(2..)
        .map(|(character, id): (char, u32)| (character.to_string(), id.into()))
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

/// The weight files of a directory.
pub fn shards(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().path());
    let mut shards: Vec<PathBuf> = entries
        .filter(|path| path.extension().is_some_and(|e| e == "safetensors"))
        .collect();
    shards.sort();
    shards
}

/// Other weights of the same shapes: the rows of each matrix in another order.
pub fn shuffle(dir: &Path) {
    for path in shards(dir) {
        let mut bytes = std::fs::read(&path).unwrap();
        let begin = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
        let header: Value = serde_json::from_slice(&bytes[8..begin]).unwrap();
        for (name, tensor) in header.as_object().unwrap() {
            let rows = tensor["shape"][0].as_u64().unwrap_or(0) as usize;
            if name == "__metadata__" || tensor["shape"].as_array().unwrap().len() != 2 {
                continue;
            }
            let at = |index: usize| tensor["data_offsets"][index].as_u64().unwrap() as usize;
            let data = &mut bytes[begin + at(0)..begin + at(1)];
            let row = data.len() / rows;
            data.rotate_left(row);
        }
        std::fs::write(&path, bytes).unwrap();
    }
}

/// A running engine; it ends with the test.
pub struct Engine {
    pub child: Child,
    pub address: String,
    lines: mpsc::Receiver<String>,
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Engine {
    /// Listens; the model may still be loading.
    pub fn begin(arguments: &[&str]) -> Self {
        Self::begin_with(&[], arguments)
    }

    pub fn begin_with(environment: &[(&str, &str)], arguments: &[&str]) -> Self {
        let device: &[&str] = match arguments.contains(&"--device") {
            true => &[],
            false => &["--device", "cpu"],
        };
        let mut child = Command::new(env!("CARGO_BIN_EXE_engine"))
            .args(["serve", "--host", "127.0.0.1", "--port", "0"])
            .args(["--served-model-name", "m"])
            .args(device)
            .args(arguments)
            .env_remove("RUST_LOG")
            .envs(environment.iter().copied())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let mut seen = String::new();
        let address = loop {
            let line = lines.recv_timeout(PATIENCE);
            let line = line.unwrap_or_else(|_| panic!("the engine does not listen: {seen}"));
            if let Some((_, rest)) = line.split_once("address=") {
                break rest.split_whitespace().next().unwrap().to_owned();
            }
            let _ = writeln!(seen, "{line}");
        };
        Self {
            child,
            address,
            lines,
        }
    }

    pub fn start(arguments: &[&str]) -> Self {
        let mut engine = Self::begin(arguments);
        engine.wait_ready();
        engine
    }

    pub fn wait_ready(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while self.ask("GET", "/readyz", "", None).0 != 200 {
            assert!(Instant::now() < deadline, "the engine did not become ready");
            let ended = self.child.try_wait().unwrap();
            assert_eq!(ended, None, "{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it said since the last call.
    pub fn log(&self) -> String {
        self.lines.try_iter().collect::<Vec<_>>().join("\n")
    }

    /// What it said until it ended; it must have.
    pub fn rest_of_log(&self) -> String {
        self.lines.iter().collect::<Vec<_>>().join("\n")
    }

    /// Status and body; 0 when nobody answers.
    pub fn ask(&self, method: &str, path: &str, head: &str, body: Option<&Value>) -> (u16, Value) {
        let exchange = || {
            let mut stream = TcpStream::connect(&self.address).ok()?;
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let body = body.map(Value::to_string).unwrap_or_default();
            let length = body.len();
            write!(
                stream,
                "{method} {path} HTTP/1.1\r\nhost: engine\r\nconnection: close\r\n{head}\
                 content-length: {length}\r\n\r\n{body}"
            )
            .ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            let status = answer.split(' ').nth(1)?.parse().ok()?;
            let (_, body) = answer.split_once("\r\n\r\n")?;
            Some((status, serde_json::from_str(body).unwrap_or(Value::Null)))
        };
        exchange().unwrap_or((0, Value::Null))
    }

    pub fn complete(&self, prompt: &[u32], more: Value) -> Value {
        let mut request = json!({"prompt": prompt, "temperature": 0, "ignore_eos": true});
        for (key, value) in more.as_object().unwrap() {
            request[key] = value.clone();
        }
        let (status, answer) = self.ask("POST", "/v1/completions", "", Some(&request));
        assert_eq!(status, 200, "{answer}");
        answer
    }

    pub fn text(&self, prompt: &[u32], max_tokens: u32) -> String {
        let answer = self.complete(prompt, json!({"max_tokens": max_tokens}));
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }
}

/// Runs to its end: whether it succeeded, and what it said.
pub fn run(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_engine"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.success(), String::from_utf8(text).unwrap())
}
