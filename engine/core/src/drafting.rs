//! What the prediction layer computes after each step, and the drafts that it makes for the next.
//!
//! Invariants: the layer sees every position that the model computed and keeps, in the same step and with the token that
//! follows it, so its cache is a function of the tokens alone like the model's; where its first pass wants logits, the
//! sequence has been given its next token. Further drafts come from the layer's own hidden states and go into places
//! after the last computed token, which the next step writes again.
//!
//! Surprise: nothing depends on a draft but time. One that cannot be made (no block, no room, a logit that is not finite) is
//! left out.

use crate::batch::{
    Batch, BatchEntry, BlockId, DraftBatch, ExecuteError, Executor, Logits, SequenceId, TokenId,
};
use crate::limits::Limits;
use crate::picking::Picks;
use crate::sampling::{SampleContext, Sampler};
use crate::scheduler::{Scheduler, spare_entry};
use crate::sequence::Sequence;

/// The passes after a step.
#[derive(Debug)]
pub(crate) struct Drafting {
    pass: DraftBatch,
    next: DraftBatch,
    /// Entries for passes to come, with room for any chunk; enough for two passes.
    spare: Vec<BatchEntry>,
}

impl Drafting {
    /// No pass, and room for all that the limits allow.
    pub(crate) fn new(limits: &Limits) -> Self {
        let entries = match limits.draft_tokens {
            0 => 0,
            _ => limits.max_num_seqs,
        };
        let pass = || DraftBatch {
            batch: Batch {
                entries: Vec::with_capacity(entries),
            },
            rows: Vec::with_capacity(entries),
        };
        Self {
            pass: pass(),
            next: pass(),
            spare: (0..2 * entries).map(|_| spare_entry(limits)).collect(),
        }
    }

    /// Adds to the first pass the `kept` positions of a step's entry, whose tokens began at `row` of the step; `goes_on` says
    /// that the sequence was given a token and may have drafts after it.
    pub(crate) fn follow(
        &mut self,
        scheduler: &mut Scheduler,
        entry: &BatchEntry,
        row: usize,
        kept: usize,
        goes_on: bool,
    ) {
        let id = entry.sequence;
        let room = scheduler.draft_room(id);
        let Some(sequence) = scheduler.sequences.get_mut(&id) else {
            return;
        };
        sequence.drafts.clear();
        // Nothing follows the last position of a sequence that ended without a token.
        let end = sequence.tokens.len().min(entry.start + kept + 1);
        let tokens = &sequence.tokens[entry.start + 1..end];
        if tokens.is_empty() {
            return;
        }
        self.pass.rows.push(row);
        self.pass.batch.entries.push(fill(
            self.spare.pop().unwrap_or_default(),
            BatchEntryParts {
                sequence: id,
                tokens,
                start: entry.start,
                blocks: &entry.blocks,
                wants_logits: goes_on && room > 0,
            },
        ));
    }

    /// Runs the passes and leaves each sequence's drafts with it.
    ///
    /// # Errors
    /// The backend failed; there are no drafts.
    pub(crate) fn run(
        &mut self,
        executor: &mut dyn Executor,
        logits: &mut Logits,
        sampler: &mut Sampler,
        picks: &mut Picks,
        scheduler: &mut Scheduler,
    ) -> Result<(), ExecuteError> {
        while !self.pass.batch.is_empty() {
            // Where the backend samples, what it picked.
            let drafted = match executor.picker() {
                Some(picker) => picker
                    .compute_draft(&self.pass)
                    .and_then(|()| picks.drafts(picker, &self.pass.batch, scheduler))
                    .map(Some),
                None => executor.draft(&self.pass, logits).and_then(|()| {
                    let rows = self.pass.batch.logits_rows();
                    logits.expect(rows, scheduler.limits.vocabulary)?;
                    Ok(None)
                }),
            };
            let drafting = self.pass.batch.entries.iter().filter(|e| e.wants_logits);
            for (row, entry) in drafting.enumerate() {
                let id = entry.sequence;
                let Some(sequence) = scheduler.sequences.get_mut(&id) else {
                    continue;
                };
                let goes_on = match &drafted {
                    Ok(picked) => {
                        let token = match picked {
                            Some(tokens) => tokens[row],
                            None => draft(sampler, logits.row(row), sequence),
                        };
                        sequence.drafts.extend(token);
                        token.is_some()
                            && go_on(scheduler, id, row, &mut self.next, &mut self.spare)
                    }
                    Err(_) => {
                        sequence.drafts.clear();
                        false
                    }
                };
                if !goes_on {
                    // What the layer left beyond the known tokens has served.
                    scheduler.roll_back(id);
                }
            }
            std::mem::swap(&mut self.pass, &mut self.next);
            self.spare.append(&mut self.next.batch.entries);
            self.next.clear();
            drafted?;
        }
        Ok(())
    }
}

/// A draft after those of the sequence.
fn draft(sampler: &mut Sampler, row: &[f32], sequence: &mut Sequence) -> Option<TokenId> {
    let known = sequence.tokens.len();
    // As if the drafts so far had been sampled; they are taken off again at once.
    sequence.tokens.extend_from_slice(&sequence.drafts);
    let context = SampleContext {
        tokens: &sequence.tokens,
        prompt_len: sequence.request.prompt.len(),
        choice: sequence.choice,
    };
    let token = sampler.draft(row, &sequence.request.parameters, context);
    sequence.tokens.truncate(known);
    token
}

/// Lets a sequence draft another token after its last draft, if one may follow and has a place.
fn go_on(
    scheduler: &mut Scheduler,
    id: SequenceId,
    row: usize,
    next: &mut DraftBatch,
    spare: &mut Vec<BatchEntry>,
) -> bool {
    let room = scheduler.draft_room(id);
    let drafts = scheduler.sequences[&id].drafts.len();
    // The layer's entry for a draft lies where the token before it does.
    if drafts >= room || scheduler.cover(id, drafts) < drafts {
        return false;
    }
    let sequence = &scheduler.sequences[&id];
    next.rows.push(row);
    next.batch.entries.push(fill(
        spare.pop().unwrap_or_default(),
        BatchEntryParts {
            sequence: id,
            tokens: &sequence.drafts[drafts - 1..],
            start: sequence.computed + drafts - 1,
            blocks: &sequence.blocks,
            wants_logits: true,
        },
    ));
    true
}

/// An entry of a pass, before it has memory of its own.
struct BatchEntryParts<'a> {
    sequence: SequenceId,
    tokens: &'a [TokenId],
    start: usize,
    blocks: &'a [BlockId],
    wants_logits: bool,
}

/// The entry in the memory of an earlier one.
fn fill(spare: BatchEntry, parts: BatchEntryParts<'_>) -> BatchEntry {
    let BatchEntry {
        mut tokens,
        mut blocks,
        ..
    } = spare;
    tokens.clear();
    tokens.extend_from_slice(parts.tokens);
    blocks.clear();
    blocks.extend_from_slice(parts.blocks);
    BatchEntry {
        sequence: parts.sequence,
        tokens,
        start: parts.start,
        blocks,
        wants_logits: parts.wants_logits,
        drafts: 0,
    }
}
