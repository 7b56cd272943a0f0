//! From a row of logits to the next token.
//!
//! Invariant: the result is a pure function of (row, parameters, the sequence's own tokens, seed, choice, position).
//! Ties are broken by the lower token id, so an order of equal logits never shows.
//!
//! Surprise: log-probabilities are those of the model, before penalties, temperature and truncation, as the OpenAI
//! clients expect from vLLM by default.

use std::cmp::Ordering;
use std::collections::BTreeMap;

use thiserror::Error;

use crate::batch::TokenId;
use crate::mask::{MaskError, Restriction, TokenMask};
use crate::random;

/// Temperatures below this are greedy: dividing by less would overflow f32 logits.
const GREEDY_TEMPERATURE: f32 = 1e-5;
/// Most alternatives reported for a token; OpenAI's limit.
pub const TOP_LOGPROBS_MAX: u32 = 20;

/// How tokens of a request are chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParameters {
    /// 0 is greedy.
    pub temperature: f32,
    /// Smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep tokens at least this fraction as probable as the best one; 0 keeps all.
    pub min_p: f32,
    /// Subtracted once from the logit of each token already generated.
    pub presence_penalty: f32,
    /// Subtracted from a logit for each time the token was generated.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens of prompt and output; 1 is off.
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens.
    pub logit_bias: BTreeMap<TokenId, f32>,
    /// Key of the random stream.
    pub seed: u64,
    /// Report the chosen token's log-probability and this many best ones; absent reports none.
    pub logprobs: Option<u32>,
    /// Do not stop at the model's end-of-sequence token.
    pub ignore_eos: bool,
}

impl Default for SamplingParameters {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            logprobs: None,
            ignore_eos: false,
        }
    }
}

/// A sampling parameter outside its range.
#[derive(Clone, Debug, PartialEq, Error)]
#[error("{field} is {value}, but must be {allowed}")]
pub struct ParameterError {
    /// The parameter as the request spells it.
    pub field: &'static str,
    /// What was given.
    pub value: String,
    /// What is allowed.
    pub allowed: &'static str,
}

impl SamplingParameters {
    /// Greedy decoding.
    pub fn greedy() -> Self {
        Self {
            temperature: 0.0,
            ..Self::default()
        }
    }

    /// Checks every range; NaN is outside all of them.
    ///
    /// # Errors
    /// The first parameter out of range.
    pub fn validate(&self) -> Result<(), ParameterError> {
        let checks: [(&'static str, f32, bool, &'static str); 6] = [
            (
                "temperature",
                self.temperature,
                (0.0..=2.0).contains(&self.temperature),
                "between 0 and 2",
            ),
            (
                "top_p",
                self.top_p,
                self.top_p > 0.0 && self.top_p <= 1.0,
                "above 0 and at most 1",
            ),
            (
                "min_p",
                self.min_p,
                (0.0..=1.0).contains(&self.min_p),
                "between 0 and 1",
            ),
            (
                "presence_penalty",
                self.presence_penalty,
                (-2.0..=2.0).contains(&self.presence_penalty),
                "between -2 and 2",
            ),
            (
                "frequency_penalty",
                self.frequency_penalty,
                (-2.0..=2.0).contains(&self.frequency_penalty),
                "between -2 and 2",
            ),
            (
                "repetition_penalty",
                self.repetition_penalty,
                self.repetition_penalty > 0.0 && self.repetition_penalty <= 10.0,
                "above 0 and at most 10",
            ),
        ];
        for (field, value, valid, allowed) in checks {
            if !valid {
                return Err(ParameterError {
                    field,
                    value: value.to_string(),
                    allowed,
                });
            }
        }
        if let Some((token, bias)) = self
            .logit_bias
            .iter()
            .find(|(_, bias)| !(-100.0..=100.0).contains(*bias))
        {
            return Err(ParameterError {
                field: "logit_bias",
                value: format!("{bias} for token {token}"),
                allowed: "between -100 and 100",
            });
        }
        if self.logprobs.is_some_and(|count| count > TOP_LOGPROBS_MAX) {
            return Err(ParameterError {
                field: "top_logprobs",
                value: self.logprobs.unwrap_or_default().to_string(),
                allowed: "between 0 and 20",
            });
        }
        Ok(())
    }

    fn is_greedy(&self) -> bool {
        self.temperature < GREEDY_TEMPERATURE
    }

    fn changes_logits(&self) -> bool {
        self.presence_penalty != 0.0
            || self.frequency_penalty != 0.0
            || self.repetition_penalty != 1.0
            || !self.logit_bias.is_empty()
    }
}

/// A chosen token, with log-probabilities when they were asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampled {
    /// The next token.
    pub token: TokenId,
    /// Its natural log-probability and those of the most probable tokens, best first.
    pub logprobs: Option<Logprobs>,
}

/// Log-probabilities at one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// Of the chosen token.
    pub chosen: f32,
    /// The best tokens, best first.
    pub top: Vec<(TokenId, f32)>,
}

/// A logit that is not a number, or infinite: the weights or the backend are broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the model gave a logit that is not finite for token {token}")]
pub struct NonFiniteLogit {
    /// Where the first one is.
    pub token: TokenId,
}

/// Why no token could be chosen.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SampleError {
    /// The model is broken.
    #[error(transparent)]
    Logit(#[from] NonFiniteLogit),
    /// The mask is.
    #[error(transparent)]
    Mask(#[from] MaskError),
}

/// The sequence that a token is sampled for.
#[derive(Clone, Copy, Debug)]
pub struct SampleContext<'a> {
    /// Prompt and output so far; the sampled token's position is its length.
    pub tokens: &'a [TokenId],
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// Which of the request's `n` choices.
    pub choice: u32,
}

/// Samples; keeps scratch memory between steps.
#[derive(Debug, Default)]
pub struct Sampler {
    scratch: Vec<f32>,
    candidates: Vec<(f32, u32)>,
    history: Vec<TokenId>,
}

impl Sampler {
    /// With room for rows of `vocabulary` logits and sequences of `positions` tokens, so that it never grows.
    pub fn with_capacity(vocabulary: usize, positions: usize) -> Self {
        Self {
            scratch: Vec::with_capacity(vocabulary),
            candidates: Vec::with_capacity(vocabulary),
            history: Vec::with_capacity(positions),
        }
    }

    /// Chooses the token after `context.tokens`.
    ///
    /// # Errors
    /// A logit is not finite.
    pub fn sample(
        &mut self,
        row: &[f32],
        parameters: &SamplingParameters,
        context: SampleContext<'_>,
    ) -> Result<Sampled, NonFiniteLogit> {
        let token = self.token(row, parameters, context)?;
        Ok(self.report(row, parameters, token))
    }

    /// What [`Self::sample`] would choose if `row` were the model's own logits: the more alike the two are, the more often a
    /// token drafted like this is the one that is then sampled, at any temperature, since both have the position's
    /// randomness. None where a logit is not finite.
    pub fn draft(
        &mut self,
        row: &[f32],
        parameters: &SamplingParameters,
        context: SampleContext<'_>,
    ) -> Option<TokenId> {
        self.token(row, parameters, context).ok()
    }

    fn token(
        &mut self,
        row: &[f32],
        parameters: &SamplingParameters,
        context: SampleContext<'_>,
    ) -> Result<TokenId, NonFiniteLogit> {
        check_finite(row)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        let adjusted = if parameters.changes_logits() {
            scratch.clear();
            scratch.extend_from_slice(row);
            adjust(&mut scratch, parameters, context, &mut self.history);
            &scratch
        } else {
            row
        };
        let token = self.choose(adjusted, parameters, context);
        self.scratch = scratch;
        Ok(token)
    }

    /// Chooses among the tokens that `mask` allows; none when the output is complete.
    ///
    /// # Errors
    /// A logit is not finite, or the mask failed.
    pub fn sample_within(
        &mut self,
        row: &[f32],
        parameters: &SamplingParameters,
        context: SampleContext<'_>,
        mask: &mut dyn TokenMask,
    ) -> Result<Option<Sampled>, SampleError> {
        check_finite(row)?;
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.clear();
        scratch.extend_from_slice(row);
        if parameters.changes_logits() {
            adjust(&mut scratch, parameters, context, &mut self.history);
        }
        let output = &context.tokens[context.prompt_len..];
        let restricted = mask.restrict(output, &mut scratch);
        let token = match restricted {
            Ok(Restriction::Complete) | Err(_) => None,
            Ok(Restriction::Free | Restriction::Masked) => {
                Some(self.choose(&scratch, parameters, context))
            }
        };
        // Without an allowed token the best one is still a forbidden one.
        let token = token.filter(|token| scratch[token.index()] != f32::NEG_INFINITY);
        self.scratch = scratch;
        match (token, restricted?) {
            (Some(token), _) => Ok(Some(self.report(row, parameters, token))),
            (None, Restriction::Complete) => Ok(None),
            (None, _) => Err(MaskError("no token is allowed".to_owned()).into()),
        }
    }

    fn choose(
        &mut self,
        row: &[f32],
        parameters: &SamplingParameters,
        context: SampleContext<'_>,
    ) -> TokenId {
        if parameters.is_greedy() {
            return argmax(row);
        }
        let draw = random::uniform(parameters.seed, context.choice, context.tokens.len() as u64);
        self.draw(row, parameters, draw)
    }

    fn report(&mut self, row: &[f32], parameters: &SamplingParameters, token: TokenId) -> Sampled {
        let logprobs = parameters
            .logprobs
            .map(|count| logprobs(row, token, count as usize, &mut self.candidates));
        Sampled { token, logprobs }
    }

    /// Draws from the truncated distribution: `top_k` and `min_p` first, then `top_p` of what is left.
    fn draw(&mut self, row: &[f32], parameters: &SamplingParameters, draw: f64) -> TokenId {
        let best = row[argmax(row).index()];
        let scale = 1.0 / f64::from(parameters.temperature);
        let weight = |logit: f32| (f64::from(logit - best) * scale).exp();
        if parameters.top_k == 0 && parameters.min_p == 0.0 && parameters.top_p >= 1.0 {
            return pick(row.iter().map(|&logit| weight(logit)), draw);
        }
        self.candidates.clear();
        // weight / weight(best) is weight itself, since the best one weighs exactly 1.
        let floor = f64::from(parameters.min_p);
        self.candidates.extend(
            row.iter()
                .enumerate()
                .filter(|(_, logit)| weight(**logit) >= floor)
                .map(|(index, &logit)| (logit, index as u32)),
        );
        let keep = match parameters.top_k as usize {
            0 => self.candidates.len(),
            k => k.min(self.candidates.len()),
        };
        let kept = if parameters.top_p >= 1.0 {
            sort_best(&mut self.candidates, keep);
            keep
        } else {
            nucleus(&mut self.candidates, keep, parameters.top_p, weight)
        };
        let kept = &self.candidates[..kept];
        let index = pick(kept.iter().map(|&(logit, _)| weight(logit)), draw);
        TokenId(kept[index.index()].1)
    }
}

fn check_finite(row: &[f32]) -> Result<(), NonFiniteLogit> {
    match row.iter().position(|logit| !logit.is_finite()) {
        None => Ok(()),
        Some(index) => Err(NonFiniteLogit {
            token: TokenId(index as u32),
        }),
    }
}

/// Bias and penalties; `history` is scratch.
fn adjust(
    row: &mut [f32],
    parameters: &SamplingParameters,
    context: SampleContext<'_>,
    history: &mut Vec<TokenId>,
) {
    for (&token, &bias) in &parameters.logit_bias {
        if let Some(logit) = row.get_mut(token.index()) {
            *logit += bias;
        }
    }
    if parameters.repetition_penalty != 1.0 {
        sorted(history, context.tokens);
        for same in history.chunk_by(|a, b| a == b) {
            if let Some(logit) = row.get_mut(same[0].index()) {
                *logit = if *logit > 0.0 {
                    *logit / parameters.repetition_penalty
                } else {
                    *logit * parameters.repetition_penalty
                };
            }
        }
    }
    if (parameters.presence_penalty, parameters.frequency_penalty) != (0.0, 0.0) {
        sorted(history, &context.tokens[context.prompt_len..]);
        for same in history.chunk_by(|a, b| a == b) {
            if let Some(logit) = row.get_mut(same[0].index()) {
                let often = same.len() as f32;
                *logit -= parameters.presence_penalty + parameters.frequency_penalty * often;
            }
        }
    }
}

/// Leaves `tokens` in order in `history`.
fn sorted(history: &mut Vec<TokenId>, tokens: &[TokenId]) {
    history.clear();
    history.extend_from_slice(tokens);
    history.sort_unstable();
}

/// The highest logit; the lowest id among equals.
pub fn argmax(row: &[f32]) -> TokenId {
    let mut best = 0;
    for (index, logit) in row.iter().enumerate() {
        if *logit > row[best] {
            best = index;
        }
    }
    TokenId(best as u32)
}

fn better(left: &(f32, u32), right: &(f32, u32)) -> Ordering {
    right.0.total_cmp(&left.0).then(left.1.cmp(&right.1))
}

/// Brings the best `count` candidates to the front, sorted.
fn sort_best(candidates: &mut [(f32, u32)], count: usize) {
    if count == 0 {
        return;
    }
    if count < candidates.len() {
        candidates.select_nth_unstable_by(count - 1, better);
    }
    candidates[..count].sort_unstable_by(better);
}

/// Sorts just as many of the best `keep` candidates as reach `top_p` of their sum, and returns how many those are.
/// Sorting all of a 128k vocabulary costs more than a decode step of a small model.
fn nucleus(
    candidates: &mut [(f32, u32)],
    keep: usize,
    top_p: f32,
    weight: impl Fn(f32) -> f64,
) -> usize {
    sort_best_partition(candidates, keep);
    // Summed in id order, so that the sum does not depend on how the selection shuffled.
    candidates[..keep].sort_unstable_by_key(|&(_, token)| token);
    let total: f64 = candidates[..keep].iter().map(|&(l, _)| weight(l)).sum();
    let goal = total * f64::from(top_p);
    let mut sorted = 64.min(keep);
    loop {
        sort_best(&mut candidates[..keep], sorted);
        let mut sum = 0.0;
        for (index, &(logit, _)) in candidates[..sorted].iter().enumerate() {
            sum += weight(logit);
            if sum >= goal {
                return index + 1;
            }
        }
        if sorted == keep {
            return keep;
        }
        sorted = (sorted * 8).min(keep);
    }
}

fn sort_best_partition(candidates: &mut [(f32, u32)], keep: usize) {
    if keep > 0 && keep < candidates.len() {
        candidates.select_nth_unstable_by(keep - 1, better);
    }
}

/// Index of the weight in which `draw` of the total falls.
fn pick(weights: impl Iterator<Item = f64> + Clone, draw: f64) -> TokenId {
    let total: f64 = weights.clone().sum();
    let goal = draw * total;
    let mut sum = 0.0;
    let mut last = 0;
    for (index, weight) in weights.enumerate() {
        if weight > 0.0 {
            last = index;
        }
        sum += weight;
        if sum > goal {
            return TokenId(index as u32);
        }
    }
    TokenId(last as u32)
}

fn logprobs(
    row: &[f32],
    token: TokenId,
    count: usize,
    candidates: &mut Vec<(f32, u32)>,
) -> Logprobs {
    let best = f64::from(row[argmax(row).index()]);
    let sum: f64 = row.iter().map(|&l| (f64::from(l) - best).exp()).sum();
    let norm = best + sum.ln();
    let logprob = |logit: f32| (f64::from(logit) - norm) as f32;
    let count = count.min(row.len());
    candidates.clear();
    if count > 0 {
        candidates.extend(row.iter().enumerate().map(|(i, &l)| (l, i as u32)));
        sort_best(candidates, count);
    }
    Logprobs {
        chosen: logprob(row[token.index()]),
        top: candidates[..count]
            .iter()
            .map(|&(logit, id)| (TokenId(id), logprob(logit)))
            .collect(),
    }
}

#[cfg(test)]
mod tests;
