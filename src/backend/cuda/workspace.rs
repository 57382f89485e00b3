//! Which parts of a ctx's memory are in use. Everything of one batch comes from one allocation that was made at start, so
//! nothing is allocated while batches run, and a batch of the same sizes finds the same addresses.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// What a region's start and length are multiples of, in bytes: what every load of the kernels and of cuBLASLt is content with.
pub(super) const ALIGNMENT: usize = 256;

/// The free parts of `0..length`: first fit, neighbours joined.
#[derive(Debug, Clone)]
pub(super) struct Workspace(Arc<Mutex<Vec<Range<usize>>>>);

/// A part in use. Dropping it gives it back: what was launched on the ctx's stream before is done with it before whatever
/// takes it next, since that is launched on the same stream.
#[derive(Debug)]
pub(super) struct Region {
    bytes: Range<usize>,
    workspace: Workspace,
}

impl Workspace {
    pub(super) fn new(length: usize) -> Self {
        Self(Arc::new(Mutex::new(vec![0..length / ALIGNMENT * ALIGNMENT])))
    }

    /// At least `length` bytes, or `None` where no free part has so many.
    pub(super) fn take(&self, length: usize) -> Option<Region> {
        let length = length.max(1).next_multiple_of(ALIGNMENT);
        let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let i = free.iter().position(|part| part.len() >= length)?;
        let start = free[i].start;
        free[i].start += length;
        if free[i].is_empty() {
            free.remove(i);
        }
        Some(Region { bytes: start..start + length, workspace: self.clone() })
    }
}

impl Region {
    /// Bytes from the workspace's start.
    pub(super) fn offset(&self) -> usize {
        self.bytes.start
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut free = self.workspace.0.lock().unwrap_or_else(PoisonError::into_inner);
        let i = free.partition_point(|part| part.start < self.bytes.start);
        free.insert(i, self.bytes.clone());
        for left in [i, i.saturating_sub(1)] {
            if left + 1 < free.len() && free[left].end == free[left + 1].start {
                free[left].end = free[left + 1].end;
                free.remove(left + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn regions_never_overlap_and_all_comes_back(steps in prop::collection::vec((1usize..5000, 0usize..8), 1..60)) {
            let workspace = Workspace::new(40_000);
            let mut held: Vec<Region> = Vec::new();
            for (length, drop_at) in steps {
                if let Some(region) = workspace.take(length) {
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
            prop_assert_eq!(workspace.take(39_000).map(|region| region.offset()), Some(0));
        }
    }

    #[test]
    fn the_same_requests_find_the_same_addresses() {
        let workspace = Workspace::new(1 << 16);
        let run = || {
            let (a, b) = (workspace.take(5000).unwrap(), workspace.take(300).unwrap());
            drop(a);
            let c = workspace.take(4000).unwrap();
            (b.offset(), c.offset())
        };
        assert_eq!(run(), run());
        assert!(workspace.take(1 << 17).is_none());
    }
}
