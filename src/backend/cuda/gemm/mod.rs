//! GEMMs on CUDA: by cuBLASLt, or by a custom wgmma kernel where that was measured to be faster.

pub(in crate::backend::cuda) mod cublaslt;
pub(in crate::backend::cuda) mod tuning_store;
pub(in crate::backend::cuda) mod wgmma;
