//! Weights for `POST /v1/weights`: fetched, compared with what serves, verified, and loaded beside it.
//!
//! Invariant: both versions are in memory at once for a moment, so the memory plan of the serving engine stays as it is
//! and the second set of weights is refused before it is read when there is no room for it. Beside a GPU that is host
//! memory: the second version waits there and the exchange swaps both.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use engine_core::StagedWeights;
use engine_cpu::{CpuExecutor, CpuLimits};
use engine_cuda::{CudaExecutor, CudaLimits};
use engine_load::{FetchSettings, LoadError, Local, Progress, content_digest, read_config};
use engine_memory::MemoryPlan;
use engine_server::{
    LoadFailure, LoadedWeights, UpdateHandle, WeightsLoader, WeightsOrigin, WeightsSource,
};
use engine_spec::{EngineConfig, ModelConfig};

use crate::load::{Weights, available_bytes, bytes_of, failure, fetch, from_load_error};

/// What serves.
pub struct Serving {
    pub model: ModelConfig,
    pub plan: MemoryPlan,
    pub directory: PathBuf,
    pub is_cpu: bool,
}

/// Where the weights of an engine came from, and how others can take their place.
pub fn origin(
    config: &EngineConfig,
    weights: Weights,
    serving: Serving,
    settings: &FetchSettings,
) -> WeightsOrigin {
    let source = WeightsSource {
        source: config.model.source.clone(),
        revision: config.model.revision.clone(),
        digest: None,
    };
    let ranks = serving.plan.ranks;
    let loader = match weights {
        Weights::Random(_) => Err("they are random numbers (--load-format dummy)".to_owned()),
        Weights::Files if ranks > 1 => Err(format!(
            "{ranks} ranks share the model, and weights are replaced in an engine of one rank only"
        )),
        Weights::Files => {
            let Serving { model, plan, .. } = &serving;
            let (sequences, tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
            let limits = match serving.is_cpu {
                true => Backend::Cpu(CpuLimits::from_plan(plan, sequences, tokens)),
                false => Backend::Cuda(CudaLimits::from_plan(model, plan, sequences, tokens)),
            };
            let settings = settings.clone();
            // The last replacement stays in the cache; those before it need not.
            let replacement = Mutex::new(None);
            let loader: WeightsLoader = Arc::new(move |source, update| {
                let (local, loaded) = load(&serving, &limits, &settings, source, update)?;
                if let Ok(mut replacement) = replacement.lock() {
                    *replacement = Some(local);
                }
                Ok(loaded)
            });
            Ok(loader)
        }
    };
    WeightsOrigin { source, loader }
}

/// Whose form the weights take.
enum Backend {
    Cpu(CpuLimits),
    Cuda(CudaLimits),
}

impl Backend {
    fn stage(
        &self,
        directory: &Path,
        model: &ModelConfig,
        progress: &Progress,
    ) -> Result<StagedWeights, LoadError> {
        match self {
            Self::Cpu(limits) => CpuExecutor::stage(directory, model, limits, progress),
            Self::Cuda(limits) => CudaExecutor::stage(directory, model, limits, progress),
        }
    }
}

fn load(
    serving: &Serving,
    backend: &Backend,
    settings: &FetchSettings,
    source: &WeightsSource,
    update: &UpdateHandle,
) -> Result<(Local, LoadedWeights), LoadFailure> {
    let progress = Arc::new(Progress::default());
    update.enter("fetching", bytes_of(&progress));
    let revision = source.revision.as_deref();
    let directory = fetch(&source.source, revision, settings, &progress)?;
    let model = read_config(&directory).map_err(|error| from_load_error(&error))?;
    check_same_model(serving, &model, &directory)?;
    check_room(serving.plan.per_rank.weights_bytes, free_bytes())?;
    update.enter("verifying", bytes_of(&progress));
    let digest = content_digest(&directory, &progress).map_err(|error| from_load_error(&error))?;
    if let Some(expected) = source
        .digest
        .as_ref()
        .filter(|expected| **expected != digest)
    {
        let message = format!(
            "digest = {expected}, but the weight files of {} have {digest}; send the digest of these files, or mend them",
            source.source
        );
        return Err(failure("WeightsMismatch", message));
    }
    update.enter("loading", bytes_of(&progress));
    let weights = backend
        .stage(&directory, &serving.model, &progress)
        .map_err(|error| from_load_error(&error))?;
    Ok((directory, LoadedWeights { weights, digest }))
}

/// The same shapes, and the same meaning of every token.
fn check_same_model(
    serving: &Serving,
    model: &ModelConfig,
    directory: &Path,
) -> Result<(), LoadFailure> {
    let differs = |what: String| {
        let message = format!(
            "{}: {what}; weights are replaced by weights of the same model only, start another engine for this one",
            directory.display()
        );
        Err(failure("ModelConfigInvalid", message))
    };
    if *model != serving.model {
        let fields = |model: &ModelConfig| match serde_json::to_value(model) {
            Ok(serde_json::Value::Object(fields)) => fields,
            _ => serde_json::Map::new(),
        };
        let (here, there) = (fields(&serving.model), fields(model));
        let field = here
            .iter()
            .find(|(name, value)| there.get(*name) != Some(*value));
        return differs(match field {
            Some((name, value)) => {
                let found = there.get(name).unwrap_or(&serde_json::Value::Null);
                format!("{name} of config.json is {found}, but {value} serves")
            }
            None => "config.json differs from the one that serves".to_owned(),
        });
    }
    let tokenizer = |directory: &Path| std::fs::read(directory.join("tokenizer.json")).ok();
    match (tokenizer(&serving.directory), tokenizer(directory)) {
        (Some(here), Some(there)) if here != there => {
            differs("tokenizer.json differs from the one that serves".to_owned())
        }
        _ => Ok(()),
    }
}

/// Both versions must fit.
fn check_room(needed: u64, free: Option<u64>) -> Result<(), LoadFailure> {
    match free {
        Some(free) if free < needed => {
            let message = format!(
                "the new weights need {needed} bytes of host memory beside those in use and {free} are free; \
                 raise the memory limit by {} bytes, or start another replica",
                needed - free
            );
            Err(failure("DoesNotFit", message))
        }
        _ => Ok(()),
    }
}

/// Bytes that this process may still allocate: of its control group and of the machine, the lesser. Pages of files do
/// not count as used, since the kernel gives them up.
fn free_bytes() -> Option<u64> {
    let number = |path: &str, name: &str| {
        let text = std::fs::read_to_string(path).ok()?;
        let line = text
            .lines()
            .find(|line| line.split_whitespace().next() == Some(name))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let anonymous = number("/sys/fs/cgroup/memory.stat", "anon");
    let group = available_bytes()
        .zip(anonymous)
        .map(|(limit, used)| limit.saturating_sub(used));
    let machine = number("/proc/meminfo", "MemAvailable:").map(|kib| kib * 1024);
    group.into_iter().chain(machine).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_for_both_versions_is_counted_before_anything_is_read() {
        assert_eq!(check_room(100, Some(100)), Ok(()));
        assert_eq!(check_room(100, None), Ok(()));
        let error = check_room(100, Some(60)).unwrap_err();
        assert_eq!(error.reason, "DoesNotFit");
        assert!(
            error.message.contains("need 100 bytes of host memory")
                && error.message.contains("60 are free")
                && error.message.contains("by 40 bytes"),
            "{}",
            error.message
        );
        assert!(free_bytes().is_some_and(|bytes| bytes > 0));
    }
}
