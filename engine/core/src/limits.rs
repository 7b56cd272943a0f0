//! The sizes an engine runs with, and what they allow a request to be.

use thiserror::Error;

use crate::request::{Rejection, Request};

/// Sizes fixed at start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Ids `0..vocabulary` exist.
    pub vocabulary: usize,
    /// Longest prompt plus output.
    pub max_model_len: usize,
    /// Sequences in the running batch.
    pub max_num_seqs: usize,
    /// Tokens in a step.
    pub max_num_batched_tokens: usize,
    /// Sequences that may wait beyond those that fit into the running batch.
    pub max_queued_requests: usize,
    /// Positions in a block.
    pub block_size: usize,
    /// Blocks of the cache.
    pub block_count: usize,
    /// Tokens that the model's prediction layer drafts for a decoding sequence in a step; 0 drafts none.
    pub draft_tokens: usize,
}

/// Most drafts of a sequence in a step.
pub const DRAFT_TOKENS_MAX: usize = 8;

/// Sizes that contradict each other.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{field} is {value}, but must be {allowed}: {why}")]
pub struct LimitsError {
    /// Which size.
    pub field: &'static str,
    /// What it is.
    pub value: usize,
    /// What it must be.
    pub allowed: String,
    /// Why.
    pub why: &'static str,
}

impl Limits {
    /// Checks that every sequence that is admitted can also run to its end.
    ///
    /// # Errors
    /// The first size that is too small.
    pub fn validate(&self) -> Result<(), LimitsError> {
        let least = |field, value: usize, least: usize, why| {
            if value >= least {
                return Ok(());
            }
            Err(LimitsError {
                field,
                value,
                allowed: format!("at least {least}"),
                why,
            })
        };
        if self.draft_tokens > DRAFT_TOKENS_MAX {
            return Err(LimitsError {
                field: "draft_tokens",
                value: self.draft_tokens,
                allowed: format!("at most {DRAFT_TOKENS_MAX}"),
                why: "each further draft is accepted less often",
            });
        }
        least("vocabulary", self.vocabulary, 1, "there must be a token")?;
        least(
            "max_model_len",
            self.max_model_len,
            2,
            "a prompt and an answer have a token each",
        )?;
        least(
            "max_num_seqs",
            self.max_num_seqs,
            1,
            "a sequence must be able to run",
        )?;
        least(
            "block_size",
            self.block_size,
            1,
            "a block holds at least one token",
        )?;
        least(
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            self.max_num_seqs,
            "a step has a token for each of max_num_seqs sequences",
        )?;
        least(
            "block_count",
            self.block_count,
            self.max_model_len.div_ceil(self.block_size),
            "one sequence of max_model_len tokens must fit into the cache",
        )
    }

    /// Checks a request against the sizes.
    ///
    /// # Errors
    /// Why it can never run.
    pub fn check(&self, request: &Request) -> Result<(), Rejection> {
        let within = |field, value: usize, limit: usize| {
            if (1..=limit).contains(&value) {
                return Ok(());
            }
            Err(Rejection::OutOfRange {
                field,
                value,
                limit,
            })
        };
        if request.prompt.is_empty() {
            return Err(Rejection::EmptyPrompt);
        }
        within("n", request.choices as usize, self.max_num_seqs)?;
        if request.max_tokens == 0 {
            within("max_tokens", request.max_tokens, self.max_model_len - 1)?;
        }
        if request.prompt.len() + request.max_tokens > self.max_model_len {
            return Err(Rejection::TooLong {
                prompt: request.prompt.len(),
                max_tokens: request.max_tokens,
                limit: self.max_model_len,
            });
        }
        if !request.resumed.is_empty() {
            within("n", request.choices as usize, 1)?;
            within(
                "resumed tokens",
                request.resumed.len(),
                request.max_tokens - 1,
            )?;
        }
        if let Some(token) = request
            .prompt
            .iter()
            .chain(&request.resumed)
            .find(|token| token.index() >= self.vocabulary)
        {
            return Err(Rejection::UnknownToken {
                token: *token,
                vocabulary: self.vocabulary,
            });
        }
        Ok(request.parameters.validate()?)
    }
}
