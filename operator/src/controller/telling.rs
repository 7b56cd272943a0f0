//! When a status is written, and when the writes of a plan follow it.
//!
//! While many are looked at, a plan is told first and carried out when all were told; and what changes no condition waits a
//! little, so that it is told with what follows. While few are, nothing waits.

use std::collections::HashMap;
use std::time::Duration;

use operator_k8s::watch::Key;
use tokio::time::Instant;

/// How long the writes of a plan wait that was told while many others were looked at, since the last of them was told; engines load
/// for minutes.
pub(super) const TOLD_PAUSE: Duration = Duration::from_secs(1);
/// How long they wait at most.
const TOLD_PAUSE_MAX: Duration = Duration::from_secs(10);
/// How long news that changes no condition may wait while many are looked at, since it was first news: what follows soon is
/// then told with it.
const MINOR_PAUSE: Duration = Duration::from_secs(3);

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

/// Since when statuses that may wait differ from what is stored.
#[derive(Debug, Default)]
pub(super) struct Minor(HashMap<Key, Instant>);

impl Minor {
    /// How long a status is not written yet.
    pub(super) fn waits(&mut self, key: &Key, may_wait: bool, now: Instant) -> Option<Duration> {
        if !may_wait {
            self.0.remove(key);
            return None;
        }
        let since = *self.0.entry(key.clone()).or_insert(now);
        let left = (since + MINOR_PAUSE).saturating_duration_since(now);
        if left.is_zero() {
            self.0.remove(key);
            return None;
        }
        Some(left)
    }

    pub(super) fn forget(&mut self, key: &Key) {
        self.0.remove(key);
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

/// Whether a status differs from the stored one only in figures and words: numbers of replicas, what follows from them, load and
/// performance, nodes. All that a later plan reads, and every condition's status and reason, is the same.
pub(super) fn is_minor(
    stored: &operator_api::ModelDeploymentStatus,
    wanted: &operator_api::ModelDeploymentStatus,
) -> bool {
    let mut told = stored.clone();
    let fresh = wanted.clone();
    told.replicas = fresh.replicas;
    told.ready_replicas = fresh.ready_replicas;
    told.updated_replicas = fresh.updated_replicas;
    told.ready = fresh.ready;
    told.phase = fresh.phase;
    told.message = fresh.message;
    told.load = fresh.load;
    told.performance = fresh.performance;
    if let (Some(told), Some(fresh)) = (&mut told.plan, fresh.plan) {
        told.nodes = fresh.nodes;
    }
    for (told, fresh) in told.conditions.iter_mut().zip(fresh.conditions) {
        told.message = fresh.message;
    }
    same(&told, wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

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

    #[test]
    fn what_changes_no_condition_and_is_not_remembered_is_minor() {
        let status = |patch: Value| -> operator_api::ModelDeploymentStatus {
            let mut whole = json!({
                "observedGeneration": 1, "replicas": 0, "readyReplicas": 0, "wantedReplicas": 2, "phase": "Planning",
                "message": "0 of 2 replicas answer", "revision": "aaaaaaaa",
                "conditions": [{"type": "Ready", "status": "False", "reason": "ReplicasStarting",
                    "message": "0 of 2 replicas answer", "lastTransitionTime": "2026-11-28T00:00:00Z"}],
            });
            let (Value::Object(whole), Value::Object(patch)) = (&mut whole, patch) else {
                panic!("objects");
            };
            whole.extend(patch);
            serde_json::from_value(json!(whole)).expect("a status")
        };
        let stored = status(json!({}));
        let ready = |status: &str, reason: &str, message: &str| {
            json!({"conditions": [{"type": "Ready", "status": status, "reason": reason, "message": message,
                "lastTransitionTime": "2026-11-28T00:00:00Z"}]})
        };
        for minor in [
            json!({"replicas": 2, "phase": "Loading", "ready": "1/2", "readyReplicas": 1}),
            ready("False", "ReplicasStarting", "1 of 2 replicas answer"),
        ] {
            assert!(is_minor(&stored, &status(minor.clone())), "{minor}");
        }
        for news in [
            json!({"observedGeneration": 2}),
            json!({"wantedReplicas": 3}),
            json!({"revision": "bbbbbbbb"}),
            json!({"rollout": {"stableRevision": "aaaaaaaa"}}),
            json!({"conditions": []}),
            ready("True", "AllReplicasReady", "2 of 2 replicas answer"),
            ready("False", "NoNodeFits", "0 of 2 replicas answer"),
        ] {
            assert!(!is_minor(&stored, &status(news.clone())), "{news}");
        }
    }

    #[test]
    fn what_is_minor_waits_once_and_is_told_with_what_follows() {
        let (start, mut minor, key) = (Instant::now(), Minor::default(), Key::new("d", "m"));
        assert_eq!(minor.waits(&key, false, start), None);
        let half = MINOR_PAUSE / 2;
        assert_eq!(minor.waits(&key, true, start), Some(MINOR_PAUSE));
        assert_eq!(minor.waits(&key, true, start + half), Some(half));
        // Other minor news does not put it off.
        assert_eq!(minor.waits(&key, true, start + MINOR_PAUSE), None);
        assert_eq!(
            minor.waits(&key, true, start + MINOR_PAUSE),
            Some(MINOR_PAUSE)
        );
        // News of weight was told, and this with it.
        assert_eq!(minor.waits(&key, false, start + MINOR_PAUSE), None);
        let later = start + 2 * MINOR_PAUSE;
        assert_eq!(minor.waits(&key, true, later), Some(MINOR_PAUSE));
    }
}
