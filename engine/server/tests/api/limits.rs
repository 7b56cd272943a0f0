//! Every limit of docs/reference/limits.md: what is at it is taken, what is beyond it is refused by name.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use crate::harness::{Backend, Server, calling_loader, options};
use engine_text::{ToolCallParser, ToolFormat};
use serde_json::{Value, json};

fn server() -> Server {
    let mut options = options();
    options.messages_max = 8;
    options.prompts_max = 3;
    let parser = ToolCallParser::Format(ToolFormat::Hermes);
    Server::start_with(options, calling_loader(Backend::scripted("Yes."), parser))
}

fn completion(field: &str, value: Value) -> (&'static str, Value) {
    (
        "/v1/completions",
        json!({"prompt": "x", "max_tokens": 2, field: value}),
    )
}

fn chat(field: &str, value: Value) -> (&'static str, Value) {
    let mut body = json!({"messages": [{"role": "user", "content": "x"}], "max_tokens": 2});
    body[field] = value;
    ("/v1/chat/completions", body)
}

fn messages(count: usize) -> Value {
    vec![json!({"role": "user", "content": "x"}); count].into()
}

fn calls(count: usize) -> Value {
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    json!([{"role": "user", "content": "x"},
        {"role": "assistant", "content": "a", "tool_calls": vec![call; count]}, {"role": "user", "content": "y"}])
}

fn tools(count: usize) -> Value {
    (0..count)
        .map(|index| json!({"type": "function", "function": {"name": format!("f{index}")}}))
        .collect()
}

fn tool(name: &str, parameters: &Value) -> Value {
    json!([{"type": "function", "function": {"name": name, "parameters": parameters}}])
}

/// A schema of so many objects inside each other.
fn deep(levels: usize) -> Value {
    (1..levels).fold(json!({}), |inner, _| json!({"not": inner}))
}

fn long_schema(bytes: usize) -> Value {
    let frame = json!({"description": ""}).to_string().len();
    json!({"description": "x".repeat(bytes - frame)})
}

fn format(schema: &Value) -> Value {
    json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
}

fn biases(count: u32) -> Value {
    let entries = (0..count).map(|token| (token.to_string(), json!(0.5)));
    Value::Object(entries.collect())
}

fn choices(count: usize) -> Value {
    let words: Vec<String> = (0..count).map(|index| format!("c{index}")).collect();
    json!({"choice": words})
}

#[test]
fn what_is_at_a_limit_is_taken_and_what_is_beyond_is_refused_by_name() {
    let server = server();
    let regex = |bytes: usize| json!({"regex": format!("[{}]", "a".repeat(bytes - 2))});
    let name = |bytes: usize| tool(&"f".repeat(bytes), &json!({}));
    let empty = json!({});
    type Case = ((&'static str, Value), (&'static str, Value), &'static str);
    let table: Vec<Case> = vec![
        (
            chat("messages", messages(8)),
            chat("messages", messages(9)),
            "messages",
        ),
        (
            chat("messages", calls(128)),
            chat("messages", calls(129)),
            "messages[1].tool_calls",
        ),
        (
            completion("prompt", json!(["a", "b", "c"])),
            completion("prompt", json!(["a", "b", "c", "d"])),
            "prompt",
        ),
        (
            completion("prompt", json!("x".repeat(1021))),
            completion("prompt", json!("x".repeat(1022))),
            "prompt",
        ),
        (
            chat("tools", tools(128)),
            chat("tools", tools(129)),
            "tools",
        ),
        (
            chat("tools", name(64)),
            chat("tools", name(65)),
            "tools[0].function.name",
        ),
        (
            chat("tools", tool("f", &deep(32))),
            chat("tools", tool("f", &deep(33))),
            "tools[0].function.parameters",
        ),
        (
            chat("tools", tool("f", &long_schema(64 << 10))),
            chat("tools", tool("f", &long_schema((64 << 10) + 1))),
            "tools[0].function.parameters",
        ),
        (
            completion("structured_outputs", regex(64 << 10)),
            completion("structured_outputs", regex((64 << 10) + 1)),
            "structured_outputs.regex",
        ),
        (
            completion("structured_outputs", choices(1024)),
            completion("structured_outputs", choices(1025)),
            "structured_outputs.choice",
        ),
        (
            completion("stop", json!(vec!["zz"; 16])),
            completion("stop", json!(vec!["zz"; 17])),
            "stop",
        ),
        (
            completion("stop", json!("z".repeat(1024))),
            completion("stop", json!("z".repeat(1025))),
            "stop",
        ),
        (
            completion("stop", json!("z")),
            completion("stop", json!("")),
            "stop",
        ),
        (
            completion("stop_token_ids", json!(vec![1; 1024])),
            completion("stop_token_ids", json!(vec![1; 1025])),
            "stop_token_ids",
        ),
        (
            completion("logit_bias", biases(200)),
            completion("logit_bias", biases(1025)),
            "logit_bias",
        ),
        (
            completion("logit_bias", json!({"7": 100})),
            completion("logit_bias", json!({"7": 101})),
            "logit_bias",
        ),
        (completion("n", json!(4)), completion("n", json!(5)), "n"),
        (completion("n", json!(1)), completion("n", json!(0)), "n"),
        (
            completion("logprobs", json!(20)),
            completion("logprobs", json!(21)),
            "logprobs",
        ),
        (
            completion("max_tokens", json!(1)),
            completion("max_tokens", json!(0)),
            "max_tokens",
        ),
        (
            completion("temperature", json!(2)),
            completion("temperature", json!(2.1)),
            "temperature",
        ),
        (
            completion("top_p", json!(1)),
            completion("top_p", json!(1.1)),
            "top_p",
        ),
        (
            completion("min_p", json!(1)),
            completion("min_p", json!(1.1)),
            "min_p",
        ),
        (
            completion("presence_penalty", json!(2)),
            completion("presence_penalty", json!(2.1)),
            "presence_penalty",
        ),
        (
            completion("frequency_penalty", json!(-2)),
            completion("frequency_penalty", json!(-2.1)),
            "frequency_penalty",
        ),
        (
            completion("repetition_penalty", json!(10)),
            completion("repetition_penalty", json!(10.1)),
            "repetition_penalty",
        ),
        (
            completion("repetition_penalty", json!(0.1)),
            completion("repetition_penalty", json!(0)),
            "repetition_penalty",
        ),
        (
            chat("response_format", format(&long_schema(64 << 10))),
            chat("response_format", format(&long_schema((64 << 10) + 1))),
            "response_format.json_schema.schema",
        ),
        (
            chat("response_format", format(&deep(32))),
            chat("response_format", format(&deep(33))),
            "response_format.json_schema.schema",
        ),
        (
            chat("tools", tool("f", &empty)),
            chat("tool_choice", json!("required")),
            "tool_choice",
        ),
    ];
    for ((path, at), (_, beyond), param) in table {
        let refused = server.post(path, &beyond);
        let error = refused.json()["error"].clone();
        assert_eq!(
            (refused.status, &error["param"]),
            (400, &json!(param)),
            "{error}"
        );
        let taken = server.post(path, &at);
        let error = taken.json()["error"].clone();
        // Tools are described in the prompt, byte by byte here: that alone may be too long for the toy.
        let is_long = error["code"] == "context_length_exceeded";
        assert!(taken.status == 200 || is_long, "{param}: {error}");
    }
    let top =
        json!({"messages": messages(1), "max_tokens": 2, "logprobs": true, "top_logprobs": 20});
    assert_eq!(server.post("/v1/chat/completions", &top).status, 200);
    let mut beyond = top.clone();
    beyond["top_logprobs"] = json!(21);
    let refused = server.post("/v1/chat/completions", &beyond);
    assert_eq!(refused.json()["error"]["param"], "top_logprobs");
}

#[test]
fn headers_that_name_callers_and_times_are_bounded() {
    let server = server();
    let body = json!({"prompt": "x", "max_tokens": 1}).to_string();
    let with = |name: &str, value: &str| {
        server.send("POST", "/v1/completions", &[(name, value)], body.as_bytes())
    };
    let (id, tenant) = ("i".repeat(128), "t".repeat(256));
    assert_eq!(
        with("x-request-id", &id).header("x-request-id"),
        Some(id.as_str())
    );
    let longer = with("x-request-id", &(id.clone() + "i"));
    assert_eq!(longer.status, 200);
    assert_eq!(
        longer.header("x-request-id").unwrap().len(),
        32,
        "a name of its own"
    );
    assert_eq!(with("x-cachalot-tenant", &tenant).status, 200);
    assert_eq!(with("x-cachalot-tenant", &(tenant + "t")).status, 400);
    assert_eq!(with("x-request-timeout", "86400").status, 200);
    assert_eq!(with("x-request-timeout", "86401").status, 400);
}

#[test]
fn heads_are_bounded_in_bytes_and_lines() {
    let server = server();
    let status = |head: &str| {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        // A server that refuses may close before it has read everything.
        let _ = write!(
            stream,
            "GET /load HTTP/1.1\r\nhost: t\r\nconnection: close\r\n{head}\r\n"
        );
        let mut text = Vec::new();
        let _ = stream.read_to_end(&mut text);
        let text = String::from_utf8_lossy(&text).into_owned();
        text.split(' ').nth(1).unwrap_or("closed").to_owned()
    };
    let line = |bytes: usize| format!("x-a: {}\r\n", "a".repeat(bytes));
    assert_eq!(status(&line(32 << 10)), "200");
    assert_eq!(status(&line(65 << 10)), "431");
    let lines = |count: usize| {
        (0..count)
            .map(|index| format!("x-{index}: a\r\n"))
            .collect::<String>()
    };
    // `host` and `connection` are two more.
    assert_eq!(status(&lines(98)), "200");
    assert_eq!(status(&lines(99)), "431");
}

#[test]
fn json_is_bounded_in_depth() {
    let server = server();
    // An unknown field is ignored, whatever it holds, but it must be read. The body itself is the first level.
    let status = |levels: usize| {
        let (open, close) = ("[".repeat(levels - 1), "]".repeat(levels - 1));
        let body = format!("{{\"prompt\": \"x\", \"max_tokens\": 1, \"more\": {open}{close}}}");
        server
            .send("POST", "/v1/completions", &[], body.as_bytes())
            .status
    };
    assert_eq!((status(127), status(128)), (200, 400));
}

/// The first frame of a server names the streams that a connection may have at once (RFC 9113, 6.5.2).
#[test]
fn an_http2_connection_has_a_bounded_number_of_streams() {
    const SETTINGS: u8 = 4;
    const MAX_CONCURRENT_STREAMS: u16 = 3;
    let server = server();
    let mut stream = TcpStream::connect(server.address).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_secs(60)))
        .unwrap();
    // The preface, and empty settings of our own.
    stream
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .unwrap();
    stream
        .write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0])
        .unwrap();
    let mut head = [0; 9];
    stream.read_exact(&mut head).unwrap();
    assert_eq!(head[3], SETTINGS);
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
    let mut settings = vec![0; length];
    stream.read_exact(&mut settings).unwrap();
    let streams = settings.chunks(6).find_map(|setting| {
        let name = u16::from_be_bytes([setting[0], setting[1]]);
        let value = u32::from_be_bytes(setting[2..].try_into().unwrap());
        (name == MAX_CONCURRENT_STREAMS).then_some(value)
    });
    assert_eq!(streams, Some(256));
}
