//! Weights from file, hub or object store: fetch, verify, map, progress.
//!
//! [`resolve`] makes a model source a local directory, [`Checkpoint::open`] checks every tensor the model expects
//! before a single weight is read, [`convert`] turns stored dtypes into resident ones, [`inspect_source`] reports what is
//! there without reading or fetching weights, [`Dummy`] makes weights up.
//!
//! Invariant: nothing here reads the environment or waits without a limit; what a caller wants known (credentials,
//! limits) comes in as a value. Every error names the file, the tensor or field, what was found and what was expected.

mod cache;
mod checkpoint;
mod content;
pub mod convert;
mod download;
mod dummy;
mod error;
mod header;
mod inspect;
mod mapped;
mod packed;
mod progress;
mod sample;
mod source;

pub use cache::Local;
pub use checkpoint::{Checkpoint, Scales, StoredTensor, TensorSource, read_config};
pub use content::content_digest;
pub use download::Patience;
pub use dummy::Dummy;
pub use error::LoadError;
pub use header::{FloatType, TensorHeader, safetensors_header};
pub use inspect::{inspect, inspect_source, source_config};
pub use mapped::Mapped;
pub use packed::{PACKED_FILE, PackedHeader, PackedModel, PackedWriter, Section};
pub use progress::Progress;
pub use sample::sample_digest;
pub use source::{FetchSettings, resolve};
