//! The labels and annotations of a pod that mean something to a decision.
//!
//! There are ten thousand pods, and a map of strings each would be most of the operator's memory:
//! keys come from one table and are kept by number, values lie in one text, everything else is
//! dropped. Invariant: values lie in the order of the table, so equal marks are equal bytes.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::names;

/// Keys that are kept.
const KEYS: &[&str] = &[
    names::MODEL_DEPLOYMENT,
    names::COMPONENT,
    names::REVISION,
    names::SERVING,
    names::REPLICA,
    names::RANK,
    names::RANKS,
    names::ATTEMPT,
    names::FAILURES,
    names::ROLLOUT_ATTEMPT,
    names::PLANNED_NODES,
    names::REFUSED_NODES,
    names::INSPECT_INPUTS,
    names::DRAIN_SINCE,
    names::PREEMPTS,
];

/// Values by key, for the keys of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marks {
    /// Which key of the table, and where its value ends in the text.
    ends: Box<[(u8, u32)]>,
    text: Box<str>,
}

impl Marks {
    /// What is kept of a map.
    pub fn of(map: Option<&BTreeMap<String, String>>) -> Self {
        Self::with(|key| map?.get(key).map(String::as_str))
    }

    /// The marks of which `value` knows the values.
    fn with<'a>(value: impl Fn(&'static str) -> Option<&'a str>) -> Self {
        let (mut ends, mut text) = (Vec::new(), String::new());
        for (number, key) in (0..).zip(KEYS) {
            if let Some(value) = value(key) {
                text.push_str(value);
                // Kubernetes allows 256 KiB of annotations in all.
                ends.push((number, u32::try_from(text.len()).unwrap_or(u32::MAX)));
            }
        }
        Self {
            ends: ends.into(),
            text: text.into(),
        }
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let mut start = 0;
        for (number, end) in &self.ends {
            let end = usize::try_from(*end).ok()?;
            if KEYS.get(usize::from(*number)) == Some(&key) {
                return self.text.get(start..end);
            }
            start = end;
        }
        None
    }

    /// Sets a value; without effect for a key that means nothing.
    pub fn insert(&mut self, key: &str, value: String) {
        let old = std::mem::take(self);
        *self = Self::with(|known| {
            if known == key {
                Some(value.as_str())
            } else {
                old.get(known)
            }
        });
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        let old = std::mem::take(self);
        *self = Self::with(|known| old.get(known).filter(|_| known != key));
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_means_something_is_kept() {
        let map = |pairs: &[(&str, &str)]| {
            let owned = pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
            owned.collect::<BTreeMap<String, String>>()
        };
        let given = map(&[
            ("example.com/x", "y"),
            (names::FAILURES, "3"),
            (names::SERVING, "true"),
        ]);
        let mut marks = Marks::of(Some(&given));
        assert_eq!((marks.len(), marks.get(names::FAILURES)), (2, Some("3")));
        assert_eq!(marks.get("example.com/x"), None);
        marks.insert(names::SERVING, "false".into());
        marks.insert("example.com/x", "z".into());
        assert_eq!((marks.len(), marks.get(names::SERVING)), (2, Some("false")));
        marks.insert(names::COMPONENT, String::new());
        marks.insert(names::FAILURES, "17".into());
        assert_eq!(marks.get(names::COMPONENT), Some(""));
        assert_eq!(marks.get(names::FAILURES), Some("17"));
        assert_eq!(marks.get(names::SERVING), Some("false"));
        marks.remove(names::COMPONENT);
        let wanted = map(&[(names::SERVING, "false"), (names::FAILURES, "17")]);
        assert_eq!(
            marks,
            Marks::of(Some(&wanted)),
            "in whatever order they came"
        );
        marks.remove(names::SERVING);
        assert!(!marks.is_empty() && marks.get(names::SERVING).is_none());
        assert!(Marks::of(None).is_empty());
    }

    /// A label or annotation that the operator writes and does not keep would be lost on the next
    /// look; the one that only endpoint pickers read is the exception.
    #[test]
    fn every_key_that_is_ours_is_kept() {
        let source = include_str!("names.rs");
        let keys = source.lines().filter_map(|line| {
            let (_, value) = line.strip_prefix("pub const ")?.split_once("&str = \"")?;
            value
                .strip_suffix("\";")
                .filter(|key| key.starts_with("cachalot.dev/"))
        });
        let missing: Vec<&str> = keys.filter(|key| !KEYS.contains(key)).collect();
        assert!(missing.is_empty(), "{missing:?}");
    }
}
