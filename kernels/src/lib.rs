//! CUDA kernels, the plans that choose them, and the driver they run on.
//!
//! [`plan`] turns a shape into a [`plan::Launch`], plain data; [`params`] are the kernels' arguments; [`image`] holds the
//! prebuilt fatbins; [`driver`] loads `libcuda.so.1` at run time and launches; [`reference`] says in float64 what each
//! kernel computes; [`emulation`] builds a stand-in for the driver that runs the same sources on the CPU.
//!
//! Invariant: building this crate needs no CUDA. Unsafe code is confined to [`driver`].

pub mod driver;
pub mod emulation;
pub mod image;
pub mod params;
pub mod plan;
pub mod reference;
