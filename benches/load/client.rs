//! An HTTP/1.1 client that keeps connections alive, and two ways to generate load: closed loop ([`Client::capacity`]) and open
//! loop ([`Client::offer`]).

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// A request of [`Client::offer`] that finds all connections busy for this time is dropped, as by a client's connection pool.
const CONNECTION_PATIENCE: Duration = Duration::from_secs(1);
/// A request that is not answered within this time has failed.
const ANSWER_PATIENCE: Duration = Duration::from_secs(180);

/// What became of one request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Status(u16),
    /// The server closed the connection without an answer.
    Closed,
    /// The server reset the connection.
    Reset,
    /// No connection: the port is closed.
    Refused,
    /// No answer within [`ANSWER_PATIENCE`], or another error.
    Failed,
    /// Not sent, because all connections were busy.
    Unsent,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Outcome {
    pub(crate) answer: Answer,
    pub(crate) has_retry_after: bool,
    /// From the scheduled start to the last byte of the answer.
    pub(crate) latency: Duration,
}

/// A response, and its connection if it stays open.
pub(crate) struct Response {
    pub(crate) status: u16,
    pub(crate) has_retry_after: bool,
    pub(crate) body: Vec<u8>,
    pub(crate) connection: Option<TcpStream>,
}

/// Connections to one server. Idle ones are used again.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    address: Arc<str>,
    idle: Arc<Mutex<Vec<TcpStream>>>,
}

impl Client {
    pub(crate) fn new(address: &str) -> Self {
        Self { address: address.into(), idle: Arc::default() }
    }

    /// Sends one request. If it fails on an idle connection, which the server may have closed, it is sent again on a new one.
    pub(crate) async fn ask(&self, request: &[u8], scheduled: Instant) -> Outcome {
        let asked = tokio::time::timeout(ANSWER_PATIENCE, self.response(request)).await;
        let (answer, has_retry_after) = match asked {
            Ok(Ok(response)) => {
                self.idle().extend(response.connection);
                (Answer::Status(response.status), response.has_retry_after)
            }
            Ok(Err(error)) => (answer_of(&error), false),
            Err(_) => (Answer::Failed, false),
        };
        Outcome { answer, has_retry_after, latency: scheduled.elapsed() }
    }

    async fn response(&self, request: &[u8]) -> io::Result<Response> {
        let idle = self.idle().pop();
        if let Some(stream) = idle
            && let Ok(response) = exchange(stream, request).await
        {
            return Ok(response);
        }
        exchange(connect(&self.address).await?, request).await
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<TcpStream>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers per second of `clients` clients that each wait for their answer before they send the next request.
    ///
    /// # Errors
    /// An answer is not 200.
    pub(crate) async fn capacity(&self, requests: &Arc<Vec<Vec<u8>>>, clients: usize, time: Duration) -> Result<f64> {
        let start = Instant::now();
        let tasks: Vec<_> = (0..clients)
            .map(|first| {
                let (client, requests) = (self.clone(), Arc::clone(requests));
                tokio::spawn(async move {
                    let mut answered = 0;
                    while start.elapsed() < time {
                        let request = &requests[(first + answered * clients) % requests.len()];
                        let outcome = client.ask(request, Instant::now()).await;
                        let answer = outcome.answer;
                        ensure!(answer == Answer::Status(200), "the capacity cannot be measured: {answer:?}");
                        answered += 1;
                    }
                    Ok(answered)
                })
            })
            .collect();
        let mut answered = 0;
        for task in tasks {
            answered += task.await??;
        }
        Ok(answered as f64 / start.elapsed().as_secs_f64())
    }

    /// Starts `rate` requests per second at fixed times, whether or not earlier ones are answered, on at most `connections`
    /// connections; returns when all are answered. Latencies count from the scheduled time, so a server that falls behind cannot
    /// hide it.
    pub(crate) async fn offer(
        &self,
        requests: &Arc<Vec<Vec<u8>>>,
        rate: f64,
        time: Duration,
        connections: usize,
    ) -> Vec<Outcome> {
        let count = (rate * time.as_secs_f64()).ceil() as usize;
        let next = Arc::new(AtomicUsize::new(0));
        let start = Instant::now();
        let senders: Vec<_> = (0..connections.min(count))
            .map(|_| {
                let (client, requests, next) = (self.clone(), Arc::clone(requests), Arc::clone(&next));
                tokio::spawn(async move {
                    let mut outcomes = Vec::new();
                    loop {
                        let i = next.fetch_add(1, Relaxed);
                        if i >= count {
                            return outcomes;
                        }
                        let scheduled = start + Duration::from_secs_f64(i as f64 / rate);
                        tokio::time::sleep_until(scheduled.into()).await;
                        outcomes.push(if scheduled.elapsed() > CONNECTION_PATIENCE {
                            Outcome { answer: Answer::Unsent, has_retry_after: false, latency: scheduled.elapsed() }
                        } else {
                            client.ask(&requests[i % requests.len()], scheduled).await
                        });
                    }
                })
            })
            .collect();
        let mut outcomes = Vec::with_capacity(count);
        for sender in senders {
            outcomes.extend(sender.await.expect("a sender that does not panic"));
        }
        outcomes
    }
}

pub(crate) async fn connect(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Sends a request and reads its response.
pub(crate) async fn exchange(mut stream: TcpStream, request: &[u8]) -> io::Result<Response> {
    stream.write_all(request).await?;
    read_response(stream).await
}

/// Reads one response, of a server that sends Content-Length.
pub(crate) async fn read_response(mut stream: TcpStream) -> io::Result<Response> {
    let mut answer = Vec::with_capacity(1024);
    let head_length = loop {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(end) = answer.windows(4).position(|bytes| bytes == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&answer[..head_length]).to_ascii_lowercase();
    let header = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    let length: usize = header("content-length").and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    while answer.len() < head_length + length {
        if stream.read_buf(&mut answer).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(Response {
        status: head.split(' ').nth(1).and_then(|text| text.parse().ok()).unwrap_or(0),
        has_retry_after: header("retry-after").is_some(),
        connection: (header("connection") != Some("close")).then_some(stream),
        body: answer.split_off(head_length),
    })
}

pub(crate) fn answer_of(error: &io::Error) -> Answer {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => Answer::Closed,
        io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Answer::Reset,
        io::ErrorKind::ConnectionRefused => Answer::Refused,
        _ => Answer::Failed,
    }
}

/// Keys of the clients, where the server knows clients by their keys.
pub(crate) const KEY: &str = "well-behaved";
pub(crate) const ATTACKERS_KEY: &str = "attacker";

/// A POST request on the wire, of the well-behaved client.
pub(crate) fn post(path: &str, body: &str) -> Vec<u8> {
    post_with_key(KEY, path, body)
}

/// A POST request on the wire.
pub(crate) fn post_with_key(key: &str, path: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
    .into_bytes()
}

/// Random English words.
pub(crate) fn text(random: &mut fastrand::Rng, words: usize) -> String {
    const WORDS: [&str; 16] = [
        "river", "engine", "harbor", "window", "letter", "market", "forest", "signal", "bridge", "garden", "copper",
        "winter", "silver", "planet", "record", "school",
    ];
    (0..words).map(|_| WORDS[random.usize(..16)]).collect::<Vec<_>>().join(" ")
}

/// 64 different rerank requests, each with `documents` documents of `words` words.
pub(crate) fn requests(path: &str, model: &str, documents: usize, words: usize) -> Arc<Vec<Vec<u8>>> {
    let request = |seed| {
        let random = &mut fastrand::Rng::with_seed(seed);
        let texts: Vec<String> = (0..documents).map(|_| text(random, words)).collect();
        post(path, &serde_json::json!({"model": model, "query": text(random, 4), "documents": texts}).to_string())
    };
    Arc::new((0..64).map(request).collect())
}
