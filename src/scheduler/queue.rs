//! One model's waiting requests and their logits. Callers push requests; workers take batches and deliver logits.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError};
use std::time::Instant;

use tokio::sync::oneshot;

use super::plan::{Slice, Waiting, WaitingList};
use super::types::{Deadline, QueuePermit, Scores};
use crate::batch::Pair;
use crate::error::RerankError;
use crate::sync::{Condvar, Mutex, MutexGuard};
use crate::telemetry::metrics;

/// A request for the queue, with the channel for its reply.
#[derive(Debug)]
pub(super) struct NewJob {
    pub(super) pairs: Arc<[Pair]>,
    pub(super) permit: QueuePermit,
    pub(super) deadline: Option<Deadline>,
    pub(super) reply: oneshot::Sender<Result<Scores, RerankError>>,
}

/// The pairs of one request that are in a batch: their range, and all pairs of the request.
type Part = (Slice, Arc<[Pair]>);

/// A batch that a worker has taken: pairs of one or several requests. If it is dropped before
/// [`BatchJob::deliver`] or [`BatchJob::fail`], as when the worker panics, its requests fail.
#[derive(Debug)]
pub(super) struct BatchJob {
    number: u64,
    parts: Vec<Part>,
    queue: Arc<Queue>,
    finished: bool,
}

/// One model's queue.
#[derive(Debug)]
pub(super) struct Queue {
    /// The model's name, for metrics.
    model: String,
    max_batch_tokens: usize,
    state: Mutex<State>,
    arrived: Condvar,
}

#[derive(Debug, Default)]
struct State {
    waiting: WaitingList,
    jobs: HashMap<u64, Job>,
    next_id: u64,
    closed: bool,
    last_success: Option<Instant>,
    /// Start of each batch that is being computed, by batch number: the first entry is the oldest batch.
    running: BTreeMap<u64, Instant>,
    batches_taken: u64,
}

/// A request in the queue or in batches, until its last logit is delivered.
#[derive(Debug)]
struct Job {
    new: NewJob,
    logits: Vec<f32>,
    missing: usize,
    arrived: Instant,
    started: Option<Instant>,
    batches: usize,
    /// Number of the last batch that was counted in `batches`.
    last_batch: Option<u64>,
}

impl BatchJob {
    pub(super) fn pairs(&self) -> impl Iterator<Item = &Pair> {
        self.parts.iter().flat_map(|(slice, all)| &all[slice.pairs.clone()])
    }

    /// Stores the logits, in the order of [`BatchJob::pairs`]; `None` is a pair for which the device has no memory. Requests
    /// without missing logits are answered.
    pub(super) fn deliver(mut self, logits: &[Option<f32>]) {
        self.finished = true;
        self.queue.deliver(&self, logits);
    }

    /// Answers every request of this batch with an error.
    pub(super) fn fail(mut self, error: impl Fn() -> RerankError) {
        self.finished = true;
        self.queue.fail(&self, error);
    }
}

impl Drop for BatchJob {
    fn drop(&mut self) {
        if !self.finished {
            self.queue.fail(self, || RerankError::Internal(anyhow::anyhow!("the worker panicked")));
        }
    }
}

impl Queue {
    pub(super) fn new(model: &str, max_batch_tokens: usize) -> Self {
        Self { model: model.to_owned(), max_batch_tokens, state: Mutex::default(), arrived: Condvar::new() }
    }

    pub(super) fn max_batch_tokens(&self) -> usize {
        self.max_batch_tokens
    }

    /// Adds a request to the queue; [`RerankError::ShuttingDown`] if the queue is closed.
    pub(super) fn push(&self, new: NewJob) -> Result<(), RerankError> {
        let mut state = self.lock();
        if state.closed {
            return Err(RerankError::ShuttingDown);
        }
        let missing = new.pairs.len();
        let job = Job {
            logits: vec![0.0; missing],
            missing,
            arrived: Instant::now(),
            started: None,
            batches: 0,
            last_batch: None,
            new,
        };
        if missing == 0 {
            job.finish();
            return Ok(());
        }
        let id = state.next_id;
        state.next_id += 1;
        let lengths = job.new.pairs.iter().map(Pair::tokens).collect();
        state.waiting.push(Waiting::new(id, job.new.permit.client, lengths));
        state.jobs.insert(id, job);
        self.arrived.notify_one();
        Ok(())
    }

    /// The next batch, waiting until there is one. `None` when the queue is closed and empty.
    pub(super) fn take(self: &Arc<Self>) -> Option<BatchJob> {
        let mut state = self.lock();
        loop {
            state.reap_cancelled(&self.model);
            let batch = state.waiting.next_batch(self.max_batch_tokens);
            if !batch.is_empty() {
                if !state.waiting.is_empty() {
                    self.arrived.notify_one(); // another worker can take a batch too
                }
                let (number, parts) = state.begin(batch);
                return Some(BatchJob { number, parts, queue: Arc::clone(self), finished: false });
            }
            if state.closed {
                return None;
            }
            state = self.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn deliver(&self, batch: &BatchJob, logits: &[Option<f32>]) {
        let mut state = self.lock();
        if logits.iter().any(|logit| logit.is_some_and(f32::is_finite)) {
            state.last_success = Some(Instant::now());
        }
        state.running.remove(&batch.number);
        let mut rest = logits;
        for (slice, _) in &batch.parts {
            let (new, after) = rest.split_at(slice.pairs.len());
            rest = after;
            if new.iter().any(Option::is_none) {
                state.fail(slice.job, RerankError::OutOfMemory);
                continue;
            }
            if new.iter().flatten().any(|logit| !logit.is_finite()) {
                state.fail(slice.job, RerankError::NonFiniteScore);
                continue;
            }
            let Some(job) = state.jobs.get_mut(&slice.job) else { continue }; // cancelled meanwhile
            for (slot, &logit) in job.logits[slice.pairs.clone()].iter_mut().zip(new.iter().flatten()) {
                *slot = logit;
            }
            job.missing -= new.len();
            if job.missing == 0
                && let Some(job) = state.jobs.remove(&slice.job)
            {
                job.finish();
            }
        }
    }

    fn fail(&self, batch: &BatchJob, error: impl Fn() -> RerankError) {
        let mut state = self.lock();
        state.running.remove(&batch.number);
        for (slice, _) in &batch.parts {
            state.fail(slice.job, error());
        }
    }

    /// Answers all waiting and running requests with an error, and refuses later ones.
    pub(super) fn fail_all(&self, error: impl Fn() -> RerankError) {
        let mut state = self.lock();
        state.closed = true;
        for id in state.jobs.keys().copied().collect::<Vec<_>>() {
            state.fail(id, error());
        }
        self.arrived.notify_all();
    }

    /// Refuses new requests. [`Queue::take`] returns `None` once all waiting requests have been taken.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.arrived.notify_all();
    }

    pub(super) fn is_open(&self) -> bool {
        !self.lock().closed
    }

    pub(super) fn last_success(&self) -> Option<Instant> {
        self.lock().last_success
    }

    /// Start of the oldest batch that is being computed.
    pub(super) fn running_since(&self) -> Option<Instant> {
        self.lock().running.values().next().copied()
    }

    /// No update of the state can panic halfway, so the state behind a poisoned lock is consistent.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Removes requests whose future was dropped or whose deadline has passed.
    fn reap_cancelled(&mut self, model: &str) {
        let now = Instant::now();
        let expired = |job: &Job| job.new.deadline.filter(|deadline| deadline.at <= now);
        let cancelled: Vec<u64> = self
            .jobs
            .iter()
            .filter(|(_, job)| job.new.reply.is_closed() || expired(job).is_some())
            .map(|(&id, _)| id)
            .collect();
        for id in cancelled {
            let Some(job) = self.remove(id) else { continue };
            let expired = expired(&job);
            let reason = if expired.is_some() { "deadline" } else { "disconnected" };
            metrics::REQUESTS_CANCELLED.counter([model, reason].map(str::to_owned)).increment(1);
            if let Some(Deadline { seconds, .. }) = expired {
                job.new.reply.send(Err(RerankError::Deadline { seconds })).ok(); // the receiver may be dropped too
            }
        }
    }

    fn begin(&mut self, batch: Vec<Slice>) -> (u64, Vec<Part>) {
        let now = Instant::now();
        let number = self.batches_taken;
        self.batches_taken += 1;
        self.running.insert(number, now);
        let part = |slice: Slice| {
            let job = self.jobs.get_mut(&slice.job)?;
            job.started.get_or_insert(now);
            job.batches += usize::from(job.last_batch.replace(number) != Some(number));
            if !self.waiting.is_in_first_level(slice.job) {
                job.new.permit.first_service = None;
            }
            Some((slice, Arc::clone(&job.new.pairs)))
        };
        (number, batch.into_iter().filter_map(part).collect())
    }

    fn fail(&mut self, id: u64, error: RerankError) {
        if let Some(job) = self.remove(id) {
            job.new.reply.send(Err(error)).ok(); // the receiver may be dropped
        }
    }

    fn remove(&mut self, id: u64) -> Option<Job> {
        self.waiting.remove(id);
        self.jobs.remove(&id)
    }
}

impl Job {
    fn finish(self) {
        let now = Instant::now();
        let started = self.started.unwrap_or(now);
        let (queued, computed) = (started - self.arrived, now - started);
        let scores = Scores { logits: self.logits, queued, computed, batches: self.batches };
        drop(self.new.permit);
        self.new.reply.send(Ok(scores)).ok(); // the receiver may be dropped
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::admission::{Admission, AdmissionLimits, Resource};
    use crate::client::ClientId;

    type Answer = oneshot::Receiver<Result<Scores, RerankError>>;

    fn admission() -> Arc<Admission> {
        let limits = AdmissionLimits { units: 1000, wait: Duration::MAX };
        Arc::new(Admission::new(Resource::Queue, ::metrics::Gauge::noop(), limits, 1))
    }

    fn job(pairs: usize) -> (NewJob, Answer) {
        admitted_job(pairs, &admission())
    }

    fn admitted_job(pairs: usize, admission: &Arc<Admission>) -> (NewJob, Answer) {
        let (reply, answer) = oneshot::channel();
        let permit = QueuePermit {
            client: ClientId::Only,
            _total: admission.admit(ClientId::Only, pairs, None).unwrap(),
            first_service: Some(admission.admit(ClientId::Only, pairs, None).unwrap()),
        };
        (NewJob { pairs: vec![Pair::new(vec![1], vec![0]); pairs].into(), permit, deadline: None, reply }, answer)
    }

    fn queue(max_batch_tokens: usize) -> Arc<Queue> {
        Arc::new(Queue::new("m", max_batch_tokens))
    }

    fn pushed(queue: &Queue, pairs: usize) -> Answer {
        let (new, answer) = job(pairs);
        queue.push(new).unwrap();
        answer
    }

    #[test]
    fn batches_of_one_request_may_finish_in_any_order() {
        let queue = queue(2);
        let mut answer = pushed(&queue, 3);
        let (first, second) = (queue.take().unwrap(), queue.take().unwrap());
        let oldest = queue.running_since().unwrap();
        second.deliver(&[Some(2.0)]);
        assert_eq!(queue.running_since(), Some(oldest), "the older batch still runs");
        assert!(answer.try_recv().is_err());
        first.deliver(&[Some(0.0), Some(1.0)]);
        assert_eq!(answer.try_recv().unwrap().unwrap().logits, [0.0, 1.0, 2.0]);
        assert_eq!(queue.running_since(), None);
    }

    #[test]
    fn a_failed_batch_fails_its_requests_and_no_other() {
        let queue = queue(2);
        let mut failed = pushed(&queue, 3);
        let first = queue.take().unwrap();
        let mut answered = pushed(&queue, 1);
        let rest = queue.take().unwrap();
        first.fail(|| RerankError::OutOfMemory);
        assert!(matches!(failed.try_recv().unwrap(), Err(RerankError::OutOfMemory)));
        rest.deliver(&[Some(2.0), Some(7.0)]);
        assert_eq!(answered.try_recv().unwrap().unwrap().logits, [7.0]);
    }

    #[test]
    fn only_the_request_whose_pair_does_not_fit_fails() {
        let queue = queue(3);
        let (mut too_large, mut fits) = (pushed(&queue, 2), pushed(&queue, 1));
        queue.take().unwrap().deliver(&[Some(0.5), None, Some(7.0)]);
        assert!(matches!(too_large.try_recv().unwrap(), Err(RerankError::OutOfMemory)));
        assert_eq!(fits.try_recv().unwrap().unwrap().logits, [7.0]);
    }

    #[test]
    fn a_worker_that_panics_fails_the_requests_of_its_batch() {
        let queue = queue(8);
        let mut answer = pushed(&queue, 2);
        let batch = queue.take().unwrap();
        std::thread::spawn(move || {
            let _batch = batch;
            panic!("as a worker might");
        })
        .join()
        .unwrap_err();
        assert!(matches!(answer.try_recv().unwrap(), Err(RerankError::Internal(_))));
        assert_eq!(queue.running_since(), None);
    }

    #[test]
    fn one_push_wakes_as_many_workers_as_there_are_batches() {
        let queue = queue(1);
        let takers: Vec<_> = (0..2)
            .map(|_| {
                let queue = Arc::clone(&queue);
                std::thread::spawn(move || queue.take().unwrap())
            })
            .collect();
        std::thread::sleep(Duration::from_millis(50)); // usually both wait by then
        let _answer = pushed(&queue, 2);
        let batches: Vec<_> = takers.into_iter().map(|taker| taker.join().unwrap()).collect();
        assert!(batches.iter().all(|batch| batch.pairs().count() == 1));
    }

    #[test]
    fn failing_all_answers_waiting_and_running_requests() {
        let queue = queue(1);
        let (mut running, mut waiting) = (pushed(&queue, 1), pushed(&queue, 1));
        let batch = queue.take().unwrap();
        queue.fail_all(|| RerankError::ShuttingDown);
        for answer in [&mut running, &mut waiting] {
            assert!(matches!(answer.try_recv().unwrap(), Err(RerankError::ShuttingDown)));
        }
        batch.deliver(&[Some(1.0)]);
        let (late, _) = job(1);
        assert!(matches!(queue.push(late), Err(RerankError::ShuttingDown)));
        assert!(queue.take().is_none());
    }

    #[test]
    fn the_watchdog_sees_whether_the_queue_is_open_and_when_a_batch_last_succeeded() {
        let queue = queue(7);
        assert_eq!(queue.max_batch_tokens(), 7);
        assert_eq!(queue.last_success(), None);
        for (logit, succeeds) in [(None, false), (Some(f32::NAN), false), (Some(0.5), true)] {
            let _answer = pushed(&queue, 1);
            queue.take().unwrap().deliver(&[logit]);
            assert_eq!(queue.last_success().is_some(), succeeds, "{logit:?}");
        }
        assert!(queue.is_open());
        queue.close();
        assert!(!queue.is_open());
    }

    #[test]
    fn a_request_whose_deadline_has_passed_is_answered_and_not_computed() {
        let queue = queue(8);
        let [mut late, mut in_time] = [0, 60].map(|seconds| {
            let (new, answer) = job(1);
            queue.push(NewJob { deadline: Some(Deadline::after(seconds)), ..new }).unwrap();
            answer
        });
        let batch = queue.take().unwrap();
        assert!(matches!(late.try_recv().unwrap(), Err(RerankError::Deadline { seconds: 0 })));
        batch.deliver(&[Some(0.5)]);
        assert_eq!(in_time.try_recv().unwrap().unwrap().logits, [0.5]);
    }

    #[test]
    fn batches_are_counted_and_the_permit_of_the_first_level_is_returned_with_the_last_pair() {
        let (queue, admission) = (queue(2), admission());
        let (new, mut answer) = admitted_job(3, &admission);
        queue.push(new).unwrap();
        let first = queue.take().unwrap();
        assert_eq!(admission.waiting(), 2 * 3, "one pair waits in the first level");
        let second = queue.take().unwrap();
        assert_eq!(admission.waiting(), 3);
        first.deliver(&[Some(0.0), Some(1.0)]);
        second.deliver(&[Some(2.0)]);
        assert_eq!(answer.try_recv().unwrap().unwrap().batches, 2);
        assert_eq!(admission.waiting(), 0);
    }

    /// What happens to a queue.
    #[derive(Debug, Clone)]
    enum Step {
        /// A request of this many pairs arrives.
        Push(usize),
        /// The client of this request leaves. The index is taken modulo the number of requests.
        Leave(usize),
        /// A worker takes a batch.
        Take,
        /// This batch ends. The index is taken modulo the number of running batches.
        Finish(usize, Outcome),
    }

    /// How a batch ends.
    #[derive(Debug, Clone, Copy)]
    enum Outcome {
        Logits,
        /// The logit at this position, modulo the batch's size, is missing.
        Missing(usize),
        /// The logit at this position, modulo the batch's size, is infinite.
        NotFinite(usize),
        Error,
        WorkerPanic,
    }

    /// What the reference knows of a request.
    struct Request {
        answer: Option<Answer>,
        pairs: usize,
        taken: usize,
        delivered: usize,
        failed: bool,
    }

    impl Request {
        fn waits_for_a_batch(&self) -> bool {
            self.answer.is_some() && !self.failed && self.taken < self.pairs
        }

        /// Checks that the request is answered if and only if it has failed or has all of its logits.
        fn check(&mut self, id: u64) {
            let Some(answer) = &mut self.answer else { return };
            match answer.try_recv() {
                Ok(Ok(scores)) => {
                    assert!(!self.failed && self.delivered == self.pairs);
                    assert_eq!(scores.logits, (0..self.pairs).map(|pair| logit(id, pair)).collect::<Vec<_>>());
                }
                Ok(Err(_)) => assert!(self.failed),
                Err(oneshot::error::TryRecvError::Empty) => {
                    assert!(!self.failed && self.delivered < self.pairs);
                    return;
                }
                Err(oneshot::error::TryRecvError::Closed) => panic!("request {id} was dropped without an answer"),
            }
            self.answer = None;
        }
    }

    fn logit(job: u64, pair: usize) -> f32 {
        (job * 100 + pair as u64) as f32
    }

    fn finish(batch: BatchJob, outcome: Outcome, requests: &mut [Request]) {
        let pairs = |part: &Part| part.0.pairs.clone().map(|pair| (part.0.job, pair)).collect::<Vec<_>>();
        let all: Vec<(u64, usize)> = batch.parts.iter().flat_map(pairs).collect();
        let mut logits: Vec<Option<f32>> = all.iter().map(|&(job, pair)| Some(logit(job, pair))).collect();
        let spoiled = match outcome {
            Outcome::Missing(at) => Some((at % all.len(), None)),
            Outcome::NotFinite(at) => Some((at % all.len(), Some(f32::INFINITY))),
            _ => None,
        };
        if let Some((at, logit)) = spoiled {
            logits[at] = logit;
        }
        for (at, &(job, _)) in all.iter().enumerate() {
            let request = &mut requests[job as usize];
            match outcome {
                Outcome::Error | Outcome::WorkerPanic => request.failed = true,
                _ if spoiled.is_some_and(|(wrong, _)| wrong == at) => request.failed = true,
                _ => request.delivered += 1,
            }
        }
        match outcome {
            Outcome::Error => batch.fail(|| RerankError::OutOfMemory),
            Outcome::WorkerPanic => drop(batch),
            _ => batch.deliver(&logits),
        }
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let outcome = prop_oneof![
            6 => Just(Outcome::Logits),
            1 => any::<usize>().prop_map(Outcome::Missing),
            1 => any::<usize>().prop_map(Outcome::NotFinite),
            1 => Just(Outcome::Error),
            1 => Just(Outcome::WorkerPanic),
        ];
        let step = prop_oneof![
            3 => (1usize..6).prop_map(Step::Push),
            1 => any::<usize>().prop_map(Step::Leave),
            4 => Just(Step::Take),
            3 => (any::<usize>(), outcome).prop_map(|(batch, outcome)| Step::Finish(batch, outcome)),
        ];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        /// Against a reference that counts pairs: requests of any size arrive and leave, batches end in any order and way.
        #[test]
        fn every_request_gets_one_answer_with_its_own_logits(steps in steps(), max_batch_tokens in 1usize..8) {
            let (queue, admission) = (queue(max_batch_tokens), admission());
            let (mut requests, mut running) = (Vec::<Request>::new(), Vec::new());
            let finish_one = || Step::Finish(0, Outcome::Logits);
            let drain = (0..400).map(|i| if i % 2 == 0 { Step::Take } else { finish_one() });
            let drain = drain.chain(std::iter::repeat_with(finish_one).take(40));
            for step in steps.into_iter().chain(drain) {
                match step {
                    Step::Push(pairs) => {
                        let (new, answer) = admitted_job(pairs, &admission);
                        queue.push(new).unwrap();
                        requests.push(Request { answer: Some(answer), pairs, taken: 0, delivered: 0, failed: false });
                    }
                    Step::Leave(i) if !requests.is_empty() => {
                        let i = i % requests.len();
                        requests[i].answer = None;
                    }
                    // Without such a request, `take` would wait forever.
                    Step::Take if requests.iter().any(Request::waits_for_a_batch) => {
                        let batch = queue.take().unwrap();
                        prop_assert!((1..=max_batch_tokens).contains(&batch.pairs().count()));
                        for (slice, _) in &batch.parts {
                            let request = &mut requests[slice.job as usize];
                            prop_assert!(request.waits_for_a_batch() && request.taken == slice.pairs.start);
                            request.taken = slice.pairs.end;
                        }
                        running.push(batch);
                    }
                    Step::Finish(i, outcome) if !running.is_empty() => {
                        let i = i % running.len();
                        finish(running.remove(i), outcome, &mut requests);
                    }
                    _ => {}
                }
                for (id, request) in requests.iter_mut().enumerate() {
                    request.check(id as u64);
                }
                prop_assert_eq!(queue.running_since().is_some(), !running.is_empty());
            }
            prop_assert!(requests.iter().all(|request| request.answer.is_none()), "a request has no answer");
            queue.close();
            prop_assert!(queue.take().is_none());
            prop_assert_eq!(admission.waiting(), 0, "a permit is held after its request");
        }
    }
}
