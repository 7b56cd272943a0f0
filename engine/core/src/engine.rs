//! One step: schedule, execute, sample, complete.
//!
//! Invariant: between two steps every sequence is either waiting without blocks or running with the blocks of its
//! computed tokens, so a request may be submitted, finished or cancelled at any such moment and its blocks are free
//! before the next step.

use crate::batch::{Batch, ExecuteError, Executor, Logits};
use crate::limits::{Limits, LimitsError};
use crate::request::{Event, EventKind, FinishReason, Rejection, Request, RequestId};
use crate::sampling::{SampleContext, SampleError, Sampled, Sampler};
use crate::scheduler::{Admission, Counters, Scheduler};
use crate::sequence::Sequence;

/// A scheduler with the buffers of a step.
#[derive(Debug)]
pub struct Engine {
    scheduler: Scheduler,
    batch: Batch,
    logits: Logits,
    sampler: Sampler,
}

/// What a step did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepReport {
    /// Sequences in the batch.
    pub sequences: usize,
    /// Tokens computed.
    pub tokens: usize,
}

/// How busy the engine is.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Load {
    /// Sequences in the running batch.
    pub running: usize,
    /// Sequences in the queue.
    pub waiting: usize,
    /// Of those, waiting for another choice of their own request.
    pub deferred: usize,
    /// Tokens that the waiting requests may compute and generate.
    pub queued_tokens: usize,
    /// Blocks held by sequences.
    pub blocks_used: usize,
    /// Blocks in total.
    pub blocks_total: usize,
    /// Takes nothing new.
    pub draining: bool,
    /// What happened so far.
    pub counters: Counters,
}

impl Engine {
    /// An idle engine.
    ///
    /// # Errors
    /// The sizes contradict each other.
    pub fn new(limits: Limits) -> Result<Self, LimitsError> {
        limits.validate()?;
        Ok(Self {
            scheduler: Scheduler::new(limits),
            batch: Batch {
                entries: Vec::with_capacity(limits.max_num_seqs),
            },
            logits: Logits::with_capacity(limits.vocabulary, limits.max_num_seqs),
            sampler: Sampler::default(),
        })
    }

    /// Bounds the queue further than [`Limits`] does.
    pub fn set_admission(&mut self, admission: Admission) {
        self.scheduler.admission = admission;
    }

    /// Puts a request into the queue.
    ///
    /// # Errors
    /// See [`Rejection`].
    pub fn submit(&mut self, request: Request) -> Result<(), Rejection> {
        self.scheduler.submit(request)
    }

    /// Ends a request whose client is gone; its blocks are free when this returns.
    pub fn cancel(&mut self, request: RequestId, events: &mut Vec<Event>) {
        self.scheduler
            .finish_request(request, FinishReason::Abort, events);
    }

    /// Ends a request whose time is over, waiting or running.
    pub fn expire(&mut self, request: RequestId, events: &mut Vec<Event>) {
        self.scheduler
            .finish_request(request, FinishReason::Deadline, events);
    }

    /// Ends one choice whose text reached a stop string.
    pub fn stop(&mut self, request: RequestId, choice: u32, events: &mut Vec<Event>) {
        self.scheduler
            .finish_choice(request, choice, FinishReason::Stop, events);
    }

    /// Ends everything, for the end of a drain or a dead backend.
    pub fn finish_all(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.scheduler.finish_all(reason, events);
    }

    /// Takes no new request from now on.
    pub fn drain(&mut self) {
        self.scheduler.drain();
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.scheduler.is_idle()
    }

    /// How busy the engine is.
    pub fn load(&self) -> Load {
        Load {
            running: self.scheduler.running(),
            waiting: self.scheduler.waiting(),
            deferred: self.scheduler.deferred(),
            queued_tokens: self.scheduler.queued_tokens(),
            blocks_used: self.scheduler.blocks.used(),
            blocks_total: self.scheduler.blocks.count(),
            draining: self.scheduler.is_draining(),
            counters: self.scheduler.counters,
        }
    }

    /// The scheduler, to look at.
    pub fn scheduler(&self) -> &Scheduler {
        &self.scheduler
    }

    /// Tokens of the step that [`Self::step`] would run after [`Self::prepare`].
    pub fn prepared_tokens(&self) -> usize {
        self.batch.token_count()
    }

    /// Schedules the next step without running it, so that a watchdog can know its size before it begins.
    pub fn prepare(&mut self, events: &mut Vec<Event>) {
        self.scheduler.schedule(&mut self.batch, events);
    }

    /// Runs the prepared step.
    ///
    /// # Errors
    /// The backend failed; the sequences of the batch have ended with [`FinishReason::Error`].
    pub fn run(
        &mut self,
        executor: &mut dyn Executor,
        events: &mut Vec<Event>,
    ) -> Result<StepReport, ExecuteError> {
        let report = StepReport {
            sequences: self.batch.entries.len(),
            tokens: self.batch.token_count(),
        };
        if self.batch.is_empty() {
            return Ok(report);
        }
        let executed = executor.execute(&self.batch, &mut self.logits);
        let executed = executed.and_then(|()| self.check_logits());
        if let Err(error) = executed {
            for index in 0..self.batch.entries.len() {
                let id = self.batch.entries[index].sequence;
                self.scheduler.finish(id, FinishReason::Error, events);
            }
            self.scheduler.recycle(&mut self.batch);
            return Err(error);
        }
        self.complete(events);
        self.scheduler.recycle(&mut self.batch);
        Ok(report)
    }

    /// Schedules and runs one step.
    ///
    /// # Errors
    /// See [`Self::run`].
    pub fn step(
        &mut self,
        executor: &mut dyn Executor,
        events: &mut Vec<Event>,
    ) -> Result<StepReport, ExecuteError> {
        self.prepare(events);
        self.run(executor, events)
    }

    fn check_logits(&self) -> Result<(), ExecuteError> {
        let expected = (self.batch.logits_rows(), self.scheduler.limits.vocabulary);
        let found = (self.logits.rows(), self.logits.vocabulary());
        if expected.0 > 0 && expected != found {
            return Err(ExecuteError::Fatal(format!(
                "it gave {} x {} logits where {} x {} were wanted",
                found.0, found.1, expected.0, expected.1
            )));
        }
        Ok(())
    }

    /// Writes down what was computed and samples where a sequence's last token was.
    fn complete(&mut self, events: &mut Vec<Event>) {
        let mut row = 0;
        for entry in &self.batch.entries {
            self.scheduler.advance(entry.sequence, entry.tokens.len());
            if !entry.wants_logits {
                continue;
            }
            row += 1;
            let Some(sequence) = self.scheduler.sequences.get_mut(&entry.sequence) else {
                continue;
            };
            let finish = match sample(&mut self.sampler, self.logits.row(row - 1), sequence) {
                Ok(Some(sampled)) => {
                    let token = sampled.token;
                    events.push(sequence.event(EventKind::Token(sampled)));
                    self.scheduler.append(entry.sequence, token)
                }
                Ok(None) => Some(FinishReason::Stop),
                Err(SampleError::Logit(_)) => {
                    self.scheduler.counters.corrupted += 1;
                    Some(FinishReason::Error)
                }
                Err(SampleError::Mask(_)) => {
                    self.scheduler.counters.mask_failures += 1;
                    Some(FinishReason::Error)
                }
            };
            if let Some(reason) = finish {
                self.scheduler.finish(entry.sequence, reason, events);
            }
        }
    }
}

/// The sequence's next token; none when its mask says that the output is complete.
fn sample(
    sampler: &mut Sampler,
    row: &[f32],
    sequence: &mut Sequence,
) -> Result<Option<Sampled>, SampleError> {
    let mut mask = sequence.mask.take();
    let context = SampleContext {
        tokens: &sequence.tokens,
        prompt_len: sequence.request.prompt.len(),
        choice: sequence.choice,
    };
    let parameters = &sequence.request.parameters;
    let sampled = match mask.as_deref_mut() {
        Some(mask) => sampler.sample_within(row, parameters, context, mask),
        None => Ok(Some(sampler.sample(row, parameters, context)?)),
    };
    sequence.mask = mask;
    sampled
}
