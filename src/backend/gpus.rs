//! What is known about the GPUs of a machine, and about CUDA's libraries.

/// The driver, CUDA's libraries and the GPUs. Versions are text such as `13.0`; `None` if the library is not found.
#[derive(Debug, Clone, Default)]
pub struct CudaSurvey {
    /// The CUDA version that the driver supports.
    pub driver: Option<String>,
    pub nvrtc: Option<String>,
    pub cublaslt: Option<String>,
    /// In the order of their ordinals.
    pub gpus: Vec<Gpu>,
    /// The reason, if there is a driver that reports no GPU.
    pub no_gpu: Option<String>,
}

/// A GPU that the driver reports.
#[derive(Debug, Clone)]
pub struct Gpu {
    pub name: String,
    /// Major and minor.
    pub compute_capability: (i32, i32),
    /// Size of its memory in bytes.
    pub memory: u64,
    /// Why the backend cannot use it, and what to do.
    pub problem: Option<String>,
}

/// The memory of a GPU, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpuMemory {
    /// In use by all processes.
    pub used: u64,
    pub total: u64,
}
