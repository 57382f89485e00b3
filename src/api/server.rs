//! The accept loop: timeouts on every connection, a cap on their number, and a drain with a deadline.
//!
//! `axum::serve` would be shorter, but it installs no timer, so hyper's header timeout never fires and a silent socket stays open
//! for ever (axum#2741).

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Weak};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use axum::Router;
use axum::body::{Body, Bytes};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use super::connection::{ConnectionState, ConnectionTimeouts, TimedStream};
use super::router::{overloaded_router, router};
use super::state::App;

/// Connections that the kernel holds until they are accepted.
const BACKLOG: u32 = 1024;
/// Pause of the accept loop when the process has no file descriptor left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections beyond the cap that are answered all the same.
const RESERVED_CONNECTIONS: usize = 64;
/// Those of them that are kept for health checks.
const HEALTH_CONNECTIONS: usize = 16;
/// Bytes of a request's header at most. hyper keeps a buffer of this size for each connection that sends a long one.
const MAX_HEADER_BYTES: usize = 32 * 1024;
/// TCP keepalive: probes start after this time without traffic.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Time limits of connections and of the end.
#[derive(Debug, Clone, Copy)]
pub struct ServerTimeouts {
    /// From the first byte of a request's header to its last.
    pub header: Duration,
    /// Between two requests on one connection, and before the first.
    pub idle: Duration,
    /// Without enough progress in writing an answer.
    pub write: Duration,
    /// From the signal until connections are no longer accepted, while load balancers see /ready fail.
    pub shutdown_grace: Duration,
    /// From the signal to the end, however much is still running.
    pub drain: Duration,
}

/// A bound address.
#[derive(Debug)]
pub struct Server {
    socket: TcpSocket,
    address: SocketAddr,
}

impl Server {
    /// Binds the address, so that a port in use is known before anything is loaded.
    ///
    /// # Errors
    /// The address is in use or not available to this process.
    pub fn bind(address: SocketAddr) -> Result<Self> {
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        socket.set_reuseaddr(true)?;
        socket
            .bind(address)
            .with_context(|| format!("cannot listen on {address}; choose another address with --port or --host"))?;
        let address = socket.local_addr()?;
        Ok(Self { socket, address })
    }

    /// The address, with the port that the system chose if 0 was given.
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

/// The connections below and beyond the cap.
struct Slots {
    regular: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    /// Regular connections, oldest first, some of them closed meanwhile.
    open: VecDeque<Weak<ConnectionState>>,
}

/// Which routes a connection gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    Full,
    /// Health checks and metrics; 503 for everything else.
    Overloaded,
}

impl Slots {
    fn new(max_connections: usize) -> Self {
        Self {
            regular: Arc::new(Semaphore::new(max_connections)),
            reserved: Arc::new(Semaphore::new(RESERVED_CONNECTIONS)),
            open: VecDeque::new(),
        }
    }

    /// A slot for a new connection. At the cap it is a reserved one, and the oldest connection without a request is told to close
    /// in its place. If every connection has a request, or hardly any reserved slot is left, the new connection gets health checks
    /// only; without a reserved slot it gets nothing.
    fn take(&mut self) -> Option<(OwnedSemaphorePermit, Service)> {
        if let Ok(slot) = Arc::clone(&self.regular).try_acquire_owned() {
            return Some((slot, Service::Full));
        }
        let made_room = self.close_oldest_idle();
        let for_health_only = self.reserved.available_permits() <= HEALTH_CONNECTIONS;
        let slot = Arc::clone(&self.reserved).try_acquire_owned().ok()?;
        Some((slot, if made_room && !for_health_only { Service::Full } else { Service::Overloaded }))
    }

    fn add(&mut self, state: &Arc<ConnectionState>) {
        if self.open.len() == self.open.capacity() {
            self.open.retain(|state| state.strong_count() > 0);
        }
        self.open.push_back(Arc::downgrade(state));
    }

    /// Whether there was one.
    fn close_oldest_idle(&mut self) -> bool {
        self.open.retain(|state| state.strong_count() > 0);
        let idle = |state: &Weak<ConnectionState>| state.upgrade().is_some_and(|state| state.is_idle());
        if let Some(state) = self.open.iter().position(idle).and_then(|i| self.open.remove(i)?.upgrade()) {
            state.close.notify_one();
            return true;
        }
        false
    }
}

/// Answers until `stop`, then drains: /ready fails at once, connections are accepted for the grace, and requests that were begun
/// are answered, at most until `timeouts.drain`.
pub async fn serve(listener: TcpListener, app: Arc<App>, timeouts: ServerTimeouts, stop: impl Future<Output = ()>) {
    let routers = [router(&app), overloaded_router(&app)];
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(None).half_close(true).max_buf_size(MAX_HEADER_BYTES);
    let graceful = GracefulShutdown::new();
    let mut slots = Slots::new(app.limits.max_connections);
    let connection_timeouts =
        ConnectionTimeouts { header: timeouts.header, idle: timeouts.idle, write: timeouts.write };
    let mut answer = |stream: TcpStream| {
        let Some((slot, service)) = slots.take() else {
            metrics::counter!("rerankd_connections_refused_total").increment(1);
            return;
        };
        let state = ConnectionState::new();
        if service == Service::Full {
            slots.add(&state);
        }
        let stream = TimedStream::new(stream, Arc::clone(&state), connection_timeouts);
        let service = tracked(routers[service as usize].clone(), Arc::clone(&state));
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        tokio::spawn(async move {
            tokio::select! {
                result = connection => {
                    // The client's errors: a broken header, a timeout, a connection that is gone.
                    if let Err(error) = result {
                        tracing::debug!(%error, "connection ended");
                    }
                }
                () = state.close.notified() => tracing::debug!("idle connection closed to make room"),
            }
            drop(slot);
        });
    };
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            stream = accept(&listener) => answer(stream),
            () = &mut stop => break,
        }
    }
    app.draining.store(true, Relaxed);
    let until = Instant::now() + timeouts.drain;
    let grace = Instant::now() + timeouts.shutdown_grace.min(timeouts.drain);
    while let Ok(stream) = tokio::time::timeout_at(grace.into(), accept(&listener)).await {
        answer(stream);
    }
    drop(listener);
    tracing::info!(seconds = timeouts.drain.as_secs(), "draining: no new connections, finishing running requests");
    let drained = tokio::time::timeout_at(until.into(), graceful.shutdown()).await;
    if drained.is_ok() {
        tracing::info!("drained");
        return;
    }
    // What is still queued or computed is answered with 503 rather than cut off.
    tracing::warn!("drain timeout reached: refusing the requests that are still running");
    app.refuse_all();
    tokio::time::sleep(LAST_ANSWERS).await;
}

/// Time for refusals to reach their clients at the end of a drain.
const LAST_ANSWERS: Duration = Duration::from_millis(250);

/// The router as a hyper service that keeps `state` up to date.
fn tracked(
    router: Router,
    state: Arc<ConnectionState>,
) -> impl hyper::service::Service<
    hyper::Request<hyper::body::Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future = impl Future<Output = Result<axum::response::Response, std::convert::Infallible>> + Send,
> {
    hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (router, guard) = (router.clone(), RequestGuard::new(&state));
        async move {
            let response = router.oneshot(request.map(Body::new)).await?;
            // The guard goes with the body: the request is finished when the body has been handed to the connection.
            Ok(response.map(|body| Body::new(Guarded { body, _guard: guard })))
        }
    })
}

/// A body that keeps a guard until it is dropped.
struct Guarded {
    body: Body,
    _guard: RequestGuard,
}

impl hyper::body::Body for Guarded {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut TaskContext<'_>,
    ) -> Poll<Option<Result<hyper::body::Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.body.size_hint()
    }
}

/// Marks a connection as busy while it lives.
struct RequestGuard(Arc<ConnectionState>);

impl RequestGuard {
    fn new(state: &Arc<ConnectionState>) -> Self {
        state.request_started();
        Self(Arc::clone(state))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.request_finished();
    }
}

/// The next connection. Errors (no descriptors left, a client that has gone) are waited out.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                stream.set_nodelay(true).ok();
                SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE)).ok();
                return stream;
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
