//! Sixteen f32 lanes, on AVX-512, on AVX2 and on plain Rust, with bit-identical results.
//!
//! Invariant: every operation is defined lane by lane with one rounding (multiply-add is fused), and [`Lanes::sum`]
//! adds in one fixed tree. A kernel written over this trait therefore gives the same bytes on every machine, which is
//! what lets pods on different nodes of a fleet agree, and lets the portable form serve as the others' oracle.
//!
//! Surprise: the methods carry no `target_feature`; they are `inline(always)` and become single instructions only
//! inside the entry points of [`crate::kernels`] that enable the feature.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod bytes;
mod pairs;
mod portable;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
#[cfg(target_arch = "x86_64")]
pub(crate) use bytes::{Avx2Bytes, Avx512VnniBytes, AvxVnniBytes};
pub(crate) use bytes::{Bytes, LINE, PortableBytes};
#[cfg(target_arch = "x86_64")]
pub(crate) use pairs::{Avx2Pairs, Avx512Bf16Pairs, Avx512Pairs};
pub(crate) use pairs::{PAIRED, Pairs, PortablePairs};
pub(crate) use portable::Portable;

/// Number of lanes.
pub(crate) const LANES: usize = 16;

/// Sixteen f32 values; see the module's description.
///
/// # Safety
/// Every method requires that the CPU has the implementation's features. The pointer methods require that the named
/// number of elements may be read or written at the pointer; no alignment is required.
#[allow(unsafe_code)]
pub(crate) trait Lanes: Copy {
    /// All lanes `value`.
    unsafe fn splat(value: f32) -> Self;
    /// Reads [`LANES`] values.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `count < LANES` values; the other lanes are zero.
    unsafe fn load_part(from: *const f32, count: usize) -> Self;
    /// Reads [`LANES`] bfloat16 values and widens them.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Reads `count < LANES` bfloat16 values; the other lanes are zero.
    unsafe fn load_bf16_part(from: *const u16, count: usize) -> Self;
    /// Writes [`LANES`] values.
    unsafe fn store(self, to: *mut f32);
    /// Writes the first `count < LANES` values.
    unsafe fn store_part(self, to: *mut f32, count: usize);
    /// `self * factor + addend`, rounded once.
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Sum.
    unsafe fn add(self, other: Self) -> Self;
    /// Difference.
    unsafe fn sub(self, other: Self) -> Self;
    /// Product.
    unsafe fn mul(self, other: Self) -> Self;
    /// Quotient.
    unsafe fn div(self, other: Self) -> Self;
    /// Per lane `other > self ? other : self`: a NaN in `self` stays.
    unsafe fn max(self, other: Self) -> Self;
    /// Per lane `other < self ? other : self`: a NaN in `self` stays.
    unsafe fn min(self, other: Self) -> Self;
    /// Interprets the lanes' bits as integers and shifts them left by 23: turns a biased exponent into a power of 2.
    unsafe fn shift_to_exponent(self) -> Self;
    /// Sum of all lanes in the order 16 → 8 → 4 → 2 → 1, upper half added to lower half each time.
    unsafe fn sum(self) -> f32;
}
