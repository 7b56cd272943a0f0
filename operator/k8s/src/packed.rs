//! An object that is looked at rarely, kept as its JSON text, and of that only what sets it apart from another one.
//!
//! A fleet is a thousand objects of a kind that differ in names and numbers, and a tree of maps and strings is five times
//! its JSON. The text is packed against the text of an object of its kind (the *pattern*) and against itself. Invariant: what
//! is packed can always be unpacked, since it holds its pattern. The surprise: patterns are learned. An object that no
//! pattern helps much becomes one itself, so that fleets of several sorts pack as well.

use std::any::TypeId;
use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::sync::{Arc, Mutex};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::wakes::lock;

static PATTERNS: Mutex<BTreeMap<TypeId, Patterns>> = Mutex::new(BTreeMap::new());
/// Patterns of a kind that are tried; each takes some ten microseconds where it does not help.
const PATTERNS_MAX: usize = 4;
/// A pattern that leaves so much of a text or less, one in so many, is as good as they come; no other is tried.
const LITTLE: usize = 5;
/// A pattern that leaves more than that is no help.
const MUCH: usize = 2;
/// Of how many texts that a pattern helps somewhat one becomes a pattern.
const SELDOM: u32 = 32;

/// The patterns of a kind.
#[derive(Debug, Default)]
struct Patterns {
    /// Those last made use of first.
    known: Vec<Arc<[u8]>>,
    /// Texts that one of them helped somewhat, since the last became one.
    somewhat: u32,
}

impl Patterns {
    /// Puts a pattern before the others.
    fn first(&mut self, pattern: &Arc<[u8]>) {
        self.known.retain(|known| !Arc::ptr_eq(known, pattern));
        self.known.insert(0, Arc::clone(pattern));
        self.known.truncate(PATTERNS_MAX);
    }
}

/// An object of a kind.
#[derive(Debug)]
pub struct Packed<K> {
    parts: Box<[u8]>,
    pattern: Arc<[u8]>,
    kind: PhantomData<fn() -> K>,
}

impl<K> PartialEq for Packed<K> {
    fn eq(&self, other: &Self) -> bool {
        if Arc::ptr_eq(&self.pattern, &other.pattern) {
            // One text and one pattern give the same parts.
            return self.parts == other.parts;
        }
        let (one, other) = (self.text(), other.text());
        one.is_some() && one == other
    }
}

impl<K> Packed<K> {
    fn text(&self) -> Option<Vec<u8>> {
        unpack(&self.parts, &self.pattern)
    }
}

impl<K: Serialize + DeserializeOwned + 'static> Packed<K> {
    /// Packs an object.
    ///
    /// # Errors
    /// It has no JSON form, which no object that was read from JSON meets, or does not come out as it went in: an object that
    /// could not be opened later would be taken for one that is not there.
    pub fn of(object: &K) -> Result<Self, String> {
        let text = serde_json::to_vec(object).map_err(|error| error.to_string())?;
        let (parts, pattern) = pack_as_others(TypeId::of::<K>(), &text);
        if unpack(&parts, &pattern).as_ref() != Some(&text) {
            return Err("its packed form does not give it back".to_owned());
        }
        Ok(Self {
            parts: parts.into(),
            pattern,
            kind: PhantomData,
        })
    }

    /// The object as it was; none if it does not read what it wrote.
    pub fn unpack(&self) -> Option<K> {
        serde_json::from_slice(&self.text()?).ok()
    }
}

/// Packs a text against the first pattern of its kind that leaves little of it, else against the one that leaves least. Where
/// none leaves half, it is the next pattern, and so is each [`SELDOM`]th where none leaves little.
fn pack_as_others(kind: TypeId, text: &[u8]) -> (Vec<u8>, Arc<[u8]>) {
    let known = lock(&PATTERNS)
        .get(&kind)
        .map(|patterns| patterns.known.clone())
        .unwrap_or_default();
    let mut best: Option<(Vec<u8>, Arc<[u8]>)> = None;
    for pattern in known {
        let parts = pack(text, &pattern);
        let is_little = parts.len() <= text.len() / LITTLE;
        if best
            .as_ref()
            .is_none_or(|(least, _)| parts.len() < least.len())
        {
            best = Some((parts, pattern));
        }
        if is_little {
            break;
        }
    }
    let mut patterns = lock(&PATTERNS);
    let patterns = patterns.entry(kind).or_default();
    if let Some((parts, pattern)) = best
        && parts.len() <= text.len() / MUCH
    {
        let helped = parts.len() <= text.len() / LITTLE;
        patterns.somewhat += u32::from(!helped);
        if patterns.somewhat < SELDOM {
            patterns.first(&pattern);
            return (parts, pattern);
        }
    }
    patterns.somewhat = 0;
    let pattern: Arc<[u8]> = text.into();
    patterns.first(&pattern);
    (pack(text, &pattern), pattern)
}

/// `text` without what it shares with the pattern or repeats of itself.
fn pack(text: &[u8], pattern: &[u8]) -> Vec<u8> {
    lz4_flex::block::compress_prepend_size_with_dict(text, pattern)
}

/// What [`pack`] was given; none for what it has not written.
fn unpack(parts: &[u8], pattern: &[u8]) -> Option<Vec<u8>> {
    lz4_flex::block::decompress_size_prepended_with_dict(parts, pattern).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn wish(index: usize, note: &str) -> serde_json::Value {
        serde_json::json!({"metadata": {"name": format!("model-{index}"), "namespace": "default"},
            "spec": {"model": {"source": "hf://org/model"}, "replicas": index, "note": note}})
    }

    /// Letters without repetitions.
    fn letters(seed: u64, count: usize) -> String {
        let next = |last: &u64| Some(last.wrapping_mul(6_364_136_223_846_793_005) + 1);
        let numbers = std::iter::successors(Some(seed), next).skip(8).take(count);
        numbers
            .map(|number| char::from(b'a' + (number >> 60) as u8))
            .collect()
    }

    #[test]
    fn whatever_is_packed_is_unpacked_as_it_was() {
        let texts: [&[u8]; 6] = [
            b"",
            b"a",
            b"abcdefg",
            &[b'a'; 500],
            b"abcabcabcabcabc",
            &[7; 6],
        ];
        let long: Vec<u8> = (0..70_000_u32)
            .map(|n| (n.wrapping_mul(n) >> 7) as u8)
            .collect();
        for text in texts.into_iter().chain([long.as_slice()]) {
            for pattern in texts.into_iter().chain([long.as_slice()]) {
                let parts = pack(text, pattern);
                assert_eq!(unpack(&parts, pattern).as_deref(), Some(text));
            }
        }
        assert!(pack(&[b'a'; 500], b"").len() < 30);
    }

    #[test]
    fn parts_that_nobody_wrote_are_nothing() {
        let text = b"abcdefghijklmnopabcdefghijklmnop";
        let parts = pack(text, b"abcdef");
        for length in 0..parts.len() {
            let found = unpack(&parts[..length], b"abcdef");
            assert_ne!(found.as_deref(), Some(&text[..]), "{length}");
        }
        assert_eq!(unpack(&[0xff; 3], b""), None);
    }

    #[test]
    fn objects_of_several_sorts_are_what_they_were_and_take_little() {
        let texts: [String; 3] = [1, 2, 3].map(|seed| letters(seed, 1500));
        let all: Vec<_> = (0..100)
            .map(|index| wish(index, &texts[index % 3]))
            .collect();
        let packed: Vec<_> = all
            .iter()
            .map(|one| Packed::of(one).expect("JSON"))
            .collect();
        for (packed, whole) in packed.iter().zip(&all) {
            assert_eq!(packed.unpack().as_ref(), Some(whole));
        }
        let bytes: usize = packed.iter().map(|one| one.parts.len()).sum();
        assert!(bytes < 100 * 80, "{bytes} bytes for 100");
        let patterns: BTreeSet<_> = packed.iter().map(|one| one.pattern.as_ptr()).collect();
        assert_eq!(patterns.len(), 3, "one of each sort");
        // Packed against another pattern it is the same object still.
        let pattern: Arc<[u8]> = packed[0].text().expect("it was packed").into();
        let again = Packed {
            parts: pack(&pattern, &pattern).into(),
            pattern,
            kind: PhantomData,
        };
        assert_eq!(again, packed[0]);
        assert_ne!(again, packed[3]);
    }

    #[test]
    fn objects_that_grow_are_soon_packed_like_each_other_and_not_like_what_they_were() {
        /// A kind of its own: patterns are of all tests.
        #[derive(Debug, PartialEq, Serialize, serde::Deserialize)]
        struct Growing(String);
        let (spec, status) = (letters(4, 900), letters(5, 600));
        let young = |index: usize| Growing(format!("{index} {spec}"));
        let grown = |index: usize| Growing(format!("{index} {spec} {status}"));
        for index in 0..100 {
            let packed = Packed::of(&young(index)).expect("JSON");
            assert!(packed.parts.len() < 60 || index == 0);
        }
        let packed: Vec<_> = (0..200)
            .map(|index| Packed::of(&grown(index)).expect("JSON"))
            .collect();
        for (index, packed) in packed.iter().enumerate() {
            assert_eq!(packed.unpack(), Some(grown(index)));
            let is_seldom = usize::try_from(SELDOM).expect("small") <= index + 1;
            assert_eq!(packed.parts.len() < 60, is_seldom, "{index}");
        }
        let patterns: BTreeSet<_> = packed.iter().map(|one| one.pattern.as_ptr()).collect();
        assert_eq!(patterns.len(), 2);
        // What is made afterwards is packed as well as before.
        assert!(Packed::of(&young(100)).expect("JSON").parts.len() < 60);
    }
}
