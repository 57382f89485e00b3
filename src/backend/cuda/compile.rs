//! Compiles the CUDA sources in `kernels/` with NVRTC for one device, dtype and model shape.

use std::ffi::{CString, c_char};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use cudarc::nvrtc::{result as nvrtc, sys};
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::dtype::CudaDtype;
use crate::backend::AttentionShape;

/// The sources by their names in `#include` lines; `kernels.cu`, the first, includes the others. NVRTC takes all of them from
/// memory and needs no include path.
const SOURCES: [(&str, &str); 13] = [
    ("kernels.cu", include_str!("kernels/kernels.cu")),
    ("attention.cuh", include_str!("kernels/attention.cuh")),
    ("attention_cls.cuh", include_str!("kernels/attention_cls.cuh")),
    ("attention_f32.cuh", include_str!("kernels/attention_f32.cuh")),
    ("attention_mma.cuh", include_str!("kernels/attention_mma.cuh")),
    ("attention_wgmma.cuh", include_str!("kernels/attention_wgmma.cuh")),
    ("config.cuh", include_str!("kernels/config.cuh")),
    ("elementwise.cuh", include_str!("kernels/elementwise.cuh")),
    ("gemm_wgmma.cuh", include_str!("kernels/gemm_wgmma.cuh")),
    ("head.cuh", include_str!("kernels/head.cuh")),
    ("ptx.cuh", include_str!("kernels/ptx.cuh")),
    ("rows.cuh", include_str!("kernels/rows.cuh")),
    ("wgmma.cuh", include_str!("kernels/wgmma.cuh")),
];

/// Machine code of the kernels.
pub(super) struct CompiledKernels {
    /// Identifies sources, options and compiler version: a hexadecimal SHA-256.
    pub(super) key: String,
    pub(super) cubin: Vec<u8>,
}

/// NVRTC's version: major, minor.
pub(super) fn nvrtc_version() -> Result<(i32, i32)> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the pointers are to live integers.
    unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) }.result().context("NVRTC does not start")?;
    Ok((major, minor))
}

/// Compiles the kernels for `architecture` (such as `sm_90a`), which takes about a second, or reads them from the cache.
///
/// # Errors
/// NVRTC does not start, or rejects the sources; the error then contains its log.
pub(super) fn compile_cached(
    architecture: &str,
    dtype: CudaDtype,
    shape: AttentionShape,
    cache: &Cache,
) -> Result<CompiledKernels> {
    let options = [
        format!("--gpu-architecture={architecture}"),
        "--std=c++17".to_owned(),
        format!("-DELEMENT_{}", dtype.name().to_uppercase()),
        format!("-DHIDDEN_SIZE={}", shape.heads * shape.head_size),
        format!("-DHEAD_SIZE={}", shape.head_size),
    ];
    let (major, minor) = nvrtc_version()?;
    let key = key(&options, &format!("{major}.{minor}"));
    let file = format!("kernels-{key}.cubin");
    if let Some(cubin) = cache.read(&file).and_then(|bytes| verified(&bytes)) {
        return Ok(CompiledKernels { key, cubin });
    }
    let start = Instant::now();
    let cubin = compile(&options).with_context(|| format!("NVRTC {major}.{minor} does not compile the kernels"))?;
    tracing::info!(architecture, seconds = start.elapsed().as_secs_f64(), "compiled the CUDA kernels");
    cache.write(&file, &[&Sha256::digest(&cubin)[..], &cubin].concat());
    Ok(CompiledKernels { key, cubin })
}

fn key(options: &[String], version: &str) -> String {
    let mut hash = Sha256::new();
    let sources = SOURCES.iter().flat_map(|(name, text)| [*name, *text]);
    for part in options.iter().map(String::as_str).chain(sources).chain([version]) {
        hash.update(part.as_bytes());
        hash.update([0]);
    }
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The cubin of a cache file, which starts with the cubin's SHA-256. `None` if they do not match: the driver is not told a
/// cubin's length, so it must never see a truncated one.
fn verified(bytes: &[u8]) -> Option<Vec<u8>> {
    let (digest, cubin) = bytes.split_at_checked(32)?;
    (Sha256::digest(cubin)[..] == *digest).then(|| cubin.to_vec())
}

fn compile(options: &[String]) -> Result<Vec<u8>> {
    let c_strings = |part: fn(&(&str, &str)) -> String| -> Result<Vec<CString>> {
        Ok(SOURCES.iter().map(|source| CString::new(part(source))).collect::<Result<_, _>>()?)
    };
    let (names, texts) = (c_strings(|source| source.0.to_owned())?, c_strings(|source| source.1.to_owned())?);
    let pointers = |strings: &[CString]| strings.iter().map(|s| s.as_ptr()).collect::<Vec<*const c_char>>();
    let (names_at, texts_at) = (pointers(&names), pointers(&texts));
    let mut program = std::ptr::null_mut();
    // SAFETY: the strings outlive the call, which copies them; both arrays have an entry for each header. `program` is used only
    // until it is destroyed below.
    unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            texts_at[0],
            names_at[0],
            (SOURCES.len() - 1) as i32,
            texts_at[1..].as_ptr(),
            names_at[1..].as_ptr(),
        )
        .result()?;
        let outcome = nvrtc::compile_program(program, options).map_err(|error| {
            let log = nvrtc::get_program_log(program).unwrap_or_default();
            let bytes: Vec<u8> = log.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
            anyhow!("{error:?}: {}", String::from_utf8_lossy(&bytes).trim())
        });
        let cubin = outcome.and_then(|()| {
            let mut size = 0;
            sys::nvrtcGetCUBINSize(program, &raw mut size).result()?;
            let mut cubin = vec![0u8; size];
            sys::nvrtcGetCUBIN(program, cubin.as_mut_ptr().cast()).result()?;
            Ok(cubin)
        });
        nvrtc::destroy_program(program).ok();
        cubin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_truncated_cached_cubin_is_rejected() {
        let file = [&Sha256::digest(b"image")[..], b"image"].concat();
        assert_eq!(verified(&file).as_deref(), Some(&b"image"[..]));
        for truncated in [&file[..file.len() - 1], &file[..20], &[]] {
            assert_eq!(verified(truncated), None);
        }
    }

    #[test]
    fn every_included_header_is_passed_to_nvrtc() {
        for (file, text) in SOURCES {
            for line in text.lines().filter_map(|line| line.strip_prefix("#include \"")) {
                let name = line.trim_end_matches('"');
                assert!(SOURCES[1..].iter().any(|(header, _)| *header == name), "{file} includes {name}");
            }
        }
    }

    #[test]
    fn the_cache_key_depends_on_options_and_compiler_version() {
        let options = |dtype: &str| vec![format!("-DELEMENT_{dtype}")];
        assert_ne!(key(&options("F16"), "13.0"), key(&options("BF16"), "13.0"));
        assert_ne!(key(&options("F16"), "13.0"), key(&options("F16"), "12.8"));
    }
}
