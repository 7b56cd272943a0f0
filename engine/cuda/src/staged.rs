//! Other weights in host memory, and their exchange with those on the device.
//!
//! A GPU has seldom room for two versions: what the weights leave, the cache has. So the second version waits in host
//! memory in the form it is served in, and an exchange swaps both through pinned memory, chunk by chunk, on several
//! threads. Every tensor keeps its address, so recorded graphs stay valid, and what was in use is then in host memory:
//! exchanging once more undoes it. Invariant: after an error neither version is whole anywhere.

use std::path::Path;
use std::sync::Arc;

use engine_load::{Checkpoint, LoadError, Progress};
use engine_memory::ResidentDtype;
use engine_model::Model;
use engine_spec::ModelConfig;
use kernels::driver::{Arena, Device, DriverError, Part, Staging};

use crate::layout::{Layout, Span};
use crate::weights::{
    Destination, STAGING_BYTES, THREADS_MAX, available_threads, check_size, read_all,
};

/// Threads that convert weights beside an executor that is serving.
const STAGING_THREADS: usize = 2;

/// Weights that are not in use, and the model that they are for.
pub(crate) struct Staged {
    pub config: ModelConfig,
    pub resident: ResidentDtype,
    pieces: Vec<Piece>,
}

/// The bytes of a span.
struct Piece {
    span: Span,
    bytes: Box<[u8]>,
}

/// What one thread has read.
#[derive(Default)]
struct Held(Vec<Piece>);

impl Destination for Held {
    fn send(&mut self, to: Span, bytes: &[u8]) -> Result<(), DriverError> {
        check_size(to, bytes)?;
        self.0.push(Piece {
            span: to,
            bytes: bytes.into(),
        });
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DriverError> {
        Ok(())
    }
}

impl Staged {
    /// Reads the checkpoint in `dir`, checked whole before a single weight is read.
    pub fn read(
        dir: &Path,
        config: &ModelConfig,
        model: &Model,
        layout: &Layout,
        resident: ResidentDtype,
        progress: &Progress,
    ) -> Result<Self, LoadError> {
        let checkpoint = Checkpoint::open(dir, config, model)?;
        let threads = available_threads().min(STAGING_THREADS);
        let held = read_all(layout, &checkpoint, model, progress, threads, || {
            Ok(Held::default())
        })?;
        Ok(Self {
            config: config.clone(),
            resident,
            pieces: held.into_iter().flat_map(|held| held.0).collect(),
        })
    }

    /// Swaps all bytes with the device's. Nothing may be queued that reads weights.
    pub fn swap(&mut self, device: &Arc<Device>, arena: &Arena) -> Result<(), String> {
        let mut chunks: Vec<(Part, &mut [u8])> = Vec::new();
        for piece in &mut self.pieces {
            let part = arena
                .part(piece.span.at, piece.span.bytes)
                .map_err(|error| error.to_string())?;
            for (index, chunk) in piece.bytes.chunks_mut(STAGING_BYTES).enumerate() {
                let place = part.cut(index * STAGING_BYTES, chunk.len());
                chunks.push((place, chunk));
            }
        }
        let threads = available_threads().min(THREADS_MAX);
        // Dealt out in turn: large and small ones to every thread.
        let mut dealt: Vec<Vec<_>> = (0..threads).map(|_| Vec::new()).collect();
        for (index, chunk) in chunks.into_iter().enumerate() {
            dealt[index % threads].push(chunk);
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = dealt
                .into_iter()
                .map(|chunks| scope.spawn(move || swap_chunks(device, arena, chunks)))
                .collect();
            let mut outcome = Ok(());
            for worker in workers {
                let ended = match worker.join() {
                    Ok(ended) => ended.map_err(|error| error.to_string()),
                    Err(_) => Err("a copying thread panicked".to_owned()),
                };
                outcome = outcome.and(ended);
            }
            outcome
        })
    }
}

/// While one chunk is on its way in, the one before it is swapped and goes out.
fn swap_chunks(
    device: &Arc<Device>,
    arena: &Arena,
    chunks: Vec<(Part, &mut [u8])>,
) -> Result<(), DriverError> {
    let stream = device.stream()?;
    let mut staging = [
        Staging::new(device, STAGING_BYTES)?,
        Staging::new(device, STAGING_BYTES)?,
    ];
    let mut arriving: Option<(Part, &mut [u8])> = None;
    let mut turn = 0;
    // One round more than chunks, for the last one to go out.
    for chunk in chunks.into_iter().map(Some).chain([None]) {
        if let Some((place, _)) = &chunk {
            staging[turn].fetch(&stream, arena, *place, place.bytes())?;
        }
        turn = 1 - turn;
        if let Some((place, bytes)) = std::mem::replace(&mut arriving, chunk) {
            staging[turn].fill()?[..bytes.len()].swap_with_slice(bytes);
            staging[turn].send(&stream, arena, place, bytes.len())?;
        }
    }
    stream.synchronize()
}
