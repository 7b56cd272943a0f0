//! `POST /v1/responses`: OpenAI's newer form of a conversation, over the same engine as chat.
//!
//! Nothing is stored, so everything that refers to a stored response is refused. Streamed events and the whole response
//! come from one state, [`ResponseAnswer`], so they cannot disagree.

use std::time::Duration;

use axum::body::Body;
use axum::response::Response;
use engine_text::{ChatMessage, Delta, GenerationDefaults, Role, ToolCall, is_tool_name};
use serde_json::{Map, Value, json};

use crate::chat::ChatRequest;
use crate::error::ApiError;
use crate::fields::{Fields, show, wrong};
use crate::format::Format;
use crate::generation::{Generation, Usage};
use crate::messages::text_of;
use crate::request::{Asked, Unserved, is_empty, refuse_unserved};
use crate::respond::{event_stream, json_response};
use crate::state::{ServerOptions, unix_seconds};
use crate::tools::Tools;

/// A comment is sent after so long without news.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

const UNSERVED: [Unserved; 12] = [
    (
        "cachalot_resume",
        |_| false,
        "send it to POST /v1/chat/completions",
    ),
    (
        "previous_response_id",
        |_| false,
        "this engine stores nothing; send the whole conversation as input",
    ),
    (
        "conversation",
        |_| false,
        "this engine stores nothing; send the whole conversation as input",
    ),
    (
        "store",
        |v| v == &Value::Bool(false),
        "this engine stores nothing; set it to false",
    ),
    (
        "background",
        |v| v == &Value::Bool(false),
        "wait for the answer, or stream it",
    ),
    ("prompt", |_| false, "send the text itself as input"),
    ("include", is_empty, "leave it out"),
    (
        "truncation",
        |v| v == "disabled",
        "shorten the input yourself",
    ),
    (
        "max_tool_calls",
        |_| false,
        "set parallel_tool_calls to false for at most one",
    ),
    (
        "top_logprobs",
        |v| v == 0,
        "use POST /v1/chat/completions for log-probabilities",
    ),
    (
        "reasoning",
        is_empty,
        "leave it out; the model reasons as it was trained to",
    ),
    ("n", |v| v == 1, "send the request several times"),
];

/// Reads a body as a chat, and what its answer repeats of it.
///
/// # Errors
/// Names the first field that is wrong.
pub fn responses_request(
    fields: &Fields,
    options: &ServerOptions,
    defaults: &GenerationDefaults,
    seed: u64,
) -> Result<(ChatRequest, Value), ApiError> {
    refuse_unserved(fields, &UNSERVED)?;
    let mut asked = Asked::parse(fields, defaults, seed)?;
    let most = fields.count("max_output_tokens")?;
    if most == Some(0) {
        return Err(wrong("max_output_tokens", &0.into(), "at least 1"));
    }
    asked.max_tokens = most.map(|count| usize::try_from(count).unwrap_or(usize::MAX));
    let chat_tools = chat_tools(fields)?;
    let tools = Tools::parse(&chat_tools)
        .map_err(|error| error.renamed(".function.", ".").renamed(".function", ""))?;
    let format = match chat_format(fields)? {
        None => None,
        Some(format) => Format::parse(&format).map_err(|error| {
            error
                .renamed("response_format.json_schema", "text.format")
                .renamed("response_format", "text.format")
        })?,
    };
    let or = |name: &str, default: Value| fields.get(name).cloned().unwrap_or(default);
    let echo = json!({
        "instructions": fields.string("instructions")?,
        "max_output_tokens": most,
        "metadata": or("metadata", json!({})),
        "parallel_tool_calls": tools.parallel,
        "temperature": asked.parameters.temperature,
        "text": or("text", json!({"format": {"type": "text"}})),
        "tool_choice": or("tool_choice", "auto".into()),
        "tools": or("tools", json!([])),
        "top_p": asked.parameters.top_p,
        "user": fields.string("user")?,
    });
    let request = ChatRequest {
        asked,
        messages: input(fields, options.messages_max)?,
        variables: fields
            .object("chat_template_kwargs")?
            .cloned()
            .unwrap_or_default(),
        add_generation_prompt: true,
        tools,
        format: format.map(|format| Format {
            field: "text.format",
            ..format
        }),
    };
    Ok((request, echo))
}

/// Tools in the shape of chat: what describes a function goes one level down.
fn chat_tools(fields: &Fields) -> Result<Fields, ApiError> {
    let mut chat = Map::new();
    if let Some(list) = fields.list("tools")? {
        let tools = list
            .iter()
            .map(|tool| json!({"type": tool["type"], "function": tool}));
        chat.insert("tools".into(), tools.collect());
    }
    if let Some(choice) = fields.get("tool_choice") {
        let choice = match choice["type"] == "function" {
            true => json!({"type": "function", "function": {"name": choice["name"]}}),
            false => choice.clone(),
        };
        chat.insert("tool_choice".into(), choice);
    }
    if let Some(parallel) = fields.get("parallel_tool_calls") {
        chat.insert("parallel_tool_calls".into(), parallel.clone());
    }
    Ok(Fields::from(chat))
}

/// `text.format` in the shape of chat's `response_format`.
fn chat_format(fields: &Fields) -> Result<Option<Fields>, ApiError> {
    let Some(text) = fields.object("text")? else {
        return Ok(None);
    };
    let Some(format) = text.get("format").filter(|format| !format.is_null()) else {
        return Ok(None);
    };
    let format = match format["type"] == "json_schema" {
        true => json!({"type": "json_schema", "json_schema": format}),
        false => format.clone(),
    };
    let mut chat = Map::new();
    chat.insert("response_format".into(), format);
    Ok(Some(Fields::from(chat)))
}

/// Instructions and input as a conversation.
fn input(fields: &Fields, limit: usize) -> Result<Vec<ChatMessage>, ApiError> {
    let mut messages = Vec::new();
    if let Some(instructions) = fields.string("instructions")? {
        messages.push(ChatMessage::new(Role::System, instructions));
    }
    match fields.get("input") {
        Some(Value::String(text)) => messages.push(ChatMessage::new(Role::User, text.clone())),
        Some(Value::Array(items)) if (1..=limit).contains(&items.len()) => {
            for (index, item) in items.iter().enumerate() {
                take_item(item, &format!("input[{index}]"), &mut messages)?;
            }
        }
        Some(Value::Array(items)) => {
            let message = format!(
                "input has {} items, but must have 1 to {limit}",
                items.len()
            );
            return Err(ApiError::invalid("input", message));
        }
        Some(other) => return Err(wrong("input", other, "a string or a list of items")),
        None => {
            let message = "input is missing; send a string or a list of items";
            return Err(ApiError::invalid("input", message));
        }
    }
    Ok(messages)
}

fn take_item(item: &Value, name: &str, messages: &mut Vec<ChatMessage>) -> Result<(), ApiError> {
    let string = |key: &str| match item[key].as_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(wrong(&format!("{name}.{key}"), &item[key], "a string")),
    };
    match item["type"].as_str() {
        None | Some("message") => {
            let role = match item["role"].as_str() {
                Some("system" | "developer") => Role::System,
                Some("user") => Role::User,
                Some("assistant") => Role::Assistant,
                _ => {
                    let expected = "one of system, developer, user, assistant";
                    return Err(wrong(&format!("{name}.role"), &item["role"], expected));
                }
            };
            let content = text_of(&item["content"], &format!("{name}.content"))?;
            messages.push(ChatMessage::new(role, content));
        }
        Some("function_call") => {
            let called = string("name")?;
            if !is_tool_name(&called) {
                return Err(wrong(
                    &format!("{name}.name"),
                    &item["name"],
                    "the name of a function",
                ));
            }
            let call = ToolCall {
                id: string("call_id")?,
                name: called,
                arguments: string("arguments")?,
            };
            match messages
                .last_mut()
                .filter(|last| last.role == Role::Assistant)
            {
                Some(last) => {
                    last.content = last.content.take().filter(|text| !text.is_empty());
                    last.tool_calls.push(call);
                }
                None => messages.push(ChatMessage {
                    role: Role::Assistant,
                    content: None,
                    tool_calls: vec![call],
                    tool_call_id: None,
                }),
            }
        }
        Some("function_call_output") => {
            let id = string("call_id")?;
            let mut calls = messages.iter().flat_map(|message| &message.tool_calls);
            if !calls.any(|call| call.id == id) {
                let expected = "the call_id of a function_call before it";
                return Err(wrong(
                    &format!("{name}.call_id"),
                    &item["call_id"],
                    expected,
                ));
            }
            let content = text_of(&item["output"], &format!("{name}.output"))?;
            messages.push(ChatMessage {
                tool_call_id: Some(id),
                ..ChatMessage::new(Role::Tool, content)
            });
        }
        // Templates drop the reasoning of earlier turns.
        Some("reasoning") => {}
        Some(other) => {
            let message = format!(
                "{name}.type is {}, but this engine takes message, function_call, function_call_output and reasoning",
                show(&other.into())
            );
            return Err(ApiError::unsupported(format!("{name}.type"), message));
        }
    }
    Ok(())
}

#[derive(Debug)]
enum Item {
    Reasoning(String),
    Message(String),
    Call { name: String, arguments: String },
}

/// A response that is being made.
#[derive(Debug)]
pub struct ResponseAnswer {
    id: String,
    created_unix_seconds: u64,
    model_name: String,
    /// Random; part of the ids of items.
    seed: u64,
    echo: Value,
    items: Vec<Item>,
    /// Whether the last item may grow.
    is_open: bool,
    sequence_number: u64,
}

impl ResponseAnswer {
    /// An empty answer to a request that goes by `name`.
    pub fn new(name: &str, seed: u64, echo: Value, model_name: &str) -> Self {
        Self {
            id: format!("resp_{name}"),
            created_unix_seconds: unix_seconds(),
            model_name: model_name.to_owned(),
            seed,
            echo,
            items: Vec::new(),
            is_open: false,
            sequence_number: 0,
        }
    }

    fn item_id(&self, index: usize) -> String {
        let prefix = match self.items[index] {
            Item::Reasoning(_) => "rs",
            Item::Message(_) => "msg",
            Item::Call { .. } => "fc",
        };
        format!("{prefix}_{:016x}{index:04x}", self.seed)
    }

    fn part(item: &Item) -> Value {
        match item {
            Item::Reasoning(text) => json!({"type": "reasoning_text", "text": text}),
            Item::Message(text) => {
                json!({"type": "output_text", "text": text, "annotations": [], "logprobs": []})
            }
            Item::Call { .. } => Value::Null,
        }
    }

    fn item(&self, index: usize, status: &str, is_new: bool) -> Value {
        let item = &self.items[index];
        let parts = match is_new {
            true => json!([]),
            false => json!([Self::part(item)]),
        };
        let id = self.item_id(index);
        match item {
            Item::Reasoning(_) => {
                json!({"id": id, "type": "reasoning", "summary": [], "content": parts, "status": status})
            }
            Item::Message(_) => {
                json!({"id": id, "type": "message", "role": "assistant", "status": status, "content": parts})
            }
            Item::Call { name, arguments } => {
                json!({"id": id, "type": "function_call", "call_id": format!("call_{:016x}{index:04x}", self.seed),
                    "name": name, "arguments": arguments, "status": status})
            }
        }
    }

    /// The response; `finish` is the engine's word for how it ended, absent while it goes on.
    fn response(
        &self,
        status: &str,
        finish: Option<&str>,
        usage: Option<Usage>,
        error: Value,
    ) -> Value {
        let last = self.items.len().saturating_sub(1);
        let output: Vec<Value> = (0..self.items.len())
            .map(|index| {
                let is_cut = finish == Some("length") && index == last;
                self.item(
                    index,
                    if is_cut { "incomplete" } else { "completed" },
                    false,
                )
            })
            .collect();
        let incomplete = (finish == Some("length")).then(|| json!({"reason": "max_output_tokens"}));
        let mut response = json!({
            "id": self.id,
            "object": "response",
            "created_at": self.created_unix_seconds,
            "status": status,
            "background": false,
            "error": error,
            "incomplete_details": incomplete,
            "model": self.model_name,
            "output": output,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "truncation": "disabled",
            "usage": usage.map(|usage| json!({
                "input_tokens": usage.prompt,
                "input_tokens_details": {"cached_tokens": usage.cached},
                "output_tokens": usage.completion,
                "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                "total_tokens": usage.prompt + usage.completion,
            })),
        });
        if let (Value::Object(response), Value::Object(echo)) = (&mut response, &self.echo) {
            response.extend(echo.clone());
        }
        response
    }

    fn event(&mut self, kind: &str, mut value: Value) -> String {
        value["type"] = kind.into();
        value["sequence_number"] = self.sequence_number.into();
        self.sequence_number += 1;
        format!("event: {kind}\ndata: {value}\n\n")
    }

    /// An event about the last item.
    fn item_event(&mut self, kind: &str, mut value: Value) -> String {
        let index = self.items.len() - 1;
        value["output_index"] = index.into();
        value["item_id"] = self.item_id(index).into();
        self.event(kind, value)
    }

    fn begin(&mut self) -> String {
        let response = self.response("in_progress", None, None, Value::Null);
        let created = self.event("response.created", json!({"response": response}));
        created + &self.event("response.in_progress", json!({"response": response}))
    }

    fn open(&mut self, item: Item) -> String {
        let mut events = self.close();
        self.items.push(item);
        self.is_open = true;
        let index = self.items.len() - 1;
        let item = self.item(index, "in_progress", true);
        events += &self.event(
            "response.output_item.added",
            json!({"output_index": index, "item": item}),
        );
        let part = Self::part(&self.items[index]);
        if !part.is_null() {
            events += &self.item_event(
                "response.content_part.added",
                json!({"content_index": 0, "part": part}),
            );
        }
        events
    }

    fn close(&mut self) -> String {
        if !std::mem::take(&mut self.is_open) {
            return String::new();
        }
        let index = self.items.len() - 1;
        let part = Self::part(&self.items[index]);
        let mut events = match &self.items[index] {
            Item::Reasoning(text) => {
                let done = json!({"content_index": 0, "text": text});
                self.item_event("response.reasoning_text.done", done)
            }
            Item::Message(text) => {
                let done = json!({"content_index": 0, "text": text, "logprobs": []});
                self.item_event("response.output_text.done", done)
            }
            Item::Call { name, arguments } => {
                let done = json!({"name": name, "arguments": arguments});
                self.item_event("response.function_call_arguments.done", done)
            }
        };
        if !part.is_null() {
            events += &self.item_event(
                "response.content_part.done",
                json!({"content_index": 0, "part": part}),
            );
        }
        let item = self.item(index, "completed", false);
        events
            + &self.event(
                "response.output_item.done",
                json!({"output_index": index, "item": item}),
            )
    }

    /// Takes what is new; gives the events that say so.
    fn push(&mut self, delta: Delta) -> String {
        let mut events = String::new();
        if !delta.reasoning.is_empty() {
            if !self.is_open || !matches!(self.items.last(), Some(Item::Reasoning(_))) {
                events += &self.open(Item::Reasoning(String::new()));
            }
            if let Some(Item::Reasoning(text)) = self.items.last_mut() {
                text.push_str(&delta.reasoning);
            }
            let news = json!({"content_index": 0, "delta": delta.reasoning});
            events += &self.item_event("response.reasoning_text.delta", news);
        }
        if !delta.content.is_empty() {
            if !self.is_open || !matches!(self.items.last(), Some(Item::Message(_))) {
                events += &self.open(Item::Message(String::new()));
            }
            if let Some(Item::Message(text)) = self.items.last_mut() {
                text.push_str(&delta.content);
            }
            let news = json!({"content_index": 0, "delta": delta.content, "logprobs": []});
            events += &self.item_event("response.output_text.delta", news);
        }
        for call in delta.calls {
            if let Some(name) = call.name {
                let arguments = String::new();
                events += &self.open(Item::Call { name, arguments });
            }
            if let Some(Item::Call { arguments, .. }) = self.items.last_mut()
                && !call.arguments.is_empty()
            {
                arguments.push_str(&call.arguments);
                let news = json!({"delta": call.arguments});
                events += &self.item_event("response.function_call_arguments.delta", news);
            }
        }
        events
    }

    /// The response at its end.
    fn end(&self, finish: Option<&str>, usage: Usage) -> (&'static str, Value) {
        let status = match finish {
            Some("length") => "incomplete",
            _ => "completed",
        };
        (
            status,
            self.response(status, finish, Some(usage), Value::Null),
        )
    }

    /// Waits for the whole answer.
    ///
    /// # Errors
    /// The engine failed, or had to end before the answer did.
    pub async fn whole(mut self, mut generation: Generation) -> Result<Response, ApiError> {
        let mut finish = None;
        let mut deltas = Vec::new();
        while let Some(update) = generation.next().await {
            let update = update?;
            finish = update.finish.or(finish);
            if update.restarted {
                deltas.clear();
            }
            deltas.push(update.delta);
        }
        for delta in deltas {
            self.push(delta);
        }
        Ok(json_response(&self.end(finish, generation.usage()).1))
    }

    /// Sends the answer as it comes. Dropping the body ends the generation.
    pub fn stream(self, generation: Generation) -> Response {
        let state = Some((self, generation, None::<&'static str>, true));
        let body = futures::stream::unfold(state, |state| async move {
            let (mut answer, mut generation, mut finish, is_first) = state?;
            if is_first {
                let events = answer.begin();
                let next = Some((answer, generation, finish, false));
                return Some((Ok::<_, std::convert::Infallible>(events), next));
            }
            let (events, is_last) = match tokio::time::timeout(KEEP_ALIVE, generation.next()).await
            {
                Err(_) => (": still working\n\n".to_owned(), false),
                Ok(Some(Ok(update))) => {
                    finish = update.finish.or(finish);
                    (answer.push(update.delta), false)
                }
                Ok(Some(Err(error))) => {
                    let usage = Some(generation.usage());
                    let error =
                        json!({"code": error.code.unwrap_or(error.kind), "message": error.message});
                    let response = answer.response("failed", None, usage, error);
                    let failed = answer.event("response.failed", json!({"response": response}));
                    (failed, true)
                }
                Ok(None) => {
                    let events = answer.close();
                    let (status, response) = answer.end(finish, generation.usage());
                    let end =
                        answer.event(&format!("response.{status}"), json!({"response": response}));
                    (events + &end, true)
                }
            };
            let next = (!is_last).then_some((answer, generation, finish, false));
            Some((Ok(events), next))
        });
        event_stream(Body::from_stream(body))
    }
}
