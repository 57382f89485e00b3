//! What the driver's and the libraries' errors mean for us: try smaller, give this batch up, or end the process.

use cudarc::cublaslt::result::CublasError;
use cudarc::cublaslt::sys::cublasStatus_t;
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUresult;

use crate::backend::BackendError;

/// Only a lack of memory passes. After any other error of the driver the context may be poisoned, where every later call fails
/// with the same code: a process that stays up answers nothing but errors.
impl From<DriverError> for BackendError {
    fn from(error: DriverError) -> Self {
        match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => Self::OutOfMemory(Box::new(error)),
            _ => Self::DeviceLost(Box::new(error)),
        }
    }
}

impl From<CublasError> for BackendError {
    fn from(error: CublasError) -> Self {
        match error.0 {
            cublasStatus_t::CUBLAS_STATUS_ALLOC_FAILED => Self::OutOfMemory(Box::new(error)),
            cublasStatus_t::CUBLAS_STATUS_EXECUTION_FAILED | cublasStatus_t::CUBLAS_STATUS_INTERNAL_ERROR => {
                Self::DeviceLost(Box::new(error))
            }
            _ => Self::Failed(Box::new(error)),
        }
    }
}
