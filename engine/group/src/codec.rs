//! What rank 0 tells the others to do, as bytes.
//!
//! Numbers are little-endian; a list is its length and its elements. Invariant: what was encoded comes back equal, and
//! anything else is refused without taking more memory than the message has.

use engine_core::{Batch, BatchEntry, BlockId, DraftBatch, SequenceId, TokenId};
use thiserror::Error;

/// What all ranks do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Compute a batch.
    Execute(Batch),
    /// Run the prediction layer.
    Draft(DraftBatch),
    /// Answer that you are there.
    Ping,
    /// The end: rank 0 has nothing more to compute.
    End,
}

/// A message that is no command.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("byte {at} of a message of {bytes} is not what a command has there")]
pub struct CodecError {
    at: usize,
    bytes: usize,
}

const EXECUTE: u8 = 1;
const DRAFT: u8 = 2;
const PING: u8 = 3;
const END: u8 = 4;

/// Bytes of an entry without its lists' elements: less than that, and there is none.
const ENTRY_BYTES_MIN: usize = 8 + 4 + 8 + 4 + 1 + 4;

/// Puts the command to compute `batch` in `to`.
pub(crate) fn encode_execute(batch: &Batch, to: &mut Vec<u8>) {
    to.clear();
    to.push(EXECUTE);
    put_batch(batch, to);
}

/// Puts the command to run the prediction layer in `to`.
pub(crate) fn encode_draft(pass: &DraftBatch, to: &mut Vec<u8>) {
    to.clear();
    to.push(DRAFT);
    put_batch(&pass.batch, to);
    put_length(pass.rows.len(), to);
    for row in &pass.rows {
        to.extend((*row as u64).to_le_bytes());
    }
}

impl Command {
    /// The command as bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut to = Vec::new();
        match self {
            Self::Execute(batch) => encode_execute(batch, &mut to),
            Self::Draft(pass) => encode_draft(pass, &mut to),
            Self::Ping => to.push(PING),
            Self::End => to.push(END),
        }
        to
    }

    /// Reads a command.
    ///
    /// # Errors
    /// The bytes are no command, or more than one.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        let mut reader = Reader { bytes, at: 0 };
        let command = reader.command().filter(|_| reader.at == bytes.len());
        command.ok_or(CodecError {
            at: reader.at,
            bytes: bytes.len(),
        })
    }
}

fn put_length(length: usize, to: &mut Vec<u8>) {
    to.extend((length as u32).to_le_bytes());
}

fn put_batch(batch: &Batch, to: &mut Vec<u8>) {
    put_length(batch.entries.len(), to);
    for entry in &batch.entries {
        let BatchEntry {
            sequence,
            tokens,
            start,
            blocks,
            wants_logits,
            drafts,
        } = entry;
        to.extend(sequence.0.to_le_bytes());
        put_length(tokens.len(), to);
        tokens
            .iter()
            .for_each(|token| to.extend(token.0.to_le_bytes()));
        to.extend((*start as u64).to_le_bytes());
        put_length(blocks.len(), to);
        blocks
            .iter()
            .for_each(|block| to.extend(block.0.to_le_bytes()));
        to.push(u8::from(*wants_logits));
        put_length(*drafts, to);
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let found = self.bytes.get(self.at..self.at + N)?;
        self.at += N;
        found.try_into().ok()
    }

    fn word(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn long(&mut self) -> Option<usize> {
        usize::try_from(u64::from_le_bytes(self.take()?)).ok()
    }

    /// A list of elements of at least `bytes_min` bytes each.
    fn list<T>(
        &mut self,
        bytes_min: usize,
        element: impl Fn(&mut Self) -> Option<T>,
    ) -> Option<Vec<T>> {
        let length = self.word()? as usize;
        if length.checked_mul(bytes_min)? > self.bytes.len() - self.at {
            return None;
        }
        (0..length).map(|_| element(self)).collect()
    }

    fn batch(&mut self) -> Option<Batch> {
        let entries = self.list(ENTRY_BYTES_MIN, |reader| {
            Some(BatchEntry {
                sequence: SequenceId(u64::from_le_bytes(reader.take()?)),
                tokens: reader.list(4, |reader| reader.word().map(TokenId))?,
                start: reader.long()?,
                blocks: reader.list(4, |reader| reader.word().map(BlockId))?,
                wants_logits: match reader.take()? {
                    [0] => false,
                    [1] => true,
                    _ => return None,
                },
                drafts: reader.word()? as usize,
            })
        })?;
        Some(Batch { entries })
    }

    fn command(&mut self) -> Option<Command> {
        match self.take()? {
            [EXECUTE] => self.batch().map(Command::Execute),
            [DRAFT] => {
                let batch = self.batch()?;
                let rows = self.list(8, Self::long)?;
                Some(Command::Draft(DraftBatch { batch, rows }))
            }
            [PING] => Some(Command::Ping),
            [END] => Some(Command::End),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    prop_compose! {
        fn entry()(
            sequence in any::<u64>(),
            tokens in prop::collection::vec(any::<u32>(), 0..6),
            start in any::<u32>(),
            blocks in prop::collection::vec(any::<u32>(), 0..6),
            wants_logits in any::<bool>(),
            drafts in 0usize..9,
        ) -> BatchEntry {
            BatchEntry {
                sequence: SequenceId(sequence),
                tokens: tokens.into_iter().map(TokenId).collect(),
                start: start as usize,
                blocks: blocks.into_iter().map(BlockId).collect(),
                wants_logits,
                drafts,
            }
        }
    }

    fn command() -> impl Strategy<Value = Command> {
        let batch = || prop::collection::vec(entry(), 0..5).prop_map(|entries| Batch { entries });
        let rows = prop::collection::vec(0usize..1000, 0..5);
        prop_oneof![
            batch().prop_map(Command::Execute),
            (batch(), rows).prop_map(|(batch, rows)| Command::Draft(DraftBatch { batch, rows })),
            Just(Command::Ping),
            Just(Command::End),
        ]
    }

    proptest! {
        #[test]
        fn a_command_comes_back_and_no_part_of_it_is_one(command in command(), cut in any::<prop::sample::Index>()) {
            let bytes = command.encode();
            prop_assert_eq!(Command::decode(&bytes), Ok(command));
            prop_assert!(Command::decode(&bytes[..cut.index(bytes.len())]).is_err());
            let longer = [bytes.as_slice(), &[0]].concat();
            prop_assert!(Command::decode(&longer).is_err());
        }

        #[test]
        fn no_bytes_are_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Command::decode(&bytes);
        }
    }

    #[test]
    fn a_length_beyond_the_message_takes_no_memory() {
        for bytes in [vec![EXECUTE, 255, 255, 255, 255], vec![9], vec![]] {
            assert!(Command::decode(&bytes).is_err(), "{bytes:?}");
        }
    }
}
