//! Checkpoints in the format of compressed-tensors, against transformers over the weights that its integers stand for
//! (see `golden/make_compressed.py`).

// A helper is no test, and may unwrap all the same.
use std::path::Path;

use crate::support::{folder, golden, greedy, limits, load, prefill, relative_error};
use engine_cpu::CpuExecutor;
use engine_load::{PACKED_FILE, Progress, read_config};
use engine_memory::{MemoryRequest, ResidentDtype, memory_plan, resident_dtype};
use engine_spec::{Device, Dtype, KvCacheDtype, Parallelism, Quantization};

const COMPRESSED: [&str; 3] = ["llama-w4a16", "qwen3-w8a8", "v2-w8a16"];
/// As for the other models: what is left is the order of sums.
const FLOAT32_TOLERANCE: f32 = 1e-4;
/// The weights are exact here; activations are rounded to 127 steps of the largest of their row or group, up to 4e-3 of
/// it, and the layers amplify that. Of the positions' errors the median; near ties of gates make others of some.
/// Measured: up to 2.6e-2.
const INTEGER_TOLERANCE: f32 = 5e-2;

fn resident(model: &str, dtype: Dtype) -> ResidentDtype {
    let config = read_config(&folder(model)).unwrap();
    resident_dtype(dtype, Quantization::None, &config, Device::Cpu)
}

fn errors(model: &str, dtype: Dtype) -> Vec<f32> {
    let dir = folder(model);
    let mut executor = load(&dir, limits(resident(model, dtype)));
    let mut errors = Vec::new();
    for prompt in golden(&dir.join("golden.json")).prompts {
        for (position, expected) in prompt.positions.iter().zip(&prompt.logits) {
            let found = prefill(&mut executor, &prompt.tokens[..=*position]);
            errors.push(relative_error(&found, expected));
        }
    }
    errors.sort_by(f32::total_cmp);
    println!("{model} {dtype}: relative errors {errors:?}");
    errors
}

#[test]
fn integers_widened_to_float32_are_what_they_stand_for() {
    for model in COMPRESSED {
        let errors = errors(model, Dtype::Float32);
        let worst = errors[errors.len() - 1];
        assert!(worst <= FLOAT32_TOLERANCE, "{model}: {worst:e}");
        let dir = folder(model);
        let mut executor = load(&dir, limits(ResidentDtype::Float32));
        for prompt in golden(&dir.join("golden.json")).prompts {
            let found = greedy(&mut executor, &prompt.tokens, prompt.greedy.len());
            assert_eq!(found, prompt.greedy, "{model}");
        }
    }
}

#[test]
fn products_with_the_stored_integers_stay_close() {
    for model in COMPRESSED {
        assert!(
            matches!(resident(model, Dtype::Auto), ResidentDtype::Integer(..)),
            "{model}"
        );
        let errors = errors(model, Dtype::Auto);
        let middle = errors[errors.len() / 2];
        assert!(middle <= INTEGER_TOLERANCE, "{model}: {middle:e}");
    }
}

#[test]
fn they_are_planned_exactly_and_packed_without_a_change() {
    for model in COMPRESSED {
        let dir = folder(model);
        let config = read_config(&dir).unwrap();
        let request = MemoryRequest {
            dtype: Dtype::Auto,
            quantization: Quantization::None,
            parallelism: Parallelism::default(),
            device: Device::Cpu,
            max_model_len: Some(100),
            max_num_seqs: 3,
            block_size: 8,
            max_num_batched_tokens: 64,
            capacity_bytes: None,
            kv_cache: KvCacheDtype::Auto,
            draft_tokens: 0,
        };
        let plan = memory_plan(&config, &request).unwrap();
        let mut limits = limits(plan.resident);
        limits.threads = 1;
        let mut converted = load(&dir, limits);
        assert_eq!(
            converted.allocated_bytes().weights,
            plan.per_rank.weights_bytes,
            "{model}"
        );

        let packed = tempfile::tempdir().unwrap();
        let progress = Progress::default();
        let path = packed.path().join(PACKED_FILE);
        engine_cpu::pack(&dir, &path, &config, plan.resident, &progress).unwrap();
        let mut mapped = CpuExecutor::load(packed.path(), &config, limits, &progress).unwrap();
        let tokens = [3, 1, 4, 1, 5];
        assert_eq!(
            prefill(&mut mapped, &tokens),
            prefill(&mut converted, &tokens),
            "{model}"
        );
    }
}

/// A copy of a model whose one weight file has `from` replaced by `to`, which is as long.
fn edited(model: &str, from: &str, to: &str) -> tempfile::TempDir {
    assert_eq!(from.len(), to.len());
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(
        folder(model).join("config.json"),
        dir.path().join("config.json"),
    )
    .unwrap();
    let mut bytes = std::fs::read(folder(model).join("model.safetensors")).unwrap();
    let at = bytes
        .windows(from.len())
        .position(|window| window == from.as_bytes());
    let at = at.unwrap_or_else(|| panic!("{from} is not in {model}"));
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    dir
}

fn refusal(dir: &Path) -> String {
    let config = read_config(dir).unwrap();
    let form = resident_dtype(Dtype::Auto, Quantization::None, &config, Device::Cpu);
    let opened = CpuExecutor::load(dir, &config, limits(form), &Progress::default());
    opened.unwrap_err().chain()
}

#[test]
fn files_that_are_not_as_the_config_says_are_refused_by_shard_and_tensor() {
    let name = "model.layers.0.mlp.up_proj.weight";
    let packed = "_packed\":{\"dtype\":\"I32\"";
    let cases = [
        (
            packed,
            "_packed\":{\"dtype\":\"F32\"",
            "_packed: dtype F32, expected I32",
        ),
        (
            packed,
            "\"       :{\"dtype\":\"F32\"",
            ": dtype F32, expected I32 as model.layers.0.mlp.up_proj.weight_packed",
        ),
        (
            "_shape",
            "_g_idx",
            "_g_idx: is in the file, expected none: columns out of order",
        ),
        (
            "_scale",
            "_xcale",
            "_scale [96, 2], which config.json calls for, is not in model.safetensors",
        ),
    ];
    for (from, to, expected) in cases {
        let dir = edited(
            "llama-w4a16",
            &format!("{name}{from}"),
            &format!("{name}{to}"),
        );
        let message = refusal(dir.path());
        let expected = format!("{name}{expected}");
        assert!(message.contains(&expected), "{message}");
        assert!(message.contains("model.safetensors"), "{message}");
    }
}
