//! The CPU backend against Hugging Face transformers, by committed vectors (see `golden/make_golden.py`).

mod support;

use engine_memory::ResidentDtype;
use engine_spec::ModelConfig;
use sha2::Digest;
use support::{MODELS, folder, golden, greedy, limits, load, prefill, relative_error};

/// Float32 throughout: what is left is the order of sums.
const FLOAT32_TOLERANCE: f32 = 1e-4;
/// Cache rows are rounded to bfloat16 (8 bits of mantissa, 2^-9 relative), weights are exact; the layers amplify it.
/// Measured: at most 1.5e-2.
const BFLOAT16_TOLERANCE: f32 = 3e-2;
/// FP8 times its scale has 4 + 24 bits of mantissa: here the weights are rounded as well. Measured: 3e-2.
const FLOAT8_TOLERANCE: f32 = 6e-2;

fn compare(model: &str, resident: ResidentDtype, tolerance: f32) {
    let dir = folder(model);
    let mut executor = load(&dir, limits(resident));
    let mut worst = 0f32;
    for prompt in golden(&dir.join("golden.json")).prompts {
        for (position, expected) in prompt.positions.iter().zip(&prompt.logits) {
            let found = prefill(&mut executor, &prompt.tokens[..=*position]);
            let error = relative_error(&found, expected);
            worst = worst.max(error);
            assert!(
                error <= tolerance,
                "{model}: {} tokens: relative error {error:e}",
                position + 1
            );
        }
    }
    println!("{model} {resident:?}: worst relative error {worst:e}");
}

#[test]
fn float32_logits_equal_those_of_transformers() {
    for model in MODELS {
        compare(model, ResidentDtype::Float32, FLOAT32_TOLERANCE);
    }
}

#[test]
fn float32_greedy_tokens_equal_those_of_transformers() {
    for model in MODELS {
        let dir = folder(model);
        let mut executor = load(&dir, limits(ResidentDtype::Float32));
        for prompt in golden(&dir.join("golden.json")).prompts {
            let found = greedy(&mut executor, &prompt.tokens, prompt.greedy.len());
            assert_eq!(
                found,
                prompt.greedy,
                "{model}: {} tokens",
                prompt.tokens.len()
            );
        }
    }
}

#[test]
fn bfloat16_logits_stay_close_to_those_of_transformers() {
    for model in MODELS {
        let tolerance = if model.ends_with("-fp8") {
            FLOAT8_TOLERANCE
        } else {
            BFLOAT16_TOLERANCE
        };
        compare(model, ResidentDtype::Bfloat16, tolerance);
    }
}

#[test]
fn both_forms_of_a_config_describe_the_same_model() {
    for model in MODELS {
        let dir = folder(model);
        let read = |name: &str| {
            let text = std::fs::read_to_string(dir.join(name)).unwrap();
            ModelConfig::from_hf_json(&text).unwrap_or_else(|e| panic!("{model}/{name}: {e}"))
        };
        let other = ["config.published.json", "config.transformers.json"]
            .into_iter()
            .find(|name| dir.join(name).exists())
            .unwrap();
        let (mut a, mut b) = (read("config.json"), read(other));
        // transformers 5 leaves the default out, see engine-spec.
        (a.mtp_layers, b.mtp_layers) = (0, 0);
        assert_eq!(a, b, "{model}");
    }
}

/// The trained model of the quick start: answers, not only numbers.
#[test]
fn the_trained_model_answers_as_it_does_in_transformers() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = root.join("../../e2e/models/tiny-r1");
    let golden = golden(&root.join("tests/golden/tiny-r1.json"));
    let weights = std::fs::read(dir.join("model.safetensors")).unwrap();
    let digest: String = sha2::Sha256::digest(&weights)
        .iter()
        .map(|b| format!("{b:02x}"))
        .collect();
    assert_eq!(
        digest, golden.sha256,
        "the weights are newer than their vectors: run \
         `python engine/cpu/tests/golden/make_golden.py trained e2e/models/tiny-r1 tiny-r1`"
    );
    for (resident, tolerance) in [
        (ResidentDtype::Float32, FLOAT32_TOLERANCE),
        (ResidentDtype::Bfloat16, BFLOAT16_TOLERANCE),
    ] {
        let mut executor = load(&dir, limits(resident));
        for prompt in &golden.prompts {
            for (position, expected) in prompt.positions.iter().zip(&prompt.logits) {
                let found = prefill(&mut executor, &prompt.tokens[..=*position]);
                let error = relative_error(&found, expected);
                assert!(error <= tolerance, "{resident:?}: relative error {error:e}");
            }
            let found = greedy(&mut executor, &prompt.tokens, prompt.greedy.len());
            assert_eq!(found, prompt.greedy, "{resident:?}");
        }
    }
}
