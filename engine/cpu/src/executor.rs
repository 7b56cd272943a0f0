//! The CPU backend behind [`engine_core::Executor`].

use std::path::Path;
use std::sync::Arc;

use engine_core::{Batch, BatchBounds, DraftBatch, ExecuteError, Executor, Logits, StagedWeights};
use engine_group::{Alone, ProcessGroup};
use engine_load::{Checkpoint, Dummy, LoadError, PACKED_FILE, PackedModel, Progress};
use engine_memory::{MemoryPlan, ResidentDtype};
use engine_model::{Drafting, Model, build_share, forward, forward_to_draft, predict};
use engine_spec::{ModelConfig, Rank};

use crate::backend::{CpuBackend, Step, StepError};
use crate::cache::Cache;
use crate::compute::Compute;
use crate::kernels::Isa;
use crate::packfile;
use crate::pool::{Pool, available_threads};
use crate::trim::return_free_memory;
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
    /// Sequences of a step that want logits.
    pub sequences_max: usize,
    /// Drafts of a sequence in a step; 0 leaves the prediction layer out.
    pub draft_tokens: usize,
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
            draft_tokens: plan.draft_tokens as usize,
            threads: available_threads(),
            isa: Isa::best(),
        }
    }
}

/// Threads that convert weights beside an executor that is serving.
const STAGING_THREADS: usize = 1;

/// Weights beside those in use, and the model that they are for.
struct Staged {
    config: ModelConfig,
    resident: ResidentDtype,
    weights: Weights,
}

impl Drop for Staged {
    fn drop(&mut self) {
        // Of two versions only one is left, and the process must not go on holding memory for two.
        drop(std::mem::take(&mut self.weights));
        return_free_memory();
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
    config: ModelConfig,
    model: Model,
    backend: CpuBackend,
    limits: CpuLimits,
    /// Rows that the last pass left for the prediction layer to go on from.
    rows_left: usize,
    broken: Option<String>,
}

impl CpuExecutor {
    /// Opens the weights in `dir` and allocates everything a step needs. Packed weights are mapped as they are; those of
    /// a checkpoint are checked and converted.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load(
        dir: &Path,
        config: &ModelConfig,
        limits: CpuLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        Self::load_share(dir, config, limits, Arc::new(Alone), progress)
    }

    /// The same as one of the ranks of `group`, with its share of the weights. All ranks must then be given the same
    /// batches in the same order; rank 0 gets the logits.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn load_share(
        dir: &Path,
        config: &ModelConfig,
        limits: CpuLimits,
        group: Arc<dyn ProcessGroup>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = build(config, &limits, group.rank());
        let mut pool = pool(limits.threads)?;
        let weights = read(dir, config, &model, limits.resident, &mut pool, progress)?;
        Ok(Self::new(config, group, model, weights, pool, limits))
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
        Self::dummy_share(config, seed, limits, Arc::new(Alone), progress)
    }

    /// The same as one of the ranks of `group`; see [`Self::load_share`].
    ///
    /// # Errors
    /// When a thread cannot be started or fails.
    pub fn dummy_share(
        config: &ModelConfig,
        seed: u64,
        limits: CpuLimits,
        group: Arc<dyn ProcessGroup>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = build(config, &limits, group.rank());
        let mut pool = pool(limits.threads)?;
        let source = Dummy::new(config, seed);
        let weights = Weights::load(&source, &model, limits.resident, &mut pool, progress)?;
        Ok(Self::new(config, group, model, weights, pool, limits))
    }

    /// Loads other weights of the same model beside those that an executor of these limits has in use; see
    /// [`Executor::exchange_weights`]. Takes as much memory again as the weights in use.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn stage(
        dir: &Path,
        config: &ModelConfig,
        limits: &CpuLimits,
        progress: &Progress,
    ) -> Result<StagedWeights, LoadError> {
        let model = build(config, limits, Rank::ALONE);
        let mut pool = pool(STAGING_THREADS)?;
        let weights = read(dir, config, &model, limits.resident, &mut pool, progress)?;
        return_free_memory();
        Ok(StagedWeights(Box::new(Staged {
            config: config.clone(),
            resident: limits.resident,
            weights,
        })))
    }

    fn new(
        config: &ModelConfig,
        group: Arc<dyn ProcessGroup>,
        model: Model,
        weights: Weights,
        pool: Pool,
        limits: CpuLimits,
    ) -> Self {
        return_free_memory();
        let mut cache = Cache::new(&model, limits.resident, limits.kv_blocks, limits.block_size);
        cache.commit(limits.threads);
        let compute = Compute::new(pool, limits.isa, &weights);
        let table = limits.model_len_max.div_ceil(limits.block_size);
        let tokens_max = limits.batched_tokens_max;
        let step = Step::new(tokens_max, limits.sequences_max * table);
        let backend = CpuBackend::new(compute, group, &model, weights, cache, step, tokens_max);
        Self {
            config: config.clone(),
            model,
            backend,
            limits,
            rows_left: 0,
            broken: None,
        }
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
            draft_tokens,
            ..
        } = self.limits;
        BatchBounds {
            tokens_max: batched_tokens_max,
            logits_rows_max: sequences_max * (1 + draft_tokens),
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
            let end = step.tokens.len();
            let wanted = end - entry.logits_rows()..end;
            step.wanted.extend(wanted.map(|row| row as u32));
        }
    }
}

/// The weights in `dir`: mapped where they are packed, converted where they are a checkpoint.
fn read(
    dir: &Path,
    config: &ModelConfig,
    model: &Model,
    resident: ResidentDtype,
    pool: &mut Pool,
    progress: &Progress,
) -> Result<Weights, LoadError> {
    let packed = dir.join(PACKED_FILE);
    if packed.is_file() && !model.rank.is_alone() {
        return Err(LoadError::Backend(format!(
            "{} holds the weights of a whole model, of which a rank cannot take its share; serve it in one rank, or give \
             the ranks the files that it was packed from",
            packed.display()
        )));
    }
    if packed.is_file() {
        let packed = PackedModel::open(&packed)?;
        let weights = packfile::open(&packed, config, model, resident)?;
        progress.begin(packed.bytes());
        progress.add(packed.bytes());
        return Ok(weights);
    }
    let checkpoint = Checkpoint::open(dir, config, model)?;
    Weights::load(&checkpoint, model, resident, pool, progress)
}

fn pool(threads: usize) -> Result<Pool, LoadError> {
    Pool::new(threads).map_err(|error| LoadError::Backend(error.to_string()))
}

/// Writes the weights of the checkpoint in `dir` to `path`, a packed file that [`CpuExecutor::load`] maps. `config` is
/// that of the directory in which the packed file will be.
///
/// # Errors
/// See [`LoadError`].
pub fn pack(
    dir: &Path,
    path: &Path,
    config: &ModelConfig,
    resident: ResidentDtype,
    progress: &Progress,
) -> Result<(), LoadError> {
    // With the prediction layer where the files have it, so that drafts remain a choice of who serves.
    let drafting = engine_model::build_to_draft(config);
    let (model, checkpoint) = match Checkpoint::open(dir, config, &drafting) {
        Ok(checkpoint) => (drafting, checkpoint),
        // Whatever else is wrong with the files is an error, a layer of which a part is missing too.
        Err(LoadError::NoPredictionLayer(_)) => {
            let model = engine_model::build(config);
            let checkpoint = Checkpoint::open(dir, config, &model)?;
            (model, checkpoint)
        }
        Err(error) => return Err(error),
    };
    let mut pool = pool(available_threads())?;
    let weights = packfile::Unpacked {
        config,
        model: &model,
        source: &checkpoint,
        dtype: resident,
    };
    packfile::write(path, weights, &mut pool, progress)
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
        self.rows_left = 0;
        self.compute(logits, |model, backend| match model.prediction {
            Some(_) => forward_to_draft(model, backend),
            None => forward(model, backend),
        })?;
        self.rows_left = batch.token_count();
        Ok(())
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        if let Some(reason) = &self.broken {
            return Err(ExecuteError::Fatal(reason.clone()));
        }
        if self.model.prediction.is_none() {
            let problem = "this model was loaded without its prediction layer".to_owned();
            return Err(ExecuteError::InvalidBatch(problem));
        }
        logits.reset(self.model.vocabulary, 0);
        if pass.batch.is_empty() {
            return Ok(());
        }
        self.bounds().check(&pass.batch)?;
        pass.check(self.rows_left)?;
        let rows = pass.batch.logits_rows();
        logits.reset(self.model.vocabulary, rows);
        self.prepare(&pass.batch);
        for (entry, first) in pass.batch.entries.iter().zip(&pass.rows) {
            let sources = *first..first + entry.tokens.len();
            let step = &mut self.backend.step;
            step.sources.extend(sources.map(|row| row as u32));
        }
        self.rows_left = 0;
        self.compute(logits, |model, backend| match &model.prediction {
            Some(prediction) => predict(model, prediction, backend),
            None => Ok(()),
        })?;
        self.rows_left = rows;
        Ok(())
    }

    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        let mut staged = staged.0.downcast::<Staged>().map_err(StagedWeights)?;
        let is_whole = self.model.rank.is_alone();
        if !is_whole || staged.config != self.config || staged.resident != self.limits.resident {
            return Err(StagedWeights(staged));
        }
        self.backend.exchange_weights(&mut staged.weights);
        // Weights that made logits infinite are gone, or come back with the fault.
        self.broken = None;
        Ok(StagedWeights(staged))
    }
}

/// The rank's share of the model, with its prediction layer when drafts are asked for.
fn build(config: &ModelConfig, limits: &CpuLimits, rank: Rank) -> Model {
    let drafting = match limits.draft_tokens {
        0 => Drafting::Off,
        _ => Drafting::On,
    };
    build_share(config, drafting, rank)
}

impl CpuExecutor {
    /// Runs a prepared pass.
    fn compute(
        &mut self,
        logits: &mut Logits,
        pass: impl FnOnce(&Model, &mut CpuBackend) -> Result<(), StepError>,
    ) -> Result<(), ExecuteError> {
        // The backend writes logits in place; it borrows the caller's buffer for the time of the step.
        std::mem::swap(&mut self.backend.step.logits, logits);
        let outcome = pass(&self.model, &mut self.backend);
        std::mem::swap(&mut self.backend.step.logits, logits);
        let problem = match outcome {
            Err(error) => error.to_string(),
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
            draft_tokens: 0,
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
                drafts: 0,
            }],
        }
    }

    #[test]
    fn exchanged_weights_compute_what_an_executor_of_their_own_does() {
        let mut executor = executor();
        let row = |executor: &mut CpuExecutor| {
            let mut logits = Logits::default();
            executor.execute(&batch(), &mut logits).unwrap();
            logits.row(0).to_vec()
        };
        let before = row(&mut executor);
        let stage = |config: &ModelConfig, limits: &CpuLimits| {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v3-groups");
            CpuExecutor::stage(&dir, config, limits, &Progress::default()).unwrap()
        };
        let (config, limits) = (executor.config.clone(), executor.limits);
        let mut other = stage(&config, &limits);
        let weights = &mut other.0.downcast_mut::<Staged>().unwrap().weights;
        weights.poison(executor.model.final_norm.weight);
        let good = executor.exchange_weights(other).unwrap();
        let error = executor.execute(&batch(), &mut Logits::default());
        assert!(matches!(error, Err(ExecuteError::Fatal(_))));
        executor.exchange_weights(good).unwrap();
        assert_eq!(row(&mut executor), before);
        // Weights of another dtype, and what is no weights of this backend, are given back.
        let narrow = CpuLimits {
            resident: ResidentDtype::Bfloat16,
            ..limits
        };
        assert!(executor.exchange_weights(stage(&config, &narrow)).is_err());
        assert!(
            executor
                .exchange_weights(StagedWeights(Box::new(7)))
                .is_err()
        );
        assert_eq!(row(&mut executor), before);
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
