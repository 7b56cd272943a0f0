//! Weights in the form the kernels read.
//!
//! Matrices `[out, in]` are float32, row-major, or bfloat16, in panels (see [`crate::packed`]), or blocks of integers (see
//! [`crate::quantised`]); an embedding that is not the head, too, is only looked up, and row-major. Norms, gates and biases
//! are float32. The key-value up-projection is held per head as a transposed key part and a value part, ready for
//! absorbed attention; in float32 and bfloat16 it takes exactly the bytes of the stored matrix.

use std::sync::OnceLock;

use engine_load::convert::{for_each, for_each_integer_row, to_bf16, to_f32};
use engine_load::{FloatType, LoadError, Progress, StoredTensor, TensorSource};
use engine_memory::{IntegerSource, ResidentDtype};
use engine_model::{Attention, LatentAttention, Model, TensorRole, WeightId};
use half::bf16;

use crate::packed::Packed;
use crate::pool::Pool;
use crate::quantised::{COLUMNS_MAX, Integers, Packer};
use crate::store::Store;

/// A matrix, or several of the same shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Values,
}

/// Elements of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Values {
    /// Row-major.
    F32(Store<f32>),
    /// Row-major; only for looking rows up.
    Bf16(Store<bf16>),
    /// In panels, for products.
    Packed(Packed),
    /// In blocks, for products.
    Integer(Integers),
}

impl Values {
    /// The bytes as a packed file has them.
    pub fn as_stored(&self) -> &[u8] {
        match self {
            Self::Packed(packed) => packed.lines().as_bytes(),
            other => other.as_bytes(),
        }
    }

    /// The bytes as they lie in memory.
    pub fn as_bytes(&self) -> &[u8] {
        match self {
            Self::F32(values) => values.as_bytes(),
            Self::Bf16(values) => values.as_bytes(),
            Self::Packed(packed) => packed.as_bytes(),
            Self::Integer(integers) => integers.lines.as_bytes(),
        }
    }
}

impl Matrix {
    /// Floats row-major, integers ready for products.
    fn new(tensor: &StoredTensor<'_>, form: ResidentDtype) -> Self {
        let (rows, columns) = match tensor.spec.shape.as_slice() {
            [length] => (1, *length),
            [rows, columns] => (*rows, *columns),
            _ => (0, 0),
        };
        let values = match form {
            ResidentDtype::Float32 => Values::F32(to_f32(tensor).into()),
            ResidentDtype::Integer(format, IntegerSource::Files)
                if matches!(tensor.dtype, FloatType::I8 | FloatType::I32) =>
            {
                let mut packer = Packer::new(format, rows, columns, rows);
                for_each_integer_row(tensor, |row| packer.put(row.scales, row.stored));
                Values::Integer(packer.finish())
            }
            ResidentDtype::Integer(format, _) => {
                let mut packer = Packer::new(format, rows, columns, rows);
                let mut row = Vec::with_capacity(columns);
                for_each(tensor, |value| {
                    row.push(value);
                    if row.len() == columns {
                        packer.push(&row);
                        row.clear();
                    }
                });
                Values::Integer(packer.finish())
            }
            ResidentDtype::Bfloat16 | ResidentDtype::Float8E4m3(_) => {
                Values::Bf16(to_bf16(tensor).into())
            }
        };
        Self {
            rows,
            columns,
            values,
        }
    }

    /// The same, ready for products.
    fn packed(self) -> Self {
        let values = match self.values {
            Values::Bf16(values) => Values::Packed(Packed::new(&values, self.rows, self.columns)),
            other => other,
        };
        Self { values, ..self }
    }

    /// Widens a row.
    pub fn read_row(&self, row: usize, to: &mut [f32]) {
        let at = row * self.columns;
        match &self.values {
            Values::F32(values) => to.copy_from_slice(&values[at..at + self.columns]),
            Values::Bf16(values) => {
                for (to, from) in to.iter_mut().zip(&values[at..at + self.columns]) {
                    *to = from.to_f32();
                }
            }
            Values::Packed(packed) => packed.unpack(row, to),
            Values::Integer(integers) => integers.read_row(row, to),
        }
    }
}

/// One tensor, ready for use.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Weight {
    Matrix(Matrix),
    Absorbed {
        /// `[latent, nope]` of each head.
        key: Matrix,
        /// `[value, latent]` of each head.
        value: Matrix,
    },
}

impl Weight {
    /// Its matrices: one, or key and value part.
    pub fn parts(&self) -> impl Iterator<Item = &Matrix> {
        let (first, second) = match self {
            Self::Matrix(matrix) => (matrix, None),
            Self::Absorbed { key, value } => (key, Some(value)),
        };
        std::iter::once(first).chain(second)
    }
}

/// All tensors of a model, by [`WeightId`].
#[derive(Debug, Default)]
pub(crate) struct Weights(Vec<Weight>);

impl Weights {
    /// Converts every tensor, on all threads; `progress` counts stored bytes.
    pub fn load(
        source: &dyn TensorSource,
        model: &Model,
        dtype: ResidentDtype,
        pool: &mut Pool,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        check(dtype, model)?;
        let absorbed = absorbed(model);
        progress.begin(source.stored_bytes(model));
        let slots: Vec<OnceLock<Weight>> = model.tensors.iter().map(|_| OnceLock::new()).collect();
        pool.run(slots.len(), &|index| {
            source.read(model, WeightId(index as u32), &mut |tensor| {
                let id = WeightId(index as u32);
                // Each index is visited once, so the slot is empty.
                let _ = slots[index].set(convert(tensor, model, id, dtype, absorbed[index]));
                progress.add(tensor.stored_bytes());
            });
        })
        .map_err(|panic| LoadError::Backend(panic.to_string()))?;
        let weights: Option<Vec<Weight>> = slots.into_iter().map(OnceLock::into_inner).collect();
        weights
            .map(Self)
            .ok_or_else(|| LoadError::Backend("a tensor was not loaded".into()))
    }

    /// Makes a float32 tensor NaN.
    #[cfg(test)]
    pub fn poison(&mut self, id: WeightId) {
        if let Weight::Matrix(matrix) = &mut self.0[id.index()]
            && let Values::F32(values) = &mut matrix.values
        {
            *values = vec![f32::NAN; values.len()].into();
        }
    }

    /// Weights that are there already, by [`WeightId`].
    pub fn new(weights: Vec<Weight>) -> Self {
        Self(weights)
    }

    /// Every matrix.
    pub fn parts(&self) -> impl Iterator<Item = &Matrix> {
        self.0.iter().flat_map(Weight::parts)
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let parts = self.parts();
        parts.map(|part| part.values.as_bytes().len() as u64).sum()
    }

    /// Whether products with a tensor read activations that were rounded to bfloat16.
    pub fn is_packed(&self, id: WeightId) -> bool {
        matches!(self.matrix(id).values, Values::Packed(_))
    }

    /// A tensor used as a plain matrix.
    pub fn matrix(&self, id: WeightId) -> &Matrix {
        match &self.0[id.index()] {
            Weight::Matrix(matrix) => matrix,
            // The model's graph names a key-value up-projection nowhere else than in attention.
            Weight::Absorbed { value, .. } => value,
        }
    }

    /// A tensor kept in float32.
    pub fn precise(&self, id: WeightId) -> &[f32] {
        match &self.matrix(id).values {
            Values::F32(values) => values,
            Values::Bf16(_) | Values::Packed(_) | Values::Integer(_) => &[],
        }
    }

    /// Key and value part of a key-value up-projection.
    pub fn absorbed(&self, id: WeightId) -> Option<(&Matrix, &Matrix)> {
        match &self.0[id.index()] {
            Weight::Absorbed { key, value } => Some((key, value)),
            Weight::Matrix(_) => None,
        }
    }
}

/// What the CPU computes with, and rows that its integer sums hold.
pub(crate) fn check(dtype: ResidentDtype, model: &Model) -> Result<(), LoadError> {
    match dtype {
        ResidentDtype::Float8E4m3(_) => Err(LoadError::Backend(
            "the CPU backend keeps weights as float32, bfloat16 or integers, not FP8".into(),
        )),
        ResidentDtype::Integer(..) => {
            let longest = model.tensors.iter().find(|spec| {
                spec.role != TensorRole::Precise && spec.shape.last() > Some(&COLUMNS_MAX)
            });
            longest.map_or(Ok(()), |spec| {
                Err(LoadError::Backend(format!(
                    "tensor {} has {:?} columns, integer products take at most {COLUMNS_MAX}; serve it with \
                     quantization none",
                    spec.name,
                    spec.shape.last().copied().unwrap_or_default()
                )))
            })
        }
        ResidentDtype::Float32 | ResidentDtype::Bfloat16 => Ok(()),
    }
}

/// Of each tensor that is a key-value up-projection, its attention.
pub(crate) fn absorbed(model: &Model) -> Vec<Option<&LatentAttention>> {
    let mut absorbed = vec![None; model.tensors.len()];
    for layer in model.cached_layers() {
        if let Attention::Latent(attention) = &layer.attention {
            absorbed[attention.kv_up.index()] = Some(attention);
        }
    }
    absorbed
}

/// A stored tensor in the form that the kernels read.
pub(crate) fn convert(
    tensor: &StoredTensor<'_>,
    model: &Model,
    id: WeightId,
    dtype: ResidentDtype,
    absorbed: Option<&LatentAttention>,
) -> Weight {
    let matrix = || Matrix::new(tensor, form(dtype, model, id));
    match absorbed {
        Some(attention) => absorb(tensor, attention, dtype.head()),
        None if is_looked_up(model, id) => Weight::Matrix(matrix()),
        None => Weight::Matrix(matrix().packed()),
    }
}

/// Whether a tensor's rows are only looked up, and not multiplied with.
pub(crate) fn is_looked_up(model: &Model, id: WeightId) -> bool {
    id == model.embedding && id != model.head
}

/// How a tensor that is not absorbed is kept.
pub(crate) fn form(dtype: ResidentDtype, model: &Model, id: WeightId) -> ResidentDtype {
    match model.tensors[id.index()].role {
        TensorRole::Precise => ResidentDtype::Float32,
        TensorRole::Table if id == model.head => dtype.head(),
        TensorRole::Table => dtype.embedding(),
        TensorRole::Matrix => dtype,
    }
}

fn absorb(tensor: &StoredTensor<'_>, attention: &LatentAttention, form: ResidentDtype) -> Weight {
    let LatentAttention {
        heads,
        nope,
        value,
        latent,
        ..
    } = *attention;
    let (keys, values) = match form {
        ResidentDtype::Float32 => {
            let (keys, values) = split_heads(&to_f32(tensor), attention);
            (Values::F32(keys.into()), Values::F32(values.into()))
        }
        ResidentDtype::Integer(format, _) => {
            let (keys, values) = split_heads(&to_f32(tensor), attention);
            // Each head's rows are multiplied by themselves.
            let pack = |rows: &[f32], columns: usize, part_rows: usize| {
                let mut packer = Packer::new(format, heads * part_rows, columns, part_rows);
                rows.chunks(columns).for_each(|row| packer.push(row));
                Values::Integer(packer.finish())
            };
            (pack(&keys, nope, latent), pack(&values, latent, value))
        }
        ResidentDtype::Bfloat16 | ResidentDtype::Float8E4m3(_) => {
            let (keys, values) = split_heads(&to_bf16(tensor), attention);
            (Values::Bf16(keys.into()), Values::Bf16(values.into()))
        }
    };
    let matrix = |rows, columns, values| {
        Matrix {
            rows,
            columns,
            values,
        }
        .packed()
    };
    Weight::Absorbed {
        key: matrix(latent, nope, keys),
        value: matrix(value, latent, values),
    }
}

/// Per head `[nope | value]` rows of `latent` columns → all heads' transposed keys, all heads' values.
fn split_heads<T: Copy>(values: &[T], attention: &LatentAttention) -> (Vec<T>, Vec<T>) {
    let LatentAttention {
        heads,
        nope,
        value,
        latent,
        ..
    } = *attention;
    let mut keys = Vec::with_capacity(heads * nope * latent);
    let mut rest = Vec::with_capacity(heads * value * latent);
    for head in values.chunks_exact((nope + value) * latent) {
        let (key, value) = head.split_at(nope * latent);
        for column in 0..latent {
            keys.extend((0..nope).map(|row| key[row * latent + column]));
        }
        rest.extend_from_slice(value);
    }
    (keys, rest)
}
