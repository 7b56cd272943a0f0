//! What each kernel computes, in the plainest form: in float64, or in the bits themselves where those are asked for.
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

/// Rows of a table `[vocabulary, width]` by tokens `[rows]`: `[rows, width]`, all `absent` for a token that it lacks.
pub fn embed(table: &[f64], width: usize, tokens: &[u32], absent: f64) -> Vec<f64> {
    let row = |token: &u32| match table.chunks(width).nth(*token as usize) {
        Some(row) => row.to_vec(),
        None => vec![absent; width],
    };
    tokens.iter().flat_map(row).collect()
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

/// Choices `[tokens, top_k]` sorted by expert, equal ones in their order: the place of each row in the choices
/// `[tokens * top_k]`, and the first row of each expert, `[experts + 1]` with the end of the last.
pub fn permute(chosen: &[i32], experts: usize) -> (Vec<usize>, Vec<usize>) {
    let mut pairs: Vec<(i32, usize)> = chosen.iter().copied().zip(0..).collect();
    pairs.sort_unstable();
    let before = |expert: usize| chosen.iter().filter(|e| **e < expert as i32).count();
    (
        pairs.into_iter().map(|(_, slot)| slot).collect(),
        (0..=experts).map(before).collect(),
    )
}

/// The sum of a token's experts and the shared one: rows `y` of `[tokens * top_k, width]`, found by `slot_row` and weighed by
/// `weights`, both `[tokens, top_k]`, and `shared` of `[tokens, width]`; `[tokens, width]`.
pub fn combine(
    y: &[f64],
    width: usize,
    top_k: usize,
    slot_row: &[i32],
    weights: &[f64],
    shared: Option<&[f64]>,
) -> Vec<f64> {
    let tokens = slot_row.len() / top_k;
    let mut out = shared.map_or_else(|| vec![0.0; tokens * width], <[f64]>::to_vec);
    for (slot, (row, weight)) in slot_row.iter().zip(weights).enumerate() {
        let of_token = &mut out[slot / top_k * width..][..width];
        for (o, v) in of_token.iter_mut().zip(&y[*row as usize * width..]) {
            *o += weight * v;
        }
    }
    out
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

/// What the latent cache stores of a token: `kv` of `[latent + rotary]`, the latent normed by `weight` of `[latent]`, the rest
/// rotated by `[rotary / 2]` pairs of `[cos, sin]`.
pub fn mla_cache_row(kv: &[f64], weight: &[f64], eps: f64, cos_sin: &[f32]) -> Vec<f64> {
    let (latent, rotary) = kv.split_at(weight.len());
    let mut row = rms_norm(latent, weight, eps);
    row.extend(rotary);
    rotate(&mut row[weight.len()..], cos_sin, false);
    row
}

/// A token's query, key or value heads `[heads, width]` as they are used: plus `bias` of `[heads, width]`, each head normed by
/// `norm` of `[width]` and rotated by `[width / 2]` pairs of `[cos, sin]`, whichever there are.
pub fn gqa_heads(
    heads: &[f64],
    width: usize,
    bias: Option<&[f64]>,
    norm: Option<(&[f64], f64)>,
    cos_sin: Option<&[f32]>,
) -> Vec<f64> {
    let mut out = Vec::with_capacity(heads.len());
    for (index, head) in heads.chunks(width).enumerate() {
        let mut head = head.to_vec();
        if let Some(bias) = bias {
            let bias = &bias[index * width..][..width];
            head.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
        }
        if let Some((weight, eps)) = norm {
            head = rms_norm(&head, weight, eps);
        }
        if let Some(cos_sin) = cos_sin {
            rotate(&mut head, cos_sin, true);
        }
        out.extend(head);
    }
    out
}

/// The line of the cache `[blocks, kv_heads, {key, value}, block_size, width]` that a head's key (0) or value (1) has in a slot.
pub fn gqa_line(
    slot: usize,
    block_size: usize,
    kv_heads: usize,
    kv_head: usize,
    kind: usize,
) -> usize {
    let (block, offset) = (slot / block_size, slot % block_size);
    ((block * kv_heads + kv_head) * 2 + kind) * block_size + offset
}

/// Copies blocks `[from, to]` of `pairs` one after the other in every layer of a cache of `[layers, layer_bytes]`; a pair of
/// which the cache of `blocks` lacks one does nothing.
pub fn copy_blocks(
    cache: &mut [u8],
    layer_bytes: usize,
    block_bytes: usize,
    blocks: usize,
    pairs: &[i32],
) {
    for pair in pairs.chunks(2) {
        if pair.iter().any(|b| !(0..blocks as i32).contains(b)) {
            continue;
        }
        let [from, to] = [0, 1].map(|i| pair[i] as usize * block_bytes);
        for layer in cache.chunks_mut(layer_bytes) {
            layer.copy_within(from..from + block_bytes, to);
        }
    }
}

/// First unit and number of units that a rank has of `units`: the first ranks have one more where they do not divide.
pub fn share(units: usize, ranks: usize, rank: usize) -> (usize, usize) {
    let of = |rank: usize| units / ranks + usize::from(rank < units % ranks);
    ((0..rank).map(of).sum(), of(rank))
}

/// Every rank's columns of rows `[rows, units * unit]`, packed: `[ranks, rows, slot]`, where a slot has room for the largest
/// share, and zeros where it is smaller.
pub fn share_columns(whole: &[u8], units: usize, unit: usize, ranks: usize) -> Vec<u8> {
    let slot = units.div_ceil(ranks) * unit;
    let mut packed = Vec::new();
    for rank in 0..ranks {
        let (first, held) = share(units, ranks, rank);
        for row in whole.chunks(units * unit) {
            packed.extend(&row[first * unit..][..held * unit]);
            packed.resize(packed.len() + slot - held * unit, 0);
        }
    }
    packed
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

/// Log-probabilities of a row `[vocabulary]` and its `top` best tokens, the lower one first among equals.
///
/// # Errors
/// The first token whose logit is no finite number.
pub fn logprobs(logits: &[f32], top: usize) -> Result<(Vec<f64>, Vec<usize>), usize> {
    if let Some(broken) = logits.iter().position(|logit| !logit.is_finite()) {
        return Err(broken);
    }
    let logits: Vec<f64> = logits.iter().map(|logit| f64::from(*logit)).collect();
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let norm = most + logits.iter().map(|l| (l - most).exp()).sum::<f64>().ln();
    let order = best(&logits, top);
    Ok((logits.iter().map(|logit| logit - norm).collect(), order))
}

/// The best token of a row `[vocabulary]`, the lower one among equals, and its log-probability.
///
/// # Errors
/// See [`logprobs`].
pub fn greedy(logits: &[f32]) -> Result<(usize, f64), usize> {
    let (all, order) = logprobs(logits, 1)?;
    Ok((order[0], all[order[0]]))
}

/// What is done to a row's logits before it is sampled. In float32 and in this order: the choice rests on the very bits.
#[derive(Clone, Copy, Debug)]
pub struct Adjustment<'a> {
    /// Taken from every token that was put out.
    pub presence: f32,
    /// Taken for each time that it was.
    pub frequency: f32,
    /// Divides what is positive of a token of the prompt or the output, and multiplies the rest.
    pub repetition: f32,
    /// Tokens; those outside of the vocabulary count for nothing.
    pub prompt: &'a [i32],
    /// Tokens, as above.
    pub output: &'a [i32],
    /// Token and what is added to it, as above.
    pub bias: &'a [(i32, f32)],
    /// A bit for each token that may be chosen, `[vocabulary / 32]` words; without it all may.
    pub mask: Option<&'a [u32]>,
}

impl Adjustment<'_> {
    /// The logits `[vocabulary]` to sample from.
    pub fn apply(&self, logits: &[f32]) -> Vec<f32> {
        let adjusted = |(token, logit): (usize, &f32)| {
            let mut logit = *logit;
            let times = |tokens: &[i32]| tokens.iter().filter(|t| **t == token as i32).count();
            if let Some((_, bias)) = self.bias.iter().find(|(t, _)| *t == token as i32) {
                logit += bias;
            }
            let count = times(self.output);
            if count + times(self.prompt) > 0 {
                logit = match logit > 0.0 {
                    true => logit / self.repetition,
                    false => logit * self.repetition,
                };
            }
            if count > 0 {
                logit -= self.presence + self.frequency * count as f32;
            }
            let word = self.mask.map_or(u32::MAX, |mask| mask[token / 32]);
            match word >> (token % 32) & 1 {
                0 => f32::NEG_INFINITY,
                _ => logit,
            }
        };
        logits.iter().enumerate().map(adjusted).collect()
    }
}

/// The number in `[0, 1)` with 53 bits that a row draws, by its seed, choice and position: Philox4x32-10 (Salmon, Moraes, Dror,
/// Shaw 2011).
pub fn uniform([seed, choice, position]: [i64; 3]) -> f64 {
    let mut counter = [position as u32, (position >> 32) as u32, choice as u32, 0];
    let mut key = [seed as u32, (seed >> 32) as u32];
    for _ in 0..10 {
        let [a, b] = [
            u64::from(counter[0]) * 0xD251_1F53,
            u64::from(counter[2]) * 0xCD9E_8D57,
        ];
        counter = [
            (b >> 32) as u32 ^ counter[1] ^ key[0],
            b as u32,
            (a >> 32) as u32 ^ counter[3] ^ key[1],
            a as u32,
        ];
        key = [
            key[0].wrapping_add(0x9E37_79B9),
            key[1].wrapping_add(0xBB67_AE85),
        ];
    }
    ((u64::from(counter[0]) << 32 | u64::from(counter[1])) >> 11) as f64 / 2f64.powi(53)
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
