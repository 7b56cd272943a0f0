//! The lanes as one AVX-512 register.

#![allow(unsafe_code)]

use std::arch::x86_64::*;

use super::Lanes;

/// See [`Lanes`]; needs `avx512f`, `avx512bw`, `avx512dq` and `avx512vl`.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(pub(super) __m512);

#[inline(always)]
fn mask(count: usize) -> u16 {
    (1u16 << count) - 1
}

#[inline(always)]
unsafe fn widen(bits: __m256i) -> __m512 {
    unsafe { _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits))) }
}

// SAFETY (of every body): the caller guarantees the features and the pointers; masked lanes touch no memory.
impl Lanes for Avx512 {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        unsafe { Self(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> Self {
        unsafe { Self(_mm512_maskz_loadu_ps(mask(count), from)) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe { Self(widen(_mm256_loadu_si256(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_bf16_part(from: *const u16, count: usize) -> Self {
        unsafe { Self(widen(_mm256_maskz_loadu_epi16(mask(count), from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        unsafe { _mm512_mask_storeu_ps(to, mask(count), self.0) }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        unsafe { Self(_mm512_fmadd_ps(self.0, factor.0, addend.0)) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        unsafe { Self(_mm512_sub_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        unsafe { Self(_mm512_div_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // The instruction is `first > second ? first : second`, hence the order.
        unsafe { Self(_mm512_max_ps(other.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        unsafe { Self(_mm512_min_ps(other.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(self) -> Self {
        unsafe {
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<23>(
                _mm512_castps_si512(self.0),
            )))
        }
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        unsafe {
            super::avx2::sum8(_mm256_add_ps(
                _mm512_castps512_ps256(self.0),
                _mm512_extractf32x8_ps::<1>(self.0),
            ))
        }
    }
}
