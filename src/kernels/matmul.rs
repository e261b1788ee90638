//! Matrix products: the one thing on a device that is a library's and not a kernel of this crate.

use super::{
    DType, Device, Error,
    check::{Presence, count, disjoint, matrix, pieces, range},
};
use crate::abi::Rows;

/// A device with matrix products.
pub trait MatrixProduct: Device {
    /// Bytes of scratch memory that [`matmul`](Self::matmul) makes use of; with less it may be slower.
    ///
    /// # Errors
    /// [`Error::Library`] where the library for products is not installed; ask before there is work.
    fn matmul_workspace(&self) -> Result<usize, Error>;

    /// Queues a product. With no rows it queues nothing.
    ///
    /// # Errors
    /// [`Error::Argument`] for a description that cannot be right; nothing was queued then. Otherwise
    /// what the device says.
    ///
    /// # Safety
    /// Every address in `work` is 0 where that is allowed, or device memory of the size its comment
    /// states, until the product is done. Nothing else touches `out` or the workspace meanwhile, and
    /// nothing writes the rest.
    unsafe fn matmul(&self, work: &Matmul) -> Result<(), Error>;
}

/// `out = x . weight^T + bias`, or `out += ...`: products of 16-bit numbers, sums in f32, one rounding at
/// the end. `sequence_stride` and `head_stride` of matrices are not used.
#[derive(Clone, Copy, Debug, Default)]
pub struct Matmul {
    /// `[rows, inner]` of `dtype`.
    pub x: Rows,
    /// `[columns, inner]` of `dtype`, as Hugging Face stores a linear layer.
    pub weight: Rows,
    /// Address of `[columns]` of `out_dtype`, which is what cuBLASLt adds to sums. 0: none.
    pub bias: u64,
    /// `[rows, columns]` of `out_dtype`; does not overlap the rest.
    pub out: Rows,
    /// Whether the product is added to what `out` holds, in F32: cuBLASLt may round a product before it adds it to
    /// 16-bit numbers.
    pub accumulate: bool,
    /// Rows of `x` and of `out`.
    pub rows: u32,
    /// Rows of the weight, columns of `out`.
    pub columns: u32,
    /// Columns of `x` and of the weight, a multiple of 8.
    pub inner: u32,
    /// Element type of `x` and of the weight, of 16 bits.
    pub dtype: DType,
    /// Element type of `out` and of the bias: `dtype`, or F32.
    pub out_dtype: DType,
    /// Address of scratch memory, aligned to 256 bytes. 0: none.
    pub workspace: u64,
    /// Bytes of it.
    pub workspace_bytes: usize,
}

impl Matmul {
    /// Whether there is anything to do; what every implementation asks first.
    ///
    /// # Errors
    /// [`Error::Argument`] for a description that cannot be right.
    pub fn check(&self) -> Result<bool, Error> {
        let Self { rows, columns, inner, dtype, out_dtype, .. } = *self;
        pieces("inner", inner)?;
        if columns == 0 || columns > MAX_COLUMNS {
            return Err(Error::argument("columns", columns, format!("from 1 to {MAX_COLUMNS}")));
        }
        if dtype == DType::F32 {
            return Err(Error::argument("dtype", format!("{dtype:?}"), "F16 or BF16"));
        }
        if out_dtype != dtype && out_dtype != DType::F32 {
            return Err(Error::argument("out_dtype", format!("{out_dtype:?}"), format!("{dtype:?} or F32")));
        }
        if self.accumulate && out_dtype != DType::F32 {
            let value = format!("{out_dtype:?}");
            return Err(Error::argument("out_dtype", value, "F32, to accumulate without rounding twice"));
        }
        if count("rows", rows)? == 0 {
            return Ok(false);
        }
        let out = matrix("out", &self.out, [rows, columns], out_dtype)?;
        let bias = range("bias", self.bias, columns.into(), out_dtype.bytes(), Presence::Optional)?;
        let bytes = self.workspace_bytes as i128;
        let workspace = range("workspace", self.workspace, bytes, 1, Presence::Optional)?;
        if !self.workspace.is_multiple_of(256) {
            let value = format!("{:#x}", self.workspace);
            return Err(Error::argument("workspace", value, "a multiple of 256"));
        }
        for (name, source) in [
            ("x", matrix("x", &self.x, [rows, inner], dtype)?),
            ("weight", matrix("weight", &self.weight, [columns, inner], dtype)?),
            ("bias", bias),
            ("workspace", workspace),
        ] {
            disjoint("out", &out, name, &source)?;
        }
        Ok(true)
    }
}

/// Above every vocabulary, and low enough for the 32-bit sizes of a library.
const MAX_COLUMNS: u32 = 1 << 28;
