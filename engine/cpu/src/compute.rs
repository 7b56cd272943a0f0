//! Spreads kernels over the pool.
//!
//! Every region is cut into tiles whose results do not depend on the cut (see [`crate::kernels`]), so the tile sizes
//! below are about speed only. Small regions run on the calling thread: waking another costs more than they take.

#![allow(unsafe_code)]

use crate::kernels::paired::{PairedProduct, RoundInPlace, RoundedSiluProduct};
use crate::kernels::{Isa, Kernel, Product, Rows, SiluProduct};
use crate::packed::{PANEL, Packed};
use crate::pool::{Pool, WorkerPanic};
use crate::weights::{Matrix, Values};

/// Weight rows of a tile: a panel, which is a sequential stream of some hundred kilobytes in large models.
const COLUMN_TILE: usize = PANEL;
/// Activation rows of a tile: they stay in the second-level cache while the weights pass.
const ROW_TILE: usize = 128;
/// Rows that one task rounds.
const ROUND_ROWS: usize = 16;
/// Multiply-adds below which a region is not worth a second thread: about ten microseconds.
const ALONE_WORK_MAX: usize = 128 * 1024;

/// A pointer that tasks on several threads write through, each to its own part.
#[derive(Debug)]
pub(crate) struct Shared<T>(pub *mut T);

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Shared<T> {}

// SAFETY: whoever dereferences it answers for the parts being disjoint.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// The pointer; a method so that closures capture the wrapper and not the raw field.
    #[inline(always)]
    pub fn at(self, offset: usize) -> *mut T {
        self.0.wrapping_add(offset)
    }
}

/// A rectangle of activations: rows `stride` values apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Area {
    pub start: Shared<f32>,
    pub stride: usize,
}

impl Area {
    /// Rows of `stride` values in `buffer`.
    pub fn new(buffer: &mut [f32], stride: usize) -> Self {
        Self {
            start: Shared(buffer.as_mut_ptr()),
            stride,
        }
    }

    /// The same rows from `offset` values on.
    pub fn skip(self, offset: usize) -> Self {
        Self {
            start: Shared(self.start.at(offset)),
            ..self
        }
    }

    /// The same start with rows `stride` values apart.
    pub fn with_stride(self, stride: usize) -> Self {
        Self { stride, ..self }
    }

    /// First value of a row.
    #[inline(always)]
    pub fn row(self, row: usize) -> *mut f32 {
        self.start.at(row * self.stride)
    }
}

/// One product of a region: all its rows with all rows of a matrix.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Job<'a> {
    pub matrix: &'a Matrix,
    /// Which one, of several of the same shape.
    pub part: usize,
    /// Float32 rows, or, for a packed matrix, rows that were rounded where they are: see [`Compute::round`].
    pub input: Area,
    /// Values of an input row, in whichever form, before the first one of the product.
    pub skip: usize,
    pub rows: Rows<'a>,
    pub count: usize,
    pub out: Area,
}

impl<'a> Job<'a> {
    /// The product with a single matrix.
    pub fn new(matrix: &'a Matrix, input: Area, rows: Rows<'a>, count: usize, out: Area) -> Self {
        Self {
            matrix,
            part: 0,
            input,
            skip: 0,
            rows,
            count,
            out,
        }
    }
}

/// Products that can be cut into tiles: columns, which are rows of a matrix, and indices of activation rows.
pub(crate) trait Tiled: Copy {
    /// Columns and indices.
    fn size(&self) -> (usize, usize);
    /// Multiply-adds.
    fn work(&self) -> usize;
    /// Computes a tile.
    ///
    /// # Safety
    /// The areas hold the rows and columns, and nobody else touches the output rectangle.
    unsafe fn run(
        &self,
        isa: Isa,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    );
}

/// How many tiles there are, by columns and by indices.
fn tiles(job: &impl Tiled) -> (usize, usize) {
    let (columns, indices) = job.size();
    (columns.div_ceil(COLUMN_TILE), indices.div_ceil(ROW_TILE))
}

impl Tiled for Job<'_> {
    fn size(&self) -> (usize, usize) {
        (self.matrix.rows, self.count)
    }

    fn work(&self) -> usize {
        self.matrix.rows * self.count * self.matrix.columns
    }

    unsafe fn run(
        &self,
        isa: Isa,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) {
        unsafe {
            match &self.matrix.values {
                Values::F32(values) => isa.run(self.product(values, columns, indices)),
                Values::Packed(packed) => isa.run_paired(self.paired(packed, columns, indices)),
                Values::Bf16(_) => unreachable!("a table that is only looked up"),
            }
        }
    }
}

impl Job<'_> {
    fn paired(
        &self,
        packed: &Packed,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) -> PairedProduct<'_> {
        PairedProduct {
            weight: packed.part(self.part),
            length: self.matrix.columns,
            height: self.matrix.rows,
            columns,
            input: self.input.start.0.cast::<u16>().wrapping_add(self.skip),
            input_stride: 2 * self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
        }
    }

    fn product(
        &self,
        values: &[f32],
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) -> Product<'_> {
        let length = self.matrix.columns;
        Product {
            weight: values[self.part * self.matrix.rows * length..].as_ptr(),
            length,
            columns,
            input: self.input.start.at(self.skip),
            input_stride: self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
        }
    }
}

/// The first half of a gated MLP, `silu(gate · x) * (up · x)`: two products of the same shape and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gated<'a> {
    pub gate: Job<'a>,
    /// With the gate's input, rows and count.
    pub up: Job<'a>,
    /// In the form that the products read.
    pub out: Area,
}

impl Tiled for Gated<'_> {
    fn size(&self) -> (usize, usize) {
        self.gate.size()
    }

    fn work(&self) -> usize {
        2 * self.gate.work()
    }

    unsafe fn run(
        &self,
        isa: Isa,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) {
        let (first, length) = (columns.start, columns.len());
        let is_packed = matches!(self.gate.matrix.values, Values::Packed(_));
        unsafe {
            self.gate.run(isa, columns.clone(), indices.clone());
            self.up.run(isa, columns, indices.clone());
            for index in indices {
                let gate = self.gate.out.row(index).add(first).cast_const();
                let up = self.up.out.row(index).add(first).cast_const();
                let out = self.out.row(index);
                if is_packed {
                    let out = out.cast::<u16>().add(first);
                    isa.run_paired(RoundedSiluProduct {
                        gate,
                        up,
                        out,
                        length,
                    });
                } else {
                    let out = out.add(first);
                    isa.run(SiluProduct {
                        gate,
                        up,
                        out,
                        length,
                    });
                }
            }
        }
    }
}

/// Threads and instruction set.
#[derive(Debug)]
pub(crate) struct Compute {
    pub pool: Pool,
    pub isa: Isa,
}

impl Compute {
    /// Runs `tasks` tasks of about `work` multiply-adds in all.
    pub fn region(
        &mut self,
        tasks: usize,
        work: usize,
        task: &(dyn Fn(usize) + Sync),
    ) -> Result<(), WorkerPanic> {
        if work > ALONE_WORK_MAX {
            return self.pool.run(tasks, task);
        }
        // One task that runs all of them: the pool then wakes nobody, and still catches a panic.
        self.pool.run(1, &|_| (0..tasks).for_each(task))
    }

    /// Computes all `jobs` in one region.
    ///
    /// # Safety
    /// Each job's areas are valid and the jobs' output rectangles are disjoint and no input of another.
    pub unsafe fn products<J: Tiled>(&mut self, jobs: &[J]) -> Result<(), WorkerPanic> {
        let isa = self.isa;
        let jobs = Jobs(jobs);
        let work: usize = jobs.0.iter().map(Tiled::work).sum();
        if work <= ALONE_WORK_MAX {
            return self.pool.run(1, &|_| {
                for job in jobs.get() {
                    // SAFETY: the caller's promise; this is the only task.
                    unsafe {
                        let (columns, indices) = job.size();
                        job.run(isa, 0..columns, 0..indices);
                    }
                }
            });
        }
        let count = |job: &J| {
            let (columns, rows) = tiles(job);
            columns * rows
        };
        let total: usize = jobs.0.iter().map(count).sum();
        self.pool.run(total, &|task| {
            let mut tile = task;
            for job in jobs.get() {
                let count = count(job);
                if tile >= count {
                    tile -= count;
                    continue;
                }
                let (columns, _) = tiles(job);
                let size = job.size();
                let column = tile % columns * COLUMN_TILE;
                let row = tile / columns * ROW_TILE;
                let columns = column..size.0.min(column + COLUMN_TILE);
                let rows = row..size.1.min(row + ROW_TILE);
                // SAFETY: the caller's promise, and each tile of a job is visited once.
                unsafe { job.run(isa, columns, rows) }
                return;
            }
        })
    }

    /// Rounds `length` values of each of `rows` rows to bfloat16 where they are: a row then holds them in its first half.
    ///
    /// # Safety
    /// The area holds the rows, and nobody else touches them.
    pub unsafe fn round(
        &mut self,
        area: Area,
        rows: usize,
        length: usize,
    ) -> Result<(), WorkerPanic> {
        let isa = self.isa;
        let tasks = rows.div_ceil(ROUND_ROWS);
        self.region(tasks, rows * length, &|task| {
            for row in task * ROUND_ROWS..rows.min((task + 1) * ROUND_ROWS) {
                let values = area.row(row);
                // SAFETY: the caller's promise; each row is visited once.
                unsafe { isa.run_paired(RoundInPlace { values, length }) };
            }
        })
    }

    /// Runs `kernel(i)` for each `i < tasks`.
    ///
    /// # Safety
    /// The kernels' pointers are valid and no two kernels write what the other touches.
    pub unsafe fn kernels<K: Kernel>(
        &mut self,
        tasks: usize,
        work: usize,
        kernel: &(dyn Fn(usize) -> K + Sync),
    ) -> Result<(), WorkerPanic> {
        let isa = self.isa;
        // SAFETY: the caller's promise.
        self.region(tasks, work, &|task| unsafe { isa.run(kernel(task)) })
    }
}

/// Jobs hold raw output pointers; the promise of [`Compute::products`] covers their use on several threads.
#[derive(Clone, Copy)]
struct Jobs<'a, J>(&'a [J]);

// SAFETY: as for [`Shared`].
unsafe impl<J> Sync for Jobs<'_, J> {}

impl<'a, J> Jobs<'a, J> {
    fn get(self) -> &'a [J] {
        self.0
    }
}

/// An empty list in the memory of `list`.
///
/// Collecting a vector's own iterator keeps its memory, whatever the lifetimes in its elements; `tests/allocations.rs`
/// would notice if it did not.
pub(crate) fn emptied<A, B>(mut list: Vec<A>) -> Vec<B> {
    list.clear();
    list.into_iter()
        .map(|_| unreachable!("it is empty"))
        .collect()
}
