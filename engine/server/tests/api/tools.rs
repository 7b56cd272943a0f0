//! Calls of tools over HTTP: declared, streamed, returned.

use crate::harness::{Backend, MODEL, Server, calling_loader, options};
use engine_text::{ToolCallParser, ToolFormat};
use serde_json::{Value, json};

const CALLS: &str = "So: <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"é\"}}</tool_call>\n\
    <tool_call>{\"arguments\": {}, \"name\": \"g\"}</tool_call>";

fn server(words: &str) -> Server {
    let parser = ToolCallParser::Format(ToolFormat::Hermes);
    Server::start_with(options(), calling_loader(Backend::scripted(words), parser))
}

fn ask(more: Value) -> Value {
    let mut body = json!({
        "model": MODEL,
        "messages": [{"role": "user", "content": "x"}],
        "tools": [{"type": "function", "function": {"name": "f"}}, {"type": "function", "function": {"name": "g"}}],
        "max_tokens": 150,
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The names and arguments of a message.
fn calls(message: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    message["tool_calls"]
        .as_array()
        .unwrap()
        .iter()
        .map(|call| {
            assert_eq!(call["type"], "function");
            assert!(text(&call["id"]).starts_with("call_"));
            (
                text(&call["function"]["name"]),
                text(&call["function"]["arguments"]),
            )
        })
        .collect()
}

#[test]
fn calls_are_returned_whole_and_streamed_alike() {
    let server = server(CALLS);
    let answer = server.post("/v1/chat/completions", &ask(json!({})));
    let choice = answer.json()["choices"][0].clone();
    assert_eq!(choice["finish_reason"], "tool_calls", "{}", answer.body);
    assert_eq!(choice["message"]["content"], "So: ");
    assert_eq!(choice["message"]["reasoning_content"], "hm");
    let expected = [
        ("f".to_owned(), "{\"a\": \"é\"}".to_owned()),
        ("g".to_owned(), "{}".to_owned()),
    ];
    assert_eq!(calls(&choice["message"]), expected);
    assert_ne!(
        choice["message"]["tool_calls"][0]["id"],
        choice["message"]["tool_calls"][1]["id"]
    );

    let events = server
        .post("/v1/chat/completions", &ask(json!({"stream": true})))
        .events();
    let (mut content, mut streamed) = (String::new(), Vec::<(String, String)>::new());
    let mut pieces = 0;
    for event in &events {
        let delta = &event["choices"][0]["delta"];
        content.push_str(delta["content"].as_str().unwrap_or_default());
        for call in delta["tool_calls"].as_array().unwrap_or(&Vec::new()) {
            let index = call["index"].as_u64().unwrap() as usize;
            let arguments = call["function"]["arguments"].as_str().unwrap();
            pieces += 1;
            if index == streamed.len() {
                let name = call["function"]["name"].as_str().unwrap();
                assert!(call["id"].is_string() && call["type"] == "function");
                streamed.push((name.to_owned(), arguments.to_owned()));
            } else {
                assert!(call.get("id").is_none() && call["function"].get("name").is_none());
                streamed[index].1.push_str(arguments);
            }
        }
    }
    assert_eq!(
        (content.as_str(), streamed.as_slice()),
        ("So: ", &expected[..])
    );
    assert!(
        pieces > 5,
        "arguments come in pieces, not at the end: {pieces}"
    );
    assert_eq!(
        events.last().unwrap()["choices"][0]["finish_reason"],
        "tool_calls"
    );
}

#[test]
fn without_parallel_calls_the_first_call_ends_the_answer() {
    let server = server(CALLS);
    let answer = server
        .post(
            "/v1/chat/completions",
            &ask(json!({"parallel_tool_calls": false})),
        )
        .json();
    assert_eq!(calls(&answer["choices"][0]["message"]).len(), 1);
    assert_eq!(answer["choices"][0]["finish_reason"], "tool_calls");
    crate::harness::eventually("the stopped sequence is gone", || {
        server.load()["kvUsage"] == 0.0
    });
}

#[test]
fn without_tools_the_same_words_are_content() {
    let server = server(CALLS);
    for body in [
        ask(json!({"tool_choice": "none"})),
        ask(json!({"tools": []})),
    ] {
        let answer = server.post("/v1/chat/completions", &body).json();
        assert_eq!(answer["choices"][0]["message"]["content"], CALLS);
        assert_eq!(answer["choices"][0]["finish_reason"], "stop");
        assert!(answer["choices"][0]["message"].get("tool_calls").is_none());
    }
}

#[test]
fn only_calls_leave_no_content() {
    let server = server("<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>");
    let answer = server.post("/v1/chat/completions", &ask(json!({}))).json();
    assert_eq!(answer["choices"][0]["message"]["content"], Value::Null);
    assert_eq!(calls(&answer["choices"][0]["message"]).len(), 1);
}

#[test]
fn a_forced_call_is_made_whatever_the_model_prefers() {
    let server = server("I would rather talk.");
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
        "additionalProperties": false});
    let tools = json!([
        {"type": "function", "function": {"name": "f", "parameters": schema}},
        {"type": "function", "function": {"name": "g", "parameters": schema}},
    ]);
    for (choice, names) in [
        (json!("required"), &["f", "g"][..]),
        (
            json!({"type": "function", "function": {"name": "g"}}),
            &["g"][..],
        ),
    ] {
        let body = ask(
            json!({"tools": tools, "tool_choice": choice, "parallel_tool_calls": false, "n": 3}),
        );
        let answer = server.post("/v1/chat/completions", &body).json();
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
            assert_eq!(choice["message"]["reasoning_content"], "hm");
            let calls = calls(&choice["message"]);
            assert_eq!(calls.len(), 1);
            assert!(names.contains(&calls[0].0.as_str()), "{calls:?}");
            let arguments: Value = serde_json::from_str(&calls[0].1).unwrap();
            assert!(arguments == json!({"n": 1}) || arguments == json!({"n": 2}));
        }
    }
}

#[test]
fn a_call_of_a_strict_function_is_valid_though_the_model_writes_another() {
    let schema = json!({"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
        "additionalProperties": false});
    let tools = |strict: bool| {
        json!([
            {"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}},
            {"type": "function", "function": {"name": "g", "parameters": schema}},
        ])
    };
    let of = |server: &Server, strict: bool, seed: u32| {
        let body = ask(
            json!({"tools": tools(strict), "tool_choice": "auto", "seed": seed, "parallel_tool_calls": false}),
        );
        let answer = server.post("/v1/chat/completions", &body).json();
        let choice = answer["choices"][0].clone();
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        assert_eq!(choice["message"]["content"], "So: ");
        assert_eq!(choice["message"]["reasoning_content"], "hm");
        calls(&choice["message"])[0].clone()
    };
    let wrong = "{\"n\": \"three\", \"m\": []}";
    let says = |name: &str| {
        server(&format!(
            "So: <tool_call>\n{{\"name\": \"{name}\", \"arguments\": {wrong}}}\n</tool_call>"
        ))
    };
    let server = says("f");
    for seed in 0..4 {
        let (name, arguments) = of(&server, true, seed);
        let value: Value = serde_json::from_str(&arguments).unwrap();
        assert!(
            value == json!({"n": 1}) || value == json!({"n": 2}),
            "{arguments}"
        );
        assert_eq!(name, "f");
    }
    // What is not strict is the model's own, alone or beside a strict function.
    assert_eq!(of(&server, false, 0), ("f".to_owned(), wrong.to_owned()));
    assert_eq!(of(&says("g"), true, 0), ("g".to_owned(), wrong.to_owned()));
    // A schema that cannot be enforced whole is refused before anything is generated.
    let mut body = ask(json!({"tools": tools(true)}));
    body["tools"][0]["function"]["parameters"]["if"] = json!({});
    let refused = server.post("/v1/chat/completions", &body);
    assert_eq!(
        (refused.status, refused.json()["error"]["param"].clone()),
        (400, json!("tools"))
    );
}

#[test]
fn an_answer_has_the_form_that_was_asked_for() {
    let server = server("I would rather talk.");
    let schema = json!({"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"], "additionalProperties": false});
    let form = json!({"type": "json_schema", "json_schema": {"name": "c", "schema": schema, "strict": true}});
    let body = ask(json!({"tools": null, "response_format": form}));
    let whole = server.post("/v1/chat/completions", &body).json();
    let message = &whole["choices"][0]["message"];
    let content: Value = serde_json::from_str(message["content"].as_str().unwrap()).unwrap();
    assert!(
        content == json!({"colour": "red"}) || content == json!({"colour": "blue"}),
        "{content}"
    );
    assert_eq!(
        (
            &message["reasoning_content"],
            &whole["choices"][0]["finish_reason"]
        ),
        (&json!("hm"), &json!("stop"))
    );

    let body = json!({"prompt": "q", "structured_outputs": {"choice": ["left", "right"]}, "n": 2, "stop": ["zzz"]});
    let chosen = server.post("/v1/completions", &body).json();
    for choice in chosen["choices"].as_array().unwrap() {
        assert!(
            choice["text"] == "left" || choice["text"] == "right",
            "{choice}"
        );
        assert_eq!(choice["finish_reason"], "stop");
    }

    let refused = server.post(
        "/v1/completions",
        &json!({"prompt": "q", "structured_outputs": {"regex": "("}}),
    );
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["param"], "structured_outputs");
}
