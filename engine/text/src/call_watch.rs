//! Notices that a free answer begins a call of a tool, so that its grammar can take over from there.
//!
//! Invariant: every text in which [`crate::tool_parser`] would see a call passes through [`Place::Call`], where the
//! grammar of calls decides; nothing else is restricted. A call begins at a token's border: tokens that would finish
//! an opening tag and carry on in the same breath are not allowed. The bracket that opens a call in a bare format is
//! different: it is often the beginning of a longer token, so there the grammar is asked about the whole token.

use std::sync::Arc;

use crate::bytes::TokenBytes;
use crate::tool_format::ToolFormat;

/// What the next token means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// Nothing but white space so far, in a format whose bare bracket opens a call.
    Start,
    /// Free text.
    Text,
    /// Inside a call, after its opening tag.
    Call,
    /// After a call, in a format whose bare bracket opens the next one.
    Between,
}

/// What a token does where a bare bracket opens a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Opening {
    /// Leaves everything as it is.
    Blank,
    /// Begins a call, if the grammar allows the token.
    Call,
    /// May not come: it would begin a call where the grammar cannot follow.
    Never,
    /// Begins free text.
    Text,
}

/// Where a free answer is.
#[derive(Clone, Debug)]
pub(crate) struct CallWatch {
    format: ToolFormat,
    pub(crate) place: Place,
    /// The last bytes of free text, in which a tag may have begun.
    tail: Vec<u8>,
    /// Tokens that hold a whole tag and more; hardly any vocabulary has one.
    around_a_tag: Arc<[u32]>,
}

impl CallWatch {
    pub(crate) fn new(format: ToolFormat, vocabulary: &TokenBytes) -> Self {
        let holds_a_tag = |token: &u32| {
            let bytes = vocabulary.get(*token);
            let tags = format.call_openings().iter();
            tags.map(|tag| tag.as_bytes())
                .any(|tag| holds_inside(bytes, tag))
        };
        Self {
            format,
            around_a_tag: (0..vocabulary.len() as u32).filter(holds_a_tag).collect(),
            place: match format.is_bare() {
                true => Place::Start,
                false => Place::Text,
            },
            tail: Vec::new(),
        }
    }

    /// What a token does in [`Place::Start`] or [`Place::Between`].
    pub(crate) fn opening(&self, bytes: &[u8]) -> Opening {
        let is_blank = |byte: &u8| byte.is_ascii_whitespace();
        let is_separator = |byte: &u8| self.place == Place::Between && *byte == b';';
        let lead = bytes
            .iter()
            .take_while(|byte| is_blank(byte) || is_separator(byte))
            .count();
        match bytes.get(lead) {
            None => Opening::Blank,
            Some(b'{') if bytes[..lead].iter().any(is_separator) => Opening::Never,
            Some(b'{') => Opening::Call,
            Some(_) => Opening::Text,
        }
    }

    /// Takes a token of free text; true when it ended with the opening tag of a call.
    pub(crate) fn read(&mut self, bytes: &[u8]) -> bool {
        self.tail.extend_from_slice(bytes);
        let tags = self.format.call_openings();
        if tags.iter().any(|tag| self.tail.ends_with(tag.as_bytes())) {
            self.tail.clear();
            self.place = Place::Call;
            return true;
        }
        let longest = tags.iter().map(|tag| tag.len()).max().unwrap_or(0);
        let keep = self.tail.len().saturating_sub(longest);
        self.tail.drain(..keep);
        false
    }

    /// A call is complete.
    pub(crate) fn end_call(&mut self) {
        self.place = match self.format.is_bare() {
            true => Place::Between,
            false => Place::Text,
        };
    }

    /// Forbids tokens that have the end of an opening tag in their middle.
    pub(crate) fn forbid_running_on(&self, vocabulary: &TokenBytes, row: &mut [f32]) {
        for token in self.around_a_tag.iter() {
            if let Some(logit) = row.get_mut(*token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        for tag in self.format.call_openings() {
            let tag = tag.as_bytes();
            let most = self.tail.len().min(tag.len() - 1);
            for begun in (1..=most).filter(|begun| self.tail.ends_with(&tag[..*begun])) {
                let rest = &tag[begun..];
                for (index, logit) in row.iter_mut().enumerate() {
                    let bytes = vocabulary.get(index as u32);
                    if bytes.len() > rest.len() && bytes.starts_with(rest) {
                        *logit = f32::NEG_INFINITY;
                    }
                }
            }
        }
    }
}

/// Whether `part` stands in `bytes` with something after it.
fn holds_inside(bytes: &[u8], part: &[u8]) -> bool {
    bytes.len() > part.len()
        && bytes[..bytes.len() - 1]
            .windows(part.len())
            .any(|window| window == part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_seen_however_it_is_cut() {
        for cut in 1..10 {
            let mut watch = CallWatch::new(ToolFormat::Hermes, &TokenBytes::from_words(&[]));
            let text = b"a < b <tool<tool_call>";
            let pieces: Vec<&[u8]> = text.chunks(cut).collect();
            for (index, piece) in pieces.iter().enumerate() {
                let is_last = index + 1 == pieces.len();
                assert_eq!(watch.read(piece), is_last, "{cut}");
            }
            assert_eq!(watch.place, Place::Call);
            watch.end_call();
            assert_eq!(watch.place, Place::Text);
            assert!(!watch.read(b">"), "the tag was used up");
        }
    }

    #[test]
    fn a_token_must_not_finish_a_tag_and_carry_on() {
        let words = [
            "a",
            ">",
            ">{",
            "_call>x",
            "call>x",
            "<tool_call>",
            "<tool_call>{",
        ];
        let vocabulary = TokenBytes::from_words(&words);
        let forbidden = |text: &[u8]| {
            let mut watch = CallWatch::new(ToolFormat::Hermes, &vocabulary);
            watch.read(text);
            let mut row = vec![0.0; words.len()];
            watch.forbid_running_on(&vocabulary, &mut row);
            (0..words.len())
                .filter(|token| row[*token] == f32::NEG_INFINITY)
                .collect::<Vec<_>>()
        };
        assert_eq!(forbidden(b"a"), [6]);
        assert_eq!(forbidden(b"<tool_call"), [2, 6]);
        assert_eq!(forbidden(b"<tool"), [3, 6]);
    }

    #[test]
    fn a_bracket_opens_a_call_at_the_start_and_after_a_call() {
        let mut watch = CallWatch::new(ToolFormat::Llama3Json, &TokenBytes::from_words(&[]));
        assert_eq!(watch.opening(b" \n"), Opening::Blank);
        assert_eq!(watch.opening(b" {\""), Opening::Call);
        assert_eq!(watch.opening(b"; "), Opening::Text);
        assert_eq!(watch.opening(b"Yes {"), Opening::Text);
        watch.end_call();
        assert_eq!(watch.opening(b"; "), Opening::Blank);
        assert_eq!(watch.opening(b"{"), Opening::Call);
        assert_eq!(watch.opening(b"; {"), Opening::Never);
    }
}
