//! GEMMs on CUDA: by cuBLASLt, or by a custom wgmma kernel for shapes where autotuning measured it to be faster.

pub(super) mod autotune;
pub(super) mod cublaslt;
pub(super) mod tuning_store;
pub(super) mod wgmma;

/// What is applied to a GEMM's result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum GemmEpilogue {
    Bias,
    /// Bias, then erf GELU. cuBLASLt has only tanh GELU, so after cuBLASLt a separate kernel applies it.
    BiasGelu,
    BiasGeluTanh,
    BiasRelu,
    /// Bias plus a residual, which may be the output buffer itself.
    BiasResidual,
}

/// The shape of `x W^T`: x is `[rows, inputs]`, W `[outputs, inputs]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct GemmShape {
    pub(super) rows: usize,
    pub(super) outputs: usize,
    pub(super) inputs: usize,
    pub(super) epilogue: GemmEpilogue,
}

/// Device addresses of a GEMM's operands.
#[derive(Debug, Clone, Copy)]
pub(super) struct GemmOperands {
    pub(super) x: u64,
    pub(super) weight: u64,
    pub(super) bias: u64,
    /// Read only with [`GemmEpilogue::BiasResidual`].
    pub(super) residual: u64,
    pub(super) output: u64,
    /// Factor of `x W^T`, applied before the bias: the inverse of the product of both operands' scales.
    pub(super) alpha: f32,
}
