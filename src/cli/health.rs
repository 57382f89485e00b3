//! `rerankd health`: asks the server on this machine whether it is healthy. Health checks of containers need no other program.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use serde::Deserialize;
use ureq::Agent;

use super::failure::Failure;
use super::output::print;
use crate::config::args::parse_seconds;

/// Maximum bytes of an answer.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

#[derive(Debug, clap::Args)]
pub(super) struct HealthArgs {
    /// IP address that the server listens on; for 0.0.0.0 and ::, the loopback address is asked
    #[arg(long, default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), env = "RERANKD_HOST")]
    host: IpAddr,
    /// TCP port of the server
    ///
    /// The environment and the config file are read as by `serve`. Flags that `serve` was started with are not known here.
    #[arg(long, default_value_t = 8080, env = "RERANKD_PORT")]
    port: u16,
    /// Ask /ready in place of /health: whether the server takes requests [default: false]
    #[arg(long)]
    ready: bool,
    /// Time limit for the answer
    #[arg(long, value_name = "SECONDS", default_value_t = 12.0, value_parser = parse_seconds)]
    timeout: f64,
}

#[derive(Deserialize)]
struct HealthError {
    message: String,
}

/// Prints one line: to standard output if the server is healthy.
///
/// # Errors
/// The server cannot be reached, does not answer in time, or is not healthy.
pub(super) fn run(args: &HealthArgs) -> Result<(), Failure> {
    if args.port == 0 {
        return Err(Failure::Config(anyhow!("--port 0: set --port or RERANKD_PORT to the server's port")));
    }
    let url = url(args);
    check(&url, Duration::from_secs_f64(args.timeout)).map_err(Failure::Other)?;
    print(&format!("{url} answered 200\n"))
}

fn url(args: &HealthArgs) -> String {
    let host = match args.host {
        IpAddr::V4(host) if host.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(host) if host.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        host => host,
    };
    format!("http://{}{}", SocketAddr::new(host, args.port), if args.ready { "/ready" } else { "/health" })
}

fn check(url: &str, timeout: Duration) -> anyhow::Result<()> {
    let agent = Agent::config_builder()
        // The server is on this machine, whatever HTTP_PROXY says.
        .proxy(None)
        .http_status_as_error(false)
        .max_redirects(0)
        .max_redirects_will_error(false)
        .timeout_global(Some(timeout))
        .user_agent(concat!("rerankd/", env!("CARGO_PKG_VERSION")))
        .build()
        .new_agent();
    let mut response = agent.get(url).call().with_context(|| url.to_owned())?;
    let status = response.status();
    let body =
        response.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec().with_context(|| url.to_owned())?;
    let message = serde_json::from_slice(&body).map(|error: HealthError| error.message).unwrap_or_default();
    ensure!(status == 200, "{url} answered {}: {message}", status.as_u16());
    Ok(())
}
