//! Weights in the form the kernels read.
//!
//! Matrices are float32 or bfloat16, row-major, as `[out, in]`. Norms, gates and biases are float32. The key-value
//! up-projection is held per head as a transposed key part and a value part, ready for absorbed attention; it takes
//! exactly the bytes of the stored matrix.

use std::sync::OnceLock;

use engine_load::{LoadError, Progress, StoredTensor, TensorSource, convert};
use engine_memory::ResidentDtype;
use engine_model::{Attention, LatentAttention, Model, TensorRole, WeightId};
use half::bf16;

use crate::pool::Pool;

/// A row-major matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub values: Values,
}

/// Elements of a matrix.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Values {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

impl Values {
    pub fn bytes(&self) -> usize {
        match self {
            Self::F32(values) => values.len() * 4,
            Self::Bf16(values) => values.len() * 2,
        }
    }
}

impl Matrix {
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
}

/// One tensor, ready for use.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Weight {
    Matrix(Matrix),
    Absorbed {
        /// `[heads * latent, nope]`.
        key: Matrix,
        /// `[heads * value, latent]`.
        value: Matrix,
    },
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
                let weight = match absorbed[index] {
                    Some(attention) => absorb(&matrix, attention),
                    None => Weight::Matrix(matrix),
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
            Values::Bf16(_) => &[],
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
    let LatentAttention {
        heads,
        nope,
        value,
        latent,
        ..
    } = *attention;
    let split = |values: &Values| match values {
        Values::F32(values) => {
            let (key, value) = split_heads(values, attention);
            (Values::F32(key), Values::F32(value))
        }
        Values::Bf16(values) => {
            let (key, value) = split_heads(values, attention);
            (Values::Bf16(key), Values::Bf16(value))
        }
    };
    let (key_values, value_values) = split(&up.values);
    Weight::Absorbed {
        key: Matrix {
            rows: heads * latent,
            columns: nope,
            values: key_values,
        },
        value: Matrix {
            rows: heads * value,
            columns: latent,
            values: value_values,
        },
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
