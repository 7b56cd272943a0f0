//! One forward pass: the GPU's implementation of [`engine_model::Backend`].
//!
//! A pass queues kernels and waits for nothing, so that it can be recorded as a graph. All addresses are fixed by the
//! layout; what differs between steps of one shape is only the inputs that were copied before. Invariant: which sums are
//! made in which order depends on a row's own shape alone.
//!
//! Surprise: an addition is not launched where the model asks for it. It waits for the norm that follows every one of
//! them, whose kernel adds, stores and norms in one reading.

mod attention;
mod experts;
mod grouped;
mod prediction;
mod products;
mod ranks;

use std::ops::Range;

use engine_model::{
    Backend, Gate, GatedMlp, GroupedAttention, LatentAttention, Moe, Norm, RowShare, Slot, WeightId,
};
use kernels::driver::{Arena, Stream};
use kernels::params::{ActivationParams, Address, EmbedParams, Params, RmsNormParams};
use kernels::plan::{self, Activation, Format, Launch, QUANT_GROUP};

use self::attention::at;
use crate::exchange::Exchange;
use crate::layout::{Form, Layout, Placed, Span};
use crate::step::Run;
use crate::{AttentionKernels, CudaError, Products};

/// What a pass runs over.
pub(crate) struct Pass<'a> {
    pub arena: &'a Arena,
    pub stream: &'a Stream,
    pub products: Products,
    pub layout: &'a Layout,
    /// Where the arena begins.
    pub base: Address,
    /// The step's shape.
    pub rows: usize,
    pub tokens: &'a [u32],
    pub runs: &'a [Run],
    pub wanted: usize,
    /// The wanted rows are all rows in order.
    pub all_wanted: bool,
    pub block_size: usize,
    pub table_length: usize,
    pub positions_max: usize,
    /// The way to the other ranks, where there are some.
    pub exchange: Option<&'a Exchange>,
    /// Of latent attention.
    pub attention: AttentionKernels,
    /// FP8 scales are powers of two.
    pub power_of_two: bool,
    /// Waits to be added to the residual stream.
    pub pending: Option<Slot>,
    /// Whose fp8 form the codes hold.
    pub quantised: Option<Slot>,
}

/// A matrix on the device, `[rows, columns]`.
#[derive(Clone, Copy)]
struct Matrix {
    at: Address,
    scales: Option<Address>,
    rows: usize,
    columns: usize,
    /// Which rows these are, where other ranks have others.
    share: Option<RowShare>,
}

impl Matrix {
    fn format(&self) -> Format {
        match self.scales {
            Some(_) => Format::Fp8,
            None => Format::Bf16,
        }
    }

    /// Its rows on all ranks.
    fn whole_rows(&self) -> usize {
        self.share.map_or(self.rows, |share| share.of)
    }
}

/// Where a product's rows go.
#[derive(Clone, Copy)]
struct Out {
    at: Address,
    /// Values from one row to the next.
    stride: usize,
}

impl Out {
    /// Rows of the matrix' own width.
    fn own(at: Address, matrix: &Matrix) -> Self {
        let stride = matrix.rows;
        Self { at, stride }
    }

    /// The matrix' columns of rows that are whole; `element` bytes each.
    fn among(at: Address, matrix: &Matrix, element: usize) -> Self {
        let first = matrix.share.map_or(0, |share| share.first);
        Self {
            at: at.offset((first * element) as u64),
            stride: matrix.whole_rows(),
        }
    }
}

/// Rows of activations.
#[derive(Clone, Copy)]
struct Rows {
    at: Address,
    /// Of fp8 rows.
    scales: Address,
    count: usize,
    stride: usize,
    /// Rows that the buffer holds.
    room: usize,
}

impl Pass<'_> {
    fn place(&self, span: Span) -> Address {
        self.base.offset(span.at as u64)
    }

    fn span(&self, slot: Slot) -> Span {
        self.layout.buffers.slots[slot as usize].0
    }

    fn slot(&self, slot: Slot) -> (Address, usize) {
        let (span, width) = self.layout.buffers.slots[slot as usize];
        (self.place(span), width)
    }

    fn placed(&self, id: WeightId) -> Placed {
        self.layout.weights[id.index()]
    }

    fn matrix(&self, id: WeightId) -> Matrix {
        let placed = self.placed(id);
        Matrix {
            at: self.place(placed.span),
            scales: match placed.form {
                Form::Fp8 { scales } => Some(self.place(scales)),
                Form::Bf16 | Form::Float32 | Form::Absorbed { .. } => None,
            },
            rows: placed.rows,
            columns: placed.columns,
            share: placed.share,
        }
    }

    /// Gate and up of an MLP, which lie one after the other.
    fn gate_up(&self, mlp: &GatedMlp) -> Matrix {
        let gate = self.matrix(mlp.gate);
        let of_both = |share: RowShare| RowShare {
            of: 2 * share.of,
            ..share
        };
        Matrix {
            rows: 2 * gate.rows,
            share: gate.share.map(of_both),
            ..gate
        }
    }

    fn launch<P: Params>(&self, launch: &Launch, params: &P) -> Result<(), CudaError> {
        Ok(self.arena.launch(self.stream, launch, params)?)
    }

    fn rows_of(&self, slot: Slot) -> Rows {
        let (span, stride) = self.layout.buffers.slots[slot as usize];
        Rows {
            at: self.place(span),
            scales: Address::NULL,
            count: self.rows,
            stride,
            room: span.bytes / (stride * 2).max(1),
        }
    }

    /// A slot in the form that a matrix multiplies.
    fn input(&mut self, slot: Slot, matrix: &Matrix) -> Result<Rows, CudaError> {
        let rows = self.rows_of(slot);
        if matrix.format() == Format::Bf16 {
            return Ok(rows);
        }
        let codes = Rows {
            at: self.place(self.layout.buffers.codes),
            scales: self.place(self.layout.buffers.code_scales),
            room: self.layout.buffers.codes.bytes / rows.stride,
            ..rows
        };
        if self.quantised != Some(slot) {
            let params = ActivationParams {
                out: codes.at,
                scales: codes.scales,
                ..self.activation_params(&rows, rows.stride, rows.stride)
            };
            let launch = plan::activation(Activation::Quantise, rows.count, rows.stride)?;
            self.launch(&launch, &params)?;
            self.quantised = Some(slot);
        }
        Ok(codes)
    }

    /// `width` values of each row, of rows of `stride` values in the end; results are the caller's to place.
    fn activation_params(&self, rows: &Rows, width: usize, stride: usize) -> ActivationParams {
        ActivationParams {
            x: rows.at,
            out: Address::NULL,
            scales: Address::NULL,
            rows: rows.count as i32,
            width: width as i32,
            x_stride: rows.stride as i32,
            out_stride: stride as i32,
            power_of_two_scales: i32::from(self.power_of_two),
            scales_stride: stride.div_ceil(QUANT_GROUP) as i32,
        }
    }

    /// `silu(gate) * up` of `count` rows in the form that `down` multiplies: these `columns` of all that it multiplies.
    fn activate(
        &self,
        count: usize,
        columns: Range<usize>,
        down: &Matrix,
    ) -> Result<Rows, CudaError> {
        let buffers = &self.layout.buffers;
        let (format, inner, held) = (down.format(), down.columns, columns.len());
        let source = Rows {
            at: self.place(buffers.gate_up),
            scales: Address::NULL,
            count,
            stride: 2 * held,
            room: count,
        };
        let product = Rows {
            at: self.place(buffers.product),
            scales: match format {
                Format::Bf16 => Address::NULL,
                Format::Fp8 => self.place(buffers.product_scales),
            },
            count,
            stride: inner,
            room: buffers.product.bytes / (inner * format.bytes()),
        };
        let group = columns.start / QUANT_GROUP;
        let params = ActivationParams {
            out: at(product.at, columns.start, format.bytes()),
            scales: match format {
                Format::Bf16 => Address::NULL,
                Format::Fp8 => at(product.scales, group, 4),
            },
            ..self.activation_params(&source, held, inner)
        };
        let launch = plan::activation(Activation::Swiglu(format), count, held)?;
        self.launch(&launch, &params)?;
        Ok(product)
    }

    /// `out = down(silu(gate(from)) * up(from))`.
    fn mlp_to(&mut self, mlp: &GatedMlp, from: Slot, out: Span) -> Result<(), CudaError> {
        let (gate_up, down) = (self.gate_up(mlp), self.matrix(mlp.down));
        let rows = self.input(from, &gate_up)?;
        let gated = Out::own(self.place(self.layout.buffers.gate_up), &gate_up);
        self.product(&gate_up, &rows, gated)?;
        let columns = mlp.first..mlp.first + mlp.held;
        let product = self.activate(rows.count, columns, &down)?;
        self.complete_products(&gate_up, &down, rows.count)?;
        self.whole_product(&down, &product, out)
    }

    /// `out = norm(x + residual)`, rows with strides; the sum is left in the residual.
    fn norm_rows(
        &self,
        norm: &Norm,
        (x, x_stride): (Address, usize),
        residual: Address,
        (out, out_stride): (Address, usize),
    ) -> Result<(), CudaError> {
        let weight = self.placed(norm.weight);
        let width = weight.columns;
        let params = RmsNormParams {
            x,
            residual,
            weight: self.place(weight.span),
            out,
            scales: Address::NULL,
            rows: self.rows as i32,
            width: width as i32,
            x_stride: x_stride as i32,
            out_stride: out_stride as i32,
            eps: norm.epsilon,
            power_of_two_scales: 0,
        };
        self.launch(&plan::rms_norm(Format::Bf16, self.rows, width)?, &params)
    }

    /// Copies `count` rows of `table` by the numbers at `chosen`: that is what an embedding does.
    fn gather(
        &self,
        table: Rows,
        chosen: Span,
        count: usize,
        out: Address,
    ) -> Result<(), CudaError> {
        let params = EmbedParams {
            table: table.at,
            tokens: self.place(chosen),
            out,
            rows: count as i32,
            width: table.stride as i32,
            vocabulary: table.count as i32,
            elsewhere: 0,
        };
        self.launch(&plan::embed(count, table.stride)?, &params)
    }

    /// A slot was written: its fp8 form is stale.
    fn written(&mut self, slot: Slot) {
        if self.quantised == Some(slot) {
            self.quantised = None;
        }
    }
}

impl Backend for Pass<'_> {
    type Error = CudaError;

    fn embed(&mut self, table: WeightId) -> Result<(), CudaError> {
        let matrix = self.matrix(table);
        let params = EmbedParams {
            table: matrix.at,
            tokens: self.place(self.layout.buffers.tokens),
            out: self.slot(Slot::Hidden).0,
            rows: self.rows as i32,
            width: matrix.columns as i32,
            vocabulary: matrix.rows as i32,
            elsewhere: i32::from(matrix.share.is_some()),
        };
        self.launch(&plan::embed(self.rows, matrix.columns)?, &params)?;
        self.complete_embedded(&matrix)
    }

    fn norm(&mut self, norm: &Norm, from: Slot, to: Slot) -> Result<(), CudaError> {
        let (source, source_stride) = self.slot(from);
        let (out, out_stride) = self.slot(to);
        let added = match from {
            Slot::Hidden => self.pending.take(),
            _ => None,
        };
        let (x, x_stride, residual) = match added {
            Some(term) => {
                let (x, stride) = self.slot(term);
                (x, stride, source)
            }
            None => (source, source_stride, Address::NULL),
        };
        self.written(to);
        self.norm_rows(norm, (x, x_stride), residual, (out, out_stride))
    }

    fn linear(&mut self, weight: WeightId, from: Slot, to: Slot) -> Result<(), CudaError> {
        let matrix = self.matrix(weight);
        let rows = self.input(from, &matrix)?;
        self.written(to);
        match to.is_whole() {
            true => self.whole_product(&matrix, &rows, self.span(to)),
            false => self.product(&matrix, &rows, Out::own(self.slot(to).0, &matrix)),
        }
    }

    fn latent_attention(
        &mut self,
        layer: usize,
        attention: &LatentAttention,
    ) -> Result<(), CudaError> {
        self.attend_latent(layer, attention)
    }

    fn grouped_attention(
        &mut self,
        layer: usize,
        attention: &GroupedAttention,
    ) -> Result<(), CudaError> {
        self.attend_grouped(layer, attention)
    }

    fn mlp(&mut self, mlp: &GatedMlp, from: Slot, to: Slot) -> Result<(), CudaError> {
        self.written(to);
        self.mlp_to(mlp, from, self.span(to))
    }

    fn gate(&mut self, gate: &Gate, from: Slot) -> Result<(), CudaError> {
        self.choose_experts(gate, from)
    }

    fn experts(&mut self, moe: &Moe, from: Slot, to: Slot) -> Result<(), CudaError> {
        self.run_experts(moe, from, to)
    }

    fn add(&mut self, from: Slot, to: Slot) -> Result<(), CudaError> {
        if to != Slot::Hidden || self.pending.is_some() {
            return Err(CudaError::Graph(
                "an addition that no norm of the residual stream follows",
            ));
        }
        self.pending = Some(from);
        Ok(())
    }

    fn head(&mut self, norm: &Norm, table: WeightId) -> Result<(), CudaError> {
        if self.wanted == 0 {
            return Ok(());
        }
        self.norm(norm, Slot::Hidden, Slot::Normed)?;
        let matrix = self.matrix(table);
        let mut rows = Rows {
            count: self.wanted,
            ..self.rows_of(Slot::Normed)
        };
        if !self.all_wanted {
            let buffers = &self.layout.buffers;
            let gathered = self.place(buffers.gathered);
            let all = self.rows_of(Slot::Normed);
            self.gather(all, buffers.wanted, self.wanted, gathered)?;
            rows.at = gathered;
            rows.room = buffers.gathered.bytes / (rows.stride * 2);
        }
        self.project(&matrix, &rows)
    }
}
