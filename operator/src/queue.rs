//! Which ModelDeployment is worked on when: plain state, no clock of its own, tested without tokio.
//!
//! Each key is in the queue at most once, with the earliest time anyone asked for. A key that is being worked on is not
//! handed out again until it is done; what was asked meanwhile is remembered. Failures back off per key, so one object
//! that fails for ever costs little and delays no other.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

/// First pause after a failure; doubles.
pub const BACKOFF_MIN: Duration = Duration::from_millis(500);
/// Longest pause after a failure.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);

/// A queue of keys with due times; times are durations since any fixed start.
#[derive(Debug)]
pub struct Queue<K> {
    due: BTreeSet<(Duration, K)>,
    states: HashMap<K, State>,
}

#[derive(Debug, Default)]
struct State {
    due: Option<Duration>,
    busy: bool,
    failures: u32,
    /// No pass before this time: the pause after a failure.
    held_until: Duration,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Queue {
            due: BTreeSet::new(),
            states: HashMap::new(),
        }
    }
}

impl<K: Clone + Ord + std::hash::Hash> Queue<K> {
    /// Asks for a pass at `at`, or earlier if that was asked before; never before the pause of a failure is over.
    pub fn ask(&mut self, key: &K, at: Duration) {
        let state = self.states.entry(key.clone()).or_default();
        let at = at.max(state.held_until);
        match state.due {
            Some(due) if due <= at => return,
            Some(due) if !state.busy => {
                self.due.remove(&(due, key.clone()));
            }
            _ => {}
        }
        state.due = Some(at);
        if !state.busy {
            self.due.insert((at, key.clone()));
        }
    }

    /// The next key that is due; it is busy from now on.
    pub fn take(&mut self, now: Duration) -> Option<K> {
        let (due, _) = self.due.first()?;
        if *due > now {
            return None;
        }
        let (_, key) = self.due.pop_first()?;
        if let Some(state) = self.states.get_mut(&key) {
            state.busy = true;
            state.due = None;
        }
        Some(key)
    }

    /// The pass over `key` succeeded; the next one at `again`, or when asked, but not before `held_until`.
    pub fn done(&mut self, key: &K, again: Option<Duration>, held_until: Duration) {
        let Some(state) = self.states.get_mut(key) else {
            return;
        };
        state.failures = 0;
        state.held_until = held_until;
        self.release(key);
        if let Some(again) = again {
            self.ask(key, again);
        }
    }

    /// The pass over `key` failed. Returns the pause; `jitter` is in 0..=255.
    pub fn failed(&mut self, key: &K, now: Duration, jitter: u8) -> Duration {
        let Some(state) = self.states.get_mut(key) else {
            return Duration::ZERO;
        };
        let pause = (BACKOFF_MIN * (1 << state.failures.min(10))).min(BACKOFF_MAX);
        let pause = pause - pause.mul_f64(f64::from(jitter) / 1024.0);
        state.failures = state.failures.saturating_add(1);
        state.held_until = now + pause;
        // What was asked during the failed pass waits for the pause too.
        state.due = None;
        self.release(key);
        self.ask(key, now + pause);
        pause
    }

    /// Forgets a key that no longer exists, unless somebody asked for it meanwhile.
    pub fn forget(&mut self, key: &K) {
        self.release(key);
        if self
            .states
            .get(key)
            .is_some_and(|state| state.due.is_none())
        {
            self.states.remove(key);
        }
    }

    fn release(&mut self, key: &K) {
        if let Some(state) = self.states.get_mut(key) {
            state.busy = false;
            if let Some(due) = &mut state.due {
                *due = (*due).max(state.held_until);
                self.due.insert((*due, key.clone()));
            }
        }
    }

    /// When the next key is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.due.first().map(|(due, _)| *due)
    }

    /// Keys that are due and wait.
    pub fn depth(&self, now: Duration) -> usize {
        self.due.iter().take_while(|(due, _)| *due <= now).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_key_is_queued_once_at_the_earliest_time_asked() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(10));
        queue.ask(&"a", s(5));
        queue.ask(&"a", s(20));
        assert_eq!(queue.take(s(4)), None);
        assert_eq!(queue.take(s(5)), Some("a"));
        assert_eq!(queue.take(s(100)), None);
    }

    #[test]
    fn a_busy_key_is_not_handed_out_twice_but_what_was_asked_is_remembered() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        assert_eq!(queue.take(s(0)), Some("a"));
        queue.ask(&"a", s(1));
        assert_eq!(queue.take(s(1)), None);
        queue.done(&"a", Some(s(60)), s(0));
        assert_eq!(queue.take(s(1)), Some("a"));
        queue.done(&"a", None, s(0));
        assert_eq!(queue.take(s(1000)), None);
    }

    #[test]
    fn failures_back_off_and_asking_does_not_shorten_the_pause() {
        let mut queue = Queue::default();
        let mut now = Duration::ZERO;
        let mut passes = 0;
        queue.ask(&"a", now);
        // Somebody asks every 100 ms for ten minutes while every pass fails.
        while now < s(600) {
            queue.ask(&"a", now);
            if queue.take(now).is_some() {
                passes += 1;
                queue.failed(&"a", now, 0);
            }
            now += Duration::from_millis(100);
        }
        assert!((10..25).contains(&passes), "{passes} passes in ten minutes");
    }

    #[test]
    fn a_success_ends_the_back_off() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.failed(&"a", s(0), 0);
        assert_eq!(queue.take(s(1)), Some("a"));
        queue.done(&"a", None, s(0));
        queue.ask(&"a", s(1));
        assert_eq!(queue.take(s(1)), Some("a"));
        assert_eq!(queue.failed(&"a", s(1), 0), BACKOFF_MIN);
    }

    #[test]
    fn what_is_asked_during_and_after_a_pass_waits_until_the_key_is_no_longer_held() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.ask(&"a", s(1));
        queue.done(&"a", Some(s(60)), s(5));
        assert_eq!((queue.take(s(4)), queue.next_due()), (None, Some(s(5))));
        assert_eq!(queue.take(s(5)), Some("a"));
        queue.done(&"a", None, s(9));
        queue.ask(&"a", s(6));
        assert_eq!((queue.take(s(8)), queue.take(s(9))), (None, Some("a")));
    }

    #[test]
    fn one_key_that_fails_does_not_delay_another() {
        let mut queue = Queue::default();
        queue.ask(&"bad", s(0));
        queue.take(s(0));
        queue.failed(&"bad", s(0), 0);
        queue.ask(&"good", s(0));
        assert_eq!(queue.take(s(0)), Some("good"));
    }

    #[test]
    fn a_forgotten_key_leaves_nothing_unless_it_was_asked_for_again() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.forget(&"a");
        assert!(queue.states.is_empty() && queue.due.is_empty());
        queue.ask(&"b", s(0));
        queue.take(s(0));
        queue.ask(&"b", s(1));
        queue.forget(&"b");
        assert_eq!(queue.take(s(1)), Some("b"));
    }

    #[test]
    fn the_pause_is_bounded_and_jitter_only_shortens_it() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        let pauses: Vec<Duration> = (0..20)
            .map(|_| {
                queue.take(s(1_000_000));
                queue.failed(&"a", s(0), 0)
            })
            .collect();
        assert_eq!(pauses.last(), Some(&BACKOFF_MAX));
        queue.take(s(1_000_000));
        let shortened = queue.failed(&"a", s(0), 255);
        assert!(shortened < BACKOFF_MAX && shortened > BACKOFF_MAX / 2);
    }

    #[test]
    fn a_pass_that_succeeds_is_followed_by_the_next_look() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.done(&"a", Some(s(60)), s(0));
        assert_eq!((queue.take(s(59)), queue.take(s(60))), (None, Some("a")));
    }

    #[test]
    fn what_is_asked_during_a_pass_that_fails_waits_for_the_pause() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.ask(&"a", s(0));
        let pause = queue.failed(&"a", s(10), 0);
        assert_eq!(queue.next_due(), Some(s(10) + pause));
        assert_eq!(queue.due.len(), 1);
    }

    #[test]
    fn who_is_asked_for_while_its_end_is_found_is_looked_at_again() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(0));
        queue.take(s(0));
        queue.ask(&"a", s(1));
        queue.forget(&"a");
        assert_eq!(queue.take(s(1)), Some("a"));
        // A key whose state was lost would never be handed out by itself again.
        queue.ask(&"a", s(2));
        assert_eq!(queue.take(s(2)), None, "it is busy");
    }

    #[test]
    fn depth_counts_those_that_are_due() {
        let mut queue = Queue::default();
        queue.ask(&"a", s(1));
        queue.ask(&"b", s(9));
        assert_eq!(
            (queue.depth(s(0)), queue.depth(s(5)), queue.depth(s(9))),
            (0, 1, 2)
        );
    }
}
