//! Ranking many queries from a file to a file: `rerankd rank --input`.
//!
//! A thread reads queries; a window of them is ranked at the same time, in this process or by servers; results are written in
//! the order of the input. The window is bounded in queries and bytes, so memory does not grow with the input.

mod job;
mod jsonl;
mod lines;
mod output;
mod progress;
mod rank;
mod remote;
mod run;
mod trec;

pub(crate) use job::{JobError, JobSource, ResultFormat};
pub(crate) use jsonl::JsonlSource;
pub(crate) use lines::{LineReader, Shard, fingerprint, is_regular_file};
pub(crate) use output::{JobOutput, OpenedOutput, OutputBusy};
pub(crate) use progress::JobProgress;
pub(crate) use rank::JobRanker;
pub(crate) use remote::{RemoteOptions, Servers};
pub(crate) use run::{OnError, RunOptions, run};
pub(crate) use trec::TrecSource;
