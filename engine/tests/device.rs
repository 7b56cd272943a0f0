//! The binary and its devices: what it says where there is no GPU, and what it answers on one (the emulated driver's).

#![allow(missing_docs, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use engine_spec::{EndReport, GpuFault};
use kernels::emulation::{BuildError, Emulation};
use serde_json::{Value, json};

/// Longest a test waits; the emulator is slow and the machine may be busy.
const PATIENCE: Duration = Duration::from_secs(120);

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn tiny() -> PathBuf {
    root().join("e2e/models/tiny-r1")
}

/// The emulated driver, or none on a machine without a C++ compiler.
fn driver() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulation");
    match Emulation::new(&folder).build_with_nccl() {
        Ok(path) => Some(path),
        Err(error @ (BuildError::NoCompiler | BuildError::WrongMachine)) => {
            eprintln!("skipped: {error}");
            None
        }
        Err(error) => panic!("the emulated driver does not build: {error}"),
    }
}

fn engine(model: &Path, device: &str, driver: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    command
        .args(["serve", "--host", "127.0.0.1", "--port", "0"])
        .args(["--max-model-len", "256", "--max-num-seqs", "2"])
        .args(["--max-num-batched-tokens", "64"])
        .args(["--device", device, "--model"])
        .arg(model)
        .env("CACHALOT_CUDA_DRIVER", driver)
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped());
    command
}

/// Runs to its end: the exit code and everything it said.
fn run(mut command: Command) -> (i32, String) {
    let mut child = command
        .args(["--failure-linger-seconds", "0"])
        .spawn()
        .unwrap();
    let mut errors = child.stderr.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        errors.read_to_string(&mut text).unwrap();
        text
    });
    let deadline = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > deadline {
            child.kill().unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    (status.code().unwrap_or(-1), reader.join().unwrap())
}

/// A running engine; ended when dropped.
struct Engine {
    child: Child,
    lines: mpsc::Receiver<String>,
    seen: String,
    address: String,
}

impl Engine {
    fn start(mut command: Command) -> Self {
        let mut child = command.spawn().unwrap();
        let errors = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            for line in errors.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut engine = Self {
            child,
            lines,
            seen: String::new(),
            address: String::new(),
        };
        engine.listens();
        engine
    }

    /// Waits for the address at which it listens.
    fn listens(&mut self) {
        let line = self.line("address=");
        let address = line.split("address=").nth(1).unwrap();
        self.address = address.split_whitespace().next().unwrap().to_owned();
    }

    /// The first line of the log that has `word`.
    fn line(&mut self, word: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        while let Ok(line) = self
            .lines
            .recv_timeout(deadline.saturating_duration_since(Instant::now()))
        {
            self.seen.push_str(&line);
            self.seen.push('\n');
            if line.contains(word) {
                return line;
            }
        }
        panic!("no line with \"{word}\" in:\n{}", self.seen);
    }

    fn request(&self, head: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nHost: engine\r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        let status = text.split_whitespace().nth(1).unwrap().parse().unwrap();
        let body = text.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        (status, body.to_owned())
    }

    fn get(&self, path: &str) -> (u16, String) {
        self.request(&format!("GET {path}"), "")
    }

    fn ask(&self, question: &str, max_tokens: u32) -> (u16, String) {
        let body = json!({"model": "tiny-r1", "temperature": 0, "max_tokens": max_tokens,
            "messages": [{"role": "user", "content": question}]});
        self.request("POST /v1/chat/completions", &body.to_string())
    }

    fn wait_ready(&self) {
        let deadline = Instant::now() + PATIENCE;
        while self.get("/readyz").0 != 200 {
            let (_, startup) = self.get("/startupz");
            assert!(Instant::now() < deadline, "not ready: {startup}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // It may have ended already.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

#[test]
fn a_gpu_that_was_asked_for_and_is_not_there_is_an_error_and_no_cpu() {
    let (code, text) = run(engine(&tiny(), "cuda", Path::new("/nowhere/libcuda.so.1")));
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains(
            "error: DeviceUnavailable: device = nvidia, and no GPU serves this model: no CUDA driver: cannot load \
             /nowhere/libcuda.so.1. Mend that, or set device to cpu"
        ),
        "{text}"
    );
    assert!(!text.contains("device chosen"), "{text}");
}

/// As the operator configures a pod: the file says nvidia, no flag says anything.
#[test]
fn a_gpu_that_the_file_asks_for_is_not_replaced_either() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("engine.json");
    let config = json!({"apiVersion": "engine.cachalot.dev/v1", "device": "nvidia", "host": "127.0.0.1", "port": 0,
        "model": {"source": tiny()}});
    std::fs::write(&file, config.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    command
        .args(["serve", "--config"])
        .arg(&file)
        .env("CACHALOT_CUDA_DRIVER", "/nowhere/libcuda.so.1")
        .stderr(Stdio::piped());
    let (code, text) = run(command);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("error: DeviceUnavailable: device = nvidia"),
        "{text}"
    );
}

/// Settings of the emulated driver, and what is said of each.
const UNUSABLE: [(&str, &str, &str); 6] = [
    (
        "VERSION",
        "12080",
        "the CUDA driver is 12.8, but the kernels need 13.0",
    ),
    (
        "DEVICES",
        "0",
        "cuInit failed with CUDA_ERROR_NO_DEVICE (100)",
    ),
    (
        "CAPABILITY",
        "75",
        "CPU emulation of CUDA has compute capability 7.5, but the kernels need 8.0 or later",
    ),
    (
        "IMAGES",
        "0",
        "kernel embed_bf16 cannot be had from fatbin embed_bf16: cuModuleLoadData failed with \
         CUDA_ERROR_NO_BINARY_FOR_GPU (209)",
    ),
    (
        "IMAGES",
        "200",
        "kernel embed_bf16 cannot be had from fatbin embed_bf16: cuModuleLoadData failed with \
         CUDA_ERROR_INVALID_IMAGE (200)",
    ),
    // The fatbin of another build: one kernel of the model is not in it.
    (
        "MISSING",
        "mla_combine_bf16",
        "kernel mla_combine_bf16 cannot be had from fatbin mla_combine_bf16: cuModuleGetFunction failed with \
         CUDA_ERROR_NOT_FOUND (500)",
    ),
];

/// What to do about a fatbin that does not fit.
const MEND: &str = "The fatbin does not fit compute capability 9.0 or this program: use a release that does, or build it \
                    anew with make kernels";

#[test]
fn every_kind_of_unusable_gpu_is_named() {
    let Some(driver) = driver() else { return };
    for (name, value, why) in UNUSABLE {
        let mut command = engine(&tiny(), "cuda", &driver);
        command.env(format!("CACHALOT_EMULATION_{name}"), value);
        let (code, text) = run(command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(why), "{name}: {text}");
        let is_image = matches!(name, "IMAGES" | "MISSING");
        assert_eq!(text.contains(MEND), is_image, "{name}: {text}");
    }
}

#[test]
fn auto_serves_on_the_cpu_beside_every_kind_of_unusable_gpu() {
    let Some(driver) = driver() else { return };
    for (name, value, why) in UNUSABLE {
        let mut command = engine(&tiny(), "auto", &driver);
        command.env(format!("CACHALOT_EMULATION_{name}"), value);
        let mut engine = Engine::start(command);
        let line = engine.line("device chosen");
        assert!(line.contains("device=\"cpu\""), "{name}: {line}");
        assert!(line.contains(why), "{name}: {line}");
        // Here the GPU was in use already.
        if name == "MISSING" {
            engine.wait_ready();
        }
    }
}

#[test]
fn devices_without_wgmma_of_their_own_answer_with_portable_kernels() {
    let Some(driver) = driver() else { return };
    let mut answers = Vec::new();
    // The last one is Hopper's, with a fatbin that lacks what is Hopper's alone.
    for (capability, missing) in [("80", ""), ("100", ""), ("120", ""), ("90", "hopper")] {
        let mut command = engine(&tiny(), "auto", &driver);
        command
            .env("CACHALOT_EMULATION_CAPABILITY", capability)
            .env("CACHALOT_EMULATION_MISSING", missing);
        let mut engine = Engine::start(command);
        let line = engine.line("device chosen");
        let (major, minor) = capability.split_at(capability.len() - 1);
        for words in [
            "device=\"cuda\"",
            &format!("capability=\"{major}.{minor}\""),
            "products=portable",
        ] {
            assert!(line.contains(words), "{words}: {line}");
        }
        if !missing.is_empty() {
            let line = engine.line("hopper products are not used");
            assert!(line.contains("kernel hopper_gemm_bf16_"), "{line}");
            assert!(line.contains("make kernels"), "{line}");
        }
        engine.wait_ready();
        answers.push(text(&engine));
    }
    for answer in &answers[1..] {
        assert_eq!(answer, &answers[0]);
    }
}

#[test]
fn too_little_device_memory_is_refused_with_the_settings_that_fit() {
    let Some(driver) = driver() else { return };
    let mut command = engine(&tiny(), "auto", &driver);
    // One GiB of it is the runtime's.
    command.env("CACHALOT_EMULATION_MEMORY", (1_028 << 20).to_string());
    let (code, text) = run(command);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("DoesNotFit: needs 1.0 GiB per device (weights 3.6 MiB"),
        "{text}"
    );
    assert!(text.contains("it would fit with"), "{text}");
}

#[test]
fn a_model_without_kernels_is_served_by_the_cpu_only_when_any_device_will_do() {
    let Some(driver) = driver() else { return };
    let model = root().join("engine/cpu/tests/golden/v3-groups");
    let (_, text) = run(engine(&model, "cuda", &driver));
    let why = "no CUDA kernel takes this model: rms_norm: width is 28";
    assert!(
        text.contains("error: DeviceUnavailable:") && text.contains(why),
        "{text}"
    );
    // This model has no tokenizer, so that it goes no further than the choice.
    let (_, text) = run(engine(&model, "auto", &driver));
    assert!(
        text.contains("device chosen device=\"cpu\" reason="),
        "{text}"
    );
    assert!(text.contains(why), "{text}");
}

#[test]
fn drafts_of_a_checkpoint_without_the_layer_are_refused_on_a_gpu_too() {
    let Some(driver) = driver() else { return };
    let mut command = engine(&tiny(), "cuda", &driver);
    command.args([
        "--speculative-config",
        r#"{"method": "mtp", "num_speculative_tokens": 1}"#,
    ]);
    let (code, text) = run(command);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("device chosen device=\"cuda\" "), "{text}");
    assert!(
        text.contains("WeightsMissing: numSpeculativeTokens is above 0, but tensor model.layers.4.eh_proj.weight"),
        "{text}"
    );
}

#[test]
fn a_cache_in_eight_bits_is_refused_where_no_kernel_reads_it() {
    let Some(driver) = driver() else { return };
    for (device, why) in [
        ("cpu", "this is the device cpu"),
        // Its latents are 64 wide.
        ("cuda", "this model has other widths"),
    ] {
        let mut command = engine(&tiny(), device, &driver);
        command.args(["--kv-cache-dtype", "fp8"]);
        let (code, text) = run(command);
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains("kvCacheDtype = fp8:") && text.contains(why),
            "{text}"
        );
    }
}

#[test]
fn auto_without_a_driver_serves_on_the_cpu_and_says_why() {
    let command = engine(&tiny(), "auto", Path::new("/nowhere/libcuda.so.1"));
    let mut engine = Engine::start(command);
    let line = engine.line("device chosen");
    assert!(line.contains("device=\"cpu\""), "{line}");
    assert!(
        line.contains("no CUDA driver: cannot load /nowhere/libcuda.so.1"),
        "{line}"
    );
    engine.wait_ready();
}

#[test]
fn both_devices_answer_the_quick_starts_question_alike() {
    let Some(driver) = driver() else { return };
    let mut answers = Vec::new();
    for device in ["auto", "cpu"] {
        let mut engine = Engine::start(engine(&tiny(), device, &driver));
        let line = engine.line("device chosen");
        let expected = if device == "auto" {
            "device=\"cuda\""
        } else {
            "device=\"cpu\""
        };
        assert!(line.contains(expected), "{line}");
        engine.wait_ready();
        let (status, body) = engine.ask("What is 123 + 456?", 120);
        assert_eq!(status, 200, "{body}");
        let answer: Value = serde_json::from_str(&body).unwrap();
        answers.push(answer["choices"].clone());
    }
    assert_eq!(answers[0], answers[1]);
    let content = answers[0][0]["message"]["content"].as_str().unwrap();
    assert!(content.contains("579"), "{content}");
}

#[test]
fn a_kernel_that_faults_makes_the_engine_unhealthy_with_the_cuda_error() {
    let Some(driver) = driver() else { return };
    let mut command = engine(&tiny(), "cuda", &driver);
    // Past the canary, in the middle of the first answer.
    command
        .env("CACHALOT_EMULATION_FAULT_AFTER", "2000")
        .args(["--failure-linger-seconds", "3"]);
    let mut engine = Engine::start(command);
    engine.line("device chosen");
    engine.wait_ready();
    assert_eq!(engine.get("/livez").0, 200);
    let (status, body) = engine.ask("What is 123 + 456?", 120);
    assert_ne!(status, 200, "{body}");
    let (status, body) = engine.get("/livez");
    assert_eq!(status, 503, "{body}");
    assert!(body.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{body}");
    let code = engine.child.wait().unwrap().code();
    assert_eq!(code, Some(1));
}

/// What is left of an engine of two GPUs that ends by a fault of the second one; it answers until then.
fn end_by(driver: &Path, code: &str) -> (String, EndReport) {
    let file = tempfile::NamedTempFile::new().unwrap();
    // Of an earlier end, and longer.
    std::fs::write(file.path(), "x".repeat(4096)).unwrap();
    let mut command = engine(&tiny(), "cuda", driver);
    command
        .env("CACHALOT_EMULATION_DEVICES", "2")
        .env("CACHALOT_EMULATION_FAULT_AFTER", "2000")
        .env("CACHALOT_EMULATION_FAULT_CODE", code)
        .env("CACHALOT_EMULATION_FAULT_DEVICE", "1")
        .env("CACHALOT_CUDA_EXCHANGE", "host")
        .args(["--tensor-parallel-size", "2"])
        .args(["--failure-linger-seconds", "3", "--termination-log"])
        .arg(file.path());
    let mut engine = Engine::start(command);
    engine.wait_ready();
    let (status, body) = engine.ask("What is 123 + 456?", 120);
    assert_ne!(status, 200, "{body}");
    let (status, problem) = engine.get("/livez");
    assert_eq!(status, 503, "{problem}");
    // Before the process ends: a probe may end it.
    assert!(engine.child.try_wait().unwrap().is_none());
    let text = std::fs::read_to_string(file.path()).unwrap();
    (problem, EndReport::from_message(&text).expect(&text))
}

#[test]
fn an_engine_that_a_gpu_ends_says_which_one_and_leaves_it_as_its_termination_message() {
    let Some(driver) = driver() else { return };
    let (problem, report) = end_by(&driver, "214");
    let fault = GpuFault {
        uuid: "GPU-00000000-0000-0000-0000-000000000001".into(),
        error: "CUDA_ERROR_ECC_UNCORRECTABLE (214)".into(),
    };
    assert!(problem.contains(&fault.uuid), "{problem}");
    assert!(problem.contains(&report.message), "{problem}");
    assert_eq!(report.gpu_fault, Some(fault));
    // A program can read outside its memory on a sound GPU.
    let (problem, report) = end_by(&driver, "700");
    assert_eq!(report.gpu_fault, None);
    assert!(problem.contains(&report.message), "{problem}");
}

fn leader() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// The text of an answer; at a temperature, so that a wrong logit shows.
fn text(engine: &Engine) -> String {
    let body = json!({"model": "tiny-r1", "temperature": 0.7, "seed": 5, "max_tokens": 24, "logprobs": true,
        "messages": [{"role": "user", "content": "What is 17 + 25?"}]});
    let (status, answer) = engine.request("POST /v1/chat/completions", &body.to_string());
    assert_eq!(status, 200, "{answer}");
    let answer: Value = serde_json::from_str(&answer).unwrap();
    answer["choices"][0].to_string()
}

#[test]
fn gpus_of_one_process_and_of_two_answer_as_one_gpu_does() {
    let Some(driver) = driver() else { return };
    let on = |gpus: &str, way: &str, arguments: &[&str]| {
        let mut command = engine(&tiny(), "cuda", &driver);
        command
            .args(arguments)
            .env("CACHALOT_EMULATION_DEVICES", gpus)
            .env("CACHALOT_CUDA_EXCHANGE", way)
            // Where the loader finds NCCL.
            .env("LD_LIBRARY_PATH", driver.parent().unwrap());
        Engine::start(command)
    };
    let one = on("1", "auto", &[]);
    one.wait_ready();
    let expected = text(&one);
    for way in ["host", "nccl"] {
        let two = on("2", way, &["--tensor-parallel-size", "2"]);
        two.wait_ready();
        assert_eq!(text(&two), expected, "{way}");
        let leader = leader();
        let of_four = |rank: &str| {
            let group = ["--world-size", "2", "--rank", rank, "--leader", &leader];
            let all = [&group[..], &["--tensor-parallel-size", "4"]].concat();
            on("2", way, &all)
        };
        let (second, first) = (of_four("1"), of_four("0"));
        first.wait_ready();
        second.wait_ready();
        assert_eq!(text(&first), expected, "{way}");
        drop(second);
        // Ranks 2 and 3 are gone: nobody waits for them.
        let (status, _) = first.ask("What is 1 + 1?", 4);
        assert_ne!(status, 200, "{way}");
    }
}

#[test]
fn a_way_between_ranks_that_was_asked_for_is_had_or_is_an_error() {
    let Some(driver) = driver() else { return };
    for (way, words) in [
        (
            "nccl",
            "ranks cannot exchange over NCCL: rank 0: no NCCL: cannot load",
        ),
        (
            "tcp",
            r#"CACHALOT_CUDA_EXCHANGE: ranks cannot exchange over "tcp"; ask for auto, host or nccl"#,
        ),
    ] {
        let mut command = engine(&tiny(), "cuda", &driver);
        command
            .args(["--tensor-parallel-size", "2"])
            .env("CACHALOT_EMULATION_DEVICES", "2")
            .env("CACHALOT_CUDA_EXCHANGE", way)
            .env_remove("LD_LIBRARY_PATH");
        let (code, text) = run(command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(words), "{text}");
    }
}

#[test]
fn more_ranks_than_gpus_are_refused_with_the_way_out() {
    let Some(driver) = driver() else { return };
    let refused = |device: &str, arguments: &[&str], words: &str| {
        let mut command = engine(&tiny(), device, &driver);
        command.args(arguments);
        let (code, text) = run(command);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains(words), "{text}");
    };
    let two = ["--tensor-parallel-size", "2"];
    refused("cuda", &two, "GPU 1 cannot be used");
    refused(
        "cuda",
        &two,
        "give the process more GPUs, or ask for fewer ranks",
    );
    refused(
        "cpu",
        &two,
        "start each with --world-size 2, --rank and --leader",
    );
    let group = ["--world-size", "2", "--leader", "127.0.0.1:1"];
    let odd = [&group[..], &["--tensor-parallel-size", "3"]].concat();
    refused(
        "cuda",
        &odd,
        "one on each of its GPUs: make one a multiple of the other",
    );
}

const HOPPERS: [(&str, &str); 2] = [
    ("hopper_gemm", "a trial of Hopper's products"),
    ("hopper_mla", "a trial of Hopper's attention"),
];

#[test]
fn a_hopper_kernel_that_never_ends_costs_hoppers_kernels_and_not_the_start() {
    let Some(driver) = driver() else { return };
    let engines = HOPPERS.map(|(kernel, trial)| {
        let mut command = engine(&tiny(), "cuda", &driver);
        command.env("CACHALOT_EMULATION_HANG", kernel);
        (Engine::start(command), trial)
    });
    for (mut engine, trial) in engines {
        let why = engine.line("starting anew with portable kernels");
        let late = format!("{trial} did not end within 20 seconds");
        assert!(why.contains(&late), "{why}");
        engine.listens();
        engine.line("products=portable");
        engine.line("attention chosen kernels=portable: as asked for");
        engine.wait_ready();
        let (status, body) = engine.ask("What is 123 + 456?", 60);
        assert!(status == 200 && body.contains("579"), "{body}");
    }
}

#[test]
fn a_hopper_kernel_that_fails_costs_hoppers_kernels_and_not_the_start() {
    let Some(driver) = driver() else { return };
    for (kernel, _) in HOPPERS {
        let mut command = engine(&tiny(), "cuda", &driver);
        command.env("CACHALOT_EMULATION_FAULT_IN", kernel);
        let mut engine = Engine::start(command);
        match kernel {
            "hopper_gemm" => engine.line("hopper products are not used"),
            _ => engine.line("attention chosen kernels=portable: Hopper's failed on this device"),
        };
        assert!(
            engine.seen.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"),
            "{}",
            engine.seen
        );
        engine.wait_ready();
        let (status, body) = engine.ask("What is 123 + 456?", 60);
        assert!(status == 200 && body.contains("579"), "{body}");
    }
}

#[test]
fn ranks_whose_nccl_moves_wrong_bytes_exchange_over_the_host_and_answer_right() {
    let Some(driver) = driver() else { return };
    let mut command = engine(&tiny(), "cuda", &driver);
    command
        .args(["--tensor-parallel-size", "2"])
        .env("CACHALOT_EMULATION_DEVICES", "2")
        .env("CACHALOT_EMULATION_NCCL_WRONG", "1")
        .env("LD_LIBRARY_PATH", driver.parent().unwrap());
    let mut engine = Engine::start(command);
    let way = engine.line("exchange chosen");
    let why = "host memory: rank 1: it moved wrong bytes in a gather, a sum";
    assert!(way.contains(why), "{way}");
    engine.wait_ready();
    let (status, body) = engine.ask("What is 123 + 456?", 60);
    assert!(status == 200 && body.contains("579"), "{body}");
}
