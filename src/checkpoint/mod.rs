//! Checkpoints on disk: `config` reads `config.json` as validated numbers, `weights` reads weight files as named host tensors,
//! and `file` opens files and bounds their size.

pub mod config;
pub mod file;
pub mod weights;
