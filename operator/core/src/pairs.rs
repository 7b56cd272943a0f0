//! A map of strings that is read and hardly ever changed, in two allocations.
//!
//! A thousand nodes carry some twenty labels each, and a tree of strings spends more on itself than on them. Invariant:
//! the keys are in order, so equal maps are equal bytes.

use std::collections::BTreeMap;

/// Values by key.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pairs {
    /// Where each key and its value end in the text.
    ends: Box<[(u32, u32)]>,
    text: Box<str>,
}

impl Pairs {
    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&str> {
        let (mut low, mut high) = (0, self.ends.len());
        while low < high {
            let middle = low.midpoint(high);
            let (found, value) = self.at(middle)?;
            match found.cmp(key) {
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Equal => return Some(value),
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// All of them, in the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        (0..self.ends.len()).filter_map(|index| self.at(index))
    }

    fn at(&self, index: usize) -> Option<(&str, &str)> {
        let (key, value) = *self.ends.get(index)?;
        let start = match index {
            0 => 0,
            _ => self.ends.get(index - 1)?.1,
        };
        let part = |from: u32, to: u32| self.text.get(from as usize..to as usize);
        Some((part(start, key)?, part(key, value)?))
    }
}

impl<K: AsRef<str> + Ord, V: AsRef<str>> From<&BTreeMap<K, V>> for Pairs {
    fn from(map: &BTreeMap<K, V>) -> Self {
        let (mut ends, mut text) = (Vec::with_capacity(map.len()), String::new());
        // Kubernetes allows objects of 3 MiB.
        let end = |text: &str| u32::try_from(text.len()).unwrap_or(u32::MAX);
        for (key, value) in map {
            text.push_str(key.as_ref());
            let key = end(&text);
            text.push_str(value.as_ref());
            ends.push((key, end(&text)));
        }
        Self {
            ends: ends.into(),
            text: text.into(),
        }
    }
}

impl<K: AsRef<str> + Ord, V: AsRef<str>, const N: usize> From<[(K, V); N]> for Pairs {
    fn from(pairs: [(K, V); N]) -> Self {
        Self::from(&BTreeMap::from(pairs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn it_is_the_map_that_it_was_made_from(
            map in prop::collection::btree_map("[a-c]{0,3}", "[x-z]{0,3}", 0..12),
            asked in "[a-c]{0,3}",
        ) {
            let pairs = Pairs::from(&map);
            prop_assert_eq!(pairs.get(&asked), map.get(&asked).map(String::as_str));
            let all: Vec<(&str, &str)> = pairs.iter().collect();
            let expected: Vec<(&str, &str)> = map.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
            prop_assert_eq!(all, expected);
        }
    }
}
