//! Matrix products of a device's library, against plain loops in f64.

use fastkv::{
    abi::Rows,
    kernels::{DType, Matmul, MatrixProduct},
};

use super::{
    Check, all,
    memory::Memory,
    number::{decode, encode, rounded, rounding, within},
    random::Random,
};

#[derive(Clone, Copy, Debug)]
struct Case {
    rows: usize,
    columns: usize,
    inner: usize,
    /// Elements between rows, beyond their width.
    gap: usize,
    dtype: DType,
    out_dtype: DType,
    bias: bool,
    accumulate: bool,
    seed: u64,
}

pub(crate) fn checks<D: MatrixProduct>() -> Vec<Check<D>> {
    vec![Check::portable("matmul", |device, seed| {
        let mut random = Random(seed);
        let sizes = [(1, 8, 8), (3, 40, 24), (17, 33, 64), (0, 8, 8), (2, 1, 128)];
        let cases = sizes.map(|(rows, columns, inner)| {
            let dtype = random.of(&[DType::F16, DType::BF16]);
            let out_dtype = random.of(&[dtype, DType::F32]);
            Case {
                rows,
                columns,
                inner,
                gap: 8 * random.below(3) + columns.next_multiple_of(8) - columns,
                dtype,
                out_dtype,
                bias: random.below(2) == 0,
                accumulate: out_dtype == DType::F32 && random.below(2) == 0,
                seed: random.next(),
            }
        });
        all(cases, |case| check(device, case))
    })]
}

fn check<D: MatrixProduct>(device: &D, case: &Case) -> Result<(), String> {
    let Case { rows, columns, inner, gap, dtype, out_dtype, .. } = *case;
    let mut memory = Memory::new(device);
    let mut random = Random(case.seed);
    let mut numbers = |dtype, count: usize| -> Vec<f64> {
        (0..count).map(|_| rounded(dtype, random.symmetric().into())).collect()
    };
    let inner_stride = inner + 8;
    let stride = columns + gap;
    let (x, weight) = (numbers(dtype, rows * inner_stride), numbers(dtype, columns * inner_stride));
    let (bias, before) = (numbers(out_dtype, columns), numbers(out_dtype, rows * stride));
    let mut put = |dtype, numbers: &[f64]| memory.put(&encode(dtype, numbers.iter().copied()));
    let matrix = |base, stride: usize| Rows { base, token_stride: stride as i64, ..Rows::default() };
    let mut work = Matmul {
        x: matrix(put(dtype, &x), inner_stride),
        weight: matrix(put(dtype, &weight), inner_stride),
        bias: if case.bias { put(out_dtype, &bias) } else { 0 },
        out: matrix(put(out_dtype, &before), stride),
        accumulate: case.accumulate,
        rows: rows as u32,
        columns: columns as u32,
        inner: inner as u32,
        dtype,
        out_dtype,
        workspace: 0,
        workspace_bytes: device.matmul_workspace().map_err(|error| error.to_string())?,
    };
    work.workspace = memory.reserve(work.workspace_bytes);
    // SAFETY: every address is a block of `memory` of the size that is described.
    unsafe { device.matmul(&work) }.map_err(|error| error.to_string())?;
    let expected: Vec<_> = (0..rows * stride)
        .map(|at| {
            let (row, column) = (at / stride, at % stride);
            if column >= columns {
                return (before[at], 0.0);
            }
            let products = (0..inner).map(|i| x[row * inner_stride + i] * weight[column * inner_stride + i]);
            let magnitude: f64 = products.clone().map(f64::abs).sum();
            let bias = if case.bias { bias[column] } else { 0.0 };
            let before = if case.accumulate { before[at] } else { 0.0 };
            let sum = products.sum::<f64>() + bias + before;
            // Products are exact in f32; each of the sums may be cut off at f32's last bit.
            let error = (magnitude + bias.abs() + before.abs()) * (inner + 2) as f64 / (1 << 23) as f64;
            (sum, error + rounding(out_dtype, sum))
        })
        .collect();
    let found = memory.get(work.out.base, rows * stride * out_dtype.bytes() as usize)?;
    within("out", &decode(out_dtype, &found), &expected)
}
