//! The stream of a request's body as it arrives on a connection. `body.rs` reads it.
//!
//! A response may be complete before its request's body has arrived: a wrong key, an unknown path, a body over a limit. If the
//! server closed the connection then, the kernel would reset it, and a client that is still sending could lose the response. The
//! unread rest is therefore read and discarded, within limits. This is done here, for every route alike.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::Bytes;
use axum::http::header;
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use tokio::sync::Semaphore;

use super::connection::ConnectionState;

/// Maximum bytes of an unread body that are discarded.
const MAX_DISCARDED_BYTES: usize = 64 << 20;
/// Maximum time for which an unread body is discarded.
const MAX_DISCARD_TIME: Duration = Duration::from_secs(10);
/// Maximum bodies that are discarded at the same time. The rest of any further one is not read.
const MAX_DISCARDING: usize = 64;

/// Slots for bodies that are being discarded.
#[derive(Debug, Clone)]
pub(super) struct DiscardSlots(Arc<Semaphore>);

impl DiscardSlots {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(MAX_DISCARDING)))
    }

    /// Reads and discards the rest of `body` in the background.
    fn discard(&self, mut body: Incoming) {
        let Ok(slot) = Arc::clone(&self.0).try_acquire_owned() else { return };
        tokio::spawn(async move {
            let discard = async {
                let mut left = MAX_DISCARDED_BYTES;
                while let Some(Ok(frame)) = body.frame().await {
                    let Some(rest) = left.checked_sub(frame.data_ref().map_or(1, Bytes::len)) else { break };
                    left = rest;
                }
            };
            tokio::time::timeout(MAX_DISCARD_TIME, discard).await.ok();
            drop(slot);
        });
    }
}

/// A request's body that reports its end to the connection. If it is dropped before its end, the rest is read and discarded.
#[derive(Debug)]
pub(super) struct RequestBody {
    /// `None` only while it is dropped.
    body: Option<Incoming>,
    state: Arc<ConnectionState>,
    slots: DiscardSlots,
    /// The client waits for `100 Continue`, which hyper sends when the body is first read.
    waits_for_continue: bool,
}

impl RequestBody {
    pub(super) fn wrap(
        request: hyper::Request<Incoming>,
        state: Arc<ConnectionState>,
        slots: DiscardSlots,
    ) -> hyper::Request<Self> {
        if request.body().is_end_stream() {
            state.request_received();
        }
        let waits_for_continue = request.headers().contains_key(header::EXPECT);
        request.map(|body| Self { body: Some(body), state, slots, waits_for_continue })
    }

    fn inner(&self) -> &Incoming {
        self.body.as_ref().expect("taken only on drop")
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        self.waits_for_continue = false;
        let frame = Pin::new(self.body.as_mut().expect("taken only on drop")).poll_frame(cx);
        if matches!(frame, Poll::Ready(None)) || self.is_end_stream() {
            self.state.request_received();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.inner().is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner().size_hint()
    }
}

impl Drop for RequestBody {
    fn drop(&mut self) {
        // A client that waits for 100 Continue has not begun to send, and reading would ask it to.
        if let Some(body) = self.body.take()
            && !body.is_end_stream()
            && !self.waits_for_continue
        {
            self.slots.discard(body);
        }
    }
}
