//! Spreads kernels over the pool.
//!
//! Every region is cut into tiles whose results do not depend on the cut (see [`crate::kernels`]), so the tile sizes
//! below are about speed only. Small regions run on the calling thread: waking another costs more than they take.

#![allow(unsafe_code)]

use std::cell::RefCell;

use half::bf16;

use crate::kernels::paired::PairedProduct;
use crate::kernels::quantised::IntegerProduct;
use crate::kernels::{Isa, Kernel, Product, Rows};
use crate::pool::{Pool, WorkerPanic};
use crate::quantised::Integers;
use crate::weights::{Matrix, Values};

/// Weight rows of a tile under few activation rows: a sequential stream of some hundred kilobytes in large models.
const COLUMN_TILE_FEW: usize = 32;
/// The same under many: rounding the activations of a tile is then a few hundredths of its work.
const COLUMN_TILE_MANY: usize = 128;
/// Weight rows of a tile of integers under few activation rows: whole blocks, and enough to make up for quantising the
/// activations once for each tile.
const INTEGER_TILE_FEW: usize = 128;
/// The same under many activation rows.
const INTEGER_TILE_MANY: usize = 256;
/// Activation rows of a tile of integers.
const INTEGER_ROW_TILE: usize = 48;
/// Activation rows of a tile: they stay in the first-level cache while the weights pass.
const ROW_TILE: usize = 16;
/// Multiply-adds below which a region is not worth a second thread: about ten microseconds.
const ALONE_WORK_MAX: usize = 128 * 1024;

thread_local! {
    /// Rounded activations of a task; grows to the most that a task of this thread has asked for.
    static SCRATCH: RefCell<Vec<u16>> = const { RefCell::new(Vec::new()) };
}

/// Lends a task the thread's room for `length` rounded activations, with whatever the last task left there.
pub(crate) fn with_scratch(length: usize, task: impl FnOnce(&mut [u16])) {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < length {
            scratch.resize(length, 0);
        }
        task(&mut scratch[..length]);
    });
}

/// A pointer that tasks on several threads write through, each to its own part.
#[derive(Clone, Copy)]
pub(crate) struct Shared<T>(pub *mut T);

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
#[derive(Clone, Copy)]
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

/// One product of a region: all its rows with all rows of a part of a matrix.
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub matrix: &'a Matrix,
    /// Rows of the matrix to use.
    pub first: usize,
    pub columns: usize,
    pub input: Area,
    pub rows: Rows<'a>,
    pub count: usize,
    pub out: Area,
}

impl<'a> Job<'a> {
    /// The product with all rows of `matrix`.
    pub fn whole(matrix: &'a Matrix, input: Area, rows: Rows<'a>, count: usize, out: Area) -> Self {
        Self {
            matrix,
            first: 0,
            columns: matrix.rows,
            input,
            rows,
            count,
            out,
        }
    }
}

impl Job<'_> {
    fn column_tile(&self) -> usize {
        match (&self.matrix.values, self.count < ROW_TILE) {
            (Values::Integer(_), true) => INTEGER_TILE_FEW,
            (Values::Integer(_), false) => INTEGER_TILE_MANY,
            (_, true) => COLUMN_TILE_FEW,
            (_, false) => COLUMN_TILE_MANY,
        }
    }

    fn row_tile(&self) -> usize {
        match &self.matrix.values {
            Values::Integer(_) => INTEGER_ROW_TILE,
            Values::F32(_) | Values::Bf16(_) => ROW_TILE,
        }
    }

    fn tiles(&self) -> (usize, usize) {
        (
            self.columns.div_ceil(self.column_tile()),
            self.count.div_ceil(self.row_tile()),
        )
    }

    fn work(&self) -> usize {
        self.columns * self.count * self.matrix.columns
    }

    /// # Safety
    /// The job's areas hold its rows and columns, and nobody else touches the output rectangle.
    unsafe fn run(
        &self,
        isa: Isa,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) {
        let length = self.matrix.columns;
        unsafe {
            match &self.matrix.values {
                Values::F32(values) => {
                    let weight = values.as_ptr().add(self.first * length);
                    isa.run(self.product(weight, columns, indices));
                }
                Values::Bf16(values) => {
                    let weight = values.as_ptr().add(self.first * length);
                    let needed = PairedProduct::scratch_length(length, indices.len());
                    with_scratch(needed, |scratch| {
                        isa.run_paired(self.paired(weight, columns, indices, scratch));
                    });
                }
                Values::Integer(integers) => {
                    let format = integers.format;
                    let needed = IntegerProduct::scratch_length(format, length, indices.len());
                    with_scratch(needed, |scratch| {
                        isa.bytes()
                            .run(self.integers(integers, columns, indices, scratch));
                    });
                }
            }
        }
    }

    fn paired<'a>(
        &'a self,
        weight: *const bf16,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
        scratch: &'a mut [u16],
    ) -> PairedProduct<'a> {
        PairedProduct {
            // `bf16` is a transparent u16.
            weight: weight.cast(),
            length: self.matrix.columns,
            columns,
            input: self.input.start.0,
            input_stride: self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
            scratch,
        }
    }

    fn integers<'a>(
        &'a self,
        integers: &Integers,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
        scratch: &'a mut [u16],
    ) -> IntegerProduct<'a> {
        IntegerProduct {
            format: integers.format,
            blocks: integers.part(self.first).as_ptr().cast(),
            length: self.matrix.columns,
            columns,
            input: self.input.start.0,
            input_stride: self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
            scratch,
        }
    }

    fn product(
        &self,
        weight: *const f32,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) -> Product<'_> {
        Product {
            weight,
            length: self.matrix.columns,
            columns,
            input: self.input.start.0,
            input_stride: self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
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
    pub unsafe fn products(&mut self, jobs: &[Job<'_>]) -> Result<(), WorkerPanic> {
        let isa = self.isa;
        let jobs = Jobs(jobs);
        let work: usize = jobs.0.iter().map(Job::work).sum();
        if work <= ALONE_WORK_MAX {
            return self.pool.run(1, &|_| {
                for job in jobs.get() {
                    // SAFETY: the caller's promise; this is the only task.
                    unsafe { job.run(isa, 0..job.columns, 0..job.count) }
                }
            });
        }
        let tiles = |job: &Job<'_>| {
            let (columns, rows) = job.tiles();
            columns * rows
        };
        let total: usize = jobs.0.iter().map(tiles).sum();
        self.pool.run(total, &|task| {
            let mut tile = task;
            for job in jobs.get() {
                let count = tiles(job);
                if tile >= count {
                    tile -= count;
                    continue;
                }
                let (columns, _) = job.tiles();
                let width = job.column_tile();
                let column = tile % columns * width;
                let height = job.row_tile();
                let row = tile / columns * height;
                let columns = column..job.columns.min(column + width);
                let rows = row..job.count.min(row + height);
                // SAFETY: the caller's promise, and each tile of a job is visited once.
                unsafe { job.run(isa, columns, rows) }
                return;
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
struct Jobs<'a>(&'a [Job<'a>]);

impl<'a> Jobs<'a> {
    fn get(self) -> &'a [Job<'a>] {
        self.0
    }
}
