//! How to use a GPU: everything that settings decide.

use std::path::PathBuf;

use super::dtype::CudaDtype;

/// Settings of a CUDA backend.
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// Precision of activations and of the encoder's GEMMs.
    pub dtype: CudaDtype,
    /// Tokens of the largest batch: memory is reserved for it.
    pub max_batch_tokens: usize,
    /// Bitwise the same score in any batch, at some cost in speed.
    pub batch_invariant: bool,
    /// Which GEMM kernels may run.
    pub gemm: GemmChoice,
    /// Never use the wgmma attention kernel.
    pub mma_attention_only: bool,
    /// Folder for compiled kernels and tuning results; without one, every start compiles and tunes again.
    pub cache: Option<PathBuf>,
}

/// Which GEMM kernels may run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GemmChoice {
    /// For each shape the one that autotuning measured to be faster.
    Fastest,
    /// cuBLASLt only.
    CublasLt,
    /// The custom wgmma kernel wherever it applies.
    Custom,
}

impl GemmChoice {
    /// Part of the name of the file of tuning results, which hold for this choice only.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Fastest => "fastest",
            Self::CublasLt => "cublaslt",
            Self::Custom => "custom",
        }
    }
}
