//! Checkpoints on disk: `config.json` as validated numbers, and weight files as named host tensors.

pub mod config;
pub mod file;
pub mod weights;
