//! The Raft core: tikv's `raft` crate behind checks, as a class without I/O.
//!
//! [`node`] is the node itself, with [`start`], [`membership`] and [`view`]; [`storage`] is its log
//! in memory.  [`wire`] and [`checks`] stand between it and what peers send, [`conf`] plans changes
//! of the configuration, [`pack`] bundles what is sent, [`lines`] keeps the crate's log lines.
//! [`core`] and [`types`] are the Python side.

mod checks;
mod conf;
pub mod core;
mod lines;
mod membership;
mod node;
mod pack;
mod start;
mod storage;
pub mod types;
mod view;
mod wire;
