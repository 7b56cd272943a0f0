//! Who owns which block of the key/value cache, and which full blocks may be shared.
//!
//! Invariant: every block is either in use (reference count above zero) or on the free list, never both. A block
//! with a hash holds exactly the tokens that the hash names, so whoever has the same prefix may use it; only full
//! blocks get a hash and a block with a hash is never written again while it is in use.
//!
//! Surprise: a free block keeps its hash and its contents until it is handed out again, which is all the prefix cache
//! there is. The free list is in order of release, so what was used longest ago is evicted first.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};

use sha2::{Digest, Sha256};

use crate::batch::{BlockId, TokenId};

/// Names the whole prefix that ends with a block: a hash over the previous block's name and this block's tokens.
/// 128 bits of SHA-256, so that nobody can make two prompts that share a block by accident or on purpose, and so that
/// two replicas give the same prefix the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PrefixHash(pub [u8; 16]);

impl PrefixHash {
    /// The start of a chain; prefixes are shared only under the same weights and the same salt.
    pub fn root(weights: &str, salt: &str) -> Self {
        // Of fixed length, so that no salt can pass for other weights.
        let weights = Sha256::digest(weights.as_bytes());
        Self::of(
            Sha256::new()
                .chain_update(weights)
                .chain_update(salt.as_bytes()),
        )
    }

    /// The name of this prefix extended by one full block.
    pub fn extend(self, tokens: &[TokenId]) -> Self {
        let mut hasher = Sha256::new().chain_update(self.0);
        for token in tokens {
            hasher.update(token.0.to_le_bytes());
        }
        Self::of(hasher)
    }

    fn of(hasher: Sha256) -> Self {
        let digest = hasher.finalize();
        let mut name = [0; 16];
        name.copy_from_slice(&digest[..16]);
        Self(name)
    }
}

const NONE: u32 = u32::MAX;

#[derive(Clone, Debug)]
struct Slot {
    references: u32,
    hash: Option<PrefixHash>,
    previous: u32,
    next: u32,
}

/// Hands out blocks and remembers prefixes.
#[derive(Debug)]
pub struct BlockManager {
    slots: Vec<Slot>,
    first_free: u32,
    last_free: u32,
    free: usize,
    cached: HashMap<PrefixHash, BlockId, BuildHasherDefault<DefaultHasher>>,
}

impl BlockManager {
    /// All of `count` blocks free and empty.
    pub fn new(count: usize) -> Self {
        let mut manager = Self {
            slots: vec![
                Slot {
                    references: 0,
                    hash: None,
                    previous: NONE,
                    next: NONE,
                };
                count
            ],
            first_free: NONE,
            last_free: NONE,
            free: 0,
            // At most one name a block; with twice the room, the map never grows.
            cached: HashMap::with_capacity_and_hasher(2 * count, BuildHasherDefault::default()),
        };
        for index in 0..count {
            manager.push_back(BlockId(index as u32));
        }
        manager
    }

    /// Blocks in total.
    pub fn count(&self) -> usize {
        self.slots.len()
    }

    /// Blocks that can be handed out now, cached ones included.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Blocks that sequences hold.
    pub fn used(&self) -> usize {
        self.slots.len() - self.free
    }

    /// How many sequences hold `block`.
    pub fn references(&self, block: BlockId) -> u32 {
        self.slots[block.index()].references
    }

    /// A block for writing, the one that was released longest ago; what it cached is forgotten.
    pub fn allocate(&mut self) -> Option<BlockId> {
        if self.first_free == NONE {
            return None;
        }
        let block = BlockId(self.first_free);
        self.unlink(block);
        let slot = &mut self.slots[block.index()];
        slot.references = 1;
        if let Some(hash) = slot.hash.take() {
            self.cached.remove(&hash);
        }
        Some(block)
    }

    /// The longest run of cached blocks for a chain of prefix names.
    pub fn lookup(&self, chain: &[PrefixHash]) -> impl Iterator<Item = BlockId> {
        chain
            .iter()
            .map_while(|hash| self.cached.get(hash).copied())
    }

    /// How many of `blocks` are on the free list, that is, would be taken from it by [`Self::share`].
    pub fn count_free(&self, blocks: &[BlockId]) -> usize {
        blocks
            .iter()
            .filter(|block| self.references(**block) == 0)
            .count()
    }

    /// One more holder of a cached block.
    pub fn share(&mut self, block: BlockId) {
        if self.slots[block.index()].references == 0 {
            self.unlink(block);
        }
        self.slots[block.index()].references += 1;
    }

    /// One holder less; a block without holders is free but keeps its contents until it is needed.
    pub fn release(&mut self, block: BlockId) {
        let slot = &mut self.slots[block.index()];
        assert!(slot.references > 0, "{block:?} was released twice");
        slot.references -= 1;
        if slot.references == 0 {
            // A block that caches nothing is the best one to hand out next.
            if slot.hash.is_some() {
                self.push_back(block);
            } else {
                self.push_front(block);
            }
        }
    }

    /// Forgets all prefixes: what the blocks hold is of no use any more.
    pub fn forget_prefixes(&mut self) {
        self.cached.clear();
        for slot in &mut self.slots {
            slot.hash = None;
        }
    }

    /// Says that `block` is full and holds the prefix `hash`. If another block already does, that one stays cached.
    pub fn publish(&mut self, block: BlockId, hash: PrefixHash) {
        if let std::collections::hash_map::Entry::Vacant(entry) = self.cached.entry(hash) {
            entry.insert(block);
            self.slots[block.index()].hash = Some(hash);
        }
    }

    fn push_back(&mut self, block: BlockId) {
        let previous = std::mem::replace(&mut self.last_free, block.0);
        let slot = &mut self.slots[block.index()];
        (slot.previous, slot.next) = (previous, NONE);
        match previous {
            NONE => self.first_free = block.0,
            _ => self.slots[previous as usize].next = block.0,
        }
        self.free += 1;
    }

    fn push_front(&mut self, block: BlockId) {
        let next = std::mem::replace(&mut self.first_free, block.0);
        let slot = &mut self.slots[block.index()];
        (slot.previous, slot.next) = (NONE, next);
        match next {
            NONE => self.last_free = block.0,
            _ => self.slots[next as usize].previous = block.0,
        }
        self.free += 1;
    }

    fn unlink(&mut self, block: BlockId) {
        let Slot { previous, next, .. } = self.slots[block.index()];
        match previous {
            NONE => self.first_free = next,
            _ => self.slots[previous as usize].next = next,
        }
        match next {
            NONE => self.last_free = previous,
            _ => self.slots[next as usize].previous = previous,
        }
        self.free -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chain(blocks: &[&[u32]]) -> Vec<PrefixHash> {
        let mut hash = PrefixHash::root("", "");
        blocks
            .iter()
            .map(|ids| {
                let tokens: Vec<TokenId> = ids.iter().copied().map(TokenId).collect();
                hash = hash.extend(&tokens);
                hash
            })
            .collect()
    }

    #[test]
    fn a_released_prefix_is_found_again_and_shared() {
        let mut blocks = BlockManager::new(4);
        let chain = chain(&[&[1, 2], &[3, 4]]);
        let first = blocks.allocate().unwrap();
        let second = blocks.allocate().unwrap();
        blocks.publish(first, chain[0]);
        blocks.publish(second, chain[1]);
        blocks.release(second);
        blocks.release(first);
        assert_eq!(blocks.free(), 4);
        assert!(blocks.lookup(&chain).eq([first, second]));
        assert_eq!(blocks.count_free(&[first, second]), 2);
        blocks.share(first);
        blocks.share(first);
        assert_eq!((blocks.free(), blocks.references(first)), (3, 2));
        blocks.release(first);
        assert_eq!(blocks.free(), 3);
    }

    #[test]
    fn empty_blocks_go_first_and_then_the_longest_unused() {
        let mut blocks = BlockManager::new(3);
        let chain = chain(&[&[1], &[2]]);
        let held: Vec<BlockId> = (0..3).map(|_| blocks.allocate().unwrap()).collect();
        assert_eq!(blocks.allocate(), None);
        blocks.publish(held[0], chain[0]);
        blocks.publish(held[1], chain[1]);
        // A sequence releases its tail first, so the tail of a prefix is evicted before its start.
        for block in [held[1], held[0], held[2]] {
            blocks.release(block);
        }
        assert_eq!(blocks.allocate(), Some(held[2]));
        assert_eq!(blocks.allocate(), Some(held[1]));
        assert!(blocks.lookup(&chain).eq([held[0]]));
        assert_eq!(blocks.allocate(), Some(held[0]));
        assert_eq!(blocks.lookup(&chain).next(), None);
    }

    #[test]
    fn prefixes_under_different_salts_have_nothing_in_common() {
        let tokens = [TokenId(1)];
        let root = PrefixHash::root("", "a");
        assert_ne!(
            root.extend(&tokens),
            PrefixHash::root("", "b").extend(&tokens)
        );
        assert_ne!(
            root.extend(&tokens),
            PrefixHash::root("a", "").extend(&tokens),
            "weights are no salt"
        );
        assert_ne!(root.extend(&tokens), root.extend(&[TokenId(2)]));
    }

    #[test]
    #[should_panic(expected = "released twice")]
    fn releasing_twice_is_a_bug() {
        let mut blocks = BlockManager::new(1);
        let block = blocks.allocate().unwrap();
        blocks.release(block);
        blocks.release(block);
    }
}
