//! The metrics exposition: exact names, types, labels and buckets; numbers that agree with what was done.

#![allow(missing_docs, clippy::unwrap_used)]

mod harness;

use std::collections::BTreeSet;
use std::io::Write;
use std::process::{Command, Stdio};

use harness::{Backend, Server, options};
use serde_json::json;

fn value(metrics: &str, series: &str) -> f64 {
    let line = metrics
        .lines()
        .find(|line| {
            line.strip_prefix(series)
                .is_some_and(|rest| rest.starts_with(' '))
        })
        .unwrap_or_else(|| panic!("{series} is not in\n{metrics}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

fn busy_server() -> Server {
    let server = Server::start(options(), Backend::quick());
    let body = json!({"prompt": "p".repeat(40), "temperature": 0, "ignore_eos": true, "max_tokens": 5, "n": 2});
    for _ in 0..2 {
        assert_eq!(server.post("/v1/completions", &body).status, 200);
    }
    assert_eq!(
        server
            .post("/v1/completions", &json!({"prompt": []}))
            .status,
        400
    );
    server
}

#[test]
fn the_exposition_has_exactly_these_series() {
    let metrics = busy_server().get("/metrics").body;
    // Everything but the numbers.
    let mut shape = BTreeSet::new();
    // Whether a probe came before the model was ready is chance.
    let is_chance = |line: &&str| line.contains("status=\"5xx\"");
    for line in metrics.lines().filter(|line| !is_chance(line)) {
        match line.strip_prefix('#') {
            Some(_) => shape.insert(line.to_owned()),
            None => shape.insert(line.rsplit_once(' ').unwrap().0.to_owned()),
        };
    }
    let shape: Vec<String> = shape.into_iter().collect();
    insta::assert_snapshot!(shape.join("\n"));
}

#[test]
fn the_numbers_agree_with_what_was_done() {
    let metrics = busy_server().get("/metrics").body;
    let labels = "{engine=\"0\",model_name=\"toy\"}";
    let count = |name: &str| value(&metrics, &format!("{name}{labels}"));
    assert_eq!(count("vllm:prompt_tokens_total"), 4.0 * 41.0);
    assert_eq!(count("vllm:generation_tokens_total"), 20.0);
    assert_eq!(count("vllm:request_prompt_tokens_count"), 2.0);
    assert_eq!(count("vllm:request_prompt_tokens_sum"), 82.0);
    assert_eq!(count("vllm:time_to_first_token_seconds_count"), 4.0);
    assert_eq!(count("vllm:inter_token_latency_seconds_count"), 16.0);
    assert_eq!(count("vllm:request_max_num_generation_tokens_sum"), 10.0);
    assert_eq!(count("vllm:num_requests_running"), 0.0);
    assert_eq!(count("vllm:kv_cache_usage_perc"), 0.0);
    // The second choice of the first request and both of the second find two full blocks.
    assert_eq!(count("vllm:prefix_cache_hits_total"), 3.0 * 32.0);
    let finished =
        "vllm:request_success_total{engine=\"0\",finished_reason=\"length\",model_name=\"toy\"}";
    assert_eq!(value(&metrics, finished), 4.0);
    let http = "http_requests_total{handler=\"/v1/completions\",method=\"POST\",status=\"4xx\"}";
    assert_eq!(value(&metrics, http), 1.0);
}

#[test]
fn drafts_are_counted_under_vllms_names_and_change_no_answer() {
    let bodies = [
        json!({"prompt": "p".repeat(40), "temperature": 0, "ignore_eos": true, "max_tokens": 60}),
        json!({"prompt": "draft", "seed": 7, "max_tokens": 40, "n": 2, "logprobs": 2, "ignore_eos": true}),
        json!({"prompt": "stop", "seed": 5, "max_tokens": 90, "ignore_eos": true, "stop": ["e", "o"]}),
    ];
    let answers = |server: &Server| {
        bodies.each_ref().map(|body| {
            let answer = server.post("/v1/completions", body);
            assert_eq!(answer.status, 200);
            let mut answer = answer.json();
            for changing in ["id", "created"] {
                answer.as_object_mut().unwrap().remove(changing);
            }
            answer
        })
    };
    let plain = Server::start(options(), Backend::quick());
    let expected = answers(&plain);
    assert!(!plain.get("/metrics").body.contains("vllm:spec_decode"));

    let server = Server::start(options(), Backend::drafting(2));
    assert_eq!(answers(&server), expected);
    let metrics = server.get("/metrics").body;
    let labels = "engine=\"0\",model_name=\"toy\"";
    let count = |name: &str| value(&metrics, &format!("vllm:{name}{{{labels}}}"));
    let at = |position: u32| {
        let name = "vllm:spec_decode_num_accepted_tokens_per_pos_total";
        value(
            &metrics,
            &format!("{name}{{{labels},position=\"{position}\"}}"),
        )
    };
    let drafts = count("spec_decode_num_drafts_total");
    let accepted = count("spec_decode_num_accepted_tokens_total");
    assert_eq!(at(0) + at(1), accepted);
    assert!(at(0) > at(1) && at(1) > 0.0, "{} {}", at(0), at(1));
    let drafted = count("spec_decode_num_draft_tokens_total");
    assert!(accepted < drafted && drafts < drafted && drafted <= 2.0 * drafts);
    for name in [
        "num_drafts",
        "num_draft_tokens",
        "num_accepted_tokens",
        "num_accepted_tokens_per_pos",
    ] {
        let line = format!("# TYPE vllm:spec_decode_{name}_total counter");
        assert!(metrics.contains(&line), "{line}");
    }
    assert_eq!(metrics.matches("position=").count(), 2);
    // Each step of a sequence after its first token is one interval, however many tokens it gave.
    let tokens = count("generation_tokens_total");
    assert!(count("inter_token_latency_seconds_count") < tokens - 4.0);
}

/// vLLM's names break two of promtool's rules; nothing else may.
#[test]
fn promtool_finds_nothing_that_vllms_own_names_do_not_force() {
    let metrics = busy_server().get("/metrics").body;
    let spawned = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut promtool) = spawned else {
        eprintln!("skipped: promtool is not installed (Debian's package prometheus has it)");
        return;
    };
    promtool
        .stdin
        .take()
        .unwrap()
        .write_all(metrics.as_bytes())
        .unwrap();
    let output = promtool.wait_with_output().unwrap();
    let complaints = String::from_utf8(output.stderr).unwrap();
    let own: Vec<&str> = complaints
        .lines()
        .filter(|line| {
            let forced = line.starts_with("vllm:") && line.ends_with("should not contain ':'")
                || line.starts_with("vllm:iteration_tokens_total non-counter");
            !forced
        })
        .collect();
    assert!(own.is_empty(), "{own:?}");
}
