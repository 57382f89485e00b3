//! Maps errors of the driver and of cuBLASLt: retry with less memory, fail the batch, or end the process.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::backend::BackendError;

/// Errors of graph capture: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED to CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD.
const CAPTURE_ERRORS: std::ops::RangeInclusive<u32> = 900..=908;

/// Lack of memory is temporary, and a failed capture does no harm. After any other driver error the CUDA context may be
/// corrupted, and then every later call fails with the same code: the process must end.
impl From<DriverError> for BackendError {
    fn from(error: DriverError) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory(Box::new(error)),
            code if CAPTURE_ERRORS.contains(&(code as u32)) => Self::Failed(Box::new(error)),
            _ => Self::DeviceLost(Box::new(error)),
        }
    }
}

/// A cuBLASLt error never means that the device is lost: if it is, the synchronization at the end of `ExecContext::run` reports it.
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
    fn only_fatal_driver_errors_mean_a_lost_device() {
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
