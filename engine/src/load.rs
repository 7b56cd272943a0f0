//! From a configuration to a model in memory: fetch, plan, read the text side, load the weights.
//!
//! The plan comes before the first allocation and refuses what does not fit; when the pod was sized by a plan, the two
//! must agree.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine_core::{Executor, Limits};
use engine_cpu::{CpuExecutor, CpuLimits, available_threads};
use engine_cuda::{CudaExecutor, CudaLimits, Opened};
use engine_group::{Follower, LeadingExecutor, ProcessGroup, TcpGroup};
use engine_load::{
    FetchSettings, LoadError, Local, PACKED_FILE, PackedModel, Progress, read_config,
};
use engine_memory::{MemoryPlan, MemoryRequest, memory_plan};
use engine_server::{LoadFailure, Loaded, StartupHandle};
use engine_spec::{Device, EngineConfig, ModelConfig, StartupPhase};
use engine_text::{Text, TextFiles};

use crate::bandwidth;
use crate::cli::DeviceChoice;
use crate::companions::{Companion, Companions};
use crate::device::{self, Found};
use crate::dummy;
use crate::ranks::{Joined, World, incomplete, terms};
use crate::weights::Serving;

pub(crate) fn failure(reason: &str, message: impl Into<String>) -> LoadFailure {
    LoadFailure {
        reason: reason.to_owned(),
        message: message.into(),
    }
}

pub(crate) fn from_load_error(error: &LoadError) -> LoadFailure {
    let reason = error.fault().map_or("EngineFailed", |fault| fault.as_str());
    failure(reason, error.chain())
}

/// Where the weights come from.
#[derive(Clone, Copy, Debug)]
pub enum Weights {
    /// The model's files.
    Files,
    /// Random numbers of a seed.
    Random(u64),
}

/// What of this machine a load may use.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Device asked for.
    pub choice: DeviceChoice,
    /// Driver library of the GPU.
    pub cuda_driver: Option<PathBuf>,
    /// GPUs that were opened.
    pub opened: Opened,
    /// How models are fetched, and where they are kept.
    pub fetch: FetchSettings,
    /// Whether to check the digests of packed weights.
    pub verify_weights: bool,
    /// This process's place among the ranks.
    pub world: World,
}

/// A model that was fetched and planned, on a device and in a group that serve it.
struct Prepared {
    config: EngineConfig,
    found: Found,
    directory: PathBuf,
    model: ModelConfig,
    plan: MemoryPlan,
    group: Arc<dyn ProcessGroup>,
    tcp: Option<Arc<TcpGroup>>,
    /// On the other GPUs of this process.
    companions: Companions,
}

/// Fetches what `config` names, plans its memory and finds the other ranks.
fn prepare(
    mut config: EngineConfig,
    machine: &Machine,
    weights: Weights,
    startup: &StartupHandle,
) -> Result<Prepared, LoadFailure> {
    let unavailable = |why: String| failure("DeviceUnavailable", why);
    // Before anything is fetched: a GPU that is not there does not come with the weights.
    let driver = machine.cuda_driver.as_deref();
    let found = device::find(machine.choice, driver, &machine.opened).map_err(unavailable)?;
    let fetched = Arc::new(Progress::default());
    startup.enter(StartupPhase::Fetching, bytes_of(&fetched));
    let directory = match weights {
        Weights::Files => fetch(
            &config.model.source,
            config.model.revision.as_deref(),
            &machine.fetch,
            &fetched,
        )?
        .keep(),
        Weights::Random(_) => dummy::directory(&config)?,
    };
    let model = read_config(&directory).map_err(|error| from_load_error(&error))?;
    let world = &machine.world;
    config.parallelism = world.parallelism(&config, &model);
    let here = |found: &Found| world.here(config.parallelism, matches!(found, Found::Gpu(_)));
    let rank = here(&found)?.first;
    let found =
        device::settle(found, machine.choice, &config, &model, rank).map_err(unavailable)?;
    let here = here(&found)?;
    config.device = match &found {
        Found::Cpu(_) => Device::Cpu,
        Found::Gpu(_) => Device::Nvidia,
    };
    let plan = plan(&config, &model, &found)?;
    tracing::info!(
        total_bytes = plan.total_bytes(),
        weights_bytes = plan.per_rank.weights_bytes,
        kv_bytes = plan.per_rank.kv_bytes,
        kv_tokens = plan.kv_tokens,
        draft_tokens = plan.draft_tokens,
        max_model_len = plan.max_model_len,
        "memory planned"
    );
    let meeting = world.meeting(here)?;
    let companions = Companions::default();
    for (gpu, rank) in here.others() {
        let found = device::another(driver, gpu, &machine.opened).map_err(unavailable)?;
        companions.start(Companion {
            rank,
            meeting: meeting.guest(),
            plan: self::plan(&config, &model, &found)?,
            found,
            config: config.clone(),
            world: world.clone(),
            weights,
            directory: directory.clone(),
            model: model.clone(),
        })?;
    }
    let terms = terms(&config, &plan, weights, &directory)?;
    let joined = world.join(here.first, meeting, &plan, terms);
    let Joined { group, tcp, plan } = joined.map_err(|failure| companions.explain(failure))?;
    Ok(Prepared {
        config,
        found,
        directory,
        model,
        plan,
        group,
        tcp,
        companions,
    })
}

/// Loads what `config` names; runs on the engine's thread. `found_group` is told of the group that it leads.
pub fn load(
    config: EngineConfig,
    machine: &Machine,
    weights: Weights,
    startup: &StartupHandle,
    found_group: impl FnOnce(Arc<TcpGroup>),
) -> Result<Loaded, LoadFailure> {
    let prepared = prepare(config, machine, weights, startup)?;
    if let Some(group) = &prepared.tcp {
        found_group(group.clone());
    }
    let Prepared {
        config,
        found,
        directory,
        model,
        plan,
        ..
    } = &prepared;
    let text = read_text(directory, |directory| match weights {
        Weights::Files => {
            let message = format!(
                "{} has no tokenizer.json; a model needs one to be served",
                directory.display()
            );
            Err(failure("ModelConfigInvalid", message))
        }
        Weights::Random(_) => dummy::tokenizer(model),
    })?;
    let roofline = match found {
        Found::Cpu(_) => Some(bandwidth::roofline(model, plan, available_threads())),
        Found::Gpu(_) => None,
    };
    let executor = load_weights(&prepared, machine, weights, startup)?;
    let executor: Box<dyn Executor> = match prepared.tcp {
        Some(_) => Box::new(LeadingExecutor::new(executor, prepared.group.clone())),
        None => executor,
    };
    let limits = Limits {
        vocabulary: executor.vocabulary(),
        max_model_len: plan.max_model_len as usize,
        max_num_seqs: config.max_num_seqs as usize,
        max_num_batched_tokens: config.max_num_batched_tokens as usize,
        max_queued_requests: config.max_queued_requests as usize,
        block_size: plan.block_size as usize,
        block_count: plan.kv_blocks as usize,
        draft_tokens: plan.draft_tokens as usize,
    };
    let weights = crate::weights::origin(
        config,
        weights,
        Serving {
            model: model.clone(),
            plan: *plan,
            directory: directory.clone(),
            is_cpu: matches!(found, Found::Cpu(_)),
        },
        &machine.fetch,
    );
    Ok(Loaded {
        executor,
        text,
        limits,
        weights,
        roofline,
    })
}

/// Loads this rank's share of what `config` names; runs on the rank's thread.
pub fn load_rank(
    config: EngineConfig,
    machine: &Machine,
    weights: Weights,
    startup: &StartupHandle,
) -> Result<Follower, LoadFailure> {
    let prepared = prepare(config, machine, weights, startup)?;
    let executor = load_weights(&prepared, machine, weights, startup)?;
    let timeout = machine.world.timeout;
    Ok(Follower::new(executor, prepared.group, timeout))
}

/// Loads this rank's weights, and waits until all ranks have theirs.
fn load_weights(
    prepared: &Prepared,
    machine: &Machine,
    weights: Weights,
    startup: &StartupHandle,
) -> Result<Box<dyn Executor>, LoadFailure> {
    let loaded = Arc::new(Progress::default());
    startup.enter(StartupPhase::Loading, bytes_of(&loaded));
    if machine.verify_weights {
        verify(&prepared.directory, &loaded).map_err(|error| from_load_error(&error))?;
    }
    let Prepared {
        config,
        found,
        directory,
        model,
        plan,
        group,
        ..
    } = prepared;
    let share = Share {
        config,
        found,
        directory,
        model,
        plan,
        group: group.clone(),
    };
    let executor = share
        .load(weights, &loaded)
        .map_err(|error| from_load_error(&error))?;
    let patience = machine.world.patience;
    prepared
        .group
        .barrier(patience)
        .map_err(|error| prepared.companions.explain(incomplete(&error)))?;
    Ok(executor)
}

/// The local directory of a model.
pub(crate) fn fetch(
    source: &str,
    revision: Option<&str>,
    settings: &FetchSettings,
    fetched: &Progress,
) -> Result<Local, LoadFailure> {
    engine_load::resolve(source, revision, settings, fetched)
        .map_err(|error| from_load_error(&error))
}

/// Compares packed weights with their digests; files of other formats have none.
fn verify(directory: &Path, progress: &Progress) -> Result<(), LoadError> {
    let path = directory.join(PACKED_FILE);
    if !path.is_file() {
        return Ok(());
    }
    PackedModel::open(&path)?.verify(progress)
}

/// What a rank loads.
pub(crate) struct Share<'a> {
    pub config: &'a EngineConfig,
    pub found: &'a Found,
    pub directory: &'a Path,
    pub model: &'a ModelConfig,
    pub plan: &'a MemoryPlan,
    pub group: Arc<dyn ProcessGroup>,
}

impl Share<'_> {
    /// The backend of the device that was found, with the weights in its memory.
    pub fn load(
        self,
        weights: Weights,
        progress: &Progress,
    ) -> Result<Box<dyn Executor>, LoadError> {
        let Self {
            config,
            found,
            directory,
            model,
            plan,
            group,
        } = self;
        if let Weights::Random(seed) = weights {
            tracing::warn!(seed, "the weights are random: answers mean nothing");
        }
        let (sequences, tokens) = (config.max_num_seqs, config.max_num_batched_tokens);
        Ok(match found {
            Found::Cpu(_) => {
                let limits = CpuLimits::from_plan(plan, sequences, tokens);
                tracing::info!(threads = limits.threads, isa = ?limits.isa, resident = ?limits.resident, "loading");
                Box::new(match weights {
                    Weights::Files => {
                        CpuExecutor::load_share(directory, model, limits, group, progress)?
                    }
                    Weights::Random(seed) => {
                        CpuExecutor::dummy_share(model, seed, limits, group, progress)?
                    }
                })
            }
            Found::Gpu(gpu) => {
                let limits = CudaLimits::from_plan(model, plan, sequences, tokens);
                tracing::info!(device = gpu.name(), resident = ?limits.resident, "loading");
                let executor = match weights {
                    Weights::Files => {
                        CudaExecutor::load_share(gpu, directory, model, limits, group, progress)?
                    }
                    Weights::Random(seed) => {
                        CudaExecutor::dummy_share(gpu, model, seed, limits, group, progress)?
                    }
                };
                tracing::info!(kernels = %executor.attention(), "attention chosen");
                if let Some(way) = executor.exchange() {
                    tracing::info!(way, "exchange chosen");
                }
                Box::new(executor)
            }
        })
    }
}

pub(crate) fn bytes_of(
    progress: &Arc<Progress>,
) -> impl Fn() -> (u64, u64) + Send + Sync + 'static {
    let progress = progress.clone();
    move || (progress.done(), progress.total())
}

pub(crate) fn plan(
    config: &EngineConfig,
    model: &ModelConfig,
    found: &Found,
) -> Result<MemoryPlan, LoadFailure> {
    // A pod that was sized by a plan has exactly that much; otherwise the machine decides.
    let there = match found {
        Found::Cpu(_) => available_bytes(),
        Found::Gpu(gpu) => Some(
            gpu.free_bytes()
                .map_err(|error| failure("DeviceUnavailable", error.to_string()))?,
        ),
    };
    let capacity = config.planned_bytes.or(there);
    let request = MemoryRequest::from_engine_config(config, capacity);
    let plan =
        memory_plan(model, &request).map_err(|misfit| failure("DoesNotFit", misfit.to_string()))?;
    if let Some(planned) = config.planned_bytes
        && planned != plan.total_bytes()
    {
        let message = format!(
            "plannedBytes = {planned}, but this engine plans {} bytes for the same configuration; \
             operator and engine must be of the same version",
            plan.total_bytes()
        );
        return Err(failure("PlanMismatch", message));
    }
    Ok(plan)
}

/// Bytes this process may use: the control group's limit, or the machine's memory.
pub(crate) fn available_bytes() -> Option<u64> {
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max")
        .ok()
        .and_then(|text| text.trim().parse::<u64>().ok());
    let machine = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| {
            let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
            let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
            Some(kib * 1024)
        });
    group.into_iter().chain(machine).min()
}

/// The text side of a model; `absent` stands in for a tokenizer.json that is not there.
fn read_text(
    directory: &Path,
    absent: impl FnOnce(&Path) -> Result<String, LoadFailure>,
) -> Result<Text, LoadFailure> {
    let optional = |name: &str| -> Result<Option<String>, LoadFailure> {
        let path = directory.join(name);
        match std::fs::read_to_string(&path) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => {
                let message = format!("{} cannot be read: {error}", path.display());
                Err(failure("ModelConfigInvalid", message))
            }
        }
    };
    let tokenizer = match optional("tokenizer.json")? {
        Some(tokenizer) => tokenizer,
        None => absent(directory)?,
    };
    let files = TextFiles {
        tokenizer: tokenizer.into_bytes(),
        tokenizer_config: optional("tokenizer_config.json")?,
        chat_template: optional("chat_template.jinja")?,
        generation_config: optional("generation_config.json")?,
    };
    Text::new(files).map_err(|error| {
        failure(
            "ModelConfigInvalid",
            format!("{}: {error}", directory.display()),
        )
    })
}
