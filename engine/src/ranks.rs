//! The ranks of a replica: which one this is, and how it finds the others.
//!
//! Invariant: what must be equal on all ranks is compared before anyone loads a byte of weights, and named where it is
//! not. What may differ, room in the cache, is settled on the least.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use engine_group::{Alone, GroupError, Joining, ProcessGroup, TcpGroup, Terms, join};
use engine_load::sample_digest;
use engine_memory::MemoryPlan;
use engine_server::LoadFailure;
use engine_spec::{EngineConfig, ModelConfig, Parallelism, Rank, rank::WORLD_SIZE_MAX};

use crate::cli::GroupArguments;
use crate::load::{Weights, failure, from_load_error};

/// This process's place among the ranks, and where rank 0 is.
#[derive(Clone, Debug)]
pub struct World {
    pub rank: Rank,
    leader: String,
    /// How long all may take to come, and to load.
    pub patience: Duration,
    /// Silence after which a rank counts as gone.
    pub timeout: Duration,
}

/// A group that was joined.
pub struct Joined {
    pub group: Arc<dyn ProcessGroup>,
    /// The same where there are other ranks.
    pub tcp: Option<Arc<TcpGroup>>,
    /// With the blocks that every rank has room for.
    pub plan: MemoryPlan,
}

impl World {
    /// Checks the flags.
    pub fn new(arguments: &GroupArguments) -> anyhow::Result<Self> {
        let GroupArguments {
            world_size,
            rank: index,
            leader,
            join_timeout_seconds,
            group_timeout_seconds,
        } = arguments;
        ensure!(
            (1..=WORLD_SIZE_MAX).contains(world_size),
            "--world-size {world_size}: expected 1 to {WORLD_SIZE_MAX}"
        );
        let rank = Rank::new(*index, *world_size).with_context(|| {
            format!(
                "--rank {index}: ranks of --world-size {world_size} are numbered from 0 to {}",
                world_size - 1
            )
        })?;
        ensure!(
            *group_timeout_seconds > 0 && *join_timeout_seconds > 0,
            "--group-timeout-seconds and --join-timeout-seconds must be above 0"
        );
        let leader = match leader {
            Some(leader) => leader.clone(),
            None if rank.is_alone() => String::new(),
            None => {
                bail!("--world-size {world_size} needs --leader HOST:PORT, the address of rank 0")
            }
        };
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Self {
            rank,
            leader,
            patience: seconds(*join_timeout_seconds),
            timeout: seconds(*group_timeout_seconds),
        })
    }

    /// How the ranks divide a model: as configured, or every layer and the routed experts by all of them.
    pub fn parallelism(
        &self,
        config: &EngineConfig,
        model: &ModelConfig,
    ) -> Result<Parallelism, LoadFailure> {
        let ranks = self.rank.count() as u32;
        let given = config.parallelism;
        if given == Parallelism::default() {
            return Ok(Parallelism {
                tensor: ranks,
                expert: if model.moe.is_some() { ranks } else { 1 },
                pipeline: 1,
            });
        }
        if given.ranks() != ranks {
            let message = format!(
                "parallelism asks for {0} ranks and --world-size is {ranks}; start each with --world-size {0}, --rank and \
                 --leader, and a device of its own, or leave parallelism out",
                given.ranks()
            );
            return Err(failure("ConfigurationInvalid", message));
        }
        Ok(given)
    }

    /// Waits for the other ranks.
    pub fn join(
        &self,
        config: &EngineConfig,
        plan: &MemoryPlan,
        weights: Weights,
        directory: &Path,
    ) -> Result<Joined, LoadFailure> {
        let ranks = self.rank.count() as u32;
        if self.rank.is_alone() {
            return Ok(Joined {
                group: Arc::new(Alone),
                tcp: None,
                plan: *plan,
            });
        }
        let joining = Joining {
            rank: self.rank,
            leader: self.leader.clone(),
            terms: terms(config, plan, weights, directory)?,
            patience: self.patience,
            timeout: self.timeout,
        };
        tracing::info!(
            rank = self.rank.index(),
            world_size = ranks,
            leader = self.leader,
            "waiting for the other ranks"
        );
        let (group, kv_blocks) = join(&joining).map_err(|error| incomplete(&error))?;
        tracing::info!(kv_blocks, "all ranks are here");
        let tcp = Arc::new(group);
        Ok(Joined {
            group: tcp.clone(),
            tcp: Some(tcp),
            plan: plan.with_kv_blocks(kv_blocks),
        })
    }
}

/// The failure of a group that did not come to be.
pub fn incomplete(error: &GroupError) -> LoadFailure {
    failure("GroupIncomplete", error.to_string())
}

/// What must be equal on all ranks.
fn terms(
    config: &EngineConfig,
    plan: &MemoryPlan,
    weights: Weights,
    directory: &Path,
) -> Result<Terms, LoadFailure> {
    let model = match weights {
        Weights::Files => sample_digest(directory).map_err(|error| from_load_error(&error))?,
        Weights::Random(seed) => {
            let digest = sample_digest(directory).map_err(|error| from_load_error(&error))?;
            format!("{digest}, random numbers of seed {seed}")
        }
    };
    let Parallelism {
        tensor,
        expert,
        pipeline,
    } = config.parallelism;
    let equal = [
        ("model", model),
        ("version", env!("CARGO_PKG_VERSION").to_owned()),
        ("weights", format!("{:?}", plan.resident)),
        ("device", format!("{:?}", config.device)),
        ("parallelism", format!("{tensor}, {expert}, {pipeline}")),
        ("maxModelLen", plan.max_model_len.to_string()),
        ("maxNumSeqs", config.max_num_seqs.to_string()),
        (
            "maxNumBatchedTokens",
            config.max_num_batched_tokens.to_string(),
        ),
        ("blockSize", plan.block_size.to_string()),
        ("kvCacheDtype", format!("{:?}", plan.kv_cache)),
        ("numSpeculativeTokens", plan.draft_tokens.to_string()),
    ];
    Ok(Terms {
        equal: equal.map(|(name, value)| (name.to_owned(), value)).into(),
        kv_blocks: plan.kv_blocks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arguments(world_size: u32, rank: u32, leader: Option<&str>) -> GroupArguments {
        GroupArguments {
            world_size,
            rank,
            leader: leader.map(str::to_owned),
            join_timeout_seconds: 5,
            group_timeout_seconds: 5,
        }
    }

    #[test]
    fn flags_that_make_no_group_are_named() {
        assert!(
            World::new(&arguments(1, 0, None))
                .expect("alone")
                .rank
                .is_alone()
        );
        assert!(World::new(&arguments(2, 1, Some("a:1"))).is_ok());
        let silent = GroupArguments {
            group_timeout_seconds: 0,
            ..arguments(2, 1, Some("a:1"))
        };
        for (arguments, words) in [
            (arguments(2, 0, None), "--world-size 2 needs --leader"),
            (
                arguments(2, 2, Some("a:1")),
                "--rank 2: ranks of --world-size 2 are numbered from 0 to 1",
            ),
            (arguments(0, 0, None), "--world-size 0: expected 1 to 64"),
            (arguments(65, 0, None), "--world-size 65: expected 1 to 64"),
            (silent, "--group-timeout-seconds"),
        ] {
            let error = World::new(&arguments).map(|_| ()).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn experts_are_shared_out_where_there_are_some_and_what_is_configured_must_fit() {
        let world = World::new(&arguments(4, 1, Some("a:1"))).expect("a place");
        let of = |text: &str| ModelConfig::from_hf_json(text).expect("a config");
        let dense = of(include_str!("../cpu/tests/golden/llama/config.json"));
        let moe = of(include_str!("../cpu/tests/golden/v3-groups/config.json"));
        let mut config = EngineConfig::for_source("m");
        let all = |expert| Parallelism {
            tensor: 4,
            expert,
            pipeline: 1,
        };
        assert_eq!(world.parallelism(&config, &dense), Ok(all(1)));
        assert_eq!(world.parallelism(&config, &moe), Ok(all(4)));
        config.parallelism = all(4);
        assert_eq!(world.parallelism(&config, &moe), Ok(all(4)));
        config.parallelism.tensor = 8;
        let refusal = world.parallelism(&config, &moe).unwrap_err();
        assert!(
            refusal
                .message
                .contains("asks for 8 ranks and --world-size is 4"),
            "{refusal:?}"
        );
    }
}
