//! Grouped-query attention on the CPU: bias, norm, rotate and cache each row, then attend.

#![allow(unsafe_code)]

use engine_model::{GroupedAttention, HeadNorms, Norm, Projection, Rope, Slot};

use super::CpuBackend;
use super::attend::{Heads, QueryPart};
use super::attention::narrow_into;
use crate::cache::CacheTarget;
use crate::compute::Shared;
use crate::kernels::{AddScaled, AttendGrouped, Element, HEADS_MAX, Isa, RmsNorm};
use crate::pool::WorkerPanic;
use crate::weights::Weights;

/// What happens to the heads of a projection before they are used.
#[derive(Clone, Copy)]
struct Finish<'a> {
    bias: Option<&'a [f32]>,
    norm: Option<(&'a [f32], f32)>,
    width: usize,
}

impl<'a> Finish<'a> {
    fn new(
        weights: &'a Weights,
        projection: &Projection,
        norm: Option<&Norm>,
        width: usize,
    ) -> Self {
        Self {
            bias: projection.bias.map(|bias| weights.precise(bias)),
            norm: norm.map(|norm| (weights.precise(norm.weight), norm.epsilon)),
            width,
        }
    }

    /// Adds the bias to all heads of a row, norms each, and rotates each by `turn` where there is one.
    ///
    /// # Safety
    /// `row` holds `heads` heads, which nobody else touches.
    unsafe fn run(self, isa: Isa, row: *mut f32, heads: usize, turn: Option<&[f32]>) {
        // SAFETY: the caller's promise; bias and norm have the widths that the model planned for them.
        unsafe {
            if let Some(bias) = self.bias {
                isa.run(AddScaled {
                    sum: row,
                    term: bias.as_ptr(),
                    factor: 1.0,
                    length: bias.len(),
                });
            }
            for head in 0..heads {
                let start = row.add(head * self.width);
                if let Some((weight, epsilon)) = self.norm {
                    isa.run(RmsNorm {
                        input: start,
                        weight: weight.as_ptr(),
                        out: start,
                        length: self.width,
                        epsilon,
                    });
                }
                if let Some(turn) = turn {
                    let values = std::slice::from_raw_parts_mut(start, self.width);
                    Rope::rotate_halves(values, turn);
                }
            }
        }
    }
}

impl CpuBackend {
    /// Caches the step's keys and values and leaves the output of every head of this rank in [`Slot::Value`].
    pub(super) fn attend_grouped(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), WorkerPanic> {
        match self.cache.layer_mut(layer) {
            CacheTarget::F32(cache) => {
                self.cache_heads(cache, attention)?;
                self.attend_wide_heads(cache, attention)
            }
            CacheTarget::Bf16(cache) => {
                self.cache_heads(cache, attention)?;
                let GroupedAttention {
                    kv_heads,
                    width,
                    scale,
                    ..
                } = *attention;
                let block = self.cache.block_size() * width;
                let queries = QueryPart {
                    rows: self.rounded(Slot::Query)?,
                    skip: 0,
                    stride: width,
                };
                let heads = Heads {
                    cache,
                    kv_heads,
                    kv_head_stride: 2 * block,
                    block_stride: kv_heads * 2 * block,
                    key_stride: width,
                    value_skip: block,
                    key_width: width,
                    value_width: width,
                    heads: attention.group(),
                    first: queries,
                    // The first part is all of it.
                    second: queries,
                    first_width: width,
                    out: self.fresh(Slot::Value).skip(attention.first_head * width),
                    scale,
                };
                // SAFETY: blocks were checked to exist and cover the context; the slots have the model's widths.
                unsafe { self.attend_heads(&heads) }
            }
        }
    }

    fn cache_heads<C: Element>(
        &mut self,
        cache: Shared<C>,
        attention: &GroupedAttention,
    ) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let turn_width = self.rope.width();
        let queries = self.wide(Slot::Query);
        let keys = self.wide(Slot::FreshKey);
        let values = self.wide(Slot::FreshValue);
        let GroupedAttention {
            heads,
            kv_heads,
            width,
            ..
        } = *attention;
        let norms = attention.head_norms.as_ref();
        let finish = |projection: &Projection, norm: Option<&Norm>| {
            Finish::new(&self.weights, projection, norm, width)
        };
        let finish_query = finish(&attention.query, norms.map(|HeadNorms { query, .. }| query));
        let finish_key = finish(&attention.key, norms.map(|HeadNorms { key, .. }| key));
        let finish_value = finish(&attention.value, None);
        let (step, cos_sin) = (&self.step, &self.cos_sin);
        let block_size = self.cache.block_size();
        let isa = self.compute.isa;
        let work = rows * (heads + 2 * kv_heads) * width * 8;
        self.compute.region(rows, work, &|row| {
            let turn = &cos_sin[row * turn_width..(row + 1) * turn_width];
            let (first, end) = step.tables[row];
            let position = step.positions[row];
            let block = step.blocks[first..end][position / block_size].index();
            // SAFETY: each row has its own part of the three slots, and its own places in the cache: positions of a
            // sequence differ, and the scheduler gives a writable block to one sequence only. The block was checked to
            // exist.
            unsafe {
                finish_query.run(isa, queries.row(row), heads, Some(turn));
                finish_key.run(isa, keys.row(row), kv_heads, Some(turn));
                finish_value.run(isa, values.row(row), kv_heads, None);
                let [keys, values] = [keys, values]
                    .map(|fresh| std::slice::from_raw_parts(fresh.row(row), kv_heads * width));
                for head in 0..kv_heads {
                    let part = (block * kv_heads + head) * 2 * block_size + position % block_size;
                    let of_head = head * width..(head + 1) * width;
                    narrow_into(cache.at(part * width), &keys[of_head.clone()]);
                    narrow_into(cache.at((part + block_size) * width), &values[of_head]);
                }
            }
        })
    }

    fn attend_wide_heads<C: Element>(
        &mut self,
        cache: Shared<C>,
        attention: &GroupedAttention,
    ) -> Result<(), WorkerPanic> {
        let rows = self.rows();
        let queries = self.wide(Slot::Query);
        let own = attention.first_head * attention.width;
        let out = self.fresh(Slot::Value).skip(own);
        let block_size = self.cache.block_size();
        let step = &self.step;
        let (width, group) = (attention.width, attention.group());
        let passes = group.div_ceil(HEADS_MAX);
        let tasks = attention.kv_heads * passes;
        let context: usize = step.positions.iter().map(|position| position + 1).sum();
        let work = context * attention.heads * 2 * width;
        let per_head = 2 * block_size * width;
        let kernel = |task: usize| {
            let (row, part) = (task / tasks, task % tasks);
            let (kv_head, first) = (part / passes, part % passes * HEADS_MAX);
            let place = (kv_head * group + first) * width;
            let (begin, end) = step.tables[row];
            AttendGrouped {
                cache: cache.at(kv_head * per_head),
                block_stride: attention.kv_heads * per_head,
                blocks: &step.blocks[begin..end],
                block_size,
                context: step.positions[row] + 1,
                width,
                scale: attention.scale,
                queries: queries.skip(place).row(row),
                out: out.skip(place).row(row),
                heads: HEADS_MAX.min(group - first),
            }
        };
        // SAFETY: blocks were checked to exist and cover the context; each task writes its own heads' output.
        unsafe { self.compute.kernels(rows * tasks, work, &kernel) }
    }
}
