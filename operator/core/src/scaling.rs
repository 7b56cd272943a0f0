//! How many replicas demand asks for: collect → analyse → limit → stabilise.
//!
//! Targets are compared with the *wanted* number of replicas, starting ones included, so replicas
//! that are still loading are never asked for twice. What a decision has to remember lives in the
//! status, so a restart forgets nothing. Surprise: fewer replicas are wished for only when what
//! runs now would still fit, or shrinking would build the queue that makes it grow again.

use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use operator_api::{AutoscalingStatus, PendingScale, Reason};

use crate::snapshot::{Demand, PodSamples};
use crate::time::seconds_between;
use crate::validate::ScaleRange;

/// Share by which demand may miss a target without anything happening, as Kubernetes' own
/// autoscaler has it.
const TOLERANCE: f64 = 0.1;
/// Samples older than this are not believed.
const SAMPLE_SECONDS_MAX: u64 = 60;

/// What was measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Replicas that answer.
    pub ready: u32,
    /// Replicas with a fresh sample.
    pub measured: u32,
    /// Requests waiting, summed.
    pub queued: f64,
    /// KV use from 0 to 1, summed over replicas.
    pub kv: f64,
    /// Sequences being computed, summed.
    pub running: f64,
}

/// What is wanted, why, and what to remember.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// What to store.
    pub status: AutoscalingStatus,
    /// Whether demand could be measured.
    pub is_active: bool,
    /// Reason of the condition ScalingActive.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl Decision {
    /// Replicas wanted.
    pub fn wanted(&self) -> u32 {
        u32::try_from(self.status.desired_replicas).unwrap_or(0)
    }
}

/// Sums up what ready replicas said, and what a Prometheus server said when it is fresh.
pub fn collect<'a>(
    ready: impl IntoIterator<Item = Option<&'a PodSamples>>,
    demand: Option<Demand>,
    now: Timestamp,
) -> Load {
    let mut load = Load::default();
    for samples in ready {
        load.ready += 1;
        let Some(sample) = samples.and_then(|samples| samples.latest.as_ref()) else {
            continue;
        };
        if seconds_between(sample.at, now) > SAMPLE_SECONDS_MAX {
            continue;
        }
        load.measured += 1;
        load.queued += f64::from(sample.report.waiting);
        load.running += f64::from(sample.report.running);
        load.kv += sample.report.kv_usage.clamp(0.0, 1.0);
    }
    if let Some(demand) = demand
        && seconds_between(demand.at, now) <= SAMPLE_SECONDS_MAX
        && demand.queued_requests.is_finite()
        && demand.kv_utilization.is_finite()
        && load.ready > 0
    {
        // The server sees every replica, also those whose scrape failed here.
        load.measured = load.ready;
        load.queued = demand.queued_requests.max(0.0);
        load.kv = demand.kv_utilization.clamp(0.0, 1.0) * f64::from(load.ready);
    }
    load
}

/// Decides how many replicas are wanted.
///
/// `before` is what the last decision stored, `present` the replicas that exist (used once, when
/// autoscaling begins), `sequences_max` what one replica computes at the same time.
pub fn decide(
    range: &ScaleRange,
    before: Option<&AutoscalingStatus>,
    present: u32,
    load: &Load,
    sequences_max: u32,
    now: Timestamp,
) -> Decision {
    let clamp = |number: u32| number.clamp(range.min, range.max);
    let stored = before.map(|status| u32::try_from(status.desired_replicas).unwrap_or(0));
    let current = clamp(stored.unwrap_or(present));
    let mut status = before.cloned().unwrap_or_default();
    status.desired_replicas = i32::try_from(current).unwrap_or(i32::MAX);
    if stored != Some(current) {
        status.last_scale_time = Some(Time(now));
    }
    if load.measured == 0 {
        status.pending_up = None;
        status.pending_down = None;
        return Decision {
            status,
            is_active: false,
            reason: Reason::NoSamples,
            message: format!("no replica could be measured; {current} replicas are kept"),
        };
    }
    let wish = analyse(range, current, load, sequences_max);
    let wanted = clamp(wish.replicas);
    let limit = match wish.replicas {
        wished if wished > range.max => Some(Reason::LimitedByMax),
        wished if wished < range.min => Some(Reason::LimitedByMin),
        _ => None,
    };
    let mut decision = stabilise(range, current, wanted, status, now);
    decision.message = format!("{}: {}", decision.message, wish.words);
    if let Some(limit) = limit.filter(|_| decision.reason == Reason::TargetsMet) {
        decision.reason = limit;
        let (field, bound) = if limit == Reason::LimitedByMax {
            ("maxReplicas", range.max)
        } else {
            ("minReplicas", range.min)
        };
        // Being at the minimum with nothing to do is no news; wishing beyond the maximum is.
        if limit == Reason::LimitedByMax {
            decision.message = format!(
                "{}; demand asks for {} replicas, spec.autoscaling.{field} = {bound}",
                decision.message, wish.replicas
            );
        }
    }
    decision
}

struct WishedFor {
    replicas: u32,
    words: String,
}

fn analyse(range: &ScaleRange, current: u32, load: &Load, sequences_max: u32) -> WishedFor {
    let have = f64::from(current.max(1));
    let mut replicas = 0u32;
    let mut words = Vec::new();
    let mut steer = |total: f64, target: f64, text: String| {
        let ratio = total / (target * have);
        let wish = if (ratio - 1.0).abs() <= TOLERANCE {
            current
        } else {
            to_count(total / target)
        };
        replicas = replicas.max(wish);
        words.push(text);
    };
    if let Some(target) = range.queued_per_replica {
        let text = format!(
            "{:.0} requests queued (target {target} per replica)",
            load.queued
        );
        steer(load.queued, f64::from(target), text);
    }
    if let Some(target) = range.kv_percent {
        let mean = load.kv / f64::from(load.measured.max(1)) * 100.0;
        let text = format!("KV cache {mean:.0} % (target {target} %)");
        steer(load.kv, f64::from(target) / 100.0, text);
    }
    if replicas < current {
        // What runs now must still fit, and replicas that could not be measured may be busy.
        let running = to_count(load.running / f64::from(sequences_max.max(1)));
        replicas = replicas.max(running).min(current);
        if load.measured < load.ready {
            replicas = current;
        }
    }
    WishedFor {
        replicas,
        words: words.join(", "),
    }
}

/// Rounds up; the small allowance keeps 3.0000001 from becoming 4.
fn to_count(replicas: f64) -> u32 {
    (replicas - 1e-6).ceil().clamp(0.0, 1e6) as u32
}

fn stabilise(
    range: &ScaleRange,
    current: u32,
    wanted: u32,
    mut status: AutoscalingStatus,
    now: Timestamp,
) -> Decision {
    let (pending, window) = match wanted.cmp(&current) {
        std::cmp::Ordering::Equal => {
            status.pending_up = None;
            status.pending_down = None;
            return Decision {
                status,
                is_active: true,
                reason: Reason::TargetsMet,
                message: format!("{current} replicas"),
            };
        }
        std::cmp::Ordering::Greater => {
            status.pending_down = None;
            let since = remember(status.pending_up.take(), wanted, now, u32::min);
            (since, range.up_seconds)
        }
        std::cmp::Ordering::Less => {
            status.pending_up = None;
            let since = remember(status.pending_down.take(), wanted, now, u32::max);
            (since, range.down_seconds)
        }
    };
    let waited = seconds_between(pending.since.0, now);
    let is_up = wanted > current;
    if waited < u64::from(window) {
        let message = format!(
            "{current} replicas; {} are followed when wished for during {window} s",
            pending.replicas
        );
        let slot = if is_up {
            &mut status.pending_up
        } else {
            &mut status.pending_down
        };
        *slot = Some(pending);
        return Decision {
            status,
            is_active: true,
            reason: Reason::Stabilizing,
            message,
        };
    }
    status.desired_replicas = pending.replicas;
    status.last_scale_time = Some(Time(now));
    Decision {
        is_active: true,
        reason: if is_up {
            Reason::ScalingUp
        } else {
            Reason::ScalingDown
        },
        message: format!("from {current} to {} replicas", pending.replicas),
        status,
    }
}

/// Joins a wish with the one that is already waiting; `cautious` picks the smaller step.
fn remember(
    pending: Option<PendingScale>,
    wanted: u32,
    now: Timestamp,
    cautious: fn(u32, u32) -> u32,
) -> PendingScale {
    let number = |replicas: u32| i32::try_from(replicas).unwrap_or(i32::MAX);
    match pending {
        None => PendingScale {
            since: Time(now),
            replicas: number(wanted),
        },
        Some(pending) => {
            let before = u32::try_from(pending.replicas).unwrap_or(0);
            PendingScale {
                replicas: number(cautious(before, wanted)),
                since: pending.since,
            }
        }
    }
}

/// Queries for a Prometheus server: requests waiting summed, and mean KV use, of one deployment.
///
/// Engine pods carry the ModelDeployment's name in a label that the usual pod discovery keeps; the
/// served model's name would also match another namespace's deployment.
pub fn prometheus_queries(namespace: &str, served_name: &str) -> [String; 2] {
    let escaped = |text: &str| text.replace('\\', "\\\\").replace('"', "\\\"");
    let labels = format!(
        "namespace=\"{}\",model_name=\"{}\"",
        escaped(namespace),
        escaped(served_name)
    );
    [
        format!("sum(vllm:num_requests_waiting{{{labels}}})"),
        format!("avg(vllm:kv_cache_usage_perc{{{labels}}})"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::SignedDuration;
    use proptest::prelude::*;

    fn range() -> ScaleRange {
        ScaleRange {
            min: 1,
            max: 8,
            queued_per_replica: Some(2),
            kv_percent: Some(75),
            up_seconds: 0,
            down_seconds: 300,
        }
    }

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn stored(desired_replicas: i32) -> AutoscalingStatus {
        AutoscalingStatus {
            desired_replicas,
            ..AutoscalingStatus::default()
        }
    }

    fn load(ready: u32, queued: f64, kv_mean: f64, running: f64) -> Load {
        Load {
            ready,
            measured: ready,
            queued,
            kv: kv_mean * f64::from(ready),
            running,
        }
    }

    #[test]
    fn the_target_that_asks_for_most_wins() {
        for (queued, kv, wanted, reason) in [
            (0.0, 0.75, 2, Reason::TargetsMet),
            (4.0, 0.0, 2, Reason::TargetsMet),
            (4.3, 0.0, 2, Reason::TargetsMet), // within the tolerance
            (9.0, 0.0, 5, Reason::ScalingUp),
            (0.0, 1.0, 3, Reason::ScalingUp),
            (9.0, 1.0, 5, Reason::ScalingUp),
            (99.0, 0.0, 8, Reason::ScalingUp),
        ] {
            let decision = decide(
                &range(),
                Some(&stored(2)),
                2,
                &load(2, queued, kv, 0.0),
                16,
                at(0),
            );
            assert_eq!(
                decision.wanted(),
                wanted,
                "queue {queued}, cache {kv}: {}",
                decision.message
            );
            assert_eq!(decision.reason, reason, "queue {queued}, cache {kv}");
        }
    }

    #[test]
    fn a_wish_beyond_the_maximum_is_told() {
        let decision = decide(
            &range(),
            Some(&stored(8)),
            8,
            &load(8, 99.0, 0.0, 0.0),
            16,
            at(0),
        );
        assert_eq!(
            (decision.wanted(), decision.reason),
            (8, Reason::LimitedByMax)
        );
        assert!(
            decision.message.contains("maxReplicas = 8"),
            "{}",
            decision.message
        );
    }

    #[test]
    fn a_dip_shorter_than_the_window_changes_nothing() {
        let mut status = stored(4);
        for second in 0..1000 {
            // Silence, but every 200 s a moment of load.
            let queued = if second % 200 == 199 { 8.0 } else { 0.0 };
            let decision = decide(
                &range(),
                Some(&status),
                4,
                &load(4, queued, 0.0, 0.0),
                16,
                at(second),
            );
            assert_eq!(decision.wanted(), 4, "after {second} s");
            status = decision.status;
        }
    }

    #[test]
    fn after_the_window_the_highest_wish_in_it_is_followed() {
        let mut status = stored(6);
        let mut wanted = 6;
        for second in 0..=300 {
            let queued = if second == 100 { 6.0 } else { 0.0 };
            let decision = decide(
                &range(),
                Some(&status),
                6,
                &load(6, queued, 0.0, 0.0),
                16,
                at(second),
            );
            wanted = decision.wanted();
            status = decision.status;
        }
        assert_eq!(wanted, 3);
    }

    #[test]
    fn what_runs_must_still_fit() {
        let decision = decide(
            &ScaleRange {
                down_seconds: 0,
                ..range()
            },
            Some(&stored(4)),
            4,
            &load(4, 0.0, 0.1, 40.0),
            16,
            at(0),
        );
        assert_eq!(
            decision.wanted(),
            3,
            "40 sequences need three replicas of 16"
        );
    }

    #[test]
    fn nothing_shrinks_while_a_replica_cannot_be_measured() {
        let mut load = load(4, 0.0, 0.0, 0.0);
        load.measured = 3;
        let quick = ScaleRange {
            down_seconds: 0,
            ..range()
        };
        assert_eq!(
            decide(&quick, Some(&stored(4)), 4, &load, 16, at(0)).wanted(),
            4
        );
        load.measured = 0;
        let blind = decide(&quick, Some(&stored(4)), 4, &load, 16, at(0));
        assert_eq!(
            (blind.wanted(), blind.reason, blind.is_active),
            (4, Reason::NoSamples, false)
        );
    }

    #[test]
    fn autoscaling_begins_with_what_is_there() {
        let decision = decide(&range(), None, 5, &Load::default(), 16, at(0));
        assert_eq!(decision.wanted(), 5);
        assert_eq!(
            decide(&range(), None, 50, &Load::default(), 16, at(0)).wanted(),
            8
        );
        assert_eq!(
            decide(&range(), None, 0, &Load::default(), 16, at(0)).wanted(),
            1
        );
    }

    #[test]
    fn a_prometheus_server_is_believed_while_its_figures_are_fresh() {
        let demand = |seconds: i64| Demand {
            at: at(0)
                .checked_sub(SignedDuration::from_secs(seconds))
                .unwrap(),
            queued_requests: 7.0,
            kv_utilization: 0.5,
        };
        let fresh = collect([None, None], Some(demand(10)), at(0));
        assert_eq!((fresh.measured, fresh.queued, fresh.kv), (2, 7.0, 1.0));
        assert_eq!(collect([None, None], Some(demand(61)), at(0)).measured, 0);
        let broken = Demand {
            queued_requests: f64::NAN,
            ..demand(0)
        };
        assert_eq!(collect([None], Some(broken), at(0)).measured, 0);
    }

    #[test]
    fn names_cannot_break_out_of_a_query() {
        let [waiting, _] = prometheus_queries("a\"} or b{", "m");
        assert_eq!(
            waiting,
            r#"sum(vllm:num_requests_waiting{namespace="a\"} or b{",model_name="m"})"#
        );
    }

    proptest! {
        #[test]
        fn the_range_is_never_left(
            before in prop::option::of(-5..200i32),
            present in 0..200u32,
            ready in 0..50u32,
            queued in 0.0..1e9f64,
            kv in 0.0..1.0f64,
            seconds in 0..10_000i64,
        ) {
            let before = before.map(stored);
            let decision = decide(&range(), before.as_ref(), present, &load(ready, queued, kv, 3.0), 16, at(seconds));
            prop_assert!((1..=8).contains(&decision.wanted()));
        }

        /// The same demand, decided upon again and again, comes to rest.
        #[test]
        fn steady_demand_comes_to_rest(start in 1..9i32, queued in 0.0..40.0f64, kv in 0.0..1.0f64) {
            let mut status = stored(start);
            let mut changes = 0;
            for step in 0..400 {
                let decision = decide(&range(), Some(&status), 1, &load(3, queued, kv, 5.0), 16, at(step * 10));
                changes += u32::from(decision.status.desired_replicas != status.desired_replicas);
                status = decision.status;
            }
            prop_assert!(changes <= 3, "{changes} changes");
        }
    }
}
