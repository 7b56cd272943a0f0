//! Pinned host memory that bytes leave for the device from, or arrive in.
//!
//! Invariant: nobody touches it while a copy is under way: [`Staging::fill`] waits for the last one.

use std::ptr;
use std::sync::Arc;

use super::{Arena, Device, DriverError, Event, Handle, Part, Stream};

/// Host memory the device copies from and to without the processor's help.
#[derive(Debug)]
pub struct Staging {
    device: Arc<Device>,
    memory: *mut u8,
    bytes: usize,
    moving: Option<Event>,
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
            moving: None,
        })
    }

    fn wait(&mut self) -> Result<(), DriverError> {
        if let Some(event) = &self.moving {
            event.synchronize()?;
        }
        self.moving = None;
        Ok(())
    }

    /// The memory, once what was sent last has left and what was fetched last is there.
    ///
    /// # Errors
    /// The copy failed.
    pub fn fill(&mut self) -> Result<&mut [u8], DriverError> {
        self.wait()?;
        // SAFETY: initialised when it was allocated; no copy reads or writes it any more.
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
        self.mark(stream)
    }

    /// Queues a copy of the first `count` bytes of `from`, which [`Staging::fill`] then gives.
    ///
    /// # Errors
    /// There are fewer, there is no room for them, or the device failed.
    pub fn fetch(
        &mut self,
        stream: &Stream,
        arena: &Arena,
        from: Part,
        count: usize,
    ) -> Result<(), DriverError> {
        self.wait()?;
        if count > self.bytes {
            return Err(DriverError::Size {
                asked: count,
                bytes: self.bytes,
            });
        }
        arena.check("a fetch", from, count)?;
        if count == 0 {
            return Ok(());
        }
        // The memory outlives the copy: whoever touches or frees it waits for the mark.
        call!(
            &self.device,
            cuMemcpyDtoHAsync_v2(self.memory.cast(), from.address().0, count, stream.handle)
        )?;
        self.mark(stream)
    }

    /// The copy that was just queued is the one to wait for.
    fn mark(&mut self, stream: &Stream) -> Result<(), DriverError> {
        match stream.record() {
            Ok(event) => {
                self.moving = Some(event);
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
        // SAFETY: the memory came from cuMemHostAlloc and no copy is under way.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuMemFreeHost)(self.memory.cast());
        }
    }
}
