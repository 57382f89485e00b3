//! One device: is there a driver, which device, and our kernels compiled for it.

use std::ffi::CString;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule};
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;
use cudarc::{cublaslt, driver};
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::dtype::CudaDtype;
use crate::backend::AttentionShape;

/// The kernels' text. It includes nothing, so NVRTC needs no folder of headers.
const KERNELS: &str = include_str!("kernels/kernels.cu");

/// The first whose kernels and libraries of CUDA 12 this driver runs.
const OLDEST_DRIVER: i32 = 12_000;

/// A context on a device and what it runs.
#[derive(Debug)]
pub(super) struct Device {
    pub(super) context: Arc<CudaContext>,
    pub(super) name: String,
    /// Streaming multiprocessors: grids of row kernels are a multiple of them.
    pub(super) multiprocessors: u32,
    pub(super) kernels: Kernels,
    /// Which kernels these are: another text, shape, precision or compiler has another.
    pub(super) kernels_key: String,
    pub(super) cache: Cache,
}

/// Every kernel of `kernels.cu`, by its name there.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed_norm: CudaFunction,
    pub(super) layer_norm: CudaFunction,
    pub(super) attention: CudaFunction,
    /// On Hopper, in half precisions and with heads of 64.
    pub(super) attention_wgmma: Option<CudaFunction>,
    /// On Hopper, where gemms are of half precisions.
    pub(super) gemm_wgmma: Option<CudaFunction>,
    pub(super) cls_attention: CudaFunction,
    pub(super) gather_cls: CudaFunction,
    pub(super) activate: CudaFunction,
    /// Where gemms are of E4M3.
    pub(super) quantise: Option<CudaFunction>,
    pub(super) to_f32: CudaFunction,
    pub(super) head_dense: CudaFunction,
    pub(super) head_out: CudaFunction,
}

/// The first CUDA device: `None` if there is no driver or no device, an error if it cannot be used.
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

    /// The device `ordinal`, with the kernels for models of this shape.
    ///
    /// # Errors
    /// No driver, no such device, one below compute capability 8.0, a missing library, a compiler too old for the device.
    pub(super) fn open(ordinal: usize, dtype: CudaDtype, shape: AttentionShape, cache: Cache) -> Result<Self> {
        let version = check(ordinal)?;
        let context = CudaContext::new(ordinal).with_context(|| format!("device cuda:{ordinal} cannot be used"))?;
        // SAFETY: no slice is shared between streams without one being waited for, so no events need to be kept for them.
        unsafe { context.disable_event_tracking() };
        if version >= 12_010 {
            // A thread that waits for a batch sleeps: the processor's time is for tokenising.
            context.set_blocking_synchronize().ok();
        }
        let name = context.name()?;
        let (major, minor) = context.compute_capability()?;
        ensure!(
            dtype != CudaDtype::Fp8 || (major, minor) >= (8, 9),
            "{name} has compute capability {major}.{minor}, which has no numbers of fp8 bits; --dtype fp8 needs 8.9 (L4, RTX 40) \
             or later. Use --dtype f16"
        );
        let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let hopper = (major, minor) == (9, 0);
        let architecture = if hopper { "sm_90a".to_owned() } else { format!("sm_{major}{minor}") };
        let (kernels_key, image) = compiled(&architecture, dtype, shape, &cache)?;
        let module = context
            .load_module(cudarc::nvrtc::Ptx::from_binary(image))
            .context("the driver refuses the compiled kernels; it may be older than the CUDA libraries")?;
        let kernels = Kernels::of(&module, dtype, shape, hopper)?;
        Ok(Self { kernels, kernels_key, context, name, multiprocessors, cache })
    }
}

impl Kernels {
    fn of(module: &Arc<CudaModule>, dtype: CudaDtype, shape: AttentionShape, hopper: bool) -> Result<Self> {
        let function = |name: &str| module.load_function(name).with_context(|| format!("the kernel {name}"));
        let attention_wgmma = hopper && dtype != CudaDtype::F32 && shape.head_size == 64;
        let gemm_wgmma = hopper && matches!(dtype, CudaDtype::F16 | CudaDtype::Bf16);
        Ok(Self {
            embed_norm: function("embed_norm")?,
            layer_norm: function("layer_norm")?,
            attention: function("attention")?,
            attention_wgmma: attention_wgmma.then(|| function("attention_wgmma")).transpose()?,
            gemm_wgmma: gemm_wgmma.then(|| function("gemm_wgmma")).transpose()?,
            cls_attention: function("cls_attention")?,
            gather_cls: function("gather_cls")?,
            activate: function("activate")?,
            quantise: (dtype == CudaDtype::Fp8).then(|| function("quantise")).transpose()?,
            to_f32: function("to_f32")?,
            head_dense: function("head_dense")?,
            head_out: function("head_out")?,
        })
    }
}

/// Seconds of the device between two events of one stream that has come to both.
pub(super) fn seconds_between(from: &CudaEvent, to: &CudaEvent) -> Result<f64, driver::DriverError> {
    type ElapsedTime =
        unsafe extern "C" fn(*mut f32, driver::sys::CUevent, driver::sys::CUevent) -> driver::sys::CUresult;
    let mut milliseconds = 0f32;
    // SAFETY: both functions are of this type, and the events are alive. cudarc knows the name since CUDA 12.8 alone, and panics
    // where a driver does not have it.
    unsafe {
        let library = driver::sys::culib();
        let named = |name: &[u8]| library.get::<ElapsedTime>(name).map(|function| *function);
        let elapsed = named(b"cuEventElapsedTime_v2").or_else(|_| named(b"cuEventElapsedTime"));
        let elapsed = elapsed.map_err(|_| driver::DriverError(driver::sys::CUresult::CUDA_ERROR_NOT_FOUND))?;
        elapsed(&raw mut milliseconds, from.cu_event(), to.cu_event()).result()?;
    }
    Ok(f64::from(milliseconds) / 1e3)
}

/// 12,010 is CUDA 12.1.
fn driver_version() -> Result<i32> {
    let mut version = 0;
    // SAFETY: an integer to write to.
    unsafe { driver::sys::cuDriverGetVersion(&raw mut version) }.result().context("the CUDA driver does not start")?;
    Ok(version)
}

/// Looks at the driver, its libraries and the device, and starts nothing on it. Returns the driver's version.
fn check(ordinal: usize) -> Result<i32> {
    check_libraries()?;
    let version = driver_version()?;
    let told = format!("{}.{}", version / 1000, version % 1000 / 10);
    ensure!(
        version >= OLDEST_DRIVER,
        "the NVIDIA driver is of CUDA {told}; 12.0 (driver 525) or later is needed, or use --device cpu"
    );
    let (library, _) = nvrtc_version()?;
    ensure!(
        library <= version / 1000,
        "the NVIDIA driver is of CUDA {told} and the libraries found are of CUDA {library}, which it does not run; install those of \
         CUDA {} or a newer driver, or use --device cpu",
        version / 1000
    );
    let devices = CudaContext::device_count().context("the CUDA driver does not start")?;
    ensure!(
        ordinal < devices.max(0) as usize,
        "there is no device cuda:{ordinal}; the driver shows {devices} (CUDA_VISIBLE_DEVICES may hide some)"
    );
    let (name, major, minor) = capability(ordinal).with_context(|| format!("device cuda:{ordinal} cannot be asked"))?;
    ensure!(
        major >= 8,
        "{name} has compute capability {major}.{minor}; the kernels need 8.0 (A100, RTX 30) or later. Use --device cpu"
    );
    Ok(version)
}

/// A device's name and compute capability.
fn capability(ordinal: usize) -> Result<(String, i32, i32), driver::DriverError> {
    use driver::result::device;
    let device = device::get(ordinal as i32)?;
    // SAFETY: the driver has just given the device.
    let ask = |attribute| unsafe { device::get_attribute(device, attribute) };
    Ok((
        device::get_name(device)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    ))
}

fn nvrtc_version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: two integers to write to.
    unsafe { nvrtc_sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().context("NVRTC does not start")?;
    Ok((major, minor))
}

/// cudarc panics where a library that it is asked for is missing, so each is looked for first.
fn check_libraries() -> Result<()> {
    // SAFETY: each call opens a library and closes it again.
    let (cuda, nvrtc, cublaslt) =
        unsafe { (driver::sys::is_culib_present(), nvrtc_sys::is_culib_present(), cublaslt::sys::is_culib_present()) };
    ensure!(cuda, "there is no NVIDIA driver on this machine (libcuda.so is not found); use --device cpu");
    let missing = match (nvrtc, cublaslt) {
        (true, true) => return Ok(()),
        (false, true) => "libnvrtc.so",
        (true, false) => "libcublasLt.so",
        (false, false) => "libnvrtc.so and libcublasLt.so",
    };
    bail!(
        "CUDA's libraries are not all here: {missing} of CUDA 12 or 13 not found. Install them, or add their folder to \
         LD_LIBRARY_PATH (the wheels nvidia-cuda-nvrtc and nvidia-cublas have them), or use --device cpu"
    )
}

/// The kernels' key and machine code for `architecture`: compiled, which takes about a second, or from the cache of an earlier start.
fn compiled(architecture: &str, dtype: CudaDtype, shape: AttentionShape, cache: &Cache) -> Result<(String, Vec<u8>)> {
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        format!("-DELEMENT_{}", dtype.name().to_uppercase()),
        format!("-DHIDDEN_SIZE={}", shape.heads * shape.head_size),
        format!("-DHEAD_SIZE={}", shape.head_size),
    ];
    let (major, minor) = nvrtc_version()?;
    let mut hash = Sha256::new();
    for part in options.iter().map(String::as_str).chain([KERNELS, &format!("{major}.{minor}")]) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    let key: String = hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    let file = format!("kernels-{key}.cubin");
    if let Some(image) = cache.read(&file).and_then(|kept| whole(&kept)) {
        return Ok((key, image));
    }
    let start = Instant::now();
    let image = compile(&options).with_context(|| format!("NVRTC {major}.{minor} does not compile the kernels"))?;
    tracing::info!(architecture, seconds = start.elapsed().as_secs_f64(), "compiled the CUDA kernels");
    cache.write(&file, &[&Sha256::digest(&image)[..], &image].concat());
    Ok((key, image))
}

/// The image that a file of the cache holds behind its digest. The driver is not told an image's length, so a torn one must not
/// gain it.
fn whole(kept: &[u8]) -> Option<Vec<u8>> {
    let (digest, image) = kept.split_at_checked(32)?;
    (Sha256::digest(image)[..] == *digest).then(|| image.to_vec())
}

fn compile(options: &[String]) -> Result<Vec<u8>> {
    let source = CString::new(KERNELS).context("the kernels' text")?;
    let program = nvrtc::create_program(&source, Some(c"kernels.cu"))?;
    // SAFETY: `program` lives until it is destroyed below, and nothing uses it after that.
    unsafe {
        let outcome = nvrtc::compile_program(program, options).map_err(|error| {
            let log = nvrtc::get_program_log(program).unwrap_or_default();
            let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
            anyhow::anyhow!("{error:?}: {}", String::from_utf8_lossy(&bytes).trim())
        });
        let image = outcome.and_then(|()| {
            let mut size = 0;
            nvrtc_sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
            let mut image = vec![0u8; size];
            nvrtc_sys::nvrtcGetCUBIN(program, image.as_mut_ptr().cast()).result()?;
            Ok(image)
        });
        nvrtc::destroy_program(program).ok();
        image
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_cached_image_is_rejected() {
        let kept = [&Sha256::digest(b"image")[..], b"image"].concat();
        assert_eq!(whole(&kept).as_deref(), Some(&b"image"[..]));
        for torn in [&kept[..kept.len() - 1], &kept[..20], &[]] {
            assert_eq!(whole(torn), None);
        }
    }
}
