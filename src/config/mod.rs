//! Configuration in two stages: settings as given ([`args`], [mod@file]), then resolved for this machine ([`resolve`]).
//!
//! Precedence: flag, then environment variable, then config file, then default. Resolving starts no thread, writes no log and
//! loads no model. It reads the API key file and checks whether a model argument is a folder. With the value `auto` it looks for a
//! GPU and measures the processor. Only this module reads the environment: [`hub`], [`machine`] and [`otlp`] read the
//! variables that are not flags.

pub mod args;
pub mod file;
pub mod hub;
pub mod machine;
pub mod otlp;
pub mod resolve;
