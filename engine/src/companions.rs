//! The ranks on the other GPUs of this process: each follows rank 0 on a thread of its own.
//!
//! Invariant: one that cannot go on leaves the group, and so ends the process's first rank too. Why is logged, and kept for
//! the report of a start that failed.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use engine_group::{Follower, Next};
use engine_load::Progress;
use engine_memory::MemoryPlan;
use engine_server::LoadFailure;
use engine_spec::{EngineConfig, ModelConfig, Rank};

use crate::device::Found;
use crate::load::{Share, Weights, failure, from_load_error};
use crate::ranks::{Meeting, World, incomplete, terms};

/// How long one waits for a word at a time.
const TICK: Duration = Duration::from_secs(1);

/// A rank that is about to join.
pub struct Companion {
    pub rank: Rank,
    pub meeting: Meeting,
    /// Its GPU, and what it will hold there.
    pub found: Found,
    pub plan: MemoryPlan,
    pub config: EngineConfig,
    pub world: World,
    pub weights: Weights,
    pub directory: PathBuf,
    pub model: ModelConfig,
}

/// Those that were started.
#[derive(Clone, Debug, Default)]
pub struct Companions {
    /// Why the first that could not load its share could not.
    failure: Arc<Mutex<Option<LoadFailure>>>,
}

impl Companions {
    /// Starts one.
    pub fn start(&self, companion: Companion) -> Result<(), LoadFailure> {
        let (kept, rank) = (self.failure.clone(), companion.rank.index());
        let serve = move || match companion.serve(&kept) {
            Ok(()) => tracing::info!(rank, "rank 0 has ended"),
            Err(LoadFailure { reason, message }) => {
                tracing::error!(rank, reason, message, "a rank of this process cannot go on");
            }
        };
        let thread = std::thread::Builder::new().name(format!("rank-{rank}"));
        let started = thread.spawn(serve).map(|_| ());
        started.map_err(|error| {
            failure(
                "EngineFailed",
                format!("no thread for rank {rank}: {error}"),
            )
        })
    }

    /// Why one of them failed, where `failure` says no more than that it is gone.
    pub fn explain(&self, failure: LoadFailure) -> LoadFailure {
        let mut kept = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        kept.take().unwrap_or(failure)
    }
}

impl Companion {
    /// Loads its share and follows rank 0 to the end.
    fn serve(self, kept: &Mutex<Option<LoadFailure>>) -> Result<(), LoadFailure> {
        let Self {
            rank,
            meeting,
            found,
            plan,
            config,
            world,
            weights,
            directory,
            model,
        } = self;
        let terms = terms(&config, &plan, weights, &directory)?;
        let joined = world.join(rank, meeting, &plan, terms)?;
        let share = Share {
            config: &config,
            found: &found,
            directory: &directory,
            model: &model,
            plan: &joined.plan,
            group: joined.group.clone(),
        };
        // Kept before the group hears of it.
        let executor = share.load(weights, &Progress::default()).map_err(|error| {
            let failure = from_load_error(&error);
            let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
            kept.get_or_insert_with(|| failure.clone());
            failure
        })?;
        let group = joined.group;
        group
            .barrier(world.patience)
            .map_err(|error| incomplete(&error))?;
        let gone = |problem| failure("EngineFailed", problem);
        let mut follower = Follower::new(executor, group, world.timeout);
        loop {
            match follower.next(TICK).map_err(gone)? {
                Next::Wait => {}
                Next::Step(_) => follower.execute().map_err(gone)?,
                Next::End => return Ok(()),
            }
        }
    }
}
