//! Sampling on the device: what the kernels need of each row goes up, a token comes back.
//!
//! Rows are picked in turns of at most [`PICK_ROWS_MAX`], since adjusted logits and counts take twice the room of the logits.
//! Invariant: a row's token does not depend on the turn that it was in, and each row is looked at for logits that are not
//! finite before its token is used.

use engine_core::{Logprobs, PickRow, Picked, SamplingParameters, TokenId};
use engine_memory::{PICK_CONTEXTS, PICK_ROWS_MAX, PICK_TOP_MAX};
use kernels::driver::{Arena, Plain, Stream};
use kernels::params::{Address, LogprobsParams, SAMPLE_NUMBERS, SampleAdjustParams, SampleParams};
use kernels::plan;

use crate::CudaError;
use crate::layout::{Bump, CudaLimits, Layout, Span};

/// Rows of a turn: what an integer array of the results has room for.
pub(crate) fn turn_rows(limits: &CudaLimits) -> usize {
    limits.sampled_max().min(PICK_ROWS_MAX as usize)
}

/// Places of a turn's inputs and results.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PickSpans {
    adjusted: Span,
    counts: Span,
    numbers: Span,
    top_k: Span,
    draws: Span,
    history: Span,
    offsets: Span,
    bias_tokens: Span,
    bias: Span,
    bias_offsets: Span,
    mask: Span,
    /// Tokens, their log-probabilities, broken logits.
    chosen: Span,
    top_tokens: Span,
    top_values: Span,
}

impl PickSpans {
    pub fn new(vocabulary: usize, limits: &CudaLimits, bump: &mut Bump) -> Self {
        let rows = turn_rows(limits);
        let history = PICK_CONTEXTS as usize * limits.model_len_max;
        let top = PICK_TOP_MAX as usize;
        let mut take = |values: usize, bytes: usize| bump.take(values * bytes);
        Self {
            adjusted: take(rows * vocabulary, 4),
            counts: take(rows * vocabulary, 4),
            numbers: take(rows * SAMPLE_NUMBERS, 4),
            top_k: take(rows, 4),
            draws: take(rows * 3, 8),
            history: take(history, 4),
            offsets: take(2 * rows + 1, 4),
            bias_tokens: take(vocabulary, 4),
            bias: take(vocabulary, 4),
            bias_offsets: take(rows + 1, 4),
            mask: take(rows * plan::mask_words(vocabulary), 4),
            chosen: take(rows * 3, 4),
            top_tokens: take(rows * top, 4),
            top_values: take(rows * top, 4),
        }
    }
}

/// A turn's inputs on the host.
#[derive(Debug, Default)]
pub(crate) struct Picking {
    numbers: Vec<f32>,
    top_k: Vec<i32>,
    draws: Vec<i64>,
    history: Vec<i32>,
    offsets: Vec<i32>,
    bias_tokens: Vec<i32>,
    bias: Vec<f32>,
    bias_offsets: Vec<i32>,
    mask: Vec<u32>,
    chosen: Vec<i32>,
    top_tokens: Vec<i32>,
    top_values: Vec<f32>,
}

/// Where a turn runs.
pub(crate) struct Place<'a> {
    pub arena: &'a Arena,
    pub stream: &'a Stream,
    pub layout: &'a Layout,
    pub base: Address,
    pub vocabulary: usize,
    pub limits: &'a CudaLimits,
}

impl Place<'_> {
    fn at(&self, span: Span) -> Address {
        self.base.offset(span.at as u64)
    }

    fn write<T: Plain>(&self, span: Span, values: &[T]) -> Result<(), CudaError> {
        let part = self.arena.part(span.at, span.bytes)?;
        Ok(self.arena.write(self.stream, part, values)?)
    }

    fn read<T: Plain>(&self, span: Span, values: &mut [T]) -> Result<(), CudaError> {
        let part = self.arena.part(span.at, span.bytes)?;
        Ok(self.arena.read(self.stream, part, values)?)
    }
}

/// Whether a row's history is looked at.
fn has_penalties(parameters: &SamplingParameters) -> bool {
    (parameters.presence_penalty, parameters.frequency_penalty) != (0.0, 0.0)
        || parameters.repetition_penalty != 1.0
}

impl Picking {
    /// Picks all rows, which are in ascending order and there. The first token whose logit is not finite is an error.
    pub fn pick(
        &mut self,
        place: &Place<'_>,
        rows: &[PickRow<'_>],
        picked: &mut Vec<Picked>,
    ) -> Result<Option<TokenId>, CudaError> {
        picked.clear();
        let mut rest = rows;
        while !rest.is_empty() {
            let (turn, later) = rest.split_at(self.turn(place, rest));
            if let Some(token) = self.pick_turn(place, turn, picked)? {
                return Ok(Some(token));
            }
            rest = later;
        }
        Ok(None)
    }

    /// Takes as many neighbouring rows as there is room for; at least one.
    fn turn(&mut self, place: &Place<'_>, rows: &[PickRow<'_>]) -> usize {
        self.clear();
        let spans = &place.layout.buffers.picks;
        let (history_max, bias_max) = (spans.history.bytes / 4, spans.bias.bytes / 4);
        let words = plan::mask_words(place.vocabulary);
        let masked = rows.iter().any(|row| row.allowed.is_some());
        for (index, row) in rows.iter().take(turn_rows(place.limits)).enumerate() {
            let parameters = row.parameters;
            let history = match has_penalties(parameters) {
                true => row.position(),
                false => 0,
            };
            let is_neighbour = row.row == rows[0].row + index;
            let is_full = self.history.len() + history > history_max
                || self.bias.len() + parameters.logit_bias.len().min(place.vocabulary) > bias_max;
            if index > 0 && (!is_neighbour || is_full) {
                return index;
            }
            self.add(place, row, history > 0);
            if masked {
                match row.allowed {
                    Some(bits) => self.mask.extend_from_slice(&bits[..words]),
                    None => self.mask.extend(std::iter::repeat_n(u32::MAX, words)),
                }
            }
        }
        self.top_k.len()
    }

    fn clear(&mut self) {
        self.numbers.clear();
        self.top_k.clear();
        self.draws.clear();
        self.history.clear();
        self.offsets.clear();
        self.offsets.push(0);
        self.bias_tokens.clear();
        self.bias.clear();
        self.bias_offsets.clear();
        self.bias_offsets.push(0);
        self.mask.clear();
    }

    fn add(&mut self, place: &Place<'_>, row: &PickRow<'_>, history: bool) {
        let parameters = row.parameters;
        self.numbers.extend([
            parameters.temperature,
            parameters.top_p,
            parameters.min_p,
            parameters.presence_penalty,
            parameters.frequency_penalty,
            parameters.repetition_penalty,
        ]);
        self.top_k
            .push(i32::try_from(parameters.top_k).unwrap_or(i32::MAX));
        self.draws.extend([
            parameters.seed as i64,
            i64::from(row.choice),
            row.position() as i64,
        ]);
        let (prompt, output) = match history {
            true => row.tokens.split_at(row.prompt_len),
            false => Default::default(),
        };
        let drafts = if history { row.drafts } else { &[] };
        let number = |token: &TokenId| token.0 as i32;
        self.history.extend(prompt.iter().map(number));
        self.offsets.push(self.history.len() as i32);
        self.history.extend(output.iter().chain(drafts).map(number));
        self.offsets.push(self.history.len() as i32);
        for (token, bias) in &parameters.logit_bias {
            if token.index() < place.vocabulary {
                self.bias_tokens.push(number(token));
                self.bias.push(*bias);
            }
        }
        self.bias_offsets.push(self.bias.len() as i32);
    }

    /// Runs the turn that was taken; a token whose logit is not finite, if there is one.
    fn pick_turn(
        &mut self,
        place: &Place<'_>,
        rows: &[PickRow<'_>],
        picked: &mut Vec<Picked>,
    ) -> Result<Option<TokenId>, CudaError> {
        let spans = &place.layout.buffers.picks;
        let (count, vocabulary) = (rows.len(), place.vocabulary);
        let raw = place
            .at(place.layout.buffers.logits)
            .offset((rows[0].row * vocabulary * 4) as u64);
        place.write(spans.numbers, &self.numbers)?;
        place.write(spans.top_k, &self.top_k)?;
        place.write(spans.draws, &self.draws)?;
        let changes = !(self.history.is_empty() && self.bias.is_empty() && self.mask.is_empty());
        let logits = match changes {
            true => self.adjust(place, raw, count)?,
            false => raw,
        };
        let stride = vocabulary as i32;
        let sample = SampleParams {
            logits,
            numbers: place.at(spans.numbers),
            top_k: place.at(spans.top_k),
            draws: place.at(spans.draws),
            chosen: place.at(spans.chosen),
            rows: count as i32,
            vocabulary: stride,
            stride,
            reserved: 0,
        };
        let launch = plan::sample(count, vocabulary)?;
        place.arena.launch(place.stream, &launch, &sample)?;
        let asked = rows.iter().filter_map(|row| row.logprobs).max();
        let top = asked.unwrap_or(0).min(PICK_TOP_MAX) as usize;
        let chosen = place.at(spans.chosen);
        let logprobs = LogprobsParams {
            logits: raw,
            tokens: chosen,
            chosen: chosen.offset((count * 4) as u64),
            top_tokens: place.at(spans.top_tokens),
            top_values: place.at(spans.top_values),
            broken: chosen.offset((count * 8) as u64),
            rows: count as i32,
            vocabulary: stride,
            stride,
            top: top as i32,
        };
        let launch = plan::logprobs(count, vocabulary, top)?;
        place.arena.launch(place.stream, &launch, &logprobs)?;
        self.report(place, rows, top, picked)
    }

    /// Bias, penalties and mask; where the adjusted logits are.
    fn adjust(&self, place: &Place<'_>, raw: Address, count: usize) -> Result<Address, CudaError> {
        let spans = &place.layout.buffers.picks;
        let vocabulary = place.vocabulary;
        place.write(spans.history, &self.history)?;
        place.write(spans.offsets, &self.offsets)?;
        place.write(spans.bias_tokens, &self.bias_tokens)?;
        place.write(spans.bias, &self.bias)?;
        place.write(spans.bias_offsets, &self.bias_offsets)?;
        place.write(spans.mask, &self.mask)?;
        let out = place.at(spans.adjusted);
        let params = SampleAdjustParams {
            logits: raw,
            out,
            counts: place.at(spans.counts),
            numbers: place.at(spans.numbers),
            tokens: place.at(spans.history),
            offsets: place.at(spans.offsets),
            bias_tokens: place.at(spans.bias_tokens),
            bias: place.at(spans.bias),
            bias_offsets: place.at(spans.bias_offsets),
            mask: match self.mask.is_empty() {
                true => Address::NULL,
                false => place.at(spans.mask),
            },
            rows: count as i32,
            vocabulary: vocabulary as i32,
            stride: vocabulary as i32,
            mask_stride: plan::mask_words(vocabulary) as i32,
        };
        let launch = plan::sample_adjust(count, vocabulary)?;
        place.arena.launch(place.stream, &launch, &params)?;
        Ok(out)
    }

    fn report(
        &mut self,
        place: &Place<'_>,
        rows: &[PickRow<'_>],
        top: usize,
        picked: &mut Vec<Picked>,
    ) -> Result<Option<TokenId>, CudaError> {
        let spans = &place.layout.buffers.picks;
        let count = rows.len();
        self.chosen.resize(3 * count, 0);
        place.read(spans.chosen, &mut self.chosen)?;
        if top > 0 {
            self.top_tokens.resize(count * top, 0);
            self.top_values.resize(count * top, 0.0);
            place.read(spans.top_tokens, &mut self.top_tokens)?;
            place.read(spans.top_values, &mut self.top_values)?;
        }
        let token = |number: i32| u32::try_from(number).ok().map(TokenId);
        let (chosen, rest) = self.chosen.split_at(count);
        let (own, broken) = rest.split_at(count);
        if let Some(token) = broken.iter().find_map(|number| token(*number)) {
            return Ok(Some(token));
        }
        for (index, row) in rows.iter().enumerate() {
            let best = |asked: u32| {
                let places = index * top..index * top + (asked as usize).min(top);
                let values = self.top_values[places.clone()].iter();
                let best = self.top_tokens[places].iter().zip(values);
                best.filter_map(|(number, value)| Some((token(*number)?, *value)))
                    .collect()
            };
            picked.push(Picked {
                token: token(chosen[index]),
                logprobs: row.logprobs.map(|asked| Logprobs {
                    chosen: f32::from_bits(own[index] as u32),
                    top: match asked {
                        0 => Vec::new(),
                        asked => best(asked),
                    },
                }),
            });
        }
        Ok(None)
    }
}
