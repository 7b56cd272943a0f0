//! How fast this machine reads memory, for the bound that decode steps are held against.
//!
//! Measured before the weights are loaded, in a buffer no larger than they will be, so that the plan's total is never
//! exceeded; a model small enough for the caches is then held against the caches, which it will be read from too.

use std::hint::black_box;
use std::time::Instant;

use engine_memory::MemoryPlan;
use engine_server::Roofline;
use engine_spec::ModelConfig;

/// Largest buffer that is read; far more than caches hold, and read in some ten milliseconds.
const BYTES_MAX: u64 = 256 << 20;
const RUNS: usize = 3;
/// Words of the sums that run side by side, so that adding is not what is measured.
const LANES: usize = 64;

/// The bound of steps of this model on `threads` threads.
pub fn roofline(model: &ModelConfig, plan: &MemoryPlan, threads: usize) -> Roofline {
    let weights = plan.per_rank.weights_bytes;
    Roofline {
        bytes_per_second: read_rate(weights.min(BYTES_MAX) as usize, threads),
        ..bytes_read(model, weights as f64)
    }
}

/// What steps read of `weights` bytes; parameters are taken to be of one size.
fn bytes_read(model: &ModelConfig, weights: f64) -> Roofline {
    let each = weights / model.parameters() as f64;
    let table = match model.tied_embeddings {
        true => 0,
        false => u64::from(model.vocab_size) * u64::from(model.hidden_size),
    };
    Roofline {
        token_bytes: model.active_parameters() as f64 * each,
        all_bytes: (model.parameters() - table) as f64 * each,
        chosen: model.moe.as_ref().map_or(1.0, |moe| {
            f64::from(moe.experts_per_token) / f64::from(moe.routed_experts)
        }),
        bytes_per_second: 1.0,
    }
}

/// Bytes per second of the best of [`RUNS`] reads of a buffer by all threads.
fn read_rate(bytes: usize, threads: usize) -> f64 {
    let words = vec![1u64; (bytes / 8).max(LANES)];
    let part = words.len().div_ceil(threads.max(1));
    let best = (0..RUNS).map(|_| {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(part) {
                scope.spawn(|| {
                    let mut sums = [0u64; LANES];
                    for line in part.chunks_exact(LANES) {
                        for (sum, word) in sums.iter_mut().zip(line) {
                            *sum = sum.wrapping_add(*word);
                        }
                    }
                    black_box(sums);
                });
            }
        });
        (words.len() * 8) as f64 / began.elapsed().as_secs_f64().max(1e-9)
    });
    best.fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V2_LITE: &str = include_str!("../cpu/tests/golden/v2-lite/config.json");
    const QWEN2_TIED: &str = include_str!("../cpu/tests/golden/qwen2-fp8/config.json");

    #[test]
    fn a_token_reads_what_it_uses_and_a_full_step_all_but_the_table() {
        let model = ModelConfig::from_hf_json(V2_LITE).expect("a config");
        let read = bytes_read(&model, model.parameters() as f64 * 2.0);
        assert_eq!(read.token_bytes, model.active_parameters() as f64 * 2.0);
        assert_eq!(read.all_bytes, (model.parameters() - 96 * 72) as f64 * 2.0);
        assert_eq!(read.chosen, 3.0 / 8.0);
        let dense = ModelConfig::from_hf_json(QWEN2_TIED).expect("a config");
        let read = bytes_read(&dense, dense.parameters() as f64);
        assert_eq!((read.chosen, read.token_bytes), (1.0, read.all_bytes));
    }

    #[test]
    fn memory_is_read_at_some_rate() {
        assert!(read_rate(1 << 20, 2).is_finite() && read_rate(0, 0) > 0.0);
    }
}
