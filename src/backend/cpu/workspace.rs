//! Rows of numbers in scratch memory that is taken and given back thousands of times a second and stays flat.
//!
//! Each thread keeps its own free list. A block that is too small for what is asked is let go and a larger one made, so a
//! thread's blocks settle at the largest sizes that its work has needed, and as many as it has needed at once.

use std::cell::RefCell;
use std::marker::PhantomData;

use bytemuck::{Pod, Zeroable};

/// A cache line, so that every row begins on one.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C, align(64))]
pub(super) struct Line([u8; 64]);

impl Line {
    /// Zeros for `bytes` bytes.
    pub(super) fn zeros(bytes: usize) -> Vec<Self> {
        vec![Self::zeroed(); bytes.div_ceil(64)]
    }
}

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// `[rows, columns]`, row-major, each row on a cache line of its own.
#[derive(Debug)]
pub(super) struct Matrix<T> {
    lines: Vec<Line>,
    rows: usize,
    columns: usize,
    stride: usize,
    element: PhantomData<T>,
}

impl<T: Pod> Matrix<T> {
    /// Takes memory for a matrix from this thread's free list. What is in it is unspecified, and never uninitialised.
    pub(super) fn take(rows: usize, columns: usize) -> Self {
        let stride = (columns * size_of::<T>()).next_multiple_of(64) / size_of::<T>();
        let lines = take_lines((rows * stride * size_of::<T>()) / 64);
        Self { lines, rows, columns, stride, element: PhantomData }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// Elements from one row's begin to the next one's.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    pub(super) fn row(&self, row: usize) -> &[T] {
        &self.all()[row * self.stride..][..self.columns]
    }

    pub(super) fn row_mut(&mut self, row: usize) -> &mut [T] {
        let (start, columns) = (row * self.stride, self.columns);
        &mut self.all_mut()[start..][..columns]
    }

    /// Every element, the rows' ends that nobody reads included.
    pub(super) fn all(&self) -> &[T] {
        bytemuck::cast_slice(&self.lines)
    }

    pub(super) fn all_mut(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.lines)
    }

    /// For threads that write different parts of it.
    pub(super) fn shared(&mut self) -> Shared<'_, T> {
        let (rows, stride) = (self.rows, self.stride);
        Shared { data: self.all_mut().as_mut_ptr(), rows, stride, matrix: PhantomData }
    }
}

impl<T> Drop for Matrix<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        // A thread that is ending has no list any more; its blocks go back to the allocator.
        let _ = FREE.try_with(|free| free.borrow_mut().push(lines));
    }
}

/// The smallest free block that is large enough, or a new one in place of the largest that is not.
fn take_lines(lines: usize) -> Vec<Line> {
    let reused = FREE.with(|free| {
        let mut free = free.borrow_mut();
        let fitting = (0..free.len()).filter(|&i| free[i].len() >= lines).min_by_key(|&i| free[i].len());
        let largest = || (0..free.len()).max_by_key(|&i| free[i].len());
        fitting.or_else(largest).map(|i| free.swap_remove(i))
    });
    match reused {
        Some(block) if block.len() >= lines => block,
        _ => vec![Line::zeroed(); lines],
    }
}

/// A matrix while several threads write it, each its own part.
#[derive(Debug)]
pub(super) struct Shared<'a, T> {
    data: *mut T,
    rows: usize,
    stride: usize,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<'_, T> {}

// SAFETY: it is a pointer into a matrix that outlives it and that nobody else touches meanwhile; what threads do with it is
// promised where they call `row`.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<T> Shared<'_, T> {
    /// The beginning of a row.
    ///
    /// # Safety
    /// What is read or written through it is within the row, and no other thread writes the same elements meanwhile.
    #[inline(always)]
    pub(super) unsafe fn row(&self, row: usize) -> *mut T {
        debug_assert!(row < self.rows);
        // SAFETY: `row` is one of the matrix, so this is within its memory.
        unsafe { self.data.add(row * self.stride) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_reused_and_settles() {
        std::thread::spawn(|| {
            for round in 1..=20 {
                let a = Matrix::<f32>::take(round, 100);
                let b = Matrix::<u16>::take(10, 33);
                assert_eq!((a.rows(), a.row(round - 1).len(), b.row(9).len()), (round, 100, 33));
                assert_eq!(b.row(9).as_ptr().align_offset(64), 0);
            }
            FREE.with(|free| assert_eq!(free.borrow().len(), 2));
        })
        .join()
        .unwrap();
    }
}
