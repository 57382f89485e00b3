//! Threads of low priority, for work on large requests that must not delay small ones: parsing, tokenizing, and
//! looking up scores.
//!
//! Beside busy threads of normal priority they get little processor time. tokio's blocking threads cannot be used for this: all
//! work shares them, and a thread that has lowered its priority may not raise it again.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread;

use tokio::sync::oneshot;

use crate::error::RerankError;

/// Niceness of the threads: beside a busy thread of niceness 0, they get about a tenth of its processor time.
#[cfg(target_os = "linux")]
const NICENESS: i32 = 10;

type Job = Box<dyn FnOnce() + Send>;

/// The queue of the threads, which are started at its first use.
static QUEUE: OnceLock<Sender<Job>> = OnceLock::new();

/// Runs `work` on a background thread, in the order of the calls. If the future is dropped before the work begins, the
/// work is skipped.
///
/// # Errors
/// [`RerankError::Internal`] if the work panics, or if no thread could be started.
pub async fn run<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, RerankError> {
    let (result, receive) = oneshot::channel();
    let job = Box::new(move || {
        if !result.is_closed() {
            result.send(work()).ok();
        }
    });
    QUEUE.get_or_init(start_threads).send(job).map_err(|_| internal("there is no background thread"))?;
    receive.await.map_err(|_| internal("background work panicked"))
}

/// Runs `work` as [`run`] if it is large, so that it does not delay other requests, else on this thread.
///
/// # Errors
/// As [`run`].
pub async fn run_if<T: Send + 'static>(
    is_large: bool,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RerankError> {
    if is_large { run(work).await } else { Ok(work()) }
}

fn internal(cause: &'static str) -> RerankError {
    RerankError::Internal(anyhow::anyhow!(cause))
}

/// Starts as many threads as there are processors.
fn start_threads() -> Sender<Job> {
    let (send, receive) = channel();
    let receive = Arc::new(Mutex::new(receive));
    for _ in 0..thread::available_parallelism().map_or(1, usize::from) {
        let receive = Arc::clone(&receive);
        if let Err(error) = thread::Builder::new().name("background".to_owned()).spawn(move || run_jobs(&receive)) {
            tracing::error!(%error, "cannot start a background thread");
        }
    }
    send
}

fn run_jobs(jobs: &Mutex<Receiver<Job>>) {
    // On other systems the call would change the whole process.
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::nice(NICENESS) {
        tracing::warn!(%error, "cannot lower the priority of a background thread");
    }
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        // The panic hook has printed the panic; the caller sees that its channel is closed.
        catch_unwind(AssertUnwindSafe(job)).ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn work_that_panics_is_an_error_and_the_threads_go_on() {
        for _ in 0..2 * thread::available_parallelism().map_or(1, usize::from) {
            let panicked = run(|| panic!("planned")).await;
            assert!(matches!(panicked, Err(RerankError::Internal(_))));
        }
        assert_eq!(run(|| 7).await.unwrap(), 7);
    }
}
