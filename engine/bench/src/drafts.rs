//! What drafts cost and what they save: decode of one sequence with and without them, at forced acceptances.
//!
//! The weights are random, so the layer's own drafts would hardly ever be accepted. Everything is computed as in service
//! (the layer's passes, the verifying steps, sampling); only which token the layer seems to prefer is then written over,
//! by the answer that the same engine gave without drafts.

use std::time::Instant;

use engine_core::{
    Batch, DraftBatch, Engine, EventKind, ExecuteError, Executor, Limits, Logits, Request,
    RequestId, SamplingParameters, TokenId, uniform,
};
use engine_cpu::{CpuExecutor, CpuLimits};
use engine_load::Progress;
use engine_memory::{MemoryRequest, memory_plan};
use engine_spec::{Device, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization};

use crate::median;
use bench_report::{Report, Row};

const PROMPT: usize = 64;
const ANSWER: usize = 128;
/// Drafts of a step, and how often each is right; 0.85 is what the report on DeepSeek-V3 gives for the first one.
const CASES: [(usize, f64); 5] = [(1, 0.0), (1, 0.85), (1, 1.0), (2, 0.85), (3, 0.85)];

/// An executor whose drafts are right as often as it is told.
struct Forced {
    executor: CpuExecutor,
    /// The sequence that greedy decoding gives, prompt included.
    answer: Vec<TokenId>,
    acceptance: f64,
}

impl Executor for Forced {
    fn vocabulary(&self) -> usize {
        self.executor.vocabulary()
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.executor.execute(batch, logits)
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.executor.draft(pass, logits)?;
        let wanted = pass.batch.entries.iter().filter(|e| e.wants_logits);
        for (row, entry) in wanted.enumerate() {
            let position = entry.end() + 1;
            let right = self.answer.get(position).map_or(0, |token| token.index());
            let is_right = uniform(0, 0, position as u64) < self.acceptance;
            let token = match is_right {
                true => right,
                false => (right + 1) % logits.vocabulary(),
            };
            logits.row_mut(row)[token] = f32::MAX;
        }
        Ok(())
    }
}

fn limits(
    config: &ModelConfig,
    threads: usize,
    drafts: usize,
) -> anyhow::Result<(Limits, CpuLimits)> {
    let request = MemoryRequest {
        dtype: Dtype::Bfloat16,
        quantization: Quantization::None,
        parallelism: Parallelism::default(),
        device: Device::Cpu,
        max_model_len: Some((PROMPT + ANSWER) as u32),
        max_num_seqs: 1,
        block_size: 16,
        max_num_batched_tokens: PROMPT as u32,
        kv_cache: KvCacheDtype::Auto,
        draft_tokens: u32::try_from(drafts)?,
        capacity_bytes: None,
    };
    let plan = memory_plan(config, &request)?;
    let mut cpu = CpuLimits::from_plan(&plan, 1, PROMPT as u32);
    cpu.threads = threads;
    let limits = Limits {
        vocabulary: config.vocab_size as usize,
        max_model_len: PROMPT + ANSWER,
        max_num_seqs: 1,
        max_num_batched_tokens: PROMPT,
        max_queued_requests: 1,
        block_size: 16,
        block_count: cpu.kv_blocks,
        draft_tokens: drafts,
    };
    Ok((limits, cpu))
}

fn prompt(vocabulary: usize) -> Vec<TokenId> {
    let token = |index: usize| TokenId((index * 7919 % vocabulary) as u32);
    (0..PROMPT).map(token).collect()
}

/// Decodes one answer: its tokens, and the seconds after its first token.
fn decode(limits: Limits, executor: &mut dyn Executor) -> anyhow::Result<(Vec<TokenId>, f64)> {
    let mut engine = Engine::new(limits)?;
    engine.submit(Request {
        id: RequestId(0),
        prompt: prompt(limits.vocabulary),
        choices: 1,
        max_tokens: ANSWER,
        parameters: SamplingParameters {
            ignore_eos: true,
            ..SamplingParameters::greedy()
        },
        stop_tokens: Vec::new(),
        cache_salt: String::new(),
        constraint: None,
        priority: 0,
        tenant: String::new(),
        resumed: Vec::new(),
    })?;
    let mut events = Vec::new();
    engine.step(executor, &mut events)?;
    let started = Instant::now();
    while !engine.is_idle() {
        engine.step(executor, &mut events)?;
    }
    let seconds = started.elapsed().as_secs_f64();
    let tokens = events.iter().filter_map(|event| match &event.kind {
        EventKind::Token(sampled) => Some(sampled.token),
        EventKind::Started { .. } | EventKind::Restarted | EventKind::Finished(_) => None,
    });
    Ok((tokens.collect(), seconds))
}

/// Measures decoding without and with drafts.
///
/// # Errors
/// When the model does not load or a step fails.
pub(crate) fn measure(
    config: &ModelConfig,
    threads: usize,
    report: &mut Report,
) -> anyhow::Result<()> {
    let rate = |seconds: f64| (ANSWER - 1) as f64 / seconds;
    let (limits_off, cpu) = limits(config, threads, 0)?;
    let mut executor = CpuExecutor::dummy(config, 1, cpu, &Progress::default())?;
    let (answer, _) = decode(limits_off, &mut executor)?;
    let off = rate(median(|| Ok(decode(limits_off, &mut executor)?.1))?);
    let name = format!("decode of 1 sequence of {ANSWER} tokens, no drafts");
    report.push(Row::plain(&name, off, "tokens/s"));
    drop(executor);
    let answer = [prompt(limits_off.vocabulary), answer].concat();
    for (drafts, acceptance) in CASES {
        let (limits, cpu) = limits(config, threads, drafts)?;
        let mut forced = Forced {
            executor: CpuExecutor::dummy(config, 1, cpu, &Progress::default())?,
            answer: answer.clone(),
            acceptance,
        };
        let on = rate(median(|| {
            let (tokens, seconds) = decode(limits, &mut forced)?;
            anyhow::ensure!(tokens == answer[PROMPT..], "drafts changed the answer");
            Ok(seconds)
        })?);
        let name = format!("{drafts} draft(s), each right {acceptance:.2} of the time (forced)");
        report.push(Row::against(&name, on, "tokens/s", off, None));
    }
    Ok(())
}
