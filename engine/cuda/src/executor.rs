//! The CUDA backend behind [`engine_core::Executor`].

use std::path::Path;

use engine_core::{Batch, BatchBounds, ExecuteError, Executor, Logits};
use engine_load::{Checkpoint, Dummy, LoadError, Progress, TensorSource};
use engine_memory::ResidentDtype;
use engine_model::{Model, forward};
use engine_spec::ModelConfig;
use kernels::driver::{Arena, DriverError, Part, Stream};
use kernels::plan::Unsupported;

use crate::graphs::{GraphKey, Graphs};
use crate::layout::{CudaLimits, Layout, Span};
use crate::pass::Pass;
use crate::shapes::{check_shapes, refusal};
use crate::step::{Inputs, Step};
use crate::{CudaError, Gpu, Products, weights};

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

/// Runs batches on one GPU.
#[derive(Debug)]
pub struct CudaExecutor {
    model: Model,
    limits: CudaLimits,
    layout: Layout,
    graphs: Graphs,
    inputs: Inputs,
    logits: Part,
    whole: Part,
    step: Step,
    stream: Stream,
    arena: Arena,
    products: Products,
    broken: Option<String>,
}

impl CudaExecutor {
    /// Whether the kernels take every shape of a model.
    ///
    /// # Errors
    /// The first shape that they do not take.
    pub fn check(config: &ModelConfig, limits: &CudaLimits) -> Result<(), Unsupported> {
        check_shapes(&engine_model::build(config), limits).map(|_| ())
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
        let model = engine_model::build(config);
        // Shapes first: what no kernel takes needs no files.
        check_shapes(&model, &limits).map_err(|reason| LoadError::Backend(refusal(&reason)))?;
        let checkpoint = Checkpoint::open(dir, config, &model)?;
        Self::with_weights(gpu, model, &checkpoint, limits, progress)
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
        let model = engine_model::build(config);
        Self::with_weights(gpu, model, &Dummy::new(config, seed), limits, progress)
    }

    fn with_weights(
        gpu: &Gpu,
        model: Model,
        source: &dyn TensorSource,
        limits: CudaLimits,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let launches =
            check_shapes(&model, &limits).map_err(|reason| LoadError::Backend(refusal(&reason)))?;
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
        let executor = Self::allocate(gpu, model, limits, layout).map_err(backend)?;
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
        model: Model,
        limits: CudaLimits,
        layout: Layout,
    ) -> Result<Self, DriverError> {
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
        };
        let width = model.rope.width();
        let mut rotary = vec![0f32; limits.model_len_max * width];
        for (position, row) in rotary.chunks_exact_mut(width.max(1)).enumerate() {
            model.rope.fill(position, row);
        }
        arena.write(&stream, part(buffers.rotary)?, &rotary)?;
        arena.fill(&stream, part(buffers.tickets)?, 0)?;
        stream.synchronize()?;
        Ok(Self {
            inputs,
            logits: part(buffers.logits)?,
            whole: arena.part(0, arena.bytes())?,
            step: Step::new(limits.block_size, limits.table_length()),
            graphs: Graphs::new(),
            model,
            limits,
            layout,
            stream,
            arena,
            products: gpu.products,
            broken: None,
        })
    }

    /// The limits it was made for.
    pub fn limits(&self) -> &CudaLimits {
        &self.limits
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

    fn check_batch(&self, batch: &Batch) -> Result<(), ExecuteError> {
        self.bounds().check(batch)?;
        if batch.entries.iter().any(|entry| entry.drafts > 0) {
            let problem = "drafts are not verified on the GPU".to_owned();
            return Err(ExecuteError::InvalidBatch(problem));
        }
        // Each has a block table on the device, whether or not it wants logits.
        let (entries, limit) = (batch.entries.len(), self.limits.sequences_max);
        if entries > limit {
            let problem = format!("{entries} sequences, the limit is {limit}");
            return Err(ExecuteError::InvalidBatch(problem));
        }
        Ok(())
    }

    /// Copies the inputs, queues the pass or replays it, and reads the logits.
    fn compute(&mut self, rows: usize, logits: &mut Logits) -> Result<(), CudaError> {
        let mut key = None;
        if self.limits.graphs && self.step.is_decode() {
            let splits = self.step.runs.first().map_or(1, |run| run.splits);
            let shape = GraphKey::of(self.step.rows(), splits, &self.limits);
            self.step.pad(shape.rows, shape.splits);
            key = Some(shape);
        }
        self.step.upload(&self.arena, &self.stream, &self.inputs)?;
        match key {
            None => self.pass()?,
            Some(key) => {
                if !self.graphs.contains_key(&key) {
                    let graph = self.arena.capture(&self.stream, || self.pass())?;
                    self.graphs.insert(key, graph);
                }
                if let Some(graph) = self.graphs.get(&key) {
                    self.arena.replay(&self.stream, graph)?;
                }
            }
        }
        let values = logits.as_mut_slice();
        debug_assert_eq!(values.len(), rows * self.model.vocabulary);
        self.arena.read(&self.stream, self.logits, values)?;
        Ok(())
    }

    /// Queues all kernels of the step.
    fn pass(&self) -> Result<(), CudaError> {
        let step = &self.step;
        let mut pass = Pass {
            arena: &self.arena,
            stream: &self.stream,
            products: self.products,
            layout: &self.layout,
            base: self.whole.address(),
            rows: step.rows(),
            runs: &step.runs,
            wanted: step.wanted.len(),
            all_wanted: step.is_decode(),
            block_size: self.limits.block_size,
            table_length: step.table_length(),
            positions_max: self.limits.model_len_max,
            power_of_two: match self.limits.resident {
                ResidentDtype::Float8E4m3(blocks) => blocks.power_of_two,
                ResidentDtype::Bfloat16 | ResidentDtype::Float32 | ResidentDtype::Integer(..) => {
                    false
                }
            },
            pending: None,
            quantised: None,
        };
        forward(&self.model, &mut pass)
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
        if let Some(reason) = &self.broken {
            return Err(ExecuteError::Fatal(reason.clone()));
        }
        logits.reset(self.model.vocabulary, 0);
        if batch.is_empty() {
            return Ok(());
        }
        self.check_batch(batch)?;
        let rows = batch.logits_rows();
        logits.reset(self.model.vocabulary, rows);
        self.step.prepare(batch);
        let problem = match self.compute(rows, logits) {
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
