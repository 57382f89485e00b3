//! The queue on simulated threads (`crate::sync`): clients, workers and a shutdown at the same time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shuttle::future::block_on;
use tokio::sync::oneshot;

use super::queue::{NewJob, Queue};
use super::types::{Deadline, QueuePermit, Scores};
use crate::admission::{Admission, AdmissionLimits, Resource};
use crate::batch::Pair;
use crate::client::ClientId;
use crate::error::RerankError;
use crate::sync::schedules::{check_random, choose};
use crate::sync::thread;

/// What a client does, on a thread of its own.
type ClientWork = Box<dyn FnOnce(&Traffic) + Send>;
type Answer = oneshot::Receiver<Result<Scores, RerankError>>;

/// Pairs of one token in a batch.
const BATCH: usize = 2;
/// Maximum pairs of a request.
const MAX_PAIRS: usize = 3;

/// A queue and the requests that went through it. The only token of a pair is `MAX_PAIRS` times its request plus its position, and
/// its logit is the same number.
struct Traffic {
    queue: Arc<Queue>,
    admissions: [Arc<Admission>; 2],
    /// Requests with a pair in a batch that failed. A lock of std is enough: nobody yields while holding it.
    failed: std::sync::Mutex<BTreeSet<u32>>,
}

/// A request in the queue.
struct Sent {
    number: u32,
    pairs: usize,
    answer: Answer,
}

impl Traffic {
    fn new() -> Arc<Self> {
        let limits = AdmissionLimits { units: usize::MAX, wait: Duration::MAX };
        let admission = || Arc::new(Admission::new(Resource::Queue, metrics::Gauge::noop(), limits, 1));
        Arc::new(Self {
            queue: Arc::new(Queue::new("m", BATCH)),
            admissions: [admission(), admission()],
            failed: std::sync::Mutex::default(),
        })
    }

    /// Sends request `number` with one pair or more; `None` if the queue is closed.
    fn push(&self, number: u32, deadline: Option<Deadline>) -> Option<Sent> {
        let (pairs, client) = (1 + choose(MAX_PAIRS), ClientId::Key(number % 2));
        let ids = (0..pairs as u32).map(|position| number * MAX_PAIRS as u32 + position);
        let [total, first_service] =
            self.admissions.each_ref().map(|admission| admission.admit(ClientId::Only, pairs, None).unwrap());
        let permit = QueuePermit { client, _total: total, first_service: Some(first_service) };
        let (reply, answer) = oneshot::channel();
        let new = NewJob { pairs: ids.map(|id| Pair::new(vec![id], vec![0])).collect(), permit, deadline, reply };
        match self.queue.push(new) {
            Ok(()) => Some(Sent { number, pairs, answer }),
            Err(RerankError::ShuttingDown) => None,
            Err(error) => panic!("{error}"),
        }
    }

    /// Takes batches until the queue is closed and empty. With `faults`, half of the batches fail or are dropped, as by a worker
    /// that panics.
    fn work(&self, faults: bool) {
        while let Some(batch) = self.queue.take() {
            let ids: Vec<u32> = batch.pairs().map(|pair| pair.ids()[0]).collect();
            assert!((1..=BATCH).contains(&ids.len()));
            let fault = if faults { choose(4) } else { 2 };
            if fault < 2 {
                self.failed.lock().unwrap().extend(ids.iter().map(|id| id / MAX_PAIRS as u32));
            }
            match fault {
                0 => batch.fail(|| RerankError::OutOfMemory),
                1 => drop(batch),
                _ => batch.deliver(&ids.iter().map(|&id| Some(id as f32)).collect::<Vec<_>>()),
            }
        }
        assert!(!self.queue.is_open(), "`take` returns `None` only if the queue is closed");
    }

    /// Runs two workers and one thread for each client, then closes the queue.
    fn run(self: &Arc<Self>, faults: bool, clients: Vec<ClientWork>) {
        let worker = |_| {
            let traffic = Arc::clone(self);
            thread::spawn(move || traffic.work(faults))
        };
        let workers: Vec<_> = (0..2).map(worker).collect();
        let client = |client: ClientWork| {
            let traffic = Arc::clone(self);
            thread::spawn(move || client(&traffic))
        };
        let clients: Vec<_> = clients.into_iter().map(client).collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
        self.queue.close();
        workers.into_iter().for_each(|worker| worker.join().unwrap());
        assert!(self.queue.take().is_none());
        assert_eq!(self.queue.running_since(), None);
        // Every request holds its permits until it leaves the queue.
        assert_eq!(self.admissions.each_ref().map(|admission| admission.waiting()), [0, 0]);
    }
}

impl Sent {
    /// Waits for the answer. If none comes, the schedule ends in a deadlock or in a closed channel, and the test fails.
    fn wait(self) -> Result<(), RerankError> {
        let scores = block_on(self.answer).expect("the request is answered")?;
        let first = self.number * MAX_PAIRS as u32;
        let expected: Vec<f32> = (first..first + self.pairs as u32).map(|id| id as f32).collect();
        assert_eq!(scores.logits, expected);
        Ok(())
    }
}

#[test]
fn shuttle_every_request_gets_the_answer_of_its_batches() {
    check_random(|| {
        let client = |number: u32| -> ClientWork {
            Box::new(move |traffic| {
                let sent = [2 * number, 2 * number + 1].map(|number| traffic.push(number, None).unwrap());
                for request in sent {
                    let number = request.number;
                    let outcome = request.wait();
                    let has_failed = traffic.failed.lock().unwrap().contains(&number);
                    assert_eq!(outcome.is_err(), has_failed, "{outcome:?}");
                }
            })
        };
        Traffic::new().run(true, vec![client(0), client(1)]);
    });
}

/// Two clients send a request each; `end` runs at any time.
fn check_end(end: fn(&Queue), may_fail: bool) {
    check_random(move || {
        let client = |number: u32| -> ClientWork {
            Box::new(move |traffic| {
                if let Some(sent) = traffic.push(number, None) {
                    match sent.wait() {
                        Ok(()) => {}
                        Err(RerankError::ShuttingDown) if may_fail => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            })
        };
        let end: ClientWork = Box::new(move |traffic| end(&traffic.queue));
        Traffic::new().run(false, vec![client(0), client(1), end]);
    });
}

#[test]
fn shuttle_a_closed_queue_answers_what_it_accepted() {
    check_end(Queue::close, false);
}

#[test]
fn shuttle_failing_all_answers_every_request() {
    check_end(|queue| queue.fail_all(|| RerankError::ShuttingDown), true);
}

#[test]
fn shuttle_cancelled_and_late_requests_leave_and_others_are_answered() {
    check_random(|| {
        let client = |number: u32| -> ClientWork {
            Box::new(move |traffic| match choose(3) {
                0 => drop(traffic.push(number, None).unwrap()),
                1 => {
                    let late = traffic.push(number, Some(Deadline::after(0))).unwrap();
                    assert!(matches!(late.wait(), Err(RerankError::Deadline { seconds: 0 })));
                }
                _ => traffic.push(number, None).unwrap().wait().unwrap(),
            })
        };
        Traffic::new().run(false, (0..3).map(client).collect());
    });
}
