//! `POST /v1/responses`: whole and streamed, with calls, and what is refused.

use crate::harness::{Answer, Backend, MODEL, Server, calling_loader, options};
use engine_text::{ToolCallParser, ToolFormat};
use serde_json::{Value, json};

fn server(words: &str) -> Server {
    let parser = ToolCallParser::Format(ToolFormat::Hermes);
    Server::start_with(options(), calling_loader(Backend::scripted(words), parser))
}

/// The events, each with its `event:` line checked against its type.
fn events(answer: &Answer) -> Vec<Value> {
    answer
        .body
        .split("\n\n")
        .filter(|event| !event.is_empty())
        .enumerate()
        .map(|(index, event)| {
            let (kind, data) = event.split_once('\n').unwrap();
            let data: Value = serde_json::from_str(data.strip_prefix("data: ").unwrap()).unwrap();
            assert_eq!(kind.strip_prefix("event: ").unwrap(), data["type"]);
            assert_eq!(data["sequence_number"], index);
            data
        })
        .collect()
}

const CALL: &str = "Look: <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";

fn ask(more: Value) -> Value {
    let mut body = json!({
        "model": MODEL, "instructions": "Be brief.", "input": "x", "max_output_tokens": 100,
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}}],
        "metadata": {"k": "v"},
    });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

#[test]
fn a_response_and_its_events_say_the_same() {
    let server = server(CALL);
    let whole = server.post("/v1/responses", &ask(json!({})));
    assert_eq!(whole.status, 200, "{}", whole.body);
    let whole = whole.json();
    assert_eq!(
        (&whole["object"], &whole["status"]),
        (&json!("response"), &json!("completed"))
    );
    assert_eq!(whole["metadata"], json!({"k": "v"}));
    let output = whole["output"].as_array().unwrap();
    let kinds: Vec<&str> = output
        .iter()
        .map(|item| item["type"].as_str().unwrap())
        .collect();
    assert_eq!(kinds, ["reasoning", "message", "function_call"]);
    assert_eq!(output[0]["content"][0]["text"], "hm");
    assert_eq!(output[1]["content"][0]["text"], "Look: ");
    assert_eq!(
        (&output[2]["name"], &output[2]["arguments"]),
        (&json!("f"), &json!("{\"a\": 1}"))
    );
    assert_eq!(
        whole["usage"]["output_tokens_details"]["reasoning_tokens"],
        2
    );

    let streamed = events(&server.post("/v1/responses", &ask(json!({"stream": true}))));
    assert_eq!(streamed[0]["type"], "response.created");
    let last = streamed.last().unwrap();
    assert_eq!(last["type"], "response.completed");
    let shape = |response: &Value| -> Vec<Value> {
        let items = response["output"].as_array().unwrap().iter();
        items
            .map(|item| {
                json!([
                    item["type"],
                    item["content"],
                    item["name"],
                    item["arguments"]
                ])
            })
            .collect()
    };
    assert_eq!(shape(&last["response"]), shape(&whole));
    let joined = |kind: &str| -> String {
        let deltas = streamed.iter().filter(|event| event["type"] == kind);
        deltas
            .map(|event| event["delta"].as_str().unwrap())
            .collect()
    };
    assert_eq!(joined("response.reasoning_text.delta"), "hm");
    assert_eq!(joined("response.output_text.delta"), "Look: ");
    assert_eq!(
        joined("response.function_call_arguments.delta"),
        "{\"a\": 1}"
    );
    let count = |kind: &str| {
        streamed
            .iter()
            .filter(|event| event["type"] == kind)
            .count()
    };
    assert_eq!(
        (
            count("response.output_item.added"),
            count("response.output_item.done")
        ),
        (3, 3)
    );
}

#[test]
fn a_result_goes_back_and_an_answer_that_is_cut_says_so() {
    let server = server("done and more");
    let input = json!([
        {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "hm", "annotations": []}]},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ]);
    let cut = server
        .post(
            "/v1/responses",
            &ask(json!({"input": input, "max_output_tokens": 7})),
        )
        .json();
    assert_eq!(cut["status"], "incomplete", "{cut}");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    assert_eq!(cut["output"][1]["status"], "incomplete");
    let form = json!({"format": {"type": "json_schema", "name": "n", "strict": true,
        "schema": {"enum": [1, 2]}}});
    let formed = server
        .post("/v1/responses", &ask(json!({"text": form, "tools": []})))
        .json();
    let text = formed["output"][1]["content"][0]["text"].as_str().unwrap();
    assert!(text == "1" || text == "2", "{formed}");
}

#[test]
fn what_is_not_served_is_refused_with_a_way_out() {
    let server = server("x");
    for (more, param) in [
        (
            json!({"previous_response_id": "resp_1"}),
            "previous_response_id",
        ),
        (json!({"store": true}), "store"),
        (json!({"background": true}), "background"),
        (json!({"input": []}), "input"),
        (
            json!({"input": [{"type": "item_reference", "id": "a"}]}),
            "input[0].type",
        ),
        (
            json!({"input": [{"role": "king", "content": "x"}]}),
            "input[0].role",
        ),
        (
            json!({"input": [{"type": "function_call_output", "call_id": "a", "output": "x"}]}),
            "input[0].call_id",
        ),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (
            json!({"tools": [{"type": "function", "name": "a b"}]}),
            "tools[0].name",
        ),
        (
            json!({"text": {"format": {"type": "json_schema", "name": "n"}}}),
            "text.format.schema",
        ),
        (json!({"max_output_tokens": 5000}), "input"),
    ] {
        let answer = server.post("/v1/responses", &ask(more.clone()));
        assert_eq!(answer.status, 400, "{more}: {}", answer.body);
        assert_eq!(
            answer.json()["error"]["param"],
            param,
            "{more}: {}",
            answer.body
        );
    }
    for (method, path, part) in [
        ("POST", "/v1/embeddings", "embedding model"),
        ("GET", "/v1/responses/resp_1", "stores no responses"),
        ("POST", "/v1/audio/speech", "text only"),
        ("POST", "/v1/messages", "/v1/chat/completions"),
    ] {
        let answer = server.send(method, path, &[("x-request-id", "r")], b"{}");
        assert_eq!(answer.status, 404);
        let error = &answer.json()["error"];
        assert_eq!(error["code"], "unsupported_endpoint");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
        assert_eq!(answer.header("x-request-id"), Some("r"));
    }
}
