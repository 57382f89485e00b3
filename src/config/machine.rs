//! What this machine offers, as far as settings depend on it.

use crate::backend::cpu::CpuBackend;

/// RequestStats about the machine. Tests make their own.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// Processors that this process may use: affinity masks and cgroup quotas count.
    pub processors: usize,
    /// Whether the CPU has bf16 dot-product instructions.
    pub has_bf16: bool,
    /// Looks for a CUDA device. Called for `--device auto` only, because it opens the driver library.
    pub find_cuda: fn() -> CudaAvailability,
}

/// Whether `--device auto` can use CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaAvailability {
    /// There is a GPU, and its driver and libraries work.
    Usable,
    /// There is a GPU, but it cannot be used; the reason.
    Unusable(String),
    /// There is no GPU.
    Absent,
}

impl Machine {
    /// The machine that this process runs on.
    pub fn detect() -> Self {
        Self {
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            has_bf16: CpuBackend::has_bf16(),
            find_cuda,
        }
    }
}

#[cfg(feature = "cuda")]
fn find_cuda() -> CudaAvailability {
    match crate::backend::cuda::find_device() {
        None => CudaAvailability::Absent,
        Some(Ok(())) => CudaAvailability::Usable,
        Some(Err(reason)) => CudaAvailability::Unusable(format!("{reason:#}")),
    }
}

#[cfg(not(feature = "cuda"))]
fn find_cuda() -> CudaAvailability {
    CudaAvailability::Absent
}
