//! Requests without a server: from the bytes of a body to what would be computed, for tests that need no socket.
//!
//! These are the functions that the routes call, in the same order; nothing is checked here that is not checked there.

use engine_text::Text;

use crate::chat::ChatRequest;
use crate::completion::{CompletionRequest, Prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::format::answer_rule;
use crate::messages::messages;
use crate::prepare::{compiled, encode, read_chat};
use crate::request::{check_model, tokens};
use crate::responses::responses_request;
use crate::state::ServerOptions;
use crate::tools::Tools;

/// Routes that [`check_body`] knows.
pub const ROUTES: [&str; 4] = [
    "/v1/completions",
    "/v1/responses",
    "/tokenize",
    "/detokenize",
];

/// Tokens of the prompt that the body of a chat request becomes.
///
/// # Errors
/// What the client would be told.
pub fn chat_prompt(body: &[u8], options: &ServerOptions, text: &Text) -> Result<usize, String> {
    let read = || {
        let fields = Fields::parse(body)?;
        check_model(&fields, &options.model_name)?;
        let request = ChatRequest::parse(&fields, options, text.defaults(), 0)?;
        Ok(read_chat(text, &request)?.tokens.len())
    };
    read().map_err(|error: ApiError| error.message)
}

/// Reads a body as one of [`ROUTES`] does.
///
/// # Errors
/// What the client would be told.
pub fn check_body(
    route: &str,
    body: &[u8],
    options: &ServerOptions,
    text: &Text,
) -> Result<(), String> {
    let read = || {
        let fields = Fields::parse(body)?;
        check_model(&fields, &options.model_name)?;
        match route {
            "/v1/completions" => completion(&fields, options, text),
            "/v1/responses" => {
                let (request, _) = responses_request(&fields, options, text.defaults(), 0)?;
                read_chat(text, &request).map(drop)
            }
            "/tokenize" => {
                if let Some(prompt) = fields.string("prompt")? {
                    return encode(text, prompt, true, "prompt").map(drop);
                }
                messages(&fields, options.messages_max)?;
                Tools::parse(&fields).map(drop)
            }
            _ => {
                let ids = tokens(fields.list("tokens")?.unwrap_or(&Vec::new()), "tokens")?;
                let ids: Vec<u32> = ids.into_iter().map(|token| token.0).collect();
                text.decode(&ids);
                Ok(())
            }
        }
    };
    read().map_err(|error: ApiError| error.message)
}

fn completion(fields: &Fields, options: &ServerOptions, text: &Text) -> Result<(), ApiError> {
    let request = CompletionRequest::parse(fields, options, text.defaults(), 0)?;
    if let Some((rule, field)) = answer_rule(request.format, &Tools::default()) {
        compiled(text.plain_grammar(&rule), field)?;
    }
    for prompt in &request.prompts {
        if let Prompt::Text(prompt) = prompt {
            encode(text, prompt, true, "prompt")?;
        }
    }
    Ok(())
}
