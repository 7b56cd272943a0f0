//! Bytes to text, never half a character.

/// Holds back the bytes of an unfinished character until it is complete or cannot become one.
#[derive(Clone, Debug, Default)]
pub struct Detokenizer {
    pending: Vec<u8>,
}

impl Detokenizer {
    /// Appends the text that is complete now.
    pub fn push(&mut self, bytes: &[u8], text: &mut String) {
        self.pending.extend_from_slice(bytes);
        let mut start = 0;
        loop {
            match std::str::from_utf8(&self.pending[start..]) {
                Ok(valid) => {
                    text.push_str(valid);
                    self.pending.clear();
                    return;
                }
                Err(error) => {
                    let end = start + error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[start..end]));
                    let Some(skip) = error.error_len() else {
                        self.pending.drain(..end);
                        return;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    start = end + skip;
                }
            }
        }
    }

    /// The stream ended; an unfinished character becomes one replacement character.
    pub fn finish(&mut self, text: &mut String) {
        if !self.pending.is_empty() {
            self.pending.clear();
            text.push(char::REPLACEMENT_CHARACTER);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_character_cut_in_four_comes_out_whole() {
        let mut detokenizer = Detokenizer::default();
        let mut text = String::new();
        for (index, byte) in "🐋".bytes().enumerate() {
            assert!(text.is_empty(), "after {index} bytes");
            detokenizer.push(&[byte], &mut text);
        }
        assert_eq!(text, "🐋");
    }

    proptest! {
        #[test]
        fn any_cut_of_any_bytes_equals_lossy_decoding_of_all(
            chunks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..6), 0..20),
            words in proptest::collection::vec("[a-z🐋é漢]{0,4}", 0..6),
        ) {
            let mut bytes: Vec<u8> = words.concat().into_bytes();
            bytes.extend(chunks.concat());
            let mut detokenizer = Detokenizer::default();
            let mut text = String::new();
            for chunk in bytes.chunks(3) {
                detokenizer.push(chunk, &mut text);
            }
            detokenizer.finish(&mut text);
            prop_assert_eq!(text, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
}
