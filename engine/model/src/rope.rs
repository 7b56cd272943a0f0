//! Rotary position embedding with YaRN as DeepSeek parametrises it, and Llama 3's scaling.
//!
//! Which values form a pair differs: DeepSeek pairs neighbours, dimensions `2i` and `2i + 1` (DeepSeek-V3
//! `inference/model.py`, `apply_rotary_emb`); Qwen and Llama pair the halves of a head, `i` and `i + width / 2`
//! (transformers `rotate_half`). Frequencies and angles are rounded to float32 as the published implementations do, so
//! that far positions agree with them; sine and cosine of the rounded angle are exact to the last place.

use engine_spec::{ModelConfig, RopeScaling, Yarn};

/// Frequencies of one model's rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Radians per position, one for each pair.
    frequencies: Vec<f32>,
    /// Factor on sine and cosine.
    multiplier: f64,
}

impl Rope {
    /// The rotary embedding that a config describes.
    pub fn new(config: &ModelConfig) -> Self {
        let width = config.attention.rotated_width();
        let theta = config.rope_theta;
        let plain = (0..width / 2).map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(width)));
        let frequencies: Vec<f64> = match &config.rope_scaling {
            None => plain.collect(),
            Some(RopeScaling::Yarn(yarn)) => {
                let (low, high) = yarn_corners(yarn, width, theta);
                let blend = |(i, f): (usize, f64)| {
                    let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                    f / yarn.factor * ramp + f * (1.0 - ramp)
                };
                plain.enumerate().map(blend).collect()
            }
            Some(RopeScaling::Llama3 {
                factor,
                low_frequency_factor: low,
                high_frequency_factor: high,
                original_max_position,
            }) => {
                let original = f64::from(*original_max_position);
                let blend = |f: f64| {
                    // Rotations within the trained context: few are interpolated, many are kept.
                    let rotations = original * f / std::f64::consts::TAU;
                    let kept = ((rotations - low) / (high - low)).clamp(0.0, 1.0);
                    f / factor * (1.0 - kept) + f * kept
                };
                plain.map(blend).collect()
            }
        };
        let scaling = config.rope_scaling.as_ref();
        Self {
            frequencies: frequencies.into_iter().map(|f| f as f32).collect(),
            multiplier: scaling.map_or(1.0, RopeScaling::cos_sin_multiplier),
        }
    }

    /// Number of rotated values.
    pub fn width(&self) -> usize {
        self.frequencies.len() * 2
    }

    /// Writes `cos, sin` of each pair for `position` into `out`, [`Rope::width`] values.
    pub fn fill(&self, position: usize, out: &mut [f32]) {
        for (pair, frequency) in out.chunks_exact_mut(2).zip(&self.frequencies) {
            let angle = f64::from(position as f32 * frequency);
            pair[0] = (angle.cos() * self.multiplier) as f32;
            pair[1] = (angle.sin() * self.multiplier) as f32;
        }
    }

    /// Rotates neighbours in `values` in place by what [`Rope::fill`] wrote.
    pub fn rotate(values: &mut [f32], cos_sin: &[f32]) {
        for (pair, turn) in values.chunks_exact_mut(2).zip(cos_sin.chunks_exact(2)) {
            let [x, y] = [pair[0], pair[1]];
            let [cos, sin] = [turn[0], turn[1]];
            pair[0] = x * cos - y * sin;
            pair[1] = x * sin + y * cos;
        }
    }

    /// Rotates the two halves of `values` against each other, in place, by what [`Rope::fill`] wrote.
    pub fn rotate_halves(values: &mut [f32], cos_sin: &[f32]) {
        let (first, second) = values.split_at_mut(values.len() / 2);
        for ((x, y), turn) in first.iter_mut().zip(second).zip(cos_sin.chunks_exact(2)) {
            let [cos, sin] = [turn[0], turn[1]];
            (*x, *y) = (*x * cos - *y * sin, *x * sin + *y * cos);
        }
    }
}

/// Pair indices between which YaRN blends from kept to interpolated frequencies (V3: 10 and 23).
fn yarn_corners(yarn: &Yarn, width: u32, theta: f64) -> (f64, f64) {
    let width = f64::from(width);
    let pair_of = |rotations: f64| {
        let wavelengths =
            f64::from(yarn.original_max_position) / (rotations * std::f64::consts::TAU);
        width * wavelengths.ln() / (2.0 * theta.ln())
    };
    let low = pair_of(yarn.beta_fast).floor().max(0.0);
    let high = pair_of(yarn.beta_slow).ceil().min(width - 1.0);
    // A step instead of a ramp would divide by zero.
    (low, if low == high { high + 0.001 } else { high })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(theta: f64, factor: f64, beta: [f64; 2]) -> (f64, f64) {
        let scaling = Yarn {
            factor,
            original_max_position: 4096,
            beta_fast: beta[0],
            beta_slow: beta[1],
            mscale: None,
            mscale_all_dim: None,
            attention_factor: None,
        };
        yarn_corners(&scaling, 64, theta)
    }

    #[test]
    fn corners_are_those_of_the_published_models() {
        assert_eq!(yarn(1e4, 40.0, [32.0, 1.0]), (10.0, 23.0));
        assert_eq!(yarn(5e4, 32.0, [1.0, 1.0]), (19.0, 20.0));
        assert_eq!(yarn(5e4, 64.0, [32.0, 1.0]), (8.0, 20.0));
    }

    #[test]
    fn rotation_keeps_the_length_and_turns_by_the_angle() {
        let mut values = [3.0, 4.0, 1.0, 0.0];
        let turn = [0.0, 1.0, 1.0, 0.0];
        Rope::rotate(&mut values, &turn);
        assert_eq!(values, [-4.0, 3.0, 1.0, 0.0]);
    }

    #[test]
    fn halves_are_rotated_against_each_other() {
        let mut values = [3.0, 1.0, 4.0, 0.0];
        let turn = [0.0, 1.0, 1.0, 0.0];
        Rope::rotate_halves(&mut values, &turn);
        assert_eq!(values, [-4.0, 1.0, 3.0, 0.0]);
    }

    /// Llama 3.1's own: wavelengths above 8192 positions are interpolated, below 2048 kept.
    #[test]
    fn llama_3_interpolates_what_turns_less_than_once_in_the_trained_context() {
        let read = |scaling: &str| {
            let text = format!(
                r#"{{"model_type": "llama", "rope_theta": 500000.0, "max_position_embeddings": 131072{scaling}}}"#
            );
            Rope::new(&ModelConfig::from_hf_json(&text).unwrap())
        };
        let scaled = read(
            r#", "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}"#,
        );
        let plain = read("");
        assert_eq!(scaled.multiplier, 1.0);
        let ratio = |pair: usize| plain.frequencies[pair] / scaled.frequencies[pair];
        assert_eq!([ratio(0), ratio(28)], [1.0, 1.0]);
        assert_eq!([ratio(35), ratio(63)], [8.0, 8.0]);
        assert!((29..35).all(|pair| ratio(pair) > 1.0 && ratio(pair) < 8.0));
    }
}
