//! The CPU's implementation of [`engine_model::Backend`].
//!
//! Invariant: buffers are allocated once, for the largest step; a step only fills a prefix of each. The rows of a step
//! are its tokens in batch order. All caches are written before any row of a layer attends, so a token of a chunk sees
//! its predecessors in the same chunk in the same rounded form in which a later step would.

#![allow(unsafe_code)]

mod attention;
mod grouped;
mod moe;

use engine_core::{BlockId, Logits};
use engine_model::{
    Backend, Gate, GatedMlp, GroupedAttention, LatentAttention, Model, Moe, Norm, Rope, Slot,
    WeightId,
};

use self::moe::Chosen;
use crate::cache::Cache;
use crate::compute::{Area, Compute, Job, Shared};
use crate::kernels::{AddScaled, RmsNorm, Rows, SiluProduct};
use crate::pool::WorkerPanic;
use crate::weights::{Values, Weights};

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
    /// Where they go; borrowed from the caller for the time of the step.
    pub logits: Logits,
}

impl Step {
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.tables.clear();
        self.blocks.clear();
        self.wanted.clear();
    }
}

/// One activation buffer.
#[derive(Debug, Default)]
struct Buffer {
    width: usize,
    values: Vec<f32>,
}

/// See the module's description.
#[derive(Debug)]
pub(crate) struct CpuBackend {
    compute: Compute,
    weights: Weights,
    cache: Cache,
    rope: Rope,
    hidden: usize,
    slots: Vec<Buffer>,
    mlp: Vec<f32>,
    cos_sin: Vec<f32>,
    chosen: Chosen,
    pub step: Step,
}

impl CpuBackend {
    pub fn new(
        compute: Compute,
        model: &Model,
        weights: Weights,
        cache: Cache,
        tokens_max: usize,
    ) -> Self {
        let slots = Slot::ALL.map(|slot| {
            let width = model.slot_width(slot);
            Buffer {
                width,
                values: vec![0.0; width * tokens_max],
            }
        });
        Self {
            compute,
            weights,
            cache,
            rope: model.rope.clone(),
            hidden: model.hidden,
            slots: slots.into(),
            mlp: vec![0.0; model.mlp_width() * tokens_max],
            cos_sin: vec![0.0; model.rope.width() * tokens_max],
            chosen: Chosen::default(),
            step: Step::default(),
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

    fn area(&mut self, slot: Slot) -> Area {
        let buffer = &mut self.slots[slot as usize];
        Area::new(&mut buffer.values, buffer.width)
    }

    /// Silu products of `count` values of three adjoining parts of the MLP scratch, `part` values each.
    fn activate(&mut self, gate: Area, part: usize, count: usize) -> Result<(), WorkerPanic> {
        let up = gate.skip(part).start;
        let out = gate.skip(2 * part).start;
        let gate = gate.start;
        let kernel = |task: usize| {
            let at = task * SPAN;
            SiluProduct {
                gate: gate.at(at),
                up: up.at(at),
                out: out.at(at),
                length: SPAN.min(count - at),
            }
        };
        // SAFETY: the three parts and the tasks' spans are disjoint and inside the scratch.
        unsafe {
            self.compute
                .kernels(count.div_ceil(SPAN), count * 16, &kernel)
        }
    }
}

impl Backend for CpuBackend {
    type Error = WorkerPanic;

    fn embed(&mut self, table: WeightId) -> Result<(), WorkerPanic> {
        let width = self.rope.width();
        for (row, position) in self.step.positions.iter().enumerate() {
            let turn = &mut self.cos_sin[row * width..(row + 1) * width];
            self.rope.fill(*position, turn);
        }
        let matrix = self.weights.matrix(table);
        let hidden = &mut self.slots[Slot::Hidden as usize].values;
        let columns = matrix.columns;
        for (row, token) in hidden.chunks_exact_mut(columns).zip(&self.step.tokens) {
            let at = *token as usize * columns;
            match &matrix.values {
                Values::F32(values) => row.copy_from_slice(&values[at..at + columns]),
                Values::Bf16(values) => {
                    for (to, from) in row.iter_mut().zip(&values[at..at + columns]) {
                        *to = from.to_f32();
                    }
                }
            }
        }
        Ok(())
    }

    fn norm(&mut self, norm: &Norm, from: Slot, to: Slot) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let (input, out) = (self.area(from), self.area(to));
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
        unsafe { self.compute.kernels(rows, rows * weight.len() * 2, &kernel) }
    }

    fn linear(&mut self, weight: WeightId, from: Slot, to: Slot) -> Result<(), WorkerPanic> {
        let count = self.rows();
        let (input, out) = (self.area(from), self.area(to));
        let matrix = self.weights.matrix(weight);
        let job = Job::whole(matrix, input, Rows::From(0), count, out);
        // SAFETY: different slots of the widths that the model planned for this weight.
        unsafe { self.compute.products(&[job]) }
    }

    fn mlp(&mut self, mlp: &GatedMlp, from: Slot, to: Slot) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let (input, out) = (self.area(from), self.area(to));
        let part = rows * mlp.inner;
        let gate = Area::new(&mut self.mlp, mlp.inner);
        let job = |weight: WeightId, input: Area, out: Area| {
            let matrix = self.weights.matrix(weight);
            Job::whole(matrix, input, Rows::From(0), rows, out)
        };
        let jobs = [
            job(mlp.gate, input, gate),
            job(mlp.up, input, gate.skip(part)),
        ];
        // SAFETY: gate and up go to different parts of the scratch, which holds three parts of `rows * inner`.
        unsafe { self.compute.products(&jobs)? };
        self.activate(gate, part, part)?;
        let matrix = self.weights.matrix(mlp.down);
        let down = Job::whole(matrix, gate.skip(2 * part), Rows::From(0), rows, out);
        // SAFETY: from the scratch to a slot.
        unsafe { self.compute.products(&[down]) }
    }

    fn latent_attention(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), WorkerPanic> {
        self.attend_latent(layer, attention)
    }

    fn grouped_attention(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), WorkerPanic> {
        self.attend_grouped(layer, attention)
    }

    fn gate(&mut self, gate: &Gate, from: Slot) -> Result<(), WorkerPanic> {
        self.choose_experts(gate, from)
    }

    fn experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), WorkerPanic> {
        self.run_experts(moe, from, to)
    }

    fn add(&mut self, from: Slot, to: Slot) -> Result<(), WorkerPanic> {
        let count = self.rows() * self.slots[to as usize].width;
        let (term, sum) = (self.area(from).start, self.area(to).start);
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
        unsafe { self.compute.kernels(count.div_ceil(SPAN), count, &kernel) }
    }

    fn head(&mut self, norm: &Norm, table: WeightId) -> Result<(), WorkerPanic> {
        let count = self.step.wanted.len();
        let (hidden, normed) = (self.area(Slot::Hidden), self.area(Slot::Normed));
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
                .kernels(count, count * weight.len() * 2, &kernel)?;
        }
        let matrix = self.weights.matrix(table);
        let out = Area::new(self.step.logits.as_mut_slice(), matrix.rows);
        let job = Job::whole(matrix, normed, Rows::From(0), count, out);
        // SAFETY: the logits have `count` rows of the table's length.
        unsafe { self.compute.products(&[job]) }
    }
}
