//! The bounds of this machine: how fast memory is read and how fast registers multiply.

#![allow(unsafe_code)]

use std::hint::black_box;
use std::time::Instant;

use crate::RUNS;

/// Bytes that are read: far more than any cache holds.
const READ_BYTES: usize = 1 << 30;
/// Multiply-adds of a run, per accumulator.
const STEPS: usize = 20_000_000;
const ACCUMULATORS: usize = 16;

/// What all threads together reach; the best of [`RUNS`] runs, since a bound is what can be reached.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bounds {
    /// Bytes per second.
    pub read_bytes: f64,
    /// Float32 operations per second, two for each multiply-add.
    pub f32_flops: f64,
    /// The same of bfloat16 dot products, where the CPU has them.
    pub bf16_flops: Option<f64>,
    /// The same of byte dot products summed in 32 bits (VNNI).
    pub int8_ops: Option<f64>,
}

/// Measures with `threads` threads.
pub(crate) fn measure(threads: usize) -> Bounds {
    Bounds {
        read_bytes: read(threads),
        f32_flops: rate(threads, f32_steps),
        bf16_flops: has_bf16().then(|| rate(threads, bf16_steps)),
        int8_ops: has_vnni().then(|| rate(threads, int8_steps)),
    }
}

fn best(mut run: impl FnMut() -> f64) -> f64 {
    (0..RUNS).map(|_| run()).fold(0.0, f64::max)
}

fn read(threads: usize) -> f64 {
    let words = vec![1u64; READ_BYTES / 8];
    let part = words.len().div_ceil(threads);
    best(|| {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(part) {
                scope.spawn(|| {
                    // Eight chains, so that the sum is not what is measured.
                    let mut sums = [0u64; 64];
                    for line in part.chunks_exact(64) {
                        for (sum, word) in sums.iter_mut().zip(line) {
                            *sum = sum.wrapping_add(*word);
                        }
                    }
                    black_box(sums);
                });
            }
        });
        READ_BYTES as f64 / started.elapsed().as_secs_f64()
    })
}

fn rate(threads: usize, steps: fn() -> f64) -> f64 {
    best(|| {
        let started = Instant::now();
        let operations: f64 = std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(steps)).collect();
            workers.into_iter().filter_map(|w| w.join().ok()).sum()
        });
        operations / started.elapsed().as_secs_f64()
    })
}

#[cfg(target_arch = "x86_64")]
fn has_bf16() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bf16")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_bf16() -> bool {
    false
}

/// Operations done.
fn f32_steps() -> f64 {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was detected.
            return unsafe { x86::f32_512() };
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were detected.
            return unsafe { x86::f32_256() };
        }
    }
    let mut sums = [0.0f32; ACCUMULATORS];
    let factor = black_box(1.000_1f32);
    for _ in 0..STEPS / 8 {
        for sum in &mut sums {
            *sum = *sum * factor + factor;
        }
    }
    black_box(sums);
    (STEPS / 8 * ACCUMULATORS * 2) as f64
}

/// Operations done.
fn bf16_steps() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if has_bf16() {
        // SAFETY: the feature was detected.
        return unsafe { x86::bf16_512() };
    }
    0.0
}

#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni")
}

#[cfg(not(target_arch = "x86_64"))]
fn has_vnni() -> bool {
    false
}

/// Operations done.
fn int8_steps() -> f64 {
    #[cfg(target_arch = "x86_64")]
    if has_vnni() {
        // SAFETY: the feature was detected.
        return unsafe { x86::int8_512() };
    }
    0.0
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::{ACCUMULATORS, STEPS};

    #[target_feature(enable = "avx512f")]
    pub(super) unsafe fn f32_512() -> f64 {
        let factor = _mm512_set1_ps(black_box(0.5));
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(factor, factor, *sum);
            }
        }
        black_box(sums);
        (STEPS * ACCUMULATORS * 32) as f64
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) unsafe fn f32_256() -> f64 {
        let factor = _mm256_set1_ps(black_box(0.5));
        let mut sums = [_mm256_setzero_ps(); ACCUMULATORS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(factor, factor, *sum);
            }
        }
        black_box(sums);
        (STEPS * ACCUMULATORS * 16) as f64
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) unsafe fn bf16_512() -> f64 {
        let one = _mm512_set1_epi16(black_box(0x3f80));
        // SAFETY: both are sixteen pairs of bfloat16 values.
        let factor = unsafe { std::mem::transmute::<__m512i, __m512bh>(one) };
        let mut sums = [_mm512_setzero_ps(); ACCUMULATORS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, factor, factor);
            }
        }
        black_box(sums);
        (STEPS * ACCUMULATORS * 64) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) unsafe fn int8_512() -> f64 {
        let factor = _mm512_set1_epi8(black_box(1));
        let mut sums = [_mm512_setzero_si512(); ACCUMULATORS];
        for _ in 0..STEPS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, factor, factor);
            }
        }
        black_box(sums);
        (STEPS * ACCUMULATORS * 128) as f64
    }
}
