//! The numbers are those of `deepseek-ai` model cards and README_WEIGHTS, not of this code.

use serde_json::Map;

use super::*;
use crate::model_config::AttentionConfig;

/// DeepSeek-R1's published config, cosmetic fields left out.
const R1: &str = r#"{"architectures":["DeepseekV3ForCausalLM"],"attention_bias":false,"bos_token_id":0,
"eos_token_id":1,"first_k_dense_replace":3,"hidden_act":"silu","hidden_size":7168,"intermediate_size":18432,
"kv_lora_rank":512,"max_position_embeddings":163840,"model_type":"deepseek_v3","moe_intermediate_size":2048,
"moe_layer_freq":1,"n_group":8,"n_routed_experts":256,"n_shared_experts":1,"norm_topk_prob":true,
"num_attention_heads":128,"num_experts_per_tok":8,"num_hidden_layers":61,"num_key_value_heads":128,
"num_nextn_predict_layers":1,"q_lora_rank":1536,"qk_nope_head_dim":128,"qk_rope_head_dim":64,
"quantization_config":{"activation_scheme":"dynamic","fmt":"e4m3","quant_method":"fp8","weight_block_size":[128,128]},
"rms_norm_eps":1e-06,"rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,"mscale_all_dim":1.0,
"original_max_position_embeddings":4096,"type":"yarn"},"rope_theta":10000,"routed_scaling_factor":2.5,
"scoring_func":"sigmoid","tie_word_embeddings":false,"topk_group":4,"topk_method":"noaux_tc",
"torch_dtype":"bfloat16","v_head_dim":128,"vocab_size":129280}"#;

const V2_LITE: &str = r#"{"model_type":"deepseek_v2","vocab_size":102400,"hidden_size":2048,"intermediate_size":10944,
"moe_intermediate_size":1408,"num_hidden_layers":27,"num_attention_heads":16,"num_key_value_heads":16,"n_shared_experts":2,
"n_routed_experts":64,"routed_scaling_factor":1.0,"kv_lora_rank":512,"q_lora_rank":null,"qk_rope_head_dim":64,"v_head_dim":128,
"qk_nope_head_dim":128,"topk_method":"greedy","n_group":1,"topk_group":1,"num_experts_per_tok":6,"moe_layer_freq":1,
"first_k_dense_replace":1,"norm_topk_prob":false,"scoring_func":"softmax","max_position_embeddings":163840,
"rms_norm_eps":1e-6,"rope_theta":10000,"rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":0.707,
"mscale_all_dim":0.707,"original_max_position_embeddings":4096,"type":"yarn"},"bos_token_id":100000,"eos_token_id":100001,
"torch_dtype":"bfloat16"}"#;

fn edited(base: &str, field: &str, value: Value) -> Result<ModelConfig, ConfigError> {
    let mut document: Map<String, Value> = serde_json::from_str(base).unwrap();
    document.insert(field.into(), value);
    parse(&serde_json::to_string(&document).unwrap())
}

#[test]
fn parameter_counts_are_those_of_the_published_checkpoints() {
    let r1 = parse(R1).unwrap();
    assert_eq!(r1.parameters(), 671_026_419_200);
    assert_eq!(r1.active_parameters(), 36_625_618_432);
    let lite = parse(V2_LITE).unwrap();
    assert_eq!(lite.parameters(), 15_706_484_224);
    assert_eq!(lite.active_parameters(), 2_451_435_008);
}

#[test]
fn yarn_scales_are_those_of_the_reference() {
    let r1 = parse(R1).unwrap();
    let scaling = r1.rope_scaling.as_ref().unwrap();
    assert!((scaling.softmax_multiplier() - 1.873_854).abs() < 1e-6);
    assert_eq!(scaling.cos_sin_multiplier(), 1.0);
    let AttentionConfig::Latent(mla) = &r1.attention else {
        panic!("R1 has latent attention");
    };
    let scale = scaling.softmax_multiplier() / f64::from(mla.qk_head_dim()).sqrt();
    assert!((scale - 0.135_233_8).abs() < 1e-7);
}

#[test]
fn stored_bytes_are_near_the_published_total_without_the_prediction_layer() {
    // 684.5 GB with the MTP module's 11.5 B unique parameters.
    let bytes = parse(R1).unwrap().stored_weight_bytes() as f64;
    assert!((672e9..674e9).contains(&bytes), "{bytes}");
}

#[test]
fn the_form_of_transformers_5_gives_the_same_config() {
    let mut document: Map<String, Value> = serde_json::from_str(R1).unwrap();
    for field in [
        "scoring_func",
        "topk_method",
        "rope_theta",
        "moe_layer_freq",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "n_group",
        "topk_group",
        "num_experts_per_tok",
        "routed_scaling_factor",
        "norm_topk_prob",
        "bos_token_id",
        "eos_token_id",
        "torch_dtype",
    ] {
        document.remove(field);
    }
    let mut rope = document.remove("rope_scaling").unwrap();
    rope["rope_type"] = "yarn".into();
    rope["rope_theta"] = 10_000.0.into();
    document.insert("rope_parameters".into(), rope);
    document.insert("dtype".into(), "bfloat16".into());
    let text = serde_json::to_string(&document).unwrap();
    assert_eq!(parse(&text).unwrap(), parse(R1).unwrap());
}

#[test]
fn the_compact_form_survives_a_round_trip_and_stays_small() {
    let config = parse(R1).unwrap();
    let text = serde_json::to_string(&config).unwrap();
    assert!(text.len() < 1500, "{}", text.len());
    assert_eq!(serde_json::from_str::<ModelConfig>(&text).unwrap(), config);
}

#[test]
fn bad_fields_are_named_with_value_and_way_out() {
    let cases = [
        (
            "model_type",
            Value::from("gpt2"),
            "model_type \"gpt2\" is not served",
        ),
        (
            "hidden_size",
            Value::from(0),
            "hidden_size = 0: must be between 1 and",
        ),
        (
            "hidden_size",
            Value::from("big"),
            "hidden_size = \"big\": expected an integer",
        ),
        (
            "hidden_size",
            Value::from(-1),
            "hidden_size = -1: expected an integer",
        ),
        (
            "qk_rope_head_dim",
            Value::from(63),
            "qk_rope_head_dim = 63: must be even",
        ),
        (
            "n_group",
            Value::from(7),
            "n_group = 7: must divide n_routed_experts (256)",
        ),
        (
            "topk_group",
            Value::from(9),
            "topk_group = 9: must be between 1 and 8",
        ),
        (
            "num_experts_per_tok",
            Value::from(200),
            "topk_group leaves only 128 experts",
        ),
        (
            "scoring_func",
            Value::from("tanh"),
            "scoring_func = tanh: served are",
        ),
        (
            "eos_token_id",
            Value::from(129_280),
            "eos_token_id = 129280: must be below vocab_size",
        ),
        (
            "rms_norm_eps",
            Value::from(0.0),
            "rms_norm_eps = 0: must be a positive number",
        ),
        (
            "num_key_value_heads",
            Value::from(8),
            "num_key_value_heads = 8",
        ),
        ("attention_bias", Value::from(true), "attention_bias = true"),
    ];
    for (field, value, expected) in cases {
        let message = edited(R1, field, value).unwrap_err().to_string();
        assert!(message.contains(expected), "{field}: {message}");
    }
    assert!(parse("[]").is_err());
    assert!(parse("{").is_err());
    assert_eq!(parse("{}").unwrap_err(), ConfigError::Missing("model_type"));
}

/// Whatever a field holds, a config is refused or all that is derived from it can be computed.
#[test]
fn no_value_of_a_field_makes_a_config_panic() {
    let nasty = [
        Value::Null,
        true.into(),
        (-1).into(),
        0.into(),
        1.into(),
        7.into(),
        1024.into(),
        4096.into(),
        65_536.into(),
        (1u64 << 20).into(),
        u32::MAX.into(),
        u64::MAX.into(),
        0.5.into(),
        1e300.into(),
        "".into(),
        "default".into(),
        Value::Array(Vec::new()),
        Value::from(vec![u32::MAX; 3]),
        Value::Object(Map::new()),
    ];
    let mut served = 0;
    for base in [R1, V2_LITE]
        .into_iter()
        .map(str::to_owned)
        .chain(super::grouped::tests::published())
    {
        let document: Map<String, Value> = serde_json::from_str(&base).unwrap();
        // Two fields at once: products of sizes overflow where one alone does not.
        for first in document.keys() {
            for second in ["hidden_size", "num_hidden_layers", first] {
                for value in &nasty {
                    let mut document = document.clone();
                    document.insert(first.clone(), value.clone());
                    document.insert(second.to_owned(), value.clone());
                    let Ok(config) = parse(&serde_json::to_string(&document).unwrap()) else {
                        continue;
                    };
                    served += 1;
                    assert!(config.active_parameters() <= config.parameters());
                    assert!(config.stored_weight_bytes() > 0);
                    assert!(config.moe_layers() <= config.layers);
                }
            }
        }
    }
    assert!(served > 1000, "{served}");
}

fn compressed(edit: impl FnOnce(&mut Value)) -> Result<ModelConfig, ConfigError> {
    let mut quantization = serde_json::json!({
        "quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": ["lm_head"],
        "config_groups": {"group_0": {
            "targets": ["Linear"], "input_activations": null, "output_activations": null,
            "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 128,
                "actorder": null, "dynamic": false},
        }},
    });
    edit(&mut quantization);
    edited(V2_LITE, "quantization_config", quantization)
}

#[test]
fn integers_of_compressed_tensors_are_read() {
    let found = |edit: fn(&mut Value)| compressed(edit).unwrap().integers.unwrap();
    let integers = |bits, group, packed| StoredIntegers {
        bits,
        group,
        packed,
    };
    assert_eq!(found(|_| ()), integers(4, Some(128), true));
    let by_channel = |q: &mut Value| {
        let weights = &mut q["config_groups"]["group_0"]["weights"];
        weights["num_bits"] = 8.into();
        weights["strategy"] = "channel".into();
        weights["group_size"] = Value::Null;
    };
    assert_eq!(found(by_channel), integers(8, None, true));
    let bytes = |q: &mut Value| {
        q["format"] = "int-quantized".into();
        let group = &mut q["config_groups"]["group_0"];
        group["weights"]["num_bits"] = 8.into();
        group["weights"]["strategy"] = "channel".into();
        group["weights"]["group_size"] = Value::Null;
        group["input_activations"] =
            serde_json::json!({"num_bits": 8, "type": "int", "dynamic": true, "strategy": "token"});
    };
    assert_eq!(found(bytes), integers(8, None, false));
    let config = compressed(|_| ()).unwrap();
    assert_eq!(config.stored_dtype, StoredDtype::Bfloat16);
    // Half a byte and an eightieth for scales of nearly all parameters; two tables stay at two bytes.
    let bytes = config.stored_weight_bytes() as f64 / config.parameters() as f64;
    assert!((0.53..0.62).contains(&bytes), "{bytes}");
}

#[test]
fn integers_that_are_not_served_are_named() {
    let cases: [(&str, Value, &str); 9] = [
        (
            "weights/symmetric",
            false.into(),
            "weights.symmetric = false: served are symmetric weights",
        ),
        ("weights/type", "float".into(), "weights.type = float"),
        (
            "weights/num_bits",
            3.into(),
            "weights.num_bits = 3, by groups of 128",
        ),
        (
            "weights/strategy",
            "block".into(),
            "weights.strategy = block: served are channel and group",
        ),
        (
            "weights/group_size",
            12.into(),
            "weights.group_size = 12: must be a multiple of 8",
        ),
        (
            "weights/actorder",
            "group".into(),
            "weights.actorder = group: columns must be in order",
        ),
        ("weights", Value::Null, "weights = null"),
        (
            "targets",
            serde_json::json!(["Conv2d"]),
            "targets = Conv2d: served is Linear",
        ),
        (
            "input_activations",
            serde_json::json!({"num_bits": 8, "type": "int", "dynamic": false}),
            "input_activations = others: served are dynamic symmetric",
        ),
    ];
    for (place, value, expected) in cases {
        let message = compressed(|q| {
            let field = q.pointer_mut(&format!("/config_groups/group_0/{place}"));
            *field.unwrap() = value;
        })
        .unwrap_err()
        .to_string();
        assert!(message.contains(expected), "{place}: {message}");
    }
    let message = compressed(|q| q["format"] = "marlin-24".into())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("format = marlin-24: served are pack-quantized"),
        "{message}"
    );
    let message = compressed(|q| q["quant_method"] = "gptq".into())
        .unwrap_err()
        .to_string();
    assert!(message.contains("quant_method = gptq"), "{message}");
}

#[test]
fn what_was_packed_is_read_back() {
    let packed = serde_json::json!({"dtype": "auto", "quantization": "int8"});
    let config = edited(V2_LITE, "cachalot_packed", packed).unwrap();
    let quantization = config.packed.unwrap().quantization;
    assert_eq!(quantization, crate::Quantization::Int8);
    let message = edited(V2_LITE, "cachalot_packed", 1.into())
        .unwrap_err()
        .to_string();
    assert!(message.contains("cachalot_packed"), "{message}");
}
