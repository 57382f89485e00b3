//! HTTP: connections, paths, API keys, limits, the dialects' JSON, errors, health checks and metrics.

mod auth;
mod body;
mod connection;
mod dialect;
mod error;
mod handler;
mod host;
mod hosts;
mod keys;
mod observe;
mod openapi;
mod ops;
mod origins;
mod pages;
mod request_body;
mod router;
mod server;
mod state;

pub use body::ApiLimits;
#[doc(hidden)]
pub use dialect::parse_request;
pub use error::ApiError;
pub use hosts::HostList;
pub use keys::Keys;
pub use origins::Origins;
pub use router::router;
pub use server::{Server, ServerTimeouts, serve};
pub use state::App;
