//! Checkpoints on disk: `config.json` as checked numbers, and weight files as named host tensors.

pub mod config;
pub mod weights;
