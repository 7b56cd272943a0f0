//! Small model directories to break.

// Not every test file uses every helper; a helper is no test, and may unwrap all the same.
#![allow(dead_code, clippy::unwrap_used)]

pub mod hub;

use std::path::Path;

use engine_load::{Checkpoint, LoadError, read_config};
use engine_spec::ModelFault;
use serde_json::{Map, Value, json};

/// A tensor to write.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<usize>,
    pub bytes: Vec<u8>,
}

/// The config of a V3 model with one dense and one MoE layer.
pub fn config() -> Value {
    json!({
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
        "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8,
        "num_hidden_layers": 2, "first_k_dense_replace": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "q_lora_rank": 12, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5,
        "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": true,
        "routed_scaling_factor": 2.5, "max_position_embeddings": 64, "rope_theta": 10000.0,
        "bos_token_id": 0, "eos_token_id": 1
    })
}

/// The config of a model with grouped-query attention; the MoE one has experts in its second layer.
pub fn grouped_config(family: &str) -> Value {
    json!({
        "model_type": family, "torch_dtype": "bfloat16", "vocab_size": 32, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 6, "max_position_embeddings": 64, "rope_theta": 10000.0, "num_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 8, "decoder_sparse_step": 2,
        "bos_token_id": 0, "eos_token_id": 1
    })
}

/// Zeros for every tensor that `config` calls for: BF16, the gate's bias F32.
pub fn tensors(config: &Value) -> Vec<Tensor> {
    let config = engine_spec::ModelConfig::from_hf_json(&config.to_string()).unwrap();
    engine_model::build(&config)
        .tensors
        .iter()
        .map(|spec| {
            let wide = spec.name.ends_with("e_score_correction_bias");
            tensor(&spec.name, if wide { "F32" } else { "BF16" }, &spec.shape)
        })
        .collect()
}

/// Zeros.
pub fn tensor(name: &str, dtype: &str, shape: &[usize]) -> Tensor {
    let size = match dtype {
        "F32" | "I32" => 4,
        "BF16" | "F16" => 2,
        _ => 1,
    };
    Tensor {
        name: name.into(),
        dtype: dtype.into(),
        shape: shape.into(),
        bytes: vec![0; shape.iter().product::<usize>() * size],
    }
}

/// Header entries in file order, and the data.
pub fn layout(tensors: &[Tensor]) -> (Vec<(String, Value)>, Vec<u8>) {
    let mut entries = Vec::new();
    let mut data = Vec::new();
    for tensor in tensors {
        let begin = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry = json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [begin, data.len()]});
        entries.push((tensor.name.clone(), entry));
    }
    (entries, data)
}

/// A file with this header text.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A well-formed file.
pub fn file(tensors: &[Tensor]) -> Vec<u8> {
    let (entries, data) = layout(tensors);
    let header: Map<String, Value> = entries.into_iter().collect();
    with_header(&Value::Object(header).to_string(), &data)
}

/// Writes config and one weight file.
pub fn write(dir: &Path, config: &Value, tensors: &[Tensor]) {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    std::fs::write(dir.join("model.safetensors"), file(tensors)).unwrap();
}

/// Writes config, two weight files and their index.
pub fn write_sharded(dir: &Path, config: &Value, tensors: &[Tensor]) -> Map<String, Value> {
    std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let mut map = Map::new();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    for (name, part) in [("a.safetensors", first), ("b.safetensors", second)] {
        std::fs::write(dir.join(name), file(part)).unwrap();
        for tensor in part {
            map.insert(tensor.name.clone(), name.into());
        }
    }
    write_index(dir, &map);
    map
}

/// Writes an index.
pub fn write_index(dir: &Path, map: &Map<String, Value>) {
    let text = json!({"metadata": {}, "weight_map": map}).to_string();
    std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
}

/// Opens a directory the way the engine does.
pub fn open(dir: &Path) -> Result<Checkpoint, LoadError> {
    let config = read_config(dir)?;
    let model = engine_model::build(&config);
    Checkpoint::open(dir, &config, &model)
}

/// The directory must be refused with this fault and a message that holds all of these words.
pub fn refused(dir: &Path, fault: ModelFault, words: &[&str]) {
    let error = open(dir).expect_err("a broken model was opened");
    let text = error.chain();
    assert_eq!(error.fault(), Some(fault), "{text}");
    for word in words {
        assert!(text.contains(word), "\"{word}\" is not in: {text}");
    }
}
