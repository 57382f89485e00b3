//! `rerankd`: a reranking server. One binary that answers `POST /v1/rerank` with the scores of a cross-encoder.
//!
//! Modules in reading order, top floor first:
//! - [`cli`]: one file per command; [`settings`]: flags, environment and config file, checked once.
//! - [`api`]: HTTP and nothing else: dialects, keys, limits, errors, operations.
//! - [`rerank`]: the story of a request in one short function; [`models`]: the served models by name.
//! - [`text`]: text to pairs of token ids, long documents cut into overlapping chunks.
//! - [`scheduler`]: who runs what, when.
//! - [`encoder`]: the graphs, generic over [`backend`]: the only place that computes.
//! - [`loading`]: names to files to checked weights, once, at start.
//! - [`eval`]: how good a ranking is: topics, measures, BM25.
//! - [`batch`], [`error`], [`telemetry`]: words that anyone uses and that use no one.
//!
//! Absent on purpose: padding, anywhere; timers in the scheduler; I/O below `loading`; a clock in `scheduler/plan.rs`;
//! `cfg(feature)` outside `backend` and the choice of device; `unsafe` outside `backend/cpu` and
//! `backend/cuda`.

#![deny(unsafe_code)]

pub mod admission;
pub mod api;
pub mod backend;
pub mod batch;
pub mod checkpoint;
pub mod cli;
pub mod config;
pub mod encoder;
pub mod error;
pub mod eval;
pub mod loading;
pub mod rerank;
pub mod scheduler;
pub mod secret;
pub mod served;
pub mod telemetry;
pub mod text;
