//! The bytes that each token stands for.
//!
//! A byte-level vocabulary spells every byte as one printable character, the table that GPT-2 introduced: the
//! printable bytes of Latin-1 stand for themselves, all others for the characters from U+0100 on. Undoing it token by
//! token, instead of decoding growing windows of tokens, is what makes incremental output exact.

use std::collections::HashMap;

use tokenizers::Tokenizer;

use crate::reasoning::{REASONING_END, REASONING_START};
use crate::text::TextError;
use crate::tool_format::TAGS;

/// Ids that a tokenizer may use; published vocabularies have up to 262,144 tokens.
const TOKENS_MAX: usize = 1 << 22;

/// Bytes of every token that has any; special tokens have none, so they never reach a client.
#[derive(Debug)]
pub struct TokenBytes {
    offsets: Vec<u32>,
    bytes: Vec<u8>,
}

impl TokenBytes {
    /// Reads the vocabulary of a byte-level tokenizer. Characters outside the byte table are kept as they are.
    ///
    /// # Errors
    /// An id is so large that the table of all tokens would be.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        let table = byte_table();
        let added = tokenizer.get_added_tokens_decoder();
        let vocabulary = tokenizer.get_vocab(true);
        let size = vocabulary.values().max().map_or(0, |id| *id as usize + 1);
        if size > TOKENS_MAX {
            return Err(TextError::Tokenizer(format!(
                "it has a token with the id {}, but ids must be below {TOKENS_MAX}",
                size - 1
            )));
        }
        let mut tokens: Vec<Vec<u8>> = vec![Vec::new(); size];
        for (token, id) in &vocabulary {
            tokens[*id as usize] = match added.get(id) {
                Some(added) if added.special && !is_parsed_tag(&added.content) => Vec::new(),
                Some(added) => added.content.clone().into_bytes(),
                None => token_bytes(token, &table),
            };
        }
        Ok(Self::of(tokens))
    }

    fn of(tokens: Vec<Vec<u8>>) -> Self {
        let mut offsets = Vec::with_capacity(tokens.len() + 1);
        let mut bytes = Vec::new();
        offsets.push(0);
        for token in tokens {
            bytes.extend_from_slice(&token);
            offsets.push(bytes.len() as u32);
        }
        Self { offsets, bytes }
    }

    /// These words as tokens 0, 1, ….
    #[cfg(test)]
    pub(crate) fn from_words(words: &[&str]) -> Self {
        Self::of(words.iter().map(|word| word.as_bytes().to_vec()).collect())
    }

    /// The bytes of a token; none for ids that the tokenizer does not name.
    pub fn get(&self, token: u32) -> &[u8] {
        let index = token as usize;
        match (self.offsets.get(index), self.offsets.get(index + 1)) {
            (Some(&start), Some(&end)) => &self.bytes[start as usize..end as usize],
            _ => &[],
        }
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Tags that the parsers of an answer look for.
fn is_parsed_tag(content: &str) -> bool {
    content == REASONING_START || content == REASONING_END || TAGS.contains(&content)
}

fn token_bytes(token: &str, table: &HashMap<char, u8>) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(token.len());
    for character in token.chars() {
        match table.get(&character) {
            Some(byte) => bytes.push(*byte),
            None => bytes.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    bytes
}

fn byte_table() -> HashMap<char, u8> {
    let mut table = HashMap::with_capacity(256);
    let mut next = 0x100;
    for byte in 0..=u8::MAX {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        let character = if printable {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).unwrap_or(char::REPLACEMENT_CHARACTER)
        };
        table.insert(character, byte);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_that_of_gpt2() {
        let table = byte_table();
        assert_eq!(table.len(), 256);
        for (character, byte) in [
            ('Ġ', b' '),
            ('Ċ', b'\n'),
            ('A', b'A'),
            ('ÿ', 0xFF),
            ('Ń', 0xAD),
            ('Ā', 0),
        ] {
            assert_eq!(table[&character], byte);
        }
    }
}
