//! A dialect is the JSON format of one API. Each has a file here, which parses a body into a `RerankRequest` and writes a `Ranking`
//! as a response.
//!
//! Every rerank path accepts every dialect. The name of the list of documents (`documents`, `texts`, `input`, `passages`,
//! `text_2`) tells which dialect a body has.

pub(super) mod documents;
mod fields;
pub(super) mod input;
mod parsed;
pub(super) mod passages;
pub(super) mod text_pairs;
pub(super) mod texts;
pub(super) mod weaviate;

use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde::de::IgnoredAny;

pub(super) use parsed::ParsedRequest;

use super::error::ApiError;
use crate::error::RerankError;
use crate::rerank::RerankRequest;

/// Parses and validates the body of a request to a rerank path, in any dialect. If it has several queries, returns the first. For
/// fuzzing and the tests of other crates; the server's handler uses the same functions.
///
/// # Errors
/// [`RerankError::Invalid`] with the field's name.
#[doc(hidden)]
pub fn parse_request(body: &[u8], max_documents: usize) -> Result<RerankRequest, RerankError> {
    Dialect::parse_body(body, max_documents).1.map(|mut parsed| parsed.requests.swap_remove(0))
}

/// A dialect, named after its list of documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    /// SiliconFlow, Cohere, Jina, Voyage and most others.
    Documents,
    /// text-embeddings-inference.
    Texts,
    /// Mixedbread.
    Input,
    /// NVIDIA NIM.
    Passages,
    /// vLLM's score API.
    TextPairs,
    /// Weaviate: `documents` and `property`.
    Weaviate,
}

impl Dialect {
    /// The dialect of a body, with or without a UTF-8 byte order mark, and the body parsed in this dialect.
    pub(super) fn parse_body(body: &[u8], max_documents: usize) -> (Self, Result<ParsedRequest, RerankError>) {
        let json = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
        let dialect = Self::of(json);
        (dialect, dialect.parse(json, max_documents))
    }

    /// The dialect of a body. A body that is not valid JSON counts as [`Dialect::Documents`], whose parser reports the error.
    fn of(body: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Lists {
            documents: Option<IgnoredAny>,
            texts: Option<IgnoredAny>,
            input: Option<IgnoredAny>,
            passages: Option<IgnoredAny>,
            text_2: Option<IgnoredAny>,
            property: Option<IgnoredAny>,
            model: Option<IgnoredAny>,
        }
        match serde_json::from_slice(body) {
            Ok(Lists { documents: Some(_), property: Some(_), model: None, .. }) => Self::Weaviate,
            Ok(Lists { documents: None, texts: Some(_), .. }) => Self::Texts,
            Ok(Lists { documents: None, input: Some(_), .. }) => Self::Input,
            Ok(Lists { documents: None, passages: Some(_), .. }) => Self::Passages,
            Ok(Lists { documents: None, text_2: Some(_), .. }) => Self::TextPairs,
            _ => Self::Documents,
        }
    }

    /// Parses and validates a body.
    ///
    /// # Errors
    /// [`RerankError::Invalid`] with the field's name.
    fn parse(self, body: &[u8], max_documents: usize) -> Result<ParsedRequest, RerankError> {
        match self {
            Self::Documents => documents::parse(body, max_documents),
            Self::Texts => texts::parse(body, max_documents),
            Self::Input => input::parse(body, max_documents),
            Self::Passages => passages::parse(body, max_documents),
            Self::TextPairs => text_pairs::parse(body, max_documents),
            Self::Weaviate => weaviate::parse(body, max_documents),
        }
    }

    /// The error response that the dialect's clients expect.
    pub(super) fn error(self, error: ApiError) -> Response {
        match self {
            Self::Texts | Self::Weaviate => error.with_text().into_response(),
            Self::Documents | Self::Input | Self::Passages | Self::TextPairs => error.into_response(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dialects_are_told_apart_by_the_name_of_the_list() {
        for (body, dialect) in [
            (r#"{"model":"m","query":"q","documents":["a"]}"#, Dialect::Documents),
            (r#"{"query":"q","texts":["a"],"raw_scores":false}"#, Dialect::Texts),
            (r#"{"query":"q","texts":["a"],"documents":["a"]}"#, Dialect::Documents),
            (r#"{"model":"m","query":"q","input":["a"],"top_k":3}"#, Dialect::Input),
            (r#"{"model":"m","query":{"text":"q"},"passages":[{"text":"a"}]}"#, Dialect::Passages),
            (r#"{"query":"q","documents":["a"],"property":""}"#, Dialect::Weaviate),
            (r#"{"model":"m","query":"q","documents":["a"],"property":""}"#, Dialect::Documents),
            (r#"{"model":"m","text_1":"q","text_2":["a"]}"#, Dialect::TextPairs),
            (r#"{"query":"q"}"#, Dialect::Documents),
            ("[]", Dialect::Documents),
            ("{", Dialect::Documents),
        ] {
            assert_eq!(Dialect::of(body.as_bytes()), dialect, "{body}");
        }
    }
}
