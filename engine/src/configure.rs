//! From file and flags to one checked configuration.

use anyhow::Context;
use engine_spec::{Device, EngineConfig};

use crate::cli::{ConfigArguments, DeviceChoice, ServeArguments};

/// The configuration that `arguments` describe, not checked yet.
fn base(arguments: &ConfigArguments) -> anyhow::Result<EngineConfig> {
    let mut config = match &arguments.config {
        Some(file) => {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("--config {} cannot be read", file.display()))?;
            EngineConfig::from_json(&text)
                .with_context(|| format!("--config {}", file.display()))?
        }
        None => EngineConfig::for_source(arguments.model.clone().unwrap_or_default()),
    };
    if let Some(model) = &arguments.model {
        config.model.source = model.clone();
    }
    if arguments.revision.is_some() {
        config.model.revision = arguments.revision.clone();
    }
    match device(arguments, &config) {
        DeviceChoice::Cpu => config.device = Device::Cpu,
        DeviceChoice::Cuda => config.device = Device::Nvidia,
        DeviceChoice::Auto => {}
    }
    set(&mut config.dtype, arguments.dtype);
    set(&mut config.quantization, arguments.quantization);
    set(&mut config.kv_cache_dtype, arguments.kv_cache_dtype);
    set(&mut config.max_num_seqs, arguments.max_num_seqs);
    set(&mut config.block_size, arguments.block_size);
    set(
        &mut config.max_num_batched_tokens,
        arguments.max_num_batched_tokens,
    );
    let drafts = arguments
        .speculative_config
        .map(|config| config.num_speculative_tokens);
    set(
        &mut config.num_speculative_tokens,
        drafts.or(arguments.num_speculative_tokens),
    );
    set(
        &mut config.parallelism.tensor,
        arguments.tensor_parallel_size,
    );
    config.max_model_len = arguments.max_model_len.or(config.max_model_len);
    Ok(config)
}

/// The device asked for: by the flag, by the file, or any.
pub fn device(arguments: &ConfigArguments, config: &EngineConfig) -> DeviceChoice {
    match (arguments.device, &arguments.config) {
        (Some(choice), _) => choice,
        (None, Some(_)) => config.device.into(),
        (None, None) => DeviceChoice::Auto,
    }
}

fn set<T>(field: &mut T, flag: Option<T>) {
    if let Some(value) = flag {
        *field = value;
    }
}

/// The configuration of `engine plan`.
pub fn for_plan(arguments: &ConfigArguments) -> anyhow::Result<EngineConfig> {
    let config = base(arguments)?;
    config.check()?;
    Ok(config)
}

/// The configuration of `engine serve`.
pub fn for_serve(arguments: &ServeArguments) -> anyhow::Result<EngineConfig> {
    let mut config = base(&arguments.engine)?;
    if arguments.served_model_name.is_some() {
        config.served_model_name = arguments.served_model_name.clone();
    }
    set(&mut config.host, arguments.host.clone());
    set(&mut config.port, arguments.port);
    set(
        &mut config.max_queued_requests,
        arguments.max_queued_requests,
    );
    set(
        &mut config.drain_timeout_seconds,
        arguments.drain_timeout_seconds,
    );
    config.check()?;
    Ok(config)
}
