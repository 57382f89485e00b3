//! Checkpoints on disk: `config` has a model's dimensions, which `parse` reads from `config.json` and `modules` from
//! sentence-transformers' modules.json; `weights` reads weight files as named host tensors, and `file` opens files and bounds
//! their size.

pub mod config;
mod fields;
pub mod file;
pub mod modules;
mod parse;
pub mod weights;
