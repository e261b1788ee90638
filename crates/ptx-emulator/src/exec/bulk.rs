//! `cp.async.bulk`: whole stretches and tiles, moved by an engine of their own.
//!
//! The engine counts as a thread that nobody has heard of until its mbarrier's phase has ended, or
//! until who issued the copy has waited for its group. What threads wrote the engine only sees behind a
//! `fence.proxy.async`.

use super::{Cta, Flow, Step, lanes};
use crate::{
    clock::{Accessor, Stamp},
    error::{Fault, Hazard, Stop},
    isa::{Address, Op},
    memory::Byte,
    schedule::Schedule,
    tensor_map::{Swizzle, Tiles},
};

/// Engines of a CTA, each a thread of its own behind those of the launch.
pub(crate) const ENGINES: u32 = 40;

/// A copy to shared memory that has been issued and has not arrived.
#[derive(Debug)]
pub(super) struct Flight {
    w: usize,
    lane: usize,
    pc: u32,
    pieces: Vec<Piece>,
    stamp: Stamp,
    barrier: u32,
    bytes: u32,
}

/// Adjacent bytes; without a source they are zero.
#[derive(Clone, Copy, Debug)]
struct Piece {
    shared: u32,
    global: Option<u64>,
    bytes: u32,
}

impl Cta<'_> {
    pub(super) fn bulk_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        match op {
            Op::Bulk { loads, shared, global, bytes, barrier } => {
                let (at, from) = (self.addresses(w, *shared), self.addresses(w, *global));
                let sizes = self.value(w, *bytes);
                for lane in lanes(active) {
                    let bytes = sizes[lane] as u32;
                    let at = self.bulk_place(lane, at[lane], bytes, 16)?;
                    if !bytes.is_multiple_of(16) || !from[lane].is_multiple_of(16) {
                        let message =
                            format!("{bytes} bytes at {:#x}; both must be multiples of 16", from[lane]);
                        return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
                    }
                    let piece =
                        |n: u32| Piece { shared: at + n, global: Some(from[lane] + u64::from(n)), bytes: 16 };
                    let pieces = (0..bytes).step_by(16).map(piece).collect();
                    self.issue_bulk(w, pc, lane, *loads, pieces, *barrier)?;
                }
            }
            Op::BulkTensor { loads, shared, map, coordinates, barrier } => {
                let (at, maps) = (self.addresses(w, *shared), self.addresses(w, *map));
                let coordinates: Vec<_> = coordinates.iter().map(|operand| self.value(w, *operand)).collect();
                for lane in lanes(active) {
                    let tiles = self.tiles(w, lane, maps[lane])?;
                    if tiles.sizes.len() != coordinates.len() {
                        let message = format!(
                            "{} coordinates for a tensor map of rank {}",
                            coordinates.len(),
                            tiles.sizes.len()
                        );
                        return Err(Stop::new(Hazard::Operand, lane as u32, message));
                    }
                    let align = match tiles.swizzle {
                        Swizzle::None => 128,
                        Swizzle::Bytes32 => 256,
                        Swizzle::Bytes64 => 512,
                        Swizzle::Bytes128 => 1024,
                    };
                    let at = self.bulk_place(lane, at[lane], tiles.bytes(), align)?;
                    let first: Vec<i32> = coordinates.iter().map(|values| values[lane] as i32).collect();
                    let pieces =
                        tiles.elements(&first).into_iter().filter(|(_, global)| *loads || global.is_some());
                    let pieces = pieces.map(|(offset, global)| Piece {
                        shared: tiles.swizzle.apply(at + offset),
                        global,
                        bytes: tiles.element_bytes,
                    });
                    let pieces = merged(&pieces.collect::<Vec<_>>());
                    self.issue_bulk(w, pc, lane, *loads, pieces, *barrier)?;
                }
            }
            Op::BulkCommit => {
                for lane in lanes(active) {
                    let group = std::mem::take(&mut self.warps[w].stores_open[lane]);
                    self.warps[w].stores[lane].push_back(group);
                }
            }
            Op::BulkWait { pending } => {
                for lane in lanes(active) {
                    while self.warps[w].stores[lane].len() > *pending as usize {
                        let group = self.warps[w].stores[lane].pop_front().expect("a group");
                        for stamp in group {
                            self.hear_engine(w, lane, stamp);
                        }
                    }
                }
            }
            Op::ProxyFence => {
                for lane in lanes(active) {
                    let told = self.tell(w, lane);
                    self.proxied.join(&told);
                }
            }
            other => unreachable!("{other:?} is not a bulk copy"),
        }
        Ok(Flow::Next)
    }

    fn hear_engine(&mut self, w: usize, lane: usize, stamp: Stamp) {
        std::sync::Arc::make_mut(&mut self.warps[w].clocks[lane]).set(stamp.thread(), stamp.epoch());
    }

    fn bulk_place(&self, lane: usize, address: u64, bytes: u32, align: u32) -> Result<u32, Stop> {
        let at = address & !super::memory::SHARED_WINDOW;
        if !at.is_multiple_of(align.into()) {
            let message = format!("{at:#x} in shared memory, which is not a multiple of {align}");
            return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
        }
        if at + u64::from(bytes) > self.shared.len().into() {
            let message = format!("{bytes} bytes at {at:#x} of {} bytes of shared memory", self.shared.len());
            return Err(Stop::new(Hazard::OutOfBounds, lane as u32, message));
        }
        Ok(at as u32)
    }

    /// The tensor map at a generic address.
    fn tiles(&mut self, w: usize, lane: usize, address: u64) -> Result<Tiles, Stop> {
        let mut bytes = [0; 128];
        if !address.is_multiple_of(64) {
            let message = format!("a tensor map at {address:#x}, which is not a multiple of 64");
            return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
        }
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = self.generic_byte(w, lane, address + n as u64)?;
        }
        Tiles::decode(&bytes).ok_or_else(|| {
            Stop::new(Hazard::Operand, lane as u32, format!("there is no tensor map at {address:#x}"))
        })
    }

    fn issue_bulk(
        &mut self,
        w: usize,
        pc: u32,
        lane: usize,
        loads: bool,
        pieces: Vec<Piece>,
        barrier: Option<Address>,
    ) -> Result<(), Stop> {
        let barrier = match barrier {
            Some(barrier) => {
                let address = self.addresses(w, barrier)[lane];
                Some(self.met(w, lane, address)?)
            }
            None => None,
        };
        // Copies to one mbarrier share an engine, stores of one warp do.
        let engine = barrier.map_or(16 + w as u32 % 16, |at| at / 8 % 16);
        self.copies += 1;
        let stamp = Stamp::new(self.number, self.run.threads() + engine, self.copies, false);
        let stop = |hazard, message| Stop::new(hazard, lane as u32, message);
        for piece in &pieces {
            if let Some(global) = piece.global
                && loads
            {
                self.read_global(w, lane, global, piece.bytes)?;
            }
            let state = self.shared.unreadable(piece.shared, piece.bytes);
            match state {
                Some((at, Byte::InFlight)) => {
                    let message =
                        format!("byte {at:#x} of shared memory belongs to another copy that is under way");
                    return Err(stop(Hazard::Async, message));
                }
                Some((at, Byte::Barrier)) => {
                    return Err(stop(
                        Hazard::Async,
                        format!("byte {at:#x} of shared memory belongs to an mbarrier"),
                    ));
                }
                Some((at, Byte::Uninitialised)) if !loads => {
                    return Err(stop(
                        Hazard::Uninitialised,
                        format!("byte {at:#x} of shared memory was never written"),
                    ));
                }
                _ => {}
            }
            // The engine has heard of all that its issuer has, and that is ordered behind a proxy fence.
            let clock = self.warps[w].clocks[lane].clone();
            let issuer = self.stamp(w, lane, false);
            let by = Accessor { clock: &clock, stamp: issuer };
            let proxied = Accessor { clock: &self.proxied, stamp };
            let mut unfenced = false;
            let threads = self.run.threads();
            let checked = self.shared.visit(piece.shared, piece.bytes, |cell, mask| {
                // The other half of the word may be of this copy too.
                if loads && cell.writer() == stamp {
                    return Ok(());
                }
                let writer = cell.writer();
                unfenced |= writer.thread() < threads && !proxied.follows(writer);
                if loads {
                    cell.write(&by, mask)?;
                    cell.land(stamp);
                    return Ok(());
                }
                cell.read_by_engine(&by, stamp, mask)
            });
            if let Err(conflict) = checked {
                let what = format!("a bulk copy of {:#x} in shared memory", piece.shared);
                return Err(stop(Hazard::Race, self.race_message(&what, loads, conflict)));
            }
            if unfenced {
                let message = format!(
                    "byte {:#x} of shared memory was written by a thread, and no fence.proxy.async stands between",
                    piece.shared
                );
                return Err(stop(Hazard::Async, message));
            }
        }
        if loads {
            for piece in &pieces {
                self.shared.states[piece.shared as usize..][..piece.bytes as usize].fill(Byte::InFlight);
            }
            let bytes = pieces.iter().map(|piece| piece.bytes).sum();
            let barrier = barrier.expect("a load has an mbarrier");
            self.flights.push_back(Flight { w, lane, pc, pieces, stamp, barrier, bytes });
            if self.run.schedule == Schedule::Eager {
                self.land_flight(self.flights.len() - 1)?;
            }
            return Ok(());
        }
        for piece in pieces {
            let value = self.shared.load(piece.shared, piece.bytes.min(8));
            let global = piece.global.expect("stores leave out what is outside");
            self.write_global(w, lane, global, piece.bytes.min(8), value)?;
            if piece.bytes == 16 {
                let value = self.shared.load(piece.shared + 8, 8);
                self.write_global(w, lane, global + 8, 8, value)?;
            }
        }
        self.warps[w].stores_open[lane].push(stamp);
        Ok(())
    }

    /// A copy arrives.
    fn land_flight(&mut self, index: usize) -> Result<(), Stop> {
        let flight = self.flights.remove(index).expect("a copy under way");
        for piece in &flight.pieces {
            let mut at = piece.shared;
            let mut left = piece.bytes;
            while left > 0 {
                let bytes = left.min(8);
                let value = match piece.global {
                    None => 0,
                    Some(global) => {
                        let address = global + u64::from(piece.bytes - left);
                        let found = self.run.memory.locate(address, bytes.into());
                        let (allocation, offset) = found
                            .map_err(|message| Stop::new(Hazard::OutOfBounds, flight.lane as u32, message))?;
                        self.run.memory.allocations()[allocation].load(offset, bytes)
                    }
                };
                self.shared.store(at, bytes, value);
                at += bytes;
                left -= bytes;
            }
        }
        self.complete_bytes(flight.lane, flight.barrier, flight.bytes, flight.stamp)
    }

    /// One of the copies under way arrives, if there is one: `None` for the oldest.
    pub(super) fn land_any(&mut self, index: Option<usize>) -> Result<bool, Fault> {
        let index = index.unwrap_or(0);
        let Some((w, pc)) = self.flights.get(index).map(|flight| (flight.w, flight.pc)) else {
            return Ok(false);
        };
        self.land_flight(index).map_err(|stop| self.fault(w, pc, stop))?;
        Ok(true)
    }
}

/// The same bytes in as few pieces as can be: chunks of 16 bytes where both sides allow it.
fn merged(pieces: &[Piece]) -> Vec<Piece> {
    let mut found: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        if let Some(last) = found.last_mut() {
            let adjacent = match (last.global, piece.global) {
                (None, None) => true,
                (Some(last_at), Some(at)) => {
                    last_at.is_multiple_of(16) && last_at + u64::from(last.bytes) == at
                }
                _ => false,
            };
            let whole =
                last.shared.is_multiple_of(16) && last.bytes < 16 && last.shared + last.bytes == piece.shared;
            if adjacent && whole {
                last.bytes += piece.bytes;
                continue;
            }
        }
        found.push(*piece);
    }
    // What did not grow to a size that memory is accessed in stays as it was.
    let sized = found.iter().all(|piece| piece.bytes.is_power_of_two());
    if sized { found } else { pieces.to_vec() }
}
