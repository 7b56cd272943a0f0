//! Rotary position embedding with DeepSeek's form of YaRN.
//!
//! Pairs are interleaved: dimensions `2i` and `2i + 1` are one complex number (DeepSeek-V3 `inference/model.py`,
//! `apply_rotary_emb`). Frequencies and angles are rounded to float32 as the published implementations do, so that
//! far positions agree with them; sine and cosine of the rounded angle are exact to the last place.

use engine_spec::{ModelConfig, RopeScaling};

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
        let width = config.attention.qk_rope_head_dim;
        let theta = config.rope_theta;
        let plain = (0..width / 2).map(|i| theta.powf(-2.0 * f64::from(i) / f64::from(width)));
        let Some(scaling) = &config.rope_scaling else {
            return Self {
                frequencies: plain.map(|f| f as f32).collect(),
                multiplier: 1.0,
            };
        };
        let RopeScaling::Yarn { factor, .. } = scaling;
        let (low, high) = yarn_corners(scaling, width, theta);
        let frequencies = plain
            .enumerate()
            .map(|(i, f)| {
                let ramp = ((i as f64 - low) / (high - low)).clamp(0.0, 1.0);
                (f / factor * ramp + f * (1.0 - ramp)) as f32
            })
            .collect();
        Self {
            frequencies,
            multiplier: scaling.cos_sin_multiplier(),
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

    /// Rotates `values` in place by what [`Rope::fill`] wrote.
    pub fn rotate(values: &mut [f32], cos_sin: &[f32]) {
        for (pair, turn) in values.chunks_exact_mut(2).zip(cos_sin.chunks_exact(2)) {
            let [x, y] = [pair[0], pair[1]];
            let [cos, sin] = [turn[0], turn[1]];
            pair[0] = x * cos - y * sin;
            pair[1] = x * sin + y * cos;
        }
    }
}

/// Pair indices between which YaRN blends from kept to interpolated frequencies (V3: 10 and 23).
fn yarn_corners(scaling: &RopeScaling, width: u32, theta: f64) -> (f64, f64) {
    let RopeScaling::Yarn {
        original_max_position,
        beta_fast,
        beta_slow,
        ..
    } = scaling;
    let width = f64::from(width);
    let pair_of = |rotations: f64| {
        let wavelengths = f64::from(*original_max_position) / (rotations * std::f64::consts::TAU);
        width * wavelengths.ln() / (2.0 * theta.ln())
    };
    let low = pair_of(*beta_fast).floor().max(0.0);
    let high = pair_of(*beta_slow).ceil().min(width - 1.0);
    // A step instead of a ramp would divide by zero.
    (low, if low == high { high + 0.001 } else { high })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn yarn(theta: f64, factor: f64, beta: [f64; 2]) -> (f64, f64) {
        let scaling = RopeScaling::Yarn {
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
}
