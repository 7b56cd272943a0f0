//! Which sequences compute which tokens in the next step.
//!
//! Invariants: the running batch never holds more than `max_num_seqs` sequences, a step never more than
//! `max_num_batched_tokens` tokens; a sequence keeps every token it was given until it finishes, preempted or not; a
//! waiting or finished sequence holds no block.
//!
//! Rules: every decoding sequence gets its token first, then its drafts, then unfinished prefills get chunks in order of
//! arrival, then waiting sequences enter as [`crate::queue`] lets them. A sequence enters with the blocks of all its known
//! tokens, so only decoding ever runs out of blocks; then the youngest running sequence of the lowest priority gives all of
//! its blocks back and returns to the head of the queue, to compute its tokens again (most of them found in the prefix
//! cache).
//! Drafts are worth less than anything else: they take blocks that nobody holds, never more than half of what the decodes
//! leave of the step while others have tokens to compute, and give all back that was rejected.
//!
//! Surprise: nothing here decides what a token is. Sampling by (seed, position) in [`crate::engine`] makes the answer
//! independent of all the choices made here.

use std::collections::BTreeMap;

use crate::batch::{Batch, BatchEntry, BlockId, SequenceId, TokenId};
use crate::blocks::{BlockManager, PrefixHash};
use crate::limits::{DRAFT_TOKENS_MAX, Limits};
use crate::queue::{Queue, Ticket};
use crate::request::{Event, EventKind, FinishReason, Rejection, Request, RequestId};
use crate::sequence::Sequence;

/// Numbers that only grow, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Sequences that gave their blocks back.
    pub preemptions: u64,
    /// Prompt tokens looked up in the prefix cache.
    pub prefix_queries: u64,
    /// Prompt tokens found there.
    pub prefix_hits: u64,
    /// Prompt tokens of sequences that started, cached or computed.
    pub prompt_tokens: u64,
    /// Tokens computed again after a preemption.
    pub recomputed_tokens: u64,
    /// Tokens sampled.
    pub generation_tokens: u64,
    /// Entries that verified drafts.
    pub drafts: u64,
    /// Drafts verified.
    pub draft_tokens: u64,
    /// Drafts that were what was sampled, by their place in the entry.
    pub accepted_tokens: [u64; DRAFT_TOKENS_MAX],
    /// Sequences that ended because a logit was not finite.
    pub corrupted: u64,
    /// Sequences that ended because their mask failed.
    pub mask_failures: u64,
}

/// Bounds of the queue beside the count of its sequences.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Admission {
    /// Tokens that waiting requests may cost together; absent does not bound them.
    pub max_queued_tokens: Option<usize>,
}

/// An entry that never grows.
pub(crate) fn spare_entry(limits: &Limits) -> BatchEntry {
    let positions = limits.max_model_len + limits.draft_tokens;
    BatchEntry {
        tokens: Vec::with_capacity(limits.max_num_batched_tokens.min(positions)),
        blocks: Vec::with_capacity(positions.div_ceil(limits.block_size)),
        ..BatchEntry::default()
    }
}

/// The queue, the running batch and the blocks.
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) limits: Limits,
    pub(crate) blocks: BlockManager,
    pub(crate) sequences: BTreeMap<SequenceId, Sequence>,
    pub(crate) admission: Admission,
    waiting: Queue,
    /// By priority, then in order of arrival.
    running: Vec<SequenceId>,
    /// Entries for the next batch, with room for any chunk; what was never written to takes no memory.
    spare: Vec<BatchEntry>,
    next_sequence: u64,
    draining: bool,
    /// Names the weights in the names of prefixes.
    weights: String,
    weights_version: u64,
    pub(crate) counters: Counters,
}

impl Scheduler {
    /// An empty queue and free blocks.
    pub fn new(limits: Limits) -> Self {
        Self {
            blocks: BlockManager::new(limits.block_count),
            waiting: Queue::new(limits.max_num_batched_tokens),
            limits,
            admission: Admission::default(),
            sequences: BTreeMap::new(),
            running: Vec::with_capacity(limits.max_num_seqs),
            spare: (0..limits.max_num_seqs)
                .map(|_| spare_entry(&limits))
                .collect(),
            next_sequence: 0,
            draining: false,
            weights: String::new(),
            weights_version: 1,
            counters: Counters::default(),
        }
    }

    /// Puts the choices of a request into the queue.
    ///
    /// # Errors
    /// The request can never run, or not now: see [`Rejection`].
    pub fn submit(&mut self, request: Request) -> Result<(), Rejection> {
        self.admit(&request)?;
        let root = PrefixHash::root(&self.weights, &request.cache_salt);
        self.waiting.push(Ticket {
            sequence: SequenceId(self.next_sequence),
            priority: request.priority,
            tenant: request.tenant.clone(),
            cost: request.cost(),
            further: request.choices - 1,
        });
        let request = std::sync::Arc::new(request);
        for choice in 0..request.choices {
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            self.sequences.insert(
                id,
                Sequence::new(id, request.clone(), choice, root, &self.limits),
            );
        }
        Ok(())
    }

    fn admit(&self, request: &Request) -> Result<(), Rejection> {
        if self.draining {
            return Err(Rejection::Draining);
        }
        self.limits.check(request)?;
        let slots = self.limits.max_num_seqs - self.running.len();
        let limit = self.limits.max_queued_requests + slots;
        if self.waiting.len() + request.choices as usize > limit {
            return Err(Rejection::QueueFull {
                waiting: self.waiting.len(),
                limit: self.limits.max_queued_requests,
            });
        }
        self.admit_tokens(request)?;
        self.admit_share(request, limit)
    }

    /// An empty queue takes any request that can run at all.
    fn admit_tokens(&self, request: &Request) -> Result<(), Rejection> {
        let waiting = self.waiting.tokens();
        match self.admission.max_queued_tokens {
            Some(limit) if waiting > 0 && waiting + request.cost() > limit => {
                Err(Rejection::TokensQueued {
                    waiting,
                    cost: request.cost(),
                    limit,
                })
            }
            _ => Ok(()),
        }
    }

    /// In a queue that is more than half full, no tenant has more than its part while others wait.
    fn admit_share(&self, request: &Request, limit: usize) -> Result<(), Rejection> {
        let (waiting, tokens, tenants) = self.waiting.share(&request.tenant);
        if tenants < 2 || waiting == 0 {
            return Ok(());
        }
        let share = limit.div_ceil(tenants);
        let half_full = (self.waiting.len() + request.choices as usize) * 2 > limit;
        let over_count = half_full && waiting + request.choices as usize > share;
        let over_tokens = self.admission.max_queued_tokens.is_some_and(|most| {
            (self.waiting.tokens() + request.cost()) * 2 > most
                && tokens + request.cost() > most.div_ceil(tenants)
        });
        if over_count || over_tokens {
            return Err(Rejection::OverShare { waiting, share });
        }
        Ok(())
    }

    /// Ends all unfinished choices of a request and frees their blocks at once.
    pub fn finish_request(
        &mut self,
        request: RequestId,
        reason: FinishReason,
        events: &mut Vec<Event>,
    ) {
        self.finish_where(reason, events, |sequence| sequence.request.id == request);
    }

    /// Ends one choice, because the caller found a stop string in its text.
    pub fn finish_choice(
        &mut self,
        request: RequestId,
        choice: u32,
        reason: FinishReason,
        events: &mut Vec<Event>,
    ) {
        self.finish_where(reason, events, |sequence| {
            sequence.request.id == request && sequence.choice == choice
        });
    }

    /// Ends everything.
    pub fn finish_all(&mut self, reason: FinishReason, events: &mut Vec<Event>) {
        self.finish_where(reason, events, |_| true);
    }

    fn finish_where(
        &mut self,
        reason: FinishReason,
        events: &mut Vec<Event>,
        chosen: impl Fn(&Sequence) -> bool,
    ) {
        let ids: Vec<SequenceId> = self
            .sequences
            .values()
            .filter(|sequence| chosen(sequence))
            .map(|sequence| sequence.id)
            .collect();
        for id in ids {
            self.finish(id, reason, events);
        }
    }

    pub(crate) fn finish(&mut self, id: SequenceId, reason: FinishReason, events: &mut Vec<Event>) {
        let Some(mut sequence) = self.sequences.remove(&id) else {
            return;
        };
        sequence.release(&mut self.blocks);
        self.running.retain(|other| *other != id);
        self.waiting.remove(id);
        let request = &sequence.request;
        // Only what entered was charged.
        let unused = match sequence.started {
            true => request.max_tokens.saturating_sub(sequence.generated()),
            false => 0,
        };
        self.waiting
            .refund(request.priority, &request.tenant, unused);
        events.push(sequence.event(EventKind::Finished(reason)));
    }

    /// Keeps requests that have not begun in the queue, or lets them in again.
    pub fn hold(&mut self, holds: bool) {
        self.waiting.hold_new(holds);
    }

    /// Whether nothing has begun, so that the weights may be replaced.
    pub fn is_clear(&mut self) -> bool {
        self.release_further();
        self.running.is_empty() && self.waiting.begun().is_none()
    }

    /// Sends everything that has begun back to its prompt; output is void. For each choice that `may_restart` refuses,
    /// because its client could not be told, it ends instead.
    pub fn restart(&mut self, may_restart: impl Fn(RequestId) -> bool, events: &mut Vec<Event>) {
        let begun: Vec<SequenceId> = self
            .sequences
            .values()
            .filter(|sequence| sequence.started)
            .map(|sequence| sequence.id)
            .collect();
        // The youngest first: each goes to the head of the queue.
        for id in begun.into_iter().rev() {
            let Some(sequence) = self.sequences.get_mut(&id) else {
                continue;
            };
            if !may_restart(sequence.request.id) {
                self.finish(id, FinishReason::Replaced, events);
                continue;
            }
            sequence.restart(&mut self.blocks);
            events.push(sequence.event(EventKind::Restarted));
            let priority = sequence.request.priority;
            if let Some(index) = self.running.iter().position(|other| *other == id) {
                self.running.remove(index);
                self.waiting.push_preempted(id, priority);
            }
        }
    }

    /// Name and version of the weights.
    pub fn weights(&self) -> (&str, u64) {
        (&self.weights, self.weights_version)
    }

    /// The weights are other ones from now on: nothing that was cached is used again. Nothing may be running.
    pub fn begin_weights(&mut self, name: &str, version: u64) {
        assert!(
            self.running.is_empty(),
            "a sequence has blocks of the old weights"
        );
        self.weights_version = version;
        name.clone_into(&mut self.weights);
        self.blocks.forget_prefixes();
        for sequence in self.sequences.values_mut() {
            let root = PrefixHash::root(name, &sequence.request.cache_salt);
            sequence.set_root(root);
        }
    }

    /// Takes no new request from now on.
    pub fn drain(&mut self) {
        self.draining = true;
    }

    /// Whether [`Self::drain`] was called.
    pub fn is_draining(&self) -> bool {
        self.draining
    }

    /// Whether there is nothing to do.
    pub fn is_idle(&self) -> bool {
        self.sequences.is_empty()
    }

    /// Sequences in the running batch.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences in the queue.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// All unfinished sequences, in order of arrival.
    pub fn sequences(&self) -> impl Iterator<Item = &Sequence> {
        self.sequences.values()
    }

    /// How many sequences hold a block.
    pub fn references(&self, block: BlockId) -> u32 {
        self.blocks.references(block)
    }

    /// Sequences in the queue that wait for another choice of their own request, not for room.
    pub fn deferred(&self) -> usize {
        self.waiting.deferred()
    }

    /// Tokens that the waiting requests may compute and generate.
    pub fn queued_tokens(&self) -> usize {
        self.waiting.tokens()
    }

    /// Fills `batch` with the next step and reports sequences that start with it.
    pub fn schedule(&mut self, batch: &mut Batch, events: &mut Vec<Event>) {
        self.recycle(batch);
        let mut budget = self.limits.max_num_batched_tokens;
        let preempted = self.schedule_decodes(batch, &mut budget);
        self.schedule_drafts(batch, &mut budget);
        self.schedule_prefills(batch, &mut budget);
        // Whoever was preempted must not come straight back and push out the next one.
        if !preempted {
            self.schedule_waiting(batch, &mut budget, events);
        }
    }

    /// Empties a batch; its entries serve the next one.
    pub(crate) fn recycle(&mut self, batch: &mut Batch) {
        self.spare.append(&mut batch.entries);
    }

    /// One token for each sequence that has only its last token left to compute.
    fn schedule_decodes(&mut self, batch: &mut Batch, budget: &mut usize) -> bool {
        let mut preempted = false;
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            let id = self.running[index];
            if self.sequences[&id].remaining() != 1 {
                index += 1;
                continue;
            }
            if self.grow(id) {
                self.push_entry(batch, id, 1);
                *budget -= 1;
                index += 1;
            } else {
                // The last in the order gives way; that may be the very sequence that needs the block.
                preempted = true;
                if let Some(victim) = self.running.pop() {
                    self.preempt(victim);
                }
            }
        }
        preempted
    }

    /// Makes sure that the sequence's next token has a place.
    fn grow(&mut self, id: SequenceId) -> bool {
        self.cover(id, 1) == 1
    }

    /// Takes blocks for up to `count` positions after the computed ones, as far as there are free ones; how many positions
    /// have a place then.
    pub(crate) fn cover(&mut self, id: SequenceId, count: usize) -> usize {
        let block_size = self.limits.block_size;
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return 0;
        };
        while sequence.blocks.len() * block_size < sequence.computed + count
            && let Some(block) = self.blocks.allocate()
        {
            sequence.blocks.push(block);
        }
        count.min(sequence.blocks.len() * block_size - sequence.computed)
    }

    /// Gives back the blocks that none of the sequence's known tokens needs.
    pub(crate) fn roll_back(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            let needed = sequence.tokens.len().div_ceil(self.limits.block_size);
            while sequence.blocks.len() > needed
                && let Some(block) = sequence.blocks.pop()
            {
                self.blocks.release(block);
            }
        }
    }

    /// How many drafts could still become tokens of a sequence, the next sampled one aside.
    pub(crate) fn draft_room(&self, id: SequenceId) -> usize {
        self.sequences.get(&id).map_or(0, |sequence| {
            let asked = sequence.request.max_tokens - sequence.generated();
            let context = self.limits.max_model_len - sequence.tokens.len();
            let left = asked.min(context).saturating_sub(1);
            left.min(self.limits.draft_tokens)
        })
    }

    /// Appends drafts to the entries of decoding sequences, which are all there is in `batch` so far.
    fn schedule_drafts(&mut self, batch: &mut Batch, budget: &mut usize) {
        if self.limits.draft_tokens == 0 {
            return;
        }
        let prefills = self
            .running
            .iter()
            .any(|id| self.sequences[id].remaining() > 1);
        let mut allowance = match prefills || self.waiting.len() > 0 {
            true => *budget / 2,
            false => *budget,
        };
        for entry in &mut batch.entries {
            let id = entry.sequence;
            let wanted = self.sequences[&id].drafts.len().min(allowance);
            if wanted == 0 {
                continue;
            }
            let drafts = self.cover(id, 1 + wanted).saturating_sub(1);
            let sequence = &self.sequences[&id];
            entry.tokens.extend_from_slice(&sequence.drafts[..drafts]);
            entry.drafts = drafts;
            let held = entry.blocks.len();
            entry.blocks.extend_from_slice(&sequence.blocks[held..]);
            allowance -= drafts;
            *budget -= drafts;
        }
    }

    fn preempt(&mut self, id: SequenceId) {
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.release(&mut self.blocks);
            self.counters.preemptions += 1;
            self.waiting.push_preempted(id, sequence.request.priority);
        }
    }

    /// Chunks of prefills that began in an earlier step; their blocks are there.
    fn schedule_prefills(&mut self, batch: &mut Batch, budget: &mut usize) {
        for index in 0..self.running.len() {
            let id = self.running[index];
            let remaining = self.sequences[&id].remaining();
            let count = remaining.min(*budget);
            if remaining > 1 && count > 0 {
                self.push_entry(batch, id, count);
                *budget -= count;
            }
        }
    }

    /// A further choice waits until the first one has computed the prompt that they share.
    fn release_further(&mut self) {
        let sequences = &self.sequences;
        self.waiting.release(|first| {
            sequences
                .get(&first)
                .is_none_or(|first| first.computed >= first.request.prompt.len())
        });
    }

    fn schedule_waiting(&mut self, batch: &mut Batch, budget: &mut usize, events: &mut Vec<Event>) {
        self.release_further();
        while *budget > 0
            && self.running.len() < self.limits.max_num_seqs
            && let Some(id) = self.waiting.peek()
        {
            if !self.enter(id, events) {
                break;
            }
            self.waiting.take(id);
            let order = |id: SequenceId| (self.sequences[&id].request.priority, id);
            let position = self
                .running
                .partition_point(|other| order(*other) < order(id));
            self.running.insert(position, id);
            let count = self.sequences[&id].remaining().min(*budget);
            self.push_entry(batch, id, count);
            *budget -= count;
        }
    }

    /// Takes the blocks of all known tokens, cached ones as far as they reach.
    fn enter(&mut self, id: SequenceId, events: &mut Vec<Event>) -> bool {
        let (block_size, ahead) = (self.limits.block_size, self.tokens_ahead());
        let Some(sequence) = self.sequences.get_mut(&id) else {
            return false;
        };
        sequence.extend_chain(block_size, ahead);
        // The last token is always computed, since its logits are needed.
        let reusable = (sequence.tokens.len() - 1) / block_size;
        // A waiting sequence holds no block, but the memory of its table.
        let mut hits = std::mem::take(&mut sequence.blocks);
        hits.extend(self.blocks.lookup(&sequence.chain[..reusable]));
        let needed = sequence.tokens.len().div_ceil(block_size);
        let taken = needed - hits.len() + self.blocks.count_free(&hits);
        if taken > self.blocks.free() {
            hits.clear();
            sequence.blocks = hits;
            return false;
        }
        for &block in &hits {
            self.blocks.share(block);
        }
        let cached = hits.len() * block_size;
        sequence.computed = cached;
        sequence.published = hits.len();
        sequence.blocks = hits;
        while sequence.blocks.len() < needed {
            let Some(block) = self.blocks.allocate() else {
                break; // Counted above.
            };
            sequence.blocks.push(block);
        }
        self.counters.prefix_queries += sequence.tokens.len() as u64;
        self.counters.prefix_hits += cached as u64;
        if sequence.started {
            self.counters.recomputed_tokens += (sequence.tokens.len() - cached) as u64;
        } else {
            sequence.started = true;
            self.counters.prompt_tokens += sequence.request.prompt.len() as u64;
            events.push(sequence.event(EventKind::Started {
                cached_tokens: cached,
                weights_version: self.weights_version,
            }));
        }
        true
    }

    fn push_entry(&mut self, batch: &mut Batch, id: SequenceId, count: usize) {
        let sequence = &self.sequences[&id];
        let BatchEntry {
            mut tokens,
            mut blocks,
            ..
        } = self.spare.pop().unwrap_or_default();
        tokens.clear();
        tokens.extend_from_slice(&sequence.tokens[sequence.computed..][..count]);
        blocks.clear();
        blocks.extend_from_slice(&sequence.blocks);
        batch.entries.push(BatchEntry {
            sequence: id,
            tokens,
            start: sequence.computed,
            blocks,
            wants_logits: count == sequence.remaining(),
            drafts: 0,
        });
    }

    /// Says that `count` more tokens of a sequence are in its blocks; full blocks may be shared from now on.
    pub(crate) fn advance(&mut self, id: SequenceId, count: usize) {
        let (block_size, ahead) = (self.limits.block_size, self.tokens_ahead());
        if let Some(sequence) = self.sequences.get_mut(&id) {
            sequence.computed += count;
            sequence.extend_chain(block_size, ahead);
            let named = sequence.chain.len();
            for index in sequence.published..named.min(sequence.computed / block_size) {
                self.blocks
                    .publish(sequence.blocks[index], sequence.chain[index]);
                sequence.published = index + 1;
            }
        }
    }

    /// What a prediction layer caches at a position is made of the token after it, so the last position of a block depends on
    /// the first token of the next.
    fn tokens_ahead(&self) -> usize {
        usize::from(self.limits.draft_tokens > 0)
    }

    /// Appends a sampled token and ends the sequence where it must end.
    pub(crate) fn append(&mut self, id: SequenceId, token: TokenId) -> Option<FinishReason> {
        let sequence = self.sequences.get_mut(&id)?;
        sequence.tokens.push(token);
        self.counters.generation_tokens += 1;
        let request = &sequence.request;
        if !request.parameters.ignore_eos && request.stop_tokens.contains(&token) {
            Some(FinishReason::Stop)
        } else if sequence.generated() >= request.max_tokens
            || sequence.tokens.len() >= self.limits.max_model_len
        {
            Some(FinishReason::Length)
        } else {
            None
        }
    }
}
