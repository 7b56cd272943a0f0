//! What the CPU engine computes, one file for each part. One binary, for each would be compiled and linked with the whole
//! engine again; only allocations are counted in one of their own.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../support/mod.rs"]
mod support;

mod batches;
mod compressed;
mod drafts;
mod golden;
mod invariance;
mod packed;
mod ranks;
