//! One scheduler for all ranks: rank 0 sends what it executes, the others execute what they are sent.

use std::sync::Arc;
use std::time::{Duration, Instant};

use engine_core::{Batch, DraftBatch, ExecuteError, Executor, Logits, PickRow, Picked, Picker};

use crate::codec::{Command, encode_draft, encode_execute};
use crate::group::{Layout, ProcessGroup};

/// How long rank 0 leaves the others without a word.
const PING_INTERVAL: Duration = Duration::from_secs(1);

/// An answer without content.
struct Nothing;

impl Layout for Nothing {
    fn piece(&self, _: usize, _: usize) -> Option<std::ops::Range<usize>> {
        None
    }
}

/// Rank 0's part of a model, which takes the other ranks' parts along.
pub struct LeadingExecutor {
    inner: Box<dyn Executor>,
    group: Arc<dyn ProcessGroup>,
    message: Vec<u8>,
    spoke: Instant,
}

impl LeadingExecutor {
    /// Leads the ranks of `group`, of which `inner` computes rank 0's share.
    pub fn new(inner: Box<dyn Executor>, group: Arc<dyn ProcessGroup>) -> Self {
        Self {
            inner,
            group,
            message: Vec::new(),
            spoke: Instant::now(),
        }
    }

    fn send(&mut self) -> Result<(), ExecuteError> {
        self.spoke = Instant::now();
        self.group.broadcast(&self.message).map_err(fatal)
    }
}

fn fatal(error: impl std::fmt::Display) -> ExecuteError {
    ExecuteError::Fatal(error.to_string())
}

impl Executor for LeadingExecutor {
    fn vocabulary(&self) -> usize {
        self.inner.vocabulary()
    }

    fn execute(&mut self, batch: &Batch, logits: &mut Logits) -> Result<(), ExecuteError> {
        encode_execute(batch, &mut self.message);
        self.send()?;
        self.inner.execute(batch, logits)
    }

    fn draft(&mut self, pass: &DraftBatch, logits: &mut Logits) -> Result<(), ExecuteError> {
        encode_draft(pass, &mut self.message);
        self.send()?;
        self.inner.draft(pass, logits)
    }

    fn picker(&mut self) -> Option<&mut dyn Picker> {
        match self.inner.picker() {
            Some(_) => Some(self),
            None => None,
        }
    }

    /// Asks the other ranks whether they are there, now and then.
    fn idle(&mut self) -> Result<(), ExecuteError> {
        if self.spoke.elapsed() < PING_INTERVAL {
            return Ok(());
        }
        self.message = Command::Ping.encode();
        self.send()?;
        self.group.gather(&mut [], &Nothing).map_err(fatal)
    }
}

/// Rank 0 picks, the others compute.
impl Picker for LeadingExecutor {
    fn compute(&mut self, batch: &Batch) -> Result<(), ExecuteError> {
        encode_execute(batch, &mut self.message);
        self.send()?;
        own_picker(&mut *self.inner)?.compute(batch)
    }

    fn compute_draft(&mut self, pass: &DraftBatch) -> Result<(), ExecuteError> {
        encode_draft(pass, &mut self.message);
        self.send()?;
        own_picker(&mut *self.inner)?.compute_draft(pass)
    }

    fn pick(&mut self, rows: &[PickRow<'_>], picked: &mut Vec<Picked>) -> Result<(), ExecuteError> {
        own_picker(&mut *self.inner)?.pick(rows, picked)
    }
}

fn own_picker(inner: &mut dyn Executor) -> Result<&mut dyn Picker, ExecuteError> {
    inner
        .picker()
        .ok_or_else(|| ExecuteError::Fatal("rank 0 picks no tokens".to_owned()))
}

/// What a follower has to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Nothing came.
    Wait,
    /// A step of so many tokens waits for [`Follower::execute`].
    Step(usize),
    /// Rank 0 has ended in good order.
    End,
}

/// A rank that follows rank 0.
pub struct Follower {
    inner: Box<dyn Executor>,
    group: Arc<dyn ProcessGroup>,
    timeout: Duration,
    heard: Instant,
    message: Vec<u8>,
    pending: Option<Command>,
    logits: Logits,
}

impl Follower {
    /// Follows rank 0 of `group`, with this rank's share in `inner`, unless rank 0 is silent for `timeout`.
    pub fn new(inner: Box<dyn Executor>, group: Arc<dyn ProcessGroup>, timeout: Duration) -> Self {
        Self {
            inner,
            group,
            timeout,
            heard: Instant::now(),
            message: Vec::new(),
            pending: None,
            logits: Logits::default(),
        }
    }

    /// Waits as long as `patience` for something to do.
    ///
    /// # Errors
    /// Rank 0 is gone, silent, or says what nobody understands; it is then over.
    pub fn next(&mut self, patience: Duration) -> Result<Next, String> {
        if !self
            .group
            .receive(&mut self.message, patience)
            .map_err(|error| error.to_string())?
        {
            let silence = self.heard.elapsed();
            if silence > self.timeout {
                let ranks = "0".to_owned();
                let seconds = silence.as_secs_f64();
                return Err(crate::GroupError::Silent { ranks, seconds }.to_string());
            }
            return Ok(Next::Wait);
        }
        self.heard = Instant::now();
        let command = Command::decode(&self.message).map_err(|error| error.to_string())?;
        let tokens = match &command {
            Command::End => return Ok(Next::End),
            Command::Ping => 0,
            Command::Execute(batch) => batch.token_count(),
            Command::Draft(pass) => pass.batch.token_count(),
        };
        self.pending = Some(command);
        Ok(Next::Step(tokens))
    }

    /// Does what the last [`Follower::next`] announced.
    ///
    /// # Errors
    /// This rank, or another, cannot go on; it is then over.
    pub fn execute(&mut self) -> Result<(), String> {
        let outcome = match self.pending.take() {
            None | Some(Command::End) => Ok(()),
            Some(Command::Ping) => self.group.gather(&mut [], &Nothing).map_err(fatal),
            Some(Command::Execute(batch)) => self.inner.execute(&batch, &mut self.logits),
            Some(Command::Draft(pass)) => self.inner.draft(&pass, &mut self.logits),
        };
        self.heard = Instant::now();
        match outcome {
            Ok(()) => Ok(()),
            // Rank 0 refuses it too, before anyone computes.
            Err(ExecuteError::InvalidBatch(_)) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}
