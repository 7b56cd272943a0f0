//! From a checked request to tokens, a parser and a grammar, off the threads that answer probes.

use axum::http::HeaderMap;
use engine_core::{Constraint, TokenId};
use engine_text::{Grammar, GrammarError, Text};

use crate::caller::Caller;
use crate::chat::ChatRequest;
use crate::constraint::constraint;
use crate::error::ApiError;
use crate::fields::Fields;
use crate::format::answer_rule;
use crate::generation::Prepared;
use crate::request::Asked;
use crate::state::{Model, Shared};
use crate::tools::Tools;

/// Tokenizing a long prompt takes a while; it must not hold up the health probes.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| {
        ApiError::engine_failed(format!("the request could not be read: {error}"))
    })?
}

/// Tokens of a text; `param` is what the client calls it.
pub fn encode(
    model: &Text,
    text: &str,
    add_special: bool,
    param: &str,
) -> Result<Vec<TokenId>, ApiError> {
    let ids = model
        .encode(text, add_special)
        .map_err(|error| ApiError::invalid(param, error.to_string()))?;
    Ok(ids.into_iter().map(TokenId).collect())
}

/// A grammar for the engine, or what is wrong with the field that asked for it.
pub fn compiled(
    grammar: Result<Grammar, GrammarError>,
    field: &str,
) -> Result<Constraint, ApiError> {
    grammar
        .map(constraint)
        .map_err(|error| ApiError::invalid(field, format!("{field} cannot be used: {error}")))
}

/// Tools need a model whose calls can be told from its text.
fn check_tools(text: &Text, tools: &Tools) -> Result<(), ApiError> {
    if tools.shown().is_empty() || text.tool_format().is_some() {
        return Ok(());
    }
    let message = "tools are declared, but how this model writes calls is not known; \
        start the engine with --tool-call-parser, or send tool_choice \"none\"";
    Err(ApiError::unsupported("tools", message))
}

/// Renders a conversation and compiles what its answer must be.
///
/// # Errors
/// Names the field that is wrong.
pub async fn prepare_chat(
    model: &std::sync::Arc<Model>,
    mut request: ChatRequest,
    caller: &Caller,
    headers: &HeaderMap,
    fields: &Fields,
    shared: &Shared,
) -> Result<(Asked, Prepared), ApiError> {
    check_tools(&model.text, &request.tools)?;
    caller.mark(&mut request.asked, headers, fields, &shared.options)?;
    let reader = model.clone();
    blocking(move || {
        let prepared = read_chat(&reader.text, &request)?;
        Ok((request.asked, prepared))
    })
    .await
}

/// The part of [`prepare_chat`] that needs no server.
///
/// # Errors
/// Names the field that is wrong.
pub fn read_chat(text: &Text, request: &ChatRequest) -> Result<Prepared, ApiError> {
    let ChatRequest {
        asked,
        messages,
        variables,
        add_generation_prompt,
        tools,
        format,
    } = request;
    check_tools(text, tools)?;
    let prompt = text
        .render(messages, tools.shown(), *add_generation_prompt, variables)
        .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    Ok(Prepared {
        tokens: encode(text, &prompt, false, "messages")?,
        constraint: answer_rule(format.clone(), tools)
            .map(|(rule, field)| compiled(text.chat_grammar(&prompt, &rule), field))
            .transpose()?,
        parser: text.chat_parser(&prompt, asked.stops.clone(), tools.allowed()),
    })
}
