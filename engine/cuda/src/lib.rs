//! The CUDA backend: one GPU, one arena, one stream; a rank of several has a share of the model.
//!
//! [`Gpu::open`] finds a device or says why there is none; [`CudaExecutor`] runs batches on it over the `kernels` crate.
//! Activations and cache are bfloat16, weights bfloat16 or FP8 with block scales, sums float32.
//! Invariant: what is computed for a token does not depend on the rest of the batch, on how a prompt was cut into chunks,
//! nor on whether a recorded graph ran; see `tests/invariance.rs` for the proof.

mod attention;
mod error;
mod exchange;
mod executor;
mod gpu;
mod graphs;
mod layout;
mod pass;
mod picking;
mod products;
mod shapes;
mod staged;
mod step;
mod trial;
mod weights;

pub use attention::VARIABLE as ATTENTION_VARIABLE;
pub use attention::{AttentionChoice, AttentionKernels, ChosenAttention, UnknownKernels};
pub use error::CudaError;
pub use exchange::{ExchangeChoice, UnknownExchange};
pub use executor::{AllocatedBytes, CudaExecutor};
pub use gpu::{Gpu, Opened};
pub use layout::CudaLimits;
pub use products::VARIABLE as PRODUCTS_VARIABLE;
pub use products::{ProductChoice, Products};
pub use shapes::refusal;
