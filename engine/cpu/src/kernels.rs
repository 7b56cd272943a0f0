//! The arithmetic of a step over [`Lanes`]: products, norms, activations and attention.
//!
//! Invariant (batch invariance): each output value is reduced in an order that depends on nothing but the length of
//! its own sum. Neither the number of rows, their grouping into a micro-kernel, the split into tasks nor the number of
//! threads enters, so the bytes of a row are the same alone and in company, in one chunk or in many.
//!
//! A float32 product walks the weight row once, as one sequential stream, with four sixteen-lane accumulators:
//! element `k` goes to lane `k % 16` of accumulator `k / 16 % 4`. Bfloat16 weights have [`panel`]'s chains. Attention
//! walks the context in chunks of [`CHUNK`] positions that begin at multiples of it.

#![allow(unsafe_code)]
// Index loops over small register arrays read like the arithmetic they unroll to.
#![allow(clippy::needless_range_loop)]

pub(crate) mod panel;
pub(crate) mod quantised;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2, Avx512};
use crate::lanes::{LANES, Lanes, Portable};

/// Accumulators of one product; four hide the latency of a multiply-add while the weights stream from memory.
const ACCUMULATORS: usize = 4;
/// Elements one round over the accumulators takes.
const STRIDE: usize = LANES * ACCUMULATORS;
/// Context positions whose scores are computed before they are folded into the output.
pub(crate) const CHUNK: usize = 64;
/// Rows (or heads) that share one pass over a weight row (or a cached latent).
pub(crate) const GROUP: usize = 4;

/// Instruction set the kernels run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2 with FMA.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX-512 F, BW, DQ, VL.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// The same with AVX512-BF16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl Isa {
    /// All that this CPU can run, best first.
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vl")
            {
                if is_x86_feature_detected!("avx512bf16") {
                    found.push(Self::Avx512Bf16);
                }
                found.push(Self::Avx512);
            }
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    /// The best that this CPU can run.
    pub fn best() -> Self {
        Self::available().first().copied().unwrap_or(Self::Portable)
    }

    /// Runs `kernel` with this instruction set's lanes.
    ///
    /// # Safety
    /// `self` must come from [`Isa::available`] or [`Isa::best`]; the kernel's own conditions must hold.
    #[inline]
    pub(crate) unsafe fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Portable => unsafe { kernel.run::<Portable>() },
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { on_avx2(kernel) },
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 => unsafe { on_avx512(kernel) },
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn on_avx2<K: Kernel>(kernel: K) {
    unsafe { kernel.run::<Avx2>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn on_avx512<K: Kernel>(kernel: K) {
    unsafe { kernel.run::<Avx512>() }
}

/// A loop nest written once over the lanes.
pub(crate) trait Kernel {
    /// # Safety
    /// The CPU has the lanes' features and the kernel's pointers are valid for what it names.
    unsafe fn run<L: Lanes>(self);
}

/// A stored weight or cache element that widens to f32 exactly.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// # Safety
    /// As [`Lanes::load`].
    unsafe fn load<L: Lanes>(from: *const Self) -> L;
    /// # Safety
    /// As [`Lanes::load_part`].
    unsafe fn load_part<L: Lanes>(from: *const Self, count: usize) -> L;
    /// Rounds to nearest even where the element is narrower.
    fn narrow(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        unsafe { L::load(from) }
    }

    #[inline(always)]
    unsafe fn load_part<L: Lanes>(from: *const Self, count: usize) -> L {
        unsafe { L::load_part(from, count) }
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    #[inline(always)]
    unsafe fn load<L: Lanes>(from: *const Self) -> L {
        unsafe { L::load_bf16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_part<L: Lanes>(from: *const Self, count: usize) -> L {
        unsafe { L::load_bf16_part(from.cast(), count) }
    }

    #[inline(always)]
    fn narrow(value: f32) -> Self {
        Self::from_f32(value)
    }
}

/// Runs a block for each sixteen of `0..length`: `$at` is the offset, `$count` is smaller than [`LANES`] for a rest.
///
/// A macro and not a function with a closure: a closure is compiled without the features of the function it stands in,
/// and every operation on lanes in it would become a call.
macro_rules! each {
    ($length:expr, |$at:ident, $count:ident| $body:block) => {{
        let length: usize = $length;
        let mut position = 0;
        while position + LANES <= length {
            let ($at, $count) = (position, LANES);
            $body;
            position += LANES;
        }
        if position < length {
            let ($at, $count) = (position, length - position);
            $body;
        }
    }};
}

/// Reads sixteen values, or the first `count` where fewer are left.
#[inline(always)]
unsafe fn load<L: Lanes, W: Element>(from: *const W, count: usize) -> L {
    unsafe {
        if count == LANES {
            W::load(from)
        } else {
            W::load_part(from, count)
        }
    }
}

/// Writes sixteen values, or the first `count` where fewer are left.
#[inline(always)]
unsafe fn store<L: Lanes>(values: L, to: *mut f32, count: usize) {
    unsafe {
        if count == LANES {
            values.store(to);
        } else {
            values.store_part(to, count);
        }
    }
}

/// Running sums of `R` dot products with one weight row.
type Sums<L, const R: usize> = [[L; ACCUMULATORS]; R];

/// Adds the products of one weight row with `R` activation rows.
#[inline(always)]
unsafe fn accumulate<L: Lanes, W: Element, const R: usize>(
    sums: &mut Sums<L, R>,
    weight: *const W,
    rows: [*const f32; R],
    length: usize,
) {
    unsafe {
        let mut at = 0;
        while at + STRIDE <= length {
            for part in 0..ACCUMULATORS {
                let offset = at + part * LANES;
                let factor: L = W::load(weight.add(offset));
                for row in 0..R {
                    sums[row][part] =
                        L::load(rows[row].add(offset)).mul_add(factor, sums[row][part]);
                }
            }
            at += STRIDE;
        }
        for part in 0..ACCUMULATORS {
            let offset = at + part * LANES;
            if offset + LANES <= length {
                let factor: L = W::load(weight.add(offset));
                for row in 0..R {
                    sums[row][part] =
                        L::load(rows[row].add(offset)).mul_add(factor, sums[row][part]);
                }
            } else if offset < length {
                let count = length - offset;
                let factor: L = W::load_part(weight.add(offset), count);
                for row in 0..R {
                    sums[row][part] =
                        L::load_part(rows[row].add(offset), count).mul_add(factor, sums[row][part]);
                }
            }
        }
    }
}

/// The totals of running sums.
#[inline(always)]
unsafe fn totals<L: Lanes, const R: usize>(sums: Sums<L, R>) -> [f32; R] {
    let mut results = [0.0; R];
    for (result, [a, b, c, d]) in results.iter_mut().zip(sums) {
        *result = unsafe { a.add(b).add(c.add(d)).sum() };
    }
    results
}

/// `R` dot products of one weight row with `R` activation rows.
#[inline(always)]
unsafe fn dots<L: Lanes, W: Element, const R: usize>(
    weight: *const W,
    rows: [*const f32; R],
    length: usize,
) -> [f32; R] {
    unsafe {
        let mut sums = [[L::splat(0.0); ACCUMULATORS]; R];
        accumulate(&mut sums, weight, rows, length);
        totals(sums)
    }
}

/// `e^x` for `x` in [-87.3, 88.3] (clamped), error below 2 units in the last place; a NaN stays a NaN.
///
/// Cody and Waite's reduction with the minimax polynomial of the Cephes library's `expf`.
#[inline(always)]
pub(crate) unsafe fn exp<L: Lanes>(x: L) -> L {
    unsafe {
        let x = x.max(L::splat(-87.3)).min(L::splat(88.3));
        // 1.5 * 2^23 makes the addition round to an integer in the low mantissa bits; 127 biases the exponent.
        let magic = L::splat(12_582_912.0 + 127.0);
        let biased = x.mul_add(L::splat(std::f32::consts::LOG2_E), magic);
        let exponent = biased.sub(magic);
        let rest = exponent.mul_add(L::splat(-0.693_359_4), x);
        let rest = exponent.mul_add(L::splat(2.121_944_4e-4), rest);
        let mut poly = L::splat(1.987_569_1e-4);
        for coefficient in [
            1.398_2e-3,
            8.333_452e-3,
            4.166_579_6e-2,
            1.666_666_5e-1,
            0.5,
        ] {
            poly = poly.mul_add(rest, L::splat(coefficient));
        }
        let poly = poly.mul_add(rest.mul(rest), rest.add(L::splat(1.0)));
        poly.mul(biased.shift_to_exponent())
    }
}

/// Which activation rows a product reads.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Rows<'a> {
    /// `start`, `start + 1`, …
    From(usize),
    /// The listed ones.
    Listed(&'a [u32]),
}

impl Rows<'_> {
    #[inline(always)]
    fn get(self, index: usize) -> usize {
        match self {
            Self::From(start) => start + index,
            Self::Listed(rows) => rows[index] as usize,
        }
    }
}

/// `out[index][column] = input[rows[index]] · weight[column]` for `index` in `indices` and `column` in `columns`.
///
/// Pointers: `weight` to rows of `length` elements; `input` and `out` to rows `input_stride` and `out_stride` apart.
pub(crate) struct Product<'a> {
    pub weight: *const f32,
    pub length: usize,
    pub columns: std::ops::Range<usize>,
    pub input: *const f32,
    pub input_stride: usize,
    pub rows: Rows<'a>,
    pub indices: std::ops::Range<usize>,
    pub out: *mut f32,
    pub out_stride: usize,
}

impl Kernel for Product<'_> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        for column in self.columns {
            unsafe {
                let weight = self.weight.add(column * self.length);
                let row = |index: usize| self.input.add(self.rows.get(index) * self.input_stride);
                let out = |index: usize| self.out.add(index * self.out_stride + column);
                let mut index = self.indices.start;
                while index + GROUP <= self.indices.end {
                    let rows = std::array::from_fn(|offset| row(index + offset));
                    let results = dots::<L, f32, GROUP>(weight, rows, self.length);
                    for (offset, result) in results.into_iter().enumerate() {
                        *out(index + offset) = result;
                    }
                    index += GROUP;
                }
                while index < self.indices.end {
                    let [result] = dots::<L, f32, 1>(weight, [row(index)], self.length);
                    *out(index) = result;
                    index += 1;
                }
            }
        }
    }
}

/// `out = input / rms(input) * weight`, `rms = sqrt(mean(input²) + epsilon)`; `out` may be `input`.
pub(crate) struct RmsNorm {
    pub input: *const f32,
    pub weight: *const f32,
    pub out: *mut f32,
    pub length: usize,
    pub epsilon: f32,
}

impl Kernel for RmsNorm {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let [squares] = dots::<L, f32, 1>(self.input, [self.input], self.length);
            let scale = 1.0 / (squares / self.length as f32 + self.epsilon).sqrt();
            let scale = L::splat(scale);
            each!(self.length, |at, count| {
                let normed: L = load::<L, f32>(self.input.add(at), count).mul(scale);
                let weight: L = load(self.weight.add(at), count);
                store(normed.mul(weight), self.out.add(at), count);
            });
        }
    }
}

/// `out = silu(gate) * up`.
pub(crate) struct SiluProduct {
    pub gate: *const f32,
    pub up: *const f32,
    pub out: *mut f32,
    pub length: usize,
}

impl Kernel for SiluProduct {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            each!(self.length, |at, count| {
                let gate: L = load(self.gate.add(at), count);
                let up: L = load(self.up.add(at), count);
                store(silu_product(gate, up), self.out.add(at), count);
            });
        }
    }
}

/// `gate / (1 + e^-gate) * up`.
#[inline(always)]
unsafe fn silu_product<L: Lanes>(gate: L, up: L) -> L {
    unsafe {
        let (zero, one) = (L::splat(0.0), L::splat(1.0));
        gate.div(one.add(exp(zero.sub(gate)))).mul(up)
    }
}

/// `sum += term * factor`.
pub(crate) struct AddScaled {
    pub sum: *mut f32,
    pub term: *const f32,
    pub factor: f32,
    pub length: usize,
}

impl Kernel for AddScaled {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        unsafe {
            let factor = L::splat(self.factor);
            each!(self.length, |at, count| {
                let sum: L = load(self.sum.add(at), count);
                let term: L = load(self.term.add(at), count);
                store(term.mul_add(factor, sum), self.sum.add(at), count);
            });
        }
    }
}

/// Absorbed latent attention of one token for some heads.
///
/// A cached row holds the normed latent (`latent` elements) and the rotated shared key (`rope` elements). A head's query
/// has the same two parts, the first being its non-positional part multiplied into the latent space. For each head
/// `out = Σ_p softmax(query · row_p * scale) row_p[..latent]` over positions `0..context`.
///
/// The softmax is the running one (one pass, rescaled when a chunk brings a new maximum) over chunks that begin at
/// multiples of [`CHUNK`] positions, so that it does not depend on how the context came to be.
pub(crate) struct Attend<'a, C> {
    /// The layer's cache; row `blocks[p / block_size] * block_size + p % block_size` belongs to position `p`.
    pub cache: *const C,
    pub blocks: &'a [engine_core::BlockId],
    pub block_size: usize,
    pub context: usize,
    pub latent: usize,
    pub rope: usize,
    pub scale: f32,
    /// First head's latent query; the next head's follows after `latent` values.
    pub latent_queries: *const f32,
    /// First head's rotated query; the next head's follows after `rotated_stride` values.
    pub rotated_queries: *const f32,
    pub rotated_stride: usize,
    /// First head's output; the next head's follows after `latent` values.
    pub out: *mut f32,
    pub heads: usize,
}

impl<C: Element> Kernel for Attend<'_, C> {
    #[inline(always)]
    unsafe fn run<L: Lanes>(self) {
        let mut head = 0;
        while head + GROUP <= self.heads {
            unsafe { self.group::<L, GROUP>(head) };
            head += GROUP;
        }
        while head < self.heads {
            unsafe { self.group::<L, 1>(head) };
            head += 1;
        }
    }
}

impl<C: Element> Attend<'_, C> {
    #[inline(always)]
    unsafe fn group<L: Lanes, const H: usize>(&self, first: usize) {
        let width = self.latent + self.rope;
        unsafe {
            let latent_queries: [*const f32; H] =
                std::array::from_fn(|head| self.latent_queries.add((first + head) * self.latent));
            let rotated_queries: [*const f32; H] = std::array::from_fn(|head| {
                self.rotated_queries
                    .add((first + head) * self.rotated_stride)
            });
            let outs: [*mut f32; H] =
                std::array::from_fn(|head| self.out.add((first + head) * self.latent));
            let mut maxima = [f32::NEG_INFINITY; H];
            let mut weights = [0.0f32; H];
            let mut start = 0;
            while start < self.context {
                let count = CHUNK.min(self.context - start);
                let mut rows = [std::ptr::null::<C>(); CHUNK];
                for (offset, row) in rows.iter_mut().enumerate().take(count) {
                    let position = start + offset;
                    let block = self.blocks[position / self.block_size].index();
                    let slot = block * self.block_size + position % self.block_size;
                    *row = self.cache.add(slot * width);
                }
                let mut scores = [[f32::NEG_INFINITY; CHUNK]; H];
                for (offset, row) in rows.iter().enumerate().take(count) {
                    let mut sums = [[L::splat(0.0); ACCUMULATORS]; H];
                    accumulate(&mut sums, *row, latent_queries, self.latent);
                    accumulate(&mut sums, row.add(self.latent), rotated_queries, self.rope);
                    let products = totals(sums);
                    for head in 0..H {
                        scores[head][offset] = products[head] * self.scale;
                    }
                }
                let mut rescale = [0.0f32; H];
                for head in 0..H {
                    rescale[head] = fold::<L>(
                        &mut scores[head],
                        count,
                        &mut maxima[head],
                        &mut weights[head],
                    );
                }
                let first_chunk = start == 0;
                each!(self.latent, |at, lanes| {
                    let mut sums = [L::splat(0.0); H];
                    if !first_chunk {
                        for head in 0..H {
                            let sum: L = load(outs[head].add(at).cast_const(), lanes);
                            sums[head] = sum.mul(L::splat(rescale[head]));
                        }
                    }
                    for (offset, row) in rows.iter().enumerate().take(count) {
                        let value: L = load(row.add(at), lanes);
                        for head in 0..H {
                            sums[head] = value.mul_add(L::splat(scores[head][offset]), sums[head]);
                        }
                    }
                    for head in 0..H {
                        store(sums[head], outs[head].add(at), lanes);
                    }
                });
                start += count;
            }
            for head in 0..H {
                let inverse = L::splat(1.0 / weights[head]);
                each!(self.latent, |at, lanes| {
                    let to = outs[head].add(at);
                    let sum: L = load(to.cast_const(), lanes);
                    store(sum.mul(inverse), to, lanes);
                });
            }
        }
    }
}

/// Turns a chunk's scores into weights relative to the running maximum; returns the factor for what was summed before.
#[inline(always)]
unsafe fn fold<L: Lanes>(
    scores: &mut [f32; CHUNK],
    count: usize,
    maximum: &mut f32,
    total: &mut f32,
) -> f32 {
    unsafe {
        let mut lanes = L::splat(*maximum);
        for part in 0..CHUNK / LANES {
            // Unused positions are minus infinity.
            lanes = lanes.max(L::load(scores.as_ptr().add(part * LANES)));
        }
        let mut parts = [0.0f32; LANES];
        lanes.store(parts.as_mut_ptr());
        // A NaN is never the larger one here; its own exponential stays NaN, so it reaches the logits all the same.
        let highest = parts.into_iter().fold(*maximum, f32::max);
        let mut before = [0.0f32; LANES];
        exp(L::splat(*maximum - highest)).store(before.as_mut_ptr());
        let rescale = if *maximum == f32::NEG_INFINITY {
            0.0
        } else {
            before[0]
        };
        for part in 0..CHUNK / LANES {
            let at = scores.as_mut_ptr().add(part * LANES);
            exp(L::load(at).sub(L::splat(highest))).store(at);
        }
        // The clamped exponential of an unused position is tiny, not zero.
        scores[count..].fill(0.0);
        let mut sum = L::splat(0.0);
        for part in 0..CHUNK / LANES {
            sum = sum.add(L::load(scores.as_ptr().add(part * LANES)));
        }
        *total = (*total).mul_add(rescale, sum.sum());
        *maximum = highest;
        rescale
    }
}

// After the macro, which they use.
pub(crate) mod attend;
mod grouped;
pub(crate) mod paired;

pub(crate) use grouped::{AttendGrouped, HEADS_MAX};

#[cfg(test)]
pub(crate) mod tests;
