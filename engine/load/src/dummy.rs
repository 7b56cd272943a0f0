//! Random weights of any config, for benchmarks of models whose files are not at hand.
//!
//! Invariant: a value is a function of (seed, tensor, element); the same seed gives the same model on every machine and
//! with any number of threads. The spread is that of a fresh initialisation, so that activations stay near one and every
//! operation costs what it costs with trained weights; the answers mean nothing.

use engine_model::{Model, TensorRole, TensorSpec, WeightId};
use engine_spec::{ModelConfig, StoredDtype, WeightBlocks};
use half::{bf16, f16};

use crate::checkpoint::{Scales, StoredTensor, TensorSource, share};
use crate::convert::e4m3;
use crate::header::FloatType;

/// Spread of a norm's weights around one, and of biases around zero.
const VECTOR_SPREAD: f32 = 0.1;

/// Makes the tensors of a config up.
#[derive(Clone, Copy, Debug)]
pub struct Dummy {
    seed: u64,
    dtype: FloatType,
    blocks: Option<WeightBlocks>,
}

impl Dummy {
    /// Weights in the dtype that `config` says its files have.
    pub fn new(config: &ModelConfig, seed: u64) -> Self {
        Self {
            seed,
            dtype: match config.stored_dtype {
                StoredDtype::Float32 => FloatType::F32,
                StoredDtype::Bfloat16 => FloatType::Bf16,
                StoredDtype::Float16 => FloatType::F16,
                StoredDtype::Float8E4m3 => FloatType::F8E4m3,
            },
            blocks: config.weight_blocks,
        }
    }

    fn dtype_of(&self, role: TensorRole) -> FloatType {
        match (role, self.dtype) {
            (TensorRole::Precise, _) => FloatType::F32,
            (TensorRole::Table, FloatType::F8E4m3) => FloatType::Bf16,
            (TensorRole::Table | TensorRole::Matrix, dtype) => dtype,
        }
    }

    /// Blocks that scale `spec`, when it is in eight bits.
    fn scaled(&self, spec: &TensorSpec) -> Option<(WeightBlocks, usize)> {
        let is_narrow = self.dtype_of(spec.role) == FloatType::F8E4m3;
        let blocks = self.blocks.filter(|_| is_narrow)?;
        let sizes = [blocks.rows as usize, blocks.columns as usize];
        let count = spec
            .stored_shape()
            .into_iter()
            .zip(sizes)
            .map(|(length, size)| length.div_ceil(size));
        Some((blocks, count.product()))
    }
}

impl TensorSource for Dummy {
    fn stored_bytes(&self, model: &Model) -> u64 {
        let size = |spec: &TensorSpec| {
            let scales = self.scaled(spec).map_or(0, |(blocks, count)| {
                // Of a share, the scales of the block rows that it touches.
                let first = spec.share.map_or(0, |share| share.first) % blocks.rows as usize;
                let rows = spec.shape.first().copied().unwrap_or_default();
                let all = spec.stored_shape().first().copied().unwrap_or_default();
                let of = |rows: usize| rows.div_ceil(blocks.rows as usize);
                4 * count / of(all).max(1) * of(first + rows)
            });
            spec.elements() * self.dtype_of(spec.role).bytes() + scales
        };
        model.tensors.iter().map(|spec| size(spec) as u64).sum()
    }

    fn read(&self, model: &Model, id: WeightId, take: &mut dyn FnMut(&StoredTensor<'_>)) {
        let spec = &model.tensors[id.index()];
        let dtype = self.dtype_of(spec.role);
        let stream = mix(self.seed ^ mix(u64::from(spec.ordinal)));
        let values = Values::of(spec);
        // A share is cut out of the whole, so that all ranks have parts of the same model.
        let elements = spec.stored_shape().iter().product();
        let bytes = values.fill(stream, dtype, elements);
        let scales: Vec<u8> = match self.scaled(spec) {
            Some((_, count)) => values.scale().to_le_bytes().repeat(count),
            None => Vec::new(),
        };
        let scales = self.scaled(spec).map(|(blocks, _)| Scales {
            dtype: FloatType::F32,
            bytes: &scales,
            blocks,
            bits: 8,
            rows_before: 0,
        });
        take(&share::of(StoredTensor {
            spec,
            dtype,
            bytes: &bytes,
            scales,
        }));
    }
}

/// What a tensor's values look like: uniform in `centre ± spread`.
#[derive(Clone, Copy)]
struct Values {
    centre: f32,
    spread: f32,
}

impl Values {
    fn of(spec: &TensorSpec) -> Self {
        match spec.shape.as_slice() {
            [_, columns] => Self {
                centre: 0.0,
                // A variance of one over the inputs keeps the outputs' at one; a uniform's is a third of its square.
                spread: (3.0 / (*columns).max(1) as f32).sqrt(),
            },
            _ => Self {
                centre: if spec.name.ends_with("norm.weight") {
                    1.0
                } else {
                    0.0
                },
                spread: VECTOR_SPREAD,
            },
        }
    }

    /// The multiplier that gives eight random bits, as FP8, the spread's variance.
    fn scale(self) -> f32 {
        let squares: f32 = (0..=255).map(|byte| e4m3(finite(byte)).powi(2)).sum();
        self.spread / (3.0 * squares / 256.0).sqrt()
    }

    fn fill(self, stream: u64, dtype: FloatType, elements: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(elements * dtype.bytes());
        let mut words = (0..).map(|word: u64| mix(stream.wrapping_add(word)));
        while bytes.len() < elements * dtype.bytes() {
            let word = words.next().unwrap_or_default().to_le_bytes();
            match dtype {
                FloatType::F8E4m3 | FloatType::F8E8m0 => bytes.extend(word.map(finite)),
                _ => {
                    for pair in word.as_chunks::<2>().0 {
                        let unit = f32::from(i16::from_le_bytes(*pair)) / 32_768.0;
                        let value = self.centre + self.spread * unit;
                        match dtype {
                            FloatType::F32 => bytes.extend(value.to_le_bytes()),
                            FloatType::F16 => bytes.extend(f16::from_f32(value).to_le_bytes()),
                            _ => bytes.extend(bf16::from_f32(value).to_le_bytes()),
                        }
                    }
                }
            }
        }
        bytes.truncate(elements * dtype.bytes());
        bytes
    }
}

/// The byte, or its neighbour where it is one of the two NaNs.
fn finite(byte: u8) -> u8 {
    if byte & 0x7f == 0x7f { byte ^ 1 } else { byte }
}

/// SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
fn mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::to_f32;

    fn config(extra: &str) -> ModelConfig {
        let text = format!(
            r#"{{"model_type": "qwen2", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 100,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0{extra}}}"#
        );
        ModelConfig::from_hf_json(&text).unwrap()
    }

    fn values(config: &ModelConfig, seed: u64, name: &str) -> Vec<f32> {
        let model = engine_model::build(config);
        let index = model.tensors.iter().position(|spec| spec.name == name);
        let mut found = Vec::new();
        let id = WeightId(index.unwrap() as u32);
        Dummy::new(config, seed).read(&model, id, &mut |tensor| found = to_f32(tensor));
        found
    }

    #[test]
    fn the_generator_gives_its_published_answers() {
        // First outputs of the reference implementation for seed 1234567.
        let step = 0x9e37_79b9_7f4a_7c15u64;
        let outputs = [0, 1, 2].map(|n| mix(1_234_567u64.wrapping_add(step.wrapping_mul(n))));
        let expected = [
            6_457_827_717_110_365_317,
            3_203_168_211_198_807_973,
            9_817_491_932_198_370_423,
        ];
        assert_eq!(outputs, expected);
    }

    #[test]
    fn every_dtype_has_the_spread_of_an_initialisation() {
        let fp8 =
            r#", "quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 48]}"#;
        for extra in [
            r#", "torch_dtype": "float32""#,
            r#", "torch_dtype": "bfloat16""#,
            r#", "torch_dtype": "float16""#,
            fp8,
        ] {
            let config = config(extra);
            let found = values(&config, 7, "model.layers.0.mlp.down_proj.weight");
            assert_eq!(found.len(), 64 * 100);
            let variance =
                found.iter().map(|value| value * value).sum::<f32>() / found.len() as f32;
            assert!((variance * 100.0 - 1.0).abs() < 0.1, "{extra}: {variance}");
            let mean = found.iter().sum::<f32>() / found.len() as f32;
            assert!(mean.abs() < 0.01, "{extra}: {mean}");
            let norm = values(&config, 7, "model.norm.weight");
            assert!(norm.iter().all(|weight| (0.9..=1.1).contains(weight)));
            let bias = values(&config, 7, "model.layers.0.self_attn.q_proj.bias");
            assert!(bias.iter().all(|bias| bias.abs() <= 0.1));
            assert!(
                values(&config, 7, "lm_head.weight")
                    .iter()
                    .all(|value| value.is_finite())
            );
        }
    }

    #[test]
    fn a_seed_names_one_model_and_tensors_differ() {
        let config = config("");
        let [q, k] =
            ["q_proj", "k_proj"].map(|name| format!("model.layers.0.self_attn.{name}.weight"));
        assert_eq!(values(&config, 1, &q), values(&config, 1, &q));
        assert_ne!(values(&config, 1, &q), values(&config, 2, &q));
        assert_ne!(values(&config, 1, &q)[..64], values(&config, 1, &k)[..64]);
    }
}
