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
