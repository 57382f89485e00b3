//! What the driver's and the libraries' errors mean for us: try smaller, give this batch up, or end the process.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::backend::BackendError;

/// What the driver says of the recording of a graph, from CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED to
/// CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD.
const CAPTURE_ERRORS: std::ops::RangeInclusive<u32> = 900..=908;

/// A lack of memory passes, and a graph that cannot be recorded harms nothing. After any other error of the driver the context may
/// be poisoned, where every later call fails with the same code: a process that stays up answers nothing but errors.
impl From<DriverError> for BackendError {
    fn from(error: DriverError) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory(Box::new(error)),
            code if CAPTURE_ERRORS.contains(&(code as u32)) => Self::Failed(Box::new(error)),
            _ => Self::DeviceLost(Box::new(error)),
        }
    }
}

/// cuBLASLt's word is never that the device is lost. Where it is, the driver says so when the batch is waited for, and its word
/// counts (`ExecContext::run`).
impl From<CublasError> for BackendError {
    fn from(error: CublasError) -> Self {
        match error.0 {
            cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Self::OutOfMemory(Box::new(error)),
            _ => Self::Failed(Box::new(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_lost_where_the_driver_says_so_and_only_there() {
        let kind = |error: BackendError| match error {
            BackendError::OutOfMemory(_) => "memory",
            BackendError::Failed(_) => "failed",
            BackendError::DeviceLost(_) => "lost",
        };
        for (code, expected) in [
            (CUresult::CUDA_ERROR_OUT_OF_MEMORY, "memory"),
            (CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, "failed"),
            (CUresult::CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD, "failed"),
            (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "lost"),
            (CUresult::CUDA_ERROR_LAUNCH_FAILED, "lost"),
            (CUresult::CUDA_ERROR_UNKNOWN, "lost"),
        ] {
            assert_eq!(kind(DriverError(code).into()), expected, "{code:?}");
        }
        for (status, expected) in [
            (cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED, "memory"),
            (cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED, "failed"),
            (cublasStatus_t::CUBLAS_STATUS_NOT_SUPPORTED, "failed"),
        ] {
            assert_eq!(kind(CublasError(status).into()), expected, "{status:?}");
        }
    }
}
