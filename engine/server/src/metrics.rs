//! What `/metrics` shows: vLLM's names for what a model server measures, `cachalot_engine_*` for what vLLM has no
//! name for.
//!
//! The engine's thread writes through atomics and a scrape reads them, so neither waits for the other. Counters spell
//! their `_total` themselves, since the library does not add it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use engine_core::{Counters, FinishReason, Limits, Load};
use engine_spec::metrics as names;
use prometheus::core::Collector;
use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

/// The index of the engine in its replica; there is one.
const ENGINE: &str = "0";
/// vLLM's name of the queue by reason.
const NUM_REQUESTS_WAITING_BY_REASON: &str = "vllm:num_requests_waiting_by_reason";
const PROMPT_TOKENS_BY_SOURCE: &str = "vllm:prompt_tokens_by_source_total";
const PROMPT_TOKENS_CACHED: &str = "vllm:prompt_tokens_cached_total";
const PROMPT_TOKENS_RECOMPUTED: &str = "vllm:prompt_tokens_recomputed_total";
const CORRUPTED_REQUESTS: &str = "vllm:corrupted_requests_total";
const REQUEST_MAX_NUM_GENERATION_TOKENS: &str = "vllm:request_max_num_generation_tokens";
const REQUEST_PREFILL_KV_COMPUTED_TOKENS: &str = "vllm:request_prefill_kv_computed_tokens";
/// Deprecated by vLLM, but asked for by published dashboards.
const TIME_PER_OUTPUT_TOKEN: &str = "vllm:time_per_output_token_seconds";

/// Everything that can be scraped.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    model_name: String,
    serving: OnceLock<ServingMetrics>,
    http_requests: IntCounterVec,
    answered: AtomicU64,
    failed: AtomicU64,
    startup_seconds: GaugeVec,
    startup_bytes: GaugeVec,
    pub stalls: IntCounter,
}

/// Series that exist once a model is loaded.
#[derive(Debug)]
pub struct ServingMetrics {
    running: IntGauge,
    waiting: IntGauge,
    waiting_capacity: IntGauge,
    waiting_deferred: IntGauge,
    kv_usage: Gauge,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    preemptions: IntCounter,
    prompt_tokens: IntCounter,
    prompt_tokens_computed: IntCounter,
    prompt_tokens_hit: IntCounter,
    prompt_tokens_cached: IntCounter,
    prompt_tokens_recomputed: IntCounter,
    generation_tokens: IntCounter,
    corrupted: IntCounter,
    success: IntCounterVec,
    rejections: IntCounterVec,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
    request_max_generation_tokens: Histogram,
    request_max_tokens: Histogram,
    request_prefill_computed: Histogram,
    request_n: Histogram,
    iteration_tokens: Histogram,
    first_token: Histogram,
    inter_token: Histogram,
    time_per_output_token: Histogram,
    request_time_per_output_token: Histogram,
    e2e: Histogram,
    queue: Histogram,
    inference: Histogram,
    prefill: Histogram,
    decode: Histogram,
    step_seconds: Histogram,
    mask_failures: IntCounter,
    pub deadlines: IntCounter,
    pub canary_deviation: Gauge,
}

/// Registers collectors; a name that is used twice is a bug found by any test that builds the metrics.
struct Registrar<'a> {
    registry: &'a Registry,
    model_name: &'a str,
}

impl Registrar<'_> {
    fn opts(&self, name: &str, help: &str) -> Opts {
        Opts::new(name, help)
            .const_label(names::LABEL_MODEL_NAME, self.model_name)
            .const_label(names::LABEL_ENGINE, ENGINE)
    }

    fn add<C: Collector + Clone + 'static>(&self, collector: Result<C, prometheus::Error>) -> C {
        #[expect(clippy::expect_used, reason = "names are constants, checked by tests")]
        let collector = collector.expect("metric names and labels are valid");
        let registered = self.registry.register(Box::new(collector.clone()));
        debug_assert!(registered.is_ok(), "{registered:?}");
        collector
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.add(IntCounter::with_opts(self.opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.add(IntCounterVec::new(self.opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Gauge {
        self.add(Gauge::with_opts(self.opts(name, help)))
    }

    fn int_gauge(&self, name: &str, help: &str) -> IntGauge {
        self.add(IntGauge::with_opts(self.opts(name, help)))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let mut opts = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        opts.common_opts = self.opts(name, help);
        self.add(Histogram::with_opts(opts))
    }
}

impl Metrics {
    /// Series that exist from the first moment.
    pub fn new(model_name: &str, version: &str) -> Self {
        let registry = Registry::new();
        let registrar = Registrar {
            registry: &registry,
            model_name,
        };
        let http_requests = registrar.add(IntCounterVec::new(
            Opts::new(
                "http_requests_total",
                "Requests answered; alert on a rising share of 5xx.",
            ),
            &["handler", "method", "status"],
        ));
        let startup_seconds = registrar.add(GaugeVec::new(
            registrar.opts(
                "cachalot_engine_startup_seconds",
                "Seconds spent in a phase of the start; alert when loading takes far longer than before.",
            ),
            &["phase"],
        ));
        let startup_bytes = registrar.add(GaugeVec::new(
            registrar.opts(
                "cachalot_engine_startup_bytes",
                "Bytes moved in a phase of the start.",
            ),
            &["phase"],
        ));
        let stalls = registrar.counter(
            "cachalot_engine_stalls_total",
            "Times the engine's thread showed no progress for too long; alert on any.",
        );
        let build = registrar.add(IntGaugeVec::new(
            registrar.opts(
                "cachalot_engine_build_info",
                "Always 1; the label says which version runs.",
            ),
            &["version"],
        ));
        build.with_label_values(&[version]).set(1);
        Self {
            registry,
            model_name: model_name.to_owned(),
            serving: OnceLock::new(),
            http_requests,
            answered: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            startup_seconds,
            startup_bytes,
            stalls,
        }
    }

    /// Adds the series of a loaded model.
    pub fn begin_serving(&self, limits: &Limits) -> &ServingMetrics {
        self.serving.get_or_init(|| {
            let registrar = Registrar {
                registry: &self.registry,
                model_name: &self.model_name,
            };
            ServingMetrics::new(&registrar, limits)
        })
    }

    /// The series of a loaded model.
    pub fn serving(&self) -> Option<&ServingMetrics> {
        self.serving.get()
    }

    /// One answered request.
    pub fn count_http(&self, handler: &str, method: &str, status: u16) {
        if handler.starts_with("/v1/") {
            self.answered.fetch_add(1, Ordering::Relaxed);
            self.failed
                .fetch_add(u64::from(status >= 500), Ordering::Relaxed);
        }
        let status = format!("{}xx", status / 100);
        self.http_requests
            .with_label_values(&[handler, method, &status])
            .inc();
    }

    /// API requests answered since start, and those of them answered with 500 or above.
    pub fn answers(&self) -> (u64, u64) {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        (read(&self.answered), read(&self.failed))
    }

    /// A phase of the start has ended.
    pub fn set_startup(&self, phase: &str, seconds: f64, bytes: u64) {
        self.startup_seconds
            .with_label_values(&[phase])
            .set(seconds);
        self.startup_bytes
            .with_label_values(&[phase])
            .set(bytes as f64);
    }

    /// The text exposition.
    pub fn render(&self) -> Vec<u8> {
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::error!(%error, "metrics could not be written");
        }
        text
    }
}

impl ServingMetrics {
    fn new(registrar: &Registrar<'_>, limits: &Limits) -> Self {
        let tokens = names::buckets_tokens(limits.max_model_len as u32);
        let by_reason = registrar.add(IntGaugeVec::new(
            registrar.opts(
                NUM_REQUESTS_WAITING_BY_REASON,
                "Requests in the queue, by what they wait for.",
            ),
            &["reason"],
        ));
        let by_source = registrar.counters(
            PROMPT_TOKENS_BY_SOURCE,
            "Prompt tokens processed, by where they came from.",
            &["source"],
        );
        let info = registrar.add(IntGaugeVec::new(
            registrar.opts(
                names::CACHE_CONFIG_INFO,
                "Always 1; the labels say how the cache is built.",
            ),
            &[
                "block_size",
                "num_gpu_blocks",
                "enable_prefix_caching",
                "max_model_len",
            ],
        ));
        info.with_label_values(&[
            &limits.block_size.to_string(),
            &limits.block_count.to_string(),
            "True",
            &limits.max_model_len.to_string(),
        ])
        .set(1);
        let success = registrar.counters(
            names::REQUEST_SUCCESS,
            "Requests that ended, by how; alert on error.",
            &[names::LABEL_FINISHED_REASON],
        );
        for reason in [
            FinishReason::Stop,
            FinishReason::Length,
            FinishReason::Abort,
            FinishReason::Error,
        ] {
            success.with_label_values(&[reason.as_str()]);
        }
        let rejections = registrar.counters(
            names::ADMISSION_REJECTIONS,
            "Requests refused at the door; alert on queue_full and queued_tokens.",
            &["reason"],
        );
        for reason in [
            "queue_full",
            "queued_tokens",
            "tenant_share",
            "draining",
            "invalid",
        ] {
            rejections.with_label_values(&[reason]);
        }
        let counter = |name, help| registrar.counter(name, help);
        let requests = names::BUCKETS_REQUEST_LATENCY;
        let token_latency = names::BUCKETS_TOKEN_LATENCY;
        let histogram = |name, help, buckets: &[f64]| registrar.histogram(name, help, buckets);
        Self {
            running: registrar.int_gauge(names::NUM_REQUESTS_RUNNING, "Sequences in the running batch."),
            waiting: registrar.int_gauge(names::NUM_REQUESTS_WAITING, "Sequences in the queue; alert when it stays above 0."),
            waiting_capacity: by_reason.with_label_values(&["capacity"]),
            waiting_deferred: by_reason.with_label_values(&["deferred"]),
            kv_usage: registrar.gauge(names::KV_CACHE_USAGE, "Share of cache blocks in use, 0 to 1."),
            prefix_queries: counter(names::PREFIX_CACHE_QUERIES, "Tokens looked up in the prefix cache."),
            prefix_hits: counter(names::PREFIX_CACHE_HITS, "Tokens found in the prefix cache."),
            preemptions: counter(names::NUM_PREEMPTIONS, "Sequences that gave their blocks back; alert on a rising rate."),
            prompt_tokens: counter(names::PROMPT_TOKENS, "Prompt tokens processed."),
            prompt_tokens_computed: by_source.with_label_values(&["local_compute"]),
            prompt_tokens_hit: by_source.with_label_values(&["local_cache_hit"]),
            prompt_tokens_cached: counter(PROMPT_TOKENS_CACHED, "Prompt tokens found in the prefix cache."),
            prompt_tokens_recomputed: counter(PROMPT_TOKENS_RECOMPUTED, "Tokens computed again after a preemption."),
            generation_tokens: counter(names::GENERATION_TOKENS, "Tokens generated."),
            corrupted: counter(CORRUPTED_REQUESTS, "Sequences that ended because a logit was not finite; alert on any."),
            success,
            rejections,
            request_prompt_tokens: histogram(names::REQUEST_PROMPT_TOKENS, "Prompt tokens of a request.", &tokens),
            request_generation_tokens: histogram(names::REQUEST_GENERATION_TOKENS, "Tokens generated for a request.", &tokens),
            request_max_generation_tokens: histogram(REQUEST_MAX_NUM_GENERATION_TOKENS, "Tokens of a request's longest choice.", &tokens),
            request_max_tokens: histogram(names::REQUEST_PARAMS_MAX_TOKENS, "A request's max_tokens.", &tokens),
            request_prefill_computed: histogram(REQUEST_PREFILL_KV_COMPUTED_TOKENS, "Prompt tokens of a request that were not cached.", &tokens),
            request_n: histogram(names::REQUEST_PARAMS_N, "A request's n.", names::BUCKETS_PARAMS_N),
            iteration_tokens: histogram(names::ITERATION_TOKENS, "Tokens of a step.", names::BUCKETS_ITERATION_TOKENS),
            first_token: histogram(names::TIME_TO_FIRST_TOKEN, "From arrival to the first token.", names::BUCKETS_FIRST_TOKEN),
            inter_token: histogram(names::INTER_TOKEN_LATENCY, "Between two tokens of a sequence.", token_latency),
            time_per_output_token: histogram(TIME_PER_OUTPUT_TOKEN, "Between two tokens of a sequence (old name).", token_latency),
            request_time_per_output_token: histogram(names::REQUEST_TIME_PER_OUTPUT_TOKEN, "Mean time between the tokens of a request.", token_latency),
            e2e: histogram(names::E2E_REQUEST_LATENCY, "From arrival to the last token.", requests),
            queue: histogram(names::REQUEST_QUEUE_TIME, "From arrival to the first step.", requests),
            inference: histogram(names::REQUEST_INFERENCE_TIME, "From the first step to the last token.", requests),
            prefill: histogram(names::REQUEST_PREFILL_TIME, "From the first step to the first token.", requests),
            decode: histogram(names::REQUEST_DECODE_TIME, "From the first to the last token.", requests),
            step_seconds: registrar.histogram(
                "cachalot_engine_step_seconds",
                "Duration of a step.",
                &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0],
            ),
            mask_failures: counter(
                "cachalot_engine_mask_failures_total",
                "Sequences that ended because a grammar could not go on; alert on a rising rate.",
            ),
            deadlines: counter(
                "cachalot_engine_deadlines_exceeded_total",
                "Requests that ended because their time was over; alert on a rising rate.",
            ),
            canary_deviation: registrar.gauge(
                "cachalot_engine_canary_deviation",
                "Largest difference of a logit between the canary alone and in a batch; 0 when batch-invariant.",
            ),
        }
    }

    /// The state after a step, and what changed since `before`.
    pub fn observe_load(&self, load: &Load, before: &Counters) {
        self.running.set(load.running as i64);
        self.waiting.set(load.waiting as i64);
        self.waiting_deferred.set(load.deferred as i64);
        self.waiting_capacity
            .set((load.waiting - load.deferred) as i64);
        self.kv_usage
            .set(load.blocks_used as f64 / load.blocks_total.max(1) as f64);
        let now = &load.counters;
        self.prefix_queries
            .inc_by(now.prefix_queries - before.prefix_queries);
        self.prefix_hits
            .inc_by(now.prefix_hits - before.prefix_hits);
        self.preemptions
            .inc_by(now.preemptions - before.preemptions);
        self.prompt_tokens
            .inc_by(now.prompt_tokens - before.prompt_tokens);
        self.prompt_tokens_recomputed
            .inc_by(now.recomputed_tokens - before.recomputed_tokens);
        self.generation_tokens
            .inc_by(now.generation_tokens - before.generation_tokens);
        self.corrupted.inc_by(now.corrupted - before.corrupted);
        self.mask_failures
            .inc_by(now.mask_failures - before.mask_failures);
    }

    /// A step of so many tokens took so long.
    pub fn observe_step(&self, tokens: usize, took: Duration) {
        self.iteration_tokens.observe(tokens as f64);
        self.step_seconds.observe(took.as_secs_f64());
    }

    /// A request was admitted.
    pub fn observe_admission(&self, prompt: usize, max_tokens: usize, choices: u32) {
        self.request_prompt_tokens.observe(prompt as f64);
        self.request_max_tokens.observe(max_tokens as f64);
        self.request_n.observe(f64::from(choices));
    }

    /// A request was refused.
    pub fn observe_rejection(&self, reason: &str) {
        self.rejections.with_label_values(&[reason]).inc();
    }

    /// A sequence entered the batch.
    pub fn observe_start(&self, queued: Duration, prompt: usize, cached: usize) {
        self.queue.observe(queued.as_secs_f64());
        self.prompt_tokens_hit.inc_by(cached as u64);
        self.prompt_tokens_cached.inc_by(cached as u64);
        self.prompt_tokens_computed.inc_by((prompt - cached) as u64);
        self.request_prefill_computed
            .observe((prompt - cached) as f64);
    }

    /// Sequences that gave a first token since start, and the seconds from arrival to it, summed.
    pub fn first_tokens(&self) -> (u64, f64) {
        (
            self.first_token.get_sample_count(),
            self.first_token.get_sample_sum(),
        )
    }

    /// A sequence gave its first token.
    pub fn observe_first_token(&self, since_arrival: Duration, since_start: Duration) {
        self.first_token.observe(since_arrival.as_secs_f64());
        self.prefill.observe(since_start.as_secs_f64());
    }

    /// A sequence gave another token.
    pub fn observe_token(&self, since_last: Duration) {
        self.inter_token.observe(since_last.as_secs_f64());
        self.time_per_output_token.observe(since_last.as_secs_f64());
    }

    /// A sequence ended.
    pub fn observe_end(&self, end: &SequenceEnd) {
        self.success.with_label_values(&[end.reason.as_str()]).inc();
        self.e2e.observe(end.since_arrival.as_secs_f64());
        self.request_generation_tokens.observe(end.generated as f64);
        if let Some(since_start) = end.since_start {
            self.inference.observe(since_start.as_secs_f64());
        }
        if let Some(decoding) = end.decoding {
            self.decode.observe(decoding.as_secs_f64());
            if end.generated > 1 {
                self.request_time_per_output_token
                    .observe(decoding.as_secs_f64() / (end.generated - 1) as f64);
            }
        }
    }

    /// A request ended; its longest choice had so many tokens.
    pub fn observe_longest_choice(&self, tokens: usize) {
        self.request_max_generation_tokens.observe(tokens as f64);
    }
}

/// How a sequence ended, for its histograms.
#[derive(Clone, Copy, Debug)]
pub struct SequenceEnd {
    pub reason: FinishReason,
    pub generated: usize,
    pub since_arrival: Duration,
    /// Absent when it never ran.
    pub since_start: Option<Duration>,
    /// First to last token; absent without a token.
    pub decoding: Option<Duration>,
}
