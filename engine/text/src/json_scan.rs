//! Finds the end of a JSON object in a stream of characters.
//!
//! It follows strings and brackets and refuses characters that no JSON has outside of strings; it does not check more,
//! because a model's arguments belong to the client, valid or not.

/// What a character did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scan {
    /// The object goes on.
    Inside,
    /// This character closed the object.
    Complete,
    /// No JSON has this character here.
    Invalid,
}

/// Where in the object the stream is.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct JsonScanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl JsonScanner {
    /// Takes the next character; the first one must be `{`.
    pub(crate) fn push(&mut self, character: char) -> Scan {
        if self.in_string {
            match character {
                _ if self.escaped => self.escaped = false,
                '\\' => self.escaped = true,
                '"' => self.in_string = false,
                _ => {}
            }
            return Scan::Inside;
        }
        match character {
            '{' | '[' => self.depth += 1,
            '}' | ']' => {
                self.depth = self.depth.saturating_sub(1);
                if self.depth == 0 {
                    return Scan::Complete;
                }
            }
            '"' => self.in_string = true,
            ':' | ',' | '+' | '-' | '.' => {}
            _ if character.is_ascii_alphanumeric() || character.is_ascii_whitespace() => {}
            _ => return Scan::Invalid,
        }
        Scan::Inside
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn end(text: &str) -> Option<(usize, Scan)> {
        let mut scanner = JsonScanner::default();
        text.chars()
            .map(|c| scanner.push(c))
            .enumerate()
            .find(|(_, scan)| *scan != Scan::Inside)
    }

    #[test]
    fn brackets_in_strings_do_not_count() {
        assert_eq!(
            end(r#"{"a":"}\"}","b":[{}]} x"#),
            Some((20, Scan::Complete))
        );
        assert_eq!(end(r#"{"a":<"#), Some((5, Scan::Invalid)));
        assert_eq!(end(r#"{"a":1"#), None);
    }
}
