//! How many bytes a model needs on a device, in closed form, before anything is allocated.
//!
//! [`memory_plan`] is linked into the operator, which sizes pods and chooses nodes by it, and into
//! the engine, which allocates by it: the same function, so both agree or the pod refuses to start.
//! Surprise: with latent attention the KV cache is *not* divided by tensor parallelism, because all
//! heads share one latent; with grouped-query attention it is, down to one key-value head per rank.

mod device;
mod integer;
mod misfit;
mod plan;
mod weights;
mod workspace;

pub use device::{
    DeviceWorkspace, EXCHANGE_BYTES, PICK_CONTEXTS, PICK_ROWS_MAX, PICK_TOP_MAX, StepBounds,
    device_workspace,
};
pub use integer::{INT4_GROUP, IntegerFormat, IntegerSource, LINE_BYTES, TILE_ROWS};
pub use misfit::{Misfit, Nearest};
pub use plan::{MemoryPlan, MemoryRequest, RankBytes, memory_plan, resolve_max_model_len};
pub use weights::{ResidentDtype, resident_dtype, weight_bytes_per_rank};
pub use workspace::{Workspace, workspace};

#[cfg(test)]
mod tests;
