//! Integration tests: the library through its public interface, and the real binary.
//!
//! One crate, so that the library is linked once. tests/README.md says what each module covers, and how a test reports that
//! this machine cannot run it.

mod architecture;
mod attacks;
mod cli;
#[cfg(feature = "cuda")]
mod cuda;
mod dialects;
mod doctor;
mod failpoints;
mod fuzz;
mod golden;
mod health;
mod http;
mod hub;
mod jobs;
mod loading;
mod metrics;
mod mini;
mod precision;
mod reload;
mod score_cache;
mod source;
mod support;
mod text;
mod traces;
