//! Weights from mapped files to their places on the device, through pinned memory, on several threads.
//!
//! Each thread has a stream and two staging buffers: while one is on its way, the next is filled. What is stored as it is
//! served goes straight from the mapped file; the rest is converted tensor by tensor. Invariant: bytes of every tensor are
//! written exactly once, and the streams are empty when this returns.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use engine_load::{FloatType, LoadError, Progress, StoredTensor, TensorSource, convert};
use engine_model::{Model, WeightId};
use half::bf16;
use kernels::driver::{Arena, Device, DriverError, Part, Staging, Stream};

use crate::layout::{Form, Layout, Placed, Span};

/// Bytes on their way at once: large enough for full speed of PCIe 5, small beside the pod's host memory.
pub(crate) const STAGING_BYTES: usize = 8 << 20;
/// Threads that read files: beyond this many the link to the device is the limit.
pub(crate) const THREADS_MAX: usize = 4;

/// Where the bytes of tensors go, on one thread.
pub(crate) trait Destination: Send {
    /// Takes all bytes of a span.
    fn send(&mut self, to: Span, bytes: &[u8]) -> Result<(), DriverError>;

    /// Waits until everything is where it belongs.
    fn finish(&mut self) -> Result<(), DriverError>;
}

/// Copies every tensor of `model` to the device; `progress` counts stored bytes.
pub(crate) fn load(
    device: &Arc<Device>,
    arena: &Arena,
    layout: &Layout,
    source: &dyn TensorSource,
    model: &Model,
    progress: &Progress,
) -> Result<(), LoadError> {
    let threads = available_threads().min(THREADS_MAX);
    let uploader = || Uploader::new(device, arena);
    read_all(layout, source, model, progress, threads, uploader).map(|_| ())
}

pub(crate) fn available_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Gives every tensor of `model`, in the form that the layout keeps it in, to the destinations of so many threads.
pub(crate) fn read_all<D: Destination>(
    layout: &Layout,
    source: &dyn TensorSource,
    model: &Model,
    progress: &Progress,
    threads: usize,
    destination: impl Fn() -> Result<D, DriverError> + Sync,
) -> Result<Vec<D>, LoadError> {
    progress.begin(source.stored_bytes(model));
    let next = AtomicUsize::new(0);
    let failed = AtomicBool::new(false);
    let work = || -> Result<D, DriverError> {
        let mut destination = destination()?;
        while !failed.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(placed) = layout.weights.get(index) else {
                break;
            };
            let mut outcome = Ok(());
            source.read(model, WeightId(index as u32), &mut |tensor| {
                outcome = place(&mut destination, tensor, placed);
                let scales = tensor.scales.map_or(0, |scales| scales.bytes.len());
                progress.add((tensor.bytes.len() + scales) as u64);
            });
            outcome?;
        }
        destination.finish()?;
        Ok(destination)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let outcome = work();
                    if outcome.is_err() {
                        failed.store(true, Ordering::Relaxed);
                    }
                    outcome
                })
            })
            .collect();
        let mut outcome = Ok(Vec::with_capacity(threads));
        for worker in workers {
            let ended = match worker.join() {
                Ok(ended) => ended.map_err(|error| LoadError::Backend(error.to_string())),
                Err(_) => Err(LoadError::Backend("a loading thread panicked".into())),
            };
            outcome = outcome.and_then(|mut done| {
                done.push(ended?);
                Ok(done)
            });
        }
        outcome
    })
}

/// Brings a tensor into its form.
fn place(
    to: &mut impl Destination,
    tensor: &StoredTensor<'_>,
    placed: &Placed,
) -> Result<(), DriverError> {
    match placed.form {
        Form::Bf16 => to.send(placed.span, &narrow(tensor)),
        Form::Float32 => {
            let bytes = encode(convert::to_f32(tensor).into_iter().map(f32::to_le_bytes));
            to.send(placed.span, &bytes)
        }
        Form::Fp8 { scales } => {
            to.send(placed.span, tensor.bytes)?;
            let multipliers = tensor.scales.map_or_else(Vec::new, |s| s.to_f32());
            to.send(
                scales,
                &encode(multipliers.into_iter().map(f32::to_le_bytes)),
            )
        }
        Form::Absorbed {
            values,
            nope,
            value,
            latent,
            ..
        } => {
            let up = convert::to_bf16(tensor);
            let (keys, rest) = split_heads(&up, nope, value, latent);
            to.send(placed.span, &keys)?;
            to.send(values, &rest)
        }
    }
}

/// Refuses bytes that are not all of a span.
pub(crate) fn check_size(to: Span, bytes: &[u8]) -> Result<(), DriverError> {
    match bytes.len() == to.bytes {
        true => Ok(()),
        false => Err(DriverError::Size {
            asked: bytes.len(),
            bytes: to.bytes,
        }),
    }
}

struct Uploader<'a> {
    arena: &'a Arena,
    stream: Stream,
    staging: [Staging; 2],
    turn: usize,
}

impl<'a> Uploader<'a> {
    fn new(device: &Arc<Device>, arena: &'a Arena) -> Result<Self, DriverError> {
        Ok(Self {
            arena,
            stream: device.stream()?,
            staging: [
                Staging::new(device, STAGING_BYTES)?,
                Staging::new(device, STAGING_BYTES)?,
            ],
            turn: 0,
        })
    }
}

impl Destination for Uploader<'_> {
    /// Queues the copy of all of a span.
    fn send(&mut self, to: Span, bytes: &[u8]) -> Result<(), DriverError> {
        check_size(to, bytes)?;
        let part: Part = self.arena.part(to.at, to.bytes)?;
        for (index, chunk) in bytes.chunks(STAGING_BYTES).enumerate() {
            let staging = &mut self.staging[self.turn];
            self.turn = 1 - self.turn;
            staging.fill()?[..chunk.len()].copy_from_slice(chunk);
            let place = part.cut(index * STAGING_BYTES, chunk.len());
            staging.send(&self.stream, self.arena, place, chunk.len())?;
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<(), DriverError> {
        self.stream.synchronize()
    }
}

fn encode<const N: usize>(values: impl Iterator<Item = [u8; N]>) -> Vec<u8> {
    values.flatten().collect()
}

/// The stored bytes when they are bf16 already.
fn narrow<'a>(tensor: &StoredTensor<'a>) -> Cow<'a, [u8]> {
    match tensor.dtype {
        FloatType::Bf16 => Cow::Borrowed(tensor.bytes),
        _ => Cow::Owned(encode(
            convert::to_bf16(tensor).into_iter().map(bf16::to_le_bytes),
        )),
    }
}

/// Per head `[nope | value]` rows of `latent` columns → all heads' transposed keys, all heads' values.
fn split_heads(up: &[bf16], nope: usize, value: usize, latent: usize) -> (Vec<u8>, Vec<u8>) {
    let mut keys = Vec::with_capacity(up.len() * 2);
    let mut values = Vec::with_capacity(up.len() * 2);
    for head in up.chunks_exact((nope + value) * latent) {
        let (key, rest) = head.split_at(nope * latent);
        for column in 0..latent {
            keys.extend((0..nope).flat_map(|row| key[row * latent + column].to_le_bytes()));
        }
        values.extend(rest.iter().flat_map(|v| v.to_le_bytes()));
    }
    (keys, values)
}
