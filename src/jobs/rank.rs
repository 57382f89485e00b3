//! Ranking one query of a run: in this process, or by servers.

use std::sync::Arc;

use super::job::{JobError, JobScore, RankJob, ResultFormat};
use super::remote::Servers;
use crate::error::RerankError;
use crate::rerank::{Ranked, RerankRequest, rerank};
use crate::served::Models;
use crate::text::DocumentOptions;

/// Ranks queries.
pub(crate) enum JobRanker {
    /// With the first of these models.
    Local {
        models: Models,
        overlap_tokens: usize,
        top_n: Option<usize>,
        format: ResultFormat,
    },
    Remote(Servers),
}

impl JobRanker {
    /// Ranks a query's documents, best first. Without documents, the ranking is empty.
    ///
    /// # Errors
    /// See [`JobError`].
    pub(crate) async fn rank(&self, job: &RankJob) -> Result<Vec<JobScore>, JobError> {
        if job.texts.is_empty() {
            return Ok(Vec::new());
        }
        let (models, request, format) = match self {
            Self::Remote(servers) => return servers.rank(job).await,
            Self::Local { models, overlap_tokens, top_n, format } => {
                let options = DocumentOptions { overlap_tokens: *overlap_tokens, ..DocumentOptions::default() };
                let request = RerankRequest {
                    top_n: *top_n,
                    options,
                    ..RerankRequest::new(job.query.clone(), Arc::clone(&job.texts))
                };
                (models, request, *format)
            }
        };
        let ranking = rerank(models, request).await.map_err(JobError::from)?;
        let score = |ranked: &Ranked| match format {
            ResultFormat::Jsonl => ranked.score,
            ResultFormat::Trec => f64::from(ranked.logit),
        };
        Ok(ranking.results.iter().map(|ranked| JobScore { index: ranked.index, score: score(ranked) }).collect())
    }
}

impl From<RerankError> for JobError {
    fn from(error: RerankError) -> Self {
        match error {
            RerankError::Invalid { .. }
            | RerankError::TooMuchWork { .. }
            | RerankError::OutOfMemory
            | RerankError::NonFiniteScore => Self::Query(error.to_string()),
            RerankError::Internal(cause) => Self::Fatal(cause.context("internal error")),
            other => Self::Fatal(other.into()),
        }
    }
}
