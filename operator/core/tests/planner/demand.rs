//! What ends a stabilisation window, begins it anew, and which figures are believed.

use std::cell::Cell;

use crate::common::{ago, now};
use engine_spec::LoadReport;
use jiff::{SignedDuration, Timestamp};
use operator_api::AutoscalingStatus;
use operator_core::scaling::{Load, collect, decide};
use operator_core::snapshot::{Demand, LoadSample, PodSamples};
use operator_core::validate::ScaleRange;

fn at(seconds: i64) -> Timestamp {
    now() + SignedDuration::from_secs(seconds)
}

/// Four replicas with windows of 60 s both ways and two requests queued for each; then, at these
/// seconds, so many are queued, or nothing could be measured. What is wanted after each.
fn wanted(story: &[(i64, Option<u32>)]) -> Vec<u32> {
    let range = ScaleRange {
        min: 1,
        max: 8,
        queued_per_replica: Some(2),
        kv_percent: None,
        up_seconds: 60,
        down_seconds: 60,
    };
    let status = Cell::new(AutoscalingStatus {
        desired_replicas: 4,
        ..AutoscalingStatus::default()
    });
    let step = |(second, queued): &(i64, Option<u32>)| {
        let load = Load {
            ready: 4,
            measured: if queued.is_some() { 4 } else { 0 },
            queued: f64::from(queued.unwrap_or(0)),
            ..Load::default()
        };
        let before = status.take();
        let decision = decide(&range, Some(&before), 4, &load, 16, at(*second));
        let wanted = decision.wanted();
        let has_scaled = wanted != u32::try_from(before.desired_replicas).unwrap();
        let since = decision.status.last_scale_time.as_ref().map(|time| time.0);
        assert_eq!(since == Some(at(*second)), has_scaled, "at {second} s");
        status.set(decision.status);
        wanted
    };
    story.iter().map(step).collect()
}

/// Queued requests by which two, four, six and eight replicas are wished for.
const TWO: Option<u32> = Some(4);
const FOUR: Option<u32> = Some(8);
const SIX: Option<u32> = Some(12);
const EIGHT: Option<u32> = Some(16);

#[test]
fn the_smallest_step_wished_for_in_the_window_is_taken() {
    assert_eq!(
        wanted(&[(0, EIGHT), (30, SIX), (59, EIGHT), (60, EIGHT)]),
        [4, 4, 4, 6]
    );
    assert_eq!(
        wanted(&[(0, Some(0)), (30, TWO), (59, Some(0)), (60, Some(0))]),
        [4, 4, 4, 2]
    );
}

#[test]
fn what_interrupts_a_wish_begins_its_window_anew() {
    // Demand that is just right, that goes the other way, and none that is known.
    for (wish, then) in [(SIX, 6), (TWO, 2)] {
        let other = if wish == SIX { TWO } else { SIX };
        for interruption in [FOUR, other, None] {
            let story = [
                (0, wish),
                (30, interruption),
                (40, wish),
                (99, wish),
                (100, wish),
            ];
            assert_eq!(
                wanted(&story),
                [4, 4, 4, 4, then],
                "{wish:?}, {interruption:?}"
            );
        }
    }
}

#[test]
fn a_sample_is_believed_for_a_minute() {
    let samples = |seconds| PodSamples {
        latest: Some(LoadSample {
            at: ago(seconds),
            report: LoadReport::default(),
        }),
        ..PodSamples::default()
    };
    let measured = |seconds| collect([Some(&samples(seconds))], None, now()).measured;
    assert_eq!((measured(60), measured(61)), (1, 0));
}

#[test]
fn a_figure_that_is_no_number_is_not_believed() {
    let demand = |queued_requests, kv_utilization| Demand {
        at: now(),
        queued_requests,
        kv_utilization,
    };
    let measured = |demand| collect([None], Some(demand), now()).measured;
    assert_eq!(measured(demand(1.0, 0.5)), 1);
    assert_eq!(measured(demand(1.0, f64::NAN)), 0);
    assert_eq!(measured(demand(f64::INFINITY, 0.5)), 0);
}
