//! Chooses one of the two attention kernels at start: `attention_wgmma` on Hopper if it passes the numerical cross-check and is
//! faster, else `attention` (on `mma.sync`). All sequences use the same kernel, so that scores are batch-invariant. Layers with a
//! window always use `attention_local`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};

use super::batch_layout::{Layout, TILE_ROWS};
use super::cross_check::{bound, worst_row};
use super::device::Device;
use super::dtype::CudaDtype;
use super::launch::device_address;
use super::options::CudaOptions;
use crate::backend::{AttentionShape, BackendError};
use crate::batch::{Batch, Pair};

/// `ATTENTION_THREADS` and `KEY_ROWS` of the kernels: threads per block, and keys per step.
const ATTENTION_THREADS: u32 = 128;
const KEY_ROWS: usize = 64;
/// Sequence lengths of the cross-check: at and around multiples of 64 (keys per step, queries per wgmma block) and of 128 (queries per
/// tile).
const CHECKED_LENGTHS: [usize; 9] = [1, 63, 64, 65, 127, 128, 129, 200, 333];
/// Tokens of the sequence that is timed.
const TIMED_LENGTH: usize = 2048;

/// An attention kernel and its launch parameters.
#[derive(Debug)]
pub(super) struct AttentionLauncher {
    pub(super) function: CudaFunction,
    /// Blocks, of `ATTENTION_THREADS` threads, per tile of 128 queries.
    pub(super) blocks_per_tile: usize,
    /// Dynamic shared memory: Q, and two stages of K and V. In f32 only one stage of K and V, without Q.
    pub(super) shared_bytes: usize,
}

/// The attention kernels that a Hopper device can choose between.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttentionKernel {
    Mma,
    Wgmma,
}

impl AttentionKernel {
    /// The kernel's name in the CUDA module; also the content of the cache file.
    fn name(self) -> &'static str {
        match self {
            Self::Mma => "attention",
            Self::Wgmma => "attention_wgmma",
        }
    }

    fn from_name(name: &[u8]) -> Option<Self> {
        [Self::Mma, Self::Wgmma].into_iter().find(|kernel| kernel.name().as_bytes() == name)
    }
}

impl AttentionLauncher {
    /// Selects the kernel for this device and shape: the cached choice of an earlier start, else the result of a trial.
    ///
    /// # Errors
    /// A driver error during the trial; the CUDA context cannot be used after it.
    pub(super) fn choose(device: &Arc<Device>, options: &CudaOptions, shape: AttentionShape) -> Result<Self> {
        let dtype = options.dtype;
        let mma = Self::with_parameters(&device.kernels.attention, 1, dtype, shape);
        let Some(function) = &device.kernels.attention_wgmma else { return Ok(mma) };
        if options.mma_attention_only {
            return Ok(mma);
        }
        let wgmma = Self::with_parameters(function, 2, dtype, shape);

        let file = format!("attention-{}-{}", device.file_name(), device.kernels_key);
        let cached = device.cache.read(&file).and_then(|name| AttentionKernel::from_name(&name));
        let chosen = match cached {
            Some(kernel) => kernel,
            None => match Trial::new(device, dtype, shape).and_then(|trial| trial.compare(&mma, &wgmma)) {
                Ok(trial) => trial.decide(dtype, |kernel| device.cache.write(&file, kernel.name().as_bytes())),
                Err(BackendError::OutOfMemory(_)) => AttentionKernel::Mma,
                Err(error) => {
                    return Err(error).context(
                        "the wgmma attention kernel does not run on this GPU; start with --cuda-attention mma to disable it",
                    );
                }
            },
        };
        Ok(if chosen == AttentionKernel::Wgmma { wgmma } else { mma })
    }

    /// The kernel for attention within a window.
    pub(super) fn local(device: &Device, dtype: CudaDtype, shape: AttentionShape) -> Self {
        Self::with_parameters(&device.kernels.attention_local, 1, dtype, shape)
    }

    /// Launch parameters for a kernel with `blocks_per_tile` blocks for each tile of 128 queries.
    fn with_parameters(
        function: &CudaFunction,
        blocks_per_tile: usize,
        dtype: CudaDtype,
        shape: AttentionShape,
    ) -> Self {
        let stages = 2 * 2 * KEY_ROWS;
        let bytes = if dtype == CudaDtype::F32 { 2 * KEY_ROWS * 4 } else { (TILE_ROWS / blocks_per_tile + stages) * 2 };
        Self { function: function.clone(), blocks_per_tile, shared_bytes: bytes * shape.head_size }
    }

    /// Launches the kernel over all tiles of a batch, for `heads` heads. `window` is for the kernel of [`Self::local`] only.
    /// `upload` is the device address of the batch's upload block; `layout` has its offsets.
    ///
    /// # Safety
    /// `upload` holds a batch in this layout, `qkv` its `[T, 3C]`, and `out` has room for `[T, C]`; both are device addresses of
    /// the kernel's dtype.
    pub(super) unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        (layout, upload): (Layout, u64),
        shape: AttentionShape,
        heads: usize,
        window: Option<usize>,
        (qkv, out): (u64, u64),
    ) -> Result<(), BackendError> {
        let window = window.map(|window| window as u32);
        let [counts, offsets, tiles] =
            [layout.counts(), layout.offsets(), layout.tile_list()].map(|index| upload + 4 * index as u64);
        let scale = (shape.head_size as f32).sqrt().recip();
        let config = LaunchConfig {
            grid_dim: ((layout.tiles * self.blocks_per_tile) as u32, heads as u32, 1),
            block_dim: (ATTENTION_THREADS, 1, 1),
            shared_mem_bytes: self.shared_bytes as u32,
        };
        let mut launch = stream.launch_builder(&self.function);
        for argument in [&counts, &offsets, &tiles, &qkv, &out] {
            launch.arg(argument);
        }
        launch.arg(&scale);
        if let Some(window) = &window {
            launch.arg(window);
        }
        // SAFETY: the signature is attention(counts, offsets, tiles, qkv, out, scale); the last parameter of attention_local is
        // window. The caller guarantees the buffers.
        unsafe { launch.launch(config) }?;
        Ok(())
    }
}

/// The kernel to use, given the trial's measurements. A NaN error counts as a failed cross-check.
fn choose(error: f32, bound: f32, mma_seconds: f64, wgmma_seconds: f64) -> AttentionKernel {
    if error <= bound && wgmma_seconds < mma_seconds { AttentionKernel::Wgmma } else { AttentionKernel::Mma }
}

/// Results of both kernels on the same input.
#[derive(Debug)]
struct TrialResult {
    /// The worst row's relative error of wgmma against mma.
    error: f32,
    mma_seconds: f64,
    wgmma_seconds: f64,
}

impl TrialResult {
    /// Chooses, logs the choice, and saves it unless the cross-check failed: a failed check is repeated, and logged, at the next
    /// start.
    fn decide(&self, dtype: CudaDtype, save: impl FnOnce(AttentionKernel)) -> AttentionKernel {
        let Self { error, mma_seconds, wgmma_seconds } = *self;
        let chosen = choose(error, bound(dtype), mma_seconds, wgmma_seconds);
        if error <= bound(dtype) {
            tracing::info!(error, mma_seconds, wgmma_seconds, "attention kernel: {}", chosen.name());
            save(chosen);
        } else {
            tracing::warn!(
                error,
                bound = bound(dtype),
                "the wgmma attention kernel failed the numerical cross-check on this GPU and is not used; please report this"
            );
        }
        chosen
    }
}

/// Inputs and stream for comparing the kernels: random Q, K and V on the device, and an output buffer.
struct Trial {
    stream: Arc<CudaStream>,
    dtype: CudaDtype,
    shape: AttentionShape,
    timed_heads: usize,
    qkv: CudaSlice<u8>,
    out: CudaSlice<u8>,
}

impl Trial {
    fn new(device: &Arc<Device>, dtype: CudaDtype, shape: AttentionShape) -> Result<Self, BackendError> {
        let stream = device.context.new_stream()?;
        let row = shape.heads * shape.head_size;
        let mut random = fastrand::Rng::with_seed(1);
        // Variance 1, so that attention scores are spread about as widely as in a real model.
        let values: Vec<f32> = (0..TIMED_LENGTH * 3 * row).map(|_| (random.f32() - 0.5) * 3.46).collect();
        let qkv = stream.clone_htod(&dtype.encode(&values))?;
        let out = stream.alloc_zeros(TIMED_LENGTH * row * dtype.bytes())?;
        // About two tiles per multiprocessor, as on a busy device, if there are enough heads.
        let timed_heads = (2 * device.multiprocessors as usize).div_ceil(TIMED_LENGTH / TILE_ROWS).min(shape.heads);
        Ok(Self { stream, dtype, shape, timed_heads, qkv, out })
    }

    fn compare(&self, mma: &AttentionLauncher, wgmma: &AttentionLauncher) -> Result<TrialResult, BackendError> {
        let (expected, got) = (self.outputs(mma)?, self.outputs(wgmma)?);
        let error = worst_row(&expected, &got, self.shape.head_size);
        Ok(TrialResult { error, mma_seconds: self.seconds(mma)?, wgmma_seconds: self.seconds(wgmma)? })
    }

    /// The kernel's output for sequences of `CHECKED_LENGTHS`, `[sum of lengths, C]`.
    fn outputs(&self, attention: &AttentionLauncher) -> Result<Vec<f32>, BackendError> {
        let (layout, upload) = self.upload(&CHECKED_LENGTHS)?;
        self.launch(attention, layout, &upload, self.shape.heads)?;
        let bytes = self.stream.clone_dtoh(&self.out)?;
        let length = CHECKED_LENGTHS.iter().sum::<usize>() * self.shape.heads * self.shape.head_size;
        Ok(self.dtype.decode(&bytes[..length * self.dtype.bytes()]))
    }

    /// Seconds per launch over one sequence of `TIMED_LENGTH` tokens, averaged over at least 2 ms of launches.
    fn seconds(&self, attention: &AttentionLauncher) -> Result<f64, BackendError> {
        let (layout, upload) = self.upload(&[TIMED_LENGTH])?;
        let mut launches = 1;
        loop {
            self.stream.synchronize()?;
            let start = Instant::now();
            for _ in 0..launches {
                self.launch(attention, layout, &upload, self.timed_heads)?;
            }
            self.stream.synchronize()?;
            if start.elapsed() >= Duration::from_millis(2) {
                return Ok(start.elapsed().as_secs_f64() / f64::from(launches));
            }
            launches *= 2;
        }
    }

    fn upload(&self, lengths: &[usize]) -> Result<(Layout, CudaSlice<u32>), BackendError> {
        let pairs: Vec<Pair> = lengths.iter().map(|&n| Pair::new(vec![0; n], vec![0; n])).collect();
        let batch = Batch::pack(&pairs);
        let layout = Layout::of(&batch);
        let mut numbers = vec![0; layout.len()];
        layout.write(&batch, &mut numbers);
        Ok((layout, self.stream.clone_htod(&numbers)?))
    }

    fn launch(
        &self,
        attention: &AttentionLauncher,
        layout: Layout,
        upload: &CudaSlice<u32>,
        heads: usize,
    ) -> Result<(), BackendError> {
        let buffers = (device_address(&self.qkv, &self.stream), device_address(&self.out, &self.stream));
        let upload = device_address(upload, &self.stream);
        // SAFETY: the batch in `upload` has at most TIMED_LENGTH tokens, for which both buffers were allocated, and one
        // stream orders the launches.
        unsafe { attention.launch(&self.stream, (layout, upload), self.shape, heads, None, buffers) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wgmma_attention_needs_a_passed_cross_check_and_a_shorter_time() {
        assert_eq!(choose(1e-4, 2e-3, 2.0, 1.0), AttentionKernel::Wgmma);
        for (error, mma_seconds, wgmma_seconds) in
            [(1e-4, 1.0, 2.0), (1e-4, 1.0, 1.0), (0.1, 2.0, 1.0), (f32::NAN, 2.0, 1.0)]
        {
            assert_eq!(
                choose(error, 2e-3, mma_seconds, wgmma_seconds),
                AttentionKernel::Mma,
                "{error} {wgmma_seconds}"
            );
        }
    }

    #[test]
    fn a_choice_is_saved_only_if_the_cross_check_passed() {
        let saved = |error| {
            let mut saved = None;
            let result = TrialResult { error, mma_seconds: 2.0, wgmma_seconds: 1.0 };
            let chosen = result.decide(CudaDtype::F16, |kernel| saved = Some(kernel));
            (chosen, saved)
        };
        assert_eq!(saved(1e-4), (AttentionKernel::Wgmma, Some(AttentionKernel::Wgmma)));
        assert_eq!(saved(0.1), (AttentionKernel::Mma, None));
    }

    #[test]
    fn cached_kernel_names_are_read_back() {
        for kernel in [AttentionKernel::Mma, AttentionKernel::Wgmma] {
            assert_eq!(AttentionKernel::from_name(kernel.name().as_bytes()), Some(kernel));
        }
        assert_eq!(AttentionKernel::from_name(b"unknown"), None);
    }
}
