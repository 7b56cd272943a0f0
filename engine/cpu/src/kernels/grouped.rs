//! Grouped-query attention: the query heads that share a key-value head pass over its cache together.
//!
//! The cache of a layer is cut into blocks; a block holds, key-value head after head, the keys of its positions and
//! then their values. A head's part of a block is therefore one sequential stream, read from memory once for all query
//! heads of the group: they take turns on a chunk of the context while it is in the first-level cache.

use super::{
    ACCUMULATORS, CHUNK, Element, GROUP, Kernel, Lanes, accumulate, fold, load, store, totals,
};
use crate::lanes::LANES;

/// Query heads of one pass; a larger group is split into several.
pub(crate) const HEADS_MAX: usize = 16;

/// Attention of one token for some query heads with the same key-value head.
///
/// For each query head `out = Σ_p softmax(query · key_p * scale) value_p` over positions `0..context`, with the running
/// softmax over chunks of [`super::Attend`].
pub(crate) struct AttendGrouped<'a, C> {
    /// The key-value head's part of the layer's cache: block `b` begins at `b * block_stride` and holds `block_size`
    /// keys and then as many values, each of `width` elements. Position `p` is number `p % block_size` of block
    /// `blocks[p / block_size]`.
    pub cache: *const C,
    pub block_stride: usize,
    pub blocks: &'a [engine_core::BlockId],
    pub block_size: usize,
    pub context: usize,
    pub width: usize,
    pub scale: f32,
    /// First head's query; the next head's follows after `width` values.
    pub queries: *const f32,
    /// First head's output; the next head's follows after `width` values.
    pub out: *mut f32,
    /// At most [`HEADS_MAX`].
    pub heads: usize,
}

/// Running softmax of each head.
struct Running {
    maxima: [f32; HEADS_MAX],
    totals: [f32; HEADS_MAX],
}

/// Keys of a chunk's positions; the value of a position is `offset` elements further on.
struct Chunk<C> {
    keys: [*const C; CHUNK],
    offset: usize,
    count: usize,
    is_first: bool,
}

impl<C: Element> Kernel for AttendGrouped<'_, C> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut running = Running {
            maxima: [f32::NEG_INFINITY; HEADS_MAX],
            totals: [0.0; HEADS_MAX],
        };
        let mut start = 0;
        while start < self.context {
            unsafe {
                let chunk = self.chunk(start);
                let mut head = 0;
                while head + GROUP <= self.heads {
                    self.attend::<L, GROUP>(head, &chunk, &mut running);
                    head += GROUP;
                }
                while head < self.heads {
                    self.attend::<L, 1>(head, &chunk, &mut running);
                    head += 1;
                }
                start += chunk.count;
            }
        }
        for head in 0..self.heads {
            unsafe {
                let out = self.out.add(head * self.width);
                let inverse = L::splat(1.0 / running.totals[head]);
                each!(self.width, |at, lanes| {
                    let sum: L = load(out.add(at).cast_const(), lanes);
                    store(sum.mul(inverse), out.add(at), lanes);
                });
            }
        }
    }
}

impl<C: Element> AttendGrouped<'_, C> {
    #[inline(always)]
    unsafe fn chunk(&self, start: usize) -> Chunk<C> {
        let count = CHUNK.min(self.context - start);
        let mut keys = [std::ptr::null::<C>(); CHUNK];
        for (offset, key) in keys.iter_mut().enumerate().take(count) {
            let position = start + offset;
            let block = self.blocks[position / self.block_size].index();
            let place = block * self.block_stride + position % self.block_size * self.width;
            *key = unsafe { self.cache.add(place) };
        }
        Chunk {
            keys,
            offset: self.block_size * self.width,
            count,
            is_first: start == 0,
        }
    }

    /// Folds a chunk into the outputs of `H` heads.
    #[inline(always)]
    unsafe fn attend<L: Lanes, const H: usize>(
        &self,
        first: usize,
        chunk: &Chunk<C>,
        running: &mut Running,
    ) {
        unsafe {
            let queries: [*const f32; H] =
                std::array::from_fn(|head| self.queries.add((first + head) * self.width));
            let outs: [*mut f32; H] =
                std::array::from_fn(|head| self.out.add((first + head) * self.width));
            let mut scores = [[f32::NEG_INFINITY; CHUNK]; H];
            for (position, key) in chunk.keys.iter().enumerate().take(chunk.count) {
                let mut sums = [[L::splat(0.0); ACCUMULATORS]; H];
                accumulate(&mut sums, *key, queries, self.width);
                let products = totals(sums);
                for head in 0..H {
                    scores[head][position] = products[head] * self.scale;
                }
            }
            let mut rescale = [0.0f32; H];
            for head in 0..H {
                rescale[head] = fold::<L>(
                    &mut scores[head],
                    chunk.count,
                    &mut running.maxima[first + head],
                    &mut running.totals[first + head],
                );
            }
            each!(self.width, |at, lanes| {
                let mut sums = [L::splat(0.0); H];
                if !chunk.is_first {
                    for head in 0..H {
                        let sum: L = load(outs[head].add(at).cast_const(), lanes);
                        sums[head] = sum.mul(L::splat(rescale[head]));
                    }
                }
                for (position, key) in chunk.keys.iter().enumerate().take(chunk.count) {
                    let value: L = load(key.add(chunk.offset + at), lanes);
                    for head in 0..H {
                        sums[head] = value.mul_add(L::splat(scores[head][position]), sums[head]);
                    }
                }
                for head in 0..H {
                    store(sums[head], outs[head].add(at), lanes);
                }
            });
        }
    }
}

#[cfg(test)]
mod tests;
