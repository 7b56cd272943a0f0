//! What `--load-format dummy` puts in the place of files that are not there.

use std::path::{Path, PathBuf};

use engine_server::LoadFailure;
use engine_spec::{EngineConfig, ModelConfig};
use serde_json::{Map, Value, json};

/// The local directory of a model whose weights are made up: nothing is fetched for it.
pub fn directory(config: &EngineConfig) -> Result<PathBuf, LoadFailure> {
    let source = &config.model.source;
    let path = Path::new(source.strip_prefix("file://").unwrap_or(source));
    if path.is_dir() {
        return Ok(path.to_owned());
    }
    Err(LoadFailure {
        reason: "ModelNotFound".to_owned(),
        message: format!(
            "--load-format dummy --model {source}: not a local directory; give one that holds a config.json"
        ),
    })
}

/// A tokenizer.json in which token `b` is byte `b`, for models that have none.
pub fn tokenizer(model: &ModelConfig) -> Result<String, LoadFailure> {
    if model.vocab_size < 256 {
        return Err(LoadFailure {
            reason: "ModelConfigInvalid".to_owned(),
            message: format!(
                "--load-format dummy: there is no tokenizer.json, and vocab_size = {} is too small for one token per byte (256)",
                model.vocab_size
            ),
        });
    }
    // Byte-level tokenizers write a byte that does not print as the next character from U+0100 on.
    let mut unprintable = (0x100..).filter_map(char::from_u32);
    let vocab: Map<String, Value> = (0..=255u8)
        .map(|byte| {
            let character = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => char::from(byte),
                _ => unprintable.next().unwrap_or_default(),
            };
            (character.to_string(), byte.into())
        })
        .collect();
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    });
    Ok(tokenizer.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_local_directory_is_served_with_random_weights() {
        let error = directory(&EngineConfig::for_source("hf://org/name")).unwrap_err();
        assert!(
            error
                .message
                .contains("hf://org/name: not a local directory"),
            "{}",
            error.message
        );
        let here = concat!("file://", env!("CARGO_MANIFEST_DIR"));
        let found = directory(&EngineConfig::for_source(here)).unwrap();
        assert_eq!(found, Path::new(env!("CARGO_MANIFEST_DIR")));
    }

    #[test]
    fn a_vocabulary_without_room_for_every_byte_needs_a_tokenizer() {
        let of = |vocabulary: u32| {
            let text = format!(r#"{{"model_type": "llama", "vocab_size": {vocabulary}}}"#);
            tokenizer(&ModelConfig::from_hf_json(&text).unwrap())
        };
        let error = of(255).unwrap_err();
        assert!(
            error.message.contains("vocab_size = 255"),
            "{}",
            error.message
        );
        let json: Value = serde_json::from_str(&of(256).unwrap()).unwrap();
        assert_eq!(json["model"]["vocab"].as_object().unwrap().len(), 256);
        assert_eq!(json["model"]["vocab"]["Ġ"], 32);
    }
}
