//! One file per wire shape: bytes -> [`crate::rerank::RerankRequest`], [`crate::rerank::Ranking`] -> bytes.

pub(super) mod documents;
mod fields;
