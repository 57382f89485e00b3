//! Which of the two attention kernels a device runs: the one on Hopper's warpgroup gemms (`attention_wgmma`) where it is there,
//! matches_library with the other and is faster, else the one on `mma.sync`. One for all sequences, so that a score does not depend on
//! what a sequence is beside.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, LaunchConfig, PushKernelArg};

use super::batch_layout::{Layout, TILE_ROWS};
use super::cross_check::{bound, worst_row};
use super::device::Device;
use super::{CudaDtype, CudaOptions, address};
use crate::backend::{AttentionShape, BackendError};
use crate::batch::{Batch, Pair};

/// Threads of a block, and keys of a step, in `kernels.cu`.
const ATTENTION_THREADS: u32 = 128;
const KEY_ROWS: usize = 64;
/// Where the two must agree: around the edges of a step of keys, a warpgroup's queries, a tile.
const AWKWARD_LENGTHS: [usize; 9] = [1, 63, 64, 65, 127, 128, 129, 200, 333];
/// Where the faster is wanted.
const LONG: usize = 2048;

/// An attention kernel and how it is launched.
#[derive(Debug)]
pub(super) struct Attention {
    pub(super) name: &'static str,
    pub(super) function: CudaFunction,
    /// Blocks, of `ATTENTION_THREADS`, that share a tile of queries.
    pub(super) blocks_a_tile: usize,
    /// What `kernels.cu` says of it: Q, and two stages of K and V. In f32 two buffers of keys and values.
    pub(super) shared_bytes: usize,
}

impl Attention {
    /// The kernel for this device and shape.
    ///
    /// # Errors
    /// The driver's, with which the device is lost to this process.
    pub(super) fn choose(device: &Arc<Device>, options: &CudaOptions, shape: AttentionShape) -> Result<Self> {
        let (d, dtype) = (shape.head_size, options.dtype);
        let of = |name, function: &CudaFunction, blocks_a_tile| {
            let stages = 2 * 2 * KEY_ROWS;
            let bytes =
                if dtype == CudaDtype::F32 { 2 * KEY_ROWS * 4 } else { (TILE_ROWS / blocks_a_tile + stages) * 2 };
            Self { name, function: function.clone(), blocks_a_tile, shared_bytes: bytes * d }
        };
        let mma = of("attention", &device.kernels.attention, 1);
        let Some(function) = &device.kernels.attention_wgmma else { return Ok(mma) };
        if options.mma_attention_only {
            return Ok(mma);
        }
        let wgmma = of("attention_wgmma", function, 2);

        let name: String = device.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let file = format!("attention-{name}-{}", device.kernels_key);
        let chosen = match device.cache.read(&file).as_deref() {
            Some(b"attention") => mma,
            Some(b"attention_wgmma") => wgmma,
            _ => match Trial::new(device, dtype, shape).and_then(|trial| trial.compare(&mma, &wgmma)) {
                Ok(verdict) => {
                    let wins = verdict.error <= bound(dtype) && verdict.wgmma_seconds < verdict.mma_seconds;
                    let chosen = if wins { wgmma } else { mma };
                    if verdict.error <= bound(dtype) {
                        tracing::info!(?verdict, "attention runs on the kernel {}", chosen.name);
                        // What disagrees is tried, and told, again at the next start.
                        device.cache.write(&file, chosen.name.as_bytes());
                    } else {
                        tracing::warn!(
                            ?verdict,
                            "the attention kernel for Hopper's warpgroup gemms gives other results than the one on mma.sync on \
                             this device and is left alone; please report it"
                        );
                    }
                    chosen
                }
                Err(BackendError::OutOfMemory(_)) => mma,
                Err(error) => {
                    return Err(error).context(
                        "the attention kernel for Hopper's warpgroup gemms does not run; --cuda-attention mma leaves it out",
                    );
                }
            },
        };
        Ok(chosen)
    }

    /// Launches it over the tiles of a batch that lies at `upload`, for `heads` heads.
    ///
    /// # Safety
    /// `upload` holds a batch in this layout, `qkv` its `[T, 3C]` and `out` room for `[T, C]`, on the device, of the kernel's dtype.
    pub(super) unsafe fn launch(
        &self,
        stream: &Arc<CudaStream>,
        layout: Layout,
        upload: u64,
        shape: AttentionShape,
        heads: usize,
        (qkv, out): (u64, u64),
    ) -> Result<(), BackendError> {
        let [counts, offsets, tiles] =
            [layout.counts(), layout.offsets(), layout.tile_list()].map(|place| upload + 4 * place as u64);
        let scale = (shape.head_size as f32).sqrt().recip();
        let config = LaunchConfig {
            grid_dim: ((layout.tiles * self.blocks_a_tile) as u32, heads as u32, 1),
            block_dim: (ATTENTION_THREADS, 1, 1),
            shared_mem_bytes: self.shared_bytes as u32,
        };
        let mut launch = stream.launch_builder(&self.function);
        for argument in [&counts, &offsets, &tiles, &qkv, &out] {
            launch.arg(argument);
        }
        // SAFETY: attention(counts, offsets, tiles, qkv, out, scale), and the caller's.
        unsafe { launch.arg(&scale).launch(config) }?;
        Ok(())
    }
}

/// What the two made of the same numbers.
#[derive(Debug)]
struct Verdict {
    /// The worst row's difference, as a share of the row.
    error: f32,
    mma_seconds: f64,
    wgmma_seconds: f64,
}

/// Random Q, K and V on the device, and room for a result.
struct Trial {
    stream: Arc<CudaStream>,
    dtype: CudaDtype,
    shape: AttentionShape,
    heads_timed: usize,
    qkv: CudaSlice<u8>,
    out: CudaSlice<u8>,
}

impl Trial {
    fn new(device: &Arc<Device>, dtype: CudaDtype, shape: AttentionShape) -> Result<Self, BackendError> {
        let stream = device.context.new_stream()?;
        let row = shape.heads * shape.head_size;
        let mut random = fastrand::Rng::with_seed(1);
        // Of variance 1, so that scores spread as a model's do.
        let values: Vec<f32> = (0..LONG * 3 * row).map(|_| (random.f32() - 0.5) * 3.46).collect();
        let qkv = stream.clone_htod(&dtype.encode(&values))?;
        let out = stream.alloc_zeros(LONG * row * dtype.bytes())?;
        // Enough tiles for every multiprocessor, as when a device is busy.
        let heads_timed = (2 * device.multiprocessors as usize).div_ceil(LONG / 128).min(shape.heads);
        Ok(Self { stream, dtype, shape, heads_timed, qkv, out })
    }

    fn compare(&self, mma: &Attention, wgmma: &Attention) -> Result<Verdict, BackendError> {
        let (expected, got) = (self.outputs(mma)?, self.outputs(wgmma)?);
        let error = worst_row(&expected, &got, self.shape.head_size);
        Ok(Verdict { error, mma_seconds: self.seconds(mma)?, wgmma_seconds: self.seconds(wgmma)? })
    }

    /// What the kernel makes of sequences of awkward lengths.
    fn outputs(&self, attention: &Attention) -> Result<Vec<f32>, BackendError> {
        let (layout, upload) = self.upload(&AWKWARD_LENGTHS)?;
        self.launch(attention, layout, &upload, self.shape.heads)?;
        let bytes = self.stream.clone_dtoh(&self.out)?;
        let length = AWKWARD_LENGTHS.iter().sum::<usize>() * self.shape.heads * self.shape.head_size;
        Ok(self.dtype.decode(&bytes[..length * self.dtype.bytes()]))
    }

    /// Seconds of a launch over one long sequence: of as many as take two milliseconds together.
    fn seconds(&self, attention: &Attention) -> Result<f64, BackendError> {
        let (layout, upload) = self.upload(&[LONG])?;
        let mut launches = 1;
        loop {
            self.stream.synchronize()?;
            let start = Instant::now();
            for _ in 0..launches {
                self.launch(attention, layout, &upload, self.heads_timed)?;
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
        attention: &Attention,
        layout: Layout,
        upload: &CudaSlice<u32>,
        heads: usize,
    ) -> Result<(), BackendError> {
        let buffers = (address(&self.qkv, &self.stream), address(&self.out, &self.stream));
        let upload = address(upload, &self.stream);
        // SAFETY: the batch of `upload`, of at most LONG tokens, for which the buffers were made; all on one stream.
        unsafe { attention.launch(&self.stream, layout, upload, self.shape, heads, buffers) }
    }
}
