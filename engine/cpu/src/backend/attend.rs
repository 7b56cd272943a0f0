//! Attention over a bfloat16 cache: which queries share a pass, and which threads share a context.
//!
//! A task is a panel of queries: the heads of a key-value head and, where they are few, those of the next tokens of the
//! same sequence. Where there are fewer tasks than the threads want, the context is cut into its splits, computed by
//! whoever is free and merged in order.
//!
//! Invariant: see [`crate::kernels::attend`]. Neither the grouping nor the cut changes a byte.

#![allow(unsafe_code)]

use half::bf16;

use super::{CpuBackend, Step};
use crate::compute::{Area, Compute, Shared};
use crate::kernels::attend::{
    AttendAll, AttendSplit, Cached, MergeSplits, Queries, Query, Running, SPLIT, scratch_length,
};
use crate::packed::{LINE, PANEL};
use crate::pool::{WorkerPanic, current_thread};
use crate::store::Line;

/// Splits that are computed before they are merged.
const SLOTS: usize = 32;

/// Rounded queries of all heads: a part of each.
#[derive(Clone, Copy)]
pub(super) struct QueryPart {
    /// Rows that were rounded where they are.
    pub rows: Area,
    /// Elements of a row before the first head's.
    pub skip: usize,
    /// From a head's to the next one's.
    pub stride: usize,
}

impl QueryPart {
    fn at(&self, row: usize, head: usize) -> *const u16 {
        let row = self.rows.row(row).cast::<u16>();
        row.wrapping_add(self.skip + head * self.stride)
    }
}

/// A layer's attention, in the kernel's terms. Widths, strides and skips are in elements.
#[derive(Clone, Copy)]
pub(super) struct Heads {
    /// First key of the first key-value head.
    pub cache: Shared<bf16>,
    pub kv_heads: usize,
    /// From a key-value head's first key to the next one's.
    pub kv_head_stride: usize,
    /// See [`Cached`].
    pub block_stride: usize,
    /// See [`Cached`].
    pub key_stride: usize,
    /// See [`Cached`].
    pub value_skip: usize,
    pub key_width: usize,
    pub value_width: usize,
    /// Query heads of a key-value head.
    pub heads: usize,
    pub first: QueryPart,
    pub second: QueryPart,
    /// Elements of the first part.
    pub first_width: usize,
    /// Outputs of all heads.
    pub out: Area,
    pub scale: f32,
}

/// Rows that follow each other in one sequence.
#[derive(Clone, Copy, Debug)]
struct Unit {
    row: usize,
    rows: usize,
}

/// Buffers of attention.
#[derive(Debug, Default)]
pub(super) struct Attending {
    units: Vec<Unit>,
    /// Each thread's.
    scratch: Vec<Line>,
    /// Lines of a thread.
    lines: usize,
    /// What splits sum up.
    sums: Vec<f32>,
    splits: Vec<Running>,
    /// Of each task: what was merged.
    merged: Vec<Running>,
}

impl Attending {
    /// Room for keys and values of these widths on so many threads.
    pub fn new(key_width: usize, value_width: usize, threads: usize, tokens_max: usize) -> Self {
        let lines = scratch_length(key_width, value_width).div_ceil(LINE);
        Self {
            units: Vec::with_capacity(tokens_max),
            scratch: vec![Line::ZERO; lines * threads],
            lines,
            sums: vec![0.0; SLOTS * PANEL * value_width],
            splits: vec![Running::default(); SLOTS],
            merged: vec![Running::default(); SLOTS],
        }
    }

    /// Cuts the step into units of at most `rows_max` rows.
    fn group(&mut self, step: &Step, rows_max: usize) {
        self.units.clear();
        for row in 0..step.tokens.len() {
            if let Some(unit) = self.units.last_mut()
                && unit.rows < rows_max
                && step.tables[row] == step.tables[unit.row]
            {
                unit.rows += 1;
            } else {
                self.units.push(Unit { row, rows: 1 });
            }
        }
    }
}

/// The tasks of a layer.
struct Tasks<'a> {
    heads: &'a Heads,
    step: &'a Step,
    units: &'a [Unit],
    block_size: usize,
    /// Panels that the query heads of a key-value head take.
    passes: usize,
}

impl Tasks<'_> {
    fn count(&self) -> usize {
        self.units.len() * self.heads.kv_heads * self.passes
    }

    /// Calls `run` with a task's queries.
    fn with(&self, task: usize, run: impl FnOnce(Queries<'_>)) {
        let heads = self.heads;
        let (kv_head, pass) = (task / self.passes % heads.kv_heads, task % self.passes);
        let unit = self.units[task / self.passes / heads.kv_heads];
        let each = heads.heads.div_ceil(self.passes);
        let first = pass * each;
        let mut lanes = [Query::default(); PANEL];
        let mut count = 0;
        for row in unit.row..unit.row + unit.rows {
            for head in first..heads.heads.min(first + each) {
                let head = kv_head * heads.heads + head;
                lanes[count] = Query {
                    first: heads.first.at(row, head),
                    second: heads.second.at(row, head),
                    context: self.step.positions[row] + 1,
                    out: heads.out.skip(head * heads.value_width).row(row),
                };
                count += 1;
            }
        }
        let (begin, end) = self.step.tables[unit.row];
        let cache = heads.cache.at(kv_head * heads.kv_head_stride);
        run(Queries {
            cached: Cached {
                // `bf16` is a transparent u16.
                start: cache.cast_const().cast(),
                blocks: &self.step.blocks[begin..end],
                block_size: self.block_size,
                block_stride: heads.block_stride,
                key_stride: heads.key_stride,
                value_skip: heads.value_skip,
                key_width: heads.key_width,
                value_width: heads.value_width,
            },
            lanes: &lanes[..count],
            first_width: heads.first_width,
            scale: heads.scale,
        });
    }
}

impl CpuBackend {
    /// Attends with all heads of all rows.
    ///
    /// # Safety
    /// What `heads` points at has the sizes it says for the step's rows, blocks and contexts; queries are rounded.
    pub(super) unsafe fn attend_heads(&mut self, heads: &Heads) -> Result<(), WorkerPanic> {
        let passes = heads.heads.div_ceil(PANEL);
        self.attending
            .group(&self.step, (PANEL / heads.heads).max(1));
        let Attending {
            units,
            scratch,
            lines,
            sums,
            splits,
            merged,
        } = &mut self.attending;
        let tasks = Tasks {
            heads,
            step: &self.step,
            units,
            block_size: self.cache.block_size(),
            passes,
        };
        let count = tasks.count();
        let (scratch, lines) = (Shared(scratch.as_mut_ptr()), *lines);
        let scratch = move || scratch.at(current_thread() * lines).cast::<u32>();
        let contexts = self.step.positions.iter().map(|position| position + 1);
        let context_max = contexts.clone().max().unwrap_or(0);
        let work = contexts.sum::<usize>() * heads.kv_heads * heads.heads;
        let work = work * (heads.key_width + heads.value_width);
        let isa = self.compute.isa;
        let enough = count > SLOTS || count >= 2 * self.compute.pool.threads();
        if enough || context_max <= SPLIT {
            return self.compute.region(count, work, &|task| {
                tasks.with(task, |queries| {
                    let scratch = scratch();
                    // SAFETY: the caller's promise; each task has its own outputs, each thread its own scratch.
                    unsafe { isa.run_paired(AttendAll { queries, scratch }) };
                });
            });
        }
        let slots = Slots {
            sums: Shared(sums.as_mut_ptr()),
            splits: Shared(splits.as_mut_ptr()),
            merged: Shared(merged.as_mut_ptr()),
        };
        // SAFETY: the caller's promise; there are no more tasks than slots.
        unsafe { slots.attend(&mut self.compute, &tasks, &scratch, context_max, work) }
    }
}

/// Where splits wait to be merged: [`SLOTS`] of each.
struct Slots {
    sums: Shared<f32>,
    splits: Shared<Running>,
    merged: Shared<Running>,
}

impl Slots {
    /// Attends split by split: as many together as there are slots.
    ///
    /// # Safety
    /// As [`CpuBackend::attend_heads`]; at most [`SLOTS`] tasks; `scratch` is the calling thread's.
    unsafe fn attend(
        &self,
        compute: &mut Compute,
        tasks: &Tasks<'_>,
        scratch: &(dyn Fn() -> *mut u32 + Sync),
        context_max: usize,
        work: usize,
    ) -> Result<(), WorkerPanic> {
        let Self {
            sums,
            splits,
            merged,
        } = *self;
        let isa = compute.isa;
        let stride = PANEL * tasks.heads.value_width;
        let count = tasks.count();
        let all = context_max.div_ceil(SPLIT);
        let together = SLOTS / count;
        for first in (0..all).step_by(together) {
            let now = together.min(all - first);
            compute.region(count * now, work, &|index| {
                tasks.with(index / now, |queries| {
                    let slot = index / now * together + index % now;
                    let attend = AttendSplit {
                        queries,
                        start: (first + index % now) * SPLIT,
                        scratch: scratch(),
                        sums: sums.at(slot * stride),
                        running: splits.at(slot),
                    };
                    // SAFETY: the caller's promise; each split has its own slot.
                    unsafe { isa.run_paired(attend) };
                });
            })?;
            compute.region(count, count * now * stride, &|task| {
                tasks.with(task, |queries| {
                    let slot = task * together;
                    let merge = MergeSplits {
                        queries,
                        count: now,
                        sums: sums.at(slot * stride),
                        splits: splits.at(slot),
                        running: merged.at(task),
                        is_first: first == 0,
                        is_last: first + now == all,
                    };
                    // SAFETY: as above; each task has its own outputs.
                    unsafe { isa.run_paired(merge) };
                });
            })?;
        }
        Ok(())
    }
}
