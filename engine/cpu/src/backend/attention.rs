//! Latent attention on the CPU: cache, absorb, attend, expand.
//!
//! Prefill is absorbed too. The expanded form needs a third of the arithmetic over long prompts, but sums in another
//! order, and a prompt's bytes would then depend on how it was cut into chunks.

#![allow(unsafe_code)]

use engine_model::{LatentAttention, Rope, Slot, WeightId};

use super::attend::{Heads, QueryPart};
use super::{CpuBackend, Step};
use crate::cache::CacheTarget;
use crate::compute::{Area, Job, Shared, emptied};
use crate::kernels::{Attend, Element, GROUP, RmsNorm, Rows};
use crate::pool::WorkerPanic;

impl CpuBackend {
    /// Caches the step's rows and leaves the output of every head of this rank in [`Slot::Value`].
    pub(super) fn attend_latent(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), WorkerPanic> {
        self.cache_rows(layer, attention)?;
        let heads = attention.heads;
        let query = self.factors(Slot::Query, &[attention.kv_up])?;
        let query = (query, attention.query_width());
        let absorbed = (self.fresh(Slot::AbsorbedQuery), attention.latent);
        self.per_head(attention.kv_up, true, heads, query, absorbed)?;
        let cache = self.cache.layer_mut(layer);
        self.attend(cache, attention)?;
        let latent = self.factors(Slot::LatentValue, &[attention.kv_up])?;
        let latent = (latent, attention.latent);
        let own = attention.first_head * attention.value;
        let value = (self.fresh(Slot::Value).skip(own), attention.value);
        self.per_head(attention.kv_up, false, heads, latent, value)
    }

    fn cache_rows(&mut self, layer: usize, attention: &LatentAttention) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let cos_sin_width = self.rope.width();
        let fresh = self.wide(Slot::CacheRow);
        let query = self.wide(Slot::Query);
        let norm = self.weights.precise(attention.kv_norm.weight);
        let norm = Shared(norm.as_ptr().cast_mut());
        let epsilon = attention.kv_norm.epsilon;
        let (step, cache) = (&self.step, &mut self.cache);
        let width = attention.latent + attention.rope;
        let target = cache.layer_mut(layer);
        let block_size = cache.block_size();
        let cos_sin = &self.cos_sin;
        let isa = self.compute.isa;
        let work = rows * (attention.heads * attention.rope + width) * 8;
        self.compute.region(rows, work, &|row| {
            let turn = &cos_sin[row * cos_sin_width..(row + 1) * cos_sin_width];
            let (first, end) = step.tables[row];
            let position = step.positions[row];
            let block = step.blocks[first..end][position / block_size].index();
            let slot = block * block_size + position % block_size;
            // SAFETY: each row has its own part of both slots, and its own cache row: positions of a sequence differ,
            // and the scheduler gives a writable block to one sequence only. The block was checked to exist.
            unsafe {
                let fresh = fresh.row(row);
                isa.run(RmsNorm {
                    input: fresh,
                    weight: norm.at(0),
                    out: fresh,
                    length: attention.latent,
                    epsilon,
                });
                let fresh = std::slice::from_raw_parts_mut(fresh, width);
                Rope::rotate(&mut fresh[attention.latent..], turn);
                match target {
                    CacheTarget::F32(start) => narrow_into(start.at(slot * width), fresh),
                    CacheTarget::Bf16(start) => narrow_into(start.at(slot * width), fresh),
                }
                for head in 0..attention.heads {
                    let rotated = query
                        .row(row)
                        .add(head * attention.query_width() + attention.nope);
                    let rotated = std::slice::from_raw_parts_mut(rotated, attention.rope);
                    Rope::rotate(rotated, turn);
                }
            }
        })
    }

    /// Per-head products: `out[h] = matrix[h] · input[h]`.
    fn per_head(
        &mut self,
        weight: WeightId,
        key: bool,
        heads: usize,
        input: (Area, usize),
        out: (Area, usize),
    ) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let Some((keys, values)) = self.weights.absorbed(weight) else {
            return Err(WorkerPanic(format!(
                "tensor {} was not loaded for attention",
                weight.0
            )));
        };
        let matrix = if key { keys } else { values };
        let mut jobs = emptied(std::mem::take(&mut self.jobs));
        jobs.extend((0..heads).map(|head| Job {
            matrix,
            part: head,
            input: input.0,
            skip: head * input.1,
            rows: Rows::From(0),
            count: rows,
            out: out.0.skip(head * out.1),
        }));
        // SAFETY: input and output are different slots; heads write different columns.
        let outcome = unsafe { self.compute.products(&jobs) };
        self.jobs = emptied(jobs);
        outcome
    }

    fn attend(
        &mut self,
        cache: CacheTarget,
        attention: &LatentAttention,
    ) -> Result<(), WorkerPanic> {
        match cache {
            CacheTarget::F32(cache) => self.attend_wide(cache, attention),
            CacheTarget::Bf16(cache) => {
                let LatentAttention {
                    heads,
                    nope,
                    rope,
                    latent,
                    scale,
                    ..
                } = *attention;
                let width = latent + rope;
                let part = |rows, skip, stride| QueryPart { rows, skip, stride };
                let heads = Heads {
                    cache,
                    kv_heads: 1,
                    kv_head_stride: 0,
                    block_stride: self.cache.block_size() * width,
                    key_stride: width,
                    // The latent is both.
                    value_skip: 0,
                    key_width: width,
                    value_width: latent,
                    heads,
                    first: part(self.rounded(Slot::AbsorbedQuery)?, 0, latent),
                    second: part(self.rounded(Slot::Query)?, nope, attention.query_width()),
                    first_width: latent,
                    out: self.fresh(Slot::LatentValue),
                    scale,
                };
                // SAFETY: blocks were checked to exist and cover the context; the slots have the model's widths.
                unsafe { self.attend_heads(&heads) }
            }
        }
    }

    fn attend_wide(
        &mut self,
        cache: Shared<f32>,
        attention: &LatentAttention,
    ) -> Result<(), WorkerPanic> {
        let heads = WideHeads {
            latent_queries: self.wide(Slot::AbsorbedQuery),
            queries: self.wide(Slot::Query),
            out: self.fresh(Slot::LatentValue),
            block_size: self.cache.block_size(),
            step: &self.step,
            attention,
        };
        let (latent, rope) = (attention.latent, attention.rope);
        let tasks = self.step.tokens.len() * attention.heads.div_ceil(GROUP);
        let context: usize = self.step.positions.iter().map(|at| at + 1).sum();
        let work = context * attention.heads * (2 * latent + rope);
        let kernel = |task| heads.task(task, cache);
        // SAFETY: blocks were checked to exist and cover the context; each task writes its own heads' output.
        unsafe { self.compute.kernels(tasks, work, &kernel) }
    }
}

/// What the tasks of a layer's float32 attention share; a task is [`GROUP`] heads of a row.
struct WideHeads<'a> {
    latent_queries: Area,
    queries: Area,
    out: Area,
    block_size: usize,
    step: &'a Step,
    attention: &'a LatentAttention,
}

impl WideHeads<'_> {
    fn task<C>(&self, task: usize, cache: Shared<C>) -> Attend<'_, C> {
        let attention = self.attention;
        let groups = attention.heads.div_ceil(GROUP);
        let row = task / groups;
        let head = task % groups * GROUP;
        let (first, end) = self.step.tables[row];
        let queries = self.queries.skip(head * attention.query_width());
        Attend {
            cache: cache.at(0),
            blocks: &self.step.blocks[first..end],
            block_size: self.block_size,
            context: self.step.positions[row] + 1,
            latent: attention.latent,
            rope: attention.rope,
            scale: attention.scale,
            latent_queries: self.latent_queries.skip(head * attention.latent).row(row),
            rotated_queries: queries.skip(attention.nope).row(row),
            rotated_stride: attention.query_width(),
            out: self.out.skip(head * attention.latent).row(row),
            heads: GROUP.min(attention.heads - head),
        }
    }
}

/// Rounds `from` into the cache.
///
/// # Safety
/// `to` has room for `from`.
pub(super) unsafe fn narrow_into<C: Element>(to: *mut C, from: &[f32]) {
    for (offset, value) in from.iter().enumerate() {
        unsafe { to.add(offset).write(C::narrow(*value)) };
    }
}
