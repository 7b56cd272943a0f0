//! Spreads kernels over the pool.
//!
//! Every region is cut into tiles whose results do not depend on the cut (see [`crate::kernels`]), so the tile sizes
//! below are about speed only. Small regions run on the calling thread: waking another costs more than they take.

#![allow(unsafe_code)]

use std::cell::RefCell;

use crate::kernels::paired::{PairedProduct, RoundInPlace};
use crate::kernels::quantised::IntegerProduct;
use crate::kernels::{Isa, Kernel, Product, Rows};
use crate::packed::{PANEL, Packed};
use crate::pool::{Pool, WorkerPanic};
use crate::quantised::Integers;
use crate::weights::{Matrix, Values};

/// Weight rows of a tile: a panel, which is a sequential stream of some hundred kilobytes in large models.
const COLUMN_TILE: usize = PANEL;
/// Activation rows of a tile: they stay in the second-level cache while the weights pass.
const ROW_TILE: usize = 128;
/// Weight rows of a tile of integers under few activation rows: whole blocks.
const INTEGER_TILE_FEW: usize = 64;
/// The same under many: quantising the activations of a tile is then a few hundredths of its work.
const INTEGER_TILE_MANY: usize = 256;
/// Activation rows that are many.
const INTEGER_MANY: usize = 16;
/// Activation rows of a tile of integers.
const INTEGER_ROW_TILE: usize = 48;
/// Rows that one task rounds.
const ROUND_ROWS: usize = 16;
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
    /// Each row's values are bfloat16, in the first half of their room: see [`Compute::round`].
    pub is_rounded: bool,
}

impl Area {
    /// Rows of `stride` values in `buffer`.
    pub fn new(buffer: &mut [f32], stride: usize) -> Self {
        Self {
            start: Shared(buffer.as_mut_ptr()),
            stride,
            is_rounded: false,
        }
    }

    /// The same rows from `offset` values on.
    pub fn skip(self, offset: usize) -> Self {
        Self {
            start: Shared(self.start.at(offset)),
            ..self
        }
    }

    /// The same rows after [`Compute::round`].
    pub fn rounded(self) -> Self {
        Self {
            is_rounded: true,
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
#[derive(Clone, Copy)]
pub(crate) struct Job<'a> {
    pub matrix: &'a Matrix,
    /// Which one, of several of the same shape.
    pub part: usize,
    /// Rounded rows for a packed matrix, float32 rows for a float32 one, either for integers.
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

impl Job<'_> {
    /// Weight and activation rows of a tile.
    fn tile(&self) -> (usize, usize) {
        match &self.matrix.values {
            Values::Integer(_) if self.count < INTEGER_MANY => (INTEGER_TILE_FEW, INTEGER_ROW_TILE),
            Values::Integer(_) => (INTEGER_TILE_MANY, INTEGER_ROW_TILE),
            Values::F32(_) | Values::Bf16(_) | Values::Packed(_) => (COLUMN_TILE, ROW_TILE),
        }
    }

    fn tiles(&self) -> (usize, usize) {
        let (width, height) = self.tile();
        (
            self.matrix.rows.div_ceil(width),
            self.count.div_ceil(height),
        )
    }

    /// First input value of the product's row 0, whatever the form.
    fn input_at(&self) -> *const f32 {
        let start = self.input.start;
        if self.input.is_rounded {
            return start.0.cast::<u16>().wrapping_add(self.skip).cast();
        }
        start.at(self.skip)
    }

    fn work(&self) -> usize {
        self.matrix.rows * self.count * self.matrix.columns
    }

    /// # Safety
    /// The job's areas hold its rows and columns, and nobody else touches the output rectangle.
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
                Values::Integer(integers) => {
                    let length = self.matrix.columns;
                    let format = integers.format;
                    let needed = IntegerProduct::scratch_length(format, length, indices.len());
                    with_scratch(needed, |scratch| {
                        isa.bytes()
                            .run(self.integers(integers, columns, indices, scratch));
                    });
                }
                Values::Bf16(_) => unreachable!("a table that is only looked up"),
            }
        }
    }

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
            input: self.input_at().cast(),
            input_stride: 2 * self.input.stride,
            rows: self.rows,
            indices,
            out: self.out.start.0,
            out_stride: self.out.stride,
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
            blocks: integers.part(self.part).as_ptr().cast(),
            length: self.matrix.columns,
            columns,
            input: self.input_at(),
            is_rounded: self.input.is_rounded,
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
        values: &[f32],
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) -> Product<'_> {
        let length = self.matrix.columns;
        Product {
            weight: values[self.part * self.matrix.rows * length..].as_ptr(),
            length,
            columns,
            input: self.input_at(),
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
                    unsafe { job.run(isa, 0..job.matrix.rows, 0..job.count) }
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
                let (width, height) = job.tile();
                let column = tile % columns * width;
                let row = tile / columns * height;
                let columns = column..job.matrix.rows.min(column + width);
                let rows = row..job.count.min(row + height);
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
struct Jobs<'a>(&'a [Job<'a>]);

impl<'a> Jobs<'a> {
    fn get(self) -> &'a [Job<'a>] {
        self.0
    }
}
