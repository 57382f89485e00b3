//! `rerankd`, a self-hosted reranking server: one binary that answers `POST /v1/rerank` with the scores of a cross-encoder.
//!
//! Modules in reading order, from the command line down to the kernels:
//! - [`cli`]: one file per command; the exit codes.
//! - [`config`]: flags, environment variables and the config file, resolved to settings.
//! - [`api`]: HTTP: request formats, API keys, limits, the error table, health and metrics.
//! - [`rerank`]: ranks one request, from text to ranking.
//! - [`served`]: the served models by name.
//! - [`score_cache`]: logits of pairs that were scored before.
//! - [`text`]: from text to pairs of token ids; long documents are split into overlapping chunks.
//! - [`client`]: the client that sends a request, and the rate limits of its API key.
//! - [`background`]: threads of low priority for large requests.
//! - [`admission`]: work is admitted whole or refused at once, by size, estimated wait, and the shares of clients.
//! - [`scheduler`]: the queue, batch composition, the workers that run batches, and their supervision.
//! - [`encoder`]: the graph of each model architecture, generic over [`backend::Backend`].
//! - [`checkpoint`]: a model's configuration and weights, checked against each other.
//! - [`loading`]: from a model's name to a model that scores: catalogue, downloads, checks of what was loaded.
//! - [`backend`]: the implementations of the graph's operations: CPU kernels, CUDA kernels, and candle as the reference.
//! - [`eval`]: ranking quality: data sets, measures, BM25.
//! - `jobs`: ranks many queries from a file to a file, resumable, in this process or by servers.
//! - [`batch`], `bounded_list`, [`error`], [`score`], [`secret`], [`telemetry`], `tls`: leaf modules that depend on nothing else
//!   in the crate.
//!
//! What the crate does without:
//! - padding: a batch is packed tokens and offsets, on every backend;
//! - timers in the batcher: a worker that is idle takes the pairs that are waiting;
//! - a clock in `scheduler/plan.rs`: batch composition is a pure function;
//! - `unsafe` outside `backend/cpu` and `backend/cuda`;
//! - environment variables outside `config`;
//! - file access in `api`, `rerank`, `served`, `text`, `scheduler` and `encoder`;
//! - `cfg(feature)` outside `backend`, `sync`, `failpoint` and tests, except where `config` and `loading` choose the device and
//!   `main` the allocator.

#![deny(unsafe_code)]

pub mod admission;
pub mod api;
pub mod backend;
pub mod background;
pub mod batch;
mod bounded_list;
pub mod checkpoint;
pub mod cli;
pub mod client;
pub mod config;
pub mod encoder;
pub mod error;
pub mod eval;
pub mod failpoint;
mod jobs;
pub mod loading;
pub mod rerank;
pub mod scheduler;
pub mod score;
pub mod score_cache;
pub mod secret;
pub mod served;
mod sync;
pub mod telemetry;
pub mod text;
mod tls;
