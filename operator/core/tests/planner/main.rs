//! The planner's rules, one file each: what is planned for a cluster as `kubectl get` prints it. One binary, for each would be
//! compiled and linked with the whole core again.

#![allow(clippy::unwrap_used)] // helpers of tests

#[path = "../common/mod.rs"]
mod common;

mod anything;
mod claims;
mod demand;
mod edges;
mod evacuation;
mod gangs;
mod gpus;
mod group_objects;
mod guide;
mod mig;
mod node_cache;
mod ownership;
mod placing;
mod plans;
mod priorities;
mod rivals;
mod rollouts;
mod room;
mod rules;
mod second_look;
mod settings;
mod sick_gpus;
mod topology;
mod views;
