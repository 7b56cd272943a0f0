//! Weights are replaced between steps of a random schedule: no answer is of two weights, none is lost.

#![allow(missing_docs, clippy::unwrap_used)]

mod toy;

use std::collections::{BTreeMap, BTreeSet};

use engine_core::{
    Engine, Event, EventKind, Executor, FinishReason, Limits, Request, RequestId, SampleContext,
    Sampler, SamplingParameters, StagedWeights, TokenId,
};
use proptest::prelude::*;
use toy::{Toy, logits_of};

const VOCABULARY: usize = 23;
const NEW: u64 = 77;

fn limits() -> Limits {
    Limits {
        vocabulary: VOCABULARY,
        max_model_len: 40,
        max_num_seqs: 3,
        max_num_batched_tokens: 12,
        max_queued_requests: 100,
        block_size: 4,
        block_count: 14,
        draft_tokens: 0,
    }
}

/// Prompts begin alike, so that prefixes are shared.
fn request(id: u64, prompt: usize, max_tokens: usize, choices: u32) -> Request {
    Request {
        id: RequestId(id),
        prompt: (0..prompt as u32).map(|t| TokenId(t * 5 % 23)).collect(),
        choices,
        max_tokens,
        parameters: SamplingParameters {
            seed: id,
            ignore_eos: true,
            ..Default::default()
        },
        stop_tokens: Vec::new(),
        cache_salt: String::new(),
        constraint: None,
        priority: 0,
        tenant: String::new(),
        resumed: Vec::new(),
    }
}

fn expected(weights: u64, request: &Request, choice: u32) -> Vec<TokenId> {
    let mut tokens = request.prompt.clone();
    let mut row = vec![0.0; VOCABULARY];
    for _ in 0..request.max_tokens {
        logits_of(weights, &tokens, &mut row);
        let context = SampleContext {
            tokens: &tokens,
            prompt_len: request.prompt.len(),
            choice,
        };
        let sampled = Sampler::default().sample(&row, &request.parameters, context);
        tokens.push(sampled.unwrap().token);
    }
    tokens.split_off(request.prompt.len())
}

#[derive(Default)]
struct Answers {
    tokens: BTreeMap<(u64, u32), Vec<TokenId>>,
    finished: BTreeMap<(u64, u32), FinishReason>,
    begun: BTreeSet<u64>,
}

impl Answers {
    fn take(&mut self, events: &mut Vec<Event>) {
        for event in events.drain(..) {
            let key = (event.request.0, event.choice);
            assert!(!self.finished.contains_key(&key), "{key:?} goes on");
            match event.kind {
                EventKind::Started { .. } => {
                    self.begun.insert(key.0);
                }
                EventKind::Restarted => self.tokens.entry(key).or_default().clear(),
                EventKind::Token(sampled) => {
                    self.tokens.entry(key).or_default().push(sampled.token);
                }
                EventKind::Finished(reason) => {
                    self.finished.insert(key, reason);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn every_answer_is_of_one_version_whole(
        shapes in proptest::collection::vec((1usize..14, 1usize..20, 1u32..3), 1..10),
        steps in 0usize..40,
        may_restart in any::<bool>(),
        told in any::<bool>(),
        late in 0usize..4,
    ) {
        let mut engine = Engine::new(limits()).unwrap();
        let mut toy = Toy::new(VOCABULARY, 4, 14).bounded(12, 3, 0);
        let mut answers = Answers::default();
        let mut events = Vec::new();
        let requests: Vec<Request> = shapes
            .iter()
            .enumerate()
            .map(|(id, (prompt, tokens, choices))| request(id as u64, *prompt, *tokens, *choices))
            .collect();
        let (later, first): (Vec<_>, Vec<_>) = requests.iter().partition(|r| r.id.0 < late as u64);
        for request in first {
            engine.submit(request.clone()).unwrap();
        }
        for _ in 0..steps {
            engine.step(&mut toy, &mut events).unwrap();
        }
        answers.take(&mut events);
        let begun = answers.begun.clone();
        let done: BTreeSet<(u64, u32)> = answers.finished.keys().copied().collect();

        engine.hold(true);
        // New requests still come in while the old ones finish.
        for request in later {
            engine.submit(request.clone()).unwrap();
        }
        if may_restart {
            engine.restart(|_| told, &mut events);
        } else {
            let mut patience = 2000;
            while !engine.is_clear() {
                engine.step(&mut toy, &mut events).unwrap();
                patience -= 1;
                prop_assert!(patience > 0, "what has begun does not end");
            }
        }
        answers.take(&mut events);
        toy.exchange_weights(StagedWeights(Box::new(NEW))).unwrap();
        engine.begin_weights("new", 2);
        engine.hold(false);
        let mut patience = 2000;
        while !engine.is_idle() {
            engine.step(&mut toy, &mut events).unwrap();
            patience -= 1;
            prop_assert!(patience > 0, "not idle");
        }
        answers.take(&mut events);

        for request in &requests {
            for choice in 0..request.choices {
                let key = (request.id.0, choice);
                let weights = match (may_restart, begun.contains(&request.id.0)) {
                    (false, true) => 0,
                    (true, true) if done.contains(&key) => 0,
                    _ => NEW,
                };
                if answers.finished[&key] == FinishReason::Replaced {
                    prop_assert!(may_restart && !told && begun.contains(&request.id.0));
                    continue;
                }
                prop_assert_eq!(answers.finished[&key], FinishReason::Length);
                prop_assert_eq!(&answers.tokens[&key], &expected(weights, request, choice));
            }
        }
        prop_assert_eq!(engine.load().blocks_used, 0);
    }
}
