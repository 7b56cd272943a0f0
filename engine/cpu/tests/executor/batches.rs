//! What the executor allocates and which batches it refuses.

use crate::support::{MODELS, entry, folder, limits, load, prefill};
use engine_core::{Batch, ExecuteError, Executor, Logits};
use engine_cpu::{CpuExecutor, CpuLimits};
use engine_load::{Progress, read_config};
use engine_memory::{MemoryRequest, ResidentDtype, memory_plan};
use engine_spec::{Device, Dtype, KvCacheDtype, Parallelism, Quantization};

#[test]
fn allocations_are_those_of_the_memory_plan() {
    let plain = MODELS.map(|model| (model, 0));
    for (model, draft_tokens) in plain.into_iter().chain([("v3-mtp", 1), ("v3-mtp", 3)]) {
        for (dtype, quantization) in [
            (Dtype::Float32, Quantization::None),
            (Dtype::Bfloat16, Quantization::None),
            (Dtype::Auto, Quantization::None),
            (Dtype::Auto, Quantization::Int8),
            (Dtype::Auto, Quantization::Int4),
        ] {
            let dir = folder(model);
            let config = read_config(&dir).unwrap();
            let request = MemoryRequest {
                dtype,
                quantization,
                parallelism: Parallelism::default(),
                device: Device::Cpu,
                max_model_len: Some(100),
                max_num_seqs: 3,
                block_size: 8,
                max_num_batched_tokens: 64,
                kv_cache: KvCacheDtype::Auto,
                draft_tokens,
                capacity_bytes: None,
            };
            let plan = memory_plan(&config, &request).unwrap();
            let executor = load(&dir, CpuLimits::from_plan(&plan, 3, 64));
            let held = executor.allocated_bytes();
            assert_eq!(held.weights, plan.per_rank.weights_bytes, "{model} weights");
            assert_eq!(held.kv, plan.per_rank.kv_bytes, "{model} cache");
            // The plan counts the logits, which belong to the caller, and an output row for each shared expert, of
            // which the joined one needs a single row.
            let logits = request.max_num_seqs * (1 + draft_tokens) * config.vocab_size;
            let shared = config.moe.as_ref().map_or(1, |moe| moe.shared_experts);
            let joined =
                shared.saturating_sub(1) * config.hidden_size * request.max_num_batched_tokens;
            let elsewhere = u64::from(logits + joined) * 4;
            assert_eq!(
                held.workspace + elsewhere,
                plan.per_rank.workspace_bytes,
                "{model} workspace"
            );
        }
    }
}

#[test]
fn random_weights_run_any_config_and_their_seed_names_them() {
    for model in MODELS {
        let config = read_config(&folder(model)).unwrap();
        let run = |seed, threads| {
            let mut limits = limits(ResidentDtype::Bfloat16);
            limits.threads = threads;
            let progress = Progress::default();
            let mut executor = CpuExecutor::dummy(&config, seed, limits, &progress).unwrap();
            assert_eq!(progress.done(), progress.total());
            let dir_held = load(&folder(model), limits).allocated_bytes();
            assert_eq!(executor.allocated_bytes(), dir_held, "{model}");
            prefill(&mut executor, &[3, 1, 4, 1, 5])
        };
        let row = run(1, 1);
        assert_eq!(run(1, 2), row, "{model}");
        assert_ne!(run(2, 1), row, "{model}");
        let largest = row
            .iter()
            .fold(0f32, |largest, value| largest.max(value.abs()));
        assert!((0.1..50.0).contains(&largest), "{model}: {largest}");
    }
}

#[test]
fn a_batch_that_breaks_the_contract_is_refused_and_harms_nothing() {
    let mut executor = load(&folder("v2-lite"), limits(ResidentDtype::Bfloat16));
    let before = prefill(&mut executor, &[5, 6, 7]);
    let too_many: Vec<_> = (0..9).map(|n| entry(n, &[1], 0, &[n as u32])).collect();
    let cases = [
        (vec![entry(1, &[], 0, &[0])], "no tokens"),
        (vec![entry(1, &[96], 0, &[0])], "vocabulary of 96"),
        (vec![entry(1, &[1; 9], 0, &[0])], "do not cover 9 positions"),
        (vec![entry(1, &[1], 8, &[0])], "do not cover 9 positions"),
        (vec![entry(1, &[1], 0, &[64])], "block 64 of 64"),
        (vec![entry(1, &[1], usize::MAX, &[0])], "the limit is 256"),
        (
            vec![entry(1, &[1; 257], 0, &[0; 64])],
            "257 tokens, the limit is 256",
        ),
        (too_many, "9 logits rows, the limit is 8"),
    ];
    for (entries, word) in cases {
        let error = executor
            .execute(&Batch { entries }, &mut Logits::default())
            .unwrap_err();
        assert!(matches!(error, ExecuteError::InvalidBatch(_)), "{error}");
        assert!(
            error.to_string().contains(word),
            "\"{word}\" is not in: {error}"
        );
    }
    assert_eq!(prefill(&mut executor, &[5, 6, 7]), before);
}

#[test]
fn only_the_wanted_rows_are_computed() {
    for model in ["v2-lite", "qwen3-moe"] {
        let mut executor = load(&folder(model), limits(ResidentDtype::Bfloat16));
        let alone = prefill(&mut executor, &[9, 8]);
        let mut silent = entry(2, &[3, 4, 5], 0, &[10]);
        silent.wants_logits = false;
        let entries = vec![silent, entry(1, &[9, 8], 0, &[0])];
        let mut logits = Logits::default();
        executor.execute(&Batch { entries }, &mut logits).unwrap();
        assert_eq!(logits.rows(), 1);
        assert_eq!(logits.row(0), alone);
        executor.execute(&Batch::default(), &mut logits).unwrap();
        assert_eq!(logits.rows(), 0);
    }
}
