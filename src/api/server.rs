//! The accept loop: timers on every connection, a cap on their number, and a drain with a deadline.
//!
//! `axum::serve` would be shorter, but installs no timer, so hyper's header timeout never fires and a silent socket stays for ever.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::Semaphore;

use super::{App, router};

/// Connections that the kernel holds until we accept them.
const BACKLOG: u32 = 1024;

/// How long the accept loop rests when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// How long connections are still taken after the signal, while load balancers see /ready fail.
const ACCEPT_GRACE: Duration = Duration::from_millis(200);

/// Time limits of connections and of the end.
#[derive(Debug, Clone, Copy)]
pub struct ServerTimeouts {
    /// From accepting a connection, or answering on it, to the last byte of the next header.
    pub header: Duration,
    /// From the signal to the end, however much is still running.
    pub drain: Duration,
}

/// A bound address that does not listen yet: taken before the models load, so that a port in use is known at once.
#[derive(Debug)]
pub struct Server {
    socket: TcpSocket,
    address: SocketAddr,
}

impl Server {
    /// Takes the address.
    ///
    /// # Errors
    /// It is in use, or not ours to take.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket.bind(address).with_context(|| format!("cannot take {address}; choose another with --port or --host"))?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address })
    }

    /// The address, with the port that the system chose where 0 was asked for.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Listens: from here on connections wait for [`serve`].
    ///
    /// # Errors
    /// Another process has begun to listen on the address.
    pub fn listen(self) -> Result<TcpListener> {
        self.socket.listen(BACKLOG).with_context(|| format!("cannot listen on {}", self.address))
    }
}

/// Answers until `stop`, then drains: no new connections, answers to all that were asked, at most `timeouts.drain`.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    max_connections: usize,
    timeouts: ServerTimeouts,
    stop: impl Future<Output = ()>,
) {
    let service = TowerToHyperService::new(router(&app));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(timeouts.header);
    let graceful = GracefulShutdown::new();
    let free = Arc::new(Semaphore::new(max_connections));
    let answer = |(stream, slot)| {
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service.clone()));
        tokio::spawn(async move {
            // Errors here are the client's: a broken header, a timeout, a connection that went away.
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection ended");
            }
            drop(slot);
        });
    };
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            accepted = accept(&listener, &free) => answer(accepted),
            () = &mut stop => break,
        }
    }
    app.draining.store(true, Relaxed);
    // Connections that the kernel has taken already are answered too.
    let grace = Instant::now() + ACCEPT_GRACE;
    while let Ok(accepted) = tokio::time::timeout_at(grace.into(), accept(&listener, &free)).await {
        answer(accepted);
    }
    drop(listener);
    let until = Instant::now() + timeouts.drain;
    tracing::info!(seconds = timeouts.drain.as_secs(), "draining");
    let drained = tokio::time::timeout_at(until.into(), graceful.shutdown()).await;
    app.models.drained(until).await;
    match drained {
        Ok(()) => tracing::info!("drained"),
        Err(_) => tracing::warn!("the drain's time is over; connections that are still busy are cut"),
    }
}

/// The next connection and its slot. Errors (no descriptors left, a client that went away) are waited out, never passed on.
async fn accept(listener: &TcpListener, free: &Arc<Semaphore>) -> (TcpStream, tokio::sync::OwnedSemaphorePermit) {
    let slot = Arc::clone(free).acquire_owned().await.expect("never closed");
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                stream.set_nodelay(true).ok();
                return (stream, slot);
            }
            Err(error) if is_clients(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn is_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}
