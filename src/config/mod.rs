//! Configuration in two stages: what was typed ([`args`], [mod@file]), then what it means on this machine ([`resolve`]).
//!
//! Precedence: flag, then environment variable, then config file, then default. Resolving starts no thread, writes no log and
//! loads no model. It reads the API key file, and looks which model arguments are folders. The environment is read here only:
//! [`hub`] and [`machine`] read the variables that are not flags.

pub mod args;
pub mod file;
pub mod hub;
pub mod machine;
pub mod resolve;
