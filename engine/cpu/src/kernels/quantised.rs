//! Products of integer weights with activations that are quantised to eight bits on the way, summed in 32-bit integers.
//!
//! Eight-bit weights meet activations with one scale for each row, four-bit weights activations with one scale for each
//! group of columns that shares a weight scale. Invariant (batch invariance): a row's activations are quantised by
//! themselves; integer sums are exact; a group's sum is scaled and added to the output's float sum in the order of the
//! groups. Tiles are about speed only.
//!
//! One row walks the blocks as one stream with four chains; many rows share every line of weights that is loaded.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the parent

use engine_memory::IntegerFormat;

use half::bf16;

use super::{Isa, Rows, panel::prefetch};
#[cfg(target_arch = "x86_64")]
use crate::lanes::{Avx2Bytes, Avx512VnniBytes, AvxVnniBytes};
use crate::lanes::{Bytes, LANES, LINE, Lanes, PortableBytes};
use crate::quantised::{BLOCK, block_lines};

/// Activations smaller than this all over a row or group are zeros.
const TINY: f32 = 1e-30;
/// 1.5 * 2^23: a float sum with it ends in the rounded integer, in two's complement.
const MAGIC: f32 = 12_582_912.0;
/// Bytes that a stream asks the memory for ahead of use.
const AHEAD: usize = 2048;

/// A loop nest written once over byte products.
pub(crate) trait IntegerKernel {
    /// # Safety
    /// The CPU has the features and the kernel's pointers are valid for what it names.
    unsafe fn run<B: Bytes>(self);
}

/// `out[index][column] = input[rows[index]] · weight[column]` for `index` in `indices` and `column` in `columns`.
///
/// Pointers: `blocks` to the blocks of a part of [`crate::quantised::Integers`]; `input` and `out` to rows
/// `input_stride` and `out_stride` apart. `columns` begin with a block.
pub(crate) struct IntegerProduct<'a> {
    pub format: IntegerFormat,
    pub blocks: *const u8,
    pub length: usize,
    pub columns: std::ops::Range<usize>,
    /// Float32 rows; or, where `is_rounded`, rows whose bfloat16 values take the first half of their room.
    pub input: *const f32,
    pub is_rounded: bool,
    pub input_stride: usize,
    pub rows: Rows<'a>,
    pub indices: std::ops::Range<usize>,
    pub out: *mut f32,
    pub out_stride: usize,
    /// Room for the quantised rows: [`IntegerProduct::scratch_length`] elements.
    pub scratch: &'a mut [u16],
}

/// How a row's quantised activations lie in the scratch: its bytes, filled up to whole lines with zeros, then scale and
/// sum of each group.
#[derive(Clone, Copy)]
struct Record {
    group: usize,
    groups: usize,
    bytes: usize,
}

impl Record {
    fn new(format: IntegerFormat, length: usize) -> Self {
        let (group, line) = match format {
            IntegerFormat::Int8 => (length, 4),
            IntegerFormat::Int4 { group } => (group as usize, 8),
        };
        Self {
            group,
            groups: length.div_ceil(group),
            bytes: length.next_multiple_of(line),
        }
    }

    fn stride(self) -> usize {
        self.bytes + 8 * self.groups
    }
}

impl IntegerProduct<'_> {
    /// Elements of scratch that `count` rows of `length` take.
    pub fn scratch_length(format: IntegerFormat, length: usize, count: usize) -> usize {
        Record::new(format, length).stride() / 2 * count
    }
}

impl IntegerKernel for IntegerProduct<'_> {
    #[inline(always)]
    unsafe fn run<B: Bytes>(self) {
        let record = Record::new(self.format, self.length);
        assert!(self.scratch.len() * 2 >= record.stride() * self.indices.len());
        let scratch = self.scratch.as_mut_ptr().cast::<u8>();
        for (place, index) in self.indices.clone().enumerate() {
            unsafe {
                let input = self.input.add(self.rows.get(index) * self.input_stride);
                let to = scratch.add(place * record.stride());
                if self.is_rounded {
                    let input = input.cast::<bf16>();
                    quantise_row(|at| (*input.add(at)).to_f32(), self.length, record, to);
                } else {
                    quantise_row(|at| *input.add(at), self.length, record, to);
                }
            }
        }
        let pass = Pass {
            product: &self,
            record,
            scratch,
            lines: block_lines(self.format, self.length),
        };
        let blocks = self.columns.start / BLOCK..self.columns.end.div_ceil(BLOCK);
        unsafe {
            match self.format {
                IntegerFormat::Int8 => pass.walk::<B, Int8, 6, 4>(blocks),
                IntegerFormat::Int4 { .. } => pass.walk::<B, Int4, 6, 2>(blocks),
            }
        }
    }
}

/// A product whose activations are quantised.
struct Pass<'a, 'b> {
    product: &'a IntegerProduct<'b>,
    record: Record,
    scratch: *const u8,
    /// Of a block.
    lines: usize,
}

/// One of the two formats.
trait Format {
    /// The outputs of `R` rows with `C` blocks. `STREAM` asks the memory for what comes next.
    ///
    /// # Safety
    /// See [`IntegerKernel::run`].
    unsafe fn tile<B: Bytes, const R: usize, const C: usize, const STREAM: bool>(
        record: Record,
        rows: [*const u8; R],
        blocks: [*const u8; C],
    ) -> [[B::Wide; C]; R];
}

impl Pass<'_, '_> {
    /// All rows with all blocks, in tiles of `R` rows and `C` blocks and smaller ones for the rest.
    #[inline(always)]
    unsafe fn walk<B: Bytes, F: Format, const R: usize, const C: usize>(
        &self,
        blocks: std::ops::Range<usize>,
    ) {
        let count = self.product.indices.len();
        let mut block = blocks.start;
        unsafe {
            while block < blocks.end {
                let wide = block + C <= blocks.end;
                let mut row = 0;
                while row < count {
                    row += match (count - row, wide) {
                        (1, true) => self.tile::<B, F, 1, C, true>(row, block),
                        (2 | 3, true) => self.tile::<B, F, 2, C, true>(row, block),
                        (4 | 5, true) => self.tile::<B, F, 4, C, false>(row, block),
                        (_, true) => self.tile::<B, F, R, C, false>(row, block),
                        (1, false) => self.tile::<B, F, 1, 1, true>(row, block),
                        (2 | 3, false) => self.tile::<B, F, 2, 1, true>(row, block),
                        (4 | 5, false) => self.tile::<B, F, 4, 1, false>(row, block),
                        (_, false) => self.tile::<B, F, R, 1, false>(row, block),
                    };
                }
                block += if wide { C } else { 1 };
            }
        }
    }

    /// Computes and writes a tile; returns its rows.
    #[inline(always)]
    unsafe fn tile<B: Bytes, F: Format, const R: usize, const C: usize, const STREAM: bool>(
        &self,
        row: usize,
        block: usize,
    ) -> usize {
        let product = self.product;
        unsafe {
            let rows = std::array::from_fn(|r| self.scratch.add((row + r) * self.record.stride()));
            let blocks =
                std::array::from_fn(|c| product.blocks.add((block + c) * self.lines * LINE));
            let results = F::tile::<B, R, C, STREAM>(self.record, rows, blocks);
            for r in 0..R {
                let index = product.indices.start + row + r;
                for c in 0..C {
                    let column = (block + c) * BLOCK;
                    let out = product.out.add(index * product.out_stride + column);
                    let left = product.columns.end - column;
                    if left >= LANES {
                        results[r][c].store(out);
                    } else {
                        results[r][c].store_part(out, left);
                    }
                }
            }
        }
        R
    }
}

/// Scale and sum of group `group` of a quantised row.
#[inline(always)]
unsafe fn group_of(row: *const u8, record: Record, group: usize) -> (f32, i32) {
    unsafe {
        let at = row.add(record.bytes + 8 * group);
        (
            at.cast::<f32>().read_unaligned(),
            at.add(4).cast::<i32>().read_unaligned(),
        )
    }
}

/// Four quantised activations.
#[inline(always)]
unsafe fn four(row: *const u8, at: usize) -> i32 {
    unsafe { row.add(at).cast::<i32>().read_unaligned() }
}

struct Int8;

impl Format for Int8 {
    #[inline(always)]
    unsafe fn tile<B: Bytes, const R: usize, const C: usize, const STREAM: bool>(
        record: Record,
        rows: [*const u8; R],
        blocks: [*const u8; C],
    ) -> [[B::Wide; C]; R] {
        unsafe {
            let groups: [(f32, i32); R] = std::array::from_fn(|r| group_of(rows[r], record, 0));
            let mut sums: [[B; C]; R] =
                std::array::from_fn(|r| [B::splat(groups[r].1.wrapping_mul(-B::OFFSET)); C]);
            for line in 0..record.bytes / 4 {
                let mut weights = [B::load(blocks[0]); C];
                for c in 0..C {
                    let at = blocks[c].add((line + 1) * LINE);
                    if STREAM {
                        prefetch(at.wrapping_add(AHEAD).cast());
                    }
                    weights[c] = B::load(at);
                }
                for r in 0..R {
                    let activations = four(rows[r], 4 * line);
                    for c in 0..C {
                        sums[r][c] = sums[r][c].add_products(weights[c], activations);
                    }
                }
            }
            let mut results = [[B::Wide::splat(0.0); C]; R];
            for c in 0..C {
                let scales = B::Wide::load(blocks[c].cast());
                for r in 0..R {
                    let scaled = sums[r][c].floats().mul(B::Wide::splat(groups[r].0));
                    results[r][c] = scaled.mul(scales);
                }
            }
            results
        }
    }
}

struct Int4;

impl Format for Int4 {
    #[inline(always)]
    unsafe fn tile<B: Bytes, const R: usize, const C: usize, const STREAM: bool>(
        record: Record,
        rows: [*const u8; R],
        mut blocks: [*const u8; C],
    ) -> [[B::Wide; C]; R] {
        unsafe {
            let mut results = [[B::Wide::splat(0.0); C]; R];
            let mut column = 0;
            for group in 0..record.groups {
                let end = (column + record.group).min(record.bytes);
                let mut scales = [B::Wide::splat(0.0); C];
                for c in 0..C {
                    scales[c] = B::Wide::load(blocks[c].cast());
                    blocks[c] = blocks[c].add(LINE);
                }
                let mut factors = [B::Wide::splat(0.0); R];
                let mut sums = [[B::splat(0); C]; R];
                for r in 0..R {
                    let (scale, sum) = group_of(rows[r], record, group);
                    factors[r] = B::Wide::splat(scale);
                    sums[r] = [B::splat(-8 * sum); C];
                }
                while column < end {
                    let mut weights = [B::load_nibbles(blocks[0]); C];
                    for c in 0..C {
                        if STREAM {
                            prefetch(blocks[c].wrapping_add(AHEAD).cast());
                        }
                        weights[c] = B::load_nibbles(blocks[c]);
                        blocks[c] = blocks[c].add(LINE);
                    }
                    for half in 0..2 {
                        for r in 0..R {
                            let activations = four(rows[r], column + 4 * half);
                            for c in 0..C {
                                sums[r][c] = sums[r][c].add_nibbles(weights[c][half], activations);
                            }
                        }
                    }
                    column += 8;
                }
                for c in 0..C {
                    for r in 0..R {
                        let factor = scales[c].mul(factors[r]);
                        results[r][c] = sums[r][c].floats().mul_add(factor, results[r][c]);
                    }
                }
            }
            results
        }
    }
}

/// Quantises a row, whose values `value` gives, into its record.
#[inline(always)]
unsafe fn quantise_row(value: impl Fn(usize) -> f32, length: usize, record: Record, to: *mut u8) {
    unsafe {
        for group in 0..record.groups {
            let first = group * record.group;
            let count = record.group.min(length - first);
            let (scale, sum) = quantise(|at| value(first + at), count, to.add(first));
            let at = to.add(record.bytes + 8 * group);
            at.cast::<f32>().write_unaligned(scale);
            at.add(4).cast::<i32>().write_unaligned(sum);
        }
        to.add(length).write_bytes(0, record.bytes - length);
    }
}

/// Quantises values to -127 ..= 127 and returns their scale and sum. Where one is no finite number the scale is NaN.
#[inline(always)]
unsafe fn quantise(value: impl Fn(usize) -> f32, count: usize, to: *mut u8) -> (f32, i32) {
    unsafe {
        // Bits of magnitudes order like integers, infinities and NaNs last.
        let mut largest = 0u32;
        for at in 0..count {
            largest = largest.max(value(at).to_bits() & 0x7fff_ffff);
        }
        let largest = f32::from_bits(largest);
        if !largest.is_finite() || largest < TINY {
            to.write_bytes(0, count);
            return (if largest < TINY { 0.0 } else { f32::NAN }, 0);
        }
        let inverse = 127.0 / largest;
        let mut sum = 0i32;
        for at in 0..count {
            let rounded = (value(at) * inverse + MAGIC).to_bits() as u8;
            *to.add(at) = rounded;
            sum += i32::from(rounded.cast_signed());
        }
        (largest / 127.0, sum)
    }
}

/// Instructions that multiply bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ByteIsa {
    /// Plain Rust.
    Portable,
    /// AVX2.
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 with AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 with AVX512-VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni,
}

impl ByteIsa {
    /// All that this CPU can run, best first.
    #[cfg(test)]
    pub fn available() -> Vec<Self> {
        let mut found = Vec::new();
        #[cfg(target_arch = "x86_64")]
        {
            if Isa::available().contains(&Isa::Avx512) && is_x86_feature_detected!("avx512vnni") {
                found.push(Self::Avx512Vnni);
            }
            if Isa::available().contains(&Isa::Avx2) {
                if is_x86_feature_detected!("avxvnni") {
                    found.push(Self::AvxVnni);
                }
                found.push(Self::Avx2);
            }
        }
        found.push(Self::Portable);
        found
    }

    /// Runs `kernel` with these instructions.
    ///
    /// # Safety
    /// `self` must be one that this CPU can run, as [`Isa::bytes`] gives; the kernel's own conditions must hold.
    #[inline]
    pub unsafe fn run<K: IntegerKernel>(self, kernel: K) {
        unsafe {
            match self {
                Self::Portable => kernel.run::<PortableBytes>(),
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => on_avx2(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::AvxVnni => on_avx_vnni(kernel),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Vnni => on_avx512_vnni(kernel),
            }
        }
    }
}

impl Isa {
    /// The best byte products that go with these float lanes on this CPU.
    #[inline]
    pub(crate) fn bytes(self) -> ByteIsa {
        match self {
            Self::Portable => ByteIsa::Portable,
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Avx512Bf16 if is_x86_feature_detected!("avx512vnni") => {
                ByteIsa::Avx512Vnni
            }
            // Every CPU with AVX-512 has AVX2.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 | Self::Avx512 | Self::Avx512Bf16 => {
                if is_x86_feature_detected!("avxvnni") {
                    ByteIsa::AvxVnni
                } else {
                    ByteIsa::Avx2
                }
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn on_avx2<K: IntegerKernel>(kernel: K) {
    unsafe { kernel.run::<Avx2Bytes>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avxvnni,avx2,fma")]
unsafe fn on_avx_vnni<K: IntegerKernel>(kernel: K) {
    unsafe { kernel.run::<AvxVnniBytes>() }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512vnni,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn on_avx512_vnni<K: IntegerKernel>(kernel: K) {
    unsafe { kernel.run::<Avx512VnniBytes>() }
}

#[cfg(test)]
mod tests;
