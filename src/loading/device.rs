//! The device that models compute on.

use crate::backend::cpu::CpuDtype;
#[cfg(feature = "cuda")]
use crate::backend::cuda::CudaOptions;
use crate::checkpoint::config::ModelConfig;

/// The device that a model computes on, and its precision.
#[derive(Debug, Clone)]
pub enum DeviceChoice {
    /// The CPU kernels, on a thread pool that all models share.
    Cpu { dtype: CpuDtype, threads: usize, pin_threads: bool },
    /// candle on the CPU, in f32: the reference implementation.
    Candle { threads: usize },
    /// NVIDIA GPUs by ordinal, each with a copy of the model.
    #[cfg(feature = "cuda")]
    Cuda(Vec<usize>, CudaOptions),
    /// candle's own CUDA kernels.
    #[cfg(feature = "candle-cuda")]
    CandleCuda { ordinal: usize, threads: usize },
}

impl DeviceChoice {
    /// The precision; for candle, which has only one, the name of the implementation. For tables and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Cpu { dtype, .. } => dtype.name(),
            Self::Candle { .. } => "candle",
            #[cfg(feature = "cuda")]
            Self::Cuda(_, options) => options.dtype.name(),
            #[cfg(feature = "candle-cuda")]
            Self::CandleCuda { .. } => "candle-cuda",
        }
    }

    /// Where the model computes: `CPU, 8 threads`, or the GPUs' names.
    pub fn place(&self) -> String {
        match self {
            Self::Cpu { threads, .. } | Self::Candle { threads } => format!("CPU, {threads} threads"),
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinals, _) => {
                ordinals.iter().map(|ordinal| format!("cuda:{ordinal}")).collect::<Vec<_>>().join(", ")
            }
            #[cfg(feature = "candle-cuda")]
            Self::CandleCuda { ordinal, .. } => format!("cuda:{ordinal}"),
        }
    }

    /// The ordinals of the GPUs; none for other devices.
    pub fn gpus(&self) -> &[usize] {
        match self {
            #[cfg(feature = "cuda")]
            Self::Cuda(ordinals, _) => ordinals,
            _ => &[],
        }
    }

    /// The device for a model: this one, but bf16 on the CPU instead of int8 for gated feed-forward networks. Their products of
    /// two activations have outliers, and int8 has one scale for a whole row. How much that changes rankings can be
    /// measured with trained weights only, and has not been.
    pub fn for_model(&self, config: &ModelConfig) -> Self {
        match *self {
            Self::Cpu { dtype: CpuDtype::Int8, threads, pin_threads } if config.gated => {
                Self::Cpu { dtype: CpuDtype::Bf16, threads, pin_threads }
            }
            _ => self.clone(),
        }
    }
}

/// What to tell when [`DeviceChoice::for_model`] changes the precision of the model `name`.
pub fn gated_notice(name: &str) -> String {
    format!("{name} is computed in bf16: int8 is not measured for models with gated feed-forward layers (--dtype)")
}
