//! Sixteen running sums of products of bfloat16 pairs: one instruction on CPUs with AVX512-BF16, the same bytes elsewhere.
//!
//! Invariant: a step adds to each lane first the product of the pair's second element, then that of its first, each with
//! one rounding of the sum. That is how `VDPBF16PS` is defined (Intel SDM, volume 2) and what AMD's Zen 5 does: a test
//! holds the emulation against the instruction bit for bit. [`Pairs::totals`] adds the lanes in one fixed tree.
//!
//! Surprise: the instructions take subnormal values, elements and sums as zero and the emulation does not. They are below
//! 1e-38, far outside of what a model computes with.

#![allow(unsafe_code)]

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
    /// The lanes.
    unsafe fn lanes(self) -> [f32; LANES];
    /// `self * factor`.
    unsafe fn scale(self, factor: f32) -> Self;
    /// Reads [`LANES`] sums.
    unsafe fn load_sums(from: *const f32) -> Self;
    /// The same pair for every lane: the first element in the low half.
    unsafe fn splat(pair: u32) -> Self::Elements;
    /// The pairs `(a[i], b[i])` for the lower and the upper sixteen `i`.
    unsafe fn interleave(a: Self::Elements, b: Self::Elements) -> [Self::Elements; 2];
    /// Rounds [`LANES`] values to the nearest bfloat16, ties to even; a NaN stays one.
    unsafe fn round(from: *const f32, to: *mut u16);

    /// The sum of all lanes: in fours (`(0 + 1) + (2 + 3)`), then the fours likewise.
    #[inline(always)]
    unsafe fn total(self) -> f32 {
        let lanes = unsafe { self.lanes() };
        let four = |v: &[f32]| (v[0] + v[1]) + (v[2] + v[3]);
        let fours: [f32; 4] = std::array::from_fn(|at| four(&lanes[4 * at..4 * at + 4]));
        four(&fours)
    }

    /// [`Pairs::total`] of each of sixteen.
    #[inline(always)]
    unsafe fn totals(sums: [Self; LANES]) -> [f32; LANES] {
        sums.map(|sum| unsafe { sum.total() })
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
    unsafe fn lanes(self) -> [f32; LANES] {
        self.0
    }

    #[inline(always)]
    unsafe fn scale(self, factor: f32) -> Self {
        Self(self.0.map(|sum| sum * factor))
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
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
    unsafe fn lanes(self) -> [f32; LANES] {
        let mut lanes = [0.0; LANES];
        unsafe {
            _mm256_storeu_ps(lanes.as_mut_ptr(), self.0[0]);
            _mm256_storeu_ps(lanes.as_mut_ptr().add(LANES / 2), self.0[1]);
        }
        lanes
    }

    #[inline(always)]
    unsafe fn scale(self, factor: f32) -> Self {
        unsafe {
            Self(
                self.0
                    .map(|sums| _mm256_mul_ps(sums, _mm256_set1_ps(factor))),
            )
        }
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> Self {
        unsafe { Self([_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(LANES / 2))]) }
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
}

/// Needs `avx512f`, `avx512bw` and `avx512dq`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Pairs(__m512);

/// Needs `avx512bf16` beside what [`Avx512Pairs`] needs.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512Bf16Pairs(__m512);

/// The totals of sixteen registers, as [`Pairs::totals`] adds them, by transposing while adding.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn totals16(sums: [__m512; LANES]) -> [f32; LANES] {
    unsafe {
        // Lanes 2n and 2n + 1 of two registers, added, side by side.
        let halve = |a, b| {
            _mm512_add_ps(
                _mm512_shuffle_ps::<0b10_00_10_00>(a, b),
                _mm512_shuffle_ps::<0b11_01_11_01>(a, b),
            )
        };
        // After two rounds a 128-bit part holds, of four registers, the sum of its own four lanes.
        let fours: [__m512; 4] = std::array::from_fn(|at| {
            let s = &sums[4 * at..4 * at + 4];
            halve(halve(s[0], s[1]), halve(s[2], s[3]))
        });
        // The same with 128-bit parts in place of lanes.
        let halve = |a, b| {
            _mm512_add_ps(
                _mm512_shuffle_f32x4::<0b10_00_10_00>(a, b),
                _mm512_shuffle_f32x4::<0b11_01_11_01>(a, b),
            )
        };
        let all = halve(halve(fours[0], fours[1]), halve(fours[2], fours[3]));
        let mut totals = [0.0; LANES];
        _mm512_storeu_ps(totals.as_mut_ptr(), all);
        totals
    }
}

/// [`Pairs::total`] of one register.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn total512(sums: __m512) -> f32 {
    unsafe {
        let swap = _mm512_permute_ps::<0b10_11_00_01>(sums);
        let pairs = _mm512_add_ps(sums, swap);
        let swap = _mm512_permute_ps::<0b01_00_11_10>(pairs);
        let fours = _mm512_add_ps(pairs, swap);
        let swap = _mm512_shuffle_f32x4::<0b10_11_00_01>(fours, fours);
        let eights = _mm512_add_ps(fours, swap);
        let swap = _mm512_shuffle_f32x4::<0b01_00_11_10>(eights, eights);
        _mm512_cvtss_f32(_mm512_add_ps(eights, swap))
    }
}

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

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn lanes512(sums: __m512) -> [f32; LANES] {
    let mut lanes = [0.0; LANES];
    unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sums) };
    lanes
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
    unsafe fn lanes(self) -> [f32; LANES] {
        unsafe { lanes512(self.0) }
    }

    #[inline(always)]
    unsafe fn scale(self, factor: f32) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, _mm512_set1_ps(factor))) }
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(from)) }
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
    unsafe fn total(self) -> f32 {
        unsafe { total512(self.0) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [Self; LANES]) -> [f32; LANES] {
        unsafe { totals16(sums.map(|sum| sum.0)) }
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
    unsafe fn lanes(self) -> [f32; LANES] {
        unsafe { lanes512(self.0) }
    }

    #[inline(always)]
    unsafe fn scale(self, factor: f32) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, _mm512_set1_ps(factor))) }
    }

    #[inline(always)]
    unsafe fn load_sums(from: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(from)) }
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
    unsafe fn total(self) -> f32 {
        unsafe { total512(self.0) }
    }

    #[inline(always)]
    unsafe fn totals(sums: [Self; LANES]) -> [f32; LANES] {
        unsafe { totals16(sums.map(|sum| sum.0)) }
    }
}
