//! What the server answers over HTTP, one file for each part. One binary, for each would be compiled and linked with the whole
//! server again.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../harness/mod.rs"]
mod harness;

mod exposition;
mod faults;
mod limits;
mod protocol;
mod responses;
mod tls;
mod tools;
mod weights;
