//! The accept loop: timeouts on every connection, a cap on the number of connections, and a drain with a deadline.
//!
//! `axum::serve` would be shorter, but it has no timeouts: a silent connection stays open forever (axum#2741). The timeouts are
//! in `connection.rs`; hyper's own header timeout is off, because it also applies to idle connections.

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
use axum::http::{HeaderValue, Version, header};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower::ServiceExt;

use super::connection::{ConnectionState, ConnectionTimeouts, TimedStream};
use super::request_body::{DiscardSlots, RequestBody};
use super::router::{overloaded_router, router};
use super::state::App;
use crate::failpoint::failpoint;
use crate::telemetry::metrics;

/// Length of the kernel's queue of connections that are not accepted yet.
const BACKLOG: u32 = 1024;
/// Pause of the accept loop after an error, such as running out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Connections beyond the cap that are still accepted.
const RESERVED_CONNECTIONS: usize = 64;
/// Reserved connections that only health checks and metrics may use.
const HEALTH_CONNECTIONS: usize = 16;
/// Maximum bytes of a request's header. hyper keeps a buffer of this size for each connection that sends a long header.
const MAX_HEADER_BYTES: usize = 32 * 1024;
/// TCP keepalive: probes start after this time without traffic.
const KEEPALIVE: Duration = Duration::from_secs(60);

/// Time limits of connections and of the shutdown.
#[derive(Debug, Clone, Copy)]
pub struct ServerTimeouts {
    /// Maximum time from the first byte of a request's header to its last; for the first request, from the connection's start.
    pub header: Duration,
    /// Maximum time between two requests on one connection.
    pub idle: Duration,
    /// A connection is closed if, over this time, its client reads a response more slowly than `MIN_WRITE_RATE` (`connection.rs`).
    pub write: Duration,
    /// Time from the signal until connections are no longer accepted. Meanwhile /ready fails, so that load balancers notice.
    pub shutdown_grace: Duration,
    /// Maximum time from the signal until the requests that are still running are refused.
    pub drain: Duration,
}

/// A bound socket that does not listen yet.
#[derive(Debug)]
pub struct Server {
    socket: TcpSocket,
    address: SocketAddr,
}

impl Server {
    /// Binds the address before anything is loaded, so that a port in use is reported at once.
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

    /// The bound address. If port 0 was given, it has the port that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Starts to listen. Connections wait in the kernel's queue until [`serve`] accepts them.
    ///
    /// # Errors
    /// Another process has begun to listen on the address.
    pub fn listen(self) -> Result<TcpListener> {
        self.socket.listen(BACKLOG).with_context(|| format!("cannot listen on {}", self.address))
    }
}

/// Slots for connections: regular ones up to the cap, reserved ones beyond it.
struct Slots {
    regular: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    /// Connections with the full service, oldest first. Some of them may be closed already.
    open: VecDeque<Weak<ConnectionState>>,
}

/// The routes that a connection can use.
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

    /// A slot for a new connection, and its service; `None` if all slots are taken. At the cap it is a reserved slot, and the
    /// connection that has been idle for longest is told to close. If no connection is idle, or at most [`HEALTH_CONNECTIONS`]
    /// reserved slots are left, the new connection has [`Service::Overloaded`].
    fn take(&mut self) -> Option<(OwnedSemaphorePermit, Service)> {
        if let Ok(slot) = Arc::clone(&self.regular).try_acquire_owned() {
            return Some((slot, Service::Full));
        }
        let made_room = self.close_longest_idle();
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

    /// Tells the connection that has been idle for longest to close; false if there was none.
    fn close_longest_idle(&mut self) -> bool {
        self.open.retain(|state| state.strong_count() > 0);
        let idle = |(i, state): (usize, &Weak<ConnectionState>)| Some((state.upgrade()?.closable_since()?, i));
        let longest = self.open.iter().enumerate().filter_map(idle).min();
        let Some(state) = longest.and_then(|(_, i)| self.open[i].upgrade()) else { return false };
        state.request_close();
        true
    }
}

/// Serves until `stop` resolves, then drains: /ready fails at once, connections are accepted for `timeouts.shutdown_grace`, and
/// running requests may finish until `timeouts.drain` has passed.
pub async fn serve(listener: TcpListener, app: Arc<App>, timeouts: ServerTimeouts, stop: impl Future<Output = ()>) {
    let routers = [router(&app), overloaded_router(&app)];
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(MAX_HEADER_BYTES);
    let graceful = GracefulShutdown::new();
    let mut slots = Slots::new(app.limits.max_connections);
    metrics::CONNECTIONS_MAX.only_gauge().set(app.limits.max_connections as f64);
    let open_connections = metrics::CONNECTIONS.only_gauge();
    let discard_slots = DiscardSlots::new();
    let connection_timeouts =
        ConnectionTimeouts { header: timeouts.header, idle: timeouts.idle, write: timeouts.write };
    let mut start_connection = |stream: TcpStream| {
        let Some((mut slot, service)) = slots.take() else {
            metrics::CONNECTIONS_REFUSED.only_counter().increment(1);
            return;
        };
        let state = ConnectionState::new();
        if service == Service::Full {
            slots.add(&state);
        }
        let stream = TimedStream::new(stream, Arc::clone(&state), connection_timeouts);
        let service =
            tracked(routers[service as usize].clone(), Arc::clone(&app), Arc::clone(&state), discard_slots.clone());
        let connection = graceful.watch(http.serve_connection(TokioIo::new(stream), service));
        let regular = Arc::clone(&slots.regular);
        let open_connections = open_connections.clone();
        tokio::spawn(async move {
            open_connections.increment(1);
            let mut connection = std::pin::pin!(connection);
            let mut is_reserved = !Arc::ptr_eq(slot.semaphore(), &regular);
            loop {
                tokio::select! {
                    result = &mut connection => {
                        // Errors of the client: an invalid header, a timeout, a lost connection.
                        if let Err(error) = result {
                            tracing::debug!(%error, "connection ended");
                        }
                        break;
                    }
                    () = state.close_requested() => {
                        tracing::debug!("idle connection closed to make room");
                        break;
                    }
                    // A reserved slot is given back as soon as there is a regular one.
                    permit = Arc::clone(&regular).acquire_owned(), if is_reserved => {
                        slot = permit.expect("never closed");
                        is_reserved = false;
                    }
                }
            }
            drop(slot);
            open_connections.decrement(1);
        });
    };
    let mut stop = std::pin::pin!(stop);
    loop {
        tokio::select! {
            stream = accept(&listener) => start_connection(stream),
            () = &mut stop => break,
        }
    }
    app.draining.store(true, Relaxed);
    let until = Instant::now() + timeouts.drain;
    let grace = Instant::now() + timeouts.shutdown_grace.min(timeouts.drain);
    while let Ok(stream) = tokio::time::timeout_at(grace.into(), accept(&listener)).await {
        start_connection(stream);
    }
    // Closing the listener would reset the connections in the kernel's queue, so they are accepted first.
    queued_connections(listener).for_each(&mut start_connection);
    // Closing a connection before its first request arrives would lose that request. So wait for first requests; their responses
    // close the connections.
    tokio::time::sleep(FIRST_REQUEST_GRACE.min(until.saturating_duration_since(Instant::now()))).await;
    tracing::info!(seconds = timeouts.drain.as_secs(), "draining: no new connections, finishing running requests");
    let drained = tokio::time::timeout_at(until.into(), graceful.shutdown()).await;
    if drained.is_ok() {
        tracing::info!("drained");
        return;
    }
    // Requests that are queued or being computed are answered with 503 before their connections close.
    tracing::warn!("drain timeout reached: refusing the requests that are still running");
    app.refuse_all();
    tokio::time::sleep(RESPONSE_FLUSH_GRACE).await;
}

/// Time for the first request of the last accepted connections to arrive.
const FIRST_REQUEST_GRACE: Duration = Duration::from_millis(100);
/// Time to write the responses to requests that the drain timeout refused, before the process ends.
const RESPONSE_FLUSH_GRACE: Duration = Duration::from_millis(250);

/// The router as a hyper service that marks `state` as busy while a request is handled. It adds `connection: close` to a response
/// that is ready before the whole request has been read, and to every response during the drain, so that clients do not send
/// another request on a connection that is about to close.
fn tracked(
    router: Router,
    app: Arc<App>,
    state: Arc<ConnectionState>,
    slots: DiscardSlots,
) -> impl hyper::service::Service<
    hyper::Request<hyper::body::Incoming>,
    Response = axum::response::Response,
    Error = std::convert::Infallible,
    Future = impl Future<Output = Result<axum::response::Response, std::convert::Infallible>> + Send,
> {
    hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (router, app, guard) = (router.clone(), Arc::clone(&app), RequestGuard::new(&state, request.version()));
        let request = RequestBody::wrap(request, Arc::clone(&state), slots.clone());
        async move {
            let mut response = router.oneshot(request.map(Body::new)).await?;
            if guard.0.is_receiving() || app.draining.load(Relaxed) {
                response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
            }
            // The guard is dropped with the response's body: the request is finished when hyper has taken all of it.
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

/// Marks a connection as busy as long as the guard exists.
struct RequestGuard(Arc<ConnectionState>);

impl RequestGuard {
    fn new(state: &Arc<ConnectionState>, version: Version) -> Self {
        state.request_started(version);
        Self(Arc::clone(state))
    }
}

impl Drop for RequestGuard {
    fn drop(&mut self) {
        self.0.request_finished();
    }
}

/// The next connection. Connections that failed before they were accepted are skipped. After other errors, such as no file
/// descriptors left, it pauses and retries.
async fn accept(listener: &TcpListener) -> TcpStream {
    loop {
        match try_accept(listener).await {
            Ok((stream, _)) => return configured(stream),
            Err(error) if is_connection_error(&error) => {}
            Err(error) => {
                tracing::error!(%error, "cannot accept connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The connections that wait in the kernel's queue. Closes the listener right after the last one.
fn queued_connections(listener: TcpListener) -> impl Iterator<Item = TcpStream> {
    let listener = listener.into_std().ok();
    let next = move || listener.as_ref()?.accept().ok();
    std::iter::from_fn(next).fuse().filter_map(|(stream, _)| {
        stream.set_nonblocking(true).ok()?;
        TcpStream::from_std(stream).ok().map(configured)
    })
}

fn configured(stream: TcpStream) -> TcpStream {
    stream.set_nodelay(true).ok();
    SockRef::from(&stream).set_tcp_keepalive(&TcpKeepalive::new().with_time(KEEPALIVE)).ok();
    stream
}

async fn try_accept(listener: &TcpListener) -> io::Result<(TcpStream, SocketAddr)> {
    failpoint!("accept-connection", Err(io::Error::from_raw_os_error(24))); // EMFILE: too many open files
    listener.accept().await
}

/// Whether only the connection that was to be accepted failed, so that the next one can be accepted at once.
fn is_connection_error(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::ConnectionRefused
    )
}
