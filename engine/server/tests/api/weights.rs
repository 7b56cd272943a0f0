//! Weights are replaced under load, and refused, over real sockets.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use crate::harness::{Answer, Backend, Server, eventually, loader, options, origin};
use engine_server::{ApiKeys, LoadFailure, Loader, ServerOptions, WeightsOrigin};
use serde_json::{Value, json};

const ADMIN: (&str, &str) = ("authorization", "Bearer root");

fn administered() -> ServerOptions {
    let mut options = options();
    options.admin_keys = ApiKeys::parse("admin: root").unwrap();
    options
}

/// A server whose model came with these ways to get others.
fn start(backend: Backend, weights: WeightsOrigin) -> Server {
    let loader: Loader = Box::new(move |startup| {
        let mut loaded = loader(backend)(startup)?;
        loaded.weights = weights;
        Ok(loaded)
    });
    Server::start_with(administered(), loader)
}

fn replace(server: &Server, body: &Value) -> Answer {
    server.send("POST", "/v1/weights", &[ADMIN], body.to_string().as_bytes())
}

fn wait_for(server: &Server, state: &str) -> Value {
    eventually(state, || {
        server.get("/v1/weights").json()["update"]["state"] == state
    });
    server.get("/v1/weights").json()
}

fn ask(max_tokens: u32, more: Value) -> Value {
    let mut body =
        json!({"prompt": "x", "max_tokens": max_tokens, "ignore_eos": true, "temperature": 0});
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// What an engine says that was started with these weights.
fn expected(weights: u64, max_tokens: u32) -> String {
    let mut backend = Backend::quick();
    backend.toy = backend.toy.weighing(weights);
    let server = Server::start(options(), backend);
    text(&server.post("/v1/completions", &ask(max_tokens, json!({}))))
}

fn text(answer: &Answer) -> String {
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.json()["choices"][0]["text"]
        .as_str()
        .unwrap()
        .to_owned()
}

#[test]
fn weights_change_under_load_without_a_failed_or_a_mixed_answer() {
    let (old, new) = (expected(0, 40), expected(7, 40));
    assert_ne!(old, new);
    for rule in ["finish", "restart"] {
        let server = start(Backend::slow(Duration::from_millis(1)), origin(|_| Ok(())));
        let stop = AtomicBool::new(false);
        let answers = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    while !stop.load(Ordering::Acquire) {
                        let answer = server.post("/v1/completions", &ask(40, json!({})));
                        answers.lock().unwrap().push(answer);
                    }
                });
            }
            eventually("some answers", || answers.lock().unwrap().len() > 6);
            let body = json!({"source": "toy:7", "in_flight": rule});
            assert_eq!(replace(&server, &body).status, 202);
            let report = wait_for(&server, "done");
            assert_eq!(report["version"], 2);
            assert_eq!(report["source"], "toy:7");
            let seen = answers.lock().unwrap().len();
            eventually("answers of the new weights", || {
                answers.lock().unwrap().len() > seen + 8
            });
            stop.store(true, Ordering::Release);
        });
        let mut versions = [0, 0];
        for answer in answers.lock().unwrap().iter() {
            let fingerprint = answer.json()["system_fingerprint"].clone();
            let is_new = fingerprint.as_str().unwrap().ends_with("-w2");
            assert_eq!(
                text(answer),
                if is_new { &new } else { &old }.as_str(),
                "{rule}"
            );
            assert_eq!(answer.json()["usage"]["completion_tokens"], 40);
            versions[usize::from(is_new)] += 1;
        }
        assert!(versions[0] > 0 && versions[1] > 0, "{versions:?}");
        let metrics = server.get("/metrics").body;
        for line in [
            "cachalot_engine_weights_version{engine=\"0\",model_name=\"toy\"} 2",
            "cachalot_engine_weights_reloads_total{engine=\"0\",model_name=\"toy\",result=\"success\"} 1",
            "cachalot_engine_weights_hold_seconds_count{engine=\"0\",model_name=\"toy\"} 1",
        ] {
            assert!(metrics.contains(line), "{line} in {metrics}");
        }
        // The load is told after the answers.
        eventually("an empty cache", || server.load()["kvUsage"] == 0.0);
    }
}

/// A backend that waits inside a step once it is told to, and the two ends of that.
fn gated() -> (Backend, Arc<AtomicBool>, Arc<AtomicBool>) {
    let (close, waits) = (
        Arc::new(AtomicBool::new(false)),
        Arc::new(AtomicBool::new(false)),
    );
    let (closed, waiting) = (close.clone(), waits.clone());
    let mut since = 0;
    let backend = Backend::new(move |_, _| {
        since = if closed.load(Ordering::Acquire) {
            since + 1
        } else {
            0
        };
        // A few tokens are out by then.
        while since > 5 && closed.load(Ordering::Acquire) {
            waiting.store(true, Ordering::Release);
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    (backend, close, waits)
}

#[test]
fn what_has_begun_finishes_as_it_began_or_begins_again() {
    let (old, new) = (expected(0, 60), expected(7, 60));
    for (rule, stream) in [
        ("finish", false),
        ("finish", true),
        ("restart", false),
        ("restart", true),
    ] {
        let (backend, gate, waits) = gated();
        let server = start(backend, origin(|_| Ok(())));
        gate.store(true, Ordering::Release);
        let answer = std::thread::scope(|scope| {
            let asked =
                scope.spawn(|| server.post("/v1/completions", &ask(60, json!({"stream": stream}))));
            eventually("the middle of an answer", || waits.load(Ordering::Acquire));
            let body = json!({"source": "toy:7", "in_flight": rule});
            assert_eq!(replace(&server, &body).status, 202);
            wait_for(&server, "waiting");
            assert_eq!(server.get("/v1/weights").json()["version"], 1);
            gate.store(false, Ordering::Release);
            asked.join().unwrap()
        });
        wait_for(&server, "done");
        match (rule, stream) {
            (_, false) => assert_eq!(
                text(&answer),
                if rule == "finish" { &old } else { &new }.as_str()
            ),
            ("finish", true) => {
                let said: String = answer
                    .events()
                    .iter()
                    .map(|event| {
                        assert!(
                            event["system_fingerprint"]
                                .as_str()
                                .unwrap()
                                .ends_with("-w1")
                        );
                        event["choices"][0]["text"].as_str().unwrap().to_owned()
                    })
                    .collect();
                assert_eq!(said, old);
            }
            _ => {
                // The client has seen tokens that nobody can take back.
                let last = answer.body.trim_end().rsplit("\n\n").next().unwrap();
                assert!(last.contains("weights_replaced"), "{last}");
                assert!(answer.body.contains("-w1"), "{}", answer.body);
            }
        }
        assert_eq!(
            text(&server.post("/v1/completions", &ask(60, json!({})))),
            new
        );
    }
}

#[test]
fn a_prefix_that_was_cached_with_old_weights_is_not_found_with_new_ones() {
    let server = start(Backend::quick(), origin(|_| Ok(())));
    let body = ask(4, json!({"prompt": "p".repeat(100)}));
    let cached = || {
        let answer = server.post("/v1/completions", &body).json();
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached(), 0);
    assert!(cached() > 0);
    assert_eq!(replace(&server, &json!({"source": "toy:7"})).status, 202);
    wait_for(&server, "done");
    // The toy would also fail the request if it met keys and values of other weights.
    assert_eq!(cached(), 0);
    assert!(cached() > 0);
}

#[test]
fn a_replacement_that_fails_leaves_the_old_weights_serving() {
    let poison = Arc::new(AtomicBool::new(false));
    let switch = poison.clone();
    let backend = Backend::new(move |_, logits| {
        if switch.load(Ordering::Acquire) {
            logits.as_mut_slice().fill(f32::NAN);
        }
        Ok(())
    });
    let failing = poison.clone();
    let weights = origin(move |source| match source.source.as_str() {
        "toy:13" => Err(LoadFailure {
            reason: "WeightsTruncated".to_owned(),
            message: "shard a is 7 bytes short".to_owned(),
        }),
        "toy:14" => panic!("no such luck"),
        "toy:15" => {
            failing.store(true, Ordering::Release);
            Ok(())
        }
        _ => Ok(()),
    });
    let server = start(backend, weights);
    let before = text(&server.post("/v1/completions", &ask(20, json!({}))));
    for (index, (source, reason, part)) in [
        ("toy:13", "WeightsTruncated", "7 bytes short"),
        ("toy:14", "EngineFailed", "panicked"),
        ("elsewhere", "ModelNotFound", "no toy"),
        // Loaded, and then wrong: the canary of the new weights finds it out.
        ("toy:15", "CanaryFailed", "not finite"),
    ]
    .into_iter()
    .enumerate()
    {
        assert_eq!(replace(&server, &json!({"source": source})).status, 202);
        let line = format!(
            "cachalot_engine_weights_reloads_total{{engine=\"0\",model_name=\"toy\",result=\"failure\"}} {}",
            index + 1
        );
        eventually(&line, || server.get("/metrics").body.contains(&line));
        poison.store(false, Ordering::Release);
        let report = server.get("/v1/weights").json();
        assert_eq!(report["update"]["state"], "failed");
        assert_eq!(report["update"]["reason"], reason);
        assert!(
            report["update"]["message"].as_str().unwrap().contains(part),
            "{report}"
        );
        assert_eq!(
            (&report["version"], &report["source"]),
            (&json!(1), &json!("toy:0"))
        );
        let after = server.post("/v1/completions", &ask(20, json!({})));
        assert_eq!(text(&after), before);
        assert!(
            after.json()["system_fingerprint"]
                .as_str()
                .unwrap()
                .ends_with("-w1")
        );
    }
    assert_eq!(server.get("/livez").status, 200);
}

#[test]
fn an_engine_that_cannot_go_back_to_the_old_weights_ends_and_says_so() {
    let poison = Arc::new(AtomicBool::new(false));
    let (switch, failing) = (poison.clone(), poison);
    let mut backend = Backend::new(move |_, logits| {
        if switch.load(Ordering::Acquire) {
            logits.as_mut_slice().fill(f32::NAN);
        }
        Ok(())
    });
    // As a device that is lost between the exchange and the canary.
    backend.exchanges = 1;
    let weights = origin(move |_| {
        failing.store(true, Ordering::Release);
        Ok(())
    });
    let mut options = administered();
    options.failure_linger = Duration::from_secs(60);
    let loader: Loader = Box::new(move |startup| {
        let mut loaded = loader(backend)(startup)?;
        loaded.weights = weights;
        Ok(loaded)
    });
    let server = Server::start_with(options, loader);
    assert_eq!(replace(&server, &json!({"source": "toy:7"})).status, 202);
    // No request has to come for a probe to find it.
    eventually("it is not alive", || server.get("/livez").status == 503);
    let body = server.get("/livez").body;
    assert!(body.contains("could not be put back"), "{body}");
    assert_eq!(server.get("/v1/weights").status, 503);
}

#[test]
fn only_one_replacement_runs_and_only_for_an_administrator() {
    let (go, wait) = mpsc::channel::<()>();
    let wait = Mutex::new(wait);
    let weights = origin(move |_| {
        wait.lock().unwrap().recv().unwrap();
        Ok(())
    });
    let server = start(Backend::quick(), weights);
    let body = json!({"source": "toy:7"});
    let without = server.post("/v1/weights", &body);
    assert_eq!(without.status, 401);
    for (wrong, param) in [
        (json!({}), "source"),
        (json!({"source": "toy:7", "digest": "md5:1"}), "digest"),
        (json!({"source": "toy:7", "in_flight": "drop"}), "in_flight"),
    ] {
        let refused = replace(&server, &wrong);
        assert_eq!(
            (refused.status, &refused.json()["error"]["param"]),
            (400, &json!(param))
        );
    }
    assert_eq!(replace(&server, &body).status, 202);
    let report = wait_for(&server, "loading");
    assert_eq!(report["update"]["bytes_total"], 2);
    let busy = replace(&server, &body);
    assert_eq!(
        (busy.status, &busy.json()["error"]["code"]),
        (409, &json!("weights_busy"))
    );
    go.send(()).unwrap();
    wait_for(&server, "done");
    go.send(()).unwrap();
    assert_eq!(replace(&server, &body).status, 202, "the next one may come");
    wait_for(&server, "done");

    let closed = Server::start(options(), Backend::quick());
    let refused = replace(&closed, &body);
    assert_eq!(
        (refused.status, &refused.json()["error"]["code"]),
        (403, &json!("admin_key_required"))
    );
    let mut fixed = origin(|_| Ok(()));
    fixed.loader = Err("the CUDA backend cannot".to_owned());
    let refused = replace(&start(Backend::quick(), fixed), &body);
    assert_eq!(refused.status, 501);
    assert!(
        refused.body.contains("the CUDA backend cannot"),
        "{}",
        refused.body
    );
}
