//! Our engine: load, prefill, decode by batch and by context.

use std::path::Path;
use std::time::Instant;

use bench_report::{Report, Row};
use engine_core::{Batch, BatchEntry, BlockId, Executor, Logits, SequenceId, TokenId};
use engine_cpu::{CpuExecutor, CpuLimits};
use engine_load::Progress;
use engine_memory::{MemoryRequest, memory_plan, resident_dtype, weight_bytes_per_rank};
use engine_spec::{Device, Dtype, KvCacheDtype, ModelConfig, Parallelism, Quantization};

use crate::machine::Bounds;
use crate::median;

/// Tokens of a prefill, in one chunk.
const PROMPT: usize = 512;
/// Steps that are timed together.
const STEPS: usize = 32;
/// Context at which batches are compared.
const CONTEXT: usize = 256;
const BATCHES: [usize; 4] = [1, 4, 16, 64];
const CONTEXTS: [usize; 4] = [512, 2048, 8192, 32_000];

/// What a rival is held against, in tokens per second.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ours {
    /// Form of the weights, as rows name it.
    pub form: &'static str,
    /// Prompt of [`PROMPT`] tokens.
    pub prefill: f64,
    /// One sequence.
    pub decode: f64,
}

struct Loaded {
    executor: CpuExecutor,
    limits: CpuLimits,
    vocabulary: u32,
    sequences: usize,
    seconds: f64,
}

impl Loaded {
    fn new(
        config: &ModelConfig,
        quantization: Quantization,
        dir: &Path,
        threads: usize,
        length: usize,
        sequences: usize,
    ) -> anyhow::Result<Self> {
        let request = MemoryRequest {
            dtype: Dtype::Auto,
            quantization,
            parallelism: Parallelism::default(),
            device: Device::Cpu,
            max_model_len: Some(u32::try_from(length)?),
            max_num_seqs: u32::try_from(sequences)?,
            block_size: 16,
            max_num_batched_tokens: PROMPT as u32,
            kv_cache: KvCacheDtype::Auto,
            draft_tokens: 0,
            capacity_bytes: None,
        };
        let plan = memory_plan(config, &request)?;
        let mut limits =
            CpuLimits::from_plan(&plan, request.max_num_seqs, request.max_num_batched_tokens);
        limits.threads = threads;
        limits.kv_blocks = sequences * length.div_ceil(limits.block_size);
        let started = Instant::now();
        let executor = CpuExecutor::load(dir, config, limits, &Progress::default())?;
        Ok(Self {
            executor,
            limits,
            vocabulary: config.vocab_size,
            sequences,
            seconds: started.elapsed().as_secs_f64(),
        })
    }

    /// Seconds of a step in which `sequences` sequences go on from `start` with `count` tokens each.
    fn step(&mut self, sequences: usize, start: usize, count: usize) -> anyhow::Result<f64> {
        let each = self.limits.kv_blocks / self.sequences;
        let entries = (0..sequences)
            .map(|sequence| BatchEntry {
                sequence: SequenceId(sequence as u64),
                tokens: (start..start + count)
                    .map(|position| TokenId((position * 7 + sequence) as u32 % self.vocabulary))
                    .collect(),
                start,
                blocks: (sequence * each..(sequence + 1) * each)
                    .map(|block| BlockId(block as u32))
                    .collect(),
                wants_logits: true,
                drafts: 0,
            })
            .collect();
        let batch = Batch { entries };
        let mut logits = Logits::with_capacity(self.vocabulary as usize, sequences);
        let started = Instant::now();
        self.executor.execute(&batch, &mut logits)?;
        Ok(started.elapsed().as_secs_f64())
    }

    /// Seconds of one of [`STEPS`] decoding steps after `context` tokens; what the cache holds does not matter.
    fn decode(&mut self, sequences: usize, context: usize) -> anyhow::Result<f64> {
        median(|| {
            (0..STEPS).try_fold(0.0, |sum, at| {
                Ok(sum + self.step(sequences, context + at, 1)? / STEPS as f64)
            })
        })
    }
}

/// Measures everything, for weights in bfloat16 and in integers, and reports it.
///
/// # Errors
/// When the checkpoint does not load or a step fails.
pub(crate) fn measure(
    config: &ModelConfig,
    dir: &Path,
    threads: usize,
    bounds: &Bounds,
    report: &mut Report,
) -> anyhow::Result<Vec<Ours>> {
    report.push(Row::plain(
        "model",
        config.parameters() as f64 / 1e6,
        "Mparam",
    ));
    let bf16 = bounds.bf16_flops.unwrap_or(bounds.f32_flops);
    let int8 = bounds.int8_ops.unwrap_or(bounds.f32_flops);
    [
        (Quantization::None, "bfloat16", bf16, Some(0.6)),
        (Quantization::Int8, "int8", int8, None),
        (Quantization::Int4, "int4", int8, None),
    ]
    .into_iter()
    .map(|(quantization, form, peak, goal)| {
        let of = Form {
            config,
            quantization,
            form,
            dir,
            threads,
        };
        let ours = of.batches(bounds, peak, goal, report)?;
        if quantization == Quantization::None {
            of.contexts(report)?;
        }
        Ok(ours)
    })
    .collect()
}

/// What is measured.
struct Form<'a> {
    config: &'a ModelConfig,
    quantization: Quantization,
    form: &'static str,
    dir: &'a Path,
    threads: usize,
}

impl Form<'_> {
    fn load(&self, length: usize, sequences: usize) -> anyhow::Result<Loaded> {
        let Self {
            config,
            quantization,
            dir,
            threads,
            ..
        } = *self;
        Loaded::new(config, quantization, dir, threads, length, sequences)
    }

    /// Prefill, and decode by batch. `peak` is the rate that prefill is held against.
    fn batches(
        &self,
        bounds: &Bounds,
        peak: f64,
        goal: Option<f64>,
        report: &mut Report,
    ) -> anyhow::Result<Ours> {
        let Self { config, form, .. } = *self;
        let mut loaded = self.load(1024, BATCHES[BATCHES.len() - 1])?;
        let weights = loaded.executor.allocated_bytes().weights as f64;
        let name = format!("load to {form}, page cache warm");
        report.push(Row::plain(&name, weights / loaded.seconds / 1e9, "GB/s"));

        let prefill = PROMPT as f64 / median(|| loaded.step(1, 0, PROMPT))?;
        // Two operations for each active parameter; attention is left out, which is on the safe side.
        let flops = prefill * 2.0 * config.active_parameters() as f64;
        let name = format!("prefill of 512 tokens, {form}");
        report.push(Row::plain(&name, prefill, "tokens/s"));
        let name = format!("prefill, products only, against the peak, {form}");
        report.push(Row::against(
            &name,
            flops / 1e9,
            "GFLOP/s",
            peak / 1e9,
            goal,
        ));

        let mut decode = 0.0;
        for sequences in BATCHES {
            let seconds = loaded.decode(sequences, CONTEXT)?;
            let name = format!("decode of a batch of {sequences}, {form}, context {CONTEXT}");
            report.push(Row::plain(&name, sequences as f64 / seconds, "tokens/s"));
            if sequences == 1 {
                decode = 1.0 / seconds;
                let name = format!("decode of 1 sequence, weights read, against memory, {form}");
                report.push(Row::against(
                    &name,
                    self.bytes_of_a_token() / seconds / 1e9,
                    "GB/s",
                    bounds.read_bytes / 1e9,
                    Some(0.85),
                ));
            }
        }
        Ok(Ours {
            form,
            prefill,
            decode,
        })
    }

    /// Decode of one sequence by context.
    fn contexts(&self, report: &mut Report) -> anyhow::Result<()> {
        let length = self.config.max_positions as usize;
        let mut loaded = self.load(length, 1)?;
        for context in CONTEXTS
            .into_iter()
            .filter(|context| context + STEPS <= length)
        {
            let seconds = loaded.decode(1, context)?;
            let name = format!("decode of 1 sequence, {}, context {context}", self.form);
            report.push(Row::plain(&name, 1.0 / seconds, "tokens/s"));
        }
        Ok(())
    }

    /// Bytes of the weights that a token uses: all but the embedding's other rows and the experts that are not chosen.
    fn bytes_of_a_token(&self) -> f64 {
        let bytes = |config: &ModelConfig| {
            let resident = resident_dtype(Dtype::Auto, self.quantization, config, Device::Cpu);
            weight_bytes_per_rank(config, resident, Device::Cpu, Parallelism::default())
        };
        let mut active = self.config.clone();
        if let Some(moe) = &mut active.moe {
            moe.routed_experts = moe.experts_per_token;
        }
        // One table is the head.
        let embedding = if active.tied_embeddings {
            0
        } else {
            let mut tied = active.clone();
            tied.tied_embeddings = true;
            bytes(&active) - bytes(&tied)
        };
        (bytes(&active) - embedding) as f64
    }
}
