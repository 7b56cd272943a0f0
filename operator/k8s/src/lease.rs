//! Which of several operators acts: a `coordination.k8s.io` Lease, as every Kubernetes controller uses it.
//!
//! [`decide`] is pure: what the Lease says, what we saw before, and the time go in; a [`Step`] comes out. Two clocks
//! are never compared: a lease is expired when *we* have not seen it change for its whole duration, measured with our
//! own monotonic clock. Invariant: [`Leadership::is_held`] turns false `RENEW_MARGIN` before anyone else may take over,
//! also when the process was frozen, because it is a deadline and not a flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use kube::api::{Api, PostParams};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::error::{Call, Category, Error};
use crate::retry::{RetryPolicy, jitter};

/// How long a leader may be silent before another takes over.
pub const LEASE_DURATION: Duration = Duration::from_secs(15);
/// How long before that the leader stops writing.
pub const RENEW_MARGIN: Duration = Duration::from_secs(5);
/// How often the lease is renewed or looked at.
pub const RETRY_PERIOD: Duration = Duration::from_secs(2);

/// What the Lease object says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LeaseRecord {
    /// Who holds it; empty: nobody.
    pub holder: String,
    /// Its own duration; another version of the operator may use another.
    pub duration: Duration,
    /// When the holder says it renewed. Compared for change only.
    pub renewed: String,
    /// How often it changed hands.
    pub transitions: i32,
}

/// A record and when we first saw it in this form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The record.
    pub record: LeaseRecord,
    /// Monotonic time of the first sight.
    pub at: Duration,
}

/// What to do about the lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nobody has made it yet.
    Create,
    /// It is ours: say so again.
    Renew {
        /// Unchanged count of hand-overs.
        transitions: i32,
    },
    /// It is free or expired.
    TakeOver {
        /// The count after the hand-over.
        transitions: i32,
    },
    /// Somebody else holds it.
    Wait,
}

/// Updates what was seen and decides. `now` is monotonic.
pub fn decide(
    seen: &mut Option<Seen>,
    current: Option<LeaseRecord>,
    identity: &str,
    now: Duration,
) -> Step {
    let Some(record) = current else {
        *seen = None;
        return Step::Create;
    };
    if seen.as_ref().is_none_or(|seen| seen.record != record) {
        *seen = Some(Seen {
            record: record.clone(),
            at: now,
        });
    }
    let seen_at = seen.as_ref().map_or(now, |seen| seen.at);
    if record.holder == identity {
        return Step::Renew {
            transitions: record.transitions,
        };
    }
    if record.holder.is_empty() || now.saturating_sub(seen_at) > record.duration {
        return Step::TakeOver {
            transitions: record.transitions.saturating_add(1),
        };
    }
    Step::Wait
}

/// Whether this process may write; cheap to copy and to ask.
#[derive(Clone, Debug)]
pub struct Leadership {
    started: Instant,
    /// Milliseconds since `started` until which we may write; 0: not leader; `u64::MAX`: no election.
    until_ms: Arc<AtomicU64>,
    changes: watch::Receiver<bool>,
}

impl Leadership {
    /// Leadership that is never asked for: a single operator without a lease.
    pub fn alone() -> Self {
        let (_, changes) = watch::channel(true);
        Leadership {
            started: Instant::now(),
            until_ms: Arc::new(AtomicU64::new(u64::MAX)),
            changes,
        }
    }

    /// May this process write now?
    pub fn is_held(&self) -> bool {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
        now < self.until_ms.load(Ordering::Acquire)
    }

    /// Returns when the lease was won or lost; never without an election.
    pub async fn changed(&mut self) {
        if self.changes.changed().await.is_err() {
            // The election ended, or there never was one.
            std::future::pending::<()>().await;
        }
    }
}

/// The loop that holds the lease.
pub struct Election {
    api: Api<Lease>,
    namespace: String,
    name: String,
    identity: String,
    started: Instant,
    until_ms: Arc<AtomicU64>,
    announce: watch::Sender<bool>,
    seen: Option<Seen>,
}

impl Election {
    /// An election over the Lease `namespace/name`; `identity` must differ between processes.
    pub fn new(
        client: kube::Client,
        namespace: &str,
        name: &str,
        identity: &str,
    ) -> (Self, Leadership) {
        let (announce, changes) = watch::channel(false);
        let started = Instant::now();
        let until_ms = Arc::new(AtomicU64::new(0));
        let leadership = Leadership {
            started,
            until_ms: Arc::clone(&until_ms),
            changes,
        };
        let election = Election {
            api: Api::namespaced(client, namespace),
            namespace: namespace.to_string(),
            name: name.to_string(),
            identity: identity.to_string(),
            started,
            until_ms,
            announce,
            seen: None,
        };
        (election, leadership)
    }

    /// Holds the lease until `stop` completes, then gives it back so that another need not wait.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        tokio::pin!(stop);
        loop {
            let began = self.started.elapsed();
            match self.turn(began).await {
                Ok(true) => self.hold_until(began + LEASE_DURATION - RENEW_MARGIN),
                Ok(false) => self.lose("another operator holds it"),
                Err(error)
                    if error.category() == Category::Conflict
                        || error.category() == Category::AlreadyExists =>
                {
                    self.lose("another operator was first");
                }
                // The deadline of the last renewal stands; nobody else may write before it.
                Err(error) => tracing::warn!(error = %error, "lease could not be renewed"),
            }
            if *self.announce.borrow()
                && self.started.elapsed().as_millis() as u64
                    >= self.until_ms.load(Ordering::Acquire)
            {
                self.lose("it could not be renewed in time");
            }
            let pause = RETRY_PERIOD + Duration::from_millis(u64::from(jitter()));
            tokio::select! {
                () = &mut stop => break,
                () = tokio::time::sleep(pause) => {}
            }
        }
        self.give_back().await;
    }

    /// One look at the lease and, when due, one write. True: it is ours.
    async fn turn(&mut self, now: Duration) -> Result<bool, Error> {
        let call = Call::on("get", "Lease", &self.namespace, &self.name);
        let current = RetryPolicy::ONCE
            .run(&call, || self.api.get_opt(&self.name))
            .await?;
        let record = current.as_ref().map(record_of);
        match decide(&mut self.seen, record, &self.identity, now) {
            Step::Wait => Ok(false),
            Step::Create => {
                let call = Call::on("create", "Lease", &self.namespace, &self.name);
                let lease = self.lease(None, 0, LEASE_DURATION);
                let parameters = PostParams::default();
                RetryPolicy::ONCE
                    .run(&call, || self.api.create(&parameters, &lease))
                    .await?;
                Ok(true)
            }
            Step::Renew { transitions } => self.write(current, transitions).await,
            Step::TakeOver { transitions } => self.write(current, transitions).await,
        }
    }

    async fn write(&self, current: Option<Lease>, transitions: i32) -> Result<bool, Error> {
        let call = Call::on("renew", "Lease", &self.namespace, &self.name);
        let lease = self.lease(current, transitions, LEASE_DURATION);
        let parameters = PostParams::default();
        RetryPolicy::ONCE
            .run(&call, || self.api.replace(&self.name, &parameters, &lease))
            .await?;
        Ok(true)
    }

    /// The object to write; keeps the resource version, so that a write on an old picture is refused.
    fn lease(&self, current: Option<Lease>, transitions: i32, duration: Duration) -> Lease {
        let now = MicroTime(jiff::Timestamp::now());
        let previous = current
            .as_ref()
            .and_then(|lease| lease.spec.clone())
            .unwrap_or_default();
        let ours = previous.holder_identity.as_deref() == Some(&self.identity);
        let metadata = current.map_or_else(
            || ObjectMeta {
                name: Some(self.name.clone()),
                namespace: Some(self.namespace.clone()),
                ..ObjectMeta::default()
            },
            |lease| ObjectMeta {
                managed_fields: None,
                ..lease.metadata
            },
        );
        Lease {
            metadata,
            spec: Some(LeaseSpec {
                holder_identity: Some(self.identity.clone()),
                lease_duration_seconds: i32::try_from(duration.as_secs()).ok(),
                acquire_time: if ours {
                    previous.acquire_time
                } else {
                    Some(now.clone())
                },
                renew_time: Some(now),
                lease_transitions: Some(transitions),
                ..LeaseSpec::default()
            }),
        }
    }

    fn hold_until(&self, deadline: Duration) {
        self.until_ms.store(
            u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX - 1),
            Ordering::Release,
        );
        if self.announce.send_replace(true) {
            return;
        }
        tracing::info!(lease = %self.name, identity = %self.identity, "lease acquired");
    }

    fn lose(&self, why: &'static str) {
        self.until_ms.store(0, Ordering::Release);
        if self.announce.send_replace(false) {
            tracing::warn!(lease = %self.name, identity = %self.identity, why, "lease lost");
        }
    }

    async fn give_back(&mut self) {
        let held = *self.announce.borrow();
        self.until_ms.store(0, Ordering::Release);
        if !held {
            return;
        }
        let call = Call::on("release", "Lease", &self.namespace, &self.name);
        let current = match RetryPolicy::ONCE
            .run(&call, || self.api.get_opt(&self.name))
            .await
        {
            Ok(Some(lease)) if record_of(&lease).holder == self.identity => lease,
            _ => return,
        };
        let transitions = record_of(&current).transitions;
        let mut lease = self.lease(Some(current), transitions, Duration::from_secs(1));
        if let Some(spec) = lease.spec.as_mut() {
            spec.holder_identity = Some(String::new());
        }
        let parameters = PostParams::default();
        match RetryPolicy::ONCE
            .run(&call, || self.api.replace(&self.name, &parameters, &lease))
            .await
        {
            Ok(_) => tracing::info!(lease = %self.name, "lease given back"),
            Err(error) => {
                tracing::warn!(error = %error, "lease could not be given back; it expires by itself")
            }
        }
    }
}

fn record_of(lease: &Lease) -> LeaseRecord {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = u64::try_from(spec.lease_duration_seconds.unwrap_or(0).max(0)).unwrap_or(0);
    LeaseRecord {
        holder: spec.holder_identity.unwrap_or_default(),
        duration: Duration::from_secs(seconds),
        renewed: spec
            .renew_time
            .map(|time| time.0.to_string())
            .unwrap_or_default(),
        transitions: spec.lease_transitions.unwrap_or(0),
    }
}

#[cfg(test)]
mod elections;

#[cfg(test)]
mod tests {
    use super::*;

    fn held_by(holder: &str, renewed: &str) -> Option<LeaseRecord> {
        Some(LeaseRecord {
            holder: holder.into(),
            duration: LEASE_DURATION,
            renewed: renewed.into(),
            transitions: 3,
        })
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn a_lease_nobody_made_is_created() {
        assert_eq!(decide(&mut None, None, "me", at(0)), Step::Create);
    }

    #[test]
    fn our_own_lease_is_renewed_also_after_a_restart_under_the_same_name() {
        assert_eq!(
            decide(&mut None, held_by("me", "t1"), "me", at(0)),
            Step::Renew { transitions: 3 }
        );
    }

    #[test]
    fn a_lease_that_was_given_back_is_taken_at_once() {
        assert_eq!(
            decide(&mut None, held_by("", "t1"), "me", at(0)),
            Step::TakeOver { transitions: 4 }
        );
    }

    #[test]
    fn a_foreign_lease_is_waited_for_until_it_was_silent_for_its_whole_duration() {
        let mut seen = None;
        assert_eq!(
            decide(&mut seen, held_by("other", "t1"), "me", at(100)),
            Step::Wait
        );
        assert_eq!(
            decide(&mut seen, held_by("other", "t1"), "me", at(115)),
            Step::Wait
        );
        assert_eq!(
            decide(&mut seen, held_by("other", "t1"), "me", at(116)),
            Step::TakeOver { transitions: 4 }
        );
    }

    #[test]
    fn a_renewal_starts_the_wait_anew_whatever_the_holders_clock_says() {
        let mut seen = None;
        decide(&mut seen, held_by("other", "2020-01-01"), "me", at(100));
        assert_eq!(
            decide(&mut seen, held_by("other", "1999-01-01"), "me", at(114)),
            Step::Wait
        );
        assert_eq!(
            decide(&mut seen, held_by("other", "1999-01-01"), "me", at(128)),
            Step::Wait
        );
        assert_eq!(
            decide(&mut seen, held_by("other", "1999-01-01"), "me", at(130)),
            Step::TakeOver { transitions: 4 }
        );
    }

    #[test]
    fn a_leader_stops_before_anyone_else_may_start() {
        // Both count from a renewal that the leader began at 0: the other cannot have seen it earlier.
        let leader_stops = LEASE_DURATION - RENEW_MARGIN;
        let mut seen = None;
        decide(&mut seen, held_by("leader", "t0"), "me", at(0));
        let mut now = at(0);
        while decide(&mut seen, held_by("leader", "t0"), "me", now) == Step::Wait {
            now += Duration::from_millis(100);
        }
        assert!(
            leader_stops + at(4) < now,
            "leader stops at {leader_stops:?}, the next starts at {now:?}"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn leadership_ends_by_itself_when_nothing_renews_it() {
        let (_announce, changes) = watch::channel(true);
        let leadership = Leadership {
            started: Instant::now(),
            until_ms: Arc::new(AtomicU64::new(10_000)),
            changes,
        };
        assert!(leadership.is_held());
        tokio::time::advance(at(11)).await;
        assert!(!leadership.is_held());
    }
}
