//! When a status is written, and when the writes of a plan follow it.
//!
//! While many are looked at, a plan is told first and carried out when all were told. While few are, nothing waits.

use std::collections::HashMap;
use std::time::Duration;

use operator_k8s::watch::Key;
use tokio::time::Instant;

/// How long the writes of a plan wait that was told while many others were looked at, since the last of them was told; engines load
/// for minutes.
pub(super) const TOLD_PAUSE: Duration = Duration::from_secs(1);
/// How long they wait at most.
const TOLD_PAUSE_MAX: Duration = Duration::from_secs(10);

/// Plans that were told and are not carried out yet.
#[derive(Debug, Default)]
pub(super) struct Told {
    /// When the last of any was told.
    last: Option<Instant>,
    since: HashMap<Key, Instant>,
}

impl Told {
    pub(super) fn tell(&mut self, key: &Key, now: Instant) {
        self.last = Some(now);
        self.since.insert(key.clone(), now);
    }

    /// How long a plan waits on, because others are still being told; it is forgotten when it waits no more.
    pub(super) fn waits(&mut self, key: &Key, now: Instant) -> Option<Duration> {
        let since = *self.since.get(key)?;
        let quiet = self.last.unwrap_or(since) + TOLD_PAUSE;
        let until = quiet.min(since + TOLD_PAUSE_MAX);
        let left = until.saturating_duration_since(now);
        if left.is_zero() {
            self.since.remove(key);
            return None;
        }
        Some(left)
    }

    pub(super) fn forget(&mut self, key: &Key) {
        self.since.remove(key);
    }
}

/// Whether a plan is the first to be told of its generation. One without a generation is carried out at once: whatever it
/// tells, the next one would be as new.
pub(super) fn is_news(told: Option<i64>, planned: Option<i64>) -> bool {
    planned.is_some() && told != planned
}

/// Whether two statuses are the same once stored; the API server keeps whole seconds.
pub(super) fn same(
    stored: &operator_api::ModelDeploymentStatus,
    wanted: &operator_api::ModelDeploymentStatus,
) -> bool {
    stored == wanted || serde_json::to_value(stored).ok() == serde_json::to_value(wanted).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_first_plan_of_a_generation_is_news() {
        assert!(is_news(None, Some(1)) && is_news(Some(1), Some(2)));
        assert!(!is_news(Some(2), Some(2)));
        // It would be told for ever, and nothing ever made.
        assert!(!is_news(None, None) && !is_news(Some(1), None));
    }

    #[test]
    fn a_plan_that_was_told_waits_until_no_other_is_told_but_not_for_ever() {
        let (start, mut told) = (Instant::now(), Told::default());
        let ms = Duration::from_millis;
        let (one, other) = (Key::new("d", "m"), Key::new("d", "n"));
        assert_eq!(told.waits(&one, start), None, "it was never told");
        told.tell(&one, start);
        assert_eq!(told.waits(&one, start + ms(400)), Some(ms(600)));
        told.tell(&other, start + ms(900));
        assert_eq!(told.waits(&one, start + ms(1000)), Some(ms(900)));
        assert_eq!(told.waits(&one, start + ms(1900)), None);
        assert!(!told.since.contains_key(&one) && told.since.contains_key(&other));
        told.tell(&one, start);
        let mut after = Duration::ZERO;
        while after < TOLD_PAUSE_MAX {
            told.tell(&other, start + after);
            let left = told.waits(&one, start + after);
            assert_eq!(
                left,
                Some((TOLD_PAUSE_MAX - after).min(TOLD_PAUSE)),
                "{after:?}"
            );
            after += TOLD_PAUSE / 2;
        }
        assert_eq!(told.waits(&one, start + after), None);
    }
}
