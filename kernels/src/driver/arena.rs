//! One allocation that everything a model needs is cut out of, and launches over it.
//!
//! Invariant: a launch through an arena has no address outside it, and an arena's memory lives as long as any graph
//! recorded over it. How far a kernel reads from an address is decided by its plan; a wrong extent is a wrong answer or a
//! fault that the driver reports, because device memory holds no value of this program.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Buffer, Device, DriverError, Graph, Plain, Stream};
use crate::params::{Address, Params, TensorMap, TensorShape};
use crate::plan::Launch;

/// Device memory of one model.
#[derive(Debug)]
pub struct Arena {
    buffer: Arc<Buffer>,
    maps: Mutex<Maps>,
}

/// Tensor maps hide where they point: a launch takes those alone that were made here.
#[derive(Debug, Default)]
struct Maps {
    by_shape: HashMap<TensorShape, TensorMap>,
    made: HashSet<TensorMap>,
}

/// A piece of an arena.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    address: Address,
    bytes: usize,
}

impl Part {
    /// Where it begins.
    pub fn address(self) -> Address {
        self.address
    }

    /// How long it is.
    pub fn bytes(self) -> usize {
        self.bytes
    }

    /// `bytes` of it from `offset` on; shorter when it ends before.
    pub fn cut(self, offset: usize, bytes: usize) -> Self {
        let offset = offset.min(self.bytes);
        Self {
            address: self.address.offset(offset as u64),
            bytes: bytes.min(self.bytes - offset),
        }
    }
}

/// Work recorded over an arena.
#[derive(Debug)]
pub struct ArenaGraph {
    graph: Graph,
    memory: Arc<Buffer>,
}

impl Arena {
    /// Allocates `bytes`.
    ///
    /// # Errors
    /// There are not as many.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, DriverError> {
        Ok(Self {
            buffer: Arc::new(device.allocate(bytes)?),
            maps: Mutex::default(),
        })
    }

    /// All of it.
    pub fn bytes(&self) -> usize {
        self.buffer.bytes
    }

    /// `bytes` from `offset` on.
    ///
    /// # Errors
    /// It ends before.
    pub fn part(&self, offset: usize, bytes: usize) -> Result<Part, DriverError> {
        let address = self.buffer.address().offset(offset as u64);
        let part = Part { address, bytes };
        self.check("a part", part, bytes)?;
        Ok(part)
    }

    pub(super) fn check(
        &self,
        what: &'static str,
        part: Part,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let address = part.address.0;
        let offset = address.checked_sub(self.buffer.address);
        let inside = offset
            .and_then(|offset| offset.checked_add(bytes as u64))
            .is_some_and(|end| end <= self.buffer.bytes as u64);
        if inside && bytes <= part.bytes {
            return Ok(());
        }
        Err(DriverError::Outside {
            what,
            address,
            bytes,
        })
    }

    /// The map of a tensor in this arena, made at its first use.
    ///
    /// # Errors
    /// The tensor is not in the arena, or the driver refuses its strides.
    pub fn tensor_map(&self, shape: &TensorShape) -> Result<TensorMap, DriverError> {
        let bytes = shape.bytes();
        let part = Part {
            address: shape.at,
            bytes,
        };
        self.check("a tensor map", part, bytes)?;
        let mut maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(map) = maps.by_shape.get(shape) {
            return Ok(*map);
        }
        let map = self.buffer.device.tensor_map(shape)?;
        maps.by_shape.insert(*shape, map);
        maps.made.insert(map);
        Ok(map)
    }

    fn made(&self, map: &TensorMap) -> bool {
        let maps = self.maps.lock().unwrap_or_else(PoisonError::into_inner);
        maps.made.contains(map)
    }

    /// Queues a kernel whose addresses are all in this arena, and whose tensor maps it made.
    ///
    /// # Errors
    /// One is not, the kernel cannot be loaded or launched, or an earlier one failed.
    pub fn launch<P: Params>(
        &self,
        stream: &Stream,
        launch: &Launch,
        params: &P,
    ) -> Result<(), DriverError> {
        let mut stray = None;
        params.addresses(&mut |address| {
            let part = Part { address, bytes: 1 };
            if address != Address::NULL && self.check(launch.kernel, part, 1).is_err() {
                stray = Some(address.0);
            }
        });
        params.maps(&mut |map| {
            if !self.made(map) {
                stray = Some(u64::MAX);
            }
        });
        if let Some(address) = stray {
            return Err(DriverError::Outside {
                what: launch.kernel,
                address,
                bytes: 1,
            });
        }
        // SAFETY: the addresses are in memory that outlives the queue's work: freeing it waits for the device, and a graph
        // keeps it. See the module for extents.
        unsafe { stream.launch(launch, params) }
    }

    /// Queues a copy of `values` to the beginning of a part; they may change as soon as this returns.
    ///
    /// # Errors
    /// They do not fit, or the copy failed.
    pub fn write<T: Plain>(
        &self,
        stream: &Stream,
        to: Part,
        values: &[T],
    ) -> Result<(), DriverError> {
        let bytes = size_of_val(values);
        self.check("a write", to, bytes)?;
        if bytes == 0 {
            return Ok(());
        }
        // The driver stages pageable memory before it returns.
        call!(
            &stream.device,
            cuMemcpyHtoDAsync_v2(to.address.0, values.as_ptr().cast(), bytes, stream.handle)
        )
    }

    /// Fills `values` from the beginning of a part, after everything queued.
    ///
    /// # Errors
    /// The part is shorter, or something queued failed.
    pub fn read<T: Plain>(
        &self,
        stream: &Stream,
        from: Part,
        values: &mut [T],
    ) -> Result<(), DriverError> {
        let bytes = size_of_val(values);
        self.check("a read", from, bytes)?;
        if bytes > 0 {
            call!(
                &stream.device,
                cuMemcpyDtoHAsync_v2(
                    values.as_mut_ptr().cast(),
                    from.address.0,
                    bytes,
                    stream.handle
                )
            )?;
        }
        stream.synchronize()
    }

    /// Queues setting every byte of a part.
    ///
    /// # Errors
    /// The part is of another arena, or the device failed.
    pub fn fill(&self, stream: &Stream, part: Part, value: u8) -> Result<(), DriverError> {
        self.check("a fill", part, part.bytes)?;
        if part.bytes == 0 {
            return Ok(());
        }
        call!(
            &stream.device,
            cuMemsetD8Async(part.address.0, value, part.bytes, stream.handle)
        )
    }

    /// See [`Stream::capture`]; `queue` launches over this arena.
    ///
    /// # Errors
    /// See [`Stream::capture`].
    pub fn capture<E: From<DriverError>>(
        &self,
        stream: &Stream,
        queue: impl FnOnce() -> Result<(), E>,
    ) -> Result<ArenaGraph, E> {
        let mut failed = None;
        let recorded = stream.capture(|_| {
            failed = queue().err();
            Ok(())
        });
        if let Some(error) = failed {
            return Err(error);
        }
        Ok(ArenaGraph {
            graph: recorded?,
            memory: self.buffer.clone(),
        })
    }

    /// Queues everything that a graph of this arena recorded.
    ///
    /// # Errors
    /// The graph is of another arena, or the device failed.
    pub fn replay(&self, stream: &Stream, graph: &ArenaGraph) -> Result<(), DriverError> {
        if !Arc::ptr_eq(&self.buffer, &graph.memory) {
            return Err(DriverError::Outside {
                what: "a graph of another arena",
                address: graph.memory.address,
                bytes: graph.memory.bytes,
            });
        }
        // SAFETY: its launches went through `launch`, over memory that the graph keeps.
        unsafe { stream.replay(&graph.graph) }
    }
}
