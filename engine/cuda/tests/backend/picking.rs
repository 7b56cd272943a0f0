//! Tokens that the device samples are those that the engine's own sampler chooses from the same logits.

use std::sync::Arc;

use crate::support::{entry, gpu, limits, load, random_model, trained_model};
use engine_core::{
    Batch, Constraint, DraftBatch, Engine, EventKind, ExecuteError, Executor, Limits, Logits,
    MaskError, MaskSource, PickRow, Picked, Picker, Request, RequestId, Restriction, Sampled,
    SamplingParameters, TokenId, TokenMask,
};
use engine_cuda::{CudaExecutor, CudaLimits};
use engine_memory::ResidentDtype;

/// The same executor, its logits sampled on the processors.
struct OnHost(CudaExecutor);

impl Executor for OnHost {
    fn vocabulary(&self) -> usize {
        self.0.vocabulary()
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.0.execute(batch, logits)
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.0.draft(pass, logits)
    }
}

/// Allows a third of the tokens, another one at each position.
#[derive(Debug)]
struct Third;

impl MaskSource for Third {
    fn start(&self) -> Box<dyn TokenMask> {
        Box::new(Self)
    }
}

impl TokenMask for Third {
    fn restrict(&mut self, output: &[TokenId], row: &mut [f32]) -> Result<Restriction, MaskError> {
        if output.is_empty() {
            return Ok(Restriction::Free);
        }
        for (token, logit) in row.iter_mut().enumerate() {
            if token % 3 != output.len() % 3 {
                *logit = f32::NEG_INFINITY;
            }
        }
        Ok(Restriction::Masked)
    }
}

/// Requests of every kind: greedy and drawn, truncated, with penalties, biases, masks and log-probabilities.
fn requests(vocabulary: u32, prompt_len: usize) -> Vec<Request> {
    (0..8u32)
        .map(|id| {
            let on = |n: u32| id % n == n - 1;
            let prompt = (0..prompt_len as u32 + id).map(|i| (i * 37 + id * 11) % vocabulary);
            Request {
                id: RequestId(id.into()),
                prompt: prompt.map(TokenId).collect(),
                choices: 1,
                max_tokens: 8,
                parameters: SamplingParameters {
                    temperature: if on(3) { 0.0 } else { 1.3 },
                    top_p: if on(2) { 0.8 } else { 1.0 },
                    top_k: if on(4) { 20 } else { 0 },
                    min_p: if on(5) { 0.01 } else { 0.0 },
                    presence_penalty: if on(2) { 0.7 } else { 0.0 },
                    frequency_penalty: if on(4) { 0.4 } else { 0.0 },
                    repetition_penalty: if on(3) { 1.3 } else { 1.0 },
                    logit_bias: (0..id % 3).map(|t| (TokenId(t * 9), 2.0)).collect(),
                    seed: 1000 + u64::from(id),
                    logprobs: [None, Some(0), Some(5)][id as usize % 3],
                    ignore_eos: true,
                },
                stop_tokens: vec![],
                cache_salt: String::new(),
                constraint: on(4).then(|| Constraint(Arc::new(Third))),
                priority: 0,
                tenant: String::new(),
                resumed: Vec::new(),
            }
        })
        .collect()
}

fn serve(
    executor: &mut dyn Executor,
    limits: &CudaLimits,
    requests: &[Request],
) -> Vec<Vec<Sampled>> {
    let mut engine = Engine::new(Limits {
        vocabulary: executor.vocabulary(),
        max_model_len: limits.model_len_max,
        max_num_seqs: limits.sequences_max,
        max_num_batched_tokens: limits.batched_tokens_max,
        max_queued_requests: 100,
        block_size: limits.block_size,
        block_count: limits.kv_blocks,
        draft_tokens: limits.draft_tokens,
    })
    .unwrap();
    let mut streams = vec![Vec::new(); requests.len()];
    let mut events = Vec::new();
    for request in requests {
        engine.submit(request.clone()).unwrap();
    }
    while !engine.is_idle() {
        engine.step(executor, &mut events).unwrap();
    }
    for event in events {
        if let EventKind::Token(sampled) = event.kind {
            streams[event.request.0 as usize].push(sampled);
        }
    }
    if limits.draft_tokens > 0 {
        assert!(engine.load().counters.draft_tokens > 0);
    }
    streams
}

/// Sums run in another order than on the processors, which may cost the last bit of a float32.
fn near(found: f32, wanted: f32) -> bool {
    (found - wanted).abs() <= 2e-7 * wanted.abs().max(1.0)
}

fn assert_same(found: &[Vec<Sampled>], expected: &[Vec<Sampled>]) {
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert_eq!(found.token, expected.token, "request {index}");
            let (Some(found), Some(expected)) = (&found.logprobs, &expected.logprobs) else {
                assert_eq!(found.logprobs, expected.logprobs, "request {index}");
                continue;
            };
            assert!(near(found.chosen, expected.chosen), "request {index}");
            assert_eq!(found.top.len(), expected.top.len());
            for (found, expected) in found.top.iter().zip(&expected.top) {
                assert_eq!(found.0, expected.0, "request {index}");
                assert!(near(found.1, expected.1), "request {index}");
            }
        }
    }
}

#[test]
fn the_engine_hands_out_the_tokens_of_its_own_sampler() {
    for (model, draft_tokens, prompt_len) in [
        (trained_model(), 0, 5),
        // Six histories of 50 tokens are more than a turn has room for.
        (random_model("v2-cuda"), 0, 50),
        (random_model("v3-mtp-cuda"), 2, 5),
    ] {
        let Some(gpu) = gpu() else { return };
        let limits = CudaLimits {
            draft_tokens,
            model_len_max: 72,
            ..limits(ResidentDtype::Bfloat16)
        };
        let mut executor = load(&gpu, &model, limits);
        let requests = requests(executor.vocabulary() as u32, prompt_len);
        assert!(executor.picker().is_some());
        let found = serve(&mut executor, &limits, &requests);
        let expected = serve(&mut OnHost(executor), &limits, &requests);
        assert_same(&found, &expected);
        // Draws, not the best token over and over.
        assert!(
            found[0]
                .windows(2)
                .any(|pair| pair[0].token != pair[1].token)
        );
    }
}

#[test]
fn rows_that_are_not_there_and_masks_that_are_too_short_are_refused() {
    let Some(gpu) = gpu() else { return };
    let mut executor = load(&gpu, &trained_model(), limits(ResidentDtype::Bfloat16));
    let tokens = [TokenId(5), TokenId(6)];
    let parameters = SamplingParameters::greedy();
    let row = PickRow {
        row: 0,
        parameters: &parameters,
        tokens: &tokens,
        drafts: &[],
        prompt_len: 2,
        choice: 0,
        allowed: None,
        logprobs: None,
    };
    let mut picked = Vec::new();
    let refused = |executor: &mut CudaExecutor, row: PickRow<'_>| {
        let error = executor.pick(&[row], &mut Vec::new()).unwrap_err();
        assert!(matches!(error, ExecuteError::InvalidBatch(_)), "{error}");
    };
    refused(&mut executor, row);
    let batch = Batch {
        entries: vec![entry(1, &[5, 6], 0, &[0])],
    };
    executor.compute(&batch).unwrap();
    refused(&mut executor, PickRow { row: 1, ..row });
    let allowed = Some([1].as_slice());
    refused(&mut executor, PickRow { allowed, ..row });
    executor.pick(&[row], &mut picked).unwrap();
    // Where nothing is allowed there is no token.
    let none = vec![0; 17];
    let nothing = PickRow {
        allowed: Some(&none),
        ..row
    };
    executor.pick(&[nothing], &mut picked).unwrap();
    assert_eq!(
        picked,
        [Picked {
            token: None,
            logprobs: None
        }]
    );
}
