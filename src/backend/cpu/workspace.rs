//! Matrices in reused memory. They are acquired and released thousands of times a second, so allocating each would be slow.
//!
//! Each thread has its own free list of blocks. If no free block is large enough, the largest one is replaced by a new
//! one. So a thread keeps as many blocks as it uses at the same time, and their sizes converge to those that it uses.

use std::cell::RefCell;
use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

/// The unit of memory: 64 bytes, aligned.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct CacheLine([u8; 64]);

impl CacheLine {
    /// Zeroed cache lines for at least `bytes` bytes.
    pub(super) fn zeros(bytes: usize) -> Vec<Self> {
        vec![Self::zeroed(); bytes.div_ceil(64)]
    }
}

thread_local! {
    static FREE: RefCell<Vec<Vec<CacheLine>>> = const { RefCell::new(Vec::new()) };
}

/// `[rows, columns]`, row-major. Each row begins on a cache line of its own.
#[derive(Debug)]
pub(super) struct Matrix<T> {
    lines: Vec<CacheLine>,
    rows: usize,
    columns: usize,
    stride: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Matrix<T> {
    /// Acquires memory for a matrix from this thread's free list. The contents are unspecified, but initialized.
    pub(super) fn acquire(rows: usize, columns: usize) -> Self {
        Self::with_stride(rows, columns, (columns * size_of::<T>()).div_ceil(64), 0)
    }

    /// [`Self::acquire`] with rows that are an odd number of cache lines apart, and memory for `behind` rows behind the last.
    pub(super) fn acquire_odd(rows: usize, columns: usize, behind: usize) -> Self {
        Self::with_stride(rows, columns, (columns * size_of::<T>()).div_ceil(64) | 1, behind)
    }

    fn with_stride(rows: usize, columns: usize, lines_per_row: usize, behind: usize) -> Self {
        let lines = acquire_lines((rows + behind) * lines_per_row);
        Self { lines, rows, columns, stride: lines_per_row * 64 / size_of::<T>(), element: PhantomData }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from the start of a row to the start of the next.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn row(&self, row: usize) -> &[T] {
        &self.as_slice()[row * self.stride..][..self.columns]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [T] {
        let (start, columns) = (row * self.stride, self.columns);
        &mut self.as_mut_slice()[start..][..columns]
    }

    /// The whole block: the rows with their padding, and whatever follows the last row if the block is larger.
    pub(super) fn as_slice(&self) -> &[T] {
        bytemuck::cast_slice(&self.lines)
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// A handle for threads that write disjoint parts of the matrix.
    pub(super) fn shared(&mut self) -> SharedMatrix<'_, T> {
        let (rows, stride) = (self.rows, self.stride);
        SharedMatrix { data: self.as_mut_slice().as_mut_ptr(), rows, stride, matrix: PhantomData }
    }
}

impl<T> Drop for Matrix<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // If this thread is exiting and its free list no longer exists, the block is deallocated.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}

/// Returns the smallest free block that is large enough. If there is none, allocates a block and deallocates the largest
/// free one.
fn acquire_lines(lines: usize) -> Vec<CacheLine> {
    let reused = FREE.with(|free| {
        let mut free = free.borrow_mut();
        let fitting = (0..free.len()).filter(|&i| free[i].len() >= lines).min_by_key(|&i| free[i].len());
        let largest = || (0..free.len()).max_by_key(|&i| free[i].len());
        fitting.or_else(largest).map(|i| free.swap_remove(i))
    });
    match reused {
        Some(block) if block.len() >= lines => block,
        _ => vec![CacheLine::zeroed(); lines],
    }
}

/// Handle through which several threads write disjoint parts of one matrix.
#[derive(Debug)]
pub(super) struct SharedMatrix<'a, T> {
    data: *mut T,
    rows: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Clone for SharedMatrix<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for SharedMatrix<'_, T> {}

// SAFETY: the pointer is into a matrix that is mutably borrowed for as long as the handle lives. Callers of `row`
// guarantee that threads do not write the same elements.
unsafe impl<T: Send> Send for SharedMatrix<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for SharedMatrix<'_, T> {}

impl<T> SharedMatrix<'_, T> {
    /// The start of a row.
    ///
    /// # Safety
    /// The matrix has this row. Accesses through the pointer stay within the row and its padding, and no other thread writes the
    /// same elements at the same time.
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize) -> *mut T {
        debug_assert!(row < self.rows);
        // SAFETY: the caller guarantees that the matrix has this row, so the pointer stays within its memory.
        unsafe { self.data.add(row * self.stride) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn released_memory_is_reused() {
        std::thread::spawn(|| {
            for round in 1..=20 {
                let a = Matrix::<f32>::acquire(round, 100);
                let b = Matrix::<u16>::acquire(10, 33);
                assert_eq!((a.rows(), a.row(round - 1).len(), b.row(9).len()), (round, 100, 33));
                assert_eq!(b.row(9).as_ptr().align_offset(64), 0);
            }
            FREE.with(|free| assert_eq!(free.borrow().len(), 2));
        })
        .join()
        .unwrap();
    }
}
