//! Spreads kernels over the pool.
//!
//! Every region is cut into tiles whose results do not depend on the cut (see [`crate::kernels`]), so the tile sizes
//! below are about speed only. Small regions run on the calling thread: waking another costs more than they take.

#![allow(unsafe_code)]

use crate::kernels::paired::{PairedProduct, RoundInPlace, RoundedSiluProduct};
use crate::kernels::quantised::IntegerProduct;
use crate::kernels::{Isa, Kernel, Product, Rows, SiluProduct};
use crate::packed::{PANEL, Packed};
use crate::pool::{Pool, WorkerPanic, current_thread};
use crate::quantised::Integers;
use crate::weights::{Matrix, Values, Weights};

/// Weight rows of a tile: a panel, which is a sequential stream of some hundred kilobytes in large models.
const COLUMN_TILE: usize = PANEL;
/// Activation rows of a tile: they stay in the second-level cache while the weights pass.
const ROW_TILE: usize = 128;
/// Weight rows of a tile of integers under few activation rows: whole blocks, and enough to make up for quantising the
/// activations once for each tile.
const INTEGER_TILE_FEW: usize = 128;
/// The same under many activation rows.
const INTEGER_TILE_MANY: usize = 256;
/// Activation rows that are many.
const INTEGER_MANY: usize = 16;
/// Activation rows of a tile of integers.
const INTEGER_ROW_TILE: usize = 48;
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
#[derive(Clone, Copy, Debug)]
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

/// Products that can be cut into tiles: columns, which are rows of a matrix, and indices of activation rows.
pub(crate) trait Tiled: Copy {
    /// Columns and indices.
    fn size(&self) -> (usize, usize);
    /// Columns and indices of a tile.
    fn tile(&self) -> (usize, usize);
    /// Multiply-adds.
    fn work(&self) -> usize;
    /// Computes a tile.
    ///
    /// # Safety
    /// The areas hold the rows and columns, and nobody else touches the output rectangle.
    unsafe fn run(
        &self,
        place: Place,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    );
}

/// How many tiles there are, by columns and by indices.
fn tiles(job: &impl Tiled) -> (usize, usize) {
    let ((columns, indices), (width, height)) = (job.size(), job.tile());
    (columns.div_ceil(width), indices.div_ceil(height))
}

impl Tiled for Job<'_> {
    fn size(&self) -> (usize, usize) {
        (self.matrix.rows, self.count)
    }

    fn tile(&self) -> (usize, usize) {
        match &self.matrix.values {
            Values::Integer(_) if self.count < INTEGER_MANY => (INTEGER_TILE_FEW, INTEGER_ROW_TILE),
            Values::Integer(_) => (INTEGER_TILE_MANY, INTEGER_ROW_TILE),
            Values::F32(_) | Values::Bf16(_) | Values::Packed(_) => (COLUMN_TILE, ROW_TILE),
        }
    }

    fn work(&self) -> usize {
        self.matrix.rows * self.count * self.matrix.columns
    }

    unsafe fn run(
        &self,
        place: Place,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) {
        unsafe {
            match &self.matrix.values {
                Values::F32(values) => place.isa.run(self.product(values, columns, indices)),
                Values::Packed(packed) => {
                    place.isa.run_paired(self.paired(packed, columns, indices));
                }
                Values::Integer(integers) => {
                    let scratch = place.scratch();
                    let product = self.integers(integers, columns, indices, scratch);
                    place.isa.bytes().run(product);
                }
                Values::Bf16(_) => unreachable!("a table that is only looked up"),
            }
        }
    }
}

impl Job<'_> {
    /// First input value of the product's row 0, whatever the form.
    fn input_at(&self) -> *const f32 {
        let start = self.input.start;
        if self.input.is_rounded {
            return start.0.cast::<u16>().wrapping_add(self.skip).cast();
        }
        start.at(self.skip)
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

/// The first half of a gated MLP, `silu(gate · x) * (up · x)`: two products of the same shape and what becomes of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gated<'a> {
    pub gate: Job<'a>,
    /// With the gate's input, rows and count.
    pub up: Job<'a>,
    /// In the form that the products read.
    pub out: Area,
    /// Values of an output row, in whichever form, before the first one of the product.
    pub skip: usize,
}

impl Tiled for Gated<'_> {
    fn size(&self) -> (usize, usize) {
        self.gate.size()
    }

    fn tile(&self) -> (usize, usize) {
        self.gate.tile()
    }

    fn work(&self) -> usize {
        2 * self.gate.work()
    }

    unsafe fn run(
        &self,
        place: Place,
        columns: std::ops::Range<usize>,
        indices: std::ops::Range<usize>,
    ) {
        let (first, length) = (columns.start, columns.len());
        unsafe {
            self.gate.run(place, columns.clone(), indices.clone());
            self.up.run(place, columns, indices.clone());
            for index in indices {
                let gate = self.gate.out.row(index).add(first).cast_const();
                let up = self.up.out.row(index).add(first).cast_const();
                let out = self.out.row(index);
                let first = self.skip + first;
                if self.out.is_rounded {
                    let out = out.cast::<u16>().add(first);
                    place.isa.run_paired(RoundedSiluProduct {
                        gate,
                        up,
                        out,
                        length,
                    });
                } else {
                    let out = out.add(first);
                    place.isa.run(SiluProduct {
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

/// Where a tile is computed.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    isa: Isa,
    /// All threads' room for quantised activations.
    scratch: Shared<u16>,
    /// Elements of a thread's.
    scratch_length: usize,
}

impl Place {
    /// This thread's room, with whatever the last task left there.
    ///
    /// # Safety
    /// A task of the pool that the scratch was made for, which lets go of it before it ends.
    unsafe fn scratch<'a>(self) -> &'a mut [u16] {
        let start = self.scratch.at(current_thread() * self.scratch_length);
        unsafe { std::slice::from_raw_parts_mut(start, self.scratch_length) }
    }
}

/// Threads and instruction set.
#[derive(Debug)]
pub(crate) struct Compute {
    pub pool: Pool,
    pub isa: Isa,
    scratch: Vec<u16>,
    scratch_length: usize,
}

impl Compute {
    /// Threads with room for quantised activations of products with all of `weights`.
    pub fn new(pool: Pool, isa: Isa, weights: &Weights) -> Self {
        let needed = weights.parts().filter_map(|matrix| match &matrix.values {
            Values::Integer(integers) => Some(IntegerProduct::scratch_length(
                integers.format,
                matrix.columns,
                INTEGER_ROW_TILE,
            )),
            _ => None,
        });
        let scratch_length = needed.max().unwrap_or(0);
        Self {
            scratch: vec![0; scratch_length * pool.threads()],
            scratch_length,
            pool,
            isa,
        }
    }

    fn place(&mut self) -> Place {
        Place {
            isa: self.isa,
            scratch: Shared(self.scratch.as_mut_ptr()),
            scratch_length: self.scratch_length,
        }
    }

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
        let place = self.place();
        let jobs = Jobs(jobs);
        let work: usize = jobs.0.iter().map(Tiled::work).sum();
        let count = |job: &J| {
            let (columns, rows) = tiles(job);
            columns * rows
        };
        let run = |job: &J, tile: usize| {
            let (columns, _) = tiles(job);
            let (size, (width, height)) = (job.size(), job.tile());
            let column = tile % columns * width;
            let row = tile / columns * height;
            let columns = column..size.0.min(column + width);
            let rows = row..size.1.min(row + height);
            // SAFETY: the caller's promise, and each tile of a job is visited once.
            unsafe { job.run(place, columns, rows) }
        };
        if work <= ALONE_WORK_MAX {
            return self.pool.run(1, &|_| {
                for job in jobs.get() {
                    (0..count(job)).for_each(|tile| run(job, tile));
                }
            });
        }
        let total: usize = jobs.0.iter().map(count).sum();
        self.pool.run(total, &|task| {
            let mut tile = task;
            for job in jobs.get() {
                let count = count(job);
                if tile < count {
                    return run(job, tile);
                }
                tile -= count;
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
