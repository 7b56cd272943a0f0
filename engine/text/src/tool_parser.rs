//! Takes tool calls out of what a model says.
//!
//! Invariants: the machine steps character by character, so the result does not depend on how the text was cut; and
//! every character ends up in the content or in a call. What looks like a call and turns out not to be one becomes
//! content again, from its first character on.
//!
//! Surprise: arguments are handed out while they arrive, so once a name is out they belong to the call even if they
//! turn out to be no JSON; OpenAI's clients are told to expect that. Markup after a complete call is dropped.

use std::collections::VecDeque;

use crate::json_scan::{JsonScanner, Scan};
use crate::stop::overlap;
use crate::tool_format::{Closing, Header, ToolFormat, read_call};

/// Longest text that is held back until it is clear whether a call begins.
const HEADER_BYTES_MAX: usize = 1024;
/// Longest call that must be read whole.
const WHOLE_BYTES_MAX: usize = 64 << 10;

/// News about one tool call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallDelta {
    /// Which call of the answer.
    pub index: usize,
    /// The function, once, with the first delta of the call.
    pub name: Option<String>,
    /// More of the arguments' text.
    pub arguments: String,
}

#[derive(Clone, Copy, Debug)]
enum State {
    /// Nothing but white space so far, in a format whose calls are the whole answer.
    Start,
    /// Content; `held` may be the beginning of a tag.
    Text,
    /// `held` begins with a tag or a bracket that may open a call.
    Header,
    /// `held` is a call to be read whole; its object begins there.
    Whole(usize, JsonScanner),
    Arguments(JsonScanner),
    /// Arguments that are no JSON, up to an end tag of which `held` may be the beginning.
    Broken,
    /// After the arguments.
    Closing,
    /// After a call.
    Between,
}

/// Takes text in any pieces, gives content and calls.
#[derive(Clone, Debug)]
pub struct ToolParser {
    format: Option<ToolFormat>,
    state: State,
    held: String,
    calls: usize,
    calls_max: usize,
    full: bool,
}

struct Output<'a> {
    content: &'a mut String,
    calls: &'a mut Vec<CallDelta>,
}

impl ToolParser {
    /// For answers in `format`. Without `parallel` the first complete call is the last.
    pub fn new(format: ToolFormat, parallel: bool) -> Self {
        Self {
            format: Some(format),
            state: match format.is_bare() {
                true => State::Start,
                false => State::Text,
            },
            held: String::new(),
            calls: 0,
            calls_max: if parallel { usize::MAX } else { 1 },
            full: false,
        }
    }

    /// Passes everything through.
    pub fn off() -> Self {
        Self {
            format: None,
            state: State::Text,
            held: String::new(),
            calls: 0,
            calls_max: 0,
            full: false,
        }
    }

    /// Calls so far, complete or not.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Appends what is certain now; true when no further call may follow, and so nothing else either.
    pub fn push(&mut self, text: &str, content: &mut String, calls: &mut Vec<CallDelta>) -> bool {
        let Some(format) = self.format else {
            content.push_str(text);
            return false;
        };
        let mut queue: VecDeque<char> = text.chars().collect();
        self.run(format, &mut queue, &mut Output { content, calls });
        self.full
    }

    /// The stream ended: what was held back is what it looks like.
    pub fn finish(&mut self, content: &mut String, calls: &mut Vec<CallDelta>) {
        let Some(format) = self.format else {
            return;
        };
        let out = &mut Output { content, calls };
        while !self.held.is_empty() && !self.full {
            match self.state {
                State::Start | State::Text => out.content.push_str(&std::mem::take(&mut self.held)),
                State::Arguments(_) | State::Closing => self.held.clear(),
                State::Between if self.held.trim_ascii().is_empty() => self.held.clear(),
                State::Broken => {
                    let rest = std::mem::take(&mut self.held);
                    self.argue(&rest, out);
                }
                State::Header | State::Whole(..) | State::Between => {
                    let mut queue = VecDeque::new();
                    self.give_back(&mut queue, out);
                    self.run(format, &mut queue, out);
                }
            }
        }
    }

    fn run(&mut self, format: ToolFormat, queue: &mut VecDeque<char>, out: &mut Output<'_>) {
        while !self.full
            && let Some(character) = queue.pop_front()
        {
            self.step(format, character, queue, out);
        }
    }

    fn step(
        &mut self,
        format: ToolFormat,
        character: char,
        queue: &mut VecDeque<char>,
        out: &mut Output<'_>,
    ) {
        match self.state {
            State::Arguments(mut scanner) => match scanner.push(character) {
                Scan::Invalid if !format.end_tags().is_empty() => {
                    self.state = State::Broken;
                    queue.push_front(character);
                }
                scan => {
                    self.argue(character.encode_utf8(&mut [0; 4]), out);
                    self.state = match scan {
                        Scan::Complete => State::Closing,
                        Scan::Inside | Scan::Invalid => State::Arguments(scanner),
                    };
                }
            },
            State::Start => self.start(character, queue, out),
            State::Text => {
                self.held.push(character);
                self.read_text(format, out);
            }
            State::Header => {
                self.held.push(character);
                self.read_header(format, queue, out);
            }
            State::Whole(from, scanner) => {
                self.held.push(character);
                self.read_whole(from, scanner, character, queue, out);
            }
            State::Broken => {
                self.held.push(character);
                self.read_broken(format, out);
            }
            State::Closing => {
                self.held.push(character);
                match format.closing(&self.held) {
                    Closing::Incomplete if self.held.len() <= HEADER_BYTES_MAX => {}
                    Closing::Incomplete | Closing::Malformed => self.leave_call(queue, out),
                    Closing::Done => self.end_call(),
                }
            }
            State::Between => {
                self.held.push(character);
                self.read_between(format, queue, out);
            }
        }
    }

    /// What was held is content, at least its first character; the rest is looked at again.
    fn give_back(&mut self, queue: &mut VecDeque<char>, out: &mut Output<'_>) {
        let held = std::mem::take(&mut self.held);
        let mut characters = held.chars();
        out.content.extend(characters.next());
        for character in characters.rev() {
            queue.push_front(character);
        }
        self.state = State::Text;
    }

    /// The call is complete but its end is not as it should be: what follows is looked at as content, except for the
    /// bracket of the call's own object.
    fn leave_call(&mut self, queue: &mut VecDeque<char>, out: &mut Output<'_>) {
        if self.calls >= self.calls_max {
            self.end_call();
            return;
        }
        let Some(rest) = self.held.trim_start().strip_prefix('}') else {
            self.give_back(queue, out);
            return;
        };
        for character in rest.chars().rev() {
            queue.push_front(character);
        }
        self.held.clear();
        self.state = State::Text;
    }

    fn start(&mut self, character: char, queue: &mut VecDeque<char>, out: &mut Output<'_>) {
        self.held.push(character);
        if character == '{' {
            self.state = State::Header;
        } else if !character.is_ascii_whitespace() {
            // A tag may still open a call; white space before it is content like any other.
            let held = std::mem::take(&mut self.held);
            let blanks = held.len() - character.len_utf8();
            out.content.push_str(&held[..blanks]);
            queue.push_front(character);
            self.state = State::Text;
        }
    }

    fn read_text(&mut self, format: ToolFormat, out: &mut Output<'_>) {
        let openings = format.openings();
        let keep = openings
            .iter()
            .map(|tag| overlap(&self.held, tag))
            .max()
            .unwrap_or(0);
        if let Some(tag) = openings.iter().find(|tag| self.held.ends_with(**tag)) {
            let before = self.held.len() - tag.len();
            out.content.push_str(&self.held[..before]);
            self.held.drain(..before);
            self.state = State::Header;
            return;
        }
        let cut = self.held.len() - keep;
        out.content.push_str(&self.held[..cut]);
        self.held.drain(..cut);
    }

    fn read_header(
        &mut self,
        format: ToolFormat,
        queue: &mut VecDeque<char>,
        out: &mut Output<'_>,
    ) {
        match format.header(&self.held) {
            Header::Incomplete if self.held.len() <= HEADER_BYTES_MAX => {}
            Header::Incomplete | Header::Malformed => self.give_back(queue, out),
            Header::Call(name, from) => {
                let arguments = self.held.split_off(from);
                self.held.clear();
                self.begin_call(name, out);
                self.state = State::Arguments(JsonScanner::default());
                for character in arguments.chars().rev() {
                    queue.push_front(character);
                }
            }
            Header::Whole(from) => {
                let mut scanner = JsonScanner::default();
                for (at, character) in self.held[from..].char_indices() {
                    if scanner.push(character) == Scan::Complete {
                        // The last character just arrived, so nothing follows it.
                        debug_assert_eq!(from + at + 1, self.held.len());
                        self.take_whole(from, queue, out);
                        return;
                    }
                }
                self.state = State::Whole(from, scanner);
            }
        }
    }

    fn read_whole(
        &mut self,
        from: usize,
        mut scanner: JsonScanner,
        character: char,
        queue: &mut VecDeque<char>,
        out: &mut Output<'_>,
    ) {
        match scanner.push(character) {
            Scan::Inside if self.held.len() <= WHOLE_BYTES_MAX => {
                self.state = State::Whole(from, scanner);
            }
            Scan::Inside | Scan::Invalid => self.give_back(queue, out),
            Scan::Complete => self.take_whole(from, queue, out),
        }
    }

    fn take_whole(&mut self, from: usize, queue: &mut VecDeque<char>, out: &mut Output<'_>) {
        let Some((name, arguments)) = read_call(&self.held[from..]) else {
            self.give_back(queue, out);
            return;
        };
        self.held.clear();
        self.begin_call(name, out);
        self.argue(&arguments, out);
        // The object's own bracket is gone already; the closing expects it.
        queue.push_front('}');
        self.state = State::Closing;
    }

    fn read_broken(&mut self, format: ToolFormat, out: &mut Output<'_>) {
        let tags = format.end_tags();
        if let Some(tag) = tags.iter().find(|tag| self.held.ends_with(**tag)) {
            let before = self.held[..self.held.len() - tag.len()].to_owned();
            self.argue(&before, out);
            self.end_call();
            return;
        }
        let keep = tags.iter().map(|tag| overlap(&self.held, tag)).max();
        let cut = self.held.len() - keep.unwrap_or(0);
        let certain: String = self.held.drain(..cut).collect();
        self.argue(&certain, out);
    }

    fn read_between(
        &mut self,
        format: ToolFormat,
        queue: &mut VecDeque<char>,
        out: &mut Output<'_>,
    ) {
        let visible = self.held.trim_ascii_start();
        let (openings, separators) = (format.openings(), format.separators());
        if visible.is_empty() {
            if self.held.len() > HEADER_BYTES_MAX {
                self.give_back(queue, out);
            }
        } else if openings.contains(&visible) || (format.is_bare() && visible == "{") {
            self.held = visible.to_owned();
            self.state = State::Header;
        } else if separators.contains(&visible) {
            self.held.clear();
        } else if !openings
            .iter()
            .chain(separators)
            .any(|tag| tag.starts_with(visible))
        {
            self.give_back(queue, out);
        }
    }

    fn begin_call(&mut self, name: String, out: &mut Output<'_>) {
        out.calls.push(CallDelta {
            index: self.calls,
            name: Some(name),
            arguments: String::new(),
        });
        self.calls += 1;
    }

    fn end_call(&mut self) {
        self.held.clear();
        self.state = State::Between;
        self.full = self.calls >= self.calls_max;
    }

    /// More arguments of the last call.
    fn argue(&self, text: &str, out: &mut Output<'_>) {
        if text.is_empty() {
            return;
        }
        let index = self.calls - 1;
        match out.calls.last_mut().filter(|call| call.index == index) {
            Some(call) => call.arguments.push_str(text),
            None => out.calls.push(CallDelta {
                index,
                name: None,
                arguments: text.to_owned(),
            }),
        }
    }
}

#[cfg(test)]
#[path = "tool_parser_tests.rs"]
mod tests;
