//! What replicas say about themselves, summed up for the status.
//!
//! Figures move with every scrape; those that moved little are reported as before, so that an idle
//! fleet does not cause a write every few seconds.

use std::collections::BTreeMap;

use engine_spec::StartupPhase;
use jiff::Timestamp;
use operator_api::{LoadProgress, Performance};

use crate::replicas::{Replica, State};
use crate::snapshot::{PodSamples, Startup};

/// Share by which a rate may move without being reported anew.
const QUIET: f64 = 0.05;

/// Progress of the starting replica that is furthest from being ready.
pub fn load_progress(
    replicas: &[Replica<'_>],
    samples: &BTreeMap<String, PodSamples>,
) -> Option<LoadProgress> {
    let starting = replicas
        .iter()
        .filter(|replica| matches!(replica.state, State::Starting | State::Failing { .. }));
    let reports = starting.filter_map(|replica| {
        let Startup::Starts(report) = samples.get(&replica.pod.name)?.startup.as_ref()? else {
            return None;
        };
        let (order, word) = match report.phase {
            StartupPhase::Fetching => (0, "fetching"),
            StartupPhase::Loading => (1, "loading"),
            StartupPhase::Warming => (2, "warming"),
            StartupPhase::Failed => (0, "failed"),
            StartupPhase::Ready => return None,
        };
        Some((order, percent(report.percent), word, replica, report))
    });
    let (_, percent, word, replica, report) =
        reports.min_by_key(|(order, percent, ..)| (*order, *percent))?;
    let wide = |bytes: u64| i64::try_from(bytes).unwrap_or(i64::MAX);
    Some(LoadProgress {
        pod: replica.pod.name.clone(),
        phase: word.to_owned(),
        bytes_loaded: wide(report.bytes_loaded),
        bytes_total: wide(report.bytes_total),
        bytes_per_second: report.bytes_per_second.max(0.0) as i64,
        eta_seconds: report
            .eta_seconds
            .map(|seconds| seconds.max(0.0).ceil() as i64),
        percent,
    })
}

fn percent(value: f64) -> i32 {
    value.clamp(0.0, 100.0) as i32
}

/// Rates and load, summed over the replicas that answer; none while nothing was measured.
pub fn performance(
    replicas: &[Replica<'_>],
    samples: &BTreeMap<String, PodSamples>,
    now: Timestamp,
    before: Option<&Performance>,
) -> Option<Performance> {
    let mut sum = Performance::default();
    let mut kv = 0.0;
    for replica in replicas.iter().filter(|replica| replica.is_ready()) {
        let Some(samples) = samples.get(&replica.pod.name) else {
            continue;
        };
        let Some(latest) = samples.current(now) else {
            continue;
        };
        sum.replicas_measured += 1;
        sum.running_requests += i64::from(latest.report.running);
        sum.queued_requests += i64::from(latest.report.waiting);
        kv += latest.report.kv_usage.clamp(0.0, 1.0);
        sum.tokens_per_second += samples.rates.generation_tokens;
        sum.prompt_tokens_per_second += samples.rates.prompt_tokens;
    }
    if sum.replicas_measured == 0 {
        return None;
    }
    sum.kv_cache_utilization_percent = percent(kv * 100.0 / f64::from(sum.replicas_measured));
    let old = before.cloned().unwrap_or_default();
    sum.tokens_per_second = quiet(sum.tokens_per_second, old.tokens_per_second);
    sum.prompt_tokens_per_second =
        quiet(sum.prompt_tokens_per_second, old.prompt_tokens_per_second);
    if (sum.kv_cache_utilization_percent - old.kv_cache_utilization_percent).abs() <= 1 {
        sum.kv_cache_utilization_percent = old.kv_cache_utilization_percent;
    }
    Some(sum)
}

/// The old figure when the new one is close to it; else the new one with three digits or so.
fn quiet(new: f64, old: f64) -> f64 {
    let rounded = if new >= 100.0 {
        new.round()
    } else {
        (new * 10.0).round() / 10.0
    };
    let is_close = (rounded - old).abs() <= old.abs() * QUIET;
    if is_close && rounded > 0.0 {
        old
    } else {
        rounded
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::snapshot::{LoadSample, PodView};
    use engine_spec::{LoadReport, StartupReport};

    fn at(seconds: i64) -> Timestamp {
        Timestamp::from_second(1_800_000_000 + seconds).unwrap()
    }

    fn pod(name: &str) -> PodView {
        PodView {
            name: name.into(),
            ..PodView::default()
        }
    }

    fn sample(seconds: i64, tokens: u64) -> LoadSample {
        LoadSample {
            at: at(seconds),
            report: LoadReport {
                running: 2,
                waiting: 1,
                kv_usage: 0.5,
                generation_tokens_total: tokens,
                ..LoadReport::default()
            },
        }
    }

    fn measured(previous: LoadSample, latest: LoadSample) -> PodSamples {
        let mut samples = PodSamples::default();
        samples.take_load(previous);
        samples.take_load(latest);
        samples
    }

    #[test]
    fn rates_are_summed_over_replicas_that_answer() {
        let pods = [pod("a"), pod("b"), pod("c")];
        let states = [State::Ready, State::Ready, State::Starting];
        let replicas: Vec<_> = pods
            .iter()
            .zip(states)
            .map(|(pod, state)| Replica::alone(pod, state))
            .collect();
        let samples = ["a", "b", "c"]
            .map(|name| (name.to_owned(), measured(sample(0, 1000), sample(10, 2000))))
            .into();
        let figures = performance(&replicas, &samples, at(10), None).unwrap();
        assert_eq!(figures.tokens_per_second, 200.0);
        assert_eq!((figures.running_requests, figures.queued_requests), (4, 2));
        assert_eq!(
            (
                figures.kv_cache_utilization_percent,
                figures.replicas_measured
            ),
            (50, 2)
        );
        assert_eq!(
            performance(&replicas, &samples, at(71), None),
            None,
            "too old to believe"
        );
    }

    #[test]
    fn engines_that_are_seldom_asked_are_told_of_until_the_answer_after_the_next_is_overdue() {
        let pods = [pod("a")];
        let replicas = [Replica::alone(&pods[0], State::Ready)];
        let samples = [("a".to_owned(), measured(sample(0, 1000), sample(200, 2000)))].into();
        let told = |seconds| performance(&replicas, &samples, at(seconds), None);
        assert!(told(600).is_some());
        assert_eq!(told(601), None);
    }

    #[test]
    fn an_engine_that_started_anew_gives_no_negative_rate() {
        let pods = [pod("a")];
        let replicas = [Replica::alone(&pods[0], State::Ready)];
        let samples = [("a".to_owned(), measured(sample(0, 1000), sample(10, 5)))].into();
        let figures = performance(&replicas, &samples, at(10), None).unwrap();
        assert_eq!(figures.tokens_per_second, 0.0);
    }

    #[test]
    fn a_figure_that_hardly_moved_is_reported_as_before() {
        assert_eq!(quiet(203.4, 200.0), 200.0);
        assert_eq!(quiet(230.6, 200.0), 231.0);
        assert_eq!(quiet(0.0, 200.0), 0.0);
        assert_eq!(quiet(3.44, 0.0), 3.4);
    }

    #[test]
    fn progress_is_that_of_the_replica_furthest_from_ready() {
        let pods = [pod("a"), pod("b"), pod("c")];
        let replicas: Vec<_> = pods
            .iter()
            .map(|pod| Replica::alone(pod, State::Starting))
            .collect();
        let report = |phase, percent| PodSamples {
            startup: Some(Startup::from(StartupReport {
                phase,
                bytes_loaded: 10,
                bytes_total: 100,
                bytes_per_second: 5.7,
                eta_seconds: Some(17.2),
                percent,
                reason: None,
                message: None,
            })),
            ..PodSamples::default()
        };
        let samples = [
            ("a".to_owned(), report(StartupPhase::Warming, 1.0)),
            ("b".to_owned(), report(StartupPhase::Loading, 10.0)),
            ("c".to_owned(), report(StartupPhase::Loading, 70.0)),
        ]
        .into();
        let progress = load_progress(&replicas, &samples).unwrap();
        assert_eq!(
            (progress.pod.as_str(), progress.phase.as_str()),
            ("b", "loading")
        );
        assert_eq!((progress.percent, progress.bytes_per_second), (10, 5));
        assert_eq!(progress.eta_seconds, Some(18));
    }
}
