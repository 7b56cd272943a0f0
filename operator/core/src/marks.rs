//! The labels and annotations of a pod that mean something to a decision.
//!
//! There are ten thousand pods, and a map of strings each would be most of the operator's memory:
//! keys come from one table and are kept by reference, everything else is dropped.

use std::collections::BTreeMap;

use crate::names;

/// Keys that are kept.
const KEYS: &[&str] = &[
    names::MODEL_DEPLOYMENT,
    names::COMPONENT,
    names::REVISION,
    names::SERVING,
    names::REPLICA,
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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Marks(Vec<(&'static str, Box<str>)>);

impl Marks {
    /// What is kept of a map.
    pub fn of(map: Option<&BTreeMap<String, String>>) -> Self {
        let known = KEYS.iter().filter_map(|key| {
            let value = map?.get(*key)?;
            Some((*key, value.as_str().into()))
        });
        let mut kept: Vec<_> = known.collect();
        kept.shrink_to_fit();
        Self(kept)
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let mut all = self.0.iter();
        all.find(|(known, _)| *known == key)
            .map(|(_, value)| &**value)
    }

    /// Sets a value; without effect for a key that means nothing.
    pub fn insert(&mut self, key: &str, value: String) {
        self.remove(key);
        if let Some(known) = KEYS.iter().find(|known| **known == key) {
            self.0.push((known, value.into()));
        }
    }

    /// Removes a key.
    pub fn remove(&mut self, key: &str) {
        self.0.retain(|(known, _)| *known != key);
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
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
