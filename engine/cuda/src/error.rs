//! Why the GPU did not compute something.

use engine_group::GroupError;
use kernels::driver::DriverError;
use kernels::plan::Unsupported;
use thiserror::Error;

/// See the variants.
#[derive(Debug, Error)]
pub enum CudaError {
    /// The driver or the device failed; names the CUDA error.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Another rank failed, or the way to it did.
    #[error(transparent)]
    Group(#[from] GroupError),
    /// No kernel takes a shape of the model.
    #[error(transparent)]
    Shape(#[from] Unsupported),
    /// The model's graph asks for what this backend does not fuse.
    #[error("the CUDA backend cannot run this graph: {0}")]
    Graph(&'static str),
    /// Ranks cannot exchange in the way that was asked for.
    #[error("ranks cannot exchange over NCCL: {0}")]
    Exchange(String),
    /// A kernel that was tried on the device does not end. It holds the device until the process ends.
    #[error("{0}; it holds the device until this process ends, and portable kernels are chosen by {products}=portable {attention}=portable", products = crate::products::VARIABLE, attention = crate::attention::VARIABLE)]
    Hung(String),
    /// The kernels that multiply cannot be had, or do not agree.
    #[error("{0}")]
    Products(String),
}
