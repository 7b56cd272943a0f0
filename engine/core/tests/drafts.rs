//! Drafts change when a token comes, never which.

#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use engine_core::{
    Batch, Constraint, DraftBatch, Engine, Event, EventKind, ExecuteError, Executor, FinishReason,
    Limits, Logits, MaskError, MaskSource, PickRow, Picked, Picker, Request, RequestId,
    Restriction, SampleContext, Sampled, Sampler, SamplingParameters, TokenId, TokenMask,
    run_canary,
};
use proptest::prelude::*;
use toy::Toy;

const VOCABULARY: usize = 23;
const MAX_MODEL_LEN: usize = 48;

fn limits(draft_tokens: usize, change: impl FnOnce(&mut Limits)) -> Limits {
    let mut limits = Limits {
        vocabulary: VOCABULARY,
        max_model_len: MAX_MODEL_LEN,
        max_num_seqs: 4,
        max_num_batched_tokens: 64,
        max_queued_requests: 1000,
        block_size: 4,
        block_count: 40,
        draft_tokens,
    };
    change(&mut limits);
    limits
}

fn toy(limits: &Limits) -> Toy {
    Toy::new(limits.vocabulary, limits.block_size, limits.block_count).bounded(
        limits.max_num_batched_tokens,
        limits.max_num_seqs,
        limits.draft_tokens,
    )
}

/// A request whose every sampling feature is on for some seed.
fn request(id: u64, prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    let every = |n: u64| seed.is_multiple_of(n);
    Request {
        id: RequestId(id),
        prompt: prompt.into_iter().map(TokenId).collect(),
        choices: 1,
        max_tokens,
        parameters: SamplingParameters {
            seed,
            temperature: if every(3) { 0.0 } else { 0.7 },
            top_p: if every(2) { 1.0 } else { 0.8 },
            top_k: if every(5) { 7 } else { 0 },
            min_p: if every(7) { 0.05 } else { 0.0 },
            presence_penalty: if every(4) { 0.5 } else { 0.0 },
            frequency_penalty: if every(6) { 0.3 } else { 0.0 },
            repetition_penalty: if every(5) { 1.2 } else { 1.0 },
            logit_bias: (0..u32::from(every(8)))
                .map(|_| (TokenId(5), 3.0))
                .collect(),
            logprobs: every(2).then_some(2),
            ignore_eos: every(9),
        },
        stop_tokens: vec![TokenId(0)],
        cache_salt: String::new(),
        priority: (seed % 3) as i64 - 1,
        tenant: String::new(),
        resumed: Vec::new(),
        constraint: (seed % 7 == 1).then(|| Constraint(Arc::new(Parity))),
    }
}

/// Allows odd tokens after even ones and even ones after odd; complete after the token 22.
#[derive(Debug)]
struct Parity;

#[derive(Debug)]
struct ParityMask;

impl MaskSource for Parity {
    fn start(&self) -> Box<dyn TokenMask> {
        Box::new(ParityMask)
    }
}

impl TokenMask for ParityMask {
    fn restrict(&mut self, output: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        let Some(last) = output.last() else {
            return Ok(Restriction::Free);
        };
        if last.0 == 22 {
            return Ok(Restriction::Complete);
        }
        for (index, logit) in row.iter_mut().enumerate() {
            if index as u32 % 2 == last.0 % 2 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Restriction::Masked)
    }
}

/// What a client sees of each choice.
type Streams = BTreeMap<(u64, u32), (Vec<Sampled>, Option<FinishReason>)>;

fn take(streams: &mut Streams, events: &mut Vec<Event>) {
    for event in events.drain(..) {
        let stream = streams.entry((event.request.0, event.choice)).or_default();
        assert_eq!(stream.1, None, "{event:?} after the end");
        match event.kind {
            EventKind::Started { .. } => {}
            EventKind::Restarted => panic!("nothing restarts here"),
            EventKind::Token(sampled) => stream.0.push(sampled),
            EventKind::Finished(reason) => stream.1 = Some(reason),
        }
    }
}

fn drive(engine: &mut Engine, executor: &mut dyn Executor) -> Streams {
    let (mut streams, mut events) = (Streams::new(), Vec::new());
    while !engine.is_idle() {
        engine.step(executor, &mut events).unwrap();
        take(&mut streams, &mut events);
    }
    streams
}

#[derive(Clone, Debug)]
enum Act {
    Submit {
        family: u32,
        extra: Vec<u32>,
        max_tokens: usize,
        seed: u64,
        choices: u32,
        resumed: usize,
    },
    Cancel(usize),
    Expire(usize),
    Stop(usize),
    Steps(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let extra = proptest::collection::vec(0u32..VOCABULARY as u32, 1..12);
    let submit = (0u32..3, extra, 1usize..24, any::<u64>(), 1u32..4, 0usize..6).prop_map(
        |(family, extra, max_tokens, seed, choices, resumed)| Act::Submit {
            family,
            extra,
            max_tokens,
            seed,
            choices,
            resumed,
        },
    );
    prop_oneof![5 => submit, 1 => any::<usize>().prop_map(Act::Cancel),
        1 => any::<usize>().prop_map(Act::Expire), 1 => any::<usize>().prop_map(Act::Stop),
        5 => (1usize..6).prop_map(Act::Steps)]
}

/// What clients saw, which requests were ended from outside, and how many drafts were verified.
type Played = (Streams, BTreeSet<u64>, u64);

/// Plays `acts` to the end.
fn play(acts: &[Act], limits: Limits) -> Played {
    play_on(&mut toy(&limits), acts, limits)
}

fn play_on(executor: &mut dyn Executor, acts: &[Act], limits: Limits) -> Played {
    let mut engine = Engine::new(limits).unwrap();
    let (mut streams, mut events) = (Streams::new(), Vec::new());
    let mut count = 0;
    let mut ended = BTreeSet::new();
    for act in acts {
        let mut chosen = |index: usize| {
            let id = index as u64 % count.max(1);
            ended.insert(id);
            RequestId(id)
        };
        match act {
            Act::Submit {
                family,
                extra,
                max_tokens,
                seed,
                choices,
                resumed,
            } => {
                // Families share prefixes, some of which end with a block.
                let shared = 12 + *family;
                let mut prompt: Vec<u32> = (0..shared).map(|i| i * (family + 2) % 23).collect();
                prompt.extend(extra);
                let mut request = request(count, prompt, *max_tokens, *seed);
                request.choices = (*choices).min(limits.max_num_seqs as u32);
                if request.choices == 1 && request.constraint.is_none() {
                    let resumed = (*resumed).min(max_tokens - 1);
                    request.resumed = (1..=resumed as u32).map(TokenId).collect();
                }
                engine.submit(request).unwrap();
                count += 1;
            }
            Act::Cancel(index) => engine.cancel(chosen(*index), &mut events),
            Act::Expire(index) => engine.expire(chosen(*index), &mut events),
            Act::Stop(index) => engine.stop(chosen(*index), 0, &mut events),
            Act::Steps(steps) => {
                for _ in 0..*steps {
                    engine.step(executor, &mut events).unwrap();
                    assert_no_block_is_held_for_a_draft(&engine, &limits);
                }
            }
        }
        take(&mut streams, &mut events);
    }
    take(&mut streams, &mut events);
    while !engine.is_idle() {
        let report = engine.step(executor, &mut events).unwrap();
        assert!(report.tokens <= limits.max_num_batched_tokens);
        assert_no_block_is_held_for_a_draft(&engine, &limits);
        take(&mut streams, &mut events);
    }
    assert_eq!(engine.load().blocks_used, 0);
    (streams, ended, engine.load().counters.draft_tokens)
}

fn assert_no_block_is_held_for_a_draft(engine: &Engine, limits: &Limits) {
    for sequence in engine.scheduler().sequences() {
        let needed = sequence.tokens.len().div_ceil(limits.block_size);
        assert!(sequence.blocks.len() <= needed, "{sequence:?}");
        assert!(sequence.blocks.len() * limits.block_size >= sequence.computed);
        assert!(sequence.drafts.len() <= limits.draft_tokens);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn event_streams_with_and_without_drafts_are_equal(
        acts in proptest::collection::vec(act(), 1..30),
        draft_tokens in 1usize..6,
        block_size in 1usize..7,
        max_num_seqs in 1usize..6,
        budget in 1usize..24,
        spare_blocks in 0usize..12,
    ) {
        let with = |draft_tokens| limits(draft_tokens, |l| {
            l.max_num_seqs = max_num_seqs;
            l.max_num_batched_tokens = budget.max(max_num_seqs);
            l.block_size = block_size;
            l.block_count = MAX_MODEL_LEN.div_ceil(block_size) + spare_blocks;
        });
        let (off, ended, none) = play(&acts, with(0));
        prop_assert_eq!(none, 0);
        let (on, _, _) = play(&acts, with(draft_tokens));
        prop_assert_eq!(off.len(), on.len());
        for (key, (tokens, reason)) in &off {
            let (drafted, drafted_reason) = &on[key];
            if ended.contains(&key.0) {
                // At a step that finds each of the two elsewhere in its answer.
                let common = tokens.len().min(drafted.len());
                prop_assert_eq!(&tokens[..common], &drafted[..common]);
            } else {
                prop_assert_eq!(tokens, drafted);
                prop_assert_eq!(reason, drafted_reason);
            }
        }
    }
}

/// A toy that samples where its logits are.
struct Picking {
    toy: Toy,
    logits: Logits,
    sampler: Sampler,
}

/// What a row allows.
#[derive(Debug)]
struct Bits(Vec<u32>);

impl TokenMask for Bits {
    fn restrict(&mut self, _: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        for (token, logit) in row.iter_mut().enumerate() {
            if self.0[token / 32] >> (token % 32) & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Restriction::Masked)
    }
}

impl Executor for Picking {
    fn vocabulary(&self) -> usize {
        self.toy.vocabulary()
    }

    fn execute(&mut self, _: &Batch, _: &mut Logits) -> Result<(), ExecuteError> {
        panic!("its logits stay where they are");
    }

    fn picker(&mut self) -> Option<&mut dyn Picker> {
        Some(self)
    }
}

impl Picker for Picking {
    fn compute(&mut self, batch: &Batch) -> Result<(), ExecuteError> {
        self.toy.execute(batch, &mut self.logits)
    }

    fn compute_draft(&mut self, pass: &DraftBatch) -> Result<(), ExecuteError> {
        self.toy.draft(pass, &mut self.logits)
    }

    fn pick(&mut self, rows: &[PickRow<'_>], picked: &mut Vec<Picked>) -> Result<(), ExecuteError> {
        assert!(rows.is_sorted_by(|a, b| a.row < b.row));
        picked.clear();
        for row in rows {
            let parameters = SamplingParameters {
                logprobs: row.logprobs,
                ..row.parameters.clone()
            };
            let context = SampleContext {
                tokens: &[row.tokens, row.drafts].concat(),
                prompt_len: row.prompt_len,
                choice: row.choice,
            };
            let logits = self.logits.row(row.row);
            let sampled = match row.allowed {
                None => self.sampler.sample(logits, &parameters, context).unwrap(),
                Some(bits) => {
                    let mut mask = Bits(bits.to_vec());
                    let sampler = &mut self.sampler;
                    let sampled = sampler.sample_within(logits, &parameters, context, &mut mask);
                    sampled.unwrap().unwrap()
                }
            };
            picked.push(Picked {
                token: Some(sampled.token),
                logprobs: sampled.logprobs,
            });
        }
        Ok(())
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Tokens, log-probabilities, ends and accepted drafts.
    #[test]
    fn a_backend_that_samples_is_told_all_that_the_engines_own_sampler_knows(
        acts in proptest::collection::vec(act(), 1..30),
        draft_tokens in 0usize..5,
        budget in 4usize..24,
    ) {
        let limits = limits(draft_tokens, |l| l.max_num_batched_tokens = budget);
        let mut picking = Picking {
            toy: toy(&limits),
            logits: Logits::default(),
            sampler: Sampler::default(),
        };
        prop_assert_eq!(play_on(&mut picking, &acts, limits), play(&acts, limits));
    }
}

fn long(id: u64, seed: u64) -> Request {
    let mut request = request(id, (1..=9).map(|i| i + id as u32).collect(), 30, seed);
    request.parameters.ignore_eos = true;
    request.constraint = None;
    request
}

#[test]
fn drafts_are_accepted_and_save_steps_and_are_counted_by_position() {
    let steps = |draft_tokens| {
        let limits = limits(draft_tokens, |_| ());
        let mut engine = Engine::new(limits).unwrap();
        let mut executor = toy(&limits);
        for id in 0..4 {
            engine.submit(long(id, id + 3)).unwrap();
        }
        let (mut steps, mut events) = (0, Vec::new());
        while !engine.is_idle() {
            engine.step(&mut executor, &mut events).unwrap();
            steps += 1;
        }
        (steps, engine.load().counters)
    };
    let (off, none) = steps(0);
    assert_eq!((off, none.drafts, none.draft_tokens), (30, 0, 0));
    let (on, counters) = steps(3);
    assert!(on < 22, "{on}");
    let accepted = counters.accepted_tokens;
    assert!(accepted[0] > accepted[1] && accepted[1] > accepted[2] && accepted[2] > 0);
    assert_eq!(accepted[3..], [0; 5]);
    let total: u64 = accepted.iter().sum();
    assert!(total < counters.draft_tokens && counters.draft_tokens <= 3 * counters.drafts);
    // Every entry after the first step gives its accepted drafts and one more token; drafts of the last token are not made.
    assert_eq!(counters.generation_tokens, 4 * 30);
    assert!(total + counters.drafts <= 4 * 29);
}

#[test]
fn the_answer_never_grows_beyond_what_was_asked_for() {
    for max_tokens in 1..8 {
        let limits = limits(5, |_| ());
        let mut engine = Engine::new(limits).unwrap();
        let mut asked = long(1, 4);
        asked.max_tokens = max_tokens;
        engine.submit(asked).unwrap();
        let (tokens, reason) = drive(&mut engine, &mut toy(&limits))
            .remove(&(1, 0))
            .unwrap();
        assert_eq!(
            (tokens.len(), reason),
            (max_tokens, Some(FinishReason::Length))
        );
    }
    // The longest context, in a cache that has room for just that.
    let limits = limits(5, |l| l.block_count = MAX_MODEL_LEN / 4);
    let mut engine = Engine::new(limits).unwrap();
    let mut asked = long(1, 4);
    asked.max_tokens = MAX_MODEL_LEN - asked.prompt.len();
    engine.submit(asked).unwrap();
    let (tokens, _) = drive(&mut engine, &mut toy(&limits))
        .remove(&(1, 0))
        .unwrap();
    assert_eq!(tokens.len(), MAX_MODEL_LEN - 9);
}

#[test]
fn a_step_gives_drafts_at_most_half_of_what_decodes_leave_while_a_prompt_waits() {
    let limits = limits(4, |l| l.max_num_batched_tokens = 8);
    let mut engine = Engine::new(limits).unwrap();
    let mut executor = toy(&limits);
    let mut events = Vec::new();
    engine.submit(long(0, 4)).unwrap();
    engine.submit(long(1, 5)).unwrap();
    let decoding = |engine: &Engine| engine.scheduler().sequences().all(|s| s.remaining() == 1);
    while !decoding(&engine) {
        engine.step(&mut executor, &mut events).unwrap();
    }
    let before = engine.load().counters.draft_tokens;
    engine.submit(request(2, (0..20).collect(), 2, 3)).unwrap();
    engine.prepare(&mut events);
    // Two tokens, three of the six left for drafts, and the rest for the prompt.
    assert_eq!(engine.prepared_tokens(), 8);
    engine.run(&mut executor, &mut events).unwrap();
    let prompt = engine.scheduler().sequences().last().unwrap();
    assert_eq!(prompt.computed, 3);
    assert_eq!(engine.load().counters.draft_tokens, before + 3);
}

#[test]
fn a_cached_prefix_is_found_where_the_token_after_it_is_the_same() {
    let cached = |draft_tokens, second: Vec<u32>| {
        let limits = limits(draft_tokens, |_| ());
        let mut engine = Engine::new(limits).unwrap();
        let mut executor = toy(&limits);
        let mut found = Vec::new();
        for (id, prompt) in [(1..=13).collect(), second].into_iter().enumerate() {
            engine.submit(request(id as u64, prompt, 6, 4)).unwrap();
            let mut events = Vec::new();
            while !engine.is_idle() {
                engine.step(&mut executor, &mut events).unwrap();
            }
            found.extend(events.iter().filter_map(|event| match event.kind {
                EventKind::Started { cached_tokens, .. } => Some(cached_tokens),
                _ => None,
            }));
        }
        found[1]
    };
    let same: Vec<u32> = (1..=13).collect();
    // Another token right after the second block, and one token later.
    let at_border: Vec<u32> = (1..=8).chain([20, 21, 22]).collect();
    let later: Vec<u32> = (1..=9).chain([20, 21, 22]).collect();
    for (drafts, prompt, expected) in [
        (0, &same, 12),
        (2, &same, 12),
        (0, &at_border, 8),
        (2, &at_border, 4),
        (0, &later, 8),
        (2, &later, 8),
    ] {
        assert_eq!(
            cached(drafts, prompt.clone()),
            expected,
            "{drafts} drafts, {prompt:?}"
        );
    }
}

/// A backend whose prediction layer fails.
struct Failing(Toy);

impl Executor for Failing {
    fn vocabulary(&self) -> usize {
        self.0.vocabulary()
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.0.execute(batch, logits)
    }

    fn draft(&mut self, _: &DraftBatch, _: &mut Logits) -> Result<(), ExecuteError> {
        Err(ExecuteError::InvalidBatch("no".into()))
    }
}

#[test]
fn a_pass_that_fails_costs_drafts_and_no_token() {
    let off = limits(0, |_| ());
    let mut engine = Engine::new(off).unwrap();
    engine.submit(long(1, 4)).unwrap();
    let expected = drive(&mut engine, &mut toy(&off));

    let limits = limits(3, |_| ());
    let mut engine = Engine::new(limits).unwrap();
    engine.submit(long(1, 4)).unwrap();
    let mut executor = Failing(toy(&limits));
    let (mut streams, mut events) = (Streams::new(), Vec::new());
    while !engine.is_idle() {
        engine.step(&mut executor, &mut events).unwrap_err();
        assert_no_block_is_held_for_a_draft(&engine, &limits);
        take(&mut streams, &mut events);
    }
    assert_eq!(streams, expected);
    assert_eq!(engine.load().counters.drafts, 0);
}

#[test]
fn a_backend_without_a_prediction_layer_says_so() {
    struct Plain(Toy);
    impl Executor for Plain {
        fn vocabulary(&self) -> usize {
            self.0.vocabulary()
        }
        fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
            self.0.execute(batch, logits)
        }
    }
    let limits = limits(1, |_| ());
    let mut engine = Engine::new(limits).unwrap();
    engine.submit(long(1, 4)).unwrap();
    let error = engine
        .step(&mut Plain(toy(&limits)), &mut Vec::new())
        .unwrap_err();
    assert!(error.to_string().contains("no prediction layer"), "{error}");
}

#[test]
fn more_drafts_than_are_counted_are_refused() {
    let text = Engine::new(limits(9, |_| ())).unwrap_err().to_string();
    assert_eq!(
        text,
        "draft_tokens is 9, but must be at most 8: each further draft is accepted less often"
    );
}

#[test]
fn the_canary_looks_at_the_prediction_layer_where_drafts_are_asked_for() {
    struct Flat(Toy);
    impl Executor for Flat {
        fn vocabulary(&self) -> usize {
            self.0.vocabulary()
        }
        fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
            self.0.execute(batch, logits)
        }
        fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
            self.0.draft(pass, logits)?;
            logits.as_mut_slice().fill(0.0);
            Ok(())
        }
    }
    let (on, off) = (limits(2, |_| ()), limits(0, |_| ()));
    run_canary(&mut toy(&on), &on).unwrap();
    run_canary(&mut Flat(toy(&off)), &off).unwrap();
    let error = run_canary(&mut Flat(toy(&on)), &on)
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "the prediction layer: all logits of step 0 are equal"
    );
}
