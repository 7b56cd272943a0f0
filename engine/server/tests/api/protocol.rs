//! The OpenAI API over real sockets: what is answered, streamed and refused.

use std::io::Write;
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::{Answer, Backend, Exchange, MODEL, Server, eventually, options};
use serde_json::{Value, json};

fn quick() -> Server {
    Server::start(options(), Backend::quick())
}

fn chat(extra: Value) -> Value {
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "héllo"}],
        "max_tokens": 40,
        "seed": 7,
        "ignore_eos": true,
    });
    body.as_object_mut()
        .unwrap()
        .extend(extra.as_object().unwrap().clone());
    body
}

/// Text and reasoning of each choice of a stream, and how it ended.
fn collect(answer: &Answer, choices: usize) -> Vec<(String, String, String)> {
    let mut collected = vec![(String::new(), String::new(), String::new()); choices];
    for event in answer.events() {
        for choice in event["choices"].as_array().unwrap() {
            let entry = &mut collected[choice["index"].as_u64().unwrap() as usize];
            let delta = &choice["delta"];
            entry
                .0
                .push_str(delta["reasoning_content"].as_str().unwrap_or(""));
            entry.1.push_str(
                delta["content"]
                    .as_str()
                    .or(choice["text"].as_str())
                    .unwrap_or(""),
            );
            entry
                .2
                .push_str(choice["finish_reason"].as_str().unwrap_or(""));
        }
    }
    collected
}

#[test]
fn a_stream_says_the_same_as_a_whole_answer_whatever_else_runs() {
    let server = quick();
    let whole = server.post("/v1/chat/completions", &chat(json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["usage"]["completion_tokens"], 40);
    let message = &whole["choices"][0]["message"];
    let expected = (
        message["reasoning_content"]
            .as_str()
            .unwrap_or("")
            .to_owned(),
        message["content"].as_str().unwrap().to_owned(),
        "length".to_owned(),
    );
    assert!(
        !expected.0.is_empty(),
        "the prompt ends inside the reasoning"
    );
    std::thread::scope(|scope| {
        for index in 0..4 {
            let (server, expected) = (&server, &expected);
            scope.spawn(move || {
                let noise = chat(json!({"seed": index, "messages": [{"role": "user", "content": "x".repeat(index * 9 + 1)}]}));
                server.post("/v1/chat/completions", &noise);
                let body = chat(json!({"stream": true, "stream_options": {"include_usage": true}}));
                // With four of these at a time the queue may be full for a moment.
                let answer = loop {
                    let answer = server.post("/v1/chat/completions", &body);
                    if answer.status != 429 {
                        break answer;
                    }
                };
                assert_eq!(answer.header("content-type"), Some("text/event-stream; charset=utf-8"));
                assert_eq!(&collect(&answer, 1)[0], expected);
                let events = answer.events();
                assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
                assert_eq!(events[0]["usage"], Value::Null);
                let last = events.last().unwrap();
                assert_eq!(last["choices"], json!([]));
                assert_eq!(last["usage"]["completion_tokens"], 40);
                assert_eq!(last["usage"]["prompt_tokens"], 11);
            });
        }
    });
}

#[test]
fn choices_differ_and_are_told_apart() {
    let server = quick();
    let answer = server.post(
        "/v1/chat/completions",
        &chat(json!({"n": 3, "stream": true})),
    );
    let streamed = collect(&answer, 3);
    assert_ne!(streamed[0], streamed[1]);
    let whole = server
        .post("/v1/chat/completions", &chat(json!({"n": 3})))
        .json();
    assert_eq!(whole["choices"].as_array().unwrap().len(), 3);
    assert_eq!(
        whole["choices"][2]["message"]["reasoning_content"],
        json!(streamed[2].0)
    );
    assert_eq!(whole["usage"]["completion_tokens"], 120);
}

#[test]
fn completions_take_text_and_tokens_one_or_many() {
    let server = quick();
    let complete = |body: Value| {
        let answer = server.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.json()
    };
    let greedy = |prompt: Value| json!({"prompt": prompt, "temperature": 0, "ignore_eos": true, "max_tokens": 12});
    let text = complete(greedy(json!("ab")));
    let bos = crate::harness::bytes_tokenizer::id("<｜begin▁of▁sentence｜>");
    let tokens = complete(greedy(json!([bos, 97, 98])));
    assert_eq!(text["choices"][0]["text"], tokens["choices"][0]["text"]);
    assert_eq!(text["object"], "text_completion");
    let many = complete(greedy(json!(["x", "ab"])));
    assert_eq!(many["choices"].as_array().unwrap().len(), 2);
    assert_eq!(many["choices"][1]["text"], text["choices"][0]["text"]);
    assert_eq!(many["usage"]["prompt_tokens"], 5);
    // Sixteen tokens unless asked otherwise, and fewer when only fewer fit.
    assert_eq!(
        complete(json!({"prompt": "ab", "ignore_eos": true}))["usage"]["completion_tokens"],
        16
    );
    let long = complete(json!({"prompt": "a".repeat(252), "ignore_eos": true}));
    assert_eq!(long["usage"]["completion_tokens"], 3);
}

#[test]
fn a_repeated_prompt_is_cached_and_answered_alike() {
    let server = quick();
    let body = json!({"prompt": "p".repeat(100), "temperature": 0, "ignore_eos": true});
    let first = server.post("/v1/completions", &body).json();
    let second = server.post("/v1/completions", &body).json();
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(
        second["usage"]["prompt_tokens_details"]["cached_tokens"],
        96
    );
    assert_eq!(first["choices"], second["choices"]);
}

#[test]
fn a_stop_string_ends_the_answer_in_both_forms() {
    let server = quick();
    let base = json!({"prompt": "q", "temperature": 0, "ignore_eos": true, "max_tokens": 60});
    let whole = server.post("/v1/completions", &base).json();
    let text = whole["choices"][0]["text"].as_str().unwrap().to_owned();
    let characters: Vec<char> = text
        .chars()
        .filter(|c| *c != char::REPLACEMENT_CHARACTER)
        .collect();
    let stop = characters[characters.len() / 2].to_string();
    let expected = &text[..text.find(&stop).unwrap()];
    let mut body = base.clone();
    body["stop"] = json!([stop]);
    let stopped = server.post("/v1/completions", &body).json();
    assert_eq!(stopped["choices"][0]["text"], expected);
    assert_eq!(stopped["choices"][0]["finish_reason"], "stop");
    body["stream"] = json!(true);
    let streamed = collect(&server.post("/v1/completions", &body), 1);
    assert_eq!(
        (streamed[0].1.as_str(), streamed[0].2.as_str()),
        (expected, "stop")
    );
    eventually("the stopped sequences are gone", || {
        server.load()["kvUsage"] == 0.0
    });
}

#[test]
fn log_probabilities_come_for_every_token() {
    let server = quick();
    let body =
        chat(json!({"logprobs": true, "top_logprobs": 2, "max_tokens": 9, "temperature": 0}));
    let whole = server.post("/v1/chat/completions", &body).json();
    let content = whole["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap()
        .clone();
    assert_eq!(content.len(), 9);
    for entry in &content {
        assert_eq!(entry["top_logprobs"].as_array().unwrap().len(), 2);
        assert_eq!(
            entry["top_logprobs"][0]["logprob"], entry["logprob"],
            "greedy takes the best"
        );
        assert!(entry["logprob"].as_f64().unwrap() < 0.0);
    }
    let mut body = body;
    body["stream"] = json!(true);
    let streamed: Vec<Value> = server
        .post("/v1/chat/completions", &body)
        .events()
        .iter()
        .filter_map(|event| {
            event["choices"][0]["logprobs"]["content"]
                .as_array()
                .cloned()
        })
        .flatten()
        .collect();
    assert_eq!(streamed, content);
    let legacy = server
        .post(
            "/v1/completions",
            &json!({"prompt": "a", "logprobs": 1, "max_tokens": 4, "ignore_eos": true}),
        )
        .json();
    let logprobs = &legacy["choices"][0]["logprobs"];
    for field in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[field].as_array().unwrap().len(), 4, "{field}");
    }
}

#[test]
fn mistakes_are_answered_in_openais_shape() {
    let server = quick();
    let user = json!([{"role": "user", "content": "x"}]);
    let token = crate::harness::bytes_tokenizer::VOCABULARY;
    let table = [
        (
            "/v1/chat/completions",
            json!({"model": "gpt-9", "messages": user}),
            404,
            "model",
            json!("model_not_found"),
            "this engine serves \"toy\"",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": "hi"}),
            400,
            "messages",
            Value::Null,
            "must be a list",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "tools": [{"type": "function", "function": {"name": "f"}}]}),
            400,
            "tools",
            json!("unsupported_parameter"),
            "--tool-call-parser",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "max_tokens": 999}),
            400,
            "messages",
            json!("context_length_exceeded"),
            "longest context is 256 tokens",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "user", "content": "x".repeat(300)}]}),
            400,
            "messages",
            json!("context_length_exceeded"),
            "shorten the prompt",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": user, "n": 5}),
            400,
            "n",
            Value::Null,
            "between 1 and 4",
        ),
        (
            "/v1/chat/completions",
            json!({"messages": [{"role": "assistant", "content": "x"}]}),
            400,
            "messages",
            Value::Null,
            "must not be of the assistant",
        ),
        (
            "/v1/completions",
            json!({"prompt": [token]}),
            400,
            "prompt",
            Value::Null,
            "outside the vocabulary",
        ),
        (
            "/v1/completions",
            json!({"prompt": "x", "top_p": 0}),
            400,
            "top_p",
            Value::Null,
            "above 0",
        ),
        (
            "/v1/completions",
            json!({"prompt": vec!["x"; 129]}),
            400,
            "prompt",
            Value::Null,
            "1 to 128",
        ),
    ];
    for (path, body, status, param, code, part) in table {
        let answer = server.post(path, &body);
        assert_eq!(answer.status, status, "{body}: {}", answer.body);
        let error = &answer.json()["error"];
        assert_eq!(error["param"], param, "{body}");
        assert_eq!(error["code"], code, "{body}");
        assert_eq!(error["type"], "invalid_request_error");
        assert!(
            error["message"].as_str().unwrap().contains(part),
            "{}",
            answer.body
        );
    }
    let malformed = server.send("POST", "/v1/completions", &[], b"{nope");
    assert_eq!(
        (malformed.status, malformed.json()["error"]["param"].clone()),
        (400, Value::Null)
    );
    for (method, path) in [
        ("GET", "/v1/nothing"),
        ("GET", "/v1/chat/completions"),
        ("POST", "/v1/models"),
    ] {
        let answer = server.send(method, path, &[], b"");
        assert_eq!(answer.status, 404, "{method} {path}");
        assert!(
            answer.json()["error"]["message"]
                .as_str()
                .unwrap()
                .contains(path)
        );
    }
    assert_eq!(server.load()["running"], 0);
}

#[test]
fn models_tokens_and_the_version_can_be_asked_for() {
    let server = quick();
    let models = server.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], MODEL);
    assert_eq!(models["data"][0]["max_model_len"], 256);
    assert_eq!(server.get("/v1/models/toy").json()["object"], "model");
    assert_eq!(server.get("/v1/models/org/other").status, 404);
    let tokens = server
        .post(
            "/tokenize",
            &json!({"prompt": "ab", "add_special_tokens": false}),
        )
        .json();
    assert_eq!(
        tokens,
        json!({"count": 2, "max_model_len": 256, "tokens": [97, 98]})
    );
    let text = server
        .post("/detokenize", &json!({"tokens": [97, 98]}))
        .json();
    assert_eq!(text, json!({"prompt": "ab"}));
    let chat = server
        .post(
            "/tokenize",
            &json!({"messages": [{"role": "user", "content": "a"}]}),
        )
        .json();
    assert_eq!(chat["count"], 6);
    assert!(server.get("/version").json()["version"].is_string());
}

#[test]
fn a_request_keeps_the_name_it_came_with() {
    let server = quick();
    let body = chat(json!({"max_tokens": 1})).to_string();
    let answer = server.send(
        "POST",
        "/v1/chat/completions",
        &[("x-request-id", "abc-1")],
        body.as_bytes(),
    );
    assert_eq!(answer.header("x-request-id"), Some("abc-1"));
    assert_eq!(answer.json()["id"], "chatcmpl-abc-1");
    let first = server
        .get("/load")
        .header("x-request-id")
        .unwrap()
        .to_owned();
    assert_eq!(first.len(), 32);
    assert_ne!(
        server.get("/load").header("x-request-id"),
        Some(first.as_str())
    );
}

#[test]
fn bodies_and_heads_have_limits_of_size_and_time() {
    let mut options = options();
    options.body_bytes_max = 4096;
    options.body_timeout = Duration::from_millis(200);
    options.header_timeout = Duration::from_millis(200);
    let server = Server::start(options, Backend::quick());
    let large = server.post("/v1/completions", &json!({"prompt": "x".repeat(5000)}));
    assert_eq!(large.status, 413);
    assert!(
        large.json()["error"]["message"]
            .as_str()
            .unwrap()
            .contains("4096 bytes")
    );

    let mut slow = TcpStream::connect(server.address).unwrap();
    slow.write_all(b"POST /v1/completions HTTP/1.1\r\nhost: t\r\ncontent-length: 100\r\n\r\n{")
        .unwrap();
    assert_eq!(Exchange::read_head(slow).status, 408);

    let mut silent = TcpStream::connect(server.address).unwrap();
    silent
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    silent.write_all(b"GET /load HT").unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut silent, &mut rest).unwrap();
    assert!(
        !String::from_utf8_lossy(&rest).contains("200 OK"),
        "the connection was closed"
    );
}

#[test]
fn a_full_queue_says_when_to_come_back() {
    let server = Server::start(options(), Backend::slow(Duration::from_millis(20)));
    let body = json!({"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true});
    // Four run and two wait; the seventh is one too many.
    let open: Vec<Exchange> = (0..6)
        .map(|_| server.open("/v1/completions", &body))
        .collect();
    let refused = server.post("/v1/completions", &body);
    assert_eq!(refused.status, 429, "{}", refused.body);
    assert_eq!(refused.json()["error"]["code"], "rate_limit_exceeded");
    assert!(
        refused
            .header("retry-after")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            >= 1
    );
    // The load is published once a step, so the last two may not show yet.
    eventually("four run and two wait", || {
        let load = server.load();
        (load["running"].as_u64(), load["waiting"].as_u64()) == (Some(4), Some(2))
    });
    drop(open);
    eventually("all clients are gone", || server.load()["running"] == 0);
    assert_eq!(server.load()["kvUsage"], 0.0);
}

#[test]
fn a_client_that_leaves_frees_its_blocks() {
    let server = Server::start(options(), Backend::slow(Duration::from_millis(5)));
    let body = chat(json!({"stream": true, "max_tokens": 200}));
    let mut open = server.open("/v1/chat/completions", &body);
    open.chunk().unwrap();
    open.chunk().unwrap();
    assert!(server.load()["kvUsage"].as_f64().unwrap() > 0.0);
    let generated = |server: &Server| server.load()["generationTokensTotal"].as_u64().unwrap();
    drop(open);
    eventually("its blocks are free", || server.load()["kvUsage"] == 0.0);
    let count = generated(&server);
    assert!(count < 200, "it went on to the end");
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(generated(&server), count, "nothing runs any more");
}

#[test]
fn a_request_whose_time_is_over_ends_with_a_clear_word() {
    let server = Server::start(options(), Backend::slow(Duration::from_millis(20)));
    let slow = json!({"prompt": "x", "max_tokens": 200, "ignore_eos": true});
    let send = |seconds: &str, body: &Value| {
        let headers = [("x-request-timeout", seconds)];
        server.send(
            "POST",
            "/v1/completions",
            &headers,
            body.to_string().as_bytes(),
        )
    };
    let late = send("0.2", &slow);
    assert_eq!(late.status, 504, "{}", late.body);
    assert_eq!(late.json()["error"]["code"], "deadline_exceeded");
    let mut streamed = slow.clone();
    streamed["stream"] = json!(true);
    let late = send("0.2", &streamed);
    assert_eq!(late.status, 200);
    assert!(late.body.contains("deadline_exceeded"), "{}", late.body);
    // Waiting counts too: four others hold every place.
    let held: Vec<Exchange> = (0..4)
        .map(|_| server.open("/v1/completions", &streamed))
        .collect();
    assert_eq!(
        send("0.3", &json!({"prompt": "x", "max_tokens": 1})).status,
        504
    );
    drop(held);
    assert_eq!(
        send("soon", &slow).json()["error"]["param"],
        "x-request-timeout"
    );
    eventually("nothing is left", || server.load()["kvUsage"] == 0.0);
    let metrics = server.get("/metrics").body;
    let line = metrics
        .lines()
        .find(|line| line.starts_with("cachalot_engine_deadlines_exceeded_total"));
    assert!(line.unwrap().ends_with(" 3"), "{line:?}");
}

#[test]
fn keys_guard_the_api_and_leave_probes_open() {
    let mut options = options();
    options.api_keys = engine_server::ApiKeys::parse("red:secret").unwrap();
    let server = Server::start(options, Backend::quick());
    let body = chat(json!({"max_tokens": 1})).to_string();
    let send = |key: &str| {
        let headers = [("authorization", key), ("x-request-id", "abc-2")];
        server.send("POST", "/v1/chat/completions", &headers, body.as_bytes())
    };
    let refused = send("Bearer wrong");
    assert_eq!(refused.status, 401, "{}", refused.body);
    assert_eq!(refused.json()["error"]["code"], "invalid_api_key");
    assert_eq!(refused.header("x-request-id"), Some("abc-2"));
    assert_eq!(send("Bearer secret").status, 200);
    for path in ["/v1/models", "/tokenize", "/v1/nothing"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
    for path in [
        "/livez",
        "/readyz",
        "/startupz",
        "/load",
        "/metrics",
        "/version",
    ] {
        assert_eq!(server.get(path).status, 200, "{path}");
    }
}
