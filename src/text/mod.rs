//! Text to pairs of token ids: tokenization, chunks with overlap, the model's pair template.
//!
//! Special tokens that occur in a text are kept: a document that contains `</s>` gets that special id, as with other servers of
//! these models.

mod chunk;
mod encoder;
mod slice;
mod template;

pub use chunk::{Chunking, Tail};
pub use encoder::{
    DEFAULT_MAX_CHUNKS, DocumentOptions, EncodedRequest, MAX_OVERLAP_TOKENS, TextEncoder, TextLimits, Truncation,
};
pub use template::EmbeddingRows;
