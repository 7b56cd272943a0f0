//! The argument of the Hopper products, and what their tensor maps describe.

use std::mem::size_of;

use super::{Address, Field, Params, TensorMap, sealed};
use crate::plan::{Format, HOPPER_COLUMNS};

/// A tensor of three dimensions and the box of it that is loaded at once: 128 bytes of columns by as many of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct TensorShape {
    /// Of its values.
    pub format: Format,
    /// Where it begins, a multiple of 16.
    pub at: Address,
    /// Values side by side.
    pub columns: usize,
    /// Lengths of the other two dimensions.
    pub lengths: [usize; 2],
    /// Values between their members: whole 16 bytes, the second a multiple of the first.
    pub strides: [usize; 2],
    /// Their lengths in a box.
    pub boxes: [usize; 2],
}

impl TensorShape {
    /// `matrices` matrices `[n, k]` of weights, one after the other.
    pub fn weights(format: Format, at: Address, n: usize, k: usize, matrices: usize) -> Self {
        Self {
            format,
            at,
            columns: k,
            lengths: [n, matrices],
            strides: [k, n * k],
            boxes: [HOPPER_COLUMNS, 1],
        }
    }

    /// Rows of `k` values for tiles of `tile_rows`, `stride` apart.
    pub fn rows(
        format: Format,
        at: Address,
        rows: usize,
        k: usize,
        stride: usize,
        tile_rows: usize,
    ) -> Self {
        Self {
            format,
            at,
            columns: k,
            lengths: [1, rows],
            strides: [stride, stride],
            boxes: [1, tile_rows],
        }
    }

    /// The same with `batch` pieces of `k` values in a row, `distance` apart.
    #[must_use]
    pub fn batched(self, batch: usize, distance: usize) -> Self {
        let ([_, rows], [_, stride]) = (self.lengths, self.strides);
        Self {
            lengths: [batch, rows],
            strides: [distance, stride],
            ..self
        }
    }

    /// Bytes from its first value to its last.
    pub fn bytes(&self) -> usize {
        let last = |i: usize| self.lengths[i].saturating_sub(1) * self.strides[i];
        (last(0) + last(1) + self.columns) * self.format.bytes()
    }
}

params!(
    /// `c[m, n] = a[m, k] b[n, k]^T` on a Hopper device: dense, batched or grouped.
    HopperGemmParams, 384, {
        /// [`TensorShape::weights`].
        b_map: TensorMap,
        /// [`TensorShape::rows`].
        a_map: TensorMap,
        /// bf16 or f32 `[m, ldc]`, a multiple of 16 bytes.
        c: Address,
        /// f32 `[m, a_scales_stride]` for fp8.
        a_scales: Address,
        /// f32 `[ceil(n / 128), b_scales_stride]` for fp8.
        b_scales: Address,
        /// Grouped fp8: i32 row of `a_scales` for each row of `c`, or null.
        a_rows: Address,
        /// Grouped: i32 `{expert, first row}` per tile; null is not grouped.
        tiles: Address,
        /// Grouped: i32 `[experts + 1]`.
        offsets: Address,
        /// Slices of a plan that sums them in blocks of their own, or null.
        partial: Address,
        /// u32 zeros, one for each block of the plan's grid in x.
        tickets: Address,
        /// Between batches of `c`.
        c_batch: i64,
        /// Between experts of `b_scales`.
        b_scales_batch: i64,
        /// Rows of `a`.
        m: i32,
        /// Rows of `b`.
        n: i32,
        /// Columns of both.
        k: i32,
        /// Between rows of `c`.
        ldc: i32,
        /// Between rows of `a_scales`.
        a_scales_stride: i32,
        /// Between rows of `b_scales`.
        b_scales_stride: i32,
        /// 1 writes f32 instead of bf16.
        c_is_float32: i32,
        /// Of the plan.
        row_tiles: i32,
        /// Of the plan.
        slices: i32,
        /// Of the plan.
        slice_blocks: i32,
        /// Zero.
        reserved: [i32; 2],
    }
);
