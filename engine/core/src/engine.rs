//! One step: schedule, execute, sample, complete, draft.
//!
//! A decoding sequence's entry may end in drafts. They are verified by sampling: after the last known token and, as long as
//! what was sampled is the next draft, after that one. A token is sampled by the model's logits and its position's own
//! randomness whether or not it was drafted, so drafts change when a token comes and never which.
//!
//! Invariant: between two steps every sequence is either waiting without blocks or running with the blocks of its
//! computed tokens, so a request may be submitted, finished or cancelled at any such moment and its blocks are free
//! before the next step.

use crate::batch::{Batch, BatchEntry, ExecuteError, Executor, Logits};
use crate::drafting::Drafting;
use crate::limits::{Limits, LimitsError};
use crate::picking::{Outcome, Picks};
use crate::request::{Event, EventKind, FinishReason, Rejection, Request, RequestId};
use crate::sampling::{SampleContext, SampleError, Sampler};
use crate::scheduler::{Admission, Counters, Scheduler};
use crate::sequence::Sequence;

/// A scheduler with the buffers of a step.
#[derive(Debug)]
pub struct Engine {
    scheduler: Scheduler,
    batch: Batch,
    logits: Logits,
    sampler: Sampler,
    drafting: Drafting,
    picks: Picks,
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
            logits: Logits::with_capacity(
                limits.vocabulary,
                limits.max_num_seqs * (1 + limits.draft_tokens),
            ),
            sampler: Sampler::with_capacity(limits.vocabulary, limits.max_model_len),
            drafting: Drafting::new(&limits),
            picks: Picks::default(),
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

    /// Keeps requests that have not begun in the queue, or lets them in again.
    pub fn hold(&mut self, holds: bool) {
        self.scheduler.hold(holds);
    }

    /// Whether nothing has begun, so that the weights may be replaced.
    pub fn is_clear(&mut self) -> bool {
        self.scheduler.is_clear()
    }

    /// Sends everything that has begun back to its prompt, or ends it where `may_restart` says no.
    pub fn restart(&mut self, may_restart: impl Fn(RequestId) -> bool, events: &mut Vec<Event>) {
        self.scheduler.restart(may_restart, events);
    }

    /// The weights have this name and version from now on; see [`Scheduler::begin_weights`].
    pub fn begin_weights(&mut self, name: &str, version: u64) {
        self.scheduler.begin_weights(name, version);
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
    /// The backend failed. Where it failed to compute the step, the sequences of the batch have ended with
    /// [`FinishReason::Error`]; where it failed to draft after it, they have their tokens and go on.
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
        if let Err(error) = self.execute(executor) {
            for index in 0..self.batch.entries.len() {
                let id = self.batch.entries[index].sequence;
                self.scheduler.finish(id, FinishReason::Error, events);
            }
            self.scheduler.recycle(&mut self.batch);
            return Err(error);
        }
        self.complete(executor, events);
        self.scheduler.recycle(&mut self.batch);
        self.drafting.run(
            executor,
            &mut self.logits,
            &mut self.sampler,
            &mut self.picks,
            &mut self.scheduler,
        )?;
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

    fn execute(&mut self, executor: &mut dyn Executor) -> Result<(), ExecuteError> {
        if let Some(picker) = executor.picker() {
            picker.compute(&self.batch)?;
            return self.picks.step(picker, &self.batch, &mut self.scheduler);
        }
        executor.execute(&self.batch, &mut self.logits)?;
        self.logits
            .expect(self.batch.logits_rows(), self.scheduler.limits.vocabulary)
    }

    /// Samples where a sequence's last token was, and writes down what of its entry stays computed.
    fn complete(&mut self, executor: &mut dyn Executor, events: &mut Vec<Event>) {
        let Self {
            scheduler,
            batch,
            logits,
            sampler,
            drafting,
            picks,
        } = self;
        let vocabulary = scheduler.limits.vocabulary;
        let mut sample = |row: usize, sequence: &mut Sequence| match executor.picker() {
            Some(picker) => picks.take(picker, row, sequence, vocabulary),
            None => sample(sampler, logits.row(row), sequence),
        };
        let drafts = scheduler.limits.draft_tokens > 0;
        let (mut row, mut token_row) = (0, 0);
        for entry in &batch.entries {
            let first = (row, token_row);
            row += entry.logits_rows();
            token_row += entry.tokens.len();
            if !scheduler.sequences.contains_key(&entry.sequence) {
                continue;
            }
            let verified = match entry.wants_logits {
                true => verify(scheduler, &mut sample, first.0, entry, events),
                false => Verified {
                    kept: entry.tokens.len(),
                    finish: None,
                },
            };
            scheduler.advance(entry.sequence, verified.kept);
            if drafts {
                let goes_on = entry.wants_logits && verified.finish.is_none();
                drafting.follow(scheduler, entry, first.1, verified.kept, goes_on);
            }
            match verified.finish {
                Some(reason) => scheduler.finish(entry.sequence, reason, events),
                None if entry.drafts > 0 => scheduler.roll_back(entry.sequence),
                None => {}
            }
        }
    }
}

/// What became of an entry that wanted logits.
struct Verified {
    /// Tokens of the entry that stay computed: all but the rejected drafts.
    kept: usize,
    finish: Option<FinishReason>,
}

/// Samples from `row` on, until a draft is not what was sampled, the drafts are used up, or the sequence ends.
fn verify(
    scheduler: &mut Scheduler,
    sample: &mut dyn FnMut(usize, &mut Sequence) -> Outcome,
    row: usize,
    entry: &BatchEntry,
    events: &mut Vec<Event>,
) -> Verified {
    let known = entry.tokens.len() - entry.drafts;
    scheduler.counters.drafts += u64::from(entry.drafts > 0);
    scheduler.counters.draft_tokens += entry.drafts as u64;
    let mut accepted = 0;
    let finish = loop {
        let Some(sequence) = scheduler.sequences.get_mut(&entry.sequence) else {
            break None;
        };
        let (token, finish) = match sample(row + accepted, sequence) {
            Ok(Some(sampled)) => {
                let token = sampled.token;
                events.push(sequence.event(EventKind::Token(sampled)));
                (token, scheduler.append(entry.sequence, token))
            }
            Ok(None) => break Some(FinishReason::Stop),
            Err(SampleError::Logit(_)) => {
                scheduler.counters.corrupted += 1;
                break Some(FinishReason::Error);
            }
            Err(SampleError::Mask(_)) => {
                scheduler.counters.mask_failures += 1;
                break Some(FinishReason::Error);
            }
        };
        let is_draft = entry.tokens.get(known + accepted) == Some(&token);
        if is_draft && let Some(count) = scheduler.counters.accepted_tokens.get_mut(accepted) {
            *count += 1;
        }
        if finish.is_some() || !is_draft {
            break finish;
        }
        accepted += 1;
    };
    Verified {
        kept: known + accepted,
        finish,
    }
}

/// The sequence's next token; none when its mask says that the output is complete.
fn sample(sampler: &mut Sampler, row: &[f32], sequence: &mut Sequence) -> Outcome {
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
