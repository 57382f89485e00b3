//! Checkpoints: `config` describes a model; `parse` reads the description from `config.json`, and `modules` reads a chain of
//! sentence-transformers modules. `weights` reads weight files as named host tensors. `file` opens files and bounds their size.

pub mod config;
mod fields;
pub mod file;
pub mod modules;
mod parse;
pub mod weights;
