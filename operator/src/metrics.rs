//! The operator's own metrics: typed handles, one registry, names that begin with `cachalot_`.
//!
//! Help texts say what to alert on; the chart's PrometheusRule uses these names.

use std::time::Duration;

use operator_k8s::error::Category;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts,
    Registry, TextEncoder,
};

/// How a pass over one ModelDeployment ended; the variants are the label values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Something was written.
    Applied,
    /// Nothing had to be written.
    Unchanged,
    /// A call failed; the pass is repeated with back-off.
    Failed,
    /// The object could not be understood; waits for it to change.
    Malformed,
    /// The object is gone.
    Gone,
    /// The pass ended before it had a result (a panic or a shutdown).
    Abandoned,
}

impl Outcome {
    const ALL: [Outcome; 6] = [
        Outcome::Applied,
        Outcome::Unchanged,
        Outcome::Failed,
        Outcome::Malformed,
        Outcome::Gone,
        Outcome::Abandoned,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Unchanged => "unchanged",
            Outcome::Failed => "failed",
            Outcome::Malformed => "malformed",
            Outcome::Gone => "gone",
            Outcome::Abandoned => "abandoned",
        }
    }
}

/// Every metric of the process.
#[derive(Clone)]
pub struct Metrics {
    registry: Registry,
    reconciles: IntCounterVec,
    reconcile_seconds: Histogram,
    errors: IntCounterVec,
    actions: IntCounterVec,
    watch_errors: IntCounterVec,
    leader: IntGauge,
    queue: IntGauge,
    events_dropped: IntCounter,
    scrapes: IntCounterVec,
    prometheus_queries: IntCounterVec,
    desired: GaugeVec,
    ready: GaugeVec,
    objects: GaugeVec,
    resident: Gauge,
}

fn register<C: Collector + Clone + 'static>(registry: &Registry, made: prometheus::Result<C>) -> C {
    // Names are constants of this file; a test makes all of them, so neither step can fail in the field.
    let collector =
        made.unwrap_or_else(|error| panic!("a metric of this binary is malformed: {error}"));
    if let Err(error) = registry.register(Box::new(collector.clone())) {
        panic!("a metric of this binary is registered twice: {error}");
    }
    collector
}

impl Metrics {
    /// All metrics, registered, those with closed labels at zero.
    pub fn new() -> Self {
        let registry = Registry::new();
        let r = &registry;
        let counters = |name: &str, help: &str, labels: &[&str]| {
            register(r, IntCounterVec::new(Opts::new(name, help), labels))
        };
        let gauges = |name: &str, help: &str, labels: &[&str]| {
            register(r, GaugeVec::new(Opts::new(name, help), labels))
        };
        let buckets = vec![
            0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
            30.0, 60.0,
        ];
        let metrics = Metrics {
            reconciles: counters(
                "cachalot_operator_reconcile_total",
                "Passes over a ModelDeployment by outcome. Alert when 'failed' keeps rising; 'abandoned' outside of shutdowns is a bug.",
                &["outcome"],
            ),
            reconcile_seconds: register(
                r,
                Histogram::with_opts(
                    HistogramOpts::new(
                        "cachalot_operator_reconcile_duration_seconds",
                        "Time of one pass, its writes included. Alert when p99 stays above 5 s: the API server is slow.",
                    )
                    .buckets(buckets),
                ),
            ),
            errors: counters(
                "cachalot_operator_reconcile_errors_total",
                "Failed calls of passes by category. Alert on any lasting 'forbidden' (a right is missing) or 'invalid' (a bug).",
                &["category"],
            ),
            actions: counters(
                "cachalot_operator_actions_total",
                "Writes to the cluster by action ('report' is the status) and result ('done', 'already', 'failed').",
                &["action", "result"],
            ),
            watch_errors: counters(
                "cachalot_operator_watch_errors_total",
                "Interruptions of a watch by kind. A few during an API server's restart are normal; alert when they go on.",
                &["kind"],
            ),
            leader: register(
                r,
                IntGauge::new("cachalot_operator_leader", "1 while this process may write. Alert when the sum over all operators is not 1."),
            ),
            queue: register(
                r,
                IntGauge::new("cachalot_operator_queue_depth", "ModelDeployments that are due and wait for a worker. Alert when it stays above 100."),
            ),
            events_dropped: register(
                r,
                IntCounter::new(
                    "cachalot_operator_events_dropped_total",
                    "Events that were not written because of a full queue, a noisy object or a refusal.",
                ),
            ),
            scrapes: counters(
                "cachalot_operator_scrapes_total",
                "Questions to engine pods by result ('ok', 'failed'). Alert when most fail: a network policy may be in the way.",
                &["result"],
            ),
            prometheus_queries: counters(
                "cachalot_operator_prometheus_queries_total",
                "Queries to the Prometheus server by result ('ok', 'empty', 'failed'). Alert when 'failed' keeps rising: autoscaling then measures the pods itself.",
                &["result"],
            ),
            desired: gauges("cachalot_model_deployment_replicas_desired", "Replicas wanted.", &["namespace", "name"]),
            ready: gauges(
                "cachalot_model_deployment_replicas_ready",
                "Replicas that answer. Alert when below the wanted number for longer than a load takes.",
                &["namespace", "name"],
            ),
            objects: gauges("cachalot_operator_mirrored_objects", "Objects held in memory by kind.", &["kind"]),
            resident: register(r, Gauge::new("process_resident_memory_bytes", "Resident memory size in bytes.")),
            registry: registry.clone(),
        };
        for outcome in Outcome::ALL {
            metrics.reconciles.with_label_values(&[outcome.as_str()]);
        }
        for category in Category::ALL {
            metrics.errors.with_label_values(&[category.as_str()]);
        }
        for result in ["ok", "failed"] {
            metrics.scrapes.with_label_values(&[result]);
        }
        metrics
    }

    /// Begins to time a pass.
    pub fn pass(&self) -> Pass<'_> {
        Pass {
            metrics: self,
            began: std::time::Instant::now(),
            outcome: Outcome::Abandoned,
        }
    }

    /// A call of a pass failed.
    pub fn error(&self, category: Category) {
        self.errors.with_label_values(&[category.as_str()]).inc();
    }

    /// A write was tried.
    pub fn action(&self, action: &str, result: &str) {
        self.actions.with_label_values(&[action, result]).inc();
    }

    /// A watch has had `errors` interruptions since the start and holds `objects` objects.
    pub fn watch(&self, kind: &str, errors: u64, objects: usize) {
        let counter = self.watch_errors.with_label_values(&[kind]);
        counter.inc_by(errors.saturating_sub(counter.get()));
        self.objects.with_label_values(&[kind]).set(objects as f64);
    }

    /// Whether this process may write.
    pub fn leader(&self, held: bool) {
        self.leader.set(i64::from(held));
    }

    /// ModelDeployments that wait for a worker.
    pub fn queue(&self, depth: usize) {
        self.queue.set(i64::try_from(depth).unwrap_or(i64::MAX));
    }

    /// Events lost since the start.
    pub fn events_dropped(&self, since_start: u64) {
        self.events_dropped
            .inc_by(since_start.saturating_sub(self.events_dropped.get()));
    }

    /// An engine pod was asked.
    pub fn scrape(&self, answered: bool) {
        self.scrapes
            .with_label_values(&[if answered { "ok" } else { "failed" }])
            .inc();
    }

    /// Prometheus was asked: `ok`, `empty` or `failed`.
    pub fn prometheus_query(&self, result: &str) {
        self.prometheus_queries.with_label_values(&[result]).inc();
    }

    /// What is wanted and what answers.
    pub fn replicas(&self, namespace: &str, name: &str, desired: i64, ready: i64) {
        self.desired
            .with_label_values(&[namespace, name])
            .set(desired as f64);
        self.ready
            .with_label_values(&[namespace, name])
            .set(ready as f64);
    }

    /// The ModelDeployment is gone, and its series with it.
    pub fn forget(&self, namespace: &str, name: &str) {
        // An absent series is what is wanted.
        let _ = self.desired.remove_label_values(&[namespace, name]);
        let _ = self.ready.remove_label_values(&[namespace, name]);
    }

    /// The exposition.
    pub fn expose(&self) -> String {
        if let Some(bytes) = resident_bytes() {
            self.resident.set(bytes as f64);
        }
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Resident memory of this process, from the kernel.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim()
        .trim_end_matches(" kB")
        .parse::<u64>()
        .ok()
        .map(|kilobytes| kilobytes * 1024)
}

/// A pass under way; records its outcome when dropped, also when nobody said one.
#[must_use = "a pass that is dropped at once counts as abandoned"]
pub struct Pass<'a> {
    metrics: &'a Metrics,
    began: std::time::Instant,
    outcome: Outcome,
}

impl Pass<'_> {
    /// How the pass ended.
    pub fn ended(mut self, outcome: Outcome) -> Duration {
        self.outcome = outcome;
        self.began.elapsed()
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        self.metrics
            .reconciles
            .with_label_values(&[self.outcome.as_str()])
            .inc();
        self.metrics
            .reconcile_seconds
            .observe(self.began.elapsed().as_secs_f64());
    }
}

#[cfg(test)]
impl Metrics {
    /// Gives every metric at least one series.
    pub fn touch(&self) {
        self.replicas("default", "m", 3, 2);
        self.watch("Pod", 1, 1);
        self.action("create", "done");
        self.prometheus_query("ok");
    }

    /// What would be exposed.
    pub fn families(&self) -> Vec<prometheus::proto::MetricFamily> {
        self.registry.gather()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closed_labels_are_there_from_the_start() {
        let text = Metrics::new().expose();
        for expected in [
            "cachalot_operator_reconcile_total{outcome=\"failed\"} 0",
            "cachalot_operator_reconcile_errors_total{category=\"forbidden\"} 0",
            "cachalot_operator_leader 0",
            "process_resident_memory_bytes ",
        ] {
            assert!(text.contains(expected), "{expected} is missing in:\n{text}");
        }
    }

    #[test]
    fn a_pass_nobody_ended_counts_as_abandoned() {
        let metrics = Metrics::new();
        drop(metrics.pass());
        metrics.pass().ended(Outcome::Applied);
        let text = metrics.expose();
        assert!(
            text.contains("reconcile_total{outcome=\"abandoned\"} 1"),
            "{text}"
        );
        assert!(
            text.contains("reconcile_total{outcome=\"applied\"} 1"),
            "{text}"
        );
        assert!(
            text.contains("reconcile_duration_seconds_count 2"),
            "{text}"
        );
    }

    #[test]
    fn the_series_of_a_deleted_model_go_away() {
        let metrics = Metrics::new();
        metrics.replicas("default", "m", 3, 2);
        assert!(
            metrics
                .expose()
                .contains("replicas_ready{name=\"m\",namespace=\"default\"} 2")
        );
        metrics.forget("default", "m");
        assert!(!metrics.expose().contains("name=\"m\""));
    }

    #[test]
    fn every_metric_named_by_the_charts_alerts_exists() {
        let rules = include_str!("../../charts/cachalot/templates/monitoring.yaml");
        let metrics = Metrics::new();
        metrics.replicas("default", "m", 3, 2);
        metrics.watch("Pod", 1, 1);
        let text = metrics.expose();
        let mut named = 0;
        for word in rules
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
            .filter(|word| word.starts_with("cachalot_"))
        {
            assert!(
                text.contains(&format!("# TYPE {word} ")),
                "the chart asks for {word}"
            );
            named += 1;
        }
        assert!(named >= 4, "found {named} metrics in the rules");
    }
}
