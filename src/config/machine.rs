//! What settings depend on: the processors, the GPU and the user's cache folder.

use std::path::PathBuf;

use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

use crate::backend::cpu::roofline::MultiplyRates;
use crate::backend::gpus::{CudaSurvey, GpuMemory};

/// What this process found on its machine and in its environment. Tests construct their own.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Number of processors that this process may use, as limited by its affinity mask and cgroup quota.
    pub processors: usize,
    /// Measures the CPU's rates of multiplications. Called for `--dtype auto` only.
    pub multiply_rates: fn() -> MultiplyRates,
    /// Looks for a CUDA device. Called for `--device auto` only, because it opens the driver library.
    pub find_cuda: fn() -> CudaAvailability,
    /// The user's cache folder (XDG Base Directory Specification), if the environment names one.
    pub user_cache: Option<PathBuf>,
}

/// Whether `--device auto` can use CUDA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CudaAvailability {
    /// There is a GPU, and its driver and libraries work.
    Usable,
    /// There is a GPU, but it cannot be used, for this reason.
    Unusable(String),
    /// There is no GPU.
    Absent,
}

impl Machine {
    /// Describes the machine that this process runs on.
    pub fn detect() -> Self {
        let folder = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        Self {
            processors: std::thread::available_parallelism().map_or(1, Into::into),
            multiply_rates: MultiplyRates::measured,
            find_cuda,
            user_cache: folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache"))),
        }
    }
}

/// The host's memory in bytes, as the operating system reports it.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostMemory {
    pub total: u64,
    /// Memory that this process or a new one could use, as far as known.
    pub free: Option<u64>,
    /// The memory limit of the container (cgroup), if there is one.
    pub limit: Option<u64>,
}

impl HostMemory {
    pub fn detect() -> Self {
        let kinds = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
        let Ok(mut system) = System::new_with_specifics(kinds) else { return Self::default() };
        let limits = sysinfo::get_current_pid().ok().and_then(|pid| {
            let wanted = ProcessesToUpdate::Some(&[pid]);
            system.refresh_processes_specifics(wanted, false, ProcessRefreshKind::nothing());
            system.process(pid)?.cgroup_limits()
        });
        // The page cache counts as usage of a cgroup, but the kernel frees it when memory is short. It cannot free `rss`.
        let within_limit = limits.as_ref().map(|limits| limits.total_memory.saturating_sub(limits.rss));
        let available = Some(system.available_memory()).filter(|&bytes| bytes > 0);
        Self {
            total: system.total_memory(),
            free: [available, within_limit].into_iter().flatten().min(),
            limit: limits.map(|limits| limits.total_memory),
        }
    }
}

/// Describes the GPUs and CUDA's libraries; `None` in a build without CUDA.
#[cfg(feature = "cuda")]
pub fn survey_cuda() -> Option<CudaSurvey> {
    Some(crate::backend::cuda::survey())
}

/// Describes the GPUs and CUDA's libraries; `None` in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn survey_cuda() -> Option<CudaSurvey> {
    None
}

/// The memory of GPU `ordinal`, which a model must be using already; `None` if the driver does not tell it.
#[cfg(feature = "cuda")]
pub fn gpu_memory(ordinal: usize) -> Option<GpuMemory> {
    crate::backend::cuda::memory_in_use(ordinal)
}

/// `None` in a build without CUDA.
#[cfg(not(feature = "cuda"))]
pub fn gpu_memory(_: usize) -> Option<GpuMemory> {
    None
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
