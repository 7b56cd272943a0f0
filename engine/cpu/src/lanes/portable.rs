//! The lanes in plain Rust: the fallback and the oracle of the other two.
//!
//! On a CPU without a fused multiply-add, `f32::mul_add` is a library call: right, and slow.

#![allow(unsafe_code)]

use super::{LANES, Lanes};

/// See [`Lanes`].
#[derive(Clone, Copy)]
pub(crate) struct Portable(pub(super) [f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, op: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|lane| op(self.0[lane], other.0[lane])))
    }
}

// SAFETY (of every body): the caller guarantees the pointers; nothing else is unsafe here.
impl Lanes for Portable {
    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn load_part(from: *const f32, count: usize) -> Self {
        let mut lanes = [0.0; LANES];
        for (index, lane) in lanes.iter_mut().enumerate().take(count) {
            *lane = unsafe { from.add(index).read_unaligned() };
        }
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_bf16_part(from: *const u16, count: usize) -> Self {
        let mut lanes = [0.0; LANES];
        for (index, lane) in lanes.iter_mut().enumerate().take(count) {
            let bits = unsafe { from.add(index).read_unaligned() };
            *lane = f32::from_bits(u32::from(bits) << 16);
        }
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn store_part(self, to: *mut f32, count: usize) {
        for (index, lane) in self.0.iter().enumerate().take(count) {
            unsafe { to.add(index).write_unaligned(*lane) }
        }
    }

    #[inline(always)]
    unsafe fn mul_add(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|lane| {
            self.0[lane].mul_add(factor.0[lane], addend.0[lane])
        }))
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    unsafe fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    unsafe fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if b > a { b } else { a })
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if b < a { b } else { a })
    }

    #[inline(always)]
    unsafe fn shift_to_exponent(self) -> Self {
        Self(self.0.map(|lane| f32::from_bits(lane.to_bits() << 23)))
    }

    #[inline(always)]
    unsafe fn sum(self) -> f32 {
        let mut lanes = self.0;
        let mut half = LANES / 2;
        while half > 0 {
            for lane in 0..half {
                lanes[lane] += lanes[lane + half];
            }
            half /= 2;
        }
        lanes[0]
    }
}
