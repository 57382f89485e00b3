//! Configuration in two stages: what was typed ([`args`], [`file`]), then what it means on this machine ([`resolve`]).
//!
//! Precedence: flag, then environment variable, then config file, then default. Resolving is pure: it starts no thread, writes
//! no log and loads no model. No module below this one reads an environment variable.

pub mod args;
pub mod file;
pub mod hub;
pub mod machine;
pub mod resolve;
