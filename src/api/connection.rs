//! One TCP connection: its timeouts, and whether it may be closed to make room for another.
//!
//! hyper's own header timeout covers an idle keep-alive connection too, and it has no write timeout; so the timers are here, in the
//! stream that hyper reads from and writes to.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::{Instant, Sleep};

/// Bytes per second at which a client must take an answer, measured over the write timeout.
const MIN_WRITE_RATE: u64 = 1024;

/// Time limits of one connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct ConnectionTimeouts {
    /// From the first byte of a request's header to its last.
    pub(super) header: Duration,
    /// Between requests, and before the first.
    pub(super) idle: Duration,
    /// Without enough progress in writing an answer.
    pub(super) write: Duration,
}

/// What a connection is doing. Shared by its stream, its service and the accept loop.
#[derive(Debug)]
pub(super) struct ConnectionState {
    phase: Mutex<Phase>,
    /// Wakes the connection so that it closes.
    pub(super) close: Notify,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Between requests since this time.
    Idle(Instant),
    /// Part of a request's header has arrived, the first byte at this time.
    Header(Instant),
    /// A request is being handled.
    Busy,
}

impl ConnectionState {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { phase: Mutex::new(Phase::Idle(Instant::now())), close: Notify::new() })
    }

    /// A request's header is complete.
    pub(super) fn request_started(&self) {
        *self.phase() = Phase::Busy;
    }

    /// The request is answered; the answer may still be on its way.
    pub(super) fn request_finished(&self) {
        *self.phase() = Phase::Idle(Instant::now());
    }

    /// Whether closing the connection interrupts no request.
    pub(super) fn is_idle(&self) -> bool {
        *self.phase() != Phase::Busy
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

    /// When reading times out, if nothing happens before.
    fn read_deadline(&self, timeouts: &ConnectionTimeouts) -> Option<Instant> {
        match *self.phase() {
            Phase::Idle(since) => Some(since + timeouts.idle),
            Phase::Header(since) => Some(since + timeouts.header),
            Phase::Busy => None,
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
    /// Since when writing has been blocked, and the bytes written since then.
    blocked: Option<(Instant, u64)>,
}

impl TimedStream {
    pub(super) fn new(inner: TcpStream, state: Arc<ConnectionState>, timeouts: ConnectionTimeouts) -> Self {
        let timer = || Box::pin(tokio::time::sleep(Duration::ZERO));
        Self { inner, state, timeouts, read_timer: timer(), write_timer: timer(), blocked: None }
    }

    /// Ends the connection if its client does not take the answer at [`MIN_WRITE_RATE`].
    fn poll_write_timeout(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let (since, written) = *self.blocked.get_or_insert_with(|| (Instant::now(), 0));
        let deadline = since + self.timeouts.write;
        if Instant::now() >= deadline {
            if written < self.timeouts.write.as_secs() * MIN_WRITE_RATE {
                // A reset frees what the kernel still holds of the answer; a normal close would wait for the client.
                SockRef::from(&self.inner).set_linger(Some(Duration::ZERO)).ok();
                return Poll::Ready(io::Error::new(io::ErrorKind::TimedOut, "the client does not read its answer"));
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
            }
            return Poll::Ready(result);
        }
        let Some(deadline) = self.state.read_deadline(&self.timeouts) else { return Poll::Pending };
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
            self.blocked = None; // the whole answer is with the kernel
        }
        result
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
