//! Text to pairs of token ids: tokenization, overlapping chunks, the model's pair template.
//!
//! Special tokens in a text are not escaped: a document that contains `</s>` gets the id of that special token, as in other
//! servers of these models.

mod chunk;
mod encoder;
mod slice;
mod template;

pub use chunk::{Chunking, Tail};
pub use encoder::{
    Chunk, DEFAULT_MAX_CHUNKS, DocumentOptions, EncodedRequest, MAX_OVERLAP_TOKENS, TextEncoder, TextLimits, Truncation,
};
pub use template::EmbeddingRows;
