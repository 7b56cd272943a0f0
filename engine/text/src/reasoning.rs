//! Splits an answer into what the model thinks and what it says.
//!
//! R1's prompt ends inside the reasoning (`<think>` is part of the prompt), other prompts do not, and a model may also
//! not think at all. A parser that waits for `<think>` puts all reasoning into the content in the first case; one that
//! assumes it loses the content in the last. So the caller says how the prompt ended and the rest is a state machine.
//!
//! Line breaks around the reasoning belong to the format, not to the text, and are dropped.

use crate::stop::overlap;

/// Opens the reasoning.
pub const REASONING_START: &str = "<think>";
/// Closes it.
pub const REASONING_END: &str = "</think>";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing but white space so far; `<think>` may follow.
    Undecided,
    /// Inside, before its first visible character.
    ReasoningOpens,
    Reasoning,
    /// After it, before the first visible character of the content.
    ContentOpens,
    Content,
}

/// Takes text in any pieces, gives reasoning and content.
#[derive(Clone, Debug)]
pub struct ReasoningParser {
    state: State,
    held: String,
}

impl ReasoningParser {
    /// For a prompt that ends inside the reasoning (`inside`) or before it.
    pub fn new(inside: bool) -> Self {
        Self {
            state: if inside {
                State::ReasoningOpens
            } else {
                State::Undecided
            },
            held: String::new(),
        }
    }

    /// Passes everything through as content, for models that do not think.
    pub fn off() -> Self {
        Self {
            state: State::Content,
            held: String::new(),
        }
    }

    /// Whether the text so far ends inside the reasoning.
    pub fn is_inside(&self) -> bool {
        matches!(self.state, State::ReasoningOpens | State::Reasoning)
    }

    /// Appends what is certain now.
    pub fn push(&mut self, text: &str, reasoning: &mut String, content: &mut String) {
        self.held.push_str(text);
        loop {
            let before = self.state;
            match self.state {
                State::Undecided => self.decide(),
                State::ReasoningOpens => self.skip_line_breaks(State::Reasoning),
                State::Reasoning => self.think(reasoning),
                State::ContentOpens => self.skip_line_breaks(State::Content),
                State::Content => content.push_str(&std::mem::take(&mut self.held)),
            }
            if self.state == before {
                return;
            }
        }
    }

    /// The stream ended: what was held back is what it looks like.
    pub fn finish(&mut self, reasoning: &mut String, content: &mut String) {
        let held = std::mem::take(&mut self.held);
        match self.state {
            State::ReasoningOpens | State::Reasoning => reasoning.push_str(&held),
            State::Undecided | State::ContentOpens | State::Content => content.push_str(&held),
        }
    }

    fn decide(&mut self) {
        let visible = self.held.trim_start();
        if let Some(rest) = visible.strip_prefix(REASONING_START) {
            self.held = rest.to_owned();
            self.state = State::ReasoningOpens;
        } else if !REASONING_START.starts_with(visible) {
            self.state = State::Content;
        }
    }

    fn skip_line_breaks(&mut self, next: State) {
        let rest = self.held.trim_start_matches(['\n', '\r']);
        self.held = rest.to_owned();
        if !self.held.is_empty() {
            self.state = next;
        }
    }

    fn think(&mut self, reasoning: &mut String) {
        if let Some(start) = self.held.find(REASONING_END) {
            reasoning.push_str(self.held[..start].trim_end_matches(['\n', '\r']));
            self.held.drain(..start + REASONING_END.len());
            self.state = State::ContentOpens;
            return;
        }
        let keep = overlap(&self.held, REASONING_END);
        let certain = self.held[..self.held.len() - keep].trim_end_matches(['\n', '\r']);
        let cut = certain.len();
        reasoning.push_str(certain);
        self.held.drain(..cut);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(inside: bool, chunks: &[&str]) -> (String, String) {
        let mut parser = ReasoningParser::new(inside);
        let (mut reasoning, mut content) = (String::new(), String::new());
        for chunk in chunks {
            parser.push(chunk, &mut reasoning, &mut content);
        }
        parser.finish(&mut reasoning, &mut content);
        (reasoning, content)
    }

    #[test]
    fn each_way_to_think_or_not_to_think_is_told_apart() {
        let pair = |r: &str, c: &str| (r.to_owned(), c.to_owned());
        assert_eq!(run(true, &["\n1+1\n</think>\n\n2"]), pair("1+1", "2"));
        assert_eq!(
            run(false, &["<think>\n1+1\n</think>\n\n2"]),
            pair("1+1", "2")
        );
        assert_eq!(run(false, &[" \n<think>a</think>b"]), pair("a", "b"));
        assert_eq!(run(false, &["just 2"]), pair("", "just 2"));
        assert_eq!(run(false, &["<thin"]), pair("", "<thin"));
        assert_eq!(run(false, &["a <think> b"]), pair("", "a <think> b"));
        assert_eq!(
            run(true, &["never done </thin"]),
            pair("never done </thin", "")
        );
        assert_eq!(run(true, &["</think>2"]), pair("", "2"));
        assert_eq!(run(true, &["a\n\nb</think>"]), pair("a\n\nb", ""));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_split(
            parts in proptest::collection::vec(
                prop_oneof![
                    Just("<think>"), Just("</think>"), Just("\n"), Just("<"), Just("</th"), Just("a"), Just(" "), Just("é")
                ], 0..12),
            inside in any::<bool>(),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..8),
        ) {
            let text = parts.concat();
            let boundaries: Vec<usize> = text.char_indices().map(|c| c.0).chain([text.len()]).collect();
            let mut points: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            points.extend([0, text.len()]);
            points.sort_unstable();
            let chunks: Vec<&str> = points.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(run(inside, &chunks), run(inside, &[&text]));
        }
    }
}
