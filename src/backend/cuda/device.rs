//! Opens a GPU: checks the driver, its libraries and the device, and loads the compiled kernels.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule};
use cudarc::nvrtc::sys as nvrtc_sys;
use cudarc::{cublaslt, driver};

use super::cache::Cache;
use super::compile::{compile_cached, nvrtc_version};
use super::dtype::CudaDtype;
use crate::backend::AttentionShape;

/// The oldest supported driver version: CUDA 12.0.
const MIN_DRIVER_VERSION: i32 = 12_000;

/// A CUDA context on a GPU, with the kernels loaded.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) name: String,
    /// Number of streaming multiprocessors; it limits the grids of strided kernels.
    pub(super) multiprocessors: u32,
    pub(super) kernels: Kernels,
    /// Identifies the compiled kernels: sources, shape, dtype and compiler version.
    pub(super) kernels_key: String,
    pub(super) cache: Cache,
}

/// The kernels, by their names in the CUDA sources.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed_norm: CudaFunction,
    pub(super) layer_norm: CudaFunction,
    pub(super) attention: CudaFunction,
    /// Attention within a window.
    pub(super) attention_local: CudaFunction,
    /// Only on Hopper, with f16 or bf16 activations and a head size of 64.
    pub(super) attention_wgmma: Option<CudaFunction>,
    /// Only on Hopper, with f16 or bf16 GEMMs.
    pub(super) gemm_wgmma: Option<CudaFunction>,
    pub(super) cls_attention: CudaFunction,
    pub(super) gather_cls: CudaFunction,
    pub(super) activate: CudaFunction,
    pub(super) gate: CudaFunction,
    pub(super) rotate: CudaFunction,
    pub(super) mean_rows: CudaFunction,
    /// Only with `--dtype fp8`.
    pub(super) quantize: Option<CudaFunction>,
    pub(super) to_f32: CudaFunction,
    pub(super) head_dense: CudaFunction,
    pub(super) head_norm: CudaFunction,
    pub(super) head_out: CudaFunction,
}

/// Checks the first CUDA device: `None` without a driver or device, an error if it cannot be used.
pub fn find_device() -> Option<Result<()>> {
    // SAFETY: opens the library and closes it again.
    let driver = unsafe { driver::sys::is_culib_present() };
    if !driver || CudaContext::device_count().unwrap_or(0) < 1 {
        return None;
    }
    Some(check(0).map(|_version| ()))
}

impl Device {
    /// The device's name with only letters, digits and hyphens, for names of cache files.
    pub(super) fn file_name(&self) -> String {
        self.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect()
    }

    /// Opens GPU `ordinal` with the kernels for models of this shape.
    ///
    /// # Errors
    /// No driver, no such device, a compute capability below 8.0, a missing library, or an NVRTC too old for the device.
    pub(super) fn open(ordinal: usize, dtype: CudaDtype, shape: AttentionShape, cache: Cache) -> Result<Self> {
        let version = check(ordinal)?;
        let context = CudaContext::new(ordinal).with_context(|| format!("device cuda:{ordinal} cannot be used"))?;
        // SAFETY: slices move between streams only after a synchronization, so cudarc need not track them with events.
        unsafe { context.disable_event_tracking() };
        if version >= 12_010 {
            // Threads that wait for a batch sleep instead of spinning; the CPU is needed for tokenization. The driver function
            // exists since CUDA 12.1, and cudarc panics without it.
            context.set_blocking_synchronize().ok();
        }
        let name = context.name()?;
        let (major, minor) = context.compute_capability()?;
        ensure!(
            dtype != CudaDtype::Fp8 || (major, minor) >= (8, 9),
            "{name} has compute capability {major}.{minor}, which has no fp8 tensor cores; --dtype fp8 needs 8.9 (L4, RTX 40) \
             or later. Use --dtype f16"
        );
        let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let hopper = (major, minor) == (9, 0);
        let architecture = if hopper { "sm_90a".to_owned() } else { format!("sm_{major}{minor}") };
        let compiled = compile_cached(&architecture, dtype, shape, &cache)?;
        let module = context
            .load_module(cudarc::nvrtc::Ptx::from_binary(compiled.cubin))
            .context("the driver rejects the compiled kernels; it may be older than the CUDA libraries")?;
        let kernels = Kernels::of(&module, dtype, shape, hopper)?;
        Ok(Self { kernels, kernels_key: compiled.key, context, name, multiprocessors, cache })
    }
}

impl Kernels {
    fn of(module: &Arc<CudaModule>, dtype: CudaDtype, shape: AttentionShape, hopper: bool) -> Result<Self> {
        let function =
            |name: &str| module.load_function(name).with_context(|| format!("cannot load the kernel {name}"));
        let attention_wgmma = hopper && dtype != CudaDtype::F32 && shape.head_size == 64;
        let gemm_wgmma = hopper && matches!(dtype, CudaDtype::F16 | CudaDtype::Bf16);
        Ok(Self {
            embed_norm: function("embed_norm")?,
            layer_norm: function("layer_norm")?,
            attention: function("attention")?,
            attention_local: function("attention_local")?,
            attention_wgmma: attention_wgmma.then(|| function("attention_wgmma")).transpose()?,
            gemm_wgmma: gemm_wgmma.then(|| function("gemm_wgmma")).transpose()?,
            cls_attention: function("cls_attention")?,
            gather_cls: function("gather_cls")?,
            activate: function("activate")?,
            gate: function("gate")?,
            rotate: function("rotate")?,
            mean_rows: function("mean_rows")?,
            quantize: (dtype == CudaDtype::Fp8).then(|| function("quantize")).transpose()?,
            to_f32: function("to_f32")?,
            head_dense: function("head_dense")?,
            head_norm: function("head_norm")?,
            head_out: function("head_out")?,
        })
    }
}

/// Seconds between two completed events of one stream, by the GPU's clock.
pub(super) fn seconds_between(from: &CudaEvent, to: &CudaEvent) -> Result<f64, driver::DriverError> {
    type ElapsedTime =
        unsafe extern "C" fn(*mut f32, driver::sys::CUevent, driver::sys::CUevent) -> driver::sys::CUresult;
    let mut milliseconds = 0f32;
    // SAFETY: both functions have this type, and the events are alive. cudarc binds only the name of CUDA 12.8 and later, and
    // panics if a driver does not have it.
    unsafe {
        let library = driver::sys::culib();
        let named = |name: &[u8]| library.get::<ElapsedTime>(name).map(|function| *function);
        let elapsed = named(b"cuEventElapsedTime_v2").or_else(|_| named(b"cuEventElapsedTime"));
        let elapsed = elapsed.map_err(|_| driver::DriverError(driver::sys::CUresult::CUDA_ERROR_NOT_FOUND))?;
        elapsed(&raw mut milliseconds, from.cu_event(), to.cu_event()).result()?;
    }
    Ok(f64::from(milliseconds) / 1e3)
}

/// The driver's CUDA version: 12010 is CUDA 12.1.
pub(super) fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: the pointer is to a live integer.
    unsafe { driver::sys::cuDriverGetVersion(&raw mut version) }.result().context("the CUDA driver does not start")?;
    Ok(version)
}

/// Checks the driver, the libraries and the device without creating a context. Returns the driver's CUDA version.
pub(super) fn check(ordinal: usize) -> Result<i32> {
    check_libraries()?;
    let version = driver_version()?;
    let driver = format!("{}.{}", version / 1000, version % 1000 / 10);
    ensure!(
        version >= MIN_DRIVER_VERSION,
        "the NVIDIA driver supports CUDA {driver}; CUDA 12.0 (driver 525) or later is required. Use --device cpu otherwise"
    );
    let (library, _) = nvrtc_version()?;
    ensure!(
        library <= version / 1000,
        "the NVIDIA driver supports CUDA {driver}, but the installed libraries are of CUDA {library}; install the libraries of \
         CUDA {} or a newer driver, or use --device cpu",
        version / 1000
    );
    let devices = CudaContext::device_count().context("the CUDA driver does not start")?;
    ensure!(
        ordinal < devices.max(0) as usize,
        "there is no device cuda:{ordinal}; the driver reports {devices} (CUDA_VISIBLE_DEVICES may hide some)"
    );
    let (name, major, minor) = capability(ordinal).with_context(|| format!("cannot query device cuda:{ordinal}"))?;
    ensure!(
        major >= 8,
        "{name} has compute capability {major}.{minor}; the kernels need 8.0 (A100, RTX 30) or later. Use --device cpu"
    );
    Ok(version)
}

/// A device's name and compute capability.
pub(super) fn capability(ordinal: usize) -> Result<(String, i32, i32), driver::DriverError> {
    use driver::result::device;
    let device = device::get(ordinal as i32)?;
    // SAFETY: `device` comes from the driver.
    let ask = |attribute| unsafe { device::get_attribute(device, attribute) };
    Ok((
        device::get_name(device)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

/// cudarc panics when a library is missing, so this checks for each first.
fn check_libraries() -> Result<()> {
    // SAFETY: each call opens a library and closes it again.
    let (cuda, nvrtc, cublaslt) =
        unsafe { (driver::sys::is_culib_present(), nvrtc_sys::is_culib_present(), cublaslt::sys::is_culib_present()) };
    ensure!(cuda, "no NVIDIA driver found (libcuda.so); use --device cpu");
    let missing = match (nvrtc, cublaslt) {
        (true, true) => return Ok(()),
        (false, true) => "libnvrtc.so",
        (true, false) => "libcublasLt.so",
        (false, false) => "libnvrtc.so and libcublasLt.so",
    };
    bail!(
        "missing CUDA libraries: {missing} of CUDA 12 or 13 not found. Install them, or add their folder to LD_LIBRARY_PATH \
         (the wheels nvidia-cuda-nvrtc and nvidia-cublas contain them), or use --device cpu"
    )
}
