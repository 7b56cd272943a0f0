//! What a chat request asks for.

use engine_text::{ChatMessage, GenerationDefaults};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::fields::Fields;
use crate::format::Format;
use crate::messages::messages;
use crate::request::{Asked, Unserved, check_logprobs, is_empty, refuse_unserved};
use crate::state::ServerOptions;
use crate::tools::Tools;

/// `POST /v1/chat/completions`.
#[derive(Clone, Debug)]
pub struct ChatRequest {
    pub asked: Asked,
    pub messages: Vec<ChatMessage>,
    pub variables: Map<String, Value>,
    pub add_generation_prompt: bool,
    pub tools: Tools,
    pub format: Option<Format>,
}

const UNSERVED_IN_CHAT: [Unserved; 6] = [
    (
        "functions",
        is_empty,
        "declare them as tools, which took their place",
    ),
    (
        "function_call",
        |v| v == "none" || v == "auto",
        "use tool_choice, which took its place",
    ),
    (
        "modalities",
        |v| v == &serde_json::json!(["text"]),
        "ask for text only",
    ),
    ("audio", is_empty, "leave it out"),
    ("prediction", is_empty, "leave it out"),
    ("web_search_options", |_| false, "leave it out"),
];

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
            tools: Tools::parse(fields)?,
            format: Format::parse(fields)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine_core::SamplingParameters;
    use engine_text::Role;

    fn chat(body: &str) -> Result<ChatRequest, ApiError> {
        let fields = Fields::parse(body.as_bytes())?;
        ChatRequest::parse(
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
        assert_eq!(request.messages[0], ChatMessage::new(Role::User, "hi"));
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
        assert_eq!(request.messages[0], ChatMessage::new(Role::System, "ab"));
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
                r#"{"messages":[{"role":"function","content":"x"}]}"#.into(),
                "messages[0].role",
                "tool_call_id",
            ),
            (
                r#"{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}"#.into(),
                "messages[0].content[0].type",
                "text only",
            ),
            (
                format!(r#"{{{user},"functions":[{{}}]}}"#),
                "functions",
                "as tools",
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
}
