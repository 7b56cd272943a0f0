//! The command line.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine_load::FetchSettings;
use engine_spec::{Device, Dtype, KvCacheDtype, Quantization};
use engine_text::ToolCallParser;
use serde::Deserialize;

/// Serves models of the DeepSeek, Qwen and Llama families over the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "engine", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve a model over HTTP: health and progress at once, requests when it is ready
    Serve(Box<ServeArguments>),
    /// Check a model without loading its weights and report what it is, as JSON
    Inspect(InspectArguments),
    /// Print the memory that serving a model takes, before anything is allocated
    Plan(PlanArguments),
    /// Write a model's weights as the processors compute with them, so that serving maps instead of converting them
    Pack(PackArguments),
}

/// The fields of the engine's configuration; a flag wins over the file.
#[derive(Args, Clone, Debug, Default)]
pub struct ConfigArguments {
    /// File with the configuration (engine.json); flags win over its fields
    #[arg(long, value_name = "FILE", env = "ENGINE_CONFIG")]
    pub config: Option<PathBuf>,
    /// Directory or URI of the model: a path, file://, hf://org/name or s3://bucket/prefix
    #[arg(long, value_name = "DIR|URI", required_unless_present = "config")]
    pub model: Option<String>,
    /// Commit, tag or branch of a hub
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Device to compute on; auto is a GPU where there is one that serves the model, and the log says why it is not
    /// [default: that of the file, or auto without a file]
    #[arg(long, value_enum)]
    pub device: Option<DeviceChoice>,
    /// Driver library of the GPU [default: libcuda.so.1, where the loader finds it]
    #[arg(long, value_name = "FILE", env = "CACHALOT_CUDA_DRIVER")]
    pub cuda_driver: Option<PathBuf>,
    /// Arithmetic: auto, float32 or bfloat16 [default: auto]
    #[arg(long)]
    pub dtype: Option<Dtype>,
    /// Integers that the large matrices are made into at load, on the processors: none, int8 or int4 [default: none]
    #[arg(long)]
    pub quantization: Option<Quantization>,
    /// What keys and values are kept as: auto, or fp8 on a GPU for models with DeepSeek-V3's attention [default: auto]
    #[arg(long, value_name = "DTYPE")]
    pub kv_cache_dtype: Option<KvCacheDtype>,
    /// Longest prompt plus answer, tokens [default: the model's own, at most 8192]
    #[arg(long, value_name = "TOKENS")]
    pub max_model_len: Option<u32>,
    /// Sequences in one batch [default: 16]
    #[arg(long, value_name = "COUNT")]
    pub max_num_seqs: Option<u32>,
    /// Tokens in a block of the cache [default: 16]
    #[arg(long, value_name = "TOKENS")]
    pub block_size: Option<u32>,
    /// Tokens of one step, prefill chunks and decodes together [default: 512]
    #[arg(long, value_name = "TOKENS")]
    pub max_num_batched_tokens: Option<u32>,
    /// Tokens that the model's prediction layer (MTP) drafts for each sequence and step, 1 to 8; answers stay the same
    /// [default: 0, none]
    #[arg(long, value_name = "COUNT", conflicts_with = "speculative_config")]
    pub num_speculative_tokens: Option<u32>,
    /// Ranks that share the model, each on a device of its own: of GPUs, a process has as many as all have evenly
    /// [default: one for each process]
    #[arg(long, value_name = "COUNT")]
    pub tensor_parallel_size: Option<u32>,
    /// The same in vLLM's form: {"method": "mtp", "num_speculative_tokens": 1}
    #[arg(long, value_name = "JSON")]
    pub speculative_config: Option<SpeculativeConfig>,
    /// Where fetched models are kept.
    #[command(flatten)]
    pub cache: CacheArguments,
}

/// The directory of fetched models, which engines on one machine may share.
#[derive(Args, Clone, Debug, Default)]
pub struct CacheArguments {
    /// Where models from a hub or object store are kept; processes may share it, and each model is fetched once
    #[arg(
        long,
        value_name = "DIR",
        env = "ENGINE_CACHE_DIR",
        default_value = "/cache"
    )]
    pub cache_dir: PathBuf,
    /// Most that the cache may hold, such as 500Gi; models that no process uses make room, the longest unused first
    /// [default: no limit]
    #[arg(long, value_name = "BYTES", env = "ENGINE_CACHE_LIMIT", value_parser = parse_bytes)]
    pub cache_limit: Option<u64>,
}

impl CacheArguments {
    /// How models are fetched, with the credentials of the environment.
    pub fn settings(&self) -> FetchSettings {
        FetchSettings {
            cache_limit_bytes: self.cache_limit,
            ..FetchSettings::from_lookup(self.cache_dir.clone(), |name| std::env::var(name).ok())
        }
    }
}

/// Whole bytes, or whole units of them as Kubernetes writes units.
fn parse_bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" => Some(1),
        "Ki" => Some(1 << 10),
        "Mi" => Some(1 << 20),
        "Gi" => Some(1 << 30),
        "Ti" => Some(1_u64 << 40),
        "k" => Some(1000),
        "M" => Some(1_000_000),
        "G" => Some(1_000_000_000),
        "T" => Some(1_000_000_000_000),
        _ => None,
    };
    digits
        .parse::<u64>()
        .ok()
        .zip(unit)
        .and_then(|(number, unit)| number.checked_mul(unit))
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| "expected bytes above 0, such as 500Gi, 2T or 1000000".to_owned())
}

/// vLLM's `--speculative-config`, of which one method is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SpeculativeConfig {
    /// What drafts.
    pub method: SpeculativeMethod,
    /// Drafts of a step.
    #[serde(default = "one")]
    pub num_speculative_tokens: u32,
}

/// What drafts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub enum SpeculativeMethod {
    /// The model's own prediction layer.
    #[serde(rename = "mtp", alias = "deepseek_mtp")]
    Mtp,
}

fn one() -> u32 {
    1
}

impl FromStr for SpeculativeConfig {
    type Err = serde_json::Error;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        serde_json::from_str(text)
    }
}

/// Device asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    /// A GPU where there is one that serves the model, else the processors
    #[default]
    Auto,
    /// The processors
    Cpu,
    /// A GPU and nothing else
    #[value(alias = "nvidia")]
    Cuda,
}

impl From<Device> for DeviceChoice {
    fn from(device: Device) -> Self {
        match device {
            Device::Cpu => Self::Cpu,
            Device::Nvidia => Self::Cuda,
        }
    }
}

/// Arguments of `engine serve`.
#[derive(Args, Clone, Debug)]
pub struct ServeArguments {
    /// Shared with `plan`.
    #[command(flatten)]
    pub engine: ConfigArguments,
    /// The ranks that serve one replica together.
    #[command(flatten)]
    pub group: GroupArguments,
    /// Name that clients ask for [default: last part of the model]
    #[arg(long, value_name = "NAME")]
    pub served_model_name: Option<String>,
    /// Address to listen on [default: 0.0.0.0]
    #[arg(long)]
    pub host: Option<String>,
    /// Port to listen on [default: 8000]
    #[arg(long)]
    pub port: Option<u16>,
    /// Requests that may wait; one more is answered with 429 [default: 256]
    #[arg(long, value_name = "COUNT")]
    pub max_queued_requests: Option<u32>,
    /// Tokens that waiting requests may cost together, prompts and answers; more are answered with 429
    #[arg(long, value_name = "TOKENS", env = "ENGINE_MAX_QUEUED_TOKENS")]
    pub max_queued_tokens: Option<u32>,
    /// Longest time that a request may take, waiting included; a client's x-request-timeout may be shorter
    #[arg(long, value_name = "SECONDS", env = "ENGINE_REQUEST_TIMEOUT_SECONDS")]
    pub request_timeout_seconds: Option<u32>,
    /// File with API keys, one NAME:KEY or KEY on each line; health and metrics need none
    #[arg(long, value_name = "FILE", env = "ENGINE_API_KEY_FILE")]
    pub api_key_file: Option<PathBuf>,
    /// File with the keys that may replace weights (POST /v1/weights), in the same form; without it nobody may
    #[arg(long, value_name = "FILE", env = "ENGINE_ADMIN_KEY_FILE")]
    pub admin_key_file: Option<PathBuf>,
    /// Certificate of the server with its intermediates, PEM; with it the port speaks HTTPS only. Read again on change
    #[arg(
        long,
        alias = "ssl-certfile",
        value_name = "FILE",
        env = "ENGINE_TLS_CERT_FILE",
        requires = "tls_key_file"
    )]
    pub tls_cert_file: Option<PathBuf>,
    /// Private key of that certificate, PEM
    #[arg(
        long,
        alias = "ssl-keyfile",
        value_name = "FILE",
        env = "ENGINE_TLS_KEY_FILE",
        requires = "tls_cert_file"
    )]
    pub tls_key_file: Option<PathBuf>,
    /// Authorities whose certificates clients must show for everything that needs an API key, PEM
    #[arg(
        long,
        alias = "ssl-ca-certs",
        value_name = "FILE",
        env = "ENGINE_TLS_CLIENT_CA_FILE",
        requires = "tls_cert_file"
    )]
    pub tls_client_ca_file: Option<PathBuf>,
    /// Seconds after SIGTERM in which running requests may finish [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub drain_timeout_seconds: Option<u32>,
    /// Seconds that a failed engine keeps answering probes, so that someone can read why
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    pub failure_linger_seconds: u32,
    /// File that says why a failed engine ended, and which GPU is the cause; written where it is there already
    #[arg(long, value_name = "FILE", default_value = "/dev/termination-log")]
    pub termination_log: PathBuf,
    /// Where the weights come from
    #[arg(long, value_enum, default_value_t = LoadFormat::Auto)]
    pub load_format: LoadFormat,
    /// Check the digests of packed weights before they are served, which reads all of them once
    #[arg(long)]
    pub verify_weights: bool,
    /// Seed of random weights
    #[arg(long, value_name = "NUMBER", default_value_t = 0)]
    pub seed: u64,
    /// How the model writes calls of tools: auto, deepseek_v3, deepseek_v31, hermes, llama3_json or none
    #[arg(
        long,
        value_name = "FORMAT",
        env = "ENGINE_TOOL_CALL_PARSER",
        default_value = "auto"
    )]
    pub tool_call_parser: ToolCallParser,
    /// Form of the log
    #[arg(long, value_enum, env = "ENGINE_LOG_FORMAT", default_value_t = LogFormat::Text)]
    pub log_format: LogFormat,
}

/// The ranks that serve one replica together, each a process with its share of the weights.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Ranks")]
pub struct GroupArguments {
    /// Processes that serve the model together, each with its share of the weights
    #[arg(
        long,
        value_name = "COUNT",
        env = "ENGINE_WORLD_SIZE",
        default_value_t = 1
    )]
    pub world_size: u32,
    /// Which of them this is, from 0; rank 0 takes the requests, the others answer probes only
    #[arg(long, value_name = "NUMBER", env = "ENGINE_RANK", default_value_t = 0)]
    pub rank: u32,
    /// Where rank 0 listens for the others; on rank 0 a name means all addresses of the machine
    #[arg(long, value_name = "HOST:PORT", env = "ENGINE_LEADER")]
    pub leader: Option<String>,
    /// Seconds that all ranks may take to come, and to load their shares
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ENGINE_JOIN_TIMEOUT_SECONDS",
        default_value_t = 1800
    )]
    pub join_timeout_seconds: u32,
    /// Seconds without a word after which a rank counts as gone; all others then end
    #[arg(
        long,
        value_name = "SECONDS",
        env = "ENGINE_GROUP_TIMEOUT_SECONDS",
        default_value_t = 30
    )]
    pub group_timeout_seconds: u32,
    /// File with 16 to 4096 bytes that all ranks know: one without them cannot join
    #[arg(long, value_name = "FILE", env = "ENGINE_GROUP_SECRET_FILE")]
    pub group_secret_file: Option<PathBuf>,
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LoadFormat {
    /// The model's files
    Auto,
    /// Random numbers, for benchmarks: a local directory with a config.json is enough
    Dummy,
}

/// Form of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object a line
    Json,
}

/// Arguments of `engine inspect`.
#[derive(Args, Clone, Debug)]
pub struct InspectArguments {
    /// Directory or URI of the model
    #[arg(long, value_name = "DIR|URI")]
    pub model: String,
    /// Commit, tag or branch of a hub
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// File for the report, such as /dev/termination-log; without it the report is printed
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Arguments of `engine pack`.
#[derive(Args, Clone, Debug)]
pub struct PackArguments {
    /// Directory or URI of the model
    #[arg(long, value_name = "DIR|URI", required_unless_present = "verify")]
    pub model: Option<String>,
    /// Commit, tag or branch of a hub
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,
    /// Directory for the packed model
    #[arg(long, value_name = "DIR", required_unless_present = "verify")]
    pub output: Option<PathBuf>,
    /// Arithmetic: auto, float32 or bfloat16
    #[arg(long, default_value_t = Dtype::Auto)]
    pub dtype: Dtype,
    /// Integers that the large matrices are made into: none, int8 or int4
    #[arg(long, default_value_t = Quantization::None)]
    pub quantization: Quantization,
    /// Check the digests of a packed model instead of making one
    #[arg(long, value_name = "DIR", conflicts_with_all = ["model", "output"])]
    pub verify: Option<PathBuf>,
    /// Where fetched models are kept.
    #[command(flatten)]
    pub cache: CacheArguments,
}

/// Arguments of `engine plan`.
#[derive(Args, Clone, Debug)]
pub struct PlanArguments {
    /// Shared with `serve`. The model may also be a config.json alone.
    #[command(flatten)]
    pub engine: ConfigArguments,
    /// Memory of one device in bytes; without it the plan takes what it wants
    #[arg(long, value_name = "BYTES")]
    pub capacity_bytes: Option<u64>,
    /// Form of the plan
    #[arg(long, value_enum, default_value_t = PlanFormat::Text)]
    pub output: PlanFormat,
}

/// Form of the plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PlanFormat {
    /// A table
    Text,
    /// JSON
    Json,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vllms_form_of_speculation_is_read_and_other_methods_are_refused() {
        let read = |text: &str| text.parse::<SpeculativeConfig>();
        let count = |text: &str| read(text).unwrap().num_speculative_tokens;
        assert_eq!(
            count(r#"{"method": "mtp", "num_speculative_tokens": 3}"#),
            3
        );
        assert_eq!(count(r#"{"method": "deepseek_mtp"}"#), 1);
        let error = read(r#"{"method": "ngram", "num_speculative_tokens": 3}"#).unwrap_err();
        assert!(
            error.to_string().contains("unknown variant `ngram`"),
            "{error}"
        );
        let error = read(r#"{"method": "mtp", "model": "x"}"#).unwrap_err();
        assert!(
            error.to_string().contains("unknown field `model`"),
            "{error}"
        );
    }

    #[test]
    fn both_flags_of_speculation_at_once_are_refused() {
        let arguments = [
            "engine",
            "plan",
            "--model",
            "x",
            "--num-speculative-tokens",
            "1",
        ];
        Cli::try_parse_from(arguments).unwrap();
        let both = [
            &arguments[..],
            &["--speculative-config", r#"{"method": "mtp"}"#],
        ]
        .concat();
        let error = Cli::try_parse_from(both).unwrap_err();
        assert!(error.to_string().contains("cannot be used with"), "{error}");
    }
}
