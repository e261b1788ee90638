//! `wgmma`: matrix products of four warps that read shared memory on their own.
//!
//! Each warp computes its 16 of the 64 rows when it issues the product. Until it has waited for it, its
//! registers are taken, and what the product read in shared memory counts as read by an engine that
//! nobody has heard of; a wait ends only when all four warps have issued what it waits for.

use std::sync::Arc;

use super::{Cluster, Flow, Step, Wait, check::is_unseen, descriptor::Layout, warp::then};
use crate::{
    clock::{Accessor, Stamp},
    error::{Hazard, Stop},
    isa::{MatrixType, Op, Product},
    number::{BF16, F16, Lanes, Rounding, Scalar},
};

/// The engine of the first warpgroup; each of up to 8 has its own.
const FIRST_ENGINE: u32 = 32;

/// The matrix b of a product, which all warps of the warpgroup read, and who wrote it.
#[derive(Debug)]
pub(super) struct Columns {
    /// Of eight columns each: the values of every k.
    groups: Vec<[[f64; 8]; 16]>,
    /// Absent where they are too many to keep.
    writers: Option<Vec<Stamp>>,
}

/// Writers of one matrix that are kept at most.
const MOST_WRITERS: usize = 32;

impl Cluster<'_> {
    pub(super) fn product_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        if !self.rendezvous(w, pc, active, u32::MAX)? {
            return Ok(Flow::Block(active));
        }
        match op {
            Op::Product(product) => self.product(w, pc, product)?,
            Op::ProductFence => self.warps[w].fragments.fence(),
            Op::ProductCommit => {
                let warp = &mut self.warps[w];
                warp.fragments.commit();
                warp.product_groups.push_back(warp.fragments.issued);
            }
            Op::ProductWait { pending } => {
                let behind = self.warps[w].product_groups.len().saturating_sub(*pending as usize);
                if behind > 0 {
                    let needed = self.warps[w].product_groups[behind - 1];
                    if self.warps[self.warpgroup(w)].iter().any(|warp| warp.fragments.issued < needed) {
                        // Everybody asks again, so all stand where they came from.
                        for lane in 0..32 {
                            self.warps[w].counters[lane] = pc;
                            self.warps[w].waits[lane] = Wait::Products(needed);
                        }
                        self.warps[w].waiting = u32::MAX;
                        return Ok(Flow::Block(active));
                    }
                    self.warps[w].product_groups.drain(..behind);
                    self.finish_products(w, needed);
                }
            }
            other => unreachable!("{other:?} is not a product of a warpgroup"),
        }
        Ok(then(active, u32::MAX))
    }

    /// The engine of a warp's warpgroup, as a thread.
    fn engine(&self, w: usize) -> u32 {
        self.run.threads() + FIRST_ENGINE + self.warps[w].place / 4
    }

    /// What a product has read and written is free again.
    fn finish_products(&mut self, w: usize, needed: u32) {
        let engine = self.engine(w);
        let warp = &mut self.warps[w];
        warp.fragments.finish(needed);
        let before = warp.clocks[0].clone();
        let mut after = before.clone();
        Arc::make_mut(&mut after).set(engine, needed);
        for clock in &mut warp.clocks {
            if Arc::ptr_eq(clock, &before) {
                *clock = after.clone();
            } else {
                Arc::make_mut(clock).set(engine, needed);
            }
        }
    }

    fn product(&mut self, w: usize, pc: u32, product: &Product) -> Result<(), Stop> {
        let stop = |message: String| Stop::new(Hazard::Operand, 0, message);
        let descriptor = |operand, name| self.uniform(w, u32::MAX, operand, name);
        let a_bits = match product.a.as_slice() {
            [operand] => descriptor(*operand, "the descriptor of a")?,
            _ => 0,
        };
        let b_bits = descriptor(product.b, "the descriptor of b")?;
        let keeps = match product.accumulate_if.map(|guard| self.warps[w].guard(guard)) {
            None => product.accumulate,
            Some(0) => false,
            Some(u32::MAX) => true,
            Some(_) => return Err(stop("the predicate for accumulation differs between lanes".into())),
        };
        let found = self.found_columns(w);
        self.in_step(w, pc, [a_bits, b_bits, keeps.into()])?;
        let registers: Vec<u32> = match product.a.as_slice() {
            [_] => Vec::new(),
            parts => parts.iter().filter_map(|part| part.register()).collect(),
        };
        let fragments = &mut self.warps[w].fragments;
        let known = fragments.issue(product.n, &product.d, &registers);
        known.map_err(|message| Stop::new(Hazard::Async, 0, message))?;
        let issued = fragments.issued;
        let n = product.n as usize;
        let format = match product.input {
            MatrixType::F16 => F16,
            MatrixType::BF16 => BF16,
        };
        let decode = |bits: u16| format.decode(u64::from(bits));
        // a[row][k] of this warp's 16 rows, b[k][column].
        let mut a = [[0.0_f64; 16]; 16];
        let first_row = self.warps[w].place % 4 * 16;
        match product.a.as_slice() {
            [_] => {
                let layout = Layout::decode(a_bits).map_err(stop)?;
                self.read_matrix(w, issued, layout, !product.transpose_a, first_row, 16, |row, k, bits| {
                    a[row][k] = decode(bits)
                })?;
            }
            registers => {
                let registers: Vec<Lanes> = registers.iter().map(|operand| self.value(w, *operand)).collect();
                for lane in 0..32 {
                    for (at, register) in registers.iter().enumerate() {
                        let (row, k) = (lane / 4 + at % 2 * 8, lane % 4 * 2 + at / 2 * 8);
                        a[row][k] = decode(register[lane] as u16);
                        a[row][k + 1] = decode((register[lane] >> 16) as u16);
                    }
                }
            }
        }
        let columns = match found.filter(|columns| self.may_read(w, columns)) {
            Some(columns) => columns,
            None => {
                let layout = Layout::decode(b_bits).map_err(stop)?;
                let mut groups = vec![[[0.0; 8]; 16]; n / 8];
                let writers = self.read_matrix(
                    w,
                    issued,
                    layout,
                    !product.transpose_b,
                    0,
                    product.n,
                    |column, k, bits| {
                        groups[column / 8][k][column % 8] = decode(bits);
                    },
                )?;
                let columns = Arc::new(Columns { groups, writers });
                self.keep_columns(w, &columns);
                columns
            }
        };
        if product.negate {
            a.iter_mut().flatten().for_each(|value| *value = -*value);
        }
        // Of eight columns each: the sums of every row.
        let mut sums = vec![[[0.0_f64; 8]; 16]; n / 8];
        for (sums, columns) in sums.iter_mut().zip(&columns.groups) {
            for (sums, a) in sums.iter_mut().zip(&a) {
                *sums = multiply(a, columns);
            }
        }
        let warp = &mut self.warps[w];
        for (at, d) in product.d.iter().enumerate() {
            let register = &mut warp.registers[*d as usize];
            for (lane, value) in register.iter_mut().enumerate() {
                // Element n of a lane lies in this row and column.
                let sum = |n: usize, before: f64| {
                    let row = lane / 4 + n / 2 % 2 * 8;
                    sums[n / 4][row][lane % 4 * 2 + n % 2] + if keeps { before } else { 0.0 }
                };
                *value = if product.half_result {
                    let [low, high] = [0, 1].map(|half| {
                        let sum = sum(2 * at + half, F16.decode(*value >> (16 * half) & 0xffff));
                        F16.encode(sum, Rounding::Nearest)
                    });
                    low | high << 16
                } else {
                    Scalar::put(sum(at, f64::from(f32::from_bits(*value as u32))) as f32)
                };
            }
        }
        self.counters.matrix_products += 1;
        // Who waits for this warp's share asks again.
        let group = self.warpgroup(w);
        for warp in &mut self.warps[group] {
            warp.wake(|wait| matches!(wait, Wait::Products(_)));
        }
        Ok(())
    }

    /// Whether a warp may read a matrix that another one of its warpgroup has read for the same product:
    /// nobody can have written there since, because nobody can have heard yet that it was read.
    fn may_read(&self, w: usize, columns: &Columns) -> bool {
        let clock = &self.warps[w].clocks[0];
        let by = Accessor { clock, stamp: self.stamp(w, 0, false) };
        let threads = self.run.threads();
        let may = |writer: &Stamp| !by.races(*writer) && !is_unseen(clock, *writer, threads);
        columns.writers.as_ref().is_some_and(|writers| writers.iter().all(may))
    }

    /// Reads `count` rows (or columns) from `first` on by 16 elements along k, and who wrote them, if
    /// they are few.
    fn read_matrix(
        &mut self,
        w: usize,
        issued: u32,
        layout: Layout,
        k_first: bool,
        first: u32,
        count: u32,
        mut visit: impl FnMut(usize, usize, u16),
    ) -> Result<Option<Vec<Stamp>>, Stop> {
        let stamp = Stamp::new(self.cta(w).number, self.engine(w), issued, false);
        let (outer, inner) = if k_first { (count, 16) } else { (16, count) };
        let mut writers = Some(Vec::new());
        for (o, i) in (0..outer).flat_map(|o| (0..inner).step_by(8).map(move |i| (o, i))) {
            let (mn, k) = if k_first { (first + o, i) } else { (first + i, o) };
            let at = layout.chunk(k_first, mn, k);
            self.engine_reads(w, 0, at, 16, stamp)?;
            for cell in &self.cta(w).shared.cells[at as usize / 4..][..4] {
                let Some(known) = &mut writers else { break };
                match cell.only_writer() {
                    Some(writer) if known.last() == Some(&writer) || known.contains(&writer) => {}
                    Some(writer) if known.len() < MOST_WRITERS => known.push(writer),
                    _ => writers = None,
                }
            }
            for (n, bits) in self.cta(w).shared.bytes(at, 16).chunks_exact(2).enumerate() {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                if k_first {
                    visit(o as usize, i as usize + n, bits);
                } else {
                    visit(i as usize + n, o as usize, bits);
                }
            }
        }
        Ok(writers)
    }
}

/// A row times eight columns.
#[inline(never)]
fn multiply(row: &[f64; 16], columns: &[[f64; 8]; 16]) -> [f64; 8] {
    let mut sums = [0.0; 8];
    for (a, b) in row.iter().zip(columns) {
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum += a * b;
        }
    }
    sums
}
