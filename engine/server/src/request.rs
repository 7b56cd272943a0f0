//! What a request body asks for, checked field by field.
//!
//! Fields that OpenAI knows and this engine does not serve are refused by name unless they ask for nothing; fields
//! that nobody knows are ignored.

use std::collections::BTreeMap;

use engine_core::{SamplingParameters, TOP_LOGPROBS_MAX, TokenId};
use engine_text::{ChatMessage, GenerationDefaults, Role};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::{Fields, show, wrong};
use crate::state::ServerOptions;

/// Stop strings a request may have; OpenAI takes 4, vLLM any number.
const STOPS_MAX: usize = 16;
/// Bytes of a stop string.
const STOP_BYTES_MAX: usize = 1024;
/// Entries of `logit_bias`.
const BIASES_MAX: usize = 1024;

/// What both kinds of request have in common.
#[derive(Clone, Debug)]
pub struct Asked {
    pub stream: bool,
    pub include_usage: bool,
    pub choices: u32,
    /// Absent: until the context is full.
    pub max_tokens: Option<usize>,
    pub parameters: SamplingParameters,
    pub stops: Vec<String>,
    pub stop_tokens: Vec<TokenId>,
    pub cache_salt: String,
}

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub asked: Asked,
    pub messages: Vec<ChatMessage>,
    pub variables: Map<String, Value>,
    pub add_generation_prompt: bool,
}

/// `POST /v1/completions`.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    pub asked: Asked,
    pub prompts: Vec<Prompt>,
}

/// A prompt as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

/// A known field that is not served, when it asks for nothing, and the way out.
type Unserved = (&'static str, fn(&Value) -> bool, &'static str);

fn is_empty(value: &Value) -> bool {
    value.as_array().is_some_and(Vec::is_empty) || value.as_object().is_some_and(Map::is_empty)
}

const UNSERVED_IN_CHAT: [Unserved; 10] = [
    (
        "tools",
        is_empty,
        "describe the tools in a message and parse the answer yourself",
    ),
    (
        "functions",
        is_empty,
        "describe the functions in a message and parse the answer yourself",
    ),
    (
        "tool_choice",
        |v| v == "none" || v == "auto",
        "leave it out",
    ),
    (
        "function_call",
        |v| v == "none" || v == "auto",
        "leave it out",
    ),
    (
        "response_format",
        |v| v["type"] == "text",
        "ask for the format in a message, or leave it out",
    ),
    ("structured_outputs", is_empty, "leave it out"),
    (
        "modalities",
        |v| v == &serde_json::json!(["text"]),
        "ask for text only",
    ),
    ("audio", is_empty, "leave it out"),
    ("prediction", is_empty, "leave it out"),
    ("web_search_options", |_| false, "leave it out"),
];

const UNSERVED_IN_COMPLETIONS: [Unserved; 4] = [
    ("suffix", |v| v == "", "leave it out"),
    (
        "echo",
        |v| v == &Value::Bool(false),
        "put the prompt before the answer yourself",
    ),
    (
        "prompt_embeds",
        |_| false,
        "send text or token ids as prompt",
    ),
    ("response_format", |v| v["type"] == "text", "leave it out"),
];

fn refuse_unserved(fields: &Fields, unserved: &[Unserved]) -> Result<(), ApiError> {
    for (name, asks_for_nothing, way_out) in unserved {
        if let Some(value) = fields.get(name).filter(|value| !asks_for_nothing(value)) {
            return Err(ApiError::unsupported(
                *name,
                format!(
                    "{name} is {}, but this engine does not serve it yet; {way_out}",
                    show(value)
                ),
            ));
        }
    }
    Ok(())
}

/// The `model` field: absent is fine, another name is not.
pub fn check_model(fields: &Fields, served: &str) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(asked) if asked != served => Err(ApiError::unknown_model(asked, served)),
        _ => Ok(()),
    }
}

impl Asked {
    fn parse(fields: &Fields, defaults: &GenerationDefaults, seed: u64) -> Result<Self, ApiError> {
        let stream = fields.flag("stream")?;
        let options = fields.object("stream_options")?;
        if let (false, Some(_)) = (stream, options) {
            let message = "stream_options is an object, but stream is false; set stream to true or leave stream_options out";
            return Err(ApiError::invalid("stream_options", message));
        }
        let include_usage =
            options.is_some_and(|options| options.get("include_usage") == Some(&Value::Bool(true)));
        let choices = fields.count("n")?.unwrap_or(1);
        let choices = u32::try_from(choices)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| wrong("n", &choices.into(), "at least 1"))?;
        let max_tokens = match fields.count("max_completion_tokens")? {
            Some(count) => Some(count),
            None => fields.count("max_tokens")?,
        };
        if max_tokens == Some(0) {
            return Err(wrong("max_tokens", &0.into(), "at least 1"));
        }
        let stops = fields.strings("stop")?;
        if stops.len() > STOPS_MAX
            || stops
                .iter()
                .any(|stop| stop.is_empty() || stop.len() > STOP_BYTES_MAX)
        {
            let message = format!(
                "stop must be at most {STOPS_MAX} strings of 1 to {STOP_BYTES_MAX} bytes each"
            );
            return Err(ApiError::invalid("stop", message));
        }
        Ok(Self {
            stream,
            include_usage,
            choices,
            max_tokens: max_tokens.map(|count| usize::try_from(count).unwrap_or(usize::MAX)),
            parameters: parameters(fields, defaults, seed)?,
            stops,
            stop_tokens: token_list(fields, "stop_token_ids")?,
            cache_salt: fields.string("cache_salt")?.unwrap_or_default().to_owned(),
        })
    }
}

fn parameters(
    fields: &Fields,
    defaults: &GenerationDefaults,
    seed: u64,
) -> Result<SamplingParameters, ApiError> {
    let base = SamplingParameters::default();
    let default_temperature = match defaults.do_sample {
        Some(false) => 0.0,
        _ => defaults.temperature.unwrap_or(base.temperature),
    };
    let parameters = SamplingParameters {
        temperature: fields.number("temperature")?.unwrap_or(default_temperature),
        top_p: fields
            .number("top_p")?
            .or(defaults.top_p)
            .unwrap_or(base.top_p),
        top_k: top_k(fields)?.or(defaults.top_k).unwrap_or(base.top_k),
        min_p: fields.number("min_p")?.unwrap_or(base.min_p),
        presence_penalty: fields
            .number("presence_penalty")?
            .unwrap_or(base.presence_penalty),
        frequency_penalty: fields
            .number("frequency_penalty")?
            .unwrap_or(base.frequency_penalty),
        repetition_penalty: fields
            .number("repetition_penalty")?
            .or(defaults.repetition_penalty)
            .unwrap_or(base.repetition_penalty),
        logit_bias: logit_bias(fields)?,
        seed: fields.bits("seed")?.unwrap_or(seed),
        logprobs: None,
        ignore_eos: fields.flag("ignore_eos")?,
    };
    parameters
        .validate()
        .map_err(|error| ApiError::invalid(error.field, error.to_string()))?;
    Ok(parameters)
}

/// vLLM's clients write -1 for all.
fn top_k(fields: &Fields) -> Result<Option<u32>, ApiError> {
    let Some(value) = fields.get("top_k") else {
        return Ok(None);
    };
    match value.as_i64() {
        Some(-1) => Ok(Some(0)),
        Some(k) => u32::try_from(k)
            .map(Some)
            .map_err(|_| wrong("top_k", value, "at least 0, or -1 for all")),
        None => Err(wrong("top_k", value, "a whole number")),
    }
}

fn logit_bias(fields: &Fields) -> Result<BTreeMap<TokenId, f32>, ApiError> {
    let mut biases = BTreeMap::new();
    let Some(object) = fields.object("logit_bias")? else {
        return Ok(biases);
    };
    if object.len() > BIASES_MAX {
        let message = format!(
            "logit_bias has {} entries, but at most {BIASES_MAX} are taken",
            object.len()
        );
        return Err(ApiError::invalid("logit_bias", message));
    }
    for (key, value) in object {
        let token = key.parse::<u32>().map_err(|_| {
            wrong(
                "logit_bias",
                &Value::String(key.clone()),
                "an object from token ids to numbers",
            )
        })?;
        let bias = value
            .as_f64()
            .ok_or_else(|| wrong("logit_bias", value, "an object from token ids to numbers"))?;
        biases.insert(TokenId(token), bias as f32);
    }
    Ok(biases)
}

fn token_list(fields: &Fields, name: &str) -> Result<Vec<TokenId>, ApiError> {
    fields
        .list(name)?
        .map_or(Ok(Vec::new()), |list| tokens(list, name))
}

/// Token ids of a list.
pub fn tokens(list: &[Value], name: &str) -> Result<Vec<TokenId>, ApiError> {
    list.iter()
        .map(|value| {
            value
                .as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .map(TokenId)
                .ok_or_else(|| wrong(name, value, "a list of token ids"))
        })
        .collect()
}

fn check_logprobs(param: &'static str, count: u64) -> Result<u32, ApiError> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count <= TOP_LOGPROBS_MAX)
        .ok_or_else(|| wrong(param, &count.into(), "at most 20"))
}

impl ChatRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn parse(
        fields: &Fields,
        options: &ServerOptions,
        defaults: &GenerationDefaults,
        seed: u64,
    ) -> Result<Self, ApiError> {
        refuse_unserved(fields, &UNSERVED_IN_CHAT)?;
        let mut asked = Asked::parse(fields, defaults, seed)?;
        let top = fields.count("top_logprobs")?;
        asked.parameters.logprobs = match (fields.flag("logprobs")?, top) {
            (true, top) => Some(check_logprobs("top_logprobs", top.unwrap_or(0))?),
            (false, None | Some(0)) => None,
            (false, Some(count)) => {
                let message =
                    format!("top_logprobs is {count}, but logprobs is false; set logprobs to true");
                return Err(ApiError::invalid("top_logprobs", message));
            }
        };
        let add_generation_prompt = match fields.get("add_generation_prompt") {
            None => true,
            Some(_) => fields.flag("add_generation_prompt")?,
        };
        Ok(Self {
            asked,
            messages: messages(fields, options.messages_max)?,
            variables: fields
                .object("chat_template_kwargs")?
                .cloned()
                .unwrap_or_default(),
            add_generation_prompt,
        })
    }
}

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
    list.iter()
        .enumerate()
        .map(|(index, value)| message(value, &format!("messages[{index}]")))
        .collect()
}

fn message(value: &Value, name: &str) -> Result<ChatMessage, ApiError> {
    let object = value
        .as_object()
        .ok_or_else(|| wrong(name, value, "an object with role and content"))?;
    let field = |key: &str| {
        (
            format!("{name}.{key}"),
            object.get(key).unwrap_or(&Value::Null),
        )
    };
    let (role_name, role) = field("role");
    let role = match role.as_str() {
        // OpenAI's newer name for the same thing.
        Some("system" | "developer") => Role::System,
        Some("user") => Role::User,
        Some("assistant") => Role::Assistant,
        Some("tool" | "function") => {
            let message = format!(
                "{role_name} is {role}, but this engine does not serve tools yet; put the result into a message of the user"
            );
            return Err(ApiError::unsupported(role_name, message));
        }
        _ => {
            return Err(wrong(
                &role_name,
                role,
                "one of system, developer, user, assistant",
            ));
        }
    };
    if object
        .get("tool_calls")
        .is_some_and(|calls| !calls.is_null() && !is_empty(calls))
    {
        let message = format!(
            "{name}.tool_calls is set, but this engine does not serve tools yet; leave it out"
        );
        return Err(ApiError::unsupported(format!("{name}.tool_calls"), message));
    }
    let (content_name, content) = field("content");
    Ok(ChatMessage {
        role,
        content: text_of(content, &content_name)?,
    })
}

/// A string, or a list of text parts.
fn text_of(content: &Value, name: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => {
            let mut text = String::new();
            for (index, part) in parts.iter().enumerate() {
                let name = format!("{name}[{index}]");
                match (part["type"].as_str(), part["text"].as_str()) {
                    (Some("text"), Some(part)) => text.push_str(part),
                    (Some(kind), _) if kind != "text" => {
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

impl CompletionRequest {
    /// Checks a body.
    ///
    /// # Errors
    /// Names the first field that is wrong.
    pub fn parse(
        fields: &Fields,
        options: &ServerOptions,
        defaults: &GenerationDefaults,
        seed: u64,
    ) -> Result<Self, ApiError> {
        refuse_unserved(fields, &UNSERVED_IN_COMPLETIONS)?;
        let mut asked = Asked::parse(fields, defaults, seed)?;
        // OpenAI's default for this older route; a whole context surprises its users.
        asked.max_tokens.get_or_insert(16);
        if let Some(count) = fields.count("logprobs")? {
            asked.parameters.logprobs = Some(check_logprobs("logprobs", count)?);
        }
        if let Some(best_of) = fields.count("best_of")?
            && best_of != u64::from(asked.choices)
        {
            let message = format!(
                "best_of is {best_of}, but this engine returns every choice it makes; set it to n or leave it out"
            );
            return Err(ApiError::unsupported("best_of", message));
        }
        let prompts = prompts(fields)?;
        if prompts.is_empty() || prompts.len() > options.prompts_max {
            let message = format!(
                "prompt has {} entries, but must have 1 to {}",
                prompts.len(),
                options.prompts_max
            );
            return Err(ApiError::invalid("prompt", message));
        }
        Ok(Self { asked, prompts })
    }
}

fn prompts(fields: &Fields) -> Result<Vec<Prompt>, ApiError> {
    let expected = "a string, a list of strings, a list of token ids or a list of such lists";
    let value = fields.get("prompt").ok_or_else(|| {
        ApiError::invalid("prompt", format!("prompt is missing; send {expected}"))
    })?;
    match value {
        Value::String(text) => Ok(vec![Prompt::Text(text.clone())]),
        Value::Array(list) if list.first().is_some_and(Value::is_number) => {
            Ok(vec![Prompt::Tokens(tokens(list, "prompt")?)])
        }
        Value::Array(list) => list
            .iter()
            .map(|item| match item {
                Value::String(text) => Ok(Prompt::Text(text.clone())),
                Value::Array(ids) => Ok(Prompt::Tokens(tokens(ids, "prompt")?)),
                other => Err(wrong("prompt", other, expected)),
            })
            .collect(),
        other => Err(wrong("prompt", other, expected)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chat(body: &str) -> Result<ChatRequest, ApiError> {
        let fields = Fields::parse(body.as_bytes())?;
        ChatRequest::parse(
            &fields,
            &ServerOptions::new("m"),
            &GenerationDefaults::default(),
            7,
        )
    }

    fn completion(body: &str) -> Result<CompletionRequest, ApiError> {
        let fields = Fields::parse(body.as_bytes())?;
        CompletionRequest::parse(
            &fields,
            &ServerOptions::new("m"),
            &GenerationDefaults::default(),
            7,
        )
    }

    #[test]
    fn a_plain_conversation_takes_the_defaults() {
        let request =
            chat(r#"{"messages":[{"role":"user","content":"hi"}],"unheard_of":1,"tools":[]}"#)
                .unwrap();
        assert_eq!(
            request.messages[0],
            ChatMessage {
                role: Role::User,
                content: "hi".into()
            }
        );
        assert_eq!(request.asked.max_tokens, None);
        assert_eq!(
            request.asked.parameters,
            SamplingParameters {
                seed: 7,
                ..Default::default()
            }
        );
    }

    #[test]
    fn parts_are_joined_and_the_makers_defaults_are_used() {
        let fields = Fields::parse(br#"{"messages":[{"role":"developer","content":[{"type":"text","text":"a"},{"type":"text","text":"b"}]}],"top_k":-1}"#).unwrap();
        let defaults: GenerationDefaults =
            serde_json::from_str(r#"{"temperature":0.6,"top_p":0.95,"top_k":9}"#).unwrap();
        let request = ChatRequest::parse(&fields, &ServerOptions::new("m"), &defaults, 7).unwrap();
        assert_eq!(
            request.messages[0],
            ChatMessage {
                role: Role::System,
                content: "ab".into()
            }
        );
        let p = request.asked.parameters;
        assert_eq!((p.temperature, p.top_p, p.top_k), (0.6, 0.95, 0));
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value() {
        let user = r#""messages":[{"role":"user","content":"x"}]"#;
        for (body, param, part) in [
            ("{}".to_owned(), "messages", "is missing"),
            (r#"{"messages":[]}"#.into(), "messages", "has 0 entries"),
            (
                r#"{"messages":[{"role":"king","content":"x"}]}"#.into(),
                "messages[0].role",
                "\"king\"",
            ),
            (
                r#"{"messages":[{"role":"user"}]}"#.into(),
                "messages[0].content",
                "null",
            ),
            (
                r#"{"messages":[{"role":"tool","content":"x"}]}"#.into(),
                "messages[0].role",
                "does not serve tools",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#.into(),
                "messages[0].content[0].type",
                "text only",
            ),
            (
                format!(r#"{{{user},"tools":[{{}}]}}"#),
                "tools",
                "does not serve it yet",
            ),
            (
                format!(r#"{{{user},"response_format":{{"type":"json_object"}}}}"#),
                "response_format",
                "ask for the format",
            ),
            (
                format!(r#"{{{user},"temperature":3}}"#),
                "temperature",
                "temperature is 3",
            ),
            (format!(r#"{{{user},"n":0}}"#), "n", "at least 1"),
            (
                format!(r#"{{{user},"max_tokens":0}}"#),
                "max_tokens",
                "at least 1",
            ),
            (
                format!(r#"{{{user},"top_logprobs":3}}"#),
                "top_logprobs",
                "logprobs is false",
            ),
            (
                format!(r#"{{{user},"logprobs":true,"top_logprobs":21}}"#),
                "top_logprobs",
                "at most 20",
            ),
            (
                format!(r#"{{{user},"stream_options":{{}}}}"#),
                "stream_options",
                "stream is false",
            ),
            (
                format!(r#"{{{user},"stop":[""]}}"#),
                "stop",
                "1 to 1024 bytes",
            ),
            (
                format!(r#"{{{user},"logit_bias":{{"a":1}}}}"#),
                "logit_bias",
                "token ids",
            ),
        ] {
            let error = chat(&body).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
            assert!(error.message.contains(part), "{body}: {}", error.message);
        }
    }

    #[test]
    fn prompts_come_as_text_or_tokens_one_or_many() {
        let prompts = |body: &str| completion(body).unwrap().prompts;
        assert_eq!(prompts(r#"{"prompt":"a"}"#), [Prompt::Text("a".into())]);
        assert_eq!(prompts(r#"{"prompt":["a","b"]}"#).len(), 2);
        assert_eq!(
            prompts(r#"{"prompt":[1,2]}"#),
            [Prompt::Tokens(vec![TokenId(1), TokenId(2)])]
        );
        assert_eq!(prompts(r#"{"prompt":[[1],[2]]}"#).len(), 2);
        assert_eq!(
            completion(r#"{"prompt":"a"}"#).unwrap().asked.max_tokens,
            Some(16)
        );
        for body in [
            "{}",
            r#"{"prompt":7}"#,
            r#"{"prompt":[]}"#,
            r#"{"prompt":[1,"a"]}"#,
            r#"{"prompt":[-1]}"#,
        ] {
            assert_eq!(
                completion(body).unwrap_err().param.as_deref(),
                Some("prompt"),
                "{body}"
            );
        }
        assert_eq!(
            completion(r#"{"prompt":"a","echo":true}"#)
                .unwrap_err()
                .code,
            Some("unsupported_parameter")
        );
        assert_eq!(
            completion(r#"{"prompt":"a","best_of":3}"#)
                .unwrap_err()
                .param
                .as_deref(),
            Some("best_of")
        );
    }
}
