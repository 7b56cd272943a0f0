//! Which way ranks on GPUs exchange, that all take the same one, and what becomes of a step when a rank is gone or silent.

use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use crate::support::{
    PATIENCE, entry, free_address, gpu, limits, nccl, random_model, rank_of_group,
};
use engine_core::{Batch, ExecuteError, Executor, Logits};
use engine_cuda::{CudaExecutor, ExchangeChoice};
use engine_load::{LoadError, Progress, read_config};
use engine_memory::ResidentDtype;

const MODEL: &str = "llama-cuda";
const WAYS: [ExchangeChoice; 2] = [ExchangeChoice::Host, ExchangeChoice::Nccl];

/// Two ranks on threads, loaded with their choice; what each made of it.
fn pair<T: Send>(
    choices: [(ExchangeChoice, Option<PathBuf>); 2],
    timeout: Duration,
    role: impl Fn(usize, Result<CudaExecutor, LoadError>) -> T + Sync,
) -> [T; 2] {
    let leader = free_address();
    thread::scope(|scope| {
        let started = choices
            .into_iter()
            .enumerate()
            .map(|(index, (way, library))| {
                let (leader, role) = (&leader, &role);
                scope.spawn(move || {
                    // What takes long comes first: ranks that have met do not wait for each other beyond the timeout.
                    let gpu = gpu().unwrap().with_exchange(way, library);
                    let group = rank_of_group(leader, index as u32, 2, timeout);
                    let dir = random_model(MODEL);
                    let config = read_config(&dir).unwrap();
                    let limits = limits(ResidentDtype::Bfloat16);
                    let progress = Progress::default();
                    let share =
                        CudaExecutor::load_share(&gpu, &dir, &config, limits, group, &progress);
                    role(index, share)
                })
            });
        let ranks: Vec<_> = started.collect();
        let ends: Vec<T> = ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        ends.try_into()
            .unwrap_or_else(|_| unreachable!("two ranks"))
    })
}

fn both(way: ExchangeChoice) -> [(ExchangeChoice, Option<PathBuf>); 2] {
    [(way, nccl()), (way, nccl())]
}

fn step(executor: &mut CudaExecutor, tokens: &[u32], start: usize) -> Result<(), ExecuteError> {
    let blocks: Vec<u32> = (0..8).collect();
    let batch = Batch {
        entries: vec![entry(1, tokens, start, &blocks)],
    };
    executor.execute(&batch, &mut Logits::default())
}

#[test]
fn decode_steps_over_nccl_are_recorded_and_those_over_the_host_are_not() {
    if gpu().is_none() {
        return;
    }
    for (way, words) in [
        (ExchangeChoice::Auto, "NCCL 2."),
        (ExchangeChoice::Nccl, "NCCL 2."),
        (
            ExchangeChoice::Host,
            "host memory: rank 0: it was asked for",
        ),
    ] {
        let done = Barrier::new(2);
        let ends = pair(both(way), PATIENCE, |_, executor| {
            let mut executor = executor.unwrap();
            step(&mut executor, &[3, 4, 5], 0).unwrap();
            let before = executor.graphs();
            step(&mut executor, &[6], 3).unwrap();
            step(&mut executor, &[7], 4).unwrap();
            // Whoever goes first would be missed by the other's last step.
            done.wait();
            (
                before,
                executor.graphs(),
                executor.exchange().unwrap().to_owned(),
            )
        });
        let recorded = usize::from(way != ExchangeChoice::Host);
        for (before, after, reason) in ends {
            assert_eq!((before, after), (0, recorded), "{way}");
            assert!(reason.starts_with(words), "{reason}");
        }
    }
}

#[test]
fn all_ranks_go_the_way_that_every_one_of_them_can_go() {
    if gpu().is_none() {
        return;
    }
    let nowhere = Some(PathBuf::from("/nowhere/libnccl.so.2"));
    let reason = "rank 1: no NCCL: cannot load /nowhere/libnccl.so.2";
    let one_without = |way| [(way, nccl()), (way, nowhere.clone())];
    let ends = pair(
        one_without(ExchangeChoice::Auto),
        PATIENCE,
        |_, executor| executor.unwrap().exchange().unwrap().to_owned(),
    );
    assert_eq!(ends, [&*format!("host memory: {reason}"); 2]);
    let ends = pair(
        one_without(ExchangeChoice::Nccl),
        PATIENCE,
        |_, executor| match executor {
            Err(LoadError::Backend(message)) => message,
            other => panic!("{:?}", other.map(|_| ())),
        },
    );
    assert_eq!(
        ends,
        [&*format!("ranks cannot exchange over NCCL: {reason}"); 2]
    );
    // One that wants the host's memory decides for all.
    let choices = [
        (ExchangeChoice::Auto, nccl()),
        (ExchangeChoice::Host, nccl()),
    ];
    let ends = pair(choices, PATIENCE, |_, executor| {
        executor.unwrap().exchange().unwrap().to_owned()
    });
    assert_eq!(ends, ["host memory: rank 1: it was asked for"; 2]);
}

#[test]
fn a_rank_that_is_gone_ends_the_step_of_the_others_with_its_number() {
    if gpu().is_none() {
        return;
    }
    for way in WAYS {
        let gone = Barrier::new(2);
        pair(both(way), PATIENCE, |index, executor| {
            let mut executor = executor.unwrap();
            if index == 1 {
                drop(executor);
                gone.wait();
                return;
            }
            gone.wait();
            for _ in 0..2 {
                let error = step(&mut executor, &[3, 4, 5], 0).unwrap_err();
                let ExecuteError::Fatal(message) = error else {
                    panic!("{error}");
                };
                assert!(message.contains("rank 1 is gone"), "{way}: {message}");
            }
        });
    }
}

#[test]
fn a_silent_rank_ends_the_step_of_the_others_after_the_groups_timeout() {
    if gpu().is_none() {
        return;
    }
    for (way, words) in [
        (ExchangeChoice::Host, "silent"),
        (
            ExchangeChoice::Nccl,
            "a step of the ranks over NCCL did not end within 6 seconds",
        ),
    ] {
        let done = Barrier::new(2);
        pair(both(way), Duration::from_secs(6), |index, executor| {
            let mut executor = executor.unwrap();
            if index == 0 {
                let error = step(&mut executor, &[3, 4, 5], 0).unwrap_err();
                assert!(error.to_string().contains(words), "{way}: {error}");
            }
            done.wait();
            if index == 1 {
                // What rank 0 gave up ends this one's step at once.
                let error = step(&mut executor, &[3, 4, 5], 0).unwrap_err();
                assert!(
                    error.to_string().contains("rank 0 is gone"),
                    "{way}: {error}"
                );
            }
        });
    }
}
