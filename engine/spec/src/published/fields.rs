//! Typed access to the fields of a `config.json`.

use serde_json::{Map, Value};

use crate::model_config::ConfigError;

/// Typed access to the document's fields; every error names the field.
pub(super) struct Fields<'a>(pub &'a Map<String, Value>);

impl Fields<'_> {
    /// The value unless absent or null.
    pub fn present(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    fn wrong(field: &str, value: &Value, expected: &str) -> ConfigError {
        let mut found = value.to_string();
        found.truncate(found.char_indices().nth(80).map_or(found.len(), |(i, _)| i));
        ConfigError::Malformed(format!("{field} = {found}: expected {expected}"))
    }

    fn integer(field: &str, value: &Value) -> Result<u32, ConfigError> {
        value
            .as_u64()
            .and_then(|n| u32::try_from(n).ok())
            .ok_or_else(|| Self::wrong(field, value, "an integer from 0 to 4294967295"))
    }

    pub fn size(&self, field: &str, default: u32) -> Result<u32, ConfigError> {
        match self.present(field) {
            Some(value) => Self::integer(field, value),
            None => Ok(default),
        }
    }

    /// Absent takes the default; null means none.
    pub fn optional_size(
        &self,
        field: &str,
        default: Option<u32>,
    ) -> Result<Option<u32>, ConfigError> {
        match self.0.get(field) {
            None => Ok(default),
            Some(Value::Null) => Ok(None),
            Some(value) => Self::integer(field, value).map(Some),
        }
    }

    pub fn number(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        match self.present(field) {
            Some(value) => value
                .as_f64()
                .ok_or_else(|| Self::wrong(field, value, "a number")),
            None => Ok(default),
        }
    }

    pub fn flag(&self, field: &str, default: bool) -> Result<bool, ConfigError> {
        match self.present(field) {
            Some(value) => value
                .as_bool()
                .ok_or_else(|| Self::wrong(field, value, "true or false")),
            None => Ok(default),
        }
    }

    pub fn text(&self, field: &str) -> Result<Option<String>, ConfigError> {
        match self.present(field) {
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(value) => Err(Self::wrong(field, value, "a string")),
            None => Ok(None),
        }
    }

    /// One integer or a list of them.
    pub fn integers(&self, field: &str, default: Option<u32>) -> Result<Vec<u32>, ConfigError> {
        match self.0.get(field) {
            None => Ok(default.into_iter().collect()),
            Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| Self::integer(field, item))
                .collect(),
            Some(value) => Ok(vec![Self::integer(field, value)?]),
        }
    }

    /// A list of strings; none when absent.
    pub fn texts(&self, field: &str) -> Result<Vec<&str>, ConfigError> {
        match self.present(field) {
            None => Ok(Vec::new()),
            Some(Value::Array(items)) => items
                .iter()
                .map(|item| {
                    item.as_str()
                        .ok_or_else(|| Self::wrong(field, item, "a string"))
                })
                .collect(),
            Some(value) => Err(Self::wrong(field, value, "a list of strings")),
        }
    }
}
