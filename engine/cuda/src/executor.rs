//! The CUDA backend behind [`engine_core::Executor`].

use std::path::Path;
use std::sync::Arc;

use engine_core::{
    Batch, BatchBounds, DraftBatch, ExecuteError, Executor, Logits, PickRow, Picked, Picker,
    StagedWeights,
};
use engine_group::{Alone, ProcessGroup};
use engine_load::{Checkpoint, Dummy, LoadError, Progress, TensorSource};
use engine_memory::ResidentDtype;
use engine_model::{Model, forward, forward_to_draft, predict};
use engine_spec::{ModelConfig, Rank};
use kernels::driver::{Arena, Device, Part, Stream};
use kernels::plan::{self, Unsupported};

use crate::exchange::Exchange;
use crate::graphs::{GraphKey, Graphs, PassKind};
use crate::layout::{CudaLimits, Layout, Span};
use crate::pass::Pass;
use crate::picking::{Picking, Place};
use crate::shapes::{check_shapes, refusal};
use crate::staged::Staged;
use crate::step::{Inputs, Step};
use crate::{ChosenAttention, CudaError, Gpu, Products, attention, weights};

/// Of a pass.
const NOT_FINITE: &str = "logits are not finite: the weights hold infinities or NaNs, or overflow";

/// Bytes that an executor uses of its one allocation, to be compared with its plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AllocatedBytes {
    /// Weights.
    pub weights: u64,
    /// Cache.
    pub kv: u64,
    /// Activations, logits, inputs.
    pub workspace: u64,
}

/// Runs batches on one GPU, as the only rank or as one of several.
#[derive(Debug)]
pub struct CudaExecutor {
    config: ModelConfig,
    model: Model,
    limits: CudaLimits,
    layout: Layout,
    graphs: Graphs,
    inputs: Inputs,
    logits: Part,
    whole: Part,
    step: Step,
    /// Places of the rows that the last pass left for the prediction layer to go on from, as its batch counts them.
    left: Vec<u32>,
    /// Logits rows that the last pass left.
    logits_left: usize,
    picking: Picking,
    /// Where there are other ranks.
    exchange: Option<Exchange>,
    stream: Stream,
    arena: Arena,
    device: Arc<Device>,
    attention: ChosenAttention,
    products: Products,
    broken: Option<Broken>,
}

/// Why no further step is run.
#[derive(Debug)]
enum Broken {
    /// The weights gave logits that are not finite; others may not.
    Weights(String),
    /// The device is lost, or what is in its memory is of no version.
    Device(String),
}

impl Broken {
    fn fatal(&self) -> ExecuteError {
        let (Self::Weights(reason) | Self::Device(reason)) = self;
        ExecuteError::Fatal(reason.clone())
    }
}

impl CudaExecutor {
    /// Whether the kernels take every shape of a rank's share of a model.
    ///
    /// # Errors
    /// The first shape that they do not take.
    pub fn check(config: &ModelConfig, limits: &CudaLimits, rank: Rank) -> Result<(), Unsupported> {
        check_shapes(&limits.build(config, rank), limits).map(|_| ())
    }

    /// Opens the weights in `dir`, checks them and the model's shapes, allocates everything at once and copies the weights.
    ///
    /// # Errors
    /// See [`LoadError`]; what the GPU refuses or fails at is [`LoadError::Backend`].
    pub fn load(
        gpu: &Gpu,
        dir: &Path,
        config: &ModelConfig,
        limits: CudaLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        Self::load_share(gpu, dir, config, limits, Arc::new(Alone), progress)
    }

    /// The same for the share of the model that is this rank's of `group`.
    ///
    /// # Errors
    /// See [`CudaExecutor::load`].
    pub fn load_share(
        gpu: &Gpu,
        dir: &Path,
        config: &ModelConfig,
        limits: CudaLimits,
        group: Arc<dyn ProcessGroup>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = limits.build(config, group.rank());
        // Shapes first: what no kernel takes needs no files.
        check_shapes(&model, &limits).map_err(|reason| LoadError::Backend(refusal(&reason)))?;
        let checkpoint = Checkpoint::open(dir, config, &model)?;
        Self::with_weights(gpu, (config, model), &checkpoint, limits, group, progress)
    }

    /// The same with random weights, for benchmarks; see [`Dummy`].
    ///
    /// # Errors
    /// See [`CudaExecutor::load`].
    pub fn dummy(
        gpu: &Gpu,
        config: &ModelConfig,
        seed: u64,
        limits: CudaLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        Self::dummy_share(gpu, config, seed, limits, Arc::new(Alone), progress)
    }

    /// The same for the share that is this rank's of `group`.
    ///
    /// # Errors
    /// See [`CudaExecutor::load`].
    pub fn dummy_share(
        gpu: &Gpu,
        config: &ModelConfig,
        seed: u64,
        limits: CudaLimits,
        group: Arc<dyn ProcessGroup>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let model = limits.build(config, group.rank());
        let weights = Dummy::new(config, seed);
        Self::with_weights(gpu, (config, model), &weights, limits, group, progress)
    }

    /// Reads other weights of the same model into host memory, for an executor of these limits that has its own in use;
    /// see [`Executor::exchange_weights`]. Takes as much host memory as the weights take on the device.
    ///
    /// # Errors
    /// See [`LoadError`].
    pub fn stage(
        dir: &Path,
        config: &ModelConfig,
        limits: &CudaLimits,
        progress: &Progress,
    ) -> Result<StagedWeights, LoadError> {
        let model = limits.build(config, Rank::ALONE);
        let layout = Layout::new(&model, limits);
        let staged = Staged::read(dir, config, &model, &layout, limits.resident, progress)?;
        Ok(StagedWeights(Box::new(staged)))
    }

    fn with_weights(
        gpu: &Gpu,
        (config, model): (&ModelConfig, Model),
        source: &dyn TensorSource,
        limits: CudaLimits,
        group: Arc<dyn ProcessGroup>,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let refused = |reason| LoadError::Backend(refusal(&reason));
        let mut launches = check_shapes(&model, &limits).map_err(refused)?;
        let chosen = attention::choose(gpu, &model, limits.kv_cache).map_err(backend)?;
        launches.extend(attention::launches(chosen.kernels, &model, &limits).map_err(refused)?);
        let layout = Layout::new(&model, &limits);
        let (needed, free) = (layout.bytes() as u64, gpu.free_bytes().map_err(backend)?);
        if needed > free {
            return Err(LoadError::Backend(format!(
                "weights, cache and workspace take {needed} bytes, but {free} bytes of {} are free; \
                 end what else uses it, or ask for a shorter context or fewer sequences",
                gpu.name()
            )));
        }
        gpu.device.load(&launches).map_err(backend)?;
        let products = gpu.products.kernels();
        gpu.device.load(&products).map_err(backend)?;
        let executor =
            Self::allocate(gpu, (config, model), limits, layout, chosen, group).map_err(backend)?;
        let Self {
            model,
            layout,
            arena,
            ..
        } = &executor;
        weights::load(&gpu.device, arena, layout, source, model, progress)?;
        Ok(executor)
    }

    fn allocate(
        gpu: &Gpu,
        (config, model): (&ModelConfig, Model),
        limits: CudaLimits,
        layout: Layout,
        attention: ChosenAttention,
        group: Arc<dyn ProcessGroup>,
    ) -> Result<Self, CudaError> {
        let arena = Arena::new(&gpu.device, layout.bytes())?;
        let stream = gpu.device.stream()?;
        let part = |span: Span| arena.part(span.at, span.bytes);
        let buffers = &layout.buffers;
        let inputs = Inputs {
            tokens: part(buffers.tokens)?,
            positions: part(buffers.positions)?,
            lengths: part(buffers.lengths)?,
            cache_rows: part(buffers.cache_rows)?,
            wanted: part(buffers.wanted)?,
            tables: part(buffers.tables)?,
            sources: part(buffers.sources)?,
        };
        let width = model.rope.width();
        let mut rotary = vec![0f32; limits.model_len_max * width];
        for (position, row) in rotary.chunks_exact_mut(width.max(1)).enumerate() {
            model.rope.fill(position, row);
        }
        arena.write(&stream, part(buffers.rotary)?, &rotary)?;
        arena.fill(&stream, part(buffers.tickets)?, 0)?;
        stream.synchronize()?;
        let longest = layout.exchanged_row_bytes(&limits, model.vocabulary);
        let exchange = Exchange::new(gpu, group, (&arena, &stream), buffers.exchange, longest)?;
        Ok(Self {
            inputs,
            logits: part(buffers.logits)?,
            whole: arena.part(0, arena.bytes())?,
            step: Step::new(
                limits.block_size,
                limits.table_length(),
                limits.draft_tokens,
            ),
            left: Vec::new(),
            logits_left: 0,
            picking: Picking::default(),
            exchange,
            graphs: Graphs::new(),
            config: config.clone(),
            model,
            limits,
            layout,
            stream,
            arena,
            device: gpu.device.clone(),
            attention,
            products: gpu.products,
            broken: None,
        })
    }

    /// The limits it was made for.
    pub fn limits(&self) -> &CudaLimits {
        &self.limits
    }

    /// The kernels of its latent attention.
    pub fn attention(&self) -> &ChosenAttention {
        &self.attention
    }

    /// How it exchanges with other ranks, and why; none where there are none.
    pub fn exchange(&self) -> Option<&str> {
        self.exchange.as_ref().map(Exchange::reason)
    }

    /// What it holds.
    pub fn allocated_bytes(&self) -> AllocatedBytes {
        AllocatedBytes {
            weights: self.layout.weights_bytes as u64,
            kv: self.layout.cache_bytes as u64,
            workspace: self.layout.workspace_bytes as u64,
        }
    }

    /// Recorded decode steps so far.
    pub fn graphs(&self) -> usize {
        self.graphs.len()
    }

    fn bounds(&self) -> BatchBounds {
        let CudaLimits {
            kv_blocks,
            block_size,
            model_len_max,
            batched_tokens_max,
            ..
        } = self.limits;
        BatchBounds {
            tokens_max: batched_tokens_max,
            logits_rows_max: self.limits.sampled_max(),
            positions_max: model_len_max,
            block_size,
            blocks: kv_blocks,
            vocabulary: self.model.vocabulary,
        }
    }

    fn check_batch(&self, batch: &Batch) -> Result<(), ExecuteError> {
        self.bounds().check(batch)?;
        // Each has a block table on the device, whether or not it wants logits.
        let (entries, limit) = (batch.entries.len(), self.limits.sequences_max);
        if entries > limit {
            let problem = format!("{entries} sequences, the limit is {limit}");
            return Err(ExecuteError::InvalidBatch(problem));
        }
        Ok(())
    }

    /// Copies the inputs and queues the pass or replays it.
    fn queue(&mut self, kind: PassKind) -> Result<(), CudaError> {
        let is_recorded = match kind {
            PassKind::Step => self.step.is_decode(),
            PassKind::Draft => self.step.is_one_run(),
        };
        let mut key = None;
        // What goes through host memory is no work of the stream's, and no graph waits for it.
        let is_queued = self.exchange.as_ref().is_none_or(Exchange::is_queued);
        if self.limits.graphs && is_recorded && is_queued {
            let splits = self.step.runs.first().map_or(1, |run| run.splits);
            let (rows, wanted) = (self.step.rows(), self.step.wanted.len());
            let shape = GraphKey::of(kind, rows, wanted, splits, &self.limits);
            self.step.pad(shape.rows, shape.splits);
            match kind {
                PassKind::Step => self.step.wanted = (0..shape.rows as u32).collect(),
                PassKind::Draft => self.step.pad_wanted(shape.wanted),
            }
            key = Some(shape);
        }
        let first_token = self.model.tensors[self.model.embedding.index()].share;
        let first_token = first_token.map_or(0, |share| share.first as u32);
        self.step
            .upload(&self.arena, &self.stream, &self.inputs, first_token)?;
        match key {
            None => self.pass(kind)?,
            Some(key) => {
                if !self.graphs.contains_key(&key) {
                    let graph = self.arena.capture(&self.stream, || self.pass(kind))?;
                    self.graphs.insert(key, graph);
                }
                if let Some(graph) = self.graphs.get(&key) {
                    self.arena.replay(&self.stream, graph)?;
                }
            }
        }
        Ok(())
    }

    /// Queues all kernels of the step.
    fn pass(&self, kind: PassKind) -> Result<(), CudaError> {
        let step = &self.step;
        let mut pass = Pass {
            arena: &self.arena,
            stream: &self.stream,
            products: self.products,
            layout: &self.layout,
            base: self.whole.address(),
            rows: step.rows(),
            tokens: &step.tokens,
            exchange: self.exchange.as_ref(),
            runs: &step.runs,
            wanted: step.wanted.len(),
            all_wanted: kind == PassKind::Step && step.is_decode(),
            block_size: self.limits.block_size,
            table_length: step.table_length(),
            positions_max: self.limits.model_len_max,
            attention: self.attention.kernels,
            power_of_two: match self.limits.resident {
                ResidentDtype::Float8E4m3(blocks) => blocks.power_of_two,
                ResidentDtype::Bfloat16 | ResidentDtype::Float32 | ResidentDtype::Integer(..) => {
                    false
                }
            },
            pending: None,
            quantised: None,
        };
        match (kind, &self.model.prediction) {
            (PassKind::Step, None) => forward(&self.model, &mut pass),
            (PassKind::Step, Some(_)) => forward_to_draft(&self.model, &mut pass),
            (PassKind::Draft, Some(prediction)) => predict(&self.model, prediction, &mut pass),
            (PassKind::Draft, None) => Err(CudaError::Graph("no prediction layer")),
        }
    }

    /// Runs a prepared pass; a failure is for ever.
    fn run(&mut self, kind: PassKind, logits: Option<&mut Logits>) -> Result<(), ExecuteError> {
        let wanted = self.step.wanted.len();
        let queued = self.queue(kind).and_then(|()| match &self.exchange {
            Some(exchange) => exchange.settle(&self.stream),
            None => Ok(()),
        });
        // The other ranks have some columns of the logits only, for rank 0.
        let logits = logits.filter(|_| self.model.rank.is_leader());
        let done = match logits {
            Some(logits) => queued.and_then(|()| {
                let values = logits.as_mut_slice();
                self.arena.read(&self.stream, self.logits, values)?;
                Ok(values.iter().all(|value| value.is_finite()))
            }),
            // Whoever picks waits; without rows nobody does.
            None if wanted > 0 && self.model.rank.is_leader() => queued.map(|()| true),
            None => queued.and_then(|()| {
                self.stream.synchronize()?;
                Ok(true)
            }),
        };
        let broken = match done {
            Ok(true) => return Ok(()),
            Ok(false) => Broken::Weights(NOT_FINITE.to_owned()),
            Err(error) => Broken::Device(error.to_string()),
        };
        Err(self.fail(broken))
    }

    fn fail(&mut self, broken: Broken) -> ExecuteError {
        let error = broken.fatal();
        if let (Some(exchange), Broken::Device(reason)) = (&self.exchange, &broken) {
            exchange.leave(reason);
        }
        self.broken = Some(broken);
        error
    }

    /// Checks a batch and runs it; its logits stay where `logits` is none.
    fn run_step(
        &mut self,
        batch: &Batch,
        mut logits: Option<&mut Logits>,
    ) -> Result<(), ExecuteError> {
        self.begin(logits.as_deref_mut())?;
        if batch.is_empty() {
            return Ok(());
        }
        self.check_batch(batch)?;
        let rows = batch.logits_rows();
        if let Some(logits) = &mut logits {
            logits.reset(self.model.vocabulary, rows);
        }
        self.step.prepare(batch);
        self.left.clear();
        self.run(PassKind::Step, logits)?;
        self.left.extend_from_slice(&self.step.row_of);
        self.logits_left = rows;
        Ok(())
    }

    /// The same for a pass of the prediction layer.
    fn run_draft(
        &mut self,
        pass: &DraftBatch,
        mut logits: Option<&mut Logits>,
    ) -> Result<(), ExecuteError> {
        self.begin(logits.as_deref_mut())?;
        if self.model.prediction.is_none() {
            let problem = "this model was loaded without its prediction layer".to_owned();
            return Err(ExecuteError::InvalidBatch(problem));
        }
        if pass.batch.is_empty() {
            return Ok(());
        }
        self.check_batch(&pass.batch)?;
        pass.check(self.left.len())?;
        let rows = pass.batch.logits_rows();
        if let Some(logits) = &mut logits {
            logits.reset(self.model.vocabulary, rows);
        }
        self.step.prepare_draft(pass, &self.left);
        self.left.clear();
        self.run(PassKind::Draft, logits)?;
        self.left.extend(0..rows as u32);
        self.logits_left = rows;
        Ok(())
    }

    fn begin(&mut self, logits: Option<&mut Logits>) -> Result<(), ExecuteError> {
        self.logits_left = 0;
        if let Some(broken) = &self.broken {
            return Err(broken.fatal());
        }
        if let Some(logits) = logits {
            logits.reset(self.model.vocabulary, 0);
        }
        Ok(())
    }
}

impl Picker for CudaExecutor {
    fn compute(&mut self, batch: &Batch) -> Result<(), ExecuteError> {
        self.run_step(batch, None)
    }

    fn compute_draft(&mut self, pass: &DraftBatch) -> Result<(), ExecuteError> {
        self.run_draft(pass, None)
    }

    fn pick(&mut self, rows: &[PickRow<'_>], picked: &mut Vec<Picked>) -> Result<(), ExecuteError> {
        if let Some(broken) = &self.broken {
            return Err(broken.fatal());
        }
        let words = plan::mask_words(self.model.vocabulary);
        let fits = |row: &PickRow<'_>| {
            row.row < self.logits_left
                && row.position() <= self.limits.model_len_max
                && row.prompt_len <= row.tokens.len()
                && row.allowed.is_none_or(|bits| bits.len() >= words)
        };
        if let Some(row) = rows.iter().find(|row| !fits(row)) {
            return Err(ExecuteError::InvalidBatch(format!(
                "row {} of {}, position {}: no token can be picked there",
                row.row,
                self.logits_left,
                row.position()
            )));
        }
        let place = Place {
            arena: &self.arena,
            stream: &self.stream,
            layout: &self.layout,
            base: self.whole.address(),
            vocabulary: self.model.vocabulary,
            limits: &self.limits,
        };
        let broken = match self.picking.pick(&place, rows, picked) {
            Ok(None) => return Ok(()),
            Ok(Some(token)) => Broken::Weights(format!("{NOT_FINITE} (token {token})")),
            Err(error) => Broken::Device(error.to_string()),
        };
        Err(self.fail(broken))
    }
}

fn backend(error: impl Into<CudaError>) -> LoadError {
    LoadError::Backend(error.into().to_string())
}

impl Executor for CudaExecutor {
    fn vocabulary(&self) -> usize {
        self.model.vocabulary
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.run_step(batch, Some(logits))
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        self.run_draft(pass, Some(logits))
    }

    fn picker(&mut self) -> Option<&mut dyn Picker> {
        Some(self)
    }

    /// Swaps the bytes on the device with those in host memory; see [`crate::staged`]. A device that fails on the way is
    /// lost to both versions: every step after it is refused, and so are further weights.
    fn exchange_weights(&mut self, staged: StagedWeights) -> Result<StagedWeights, StagedWeights> {
        let mut staged = staged.0.downcast::<Staged>().map_err(StagedWeights)?;
        let fits = staged.config == self.config
            && staged.resident == self.limits.resident
            && self.exchange.is_none();
        if !fits || matches!(self.broken, Some(Broken::Device(_))) {
            return Err(StagedWeights(staged));
        }
        let swapped = staged.swap(&self.device, &self.arena);
        // Weights that made logits infinite are gone, or come back with the fault.
        self.broken = swapped.err().map(|error| {
            Broken::Device(format!(
                "the weights could not be exchanged, neither version is whole: {error}"
            ))
        });
        Ok(StagedWeights(staged))
    }
}
