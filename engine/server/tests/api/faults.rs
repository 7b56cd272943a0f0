//! Starting, draining and failing, over real sockets.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use crate::harness::{Backend, Server, eventually, failing_loader, loader, options};
use engine_core::ExecuteError;
use engine_server::{Loader, ServeError};
use engine_spec::StartupPhase;
use serde_json::{Value, json};

fn long(extra: Value) -> Value {
    let mut body = json!({"prompt": "x", "max_tokens": 100, "ignore_eos": true, "temperature": 0});
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

#[test]
fn while_it_loads_it_is_alive_but_not_ready() {
    let (go, wait) = mpsc::channel::<()>();
    let slow: Loader = Box::new(move |startup| {
        startup.enter(StartupPhase::Loading, || (30, 120));
        wait.recv().unwrap();
        loader(Backend::quick())(startup)
    });
    let server = Server::begin(options(), slow);
    eventually("loading", || {
        server.get("/startupz").json()["phase"] == "loading"
    });
    let startup = server.get("/startupz");
    assert_eq!(startup.status, 503);
    assert_eq!(startup.json()["percent"], 25.0);
    assert_eq!(startup.json()["bytesTotal"], 120);
    let number = |name: &str| startup.json()[name].as_f64().unwrap();
    // 90 bytes are left, at the rate of the first 30.
    let eta = 90.0 / number("bytesPerSecond");
    assert!(
        (number("etaSeconds") - eta).abs() < 1e-6 * eta,
        "{}",
        startup.body
    );
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/readyz").status, 503);
    assert_eq!(server.get("/v1/models").status, 503);
    assert_eq!(server.get("/metrics").status, 200);
    let early = server.post("/v1/completions", &long(json!({})));
    assert_eq!(
        (early.status, early.json()["error"]["code"].clone()),
        (503, json!("not_ready"))
    );
    assert!(early.header("retry-after").is_some());
    assert!(
        early.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("25 %")
    );
    go.send(()).unwrap();
    eventually("ready", || server.get("/readyz").status == 200);
    let startup = server.get("/startupz");
    assert_eq!(
        (startup.status, startup.json()["phase"].clone()),
        (200, json!("ready"))
    );
    let metrics = server.get("/metrics").body;
    assert!(
        metrics.contains(
            "cachalot_engine_startup_seconds{engine=\"0\",model_name=\"toy\",phase=\"warming\"}"
        ),
        "{metrics}"
    );
}

#[test]
fn a_model_that_cannot_be_loaded_says_why_and_ends() {
    let server = Server::begin(
        options(),
        failing_loader("WeightsTruncated", "shard a is 7 bytes short"),
    );
    eventually("failed", || {
        server.get("/startupz").json()["phase"] == "failed"
    });
    let report = server.get("/startupz");
    assert_eq!(report.status, 503);
    assert_eq!(report.json()["reason"], "WeightsTruncated");
    assert_eq!(report.json()["message"], "shard a is 7 bytes short");
    assert_eq!(server.get("/readyz").status, 503);
    match server.join().unwrap_err() {
        ServeError::Load(failure) => assert_eq!(failure.reason, "WeightsTruncated"),
        other => panic!("{other}"),
    }
}

#[test]
fn a_loader_that_panics_is_a_failed_start() {
    let panics: Loader = Box::new(|_| panic!("no such luck"));
    let error = Server::begin(options(), panics).join().unwrap_err();
    assert!(error.to_string().contains("no such luck"), "{error}");
}

#[test]
fn a_model_whose_logits_are_not_finite_is_never_ready() {
    let broken = Backend::new(|_, logits| {
        if let Some(first) = logits.as_mut_slice().first_mut() {
            *first = f32::NAN;
        }
        Ok(())
    });
    let server = Server::begin(options(), loader(broken));
    eventually("failed", || {
        server.get("/startupz").json()["phase"] == "failed"
    });
    let report = server.get("/startupz").json();
    assert_eq!(report["reason"], "CanaryFailed");
    assert!(
        report["message"].as_str().unwrap().contains("not finite"),
        "{report}"
    );
    assert!(server.join().is_err());
}

#[test]
fn a_logit_that_stops_being_finite_fails_its_request_alone() {
    let poison = Arc::new(AtomicBool::new(false));
    let switch = poison.clone();
    let server = Server::start(
        options(),
        Backend::new(move |_, logits| {
            if switch.swap(false, Ordering::AcqRel) {
                logits.as_mut_slice()[3] = f32::INFINITY;
            }
            Ok(())
        }),
    );
    poison.store(true, Ordering::Release);
    let answer = server.post("/v1/completions", &long(json!({})));
    assert_eq!(
        (answer.status, answer.json()["error"]["code"].clone()),
        (500, json!("engine_failed"))
    );
    assert_eq!(server.post("/v1/completions", &long(json!({}))).status, 200);
    let metrics = server.get("/metrics").body;
    assert!(
        metrics.contains("vllm:corrupted_requests_total{engine=\"0\",model_name=\"toy\"} 1"),
        "{metrics}"
    );
    assert!(
        metrics.contains("finished_reason=\"error\",model_name=\"toy\"} 1"),
        "{metrics}"
    );
}

#[test]
fn a_panic_of_the_backend_fails_requests_and_health_and_never_hangs() {
    let server = Server::start(
        options(),
        Backend::new(|step, _| {
            assert!(step < 30, "the backend is broken");
            // Both requests must be in before it breaks.
            std::thread::sleep(Duration::from_millis(10));
            Ok(())
        }),
    );
    std::thread::scope(|scope| {
        let whole = scope.spawn(|| server.post("/v1/completions", &long(json!({}))));
        let stream = scope.spawn(|| server.post("/v1/completions", &long(json!({"stream": true}))));
        let whole = whole.join().unwrap();
        assert_eq!(whole.status, 500, "{}", whole.body);
        assert!(
            whole.json()["error"]["message"]
                .as_str()
                .unwrap()
                .contains("the backend is broken")
        );
        let stream = stream.join().unwrap();
        assert_eq!(stream.status, 200);
        let last = stream.body.trim_end().rsplit("\n\n").next().unwrap();
        let error: Value = serde_json::from_str(last.strip_prefix("data: ").unwrap()).unwrap();
        assert_eq!(error["error"]["code"], "engine_failed");
    });
    let live = server.get("/livez");
    assert_eq!(live.status, 503);
    assert!(live.body.contains("the backend is broken"), "{}", live.body);
    assert_eq!(server.get("/readyz").status, 503);
    let refused = server.post("/v1/completions", &long(json!({})));
    assert_eq!(refused.status, 503);
    assert!(
        server
            .join()
            .unwrap_err()
            .to_string()
            .contains("the backend is broken")
    );
}

#[test]
fn a_fatal_error_of_the_backend_ends_like_a_panic() {
    let server = Server::start(
        options(),
        Backend::new(|step, _| match step < 30 {
            true => Ok(()),
            false => Err(ExecuteError::Fatal("the device fell off".to_owned())),
        }),
    );
    assert_eq!(server.post("/v1/completions", &long(json!({}))).status, 500);
    assert_eq!(server.get("/livez").status, 503);
    assert!(
        server
            .join()
            .unwrap_err()
            .to_string()
            .contains("the device fell off")
    );
}

#[test]
fn a_hang_of_the_backend_is_noticed_and_may_pass() {
    let mut options = options();
    options.stall_timeout = Duration::from_millis(300);
    let (hang, switch) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (flag, hung) = (hang.clone(), switch.clone());
    let server = Server::start(
        options,
        Backend::new(move |_, _| {
            hung.store(flag.load(Ordering::Acquire), Ordering::Release);
            while flag.load(Ordering::Acquire) {
                std::thread::sleep(Duration::from_millis(5));
            }
            Ok(())
        }),
    );
    hang.store(true, Ordering::Release);
    let answer = server.post("/v1/completions", &long(json!({})));
    assert!(switch.load(Ordering::Acquire));
    assert_eq!(answer.status, 500, "{}", answer.body);
    assert!(
        answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("no progress")
    );
    assert_eq!(server.get("/livez").status, 503);
    assert!(
        server
            .get("/metrics")
            .body
            .contains("cachalot_engine_stalls_total{engine=\"0\",model_name=\"toy\"} 1")
    );
    hang.store(false, Ordering::Release);
    eventually("alive again", || server.get("/livez").status == 200);
    eventually("serving again", || {
        server.post("/v1/completions", &long(json!({}))).status == 200
    });
}

#[test]
fn a_hang_is_noticed_within_five_seconds_and_so_is_a_dead_thread() {
    for hangs in [true, false] {
        let broken = Arc::new(Mutex::new(None::<Instant>));
        let since = broken.clone();
        let server = Server::start(
            // As it is served: no time is shortened.
            options(),
            Backend::new(move |step, _| {
                if step > 20 {
                    since.lock().unwrap().get_or_insert_with(Instant::now);
                    assert!(hangs, "the thread is gone");
                    // Longer than the test takes, shorter than for ever: the thread must end.
                    std::thread::sleep(Duration::from_secs(8));
                }
                Ok(())
            }),
        );
        let noticed = std::thread::scope(|scope| {
            scope.spawn(|| server.post("/v1/completions", &long(json!({}))));
            eventually("not alive", || server.get("/livez").status == 503);
            broken.lock().unwrap().unwrap().elapsed()
        });
        assert!(noticed < Duration::from_secs(5), "{noticed:?}");
    }
}

#[test]
fn a_drain_finishes_what_runs_and_takes_nothing_new() {
    let mut server = Server::start(options(), Backend::slow(Duration::from_millis(5)));
    let reference = server.post("/v1/completions", &long(json!({}))).json();
    let body = long(json!({"stream": true}));
    let mut open = server.open("/v1/completions", &body);
    let first = open.chunk().unwrap();
    server.shut_down();
    eventually("draining", || server.load()["draining"] == true);
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/readyz").status, 503);
    let refused = server.post("/v1/completions", &body);
    assert_eq!(
        (refused.status, refused.json()["error"]["code"].clone()),
        (503, json!("draining"))
    );
    assert!(refused.header("retry-after").is_some());
    let mut rest = open.rest();
    rest.body.insert_str(0, &first);
    let text: String = rest
        .events()
        .iter()
        .map(|event| event["choices"][0]["text"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(json!(text), reference["choices"][0]["text"]);
    server.join().unwrap();
}

#[test]
fn a_drain_that_takes_too_long_ends_what_runs_with_an_error_to_retry() {
    let mut options = options();
    options.drain_timeout = Duration::from_millis(200);
    let mut server = Server::start(options, Backend::slow(Duration::from_millis(50)));
    let mut open = server.open("/v1/completions", &long(json!({"stream": true})));
    open.chunk().unwrap();
    let began = Instant::now();
    server.shut_down();
    let body = open.rest().body;
    assert!(body.contains("\"code\":\"aborted\""), "{body}");
    server.join().unwrap();
    assert!(began.elapsed() < Duration::from_secs(8));
}

/// The text and the log-probabilities of a stream of completions, and its last event.
fn streamed(body: &str) -> (String, Vec<Value>, Value) {
    let (mut text, mut logprobs, mut last) = (String::new(), Vec::new(), Value::Null);
    for event in body
        .split("\n\n")
        .filter_map(|event| event.strip_prefix("data: {"))
    {
        let event: Value = serde_json::from_str(&format!("{{{event}")).unwrap();
        let choice = &event["choices"][0];
        text += choice["text"].as_str().unwrap_or_default();
        if let Some(tokens) = choice["logprobs"]["token_logprobs"].as_array() {
            logprobs.extend(tokens.clone());
        }
        last = event;
    }
    (text, logprobs, last)
}

#[test]
fn an_aborted_answer_goes_on_elsewhere_byte_by_byte() {
    for more in [
        json!({"logprobs": 0}),
        json!({"temperature": 0, "stop": ["\u{7f}\u{7f}\u{7f}"]}),
        json!({"structured_outputs": {"regex": "([a-f]{3} ){20}"}, "ignore_eos": false}),
    ] {
        let mut body = long(json!({"stream": true, "max_tokens": 60, "seed": 11}));
        for (key, value) in more.as_object().unwrap() {
            body[key] = value.clone();
        }
        let whole = Server::start(options(), Backend::quick())
            .post("/v1/completions", &body)
            .body;
        let (expected, expected_logprobs, last) = streamed(&whole);
        let mut options = options();
        options.drain_timeout = Duration::from_millis(100);
        let mut server = Server::start(options, Backend::slow(Duration::from_millis(20)));
        let mut open = server.open("/v1/completions", &body);
        let first = open.chunk().unwrap();
        server.shut_down();
        let mut rest = open.rest();
        rest.body.insert_str(0, &first);
        server.join().unwrap();
        let (mut text, mut logprobs, end) = streamed(&rest.body);
        assert_eq!(end["error"]["code"], "aborted");
        let state = &end["cachalot_resume"];
        assert_eq!(state["version"], 1, "{end}");
        let so_far = state["tokens"].as_array().unwrap().len();
        assert!((1..60).contains(&so_far), "{so_far}");

        body["cachalot_resume"] = state.clone();
        body["seed"] = Value::Null;
        let elsewhere = Server::start(crate::harness::options(), Backend::quick());
        let (more_text, more_logprobs, end) =
            streamed(&elsewhere.post("/v1/completions", &body).body);
        text += &more_text;
        logprobs.extend(more_logprobs);
        assert_eq!(text, expected);
        assert_eq!(logprobs, expected_logprobs);
        assert_eq!(
            end["choices"][0]["finish_reason"],
            last["choices"][0]["finish_reason"]
        );
        let mut whole = body.clone();
        whole["stream"] = json!(false);
        let usage = elsewhere.post("/v1/completions", &whole).json()["usage"].clone();
        assert!(usage["completion_tokens"].as_u64().unwrap() >= so_far as u64);

        let mut other = body.clone();
        other["prompt"] = json!("another");
        let refused = elsewhere.post("/v1/completions", &other);
        assert_eq!(refused.status, 400);
        assert_eq!(refused.json()["error"]["param"], "cachalot_resume");
        body["n"] = json!(2);
        assert_eq!(elsewhere.post("/v1/completions", &body).status, 400);
    }
}

#[test]
fn an_idle_server_ends_at_once() {
    let mut server = Server::start(options(), Backend::quick());
    let began = Instant::now();
    server.shut_down();
    server.join().unwrap();
    assert!(began.elapsed() < Duration::from_secs(3));
}
