//! Requests, sequences, blocks, scheduling, sampling, admission, drain. Pure.
//!
//! admit → schedule → execute → complete: the [`Scheduler`] admits a [`Request`] and turns what runs into a plain
//! [`Batch`]; an [`Executor`] computes it; the [`Engine`] samples each sequence's next tokens from the logits, or has a
//! [`Picker`] do that where they are, reports [`Event`]s and lets the executor draft. Nothing in here knows threads, clocks, files or HTTP, so the same schedule can be replayed,
//! simulated and fuzzed.

mod batch;
mod blocks;
mod canary;
mod drafting;
mod engine;
mod limits;
mod mask;
mod picking;
mod queue;
mod random;
mod request;
mod sampling;
mod scheduler;
mod sequence;

pub use batch::{
    Batch, BatchBounds, BatchEntry, BlockId, DraftBatch, ExecuteError, Executor, Logits,
    SequenceId, StagedWeights, TokenId,
};
pub use blocks::{BlockManager, PrefixHash};
pub use canary::{CanaryError, CanaryReport, run_canary};
pub use engine::{Engine, Load, StepReport};
pub use limits::{DRAFT_TOKENS_MAX, Limits, LimitsError};
pub use mask::{Constraint, MaskError, MaskSource, Restriction, TokenMask};
pub use picking::{PickRow, Picked, Picker};
pub use random::uniform;
pub use request::{Event, EventKind, FinishReason, Rejection, Request, RequestId};
pub use sampling::{
    Logprobs, NonFiniteLogit, ParameterError, SampleContext, SampleError, Sampled, Sampler,
    SamplingParameters, TOP_LOGPROBS_MAX, argmax,
};
pub use scheduler::{Admission, Counters, Scheduler};
pub use sequence::Sequence;
