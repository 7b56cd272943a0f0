//! What ModelDeployments report, for people and scripts: states, rates, and time to first token.
//!
//! Reads stored statuses, and the text of the engines' `/metrics` where somebody fetched it.

use std::sync::Arc;

use engine_spec::metrics::TIME_TO_FIRST_TOKEN;
use operator_api::ModelDeployment;
use serde::Serialize;

use crate::explain::{Judgement, PodWords, judgements, pods};
use crate::snapshot::Snapshot;

/// Buckets that a histogram of one pod may have.
const BUCKETS_MAX: usize = 256;

/// A stored status and the pods it speaks of.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct StatusWords {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Phase; `Unknown` before the operator looked.
    pub phase: String,
    /// Answering of wanted replicas, for example `2/3`.
    pub ready: String,
    /// GPUs planned.
    pub gpus: i64,
    /// Revision.
    pub revision: String,
    /// Base URL inside the cluster.
    pub endpoint: String,
    /// Whether the status speaks of the spec as it is now.
    pub is_current: bool,
    /// The most important message.
    pub message: String,
    /// Conditions.
    pub conditions: Vec<Judgement>,
    /// Engine pods that exist.
    pub pods: Vec<PodWords>,
}

/// What a ModelDeployment reports.
pub fn status_words(snapshot: &Snapshot) -> StatusWords {
    let ModelDeployment {
        metadata, status, ..
    } = &*snapshot.deployment;
    let status = status.clone().unwrap_or_default();
    StatusWords {
        namespace: metadata.namespace.clone().unwrap_or_default(),
        name: metadata.name.clone().unwrap_or_default(),
        phase: status
            .phase
            .map_or("Unknown", operator_api::Phase::as_str)
            .to_owned(),
        ready: status.ready.unwrap_or_else(|| "?/?".into()),
        gpus: status.plan.map_or(0, |plan| plan.gpus),
        revision: status.revision.unwrap_or_default(),
        endpoint: status.endpoint.unwrap_or_default(),
        is_current: status.observed_generation.is_some()
            && status.observed_generation == metadata.generation,
        message: status.message.unwrap_or_default(),
        conditions: judgements(&status.conditions),
        pods: seen_pods(snapshot),
    }
}

/// Engine pods, judged by their nodes only where nodes were looked at: without a list of them
/// every replica would seem to be on a node that is gone.
fn seen_pods(snapshot: &Snapshot) -> Vec<PodWords> {
    if !snapshot.cluster.nodes.is_empty() {
        return pods(snapshot);
    }
    let mut apart = snapshot.clone();
    for pod in &mut apart.pods {
        Arc::make_mut(pod).node = None;
    }
    let mut words = pods(&apart);
    for word in &mut words {
        let pod = snapshot.pods.iter().find(|pod| pod.name == word.name);
        word.node = pod.and_then(|pod| pod.node.clone());
    }
    words
}

/// Load and speed of one ModelDeployment; what was not measured is absent.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Rates {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Answering of wanted replicas.
    pub ready: String,
    /// Tokens generated per second, over all replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<f64>,
    /// Median time to first token, since the replicas started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_p50_seconds: Option<f64>,
    /// The time to first token that 95 % of requests stay within.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ttft_p95_seconds: Option<f64>,
    /// Share of the KV cache in use, mean over replicas.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kv_percent: Option<i32>,
    /// Sequences being computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub running: Option<i64>,
    /// Requests waiting.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub queued: Option<i64>,
}

/// Rates of a ModelDeployment; `metrics` are the texts of its pods' `/metrics`.
pub fn rates<'a>(
    deployment: &ModelDeployment,
    metrics: impl IntoIterator<Item = &'a str>,
) -> Rates {
    let status = deployment.status.clone().unwrap_or_default();
    let measured = status.performance;
    let mut ttft = Histogram::default();
    for text in metrics {
        ttft.add(text, TIME_TO_FIRST_TOKEN);
    }
    Rates {
        namespace: deployment.metadata.namespace.clone().unwrap_or_default(),
        name: deployment.metadata.name.clone().unwrap_or_default(),
        ready: status.ready.unwrap_or_else(|| "?/?".into()),
        tokens_per_second: measured.as_ref().map(|m| m.tokens_per_second),
        ttft_p50_seconds: ttft.quantile(0.5),
        ttft_p95_seconds: ttft.quantile(0.95),
        kv_percent: measured.as_ref().map(|m| m.kv_cache_utilization_percent),
        running: measured.as_ref().map(|m| m.running_requests),
        queued: measured.as_ref().map(|m| m.queued_requests),
    }
}

/// Counts of a Prometheus histogram at or below each bound, summed over pods and labels.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Bound and cumulative count, in order of the bounds.
    buckets: Vec<(f64, f64)>,
}

impl Histogram {
    /// Adds the buckets of `name` that an exposition has; lines that make no sense are passed over.
    pub fn add(&mut self, exposition: &str, name: &str) {
        for line in exposition.lines() {
            let Some((bound, count)) = bucket(line, name) else {
                continue;
            };
            match self
                .buckets
                .binary_search_by(|(known, _)| known.total_cmp(&bound))
            {
                Ok(index) => self.buckets[index].1 += count,
                Err(index) if self.buckets.len() < BUCKETS_MAX => {
                    self.buckets.insert(index, (bound, count));
                }
                Err(_) => {}
            }
        }
    }

    /// The value that a `share` of all observations stays within, interpolated within its bucket
    /// as Prometheus' `histogram_quantile` does; none without observations.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let total = self.buckets.last()?.1;
        if total <= 0.0 {
            return None;
        }
        let rank = share * total;
        let index = self.buckets.iter().position(|(_, count)| *count >= rank)?;
        let (low, below) = match index {
            0 => (0.0, 0.0),
            _ => self.buckets[index - 1],
        };
        let (high, count) = self.buckets[index];
        if high.is_infinite() {
            return Some(low);
        }
        let within = count - below;
        let part = if within > 0.0 {
            (rank - below) / within
        } else {
            1.0
        };
        Some(low + (high - low) * part)
    }
}

/// Bound and count of a line `name_bucket{…,le="0.1",…} 12`.
fn bucket(line: &str, name: &str) -> Option<(f64, f64)> {
    let rest = line.strip_prefix(name)?.strip_prefix("_bucket{")?;
    let (labels, value) = rest.rsplit_once('}')?;
    let bound = labels
        .split(',')
        .find_map(|label| label.strip_prefix("le=\""))?;
    let bound = match bound.strip_suffix('"')? {
        "+Inf" => f64::INFINITY,
        number => number.parse().ok()?,
    };
    let count: f64 = value.split_whitespace().next()?.parse().ok()?;
    (!bound.is_nan() && count.is_finite() && count >= 0.0).then_some((bound, count))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE vllm:time_to_first_token_seconds histogram\n\
        vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"a,b\",le=\"0.1\"} 50\n\
        vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"a,b\",le=\"0.5\"} 90\n\
        vllm:time_to_first_token_seconds_bucket{engine=\"0\",model_name=\"a,b\",le=\"+Inf\"} 100\n\
        vllm:time_to_first_token_seconds_sum{engine=\"0\"} 33\n\
        vllm:other_bucket{le=\"0.1\"} 9\n";

    #[test]
    fn quantiles_are_those_of_prometheus() {
        let mut histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        histogram.add(TEXT, TIME_TO_FIRST_TOKEN);
        assert_eq!(histogram.quantile(0.25), Some(0.05));
        assert_eq!(histogram.quantile(0.5), Some(0.1));
        // Halfway between 50 and 90 of 100: halfway between 0.1 and 0.5.
        let p70 = histogram.quantile(0.7).expect("observed");
        assert!((p70 - 0.3).abs() < 1e-12, "{p70}");
        // Beyond the last finite bound nothing more is known.
        assert_eq!(histogram.quantile(0.99), Some(0.5));
        // Pods add up.
        histogram.add(TEXT, TIME_TO_FIRST_TOKEN);
        assert_eq!(histogram.quantile(0.5), Some(0.1));
        assert_eq!(histogram.buckets.last(), Some(&(f64::INFINITY, 200.0)));
    }

    #[test]
    fn an_exposition_that_makes_no_sense_counts_nothing() {
        let mut histogram = Histogram::default();
        for line in [
            "vllm:time_to_first_token_seconds_bucket{le=\"x\"} 1",
            "vllm:time_to_first_token_seconds_bucket{le=\"1\"} NaN",
            "vllm:time_to_first_token_seconds_bucket{le=\"1\"",
            "vllm:time_to_first_token_seconds_bucket{} 3",
            "<html>",
        ] {
            histogram.add(line, TIME_TO_FIRST_TOKEN);
        }
        assert_eq!(histogram, Histogram::default());
    }
}
