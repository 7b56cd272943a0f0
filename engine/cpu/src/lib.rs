//! The CPU backend: reference and real path.
//!
//! [`CpuExecutor`] runs batches over weights in float32, bfloat16 or integers and a block cache of latents, or of keys and values.
//! Sums are float32.
//! Invariant: what it computes for a token does not depend on the rest of the batch, on how a prompt was cut into
//! chunks, nor on the number of threads; see [`kernels`] for how, and `tests/invariance.rs` for the proof.

mod backend;
mod cache;
mod compute;
mod executor;
pub mod kernels;
mod lanes;
mod packed;
mod packfile;
mod pool;
mod quantised;
mod store;
mod trim;
mod weights;

pub use executor::{AllocatedBytes, CpuExecutor, CpuLimits, pack};
pub use kernels::Isa;
pub use pool::{Pool, SpawnError, WorkerPanic, available_threads};
