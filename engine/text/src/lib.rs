//! Tokenizer, chat template, detokeniser, stop strings, reasoning and tool parsers, grammars.
//!
//! Text goes in through [`Text::render`] and [`Text::encode`]; tokens come out through an [`OutputParser`], one for
//! each choice of a request. Invariant: what a client receives does not depend on how the token stream was cut into
//! pieces. Special tokens are found by their text, never by number, because families reuse numbers.
//!
//! Nothing here reads files: the caller hands over their contents in [`TextFiles`].

mod bytes;
mod call_watch;
mod detokenizer;
mod generation;
mod grammar;
mod json_scan;
mod output;
mod reasoning;
mod stop;
mod template;
mod text;
mod tool_format;
mod tool_parser;
mod tool_prompt;

pub use bytes::TokenBytes;
pub use detokenizer::Detokenizer;
pub use generation::GenerationDefaults;
pub use grammar::{
    Allowed, AnswerRule, CallRule, CallableFunction, ContentRule, GRAMMAR_BYTES_MAX, Grammar,
    GrammarError, GrammarState,
};
pub use output::{Delta, OutputParser};
pub use reasoning::{REASONING_END, REASONING_START, ReasoningParser};
pub use stop::StopStrings;
pub use template::{ChatMessage, Role, TemplateError, ToolCall};
pub use text::{AllowedCalls, Text, TextError, TextFiles};
pub use tool_format::{TOOL_NAME_BYTES_MAX, ToolCallParser, ToolFormat, is_tool_name};
pub use tool_parser::{CallDelta, ToolParser};
