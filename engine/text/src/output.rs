//! Tokens of one choice to what its client receives.

use std::sync::Arc;

use crate::bytes::TokenBytes;
use crate::detokenizer::Detokenizer;
use crate::reasoning::ReasoningParser;
use crate::stop::StopStrings;
use crate::tool_parser::{CallDelta, ToolParser};

/// New text since the last one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// What the model thought.
    pub reasoning: String,
    /// What it said.
    pub content: String,
    /// What it calls.
    pub calls: Vec<CallDelta>,
    /// A stop string or the last call was reached: later tokens must be ignored.
    pub stopped: bool,
}

impl Delta {
    /// Whether there is no new text.
    pub fn is_empty(&self) -> bool {
        self.reasoning.is_empty() && self.content.is_empty() && self.calls.is_empty()
    }
}

/// Detokeniser, stop strings, reasoning parser and tool parser in a row.
#[derive(Clone, Debug)]
pub struct OutputParser {
    bytes: Arc<TokenBytes>,
    detokenizer: Detokenizer,
    stops: StopStrings,
    reasoning: ReasoningParser,
    tools: ToolParser,
}

impl OutputParser {
    /// A parser at the start of an answer.
    pub fn new(
        bytes: Arc<TokenBytes>,
        stops: StopStrings,
        reasoning: ReasoningParser,
        tools: ToolParser,
    ) -> Self {
        Self {
            bytes,
            detokenizer: Detokenizer::default(),
            stops,
            reasoning,
            tools,
        }
    }

    /// Whether the answer calls tools.
    pub fn has_calls(&self) -> bool {
        self.tools.calls() > 0
    }

    /// Whether the answer is inside its reasoning.
    pub fn is_reasoning(&self) -> bool {
        self.reasoning.is_inside()
    }

    /// Takes the next token.
    pub fn push(&mut self, token: u32) -> Delta {
        let mut text = String::new();
        self.detokenizer.push(self.bytes.get(token), &mut text);
        self.take(&text, false)
    }

    /// The answer ended.
    pub fn finish(&mut self) -> Delta {
        let mut text = String::new();
        self.detokenizer.finish(&mut text);
        self.take(&text, true)
    }

    fn take(&mut self, text: &str, last: bool) -> Delta {
        let mut delta = Delta::default();
        let mut passed = String::new();
        delta.stopped = self.stops.push(text, &mut passed);
        if last && !delta.stopped {
            self.stops.finish(&mut passed);
        }
        let mut said = String::new();
        self.reasoning
            .push(&passed, &mut delta.reasoning, &mut said);
        if last || delta.stopped {
            self.reasoning.finish(&mut delta.reasoning, &mut said);
        }
        delta.stopped |= self.tools.push(&said, &mut delta.content, &mut delta.calls);
        if last || delta.stopped {
            self.tools.finish(&mut delta.content, &mut delta.calls);
        }
        delta
    }
}
