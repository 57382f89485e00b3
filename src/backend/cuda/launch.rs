//! Helpers for kernel launches, and constants shared with the CUDA sources.

use cudarc::driver::{CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchArgs, LaunchConfig, PushKernelArg};

use crate::backend::{Activation, BackendError};

/// Threads per block of the kernels that process one row per warp.
pub(super) const ROW_THREADS: u32 = 256;
/// Numbers of the elementwise functions, as in `kernels/elementwise.cuh`.
pub(super) const GELU_ERF: u32 = 0;
pub(super) const GELU_TANH: u32 = 1;
pub(super) const RELU: u32 = 2;
pub(super) const IDENTITY: u32 = 3;
pub(super) const SILU: u32 = 4;
/// In the head only.
pub(super) const TANH: u32 = 5;

/// The device address of a slice. The caller orders accesses to it with streams.
pub(super) fn device_address<T>(slice: &CudaSlice<T>, stream: &CudaStream) -> u64 {
    slice.device_ptr(stream).0
}

/// Pushes device addresses as kernel arguments, in order.
pub(super) fn push<'a, const N: usize>(arguments: &mut LaunchArgs<'a>, addresses: [&'a u64; N]) {
    for address in addresses {
        arguments.arg(address);
    }
}

/// Launches `function` on `stream`.
///
/// # Safety
/// `arguments` pushes the parameters of the kernel's signature in order, with addresses of buffers of the sizes that the kernel's
/// comment states.
pub(super) unsafe fn launch<'a>(
    stream: &'a CudaStream,
    function: &'a CudaFunction,
    grid: (usize, usize),
    block: u32,
    arguments: impl FnOnce(&mut LaunchArgs<'a>),
) -> Result<(), BackendError> {
    let mut launch = stream.launch_builder(function);
    arguments(&mut launch);
    let config =
        LaunchConfig { grid_dim: (grid.0 as u32, grid.1 as u32, 1), block_dim: (block, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: guaranteed by the caller.
    unsafe { launch.launch(config) }?;
    Ok(())
}

/// The number by which the kernels know an elementwise function.
pub(super) fn function_number(activation: Activation) -> u32 {
    match activation {
        Activation::Gelu => GELU_ERF,
        Activation::GeluTanh => GELU_TANH,
        Activation::Relu => RELU,
        Activation::Silu => SILU,
        Activation::Tanh => TANH,
    }
}
