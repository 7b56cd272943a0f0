//! Updates of a generation to OpenAI's JSON, whole or as server-sent events.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::http::HeaderValue;
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use engine_core::{Logprobs, TokenId};
use engine_text::{CallDelta, Text};
use serde_json::{Map, Value, json};

use crate::error::ApiError;
use crate::generation::{Generation, Update, Usage};
use crate::state::Model;

/// A comment is sent after so long without news, so that no proxy thinks the stream is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Which of the two routes is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    Chat,
    Completion,
}

/// What all JSON of one response has in common.
#[derive(Debug)]
pub struct Envelope {
    pub route: Route,
    pub id: String,
    pub created_unix_seconds: u64,
    pub model_name: String,
    pub model: Arc<Model>,
    /// Whether log-probabilities were asked for.
    pub logprobs: bool,
    /// Characters so far of each choice, for the older log-probability format.
    pub offsets: Vec<usize>,
    /// Random; part of the ids of calls, which must differ between answers.
    pub call_seed: u64,
}

/// What one choice has become.
#[derive(Debug, Default)]
struct Whole {
    content: String,
    reasoning: String,
    /// Name and arguments.
    calls: Vec<(String, String)>,
    logprobs: Vec<(TokenId, Logprobs)>,
    finish: Option<&'static str>,
}

impl Envelope {
    fn object(&self, chunk: bool) -> &'static str {
        match (self.route, chunk) {
            (Route::Chat, true) => "chat.completion.chunk",
            (Route::Chat, false) => "chat.completion",
            (Route::Completion, _) => "text_completion",
        }
    }

    fn wrap(
        &self,
        chunk: bool,
        choices: Vec<Value>,
        usage: Option<Value>,
        generation: &Generation,
    ) -> Value {
        let mut value = json!({
            "id": self.id,
            "object": self.object(chunk),
            "created": self.created_unix_seconds,
            "model": self.model_name,
            "system_fingerprint": generation.fingerprint(),
            "choices": choices,
        });
        if let Some(usage) = usage {
            value["usage"] = usage;
        }
        value
    }

    /// The first event of a choice in a chat: who speaks.
    fn opening(&self, choice: usize) -> Value {
        json!({
            "index": choice,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": null,
            "finish_reason": null,
        })
    }

    fn chunk(&mut self, update: Update) -> Value {
        let logprobs = self.logprobs_json(update.choice, &update.logprobs);
        match self.route {
            Route::Completion => json!({
                "index": update.choice,
                "text": update.delta.content,
                "logprobs": logprobs,
                "finish_reason": update.finish,
            }),
            Route::Chat => {
                let mut delta = Map::new();
                if !update.delta.reasoning.is_empty() {
                    delta.insert("reasoning_content".into(), update.delta.reasoning.into());
                }
                if !update.delta.content.is_empty() {
                    delta.insert("content".into(), update.delta.content.into());
                }
                if !update.delta.calls.is_empty() {
                    let calls = update.delta.calls.iter();
                    let calls = calls.map(|call| self.call_delta(update.choice, call));
                    delta.insert("tool_calls".into(), calls.collect());
                }
                json!({
                    "index": update.choice,
                    "delta": delta,
                    "logprobs": logprobs,
                    "finish_reason": update.finish,
                })
            }
        }
    }

    fn whole(&mut self, index: usize, whole: Whole) -> Value {
        let logprobs = self.logprobs_json(index, &whole.logprobs);
        match self.route {
            Route::Completion => json!({
                "index": index,
                "text": whole.content,
                "logprobs": logprobs,
                "finish_reason": whole.finish,
            }),
            Route::Chat => {
                let reasoning = (!whole.reasoning.is_empty()).then_some(whole.reasoning);
                let only_calls = whole.content.is_empty() && !whole.calls.is_empty();
                let mut message = json!({
                    "role": "assistant",
                    "content": (!only_calls).then_some(whole.content),
                    "reasoning_content": reasoning,
                    "refusal": null,
                });
                if !whole.calls.is_empty() {
                    let calls = whole.calls.iter().enumerate();
                    message["tool_calls"] = calls
                        .map(|(call, (name, arguments))| {
                            json!({"id": self.call_id(index, call), "type": "function",
                                "function": {"name": name, "arguments": arguments}})
                        })
                        .collect();
                }
                json!({
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": whole.finish,
                })
            }
        }
    }

    fn call_id(&self, choice: usize, call: usize) -> String {
        format!("call_{:016x}{choice:04x}{call:04x}", self.call_seed)
    }

    /// The id, the type and the name come once, with the first piece of a call.
    fn call_delta(&self, choice: usize, call: &CallDelta) -> Value {
        match &call.name {
            Some(name) => json!({
                "index": call.index,
                "id": self.call_id(choice, call.index),
                "type": "function",
                "function": {"name": name, "arguments": call.arguments},
            }),
            None => json!({"index": call.index, "function": {"arguments": call.arguments}}),
        }
    }

    fn logprobs_json(&mut self, choice: usize, entries: &[(TokenId, Logprobs)]) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let text = &self.model.text;
        match self.route {
            Route::Chat => json!({
                "content": entries.iter().map(|(token, logprobs)| {
                    let mut entry = token_json(text, *token, logprobs.chosen);
                    entry["top_logprobs"] = logprobs.top.iter()
                        .map(|(token, logprob)| token_json(text, *token, *logprob))
                        .collect();
                    entry
                }).collect::<Vec<_>>(),
                "refusal": null,
            }),
            Route::Completion => {
                let mut offsets = Vec::new();
                let mut tokens = Vec::new();
                for (token, _) in entries {
                    let shown = token_text(text, *token);
                    offsets.push(self.offsets[choice]);
                    self.offsets[choice] += shown.chars().count();
                    tokens.push(shown);
                }
                json!({
                    "tokens": tokens,
                    "token_logprobs": entries.iter().map(|(_, l)| l.chosen).collect::<Vec<_>>(),
                    "top_logprobs": entries.iter().map(|(_, logprobs)| {
                        logprobs.top.iter()
                            .map(|(token, logprob)| (token_text(text, *token), json!(logprob)))
                            .collect::<Map<String, Value>>()
                    }).collect::<Vec<_>>(),
                    "text_offset": offsets,
                })
            }
        }
    }
}

fn token_text(text: &Text, token: TokenId) -> String {
    String::from_utf8_lossy(&text.token_bytes(token.0)).into_owned()
}

fn token_json(text: &Text, token: TokenId, logprob: f32) -> Value {
    let bytes = text.token_bytes(token.0);
    json!({"token": String::from_utf8_lossy(&bytes), "logprob": logprob, "bytes": bytes})
}

fn usage_json(usage: Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning},
    })
}

/// JSON as a response.
pub fn json_response(value: &Value) -> Response {
    let json = HeaderValue::from_static("application/json");
    ([(CONTENT_TYPE, json)], value.to_string()).into_response()
}

/// Waits for the whole answer.
///
/// # Errors
/// The backend failed, or the drain ran out of time.
pub async fn whole(
    mut generation: Generation,
    mut envelope: Envelope,
) -> Result<Response, ApiError> {
    let mut choices: Vec<Whole> = (0..generation.choices())
        .map(|_| Whole::default())
        .collect();
    while let Some(update) = generation.next().await {
        let update = update?;
        let choice = &mut choices[update.choice];
        if update.restarted {
            *choice = Whole::default();
            envelope.offsets[update.choice] = 0;
        }
        choice.content.push_str(&update.delta.content);
        choice.reasoning.push_str(&update.delta.reasoning);
        for call in update.delta.calls {
            if let Some(name) = call.name {
                choice.calls.push((name, String::new()));
            }
            if let Some((_, arguments)) = choice.calls.get_mut(call.index) {
                arguments.push_str(&call.arguments);
            }
        }
        choice.logprobs.extend(update.logprobs);
        choice.finish = update.finish.or(choice.finish);
    }
    let choices = choices
        .into_iter()
        .enumerate()
        .map(|(index, whole)| envelope.whole(index, whole))
        .collect();
    let usage = usage_json(generation.usage());
    Ok(json_response(&envelope.wrap(
        false,
        choices,
        Some(usage),
        &generation,
    )))
}

enum Next {
    Opening(usize),
    News,
    Usage,
    Done,
    End,
}

struct Events {
    generation: Generation,
    envelope: Envelope,
    include_usage: bool,
    next: Next,
}

impl Events {
    /// The next event in its wire form.
    async fn next(&mut self) -> Option<String> {
        match self.next {
            Next::Opening(choice) => {
                self.next = match choice + 1 < self.generation.choices() {
                    true => Next::Opening(choice + 1),
                    false => Next::News,
                };
                let opening = self.envelope.opening(choice);
                Some(self.data(vec![opening]))
            }
            Next::News => self.news().await,
            Next::Usage => {
                self.next = Next::Done;
                let usage = usage_json(self.generation.usage());
                let last = self
                    .envelope
                    .wrap(true, Vec::new(), Some(usage), &self.generation);
                Some(event(&last))
            }
            Next::Done => {
                self.next = Next::End;
                Some("data: [DONE]\n\n".to_owned())
            }
            Next::End => None,
        }
    }

    async fn news(&mut self) -> Option<String> {
        match tokio::time::timeout(KEEP_ALIVE, self.generation.next()).await {
            Err(_) => Some(": still working\n\n".to_owned()),
            // Nothing was sent of what is void.
            Ok(Some(Ok(update))) if update.restarted => Box::pin(self.next()).await,
            Ok(Some(Ok(update))) => {
                let chunk = self.envelope.chunk(update);
                Some(self.data(vec![chunk]))
            }
            Ok(Some(Err(error))) => {
                self.next = Next::End;
                Some(event(&error.body()))
            }
            Ok(None) => {
                self.next = if self.include_usage {
                    Next::Usage
                } else {
                    Next::Done
                };
                Box::pin(self.next()).await
            }
        }
    }

    fn data(&self, choices: Vec<Value>) -> String {
        // OpenAI sends an empty usage in all events but the last when usage was asked for.
        let usage = self.include_usage.then_some(Value::Null);
        event(&self.envelope.wrap(true, choices, usage, &self.generation))
    }
}

fn event(value: &Value) -> String {
    format!("data: {value}\n\n")
}

/// Sends the answer as it comes. Dropping the body ends the generation.
pub fn stream(generation: Generation, envelope: Envelope, include_usage: bool) -> Response {
    let next = match envelope.route {
        Route::Chat => Next::Opening(0),
        Route::Completion => Next::News,
    };
    let events = Events {
        generation,
        envelope,
        include_usage,
        next,
    };
    let body = futures::stream::unfold(events, |mut events| async move {
        let text = events.next().await?;
        Some((Ok::<_, std::convert::Infallible>(text), events))
    });
    event_stream(Body::from_stream(body))
}

/// Server-sent events as a response.
pub fn event_stream(body: Body) -> Response {
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/event-stream; charset=utf-8"),
    );
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that buffer would turn a stream into a long silence.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
