//! Which device serves a model, and why.
//!
//! A GPU that was asked for is never replaced by the processors: a fleet that was sized for GPUs would answer a hundred
//! times slower and look healthy. Only `auto` falls back, and the log has one line that says why.

use std::fmt::Display;
use std::path::Path;
use std::str::FromStr;

use engine_cuda::{CudaExecutor, CudaLimits, Gpu, refusal};
use engine_memory::{MemoryRequest, memory_plan};
use engine_spec::{Device, EngineConfig, ModelConfig, Rank};

use crate::cli::DeviceChoice;

/// What there is to compute on.
pub enum Found {
    /// The processors, and why not a GPU.
    Cpu(String),
    /// A GPU.
    Gpu(Gpu),
}

/// Looks for a GPU unless the processors were asked for.
///
/// # Errors
/// One was asked for and there is none: why.
pub fn find(choice: DeviceChoice, driver: Option<&Path>) -> Result<Found, String> {
    if choice == DeviceChoice::Cpu {
        return Ok(Found::Cpu("the device cpu was asked for".into()));
    }
    match Gpu::open(driver, 0) {
        Ok(gpu) => Ok(Found::Gpu(as_asked(gpu)?)),
        Err(error) => fall_back(choice, error.to_string()),
    }
}

/// Another GPU of this process.
///
/// # Errors
/// There is none of this number, or it cannot be used: why.
pub fn another(driver: Option<&Path>, ordinal: u32) -> Result<Found, String> {
    let gpu = Gpu::open(driver, ordinal).map_err(|error| {
        format!(
            "parallelism gives each GPU of this process a rank, and GPU {ordinal} cannot be used: {error}; give the \
             process more GPUs, or ask for fewer ranks"
        )
    })?;
    Ok(Found::Gpu(as_asked(gpu)?))
}

/// Forces the kernels of latent attention: `auto`, `portable` or `hopper`.
const ATTENTION: &str = "CACHALOT_CUDA_ATTENTION";
/// Forces the way that ranks exchange: `auto`, `host` or `nccl`.
const EXCHANGE: &str = "CACHALOT_CUDA_EXCHANGE";

fn as_asked(gpu: Gpu) -> Result<Gpu, String> {
    let gpu = gpu.with_attention(asked(ATTENTION)?);
    Ok(gpu.with_exchange(asked(EXCHANGE)?, None))
}

/// The choice that a variable names.
fn asked<T>(variable: &str) -> Result<T, String>
where
    T: Default + FromStr<Err: Display>,
{
    match std::env::var(variable) {
        Ok(name) => name.parse().map_err(|error| format!("{variable}: {error}")),
        Err(_) => Ok(T::default()),
    }
}

/// Keeps a GPU that serves the model; says in the log what is used and why.
///
/// # Errors
/// The GPU was asked for and does not serve the model: why.
pub fn settle(
    found: Found,
    choice: DeviceChoice,
    config: &EngineConfig,
    model: &ModelConfig,
    rank: Rank,
) -> Result<Found, String> {
    let settled = match found {
        Found::Gpu(gpu) => match unserved(config, model, rank) {
            Some(why) => fall_back(choice, why)?,
            None => Found::Gpu(gpu),
        },
        cpu @ Found::Cpu(_) => cpu,
    };
    match &settled {
        Found::Cpu(reason) => tracing::info!(device = "cpu", reason, "device chosen"),
        Found::Gpu(gpu) => {
            let (major, minor) = gpu.capability();
            let capability = format!("{major}.{minor}");
            let reason = match choice {
                DeviceChoice::Cuda => "a GPU was asked for",
                DeviceChoice::Auto | DeviceChoice::Cpu => "it serves this model",
            };
            tracing::info!(
                device = "cuda",
                name = gpu.name(),
                capability,
                products = %gpu.products(),
                reason,
                "device chosen"
            );
            if let Some(reason) = gpu.fallback() {
                tracing::warn!(reason, "hopper products are not used");
            }
        }
    }
    Ok(settled)
}

fn fall_back(choice: DeviceChoice, why: String) -> Result<Found, String> {
    match choice {
        DeviceChoice::Cuda => Err(format!(
            "device = nvidia, and no GPU serves this model: {why}. Mend that, or set device to cpu (--device cpu, or \
             spec.accelerator.type: cpu)"
        )),
        DeviceChoice::Auto | DeviceChoice::Cpu => Ok(Found::Cpu(why)),
    }
}

/// Why the GPU backend does not serve a rank's share of a model, its memory aside.
fn unserved(config: &EngineConfig, model: &ModelConfig, rank: Rank) -> Option<String> {
    let request = MemoryRequest {
        device: Device::Nvidia,
        ..MemoryRequest::from_engine_config(config, None)
    };
    let plan = match memory_plan(model, &request) {
        Ok(plan) => plan,
        Err(misfit) => return Some(misfit.to_string()),
    };
    let limits = CudaLimits::from_plan(
        model,
        &plan,
        config.max_num_seqs,
        config.max_num_batched_tokens,
    );
    CudaExecutor::check(model, &limits, rank)
        .err()
        .map(|reason| refusal(&reason))
}
