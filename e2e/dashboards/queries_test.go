package dashboards

// query is what somebody asks of an engine, in our spelling: the series, labels and functions are theirs.
type query struct {
	who  string
	expr string
}

const (
	vllmService   = "vLLM, service status"
	vllmOverview  = "vLLM, overview"
	vllmInstances = "vLLM, instances"
	vllmCache     = "vLLM, KV cache"
	vllmGrafana   = "vLLM 0.33, Grafana"
	stack         = "production-stack, dashboards"
	stackScaling  = "production-stack, KEDA and Prometheus adapter"
	kserve        = "KServe, KEDA"
	llmdScaling   = "llm-d, workload variant autoscaler"
	picker        = "endpoint picker of the Gateway API inference extension"
	aibrix        = "AIBrix, pod autoscaler"
)

const all = `job=~"engine.*", model_name=~"toy|other", instance=~".+", engine=~".*"`

var queries = []query{
	{vllmService, `2 - (max(vllm:engine_sleep_state{sleep_state="awake", job=~".+", model_name=~".+"}) == bool 0)`},
	{vllmService, `histogram_quantile(0.5, sum by (le) (rate(vllm:time_to_first_token_seconds_bucket{model_name="toy"}[1m])))`},
	{vllmService, `sum(rate(vllm:generation_tokens_total{model_name="toy"}[1m]))`},
	{vllmService, `1 - sum(rate(vllm:request_success_total{finished_reason="error"}[1m])) / (sum(rate(vllm:request_success_total[1m])) > 0)`},
	{vllmService, `sum(avg_over_time(vllm:num_requests_running{model_name="toy"}[1m]))`},
	{vllmOverview, `sum(rate(vllm:request_success_total{` + all + `}[1m]))`},
	{vllmOverview, `sum(rate(vllm:prompt_tokens_total{` + all + `}[1m]))`},
	{vllmOverview, `sum by (status) (rate(http_requests_total{job="engine", status="4xx"}[1m]))`},
	{vllmOverview, `sum by (handler, method) (rate(http_requests_total{job="engine", status="2xx"}[1m]))`},
	{vllmOverview, `histogram_quantile(0.95, sum by (le) (rate(vllm:inter_token_latency_seconds_bucket{` + all + `}[1m])))`},
	{vllmOverview, `histogram_quantile(0.95, sum by (le) (rate(vllm:e2e_request_latency_seconds_bucket{` + all + `}[1m])))`},
	{vllmOverview, `sum by (finished_reason) (increase(vllm:request_success_total{` + all + `}[1m]))`},
	{vllmOverview, `sum by (reason) (rate(vllm:admission_rejections_total{` + all + `}[1m]))`},
	{vllmOverview, `count(up{job="engine"} == 1)`},
	{vllmInstances, `count by (model_name, instance) (vllm:num_requests_running{` + all + `})`},
	{vllmInstances, `sum by (model_name, instance) (vllm:num_requests_waiting{` + all + `})`},
	{vllmInstances, `sum by (model_name, instance) (rate(vllm:num_preemptions_total{` + all + `}[1m]))`},
	{vllmInstances, `max by (model_name, instance) ((time() - process_start_time_seconds{job="engine"}) * on (job, instance)` +
		` group_left (model_name) group by (job, instance, model_name) (vllm:num_requests_running{` + all + `}))`},
	{vllmInstances, `process_resident_memory_bytes{job="engine"}`},
	{vllmInstances, `rate(process_cpu_seconds_total{job="engine"}[1m])`},
	{vllmInstances, `sum by (le) (increase(vllm:iteration_tokens_total_bucket{` + all + `}[1m]))`},
	{vllmCache, `max(vllm:kv_cache_usage_perc{` + all + `})`},
	{vllmCache, `sum(rate(vllm:prefix_cache_hits_total{` + all + `}[1m])) / (sum(rate(vllm:prefix_cache_queries_total{` + all + `}[1m])) > 0)`},
	{vllmCache, `sum(rate(vllm:prompt_tokens_cached_total[1m])) / (sum(rate(vllm:prompt_tokens_total[1m])) > 0)`},
	{vllmCache, `sum(vllm:num_requests_waiting_by_reason{reason="capacity"})`},
	{vllmCache, `sum(vllm:num_requests_waiting_by_reason{reason="deferred"})`},
	{vllmCache, `sum by (source) (rate(vllm:prompt_tokens_by_source_total{source=~"local_.+"}[1m]))`},
	{vllmCache, `sum(rate(vllm:prompt_tokens_recomputed_total[1m]))`},
	{vllmCache, `histogram_quantile(0.5, sum by (le) (rate(vllm:request_prefill_kv_computed_tokens_bucket[1m])))`},
	{vllmCache, `max by (block_size, num_gpu_blocks, enable_prefix_caching) (vllm:cache_config_info)`},
	{vllmGrafana, `rate(vllm:e2e_request_latency_seconds_sum{model_name="toy"}[1m]) / rate(vllm:e2e_request_latency_seconds_count{model_name="toy"}[1m])`},
	{vllmGrafana, `histogram_quantile(0.99, sum by (le) (rate(vllm:request_time_per_output_token_seconds_bucket{model_name="toy"}[1m])))`},
	{vllmGrafana, `rate(vllm:request_queue_time_seconds_sum{model_name="toy"}[1m])`},
	{vllmGrafana, `rate(vllm:request_prefill_time_seconds_sum{model_name="toy"}[1m])`},
	{vllmGrafana, `rate(vllm:request_decode_time_seconds_sum{model_name="toy"}[1m])`},
	{vllmGrafana, `rate(vllm:request_inference_time_seconds_sum{model_name="toy"}[1m])`},
	{vllmGrafana, `rate(vllm:request_max_num_generation_tokens_sum{model_name="toy"}[1m])`},
	{vllmGrafana, `sum by (le) (increase(vllm:request_prompt_tokens_bucket{model_name="toy"}[1m]))`},
	{vllmGrafana, `sum by (le) (increase(vllm:request_generation_tokens_bucket{model_name="toy"}[1m]))`},
	{vllmGrafana, `sum by (le) (increase(vllm:request_params_n_bucket[1m]))`},
	{vllmGrafana, `sum by (le) (increase(vllm:request_params_max_tokens_bucket[1m]))`},
	{vllmGrafana, `rate(vllm:iteration_tokens_total_count[1m])`},
	{vllmGrafana, `sum(rate(vllm:corrupted_requests_total[1m]))`},
	{stack, `avg(vllm:e2e_request_latency_seconds_sum) / avg(vllm:e2e_request_latency_seconds_count)`},
	{stack, `sum by (le) (vllm:time_to_first_token_seconds_bucket)`},
	{stack, `avg(vllm:request_time_per_output_token_seconds_sum) / avg(vllm:request_time_per_output_token_seconds_count)`},
	{stack, `rate(vllm:time_per_output_token_seconds_sum[1m]) / rate(vllm:time_per_output_token_seconds_count[1m])`},
	{stackScaling, `vllm:num_requests_waiting`},
	{stackScaling, `sum by (job) (vllm:num_requests_waiting)`},
	{kserve, `sum(vllm:num_requests_running{model_name="toy"}) + sum(vllm:num_requests_waiting{model_name="toy"})`},
	{kserve, `avg(vllm:kv_cache_usage_perc{model_name="toy"})`},
	{llmdScaling, `max_over_time(vllm:kv_cache_usage_perc[1m])`},
	{llmdScaling, `max_over_time(vllm:num_requests_waiting[1m])`},
	{llmdScaling, `sum(rate(vllm:request_generation_tokens_sum[1m])) / sum(rate(vllm:request_generation_tokens_count[1m]))`},
	{llmdScaling, `sum(rate(vllm:request_prompt_tokens_sum[1m])) / sum(rate(vllm:request_prompt_tokens_count[1m]))`},
	{llmdScaling, `sum(rate(vllm:time_to_first_token_seconds_sum[1m])) / sum(rate(vllm:time_to_first_token_seconds_count[1m]))`},
	{llmdScaling, `histogram_quantile(0.9, sum by (le) (rate(vllm:inter_token_latency_seconds_bucket[1m])))`},
	{llmdScaling, `sum(increase(vllm:request_success_total[1m]))`},
	{llmdScaling, `vllm:cache_config_info{block_size=~"[0-9]+", num_gpu_blocks=~"[0-9]+"}`},
	{picker, `vllm:num_requests_running`},
	{picker, `vllm:kv_cache_usage_perc >= 0 <= 1`},
	{aibrix, `vllm:num_requests_running{model_name="toy"}`},
}

// Series that no engine gives out any more, or never did; published dashboards still ask for them.
var notOfAnEngine = map[string]string{
	"vllm:healthy_pods_total":             "production-stack's router",
	"vllm:current_qps":                    "production-stack's router",
	"router_cpu_usage_percent":            "production-stack's router",
	"router_memory_usage_percent":         "production-stack's router",
	"router_disk_usage_percent":           "production-stack's router",
	"vllm:gpu_prefix_cache_hits_total":    "vLLM V0; vllm:prefix_cache_hits_total now",
	"vllm:gpu_prefix_cache_queries_total": "vLLM V0; vllm:prefix_cache_queries_total now",
}
