//! Errors as OpenAI shapes them: `{"error": {"message", "type", "param", "code"}}`.
//!
//! Every message names the field, the value and the way out.

use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use engine_core::Rejection;
use serde_json::{Value, json};

use crate::resume::FIELD;

/// An answer that is not an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// For people.
    pub message: String,
    /// OpenAI's class of error.
    pub kind: &'static str,
    /// The field that is wrong.
    pub param: Option<String>,
    /// For programs.
    pub code: Option<&'static str>,
    /// When to try again.
    pub retry_after_seconds: Option<u64>,
    /// The state with which the request can go on elsewhere.
    pub resume: Option<Box<Value>>,
}

/// Paths that clients know from elsewhere, and what to do instead.
const REFUSED: [(&str, &str); 14] = [
    (
        "/v1/embeddings",
        "this engine serves generation only; run an embedding model beside it",
    ),
    (
        "/v1/rerank",
        "this engine serves generation only; run a reranking model beside it",
    ),
    (
        "/v1/score",
        "this engine serves generation only; run a scoring model beside it",
    ),
    (
        "/v1/moderations",
        "this engine serves generation only; ask the model in a chat",
    ),
    ("/v1/audio", "this engine reads and writes text only"),
    ("/v1/images", "this engine reads and writes text only"),
    (
        "/v1/files",
        "this engine stores nothing; send the text with the request",
    ),
    (
        "/v1/batches",
        "this engine stores nothing; send the requests, they are batched while they run",
    ),
    (
        "/v1/fine_tuning",
        "this engine does not train; serve the trained model as one of its own",
    ),
    (
        "/v1/assistants",
        "this engine stores nothing; use POST /v1/responses or /v1/chat/completions",
    ),
    (
        "/v1/threads",
        "this engine stores nothing; use POST /v1/responses or /v1/chat/completions",
    ),
    (
        "/v1/conversations",
        "this engine stores nothing; send the whole conversation as input",
    ),
    (
        "/v1/responses/",
        "this engine stores no responses; keep what POST /v1/responses returned",
    ),
    (
        "/v1/messages",
        "use POST /v1/chat/completions with OpenAI's messages",
    ),
];

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            message: message.into(),
            kind,
            param: None,
            code: None,
            retry_after_seconds: None,
            resume: None,
        }
    }

    /// The request is wrong; sending it again will not help.
    pub fn invalid(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            param: Some(param.into()),
            ..Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
        }
    }

    /// The request is no JSON object.
    pub fn malformed(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// A feature of the API that this engine does not have.
    pub fn unsupported(param: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            code: Some("unsupported_parameter"),
            ..Self::invalid(param, message)
        }
    }

    /// There is no such model here.
    pub fn unknown_model(asked: &str, served: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            code: Some("model_not_found"),
            ..Self::invalid(
                "model",
                format!(
                    "the model \"{asked}\" does not exist here; this engine serves \"{served}\""
                ),
            )
        }
    }

    /// No API key, or an unknown one.
    pub fn unauthorized(message: impl Into<String>) -> Self {
        Self {
            code: Some("invalid_api_key"),
            ..Self::new(StatusCode::UNAUTHORIZED, "invalid_request_error", message)
        }
    }

    /// No certificate of a client where one is needed.
    pub fn no_certificate() -> Self {
        Self {
            code: Some("client_certificate_required"),
            ..Self::new(
                StatusCode::UNAUTHORIZED,
                "invalid_request_error",
                "no client certificate was shown; connect with one that this engine's client CA issued",
            )
        }
    }

    /// Weights may be replaced by nobody.
    pub fn no_admin() -> Self {
        Self {
            code: Some("admin_key_required"),
            ..Self::new(
                StatusCode::FORBIDDEN,
                "invalid_request_error",
                "this engine lets nobody replace its weights; start it with --admin-key-file",
            )
        }
    }

    /// Weights are being replaced already.
    pub fn weights_busy() -> Self {
        Self {
            code: Some("weights_busy"),
            ..Self::new(
                StatusCode::CONFLICT,
                "invalid_request_error",
                "a replacement of the weights is under way; wait until GET /v1/weights shows its end",
            )
        }
    }

    /// This engine cannot do it.
    pub fn not_implemented(why: &str) -> Self {
        Self {
            code: Some("unsupported_endpoint"),
            ..Self::new(
                StatusCode::NOT_IMPLEMENTED,
                "invalid_request_error",
                format!(
                    "the weights of this engine cannot be replaced: {why}; start another replica"
                ),
            )
        }
    }

    /// The weights changed under an answer that was being streamed.
    pub fn weights_replaced() -> Self {
        Self::unavailable(
            "weights_replaced",
            "the weights were replaced while this answer was written; send the request again",
            1,
        )
    }

    /// The request's time was over before its answer was.
    pub fn deadline_exceeded(seconds: f64) -> Self {
        Self {
            code: Some("deadline_exceeded"),
            ..Self::new(
                StatusCode::GATEWAY_TIMEOUT,
                "timeout_error",
                format!(
                    "the answer was not complete within {seconds} s; ask for fewer tokens or allow more time"
                ),
            )
        }
    }

    /// A rank that takes no requests was asked.
    pub fn not_this_rank() -> Self {
        Self {
            code: Some("not_this_rank"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                "this rank takes no requests; send them to rank 0 of its group",
            )
        }
    }

    /// There is no such path or method here.
    pub fn no_route(method: &str, path: &str) -> Self {
        let refused = REFUSED.iter().find(|(prefix, _)| path.starts_with(prefix));
        let (code, way_out) = match refused {
            Some((_, way_out)) => (Some("unsupported_endpoint"), *way_out),
            None => (None, "see GET /v1/models and POST /v1/chat/completions"),
        };
        Self {
            code,
            ..Self::new(
                StatusCode::NOT_FOUND,
                "invalid_request_error",
                format!("there is no {method} {path} here; {way_out}"),
            )
        }
    }

    /// The body is larger than the limit.
    pub fn body_too_large(limit: usize) -> Self {
        Self::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            "invalid_request_error",
            format!("the request body is larger than {limit} bytes; send a shorter one"),
        )
    }

    /// The body did not arrive in time.
    pub fn body_too_slow(seconds: u64) -> Self {
        Self::new(
            StatusCode::REQUEST_TIMEOUT,
            "invalid_request_error",
            format!("the request body did not arrive within {seconds} s; send it again"),
        )
    }

    /// Not now, or not here.
    pub fn unavailable(code: &'static str, message: impl Into<String>, retry: u64) -> Self {
        Self {
            code: Some(code),
            retry_after_seconds: Some(retry),
            ..Self::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "service_unavailable",
                message,
            )
        }
    }

    /// The backend failed while it worked on the request.
    pub fn engine_failed(message: impl Into<String>) -> Self {
        Self {
            code: Some("engine_failed"),
            ..Self::new(StatusCode::INTERNAL_SERVER_ERROR, "server_error", message)
        }
    }

    /// A request that the engine did not admit. `prompt_field` is what the caller calls its prompt.
    pub fn rejected(rejection: &Rejection, prompt_field: &str, retry_after_seconds: u64) -> Self {
        let message = rejection.to_string();
        match rejection {
            Rejection::Draining => Self::unavailable("draining", message + "; send it again", 1),
            Rejection::QueueFull { .. }
            | Rejection::TokensQueued { .. }
            | Rejection::OverShare { .. } => Self {
                code: Some("rate_limit_exceeded"),
                retry_after_seconds: Some(retry_after_seconds),
                ..Self::new(
                    StatusCode::TOO_MANY_REQUESTS,
                    "rate_limit_error",
                    message + "; try again later",
                )
            },
            Rejection::TooLong { .. } => Self {
                code: Some("context_length_exceeded"),
                ..Self::invalid(
                    prompt_field,
                    message + "; shorten the prompt or lower max_tokens",
                )
            },
            Rejection::EmptyPrompt | Rejection::UnknownToken { .. } => {
                Self::invalid(prompt_field, message)
            }
            Rejection::OutOfRange { field, .. } => Self::invalid(*field, message),
            Rejection::Parameter(error) => Self::invalid(error.field, message),
        }
    }

    /// The same error where the client calls a field by another name.
    pub fn renamed(mut self, from: &str, to: &str) -> Self {
        self.message = self.message.replace(from, to);
        self.param = self.param.map(|param| param.replace(from, to));
        self
    }

    /// The JSON of the error.
    pub fn body(&self) -> Value {
        let mut body = json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": self.code,
        }});
        if let Some(resume) = &self.resume {
            body[FIELD] = (**resume).clone();
        }
        body
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.body().to_string()).into_response();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_seconds {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}
