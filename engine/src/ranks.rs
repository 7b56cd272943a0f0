//! The ranks of a replica: which ones are in this process, and how they find the others.
//!
//! Invariant: what must be equal on all ranks is compared before anyone loads a byte of weights, and named where it is
//! not. What may differ, room in the cache, is settled on the least.

use std::net::{Ipv4Addr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use engine_group::{
    Alone, GroupError, Joining, ProcessGroup, Secret, TcpGroup, Terms, join, lead_at,
};
use engine_load::sample_digest;
use engine_memory::MemoryPlan;
use engine_server::LoadFailure;
use engine_spec::{EngineConfig, ModelConfig, Parallelism, Rank, rank::WORLD_SIZE_MAX};

use crate::cli::GroupArguments;
use crate::load::{Weights, failure, from_load_error};

/// This process's place among those that serve a model together, and where rank 0 is.
#[derive(Clone, Debug)]
pub struct World {
    /// Which process this is.
    pub process: Rank,
    leader: String,
    /// How long all may take to come, and to load.
    pub patience: Duration,
    /// Silence after which a rank counts as gone.
    pub timeout: Duration,
    /// What all processes know.
    secret: Option<Secret>,
}

/// The ranks of this process: one, or one for each of its GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Here {
    /// The first of them.
    pub first: Rank,
    /// How many.
    pub count: usize,
}

impl Here {
    /// The ranks beside the first one, and the GPU of each.
    pub fn others(self) -> impl Iterator<Item = (u32, Rank)> {
        let rank = move |gpu: usize| self.first.other(self.first.index() + gpu);
        (1..self.count).map(move |gpu| (gpu as u32, rank(gpu)))
    }
}

/// Where ranks meet.
#[derive(Debug)]
pub struct Meeting {
    /// Of rank 0.
    address: String,
    /// Rank 0's, when all ranks are in this process.
    listener: Option<TcpListener>,
    /// What these ranks know, and what else finds the port does not.
    secret: Option<Secret>,
}

impl Meeting {
    /// The same for a rank that comes.
    pub fn guest(&self) -> Self {
        Self {
            address: self.address.clone(),
            listener: None,
            secret: self.secret.clone(),
        }
    }
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
            group_secret_file,
        } = arguments;
        ensure!(
            (1..=WORLD_SIZE_MAX).contains(world_size),
            "--world-size {world_size}: expected 1 to {WORLD_SIZE_MAX}"
        );
        let process = Rank::new(*index, *world_size).with_context(|| {
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
            None if process.is_alone() => String::new(),
            None => {
                bail!("--world-size {world_size} needs --leader HOST:PORT, the address of rank 0")
            }
        };
        ensure!(
            group_secret_file.is_none() || !process.is_alone(),
            "--group-secret-file is for several processes; give --world-size too, or leave it out"
        );
        let secret = group_secret_file.as_deref().map(read_secret);
        let seconds = |seconds: u32| Duration::from_secs(seconds.into());
        Ok(Self {
            process,
            leader,
            patience: seconds(*join_timeout_seconds),
            timeout: seconds(*group_timeout_seconds),
            secret: secret.transpose()?,
        })
    }

    /// How the ranks divide a model: as configured, or every layer and the routed experts by all processes.
    pub fn parallelism(&self, config: &EngineConfig, model: &ModelConfig) -> Parallelism {
        let given = config.parallelism;
        let tensor = match given == Parallelism::default() {
            true => self.process.count() as u32,
            false => given.tensor,
        };
        match given.expert {
            1 => Parallelism {
                tensor,
                expert: model.moe.as_ref().map_or(1, |_| tensor),
                ..given
            },
            _ => given,
        }
    }

    /// The ranks of this process: on the processors one, of GPUs as many as all processes have evenly.
    pub fn here(&self, parallelism: Parallelism, on_gpus: bool) -> Result<Here, LoadFailure> {
        let (ranks, processes) = (parallelism.ranks(), self.process.count() as u32);
        let wrong = |way_out: String| {
            let message = format!(
                "parallelism asks for {ranks} ranks and --world-size is {processes}; {way_out}"
            );
            Err(failure("ConfigurationInvalid", message))
        };
        if !on_gpus && ranks != processes {
            return wrong(format!(
                "start each with --world-size {ranks}, --rank and --leader, or leave parallelism out"
            ));
        }
        if !ranks.is_multiple_of(processes) {
            return wrong("each process has as many of them, one on each of its GPUs: make one a multiple of the other".into());
        }
        let count = ranks / processes;
        match Rank::new(self.process.index() as u32 * count, ranks) {
            Some(first) => Ok(Here {
                first,
                count: count as usize,
            }),
            None => wrong(format!("ask for at most {WORLD_SIZE_MAX} ranks")),
        }
    }

    /// Where the ranks meet; those of one process by themselves.
    pub fn meeting(&self, here: Here) -> Result<Meeting, LoadFailure> {
        if !self.process.is_alone() || here.count == 1 {
            return Ok(Meeting {
                address: self.leader.clone(),
                listener: None,
                secret: self.secret.clone(),
            });
        }
        let listen = || {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
            let address = listener.local_addr()?.to_string();
            Ok((address, listener, Secret::random()?))
        };
        let (address, listener, secret) =
            listen().map_err(|error: std::io::Error| incomplete(&GroupError::Socket(error)))?;
        Ok(Meeting {
            address,
            listener: Some(listener),
            secret: Some(secret),
        })
    }

    /// Waits for the other ranks.
    pub fn join(
        &self,
        rank: Rank,
        meeting: Meeting,
        plan: &MemoryPlan,
        terms: Terms,
    ) -> Result<Joined, LoadFailure> {
        if rank.is_alone() {
            return Ok(Joined {
                group: Arc::new(Alone),
                tcp: None,
                plan: *plan,
            });
        }
        let joining = Joining {
            rank,
            leader: meeting.address,
            terms,
            patience: self.patience,
            timeout: self.timeout,
            secret: meeting.secret,
        };
        tracing::info!(
            rank = rank.index(),
            ranks = rank.count(),
            leader = joining.leader,
            "waiting for the other ranks"
        );
        let joined = match meeting.listener {
            Some(listener) => lead_at(&joining, listener),
            None => join(&joining),
        };
        let (group, kv_blocks) = joined.map_err(|error| incomplete(&error))?;
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
pub fn terms(
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

fn read_secret(file: &Path) -> anyhow::Result<Secret> {
    let flag = || format!("--group-secret-file {}", file.display());
    let bytes = std::fs::read(file).with_context(|| flag() + " cannot be read")?;
    Secret::new(&bytes).with_context(flag)
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
            group_secret_file: None,
        }
    }

    #[test]
    fn flags_that_make_no_group_are_named() {
        assert!(
            World::new(&arguments(1, 0, None))
                .expect("alone")
                .process
                .is_alone()
        );
        assert!(World::new(&arguments(2, 1, Some("a:1"))).is_ok());
        let silent = GroupArguments {
            group_timeout_seconds: 0,
            ..arguments(2, 1, Some("a:1"))
        };
        let with_secret = |arguments: GroupArguments| GroupArguments {
            group_secret_file: Some("/no/such/file".into()),
            ..arguments
        };
        for (arguments, words) in [
            (
                with_secret(arguments(1, 0, None)),
                "--group-secret-file is for several processes",
            ),
            (
                with_secret(arguments(2, 1, Some("a:1"))),
                "--group-secret-file /no/such/file cannot be read",
            ),
            (arguments(2, 0, None), "--world-size 2 needs --leader"),
            (
                arguments(2, 2, Some("a:1")),
                "--rank 2: ranks of --world-size 2 are numbered from 0 to 1",
            ),
            (arguments(0, 0, None), "--world-size 0: expected 1 to 64"),
            (arguments(65, 0, None), "--world-size 65: expected 1 to 64"),
            (silent, "--group-timeout-seconds"),
        ] {
            let error = format!("{:#}", World::new(&arguments).map(|_| ()).unwrap_err());
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn ranks_of_one_process_have_a_secret_of_their_own() {
        let world = World::new(&arguments(1, 0, None)).expect("alone");
        let (first, count) = (Rank::new(0, 2).expect("a rank"), 2);
        let meet = || world.meeting(Here { first, count }).expect("a port");
        let (one, other) = (meet(), meet());
        let guest = one.guest();
        assert!(one.secret.is_some() && one.secret == guest.secret);
        assert_ne!(one.secret, other.secret);
        assert_eq!(one.address, guest.address);
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
        assert_eq!(world.parallelism(&config, &dense), all(1));
        assert_eq!(world.parallelism(&config, &moe), all(4));
        config.parallelism = all(1);
        assert_eq!(world.parallelism(&config, &moe), all(4));
        let wanted = world.parallelism(&config, &dense);
        let of = |index, count| Rank::new(index, count).expect("a rank");
        for on_gpus in [false, true] {
            let (first, count) = (of(1, 4), 1);
            assert_eq!(world.here(wanted, on_gpus), Ok(Here { first, count }));
        }
        config.parallelism.tensor = 8;
        let wanted = world.parallelism(&config, &dense);
        let (first, count) = (of(2, 8), 2);
        let here = world.here(wanted, true).expect("two of eight");
        assert_eq!(here, Here { first, count });
        assert_eq!(here.others().collect::<Vec<_>>(), [(1, of(3, 8))]);
        let refusal = world.here(wanted, false).unwrap_err().message;
        let words = "asks for 8 ranks and --world-size is 4; start each with --world-size 8";
        assert!(refusal.contains(words), "{refusal}");
        config.parallelism.tensor = 6;
        let refusal = world.here(world.parallelism(&config, &dense), true);
        let refusal = refusal.unwrap_err().message;
        assert!(
            refusal.contains("make one a multiple of the other"),
            "{refusal}"
        );
    }
}
