//! The errors of one request. A message is meant for the client; `api/error.rs` maps errors to HTTP statuses.

/// Why a request could not be answered with a ranking.
#[derive(Debug, thiserror::Error)]
pub enum RerankError {
    /// No served model has this name or alias. The message begins with the sentence of SiliconFlow's API.
    #[error(
        "Model does not exist. Please check it carefully. The request asked for {model:?}; this server has {served}."
    )]
    UnknownModel {
        /// The name in the request, shortened.
        model: String,
        /// Names of the served models.
        served: String,
    },
    /// A field of the request is not valid.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field's name, with an index in a list: `documents[7]`.
        field: String,
        /// What is wrong with the value, and what is expected.
        problem: String,
    },
    /// The request exceeds the token limit of one request (`--max-request-tokens`), or of its key in a minute.
    #[error(
        "the request asks for {tokens} tokens of work over all its chunks, the limit is {limit}; \
         send fewer or shorter documents, or lower max_chunks_per_doc"
    )]
    TooMuchWork {
        /// Tokens of the request's pairs. Counting stops soon after the limit.
        tokens: usize,
        /// The limit, in tokens.
        limit: usize,
    },
    /// The queue, or another limited resource, is full.
    #[error("Model service overloaded. Please try again later.")]
    Overloaded {
        /// The limit that was reached.
        bottleneck: Bottleneck,
        /// Seconds until the queue is expected to have room.
        retry_after_s: u64,
    },
    /// The client has used up a rate limit of its key.
    #[error("the rate limit of this key, {limit} {unit} per minute, is used up; try again in {retry_after_s} s")]
    RateLimited {
        /// Units per minute.
        limit: u32,
        /// `requests` or `tokens`.
        unit: &'static str,
        /// Seconds until the same request is allowed.
        retry_after_s: u64,
    },
    /// The request's own computation would take longer than its deadline allows.
    #[error(
        "the request would take about {needed_s} s to compute, the deadline is {patience_s} s; send fewer or shorter documents, or \
         lower max_chunks_per_doc"
    )]
    CannotFinish {
        /// Estimated seconds of computation, at the measured speed.
        needed_s: u64,
        /// Seconds until the deadline.
        patience_s: u64,
    },
    /// The deadline passed before the scores were computed.
    #[error(
        "the deadline of {seconds} s passed before the request was computed; send fewer documents or try again when the server is less busy"
    )]
    Deadline {
        /// Seconds from the complete body to the deadline.
        seconds: u64,
    },
    /// The device's memory does not suffice for one of the request's pairs, even in a batch alone.
    #[error("the device's memory is exhausted; send shorter documents, or try again later")]
    OutOfMemory,
    /// The server is still loading its models.
    #[error("the server is loading its models; try again in a moment")]
    Loading,
    /// The server drains and accepts no new requests.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The model returned NaN or infinity: the weights are damaged, or the precision (`--dtype`) overflows.
    #[error("the model's score is not a finite number (non_finite_score)")]
    NonFiniteScore,
    /// An internal error. The cause is logged with the request id and not sent to the client.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

/// The limit for which a request was refused with [`RerankError::Overloaded`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bottleneck {
    /// `--max-queue-tokens`.
    QueueTokens,
    /// `--max-queue-wait`, at the measured speed.
    QueueWait,
    /// The queue could not be computed before the request's deadline.
    Deadline,
    /// The texts that wait for the tokenizer.
    Tokenizer,
    /// `--max-inflight-bytes`.
    Memory,
    /// `--max-connections`.
    Connections,
}

impl Bottleneck {
    /// The name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::QueueTokens => "queue_tokens",
            Self::QueueWait => "queue_wait",
            Self::Deadline => "deadline",
            Self::Tokenizer => "tokenizer",
            Self::Memory => "memory",
            Self::Connections => "connections",
        }
    }
}

impl RerankError {
    /// The cause of the error in metrics.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::UnknownModel { .. } => "unknown_model",
            Self::Invalid { .. } => "invalid",
            Self::TooMuchWork { .. } => "too_much_work",
            Self::Overloaded { bottleneck, .. } => bottleneck.name(),
            Self::RateLimited { unit: "tokens", .. } => "token_rate",
            Self::RateLimited { .. } => "request_rate",
            Self::CannotFinish { .. } => "deadline",
            Self::Deadline { .. } => "timeout",
            Self::OutOfMemory => "device_memory",
            Self::Loading => "loading",
            Self::ShuttingDown => "shutting_down",
            Self::NonFiniteScore => "non_finite_score",
            Self::Internal(_) => "internal",
        }
    }

    /// Creates [`RerankError::Invalid`].
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }
}
