//! What a completion request asks for.

use engine_core::TokenId;
use engine_text::GenerationDefaults;
use serde_json::Value;

use crate::error::ApiError;
use crate::fields::{Fields, wrong};
use crate::format::Format;
use crate::request::{Asked, Unserved, check_logprobs, refuse_unserved, tokens};
use crate::state::ServerOptions;

/// `POST /v1/completions`.
#[derive(Clone, Debug)]
pub struct CompletionRequest {
    pub asked: Asked,
    pub prompts: Vec<Prompt>,
    pub format: Option<Format>,
}

/// A prompt as it was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

const UNSERVED_IN_COMPLETIONS: [Unserved; 3] = [
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
];

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
        Ok(Self {
            asked,
            prompts,
            format: Format::parse(fields)?,
        })
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
