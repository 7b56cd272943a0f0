//! The tensors a model expects to find in its weight files.

/// A tensor of a model: an index into [`crate::Model::tensors`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WeightId(pub u32);

impl WeightId {
    /// The index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a tensor is for; decides which stored dtypes are right and what it is kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorRole {
    /// A linear map, `[out, in]`: the checkpoint's dtype, FP8 with block scales included.
    Matrix,
    /// Embedding or head: the checkpoint's dtype, never FP8.
    Table,
    /// A norm's weight, a bias, a gate: any float dtype, computed with in float32.
    Precise,
}

/// Name, shape and role of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// As in the file.
    pub name: String,
    /// As in the file: `[out, in]` or `[length]`.
    pub shape: Vec<usize>,
    /// See [`TensorRole`].
    pub role: TensorRole,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Collects specs and hands out their ids.
#[derive(Debug, Default)]
pub(crate) struct TensorList(pub Vec<TensorSpec>);

impl TensorList {
    pub fn add(&mut self, name: String, shape: &[u32], role: TensorRole) -> WeightId {
        let id = WeightId(u32::try_from(self.0.len()).unwrap_or(u32::MAX));
        self.0.push(TensorSpec {
            name,
            shape: shape.iter().map(|size| *size as usize).collect(),
            role,
        });
        id
    }

    pub fn matrix(&mut self, name: String, out: u32, input: u32) -> WeightId {
        self.add(name, &[out, input], TensorRole::Matrix)
    }

    /// Norm weights or biases.
    pub fn vector(&mut self, name: String, length: u32) -> WeightId {
        self.add(name, &[length], TensorRole::Precise)
    }
}
