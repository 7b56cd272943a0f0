//! A process group over TCP: each rank has a connection to every other.
//!
//! All connections of an operation move at once, in both directions, on the calling thread: whoever can send sends and
//! whoever can read reads, so that no order of ranks can lock up, and pieces go from and to the buffer itself. Invariant:
//! an operation ends when it is done, when a connection breaks, or when nothing has moved for the group's timeout. After
//! an error all connections are closed, which is how the other ranks learn of it.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine_spec::Rank;
use engine_spec::rank::WORLD_SIZE_MAX;

use crate::error::GroupError;
use crate::group::{Layout, ProcessGroup};
use crate::poll::Poll;
use crate::wire::{HEAD, Head, Kind};

/// Pieces that one system call moves.
const SLICES: usize = 32;
/// Longest message from rank 0.
const MESSAGE_BYTES_MAX: u64 = 64 << 20;

/// See the module's description.
#[derive(Debug)]
pub struct TcpGroup {
    rank: Rank,
    timeout: Duration,
    links: Mutex<Links>,
}

/// The connections, and how far the group is.
#[derive(Debug)]
struct Links {
    rank: Rank,
    /// By rank; none to itself.
    streams: Vec<Option<TcpStream>>,
    timeout: Duration,
    operation: u64,
    /// Why it ended.
    parted: Option<String>,
    poll: Poll,
    flows: Vec<Flow>,
}

/// How far one direction of a connection is in an operation.
#[derive(Clone, Copy, Debug, Default)]
struct Flow {
    /// Bytes of the head.
    head: usize,
    piece: usize,
    /// Bytes of the piece.
    offset: usize,
    is_done: bool,
}

impl Flow {
    const DONE: Self = Self {
        head: HEAD,
        piece: 0,
        offset: 0,
        is_done: true,
    };

    /// Goes on by so many bytes.
    fn advance(&mut self, mut bytes: usize, layout: &dyn Layout, rank: usize) {
        let head = bytes.min(HEAD - self.head);
        self.head += head;
        bytes -= head;
        while bytes > 0 {
            let Some(piece) = layout.piece(rank, self.piece) else {
                return;
            };
            let left = piece.len() - self.offset;
            if bytes < left {
                self.offset += bytes;
                return;
            }
            bytes -= left;
            self.piece += 1;
            self.offset = 0;
        }
    }

    /// What is left of the pieces, as many as one call moves.
    fn pieces<'a>(
        &self,
        layout: &'a dyn Layout,
        rank: usize,
    ) -> impl Iterator<Item = Range<usize>> + 'a {
        let (first, offset) = (self.piece, self.offset);
        (first..)
            .map_while(move |index| {
                let piece = layout.piece(rank, index)?;
                let skipped = if index == first { offset } else { 0 };
                Some(piece.start + skipped..piece.end)
            })
            .filter(|piece| !piece.is_empty())
            .take(SLICES - 1)
    }
}

/// One piece: the whole buffer, from rank 0.
struct Whole(usize);

impl Layout for Whole {
    fn piece(&self, rank: usize, index: usize) -> Option<Range<usize>> {
        (rank == 0 && index == 0).then_some(0..self.0)
    }
}

/// One operation.
struct Operation<'a> {
    head: Head,
    layout: &'a dyn Layout,
    patience: Duration,
}

/// What came of an attempt to send or read.
enum Moved {
    Nothing,
    Some,
}

impl TcpGroup {
    /// A group of connected ranks: `streams` by rank, none to this one.
    pub(crate) fn new(
        rank: Rank,
        streams: Vec<Option<TcpStream>>,
        timeout: Duration,
    ) -> io::Result<Self> {
        for stream in streams.iter().flatten() {
            stream.set_nonblocking(true)?;
            stream.set_nodelay(true)?;
        }
        Ok(Self {
            rank,
            timeout,
            links: Mutex::new(Links {
                rank,
                flows: vec![Flow::DONE; 2 * streams.len()],
                streams,
                timeout,
                operation: 0,
                parted: None,
                poll: Poll::default(),
            }),
        })
    }

    fn links(&self) -> MutexGuard<'_, Links> {
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`ProcessGroup::broadcast`], unless an operation goes on for longer than `patience`.
    ///
    /// # Errors
    /// See [`ProcessGroup::all_gather`].
    pub fn try_broadcast(&self, message: &[u8], patience: Duration) -> Result<bool, GroupError> {
        let deadline = Instant::now() + patience;
        loop {
            if let Ok(mut links) = self.links.try_lock() {
                return links.broadcast(message).map(|()| true);
            }
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl ProcessGroup for TcpGroup {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn all_gather(&self, buffer: &mut [u8], layout: &dyn Layout) -> Result<(), GroupError> {
        let mut links = self.links();
        let patience = links.timeout;
        links.run(Kind::Pieces, buffer, layout, patience)
    }

    fn gather(&self, buffer: &mut [u8], layout: &dyn Layout) -> Result<(), GroupError> {
        let mut links = self.links();
        let patience = links.timeout;
        links.run(Kind::PiecesForLeader, buffer, layout, patience)
    }

    fn barrier(&self, patience: Duration) -> Result<(), GroupError> {
        self.links()
            .run(Kind::Barrier, &mut [], &Whole(0), patience)
    }

    fn broadcast(&self, message: &[u8]) -> Result<(), GroupError> {
        self.links().broadcast(message)
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn check(&self) -> Result<(), GroupError> {
        match self.links.try_lock() {
            Ok(mut links) => links.attempt(|links| links.check()),
            // An operation is under way, and finds out by itself.
            Err(_) => Ok(()),
        }
    }

    fn leave(&self, reason: &str) {
        let mut links = self.links();
        if links.parted.is_none() {
            links.part(reason);
        }
    }

    fn receive(&self, message: &mut Vec<u8>, patience: Duration) -> Result<bool, GroupError> {
        self.links().receive(message, patience)
    }
}

impl Links {
    /// Runs the next operation; an error is the last one.
    fn run(
        &mut self,
        kind: Kind,
        buffer: &mut [u8],
        layout: &dyn Layout,
        patience: Duration,
    ) -> Result<(), GroupError> {
        let (own, all) = (self.rank.index(), self.rank.count());
        for rank in (0..all).filter(|rank| *rank != own) {
            let (sends, reads) = match kind {
                Kind::Pieces | Kind::Barrier => (true, true),
                Kind::PiecesForLeader => (rank == 0, own == 0),
                Kind::Broadcast => (own == 0, rank == 0),
            };
            let flow = |moves| if moves { Flow::default() } else { Flow::DONE };
            self.flows[2 * rank] = flow(sends);
            self.flows[2 * rank + 1] = flow(reads);
        }
        let operation = Operation {
            head: Head {
                kind,
                operation: self.operation,
                bytes: layout.bytes(own) as u64,
            },
            layout,
            patience,
        };
        self.attempt(|links| links.exchange(&operation, buffer))?;
        self.operation += 1;
        Ok(())
    }

    /// Does something that must not fail twice.
    fn attempt<T>(
        &mut self,
        action: impl FnOnce(&mut Self) -> Result<T, GroupError>,
    ) -> Result<T, GroupError> {
        if let Some(reason) = &self.parted {
            return Err(GroupError::Parted(reason.clone()));
        }
        let outcome = action(self);
        if let Err(error) = &outcome {
            self.part(&error.to_string());
        }
        outcome
    }

    fn part(&mut self, reason: &str) {
        self.parted = Some(reason.to_owned());
        for stream in self.streams.iter().flatten() {
            // The others then see that this rank is gone; a socket that is closed already needs nothing.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Looks for connections that were closed, without reading what came.
    fn check(&mut self) -> Result<(), GroupError> {
        for (rank, stream) in self.streams.iter().enumerate() {
            let Some(stream) = stream else { continue };
            match stream.peek(&mut [0]) {
                Ok(0) => {
                    let source = io::ErrorKind::UnexpectedEof.into();
                    return Err(GroupError::Lost { rank, source });
                }
                Ok(_) => {}
                Err(error) if is_not_yet(&error) => {}
                Err(source) => return Err(GroupError::Lost { rank, source }),
            }
        }
        Ok(())
    }

    /// Moves all flows to their ends.
    fn exchange(&mut self, operation: &Operation<'_>, buffer: &mut [u8]) -> Result<(), GroupError> {
        let head = operation.head.encode();
        let mut heads = [[0; HEAD]; WORLD_SIZE_MAX as usize];
        let mut moved_at = Instant::now();
        loop {
            let (mut is_done, mut has_moved) = (true, false);
            for (rank, stream) in self.streams.iter_mut().enumerate() {
                let Some(stream) = stream else { continue };
                let lost = |source| GroupError::Lost { rank, source };
                let [sending, reading] = &mut self.flows[2 * rank..2 * rank + 2] else {
                    continue;
                };
                if !sending.is_done {
                    let moved = send(stream, sending, &head, buffer, operation.layout, self.rank);
                    has_moved |= matches!(moved.map_err(lost)?, Moved::Some);
                }
                if !reading.is_done {
                    let moved = read(stream, reading, &mut heads[rank], buffer, operation, rank)?;
                    has_moved |= matches!(moved, Moved::Some);
                }
                is_done &= sending.is_done && reading.is_done;
            }
            if is_done {
                return Ok(());
            }
            let now = Instant::now();
            if has_moved {
                moved_at = now;
                continue;
            }
            let waited = now - moved_at;
            let left = operation.patience.saturating_sub(waited);
            if left.is_zero() {
                return Err(self.silent(waited));
            }
            self.wait(left)?;
        }
    }

    /// Waits until a flow that is not at its end may go on.
    fn wait(&mut self, patience: Duration) -> Result<(), GroupError> {
        self.poll.clear();
        for (rank, stream) in self.streams.iter().enumerate() {
            let Some(stream) = stream else { continue };
            let (sending, reading) = (&self.flows[2 * rank], &self.flows[2 * rank + 1]);
            if !(sending.is_done && reading.is_done) {
                self.poll.add(stream, !reading.is_done, !sending.is_done);
            }
        }
        self.poll.wait(patience)?;
        Ok(())
    }

    fn silent(&self, waited: Duration) -> GroupError {
        let ranks = (0..self.streams.len()).filter(|rank| {
            self.streams[*rank].is_some()
                && !(self.flows[2 * rank].is_done && self.flows[2 * rank + 1].is_done)
        });
        GroupError::Silent {
            ranks: listed(ranks),
            seconds: waited.as_secs_f64(),
        }
    }

    fn broadcast(&mut self, message: &[u8]) -> Result<(), GroupError> {
        let patience = self.timeout;
        // Nothing is read into it; a layout of rank 0's pieces alone has no other's.
        let mut message = message.to_vec();
        let layout = Whole(message.len());
        self.run(Kind::Broadcast, &mut message, &layout, patience)
    }

    fn receive(&mut self, message: &mut Vec<u8>, patience: Duration) -> Result<bool, GroupError> {
        let waited = self.attempt(|links| {
            links.poll.clear();
            let Some(Some(leader)) = links.streams.first() else {
                return Ok(None);
            };
            links.poll.add(leader, true, false);
            if !links.poll.wait(patience)? {
                return Ok(None);
            }
            let mut head = [0; HEAD];
            match leader.peek(&mut head) {
                Ok(0) => Err(GroupError::Lost {
                    rank: 0,
                    source: io::ErrorKind::UnexpectedEof.into(),
                }),
                // The rest of the head is on its way.
                Ok(count) if count < HEAD => Ok(None),
                Ok(_) => Ok(Some(head)),
                Err(error) if is_not_yet(&error) => Ok(None),
                Err(source) => Err(GroupError::Lost { rank: 0, source }),
            }
        })?;
        let Some(head) = waited else {
            return Ok(false);
        };
        let bytes = self.attempt(|_| match Head::decode(&head) {
            Some(head) if head.bytes <= MESSAGE_BYTES_MAX => Ok(head.bytes as usize),
            found => Err(GroupError::OutOfStep {
                rank: 0,
                problem: format!("it sent {found:?} where a message of at most {MESSAGE_BYTES_MAX} bytes was expected"),
            }),
        })?;
        message.clear();
        message.resize(bytes, 0);
        let patience = self.timeout;
        self.run(Kind::Broadcast, message, &Whole(bytes), patience)?;
        Ok(true)
    }
}

/// Numbers, separated by commas.
pub(crate) fn listed(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<String> = ranks.map(|rank| rank.to_string()).collect();
    ranks.join(", ")
}

fn is_not_yet(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Sends what the socket takes.
fn send(
    stream: &mut TcpStream,
    flow: &mut Flow,
    head: &[u8; HEAD],
    buffer: &[u8],
    layout: &dyn Layout,
    own: Rank,
) -> io::Result<Moved> {
    let mut moved = Moved::Nothing;
    loop {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut count = 0;
        let rest = &head[flow.head..];
        let pieces = flow.pieces(layout, own.index()).map(|piece| &buffer[piece]);
        for part in std::iter::once(rest).chain(pieces) {
            slices[count] = IoSlice::new(part);
            count += 1;
        }
        if rest.is_empty() && count == 1 {
            flow.is_done = true;
            return Ok(moved);
        }
        match stream.write_vectored(&slices[..count]) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(bytes) => flow.advance(bytes, layout, own.index()),
            Err(error) if is_not_yet(&error) => return Ok(moved),
            Err(error) => return Err(error),
        }
        moved = Moved::Some;
    }
}

/// Reads what the socket has, and no more than this operation's.
fn read(
    stream: &mut TcpStream,
    flow: &mut Flow,
    head: &mut [u8; HEAD],
    buffer: &mut [u8],
    operation: &Operation<'_>,
    rank: usize,
) -> Result<Moved, GroupError> {
    let lost = |source| GroupError::Lost { rank, source };
    let mut moved = Moved::Nothing;
    loop {
        let outcome = if flow.head < HEAD {
            stream.read(&mut head[flow.head..])
        } else {
            let mut slices: [IoSliceMut<'_>; SLICES] =
                std::array::from_fn(|_| IoSliceMut::new(&mut []));
            let mut count = 0;
            let (mut rest, mut passed) = (&mut *buffer, 0);
            for piece in flow.pieces(operation.layout, rank) {
                let (_, from) = rest.split_at_mut(piece.start - passed);
                let (part, after) = from.split_at_mut(piece.len());
                slices[count] = IoSliceMut::new(part);
                count += 1;
                (rest, passed) = (after, piece.end);
            }
            if count == 0 {
                flow.is_done = true;
                return Ok(moved);
            }
            stream.read_vectored(&mut slices[..count])
        };
        match outcome {
            Ok(0) => return Err(lost(io::ErrorKind::UnexpectedEof.into())),
            Ok(bytes) => {
                let had_head = flow.head == HEAD;
                flow.advance(bytes, operation.layout, rank);
                if !had_head && flow.head == HEAD {
                    expect(head, operation, rank)?;
                }
            }
            Err(error) if is_not_yet(&error) => return Ok(moved),
            Err(error) => return Err(lost(error)),
        }
        moved = Moved::Some;
    }
}

/// Checks that a rank is where this one is.
fn expect(head: &[u8; HEAD], operation: &Operation<'_>, rank: usize) -> Result<(), GroupError> {
    let expected = Head {
        bytes: operation.layout.bytes(rank) as u64,
        ..operation.head
    };
    match Head::decode(head) {
        Some(found) if found == expected => Ok(()),
        found => Err(GroupError::OutOfStep {
            rank,
            problem: format!("it sent {found:?}, expected {expected:?}"),
        }),
    }
}
