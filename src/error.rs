//! What can go wrong with one request. Each carries the facts its message needs; `api/error.rs` alone knows HTTP.

/// Why a request has no ranking.
#[derive(Debug, thiserror::Error)]
pub enum RerankError {
    /// No served model has this name or alias.
    #[error(
        "Model does not exist. Please check it carefully. The request asked for {model:?}; this server has {served}."
    )]
    UnknownModel {
        /// As the request gave it, shortened.
        model: String,
        /// Names of the served models.
        served: String,
    },
    /// A field has a value that cannot be used.
    #[error("{field}: {problem}")]
    Invalid {
        /// The field, with its index where it has one: `documents[7]`.
        field: String,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// The request asks for more tokens than one request may.
    #[error(
        "the request asks for {tokens} tokens of work over all its chunks, the limit is {limit}; \
         send fewer or shorter documents, or lower max_chunks_per_doc"
    )]
    TooMuchWork {
        /// Tokens of all its pairs, or of those counted when the limit was passed.
        tokens: usize,
        /// The limit of one request.
        limit: usize,
    },
    /// More work is waiting than may wait.
    #[error("Model service overloaded. Please try again later.")]
    Overloaded {
        /// When the queue is expected to have room.
        retry_after_s: u64,
    },
    /// The work alone takes longer than the deadline allows.
    #[error(
        "the request would take about {needed_s} s to compute, the deadline is {patience_s} s; send fewer or shorter documents, or \
         lower max_chunks_per_doc"
    )]
    CannotFinish {
        /// Seconds of computing, at the measured speed.
        needed_s: u64,
        /// Seconds until the deadline.
        patience_s: u64,
    },
    /// The deadline passed before the scores were there.
    #[error(
        "the deadline of {seconds} s passed before the request was computed; send fewer documents or try again when the server is less busy"
    )]
    Deadline {
        /// The deadline, counted from the request's arrival.
        seconds: u64,
    },
    /// The device has no memory for one of the request's pairs alone.
    #[error("the device's memory is exhausted; send shorter documents, or try again later")]
    OutOfMemory,
    /// Models are being loaded.
    #[error("the server is loading its models; try again in a moment")]
    Loading,
    /// The server is on its way down.
    #[error("the server is shutting down")]
    ShuttingDown,
    /// The model gave a NaN or an infinity: wrong weights, or a number format that overflows.
    #[error("the model's score is not a finite number (non_finite_score)")]
    NonFiniteScore,
    /// A fault of ours. The cause goes to the log, with the request's id.
    #[error("internal error")]
    Internal(#[source] anyhow::Error),
}

impl RerankError {
    /// A field has a value that cannot be used.
    pub fn invalid(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), problem: problem.into() }
    }
}
