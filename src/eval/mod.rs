//! Ranking quality: data sets with relevance judgments, measures (nDCG, MRR, recall), and BM25 as the baseline.

pub mod bm25;
pub mod measures;
pub mod topics;

pub use measures::Measures;
pub use topics::{Topic, TopicOptions};
