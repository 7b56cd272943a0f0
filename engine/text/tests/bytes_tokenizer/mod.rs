//! A whole tokenizer of 256 bytes and DeepSeek's special tokens, for tests that need no trained model.

#![allow(dead_code, missing_docs, clippy::unwrap_used)]

use engine_text::TextFiles;
use serde_json::json;

/// Ids of the added tokens, after the 256 bytes.
pub const ADDED: [(&str, bool); 6] = [
    ("<｜begin▁of▁sentence｜>", true),
    ("<｜end▁of▁sentence｜>", true),
    ("<｜User｜>", false),
    ("<｜Assistant｜>", false),
    ("<think>", false),
    ("</think>", false),
];
pub const VOCABULARY: usize = 256 + ADDED.len();

/// Byte `b` is token `b`.
pub fn byte_characters() -> Vec<String> {
    let mut next = 0x100;
    (0..=255u8)
        .map(|byte| {
            let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
            let code = if printable {
                u32::from(byte)
            } else {
                next += 1;
                next - 1
            };
            char::from_u32(code).unwrap().to_string()
        })
        .collect()
}

pub fn id(token: &str) -> u32 {
    256 + ADDED.iter().position(|(added, _)| *added == token).unwrap() as u32
}

pub fn tokenizer_json() -> serde_json::Value {
    let vocab: serde_json::Map<String, serde_json::Value> = byte_characters()
        .into_iter()
        .enumerate()
        .map(|(id, token)| (token, id.into()))
        .collect();
    let added: Vec<_> = ADDED
        .iter()
        .enumerate()
        .map(|(index, (content, special))| {
            json!({"id": 256 + index, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": true, "special": special})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": []}
    })
}

pub const TEMPLATE: &str = "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }}\
    {% elif m['role'] == 'user' %}{{ '<｜User｜>' + m['content'] }}\
    {% else %}{{ '<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}\
    {% if messages[-1]['role'] == 'assistant' %}{{ raise_exception('the last message must not be of the assistant') }}{% endif %}\
    {% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}";

pub fn files() -> TextFiles {
    TextFiles {
        tokenizer: tokenizer_json().to_string().into_bytes(),
        tokenizer_config: Some(
            json!({
                "add_bos_token": true,
                "bos_token": {"__type": "AddedToken", "content": ADDED[0].0},
                "eos_token": ADDED[1].0,
                "chat_template": TEMPLATE,
            })
            .to_string(),
        ),
        chat_template: None,
        generation_config: None,
    }
}
