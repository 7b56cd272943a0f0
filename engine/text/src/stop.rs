//! Ends a text at the first stop string, wherever the token borders are.
//!
//! The first stop string is the one that is complete first, not the one that begins first: only that does not depend
//! on how the text was cut. Of two that are complete at the same character the longer one counts.

/// Looks for stop strings in a stream of text.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopStrings {
    /// Empty strings are ignored.
    pub fn new(strings: Vec<String>) -> Self {
        Self {
            strings: strings.into_iter().filter(|s| !s.is_empty()).collect(),
            held: String::new(),
            stopped: false,
        }
    }

    /// Appends to `out` what can no longer be part of a stop string; true when one was found.
    pub fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        if self.strings.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        let found = self
            .strings
            .iter()
            .filter_map(|stop| {
                let start = self.held.find(stop.as_str())?;
                Some((start + stop.len(), start))
            })
            .min();
        if let Some((_, start)) = found {
            out.push_str(&self.held[..start]);
            self.held.clear();
            self.stopped = true;
            return true;
        }
        let keep = self
            .strings
            .iter()
            .map(|stop| overlap(&self.held, stop))
            .max()
            .unwrap_or(0);
        let cut = self.held.len() - keep;
        out.push_str(&self.held[..cut]);
        self.held.drain(..cut);
        false
    }

    /// The stream ended without a stop string: what was held back is text.
    pub fn finish(&mut self, out: &mut String) {
        out.push_str(&std::mem::take(&mut self.held));
    }
}

/// Length of the longest end of `text` that is a beginning of `pattern`, but not all of it.
pub(crate) fn overlap(text: &str, pattern: &str) -> usize {
    let longest = text.len().min(pattern.len().saturating_sub(1));
    (1..=longest)
        .rev()
        .find(|&len| {
            let start = text.len() - len;
            text.is_char_boundary(start)
                && pattern.as_bytes().starts_with(&text.as_bytes()[start..])
        })
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[String], chunks: &[&str]) -> (String, bool) {
        let mut filter = StopStrings::new(stops.to_vec());
        let mut out = String::new();
        for chunk in chunks {
            if filter.push(chunk, &mut out) {
                return (out, true);
            }
        }
        filter.finish(&mut out);
        (out, false)
    }

    #[test]
    fn a_stop_string_over_a_border_is_found_and_not_shown() {
        let stops = ["END".to_owned()];
        assert_eq!(
            run(&stops, &["one E", "N", "D two"]),
            ("one ".to_owned(), true)
        );
        assert_eq!(
            run(&stops, &["one E", "N", "C"]),
            ("one ENC".to_owned(), false)
        );
        assert_eq!(run(&stops, &["EEN", "END"]), ("EEN".to_owned(), true));
    }

    #[test]
    fn the_one_that_is_complete_first_counts() {
        let stops = ["abc".to_owned(), "b".to_owned()];
        assert_eq!(run(&stops, &["xabc"]), ("xa".to_owned(), true));
        assert_eq!(run(&stops, &["x", "a", "b", "c"]), ("xa".to_owned(), true));
    }

    proptest! {
        #[test]
        fn any_cut_gives_the_same_text(
            text in "[abé]{0,24}",
            stops in proptest::collection::vec("[abé]{1,4}", 1..4),
            cuts in proptest::collection::vec(any::<proptest::sample::Index>(), 0..6),
        ) {
            let whole = run(&stops, &[&text]);
            let boundaries: Vec<usize> = text.char_indices().map(|c| c.0).chain([text.len()]).collect();
            let mut points: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
            points.extend([0, text.len()]);
            points.sort_unstable();
            let chunks: Vec<&str> = points.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            prop_assert_eq!(run(&stops, &chunks), whole.clone());
            prop_assert!(stops.iter().all(|stop| !whole.0.contains(stop.as_str())));
        }
    }
}
