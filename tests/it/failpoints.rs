//! Faults inside the real binary, injected by failpoints (feature `failpoints`, src/failpoint.rs). Without the feature, one test
//! shows that the binary has none.

use std::collections::BTreeSet;
use std::path::Path;

/// The names in `failpoint!("name")` in `src/`.
fn names(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            names(&path, found);
        } else if !path.ends_with("failpoint.rs") {
            let text = std::fs::read_to_string(&path).unwrap();
            let calls = text.split("failpoint!(\"").skip(1);
            found.extend(calls.map(|rest| rest.split('"').next().unwrap().to_owned()));
        }
    }
}

#[test]
fn the_binary_has_failpoints_only_with_their_feature() {
    let mut all = BTreeSet::new();
    names(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut all);
    assert!(all.len() >= 10, "{all:?}");
    let binary = std::fs::read(env!("CARGO_BIN_EXE_rerankd")).unwrap();
    for name in all {
        let is_there = memchr::memmem::find(&binary, name.as_bytes()).is_some();
        assert_eq!(is_there, cfg!(feature = "failpoints"), "{name}");
    }
}

#[cfg(feature = "failpoints")]
mod injected {
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
    use std::time::{Duration, Instant};

    use crate::support::fixture;
    use crate::support::server::{Server, scores_of};

    /// How long a test waits for a condition before it fails.
    const PATIENCE: Duration = Duration::from_secs(60);

    /// A server with a tiny model and these faults. Logs only errors, and not where a worker panics often: nobody reads them.
    fn server(faults: &str, log: &str) -> Server {
        let model = format!("m={}", fixture("xlmr").display());
        let log = format!("{log},rerankd::cli=info");
        let arguments = ["--model", &model, "--device", "cpu", "--dtype", "f32", "--log", &log];
        Server::start_in(&arguments, &[("FAILPOINTS", faults), ("RUST_BACKTRACE", "0")])
    }

    /// A request of three documents; `number` makes it differ from others.
    fn body(number: usize) -> String {
        format!(r#"{{"model":"m","query":"query {number}","documents":["a {number}","a longer document","c"]}}"#)
    }

    fn get(server: &Server, path: &str) -> String {
        server.request(&format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"))
    }

    fn status(answer: &str) -> u16 {
        answer.split(' ').nth(1).and_then(|status| status.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
    }

    fn restarts(server: &Server) -> usize {
        let metrics = get(server, "/metrics");
        assert_eq!(status(&metrics), 200);
        let line = metrics.lines().find(|line| line.starts_with("rerankd_worker_restarts_total{"));
        line.map_or(0, |line| line.rsplit(' ').next().unwrap().parse().unwrap())
    }

    fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
        let until = Instant::now() + PATIENCE;
        while !condition() {
            assert!(Instant::now() < until, "{what} did not happen");
            std::thread::yield_now();
        }
    }

    fn median_ms(mut times: Vec<Duration>) -> f64 {
        times.sort();
        times[times.len() / 2].as_secs_f64() * 1e3
    }

    // Goal G11.
    #[test]
    fn a_hundred_worker_panics_fail_the_requests_of_their_batches_and_no_other() {
        const PANICS: usize = 100;
        const CLIENTS: usize = 4;
        const BODIES: usize = 10;
        let usual = server("", "off");
        let expected: Vec<Vec<f64>> = (0..BODIES).map(|number| usual.scores(&body(number))).collect();
        drop(usual);
        // The usual limit of restarts would end the process; the test below shows that.
        let faults = "any-number-of-restarts=return;worker-before-batch=15%panic;worker-after-batch=15%panic";
        let server = server(faults, "off");
        let check = |number: usize| {
            let answer = server.rerank(&body(number % BODIES));
            match status(&answer) {
                200 => assert_eq!(scores_of(&answer), expected[number % BODIES]),
                500 => return false,
                _ => panic!("{answer}"),
            }
            true
        };

        // With one client, every request is a batch of its own.
        let (mut failed, mut undisturbed, mut after_panic) = (0, Vec::new(), Vec::new());
        let mut has_failed = false;
        for number in 0.. {
            let begun = Instant::now();
            let is_answered = check(number);
            if is_answered {
                if has_failed { &mut after_panic } else { &mut undisturbed }.push(begun.elapsed());
            }
            has_failed = !is_answered;
            failed += usize::from(has_failed);
            if failed == PANICS / 2 {
                break;
            }
        }
        wait_until("one restart for each failed request", || restarts(&server) == PANICS / 2);
        eprintln!(
            "answer after a panic: median {:.1} ms; other answers: median {:.1} ms",
            median_ms(after_panic),
            median_ms(undisturbed)
        );

        // A batch has pairs of one to CLIENTS requests.
        let (failed, answered) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let is_over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for client in 0..CLIENTS {
                let (failed, answered, is_over, check) = (&failed, &answered, &is_over, &check);
                scope.spawn(move || {
                    for number in client.. {
                        let counter = if check(number) { answered } else { failed };
                        counter.fetch_add(1, SeqCst);
                        if is_over.load(SeqCst) {
                            break;
                        }
                    }
                });
            }
            let until = Instant::now() + PATIENCE;
            while restarts(&server) < PANICS && Instant::now() < until {
                std::thread::yield_now();
            }
            is_over.store(true, SeqCst);
        });
        let (failed, answered) = (failed.into_inner(), answered.into_inner());
        wait_until("a failed request for each restart", || {
            let restarts = restarts(&server) - PANICS / 2;
            (restarts..=CLIENTS * restarts).contains(&failed)
        });
        assert!(answered > 0 && restarts(&server) >= PANICS);
        eprintln!("{} panics; {CLIENTS} clients: {answered} requests answered, {failed} failed", restarts(&server));
        wait_until("a healthy server", || status(&get(&server, "/health")) == 200);
    }

    #[test]
    fn the_fourth_panic_of_a_worker_within_a_minute_ends_the_process() {
        let mut server = server("worker-before-batch=panic", "off");
        for number in 0..3 {
            assert_eq!(status(&server.rerank(&body(number))), 500);
            assert_eq!(status(&get(&server, "/ready")), 200);
        }
        assert_eq!(status(&server.rerank(&body(3))), 500, "the response is written before the process ends");
        assert_eq!(server.exit_code(), Some(70));
    }

    #[test]
    fn a_fault_fails_its_request_and_the_next_one_is_answered() {
        let expected = server("", "off").scores(&body(0));
        for (fault, first_status) in [
            ("request-handler=1*panic", 500),
            ("tokenizer-unit=1*panic", 500),
            ("worker-before-batch=1*panic", 500),
            ("worker-after-batch=1*panic", 500),
            ("encoder-error=1*return", 500),
            // The batch is halved, and the halves fit.
            ("encoder-out-of-memory=1*return", 200),
            // The batch, its first half of one pair, and each half of the second half do not fit.
            ("encoder-out-of-memory=5*return", 503),
        ] {
            let server = server(fault, "off");
            let answer = server.rerank(&body(0));
            assert_eq!(status(&answer), first_status, "{fault}: {answer}");
            if first_status == 200 {
                assert_eq!(scores_of(&answer), expected, "{fault}");
            }
            assert_eq!(server.scores(&body(0)), expected, "{fault}");
        }
    }

    #[test]
    fn without_descriptors_accepting_pauses_and_health_is_served_again() {
        // The loop accepts two connections, then fails three times.
        let mut server = server("accept-connection=2*off->3*return", "error");
        for _ in 0..4 {
            assert_eq!(status(&get(&server, "/health")), 200);
        }
        server.child.kill().unwrap();
        let log = server.rest_of_log();
        assert_eq!(log.matches("cannot accept connections").count(), 3, "{log}");
    }
}
