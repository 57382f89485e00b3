//! How good is a ranking? Topics with known relevant documents, the field's measures, and BM25 to compare with.

pub mod bm25;
pub mod measures;
pub mod topics;

pub use measures::Measures;
pub use topics::{Topic, TopicOptions};
