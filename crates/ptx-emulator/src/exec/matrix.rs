//! Matrices spread over the lanes of a warp: `ldmatrix`, `stmatrix`, `movmatrix`, `mma.sync`.

use super::{Cluster, Flow, Step, lanes, warp::then};
use crate::{
    error::Stop,
    isa::{Address, MatrixType, Op, Operand},
    number::{BF16, F16, F32, Format, Lanes, Rounding},
};

/// Rows of an 8 x 8 matrix of 16-bit elements are this many bytes.
const ROW_BYTES: u32 = 16;

impl Cluster<'_> {
    pub(super) fn matrix_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        if !self.rendezvous(w, pc, active, u32::MAX)? {
            return Ok(Flow::Block(active));
        }
        match op {
            Op::LoadMatrix { count, transposed, d, address } => {
                self.load_matrix(w, *count, *transposed, d, *address)?;
            }
            Op::StoreMatrix { count, transposed, address, a } => {
                self.store_matrix(w, *count, *transposed, *address, a)?;
            }
            Op::TransposeMatrix { d, a } => {
                let mut elements = [[0_u16; 8]; 8];
                scatter(&mut elements, &self.value(w, *a), false);
                self.warps[w].set(*d, &gathered(&elements, true), u32::MAX);
            }
            Op::MultiplyMatrix { input, half_result, k, d, a, b, c } => {
                let gather = |operands: &[Operand]| -> Vec<Lanes> {
                    operands.iter().map(|operand| self.value(w, *operand)).collect()
                };
                let (a, b, c) = (gather(a), gather(b), gather(c));
                let results = multiply(*input, *half_result, *k as usize, &a, &b, &c);
                for (d, result) in d.iter().zip(&results) {
                    self.warps[w].set(*d, result, u32::MAX);
                }
                self.counters.matrix_products += 1;
            }
            other => unreachable!("{other:?} is not about matrices"),
        }
        Ok(then(active, u32::MAX))
    }

    /// Lane `8 m + r` says where row `r` of matrix `m` lies.
    fn load_matrix(
        &mut self,
        w: usize,
        count: u32,
        transposed: bool,
        d: &[u32],
        address: Address,
    ) -> Result<(), Stop> {
        let addresses = self.addresses(w, address);
        self.counters.shared_requests += 1;
        for (matrix, d) in (0..count as usize).zip(d) {
            let rows = 8 * matrix..8 * matrix + 8;
            self.counters.shared_passes(rows.clone().map(|lane| addresses[lane]), ROW_BYTES);
            let mut elements = [[0_u16; 8]; 8];
            for (row, lane) in elements.iter_mut().zip(rows) {
                let at = self.access_shared(w, lane, addresses[lane], ROW_BYTES, false)?;
                for (pair, word) in row.chunks_mut(2).zip(0..) {
                    let word = self.cta(w).shared.load(at + 4 * word, 4) as u32;
                    pair.copy_from_slice(&[word as u16, (word >> 16) as u16]);
                }
            }
            self.warps[w].set(*d, &gathered(&elements, transposed), u32::MAX);
        }
        Ok(())
    }

    fn store_matrix(
        &mut self,
        w: usize,
        count: u32,
        transposed: bool,
        address: Address,
        a: &[Operand],
    ) -> Result<(), Stop> {
        let addresses = self.addresses(w, address);
        self.counters.shared_requests += 1;
        for (matrix, a) in (0..count as usize).zip(a) {
            let rows = 8 * matrix..8 * matrix + 8;
            self.counters.shared_passes(rows.clone().map(|lane| addresses[lane]), ROW_BYTES);
            let mut elements = [[0_u16; 8]; 8];
            scatter(&mut elements, &self.value(w, *a), transposed);
            for (row, lane) in elements.iter().zip(rows) {
                let at = self.access_shared(w, lane, addresses[lane], ROW_BYTES, true)?;
                for (element, offset) in row.iter().zip((0..).step_by(2)) {
                    self.cta_mut(w).shared.store(at + offset, 2, u64::from(*element));
                }
            }
        }
        Ok(())
    }
}

/// Row and column of the two elements of an 8 x 8 matrix that a lane holds.
fn held(lane: usize, transposed: bool) -> [(usize, usize); 2] {
    let (group, first) = (lane / 4, 2 * (lane % 4));
    if transposed { [(first, group), (first + 1, group)] } else { [(group, first), (group, first + 1)] }
}

/// What the lanes hold of a matrix.
fn gathered(elements: &[[u16; 8]; 8], transposed: bool) -> Lanes {
    std::array::from_fn(|lane| {
        let [first, second] = held(lane, transposed).map(|(row, column)| elements[row][column]);
        u64::from(first) | u64::from(second) << 16
    })
}

/// The matrix of what the lanes hold.
fn scatter(elements: &mut [[u16; 8]; 8], values: &Lanes, transposed: bool) {
    for lane in lanes(u32::MAX) {
        let [first, second] = held(lane, transposed);
        elements[first.0][first.1] = values[lane] as u16;
        elements[second.0][second.1] = (values[lane] >> 16) as u16;
    }
}

/// `d[16][8] = a[16][k] * b[k][8] + c[16][8]`. Products of 16-bit numbers are exact; they and `c` are
/// added in f64 and rounded once, where hardware rounds a little more often.
fn multiply(
    input: MatrixType,
    half_result: bool,
    k: usize,
    a: &[Lanes],
    b: &[Lanes],
    c: &[Lanes],
) -> Vec<Lanes> {
    let format = match input {
        MatrixType::F16 => F16,
        MatrixType::BF16 => BF16,
    };
    let pair = |register: u64| [register & 0xffff, register >> 16 & 0xffff].map(|bits| decode(format, bits));
    // Rows of a, and columns of b, so that the innermost loop walks along both.
    let mut rows = [[0.0_f64; 16]; 16];
    let mut columns = [[0.0_f64; 16]; 8];
    for lane in 0..32 {
        let (group, first) = (lane / 4, 2 * (lane % 4));
        for (n, register) in a.iter().enumerate() {
            let (row, column) = (group + n % 2 * 8, first + n / 2 * 8);
            rows[row][column..column + 2].copy_from_slice(&pair(register[lane]));
        }
        for (n, register) in b.iter().enumerate() {
            columns[group][first + n * 8..][..2].copy_from_slice(&pair(register[lane]));
        }
    }
    let product = |row: usize, column: usize, c: f64| {
        let terms = rows[row][..k].iter().zip(&columns[column][..k]);
        terms.fold(0.0, |sum, (a, b)| sum + a * b) + c
    };
    let mut results = vec![[0; 32]; c.len()];
    for lane in 0..32 {
        let (group, first) = (lane / 4, 2 * (lane % 4));
        for half in 0..2 {
            let row = group + 8 * half;
            if half_result {
                let [low, high] = [0, 1].map(|n| {
                    let c = F16.decode(c[half][lane] >> (16 * n) & 0xffff);
                    F16.encode(product(row, first + n, c), Rounding::Nearest)
                });
                results[half][lane] = low | high << 16;
            } else {
                for n in 0..2 {
                    let c = f64::from(f32::from_bits(c[2 * half + n][lane] as u32));
                    results[2 * half + n][lane] = rounded(product(row, first + n, c));
                }
            }
        }
    }
    results
}

fn rounded(value: f64) -> u64 {
    if value.is_nan() { F32.encode(value, Rounding::Nearest) } else { u64::from((value as f32).to_bits()) }
}

fn decode(format: Format, bits: u64) -> f64 {
    format.decode(bits)
}
