//! What the backend computes, over the emulated driver or a device, one file for each part. One binary, for each would be
//! compiled and linked with the whole backend again; only what a device counts is in one of its own.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../support/mod.rs"]
mod support;

mod attention;
mod batches;
mod drafts;
mod exchange;
mod faults;
mod fp8_cache;
mod golden;
mod heads;
mod invariance;
mod picking;
mod products;
mod ranks;
mod sampling;
mod weights;
