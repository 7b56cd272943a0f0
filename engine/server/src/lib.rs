//! The OpenAI-compatible HTTP server, health, metrics and the engine loop.
//!
//! [`serve`] answers from the first moment: health and progress while the model loads, requests once a canary was
//! decoded. One dedicated thread owns the executor and loops schedule → execute → complete; HTTP tasks talk to it
//! through bounded channels and own nothing of it. Invariant: a request is never waited for by that thread, and never
//! outlives its client by more than a step.

mod caller;
mod chat;
mod completion;
mod constraint;
mod error;
mod fields;
mod format;
mod generation;
mod health;
mod http;
mod messages;
mod metrics;
pub mod offline;
mod prepare;
mod rank;
mod request;
mod respond;
mod responses;
mod resume;
mod routes;
mod serve;
mod startup;
mod state;
mod tls;
mod tools;
mod weights;
mod worker;

pub use caller::ApiKeys;
pub use rank::{RankLoader, serve_rank};
pub use serve::{ServeError, serve};
pub use startup::{LoadFailure, Loaded, Loader, Roofline, StartupHandle};
pub use state::{OnFailure, ServerOptions};
pub use tls::{Tls, TlsError, TlsFiles};
pub use weights::{LoadedWeights, UpdateHandle, WeightsLoader, WeightsOrigin, WeightsSource};
