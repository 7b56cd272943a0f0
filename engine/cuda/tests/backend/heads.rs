//! The head shape of V2, V3 and R1 (latent 512, rotary 64, nope and value 128) on more heads than one tile has, against the
//! CPU backend in float32, which is held to transformers by golden vectors.

use std::path::Path;

use crate::support::{bits, entry, gpu, limits, load, prefill, relative_error, step};
use engine_cpu::{CpuExecutor, CpuLimits, Isa};
use engine_load::{Progress, read_config};
use engine_memory::ResidentDtype;
use engine_model::TensorRole;
use half::bf16;
use safetensors::tensor::{Dtype, TensorView, serialize_to_file};

const CONFIG: &str = r#"{"model_type":"deepseek_v3","vocab_size":64,"hidden_size":64,"intermediate_size":96,
    "moe_intermediate_size":32,"num_hidden_layers":2,"first_k_dense_replace":1,"num_attention_heads":18,"q_lora_rank":48,
    "kv_lora_rank":512,"qk_nope_head_dim":128,"qk_rope_head_dim":64,"v_head_dim":128,"n_routed_experts":8,
    "n_shared_experts":1,"num_experts_per_tok":2,"n_group":2,"topk_group":1,"routed_scaling_factor":2.5,
    "norm_topk_prob":true,"scoring_func":"sigmoid","topk_method":"noaux_tc","rms_norm_eps":1e-6,"rope_theta":10000.0,
    "max_position_embeddings":256,"bos_token_id":0,"eos_token_id":1,"num_nextn_predict_layers":0,
    "tie_word_embeddings":false,"torch_dtype":"bfloat16"}"#;

/// Activations are bfloat16 between operations; random layers amplify that. Measured: 1.6e-2.
const TOLERANCE: f32 = 3e-2;

/// A checkpoint of random weights: norms near one, matrices that keep the size of what they multiply.
fn write_model(dir: &Path) {
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
    let model = engine_model::build(&read_config(dir).unwrap());
    let mut state = 7u64;
    // The upper half of a linear congruence (Knuth), uniform in [-1, 1).
    let mut random = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let tensors: Vec<(String, Vec<usize>, Vec<u8>)> = model
        .tensors
        .iter()
        .map(|spec| {
            let width = *spec.shape.last().unwrap() as f32;
            let (offset, size) = match (spec.role, spec.shape.len()) {
                (TensorRole::Precise, 1) => (1.0, 0.2),
                (TensorRole::Table, _) => (0.0, 1.0),
                _ => (0.0, 2.0 / width.sqrt()),
            };
            let values = (0..spec.elements())
                .flat_map(|_| bf16::from_f32(offset + size * random()).to_le_bytes())
                .collect();
            (spec.name.clone(), spec.shape.clone(), values)
        })
        .collect();
    let views = tensors.iter().map(|(name, shape, values)| {
        let view = TensorView::new(Dtype::BF16, shape.clone(), values).unwrap();
        (name.as_str(), view)
    });
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
}

#[test]
fn the_published_head_shape_agrees_with_the_cpu_and_with_itself_in_chunks() {
    let Some(gpu) = gpu() else { return };
    let dir = tempfile::tempdir().unwrap();
    write_model(dir.path());
    let config = read_config(dir.path()).unwrap();
    let cpu_limits = CpuLimits {
        resident: ResidentDtype::Float32,
        kv_blocks: 64,
        block_size: 8,
        model_len_max: 256,
        batched_tokens_max: 128,
        sequences_max: 6,
        draft_tokens: 0,
        threads: 2,
        isa: Isa::best(),
    };
    let progress = Progress::default();
    let mut cpu = CpuExecutor::load(dir.path(), &config, cpu_limits, &progress).unwrap();
    let mut executor = load(&gpu, dir.path(), limits(ResidentDtype::Bfloat16));
    let tokens: Vec<u32> = (0..35).map(|i| (i * 29 + 3) % 60 + 2).collect();
    let mut errors = Vec::new();
    for length in [1, 9, 35] {
        let found = prefill(&mut executor, &tokens[..length]);
        errors.push(relative_error(
            &found,
            &prefill(&mut cpu, &tokens[..length]),
        ));
    }
    println!("{errors:?}");
    assert!(errors.iter().all(|error| *error <= TOLERANCE), "{errors:?}");
    let blocks = [40, 3, 17, 8, 25];
    step(&mut executor, vec![entry(2, &tokens[..19], 0, &blocks)]);
    step(&mut executor, vec![entry(2, &tokens[19..34], 19, &blocks)]);
    let last = step(&mut executor, vec![entry(2, &tokens[34..], 34, &blocks)]);
    assert_eq!(bits(&last[0]), bits(&prefill(&mut executor, &tokens)));
}
