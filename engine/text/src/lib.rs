//! Tokenizer, chat template, detokeniser, stop strings, reasoning parser.
//!
//! Text goes in through [`Text::render`] and [`Text::encode`]; tokens come out through an [`OutputParser`], one for
//! each choice of a request. Invariant: what a client receives does not depend on how the token stream was cut into
//! pieces. Special tokens are found by their text, never by number, because families reuse numbers.
//!
//! Nothing here reads files: the caller hands over their contents in [`TextFiles`].

mod bytes;
mod detokenizer;
mod generation;
mod output;
mod reasoning;
mod stop;
mod template;
mod text;

pub use bytes::TokenBytes;
pub use detokenizer::Detokenizer;
pub use generation::GenerationDefaults;
pub use output::{Delta, OutputParser};
pub use reasoning::{REASONING_END, REASONING_START, ReasoningParser};
pub use stop::StopStrings;
pub use template::{ChatMessage, Role, TemplateError};
pub use text::{Text, TextError, TextFiles};
