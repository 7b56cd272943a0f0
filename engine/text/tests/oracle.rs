//! Our parsers against vLLM's, by what those made of the same answers (see `oracle/make_oracle.py`).
//!
//! Where we differ on purpose the case is listed with its reason, and the test fails when the difference is gone.

#![allow(missing_docs, clippy::unwrap_used)]

use engine_text::{CallDelta, ReasoningParser, ToolFormat, ToolParser};
use serde::Deserialize;
use serde_json::Value;

#[derive(Deserialize)]
struct Oracle {
    calls: Vec<Case>,
    reasoning: Vec<Thought>,
}

#[derive(Deserialize)]
struct Case {
    format: String,
    name: String,
    text: String,
    content: String,
    calls: Vec<(String, String)>,
}

#[derive(Deserialize)]
struct Thought {
    name: String,
    text: String,
    reasoning: String,
    content: String,
}

/// Format or `*`, case, and why we differ.
const DELIBERATE: &[(&str, &str, &str)] = &[
    (
        "deepseek_v3",
        "one lines",
        "vLLM's expression ends at a line break; arguments over several lines are a call",
    ),
    ("deepseek_v31", "one lines", "as above"),
    ("deepseek_v3", "extra line breaks", "as above"),
    (
        "deepseek_v3",
        "text after",
        "vLLM drops it; what a model says after its calls is content",
    ),
    ("deepseek_v31", "text after", "as above"),
    ("hermes", "text after", "as above"),
    ("hermes", "text between", "as above"),
    ("llama3_json", "text after", "as above"),
    (
        "deepseek_v3",
        "no begin of calls",
        "a whole call is a call, with or without the tag around all of them",
    ),
    ("deepseek_v31", "no begin of calls", "as above"),
    (
        "deepseek_v3",
        "begin alone",
        "no call came, so nothing of the answer is taken away",
    ),
    ("deepseek_v31", "begin alone", "as above"),
    ("deepseek_v3", "no call inside", "as above"),
    ("deepseek_v31", "no call inside", "as above"),
    (
        "deepseek_v3",
        "missing name",
        "vLLM calls a function without a name, which no client has",
    ),
    ("deepseek_v31", "missing name", "as above"),
    (
        "deepseek_v3",
        "unfinished",
        "arguments are streamed, so a call that max_tokens cut off is one in either form",
    ),
    ("deepseek_v31", "unfinished", "as above"),
    ("hermes", "unfinished", "as above"),
    ("llama3_json", "unfinished", "as above"),
    (
        "hermes",
        "no arguments",
        "a function without parameters is called without arguments",
    ),
    ("llama3_json", "no parameters", "as above"),
    (
        "hermes",
        "arguments as text",
        "OpenAI's own form of arguments; quoting it twice is of use to nobody",
    ),
    (
        "llama3_json",
        "text before",
        "JSON in the middle of an answer is content: a stream cannot take back what it said",
    ),
];

const DELIBERATE_REASONING: &[(&str, &str)] = &[(
    "tag opens again",
    "vLLM forgets everything before the last <think>; reasoning ends once",
)];

fn oracle() -> Oracle {
    serde_json::from_str(include_str!("oracle/vllm.json")).unwrap()
}

fn ours(format: ToolFormat, text: &str) -> (String, Vec<(String, String)>) {
    let mut parser = ToolParser::new(format, true);
    let (mut content, mut deltas) = (String::new(), Vec::<CallDelta>::new());
    parser.push(text, &mut content, &mut deltas);
    parser.finish(&mut content, &mut deltas);
    let mut calls: Vec<(String, String)> = Vec::new();
    for delta in deltas {
        if let Some(name) = delta.name {
            calls.push((name, String::new()));
        }
        calls[delta.index].1.push_str(&delta.arguments);
    }
    (content, calls)
}

/// Arguments as a program sees them: vLLM writes some anew, we hand out the model's own text.
fn meaning(calls: &[(String, String)]) -> Vec<(&str, Value)> {
    calls
        .iter()
        .map(|(name, arguments)| {
            let text = Value::String(arguments.clone());
            (
                name.as_str(),
                serde_json::from_str(arguments).unwrap_or(text),
            )
        })
        .collect()
}

#[test]
fn tool_calls_are_those_that_vllm_finds() {
    let oracle = oracle();
    let mut wrong = Vec::new();
    for format in ["deepseek_v3", "deepseek_v31", "hermes", "llama3_json"] {
        let count = oracle
            .calls
            .iter()
            .filter(|case| case.format == format)
            .count();
        assert!(count >= 30, "{format} has {count} cases");
    }
    for case in &oracle.calls {
        let format = match case.format.as_str() {
            "deepseek_v3" => ToolFormat::DeepseekV3,
            "deepseek_v31" => ToolFormat::DeepseekV31,
            "hermes" => ToolFormat::Hermes,
            _ => ToolFormat::Llama3Json,
        };
        let (content, calls) = ours(format, &case.text);
        let agree = content == case.content && meaning(&calls) == meaning(&case.calls);
        let deliberate = DELIBERATE
            .iter()
            .any(|(f, name, _)| (*f == "*" || *f == case.format) && *name == case.name);
        if agree == deliberate {
            wrong.push(format!(
                "{} / {}: {:?}\n  ours {content:?} {calls:?}\n  vLLM {:?} {:?}",
                case.format, case.name, case.text, case.content, case.calls
            ));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {}:\n{}",
        wrong.len(),
        oracle.calls.len(),
        wrong.join("\n")
    );
}

#[test]
fn reasoning_is_what_vllm_finds() {
    let mut wrong = Vec::new();
    for case in oracle().reasoning {
        // vLLM's parser assumes a prompt that ended inside the reasoning; a model that writes the tag again is told by it.
        let inside = !case.text.starts_with("<think>");
        let mut parser = ReasoningParser::new(inside);
        let (mut reasoning, mut content) = (String::new(), String::new());
        parser.push(&case.text, &mut reasoning, &mut content);
        parser.finish(&mut reasoning, &mut content);
        // We drop the line breaks that belong to the format; vLLM leaves that to whoever shows the text.
        let trim = |text: &str| text.trim_matches('\n').to_owned();
        let agree = trim(&case.reasoning) == reasoning && trim(&case.content) == trim(&content);
        let deliberate = DELIBERATE_REASONING
            .iter()
            .any(|(name, _)| *name == case.name);
        if agree == deliberate {
            wrong.push(format!(
                "{}: {:?}\n  ours {reasoning:?} {content:?}\n  vLLM {:?} {:?}",
                case.name, case.text, case.reasoning, case.content
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
