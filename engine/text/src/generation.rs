//! `generation_config.json`: how the model's makers want it sampled, and where its answers end.

use serde::Deserialize;

/// Defaults for what a request leaves open. Fields that the file does not have stay empty.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
pub struct GenerationDefaults {
    /// Sampling temperature; only meant when `do_sample` is not false.
    #[serde(default)]
    pub temperature: Option<f32>,
    /// Nucleus.
    #[serde(default)]
    pub top_p: Option<f32>,
    /// Best tokens only.
    #[serde(default)]
    pub top_k: Option<u32>,
    /// Repetition penalty.
    #[serde(default)]
    pub repetition_penalty: Option<f32>,
    /// False means greedy.
    #[serde(default)]
    pub do_sample: Option<bool>,
    /// Tokens that end an answer.
    #[serde(default)]
    eos_token_id: OneOrMany,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    #[default]
    None,
    One(u32),
    Many(Vec<u32>),
}

impl GenerationDefaults {
    /// Tokens that end an answer.
    pub fn eos_tokens(&self) -> Vec<u32> {
        match &self.eos_token_id {
            OneOrMany::None => Vec::new(),
            OneOrMany::One(token) => vec![*token],
            OneOrMany::Many(tokens) => tokens.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_or_many_ends_are_read() {
        let read = |text: &str| serde_json::from_str::<GenerationDefaults>(text).unwrap();
        assert_eq!(
            read(r#"{"eos_token_id": 1, "temperature": 0.6}"#).eos_tokens(),
            [1]
        );
        assert_eq!(read(r#"{"eos_token_id": [1, 7]}"#).eos_tokens(), [1, 7]);
        assert!(read(r#"{"eos_token_id": null}"#).eos_tokens().is_empty());
        assert_eq!(
            read(r#"{"transformers_version": "5", "top_p": 0.95}"#).top_p,
            Some(0.95)
        );
    }
}
