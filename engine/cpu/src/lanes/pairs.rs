//! Sixteen running sums of products of bfloat16 pairs: one instruction on CPUs with AVX512-BF16, the same bytes elsewhere.
//!
//! Invariant: a step adds to each lane first the product of the pair's second element, then that of its first, each with
//! one rounding of the sum. That is how `VDPBF16PS` is defined (Intel SDM, volume 2) and what AMD's Zen 5 does: a test
//! holds the emulation against the instruction bit for bit.
//!
//! Surprise: the instructions take subnormal values, elements and sums as zero and the emulation does not. They are below
//! 1e-38, far outside of what a model computes with.

#![allow(unsafe_code)]
#![allow(clippy::needless_range_loop)] // as in the kernels

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

use half::bf16;

#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512};
use super::{LANES, Lanes, Portable};

/// Elements of one step: a pair for each lane.
pub(crate) const PAIRED: usize = 2 * LANES;

/// Sixteen running sums; see the module's description.
///
/// # Safety
/// Every method requires that the CPU has the implementation's features, and that the named number of elements may be
/// read at the pointer; no alignment is required.
pub(crate) trait Pairs: Copy {
    /// [`PAIRED`] bfloat16 elements.
    type Elements: Copy;
    /// Float32 lanes of the same instruction set.
    type Wide: Lanes;
    /// All sums zero.
    unsafe fn zero() -> Self;
    /// The sums that the lanes hold.
    unsafe fn from_wide(lanes: Self::Wide) -> Self;
    /// The sums as lanes.
    unsafe fn wide(self) -> Self::Wide;
    /// Reads [`PAIRED`] elements.
    unsafe fn load(from: *const u16) -> Self::Elements;
    /// Reads `count < PAIRED` elements; the others are zero.
    unsafe fn load_part(from: *const u16, count: usize) -> Self::Elements;
    /// Adds each lane's two products.
    unsafe fn add_products(self, a: Self::Elements, b: Self::Elements) -> Self;
    /// The same pair for every lane: the first element in the low half.
    unsafe fn splat(pair: u32) -> Self::Elements;
    /// The pairs `(a[i], b[i])` for the lower and the upper sixteen `i`.
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2];
    /// Rounds [`LANES`] values to the nearest bfloat16, ties to even; a NaN stays one.
    unsafe fn round(from: *const f32, to: *mut u16);

    /// Writes [`PAIRED`] elements.
    unsafe fn store(elements: Self::Elements, to: *mut u32);

    /// The pairs `(a[i], b[i])`, rounded as [`Pairs::round`] does.
    #[inline(always)]
    unsafe fn round_pairs(a: Self::Wide, b: Self::Wide) -> Self::Elements {
        let mut values = [0.0; LANES];
        let mut rounded = [[0u16; LANES]; 2];
        let mut pairs = [0u16; PAIRED];
        unsafe {
            for (lanes, rounded) in [a, b].into_iter().zip(&mut rounded) {
                lanes.store(values.as_mut_ptr());
                Self::round(values.as_ptr(), rounded.as_mut_ptr());
            }
            for (lane, pair) in pairs.chunks_exact_mut(2).enumerate() {
                pair.copy_from_slice(&[rounded[0][lane], rounded[1][lane]]);
            }
            Self::load(pairs.as_ptr())
        }
    }

    /// Transposes a square of [`LANES`] rows of [`LANES`] pairs; rows are `stride` and `to_stride` pairs apart.
    #[inline(always)]
    unsafe fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        for row in 0..LANES {
            for column in 0..LANES {
                unsafe {
                    let pair = from.add(row * stride + column).read();
                    to.add(column * to_stride + row).write(pair);
                }
            }
        }
    }
}

#[inline(always)]
fn first(pair: u32) -> f32 {
    f32::from_bits(pair << 16)
}

#[inline(always)]
fn second(pair: u32) -> f32 {
    f32::from_bits(pair & 0xffff_0000)
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct PortablePairs([f32; LANES]);

// SAFETY (of every body): the caller guarantees the pointers; nothing else is unsafe here.
impl Pairs for PortablePairs {
    type Elements = [u32; LANES];
    type Wide = Portable;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0.0; LANES])
    }

    #[inline(always)]
    unsafe fn from_wide(lanes: Self::Wide) -> Self {
        Self(lanes.0)
    }

    #[inline(always)]
    unsafe fn wide(self) -> Self::Wide {
        Portable(self.0)
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self::Elements {
        let elements = unsafe { from.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        elements.map(|[low, high]| u32::from(low) | u32::from(high) << 16)
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u16, count: usize) -> Self::Elements {
        let mut elements = [0u16; PAIRED];
        unsafe {
            std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr(), count);
            Self::load(elements.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self::Elements, b: Self::Elements) -> Self {
        Self(std::array::from_fn(|lane| {
            let (a, b) = (a[lane], b[lane]);
            let sum = second(a).mul_add(second(b), self.0[lane]);
            first(a).mul_add(first(b), sum)
        }))
    }

    #[inline(always)]
    unsafe fn splat(pair: u32) -> Self::Elements {
        [pair; LANES]
    }

    #[inline(always)]
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2] {
        let element = |of: &[u32; LANES], at: usize| of[at / 2] >> (16 * (at % 2)) & 0xffff;
        [0, LANES].map(|from| {
            std::array::from_fn(|lane| element(&a, from + lane) | element(&b, from + lane) << 16)
        })
    }

    #[inline(always)]
    unsafe fn round(from: *const f32, to: *mut u16) {
        for lane in 0..LANES {
            unsafe {
                let value = bf16::from_f32(from.add(lane).read_unaligned());
                to.add(lane).write_unaligned(value.to_bits());
            }
        }
    }

    #[inline(always)]
    unsafe fn store(elements: Self::Elements, to: *mut u32) {
        unsafe { to.cast::<[u32; LANES]>().write_unaligned(elements) };
    }
}

/// Needs `avx2` and `fma`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2Pairs([__m256; 2]);

// SAFETY (of every body): the caller guarantees the features and the pointers.
#[cfg(target_arch = "x86_64")]
impl Pairs for Avx2Pairs {
    type Elements = [__m256i; 2];
    type Wide = Avx2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self([_mm256_setzero_ps(); 2]) }
    }

    #[inline(always)]
    unsafe fn from_wide(lanes: Self::Wide) -> Self {
        Self([lanes.0, lanes.1])
    }

    #[inline(always)]
    unsafe fn wide(self) -> Self::Wide {
        Avx2(self.0[0], self.0[1])
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self::Elements {
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(LANES).cast()),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u16, count: usize) -> Self::Elements {
        let mut elements = [0u16; PAIRED];
        unsafe {
            std::ptr::copy_nonoverlapping(from, elements.as_mut_ptr(), count);
            Self::load(elements.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self::Elements, b: Self::Elements) -> Self {
        unsafe {
            let high = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
            Self(std::array::from_fn(|half| {
                let second = |x| _mm256_castsi256_ps(_mm256_and_si256(x, high));
                let first = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
                let (a, b) = (a[half], b[half]);
                let sum = _mm256_fmadd_ps(second(a), second(b), self.0[half]);
                _mm256_fmadd_ps(first(a), first(b), sum)
            }))
        }
    }

    #[inline(always)]
    unsafe fn splat(pair: u32) -> Self::Elements {
        unsafe { [_mm256_set1_epi32(pair.cast_signed()); 2] }
    }

    #[inline(always)]
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2] {
        unsafe {
            std::array::from_fn(|half| {
                // Unpacking works in 128-bit parts: elements 0-3 and 8-11, then 4-7 and 12-15.
                let outer = _mm256_unpacklo_epi16(a[half], b[half]);
                let inner = _mm256_unpackhi_epi16(a[half], b[half]);
                [
                    _mm256_permute2x128_si256::<0x20>(outer, inner),
                    _mm256_permute2x128_si256::<0x31>(outer, inner),
                ]
            })
        }
    }

    #[inline(always)]
    unsafe fn round(from: *const f32, to: *mut u16) {
        unsafe {
            let nearest = |values: __m256| {
                let bits = _mm256_castps_si256(values);
                let upper = _mm256_srli_epi32::<16>(bits);
                let odd = _mm256_and_si256(upper, _mm256_set1_epi32(1));
                let up = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
                let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, up));
                let quiet = _mm256_or_si256(upper, _mm256_set1_epi32(0x40));
                let nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(values, values));
                _mm256_blendv_epi8(rounded, quiet, nan)
            };
            let low = nearest(_mm256_loadu_ps(from));
            let high = nearest(_mm256_loadu_ps(from.add(LANES / 2)));
            // Packing works in 128-bit parts; put them back in order.
            let packed = _mm256_packus_epi32(low, high);
            let ordered = _mm256_permute4x64_epi64::<0b11_01_10_00>(packed);
            _mm256_storeu_si256(to.cast(), ordered);
        }
    }

    #[inline(always)]
    unsafe fn store(elements: Self::Elements, to: *mut u32) {
        unsafe {
            _mm256_storeu_si256(to.cast(), elements[0]);
            _mm256_storeu_si256(to.add(LANES / 2).cast(), elements[1]);
        }
    }
}

/// Needs `avx512f`, `avx512bw` and `avx512dq`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Pairs(__m512);

/// Needs `avx512bf16` beside what [`Avx512Pairs`] needs.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16Pairs(__m512);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn load512(from: *const u16, count: usize) -> __m512i {
    unsafe { _mm512_maskz_loadu_epi16((1u32 << count) - 1, from.cast()) }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn as_bf16(pairs: __m512i) -> __m512bh {
    // SAFETY: both are sixteen pairs of bfloat16 values.
    unsafe { std::mem::transmute::<__m512i, __m512bh>(pairs) }
}

/// See [`Pairs::interleave`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn interleave512(a: __m512i, b: __m512i) -> [__m512i; 2] {
    const ORDER: [[u16; PAIRED]; 2] = {
        let mut order = [[0; PAIRED]; 2];
        let mut at = 0;
        while at < LANES {
            // Indices from 32 on are those of the second operand.
            order[0][2 * at] = at as u16;
            order[0][2 * at + 1] = (at + PAIRED) as u16;
            order[1][2 * at] = (at + LANES) as u16;
            order[1][2 * at + 1] = (at + LANES + PAIRED) as u16;
            at += 1;
        }
        order
    };
    unsafe {
        let [lower, upper] = &ORDER;
        let lower = _mm512_loadu_si512(lower.as_ptr().cast());
        let upper = _mm512_loadu_si512(upper.as_ptr().cast());
        [
            _mm512_permutex2var_epi16(a, lower, b),
            _mm512_permutex2var_epi16(a, upper, b),
        ]
    }
}

/// See [`Pairs::transpose`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn transpose512(from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
    unsafe {
        let zero = _mm512_setzero_si512();
        let mut rows = [zero; LANES];
        for (at, row) in rows.iter_mut().enumerate() {
            *row = _mm512_loadu_si512(from.add(at * stride).cast());
        }
        // Within each 128-bit part: columns of two rows, then of four.
        let mut twos = [zero; LANES];
        for at in 0..LANES / 2 {
            twos[2 * at] = _mm512_unpacklo_epi32(rows[2 * at], rows[2 * at + 1]);
            twos[2 * at + 1] = _mm512_unpackhi_epi32(rows[2 * at], rows[2 * at + 1]);
        }
        let mut fours = [[zero; 4]; 4];
        for (at, four) in fours.iter_mut().enumerate() {
            let two = &twos[4 * at..4 * at + 4];
            four[0] = _mm512_unpacklo_epi64(two[0], two[2]);
            four[1] = _mm512_unpackhi_epi64(two[0], two[2]);
            four[2] = _mm512_unpacklo_epi64(two[1], two[3]);
            four[3] = _mm512_unpackhi_epi64(two[1], two[3]);
        }
        // Part `q` of `fours[n][c]` is column `4q + c` of rows `4n` to `4n + 3`.
        for column in 0..4 {
            let [a, b, c, d] = [0, 1, 2, 3].map(|at| fours[at][column]);
            let even = _mm512_shuffle_i32x4::<0b10_00_10_00>(a, b);
            let even_upper = _mm512_shuffle_i32x4::<0b10_00_10_00>(c, d);
            let odd = _mm512_shuffle_i32x4::<0b11_01_11_01>(a, b);
            let odd_upper = _mm512_shuffle_i32x4::<0b11_01_11_01>(c, d);
            let columns = [
                _mm512_shuffle_i32x4::<0b10_00_10_00>(even, even_upper),
                _mm512_shuffle_i32x4::<0b10_00_10_00>(odd, odd_upper),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(even, even_upper),
                _mm512_shuffle_i32x4::<0b11_01_11_01>(odd, odd_upper),
            ];
            for (part, values) in columns.into_iter().enumerate() {
                _mm512_storeu_si512(to.add((4 * part + column) * to_stride).cast(), values);
            }
        }
    }
}

// SAFETY (of every body): the caller guarantees the features and the pointers; masked elements touch no memory.
#[cfg(target_arch = "x86_64")]
impl Pairs for Avx512Pairs {
    type Elements = __m512i;
    type Wide = Avx512;

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn from_wide(lanes: Self::Wide) -> Self {
        Self(lanes.0)
    }

    #[inline(always)]
    unsafe fn wide(self) -> Self::Wide {
        Avx512(self.0)
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self::Elements {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u16, count: usize) -> Self::Elements {
        unsafe { load512(from, count) }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self::Elements, b: Self::Elements) -> Self {
        unsafe {
            let high = _mm512_set1_epi32(0xffff_0000_u32.cast_signed());
            let second = |x| _mm512_castsi512_ps(_mm512_and_si512(x, high));
            let first = |x| _mm512_castsi512_ps(_mm512_slli_epi32::<16>(x));
            let sum = _mm512_fmadd_ps(second(a), second(b), self.0);
            Self(_mm512_fmadd_ps(first(a), first(b), sum))
        }
    }

    #[inline(always)]
    unsafe fn splat(pair: u32) -> Self::Elements {
        unsafe { _mm512_set1_epi32(pair.cast_signed()) }
    }

    #[inline(always)]
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2] {
        unsafe { interleave512(a, b) }
    }

    #[inline(always)]
    unsafe fn round(from: *const f32, to: *mut u16) {
        unsafe {
            let values = _mm512_loadu_ps(from);
            let bits = _mm512_castps_si512(values);
            let upper = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(upper, _mm512_set1_epi32(1));
            let up = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, up));
            let quiet = _mm512_or_si512(upper, _mm512_set1_epi32(0x40));
            let nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(values, values);
            let chosen = _mm512_mask_mov_epi32(rounded, nan, quiet);
            _mm256_storeu_si256(to.cast(), _mm512_cvtepi32_epi16(chosen));
        }
    }

    #[inline(always)]
    unsafe fn store(elements: Self::Elements, to: *mut u32) {
        unsafe { _mm512_storeu_si512(to.cast(), elements) };
    }

    #[inline(always)]
    unsafe fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        unsafe { transpose512(from, stride, to, to_stride) };
    }
}

// SAFETY (of every body): as above.
#[cfg(target_arch = "x86_64")]
impl Pairs for Avx512Bf16Pairs {
    type Elements = __m512bh;
    type Wide = Avx512;

    #[inline(always)]
    unsafe fn zero() -> Self {
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn from_wide(lanes: Self::Wide) -> Self {
        Self(lanes.0)
    }

    #[inline(always)]
    unsafe fn wide(self) -> Self::Wide {
        Avx512(self.0)
    }

    #[inline(always)]
    unsafe fn load(from: *const u16) -> Self::Elements {
        unsafe { as_bf16(_mm512_loadu_si512(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const u16, count: usize) -> Self::Elements {
        unsafe { as_bf16(load512(from, count)) }
    }

    #[inline(always)]
    unsafe fn add_products(self, a: Self::Elements, b: Self::Elements) -> Self {
        unsafe { Self(_mm512_dpbf16_ps(self.0, a, b)) }
    }

    #[inline(always)]
    unsafe fn splat(pair: u32) -> Self::Elements {
        unsafe { as_bf16(_mm512_set1_epi32(pair.cast_signed())) }
    }

    #[inline(always)]
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2] {
        unsafe {
            // SAFETY: both are sixteen pairs of bfloat16 values.
            let [a, b] = std::mem::transmute::<[__m512bh; 2], [__m512i; 2]>([a, b]);
            let [lower, upper] = interleave512(a, b);
            [as_bf16(lower), as_bf16(upper)]
        }
    }

    #[inline(always)]
    unsafe fn round(from: *const f32, to: *mut u16) {
        unsafe {
            let rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
            // SAFETY: both are sixteen bfloat16 values.
            let rounded = std::mem::transmute::<__m256bh, __m256i>(rounded);
            _mm256_storeu_si256(to.cast(), rounded);
        }
    }

    #[inline(always)]
    unsafe fn store(elements: Self::Elements, to: *mut u32) {
        unsafe {
            // SAFETY: both are sixteen pairs of bfloat16 values.
            let pairs = std::mem::transmute::<__m512bh, __m512i>(elements);
            _mm512_storeu_si512(to.cast(), pairs);
        }
    }

    #[inline(always)]
    unsafe fn round_pairs(a: Self::Wide, b: Self::Wide) -> Self::Elements {
        unsafe {
            // The second operand's values come first.
            let both = _mm512_cvtne2ps_pbh(b.0, a.0);
            // SAFETY: both are 32 bfloat16 values.
            let both = std::mem::transmute::<__m512bh, __m512i>(both);
            let upper = _mm512_castsi256_si512(_mm512_extracti64x4_epi64::<1>(both));
            let [pairs, _] = interleave512(both, upper);
            as_bf16(pairs)
        }
    }

    #[inline(always)]
    unsafe fn transpose(from: *const u32, stride: usize, to: *mut u32, to_stride: usize) {
        unsafe { transpose512(from, stride, to, to_stride) };
    }
}
