//! `engine plan`: bytes before they are allocated.

use std::path::Path;

use anyhow::Context;
use engine_cuda::Gpu;
use engine_memory::{MemoryRequest, memory_plan};
use engine_spec::{Device, EngineConfig, ModelConfig};

use crate::cli::{DeviceChoice, PlanArguments, PlanFormat};
use crate::configure;

/// Prints the plan.
pub fn run(arguments: &PlanArguments) -> anyhow::Result<()> {
    let mut config = configure::for_plan(&arguments.engine)?;
    if configure::device(&arguments.engine, &config) == DeviceChoice::Auto {
        let driver = arguments.engine.cuda_driver.as_deref();
        config.device = match Gpu::open(driver, 0) {
            Ok(_) => Device::Nvidia,
            Err(_) => Device::Cpu,
        };
    }
    let model = model_config(arguments, &config)?;
    let request = MemoryRequest::from_engine_config(&config, arguments.capacity_bytes);
    let plan = memory_plan(&model, &request)?;
    match arguments.output {
        PlanFormat::Text => println!("{plan}"),
        PlanFormat::Json => println!("{}", serde_json::to_string_pretty(&plan)?),
    }
    Ok(())
}

fn model_config(arguments: &PlanArguments, config: &EngineConfig) -> anyhow::Result<ModelConfig> {
    let source = &config.model.source;
    let path = Path::new(source.strip_prefix("file://").unwrap_or(source));
    if path.is_file() {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("--model {source} cannot be read"))?;
        return ModelConfig::from_hf_json(&text).with_context(|| format!("--model {source}"));
    }
    let settings = arguments.engine.cache.settings();
    let revision = config.model.revision.as_deref();
    Ok(engine_load::source_config(source, revision, &settings)?)
}
