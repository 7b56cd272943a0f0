//! Typed access to the fields of a request body, with errors that name field and value.
//!
//! Unknown fields are ignored, as OpenAI does; null is the same as absent.

use serde_json::{Map, Value};

use crate::error::ApiError;

/// Longest piece of a wrong value that an error repeats.
const SHOWN_MAX: usize = 60;

/// The fields of one JSON object.
#[derive(Debug)]
pub struct Fields {
    map: Map<String, Value>,
}

impl From<Map<String, Value>> for Fields {
    fn from(map: Map<String, Value>) -> Self {
        Self { map }
    }
}

impl Fields {
    /// Parses a body.
    ///
    /// # Errors
    /// It is not a JSON object.
    pub fn parse(body: &[u8]) -> Result<Self, ApiError> {
        match serde_json::from_slice(body) {
            Ok(Value::Object(map)) => Ok(Self { map }),
            Ok(other) => Err(ApiError::malformed(format!(
                "the request body is {}, but must be a JSON object",
                show(&other)
            ))),
            Err(error) => Err(ApiError::malformed(format!(
                "the request body is not JSON: {error}"
            ))),
        }
    }

    /// A field that is present and not null.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    fn typed<'a, T>(
        &'a self,
        name: &str,
        expected: &str,
        convert: impl FnOnce(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(value) = self.get(name) else {
            return Ok(None);
        };
        convert(value)
            .map(Some)
            .ok_or_else(|| wrong(name, value, expected))
    }

    /// A number.
    ///
    /// # Errors
    /// It is something else.
    pub fn number(&self, name: &str) -> Result<Option<f32>, ApiError> {
        let number = self.typed(name, "a number", Value::as_f64)?;
        Ok(number.map(|number| number as f32))
    }

    /// A whole number of at least zero.
    ///
    /// # Errors
    /// It is something else.
    pub fn count(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.typed(name, "a whole number of at least 0", Value::as_u64)
    }

    /// A whole number.
    ///
    /// # Errors
    /// It is something else.
    pub fn integer(&self, name: &str) -> Result<Option<i64>, ApiError> {
        self.typed(name, "a whole number", Value::as_i64)
    }

    /// Any whole number, its bits.
    ///
    /// # Errors
    /// It is something else.
    pub fn bits(&self, name: &str) -> Result<Option<u64>, ApiError> {
        self.typed(name, "a whole number of at most 64 bits", |value| {
            value.as_u64().or_else(|| value.as_i64().map(|v| v as u64))
        })
    }

    /// A boolean, false when absent.
    ///
    /// # Errors
    /// It is something else.
    pub fn flag(&self, name: &str) -> Result<bool, ApiError> {
        Ok(self
            .typed(name, "true or false", Value::as_bool)?
            .unwrap_or(false))
    }

    /// A string.
    ///
    /// # Errors
    /// It is something else.
    pub fn string(&self, name: &str) -> Result<Option<&str>, ApiError> {
        self.typed(name, "a string", Value::as_str)
    }

    /// An object.
    ///
    /// # Errors
    /// It is something else.
    pub fn object(&self, name: &str) -> Result<Option<&Map<String, Value>>, ApiError> {
        self.typed(name, "an object", Value::as_object)
    }

    /// A list.
    ///
    /// # Errors
    /// It is something else.
    pub fn list(&self, name: &str) -> Result<Option<&Vec<Value>>, ApiError> {
        self.typed(name, "a list", Value::as_array)
    }

    /// A string or a list of strings.
    ///
    /// # Errors
    /// It is something else.
    pub fn strings(&self, name: &str) -> Result<Vec<String>, ApiError> {
        let strings = self.typed(name, "a string or a list of strings", |value| match value {
            Value::String(text) => Some(vec![text.clone()]),
            Value::Array(list) => list
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect(),
            _ => None,
        })?;
        Ok(strings.unwrap_or_default())
    }
}

/// The error for a value of the wrong type or range.
pub fn wrong(name: &str, value: &Value, expected: &str) -> ApiError {
    ApiError::invalid(
        name,
        format!("{name} is {}, but must be {expected}", show(value)),
    )
}

/// A value for people, cut where it is long. Only ever the value that is wrong, never a prompt: lists and objects are
/// named, not shown.
pub fn show(value: &Value) -> String {
    match value {
        Value::Array(list) => format!("a list of {}", list.len()),
        Value::Object(_) => "an object".to_owned(),
        Value::String(text) if text.chars().count() > SHOWN_MAX => {
            format!("\"{}…\"", text.chars().take(SHOWN_MAX).collect::<String>())
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_field() {
        let fields =
            Fields::parse(br#"{"temperature":"hot","n":-1,"stop":[1],"seed":-1,"user":null}"#)
                .unwrap();
        let message = |error: ApiError| (error.param.unwrap(), error.message);
        assert_eq!(
            message(fields.number("temperature").unwrap_err()),
            (
                "temperature".into(),
                "temperature is \"hot\", but must be a number".into()
            )
        );
        assert_eq!(
            message(fields.count("n").unwrap_err()).1,
            "n is -1, but must be a whole number of at least 0"
        );
        assert_eq!(
            message(fields.strings("stop").unwrap_err()).1,
            "stop is a list of 1, but must be a string or a list of strings"
        );
        assert_eq!(fields.bits("seed").unwrap(), Some(u64::MAX));
        assert_eq!(fields.string("user").unwrap(), None);
        assert!(
            Fields::parse(b"[]")
                .unwrap_err()
                .message
                .contains("a list of 0")
        );
        assert!(
            Fields::parse(b"{")
                .unwrap_err()
                .message
                .contains("not JSON")
        );
    }
}
