//! Which tokens may come next in a sequence, decided by someone outside: a grammar, a schema.
//!
//! Invariant: what a mask allows is a function of the sequence's own output alone. A mask may keep state between calls,
//! but it is handed the whole output each time, so a preempted or resumed sequence needs nothing saved.

use std::fmt;
use std::sync::Arc;

use thiserror::Error;

use crate::batch::TokenId;

/// What a mask says about the next token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Restriction {
    /// Any token may come.
    Free,
    /// Only tokens whose logit is still finite may come; at least one is.
    Masked,
    /// The output is complete: nothing may come.
    Complete,
}

/// The mask gave up: the output left the grammar, or its limits were reached.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("the next token could not be restricted: {0}")]
pub struct MaskError(pub String);

/// The state of one sequence.
pub trait TokenMask: Send + fmt::Debug {
    /// Sets the logits of tokens that may not follow `output` to negative infinity. `output` is all that was generated,
    /// and never shorter than in the call before.
    ///
    /// # Errors
    /// See [`MaskError`].
    fn restrict(&mut self, output: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError>;
}

/// Makes the masks of the choices of a request.
pub trait MaskSource: Send + Sync + fmt::Debug {
    /// A mask before the first token of output.
    fn start(&self) -> Box<dyn TokenMask>;
}

/// What the output of a request must be; two are equal when they are the same object.
#[derive(Clone, Debug)]
pub struct Constraint(pub Arc<dyn MaskSource>);

impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
