//! A model's whole text side, from files to deltas.

#![allow(missing_docs, clippy::unwrap_used)]

mod bytes_tokenizer;

use bytes_tokenizer::{files, id, tokenizer_json};
use engine_text::{
    AllowedCalls, ChatMessage, Delta, OutputParser, Role, Text, TextError, ToolCallParser,
    ToolFormat,
};
use proptest::prelude::*;

fn text() -> Text {
    Text::new(files()).unwrap()
}

fn message(role: Role, content: &str) -> ChatMessage {
    ChatMessage::new(role, content)
}

#[test]
fn a_conversation_becomes_a_prompt_that_ends_inside_the_reasoning() {
    let text = text();
    let messages = [
        message(Role::System, "S"),
        message(Role::User, "hé"),
        message(Role::Assistant, "x</think>y"),
        message(Role::User, "z"),
    ];
    let prompt = text
        .render(&messages, &[], true, &serde_json::Map::new())
        .unwrap();
    assert_eq!(
        prompt,
        "<｜begin▁of▁sentence｜>S<｜User｜>hé<｜Assistant｜>y<｜end▁of▁sentence｜><｜User｜>z<｜Assistant｜><think>\n"
    );
    let tokens = text.encode(&prompt, false).unwrap();
    assert_eq!(
        tokens[..2],
        [id("<｜begin▁of▁sentence｜>"), u32::from(b'S')]
    );
    assert_eq!(
        tokens[tokens.len() - 2..],
        [id("<think>"), u32::from(b'\n')]
    );
    assert_eq!(text.eos_tokens(), [id("<｜end▁of▁sentence｜>")]);
}

#[test]
fn a_plain_prompt_gets_its_beginning_once() {
    let text = text();
    let bos = id("<｜begin▁of▁sentence｜>");
    assert_eq!(text.encode("a", true).unwrap(), [bos, 97]);
    assert_eq!(
        text.encode("<｜begin▁of▁sentence｜>a", true).unwrap(),
        [bos, 97]
    );
    assert_eq!(text.encode("a", false).unwrap(), [97]);
}

#[test]
fn the_templates_refusal_reaches_the_caller() {
    let messages = [message(Role::User, "a"), message(Role::Assistant, "b")];
    let error = text()
        .render(&messages, &[], true, &serde_json::Map::new())
        .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("the last message must not be of the assistant"),
        "{error}"
    );
}

#[test]
fn a_tokenizer_that_is_not_byte_level_is_refused_by_name() {
    let mut files = files();
    let mut tokenizer = tokenizer_json();
    tokenizer["decoder"] = serde_json::json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true});
    files.tokenizer = tokenizer.to_string().into_bytes();
    let error = Text::new(files).unwrap_err();
    assert!(
        matches!(&error, TextError::Decoder { found } if found == "Metaspace"),
        "{error}"
    );
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let mut broken = files();
    broken.tokenizer_config = Some("{".to_owned());
    assert!(
        Text::new(broken)
            .unwrap_err()
            .to_string()
            .starts_with("tokenizer_config.json cannot be read")
    );
    let mut broken = files();
    broken.tokenizer = b"{}".to_vec();
    assert!(
        Text::new(broken)
            .unwrap_err()
            .to_string()
            .starts_with("tokenizer.json cannot be read")
    );
}

fn collect(mut parser: OutputParser, tokens: &[u32]) -> (String, String, bool) {
    let (mut reasoning, mut content) = (String::new(), String::new());
    let mut take = |delta: Delta| {
        reasoning.push_str(&delta.reasoning);
        content.push_str(&delta.content);
        delta.stopped
    };
    let mut stopped = false;
    for token in tokens {
        stopped = take(parser.push(*token));
        if stopped {
            break;
        }
    }
    if !stopped {
        take(parser.finish());
    }
    (reasoning, content, stopped)
}

#[test]
fn an_answer_is_split_and_ends_at_its_stop_string() {
    let text = text();
    let mut tokens = text.encode("1+1\n", false).unwrap();
    tokens.push(id("</think>"));
    tokens.extend(text.encode("\n\nit is 2 END more", false).unwrap());
    let parser = text.chat_parser(
        "<｜Assistant｜><think>\n",
        vec![" END".to_owned()],
        AllowedCalls::None,
    );
    assert_eq!(
        collect(parser, &tokens),
        ("1+1".to_owned(), "it is 2".to_owned(), true)
    );
    let plain = text.plain_parser(vec![]);
    assert_eq!(
        collect(plain, &tokens).1,
        "1+1\n</think>\n\nit is 2 END more"
    );
}

#[test]
fn reasoning_comes_before_content_and_calls() {
    let mut text = text();
    assert_eq!(text.tool_format(), None);
    text.set_tool_call_parser(ToolCallParser::Format(ToolFormat::Hermes));
    let mut tokens = text.encode("<tool_call> is a thought", false).unwrap();
    tokens.push(id("</think>"));
    let said = "\n\nSo: <tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}</tool_call>";
    tokens.extend(text.encode(said, false).unwrap());
    let mut parser = text.chat_parser("<think>\n", vec![], AllowedCalls::Many);
    let mut whole = Delta::default();
    for delta in tokens
        .iter()
        .map(|token| parser.push(*token))
        .collect::<Vec<_>>()
    {
        whole.reasoning.push_str(&delta.reasoning);
        whole.content.push_str(&delta.content);
        whole.calls.extend(delta.calls);
    }
    assert!(parser.has_calls());
    assert_eq!(whole.reasoning, "<tool_call> is a thought");
    assert_eq!(whole.content, "So: ");
    assert_eq!(whole.calls[0].name.as_deref(), Some("f"));
    let arguments: String = whole.calls.iter().map(|c| c.arguments.as_str()).collect();
    assert_eq!(arguments, "{\"a\": 1}");
}

#[test]
fn tools_that_the_template_does_not_know_are_described_in_the_system_message() {
    let mut text = text();
    text.set_tool_call_parser(ToolCallParser::Format(ToolFormat::DeepseekV31));
    let tools = [serde_json::json!({"type": "function", "function": {
        "name": "sum", "description": "Adds.", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}})];
    let messages = [message(Role::System, "S"), message(Role::User, "u")];
    let prompt = text
        .render(&messages, &tools, true, &serde_json::Map::new())
        .unwrap();
    let system = prompt.split("<｜User｜>").next().unwrap();
    for part in [
        "S\n\n",
        "sum",
        "Adds.",
        r#"{"type":"object","properties":{"b":{},"a":{}}}"#,
        "<｜tool▁sep｜>",
    ] {
        assert!(system.contains(part), "{part} is missing in {system}");
    }
    let without = text
        .render(&messages[1..], &tools, true, &serde_json::Map::new())
        .unwrap();
    assert!(without.contains("sum"));
}

#[test]
fn special_and_unnamed_tokens_show_nothing() {
    let text = text();
    let tokens = [97, id("<｜end▁of▁sentence｜>"), 90_000, 98];
    assert_eq!(collect(text.plain_parser(vec![]), &tokens).1, "ab");
    assert_eq!(text.decode(&tokens), "ab");
    assert_eq!(
        text.token_bytes(id("<｜end▁of▁sentence｜>")),
        "<｜end▁of▁sentence｜>".as_bytes()
    );
}

proptest! {
    #[test]
    fn no_token_stream_shows_half_a_character(tokens in proptest::collection::vec(0u32..270, 0..60)) {
        let text = text();
        let mut parser = text.plain_parser(vec![]);
        let mut all = String::new();
        for token in &tokens {
            all.push_str(&parser.push(*token).content);
        }
        all.push_str(&parser.finish().content);
        prop_assert_eq!(all, text.decode(&tokens));
    }
}
