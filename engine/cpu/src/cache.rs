//! The block cache of attention.
//!
//! One allocation per layer. A block is one contiguous piece that can be copied or shared as a whole. With latent
//! attention block `b` holds rows `b * block_size ..` of `[latent | rotated key]`, one for each position; with
//! grouped-query attention it holds, key-value head after head, the keys of its positions and then their values.

use engine_memory::ResidentDtype;
use engine_model::Model;
use half::bf16;

use crate::compute::Shared;

/// Elements of one layer.
#[derive(Debug)]
pub(crate) enum CacheValues {
    F32(Vec<f32>),
    Bf16(Vec<bf16>),
}

/// A layer's rows as a pointer of their element type.
#[derive(Clone, Copy)]
pub(crate) enum CacheTarget {
    F32(Shared<f32>),
    Bf16(Shared<bf16>),
}

/// Smallest page of memory.
const PAGE_BYTES: usize = 4096;

/// Writes to every page.
fn touch<T: Copy + Send>(values: &mut [T], threads: usize) {
    let share = values.len().div_ceil(threads.max(1)).max(1);
    std::thread::scope(|scope| {
        for part in values.chunks_mut(share) {
            scope.spawn(move || {
                for value in part.iter_mut().step_by(PAGE_BYTES / size_of::<T>()) {
                    // Only the write counts, which must not be optimised away.
                    *std::hint::black_box(&mut *value) = *value;
                }
            });
        }
    });
}

/// All layers' rows.
#[derive(Debug)]
pub(crate) struct Cache {
    layers: Vec<CacheValues>,
    block_size: usize,
}

impl Cache {
    /// Zeroed memory for `blocks` blocks of `block_size` positions in every layer.
    pub fn new(model: &Model, dtype: ResidentDtype, blocks: usize, block_size: usize) -> Self {
        let layers = model
            .cached_layers()
            .map(|layer| {
                let length = blocks * block_size * layer.kv.width();
                match dtype {
                    ResidentDtype::Float32 => CacheValues::F32(vec![0.0; length]),
                    ResidentDtype::Bfloat16
                    | ResidentDtype::Float8E4m3(_)
                    | ResidentDtype::Integer(..) => CacheValues::Bf16(vec![bf16::ZERO; length]),
                }
            })
            .collect();
        Self { layers, block_size }
    }

    /// Takes every page of the cache from the system now. Zeroed memory comes into being at its first use otherwise,
    /// and a machine that has less than it promised would end the process in the middle of a request.
    pub fn commit(&mut self, threads: usize) {
        for layer in &mut self.layers {
            match layer {
                CacheValues::F32(values) => touch(values, threads),
                CacheValues::Bf16(values) => touch(values, threads),
            }
        }
    }

    /// Positions per block.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        let size = |layer: &CacheValues| match layer {
            CacheValues::F32(values) => values.len() * 4,
            CacheValues::Bf16(values) => values.len() * 2,
        };
        self.layers.iter().map(|layer| size(layer) as u64).sum()
    }

    /// The rows of a layer.
    pub fn layer_mut(&mut self, layer: usize) -> CacheTarget {
        match &mut self.layers[layer] {
            CacheValues::F32(values) => CacheTarget::F32(Shared(values.as_mut_ptr())),
            CacheValues::Bf16(values) => CacheTarget::Bf16(Shared(values.as_mut_ptr())),
        }
    }
}
