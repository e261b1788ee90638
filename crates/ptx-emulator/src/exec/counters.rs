//! What a launch did, in exact numbers.

use super::lanes;
use crate::{isa::Op, number::Lanes};

/// Kinds of instruction that are counted apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Class {
    Integer,
    Float,
    Special,
    Control,
    Memory,
    Synchronisation,
    Matrix,
}

/// Counts of one launch. Every one is exact and the same for every run of the same schedule, so it can
/// be compared with what it was before a change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters {
    /// Instructions, once for each thread that executed them.
    pub thread_instructions: u64,
    /// Instructions, once for each group of lanes that executed them together.
    pub warp_instructions: u64,
    /// Thread instructions: integers, bits, moves, comparisons, conversions and address arithmetic.
    pub integer: u64,
    /// Thread instructions: exactly rounded floating-point arithmetic.
    pub float: u64,
    /// Thread instructions: approximated functions such as `ex2`.
    pub special: u64,
    /// Thread instructions: branches and ends.
    pub control: u64,
    /// Thread instructions: loads, stores, atomics and copies.
    pub memory: u64,
    /// Thread instructions: barriers, fences, shuffles, votes.
    pub synchronisation: u64,
    /// Matrix products, once for each warp that takes part (a `wgmma` counts four times).
    pub matrix_products: u64,
    /// Requests to shared memory of a warp: loads, stores, atomics, `ldmatrix`, `stmatrix`, `cp.async`.
    ///
    /// What engines do there is not among them, nor in the passes: how they divide their work is not
    /// documented. Every layout that `wgmma` can describe is without conflicts within a core matrix, and
    /// a copy moves whole chunks of 16 bytes; a swizzle that does not fit shows in the passes of the threads
    /// that read what was copied, or as a wrong result. Bytes of copies are in `bulk_bytes`.
    pub shared_requests: u64,
    /// Passes that those requests take; without bank conflicts a request of 4 bytes a lane takes one.
    pub shared_passes: u64,
    /// Passes that bank conflicts add.
    pub bank_conflicts: u64,
    /// Requests of a warp to shared memory of other CTAs of the cluster.
    pub cluster_requests: u64,
    /// Requests to device memory of a warp.
    pub global_requests: u64,
    /// Sectors of 32 bytes that those requests touch.
    pub global_sectors: u64,
    /// Copies by engines, `cp.async.bulk` with or without a tensor map; one to many CTAs is one.
    pub bulk_copies: u64,
    /// Bytes that those copies write to shared memory, of each CTA, and read from there.
    pub bulk_bytes: u64,
    /// Sectors of 32 bytes of device memory that those copies touch.
    pub bulk_sectors: u64,
}

impl Counters {
    pub(super) fn count(&mut self, class: Class, active: u32) {
        let threads = u64::from(active.count_ones());
        self.thread_instructions += threads;
        self.warp_instructions += 1;
        match class {
            Class::Integer => self.integer += threads,
            Class::Float => self.float += threads,
            Class::Special => self.special += threads,
            Class::Control => self.control += threads,
            Class::Memory => self.memory += threads,
            Class::Synchronisation => self.synchronisation += threads,
            Class::Matrix => {}
        }
    }

    /// A request of up to 16 bytes a lane: a pass serves each of 32 banks of 4 bytes once, and lanes
    /// that want the same word share it. Wider accesses go by halves or quarters of the warp.
    pub(super) fn shared_request(&mut self, addresses: &Lanes, active: u32, bytes: u32) {
        self.shared_requests += 1;
        let lanes_together = match bytes {
            16 => 8,
            8 => 16,
            _ => 32,
        };
        for first in (0..32).step_by(lanes_together as usize) {
            let together = active & ((u32::MAX >> (32 - lanes_together)) << first);
            if together != 0 {
                self.shared_passes(lanes(together).map(|lane| addresses[lane]), bytes);
            }
        }
    }

    /// One pass and as many more as its bank conflicts need.
    pub(super) fn shared_passes(&mut self, addresses: impl Iterator<Item = u64>, bytes: u32) {
        let mut words = [0_u64; 64];
        let mut count = 0;
        for address in addresses {
            for word in 0..u64::from(bytes.div_ceil(4)) {
                let word = address / 4 + word;
                if !words[..count].contains(&word) {
                    words[count] = word;
                    count += 1;
                }
            }
        }
        let mut banks = [0_u64; 32];
        for word in &words[..count] {
            banks[*word as usize % 32] += 1;
        }
        let passes = banks.into_iter().max().unwrap_or(0).max(1);
        self.shared_passes += passes;
        self.bank_conflicts += passes - 1;
    }

    pub(super) fn global_request(&mut self, addresses: &Lanes, active: u32, bytes: u32) {
        self.global_requests += 1;
        let mut sectors = [0_u64; 64];
        let mut count = 0;
        for lane in lanes(active) {
            for sector in addresses[lane] / 32..=(addresses[lane].saturating_add(u64::from(bytes) - 1)) / 32 {
                // Neighbours share sectors; most requests ascend.
                if count == 0 || sectors[count - 1] != sector && !sectors[..count].contains(&sector) {
                    sectors[count] = sector;
                    count += 1;
                }
            }
        }
        self.global_sectors += count as u64;
    }

    /// A copy by an engine, with addresses and sizes of what it moves from or to device memory.
    pub(super) fn bulk_copy(&mut self, ranges: impl Iterator<Item = (u64, u32)>) {
        self.bulk_copies += 1;
        let mut sectors: Vec<u64> =
            ranges.flat_map(|(at, bytes)| at / 32..=(at + u64::from(bytes) - 1) / 32).collect();
        sectors.sort_unstable();
        sectors.dedup();
        self.bulk_sectors += sectors.len() as u64;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        self.thread_instructions += other.thread_instructions;
        self.warp_instructions += other.warp_instructions;
        self.integer += other.integer;
        self.float += other.float;
        self.special += other.special;
        self.control += other.control;
        self.memory += other.memory;
        self.synchronisation += other.synchronisation;
        self.matrix_products += other.matrix_products;
        self.shared_requests += other.shared_requests;
        self.shared_passes += other.shared_passes;
        self.bank_conflicts += other.bank_conflicts;
        self.cluster_requests += other.cluster_requests;
        self.global_requests += other.global_requests;
        self.global_sectors += other.global_sectors;
        self.bulk_copies += other.bulk_copies;
        self.bulk_bytes += other.bulk_bytes;
        self.bulk_sectors += other.bulk_sectors;
    }
}

/// Which class an instruction counts in; arithmetic is told by the end of its opcode.
pub(crate) fn class(op: &Op, opcode: &str) -> Class {
    match op {
        Op::Unary { .. } | Op::Binary { .. } | Op::Ternary { .. }
            if ["f16", "f16x2", "bf16", "bf16x2", "f32", "f64"].iter().any(|ty| opcode.ends_with(ty))
                && !opcode.starts_with("mov") =>
        {
            Class::Float
        }
        Op::Approximate { .. } | Op::Divide { .. } => Class::Special,
        Op::Branch { .. }
        | Op::BranchTable { .. }
        | Op::Exit
        | Op::Trap
        | Op::Print { .. }
        | Op::AssertFail { .. }
        | Op::Nothing
        | Op::Yield => Class::Control,
        Op::Load { .. }
        | Op::Store { .. }
        | Op::Atomic { .. }
        | Op::CopyAsync { .. }
        | Op::Bulk { .. }
        | Op::BulkTensor { .. }
        | Op::StoreAsync { .. }
        | Op::LoadMatrix { .. }
        | Op::StoreMatrix { .. } => Class::Memory,
        Op::Fence
        | Op::SetRegisters { .. }
        | Op::Barrier { .. }
        | Op::WarpSync { .. }
        | Op::Shuffle { .. }
        | Op::TransposeMatrix { .. }
        | Op::Vote { .. }
        | Op::ActiveMask { .. }
        | Op::Match { .. }
        | Op::Redux { .. }
        | Op::Elect { .. }
        | Op::CommitGroup
        | Op::WaitGroup { .. }
        | Op::ClusterArrive { .. }
        | Op::ClusterWait { .. }
        | Op::BulkCommit
        | Op::ProductFence
        | Op::ProductCommit
        | Op::ProductWait { .. }
        | Op::BulkWait { .. }
        | Op::ProxyFence
        | Op::BarrierInit { .. }
        | Op::BarrierInvalidate { .. }
        | Op::BarrierArrive { .. }
        | Op::BarrierExpect { .. }
        | Op::BarrierComplete { .. }
        | Op::BarrierTest { .. }
        | Op::BarrierCopies { .. } => Class::Synchronisation,
        Op::MultiplyMatrix { .. } | Op::Product(_) => Class::Matrix,
        _ => Class::Integer,
    }
}
