//! Trying kernels on a device before they are trusted, which must end also where a kernel does not.
//!
//! A kernel cannot be cut off: it ends with its process. Whoever tries one therefore waits for a while only, gives up with
//! [`CudaError::Hung`], and frees nothing, since that would wait for the kernel. The process can then start anew without it.

use std::time::Duration;

use kernels::driver::{DriverError, Stream};

use crate::CudaError;

/// Longest that one launch may take: a thousand times what the emulator takes for it.
const LIMIT: Duration = Duration::from_secs(20);

/// Waits for what was queued.
///
/// # Errors
/// [`CudaError::Hung`] when it does not end, or what it failed with.
pub(crate) fn end(stream: &Stream, what: &'static str) -> Result<(), CudaError> {
    stream
        .settle_within(what, LIMIT)
        .map_err(|error| match error {
            DriverError::Late { .. } => CudaError::Hung(error.to_string()),
            failed => failed.into(),
        })
}

/// Frees what a trial used, unless a kernel is still at it.
pub(crate) fn leave<T, U>(used: T, outcome: &Result<U, CudaError>) {
    match outcome {
        Err(CudaError::Hung(_)) => std::mem::forget(used),
        _ => drop(used),
    }
}
