//! Matrix products of f32 on the calling thread, by the gemm crate. One place for its raw pointers.

use std::marker::PhantomData;

use gemm::Parallelism;

/// A matrix in a slice.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// `rows × columns`, row-major without gaps.
    pub(super) fn new(data: &'a [f32], rows: usize, columns: usize) -> Self {
        assert!(data.len() >= rows * columns, "{rows}×{columns} matrix in {} elements", data.len());
        Self { data, rows, columns, row_stride: columns, column_stride: 1 }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix that several threads fill, each its own tile.
pub(super) struct Tiles<'a> {
    start: *mut f32,
    rows: usize,
    columns: usize,
    matrix: PhantomData<&'a mut [f32]>,
}

// SAFETY: the only access is `multiply_tile`, whose contract keeps concurrent tiles apart.
unsafe impl Sync for Tiles<'_> {}

impl<'a> Tiles<'a> {
    pub(super) fn new(data: &'a mut [f32], rows: usize, columns: usize) -> Self {
        assert_eq!(data.len(), rows * columns);
        Self { start: data.as_mut_ptr(), rows, columns, matrix: PhantomData }
    }

    /// Writes `lhs · rhs` to the tile whose first element is (`row`, `column`).
    ///
    /// # Safety
    /// No other thread may touch that tile meanwhile.
    pub(super) unsafe fn multiply_tile(&self, row: usize, column: usize, lhs: Matrix<'_>, rhs: Matrix<'_>) {
        assert!(row + lhs.rows <= self.rows && column + rhs.columns <= self.columns);
        // SAFETY: the tile lies inside the matrix (just checked), and the caller has it alone.
        unsafe {
            product(self.start.add(row * self.columns + column), self.columns, lhs, rhs, false);
        }
    }
}

/// `out = lhs · rhs`, or `out += lhs · rhs`; `out` is row-major without gaps.
pub(super) fn multiply(out: &mut [f32], lhs: Matrix<'_>, rhs: Matrix<'_>, accumulate: bool) {
    assert!(out.len() >= lhs.rows * rhs.columns);
    // SAFETY: `out` holds rows × columns elements (just checked) and is borrowed mutably.
    unsafe { product(out.as_mut_ptr(), rhs.columns, lhs, rhs, accumulate) }
}

/// # Safety
/// `out` must be valid for `lhs.rows` rows of `rhs.columns` elements, `out_stride` apart.
unsafe fn product(out: *mut f32, out_stride: usize, lhs: Matrix<'_>, rhs: Matrix<'_>, accumulate: bool) {
    assert_eq!(lhs.columns, rhs.rows);
    // SAFETY: the operands' extents were checked when they were made; `out` by the caller.
    unsafe {
        gemm::gemm(
            lhs.rows,
            rhs.columns,
            lhs.columns,
            out,
            1,
            out_stride as isize,
            accumulate,
            lhs.data.as_ptr(),
            lhs.column_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.column_stride as isize,
            rhs.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}
