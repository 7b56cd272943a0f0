//! The CPU's implementation of [`engine_model::Backend`].
//!
//! Invariant: buffers are allocated once, for the largest step; a step only fills a prefix of each. The rows of a step
//! are its tokens in batch order. All caches are written before any row of a layer attends, so a token of a chunk sees
//! its predecessors in the same chunk in the same rounded form in which a later step would.
//!
//! Surprise: activations are rounded to bfloat16 once, where they are, by the first product with packed weights that
//! reads them. What needs them in float32 comes before; a buffer knows in which form it is, and reading it in the other
//! is a panic.

#![allow(unsafe_code)]

mod attend;
mod attention;
mod exchange;
mod grouped;
mod moe;
mod prediction;

use std::sync::Arc;

use engine_core::{BlockId, Logits};
use engine_group::{Columns, Owners, ProcessGroup};
use engine_model::{
    Attention, Backend, Gate, GatedMlp, GroupedAttention, KvLayout, LatentAttention, Mlp, Model,
    Moe, Norm, Rope, RowShare, Slot, WeightId,
};
use engine_spec::Rank;

use self::attend::Attending;
pub(crate) use self::exchange::StepError;
use self::exchange::bytes_of;
use self::moe::Chosen;
use crate::cache::Cache;
use crate::compute::{Area, Compute, Gated, Job, Shared};
use crate::kernels::{AddScaled, RmsNorm, Rows};
use crate::pool::WorkerPanic;
use crate::weights::Weights;

/// Values of an elementwise task.
const SPAN: usize = 8 * 1024;
/// What the current step consists of.
#[derive(Debug, Default)]
pub(crate) struct Step {
    /// Of each row.
    pub tokens: Vec<u32>,
    /// Of each row.
    pub positions: Vec<usize>,
    /// Of each row: where its sequence's block table begins and ends in `blocks`.
    pub tables: Vec<(usize, usize)>,
    /// All block tables.
    pub blocks: Vec<BlockId>,
    /// Rows that want logits.
    pub wanted: Vec<u32>,
    /// Of each row of a drafting pass: the row of the pass before that it goes on from.
    pub sources: Vec<u32>,
    /// Where they go; borrowed from the caller for the time of the step.
    pub logits: Logits,
}

impl Step {
    /// Room for steps of `tokens_max` tokens with block tables of `blocks_max` blocks in all.
    pub fn new(tokens_max: usize, blocks_max: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(tokens_max),
            positions: Vec::with_capacity(tokens_max),
            tables: Vec::with_capacity(tokens_max),
            blocks: Vec::with_capacity(blocks_max),
            wanted: Vec::with_capacity(tokens_max),
            sources: Vec::with_capacity(tokens_max),
            logits: Logits::default(),
        }
    }

    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.tables.clear();
        self.blocks.clear();
        self.wanted.clear();
        self.sources.clear();
    }
}

/// One activation buffer.
#[derive(Debug, Default)]
struct Buffer {
    width: usize,
    values: Vec<f32>,
    /// Each row's values are bfloat16, in the first half of their room.
    is_rounded: bool,
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct CpuBackend {
    compute: Compute,
    /// The other ranks.
    group: Arc<dyn ProcessGroup>,
    rank: Rank,
    /// By tensor: which rows of it this rank has.
    shares: Vec<Option<RowShare>>,
    owners: Owners,
    weights: Weights,
    cache: Cache,
    rope: Rope,
    hidden: usize,
    slots: Vec<Buffer>,
    mlp: Vec<f32>,
    cos_sin: Vec<f32>,
    chosen: Chosen,
    attending: Attending,
    /// Memory of lists of jobs.
    jobs: Vec<Job<'static>>,
    gated: Vec<Gated<'static>>,
    pub step: Step,
}

impl CpuBackend {
    pub fn new(
        compute: Compute,
        group: Arc<dyn ProcessGroup>,
        model: &Model,
        weights: Weights,
        cache: Cache,
        step: Step,
        tokens_max: usize,
    ) -> Self {
        let slots = Slot::ALL.map(|slot| {
            let width = model.slot_width(slot);
            Buffer {
                width,
                values: vec![0.0; width * tokens_max],
                is_rounded: false,
            }
        });
        let widths =
            |width: fn(&KvLayout) -> usize| model.layers.iter().map(|layer| width(&layer.kv)).max();
        // A layer's heads, or its experts and the shared one.
        let jobs = model.layers.iter().map(|layer| {
            let heads = match &layer.attention {
                Attention::Latent(attention) => attention.heads,
                Attention::Grouped(_) => 0,
            };
            let experts = match &layer.mlp {
                Mlp::Moe(moe) => moe.experts.len() + 1,
                Mlp::Dense(_) => 0,
            };
            heads.max(experts)
        });
        let jobs = jobs.max().unwrap_or(0);
        let chosen = Chosen::new(model, compute.pool.threads(), tokens_max);
        let attending = Attending::new(
            widths(|kv| kv.key_width()).unwrap_or(0),
            widths(|kv| kv.value_width()).unwrap_or(0),
            compute.pool.threads(),
            tokens_max,
        );
        Self {
            compute,
            group,
            rank: model.rank,
            shares: model.tensors.iter().map(|spec| spec.share).collect(),
            owners: Owners::default(),
            weights,
            cache,
            rope: model.rope.clone(),
            hidden: model.hidden,
            slots: slots.into(),
            mlp: vec![0.0; model.mlp_width() * tokens_max],
            cos_sin: vec![0.0; model.rope.width() * tokens_max],
            chosen,
            attending,
            jobs: Vec::with_capacity(jobs),
            gated: Vec::with_capacity(jobs),
            step,
        }
    }

    /// Puts other weights of the same model in the place of those in use.
    pub fn exchange_weights(&mut self, weights: &mut Weights) {
        std::mem::swap(&mut self.weights, weights);
    }

    /// Bytes of weights held.
    pub fn weight_bytes(&self) -> u64 {
        self.weights.bytes()
    }

    /// Bytes of cache held.
    pub fn cache_bytes(&self) -> u64 {
        self.cache.bytes()
    }

    /// Bytes of activation buffers held.
    pub fn workspace_bytes(&self) -> u64 {
        let slots: usize = self.slots.iter().map(|slot| slot.values.len()).sum();
        (slots + self.mlp.len()) as u64 * 4
    }

    /// Makes a norm's weights NaN, for tests of what follows.
    #[cfg(test)]
    pub fn poison(&mut self, id: WeightId) {
        self.weights.poison(id);
    }

    fn rows(&self) -> usize {
        self.step.tokens.len()
    }

    /// A slot to write to.
    fn fresh(&mut self, slot: Slot) -> Area {
        let buffer = &mut self.slots[slot as usize];
        buffer.is_rounded = false;
        Area::new(&mut buffer.values, buffer.width)
    }

    /// A slot's float32 values.
    fn wide(&mut self, slot: Slot) -> Area {
        let buffer = &mut self.slots[slot as usize];
        assert!(!buffer.is_rounded, "{slot:?} was rounded already");
        Area::new(&mut buffer.values, buffer.width)
    }

    /// A slot's values, rounded or not.
    fn as_they_are(&mut self, slot: Slot) -> Area {
        let buffer = &mut self.slots[slot as usize];
        let area = Area::new(&mut buffer.values, buffer.width);
        if buffer.is_rounded {
            area.rounded()
        } else {
            area
        }
    }

    /// A slot's values, rounded where they are.
    fn rounded(&mut self, slot: Slot) -> Result<Area, WorkerPanic> {
        let rows = self.rows();
        let area = self.as_they_are(slot);
        if area.is_rounded {
            return Ok(area);
        }
        let buffer = &mut self.slots[slot as usize];
        buffer.is_rounded = true;
        // SAFETY: the slot holds the step's rows.
        unsafe { self.compute.round(area, rows, buffer.width)? };
        Ok(area.rounded())
    }

    /// A slot's values in a form that products with all of `weights` read.
    fn factors(&mut self, slot: Slot, weights: &[WeightId]) -> Result<Area, WorkerPanic> {
        if weights.iter().any(|id| self.weights.is_packed(*id)) {
            return self.rounded(slot);
        }
        Ok(self.as_they_are(slot))
    }
}

impl Backend for CpuBackend {
    type Error = StepError;

    fn embed(&mut self, table: WeightId) -> Result<(), StepError> {
        let width = self.rope.width();
        for (row, position) in self.step.positions.iter().enumerate() {
            let turn = &mut self.cos_sin[row * width..(row + 1) * width];
            self.rope.fill(*position, turn);
        }
        self.fresh(Slot::Hidden);
        self.look_up(table)
    }

    fn norm(&mut self, norm: &Norm, from: Slot, to: Slot) -> Result<(), StepError> {
        let rows = self.rows();
        let (input, out) = (self.wide(from), self.fresh(to));
        let weight = self.weights.precise(norm.weight);
        let weight_start = Shared(weight.as_ptr().cast_mut());
        let kernel = |row: usize| RmsNorm {
            input: input.row(row),
            weight: weight_start.at(0),
            out: out.row(row),
            length: weight.len(),
            epsilon: norm.epsilon,
        };
        // SAFETY: each task has its own rows, as wide as the weight.
        unsafe {
            self.compute
                .kernels(rows, rows * weight.len() * 2, &kernel)?
        };
        Ok(())
    }

    fn linear(&mut self, weight: WeightId, from: Slot, to: Slot) -> Result<(), StepError> {
        let count = self.rows();
        let (input, out) = (self.factors(from, &[weight])?, self.fresh(to));
        let (first, columns) = self.place(weight, to);
        let matrix = self.weights.matrix(weight);
        let job = Job::new(matrix, input, Rows::From(0), count, out.skip(first));
        // SAFETY: different slots of the widths that the model planned for this weight.
        unsafe { self.compute.products(&[job])? };
        self.complete(to, columns)
    }

    fn mlp(&mut self, mlp: &GatedMlp, from: Slot, to: Slot) -> Result<(), StepError> {
        let rows = self.rows();
        let (input, out) = (self.factors(from, &[mlp.gate, mlp.up])?, self.fresh(to));
        let part = rows * mlp.held;
        let gate = Area::new(&mut self.mlp, mlp.held);
        let mut product = gate.skip(2 * part).with_stride(mlp.inner);
        if self.weights.is_packed(mlp.down) {
            product = product.rounded();
        }
        let job = |weight: WeightId, out: Area| {
            let matrix = self.weights.matrix(weight);
            Job::new(matrix, input, Rows::From(0), rows, out)
        };
        let gated = Gated {
            gate: job(mlp.gate, gate),
            up: job(mlp.up, gate.skip(part)),
            out: product,
            skip: mlp.first,
        };
        // SAFETY: three different parts of the scratch, which holds two of `rows * held` and one of `rows * inner`.
        unsafe { self.compute.products(&[gated])? };
        if !self.rank.is_alone() {
            let layout = self.product_columns(mlp, rows, 2 * part);
            self.group.all_gather(bytes_of(&mut self.mlp), &layout)?;
            product.start = Area::new(&mut self.mlp, mlp.inner).skip(2 * part).start;
        }
        let (first, columns) = self.place(mlp.down, to);
        let matrix = self.weights.matrix(mlp.down);
        let down = Job::new(matrix, product, Rows::From(0), rows, out.skip(first));
        // SAFETY: from the scratch to a slot.
        unsafe { self.compute.products(&[down])? };
        self.complete(to, columns)
    }

    fn latent_attention(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), StepError> {
        self.attend_latent(layer, attention)?;
        self.complete_units(
            Slot::Value,
            attention.all_heads * attention.value,
            attention.value,
        )
    }

    fn grouped_attention(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), StepError> {
        self.attend_grouped(layer, attention)?;
        self.complete_units(
            Slot::Value,
            attention.all_heads * attention.width,
            attention.width,
        )
    }

    fn gate(&mut self, gate: &Gate, from: Slot) -> Result<(), StepError> {
        Ok(self.choose_experts(gate, from)?)
    }

    fn experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), StepError> {
        self.run_experts(moe, from, to)
    }

    fn add(&mut self, from: Slot, to: Slot) -> Result<(), StepError> {
        let count = self.rows() * self.slots[to as usize].width;
        let (term, sum) = (self.wide(from).start, self.wide(to).start);
        let kernel = |task: usize| {
            let at = task * SPAN;
            AddScaled {
                sum: sum.at(at),
                term: term.at(at),
                factor: 1.0,
                length: SPAN.min(count - at),
            }
        };
        // SAFETY: different slots of the same width; the spans are disjoint.
        unsafe { self.compute.kernels(count.div_ceil(SPAN), count, &kernel)? };
        Ok(())
    }

    fn head(&mut self, norm: &Norm, table: WeightId) -> Result<(), StepError> {
        self.norm_wanted(norm, Slot::Normed)?;
        self.project_wanted(table)?;
        self.collect_logits()
    }
}

impl CpuBackend {
    /// Where the ranks' gated values are, `skip` values into the scratch.
    fn product_columns(&self, mlp: &GatedMlp, rows: usize, skip: usize) -> Columns {
        let element = match self.weights.is_packed(mlp.down) {
            true => 2,
            false => size_of::<f32>(),
        };
        Columns {
            rank: self.rank,
            rows,
            columns: mlp.inner,
            unit: self.rank.row_unit(mlp.inner),
            element,
            skip: skip * size_of::<f32>(),
            stride: mlp.inner * size_of::<f32>(),
        }
    }

    /// `to` = the normed hidden states of the rows that want logits, in their order.
    fn norm_wanted(&mut self, norm: &Norm, to: Slot) -> Result<(), WorkerPanic> {
        let count = self.step.wanted.len();
        let (hidden, normed) = (self.wide(Slot::Hidden), self.fresh(to));
        let weight = self.weights.precise(norm.weight);
        let weight_start = Shared(weight.as_ptr().cast_mut());
        let wanted = &self.step.wanted;
        let kernel = |index: usize| RmsNorm {
            input: hidden.row(wanted[index] as usize),
            weight: weight_start.at(0),
            out: normed.row(index),
            length: weight.len(),
            epsilon: norm.epsilon,
        };
        // SAFETY: each task writes its own row of another slot than it reads.
        unsafe {
            self.compute
                .kernels(count, count * weight.len() * 2, &kernel)
        }
    }

    /// Logits of the first rows of [`Slot::Normed`], as many as want them.
    fn project_wanted(&mut self, table: WeightId) -> Result<(), WorkerPanic> {
        let count = self.step.wanted.len();
        let mut normed = self.wide(Slot::Normed);
        if self.weights.is_packed(table) {
            let width = self.hidden;
            // SAFETY: the slot holds more rows than are wanted, and the next layer's norm begins it anew.
            unsafe { self.compute.round(normed, count, width)? };
            normed = normed.rounded();
        }
        let matrix = self.weights.matrix(table);
        let first = self.shares[table.index()].map_or(0, |share| share.first);
        let vocabulary = self.step.logits.vocabulary();
        let out = Area::new(self.step.logits.as_mut_slice(), vocabulary).skip(first);
        let job = Job::new(matrix, normed, Rows::From(0), count, out);
        // SAFETY: the logits have `count` rows of the vocabulary, of which the table is this rank's share.
        unsafe { self.compute.products(&[job]) }
    }
}
