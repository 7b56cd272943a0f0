//! What scheduling and bookkeeping take of a step, beside a backend that takes nothing.

use std::time::Instant;

use bench_report::{Row, median};
use engine_core::{
    Batch, Engine, ExecuteError, Executor, Limits, Logits, Request, RequestId, SamplingParameters,
    TokenId,
};

use crate::RUNS;

/// Sequences that decode side by side.
const SEQUENCES: usize = 256;
/// Steps that are timed together.
const STEPS: usize = 500;
/// Two tokens, so that choosing one is next to nothing.
const VOCABULARY: usize = 2;

/// Gives every row the same logits and remembers how long that took.
struct Idle {
    seconds: f64,
}

impl Executor for Idle {
    fn vocabulary(&self) -> usize {
        VOCABULARY
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        let began = Instant::now();
        let rows = batch.entries.iter().filter(|entry| entry.wants_logits);
        logits.reset(VOCABULARY, rows.count());
        self.seconds += began.elapsed().as_secs_f64();
        Ok(())
    }
}

/// Seconds of a step outside its backend: schedule, sample, hand out events.
fn step_seconds() -> anyhow::Result<f64> {
    let length = 64 + STEPS + 16;
    let mut engine = Engine::new(Limits {
        vocabulary: VOCABULARY,
        max_model_len: length,
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 8192,
        max_queued_requests: SEQUENCES,
        block_size: 16,
        block_count: SEQUENCES * length.div_ceil(16),
        draft_tokens: 0,
    })?;
    for id in 0..SEQUENCES {
        engine.submit(Request {
            id: RequestId(id as u64),
            // Prompts of their own: no two share a prefix.
            prompt: (0..64)
                .map(|at| TokenId((id >> (at % 8)) as u32 & 1))
                .collect(),
            choices: 1,
            max_tokens: STEPS + 16,
            parameters: SamplingParameters {
                temperature: 0.0,
                ignore_eos: true,
                ..SamplingParameters::default()
            },
            stop_tokens: Vec::new(),
            cache_salt: id.to_string(),
            constraint: None,
            priority: 0,
            tenant: String::new(),
            resumed: Vec::new(),
        })?;
    }
    let (mut idle, mut events) = (Idle { seconds: 0.0 }, Vec::new());
    while engine.load().running < SEQUENCES || engine.load().waiting > 0 {
        engine.step(&mut idle, &mut events)?;
        events.clear();
    }
    engine.step(&mut idle, &mut events)?;
    idle.seconds = 0.0;
    let began = Instant::now();
    for _ in 0..STEPS {
        events.clear();
        let report = engine.step(&mut idle, &mut events)?;
        anyhow::ensure!(
            report.sequences == SEQUENCES,
            "{} sequences in a step",
            report.sequences
        );
    }
    Ok((began.elapsed().as_secs_f64() - idle.seconds) / STEPS as f64)
}

/// The row.
///
/// # Errors
/// When a step fails or does not hold every sequence.
pub(crate) fn row() -> anyhow::Result<Row> {
    let runs: anyhow::Result<Vec<f64>> = (0..RUNS).map(|_| step_seconds()).collect();
    let name = format!("scheduler step of {SEQUENCES} sequences: schedule, choose, report");
    Ok(Row::below(&name, median(runs?) * 1e6, "µs", 50.0))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_step_of_all_sequences_is_timed() {
        let seconds = super::step_seconds().expect("steps run");
        assert!(seconds > 0.0 && seconds.is_finite());
    }
}
