//! One file per wire shape: bytes -> [`RerankRequest`], [`Ranking`] -> bytes.
//!
//! Every rerank path takes every shape: which one a body has shows in the name of its list of documents.

pub(super) mod documents;
mod fields;
pub(super) mod input;
pub(super) mod passages;
pub(super) mod texts;

use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;

use super::ApiError;
use crate::error::RerankError;
use crate::rerank::{Ranking, RerankRequest};

/// A checked request, and how its answer is written.
pub(super) struct ParsedRequest {
    pub(super) request: RerankRequest,
    pub(super) write: Write,
}

/// Writes an answer from the ranking and the request's id.
pub(super) type Write = Box<dyn FnOnce(&Ranking, String) -> Response + Send>;

/// A wire shape, called by the name of its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// The vendor's own, Cohere, Jina, Voyage and most others.
    Documents,
    /// text-embeddings-inference.
    Texts,
    /// Mixedbread.
    Input,
    /// NVIDIA NIM.
    Passages,
}

impl Dialect {
    /// The shape of a body. What is no JSON object is left to the first shape to refuse.
    pub(super) fn of(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Lists {
            documents: Option<IgnoredAny>,
            texts: Option<IgnoredAny>,
            input: Option<IgnoredAny>,
            passages: Option<IgnoredAny>,
        }
        match serde_json::from_slice(body) {
            Ok(Lists { documents: None, texts: Some(_), .. }) => Self::Texts,
            Ok(Lists { documents: None, input: Some(_), .. }) => Self::Input,
            Ok(Lists { documents: None, passages: Some(_), .. }) => Self::Passages,
            _ => Self::Documents,
        }
    }

    /// Reads and checks a body.
    ///
    /// # Errors
    /// [`RerankError::Invalid`], naming the field.
    pub(super) fn parse(self, body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
        match self {
            Self::Documents => documents::parse(body, max_documents),
            Self::Texts => texts::parse(body, max_documents),
            Self::Input => input::parse(body, max_documents),
            Self::Passages => passages::parse(body, max_documents),
        }
    }

    /// An error, in the shape that the dialect's clients read.
    pub(super) fn error(self, error: ApiError) -> Response {
        match self {
            Self::Texts => texts::error(error),
            Self::Documents | Self::Input | Self::Passages => error.into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_apart_by_the_name_of_the_list() {
        for (body, dialect) in [
            (r#"{"model":"m","query":"q","documents":["a"]}"#, Dialect::Documents),
            (r#"{"query":"q","texts":["a"],"raw_scores":false}"#, Dialect::Texts),
            (r#"{"query":"q","texts":["a"],"documents":["a"]}"#, Dialect::Documents),
            (r#"{"model":"m","query":"q","input":["a"],"top_k":3}"#, Dialect::Input),
            (r#"{"model":"m","query":{"text":"q"},"passages":[{"text":"a"}]}"#, Dialect::Passages),
            (r#"{"query":"q"}"#, Dialect::Documents),
            ("[]", Dialect::Documents),
            ("{", Dialect::Documents),
        ] {
            assert_eq!(Dialect::of(body.as_bytes()), dialect, "{body}");
        }
    }
}
