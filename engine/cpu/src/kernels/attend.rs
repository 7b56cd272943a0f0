//! Absorbed latent attention over a bfloat16 cache, in pairs.
//!
//! The same running softmax as [`super::Attend`], with queries and probabilities rounded to bfloat16 before they meet the
//! cached rows (DeepSeek-V3's `inference/model.py` casts both, too). Scores of four heads with four positions are a
//! register tile of [`super::paired`]; values are added two positions at a time.
//!
//! Invariant: a score is one chain over its row; an output adds the pairs of positions of a chunk in order. Neither
//! depends on which heads or positions share a tile.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the parent

use half::bf16;

use super::paired::{PairedKernel, round};
use super::panel::prefetch;
use super::{Attend, CHUNK, GROUP, fold};
use crate::lanes::{LANES, PAIRED, Pairs};

const AHEAD: usize = 1024;

/// See the module's description.
pub(crate) struct PairedAttend<'a> {
    pub of: Attend<'a, bf16>,
    /// Room for [`GROUP`] rounded queries: [`PairedAttend::scratch_length`] elements.
    pub scratch: &'a mut [u16],
}

impl PairedAttend<'_> {
    /// Elements that the rounded queries take.
    pub fn scratch_length(latent: usize, rope: usize) -> usize {
        // The parts are rounded one after the other, each in whole steps of lanes.
        (latent + rope + LANES).next_multiple_of(PAIRED) * GROUP
    }
}

impl PairedKernel for PairedAttend<'_> {
    #[inline(always)]
    unsafe fn run<P: Pairs>(mut self) {
        let mut head = 0;
        unsafe {
            while head + GROUP <= self.of.heads {
                self.group::<P, GROUP>(head);
                head += GROUP;
            }
            while head < self.of.heads {
                self.group::<P, 1>(head);
                head += 1;
            }
        }
    }
}

impl PairedAttend<'_> {
    #[inline(always)]
    unsafe fn group<P: Pairs, const H: usize>(&mut self, first: usize) {
        unsafe {
            let queries = self.round_queries::<P, H>(first);
            let outs: [*mut f32; H] =
                std::array::from_fn(|head| self.of.out.add((first + head) * self.of.latent));
            let mut maxima = [f32::NEG_INFINITY; H];
            let mut totals = [0.0f32; H];
            for start in (0..self.of.context).step_by(CHUNK) {
                let count = CHUNK.min(self.of.context - start);
                let rows = self.cached_rows(start, count);
                let mut scores = self.scores::<P, H>(queries, &rows, count);
                let mut rescale = [0.0f32; H];
                for head in 0..H {
                    let (maximum, total) = (&mut maxima[head], &mut totals[head]);
                    rescale[head] = fold::<P::Wide>(&mut scores[head], count, maximum, total);
                }
                let mut weights = [[0u16; CHUNK]; H];
                for head in 0..H {
                    round::<P>(scores[head].as_ptr(), CHUNK, weights[head].as_mut_ptr());
                }
                for at in (0..self.of.latent).step_by(PAIRED) {
                    let wide = PAIRED.min(self.of.latent - at);
                    let outs = outs.map(|out| out.add(at));
                    let before = (start > 0).then_some(rescale);
                    add_values::<P, H>(outs, wide, before, &weights, &rows, at, count);
                }
            }
            for head in 0..H {
                let inverse = 1.0 / totals[head];
                for value in std::slice::from_raw_parts_mut(outs[head], self.of.latent) {
                    *value *= inverse;
                }
            }
        }
    }

    /// Rounds the queries of `H` heads, each `[latent | rotated]` filled up to whole steps with zeros.
    #[inline(always)]
    unsafe fn round_queries<P: Pairs, const H: usize>(&mut self, first: usize) -> [*const u16; H] {
        let (latent, rope) = (self.of.latent, self.of.rope);
        let stride = self.scratch.len() / GROUP;
        for head in 0..H {
            let query = &mut self.scratch[head * stride..(head + 1) * stride];
            query.fill(0);
            unsafe {
                let from = self.of.latent_queries.add((first + head) * latent);
                round::<P>(from, latent, query.as_mut_ptr());
                let from = self
                    .of
                    .rotated_queries
                    .cast::<u16>()
                    .add((first + head) * self.of.rotated_stride);
                std::ptr::copy_nonoverlapping(from, query[latent..].as_mut_ptr(), rope);
            }
        }
        let start = self.scratch.as_ptr();
        std::array::from_fn(|head| start.wrapping_add(head * stride))
    }

    /// Where `count` positions from `start` on are cached; the rest points at the last of them.
    #[inline(always)]
    fn cached_rows(&self, start: usize, count: usize) -> [*const u16; CHUNK] {
        let width = self.of.latent + self.of.rope;
        std::array::from_fn(|offset| {
            let position = start + offset.min(count - 1);
            let block = self.of.blocks[position / self.of.block_size].index();
            let slot = block * self.of.block_size + position % self.of.block_size;
            self.of.cache.wrapping_add(slot * width).cast()
        })
    }

    #[inline(always)]
    unsafe fn scores<P: Pairs, const H: usize>(
        &self,
        queries: [*const u16; H],
        rows: &[*const u16; CHUNK],
        count: usize,
    ) -> [[f32; CHUNK]; H] {
        const WIDE: usize = 4;
        let width = self.of.latent + self.of.rope;
        let mut scores = [[f32::NEG_INFINITY; CHUNK]; H];
        for at in (0..count).step_by(WIDE) {
            unsafe {
                // Rows beyond the count repeat the last one; their scores are dropped.
                let four = std::array::from_fn(|offset| rows[at + offset]);
                let sums = block::<P, H, WIDE, true>(queries, four, width, AHEAD);
                let products = totals::<P, H, WIDE>(sums);
                for offset in 0..WIDE.min(count - at) {
                    for head in 0..H {
                        scores[head][at + offset] = products[head][offset] * self.of.scale;
                    }
                }
            }
        }
        scores
    }
}

/// The totals of a tile, sixteen at once where there are so many.
#[inline(always)]
unsafe fn totals<P: Pairs, const R: usize, const C: usize>(sums: [[P; C]; R]) -> [[f32; C]; R] {
    unsafe {
        if R * C == LANES {
            let all = P::totals(std::array::from_fn(|at| sums[at / C][at % C]));
            return std::array::from_fn(|r| std::array::from_fn(|c| all[r * C + c]));
        }
        sums.map(|row| row.map(|sum| sum.total()))
    }
}

/// `outs[head][..wide] = outs[head][..wide] * before + Σ_p weights[head][p] * rows[p][at..at + wide]`; nothing was there
/// before when `before` is absent.
#[inline(always)]
unsafe fn add_values<P: Pairs, const H: usize>(
    outs: [*mut f32; H],
    wide: usize,
    before: Option<[f32; H]>,
    weights: &[[u16; CHUNK]; H],
    rows: &[*const u16; CHUNK],
    at: usize,
    count: usize,
) {
    unsafe {
        let mut sums = [[P::zero(); 2]; H];
        if let Some(factors) = before {
            for head in 0..H {
                let mut values = [0.0f32; PAIRED];
                std::ptr::copy_nonoverlapping(outs[head], values.as_mut_ptr(), wide);
                for half in 0..2 {
                    let old = P::load_sums(values.as_ptr().add(half * LANES));
                    sums[head][half] = old.scale(factors[head]);
                }
            }
        }
        let load = |row: *const u16| {
            if wide == PAIRED {
                P::load(row.add(at))
            } else {
                P::load_part(row.add(at), wide)
            }
        };
        // The weight of a position beyond the count is zero.
        for position in (0..count).step_by(2) {
            let values = P::interleave(load(rows[position]), load(rows[position + 1]));
            for head in 0..H {
                let [a, b] = [weights[head][position], weights[head][position + 1]];
                let weight = P::splat(u32::from(a) | u32::from(b) << 16);
                for half in 0..2 {
                    sums[head][half] = sums[head][half].add_products(values[half], weight);
                }
            }
        }
        for head in 0..H {
            let mut values = [0.0f32; PAIRED];
            for half in 0..2 {
                let lanes = sums[head][half].lanes();
                values[half * LANES..(half + 1) * LANES].copy_from_slice(&lanes);
            }
            std::ptr::copy_nonoverlapping(values.as_ptr(), outs[head], wide);
        }
    }
}

/// The sums of the products of `R` rows, filled up to whole steps with zeros, with `C` rows of `length` elements.
/// `STREAM` asks the memory for what lies `ahead` elements after the latter.
#[inline(always)]
unsafe fn block<P: Pairs, const R: usize, const C: usize, const STREAM: bool>(
    rows: [*const u16; R],
    weights: [*const u16; C],
    length: usize,
    ahead: usize,
) -> [[P; C]; R] {
    unsafe {
        let mut sums = [[P::zero(); C]; R];
        let whole = length / PAIRED * PAIRED;
        let mut at = 0;
        while at < whole {
            if STREAM {
                for weight in weights {
                    prefetch(weight.wrapping_add(at + ahead).cast());
                }
            }
            let factors = std::array::from_fn(|c| P::load(weights[c].add(at)));
            step(&mut sums, factors, rows, at);
            at += PAIRED;
        }
        if at < length {
            let factors = std::array::from_fn(|c| P::load_part(weights[c].add(at), length - at));
            step(&mut sums, factors, rows, at);
        }
        sums
    }
}

/// Adds the products of one step of `R` rows and `C` columns.
#[inline(always)]
unsafe fn step<P: Pairs, const R: usize, const C: usize>(
    sums: &mut [[P; C]; R],
    factors: [P::Elements; C],
    rows: [*const u16; R],
    at: usize,
) {
    for r in 0..R {
        unsafe {
            let values = P::load(rows[r].add(at));
            for c in 0..C {
                sums[r][c] = sums[r][c].add_products(values, factors[c]);
            }
        }
    }
}
