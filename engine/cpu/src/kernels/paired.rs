//! Products of bfloat16 weights with activations rounded to bfloat16, summed in float32.
//!
//! Invariant: see [`super::panel`], which does the arithmetic.

#![allow(unsafe_code)]

use super::panel::{Multiply, Operands, Row, Shape};
use super::{Isa, Rows, load, silu_product};
#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2Pairs, Avx512Bf16Pairs, Avx512Pairs};
use crate::lanes::{LANES, Lanes, Pairs, PortablePairs};
use crate::packed::PANEL;

/// A loop nest written once over pairs.
pub(crate) trait PairedKernel {
    /// # Safety
    /// The CPU has the pairs' features and the kernel's pointers are valid for what it names.
    unsafe fn run<P: Multiply>(self);
}

/// `out[index][column] = input[rows[index]] · weight[column]` for `index` in `indices` and `column` in `columns`, which
/// begin at a multiple of [`PANEL`] and end at one or at the matrix's end.
///
/// Pointers: `weight` to the panels of a matrix of `height` rows of `length` elements; `input` and `out` to rows
/// `input_stride` and `out_stride` apart.
pub(crate) struct PairedProduct<'a> {
    pub weight: *const u32,
    pub length: usize,
    pub height: usize,
    pub columns: std::ops::Range<usize>,
    pub input: *const u16,
    pub input_stride: usize,
    pub rows: Rows<'a>,
    pub indices: std::ops::Range<usize>,
    pub out: *mut f32,
    pub out_stride: usize,
}

impl PairedKernel for PairedProduct<'_> {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        let pairs = self.length.div_ceil(2);
        for column in self.columns.clone().step_by(PANEL) {
            let columns = Columns {
                of: &self,
                first: column,
            };
            let shape = Shape {
                count: self.indices.len(),
                step: 1,
                length: self.length,
                width: PANEL.min(self.height - column),
                adds: false,
            };
            unsafe { P::multiply(&columns, self.weight.add(column * pairs), shape) };
        }
    }
}

/// A product's columns from one on.
struct Columns<'a> {
    of: &'a PairedProduct<'a>,
    first: usize,
}

impl Operands for Columns<'_> {
    fn gather(&self, first: usize, rows: &mut [Row]) {
        let of = self.of;
        for (row, index) in rows.iter_mut().zip(of.indices.start + first..) {
            let from = of.rows.get(index) * of.input_stride;
            let to = index * of.out_stride + self.first;
            row.from = of.input.wrapping_add(from).cast();
            row.out = of.out.wrapping_add(to);
        }
    }
}

/// Rounds `length` values to bfloat16, where they are: the result takes the first half of their room.
pub(crate) struct RoundInPlace {
    pub values: *mut f32,
    pub length: usize,
}

impl PairedKernel for RoundInPlace {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        // A step writes where this or an earlier one has read.
        unsafe { round::<P>(self.values, self.length, self.values.cast()) };
    }
}

/// `out = silu(gate) * up`, rounded.
pub(crate) struct RoundedSiluProduct {
    pub gate: *const f32,
    pub up: *const f32,
    pub out: *mut u16,
    pub length: usize,
}

impl PairedKernel for RoundedSiluProduct {
    #[inline(always)]
    unsafe fn run<P: Multiply>(self) {
        let mut products = [0.0f32; LANES];
        unsafe {
            each!(self.length, |at, count| {
                let gate: P::Wide = load(self.gate.add(at), count);
                let up: P::Wide = load(self.up.add(at), count);
                silu_product(gate, up).store(products.as_mut_ptr());
                round::<P>(products.as_ptr(), count, self.out.add(at));
            });
        }
    }
}

/// Rounds `length` values from `from` to `to`, which may begin where `from` does.
#[inline(always)]
unsafe fn round<P: Pairs>(from: *const f32, length: usize, to: *mut u16) {
    let whole = length / LANES * LANES;
    unsafe {
        for at in (0..whole).step_by(LANES) {
            P::round(from.add(at), to.add(at));
        }
        if whole < length {
            let mut rest = [0.0; LANES];
            let mut rounded = [0; LANES];
            std::ptr::copy_nonoverlapping(from.add(whole), rest.as_mut_ptr(), length - whole);
            P::round(rest.as_ptr(), rounded.as_mut_ptr());
            std::ptr::copy_nonoverlapping(rounded.as_ptr(), to.add(whole), length - whole);
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
