//! Expected numbers are those of the published checkpoints and papers.

use engine_spec::{
    Device, Dtype, KvCacheDtype, ModelConfig, Packing, Parallelism, Quantization, Rank,
};

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

/// So many GPUs for a model with experts, which they share.
fn on_gpus(tensor: u32, capacity_gib: Option<u64>) -> MemoryRequest {
    MemoryRequest {
        dtype: Dtype::Auto,
        quantization: Quantization::None,
        parallelism: Parallelism {
            tensor,
            expert: tensor,
            pipeline: 1,
        },
        device: Device::Nvidia,
        max_model_len: Some(16_384),
        max_num_seqs: 64,
        block_size: 64,
        max_num_batched_tokens: 8192,
        kv_cache: KvCacheDtype::Auto,
        draft_tokens: 0,
        capacity_bytes: capacity_gib.map(|n| n * GIB),
    }
}

/// The same for a model without experts.
fn dense_on_gpus(tensor: u32) -> MemoryRequest {
    MemoryRequest {
        parallelism: Parallelism {
            tensor,
            ..Parallelism::default()
        },
        ..on_gpus(1, None)
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
    for expert in [1, 4] {
        let text = with(8, expert, 1);
        assert!(
            text.contains("must be equal to tensor (8): ranks hold whole experts"),
            "{text}"
        );
    }
    assert!(with(1, 1, 2).contains("pipeline = 2: must be 1: ranks hold a part of every layer"));
    let dense = MemoryRequest {
        parallelism: Parallelism {
            tensor: 2,
            expert: 2,
            pipeline: 1,
        },
        ..on_gpus(1, None)
    };
    let text = memory_plan(&llama_8b(), &dense).unwrap_err().to_string();
    assert!(
        text.contains("expert = 2: must be 1: the model has no experts"),
        "{text}"
    );
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

fn llama_8b() -> ModelConfig {
    ModelConfig::from_hf_json(
        r#"{"model_type":"llama","vocab_size":128256,"intermediate_size":14336,"num_key_value_heads":8,
        "max_position_embeddings":131072,"rope_theta":500000.0}"#,
    )
    .unwrap()
}

fn qwen3_30b_a3b() -> ModelConfig {
    ModelConfig::from_hf_json(
        r#"{"model_type":"qwen3_moe","num_hidden_layers":48,"head_dim":128,"max_position_embeddings":40960,
        "rope_theta":1000000,"norm_topk_prob":true}"#,
    )
    .unwrap()
}

#[test]
fn a_cached_token_of_grouped_attention_is_shared_out_until_each_rank_has_one_head() {
    // 32 layers x 2 x 8 heads x 128 values x 2 bytes, as Llama's makers state: 128 KiB a token.
    let expected = [131_072, 65_536, 32_768, 16_384, 16_384, 16_384];
    for (tensor, bytes) in [1, 2, 4, 8, 16, 32].into_iter().zip(expected) {
        let plan = memory_plan(&llama_8b(), &dense_on_gpus(tensor)).unwrap();
        assert_eq!(plan.kv_bytes_per_token, bytes, "{tensor} ranks");
    }
    let plan = memory_plan(&qwen3_30b_a3b(), &on_gpus(1, None)).unwrap();
    assert_eq!(plan.kv_bytes_per_token, 98_304);
}

#[test]
fn weights_of_grouped_attention_are_the_checkpoint() {
    let norms = 65 * 4096;
    let plan = memory_plan(&llama_8b(), &dense_on_gpus(1)).unwrap();
    assert_eq!(plan.per_rank.weights_bytes, 2 * 8_030_261_248);
    let plan = memory_plan(&qwen3_30b_a3b(), &on_gpus(1, None)).unwrap();
    assert_eq!(plan.per_rank.weights_bytes, 2 * 30_532_122_624);
    // Past one key-value head per rank its two projections are copied, everything else still halves.
    // The tables' 1002 blocks are no multiple of the ranks.
    let rank = |tensor| {
        let plan = memory_plan(&llama_8b(), &dense_on_gpus(tensor)).unwrap();
        let tables = 2 * Rank::rows_max(128_256, tensor) * 4096 * 2;
        plan.per_rank.weights_bytes - 2 * norms - tables
    };
    let copied = 2 * 32 * 128 * 4096 * 2;
    assert_eq!(2 * (rank(16) - copied), rank(8) - copied);
    assert_eq!(2 * rank(4), rank(2));
}

#[test]
fn key_value_heads_that_cannot_be_shared_out_are_named() {
    let config = ModelConfig::from_hf_json(
        r#"{"model_type":"llama","num_attention_heads":24,"hidden_size":3072,"num_key_value_heads":6}"#,
    )
    .unwrap();
    let request = MemoryRequest {
        max_model_len: None,
        ..dense_on_gpus(4)
    };
    let text = memory_plan(&config, &request).unwrap_err().to_string();
    let expected = "tensor = 4: must divide the model's 6 key-value heads or be a multiple of them";
    assert!(text.contains(expected), "{text}");
    for tensor in [1, 2, 3, 6, 12, 24] {
        let mut request = request;
        request.parallelism.tensor = tensor;
        memory_plan(&config, &request).unwrap();
    }
}

#[test]
fn a_dense_width_that_no_layer_has_takes_no_workspace() {
    let mut config = qwen3_30b_a3b();
    let workspace = |config: &ModelConfig| {
        let plan = memory_plan(config, &on_gpus(1, None)).unwrap();
        plan.per_rank.workspace_bytes
    };
    let before = workspace(&config);
    config.intermediate_size *= 100;
    assert_eq!(workspace(&config), before);
    if let Some(moe) = &mut config.moe {
        moe.dense_layers = vec![3];
    }
    assert!(workspace(&config) > before);
}

/// The largest config and request that are let in.
#[test]
fn the_plan_of_an_absurd_model_is_a_number_and_no_panic() {
    let mut config = llama_8b();
    config.layers = 1024;
    config.max_positions = 1 << 24;
    config.attention = engine_spec::AttentionConfig::Grouped(engine_spec::GqaConfig {
        heads: 4096,
        kv_heads: 4096,
        head_dim: 256,
        qkv_bias: true,
        qk_norm: true,
    });
    let mut request = MemoryRequest {
        dtype: Dtype::Bfloat16,
        max_model_len: Some(1 << 24),
        max_num_seqs: 4096,
        block_size: 1024,
        max_num_batched_tokens: 1 << 20,
        ..on_gpus(1, None)
    };
    let plan = memory_plan(&config, &request).unwrap();
    assert_eq!(plan.total_bytes(), u64::MAX);
    request.capacity_bytes = Some(80 * GIB);
    let text = memory_plan(&config, &request).unwrap_err().to_string();
    assert!(text.contains("no setting makes it fit"), "{text}");
}

#[test]
fn fp8_is_kept_where_the_gpu_multiplies_it_and_widened_where_not() {
    let with = |block: u32, inner: u32| {
        let text = format!(
            r#"{{"model_type":"deepseek_v3","max_position_embeddings":4096,"n_group":8,"moe_intermediate_size":{inner},
            "quantization_config":{{"quant_method":"fp8","weight_block_size":[128,{block}]}}}}"#
        );
        let config = ModelConfig::from_hf_json(&text).unwrap();
        [Device::Nvidia, Device::Cpu]
            .map(|device| resident_dtype(Dtype::Auto, Quantization::None, &config, device))
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

/// The prediction layer of R1: a decoder layer of 256 experts, the joining matrix of 7168 x 14336, three norms.
#[test]
fn drafts_take_a_layer_of_weights_and_cache_and_the_buffers_that_it_goes_through() {
    let with = |draft_tokens, dtype| {
        let request = MemoryRequest {
            dtype,
            device: Device::Cpu,
            draft_tokens,
            max_num_seqs: 4,
            max_num_batched_tokens: 512,
            ..on_gpus(1, None)
        };
        memory_plan(&r1(), &request).unwrap()
    };
    let (off, one, three) = (
        with(0, Dtype::Float32),
        with(1, Dtype::Float32),
        with(3, Dtype::Float32),
    );
    let layer = 187_107_328 + 2 * 7168 + 257 * 44_040_192 + 256 * 7168 + 256;
    let parameters = layer + 7168 * 14_336 + 3 * 7168;
    let weights = one.per_rank.weights_bytes - off.per_rank.weights_bytes;
    assert_eq!(weights, 4 * parameters);
    assert_eq!(one.kv_bytes_per_token, 62 * 576 * 4);
    // Three more streams of tokens x hidden, and a row of logits for each draft.
    let workspace = one.per_rank.workspace_bytes - off.per_rank.workspace_bytes;
    assert_eq!(workspace, 4 * (3 * 512 * 7168 + 4 * 129_280));
    let workspace = three.per_rank.workspace_bytes - one.per_rank.workspace_bytes;
    assert_eq!(workspace, 4 * 2 * 4 * 129_280);
    assert_eq!(three.per_rank.weights_bytes, one.per_rank.weights_bytes);
    assert_eq!((off.draft_tokens, three.draft_tokens), (0, 3));
    let halved = with(1, Dtype::Bfloat16).per_rank.weights_bytes
        - with(0, Dtype::Bfloat16).per_rank.weights_bytes;
    // Norms, the gate and its bias stay in four bytes.
    let precise = 5 * 7168 + 1536 + 512 + 256 * 7168 + 256;
    assert_eq!(halved, 2 * parameters + 2 * precise);
}

#[test]
fn a_cache_in_eight_bits_takes_656_bytes_a_layer_and_is_refused_where_there_is_none() {
    let fp8 = MemoryRequest {
        kv_cache: KvCacheDtype::Fp8,
        ..on_gpus(8, None)
    };
    let plan = memory_plan(&r1(), &fp8).unwrap();
    assert_eq!(plan.kv_bytes_per_token, 61 * 656);
    assert_eq!(
        plan.per_rank.kv_bytes,
        plan.kv_tokens * plan.kv_bytes_per_token
    );
    assert_eq!(plan.kv_cache, KvCacheDtype::Fp8);
    let grouped = MemoryRequest {
        parallelism: Parallelism::default(),
        ..fp8
    };
    let text = memory_plan(&qwen3_30b_a3b(), &grouped)
        .unwrap_err()
        .to_string();
    assert!(
        text.contains("kvCacheDtype = fp8") && text.contains("keys and values of heads"),
        "{text}"
    );
    let on_cpu = MemoryRequest {
        device: Device::Cpu,
        parallelism: Parallelism::default(),
        ..fp8
    };
    let text = memory_plan(&r1(), &on_cpu).unwrap_err().to_string();
    assert!(
        text.contains("this is the device cpu; ask for auto"),
        "{text}"
    );
}

#[test]
fn drafts_without_a_layer_for_them_are_refused() {
    let request = MemoryRequest {
        draft_tokens: 1,
        ..on_gpus(1, None)
    };
    let refused = memory_plan(&qwen3_30b_a3b(), &request);
    let text = refused.unwrap_err().to_string();
    assert!(
        text.contains("qwen3_moe models have no prediction layer (num_nextn_predict_layers"),
        "{text}"
    );
}

#[test]
fn on_a_gpu_drafts_take_the_layer_in_its_form_and_a_block_table_each() {
    let with = |draft_tokens| {
        let request = MemoryRequest {
            draft_tokens,
            max_model_len: Some(8192),
            max_num_seqs: 4,
            max_num_batched_tokens: 512,
            block_size: 64,
            ..on_gpus(1, None)
        };
        memory_plan(&r1(), &request).unwrap()
    };
    let (off, one, three) = (with(0), with(1), with(3));
    assert_eq!(one.kv_bytes_per_token, 62 * 576 * 2);
    let workspace = one.per_rank.workspace_bytes - off.per_rank.workspace_bytes;
    // A row that is sampled: logits, what was picked for them, its number and its block table; and for picking its token,
    // adjusted logits and counts, a bit for each token, settings, history borders and results.
    let picking = 129_280 * 8 + 4040 * 4 + 6 * 4 + 4 + 3 * 8 + 2 * 3 * 4 + 20 * 8;
    let sampled = 129_280 * 4 + 7168 * 2 + 4 * (1 + 128) + picking;
    assert_eq!(workspace, 3 * 512 * 7168 * 2 + 512 * 4 + 4 * sampled);
    let workspace = three.per_rank.workspace_bytes - one.per_rank.workspace_bytes;
    assert_eq!(workspace, 2 * 4 * sampled);
    // FP8 matrices with a scale for each 128 x 128; eh_proj, norms and the gate in bfloat16.
    let weights = one.per_rank.weights_bytes - off.per_rank.weights_bytes;
    let fp8 =
        |rows: u64, columns: u64| rows * columns + 4 * rows.div_ceil(128) * columns.div_ceil(128);
    let attention = fp8(1536, 7168)
        + fp8(128 * 192, 1536)
        + fp8(576, 7168)
        + fp8(7168, 128 * 128)
        + 2 * 128 * (128 + 128) * 512;
    let experts = 257 * (2 * fp8(2048, 7168) + fp8(7168, 2048));
    let rest = 2 * 7168 * 14_336 + 2 * (5 * 7168 + 1536 + 512 + 256 * 7168) + 4 * 256;
    assert_eq!(weights, attention + experts + rest);
}

#[test]
fn ranks_hold_whole_experts_and_a_part_of_every_layer() {
    let request = |tensor, expert, pipeline| MemoryRequest {
        device: Device::Cpu,
        parallelism: Parallelism {
            tensor,
            expert,
            pipeline,
        },
        ..on_gpus(1, None)
    };
    let config = qwen3_30b_a3b();
    let one = memory_plan(&config, &request(1, 1, 1)).unwrap();
    let four = memory_plan(&config, &request(4, 4, 1)).unwrap();
    assert_eq!(four.ranks, 4);
    assert_eq!(four.kv_bytes_per_token * 4, one.kv_bytes_per_token);
    // Gates and norms are on every rank.
    let quarter = one.per_rank.weights_bytes / 4;
    let more = four.per_rank.weights_bytes - quarter;
    assert!(more > 0 && more < quarter / 50, "{more} of {quarter}");
    assert!(four.per_rank.workspace_bytes < one.per_rank.workspace_bytes);
    let fewer = four.with_kv_blocks(7);
    assert_eq!((fewer.kv_blocks, fewer.kv_tokens), (7, 7 * 64));
    assert_eq!(
        fewer.per_rank.kv_bytes,
        fewer.kv_tokens * fewer.kv_bytes_per_token
    );
    assert_eq!(four.with_kv_blocks(u32::MAX), four);
}

#[test]
fn integers_take_their_bits_and_scales() {
    let weights = |quantization, config: &ModelConfig| {
        let request = MemoryRequest {
            device: Device::Cpu,
            quantization,
            ..on_gpus(1, None)
        };
        memory_plan(config, &request)
            .unwrap()
            .per_rank
            .weights_bytes
    };
    // Llama 8B: an embedding of two bytes a weight, a head of one with a scale of four for each of its rows; of each layer
    // 218,103,808 weights in 38,912 + 4096 * 2 + 2048 rows; norms of four bytes.
    let (table, layer, rows) = (
        128_256 * 4096,
        218_103_808,
        2 * 14_336 + 3 * 4096 + 2 * 1024,
    );
    let around = table * 2 + table + 128_256 * 4 + 65 * 4096 * 4;
    let llama = llama_8b();
    assert_eq!(
        weights(Quantization::Int8, &llama),
        around + 32 * (layer + rows * 4)
    );
    // Half a byte, and four bytes for 64 of them.
    assert_eq!(
        weights(Quantization::Int4, &llama),
        around + 32 * (layer / 2 + layer / 64 * 4)
    );
    // R1 at four bits fits into half a terabyte with room: 4.5 bits of 671 B weights.
    let r1 = weights(Quantization::Int4, &r1()) as f64;
    assert!((377e9..383e9).contains(&r1), "{r1}");
}

#[test]
fn integers_of_the_files_leave_head_and_embedding_wide() {
    let text = r#"{"model_type":"llama","vocab_size":128256,"intermediate_size":14336,"num_key_value_heads":8,
        "quantization_config":{"quant_method":"compressed-tensors","format":"pack-quantized","config_groups":{"group_0":{
        "targets":["Linear"],"weights":{"num_bits":4,"type":"int","symmetric":true,"strategy":"group","group_size":128}}}}}"#;
    let config = ModelConfig::from_hf_json(text).unwrap();
    let request = MemoryRequest {
        device: Device::Cpu,
        max_model_len: None,
        ..on_gpus(1, None)
    };
    let plan = memory_plan(&config, &request).unwrap();
    let layer = 218_103_808;
    let wide = 2 * 128_256 * 4096 * 2 + 65 * 4096 * 4;
    assert_eq!(
        plan.per_rank.weights_bytes,
        wide + 32 * (layer / 2 + layer / 128 * 4)
    );
    // The GPU has no integer products and widens.
    let plan = memory_plan(
        &config,
        &MemoryRequest {
            device: Device::Nvidia,
            ..request
        },
    )
    .unwrap();
    assert_eq!(plan.resident, ResidentDtype::Bfloat16);
}

#[test]
fn a_gpu_has_no_integers_and_no_packed_weights_and_says_so() {
    let request = MemoryRequest {
        quantization: Quantization::Int8,
        ..on_gpus(8, None)
    };
    let misfit = memory_plan(&r1(), &request).unwrap_err();
    assert_eq!(misfit, Misfit::NoIntegers(Quantization::Int8));
    assert!(
        misfit
            .to_string()
            .contains("quantization = int8: the GPU backend"),
        "{misfit}"
    );
    let mut packed = r1();
    packed.packed = Some(Packing {
        dtype: Dtype::Auto,
        quantization: Quantization::Int4,
    });
    let misfit = memory_plan(&packed, &on_gpus(8, None)).unwrap_err();
    assert_eq!(misfit, Misfit::Packed);
    // On the CPU what was packed decides.
    let device = Device::Cpu;
    let resident = resident_dtype(Dtype::Auto, Quantization::None, &packed, device);
    assert_eq!(
        resident,
        resident_dtype(Dtype::Auto, Quantization::Int4, &r1(), device)
    );
}
