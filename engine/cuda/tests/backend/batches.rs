//! What the executor allocates, which batches and models it refuses.

use crate::support::{
    device, entry, gpu, gpu_of, limits, load, plan, prefill, random_model, request, step,
    trained_model,
};
use engine_core::{Batch, ExecuteError, Executor, Logits};
use engine_cuda::CudaExecutor;
use engine_load::{Progress, read_config};
use engine_memory::{Misfit, ResidentDtype, memory_plan};
use engine_spec::{Dtype, ModelConfig};

#[test]
fn each_part_of_the_allocation_is_what_the_memory_plan_says() {
    let Some(device) = device() else { return };
    let gpu = gpu_of(&device);
    let dir = trained_model();
    let config = read_config(&dir).unwrap();
    let (plan, limits) = plan(&config, request(Dtype::Auto));
    let held = load(&gpu, &dir, limits).allocated_bytes();
    let planned = plan.per_rank;
    for (name, used, planned) in [
        ("weights", held.weights, planned.weights_bytes),
        ("cache", held.kv, planned.kv_bytes),
        ("workspace", held.workspace, planned.workspace_bytes),
    ] {
        let share = used as f64 / planned as f64;
        assert!(
            (share - 1.0).abs() < 0.01,
            "{name}: {used} of {planned} planned"
        );
    }
}

#[test]
fn progress_counts_every_stored_byte() {
    let Some(gpu) = gpu() else { return };
    let dir = trained_model();
    let config = read_config(&dir).unwrap();
    let progress = Progress::default();
    CudaExecutor::load(
        &gpu,
        &dir,
        &config,
        limits(ResidentDtype::Bfloat16),
        &progress,
    )
    .unwrap();
    assert_eq!(progress.done(), progress.total());
    let file = std::fs::metadata(dir.join("model.safetensors")).unwrap();
    assert!(progress.total() > file.len() * 9 / 10);
}

#[test]
fn a_batch_that_breaks_the_contract_is_refused_and_harms_nothing() {
    let Some(gpu) = gpu() else { return };
    let mut executor = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    let before = prefill(&mut executor, &[5, 6, 7]);
    let many = |wants_logits: bool| -> Vec<_> {
        (0..7)
            .map(|n| {
                let mut entry = entry(n, &[1], 0, &[n as u32]);
                entry.wants_logits = wants_logits;
                entry
            })
            .collect()
    };
    let cases = [
        (vec![entry(1, &[], 0, &[0])], "no tokens"),
        (vec![entry(1, &[544], 0, &[0])], "vocabulary of 544"),
        (vec![entry(1, &[1; 9], 0, &[0])], "do not cover 9 positions"),
        (vec![entry(1, &[1], 0, &[64])], "block 64 of 64"),
        (vec![entry(1, &[1], usize::MAX, &[0])], "the limit is 256"),
        (
            vec![entry(1, &[1; 129], 0, &[0; 64])],
            "129 tokens, the limit is 128",
        ),
        (many(true), "7 logits rows, the limit is 6"),
        (many(false), "7 sequences, the limit is 6"),
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
fn a_step_without_logits_computes_none() {
    let Some(gpu) = gpu() else { return };
    let mut executor = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    let mut silent = entry(2, &[3, 4, 5], 0, &[10]);
    silent.wants_logits = false;
    assert!(step(&mut executor, vec![silent]).is_empty());
    assert!(step(&mut executor, vec![]).is_empty());
}

#[test]
fn a_shape_without_kernels_is_refused_before_anything_is_allocated() {
    let Some(gpu) = gpu() else { return };
    let dir = random_model("v3-groups");
    let config = read_config(&dir).unwrap();
    let error = CudaExecutor::load(
        &gpu,
        &dir,
        &config,
        limits(ResidentDtype::Bfloat16),
        &Progress::default(),
    )
    .unwrap_err();
    assert_eq!(
        error.to_string(),
        "no CUDA kernel takes this model: rms_norm: width is 28, but the kernels take a multiple of 8 within the \
         kernel's bound; serve it with the device cpu"
    );
}

#[test]
fn a_head_width_without_a_kernel_is_refused_with_the_way_out() {
    let Some(gpu) = gpu() else { return };
    let text = r#"{"model_type":"llama","vocab_size":96,"hidden_size":192,"intermediate_size":88,"num_hidden_layers":2,
        "num_attention_heads":2,"num_key_value_heads":1,"max_position_embeddings":256}"#;
    let config = ModelConfig::from_hf_json(text).unwrap();
    let limits = limits(ResidentDtype::Bfloat16);
    let error = CudaExecutor::dummy(&gpu, &config, 1, limits, &Progress::default()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "no CUDA kernel takes this model: gqa_decode: head width is 96, but the kernels take 64 and 128; \
         serve it with the device cpu"
    );
}

#[test]
fn random_weights_are_loaded_without_files() {
    let Some(gpu) = gpu() else { return };
    let config = read_config(&trained_model()).unwrap();
    let limits = limits(ResidentDtype::Bfloat16);
    let mut executor = CudaExecutor::dummy(&gpu, &config, 1, limits, &Progress::default()).unwrap();
    let row = prefill(&mut executor, &[5, 6, 7]);
    assert!(row.iter().any(|logit| *logit != row[0]));
}

#[test]
fn too_little_memory_is_refused_with_numbers() {
    let Some(gpu) = gpu() else { return };
    let dir = trained_model();
    let config = read_config(&dir).unwrap();
    let mut limits = limits(ResidentDtype::Bfloat16);
    limits.kv_blocks = 1 << 24;
    let error = CudaExecutor::load(&gpu, &dir, &config, limits, &Progress::default()).unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("weights, cache and workspace take 103") && text.contains("are free"),
        "{text}"
    );
    // The plan refuses earlier, with the settings that would fit.
    let mut tight = request(Dtype::Auto);
    tight.capacity_bytes = Some((1 << 30) + (5 << 20));
    let misfit = memory_plan(&config, &tight).unwrap_err();
    assert!(matches!(misfit, Misfit::DoesNotFit { .. }), "{misfit}");
    assert!(misfit.to_string().contains("it would fit with"), "{misfit}");
    tight.dtype = Dtype::Float32;
    assert_eq!(
        memory_plan(&config, &tight).unwrap_err(),
        Misfit::NoArithmetic
    );
}
