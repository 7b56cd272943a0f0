//! Which device serves a model, and why.
//!
//! A GPU that was asked for is never replaced by the processors: a fleet that was sized for GPUs would answer a hundred
//! times slower and look healthy. Only `auto` falls back, and the log has one line that says why.

use std::fmt::Display;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::str::FromStr;

use engine_cuda::{
    ATTENTION_VARIABLE, CudaError, CudaExecutor, CudaLimits, Gpu, Opened, PRODUCTS_VARIABLE,
    refusal,
};
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
pub fn find(choice: DeviceChoice, driver: Option<&Path>, opened: &Opened) -> Result<Found, String> {
    if choice == DeviceChoice::Cpu {
        return Ok(Found::Cpu("the device cpu was asked for".into()));
    }
    match opened.open(driver, 0).map_err(without_trial) {
        Ok(gpu) => Ok(Found::Gpu(as_asked(gpu)?)),
        Err(error) => fall_back(choice, error.to_string()),
    }
}

/// Starts this program anew, with portable kernels, where one that was tried holds the device: only its process's end frees
/// it. Anything else is given back.
fn without_trial(error: CudaError) -> CudaError {
    let CudaError::Hung(why) = &error else {
        return error;
    };
    tracing::warn!(reason = why, "starting anew with portable kernels");
    let mut arguments = std::env::args_os();
    let mut anew = Command::new("/proc/self/exe");
    if let Some(name) = arguments.next() {
        anew.arg0(name);
    }
    anew.args(arguments);
    anew.envs([ATTENTION_VARIABLE, PRODUCTS_VARIABLE].map(|variable| (variable, "portable")));
    // Comes back only where it fails.
    let failed = anew.exec();
    tracing::error!(error = %failed, "this program cannot be started anew");
    error
}

/// Another GPU of this process.
///
/// # Errors
/// There is none of this number, or it cannot be used: why.
pub fn another(driver: Option<&Path>, ordinal: u32, opened: &Opened) -> Result<Found, String> {
    let gpu = opened.open(driver, ordinal).map_err(without_trial);
    let gpu = gpu.map_err(|error| {
        format!(
            "parallelism gives each GPU of this process a rank, and GPU {ordinal} cannot be used: {error}; give the \
             process more GPUs, or ask for fewer ranks"
        )
    })?;
    Ok(Found::Gpu(as_asked(gpu)?))
}

/// Forces the way that ranks exchange: `auto`, `host` or `nccl`.
const EXCHANGE: &str = "CACHALOT_CUDA_EXCHANGE";

fn as_asked(gpu: Gpu) -> Result<Gpu, String> {
    let gpu = gpu.with_attention(asked(ATTENTION_VARIABLE)?);
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
        Found::Gpu(gpu) => match served(&gpu, config, model, rank) {
            Err(why) => fall_back(choice, why)?,
            Ok(()) => Found::Gpu(gpu),
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
                uuid = gpu.uuid(),
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

/// Whether the GPU backend serves a rank's share of a model, its memory aside, and if not, why. Kernels are tried here.
fn served(gpu: &Gpu, config: &EngineConfig, model: &ModelConfig, rank: Rank) -> Result<(), String> {
    let request = MemoryRequest {
        device: Device::Nvidia,
        ..MemoryRequest::from_engine_config(config, None)
    };
    let plan = memory_plan(model, &request).map_err(|misfit| misfit.to_string())?;
    let limits = CudaLimits::from_plan(
        model,
        &plan,
        config.max_num_seqs,
        config.max_num_batched_tokens,
    );
    CudaExecutor::check(model, &limits, rank).map_err(|reason| refusal(&reason))?;
    let tried = gpu.try_kernels(model, &limits, rank);
    tried.map_err(|error| without_trial(error).to_string())
}
