//! From a checked request to tokens, a parser and a grammar, off the threads that answer probes.

use axum::http::HeaderMap;
use engine_core::{Constraint, TokenId};
use engine_text::{Grammar, GrammarError};

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
    model: &Model,
    text: &str,
    add_special: bool,
    param: &str,
) -> Result<Vec<TokenId>, ApiError> {
    let ids = model
        .text
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
fn check_tools(model: &Model, tools: &Tools) -> Result<(), ApiError> {
    if tools.shown().is_empty() || model.text.tool_format().is_some() {
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
    request: ChatRequest,
    caller: &Caller,
    headers: &HeaderMap,
    fields: &Fields,
    shared: &Shared,
) -> Result<(Asked, Prepared), ApiError> {
    let ChatRequest {
        mut asked,
        messages,
        variables,
        add_generation_prompt,
        tools,
        format,
    } = request;
    check_tools(model, &tools)?;
    caller.mark(&mut asked, headers, fields, &shared.options)?;
    let rule = answer_rule(format, &tools);
    let stops = asked.stops.clone();
    let reader = model.clone();
    let prepared = blocking(move || {
        let prompt = reader
            .text
            .render(&messages, tools.shown(), add_generation_prompt, &variables)
            .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
        Ok(Prepared {
            tokens: encode(&reader, &prompt, false, "messages")?,
            constraint: rule
                .map(|(rule, field)| compiled(reader.text.chat_grammar(&prompt, &rule), field))
                .transpose()?,
            parser: reader.text.chat_parser(&prompt, stops, tools.allowed()),
        })
    })
    .await?;
    Ok((asked, prepared))
}
