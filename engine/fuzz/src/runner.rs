//! Replays a corpus and mutations of it, and keeps the first input that breaks a rule.
//!
//! Invariant: the same seed, corpus and number of inputs give the same inputs. Surprise: the input under way is written
//! to disk before it runs, because a stack that overflows ends the process without a word.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use crate::{Mutator, Target};

/// Reads and resets the largest number of bytes allocated at a time; the owner of the allocator provides it.
#[derive(Clone, Copy, Debug)]
pub struct Meter {
    /// Forgets the peak; bytes allocated now.
    pub reset: fn() -> usize,
    /// Most bytes allocated since then.
    pub peak: fn() -> usize,
}

/// How a target is run.
#[derive(Clone, Debug)]
pub struct Runner {
    /// Folder with a folder for each target.
    pub corpus: PathBuf,
    /// Folder for inputs that fail.
    pub failures: PathBuf,
    /// Where mutations begin.
    pub seed: u64,
    /// Mutations.
    pub inputs: usize,
    /// No more mutations begin after this time.
    pub budget: Duration,
    /// An input that takes longer hangs. Far more than any input needs, on any machine.
    pub hang: Duration,
    /// Measures allocations, where someone can.
    pub meter: Option<Meter>,
}

/// What a run did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Inputs of the corpus.
    pub replayed: usize,
    /// Mutations of them.
    pub mutated: usize,
}

/// An input that broke a rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// What happened.
    pub problem: String,
    /// The input.
    pub input: Vec<u8>,
    /// Where the input is kept.
    pub path: PathBuf,
}

/// Shorter inputs that are tried.
const SHRINK_TRIES: usize = 2000;

type Reply = (Result<(), String>, usize);

impl Runner {
    /// Replays the corpus of a target, then mutates it.
    ///
    /// # Errors
    /// The first input that panics, hangs or allocates too much.
    ///
    /// # Panics
    /// The corpus is empty or files cannot be read or written.
    pub fn run(&self, target: &Target) -> Result<Outcome, Failure> {
        let corpus = read(&self.corpus.join(target.name));
        assert!(!corpus.is_empty(), "{} has no corpus", target.name);
        let (inputs, replies) = worker(target.run, self.meter);
        let mut worker = (inputs, replies);
        for input in &corpus {
            self.one(target, input, &mut worker)?;
        }
        let began = Instant::now();
        let mut mutator = Mutator::new(target, &corpus, self.seed);
        let mut mutated = 0;
        while mutated < self.inputs && began.elapsed() < self.budget {
            self.one(target, &mutator.next_input(), &mut worker)?;
            mutated += 1;
        }
        Ok(Outcome {
            replayed: corpus.len(),
            mutated,
        })
    }

    fn one(
        &self,
        target: &Target,
        input: &[u8],
        (inputs, replies): &mut (Sender<Vec<u8>>, Receiver<Reply>),
    ) -> Result<(), Failure> {
        let current = self.failures.join(format!("{}.under-way", target.name));
        keep(&current, input);
        let failure = |problem: String| {
            let path = self.failures.join(format!("{}.failed", target.name));
            keep(&path, input);
            Failure {
                problem,
                input: input.to_vec(),
                path,
            }
        };
        if inputs.send(input.to_vec()).is_err() {
            return Err(failure("the thread that runs inputs is gone".into()));
        }
        match replies.recv_timeout(self.hang) {
            Ok(reply) => match problem(target, reply) {
                None => Ok(()),
                Some(found) => {
                    let (input, found) = self.shrink(target, input, found, (inputs, replies));
                    let path = self.failures.join(format!("{}.failed", target.name));
                    keep(&path, &input);
                    Err(Failure {
                        problem: found,
                        input,
                        path,
                    })
                }
            },
            Err(RecvTimeoutError::Timeout) => Err(failure(format!(
                "hangs: more than {} s",
                self.hang.as_secs()
            ))),
            Err(RecvTimeoutError::Disconnected) => {
                Err(failure("the thread that runs inputs ended".into()))
            }
        }
    }

    /// Leaves out what the failure does not need, in pieces of falling size; an input that hangs ends it.
    fn shrink(
        &self,
        target: &Target,
        input: &[u8],
        mut found: String,
        (inputs, replies): (&Sender<Vec<u8>>, &Receiver<Reply>),
    ) -> (Vec<u8>, String) {
        let (mut input, mut tries) = (input.to_vec(), SHRINK_TRIES);
        let mut size = input.len() / 2;
        while size > 0 {
            let mut at = 0;
            while at < input.len() && tries > 0 {
                tries -= 1;
                let mut shorter = input.clone();
                shorter.drain(at..(at + size).min(input.len()));
                let sent = inputs.send(shorter.clone());
                let Ok(reply) = replies.recv_timeout(self.hang) else {
                    return (input, found);
                };
                match problem(target, reply).filter(|_| sent.is_ok()) {
                    Some(again) => (input, found) = (shorter, again),
                    None => at += size,
                }
            }
            size /= 2;
        }
        (input, found)
    }
}

/// What a finished input did wrong.
fn problem(target: &Target, (result, bytes): Reply) -> Option<String> {
    match result {
        Err(panic) => Some(format!("panicked: {panic}")),
        Ok(()) if bytes > target.bytes_max => Some(format!(
            "allocated {bytes} bytes, more than {}",
            target.bytes_max
        )),
        Ok(()) => None,
    }
}

/// A thread that runs inputs; a hang leaves it behind, and with it the process ends.
fn worker(run: fn(&[u8]), meter: Option<Meter>) -> (Sender<Vec<u8>>, Receiver<Reply>) {
    let (inputs, received) = channel::<Vec<u8>>();
    let (replies, answers) = channel();
    std::thread::spawn(move || {
        for input in received {
            let before = meter.map_or(0, |meter| (meter.reset)());
            let result = catch_unwind(AssertUnwindSafe(|| run(&input)));
            let bytes = meter.map_or(0, |meter| (meter.peak)().saturating_sub(before));
            let result = result.map_err(|panic| {
                let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
                text.or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_else(|| "no message".into())
            });
            if replies.send((result, bytes)).is_err() {
                return;
            }
        }
    });
    (inputs, answers)
}

/// Files of a folder, by name, so that a seed means the same everywhere.
fn read(folder: &Path) -> Vec<Vec<u8>> {
    let Ok(entries) = std::fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    paths.sort();
    paths
        .iter()
        .map(|path| std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display())))
        .collect()
}

fn keep(path: &Path, input: &[u8]) {
    let written = path
        .parent()
        .map_or(Ok(()), std::fs::create_dir_all)
        .and_then(|()| std::fs::write(path, input));
    if let Err(error) = written {
        panic!("{}: {error}", path.display());
    }
}
