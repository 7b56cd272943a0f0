//! The tensors a model expects to find in its weight files, and which rows of them a rank holds.

use std::ops::Range;

use engine_spec::Rank;

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
    /// What is held: `[out, in]` or `[length]`, as in the file where a rank holds all of it.
    pub shape: Vec<usize>,
    /// See [`TensorRole`].
    pub role: TensorRole,
    /// Which rows of the file's tensor these are; all of them when absent.
    pub share: Option<RowShare>,
    /// Its place among the tensors of the whole model, the same on every rank.
    pub ordinal: u32,
}

/// A rank's rows of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RowShare {
    /// First row in the file.
    pub first: usize,
    /// Rows in the file.
    pub of: usize,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Shape in the file.
    pub fn stored_shape(&self) -> Vec<usize> {
        let mut shape = self.shape.clone();
        if let (Some(share), Some(rows)) = (self.share, shape.first_mut()) {
            *rows = share.of;
        }
        shape
    }
}

/// Collects specs and hands out their ids.
#[derive(Debug)]
pub(crate) struct TensorList {
    pub specs: Vec<TensorSpec>,
    /// Whose tensors these are.
    pub rank: Rank,
    next: u32,
}

impl TensorList {
    pub fn new(rank: Rank) -> Self {
        Self {
            specs: Vec::new(),
            rank,
            next: 0,
        }
    }

    /// A tensor that every rank holds.
    pub fn add(&mut self, name: String, shape: &[u32], role: TensorRole) -> WeightId {
        let rows = shape.first().map_or(0, |rows| *rows as usize);
        self.add_rows(name, shape, role, 0..rows)
    }

    /// A tensor of which the rank holds `rows`.
    pub fn add_rows(
        &mut self,
        name: String,
        shape: &[u32],
        role: TensorRole,
        rows: Range<usize>,
    ) -> WeightId {
        let id = WeightId(u32::try_from(self.specs.len()).unwrap_or(u32::MAX));
        let mut shape: Vec<usize> = shape.iter().map(|size| *size as usize).collect();
        let of = shape.first().copied().unwrap_or_default();
        if let Some(held) = shape.first_mut() {
            *held = rows.len();
        }
        self.specs.push(TensorSpec {
            name,
            shape,
            role,
            share: (rows.len() < of).then_some(RowShare {
                first: rows.start,
                of,
            }),
            ordinal: self.next,
        });
        self.next += 1;
        id
    }

    /// Passes over tensors of the whole model that other ranks hold.
    pub fn pass_over(&mut self, tensors: usize) {
        self.next += tensors as u32;
    }

    /// A tensor whose rows all ranks share: see [`Rank::share_rows`].
    pub fn add_split(&mut self, name: String, shape: &[u32], role: TensorRole) -> WeightId {
        let rows = shape.first().map_or(0, |rows| *rows as usize);
        let rows = self.rank.share_rows(rows);
        self.add_rows(name, shape, role, rows)
    }

    /// A linear map whose rows all ranks share.
    pub fn split_matrix(&mut self, name: String, out: u32, input: u32) -> WeightId {
        self.add_split(name, &[out, input], TensorRole::Matrix)
    }

    pub fn matrix(&mut self, name: String, out: u32, input: u32) -> WeightId {
        self.add(name, &[out, input], TensorRole::Matrix)
    }

    /// Norm weights or biases.
    pub fn vector(&mut self, name: String, length: u32) -> WeightId {
        self.add(name, &[length], TensorRole::Precise)
    }
}
