//! A grammar as the engine's mask: the two crates do not know each other.

use std::sync::Arc;

use engine_core::{Constraint, MaskError, MaskSource, Restriction, TokenId, TokenMask};
use engine_text::{Allowed, Grammar, GrammarState};

#[derive(Debug)]
struct Source(Grammar);

#[derive(Debug)]
struct Mask(GrammarState);

/// What the output of a request must be.
pub fn constraint(grammar: Grammar) -> Constraint {
    Constraint(Arc::new(Source(grammar)))
}

impl MaskSource for Source {
    fn start(&self) -> Box<dyn TokenMask> {
        Box::new(Mask(self.0.start()))
    }
}

impl TokenMask for Mask {
    fn restrict(&mut self, output: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        let failed = |error: engine_text::GrammarError| MaskError(error.to_string());
        for token in output.get(self.0.seen()..).unwrap_or_default() {
            self.0.take(token.0).map_err(failed)?;
        }
        match self.0.restrict(row).map_err(failed)? {
            Allowed::Some => Ok(Restriction::Masked),
            Allowed::Nothing => Ok(Restriction::Complete),
        }
    }
}
