//! One card: is there a driver, which device, and our kernels compiled for it.

use std::ffi::CString;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use cudarc::driver::sys::CUdevice_attribute as Attribute;
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule};
use cudarc::nvrtc::result as nvrtc;
use cudarc::nvrtc::sys as nvrtc_sys;
use cudarc::{cublaslt, driver};
use sha2::{Digest, Sha256};

use super::Element;
use crate::backend::AttentionShape;

/// The kernels' text. It includes nothing, so NVRTC needs no folder of headers.
const KERNELS: &str = include_str!("kernels.cu");

/// The first whose kernels and libraries of CUDA 12 this driver runs.
const OLDEST_DRIVER: i32 = 12_000;

/// A context on a device and what it runs.
#[derive(Debug)]
pub(super) struct Card {
    pub(super) context: Arc<CudaContext>,
    pub(super) name: String,
    /// Streaming multiprocessors: grids of row kernels are a multiple of them.
    pub(super) multiprocessors: u32,
    pub(super) kernels: Kernels,
    /// Which kernels these are: another text, shape, precision or compiler has another.
    pub(super) kernels_key: String,
}

/// Every kernel of `kernels.cu`, by its name there.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed_norm: CudaFunction,
    pub(super) layer_norm: CudaFunction,
    pub(super) attention: CudaFunction,
    /// On Hopper, in half precisions and with heads of 64.
    pub(super) attention_wgmma: Option<CudaFunction>,
    /// On Hopper, where products are of half precisions.
    pub(super) product_wgmma: Option<CudaFunction>,
    pub(super) first_token_attention: CudaFunction,
    pub(super) first_rows: CudaFunction,
    pub(super) activate: CudaFunction,
    /// Where products are of E4M3.
    pub(super) quantise: Option<CudaFunction>,
    pub(super) widen: CudaFunction,
    pub(super) head_dense: CudaFunction,
    pub(super) head_out: CudaFunction,
}

/// Whether this machine has a card and all that is needed to use it. Where only something about it is amiss, it is worth a warning.
pub fn is_there() -> bool {
    // SAFETY: opens the library and closes it again.
    let driver = unsafe { driver::sys::is_culib_present() };
    if !driver || CudaContext::device_count().unwrap_or(0) < 1 {
        return false;
    }
    let usable = check(0);
    if let Err(amiss) = &usable {
        tracing::warn!("there is a card, but {amiss:#}");
    }
    usable.is_ok()
}

impl Card {
    /// The device `ordinal`, with the kernels for models of this shape.
    ///
    /// # Errors
    /// No driver, no such device, one below compute capability 8.0, a missing library, a compiler too old for the device.
    pub(super) fn open(ordinal: usize, element: Element, shape: AttentionShape) -> Result<Self> {
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
            element != Element::Fp8 || (major, minor) >= (8, 9),
            "{name} has compute capability {major}.{minor}, which has no numbers of eight bits; --dtype fp8 needs 8.9 (L4, RTX 40) \
             or later. Use --dtype f16"
        );
        let multiprocessors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32;
        let hopper = (major, minor) == (9, 0);
        let architecture = if hopper { "sm_90a".to_owned() } else { format!("sm_{major}{minor}") };
        let (kernels_key, image) = compiled(&architecture, element, shape)?;
        let module = context
            .load_module(cudarc::nvrtc::Ptx::from_binary(image))
            .context("the driver refuses the compiled kernels; it may be older than the CUDA libraries")?;
        let kernels = Kernels::of(&module, element, shape, hopper)?;
        Ok(Self { kernels, kernels_key, context, name, multiprocessors })
    }
}

impl Kernels {
    fn of(module: &Arc<CudaModule>, element: Element, shape: AttentionShape, hopper: bool) -> Result<Self> {
        let function = |name: &str| module.load_function(name).with_context(|| format!("the kernel {name}"));
        let attention_wgmma = hopper && element != Element::F32 && shape.head_size == 64;
        let product_wgmma = hopper && matches!(element, Element::F16 | Element::Bf16);
        Ok(Self {
            embed_norm: function("embed_norm")?,
            layer_norm: function("layer_norm")?,
            attention: function("attention")?,
            attention_wgmma: attention_wgmma.then(|| function("attention_wgmma")).transpose()?,
            product_wgmma: product_wgmma.then(|| function("product_wgmma")).transpose()?,
            first_token_attention: function("first_token_attention")?,
            first_rows: function("first_rows")?,
            activate: function("activate")?,
            quantise: (element == Element::Fp8).then(|| function("quantise")).transpose()?,
            widen: function("widen")?,
            head_dense: function("head_dense")?,
            head_out: function("head_out")?,
        })
    }
}

/// Seconds of the card between two events of one stream that has come to both.
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
    let card = device::get(ordinal as i32)?;
    // SAFETY: the driver has just given the device.
    let ask = |attribute| unsafe { device::get_attribute(card, attribute) };
    Ok((
        device::get_name(card)?,
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
fn compiled(architecture: &str, element: Element, shape: AttentionShape) -> Result<(String, Vec<u8>)> {
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        format!("-DELEMENT_{}", element.name().to_uppercase()),
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
    let file = cache_folder().map(|folder| folder.join(format!("kernels-{key}.cubin")));
    if let Some(image) = file.as_ref().and_then(|file| std::fs::read(file).ok()).and_then(|kept| whole(&kept)) {
        return Ok((key, image));
    }
    let start = Instant::now();
    let image = compile(&options).with_context(|| format!("NVRTC {major}.{minor} does not compile the kernels"))?;
    tracing::info!(architecture, seconds = start.elapsed().as_secs_f64(), "compiled the CUDA kernels");
    if let Some(file) = file {
        store(&file, &[&Sha256::digest(&image)[..], &image].concat());
    }
    Ok((key, image))
}

/// The image that a file of the cache holds behind its digest. The driver is not told an image's length, so a torn one must not
/// reach it.
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

/// Where compiled kernels and tuned products are kept from one start to the next: `RERANKD_CUDA_CACHE`, or
/// `$XDG_CACHE_HOME/rerankd`, or `~/.cache/rerankd`.
pub(super) fn cache_folder() -> Option<PathBuf> {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("RERANKD_CUDA_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("rerankd")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/rerankd")))
}

/// Writes a file of the cache whole or not at all. A cache that cannot be written costs a second at the next start, no more.
pub(super) fn store(file: &std::path::Path, bytes: &[u8]) {
    let write = || {
        let folder = file.parent().unwrap_or(file);
        std::fs::create_dir_all(folder)?;
        // A name of this writer's own: in containers that share the cache, every process has the same number.
        let part = file.with_extension(format!("part-{}", uuid::Uuid::now_v7()));
        let mut writer = std::fs::File::create(&part)?;
        writer.write_all(bytes)?;
        writer.sync_all()?;
        std::fs::rename(&part, file)
    };
    if let Err(error) = write() {
        tracing::debug!("{} is not kept: {error}", file.display());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_image_leaves_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("kernels.cubin");
        store(&file, &[&Sha256::digest(b"image")[..], b"image"].concat());
        let kept = std::fs::read(&file).unwrap();
        assert_eq!(whole(&kept).as_deref(), Some(&b"image"[..]));
        for torn in [&kept[..kept.len() - 1], &kept[..20], &[]] {
            assert_eq!(whole(torn), None);
        }
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing half written stays");
    }
}
