//! Expected numbers are those of the published checkpoints and papers.

use engine_spec::{Device, Dtype, ModelConfig, Parallelism};

use crate::{MemoryRequest, Misfit, ResidentDtype, memory_plan, resident_dtype};

const GIB: u64 = 1 << 30;

fn r1() -> ModelConfig {
    ModelConfig::from_hf_json(
        r#"{"model_type":"deepseek_v3","max_position_embeddings":163840,"n_group":8,"num_nextn_predict_layers":1,
        "quantization_config":{"quant_method":"fp8","weight_block_size":[128,128]},
        "rope_scaling":{"beta_fast":32,"beta_slow":1,"factor":40,"mscale":1.0,"mscale_all_dim":1.0,
        "original_max_position_embeddings":4096,"type":"yarn"}}"#,
    )
    .unwrap()
}

fn on_gpus(tensor: u32, capacity_gib: Option<u64>) -> MemoryRequest {
    MemoryRequest {
        dtype: Dtype::Auto,
        parallelism: Parallelism {
            tensor,
            ..Parallelism::default()
        },
        device: Device::Nvidia,
        max_model_len: Some(16_384),
        max_num_seqs: 64,
        block_size: 64,
        max_num_batched_tokens: 8192,
        capacity_bytes: capacity_gib.map(|n| n * GIB),
    }
}

#[test]
fn a_cached_token_of_r1_is_70272_bytes() {
    let plan = memory_plan(&r1(), &on_gpus(8, None)).unwrap();
    assert_eq!(plan.kv_bytes_per_token, 70_272);
    assert_eq!(plan.kv_tokens, 64 * 16_384);
}

#[test]
fn weights_of_one_rank_are_the_checkpoint() {
    // 671.03 B parameters, nearly all at 1.00024 bytes; embedding and head (1.85 B), the gates (0.11 B) and the key-value
    // up-projections (1.02 B), whose batched products are bfloat16, at two.
    let plan = memory_plan(&r1(), &on_gpus(1, None)).unwrap();
    let bytes = plan.per_rank.weights_bytes as f64;
    assert!((673.9e9..674.4e9).contains(&bytes), "{bytes}");
}

#[test]
fn r1_fits_eight_h200_and_not_eight_h100() {
    let h200 = memory_plan(&r1(), &on_gpus(8, Some(140))).unwrap();
    assert!(h200.total_bytes() <= 140 * GIB);
    assert!(h200.kv_tokens >= 16_384);
    let misfit = memory_plan(&r1(), &on_gpus(8, Some(79))).unwrap_err();
    let text = misfit.to_string();
    let Misfit::DoesNotFit { nearest, .. } = misfit else {
        panic!("{text}");
    };
    assert_eq!(nearest.tensor, Some(16));
    assert!(text.contains("but 79.0 GiB are there"), "{text}");
    assert!(text.contains("16 devices per replica"), "{text}");
}

#[test]
fn a_capacity_bounds_the_cache_and_is_never_exceeded() {
    for capacity in [100, 110, 120, 140, 300] {
        if let Ok(plan) = memory_plan(&r1(), &on_gpus(8, Some(capacity))) {
            assert!(plan.total_bytes() <= capacity * GIB);
            assert!(plan.kv_tokens >= u64::from(plan.max_model_len));
        }
    }
}

#[test]
fn advice_is_true() {
    let (mut shorter, mut smaller_steps, mut wider) = (0, 0, 0);
    for capacity in 78..95 {
        let tight = on_gpus(8, Some(capacity));
        let Err(Misfit::DoesNotFit { nearest, .. }) = memory_plan(&r1(), &tight) else {
            continue;
        };
        if let Some(tokens) = nearest.max_model_len {
            shorter += 1;
            let request = MemoryRequest {
                max_model_len: Some(tokens),
                ..tight
            };
            memory_plan(&r1(), &request).unwrap();
        }
        if let Some(tokens) = nearest.max_num_batched_tokens {
            smaller_steps += 1;
            let request = MemoryRequest {
                max_num_batched_tokens: tokens,
                ..tight
            };
            memory_plan(&r1(), &request).unwrap();
        }
        if let Some(tensor) = nearest.tensor {
            wider += 1;
            memory_plan(&r1(), &on_gpus(tensor, Some(capacity))).unwrap();
        }
    }
    assert!(
        shorter > 0 && smaller_steps > 0 && wider > 0,
        "{shorter} {smaller_steps} {wider}"
    );
}

#[test]
fn impossible_divisions_are_named() {
    let with = |tensor, expert, pipeline| {
        let parallelism = Parallelism {
            tensor,
            expert,
            pipeline,
        };
        let request = MemoryRequest {
            parallelism,
            ..on_gpus(1, None)
        };
        memory_plan(&r1(), &request).unwrap_err().to_string()
    };
    assert!(with(3, 1, 1).contains("tensor = 3: must divide the model's 128 heads"));
    assert!(with(8, 7, 1).contains("expert = 7: must divide the model's 256 routed experts"));
    assert!(with(8, 4, 1).contains("expert = 4: must be 1 or equal to tensor (8)"));
    assert!(with(1, 1, 62).contains("pipeline = 62: must be between 1 and the model's 61 layers"));
    let long = MemoryRequest {
        max_model_len: Some(200_000),
        ..on_gpus(8, None)
    };
    let text = memory_plan(&r1(), &long).unwrap_err().to_string();
    assert!(
        text.contains("maxModelLen = 200000: the model is declared for 163840"),
        "{text}"
    );
}

#[test]
fn more_ranks_never_need_more_per_rank() {
    let totals: Vec<u64> = [2, 4, 8, 16]
        .map(|n| {
            memory_plan(&r1(), &on_gpus(n, None))
                .unwrap()
                .per_rank
                .weights_bytes
        })
        .into();
    assert!(totals.is_sorted_by(|a, b| a > b), "{totals:?}");
}

#[test]
fn fp8_is_kept_where_the_gpu_multiplies_it_and_widened_where_not() {
    let with = |block: u32, inner: u32| {
        let text = format!(
            r#"{{"model_type":"deepseek_v3","max_position_embeddings":4096,"n_group":8,"moe_intermediate_size":{inner},
            "quantization_config":{{"quant_method":"fp8","weight_block_size":[128,{block}]}}}}"#
        );
        let config = ModelConfig::from_hf_json(&text).unwrap();
        [Device::Nvidia, Device::Cpu].map(|device| resident_dtype(Dtype::Auto, &config, device))
    };
    let [gpu, cpu] = with(128, 2048);
    assert!(matches!(gpu, ResidentDtype::Float8E4m3(_)));
    assert_eq!(cpu, ResidentDtype::Bfloat16);
    for (block, inner) in [(64, 2048), (128, 2000)] {
        assert_eq!(with(block, inner)[0], ResidentDtype::Bfloat16);
    }
}

#[test]
fn a_gpu_has_no_float32_and_says_so() {
    let request = MemoryRequest {
        dtype: Dtype::Float32,
        ..on_gpus(8, None)
    };
    let misfit = memory_plan(&r1(), &request).unwrap_err();
    assert_eq!(misfit, Misfit::NoArithmetic);
    assert!(misfit.to_string().contains("ask for auto or bfloat16"));
}

#[test]
fn a_long_context_does_not_blow_up_the_parts_of_attention() {
    let workspace = |length| {
        let request = MemoryRequest {
            max_model_len: Some(length),
            ..on_gpus(1, None)
        };
        memory_plan(&r1(), &request)
            .unwrap()
            .per_rank
            .workspace_bytes
    };
    // Ten times the context adds its tables (64 block tables, sines and cosines), no more.
    let (short, long) = (workspace(16_384), workspace(163_840));
    assert!(long - short < 64 << 20, "{short} {long}");
}
