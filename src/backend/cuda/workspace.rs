//! Memory of an execution context: one device allocation for activations, divided by a first-fit allocator, and pinned host memory.
//! Operations allocate from it and never from the driver, and batches of the same layout get the same addresses.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream, result};

use super::batch_layout::Layout;
use super::launch::device_address;
use crate::backend::BackendError;

/// Alignment in bytes of a region's start and length; sufficient for all loads of the kernels and of cuBLASLt.
pub(super) const ALIGNMENT: usize = 256;

/// Bytes of GPU memory that stay free for the driver, or a twentieth of the GPU's memory if that is less.
const MAX_KEPT_FREE: usize = 256 << 20;

/// Device and pinned memory for batches of up to `tokens` tokens.
#[derive(Debug)]
pub(super) struct ContextMemory {
    pub(super) tokens: usize,
    pub(super) activations: CudaSlice<u8>,
    pub(super) base: u64,
    pub(super) workspace: Workspace,
    pub(super) upload: Pinned<u32>,
    _upload_device: CudaSlice<u8>,
    pub(super) upload_at: u64,
    pub(super) download: Pinned<f32>,
}

/// First-fit allocator of the byte range `0..length`. Adjacent free ranges are merged.
#[derive(Debug, Clone)]
pub(super) struct Workspace(Arc<Mutex<Vec<Range<usize>>>>);

/// An allocated range, freed on drop. It can be reused at once: kernels of the next owner run on the same stream, after those of the
/// previous one.
#[derive(Debug)]
pub(super) struct Region {
    bytes: Range<usize>,
    workspace: Workspace,
}

impl Workspace {
    pub(super) fn new(length: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0..length / ALIGNMENT * ALIGNMENT])))
    }

    /// Allocates at least `length` bytes, or returns `None` if no free range is large enough.
    pub(super) fn allocate(&self, length: usize) -> Option<Region> {
        let length = length.max(1).next_multiple_of(ALIGNMENT);
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let i = free.iter().position(|range| range.len() >= length)?;
        let start = free[i].start;
        free[i].start += length;
        if free[i].is_empty() {
            free.remove(i);
        }
        Some(Region { bytes: start..start + length, workspace: self.clone() })
    }
}

impl Region {
    /// Offset in bytes from the workspace's start.
    pub(super) fn offset(&self) -> usize {
        self.bytes.start
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut free = self.workspace.0.lock().unwrap_or_else(PoisonError::into_inner);
        let i = free.partition_point(|range| range.start < self.bytes.start);
        free.insert(i, self.bytes.clone());
        for left in [i, i.saturating_sub(1)] {
            if left + 1 < free.len() && free[left].end == free[left + 1].start {
                free[left].end = free[left + 1].end;
                free.remove(left + 1);
            }
        }
    }
}

impl ContextMemory {
    /// # Errors
    /// [`BackendError::OutOfMemory`], also if less than [`MAX_KEPT_FREE`] would stay free: the driver allocates memory for graphs and
    /// when a kernel first runs, and a failure there is fatal.
    pub(super) fn new(stream: &Arc<CudaStream>, tokens: usize, token_bytes: usize) -> Result<Self, BackendError> {
        let layout = Layout::largest(tokens);
        let activations = stream.alloc_zeros::<u8>(layout.token_rows * token_bytes)?;
        let upload_device = stream.alloc_zeros::<u8>(layout.len() * 4)?;
        let (free, total) = result::mem_get_info()?;
        let kept = MAX_KEPT_FREE.min(total / 20);
        if free < kept {
            // Freed on the stream, so returned to the driver by the synchronization.
            drop((activations, upload_device));
            stream.synchronize()?;
            return Err(BackendError::OutOfMemory(
                format!(
                    "{} MiB of GPU memory would remain free, but {} MiB are reserved for the driver",
                    free >> 20,
                    kept >> 20
                )
                .into(),
            ));
        }
        Ok(Self {
            tokens,
            base: device_address(&activations, stream),
            workspace: Workspace::new(activations.len()),
            activations,
            upload: Pinned::new(layout.len())?,
            upload_at: device_address(&upload_device, stream),
            _upload_device: upload_device,
            download: Pinned::new(layout.sequence_rows)?,
        })
    }
}

/// Pinned host memory, which the GPU accesses directly.
#[derive(Debug)]
pub(super) struct Pinned<T> {
    pub(super) at: *mut T,
    pub(super) length: usize,
}

// SAFETY: plain memory with a single owner.
unsafe impl<T: Send> Send for Pinned<T> {}

impl<T: bytemuck::Pod> Pinned<T> {
    fn new(length: usize) -> Result<Self, BackendError> {
        let bytes = length * size_of::<T>();
        // SAFETY: the driver returns `bytes` bytes, page-aligned; zeros are valid values of a Pod type.
        unsafe {
            let at = result::malloc_host(bytes, 0)?;
            std::ptr::write_bytes(at.cast::<u8>(), 0, bytes);
            Ok(Self { at: at.cast(), length })
        }
    }

    pub(super) fn values(&self) -> &[T] {
        // SAFETY: `length` initialized values; the GPU does not write them now, see `ExecContext::download`.
        unsafe { std::slice::from_raw_parts(self.at, self.length) }
    }

    pub(super) fn values_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.length) }
    }
}

impl<T> Drop for Pinned<T> {
    fn drop(&mut self) {
        // SAFETY: from `malloc_host`; contexts synchronize their stream before they drop memory.
        unsafe { result::free_host(self.at.cast()) }.ok();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn regions_never_overlap_and_are_all_freed(steps in prop::collection::vec((1usize..5000, 0usize..8), 1..60)) {
            let workspace = Workspace::new(40_000);
            let mut held: Vec<Region> = Vec::new();
            for (length, drop_at) in steps {
                if let Some(region) = workspace.allocate(length) {
                    prop_assert!(region.bytes.len() >= length && region.bytes.end <= 40_000);
                    prop_assert!(region.offset() % ALIGNMENT == 0);
                    for other in &held {
                        prop_assert!(region.bytes.end <= other.bytes.start || other.bytes.end <= region.bytes.start);
                    }
                    held.push(region);
                }
                if drop_at < held.len() {
                    held.swap_remove(drop_at);
                }
            }
            drop(held);
            prop_assert_eq!(workspace.allocate(39_000).map(|region| region.offset()), Some(0));
        }
    }

    #[test]
    fn the_same_requests_get_the_same_addresses() {
        let workspace = Workspace::new(1 << 16);
        let run = || {
            let (a, b) = (workspace.allocate(5000).unwrap(), workspace.allocate(300).unwrap());
            drop(a);
            let c = workspace.allocate(4000).unwrap();
            (b.offset(), c.offset())
        };
        assert_eq!(run(), run());
        assert!(workspace.allocate(1 << 17).is_none());
    }
}
