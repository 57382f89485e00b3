//! One TCP connection: its timeouts, and whether it may be closed to make room for another.
//!
//! hyper's header timeout also applies to idle keep-alive connections, and hyper has no write timeout. The timers are therefore
//! in the stream that hyper reads and writes.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::Version;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

/// Minimum rate at which a client reads a response, in bytes per second, measured over the write timeout.
const MIN_WRITE_RATE: u64 = 1024;

/// An interim response that requires no action of the client (RFC 9110, 15.2; RFC 2518, 10.1).
const PROBE: &[u8] = b"HTTP/1.1 102 Processing\r\n\r\n";
/// How often a half-closed connection is checked for a reset.
const PROBE_INTERVAL: Duration = Duration::from_millis(100);

/// Time limits of one connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionTimeouts {
    /// Maximum time from the first byte of a request's header to its last; for the first request, from the connection's start.
    pub(super) header: Duration,
    /// Maximum time between two requests.
    pub(super) idle: Duration,
    /// Maximum time without enough progress in writing a response.
    pub(super) write: Duration,
}

/// What a connection is doing. Shared by its stream, its service and the accept loop.
#[derive(Debug)]
pub(super) struct ConnectionState {
    phase: Mutex<Phase>,
    /// From the start of a request until its whole response is written to the socket.
    is_writing: AtomicBool,
    /// Whether the request's protocol version has interim responses: HTTP/1.1, not HTTP/1.0.
    has_interim: AtomicBool,
    /// Tells the connection's task to close it, if it is still idle.
    close: Notify,
    /// Whether the task has been told so and has not decided yet.
    is_close_requested: AtomicBool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Between requests since this time.
    Idle(Instant),
    /// Part of a request's header has arrived, the first byte at this time; or the connection was opened at this time.
    Header(Instant),
    /// A request's body is arriving.
    Receiving,
    /// A request is being handled.
    Busy,
}

impl Phase {
    fn has_request(self) -> bool {
        matches!(self, Self::Receiving | Self::Busy)
    }
}

impl ConnectionState {
    pub(super) fn new() -> Arc<Self> {
        // The header timeout of the first request starts with the connection.
        let phase = Mutex::new(Phase::Header(Instant::now()));
        Arc::new(Self {
            phase,
            is_writing: AtomicBool::new(false),
            has_interim: AtomicBool::new(false),
            close: Notify::new(),
            is_close_requested: AtomicBool::new(false),
        })
    }

    /// Called when a request's header is complete. Its body, if it has one, follows.
    pub(super) fn request_started(&self, version: Version) {
        self.is_writing.store(true, Relaxed);
        self.has_interim.store(version == Version::HTTP_11, Relaxed);
        *self.phase() = Phase::Receiving;
    }

    /// Called when the whole request has arrived.
    pub(super) fn request_received(&self) {
        let mut phase = self.phase();
        if *phase == Phase::Receiving {
            *phase = Phase::Busy;
        }
    }

    /// Whether part of the request's body has not been read.
    pub(super) fn is_receiving(&self) -> bool {
        *self.phase() == Phase::Receiving
    }

    /// Called when hyper has the whole response, though perhaps not all of it is written to the socket.
    pub(super) fn request_finished(&self) {
        *self.phase() = Phase::Idle(Instant::now());
    }

    /// Since when the connection could be closed without interrupting a request or a response. An unfinished header does not
    /// count as a request. `None` while there is a request or a response.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        match *self.phase() {
            Phase::Idle(since) | Phase::Header(since) if !self.is_writing.load(Relaxed) => Some(since),
            _ => None,
        }
    }

    /// Since when the connection has been idle, if it has not been told to close.
    pub(super) fn closable_since(&self) -> Option<Instant> {
        self.idle_since().filter(|_| !self.is_close_requested.load(Relaxed))
    }

    /// Tells the connection's task to close the connection, if it is still idle.
    pub(super) fn request_close(&self) {
        self.is_close_requested.store(true, Relaxed);
        self.close.notify_one();
    }

    /// Resolves when the connection is to be closed, and is idle. A connection on which a request has begun meanwhile stays.
    pub(super) async fn close_requested(&self) {
        loop {
            self.close.notified().await;
            if self.idle_since().is_some() {
                return;
            }
            self.is_close_requested.store(false, Relaxed);
        }
    }

    /// Called when everything that hyper has is written to the socket.
    fn flushed(&self) {
        if !self.phase().has_request() {
            self.is_writing.store(false, Relaxed);
        }
    }

    fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn received_bytes(&self) {
        let mut phase = self.phase();
        if let Phase::Idle(_) = *phase {
            *phase = Phase::Header(Instant::now());
        }
    }

    fn sent_bytes(&self) {
        let mut phase = self.phase();
        if let Phase::Idle(since) = &mut *phase {
            *since = Instant::now();
        }
    }

    /// Deadline for the next byte, or for the whole header; `None` from a request's complete header to its response.
    fn read_deadline(&self, timeouts: &ConnectionTimeouts) -> Option<Instant> {
        match *self.phase() {
            Phase::Idle(since) => Some(since + timeouts.idle),
            Phase::Header(since) => Some(since + timeouts.header),
            Phase::Receiving | Phase::Busy => None,
        }
    }
}

/// The stream of a connection, with timeouts.
pub(super) struct TimedStream {
    inner: TcpStream,
    state: Arc<ConnectionState>,
    timeouts: ConnectionTimeouts,
    read_timer: Pin<Box<Sleep>>,
    write_timer: Pin<Box<Sleep>>,
    /// Start of the current window of blocked writing, and the bytes written in that window.
    blocked: Option<(Instant, u64)>,
    /// Whether [`PROBE`] has been sent because the client has closed its sending side.
    probed: bool,
    /// When the client's closing of its sending side was first seen.
    end_seen: Option<Instant>,
}

impl TimedStream {
    pub(super) fn new(inner: TcpStream, state: Arc<ConnectionState>, timeouts: ConnectionTimeouts) -> Self {
        let timer = || Box::pin(tokio::time::sleep(Duration::ZERO));
        Self {
            inner,
            state,
            timeouts,
            read_timer: timer(),
            write_timer: timer(),
            blocked: None,
            probed: false,
            end_seen: None,
        }
    }

    /// Whether the client closed its sending side at least [`PROBE_INTERVAL`] ago.
    fn is_end_due(&mut self) -> bool {
        self.end_seen.get_or_insert_with(Instant::now).elapsed() >= PROBE_INTERVAL
    }

    /// Called when the client has closed its sending side while its request is handled. Either it waits for the response on a
    /// half-closed connection, or it has closed the connection. [`PROBE`] distinguishes them: a host that has closed the
    /// connection replies with a reset, and this returns the error. Clients of HTTP/1.0 get no probe.
    fn poll_half_closed(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        if !self.probed && self.blocked.is_none() && self.state.has_interim.load(Relaxed) {
            self.probed = true;
            self.inner.try_write(PROBE).ok();
        }
        if let Ok(Some(error)) | Err(error) = self.inner.take_error() {
            return Poll::Ready(error);
        }
        self.read_timer.as_mut().reset(Instant::now() + PROBE_INTERVAL);
        ready!(self.read_timer.as_mut().poll(cx));
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// An error if the client does not read the response at [`MIN_WRITE_RATE`]; otherwise arms the timer.
    fn poll_write_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let (since, written) = *self.blocked.get_or_insert_with(|| (Instant::now(), 0));
        let deadline = since + self.timeouts.write;
        if Instant::now() >= deadline {
            if written < self.timeouts.write.as_secs() * MIN_WRITE_RATE {
                // With a linger time of 0, closing sends a reset and frees the kernel's send buffer at once.
                SockRef::from(&self.inner).set_linger(Some(Duration::ZERO)).ok();
                return Poll::Ready(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "write timeout: the client does not read the response",
                ));
            }
            self.blocked = Some((Instant::now(), 0));
            return self.poll_write_timeout(cx);
        }
        self.write_timer.as_mut().reset(deadline);
        ready!(self.write_timer.as_mut().poll(cx));
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn after_write(&mut self, cx: &mut Context<'_>, result: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        match result {
            Poll::Ready(Ok(bytes)) => {
                self.state.sent_bytes();
                if let Some((_, written)) = &mut self.blocked {
                    *written += bytes as u64;
                }
                Poll::Ready(Ok(bytes))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => self.poll_write_timeout(cx).map(Err),
        }
    }
}

impl AsyncRead for TimedStream {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if let Poll::Ready(result) = Pin::new(&mut self.inner).poll_read(cx, buffer) {
            if buffer.filled().len() > before {
                self.state.received_bytes();
            } else if result.is_ok() {
                let phase = *self.state.phase();
                match phase {
                    Phase::Busy => return self.poll_half_closed(cx).map(Err),
                    // hyper may still hold the rest of the body, and looks for the end of the stream before it hands that rest
                    // on. If the end were reported now, a complete request would fail.
                    Phase::Receiving if !self.is_end_due() => {
                        self.read_timer.as_mut().reset(Instant::now() + PROBE_INTERVAL);
                        ready!(self.read_timer.as_mut().poll(cx));
                        cx.waker().wake_by_ref();
                        return Poll::Pending;
                    }
                    _ => {}
                }
            }
            return Poll::Ready(result);
        }
        // hyper does not read again when a request ends, so the timer must also be armed while a request is handled.
        let deadline = self.state.read_deadline(&self.timeouts).unwrap_or_else(|| Instant::now() + self.timeouts.idle);
        self.read_timer.as_mut().reset(deadline);
        ready!(self.read_timer.as_mut().poll(cx));
        // The phase may have changed since the timer was set.
        match self.state.read_deadline(&self.timeouts) {
            Some(deadline) if deadline <= Instant::now() => {
                Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "no request arrived in time")))
            }
            _ => {
                cx.waker().wake_by_ref();
                Poll::Pending
            }
        }
    }
}

impl AsyncWrite for TimedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.after_write(cx, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.inner).poll_write_vectored(cx, parts);
        self.after_write(cx, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let result = Pin::new(&mut self.inner).poll_flush(cx);
        if let Poll::Ready(Ok(())) = result {
            self.state.flushed();
            self.blocked = None; // the kernel has everything that was written so far
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_connection_that_was_told_to_close_during_a_request_can_be_told_again_after_it() {
        let state = ConnectionState::new();
        assert!(state.closable_since().is_some());
        state.request_close();
        assert_eq!(state.closable_since(), None, "no second connection may count on its slot");
        state.request_started(Version::HTTP_11);
        tokio::select! {
            biased;
            () = state.close_requested() => panic!("closed during a request"),
            () = tokio::task::yield_now() => {}
        }
        state.request_finished();
        state.flushed();
        assert!(state.closable_since().is_some());
        state.request_close();
        state.close_requested().await;
    }
}
