//! What a client asks of the engine, what it may be refused for, and what the engine tells about it.

use thiserror::Error;

use crate::batch::TokenId;
use crate::mask::Constraint;
use crate::sampling::{ParameterError, Sampled, SamplingParameters};

/// Names a request within one engine process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RequestId(pub u64);

/// One prompt and how to continue it.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// Given by the caller, never reused.
    pub id: RequestId,
    /// At least one token.
    pub prompt: Vec<TokenId>,
    /// Independent continuations; OpenAI's `n`.
    pub choices: u32,
    /// Tokens to generate at most, at least 1.
    pub max_tokens: usize,
    /// How tokens are chosen.
    pub parameters: SamplingParameters,
    /// Tokens that end the answer, such as the model's end of sequence; not applied under `ignore_eos`.
    pub stop_tokens: Vec<TokenId>,
    /// Requests share cached prefixes only under the same salt (one salt per tenant).
    pub cache_salt: String,
    /// What the output must be; absent leaves it free.
    pub constraint: Option<Constraint>,
    /// Lower goes first; 0 unless asked otherwise.
    pub priority: i64,
    /// Requests of different tenants take turns.
    pub tenant: String,
    /// Output that was generated elsewhere already; only for one choice. It counts towards `max_tokens`.
    pub resumed: Vec<TokenId>,
}

impl Request {
    /// Tokens that it may compute and generate, all choices together.
    pub fn cost(&self) -> usize {
        self.prompt.len() + self.max_tokens * self.choices as usize
    }
}

/// Why a sequence ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// A stop token or, decided by the caller, a stop string.
    Stop,
    /// `max_tokens` or the longest context.
    Length,
    /// The client went away or the drain ran out of time.
    Abort,
    /// The request's own time was over.
    Deadline,
    /// The backend failed.
    Error,
    /// The weights were replaced, and its output so far cannot be taken back.
    Replaced,
}

impl FinishReason {
    /// The value of vLLM's metric label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            // vLLM has no word of its own for it.
            Self::Abort | Self::Deadline | Self::Replaced => "abort",
            Self::Error => "error",
        }
    }
}

/// What happened to one choice of a request in a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// Whose.
    pub request: RequestId,
    /// Which of its choices.
    pub choice: u32,
    /// What.
    pub kind: EventKind,
}

/// The kinds of [`Event`], in the order in which they come.
#[derive(Clone, Debug, PartialEq)]
pub enum EventKind {
    /// The sequence entered the running batch for the first time; so many prompt tokens came from the cache.
    Started {
        /// Prompt tokens that need not be computed.
        cached_tokens: usize,
        /// Which weights it is computed with; 1 are the first ones.
        weights_version: u64,
    },
    /// All output so far is void: the sequence begins again with other weights.
    Restarted,
    /// The next token. A stop token is reported too, before [`EventKind::Finished`].
    Token(Sampled),
    /// Nothing follows.
    Finished(FinishReason),
}

/// Why a request was not admitted.
#[derive(Clone, Debug, PartialEq, Error)]
pub enum Rejection {
    /// The engine finishes what it has and takes nothing new.
    #[error("this replica is draining and takes no new requests")]
    Draining,
    /// The queue is full.
    #[error("{waiting} requests are waiting already and at most {limit} may")]
    QueueFull {
        /// Sequences in the queue.
        waiting: usize,
        /// How many it holds.
        limit: usize,
    },
    /// What waits costs too many tokens.
    #[error(
        "requests of {waiting} tokens are waiting already, this one has {cost} and at most {limit} may wait"
    )]
    TokensQueued {
        /// Tokens in the queue.
        waiting: usize,
        /// Tokens of this request.
        cost: usize,
        /// How many may wait.
        limit: usize,
    },
    /// The queue fills up and this tenant has more than its share of it.
    #[error(
        "{waiting} requests of this tenant are waiting already, its share of the queue is {share}"
    )]
    OverShare {
        /// Sequences of the tenant in the queue.
        waiting: usize,
        /// How many it may have while others wait.
        share: usize,
    },
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Not even one token could be generated, or not as many as asked.
    #[error(
        "the prompt has {prompt} tokens and max_tokens is {max_tokens}, together {}, \
         but the longest context is {limit} tokens",
        prompt + max_tokens
    )]
    TooLong {
        /// Prompt tokens.
        prompt: usize,
        /// Tokens asked for.
        max_tokens: usize,
        /// `max_model_len`.
        limit: usize,
    },
    /// A prompt token is outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocabulary} tokens")]
    UnknownToken {
        /// The token.
        token: TokenId,
        /// Ids `0..vocabulary` exist.
        vocabulary: usize,
    },
    /// `n` or `max_tokens` out of range.
    #[error("{field} is {value}, but must be between 1 and {limit}")]
    OutOfRange {
        /// As the request spells it.
        field: &'static str,
        /// What was given.
        value: usize,
        /// The largest value.
        limit: usize,
    },
    /// A sampling parameter out of range.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
}

impl Rejection {
    /// Whether the same request may be admitted later or elsewhere.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Draining
                | Self::QueueFull { .. }
                | Self::TokensQueued { .. }
                | Self::OverShare { .. }
        )
    }
}
