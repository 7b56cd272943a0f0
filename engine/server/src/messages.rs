//! The conversation of a request: OpenAI's messages to what chat templates take.

use std::collections::BTreeSet;

use engine_text::{ChatMessage, Role, ToolCall, is_tool_name};
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, wrong};

/// Calls that one message may hold.
const CALLS_MAX: usize = 128;

/// The conversation of a body.
pub fn messages(fields: &Fields, limit: usize) -> Result<Vec<ChatMessage>, ApiError> {
    let list = fields.list("messages")?.ok_or_else(|| {
        ApiError::invalid(
            "messages",
            "messages is missing; send a list with at least one message",
        )
    })?;
    if list.is_empty() || list.len() > limit {
        let message = format!(
            "messages has {} entries, but must have 1 to {limit}",
            list.len()
        );
        return Err(ApiError::invalid("messages", message));
    }
    let mut calls = BTreeSet::new();
    list.iter()
        .enumerate()
        .map(|(index, value)| message(value, &format!("messages[{index}]"), &mut calls))
        .collect()
}

/// One message; `calls` holds the ids of the calls before it.
fn message(
    value: &Value,
    name: &str,
    calls: &mut BTreeSet<String>,
) -> Result<ChatMessage, ApiError> {
    let object = value
        .as_object()
        .ok_or_else(|| wrong(name, value, "an object with role and content"))?;
    let field = |key: &str| object.get(key).unwrap_or(&Value::Null);
    let role_name = format!("{name}.role");
    let role = match field("role").as_str() {
        // OpenAI's newer name for the same thing.
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool") => Role::Tool,
        Some("function") => {
            let message = format!(
                "{role_name} is \"function\", but this engine takes results of tools only; use the role tool with tool_call_id"
            );
            return Err(ApiError::unsupported(role_name, message));
        }
        _ => {
            let expected = "one of system, developer, user, assistant, tool";
            return Err(wrong(&role_name, field("role"), expected));
        }
    };
    let mut message = ChatMessage {
        role,
        content: None,
        tool_calls: tool_calls(field("tool_calls"), role, &format!("{name}.tool_calls"))?,
        tool_call_id: None,
    };
    calls.extend(message.tool_calls.iter().map(|call| call.id.clone()));
    if role == Role::Tool {
        let id = field("tool_call_id");
        let known = id.as_str().filter(|id| calls.contains(*id));
        let expected = "the id of a call in an earlier message of the assistant";
        message.tool_call_id = Some(
            known
                .ok_or_else(|| wrong(&format!("{name}.tool_call_id"), id, expected))?
                .to_owned(),
        );
    }
    let content = field("content");
    // A turn that only calls has no content; clients write null, an empty string or nothing.
    let is_absent = content.is_null() || content == "";
    if message.tool_calls.is_empty() || !is_absent {
        message.content = Some(text_of(content, &format!("{name}.content"))?);
    }
    Ok(message)
}

/// The calls of an earlier answer.
fn tool_calls(value: &Value, role: Role, name: &str) -> Result<Vec<ToolCall>, ApiError> {
    let list = match value {
        Value::Null => return Ok(Vec::new()),
        Value::Array(list) if list.is_empty() => return Ok(Vec::new()),
        Value::Array(list) if role == Role::Assistant && list.len() <= CALLS_MAX => list,
        other => {
            let expected =
                format!("a list of at most {CALLS_MAX} calls in a message of the assistant");
            return Err(wrong(name, other, &expected));
        }
    };
    list.iter()
        .enumerate()
        .map(|(index, call)| tool_call(call, &format!("{name}[{index}]")))
        .collect()
}

fn tool_call(call: &Value, name: &str) -> Result<ToolCall, ApiError> {
    if call["type"] != "function" && !call["type"].is_null() {
        return Err(wrong(
            &format!("{name}.type"),
            &call["type"],
            "\"function\"",
        ));
    }
    let string = |path: &str, value: &Value| match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong(&format!("{name}.{path}"), value, "a string")),
    };
    let function = &call["function"];
    let called = string("function.name", &function["name"])?;
    if !is_tool_name(&called) {
        let expected = "the name of a function: letters, digits, underscores, dashes or dots";
        return Err(wrong(
            &format!("{name}.function.name"),
            &function["name"],
            expected,
        ));
    }
    Ok(ToolCall {
        id: string("id", &call["id"])?,
        name: called,
        arguments: string("function.arguments", &function["arguments"])?,
    })
}

/// A string, or a list of text parts.
pub fn text_of(content: &Value, name: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                let name = format!("{name}[{index}]");
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text" | "input_text" | "output_text"), Some(part)) => {
                        text.push_str(part)
                    }
                    (Some(kind), _) if !kind.ends_with("text") => {
                        let message = format!(
                            "{name}.type is \"{kind}\", but this engine reads text only; leave it out"
                        );
                        return Err(ApiError::unsupported(format!("{name}.type"), message));
                    }
                    _ => return Err(wrong(&name, part, "an object with type \"text\" and text")),
                }
            }
            Ok(text)
        }
        other => Err(wrong(name, other, "a string or a list of text parts")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(list: Value) -> Result<Vec<ChatMessage>, ApiError> {
        let body = json!({"messages": list}).to_string();
        messages(&Fields::parse(body.as_bytes()).unwrap(), 16)
    }

    fn call(id: &str) -> Value {
        json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}})
    }

    #[test]
    fn calls_and_their_results_are_read() {
        let read = parse(json!([
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": null, "tool_calls": [call("a"), call("b")]},
            {"role": "tool", "tool_call_id": "b", "content": [{"type": "text", "text": "r"}]},
            {"role": "assistant", "content": "done", "tool_calls": []},
        ]))
        .unwrap();
        assert_eq!(
            (read[1].content.clone(), read[1].tool_calls.len()),
            (None, 2)
        );
        assert_eq!(read[2].tool_call_id.as_deref(), Some("b"));
        assert_eq!(read[2].content.as_deref(), Some("r"));
        assert_eq!(read[3], ChatMessage::new(Role::Assistant, "done"));
    }

    #[test]
    fn what_is_wrong_with_a_call_is_named() {
        let assistant = |call: Value| json!([{"role": "assistant", "tool_calls": [call]}]);
        let without = |path: &str| {
            let mut call = call("a");
            *call.pointer_mut(path).unwrap() = json!(7);
            call
        };
        for (list, param) in [
            (assistant(without("/id")), "messages[0].tool_calls[0].id"),
            (
                assistant(without("/type")),
                "messages[0].tool_calls[0].type",
            ),
            (
                assistant(without("/function/name")),
                "messages[0].tool_calls[0].function.name",
            ),
            (
                assistant(without("/function/arguments")),
                "messages[0].tool_calls[0].function.arguments",
            ),
            (
                json!([{"role": "assistant", "tool_calls": vec![call("a"); 129]}]),
                "messages[0].tool_calls",
            ),
            (
                json!([{"role": "user", "content": "x", "tool_calls": [call("a")]}]),
                "messages[0].tool_calls",
            ),
            (
                json!([{"role": "tool", "tool_call_id": "a", "content": "x"}]),
                "messages[0].tool_call_id",
            ),
            (
                json!([{"role": "assistant", "content": null}]),
                "messages[0].content",
            ),
        ] {
            assert_eq!(
                parse(list.clone()).unwrap_err().param.as_deref(),
                Some(param),
                "{list}"
            );
        }
    }
}
