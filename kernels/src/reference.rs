//! What each kernel computes, in float64 and in the plainest form.
//!
//! Invariant: nothing here shares an algorithm with a kernel; e4m3 is found by looking at all codes, experts by sorting,
//! softmax over the whole row.

use half::bf16;

/// Values as the kernels read them.
pub fn widen(values: &[bf16]) -> Vec<f64> {
    values
        .iter()
        .map(|value| f64::from(value.to_f32()))
        .collect()
}

/// The value of an e4m3 code; NaN for its two NaN codes.
pub fn e4m3_value(code: u8) -> f64 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    match (exponent, code & 7) {
        (15, 7) => f64::NAN,
        (0, _) => sign * mantissa * 2f64.powi(-9),
        _ => sign * (1.0 + mantissa / 8.0) * 2f64.powi(exponent - 7),
    }
}

/// The nearest e4m3 code, ties to the even one, saturating; NaN to NaN.
pub fn e4m3_code(value: f32) -> u8 {
    if value.is_nan() {
        return 0x7f | (value.is_sign_negative() as u8) << 7;
    }
    let magnitude = f64::from(value.abs());
    let mut best = 0;
    for code in 1..0x7f_u8 {
        let (old, new) = (
            (e4m3_value(best) - magnitude).abs(),
            (e4m3_value(code) - magnitude).abs(),
        );
        if new < old || new == old && code % 2 == 0 {
            best = code;
        }
    }
    best | (value.is_sign_negative() as u8) << 7
}

/// Codes and scales of a row in groups of 128 (DeepSeek-V3 `inference/kernel.py`, `act_quant`).
pub fn quantise(row: &[f32], power_of_two: bool) -> (Vec<u8>, Vec<f32>) {
    let mut codes = Vec::with_capacity(row.len());
    let mut scales = Vec::new();
    for group in row.chunks(128) {
        let amax = group
            .iter()
            .fold(1e-4f32, |best, value| best.max(value.abs()));
        let mut scale = amax / 448.0;
        if power_of_two {
            scale = scale.log2().ceil().exp2();
        }
        codes.extend(group.iter().map(|value| e4m3_code(value / scale)));
        scales.push(scale);
    }
    (codes, scales)
}

/// `x * rsqrt(mean(x^2) + eps) * weight`.
pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64) -> Vec<f64> {
    let mean = x.iter().map(|v| v * v).sum::<f64>() / x.len() as f64;
    let factor = 1.0 / (mean + eps).sqrt();
    x.iter().zip(weight).map(|(v, w)| v * factor * w).collect()
}

/// `silu(gate) * up` of a row `gate | up`.
pub fn swiglu(row: &[f64]) -> Vec<f64> {
    let (gate, up) = row.split_at(row.len() / 2);
    gate.iter()
        .zip(up)
        .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
        .collect()
}

/// `a · b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}

/// The dot product of block-scaled rows: scales change every 128 values.
pub fn dot_fp8(a: &[u8], a_scales: &[f32], b: &[u8], b_scales: &[f32]) -> f64 {
    a.chunks(128)
        .zip(b.chunks(128))
        .zip(a_scales.iter().zip(b_scales))
        .map(|((x, y), (s, t))| {
            let part: f64 = x
                .iter()
                .zip(y)
                .map(|(x, y)| e4m3_value(*x) * e4m3_value(*y))
                .sum();
            part * f64::from(*s) * f64::from(*t)
        })
        .sum()
}

/// How a gate chooses.
#[derive(Clone, Copy, Debug)]
pub struct Gate {
    /// Experts per token.
    pub top_k: usize,
    /// Of equal size.
    pub groups: usize,
    /// Groups a token may use.
    pub groups_per_token: usize,
    /// Softmax instead of sigmoid.
    pub softmax: bool,
    /// A group's score is the sum of its two best instead of its best.
    pub group_top_two: bool,
    /// Divide by the sum of the chosen.
    pub normalise: bool,
    /// Factor on the weights.
    pub scale: f64,
}

impl Gate {
    /// Chosen experts in ascending order, with weights.
    pub fn choose(&self, logits: &[f64], bias: Option<&[f64]>) -> Vec<(usize, f64)> {
        let scores: Vec<f64> = if self.softmax {
            let top = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|l| (l - top).exp()).sum();
            logits.iter().map(|l| (l - top).exp() / sum).collect()
        } else {
            logits.iter().map(|l| 1.0 / (1.0 + (-l).exp())).collect()
        };
        let mut ranked: Vec<f64> = match bias {
            Some(bias) => scores.iter().zip(bias).map(|(s, b)| s + b).collect(),
            None => scores.clone(),
        };
        let size = logits.len() / self.groups;
        let group_scores: Vec<f64> = ranked
            .chunks(size)
            .map(|group| {
                let mut sorted = group.to_vec();
                sorted.sort_by(|a, b| b.total_cmp(a));
                sorted
                    .iter()
                    .take(if self.group_top_two { 2 } else { 1 })
                    .sum()
            })
            .collect();
        let open = best(&group_scores, self.groups_per_token);
        for (expert, score) in ranked.iter_mut().enumerate() {
            if !open.contains(&(expert / size)) {
                *score = f64::NEG_INFINITY;
            }
        }
        let mut chosen = best(&ranked, self.top_k);
        chosen.sort_unstable();
        let sum: f64 = chosen.iter().map(|expert| scores[*expert]).sum();
        let divisor = if self.normalise { sum + 1e-20 } else { 1.0 };
        chosen
            .into_iter()
            .map(|expert| (expert, scores[expert] / divisor * self.scale))
            .collect()
    }
}

/// Indices of the highest values, the lower index first among equals.
fn best(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]).then(a.cmp(b)));
    order.truncate(count);
    order
}

/// Rotates neighbours by angles given as `[cos, sin]` pairs.
pub fn rotate(values: &mut [f64], cos_sin: &[f32], half_split: bool) {
    let half = values.len() / 2;
    for pair in 0..half {
        let (i, j) = if half_split {
            (pair, pair + half)
        } else {
            (2 * pair, 2 * pair + 1)
        };
        let (c, s) = (
            f64::from(cos_sin[2 * pair]),
            f64::from(cos_sin[2 * pair + 1]),
        );
        (values[i], values[j]) = (values[i] * c - values[j] * s, values[i] * s + values[j] * c);
    }
}

/// Softmax attention of one query over `keys` and `values`; the output and the natural log of the sum of exponents.
pub fn attend(
    query: &[f64],
    keys: &[Vec<f64>],
    values: &[Vec<f64>],
    scale: f64,
) -> (Vec<f64>, f64) {
    let scores: Vec<f64> = keys.iter().map(|key| dot(query, key) * scale).collect();
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
    let mut out = vec![0.0; values.first().map_or(0, Vec::len)];
    for (score, value) in scores.iter().zip(values) {
        let weight = (score - top).exp() / sum;
        for (o, v) in out.iter_mut().zip(value) {
            *o += weight * v;
        }
    }
    (out, top + sum.ln())
}

/// How a row is sampled.
#[derive(Clone, Copy, Debug)]
pub struct Sampling {
    /// Below 1e-5 is greedy.
    pub temperature: f32,
    /// 1 keeps all.
    pub top_p: f32,
    /// 0 keeps all.
    pub min_p: f32,
    /// 0 keeps all.
    pub top_k: usize,
}

impl Sampling {
    /// The token that `draw` in `[0, 1)` falls on. Untruncated rows are cut in the order of tokens, truncated ones in the
    /// order of rank, as the engine's sampler does.
    pub fn choose(&self, logits: &[f32], draw: f64) -> Option<usize> {
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]).then(a.cmp(b)));
        let best = logits[*order.first()?];
        if best == f32::NEG_INFINITY {
            return None;
        }
        if self.temperature < 1e-5 {
            return order.first().copied();
        }
        let scale = 1.0 / f64::from(self.temperature);
        let weight = |token: &usize| (f64::from(logits[*token] - best) * scale).exp();
        if self.top_k == 0 && self.min_p == 0.0 && self.top_p >= 1.0 {
            order.sort_unstable();
        } else {
            order.retain(|token| weight(token) >= f64::from(self.min_p));
            if self.top_k > 0 {
                order.truncate(self.top_k);
            }
            if self.top_p < 1.0 {
                let goal = order.iter().map(weight).sum::<f64>() * f64::from(self.top_p);
                let mut sum = 0.0;
                let reached = order.iter().position(|token| {
                    sum += weight(token);
                    sum >= goal
                });
                order.truncate(reached.map_or(order.len(), |at| at + 1));
            }
        }
        let goal = draw * order.iter().map(weight).sum::<f64>();
        let mut sum = 0.0;
        let found = order.iter().copied().find(|token| {
            sum += weight(token);
            sum > goal
        });
        found.or_else(|| {
            order
                .iter()
                .rev()
                .copied()
                .find(|token| weight(token) > 0.0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_e4m3_code_is_its_own_nearest() {
        for code in (0..=255u8).filter(|code| code & 0x7f != 0x7f) {
            assert_eq!(e4m3_code(e4m3_value(code) as f32), code);
        }
        assert_eq!(e4m3_code(1e9), 0x7e);
        assert_eq!(e4m3_value(0x7e), 448.0);
    }
}
