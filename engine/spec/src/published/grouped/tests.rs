//! The numbers are the totals that the published checkpoints' indexes and model cards state.

use serde_json::{Map, Value, json};

use crate::inspect::{InspectReport, ModelFacts, TERMINATION_MESSAGE_BYTES_MAX};
use crate::model_config::{
    AttentionConfig, ConfigError, GqaConfig, ModelConfig, RopeScaling, StoredDtype,
};

fn qwen2(hidden: u32, inner: u32, heads: u32, kv_heads: u32, vocab: u32, tied: bool) -> Value {
    json!({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "vocab_size": vocab,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 28,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_act": "silu",
        "max_position_embeddings": 32768, "max_window_layers": 21, "sliding_window": 32768,
        "use_sliding_window": false, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "bos_token_id": 151643,
        "eos_token_id": 151645})
}

fn llama_8b() -> Value {
    json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "attention_bias": false, "mlp_bias": false, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]})
}

fn qwen3(hidden: u32, inner: u32, layers: u32, heads: u32, tied: bool) -> Value {
    json!({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936,
        "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "max_position_embeddings": 40960, "max_window_layers": layers,
        "sliding_window": null, "use_sliding_window": false, "rope_scaling": null,
        "rms_norm_eps": 1e-6, "rope_theta": 1000000, "attention_bias": false,
        "tie_word_embeddings": tied, "torch_dtype": "bfloat16", "bos_token_id": 151643,
        "eos_token_id": 151645})
}

fn qwen3_30b_a3b() -> Value {
    let mut config = qwen3(2048, 6144, 48, 32, false);
    let moe = json!({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
        "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": true, "decoder_sparse_step": 1,
        "mlp_only_layers": []});
    for (field, value) in moe.as_object().unwrap() {
        config[field] = value.clone();
    }
    config
}

/// A published config of each family.
pub(in super::super) fn published() -> [String; 4] {
    [
        qwen2(3584, 18_944, 28, 4, 152_064, false),
        llama_8b(),
        qwen3(1024, 3072, 28, 16, true),
        qwen3_30b_a3b(),
    ]
    .map(|config| config.to_string())
}

fn read(config: &Value) -> ModelConfig {
    ModelConfig::from_hf_json(&config.to_string()).unwrap()
}

fn edited(mut config: Value, field: &str, value: Value) -> Result<ModelConfig, ConfigError> {
    config[field] = value;
    ModelConfig::from_hf_json(&config.to_string())
}

#[test]
fn parameter_counts_are_those_of_the_published_checkpoints() {
    let cases = [
        (qwen2(1536, 8960, 12, 2, 151_936, true), 1_543_714_304),
        // R1-Distill-Qwen-1.5B: the same with a head of its own.
        (qwen2(1536, 8960, 12, 2, 151_936, false), 1_777_088_000),
        (qwen2(3584, 18_944, 28, 4, 152_064, false), 7_615_616_512),
        (llama_8b(), 8_030_261_248),
        (qwen3(1024, 3072, 28, 16, true), 596_049_920),
        (qwen3(4096, 12_288, 36, 32, false), 8_190_735_360),
        (qwen3_30b_a3b(), 30_532_122_624),
    ];
    for (config, parameters) in cases {
        let config = read(&config);
        assert_eq!(config.parameters(), parameters, "{config:?}");
        assert_eq!(config.stored_weight_bytes(), parameters * 2);
    }
    // "3.3B activated" counts the embedding's 0.31 B as well.
    let moe = read(&qwen3_30b_a3b());
    assert_eq!(moe.active_parameters(), 3_041_867_776);
    assert_eq!(moe.moe_layers(), 48);
}

#[test]
fn attention_is_what_the_family_says() {
    let grouped = |config: &Value| match read(config).attention {
        AttentionConfig::Grouped(gqa) => gqa,
        AttentionConfig::Latent(_) => panic!("grouped-query attention expected"),
    };
    let shape = |heads, kv_heads, head_dim, qkv_bias, qk_norm| GqaConfig {
        heads,
        kv_heads,
        head_dim,
        qkv_bias,
        qk_norm,
    };
    let qwen = qwen2(3584, 18_944, 28, 4, 152_064, false);
    assert_eq!(grouped(&qwen), shape(28, 4, 128, true, false));
    assert_eq!(grouped(&llama_8b()), shape(32, 8, 128, false, false));
    let qwen3 = qwen3(1024, 3072, 28, 16, true);
    assert_eq!(grouped(&qwen3), shape(16, 8, 128, false, true));
    assert_eq!(grouped(&qwen3_30b_a3b()), shape(32, 4, 128, false, true));
    let llama = read(&llama_8b());
    assert_eq!(llama.eos_tokens, [128_001, 128_008, 128_009]);
    let scaling = llama.rope_scaling.unwrap();
    assert_eq!(scaling.cos_sin_multiplier(), 1.0);
    assert!(matches!(scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
}

#[test]
fn the_form_of_transformers_5_gives_the_same_config() {
    for (mut config, absent) in [
        (
            qwen2(4096, 22_016, 32, 32, 151_936, false),
            &[
                "vocab_size",
                "hidden_size",
                "num_key_value_heads",
                "use_sliding_window",
            ][..],
        ),
        (
            llama_8b(),
            &[
                "hidden_size",
                "num_attention_heads",
                "mlp_bias",
                "attention_bias",
            ],
        ),
        (
            qwen3(4096, 22_016, 32, 32, false),
            &[
                "intermediate_size",
                "num_hidden_layers",
                "head_dim",
                "tie_word_embeddings",
            ],
        ),
        (
            qwen3_30b_a3b(),
            &[
                "num_experts_per_tok",
                "moe_intermediate_size",
                "decoder_sparse_step",
                "mlp_only_layers",
            ],
        ),
    ] {
        let published = read(&config);
        let fields = config.as_object_mut().unwrap();
        for field in absent {
            fields.remove(*field).unwrap();
        }
        let theta = fields.remove("rope_theta").unwrap();
        let mut rope = match fields.remove("rope_scaling") {
            Some(Value::Object(rope)) => rope,
            _ => Map::from_iter([("rope_type".to_owned(), "default".into())]),
        };
        rope.insert("rope_theta".into(), theta);
        fields.insert("rope_parameters".into(), rope.into());
        let dtype = fields.remove("torch_dtype").unwrap();
        fields.insert("dtype".into(), dtype);
        if let Some(experts) = fields.remove("num_experts") {
            fields.insert("num_local_experts".into(), experts);
        }
        if fields["model_type"] != "llama" {
            fields.insert("sliding_window".into(), Value::Null);
            let kinds = vec!["full_attention"; published.layers as usize];
            fields.insert("layer_types".into(), kinds.into());
        }
        assert_eq!(read(&config), published);
    }
}

#[test]
fn moe_layers_are_every_nth_counted_from_one_without_the_dense_ones() {
    let mut config = qwen3_30b_a3b();
    config["num_hidden_layers"] = 9.into();
    config["decoder_sparse_step"] = 2.into();
    config["mlp_only_layers"] = json!([7, 3, 3]);
    let config = read(&config);
    let found: Vec<u32> = (0..9).filter(|layer| config.is_moe_layer(*layer)).collect();
    assert_eq!(found, [1, 5]);
    let dense = edited(qwen3_30b_a3b(), "num_experts", 0.into()).unwrap();
    assert_eq!((dense.moe_layers(), dense.moe), (0, None));
}

#[test]
fn yarn_multiplies_cosines_and_leaves_the_softmax_alone() {
    let yarn = json!({"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"});
    let config = edited(qwen3_30b_a3b(), "rope_scaling", yarn).unwrap();
    let scaling = config.rope_scaling.unwrap();
    // 0.1 ln 4 + 1, as the YaRN paper has it.
    assert!((scaling.cos_sin_multiplier() - 1.138_629_4).abs() < 1e-7);
    assert_eq!(scaling.softmax_multiplier(), 1.0);
}

#[test]
fn facts_stay_within_a_termination_message() {
    let mut config = qwen3_30b_a3b();
    config["num_hidden_layers"] = 1024.into();
    config["mlp_only_layers"] = (768..1024).collect::<Vec<u32>>().into();
    config["rope_scaling"] = json!({"type": "yarn", "factor": 4.123456789012345, "mscale": 0.123456789012345,
        "mscale_all_dim": 0.123456789012345, "original_max_position_embeddings": 32768,
        "attention_factor": 1.123456789012345});
    let config = read(&config);
    let digest = format!("sha256:{}", "0".repeat(64));
    let report = InspectReport::Facts(Box::new(ModelFacts::from_config(config, digest)));
    let message = report.to_message();
    assert!(
        message.len() <= TERMINATION_MESSAGE_BYTES_MAX,
        "{}",
        message.len()
    );
    assert_eq!(InspectReport::from_message(&message).unwrap(), report);
}

#[test]
fn fp8_files_keep_norms_biases_and_gates_wide() {
    let blocks = json!({"quant_method": "fp8", "weight_block_size": [128, 128]});
    let config = edited(qwen3_30b_a3b(), "quantization_config", blocks).unwrap();
    assert_eq!(config.stored_dtype, StoredDtype::Float8E4m3);
    let wide: u64 = 2 * 151_936 * 2048 + 2048 + 48 * (2 * 2048 + 2 * 128 + 128 * 2048);
    let narrow = 30_532_122_624 - wide;
    assert_eq!(
        config.stored_weight_bytes(),
        wide * 2 + narrow + narrow * 4 / 16_384
    );
}

#[test]
fn what_is_not_served_is_named_with_a_way_out() {
    let mut windowed = qwen3_30b_a3b();
    windowed["sliding_window"] = 4096.into();
    let mut crowded = qwen3_30b_a3b();
    crowded["num_experts"] = 65_536.into();
    let mut many_headed = llama_8b();
    many_headed["num_attention_heads"] = 512.into();
    let cases = [
        (
            windowed,
            "use_sliding_window",
            json!(true),
            "sliding_window = 4096: layers with",
        ),
        (
            qwen2(1536, 8960, 12, 2, 96, true),
            "use_sliding_window",
            json!(true),
            "sliding_window = 32768",
        ),
        (
            qwen3(64, 64, 1, 4, true),
            "layer_types",
            json!(["sliding_attention"]),
            "layer_types = sliding_attention: layers with a sliding window",
        ),
        (
            llama_8b(),
            "attention_bias",
            json!(true),
            "attention_bias = true: biases are not",
        ),
        (llama_8b(), "mlp_bias", json!(true), "mlp_bias = true"),
        (
            qwen3(64, 64, 1, 4, true),
            "attention_bias",
            json!(true),
            "attention_bias = true",
        ),
        (
            llama_8b(),
            "partial_rotary_factor",
            json!(0.5),
            "partial_rotary_factor = 0.5: heads that",
        ),
        (
            llama_8b(),
            "hidden_act",
            json!("gelu"),
            "hidden_act = gelu: only silu",
        ),
        (
            llama_8b(),
            "num_key_value_heads",
            json!(5),
            "num_key_value_heads = 5: must divide num_attention_heads (32)",
        ),
        (
            llama_8b(),
            "num_key_value_heads",
            json!(0),
            "num_key_value_heads = 0: must be between 1 and",
        ),
        (
            llama_8b(),
            "num_attention_heads",
            json!(48),
            "num_attention_heads = 48: must divide hidden_size (4096)",
        ),
        (
            llama_8b(),
            "num_attention_heads",
            json!(0),
            "num_attention_heads = 0",
        ),
        (
            llama_8b(),
            "head_dim",
            json!(63),
            "head_dim = 63: must be even",
        ),
        (
            llama_8b(),
            "rope_scaling",
            json!({"type": "linear", "factor": 2.0}),
            "rope_scaling.type = linear: served are default, yarn and llama3",
        ),
        (
            llama_8b(),
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 2.0}),
            "`rope_scaling.low_freq_factor` is missing",
        ),
        (
            llama_8b(),
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192}),
            "rope_scaling.high_freq_factor = 4: must be above low_freq_factor (4)",
        ),
        (
            qwen3_30b_a3b(),
            "rope_scaling",
            json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "truncate": false}),
            "rope_scaling.truncate = false",
        ),
        (
            qwen3_30b_a3b(),
            "decoder_sparse_step",
            json!(0),
            "decoder_sparse_step = 0: must be between 1 and",
        ),
        (
            qwen3_30b_a3b(),
            "num_experts_per_tok",
            json!(129),
            "num_experts_per_tok = 129: must be between 1 and 128",
        ),
        (
            qwen3_30b_a3b(),
            "num_experts",
            json!(100_000),
            "num_experts = 100000: must be between 1 and 65536",
        ),
        (
            qwen3_30b_a3b(),
            "mlp_only_layers",
            json!([48]),
            "mlp_only_layers = 48: must be below num_hidden_layers (48)",
        ),
        (
            qwen3_30b_a3b(),
            "mlp_only_layers",
            json!("all"),
            "mlp_only_layers = \"all\": expected an integer",
        ),
        (
            qwen3_30b_a3b(),
            "layer_types",
            json!([1]),
            "layer_types = 1: expected a string",
        ),
        (
            llama_8b(),
            "model_type",
            json!("mistral"),
            "served are deepseek_v2, deepseek_v3, qwen2, llama, qwen3 and qwen3_moe",
        ),
    ];
    for (config, field, value, expected) in cases {
        let message = edited(config, field, value).unwrap_err().to_string();
        assert!(message.contains(expected), "{field}: {message}");
    }
    let many: Vec<u32> = (0..300).collect();
    let mut config = qwen3_30b_a3b();
    config["num_hidden_layers"] = 1000.into();
    let message = edited(config, "mlp_only_layers", many.into())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("300 layers: must be at most 256"),
        "{message}"
    );
}

#[test]
fn a_window_beyond_the_last_layer_is_none() {
    let mut config = qwen2(1536, 8960, 12, 2, 151_936, true);
    config["max_window_layers"] = 28.into();
    edited(config, "use_sliding_window", true.into()).unwrap();
    edited(llama_8b(), "sliding_window", 4096.into()).unwrap();
}
