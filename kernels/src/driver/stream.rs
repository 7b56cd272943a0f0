//! Work in order: copies, kernels, events, graphs.
//!
//! Invariant: every copy is queued on a stream. A copy on the default stream is not ordered with the streams used here,
//! which do not wait for it.

use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{Buffer, Device, DriverError, Handle, Plain};
use crate::params::Params;
use crate::plan::Launch;

/// `CUDA_ERROR_NOT_READY`: no failure.
const NOT_READY: i32 = 600;
/// Time between two looks at a stream.
const LOOK: Duration = Duration::from_micros(50);

/// A queue of work on a device.
pub struct Stream {
    pub(super) device: Arc<Device>,
    pub(super) handle: Handle,
}

// SAFETY: see Device.
unsafe impl Send for Stream {}

impl std::fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Stream {
    pub(super) fn new(device: Arc<Device>, handle: Handle) -> Self {
        Self { device, handle }
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// Every address in `params` must be a device buffer of the shape that `launch` was planned for, alive until the
    /// stream is synchronised, and of a captured launch as long as its graph.
    ///
    /// # Errors
    /// The kernel cannot be loaded or launched, or an earlier one failed.
    pub unsafe fn launch<P: Params>(&self, launch: &Launch, params: &P) -> Result<(), DriverError> {
        let function = self.device.function(launch.kernel, launch.shared_bytes)?;
        let mut arguments: [Handle; 1] = [ptr::from_ref(params).cast_mut().cast()];
        let [x, y, z] = launch.grid;
        call!(
            &self.device,
            cuLaunchKernel(
                function,
                x,
                y,
                z,
                launch.threads,
                1,
                1,
                launch.shared_bytes,
                self.handle,
                arguments.as_mut_ptr(),
                ptr::null_mut(),
            )
        )
    }

    /// New memory that will hold `values`.
    ///
    /// # Errors
    /// There is not enough, or the copy failed.
    pub fn upload<T: Plain>(&self, values: &[T]) -> Result<Buffer, DriverError> {
        let mut buffer = self.device.allocate(size_of_val(values))?;
        self.write(&mut buffer, values)?;
        Ok(buffer)
    }

    /// Queues a copy of `values` to the beginning of a buffer; they may change as soon as this returns.
    ///
    /// # Errors
    /// They do not fit, or the copy failed.
    pub fn write<T: Plain>(&self, buffer: &mut Buffer, values: &[T]) -> Result<(), DriverError> {
        let asked = size_of_val(values);
        fits(buffer, asked)?;
        if asked == 0 {
            return Ok(());
        }
        // The driver stages pageable memory before it returns.
        call!(
            &self.device,
            cuMemcpyHtoDAsync_v2(buffer.address, values.as_ptr().cast(), asked, self.handle)
        )
    }

    /// The first `count` values, after everything queued.
    ///
    /// # Errors
    /// There are fewer, or something queued failed.
    pub fn read<T: Plain + Default>(
        &self,
        buffer: &Buffer,
        count: usize,
    ) -> Result<Vec<T>, DriverError> {
        let asked = count * size_of::<T>();
        fits(buffer, asked)?;
        let mut values = vec![T::default(); count];
        if asked > 0 {
            call!(
                &self.device,
                cuMemcpyDtoHAsync_v2(
                    values.as_mut_ptr().cast(),
                    buffer.address,
                    asked,
                    self.handle
                )
            )?;
        }
        self.synchronize()?;
        Ok(values)
    }

    /// Queues setting every byte.
    ///
    /// # Errors
    /// The device failed.
    pub fn fill(&self, buffer: &mut Buffer, value: u8) -> Result<(), DriverError> {
        call!(
            &self.device,
            cuMemsetD8Async(buffer.address, value, buffer.bytes, self.handle)
        )
    }

    /// Marks this place in the queue.
    ///
    /// # Errors
    /// The device failed.
    pub fn record(&self) -> Result<Event, DriverError> {
        let mut handle = ptr::null_mut();
        call!(&self.device, cuEventCreate(&mut handle, 0))?;
        let event = Event {
            device: self.device.clone(),
            handle,
        };
        call!(&self.device, cuEventRecord(handle, self.handle))?;
        Ok(event)
    }

    /// What is queued from here on waits for the event's place in its queue.
    ///
    /// # Errors
    /// The device failed.
    pub fn wait(&self, event: &Event) -> Result<(), DriverError> {
        call!(
            &self.device,
            cuStreamWaitEvent(self.handle, event.handle, 0)
        )
    }

    /// Waits for everything queued.
    ///
    /// # Errors
    /// Something queued failed.
    pub fn synchronize(&self) -> Result<(), DriverError> {
        call!(&self.device, cuStreamSynchronize(self.handle))
    }

    /// Whether everything queued is done.
    ///
    /// # Errors
    /// Something queued failed.
    pub fn is_idle(&self) -> Result<bool, DriverError> {
        match call!(&self.device, cuStreamQuery(self.handle)) {
            Err(DriverError::Call {
                code: NOT_READY, ..
            }) => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Waits for everything queued, but not for ever.
    ///
    /// # Errors
    /// Something queued failed, or `what` was not done by `limit`: it may never be, and then whatever frees memory or ends a
    /// stream of its context waits for it.
    pub fn settle_within(&self, what: &'static str, limit: Duration) -> Result<(), DriverError> {
        let began = Instant::now();
        while !self.is_idle()? {
            if began.elapsed() >= limit {
                return Err(DriverError::Late {
                    what,
                    seconds: limit.as_secs(),
                });
            }
            std::thread::sleep(LOOK);
        }
        Ok(())
    }

    /// Records what `queue` queues on this stream instead of running it. Every kernel must have been launched once
    /// before, because code cannot be loaded while recording.
    ///
    /// # Errors
    /// What `queue` fails with, or the device failed.
    pub fn capture(
        &self,
        queue: impl FnOnce(&Self) -> Result<(), DriverError>,
    ) -> Result<Graph, DriverError> {
        // 1: only this thread is kept from calls that break a capture.
        call!(&self.device, cuStreamBeginCapture_v2(self.handle, 1))?;
        let queued = queue(self);
        let mut recorded = ptr::null_mut();
        let ended = call!(&self.device, cuStreamEndCapture(self.handle, &mut recorded));
        queued?;
        ended?;
        let mut handle = ptr::null_mut();
        let instantiated = call!(
            &self.device,
            cuGraphInstantiateWithFlags(&mut handle, recorded, 0)
        );
        call!(&self.device, cuGraphDestroy(recorded))?;
        instantiated?;
        Ok(Graph {
            device: self.device.clone(),
            handle,
        })
    }

    /// Queues everything that a graph recorded.
    ///
    /// # Safety
    /// The buffers of its launches are still alive.
    ///
    /// # Errors
    /// The device failed.
    pub unsafe fn replay(&self, graph: &Graph) -> Result<(), DriverError> {
        call!(&self.device, cuGraphLaunch(graph.handle, self.handle))
    }
}

fn fits(buffer: &Buffer, asked: usize) -> Result<(), DriverError> {
    if asked > buffer.bytes {
        return Err(DriverError::Size {
            asked,
            bytes: buffer.bytes,
        });
    }
    Ok(())
}

impl Drop for Stream {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        // SAFETY: the handle came from cuStreamCreate and is not used again.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuStreamDestroy_v2)(self.handle);
        }
    }
}

/// A place in a queue.
pub struct Event {
    device: Arc<Device>,
    handle: Handle,
}

// SAFETY: see Device.
unsafe impl Send for Event {}

impl std::fmt::Debug for Event {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Event").finish_non_exhaustive()
    }
}

impl Event {
    /// Waits until its place in the queue is reached.
    ///
    /// # Errors
    /// Something before it failed.
    pub fn synchronize(&self) -> Result<(), DriverError> {
        call!(&self.device, cuEventSynchronize(self.handle))
    }

    /// Milliseconds of device time since `earlier`; both must have happened.
    ///
    /// # Errors
    /// One has not happened, or the device failed.
    pub fn milliseconds_since(&self, earlier: &Self) -> Result<f32, DriverError> {
        let mut milliseconds = 0.0;
        call!(
            &self.device,
            cuEventElapsedTime_v2(&mut milliseconds, earlier.handle, self.handle)
        )?;
        Ok(milliseconds)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        // SAFETY: the handle came from cuEventCreate and is not used again.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuEventDestroy_v2)(self.handle);
        }
    }
}

/// Recorded work, ready to be replayed.
pub struct Graph {
    device: Arc<Device>,
    handle: Handle,
}

// SAFETY: see Device.
unsafe impl Send for Graph {}

impl std::fmt::Debug for Graph {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Graph").finish_non_exhaustive()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let functions = &self.device.driver.functions;
        // SAFETY: the handle came from cuGraphInstantiateWithFlags and is not used again.
        unsafe {
            (functions.cuCtxSetCurrent)(self.device.context);
            (functions.cuGraphExecDestroy)(self.handle);
        }
    }
}
