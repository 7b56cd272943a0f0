//! Sampling where the logits are: what a backend is told of a row, and what the engine makes of its answers.
//!
//! Invariant: the token is the one that [`crate::Sampler`] chooses, by the same parameters, history and randomness; what
//! crosses the bus is tokens, and log-probabilities where they were asked for.
//!
//! Surprise: a step's rows are picked all at once, those after drafts as if the drafts had been accepted; where one was not,
//! verification does not look further. A mask cannot be asked ahead of its sequence, so a masked row after a draft is picked
//! when its turn comes.

use crate::batch::{Batch, BatchEntry, DraftBatch, ExecuteError, TokenId};
use crate::mask::{MaskError, Restriction, TokenMask};
use crate::sampling::{Logprobs, SampleError, Sampled, SamplingParameters};
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;

/// A row of logits and everything its token depends on.
#[derive(Clone, Copy, Debug)]
pub struct PickRow<'a> {
    /// Which of the last pass's logits rows.
    pub row: usize,
    /// How to choose.
    pub parameters: &'a SamplingParameters,
    /// Prompt and output so far.
    pub tokens: &'a [TokenId],
    /// Drafts after them, which count as output; the picked token's position follows both.
    pub drafts: &'a [TokenId],
    /// How many of `tokens` are the prompt.
    pub prompt_len: usize,
    /// Which of the request's `n` choices.
    pub choice: u32,
    /// Bit `i % 32` of word `i / 32` allows token `i`; absent allows all.
    pub allowed: Option<&'a [u32]>,
    /// Report the chosen token's log-probability and so many best ones.
    pub logprobs: Option<u32>,
}

impl PickRow<'_> {
    /// Where the picked token stands in its sequence.
    pub fn position(&self) -> usize {
        self.tokens.len() + self.drafts.len()
    }
}

/// A backend's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Picked {
    /// None where nothing is allowed.
    pub token: Option<TokenId>,
    /// Where they were asked for.
    pub logprobs: Option<Logprobs>,
}

/// A backend that samples where its logits are.
pub trait Picker {
    /// As [`crate::Executor::execute`], but the logits stay.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    fn compute(&mut self, batch: &Batch) -> Result<(), ExecuteError>;

    /// As [`crate::Executor::draft`], but the logits stay.
    ///
    /// # Errors
    /// See [`ExecuteError`].
    fn compute_draft(&mut self, pass: &DraftBatch) -> Result<(), ExecuteError>;

    /// The tokens of rows of the last pass, in ascending order of rows; leaves an answer for each in `picked`.
    ///
    /// # Errors
    /// The device failed or a logit is not finite ([`ExecuteError::Fatal`]), or a row is not there.
    fn pick(&mut self, rows: &[PickRow<'_>], picked: &mut Vec<Picked>) -> Result<(), ExecuteError>;
}

/// As [`crate::Sampler::sample_within`] says it.
pub(crate) type Outcome = Result<Option<Sampled>, SampleError>;

/// What was picked for a step.
#[derive(Debug, Default)]
pub(crate) struct Picks {
    /// By logits row; none where it has not been asked for.
    outcomes: Vec<Option<Outcome>>,
    picked: Vec<Picked>,
    /// What a mask is shown.
    scratch: Vec<f32>,
}

impl Picks {
    /// Picks all rows of a step but those that wait for their turn.
    pub(crate) fn step(
        &mut self,
        picker: &mut dyn Picker,
        batch: &Batch,
        scheduler: &mut Scheduler,
    ) -> Result<(), ExecuteError> {
        self.outcomes.clear();
        self.outcomes.resize(batch.logits_rows(), None);
        let vocabulary = scheduler.limits.vocabulary;
        let mut masks: Vec<Option<Vec<u32>>> = vec![None; batch.entries.len()];
        let mut row = 0;
        for (entry, allowed) in batch.entries.iter().zip(&mut masks) {
            let first = row;
            row += entry.logits_rows();
            let sequence = match scheduler.sequences.get_mut(&entry.sequence) {
                Some(sequence) if entry.wants_logits => sequence,
                _ => continue,
            };
            if let Some(mut mask) = sequence.mask.take() {
                match self.ask(&mut *mask, sequence, vocabulary) {
                    Ok(bits) => *allowed = bits,
                    Err(outcome) => self.outcomes[first] = Some(outcome),
                }
                sequence.mask = Some(mask);
            }
        }
        let mut rows = Vec::with_capacity(row);
        let mut row = 0;
        for (entry, allowed) in batch.entries.iter().zip(&masks) {
            let first = row;
            row += entry.logits_rows();
            let Some(sequence) = scheduler.sequences.get(&entry.sequence) else {
                continue;
            };
            let ahead = match sequence.mask {
                None => entry.logits_rows(),
                Some(_) => entry.logits_rows().min(1),
            };
            rows.extend(
                (0..ahead)
                    .filter(|after| self.outcomes[first + after].is_none())
                    .map(|after| PickRow {
                        drafts: &drafts(entry)[..after],
                        allowed: allowed.as_deref(),
                        ..row_of(first + after, sequence)
                    }),
            );
        }
        if rows.is_empty() {
            return Ok(());
        }
        picker.pick(&rows, &mut self.picked)?;
        for (row, picked) in rows.iter().zip(self.picked.drain(..)) {
            self.outcomes[row.row] = Some(outcome(picked));
        }
        Ok(())
    }

    /// What was picked for a row, or is picked now.
    pub(crate) fn take(
        &mut self,
        picker: &mut dyn Picker,
        row: usize,
        sequence: &mut Sequence,
        vocabulary: usize,
    ) -> Outcome {
        if let Some(outcome) = self.outcomes.get_mut(row).and_then(Option::take) {
            return outcome;
        }
        let mut mask = sequence.mask.take();
        let asked = match mask.as_deref_mut() {
            Some(mask) => self.ask(mask, sequence, vocabulary),
            None => Ok(None),
        };
        sequence.mask = mask;
        let allowed = match asked {
            Ok(allowed) => allowed,
            Err(outcome) => return outcome,
        };
        let row = PickRow {
            allowed: allowed.as_deref(),
            ..row_of(row, sequence)
        };
        let picked = picker.pick(&[row], &mut self.picked);
        // A backend that failed says so again at the next step; this sequence ends here.
        picked.map_err(|error| MaskError(error.to_string()))?;
        match self.picked.pop() {
            Some(picked) => outcome(picked),
            None => Err(MaskError("the backend picked no token".to_owned()).into()),
        }
    }

    /// The drafts of the sequences of a drafting pass that want one, in its order.
    pub(crate) fn drafts(
        &mut self,
        picker: &mut dyn Picker,
        batch: &Batch,
        scheduler: &Scheduler,
    ) -> Result<Vec<Option<TokenId>>, ExecuteError> {
        let wanted = batch.entries.iter().filter(|entry| entry.wants_logits);
        let mut rows = Vec::new();
        for (row, entry) in wanted.enumerate() {
            if let Some(sequence) = scheduler.sequences.get(&entry.sequence) {
                rows.push(PickRow {
                    drafts: &sequence.drafts,
                    logprobs: None,
                    ..row_of(row, sequence)
                });
            }
        }
        let mut tokens = vec![None; batch.logits_rows()];
        if !rows.is_empty() {
            picker.pick(&rows, &mut self.picked)?;
        }
        for (row, picked) in rows.iter().zip(self.picked.drain(..)) {
            tokens[row.row] = picked.token;
        }
        Ok(tokens)
    }

    /// The bits of the tokens that a mask allows, none where it allows all; an outcome where nothing is picked.
    fn ask(
        &mut self,
        mask: &mut dyn TokenMask,
        sequence: &Sequence,
        vocabulary: usize,
    ) -> Result<Option<Vec<u32>>, Outcome> {
        self.scratch.clear();
        self.scratch.resize(vocabulary, 0.0);
        let output = &sequence.tokens[sequence.request.prompt.len()..];
        match mask.restrict(output, &mut self.scratch) {
            Ok(Restriction::Free) => Ok(None),
            Ok(Restriction::Complete) => Err(Ok(None)),
            Err(error) => Err(Err(error.into())),
            Ok(Restriction::Masked) => Ok(Some(
                self.scratch
                    .chunks(32)
                    .map(|logits| {
                        let bits = logits.iter().enumerate();
                        bits.fold(0, |word, (bit, logit)| {
                            word | u32::from(*logit != f32::NEG_INFINITY) << bit
                        })
                    })
                    .collect(),
            )),
        }
    }
}

fn drafts(entry: &BatchEntry) -> &[TokenId] {
    &entry.tokens[entry.tokens.len() - entry.drafts..]
}

fn row_of(row: usize, sequence: &Sequence) -> PickRow<'_> {
    let parameters = &sequence.request.parameters;
    PickRow {
        row,
        parameters,
        tokens: &sequence.tokens,
        drafts: &[],
        prompt_len: sequence.request.prompt.len(),
        choice: sequence.choice,
        allowed: None,
        logprobs: parameters.logprobs,
    }
}

fn outcome(picked: Picked) -> Outcome {
    let Picked { token, logprobs } = picked;
    match token {
        Some(token) => Ok(Some(Sampled { token, logprobs })),
        None => Err(MaskError("no token is allowed".to_owned()).into()),
    }
}
