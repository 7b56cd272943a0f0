//! Every metric name an engine exposes, spelled once.
//!
//! The `vllm:` names, types, labels and buckets are those of vLLM V1, so that existing dashboards,
//! autoscalers and endpoint pickers read our engines unchanged. Counters carry `_total` here
//! because the exposition library does not add it.

/// Label: the served model name.
pub const LABEL_MODEL_NAME: &str = "model_name";
/// Label: index of the engine in its replica; always "0" so far.
pub const LABEL_ENGINE: &str = "engine";
/// Label of [`REQUEST_SUCCESS`]: `stop`, `length`, `abort` or `error`.
pub const LABEL_FINISHED_REASON: &str = "finished_reason";

/// Gauge: sequences in the running batch.
pub const NUM_REQUESTS_RUNNING: &str = "vllm:num_requests_running";
/// Gauge: requests admitted but not yet running.
pub const NUM_REQUESTS_WAITING: &str = "vllm:num_requests_waiting";
/// Gauge: share of KV blocks in use, 0 to 1.
pub const KV_CACHE_USAGE: &str = "vllm:kv_cache_usage_perc";
/// Info gauge: `block_size`, `num_gpu_blocks` as labels.
pub const CACHE_CONFIG_INFO: &str = "vllm:cache_config_info";

/// Counter: prompt tokens looked up in the prefix cache.
pub const PREFIX_CACHE_QUERIES: &str = "vllm:prefix_cache_queries_total";
/// Counter: prompt tokens found there.
pub const PREFIX_CACHE_HITS: &str = "vllm:prefix_cache_hits_total";
/// Counter: sequences that gave their blocks back.
pub const NUM_PREEMPTIONS: &str = "vllm:num_preemptions_total";
/// Counter: prompt tokens processed.
pub const PROMPT_TOKENS: &str = "vllm:prompt_tokens_total";
/// Counter: tokens generated.
pub const GENERATION_TOKENS: &str = "vllm:generation_tokens_total";
/// Counter by `finished_reason`.
pub const REQUEST_SUCCESS: &str = "vllm:request_success_total";
/// Counter by `reason`: requests refused at the door.
pub const ADMISSION_REJECTIONS: &str = "vllm:admission_rejections_total";

/// Counter: decoding sequences' steps that verified drafts.
pub const SPEC_DECODE_NUM_DRAFTS: &str = "vllm:spec_decode_num_drafts_total";
/// Counter: drafted tokens that were verified.
pub const SPEC_DECODE_NUM_DRAFT_TOKENS: &str = "vllm:spec_decode_num_draft_tokens_total";
/// Counter: drafted tokens that were accepted.
pub const SPEC_DECODE_NUM_ACCEPTED_TOKENS: &str = "vllm:spec_decode_num_accepted_tokens_total";
/// Counter by [`LABEL_POSITION`]: drafted tokens that were accepted.
pub const SPEC_DECODE_NUM_ACCEPTED_TOKENS_PER_POS: &str =
    "vllm:spec_decode_num_accepted_tokens_per_pos_total";
/// Label of [`SPEC_DECODE_NUM_ACCEPTED_TOKENS_PER_POS`]: place among the drafts of a step, from 0.
pub const LABEL_POSITION: &str = "position";

/// Histogram: prompt tokens per request.
pub const REQUEST_PROMPT_TOKENS: &str = "vllm:request_prompt_tokens";
/// Histogram: generated tokens per request.
pub const REQUEST_GENERATION_TOKENS: &str = "vllm:request_generation_tokens";
/// Histogram: the request's `max_tokens`.
pub const REQUEST_PARAMS_MAX_TOKENS: &str = "vllm:request_params_max_tokens";
/// Histogram: the request's `n`.
pub const REQUEST_PARAMS_N: &str = "vllm:request_params_n";
/// Histogram: tokens per step.
pub const ITERATION_TOKENS: &str = "vllm:iteration_tokens_total";
/// Histogram: arrival to first token.
pub const TIME_TO_FIRST_TOKEN: &str = "vllm:time_to_first_token_seconds";
/// Histogram: between two tokens of one sequence.
pub const INTER_TOKEN_LATENCY: &str = "vllm:inter_token_latency_seconds";
/// Histogram: mean of the above over a request.
pub const REQUEST_TIME_PER_OUTPUT_TOKEN: &str = "vllm:request_time_per_output_token_seconds";
/// Histogram: arrival to last token.
pub const E2E_REQUEST_LATENCY: &str = "vllm:e2e_request_latency_seconds";
/// Histogram: arrival to first step.
pub const REQUEST_QUEUE_TIME: &str = "vllm:request_queue_time_seconds";
/// Histogram: first step to last token.
pub const REQUEST_INFERENCE_TIME: &str = "vllm:request_inference_time_seconds";
/// Histogram: first step to first token.
pub const REQUEST_PREFILL_TIME: &str = "vllm:request_prefill_time_seconds";
/// Histogram: first token to last token.
pub const REQUEST_DECODE_TIME: &str = "vllm:request_decode_time_seconds";

/// Buckets of [`TIME_TO_FIRST_TOKEN`], seconds.
pub const BUCKETS_FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
];
/// Buckets of [`INTER_TOKEN_LATENCY`] and [`REQUEST_TIME_PER_OUTPUT_TOKEN`], seconds.
pub const BUCKETS_TOKEN_LATENCY: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
];
/// Buckets of the request-long histograms, seconds.
pub const BUCKETS_REQUEST_LATENCY: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
];
/// Buckets of [`ITERATION_TOKENS`].
pub const BUCKETS_ITERATION_TOKENS: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
/// Buckets of [`REQUEST_PARAMS_N`].
pub const BUCKETS_PARAMS_N: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];

/// Buckets of the per-request token histograms: 1, 2, 5, 10, … up to `max_model_len`.
pub fn buckets_tokens(max_model_len: u32) -> Vec<f64> {
    let mut buckets = Vec::new();
    let mut decade = 1u64;
    loop {
        for step in [1, 2, 5] {
            let value = decade * step;
            if value > u64::from(max_model_len) {
                return buckets;
            }
            buckets.push(value as f64);
        }
        decade *= 10;
    }
}

#[cfg(test)]
mod tests {
    use super::buckets_tokens;

    #[test]
    fn token_buckets_end_at_the_context_length() {
        assert_eq!(buckets_tokens(50), [1.0, 2.0, 5.0, 10.0, 20.0, 50.0]);
        assert_eq!(buckets_tokens(8192).last(), Some(&5000.0));
    }
}
