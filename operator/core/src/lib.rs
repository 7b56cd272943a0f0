//! The operator's decisions: observe → validate → plan → check, and nothing else.
//!
//! Everything a decision needs is in the [`Snapshot`], the time included; everything that follows
//! from it is in the [`Plan`]: plain data that can be printed, compared, checked, simulated. No
//! clock, no environment, no randomness, no client (`clippy.toml` bans them).

pub mod check;
mod children;
mod decide;
pub mod devices;
pub mod explain;
pub mod fit;
pub mod gang;
pub mod gpu_faults;
pub mod health;
pub mod inspect;
pub mod inventory;
pub mod marks;
pub mod mig;
pub mod names;
pub mod node_cache;
pub mod objects;
pub mod ownership;
pub mod pairs;
pub mod placement;
pub mod plan;
pub mod preemption;
pub mod priority;
pub mod quota;
pub mod replicas;
pub mod report;
pub mod resources;
pub mod rollout;
mod samples;
pub mod scaling;
pub mod sim;
pub mod snapshot;
pub mod spot;
pub mod status;
pub mod time;
mod topology;
pub mod validate;

pub use check::{Flaw, check};
pub use decide::plan;
pub use explain::{Explanation, explain};
pub use inventory::Inventory;
pub use node_cache::NodeCache;
pub use ownership::Controller;
pub use plan::{Action, Event, EventKind, Kind, Object, Plan, Settings};
pub use priority::{Contest, PriorityClassView, Rival};
pub use resources::Resources;
pub use snapshot::{
    Claim, ClaimTemplateView, Cluster, ConfigMapView, ContainerView, Counters, Demand, LoadSample,
    NodeView, PodPhase, PodSamples, PodView, QuotaView, Rates, Scheduled, Snapshot, Startup, Taint,
    TaintEffect, Terminated,
};
pub use validate::{ValidDeployment, Violation, Violations, validate};
