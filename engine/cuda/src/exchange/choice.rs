//! Which way ranks exchange. They agree on it over the group's connections: every step of it is told to all, so that all
//! go the same way or none.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use engine_group::{Columns, GroupError, ProcessGroup};
use kernels::driver::{Arena, Communicator, Nccl as Library, NcclId, Stream};
use thiserror::Error;

use super::nccl::Nccl;
use crate::layout::Span;
use crate::{CudaError, Gpu};

/// What a rank tells in a step: whether it went well, and a text, an identifier or nothing.
const TOLD_BYTES: usize = 256;
/// Bytes of a rank's slot in the check.
const CHECKED_BYTES: usize = 4096;
/// Time for NCCL to connect the ranks, which takes seconds among many.
const MEETING: Duration = Duration::from_secs(120);

/// How ranks on GPUs exchange activations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExchangeChoice {
    /// Over NCCL where every rank has it and it passes a check.
    #[default]
    Auto,
    /// By way of host memory.
    Host,
    /// Over NCCL, or not at all.
    Nccl,
}

impl fmt::Display for ExchangeChoice {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Auto => "auto",
            Self::Host => "host",
            Self::Nccl => "nccl",
        })
    }
}

/// A name of no way.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("ranks cannot exchange over {0:?}; ask for auto, host or nccl")]
pub struct UnknownExchange(String);

impl FromStr for ExchangeChoice {
    type Err = UnknownExchange;

    fn from_str(name: &str) -> Result<Self, UnknownExchange> {
        let all = [Self::Auto, Self::Host, Self::Nccl];
        let named = all.into_iter().find(|choice| choice.to_string() == name);
        named.ok_or_else(|| UnknownExchange(name.to_owned()))
    }
}

/// What came of a step on this rank.
type Told<T> = Result<T, String>;

/// NCCL's communicator, or none, and why.
pub(super) fn choose(
    gpu: &Gpu,
    group: &dyn ProcessGroup,
    at: (&Arena, &Stream),
    slots: Span,
) -> Result<(Option<Nccl>, String), CudaError> {
    let choice = gpu.exchange;
    match agree(gpu, group, at, slots)? {
        Ok((nccl, version)) => Ok((Some(nccl), format!("NCCL {version}"))),
        Err(reason) if choice == ExchangeChoice::Nccl => Err(CudaError::Exchange(reason)),
        Err(reason) => Ok((None, format!("host memory: {reason}"))),
    }
}

fn agree(
    gpu: &Gpu,
    group: &dyn ProcessGroup,
    at: (&Arena, &Stream),
    slots: Span,
) -> Result<Told<(Nccl, String)>, CudaError> {
    // Ranks come from opening files and from checks of their devices, each in its time.
    group.barrier(2 * MEETING)?;
    let table = Table { group };
    let library = match gpu.exchange {
        ExchangeChoice::Host => Err("it was asked for".to_owned()),
        ExchangeChoice::Auto | ExchangeChoice::Nccl => {
            Library::load(gpu.nccl.as_deref()).map_err(|error| error.to_string())
        }
    };
    let version = library.as_ref().map(|it| it.version().into_bytes());
    let versions = match table.all(version.map_err(Clone::clone))? {
        Ok(versions) => versions,
        Err(reason) => return Ok(Err(reason)),
    };
    let Ok(library) = library else {
        return Err(CudaError::Graph(
            "a rank without NCCL that all have agreed on",
        ));
    };
    let version = library.version();
    if let Some((rank, other)) = versions
        .iter()
        .enumerate()
        .find(|(_, it)| **it != versions[0])
    {
        let other = String::from_utf8_lossy(other);
        let first = String::from_utf8_lossy(&versions[0]);
        return Ok(Err(format!(
            "rank {rank} has NCCL {other} and rank 0 has {first}"
        )));
    }
    let id = match group.rank().is_leader() {
        true => library
            .identifier()
            .map(|id| id.0.to_vec())
            .map_err(|error| error.to_string()),
        false => Ok(Vec::new()),
    };
    let ids = match table.all(id)? {
        Ok(ids) => ids,
        Err(reason) => return Ok(Err(reason)),
    };
    let id: Told<[u8; 128]> = ids[0]
        .as_slice()
        .try_into()
        .map_err(|_| "rank 0 gave no identifier".to_owned());
    let met = id.and_then(|id| meet(gpu, group, &library, NcclId(id)));
    // Whoever waits for it longest has given up by then.
    group.barrier(2 * MEETING)?;
    if let Err(reason) = table.all(met.as_ref().map(|_| Vec::new()).map_err(Clone::clone))? {
        return Ok(Err(reason));
    }
    let Ok(communicator) = met else {
        return Err(CudaError::Graph(
            "a rank that all have met and that has met nobody",
        ));
    };
    let nccl = Nccl {
        group: communicator,
        slots,
        rank: group.rank().index(),
        ranks: group.rank().count(),
    };
    let checked = check(&nccl, group, at);
    // One that failed at once waits for those that wait for it.
    group.barrier(2 * MEETING)?;
    Ok(table
        .all(checked.map(|()| Vec::new()))?
        .map(|_| (nccl, version)))
}

fn meet(
    gpu: &Gpu,
    group: &dyn ProcessGroup,
    library: &Arc<Library>,
    id: NcclId,
) -> Told<Communicator> {
    let place = (group.rank().index(), group.rank().count());
    Communicator::meet(library, &gpu.device, id, place, MEETING).map_err(|error| error.to_string())
}

/// Moves known bytes by every operation that a pass uses, which also connects whoever has to be connected for it. A rank that
/// got wrong ones goes on with the others, which wait for it.
fn check(nccl: &Nccl, group: &dyn ProcessGroup, (arena, stream): (&Arena, &Stream)) -> Told<()> {
    let bytes = CHECKED_BYTES * nccl.ranks;
    let mark = |rank: usize| rank as u8 + 1;
    let expected: Vec<u8> = (0..bytes).map(|at| mark(at / CHECKED_BYTES)).collect();
    let moved = || -> Result<Vec<&str>, CudaError> {
        let slots = arena.part(nccl.slots.at, bytes)?;
        let own = slots.cut(nccl.rank * CHECKED_BYTES, CHECKED_BYTES);
        let mut wrong = Vec::new();
        for what in ["a gather", "a sum", "a gather to rank 0"] {
            arena.fill(stream, slots, 0)?;
            arena.fill(stream, own, mark(nccl.rank))?;
            match what {
                "a gather" => nccl.group.all_gather(arena, stream, slots)?,
                "a sum" => nccl.group.add_bits(arena, stream, slots)?,
                _ => nccl.group.gather(arena, stream, slots)?,
            }
            nccl.settle(stream, group)?;
            let mut found = vec![0u8; bytes];
            arena.read(stream, slots, &mut found)?;
            let gets_all = nccl.rank == 0 || what != "a gather to rank 0";
            if gets_all && found != expected {
                wrong.push(what);
            }
        }
        Ok(wrong)
    };
    match moved() {
        Ok(wrong) if wrong.is_empty() => Ok(()),
        Ok(wrong) => Err(format!("it moved wrong bytes in {}", wrong.join(", "))),
        Err(error) => Err(error.to_string()),
    }
}

/// Where ranks tell each other how a step went.
struct Table<'a> {
    group: &'a dyn ProcessGroup,
}

impl Table<'_> {
    /// What every rank has to tell when it went well for all; else the first rank's reason.
    fn all(&self, own: Told<Vec<u8>>) -> Result<Told<Vec<Vec<u8>>>, GroupError> {
        let rank = self.group.rank();
        let mut table = vec![0u8; rank.count() * TOLD_BYTES];
        let (is_well, told) = match &own {
            Ok(told) => (true, told.as_slice()),
            Err(reason) => (false, reason.as_bytes()),
        };
        let told = &told[..told.len().min(TOLD_BYTES - 3)];
        let place = &mut table[rank.index() * TOLD_BYTES..][..TOLD_BYTES];
        place[0] = u8::from(is_well);
        place[1..3].copy_from_slice(&(told.len() as u16).to_le_bytes());
        place[3..3 + told.len()].copy_from_slice(told);
        let layout = Columns {
            rank,
            rows: 1,
            columns: rank.count(),
            unit: 1,
            element: TOLD_BYTES,
            skip: 0,
            stride: table.len(),
        };
        self.group.all_gather(&mut table, &layout)?;
        let mut all = Vec::new();
        for (rank, place) in table.chunks(TOLD_BYTES).enumerate() {
            let length = usize::from(u16::from_le_bytes([place[1], place[2]]));
            let told = &place[3..(3 + length).min(TOLD_BYTES)];
            if place[0] == 0 {
                let reason = String::from_utf8_lossy(told);
                return Ok(Err(format!("rank {rank}: {reason}")));
            }
            all.push(told.to_vec());
        }
        Ok(Ok(all))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_documentation() {
        for (name, choice) in [
            ("auto", ExchangeChoice::Auto),
            ("host", ExchangeChoice::Host),
            ("nccl", ExchangeChoice::Nccl),
        ] {
            assert_eq!(name.parse(), Ok(choice));
        }
        let error = "tcp".parse::<ExchangeChoice>().unwrap_err().to_string();
        assert_eq!(
            error,
            r#"ranks cannot exchange over "tcp"; ask for auto, host or nccl"#
        );
    }
}
