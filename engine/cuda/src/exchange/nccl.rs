//! From device to device over NCCL, in the order of the stream and without the host: a pass can be recorded.
//!
//! Columns are packed, gathered and laid out again, as many rows at a time as the slots hold. Rows that one rank has and the
//! others have zeros for are added up as integers: a sum of bits with zeros is these bits, in whatever order NCCL adds.
//! That moves twice the bytes of a gather, and in return nobody has to know on the host whose rows they are.

use std::time::{Duration, Instant};

use engine_group::ProcessGroup;
use kernels::driver::{Arena, Communicator, DriverError, Part, Stream};
use kernels::params::ShareColumnsParams;
use kernels::plan::{self, Launch};

use super::{Rows, Shared};
use crate::CudaError;
use crate::layout::Span;

/// Time between two looks at the stream, and at the other ranks.
const LOOK: Duration = Duration::from_micros(20);
const LOOK_AROUND: Duration = Duration::from_millis(5);

/// See the module.
#[derive(Debug)]
pub(super) struct Nccl {
    pub group: Communicator,
    /// Room for the packed columns of all ranks.
    pub slots: Span,
    pub rank: usize,
    pub ranks: usize,
}

/// What is moved at a time.
struct Turn {
    rows: usize,
    first: usize,
    slots: Part,
}

impl Nccl {
    /// What must have been loaded before a pass is recorded.
    pub fn kernels(ranks: usize) -> Result<[Launch; 1], CudaError> {
        Ok([plan::share_columns(1, ranks, 16, ranks, true)?])
    }

    pub fn columns(&self, arena: &Arena, stream: &Stream, shared: Shared) -> Result<(), CudaError> {
        self.by_turns(arena, shared, |turn| {
            self.share((arena, stream), shared, turn, false)?;
            self.group.all_gather(arena, stream, turn.slots)?;
            self.share((arena, stream), shared, turn, true)
        })
    }

    /// Rank 0 gets the columns of all.
    pub fn logits(&self, arena: &Arena, stream: &Stream, shared: Shared) -> Result<(), CudaError> {
        let leads = self.rank == 0;
        self.by_turns(arena, shared, |turn| {
            if !leads {
                self.share((arena, stream), shared, turn, false)?;
            }
            self.group.gather(arena, stream, turn.slots)?;
            match leads {
                true => self.share((arena, stream), shared, turn, true),
                false => Ok(()),
            }
        })
    }

    /// Rows that one rank has and the others have zeros for.
    pub fn add(&self, arena: &Arena, stream: &Stream, rows: Rows) -> Result<(), CudaError> {
        let part = arena.part(rows.span.at, rows.count * rows.row_bytes)?;
        Ok(self.group.add_bits(arena, stream, part)?)
    }

    /// Waits for the stream as long as the others are there, at most for the group's timeout.
    pub fn settle(&self, stream: &Stream, others: &dyn ProcessGroup) -> Result<(), CudaError> {
        let settled = self.look(stream, others);
        if settled.is_err() {
            // What waits on the device for another rank would wait for ever.
            self.group.abort();
        }
        settled
    }

    fn look(&self, stream: &Stream, others: &dyn ProcessGroup) -> Result<(), CudaError> {
        let began = Instant::now();
        let mut looked_around = began;
        while !stream.is_idle()? {
            let now = Instant::now();
            if now - looked_around >= LOOK_AROUND {
                looked_around = now;
                others.check()?;
                self.failed(others)?;
            }
            if now - began >= others.timeout() {
                return Err(DriverError::Late {
                    what: "a step of the ranks over NCCL",
                    seconds: others.timeout().as_secs(),
                }
                .into());
            }
            std::thread::sleep(LOOK);
        }
        self.failed(others)
    }

    /// What NCCL failed with. The group's connections say which rank is gone, and NCCL may see it a moment earlier.
    fn failed(&self, others: &dyn ProcessGroup) -> Result<(), CudaError> {
        self.group.check().or_else(|error| {
            std::thread::sleep(LOOK_AROUND);
            others.check()?;
            Err(error.into())
        })
    }

    /// Cuts rows into turns whose slots fit.
    fn by_turns(
        &self,
        arena: &Arena,
        shared: Shared,
        mut exchange: impl FnMut(&Turn) -> Result<(), CudaError>,
    ) -> Result<(), CudaError> {
        let row = self.ranks * shared.slot_bytes(self.ranks);
        let turn = self.slots.bytes / row.max(1);
        if turn == 0 {
            return Err(CudaError::Graph(
                "rows that are longer than what ranks exchange at once",
            ));
        }
        for first in (0..shared.count).step_by(turn) {
            let rows = turn.min(shared.count - first);
            exchange(&Turn {
                rows,
                first,
                slots: arena.part(self.slots.at, rows * row)?,
            })?;
        }
        Ok(())
    }

    /// Packs this rank's columns, or lays out the others'.
    fn share(
        &self,
        (arena, stream): (&Arena, &Stream),
        shared: Shared,
        turn: &Turn,
        unpack: bool,
    ) -> Result<(), CudaError> {
        let Rows {
            span, row_bytes, ..
        } = shared.rows();
        let rows = arena.part(span.at + turn.first * row_bytes, turn.rows * row_bytes)?;
        let (units, unit_bytes) = (shared.units(), shared.unit * shared.element);
        let params = ShareColumnsParams {
            rows: rows.address(),
            slots: turn.slots.address(),
            count: turn.rows as i32,
            units: units as i32,
            unit_bytes: unit_bytes as i32,
            ranks: self.ranks as i32,
            rank: self.rank as i32,
            unpack: i32::from(unpack),
        };
        let launch = plan::share_columns(turn.rows, units, unit_bytes, self.ranks, unpack)?;
        Ok(arena.launch(stream, &launch, &params)?)
    }
}
