//! Products with weights. Weights stay as they are stored, mapped into memory; a panel of them is
//! widened to f32 just before it is used, so that a 16-bit model takes no more than its file.

use std::cell::RefCell;

use rayon::prelude::*;

use super::gemm::{Matrix, Tiles};
use super::tensor::Tensor;
use super::weight::Weight;
use crate::backend::BackendError;

/// Output features of a panel.
const PANEL: usize = 256;
/// Rows of activations of a tile at most; enough to make widening a panel cheap beside its products.
const TILE_ROWS: usize = 512;

/// `x · weightᵀ + bias`.
pub(super) fn linear(x: &Tensor, weight: &Weight, bias: Option<&Weight>) -> Result<Tensor, BackendError> {
    let (features, width) = weight.matrix("linear")?;
    if x.width != width {
        return Err(BackendError::Shape {
            operation: "linear",
            problem: format!("rows of {} elements times a weight of {features} × {width}", x.width),
        });
    }
    let mut out = Tensor::zeros("activations", x.rows, features)?;
    let threads = rayon::current_num_threads();
    let tile_rows = x.rows.div_ceil(threads).clamp(1, TILE_ROWS);
    // Few rows (decode) leave only the features to share among the threads.
    let panel = if x.rows >= 2 * threads { PANEL } else { features.div_ceil(4 * threads).clamp(16, PANEL) };
    let tiles: Vec<(usize, usize)> = (0..x.rows)
        .step_by(tile_rows)
        .flat_map(|row| (0..features).step_by(panel).map(move |feature| (row, feature)))
        .collect();
    let product = Tiles::new(&mut out.data, x.rows, features);
    tiles.into_par_iter().for_each(|(row, feature)| {
        let rows = tile_rows.min(x.rows - row);
        let columns = panel.min(features - feature);
        let lhs = Matrix::new(&x.data[row * width..(row + rows) * width], rows, width);
        SCRATCH.with_borrow_mut(|scratch| {
            let panel = weight.widened(feature * width..(feature + columns) * width, scratch);
            let rhs = Matrix::new(panel, columns, width).transposed();
            // SAFETY: tiles do not overlap: each begins at its own multiple of rows and features.
            unsafe { product.multiply_tile(row, feature, lhs, rhs) }
        });
    });
    if let Some(bias) = bias {
        let bias = bias.vector("linear", features)?;
        for row in out.data.chunks_exact_mut(features) {
            super::simd::add_scaled(row, bias, 1.0);
        }
    }
    Ok(out)
}

thread_local! {
    /// The panel that a thread is widening.
    static SCRATCH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}
