//! The queue against examples, and against a reference that counts pairs.

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
