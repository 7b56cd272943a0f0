//! One token stream: what is known of it, what of that is computed, and where.
//!
//! Invariant: `tokens` is prompt plus output and only grows, by sampled tokens, never by drafts; `computed` of them are in
//! `blocks`; `chain[i]` names the prefix that ends with block `i`.

use std::sync::Arc;

use crate::batch::{BlockId, SequenceId, TokenId};
use crate::blocks::{BlockManager, PrefixHash};
use crate::limits::Limits;
use crate::mask::TokenMask;
use crate::request::{Event, EventKind, Request};

/// One choice of a request.
#[derive(Debug)]
pub struct Sequence {
    /// In order of arrival.
    pub id: SequenceId,
    /// What was asked; shared by the choices.
    pub request: Arc<Request>,
    /// Which choice this is.
    pub choice: u32,
    /// Prompt and output.
    pub tokens: Vec<TokenId>,
    /// Tokens in the cache.
    pub computed: usize,
    /// The block table.
    pub blocks: Vec<BlockId>,
    /// Names of the full blocks of `tokens`.
    pub chain: Vec<PrefixHash>,
    /// What the prediction layer expects to follow `tokens`; nothing but the next step looks at it.
    pub drafts: Vec<TokenId>,
    /// How many of `blocks` may be shared already.
    pub published: usize,
    /// Whether it ever ran.
    pub started: bool,
    /// Which tokens may come next; absent leaves them free.
    pub mask: Option<Box<dyn TokenMask>>,
    root: PrefixHash,
}

impl Sequence {
    /// A sequence that holds its prompt and no block, and room for all that it may become.
    pub fn new(
        id: SequenceId,
        request: Arc<Request>,
        choice: u32,
        root: PrefixHash,
        limits: &Limits,
    ) -> Self {
        let known = request.prompt.len() + request.resumed.len();
        let most = limits
            .max_model_len
            .min(request.prompt.len() + request.max_tokens)
            .max(known);
        let mut tokens = Vec::with_capacity(most);
        tokens.extend_from_slice(&request.prompt);
        tokens.extend_from_slice(&request.resumed);
        let blocks = most.div_ceil(limits.block_size);
        Self {
            id,
            tokens,
            mask: request
                .constraint
                .as_ref()
                .map(|constraint| constraint.0.start()),
            request,
            choice,
            computed: 0,
            blocks: Vec::with_capacity(blocks),
            chain: Vec::with_capacity(blocks),
            drafts: Vec::with_capacity(limits.draft_tokens),
            published: 0,
            started: false,
            root,
        }
    }

    /// Known tokens that are not computed yet; 1 while decoding.
    pub fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Tokens of output.
    pub fn generated(&self) -> usize {
        self.tokens.len() - self.request.prompt.len()
    }

    /// Names the full blocks that have no name yet. A name covers `ahead` tokens after its block too, where what the block
    /// caches depends on them.
    pub fn extend_chain(&mut self, block_size: usize, ahead: usize) {
        let full = self.tokens.len().saturating_sub(ahead) / block_size;
        while self.chain.len() < full {
            let index = self.chain.len();
            let previous = self.chain.last().copied().unwrap_or(self.root);
            let tokens = &self.tokens[index * block_size..(index + 1) * block_size + ahead];
            self.chain.push(previous.extend(tokens));
        }
    }

    /// Gives all blocks back, the tail first, so that it is evicted first. Tokens stay.
    pub fn release(&mut self, blocks: &mut BlockManager) {
        for block in self.blocks.drain(..).rev() {
            blocks.release(block);
        }
        self.computed = 0;
        self.published = 0;
        self.drafts.clear();
    }

    /// Begins again from what the client sent, for other weights.
    pub(crate) fn restart(&mut self, blocks: &mut BlockManager) {
        self.release(blocks);
        let known = self.request.prompt.len() + self.request.resumed.len();
        self.tokens.truncate(known);
        self.mask = self.request.constraint.as_ref().map(|c| c.0.start());
        self.started = false;
    }

    /// Names its blocks anew; it must hold none.
    pub(crate) fn set_root(&mut self, root: PrefixHash) {
        debug_assert!(self.blocks.is_empty());
        self.root = root;
        self.chain.clear();
    }

    /// An event about this sequence.
    pub fn event(&self, kind: EventKind) -> Event {
        Event {
            request: self.request.id,
            choice: self.choice,
            kind,
        }
    }
}
