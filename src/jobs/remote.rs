//! Ranking by servers: each query is one `POST /v1/rerank` to the server with the fewest requests in flight.
//!
//! A server that is busy, fails or cannot be reached gets no requests for a while, and the query goes to another one.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use ureq::http::{Response, Uri, header};
use ureq::{Agent, Body};

use super::job::{JobError, JobScore, RankJob};
use crate::secret::Secret;
use crate::tls;

/// Maximum time of connecting.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Maximum time until a response begins; more than a server's default `--request-timeout`.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(180);
/// Maximum bytes of a response.
const MAX_RESPONSE_BYTES: u64 = 256 << 20;
/// Attempts to rank a query that servers answer with a 5xx status other than 502 and 503, such as 500 or 504.
const FAILED_ATTEMPTS: u32 = 3;
/// Pause of a server after its first failure. It doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// Longest pause without a `Retry-After`, and longest pause with one.
const MAX_PAUSE: Duration = Duration::from_secs(10);
const MAX_RETRY_AFTER: Duration = Duration::from_secs(300);

/// How to reach the servers and what to ask for.
#[derive(Debug, Clone)]
pub(crate) struct RemoteOptions {
    /// Base URLs, or URLs of a rerank path.
    pub(crate) urls: Vec<String>,
    pub(crate) key: Option<Secret>,
    /// A served model; `None` is the first model of the first server that answers.
    pub(crate) model: Option<String>,
    pub(crate) top_n: Option<usize>,
    pub(crate) overlap_tokens: usize,
    /// Ask for logits instead of scores.
    pub(crate) raw_scores: bool,
    /// How long a query is offered to servers that are all busy or out of reach, before the run ends.
    pub(crate) patience: Duration,
}

/// Several servers with the same model.
pub(crate) struct Servers {
    http: Arc<ServerHttp>,
    options: RemoteOptions,
    model: String,
    pool: Mutex<ServerPool>,
}

/// The connections, and the URLs of the servers' rerank paths.
struct ServerHttp {
    agent: Agent,
    urls: Vec<String>,
    key: Option<Secret>,
}

/// Why a server did not answer a request.
#[derive(Debug)]
enum Refusal {
    /// The server cannot take the request now: try again after this time, or elsewhere.
    Busy { reason: String, retry_after: Option<Duration> },
    /// The server failed with this request.
    Failed(String),
    /// The request is not valid.
    Rejected(String),
    /// No request will succeed: a wrong key, a wrong URL.
    Misconfigured(String),
}

impl Servers {
    /// Asks a server for its model unless the options name one.
    ///
    /// # Errors
    /// A URL is not valid; no server can be reached, or one does not accept the key.
    pub(crate) async fn connect(options: RemoteOptions) -> Result<Self, JobError> {
        let urls =
            options.urls.iter().map(|url| rerank_url(url)).collect::<Result<Vec<_>>>().map_err(JobError::Fatal)?;
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(RESPONSE_TIMEOUT))
            .user_agent(concat!("rerankd/", env!("CARGO_PKG_VERSION")))
            .max_idle_connections_per_host(64)
            .max_idle_connections(512)
            .tls_config(tls::client_config())
            .build()
            .new_agent();
        let pool = Mutex::new(ServerPool::new(urls.len()));
        let http = Arc::new(ServerHttp { agent, urls, key: options.key.clone() });
        let mut servers = Self { http, model: String::new(), pool, options };
        servers.model = match servers.options.model.clone() {
            Some(model) => model,
            None => servers.first_model().await?,
        };
        Ok(servers)
    }

    /// The name of the model in the requests.
    pub(crate) fn model(&self) -> &str {
        &self.model
    }

    async fn first_model(&self) -> Result<String, JobError> {
        self.until_answered(|http, server| http.first_model(server)).await
    }

    /// Ranks a query's documents, best first.
    ///
    /// # Errors
    /// [`JobError::Query`] if the query is not valid or fails on the servers; [`JobError::Unavailable`] if no server has accepted
    /// it within [`RemoteOptions::patience`]; [`JobError::Fatal`] if no query could succeed.
    pub(crate) async fn rank(&self, job: &RankJob) -> Result<Vec<JobScore>, JobError> {
        let RemoteOptions { top_n, overlap_tokens, raw_scores, .. } = &self.options;
        let body = json!({
            "model": self.model, "query": job.query, "documents": &job.texts[..], "top_n": top_n,
            "overlap_tokens": overlap_tokens, "raw_scores": raw_scores,
        });
        let body: Arc<str> = body.to_string().into();
        let (documents, results) = (job.texts.len(), top_n.unwrap_or(usize::MAX).min(job.texts.len()));
        self.until_answered(move |http, server| http.rerank(server, &body, documents, results)).await
    }

    /// Sends a request to one server after the other until one answers it.
    async fn until_answered<T: Send + 'static>(
        &self,
        send: impl Fn(&ServerHttp, usize) -> Result<T, Refusal> + Clone + Send + 'static,
    ) -> Result<T, JobError> {
        let begun = Instant::now();
        let mut failed = 0;
        loop {
            let server = loop {
                let next = self.pool().acquire(Instant::now());
                match next {
                    Ok(server) => break server,
                    Err(wait) => tokio::time::sleep(wait).await,
                }
            };
            let (http, send) = (Arc::clone(&self.http), send.clone());
            let attempt = tokio::task::spawn_blocking(move || send(&http, server)).await;
            let attempt = attempt.map_err(|error| JobError::Fatal(anyhow!(error)))?;
            let pause = match &attempt {
                Err(Refusal::Busy { retry_after, .. }) => Some(*retry_after),
                Err(Refusal::Failed(_)) => Some(None),
                _ => None,
            };
            self.pool().release(server, pause, Instant::now());
            match attempt {
                Ok(answer) => return Ok(answer),
                Err(Refusal::Busy { reason, .. }) => {
                    tracing::debug!("{reason}");
                    if begun.elapsed() >= self.options.patience {
                        let seconds = self.options.patience.as_secs();
                        return Err(JobError::Unavailable(anyhow!("no server took a query for {seconds} s: {reason}")));
                    }
                }
                Err(Refusal::Failed(reason)) => {
                    failed += 1;
                    if failed == FAILED_ATTEMPTS {
                        return Err(JobError::Query(reason));
                    }
                }
                Err(Refusal::Rejected(reason)) => return Err(JobError::Query(reason)),
                Err(Refusal::Misconfigured(reason)) => return Err(JobError::Fatal(anyhow!(reason))),
            }
        }
    }

    fn pool(&self) -> MutexGuard<'_, ServerPool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which server gets the next request. No I/O and no clock: the time is an argument. Pauses have a random jitter.
#[derive(Debug)]
struct ServerPool {
    slots: Vec<ServerSlot>,
    /// The server to begin the search with, so that idle servers take turns.
    next: usize,
}

#[derive(Debug, Clone, Default)]
struct ServerSlot {
    in_flight: usize,
    /// Failures since the last success.
    failures: u32,
    paused_until: Option<Instant>,
}

impl ServerPool {
    fn new(servers: usize) -> Self {
        Self { slots: vec![ServerSlot::default(); servers], next: 0 }
    }

    /// The server with the fewest requests in flight, or how long all of them are paused.
    fn acquire(&mut self, now: Instant) -> Result<usize, Duration> {
        let count = self.slots.len();
        let is_free = |slot: &ServerSlot| slot.paused_until.is_none_or(|until| until <= now);
        let in_turn = (0..count).map(|i| (self.next + i) % count);
        let Some(best) = in_turn.filter(|&i| is_free(&self.slots[i])).min_by_key(|&i| self.slots[i].in_flight) else {
            let first = self.slots.iter().filter_map(|slot| slot.paused_until).min().unwrap_or(now);
            return Err(first.saturating_duration_since(now).max(Duration::from_millis(1)));
        };
        self.slots[best].in_flight += 1;
        self.next = (best + 1) % count;
        Ok(best)
    }

    /// Ends a request. `pause` is `None` if the server answered it. Otherwise the server is paused: `Some(Some(_))` is the
    /// `Retry-After` that it sent, the minimum of the pause up to [`MAX_RETRY_AFTER`].
    fn release(&mut self, server: usize, pause: Option<Option<Duration>>, now: Instant) {
        let slot = &mut self.slots[server];
        slot.in_flight -= 1;
        let Some(retry_after) = pause else {
            (slot.failures, slot.paused_until) = (0, None);
            return;
        };
        // Requests that were in flight together fail together and count once.
        if slot.paused_until.is_none_or(|until| until <= now) {
            slot.failures += 1;
        }
        let doubled = FIRST_PAUSE.saturating_mul(1 << (slot.failures - 1).min(10)).min(MAX_PAUSE);
        let jittered = doubled.mul_f64(1.0 - fastrand::f64() / 2.0);
        let until = now + jittered.max(retry_after.unwrap_or_default().min(MAX_RETRY_AFTER));
        slot.paused_until = slot.paused_until.max(Some(until));
    }
}

/// The URL of the rerank path. A base URL may end with `/v1`.
fn rerank_url(text: &str) -> Result<String> {
    let is_http = |uri: &Uri| matches!(uri.scheme_str(), Some("http" | "https")) && uri.host().is_some();
    let valid = text.parse::<Uri>().is_ok_and(|uri| is_http(&uri) && uri.query().is_none());
    ensure!(valid, "--server {text:?}: expected a URL such as http://host:8080");
    let base = text.trim_end_matches('/');
    Ok(if base.ends_with("/rerank") { base.to_owned() } else { format!("{}/v1/rerank", base.trim_end_matches("/v1")) })
}

#[derive(Deserialize)]
struct RemoteAnswer<'a> {
    #[serde(borrow)]
    results: Vec<RemoteResult<'a>>,
}

#[derive(Deserialize)]
struct RemoteResult<'a> {
    index: usize,
    /// Kept as text, because serde_json without `float_roundtrip` may read a number one unit in the last place (ULP) off.
    #[serde(borrow)]
    relevance_score: &'a RawValue,
}

#[derive(Deserialize)]
struct RemoteModels {
    data: Vec<RemoteModel>,
}

#[derive(Deserialize)]
struct RemoteModel {
    id: String,
}

#[derive(Deserialize)]
struct RemoteError {
    message: String,
}

impl ServerHttp {
    fn first_model(&self, server: usize) -> Result<String, Refusal> {
        let url = format!("{}/models", self.urls[server].trim_end_matches("/rerank"));
        let body = self.read(&url, self.authorized(self.agent.get(&url)).call())?;
        let models: Option<RemoteModels> = serde_json::from_slice(&body).ok();
        let first = models.and_then(|models| models.data.into_iter().next());
        let nothing = || Refusal::Misconfigured(format!("{url} lists no model; name one with --model"));
        first.map(|model| model.id).ok_or_else(nothing)
    }

    /// Sends a request with `documents` documents, and expects `results` results.
    fn rerank(&self, server: usize, body: &str, documents: usize, results: usize) -> Result<Vec<JobScore>, Refusal> {
        let url = &self.urls[server];
        let request = self.authorized(self.agent.post(url)).header(header::CONTENT_TYPE, "application/json");
        let body = self.read(url, request.send(body))?;
        let unexpected = || Refusal::Misconfigured(format!("{url} does not answer as a rerank API does"));
        let answer: RemoteAnswer<'_> = serde_json::from_slice(&body).map_err(|_| unexpected())?;
        let score = |result: &RemoteResult<'_>| {
            let score = result.relevance_score.get().parse::<f64>().ok().filter(|score| score.is_finite())?;
            (result.index < documents).then_some(JobScore { index: result.index, score })
        };
        let scores: Option<Vec<JobScore>> = answer.results.iter().map(score).collect();
        let scores = scores.filter(|scores| scores.len() == results && all_differ(scores, documents));
        scores.ok_or_else(unexpected)
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.key {
            Some(key) => request.header(header::AUTHORIZATION, format!("Bearer {}", key.reveal())),
            None => request,
        }
    }

    /// The body of a successful response.
    fn read(&self, url: &str, response: Result<Response<Body>, ureq::Error>) -> Result<Vec<u8>, Refusal> {
        let broken = |error: &ureq::Error| Refusal::Busy {
            reason: format!("{url}: {error}{}", tls::hint(error)),
            retry_after: None,
        };
        let mut response = response.map_err(|error| match &error {
            ureq::Error::BadUri(_) | ureq::Error::Http(_) | ureq::Error::InvalidProxyUrl => {
                Refusal::Misconfigured(format!("{url}: {error}"))
            }
            _ => broken(&error),
        })?;
        let retry_after = response.headers().get(header::RETRY_AFTER).and_then(|value| value.to_str().ok());
        let retry_after = retry_after.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
        let status = response.status().as_u16();
        let body = response.body_mut().with_config().limit(MAX_RESPONSE_BYTES).read_to_vec();
        let body = body.map_err(|error| broken(&error))?;
        if status == 200 {
            return Ok(body);
        }
        let message = serde_json::from_slice::<RemoteError>(&body)
            .map_or_else(|_| String::from_utf8_lossy(&body).chars().take(200).collect(), |error| error.message);
        let reason = format!("{url} answered {status}: {message}");
        Err(match status {
            408 | 425 | 429 | 502 | 503 => Refusal::Busy { reason, retry_after },
            400 | 413 | 415 | 422 => Refusal::Rejected(message),
            500.. => Refusal::Failed(reason),
            _ => Refusal::Misconfigured(reason),
        })
    }
}

/// Whether no document occurs twice.
fn all_differ(scores: &[JobScore], documents: usize) -> bool {
    let mut seen = vec![false; documents];
    scores.iter().all(|scored| !std::mem::replace(&mut seen[scored.index], true))
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn requests_go_to_the_server_with_the_fewest_in_flight() {
        let mut pool = ServerPool::new(3);
        let now = Instant::now();
        let first: Vec<usize> = (0..6).map(|_| pool.acquire(now).unwrap()).collect();
        assert_eq!(first, [0, 1, 2, 0, 1, 2]);
        pool.release(1, None, now);
        assert_eq!(pool.acquire(now), Ok(1));
    }

    #[test]
    fn a_busy_server_is_avoided_for_as_long_as_it_asks() {
        let mut pool = ServerPool::new(2);
        let now = Instant::now();
        assert_eq!(pool.acquire(now), Ok(0));
        pool.release(0, Some(Some(5 * S)), now);
        assert!((0..4).all(|_| pool.acquire(now + 4 * S) == Ok(1)));
        assert_eq!(pool.acquire(now + 5 * S), Ok(0));
    }

    #[test]
    fn pauses_double_once_per_failure_and_end_with_a_success() {
        let mut pool = ServerPool::new(1);
        let mut now = Instant::now();
        for _ in 0..3 {
            assert!((0..3).all(|_| pool.acquire(now).is_ok()));
            (0..3).for_each(|_| pool.release(0, Some(None), now));
            now += 100 * S;
        }
        assert_eq!(pool.slots[0].failures, 3, "requests in flight together count once");
        pool.acquire(now).unwrap();
        pool.release(0, Some(None), now);
        let wait = pool.acquire(now).unwrap_err();
        assert!((S..=2 * S).contains(&wait), "{wait:?}");
        now += 2 * S;
        pool.acquire(now).unwrap();
        pool.release(0, None, now);
        assert!(pool.slots[0].failures == 0 && pool.acquire(now).is_ok());
    }

    #[test]
    fn server_urls_are_bases_or_rerank_paths() {
        for (url, expected) in [
            ("http://a:8080", "http://a:8080/v1/rerank"),
            ("http://a:8080/", "http://a:8080/v1/rerank"),
            ("https://a/v1", "https://a/v1/rerank"),
            ("http://a/gateway/v2/rerank", "http://a/gateway/v2/rerank"),
        ] {
            assert_eq!(rerank_url(url).unwrap(), expected);
        }
        for wrong in ["a:8080", "ftp://a", "", "http://a?x=1"] {
            assert!(rerank_url(wrong).unwrap_err().to_string().contains("--server"), "{wrong}");
        }
    }
}
