//! Sixteen running integer sums, one for each of sixteen weight rows that lie interleaved in memory.
//!
//! A line of [`LINE`] bytes holds four consecutive elements of each of sixteen weight rows. A step multiplies it by four
//! activations, the same for all rows, and adds each row's four products to its lane: `VPDPBUSD` in one instruction.
//! Invariant: sums are integers and exact, so no order of steps and no instruction set can change them.
//!
//! Surprise: the instruction wants one factor unsigned. Weights are stored with an offset of 128 (eight bits) or 8 (four
//! bits); what the offset adds is the offset times the sum of the activations, which callers subtract by starting their
//! sums there. Instructions without VNNI would overflow on such bytes, take the eight-bit offset off again and say so in
//! [`Bytes::OFFSET`].

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;

#[cfg(target_arch = "x86_64")]
use super::{Avx2, Avx512};
use super::{LANES, Lanes, Portable};

/// Bytes of a line: four for each of sixteen weight rows.
pub(crate) const LINE: usize = 64;

/// Sixteen running sums; see the module's description.
///
/// # Safety
/// Every method requires that the CPU has the implementation's features, and that [`LINE`] bytes may be read at the
/// pointer; no alignment is required. Activations lie in -127 ..= 127.
pub(crate) trait Bytes: Copy {
    /// A line of weights.
    type Weights: Copy;
    /// Float32 lanes of the same instruction set.
    type Wide: Lanes;
    /// What [`Bytes::add_products`] leaves of the offset of eight-bit weights in its products: 128 or nothing.
    const OFFSET: i32;
    /// All sums `value`.
    unsafe fn splat(value: i32) -> Self;
    /// Reads a line of bytes.
    unsafe fn load(from: *const u8) -> Self::Weights;
    /// Reads a line of nibbles: the low halves of all bytes, the high halves.
    unsafe fn load_nibbles(from: *const u8) -> [Self::Weights; 2];
    /// Adds the products of bytes with four activations.
    unsafe fn add_products(self, weights: Self::Weights, activations: i32) -> Self;
    /// Adds the products of nibbles (0 ..= 15) with four activations.
    unsafe fn add_nibbles(self, weights: Self::Weights, activations: i32) -> Self;
    /// The sums as floats, rounded to nearest.
    unsafe fn floats(self) -> Self::Wide;
}

/// Plain Rust.
#[derive(Clone, Copy)]
pub(crate) struct PortableBytes([i32; LANES]);

impl PortableBytes {
    #[inline(always)]
    fn add(self, weights: [u8; LINE], activations: i32, offset: i32) -> Self {
        let activations = activations.to_le_bytes();
        Self(std::array::from_fn(|lane| {
            let products = (0..4).map(|at| {
                let weight = i32::from(weights[4 * lane + at]) - offset;
                weight * i32::from(activations[at].cast_signed())
            });
            self.0[lane].wrapping_add(products.sum())
        }))
    }
}

// SAFETY (of every body): the caller guarantees the pointers; nothing else is unsafe here.
impl Bytes for PortableBytes {
    type Weights = [u8; LINE];
    type Wide = Portable;
    const OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Weights {
        unsafe { from.cast::<[u8; LINE]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> [Self::Weights; 2] {
        let bytes = unsafe { Self::load(from) };
        [bytes.map(|byte| byte & 15), bytes.map(|byte| byte >> 4)]
    }

    #[inline(always)]
    unsafe fn add_products(self, weights: Self::Weights, activations: i32) -> Self {
        self.add(weights, activations, 128)
    }

    #[inline(always)]
    unsafe fn add_nibbles(self, weights: Self::Weights, activations: i32) -> Self {
        self.add(weights, activations, 0)
    }

    #[inline(always)]
    unsafe fn floats(self) -> Self::Wide {
        Portable(self.0.map(|sum| sum as f32))
    }
}

/// Needs `avx2`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2Bytes([__m256i; 2]);

/// Needs `avxvnni` beside what [`Avx2Bytes`] needs.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct AvxVnniBytes([__m256i; 2]);

/// Needs `avx512f`, `avx512bw` and `avx512vnni`.
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512VnniBytes(__m512i);

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn load256(from: *const u8) -> [__m256i; 2] {
    unsafe {
        [
            _mm256_loadu_si256(from.cast()),
            _mm256_loadu_si256(from.add(LINE / 2).cast()),
        ]
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn nibbles256(from: *const u8) -> [[__m256i; 2]; 2] {
    unsafe {
        let [a, b] = load256(from);
        let mask = _mm256_set1_epi8(15);
        let low = |bytes| _mm256_and_si256(bytes, mask);
        let high = |bytes| _mm256_and_si256(_mm256_srli_epi16::<4>(bytes), mask);
        [[low(a), low(b)], [high(a), high(b)]]
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn floats256(sums: [__m256i; 2]) -> Avx2 {
    unsafe { Avx2(_mm256_cvtepi32_ps(sums[0]), _mm256_cvtepi32_ps(sums[1])) }
}

/// Adds the four products of each lane; no pair of `unsigned * signed` products may leave sixteen bits.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn add_pairs(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    unsafe {
        let pairs = _mm256_maddubs_epi16(unsigned, signed);
        _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
    }
}

// SAFETY (of every body): the caller guarantees the features and the pointers.
#[cfg(target_arch = "x86_64")]
impl Bytes for Avx2Bytes {
    type Weights = [__m256i; 2];
    type Wide = Avx2;
    const OFFSET: i32 = 0;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        unsafe { Self([_mm256_set1_epi32(value); 2]) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Weights {
        unsafe { load256(from) }
    }

    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> [Self::Weights; 2] {
        unsafe { nibbles256(from) }
    }

    #[inline(always)]
    unsafe fn add_products(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe {
            let activations = _mm256_set1_epi32(activations);
            let offset = _mm256_set1_epi8(i8::MIN);
            let mut sums = self.0;
            for half in 0..2 {
                // Magnitudes are at most 128 and 127, so two products stay within sixteen bits.
                let weights = _mm256_xor_si256(weights[half], offset);
                let signed = _mm256_sign_epi8(activations, weights);
                sums[half] = add_pairs(sums[half], _mm256_abs_epi8(weights), signed);
            }
            Self(sums)
        }
    }

    #[inline(always)]
    unsafe fn add_nibbles(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe {
            let activations = _mm256_set1_epi32(activations);
            let mut sums = self.0;
            for half in 0..2 {
                sums[half] = add_pairs(sums[half], weights[half], activations);
            }
            Self(sums)
        }
    }

    #[inline(always)]
    unsafe fn floats(self) -> Self::Wide {
        unsafe { floats256(self.0) }
    }
}

// SAFETY (of every body): as above.
#[cfg(target_arch = "x86_64")]
impl Bytes for AvxVnniBytes {
    type Weights = [__m256i; 2];
    type Wide = Avx2;
    const OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        unsafe { Self([_mm256_set1_epi32(value); 2]) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Weights {
        unsafe { load256(from) }
    }

    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> [Self::Weights; 2] {
        unsafe { nibbles256(from) }
    }

    #[inline(always)]
    unsafe fn add_products(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe {
            let activations = _mm256_set1_epi32(activations);
            let [a, b] = self.0;
            Self([
                _mm256_dpbusd_avx_epi32(a, weights[0], activations),
                _mm256_dpbusd_avx_epi32(b, weights[1], activations),
            ])
        }
    }

    #[inline(always)]
    unsafe fn add_nibbles(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe { self.add_products(weights, activations) }
    }

    #[inline(always)]
    unsafe fn floats(self) -> Self::Wide {
        unsafe { floats256(self.0) }
    }
}

// SAFETY (of every body): as above.
#[cfg(target_arch = "x86_64")]
impl Bytes for Avx512VnniBytes {
    type Weights = __m512i;
    type Wide = Avx512;
    const OFFSET: i32 = 128;

    #[inline(always)]
    unsafe fn splat(value: i32) -> Self {
        unsafe { Self(_mm512_set1_epi32(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self::Weights {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_nibbles(from: *const u8) -> [Self::Weights; 2] {
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let mask = _mm512_set1_epi8(15);
            [
                _mm512_and_si512(bytes, mask),
                _mm512_and_si512(_mm512_srli_epi16::<4>(bytes), mask),
            ]
        }
    }

    #[inline(always)]
    unsafe fn add_products(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe {
            let activations = _mm512_set1_epi32(activations);
            Self(_mm512_dpbusd_epi32(self.0, weights, activations))
        }
    }

    #[inline(always)]
    unsafe fn add_nibbles(self, weights: Self::Weights, activations: i32) -> Self {
        unsafe { self.add_products(weights, activations) }
    }

    #[inline(always)]
    unsafe fn floats(self) -> Self::Wide {
        unsafe { Avx512(_mm512_cvtepi32_ps(self.0)) }
    }
}
