//! Products of bfloat16 weights with activations rounded to bfloat16, summed in float32.
//!
//! Invariant (batch invariance): an output is one chain of steps of [`PAIRED`] elements over its weight row, from the
//! first to the last, and one fixed tree over the lanes. How many rows and columns a register tile holds is about speed
//! only.
//!
//! A few rows walk the weights as one sequential stream, the memory's favourite; many rows reuse a tile of 4 x 4 from
//! registers, which needs eight loads for sixteen products.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the parent

#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2Pairs, Avx512Bf16Pairs, Avx512Pairs};
use crate::lanes::{LANES, PAIRED, Pairs, PortablePairs};

use super::{Isa, Rows};

/// Rows and columns of a register tile.
const TILE: usize = 4;
/// Elements that a stream asks the memory for ahead of use: 2 KiB. A chain waits for its own sum, so too few loads are
/// in flight without it: 22 GB/s became 30 on one core of a Zen 5; 1 to 4 KiB made no difference.
pub(super) const AHEAD: usize = 1024;

/// A loop nest written once over pairs.
pub(crate) trait PairedKernel {
    /// # Safety
    /// The CPU has the pairs' features and the kernel's pointers are valid for what it names.
    unsafe fn run<P: Pairs>(self);
}

/// `out[index][column] = bf16(input[rows[index]]) · weight[column]` for `index` in `indices` and `column` in `columns`.
///
/// Pointers: `weight` to rows of `length` bfloat16 elements; `input` and `out` to rows `input_stride` and `out_stride`
/// apart.
pub(crate) struct PairedProduct<'a> {
    pub weight: *const u16,
    pub length: usize,
    pub columns: std::ops::Range<usize>,
    pub input: *const f32,
    pub input_stride: usize,
    pub rows: Rows<'a>,
    pub indices: std::ops::Range<usize>,
    pub out: *mut f32,
    pub out_stride: usize,
    /// Room for the rounded rows: [`PairedProduct::scratch_length`] elements.
    pub scratch: &'a mut [u16],
}

impl PairedProduct<'_> {
    /// Elements that `count` rows of `length` take when rounded: each row is filled up to whole steps with zeros.
    pub fn scratch_length(length: usize, count: usize) -> usize {
        length.next_multiple_of(PAIRED) * count
    }
}

impl PairedKernel for PairedProduct<'_> {
    #[inline(always)]
    unsafe fn run<P: Pairs>(self) {
        let stride = self.length.next_multiple_of(PAIRED);
        let rows = self.scratch.chunks_exact_mut(stride);
        for (row, index) in rows.zip(self.indices.clone()) {
            unsafe {
                let input = self.input.add(self.rows.get(index) * self.input_stride);
                round::<P>(input, self.length, row);
            }
        }
        let count = self.indices.len();
        // Fewer are kept beside one pass over the weights.
        let tiled = if count < 2 * TILE {
            0
        } else {
            count / TILE * TILE
        };
        let whole = self.columns.start + self.columns.len() / TILE * TILE;
        unsafe {
            for column in (self.columns.start..whole).step_by(TILE) {
                for row in (0..tiled).step_by(TILE) {
                    // The sums stay in registers only if each branch uses its own.
                    if row == 0 {
                        // Meanwhile the next four weight rows come in.
                        let ahead = TILE * self.length;
                        let sums = self.block::<P, TILE, TILE, true>(row, column, ahead);
                        self.put(row, column, sums);
                    } else {
                        let sums = self.block::<P, TILE, TILE, false>(row, column, 0);
                        self.put(row, column, sums);
                    }
                }
            }
            for row in (0..tiled).step_by(TILE) {
                self.stream::<P, TILE, 1>(row, whole);
            }
            let mut row = tiled;
            while row < count {
                let first = self.columns.start;
                row += match count - row {
                    1 => self.stream::<P, 1, 2>(row, first),
                    2 | 3 => self.stream::<P, 2, 1>(row, first),
                    _ => self.stream::<P, TILE, 1>(row, first),
                };
            }
        }
    }
}

impl PairedProduct<'_> {
    /// `R` rows by all columns from `first` on, `C` weight rows at a time; returns `R`.
    #[inline(always)]
    unsafe fn stream<P: Pairs, const R: usize, const C: usize>(
        &self,
        row: usize,
        first: usize,
    ) -> usize {
        let mut column = first;
        unsafe {
            while column + C <= self.columns.end {
                let sums = self.block::<P, R, C, true>(row, column, AHEAD);
                self.put(row, column, sums);
                column += C;
            }
            while column < self.columns.end {
                let sums = self.block::<P, R, 1, true>(row, column, AHEAD);
                self.put(row, column, sums);
                column += 1;
            }
        }
        R
    }

    /// The sums of `R` rows with `C` columns.
    #[inline(always)]
    unsafe fn block<P: Pairs, const R: usize, const C: usize, const STREAM: bool>(
        &self,
        row: usize,
        column: usize,
        ahead: usize,
    ) -> [[P; C]; R] {
        unsafe {
            let rows = std::array::from_fn(|r| self.rounded(row + r));
            let weights = std::array::from_fn(|c| self.weight.add((column + c) * self.length));
            block::<P, R, C, STREAM>(rows, weights, self.length, ahead)
        }
    }

    /// Totals the sums and writes them.
    #[inline(always)]
    unsafe fn put<P: Pairs, const R: usize, const C: usize>(
        &self,
        row: usize,
        column: usize,
        sums: [[P; C]; R],
    ) {
        unsafe {
            if R * C < LANES {
                for r in 0..R {
                    for c in 0..C {
                        *self.at(row + r, column + c) = sums[r][c].total();
                    }
                }
                return;
            }
            let all = std::array::from_fn(|at| sums[at / C][at % C]);
            let totals = P::totals(all);
            for r in 0..R {
                let from = totals.as_ptr().add(r * C);
                std::ptr::copy_nonoverlapping(from, self.at(row + r, column), C);
            }
        }
    }

    #[inline(always)]
    fn rounded(&self, row: usize) -> *const u16 {
        let stride = self.length.next_multiple_of(PAIRED);
        self.scratch.as_ptr().wrapping_add(row * stride)
    }

    /// Where the result of the `row`-th index goes.
    #[inline(always)]
    fn at(&self, row: usize, column: usize) -> *mut f32 {
        let index = self.indices.start + row;
        self.out.wrapping_add(index * self.out_stride + column)
    }
}

/// The sums of the products of `R` rows, filled up to whole steps with zeros, with `C` rows of `length` elements.
/// `STREAM` asks the memory for what lies `ahead` elements after the latter.
#[inline(always)]
pub(super) unsafe fn block<P: Pairs, const R: usize, const C: usize, const STREAM: bool>(
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
                    prefetch(weight.wrapping_add(at + ahead));
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

/// Asks for a cache line; any address will do.
#[inline(always)]
pub(super) fn prefetch(at: *const u16) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint that touches nothing; every x86-64 has it.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Rounds `length` values into `row`, and fills the rest of it with zeros.
#[inline(always)]
pub(super) unsafe fn round<P: Pairs>(from: *const f32, length: usize, row: &mut [u16]) {
    let whole = length / LANES * LANES;
    let to = row.as_mut_ptr();
    unsafe {
        for at in (0..whole).step_by(LANES) {
            P::round(from.add(at), to.add(at));
        }
        row[whole..].fill(0);
        if whole < length {
            let mut rest = [0.0; LANES];
            std::ptr::copy_nonoverlapping(from.add(whole), rest.as_mut_ptr(), length - whole);
            P::round(rest.as_ptr(), to.add(whole));
        }
    }
}

impl Isa {
    /// Runs `kernel` with this instruction set's pairs.
    ///
    /// # Safety
    /// `self` must come from [`Isa::available`] or [`Isa::best`]; the kernel's own conditions must hold.
    #[inline]
    pub(crate) unsafe fn run_paired<K: PairedKernel>(self, kernel: K) {
        unsafe {
            match self {
                Self::Portable => kernel.run::<PortablePairs>(),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => on_avx2(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => on_avx512(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => on_avx512_bf16(kernel),
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn on_avx2<K: PairedKernel>(kernel: K) {
    unsafe { kernel.run::<Avx2Pairs>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn on_avx512<K: PairedKernel>(kernel: K) {
    unsafe { kernel.run::<Avx512Pairs>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn on_avx512_bf16<K: PairedKernel>(kernel: K) {
    unsafe { kernel.run::<Avx512Bf16Pairs>() }
}
