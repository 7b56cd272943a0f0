//! The sampling kernels against the engine's own sampler: the same token and the same log-probabilities for the same
//! logits, parameters, history and position.

use std::collections::BTreeMap;

use crate::support::device;
use engine_core::{
    MaskError, Restriction, SampleContext, Sampled, Sampler, SamplingParameters, TokenId, TokenMask,
};
use kernels::driver::{Arena, Plain, Stream};
use kernels::params::{Address, LogprobsParams, SampleAdjustParams, SampleParams};
use kernels::plan;

const VOCABULARY: usize = 300;
const TOP: u32 = 4;

/// A fixed sequence of numbers: Knuth's linear congruence, its upper half.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 32
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len())]
    }
}

/// A row and everything its token depends on.
struct Row {
    logits: Vec<f32>,
    parameters: SamplingParameters,
    tokens: Vec<TokenId>,
    prompt_len: usize,
    choice: u32,
    allowed: Option<Vec<bool>>,
}

#[derive(Debug)]
struct Allow(Vec<bool>);

impl TokenMask for Allow {
    fn restrict(&mut self, _: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        for (logit, allowed) in row.iter_mut().zip(&self.0) {
            if !allowed {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Restriction::Masked)
    }
}

impl Row {
    fn new(numbers: &mut Numbers) -> Self {
        let step = numbers.of(&[1.0, 0.001]); // ties, or hardly any
        let logits = (0..VOCABULARY)
            .map(|_| (numbers.below(20_000) as f32 / 1000.0 / step).round() * step - 10.0)
            .collect();
        let tokens: Vec<TokenId> = (0..1 + numbers.below(60))
            .map(|_| TokenId(numbers.below(VOCABULARY) as u32))
            .collect();
        let logit_bias: BTreeMap<TokenId, f32> = (0..numbers.of(&[0, 7]))
            .map(|_| {
                (
                    TokenId(numbers.below(VOCABULARY) as u32),
                    numbers.below(9) as f32 - 4.0,
                )
            })
            .collect();
        Self {
            logits,
            prompt_len: numbers.below(tokens.len()),
            tokens,
            choice: numbers.below(3) as u32,
            allowed: numbers
                .of(&[false, true])
                .then(|| (0..VOCABULARY).map(|_| numbers.below(3) > 0).collect()),
            parameters: SamplingParameters {
                temperature: numbers.of(&[0.0, 0.3, 1.0, 2.0]),
                top_p: numbers.of(&[1.0, 0.95, 0.5, 0.01]),
                top_k: numbers.of(&[0, 1, 20, 1000]),
                min_p: numbers.of(&[0.0, 0.0, 0.1]),
                presence_penalty: numbers.of(&[0.0, 0.5, -1.0]),
                frequency_penalty: numbers.of(&[0.0, 0.25]),
                repetition_penalty: numbers.of(&[1.0, 1.2, 0.7]),
                logit_bias,
                seed: numbers.next() << 32 | numbers.next(),
                logprobs: Some(TOP),
                ignore_eos: false,
            },
        }
    }

    fn on_cpu(&self, sampler: &mut Sampler) -> Sampled {
        let context = SampleContext {
            tokens: &self.tokens,
            prompt_len: self.prompt_len,
            choice: self.choice,
        };
        match &self.allowed {
            None => sampler
                .sample(&self.logits, &self.parameters, context)
                .unwrap(),
            Some(allowed) => {
                let mut mask = Allow(allowed.clone());
                let sampled =
                    sampler.sample_within(&self.logits, &self.parameters, context, &mut mask);
                sampled.unwrap().unwrap()
            }
        }
    }
}

/// Pieces of device memory, one after the other.
struct Pieces<'a> {
    arena: &'a Arena,
    stream: &'a Stream,
    used: usize,
}

impl Pieces<'_> {
    fn room(&mut self, bytes: usize) -> kernels::driver::Part {
        let part = self.arena.part(self.used, bytes).unwrap();
        self.used += bytes.next_multiple_of(256);
        part
    }

    fn send<T: Plain>(&mut self, values: &[T]) -> Address {
        let part = self.room(size_of_val(values).max(1));
        self.arena.write(self.stream, part, values).unwrap();
        part.address()
    }
}

/// What the rows' kernels say: tokens, their log-probabilities, the best tokens and theirs.
type Answer = (Vec<i32>, Vec<f32>, Vec<i32>, Vec<f32>);

fn on_device(rows: &[Row]) -> Option<Answer> {
    let device = device()?;
    let (arena, stream) = (
        Arena::new(&device, 1 << 22).unwrap(),
        device.stream().unwrap(),
    );
    let mut pieces = Pieces {
        arena: &arena,
        stream: &stream,
        used: 0,
    };
    let words = plan::mask_words(VOCABULARY);
    let (mut offsets, mut tokens) = (vec![0i32], Vec::new());
    let (mut bias_tokens, mut bias, mut bias_offsets) = (Vec::new(), Vec::new(), vec![0i32]);
    let (mut numbers, mut top_k, mut draws) = (Vec::new(), Vec::<i32>::new(), Vec::<i64>::new());
    let mut masks = vec![u32::MAX; rows.len() * words];
    for (index, row) in rows.iter().enumerate() {
        let (prompt, output) = row.tokens.split_at(row.prompt_len);
        for part in [prompt, output] {
            tokens.extend(part.iter().map(|token| token.0 as i32));
            offsets.push(tokens.len() as i32);
        }
        let parameters = &row.parameters;
        for (token, value) in &parameters.logit_bias {
            bias_tokens.push(token.0 as i32);
            bias.push(*value);
        }
        bias_offsets.push(bias.len() as i32);
        numbers.extend([
            parameters.temperature,
            parameters.top_p,
            parameters.min_p,
            parameters.presence_penalty,
            parameters.frequency_penalty,
            parameters.repetition_penalty,
        ]);
        top_k.push(parameters.top_k as i32);
        draws.extend([
            parameters.seed as i64,
            i64::from(row.choice),
            row.tokens.len() as i64,
        ]);
        for (token, allowed) in row.allowed.iter().flatten().enumerate() {
            if !allowed {
                masks[index * words + token / 32] &= !(1 << (token % 32));
            }
        }
    }
    let all: Vec<f32> = rows.iter().flat_map(|row| row.logits.clone()).collect();
    let (count, vocabulary) = (rows.len() as i32, VOCABULARY as i32);
    let logits = pieces.send(&all);
    let numbers = pieces.send(&numbers);
    let out = pieces.room(all.len() * 4).address();
    let adjust = SampleAdjustParams {
        logits,
        out,
        counts: pieces.room(all.len() * 4).address(),
        numbers,
        tokens: pieces.send(&tokens),
        offsets: pieces.send(&offsets),
        bias_tokens: pieces.send(&bias_tokens),
        bias: pieces.send(&bias),
        bias_offsets: pieces.send(&bias_offsets),
        mask: pieces.send(&masks),
        rows: count,
        vocabulary,
        stride: vocabulary,
        mask_stride: words as i32,
    };
    let chosen = pieces.room(rows.len() * 4);
    let sample = SampleParams {
        logits: out,
        numbers,
        top_k: pieces.send(&top_k),
        draws: pieces.send(&draws),
        chosen: chosen.address(),
        rows: count,
        vocabulary,
        stride: vocabulary,
        reserved: 0,
    };
    let best = rows.len() * TOP as usize;
    let [own, broken] = [0, 1].map(|_| pieces.room(rows.len() * 4));
    let [top_tokens, top_values] = [0, 1].map(|_| pieces.room(best * 4));
    let logprobs = LogprobsParams {
        logits,
        tokens: chosen.address(),
        chosen: own.address(),
        top_tokens: top_tokens.address(),
        top_values: top_values.address(),
        broken: broken.address(),
        rows: count,
        vocabulary,
        stride: vocabulary,
        top: TOP as i32,
    };
    let launch = plan::sample_adjust(rows.len(), VOCABULARY).unwrap();
    arena.launch(&stream, &launch, &adjust).unwrap();
    let launch = plan::sample(rows.len(), VOCABULARY).unwrap();
    arena.launch(&stream, &launch, &sample).unwrap();
    let launch = plan::logprobs(rows.len(), VOCABULARY, TOP as usize).unwrap();
    arena.launch(&stream, &launch, &logprobs).unwrap();
    let mut answer: Answer = (
        vec![0; rows.len()],
        vec![0.0; rows.len()],
        vec![0; best],
        vec![0.0; best],
    );
    arena.read(&stream, chosen, &mut answer.0).unwrap();
    arena.read(&stream, own, &mut answer.1).unwrap();
    arena.read(&stream, top_tokens, &mut answer.2).unwrap();
    arena.read(&stream, top_values, &mut answer.3).unwrap();
    Some(answer)
}

/// Sums run in another order than on the CPU, which may cost the last bit of a float32.
fn near(found: f32, wanted: f32) -> bool {
    (found - wanted).abs() <= 2e-7 * wanted.abs().max(1.0)
}

#[test]
fn the_device_chooses_the_tokens_of_the_engines_sampler() {
    let mut numbers = Numbers(3);
    let rows: Vec<Row> = (0..96).map(|_| Row::new(&mut numbers)).collect();
    let Some((tokens, own, top_tokens, top_values)) = on_device(&rows) else {
        return;
    };
    let mut sampler = Sampler::default();
    for (index, row) in rows.iter().enumerate() {
        let wanted = row.on_cpu(&mut sampler);
        let logprobs = wanted.logprobs.unwrap();
        assert_eq!(
            tokens[index],
            wanted.token.0 as i32,
            "row {index}: {:?}, mask {}",
            row.parameters,
            row.allowed.is_some()
        );
        assert!(near(own[index], logprobs.chosen), "row {index}");
        let place = index * TOP as usize;
        for (n, (token, value)) in logprobs.top.iter().enumerate() {
            assert_eq!(top_tokens[place + n], token.0 as i32, "row {index}");
            assert!(near(top_values[place + n], *value), "row {index}");
        }
    }
    // The rows are of all kinds: neither all greedy nor all the best token.
    let greedy = rows
        .iter()
        .filter(|row| row.parameters.temperature == 0.0)
        .count();
    let best = (0..rows.len())
        .filter(|row| tokens[*row] == top_tokens[row * TOP as usize])
        .count();
    assert!(greedy > 8 && greedy < 48 && best < 80, "{greedy} {best}");
}
