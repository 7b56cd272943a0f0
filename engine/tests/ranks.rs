//! Processes that serve one replica together: the answers of one, and an end on all of them when one is gone.

#![allow(clippy::unwrap_used)] // helpers of tests

mod process;

use std::net::TcpListener;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use process::{Engine, PATIENCE, golden, run, shuffle};
use serde_json::json;

const PROMPT: [u32; 6] = [3, 14, 15, 92, 65, 35];

fn leader() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Begins rank `rank` of `world` on the model in `dir`.
fn begin(dir: &Path, leader: &str, rank: u32, world: u32, more: &[&str]) -> Engine {
    let (model, rank, world) = (dir.to_str().unwrap(), rank.to_string(), world.to_string());
    let place = [
        "--model",
        model,
        "--leader",
        leader,
        "--rank",
        &rank,
        "--world-size",
        &world,
    ];
    let times = [
        "--group-timeout-seconds",
        "20",
        "--failure-linger-seconds",
        "1",
    ];
    Engine::begin(&[&place[..], &times[..], more].concat())
}

fn ready(engine: &mut Engine) {
    let deadline = Instant::now() + PATIENCE;
    while engine.ask("GET", "/readyz", "", None).0 != 200 {
        assert!(Instant::now() < deadline, "not ready: {}", engine.log());
        let ended = engine.child.try_wait().unwrap();
        assert_eq!(ended, None, "{}", engine.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn end_of(engine: &mut Engine) -> ExitStatus {
    let deadline = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = engine.child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it goes on: {}", engine.log());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn terminate(engine: &Engine) {
    let sent = std::process::Command::new("kill")
        .args(["-TERM", &engine.child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
}

fn ranks(dir: &Path, world: u32, more: &[&str]) -> Vec<Engine> {
    let leader = leader();
    // The last one first: rank 0 need not be the first to start.
    let mut ranks: Vec<Engine> = (0..world)
        .rev()
        .map(|rank| begin(dir, &leader, rank, world, more))
        .collect();
    ranks.reverse();
    ranks.iter_mut().for_each(ready);
    ranks
}

#[test]
fn ranks_answer_as_one_process_does_and_end_in_good_order() {
    for (model, world, more) in [
        ("v3-groups", 2, &[][..]),
        ("v3-mtp", 4, &["--num-speculative-tokens", "2"][..]),
        ("llama", 2, &["--quantization", "int8"][..]),
    ] {
        let dir = golden(model);
        let path = dir.path().to_str().unwrap();
        let one = Engine::start(&[&["--model", path], more].concat());
        let mut ranks = ranks(dir.path(), world, more);
        assert_eq!(ranks[0].text(&PROMPT, 24), one.text(&PROMPT, 24), "{model}");
        let sampled = json!({"max_tokens": 12, "temperature": 1.5, "seed": 7, "logprobs": 2});
        let of = |engine: &Engine| engine.complete(&PROMPT, sampled.clone())["choices"].clone();
        assert_eq!(of(&ranks[0]), of(&one), "{model}");
        let chat = json!({"model": "m", "max_tokens": 8, "temperature": 0,
            "messages": [{"role": "user", "content": "Hi"}]});
        let of = |engine: &Engine| {
            let (status, answer) = engine.ask("POST", "/v1/chat/completions", "", Some(&chat));
            (status, answer["choices"].clone())
        };
        assert_eq!(of(&ranks[0]), of(&one), "{model}");
        let (status, answer) = ranks[1].ask("POST", "/v1/completions", "", Some(&chat));
        assert_eq!(status, 404, "{answer}");
        assert!(
            answer["error"]["message"]
                .as_str()
                .unwrap()
                .contains("rank 0"),
            "{answer}"
        );
        for path in ["/livez", "/startupz", "/metrics", "/version"] {
            assert_eq!(ranks[1].ask("GET", path, "", None).0, 200, "{path}");
        }
        // Idle for longer than ranks are left without a word.
        std::thread::sleep(Duration::from_millis(1500));
        assert!(!ranks[0].text(&PROMPT, 3).is_empty());
        // A pod group is told to end all at once; the others wait for rank 0.
        ranks.iter().for_each(terminate);
        for engine in &mut ranks {
            let status = end_of(engine);
            assert!(status.success(), "{model}: {}", engine.rest_of_log());
        }
    }
}

#[test]
fn a_rank_that_dies_ends_all_others_with_an_error_that_names_it() {
    let dir = golden("v2-lite");
    for gone in [0, 1] {
        let mut ranks = ranks(dir.path(), 4, &[]);
        let began = Instant::now();
        ranks[gone].child.kill().unwrap();
        for (rank, engine) in ranks
            .iter_mut()
            .enumerate()
            .filter(|(rank, _)| *rank != gone)
        {
            let status = end_of(engine);
            let log = engine.rest_of_log();
            assert!(!status.success(), "rank {rank}: {log}");
            assert!(log.contains("is gone"), "rank {rank}: {log}");
            if rank == 0 || gone == 0 {
                assert!(
                    log.contains(&format!("rank {gone} is gone")),
                    "rank {rank}: {log}"
                );
            }
        }
        assert!(
            began.elapsed() < Duration::from_secs(15),
            "{:?}",
            began.elapsed()
        );
    }
}

#[test]
fn a_rank_with_another_model_or_settings_is_refused_by_name() {
    let (dir, other) = (golden("qwen2"), golden("qwen2"));
    shuffle(other.path());
    let leader = leader();
    let mut first = begin(dir.path(), &leader, 0, 2, &[]);
    for (dir, more, words) in [
        (&other, &[][..], "GroupIncomplete: rank 0 at"),
        (&other, &[][..], "model is sample:"),
        (
            &dir,
            &["--max-num-seqs", "3"][..],
            "maxNumSeqs is 3 on rank 1 of 2, and 16 on rank 0",
        ),
        (
            &dir,
            &["--quantization", "int8"][..],
            "weights is Integer(Int8, Load) on rank 1 of 2",
        ),
    ] {
        let mut refused = begin(dir.path(), &leader, 1, 2, more);
        assert!(!end_of(&mut refused).success());
        let log = refused.rest_of_log();
        assert!(log.contains(words), "{words}: {log}");
    }
    assert_eq!(first.ask("GET", "/readyz", "", None).0, 503);
    assert_eq!(first.ask("GET", "/livez", "", None).0, 200);
    let mut second = begin(dir.path(), &leader, 1, 2, &[]);
    ready(&mut first);
    ready(&mut second);
}

#[test]
fn what_ranks_cannot_do_is_said_at_once() {
    let dir = golden("llama");
    let path = dir.path().to_str().unwrap();
    for (arguments, words) in [
        (&["--world-size", "2"][..], "needs --leader HOST:PORT"),
        (
            &["--world-size", "2", "--rank", "2", "--leader", "h:1"][..],
            "numbered from 0 to 1",
        ),
    ] {
        let (success, text) = run(&[&["serve", "--model", path], arguments].concat());
        assert!(!success && text.contains(words), "{text}");
    }
    // Three ranks cannot share four heads; nobody waits for them.
    let mut engine = begin(dir.path(), &leader(), 0, 3, &[]);
    assert!(!end_of(&mut engine).success());
    let log = engine.rest_of_log();
    assert!(
        log.contains("parallelism tensor = 3: must divide the model's 4 heads"),
        "{log}"
    );
    let mut engine = begin(
        dir.path(),
        &leader(),
        0,
        2,
        &["--join-timeout-seconds", "1"],
    );
    assert!(!end_of(&mut engine).success());
    let log = engine.rest_of_log();
    assert!(log.contains("rank 1 did not join within 1 s"), "{log}");
    // A configuration for several ranks says how to start them.
    let config = json!({"apiVersion": "engine.cachalot.dev/v1", "model": {"source": path},
        "parallelism": {"tensor": 2, "expert": 1, "pipeline": 1}});
    let file = dir.path().join("engine.json");
    std::fs::write(&file, config.to_string()).unwrap();
    let mut engine = Engine::begin(&[
        "--config",
        file.to_str().unwrap(),
        "--failure-linger-seconds",
        "1",
    ]);
    assert!(!end_of(&mut engine).success());
    let log = engine.rest_of_log();
    assert!(
        log.contains("start each with --world-size 2, --rank and --leader"),
        "{log}"
    );
}

#[test]
fn weights_of_ranks_are_not_replaced() {
    let dir = golden("qwen2");
    let keys = dir.path().join("keys");
    std::fs::write(&keys, "secret").unwrap();
    let ranks = ranks(dir.path(), 2, &["--admin-key-file", keys.to_str().unwrap()]);
    let request = json!({"source": dir.path()});
    let head = "authorization: Bearer secret\r\n";
    let (status, answer) = ranks[0].ask("POST", "/v1/weights", head, Some(&request));
    assert_eq!(status, 501, "{answer}");
    assert!(
        answer.to_string().contains("2 ranks share the model"),
        "{answer}"
    );
}

#[test]
fn ranks_with_one_secret_answer_and_others_are_told_that_theirs_differs() {
    let dir = golden("qwen2");
    let file = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let (right, wrong) = (
        file("right", "what all ranks know\n"),
        file("wrong", "what no rank knows\n"),
    );
    let secret = ["--group-secret-file", right.as_str()];
    let one = Engine::start(&["--model", dir.path().to_str().unwrap()]);
    let leader = leader();
    let mut first = begin(dir.path(), &leader, 0, 2, &secret);
    for other in [&["--group-secret-file", wrong.as_str()][..], &[]] {
        let mut refused = begin(dir.path(), &leader, 1, 2, other);
        assert!(!end_of(&mut refused).success());
        let words = "start every rank with the same --group-secret-file";
        let log = refused.rest_of_log();
        assert!(
            log.contains("GroupIncomplete: rank 0 at") && log.contains(words),
            "{log}"
        );
    }
    let mut second = begin(dir.path(), &leader, 1, 2, &secret);
    ready(&mut first);
    ready(&mut second);
    assert_eq!(first.text(&PROMPT, 24), one.text(&PROMPT, 24));
    let logs = first.log() + &second.log();
    assert!(!logs.contains("what all ranks know"), "{logs}");
}
