//! Random schedules against a model whose answers are known: no block leaked, no token lost, no answer changed.

#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::collections::BTreeMap;
use std::sync::Arc;

use engine_core::{
    Admission, BlockId, Constraint, Engine, Event, EventKind, FinishReason, Limits, MaskError,
    MaskSource, Rejection, Request, RequestId, Restriction, SampleContext, Sampled, Sampler,
    SamplingParameters, TokenId, TokenMask, run_canary,
};
use proptest::prelude::*;
use toy::{Toy, logits_after};

const VOCABULARY: usize = 23;
const EOS: TokenId = TokenId(0);

fn request(id: u64, prompt: Vec<u32>, max_tokens: usize, seed: u64) -> Request {
    Request {
        id: RequestId(id),
        prompt: prompt.into_iter().map(TokenId).collect(),
        choices: 1,
        max_tokens,
        parameters: SamplingParameters {
            seed,
            temperature: if seed.is_multiple_of(3) { 0.0 } else { 0.9 },
            top_p: if seed.is_multiple_of(2) { 1.0 } else { 0.8 },
            repetition_penalty: if seed.is_multiple_of(5) { 1.2 } else { 1.0 },
            ..Default::default()
        },
        stop_tokens: vec![EOS],
        cache_salt: String::new(),
        priority: (seed % 3) as i64 - 1,
        tenant: ["", "a", "b"][(seed % 11) as usize % 3].to_owned(),
        resumed: Vec::new(),
        constraint: (seed % 7 == 1).then(|| Constraint(Arc::new(Sums))),
    }
}

/// Allows tokens by the sum of the output, ends at a sum over 120; keeps state like a grammar does.
#[derive(Debug)]
struct Sums;

#[derive(Debug, Default)]
struct SumsMask {
    seen: usize,
    sum: u32,
}

impl MaskSource for Sums {
    fn start(&self) -> Box<dyn TokenMask> {
        Box::<SumsMask>::default()
    }
}

impl TokenMask for SumsMask {
    fn restrict(&mut self, output: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        for token in &output[self.seen..] {
            assert!(self.allows(token.0), "{token} after a sum of {}", self.sum);
            self.sum += token.0;
        }
        self.seen = output.len();
        if self.sum > 120 {
            return Ok(Restriction::Complete);
        }
        for (index, logit) in row.iter_mut().enumerate() {
            if !self.allows(index as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Restriction::Masked)
    }
}

impl SumsMask {
    fn allows(&self, token: u32) -> bool {
        (self.sum + token) % 3 != 2
    }
}

/// The answer by definition: one token after the other, without a scheduler or a cache.
fn expected(request: &Request, choice: u32, max_model_len: usize) -> (Vec<TokenId>, FinishReason) {
    let mut tokens = request.prompt.clone();
    let mut row = vec![0.0; VOCABULARY];
    let mut mask = request.constraint.as_ref().map(|c| c.0.start());
    loop {
        logits_after(&tokens, &mut row);
        let context = SampleContext {
            tokens: &tokens,
            prompt_len: request.prompt.len(),
            choice,
        };
        let mut sampler = Sampler::default();
        let sampled = match mask.as_deref_mut() {
            Some(mask) => sampler.sample_within(&row, &request.parameters, context, mask),
            None => sampler
                .sample(&row, &request.parameters, context)
                .map(Some)
                .map_err(Into::into),
        };
        let Some(Sampled { token, .. }) = sampled.unwrap() else {
            return (tokens.split_off(request.prompt.len()), FinishReason::Stop);
        };
        tokens.push(token);
        let generated = tokens.len() - request.prompt.len();
        let finish = if !request.parameters.ignore_eos && token == EOS {
            Some(FinishReason::Stop)
        } else if generated == request.max_tokens || tokens.len() == max_model_len {
            Some(FinishReason::Length)
        } else {
            None
        };
        if let Some(reason) = finish {
            return (tokens.split_off(request.prompt.len()), reason);
        }
    }
}

#[derive(Default)]
struct Answers {
    tokens: BTreeMap<(u64, u32), Vec<TokenId>>,
    finished: BTreeMap<(u64, u32), FinishReason>,
    started: BTreeMap<(u64, u32), usize>,
}

impl Answers {
    fn take(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let key = (event.request.0, event.choice);
            assert!(
                !self.finished.contains_key(&key),
                "{key:?} goes on after its end"
            );
            match event.kind {
                EventKind::Started { cached_tokens, .. } => {
                    assert!(
                        self.started.insert(key, cached_tokens).is_none(),
                        "{key:?} started twice"
                    );
                }
                EventKind::Token(sampled) => {
                    self.tokens.entry(key).or_default().push(sampled.token)
                }
                EventKind::Restarted => panic!("{key:?} restarted, but no weights were replaced"),
                EventKind::Finished(reason) => {
                    self.finished.insert(key, reason);
                }
            }
        }
    }
}

/// Each block is held exactly as often as sequences list it, and every list is as long as it must be.
fn assert_blocks_are_accounted_for(engine: &Engine, limits: &Limits) {
    let scheduler = engine.scheduler();
    let mut held: BTreeMap<BlockId, u32> = BTreeMap::new();
    for sequence in scheduler.sequences() {
        assert!(sequence.blocks.len() * limits.block_size >= sequence.computed);
        for block in &sequence.blocks {
            *held.entry(*block).or_default() += 1;
        }
    }
    for index in 0..limits.block_count as u32 {
        let block = BlockId(index);
        assert_eq!(
            scheduler.references(block),
            held.get(&block).copied().unwrap_or(0),
            "{block:?}"
        );
    }
    assert_eq!(engine.load().blocks_used, held.len());
    assert!(engine.load().running <= limits.max_num_seqs);
}

fn limits(block_size: usize, max_num_seqs: usize, budget: usize, spare_blocks: usize) -> Limits {
    let max_model_len = 48;
    Limits {
        vocabulary: VOCABULARY,
        max_model_len,
        max_num_seqs,
        max_num_batched_tokens: budget.max(max_num_seqs),
        max_queued_requests: 1000,
        block_size,
        block_count: max_model_len.div_ceil(block_size) + spare_blocks,
        draft_tokens: 0,
    }
}

fn drafting(limits: Limits, draft_tokens: usize) -> Limits {
    Limits {
        draft_tokens,
        ..limits
    }
}

fn toy(limits: &Limits) -> Toy {
    Toy::new(limits.vocabulary, limits.block_size, limits.block_count).bounded(
        limits.max_num_batched_tokens,
        limits.max_num_seqs,
        limits.draft_tokens,
    )
}

#[derive(Clone, Debug)]
enum Act {
    Submit {
        family: u8,
        extra: Vec<u32>,
        max_tokens: usize,
        seed: u64,
        choices: u32,
    },
    Cancel(usize),
    Expire(usize),
    Steps(usize),
}

fn act() -> impl Strategy<Value = Act> {
    let submit = (
        0u8..3,
        proptest::collection::vec(0u32..VOCABULARY as u32, 1..12),
        1usize..20,
        any::<u64>(),
        1u32..3,
    )
        .prop_map(|(family, extra, max_tokens, seed, choices)| Act::Submit {
            family,
            extra,
            max_tokens,
            seed,
            choices,
        });
    prop_oneof![4 => submit, 1 => any::<usize>().prop_map(Act::Cancel),
        1 => any::<usize>().prop_map(Act::Expire), 4 => (1usize..6).prop_map(Act::Steps)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn answers_do_not_depend_on_the_schedule(
        acts in proptest::collection::vec(act(), 1..40),
        block_size in 1usize..7,
        max_num_seqs in 1usize..6,
        budget in 1usize..20,
        spare_blocks in 0usize..12,
        draft_tokens in 0usize..5,
    ) {
        let limits = drafting(limits(block_size, max_num_seqs, budget, spare_blocks), draft_tokens);
        let mut engine = Engine::new(limits).unwrap();
        let mut executor = toy(&limits);
        let mut events = Vec::new();
        let mut answers = Answers::default();
        let mut requests: Vec<Request> = Vec::new();
        let (mut cancelled, mut expired) = (Vec::new(), Vec::new());
        for act in acts {
            match act {
                Act::Submit { family, extra, max_tokens, seed, choices } => {
                    // Families share prefixes, so that the prefix cache has something to find.
                    let mut prompt: Vec<u32> = (0..14).map(|i| (i * (u32::from(family) + 2)) % VOCABULARY as u32).collect();
                    prompt.extend(extra);
                    let mut request = request(requests.len() as u64, prompt, max_tokens, seed);
                    request.choices = choices.min(max_num_seqs as u32);
                    requests.push(request.clone());
                    engine.submit(request).unwrap();
                }
                Act::Cancel(index) if !requests.is_empty() => {
                    let id = (index % requests.len()) as u64;
                    engine.cancel(RequestId(id), &mut events);
                    cancelled.push(id);
                }
                Act::Expire(index) if !requests.is_empty() => {
                    let id = (index % requests.len()) as u64;
                    engine.expire(RequestId(id), &mut events);
                    expired.push(id);
                }
                Act::Cancel(_) | Act::Expire(_) => {}
                Act::Steps(count) => {
                    for _ in 0..count {
                        let report = engine.step(&mut executor, &mut events).unwrap();
                        prop_assert!(report.tokens <= limits.max_num_batched_tokens);
                        assert_blocks_are_accounted_for(&engine, &limits);
                    }
                }
            }
            answers.take(&mut events);
            assert_blocks_are_accounted_for(&engine, &limits);
        }
        let mut steps = 0;
        while !engine.is_idle() {
            engine.step(&mut executor, &mut events).unwrap();
            answers.take(&mut events);
            steps += 1;
            prop_assert!(steps < 20_000, "the engine makes no progress");
        }
        prop_assert_eq!(engine.load().blocks_used, 0);
        for request in &requests {
            for choice in 0..request.choices {
                let key = (request.id.0, choice);
                let (tokens, reason) = expected(request, choice, limits.max_model_len);
                let found = answers.tokens.remove(&key).unwrap_or_default();
                match answers.finished[&key] {
                    FinishReason::Abort => {
                        prop_assert!(cancelled.contains(&request.id.0));
                        prop_assert_eq!(&tokens[..found.len()], &found[..]);
                    }
                    FinishReason::Deadline => {
                        prop_assert!(expired.contains(&request.id.0));
                        prop_assert_eq!(&tokens[..found.len()], &found[..]);
                    }
                    finished => {
                        prop_assert_eq!(finished, reason);
                        prop_assert_eq!(tokens, found);
                    }
                }
            }
        }
    }
}

proptest! {
    /// An answer that is cut off anywhere and continued by another engine is the answer.
    #[test]
    fn a_resumed_answer_goes_on_as_if_nothing_had_happened(
        prompt in proptest::collection::vec(0u32..VOCABULARY as u32, 1..12),
        max_tokens in 2usize..20,
        seed in any::<u64>(),
        cut in any::<proptest::sample::Index>(),
        block_size in 1usize..7,
        draft_tokens in 0usize..4,
    ) {
        let limits = drafting(limits(block_size, 2, 5, 8), draft_tokens);
        let mut request = request(1, prompt, max_tokens, seed);
        let (tokens, reason) = expected(&request, 0, limits.max_model_len);
        let cut = cut.index(tokens.len().max(1));
        request.resumed = tokens[..cut].to_vec();
        let mut engine = Engine::new(limits).unwrap();
        engine.submit(request).unwrap();
        let mut answers = drive(&mut engine, &mut toy(&limits));
        prop_assert_eq!(answers.finished[&(1, 0)], reason);
        prop_assert_eq!(answers.tokens.remove(&(1, 0)).unwrap_or_default(), &tokens[cut..]);
    }
}

fn drive(engine: &mut Engine, executor: &mut Toy) -> Answers {
    let mut answers = Answers::default();
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(executor, &mut events).unwrap();
        answers.take(&mut events);
    }
    answers
}

#[test]
fn a_full_cache_preempts_and_loses_nothing() {
    let limits = limits(4, 4, 16, 2);
    let mut engine = Engine::new(limits).unwrap();
    let requests: Vec<Request> = (0..4)
        .map(|id| {
            let mut request = request(id, (1..=10).map(|i| i + id as u32).collect(), 30, id);
            request.parameters.ignore_eos = true;
            request
        })
        .collect();
    for request in &requests {
        engine.submit(request.clone()).unwrap();
    }
    let answers = drive(&mut engine, &mut toy(&limits));
    assert!(engine.load().counters.preemptions > 0);
    for request in &requests {
        assert_eq!(
            answers.tokens[&(request.id.0, 0)],
            expected(request, 0, limits.max_model_len).0
        );
    }
}

#[test]
fn a_repeated_prompt_comes_from_the_prefix_cache_and_salts_keep_tenants_apart() {
    let limits = limits(4, 4, 64, 20);
    let mut engine = Engine::new(limits).unwrap();
    let mut executor = toy(&limits);
    let prompt: Vec<u32> = (1..=17).collect();
    let mut cached = Vec::new();
    for (id, salt) in ["", "", "tenant"].iter().enumerate() {
        let mut request = request(id as u64, prompt.clone(), 2, 3);
        request.cache_salt = (*salt).to_owned();
        engine.submit(request).unwrap();
        cached.push(drive(&mut engine, &mut executor).started[&(id as u64, 0)]);
    }
    assert_eq!(cached, [0, 16, 0]);
    assert_eq!(engine.load().counters.prefix_hits, 16);
}

#[test]
fn choices_share_the_prompt_and_differ_in_the_answer() {
    let limits = limits(4, 4, 64, 20);
    let mut engine = Engine::new(limits).unwrap();
    let mut request = request(9, (1..=17).collect(), 12, 1);
    request.choices = 3;
    request.parameters.ignore_eos = true;
    engine.submit(request).unwrap();
    let answers = drive(&mut engine, &mut toy(&limits));
    assert_eq!(
        answers.started.values().copied().collect::<Vec<_>>(),
        [0, 16, 16]
    );
    assert_ne!(answers.tokens[&(9, 0)], answers.tokens[&(9, 1)]);
}

#[test]
fn a_cancelled_request_holds_no_block_before_the_next_step() {
    let limits = limits(4, 4, 64, 20);
    let mut engine = Engine::new(limits).unwrap();
    let mut executor = toy(&limits);
    let mut events = Vec::new();
    engine.submit(request(1, (1..=9).collect(), 20, 1)).unwrap();
    engine.step(&mut executor, &mut events).unwrap();
    assert_eq!(engine.load().blocks_used, 3);
    engine.cancel(RequestId(1), &mut events);
    assert_eq!(engine.load().blocks_used, 0);
    assert!(engine.is_idle());
    assert_eq!(
        events.last().unwrap().kind,
        EventKind::Finished(FinishReason::Abort)
    );
}

#[test]
fn decoding_goes_on_while_a_long_prompt_is_prefilled() {
    let limits = limits(4, 4, 6, 20);
    let mut engine = Engine::new(limits).unwrap();
    let mut executor = toy(&limits);
    let mut first = request(1, vec![1, 2], 20, 3);
    first.parameters.ignore_eos = true;
    engine.submit(first).unwrap();
    let mut events = Vec::new();
    engine.step(&mut executor, &mut events).unwrap();
    engine.submit(request(2, (1..=20).collect(), 4, 3)).unwrap();
    for _ in 0..4 {
        events.clear();
        let report = engine.step(&mut executor, &mut events).unwrap();
        assert!(report.tokens <= 6);
        let tokens = events
            .iter()
            .filter(|e| e.request.0 == 1 && matches!(e.kind, EventKind::Token(_)));
        assert_eq!(tokens.count(), 1);
    }
    assert!(
        events
            .iter()
            .any(|e| e.request.0 == 2 && matches!(e.kind, EventKind::Token(_)))
    );
}

/// Requests in the order in which they started.
fn starts(engine: &mut Engine, executor: &mut Toy) -> Vec<u64> {
    let mut started = Vec::new();
    let mut events = Vec::new();
    while !engine.is_idle() {
        engine.step(executor, &mut events).unwrap();
        for event in events.drain(..) {
            if matches!(event.kind, EventKind::Started { .. }) {
                started.push(event.request.0);
            }
        }
    }
    started
}

#[test]
fn tenants_take_turns_and_priorities_go_first() {
    let limits = limits(4, 1, 16, 20);
    let mut engine = Engine::new(limits).unwrap();
    let mut submit = |id: u64, tenant: &str, priority: i64| {
        let mut request = request(id, vec![1, 2, 3], 5, 3);
        (request.tenant, request.priority) = (tenant.to_owned(), priority);
        engine.submit(request).unwrap();
    };
    for id in 0..8 {
        submit(id, "flood", 0);
    }
    submit(20, "other", 0);
    submit(21, "other", 0);
    submit(30, "flood", -1);
    let started = starts(&mut engine, &mut toy(&limits));
    let at = |id| started.iter().position(|other| *other == id).unwrap();
    assert_eq!((started.len(), at(30)), (11, 0));
    assert!(at(20) <= 5 && at(21) <= 6, "{started:?}");
    assert!(at(7) > at(21), "{started:?}");
}

#[test]
fn a_queue_is_bounded_by_tokens_and_a_tenant_by_its_share() {
    let mut limits = limits(4, 1, 64, 0);
    limits.max_queued_requests = 7;
    let mut engine = Engine::new(limits).unwrap();
    engine.set_admission(Admission {
        max_queued_tokens: Some(100),
    });
    let from = |id: u64, tenant: &str, max_tokens: usize| {
        let mut request = request(id, vec![1, 2], max_tokens, 3);
        request.tenant = tenant.to_owned();
        request
    };
    engine.submit(from(0, "a", 38)).unwrap();
    engine.submit(from(1, "b", 8)).unwrap();
    let over = engine.submit(from(2, "a", 18)).unwrap_err();
    assert!(
        matches!(over, Rejection::OverShare { waiting: 1, .. }),
        "{over}"
    );
    assert!(over.is_retryable());
    engine.submit(from(3, "b", 28)).unwrap();
    assert_eq!(
        engine.submit(from(4, "c", 28)).unwrap_err(),
        Rejection::TokensQueued {
            waiting: 80,
            cost: 30,
            limit: 100
        }
    );
    assert_eq!(engine.load().queued_tokens, 80);
    // By count: of eight places half are taken, and "b" has two of them.
    engine.set_admission(Admission::default());
    for id in 10..12 {
        engine.submit(from(id, "b", 1)).unwrap();
    }
    let over = engine.submit(from(12, "b", 1)).unwrap_err();
    assert_eq!(
        over,
        Rejection::OverShare {
            waiting: 4,
            share: 4
        }
    );
    engine.submit(from(13, "c", 1)).unwrap();
}

#[test]
fn admission_names_what_is_wrong() {
    let mut limits = limits(4, 1, 64, 0);
    limits.max_queued_requests = 1;
    let mut engine = Engine::new(limits).unwrap();
    let refusal = |engine: &mut Engine, request| engine.submit(request).unwrap_err();
    assert_eq!(
        refusal(&mut engine, request(1, vec![], 1, 0)),
        Rejection::EmptyPrompt
    );
    assert_eq!(
        refusal(&mut engine, request(1, vec![1; 40], 9, 0)).to_string(),
        "the prompt has 40 tokens and max_tokens is 9, together 49, but the longest context is 48 tokens"
    );
    assert_eq!(
        refusal(&mut engine, request(1, vec![99], 1, 0)).to_string(),
        "token id 99 is outside the vocabulary of 23 tokens"
    );
    engine.submit(request(1, vec![1], 9, 0)).unwrap();
    engine.submit(request(2, vec![1], 9, 0)).unwrap();
    let full = refusal(&mut engine, request(3, vec![1], 9, 0));
    assert!(full.is_retryable());
    assert_eq!(
        full,
        Rejection::QueueFull {
            waiting: 2,
            limit: 1
        }
    );
    engine.drain();
    assert_eq!(
        refusal(&mut engine, request(3, vec![1], 9, 0)),
        Rejection::Draining
    );
    let answers = drive(&mut engine, &mut toy(&limits));
    assert_eq!(answers.finished.len(), 2);
}

#[test]
fn limits_that_cannot_work_are_refused() {
    let mut limits = limits(4, 1, 64, 0);
    limits.block_count -= 1;
    assert_eq!(
        Engine::new(limits).unwrap_err().to_string(),
        "block_count is 11, but must be at least 12: one sequence of max_model_len tokens must fit into the cache"
    );
}

#[test]
fn the_canary_passes_on_a_sound_backend_and_fails_on_one_that_mixes_rows() {
    let limits = limits(4, 4, 64, 20);
    let report = run_canary(&mut toy(&limits), &limits).unwrap();
    assert_eq!((report.tokens.len(), report.deviation), (4, 0.0));

    struct Mixed(Toy);
    impl engine_core::Executor for Mixed {
        fn vocabulary(&self) -> usize {
            self.0.vocabulary()
        }
        fn execute(
            &mut self,
            batch: &engine_core::Batch,
            logits: &mut engine_core::Logits,
        ) -> Result<(), engine_core::ExecuteError> {
            self.0.execute(batch, logits)?;
            if logits.rows() > 1 {
                let first = logits.row(0).to_vec();
                let last = logits.rows() - 1;
                logits.row_mut(last).copy_from_slice(&first);
            }
            Ok(())
        }
    }
    let error = run_canary(&mut Mixed(toy(&limits)), &limits).unwrap_err();
    assert!(
        error.to_string().contains("beside another sequence"),
        "{error}"
    );
}
