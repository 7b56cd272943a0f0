//! The CPU backend behind [`engine_core::Executor`].

use std::path::Path;

use engine_core::{Batch, BatchBounds, ExecuteError, Executor, Logits};
use engine_load::{Checkpoint, Dummy, LoadError, Progress, TensorSource};
use engine_memory::{MemoryPlan, ResidentDtype};
use engine_model::{Model, forward};
use engine_spec::ModelConfig;

use crate::backend::{CpuBackend, Step};
use crate::cache::Cache;
use crate::compute::Compute;
use crate::kernels::Isa;
use crate::pool::{Pool, available_threads};
use crate::weights::Weights;

/// Sizes that a backend allocates for, once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuLimits {
    /// Dtype of weights and cache.
    pub resident: ResidentDtype,
    /// Blocks of the cache.
    pub kv_blocks: usize,
    /// Positions per block.
    pub block_size: usize,
    /// Positions of a sequence.
    pub model_len_max: usize,
    /// Tokens of a step.
    pub batched_tokens_max: usize,
    /// Logits rows of a step.
    pub sequences_max: usize,
    /// Threads that compute, the calling one included.
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: Isa,
}

impl CpuLimits {
    /// The limits of a plan on this machine: the best instruction set, all threads this process may use.
    pub fn from_plan(plan: &MemoryPlan, max_num_seqs: u32, max_num_batched_tokens: u32) -> Self {
        Self {
            resident: plan.resident,
            kv_blocks: plan.kv_blocks as usize,
            block_size: plan.block_size as usize,
            model_len_max: plan.max_model_len as usize,
            batched_tokens_max: max_num_batched_tokens as usize,
            sequences_max: max_num_seqs as usize,
            threads: available_threads(),
            isa: Isa::best(),
        }
    }
}

/// Bytes that an executor has allocated, to be compared with its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocatedBytes {
    /// Weights.
    pub weights: u64,
    /// Cache.
    pub kv: u64,
    /// Activations. Logits belong to the caller; what threads work in, some hundred kilobytes each, and the slots of a
    /// split context, some megabytes, are not counted.
    pub workspace: u64,
}

/// Runs batches on the CPU.
#[derive(Debug)]
pub struct CpuExecutor {
    model: Model,
    backend: CpuBackend,
    limits: CpuLimits,
    broken: Option<String>,
}

impl CpuExecutor {
    /// Opens the weights in `dir`, checks and converts them, and allocates everything a step needs.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(
        dir: &Path,
        config: &ModelConfig,
        limits: CpuLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = engine_model::build(config);
        let checkpoint = Checkpoint::open(dir, config, &model)?;
        Self::with_weights(model, &checkpoint, limits, progress)
    }

    /// The same with random weights, for benchmarks; see [`Dummy`].
    ///
    /// # Errors
    /// When a thread cannot be started or fails.
    pub fn dummy(
        config: &ModelConfig,
        seed: u64,
        limits: CpuLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = engine_model::build(config);
        Self::with_weights(model, &Dummy::new(config, seed), limits, progress)
    }

    fn with_weights(
        model: Model,
        source: &dyn TensorSource,
        limits: CpuLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let mut pool =
            Pool::new(limits.threads).map_err(|error| LoadError::Backend(error.to_string()))?;
        let weights = Weights::load(source, &model, limits.resident, &mut pool, progress)?;
        let cache = Cache::new(&model, limits.resident, limits.kv_blocks, limits.block_size);
        let compute = Compute {
            pool,
            isa: limits.isa,
        };
        let table = limits.model_len_max.div_ceil(limits.block_size);
        let tokens_max = limits.batched_tokens_max;
        let step = Step::new(tokens_max, limits.sequences_max * table);
        let backend = CpuBackend::new(compute, &model, weights, cache, step, tokens_max);
        Ok(Self {
            model,
            backend,
            limits,
            broken: None,
        })
    }

    /// The limits it was made for.
    pub fn limits(&self) -> &CpuLimits {
        &self.limits
    }

    /// What it holds.
    pub fn allocated_bytes(&self) -> AllocatedBytes {
        AllocatedBytes {
            weights: self.backend.weight_bytes(),
            kv: self.backend.cache_bytes(),
            workspace: self.backend.workspace_bytes(),
        }
    }

    fn bounds(&self) -> BatchBounds {
        let CpuLimits {
            kv_blocks,
            block_size,
            model_len_max,
            batched_tokens_max,
            sequences_max,
            ..
        } = self.limits;
        BatchBounds {
            tokens_max: batched_tokens_max,
            logits_rows_max: sequences_max,
            positions_max: model_len_max,
            block_size,
            blocks: kv_blocks,
            vocabulary: self.model.vocabulary,
        }
    }

    fn prepare(&mut self, batch: &Batch) {
        let step = &mut self.backend.step;
        step.clear();
        for entry in &batch.entries {
            let first = step.blocks.len();
            step.blocks.extend_from_slice(&entry.blocks);
            let table = (first, step.blocks.len());
            for (offset, token) in entry.tokens.iter().enumerate() {
                step.tokens.push(token.0);
                step.positions.push(entry.start + offset);
                step.tables.push(table);
            }
            if entry.wants_logits {
                step.wanted.push(step.tokens.len() as u32 - 1);
            }
        }
    }
}

impl Executor for CpuExecutor {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        if let Some(reason) = &self.broken {
            return Err(ExecuteError::Fatal(reason.clone()));
        }
        logits.reset(self.model.vocabulary, 0);
        if batch.is_empty() {
            return Ok(());
        }
        self.bounds().check(batch)?;
        logits.reset(self.model.vocabulary, batch.logits_rows());
        self.prepare(batch);
        // The backend writes logits in place; it borrows the caller's buffer for the time of the step.
        std::mem::swap(&mut self.backend.step.logits, logits);
        let outcome = forward(&self.model, &mut self.backend);
        std::mem::swap(&mut self.backend.step.logits, logits);
        let problem = match outcome {
            Err(panic) => panic.to_string(),
            Ok(()) if logits.as_mut_slice().iter().all(|value| value.is_finite()) => return Ok(()),
            Ok(()) => {
                "logits are not finite: the weights hold infinities or NaNs, or overflow".into()
            }
        };
        self.broken = Some(problem.clone());
        Err(ExecuteError::Fatal(problem))
    }
}

#[cfg(test)]
mod tests {
    use engine_core::{BatchEntry, BlockId, SequenceId, TokenId};

    use super::*;

    fn executor() -> CpuExecutor {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3-groups");
        let config = engine_load::read_config(&dir).unwrap();
        let limits = CpuLimits {
            resident: ResidentDtype::Float32,
            kv_blocks: 16,
            block_size: 16,
            model_len_max: 256,
            batched_tokens_max: 256,
            sequences_max: 1,
            threads: 2,
            isa: Isa::best(),
        };
        CpuExecutor::load(&dir, &config, limits, &Progress::default()).unwrap()
    }

    fn batch() -> Batch {
        Batch {
            entries: vec![BatchEntry {
                sequence: SequenceId(1),
                tokens: vec![TokenId(3); 200],
                start: 0,
                blocks: (0..16).map(BlockId).collect(),
                wants_logits: true,
            }],
        }
    }

    #[test]
    fn a_panic_on_a_worker_ends_the_step_with_an_error() {
        let mut executor = executor();
        executor.prepare(&batch());
        // As if the step had been assembled wrongly: the last row has no block table.
        executor.backend.step.tables.pop();
        let CpuExecutor { model, backend, .. } = &mut executor;
        let error = forward(model, backend).unwrap_err();
        assert!(error.to_string().contains("out of bounds"), "{error}");
        executor.execute(&batch(), &mut Logits::default()).unwrap();
    }

    #[test]
    fn weights_that_are_not_finite_are_fatal_and_stay_so() {
        let mut executor = executor();
        executor.backend.poison(executor.model.final_norm.weight);
        for _ in 0..2 {
            let error = executor
                .execute(&batch(), &mut Logits::default())
                .unwrap_err();
            assert!(matches!(error, ExecuteError::Fatal(_)), "{error}");
            assert!(error.to_string().contains("not finite"), "{error}");
        }
    }
}
