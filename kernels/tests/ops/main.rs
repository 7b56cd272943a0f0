//! Every kernel against float64, on the emulated driver or on a real one.
//!
//! `KERNELS_DRIVER=libcuda.so.1` uses that driver; without it the emulated one is built with the machine's C++ compiler,
//! and the tests pass with a message when there is none. `KERNELS_NCCL` is the NCCL beside that driver. Random
//! inputs are fresh in every run; a test that fails prints the `KERNELS_SEED` that gives them again.

mod attention;
mod collectives;
mod experts;
mod faults;
mod fp8_cache;
mod gemms;
mod grouped;
mod harness;
mod hopper_attention;
mod hopper_gemms;
mod masked;
mod mutation;
mod ranks;
mod rows;
mod sampling;
mod sanitizer;
mod seeds;
mod streams;
