//! Finds the GPUs and CUDA's libraries without creating a CUDA context, for `rerankd doctor`.

use cudarc::driver::{CudaContext, result::device, sys};
use cudarc::nvrtc::sys as nvrtc_sys;
use cudarc::{cublaslt, driver};

use super::compile::nvrtc_version;
use super::device::{capability, check, driver_version};
use crate::backend::gpus::{CudaSurvey, Gpu, GpuMemory};

/// Asks the driver and the libraries. Creates no context, but the driver's initialization may take a second.
pub fn survey() -> CudaSurvey {
    // SAFETY: each call opens a library and closes it again.
    let (driver, nvrtc, cublaslt) =
        unsafe { (sys::is_culib_present(), nvrtc_sys::is_culib_present(), cublaslt::sys::is_culib_present()) };
    let text = |major: i32, minor: i32| format!("{major}.{minor}");
    let mut survey = CudaSurvey {
        driver: driver.then(|| driver_version().map_or("?".to_owned(), |v| text(v / 1000, v % 1000 / 10))),
        nvrtc: nvrtc.then(|| nvrtc_version().map_or("?".to_owned(), |(major, minor)| text(major, minor))),
        cublaslt: cublaslt.then(|| {
            // SAFETY: the library is there, and the function has no arguments.
            let version = unsafe { cublaslt::sys::cublasLtGetVersion() } as i32;
            text(version / 10_000, version % 10_000 / 100)
        }),
        ..CudaSurvey::default()
    };
    if !driver {
        return survey;
    }
    match CudaContext::device_count() {
        Ok(count) if count > 0 => survey.gpus = (0..count as usize).map(gpu).collect(),
        Ok(_) => survey.no_gpu = Some("the driver reports no GPU (CUDA_VISIBLE_DEVICES may hide some)".to_owned()),
        Err(error) => survey.no_gpu = Some(format!("the CUDA driver does not start: {error}")),
    }
    survey
}

fn gpu(ordinal: usize) -> Gpu {
    let (name, major, minor) = capability(ordinal).unwrap_or_else(|error| (format!("unknown ({error})"), 0, 0));
    Gpu {
        name,
        compute_capability: (major, minor),
        memory: memory(ordinal).unwrap_or(0),
        problem: check(ordinal).err().map(|reason| format!("{reason:#}")),
    }
}

/// The memory of GPU `ordinal` that all processes use. Shares the primary context of the models; without one it creates it.
pub fn memory_in_use(ordinal: usize) -> Option<GpuMemory> {
    let context = CudaContext::new(ordinal).ok()?;
    context.bind_to_thread().ok()?;
    let (free, total) = driver::result::mem_get_info().ok()?;
    Some(GpuMemory { used: total.saturating_sub(free) as u64, total: total as u64 })
}

fn memory(ordinal: usize) -> Result<u64, driver::DriverError> {
    let device = device::get(ordinal as i32)?;
    // SAFETY: `device` comes from the driver.
    unsafe { device::total_mem(device) }.map(|bytes| bytes as u64)
}
