//! The functions that are fuzzed. Each takes any bytes and panics if a promise is broken.
//!
//! `cargo fuzz` calls them through `fuzz_targets/`; `cargo test --test it fuzz::` replays the corpus and mutations of it.

#![allow(unreachable_pub, reason = "public for the fuzz crate, which includes the same files")]

pub mod chunks;
pub mod http;
pub mod models;
pub mod requests;
