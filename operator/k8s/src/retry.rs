//! One call to the API server: bounded in time, repeated a few times when that can help.
//!
//! Only categories that are transient are repeated (429, 5xx, no answer, no connection). A conflict is not: what was
//! wanted may have changed, so the next pass looks again. Every write here may be repeated safely, because names are
//! deterministic and applies are idempotent. kube's own retry layer is switched off: it repeats for minutes.

use std::future::Future;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use crate::error::{Call, Error};

/// How long and how often to try.
#[derive(Clone, Copy, Debug)]
pub struct RetryPolicy {
    /// Calls in total, at least 1.
    pub attempts_max: u32,
    /// Time for one call.
    pub attempt_timeout: Duration,
    /// Delay before the second call; doubles from there.
    pub delay_min: Duration,
    /// Longest delay, also for what a server asks with Retry-After.
    pub delay_max: Duration,
}

impl RetryPolicy {
    /// For reads and writes of a pass: at most about 40 s when nothing answers.
    pub const CALL: RetryPolicy = RetryPolicy {
        attempts_max: 4,
        attempt_timeout: Duration::from_secs(10),
        delay_min: Duration::from_millis(100),
        delay_max: Duration::from_secs(2),
    };
    /// For what must not be late, such as the lease: once.
    pub const ONCE: RetryPolicy = RetryPolicy {
        attempts_max: 1,
        ..RetryPolicy::CALL
    };

    /// Runs `call` until it succeeds, fails for good, or the attempts are used up.
    pub async fn run<T, F, Answer>(&self, call: &Call, mut attempt: F) -> Result<T, Error>
    where
        F: FnMut() -> Answer,
        Answer: Future<Output = Result<T, kube::Error>>,
    {
        let (mut tried, mut is_open) = (0, false);
        loop {
            tried += 1;
            let error = match tokio::time::timeout(self.attempt_timeout, attempt()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(source)) => Error::Api {
                    call: call.clone(),
                    source: Box::new(source),
                },
                Err(_) => Error::Timeout {
                    call: call.clone(),
                    limit: self.attempt_timeout,
                },
            };
            if tried >= self.attempts_max || !error.category().is_transient() {
                // A quota may refuse the second attempt because the first, of which nothing was heard, used it up.
                return Err(if is_open && !error.is_open() {
                    let refused = Box::new(error);
                    Error::Repeated { refused }
                } else {
                    error
                });
            }
            is_open |= error.is_open();
            let delay = self.delay(tried, error.retry_after(), jitter());
            tracing::debug!(%call, tried, delay_ms = delay.as_millis(), error = %error, "call failed and is repeated");
            tokio::time::sleep(delay).await;
        }
    }

    /// The delay after `tried` failures; `jitter` is in 0..=255 and takes away up to half.
    fn delay(&self, tried: u32, asked: Option<Duration>, jitter: u8) -> Duration {
        let doubled = self
            .delay_min
            .saturating_mul(1 << tried.saturating_sub(1).min(16));
        let bounded = doubled.max(asked.unwrap_or_default()).min(self.delay_max);
        bounded - bounded.mul_f64(f64::from(jitter) / 512.0)
    }
}

/// Random enough to keep two operators from knocking in step; nothing else hangs on it.
pub fn jitter() -> u8 {
    RandomState::new().build_hasher().finish() as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn refused(code: u16, reason: &str) -> kube::Error {
        kube::Error::Api(Status::failure("no", reason).with_code(code).boxed())
    }

    async fn calls_made(
        policy: RetryPolicy,
        answer: impl Fn(u32) -> Result<(), kube::Error>,
    ) -> (u32, bool) {
        let made = AtomicU32::new(0);
        let call = Call::on("apply", "Pod", "default", "p");
        let result = policy
            .run(&call, || {
                let tried = made.fetch_add(1, Ordering::Relaxed) + 1;
                let answer = answer(tried);
                async move { answer }
            })
            .await;
        (made.load(Ordering::Relaxed), result.is_ok())
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_error_is_repeated_until_it_passes() {
        let outcome = calls_made(RetryPolicy::CALL, |tried| {
            if tried < 3 {
                Err(refused(503, "ServiceUnavailable"))
            } else {
                Ok(())
            }
        })
        .await;
        assert_eq!(outcome, (3, true));
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_stays_down_is_given_up_after_the_last_attempt() {
        assert_eq!(
            calls_made(RetryPolicy::CALL, |_| Err(refused(500, "InternalError"))).await,
            (4, false)
        );
    }

    #[tokio::test(start_paused = true)]
    async fn refusals_and_conflicts_are_not_repeated() {
        for (code, reason) in [
            (409, "Conflict"),
            (403, "Forbidden"),
            (422, "Invalid"),
            (404, "NotFound"),
            (410, "Gone"),
        ] {
            assert_eq!(
                calls_made(RetryPolicy::CALL, |_| Err(refused(code, reason))).await,
                (1, false),
                "{reason}"
            );
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_asks_for_time_is_given_it() {
        let began = tokio::time::Instant::now();
        let outcome = calls_made(RetryPolicy::CALL, |tried| {
            let status = serde_json::json!({"status": "Failure", "code": 429, "message": "", "reason": "",
                "details": {"retryAfterSeconds": 1}});
            let status: Status = serde_json::from_value(status).expect("a status");
            match tried {
                1 => Err(kube::Error::Api(status.boxed())),
                _ => Ok(()),
            }
        });
        assert_eq!(outcome.await, (2, true));
        // Jitter takes away up to half.
        assert!(
            began.elapsed() >= Duration::from_millis(500),
            "{:?}",
            began.elapsed()
        );
    }

    #[tokio::test(start_paused = true)]
    async fn what_must_not_be_late_is_tried_once() {
        let outcome = calls_made(RetryPolicy::ONCE, |_| {
            Err(refused(503, "ServiceUnavailable"))
        });
        assert_eq!(outcome.await, (1, false));
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_never_answers_ends() {
        let call = Call::on("get", "Lease", "default", "l");
        let began = tokio::time::Instant::now();
        let result = RetryPolicy::ONCE
            .run(&call, std::future::pending::<Result<(), kube::Error>>)
            .await;
        assert!(matches!(result, Err(Error::Timeout { .. })));
        // The lease of a leader that waits longer is another's.
        assert!(began.elapsed() <= Duration::from_secs(10));
    }

    #[test]
    fn delays_double_honour_the_server_and_stay_bounded() {
        let policy = RetryPolicy::CALL;
        assert_eq!(policy.delay(1, None, 0), Duration::from_millis(100));
        assert_eq!(policy.delay(3, None, 0), Duration::from_millis(400));
        assert_eq!(
            policy.delay(1, Some(Duration::from_secs(1)), 0),
            Duration::from_secs(1)
        );
        assert_eq!(
            policy.delay(9, Some(Duration::from_secs(3600)), 0),
            policy.delay_max
        );
        let shortened = policy.delay(1, None, 255);
        assert!(shortened >= Duration::from_millis(50) && shortened < policy.delay_min);
    }
}
