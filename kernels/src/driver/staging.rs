//! Pinned host memory that bytes leave for the device from.
//!
//! Invariant: nobody writes to it while a copy still reads it: [`Staging::fill`] waits for the last one.

use std::ptr;
use std::sync::Arc;

use super::{Arena, Device, DriverError, Event, Handle, Part, Stream};

/// Host memory the device copies from without the processor's help.
#[derive(Debug)]
pub struct Staging {
    device: Arc<Device>,
    memory: *mut u8,
    bytes: usize,
    leaving: Option<Event>,
}

// SAFETY: the memory belongs to this value alone; for the device see Device.
unsafe impl Send for Staging {}

impl Staging {
    /// Allocates and zeroes `bytes`.
    ///
    /// # Errors
    /// The host cannot pin as many.
    pub fn new(device: &Arc<Device>, bytes: usize) -> Result<Self, DriverError> {
        let bytes = bytes.max(1);
        let mut memory: Handle = ptr::null_mut();
        call!(device, cuMemHostAlloc(&mut memory, bytes, 0))?;
        let memory: *mut u8 = memory.cast();
        // SAFETY: just allocated, this long.
        unsafe { memory.write_bytes(0, bytes) };
        Ok(Self {
            device: device.clone(),
            memory,
            bytes,
            leaving: None,
        })
    }

    fn wait(&mut self) -> Result<(), DriverError> {
        if let Some(event) = &self.leaving {
            event.synchronize()?;
        }
        self.leaving = None;
        Ok(())
    }

    /// The memory, once what was sent last has left.
    ///
    /// # Errors
    /// The copy failed.
    pub fn fill(&mut self) -> Result<&mut [u8], DriverError> {
        self.wait()?;
        // SAFETY: initialised when it was allocated; no copy reads it any more.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.memory, self.bytes) })
    }

    /// Queues a copy of the first `count` bytes to the beginning of `to`.
    ///
    /// # Errors
    /// They do not fit, or the device failed.
    pub fn send(
        &mut self,
        stream: &Stream,
        arena: &Arena,
        to: Part,
        count: usize,
    ) -> Result<(), DriverError> {
        self.wait()?;
        if count > self.bytes {
            return Err(DriverError::Size {
                asked: count,
                bytes: self.bytes,
            });
        }
        // SAFETY: see `fill`.
        let bytes = unsafe { std::slice::from_raw_parts(self.memory, count) };
        arena.write(stream, to, bytes)?;
        match stream.record() {
            Ok(event) => {
                self.leaving = Some(event);
                Ok(())
            }
            Err(error) => {
                // Without a mark to wait for, the queue is waited for; a device that fails here copies nothing.
                stream.synchronize().ok();
                Err(error)
            }
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // Errors on the way out have nowhere to go; a dead context copies nothing any more.
        self.wait().ok();
        let functions = &self.device.driver.functions;
        // SAFETY: the memory came from cuMemHostAlloc and nothing reads it.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuMemFreeHost)(self.memory.cast());
        }
    }
}
