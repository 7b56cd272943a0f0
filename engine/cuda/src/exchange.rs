//! What the ranks of a group tell each other in the middle of a pass: over NCCL where all have it, else by way of host memory.
//!
//! Invariant: a value is computed by one rank and copied by the others, so that all hold the bytes that one rank alone would
//! hold. All ranks take the same way, and NCCL only after it moved known bytes right.

mod choice;
mod host;
mod nccl;

use std::sync::Arc;

use engine_group::ProcessGroup;
use engine_spec::Rank;
use kernels::driver::{Arena, Stream};

pub use choice::{ExchangeChoice, UnknownExchange};

use self::host::{At, Host};
use self::nccl::Nccl;
use crate::layout::Span;
use crate::{CudaError, Gpu};

/// The way to the other ranks.
#[derive(Debug)]
pub(crate) struct Exchange {
    group: Arc<dyn ProcessGroup>,
    way: Way,
    reason: String,
}

#[derive(Debug)]
enum Way {
    Host(Host),
    Nccl(Nccl),
}

/// Rows of a buffer, one after the other.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    pub span: Span,
    pub count: usize,
    pub row_bytes: usize,
}

/// Rows of which every rank has a share of the columns.
#[derive(Clone, Copy)]
pub(crate) struct Shared {
    pub span: Span,
    pub count: usize,
    /// Of all ranks.
    pub columns: usize,
    /// Columns that are dealt out together.
    pub unit: usize,
    /// Bytes of a column.
    pub element: usize,
}

impl Exchange {
    /// For rows of at most `row_bytes`, with `slots` for what is packed; none where there is nobody else. All ranks are here.
    ///
    /// # Errors
    /// NCCL was asked for and cannot be used, a rank is gone, or the device failed.
    pub fn new(
        gpu: &Gpu,
        group: Arc<dyn ProcessGroup>,
        (arena, stream): (&Arena, &Stream),
        slots: Span,
        row_bytes: usize,
    ) -> Result<Option<Self>, CudaError> {
        if group.rank().is_alone() {
            return Ok(None);
        }
        let (communicator, reason) = choice::choose(gpu, &*group, (arena, stream), slots)?;
        let way = match communicator {
            Some(communicator) => {
                gpu.device.load(&Nccl::kernels(group.rank().count())?)?;
                Way::Nccl(communicator)
            }
            None => Way::Host(Host::new(&gpu.device, row_bytes)?),
        };
        Ok(Some(Self { group, way, reason }))
    }

    /// This rank.
    pub fn rank(&self) -> Rank {
        self.group.rank()
    }

    /// Which way, and why.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Whether everything is queued on the stream, with nothing for the host to do: a pass can then be recorded, and rows
    /// of other ranks must be zeros before they are exchanged.
    pub fn is_queued(&self) -> bool {
        matches!(self.way, Way::Nccl(_))
    }

    /// Fills the columns of all ranks.
    pub fn columns(&self, arena: &Arena, stream: &Stream, shared: Shared) -> Result<(), CudaError> {
        match &self.way {
            Way::Host(host) => host.columns(self.at(arena, stream), shared),
            Way::Nccl(nccl) => nccl.columns(arena, stream, shared),
        }
    }

    /// Fills rank 0's rows of logits.
    pub fn logits(&self, arena: &Arena, stream: &Stream, shared: Shared) -> Result<(), CudaError> {
        match &self.way {
            Way::Host(host) => host.logits(self.at(arena, stream), shared),
            Way::Nccl(nccl) => nccl.logits(arena, stream, shared),
        }
    }

    /// Fills the rows of the step's `tokens`, which were looked up by the ranks that hold them.
    pub fn embedded(
        &self,
        (arena, stream): (&Arena, &Stream),
        rows: Rows,
        tokens: &[u32],
        vocabulary: usize,
    ) -> Result<(), CudaError> {
        match &self.way {
            Way::Host(host) => host.embedded(self.at(arena, stream), rows, tokens, vocabulary),
            Way::Nccl(nccl) => nccl.add(arena, stream, rows),
        }
    }

    /// Fills the sorted rows of all experts; `starts` gives the first row of each, and the end, to who has to know.
    pub fn experts(
        &self,
        (arena, stream): (&Arena, &Stream),
        rows: Rows,
        starts: impl FnOnce() -> Result<Vec<u32>, CudaError>,
    ) -> Result<(), CudaError> {
        match &self.way {
            Way::Host(host) => host.experts(self.at(arena, stream), rows, &starts()?),
            Way::Nccl(nccl) => nccl.add(arena, stream, rows),
        }
    }

    /// Waits for a pass; one that another rank keeps waiting ends with that rank.
    ///
    /// # Errors
    /// A rank is gone or silent, or the device failed.
    pub fn settle(&self, stream: &Stream) -> Result<(), CudaError> {
        match &self.way {
            // Every exchange has waited already.
            Way::Host(_) => Ok(()),
            Way::Nccl(nccl) => nccl.settle(stream, &*self.group),
        }
    }

    /// Tells the others that this rank is of no use any more.
    pub fn leave(&self, reason: &str) {
        self.group.leave(reason);
    }

    fn at<'a>(&'a self, arena: &'a Arena, stream: &'a Stream) -> At<'a> {
        let group = &*self.group;
        At {
            group,
            arena,
            stream,
        }
    }
}

impl Rows {
    pub fn new(span: Span, count: usize, row_bytes: usize) -> Self {
        Self {
            span,
            count,
            row_bytes,
        }
    }
}

impl Shared {
    fn rows(self) -> Rows {
        Rows::new(self.span, self.count, self.columns * self.element)
    }

    fn units(self) -> usize {
        self.columns / self.unit
    }

    /// Bytes of a row's largest share.
    fn slot_bytes(self, ranks: usize) -> usize {
        self.units().div_ceil(ranks) * self.unit * self.element
    }
}
