//! The routes: what each path answers.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use axum::body::{Body, Bytes};
use axum::extract::{MatchedPath, Path, Request, State};
use axum::handler::Handler;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use engine_spec::{LoadReport, StartupPhase};
use http_body_util::{BodyExt, Limited};
use serde_json::{Value, json};

use crate::caller::Caller;
use crate::chat::ChatRequest;
use crate::completion::{CompletionRequest, Prompt};
use crate::error::ApiError;
use crate::fields::Fields;
use crate::format::answer_rule;
use crate::generation::{Generation, Prepared};
use crate::http::Peer;
use crate::messages::messages;
use crate::prepare::{blocking, compiled, encode, prepare_chat};
use crate::request::{check_model, tokens};
use crate::respond::{Envelope, Route, json_response, stream, whole};
use crate::responses::{ResponseAnswer, responses_request};
use crate::state::{Model, Shared, unix_seconds};
use crate::tools::Tools;
use crate::weights::Weights;

const REQUEST_ID: &str = "x-request-id";
/// Longest request id that is taken over from a client.
const REQUEST_ID_MAX: usize = 128;

const WEIGHTS: &str = "/v1/weights";

type AppState = State<Arc<Shared>>;

/// All routes.
pub fn router(shared: Arc<Shared>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses))
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*name}", get(get_model))
        .route(WEIGHTS, get(weights).post(replace_weights))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route("/load", get(load))
        .merge(probes(readyz))
        .fallback(no_route)
        .method_not_allowed_fallback(no_route)
        .layer(from_fn_with_state(shared.clone(), observe))
        .with_state(shared)
}

/// The routes that every rank answers, by what it means by ready.
pub fn probes<F, T>(readyz: F) -> Router<Arc<Shared>>
where
    F: Handler<T, Arc<Shared>> + Clone,
    T: 'static,
{
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(readyz.clone()))
        .route("/health", get(readyz))
        .route("/startupz", get(startupz))
        .route("/version", get(version))
        .route("/metrics", get(metrics))
}

/// Gives every request a name, counts and logs it. Prompts and answers never appear in a log.
pub async fn observe(State(shared): AppState, mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let name = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|name| {
            (1..=REQUEST_ID_MAX).contains(&name.len()) && name.chars().all(|c| c.is_ascii_graphic())
        })
        .map_or_else(
            || format!("{:016x}{:016x}", shared.random(), shared.random()),
            str::to_owned,
        );
    let method = request.method().clone();
    let handler = request
        .extensions()
        .get::<MatchedPath>()
        .map_or("none", |path| path.as_str())
        .to_owned();
    let key = check_key(&shared, &request);
    let mut response = match key {
        Ok(key) => {
            let name = name.clone();
            request.extensions_mut().insert(Caller { name, key });
            next.run(request).await
        }
        Err(error) => error.into_response(),
    };
    let status = response.status().as_u16();
    shared.metrics.count_http(&handler, method.as_str(), status);
    let seconds = began.elapsed().as_secs_f64();
    if handler.starts_with("/v1/") {
        tracing::info!(request_id = name, handler, %method, status, seconds, "answered");
    } else {
        tracing::debug!(request_id = name, handler, %method, status, seconds, "answered");
    }
    if let Ok(name) = HeaderValue::from_str(&name) {
        response.headers_mut().insert(REQUEST_ID, name);
    }
    response
}

/// The name of the key that a request shows, where it needs one.
fn check_key(shared: &Shared, request: &Request) -> Result<Option<String>, ApiError> {
    let path = request.uri().path();
    if !needs_key(path) {
        return Ok(None);
    }
    check_certificate(shared, request)?;
    let options = &shared.options;
    if path == WEIGHTS && request.method() == Method::POST {
        return match options.admin_keys.is_empty() {
            true => Err(ApiError::no_admin()),
            false => options.admin_keys.check(request.headers()),
        };
    }
    options.api_keys.check(request.headers())
}

/// Where certificates of clients are asked for, whoever must show a key must show one.
fn check_certificate(shared: &Shared, request: &Request) -> Result<(), ApiError> {
    let is_asked_for = shared
        .options
        .tls
        .as_ref()
        .is_some_and(|tls| tls.asks_for_clients());
    let peer = request.extensions().get::<Peer>().copied();
    match is_asked_for && !peer.unwrap_or_default().is_verified {
        true => Err(ApiError::no_certificate()),
        false => Ok(()),
    }
}

/// Probes, metrics and the load report stay open: whoever asks for them has no key.
fn needs_key(path: &str) -> bool {
    path.starts_with("/v1/") || path == "/tokenize" || path == "/detokenize"
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::no_route(method.as_str(), uri.path())
}

/// The fields of a body within the limits of size and time.
async fn read(shared: &Shared, headers: &HeaderMap, body: Body) -> Result<Fields, ApiError> {
    let limit = shared.options.body_bytes_max;
    let declared = headers
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
    if declared.is_some_and(|length| length > limit) {
        return Err(ApiError::body_too_large(limit));
    }
    let timeout = shared.options.body_timeout;
    let collected = tokio::time::timeout(timeout, Limited::new(body, limit).collect())
        .await
        .map_err(|_| ApiError::body_too_slow(timeout.as_secs()))?;
    let bytes: Bytes = match collected {
        Ok(collected) => collected.to_bytes(),
        Err(error) if error.is::<http_body_util::LengthLimitError>() => {
            return Err(ApiError::body_too_large(limit));
        }
        Err(error) => {
            return Err(ApiError::malformed(format!(
                "the request body broke off: {error}"
            )));
        }
    };
    Fields::parse(&bytes)
}

async fn chat(
    State(shared): AppState,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = shared.admitting()?.clone();
    let fields = read(&shared, &headers, body).await?;
    check_model(&fields, &shared.options.model_name)?;
    let seed = shared.random();
    let request = ChatRequest::parse(&fields, &shared.options, model.text.defaults(), seed)?;
    let (asked, prepared) =
        prepare_chat(&model, request, &caller, &headers, &fields, &shared).await?;
    let generation = Generation::begin(&shared, &model, vec![prepared], &asked, "messages").await?;
    let envelope = envelope(
        &shared,
        model,
        Route::Chat,
        &caller,
        &generation,
        asked.parameters.logprobs.is_some(),
    );
    if asked.stream {
        Ok(stream(generation, envelope, asked.include_usage))
    } else {
        whole(generation, envelope).await
    }
}

async fn responses(
    State(shared): AppState,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = shared.admitting()?.clone();
    let fields = read(&shared, &headers, body).await?;
    check_model(&fields, &shared.options.model_name)?;
    let seed = shared.random();
    let (request, echo) = responses_request(&fields, &shared.options, model.text.defaults(), seed)?;
    let (asked, prepared) = prepare_chat(&model, request, &caller, &headers, &fields, &shared)
        .await
        .map_err(|error| error.renamed("messages", "input"))?;
    let is_streamed = asked.stream;
    let mut generation =
        Generation::begin(&shared, &model, vec![prepared], &asked, "input").await?;
    generation.forbid_resuming();
    let answer = ResponseAnswer::new(
        &caller.name,
        shared.random(),
        echo,
        &shared.options.model_name,
    );
    if is_streamed {
        Ok(answer.stream(generation))
    } else {
        answer.whole(generation).await
    }
}

async fn completions(
    State(shared): AppState,
    Extension(caller): Extension<Caller>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = shared.admitting()?.clone();
    let fields = read(&shared, &headers, body).await?;
    check_model(&fields, &shared.options.model_name)?;
    let seed = shared.random();
    let request = CompletionRequest::parse(&fields, &shared.options, model.text.defaults(), seed)?;
    let CompletionRequest {
        mut asked,
        prompts,
        format,
    } = request;
    caller.mark(&mut asked, &headers, &fields, &shared.options)?;
    let rule = answer_rule(format, &Tools::default());
    let reader = model.clone();
    let stops = asked.stops.clone();
    let prepared = blocking(move || {
        let constraint = rule
            .map(|(rule, field)| compiled(reader.text.plain_grammar(&rule), field))
            .transpose()?;
        prompts
            .into_iter()
            .map(|prompt| {
                Ok(Prepared {
                    tokens: match prompt {
                        Prompt::Text(text) => encode(&reader.text, &text, true, "prompt")?,
                        Prompt::Tokens(tokens) => tokens,
                    },
                    parser: reader.text.plain_parser(stops.clone()),
                    constraint: constraint.clone(),
                })
            })
            .collect::<Result<Vec<_>, ApiError>>()
    })
    .await?;
    // The default of 16 must not make a prompt that just fits too long.
    if fields.get("max_tokens").is_none() && fields.get("max_completion_tokens").is_none() {
        let longest = prepared.iter().map(|p| p.tokens.len()).max().unwrap_or(0);
        let room = model.limits.max_model_len.saturating_sub(longest).max(1);
        asked.max_tokens = asked.max_tokens.map(|default| default.min(room));
    }
    let generation = Generation::begin(&shared, &model, prepared, &asked, "prompt").await?;
    let envelope = envelope(
        &shared,
        model,
        Route::Completion,
        &caller,
        &generation,
        asked.parameters.logprobs.is_some(),
    );
    if asked.stream {
        Ok(stream(generation, envelope, asked.include_usage))
    } else {
        whole(generation, envelope).await
    }
}

fn envelope(
    shared: &Shared,
    model: Arc<Model>,
    route: Route,
    caller: &Caller,
    generation: &Generation,
    logprobs: bool,
) -> Envelope {
    let prefix = match route {
        Route::Chat => "chatcmpl",
        Route::Completion => "cmpl",
    };
    Envelope {
        route,
        id: format!("{prefix}-{}", caller.name),
        created_unix_seconds: unix_seconds(),
        model_name: shared.options.model_name.clone(),
        model,
        logprobs,
        offsets: vec![0; generation.choices()],
        call_seed: shared.random(),
    }
}

fn model_json(shared: &Shared, model: &Model) -> Value {
    json!({
        "id": shared.options.model_name,
        "object": "model",
        "created": model.created_unix_seconds,
        "owned_by": "cachalot",
        "max_model_len": model.limits.max_model_len,
    })
}

async fn list_models(State(shared): AppState) -> Result<Response, ApiError> {
    let model = shared.serving()?;
    Ok(json_response(
        &json!({"object": "list", "data": [model_json(&shared, model)]}),
    ))
}

async fn get_model(
    State(shared): AppState,
    Path(name): Path<String>,
) -> Result<Response, ApiError> {
    let model = shared.serving()?;
    if name != shared.options.model_name {
        return Err(ApiError::unknown_model(&name, &shared.options.model_name));
    }
    Ok(json_response(&model_json(&shared, model)))
}

async fn weights(State(shared): AppState) -> Result<Response, ApiError> {
    shared.serving()?;
    Ok(json_response(&shared.weights.report()))
}

async fn replace_weights(
    State(shared): AppState,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    shared.serving()?;
    let fields = read(&shared, &headers, body).await?;
    let (source, rule) = crate::weights::parse(&fields)?;
    Weights::replace(&shared, source, rule)?;
    let mut response = json_response(&shared.weights.report());
    *response.status_mut() = StatusCode::ACCEPTED;
    Ok(response)
}

async fn tokenize(
    State(shared): AppState,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = shared.serving()?.clone();
    let fields = read(&shared, &headers, body).await?;
    check_model(&fields, &shared.options.model_name)?;
    let add_special = match fields.get("add_special_tokens") {
        None => true,
        Some(_) => fields.flag("add_special_tokens")?,
    };
    let limit = shared.options.messages_max;
    let tokens = blocking(move || match fields.string("prompt")? {
        Some(prompt) => encode(&model.text, prompt, add_special, "prompt"),
        None => {
            let messages = messages(&fields, limit)?;
            let tools = Tools::parse(&fields)?;
            let prompt = model
                .text
                .render(&messages, tools.shown(), true, &serde_json::Map::new())
                .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
            encode(&model.text, &prompt, false, "messages")
        }
    })
    .await?;
    let ids: Vec<u32> = tokens.iter().map(|token| token.0).collect();
    let longest = shared.serving()?.limits.max_model_len;
    Ok(json_response(
        &json!({"count": ids.len(), "max_model_len": longest, "tokens": ids}),
    ))
}

async fn detokenize(
    State(shared): AppState,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let model = shared.serving()?.clone();
    let fields = read(&shared, &headers, body).await?;
    check_model(&fields, &shared.options.model_name)?;
    let list = fields.list("tokens")?.ok_or_else(|| {
        ApiError::invalid("tokens", "tokens is missing; send a list of token ids")
    })?;
    let ids: Vec<u32> = tokens(list, "tokens")?
        .into_iter()
        .map(|token| token.0)
        .collect();
    Ok(json_response(&json!({"prompt": model.text.decode(&ids)})))
}

pub fn probe(problem: Option<String>) -> Response {
    match problem {
        None => json_response(&json!({"ok": true})),
        Some(problem) => {
            let mut response = json_response(&json!({"ok": false, "message": problem}));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            response
        }
    }
}

/// Alive: the engine's thread makes progress, or the model is still loading.
async fn livez(State(shared): AppState) -> Response {
    probe(shared.heartbeat.problem())
}

/// Ready: a canary was decoded and new requests are taken.
async fn readyz(State(shared): AppState) -> Response {
    probe(shared.serving().err().map(|error| error.message))
}

async fn startupz(State(shared): AppState) -> Response {
    let report = shared.startup.report();
    let started = report.phase == StartupPhase::Ready;
    let mut response = json_response(&json!(report));
    if !started {
        *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
    }
    response
}

async fn load(State(shared): AppState) -> Response {
    let load = shared.load();
    let block_size = shared
        .model
        .get()
        .map_or(0, |model| model.limits.block_size);
    // Responses still being written count as running: a drain must wait for their last byte.
    let unfinished = shared.in_flight.load(Ordering::Acquire);
    let running = load.running.max(unfinished.saturating_sub(load.waiting));
    let (requests_total, request_errors_total) = shared.metrics.answers();
    let serving = shared.metrics.serving();
    let (first_tokens_total, first_token_seconds_total) =
        serving.map_or((0, 0.0), |serving| serving.first_tokens());
    json_response(&json!(LoadReport {
        running: running as u32,
        waiting: load.waiting as u32,
        kv_usage: load.blocks_used as f64 / load.blocks_total.max(1) as f64,
        kv_tokens_total: (load.blocks_total * block_size) as u64,
        draining: shared.is_draining(),
        prompt_tokens_total: load.counters.prompt_tokens,
        generation_tokens_total: load.counters.generation_tokens,
        requests_total,
        request_errors_total,
        first_tokens_total,
        first_token_seconds_total,
    }))
}

async fn version(State(shared): AppState) -> Response {
    json_response(&json!({"version": shared.options.version}))
}

async fn metrics(State(shared): AppState) -> Response {
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(CONTENT_TYPE, format)], shared.metrics.render()).into_response()
}
