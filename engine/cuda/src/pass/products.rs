//! Matrix products of a pass, by the kernels that the GPU was given.

use std::ops::Range;

use kernels::params::{Address, EmbedParams, GemmParams, HopperGemmParams, TensorShape};
use kernels::plan::{self, Format, HopperPlan, QUANT_GROUP};

use super::attention::at;
use super::{Matrix, Out, Pass, Rows};
use crate::{CudaError, Products};

/// What a product writes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sums {
    Bf16,
    Float32,
}

/// One product for each head: `out[row, head] = matrix[head] input[row, head]`.
pub(super) struct PerHead {
    pub input: Address,
    /// Between rows and between heads of the input.
    pub input_strides: (usize, usize),
    pub matrix: Address,
    pub out: Out,
    pub heads: usize,
    /// Values of a head's output and input.
    pub rows: usize,
    pub columns: usize,
}

/// Sorted rows and the experts whose rows they are.
pub(super) struct OfExperts<'a> {
    /// The first expert's that the rank holds; the others follow it.
    pub first: &'a Matrix,
    /// Which experts the rank holds.
    pub held: Range<usize>,
    /// Experts of all ranks.
    pub experts: usize,
    /// What `row_token` picks from, or the sorted rows themselves where it is null.
    pub rows: &'a Rows,
    pub row_token: Address,
    /// Sorted rows.
    pub chosen: usize,
    pub out: Address,
}

impl Pass<'_> {
    /// The arguments of `c = rows matrix^T`.
    fn product_params(&self, matrix: &Matrix, rows: &Rows, c: Out) -> GemmParams {
        GemmParams {
            a: rows.at,
            b: matrix.at,
            c: c.at,
            a_scales: rows.scales,
            b_scales: matrix.scales.unwrap_or_default(),
            m: rows.count as i32,
            n: matrix.rows as i32,
            k: matrix.columns as i32,
            lda: rows.stride as i32,
            ldb: matrix.columns as i32,
            ldc: c.stride as i32,
            a_scales_stride: matrix.columns.div_ceil(QUANT_GROUP) as i32,
            b_scales_stride: matrix.columns.div_ceil(QUANT_GROUP) as i32,
            ..GemmParams::default()
        }
    }

    /// The same for Hopper, maps aside.
    fn hopper_params(
        &self,
        plan: &HopperPlan,
        matrix: &Matrix,
        rows: &Rows,
        c: Out,
    ) -> HopperGemmParams {
        let buffers = &self.layout.buffers;
        HopperGemmParams {
            c: c.at,
            a_scales: rows.scales,
            b_scales: matrix.scales.unwrap_or_default(),
            // Attention's parts: nothing lives in them between two launches of attention.
            partial: match plan.partial_bytes {
                0 => Address::NULL,
                _ => self.place(buffers.parts),
            },
            tickets: self.place(buffers.tickets),
            m: rows.count as i32,
            n: matrix.rows as i32,
            k: matrix.columns as i32,
            ldc: c.stride as i32,
            a_scales_stride: matrix.columns.div_ceil(QUANT_GROUP) as i32,
            b_scales_stride: matrix.columns.div_ceil(QUANT_GROUP) as i32,
            row_tiles: plan.row_tiles as i32,
            slices: plan.slices as i32,
            slice_blocks: plan.slice_blocks as i32,
            ..HopperGemmParams::default()
        }
    }

    fn hopper_launch(
        &self,
        plan: &HopperPlan,
        weights: &TensorShape,
        rows: &TensorShape,
        params: HopperGemmParams,
    ) -> Result<(), CudaError> {
        let params = HopperGemmParams {
            b_map: self.arena.tensor_map(weights)?,
            a_map: self.arena.tensor_map(rows)?,
            ..params
        };
        self.launch(&plan.launch, &params)
    }

    /// `c = rows matrix^T` in bf16.
    pub(super) fn product(&self, matrix: &Matrix, rows: &Rows, c: Out) -> Result<(), CudaError> {
        self.multiply(matrix, rows, c, Sums::Bf16)
    }

    /// `c = rows matrix^T` in float32; the matrix is bf16.
    pub(super) fn wide_product(
        &self,
        matrix: &Matrix,
        rows: &Rows,
        c: Out,
    ) -> Result<(), CudaError> {
        self.multiply(matrix, rows, c, Sums::Float32)
    }

    fn multiply(&self, matrix: &Matrix, rows: &Rows, c: Out, sums: Sums) -> Result<(), CudaError> {
        let (format, n, k) = (matrix.format(), matrix.rows, matrix.columns);
        let c_is_float32 = i32::from(sums == Sums::Float32);
        match self.products {
            Products::Portable => {
                let params = GemmParams {
                    c_is_float32,
                    ..self.product_params(matrix, rows, c)
                };
                self.launch(&plan::gemm(format, rows.count, n, k, 1)?, &params)
            }
            Products::Hopper => {
                let room = self.layout.buffers.parts.bytes;
                let whole = matrix.whole_rows();
                let plan = plan::hopper_gemm_share(format, rows.count, n, whole, k, 1, room)?;
                let params = HopperGemmParams {
                    c_is_float32,
                    ..self.hopper_params(&plan, matrix, rows, c)
                };
                let weights = TensorShape::weights(format, matrix.at, n, k, 1);
                self.hopper_launch(&plan, &weights, &rows.shape(format, k, &plan), params)
            }
        }
    }

    pub(super) fn per_head(&self, product: &PerHead) -> Result<(), CudaError> {
        let PerHead {
            input,
            input_strides: (row, head),
            matrix,
            out,
            heads,
            rows,
            columns,
        } = *product;
        let of_head = Matrix {
            at: matrix,
            scales: None,
            rows,
            columns,
            share: None,
        };
        let input = Rows {
            at: input,
            scales: Address::NULL,
            count: self.rows,
            stride: row,
            room: self.rows,
        };
        match self.products {
            Products::Portable => {
                let params = GemmParams {
                    a_batch: head as i64,
                    b_batch: (rows * columns) as i64,
                    c_batch: rows as i64,
                    ..self.product_params(&of_head, &input, out)
                };
                let launch = plan::gemm(Format::Bf16, self.rows, rows, columns, heads)?;
                self.launch(&launch, &params)
            }
            Products::Hopper => {
                let plan = plan::hopper_gemm(Format::Bf16, self.rows, rows, columns, heads, 0)?;
                let params = HopperGemmParams {
                    c_batch: rows as i64,
                    ..self.hopper_params(&plan, &of_head, &input, out)
                };
                let weights = TensorShape::weights(Format::Bf16, matrix, rows, columns, heads);
                let shape = input.shape(Format::Bf16, columns, &plan);
                self.hopper_launch(&plan, &weights, &shape.batched(heads, head), params)
            }
        }
    }

    /// Rows of a tile of the experts' products: what the sort is asked with.
    pub(super) fn expert_tile_rows(&self, chosen: usize, experts: usize) -> usize {
        match self.products {
            Products::Portable => plan::grouped_tile_rows(chosen, experts),
            Products::Hopper => plan::hopper_grouped_tile_rows(chosen, experts),
        }
    }

    /// Every sorted row times the matrix of its expert.
    pub(super) fn expert_product(&self, product: &OfExperts<'_>) -> Result<(), CudaError> {
        let OfExperts {
            first,
            ref held,
            experts,
            rows,
            row_token,
            chosen,
            out,
        } = *product;
        let buffers = &self.layout.buffers;
        let (format, n, k) = (first.format(), first.rows, first.columns);
        let tiles = self.place(buffers.tiles);
        // Tiles count experts from the first one held.
        let offsets = at(self.place(buffers.offsets), held.start, 4);
        let out = Out::own(out, first);
        let b_scales_batch = (n.div_ceil(QUANT_GROUP) * k.div_ceil(QUANT_GROUP)) as i64;
        match self.products {
            Products::Portable => {
                let params = GemmParams {
                    a_rows: row_token,
                    tiles,
                    offsets,
                    b_batch: (n * k) as i64,
                    b_scales_batch,
                    m: chosen as i32,
                    ..self.product_params(first, rows, out)
                };
                let launch = plan::grouped_gemm(format, chosen, n, k, experts)?;
                self.launch(&launch, &params)
            }
            Products::Hopper => {
                let plan = plan::hopper_grouped_gemm(format, chosen, n, k, experts)?;
                let sorted = match row_token {
                    Address::NULL => *rows,
                    tokens => self.bring_together(rows, format, tokens, chosen)?,
                };
                let params = HopperGemmParams {
                    a_rows: row_token,
                    tiles,
                    offsets,
                    b_scales_batch,
                    ..self.hopper_params(&plan, first, &sorted, out)
                };
                let weights = TensorShape::weights(format, first.at, n, k, held.len());
                self.hopper_launch(&plan, &weights, &sorted.shape(format, k, &plan), params)
            }
        }
    }

    /// Tokens' rows in the order of their experts, for TMA reads rows that lie together. They go where the experts'
    /// outputs come later; scales stay with the tokens.
    fn bring_together(
        &self,
        rows: &Rows,
        format: Format,
        row_token: Address,
        chosen: usize,
    ) -> Result<Rows, CudaError> {
        let span = self.layout.buffers.expert_out;
        // Picking rows is what an embedding does; it looks at no value, so codes go by twos.
        let width = rows.stride * format.bytes() / Format::Bf16.bytes();
        let params = EmbedParams {
            table: rows.at,
            tokens: row_token,
            out: self.place(span),
            rows: chosen as i32,
            width: width as i32,
            vocabulary: rows.count as i32,
            elsewhere: 0,
        };
        self.launch(&plan::embed(chosen, width)?, &params)?;
        Ok(Rows {
            at: self.place(span),
            count: chosen,
            room: span.bytes / (rows.stride * format.bytes()),
            ..*rows
        })
    }
}

impl Rows {
    /// All rows that there is room for: one map serves every number of rows, and what is read beyond is not stored.
    fn shape(&self, format: Format, k: usize, plan: &HopperPlan) -> TensorShape {
        TensorShape::rows(format, self.at, self.room, k, self.stride, plan.tile_rows)
    }
}
