//! Whether the engine's thread makes progress.
//!
//! The thread leaves marks in atomics, so that a probe never waits for it. A step may take as long as its tokens did
//! before, ten times over, but four seconds in any case: a fixed limit would either kill large models or miss hangs of
//! small ones.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Times the slowest rate seen so far.
const SLACK: u64 = 10;

/// Longest that an exchange of weights may take: those of the largest GPU, both ways, over a slow link.
const EXCHANGE: Duration = Duration::from_secs(120);

/// Marks of the engine's thread.
#[derive(Debug)]
pub struct Heartbeat {
    epoch: Instant,
    patience: Duration,
    /// Microseconds since `epoch` of the last mark; 0 before the first.
    marked: AtomicU64,
    /// Tokens of the step in progress; 0 between steps.
    tokens: AtomicU64,
    /// Whether weights are being exchanged.
    exchanging: AtomicBool,
    /// Slowest step so far, nanoseconds for each token.
    slowest: AtomicU64,
    failure: Mutex<Option<String>>,
}

impl Heartbeat {
    /// Marks that must not be older than `patience` plus what the step's tokens explain.
    pub fn new(patience: Duration) -> Self {
        Self {
            epoch: Instant::now(),
            patience,
            marked: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            exchanging: AtomicBool::new(false),
            slowest: AtomicU64::new(0),
            failure: Mutex::new(None),
        }
    }

    fn now(&self) -> u64 {
        self.epoch.elapsed().as_micros() as u64 + 1
    }

    /// The thread is between two steps.
    pub fn tick(&self) {
        self.begin_step(0);
    }

    /// Weights are being exchanged from now on until the next mark.
    pub fn begin_exchange(&self) {
        self.tokens.store(0, Ordering::Relaxed);
        self.exchanging.store(true, Ordering::Relaxed);
        self.marked.store(self.now(), Ordering::Release);
    }

    /// A step of so many tokens begins.
    pub fn begin_step(&self, tokens: usize) {
        self.tokens.store(tokens as u64, Ordering::Relaxed);
        self.exchanging.store(false, Ordering::Relaxed);
        self.marked.store(self.now(), Ordering::Release);
    }

    /// The step took so long.
    pub fn end_step(&self, took: Duration) {
        let tokens = self.tokens.load(Ordering::Relaxed).max(1);
        self.slowest
            .fetch_max(took.as_nanos() as u64 / tokens, Ordering::Relaxed);
        self.tick();
    }

    /// The thread has ended and will not come back.
    pub fn fail(&self, why: impl Into<String>) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(why.into());
    }

    /// Whether [`Self::fail`] was called.
    pub fn is_failed(&self) -> bool {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_some()
    }

    /// Time since the last mark.
    pub fn age(&self) -> Duration {
        let marked = self.marked.load(Ordering::Acquire);
        match marked {
            0 => Duration::ZERO,
            _ => Duration::from_micros(self.now().saturating_sub(marked)),
        }
    }

    /// What is wrong, if anything is.
    pub fn problem(&self) -> Option<String> {
        if let Some(failure) = &*self.failure.lock().unwrap_or_else(PoisonError::into_inner) {
            return Some(failure.clone());
        }
        let age = self.age();
        let tokens = self.tokens.load(Ordering::Relaxed);
        let slowest = self.slowest.load(Ordering::Relaxed);
        let explained = match self.exchanging.load(Ordering::Relaxed) {
            true => EXCHANGE,
            false => Duration::from_nanos(slowest.saturating_mul(tokens).saturating_mul(SLACK)),
        };
        let allowed = self.patience.max(explained);
        (age > allowed).then(|| {
            format!(
                "the engine's thread has shown no progress for {:.1} s (a step of {tokens} tokens may take {:.1} s)",
                age.as_secs_f64(),
                allowed.as_secs_f64()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_may_take_what_its_tokens_took_before_and_no_longer() {
        let heartbeat = Heartbeat::new(Duration::from_millis(20));
        assert_eq!(heartbeat.problem(), None, "nothing has begun");
        heartbeat.begin_step(1);
        heartbeat.end_step(Duration::from_millis(10));
        heartbeat.begin_step(100);
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(heartbeat.problem(), None, "100 tokens may take 10 s");
        heartbeat.begin_step(0);
        std::thread::sleep(Duration::from_millis(40));
        assert!(heartbeat.problem().unwrap().contains("no progress"));
        heartbeat.begin_exchange();
        std::thread::sleep(Duration::from_millis(40));
        assert_eq!(heartbeat.problem(), None, "an exchange may take minutes");
        heartbeat.tick();
        assert_eq!(heartbeat.problem(), None);
        std::thread::sleep(Duration::from_millis(40));
        assert!(heartbeat.problem().is_some(), "and ends with the next mark");
        heartbeat.tick();
        heartbeat.fail("gone");
        assert_eq!(heartbeat.problem().as_deref(), Some("gone"));
    }
}
