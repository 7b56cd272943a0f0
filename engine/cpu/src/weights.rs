//! Weights in the form the kernels read.
//!
//! Matrices `[out, in]` are float32, row-major, or bfloat16, in panels (see [`crate::packed`]); an embedding that is not
//! the head, too, is only looked up, and row-major. Norms, gates and biases are float32. The key-value up-projection is
//! held per head as a transposed key part and a value part, ready for absorbed attention; it takes exactly the bytes of
//! the stored matrix.

use std::sync::OnceLock;

use engine_load::{LoadError, Progress, StoredTensor, TensorSource, convert};
use engine_memory::ResidentDtype;
use engine_model::{Attention, LatentAttention, Model, TensorRole, WeightId};
use half::bf16;

use crate::packed::Packed;
use crate::pool::Pool;

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
    F32(Vec<f32>),
    /// Row-major; only for looking rows up.
    Bf16(Vec<bf16>),
    /// In panels, for products.
    Packed(Packed),
}

impl Values {
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * 4,
            Self::Bf16(values) => values.len() * 2,
            Self::Packed(packed) => packed.bytes(),
        }
    }
}

impl Matrix {
    /// Row-major.
    fn new(tensor: &StoredTensor<'_>, wide: bool) -> Self {
        let (rows, columns) = match tensor.spec.shape.as_slice() {
            [length] => (1, *length),
            [rows, columns] => (*rows, *columns),
            _ => (0, 0),
        };
        let values = if wide {
            Values::F32(convert::to_f32(tensor))
        } else {
            Values::Bf16(convert::to_bf16(tensor))
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

/// All tensors of a model, by [`WeightId`].
#[derive(Debug)]
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
        let wide = match dtype {
            ResidentDtype::Float32 => true,
            ResidentDtype::Bfloat16 => false,
            ResidentDtype::Float8E4m3(_) => {
                return Err(LoadError::Backend(
                    "the CPU backend keeps weights as float32 or bfloat16, not FP8".into(),
                ));
            }
        };
        let mut absorbed: Vec<Option<&LatentAttention>> = vec![None; model.tensors.len()];
        for layer in &model.layers {
            if let Attention::Latent(attention) = &layer.attention {
                absorbed[attention.kv_up.index()] = Some(attention);
            }
        }
        progress.begin(source.stored_bytes(model));
        let slots: Vec<OnceLock<Weight>> = model.tensors.iter().map(|_| OnceLock::new()).collect();
        pool.run(slots.len(), &|index| {
            source.read(model, WeightId(index as u32), &mut |tensor| {
                let wide = wide || tensor.spec.role == TensorRole::Precise;
                let matrix = Matrix::new(tensor, wide);
                let id = WeightId(index as u32);
                let weight = match absorbed[index] {
                    Some(attention) => absorb(&matrix, attention),
                    None if id == model.embedding && id != model.head => Weight::Matrix(matrix),
                    None => Weight::Matrix(matrix.packed()),
                };
                // Each index is visited once, so the slot is empty.
                let _ = slots[index].set(weight);
                let scales = tensor.scales.map_or(0, |scales| scales.bytes.len());
                progress.add((tensor.bytes.len() + scales) as u64);
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
            values.fill(f32::NAN);
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let size = |weight: &Weight| match weight {
            Weight::Matrix(matrix) => matrix.values.bytes(),
            Weight::Absorbed { key, value } => key.values.bytes() + value.values.bytes(),
        };
        self.0.iter().map(|weight| size(weight) as u64).sum()
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
            Values::Bf16(_) | Values::Packed(_) => &[],
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

fn absorb(up: &Matrix, attention: &LatentAttention) -> Weight {
    let (key, value) = match &up.values {
        Values::F32(values) => {
            let (key, value) = split_heads(values, attention);
            (Values::F32(key), Values::F32(value))
        }
        Values::Bf16(values) => {
            let (key, value) = split_heads(values, attention);
            (Values::Bf16(key), Values::Bf16(value))
        }
        Values::Packed(_) => unreachable!("a tensor is read row-major"),
    };
    let matrix = |rows, columns, values| Matrix {
        rows,
        columns,
        values,
    };
    Weight::Absorbed {
        key: matrix(attention.latent, attention.nope, key).packed(),
        value: matrix(attention.value, attention.latent, value).packed(),
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
