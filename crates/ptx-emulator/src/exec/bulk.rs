//! `cp.async.bulk`: whole stretches and tiles, moved by an engine of their own.
//!
//! The engine counts as a thread that nobody has heard of until its mbarrier's phase has ended, or
//! until who issued the copy has waited for its group. What threads wrote the engine only sees behind a
//! `fence.proxy.async`.

use std::sync::Arc;

use super::{
    Cluster, Flow, Step,
    check::{is_unseen, unfenced_message},
    lanes,
    mbarrier::At,
    memory::{LOCAL_WINDOW, WINDOW},
};
use crate::{
    clock::{Accessor, Stamp},
    error::{Fault, Hazard, Stop},
    isa::{Address, Op, Operand, Space},
    memory::Byte,
    schedule::Schedule,
    tensor_map::{Swizzle, Tiles},
};

/// Engines of a CTA, each a thread of its own behind those of the launch.
pub(crate) const ENGINES: u32 = 56;
/// The engines that read shared memory for stores, and those that write to device memory for them: one of
/// each for every second warp. Those for loads come before, those of `wgmma` between.
const READERS: u32 = 16;
const WRITERS: u32 = 40;

/// A copy to shared memory of one CTA that has been issued and has not arrived.
#[derive(Debug)]
pub(super) struct Flight {
    w: usize,
    lane: usize,
    pc: u32,
    /// Rank of the CTA that it goes to.
    cta: usize,
    pieces: Vec<Piece>,
    stamp: Stamp,
    barrier: At,
    bytes: u32,
}

/// A bulk store: what its engines did when.
#[derive(Clone, Copy, Debug)]
pub(super) struct Store {
    pub(super) reads: Stamp,
    writes: Stamp,
}

/// Adjacent bytes of shared memory, and what comes to them or where they go.
#[derive(Clone, Copy, Debug)]
struct Piece {
    shared: u32,
    other: Other,
    bytes: u32,
}

/// The other side of a piece.
#[derive(Clone, Copy, Debug)]
enum Other {
    /// Outside of a tensor: zeros come, nothing goes.
    Nothing,
    Global(u64),
    /// Rank of a CTA, and where in its shared memory.
    Shared(usize, u32),
    Value(u64),
}

impl Cluster<'_> {
    pub(super) fn bulk_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        match op {
            Op::Bulk { from, to, source, destination, bytes, barrier, ctas } => {
                let (sources, destinations) = (self.addresses(w, *source), self.addresses(w, *destination));
                let sizes = self.value(w, *bytes);
                for lane in lanes(active) {
                    let (source, destination) = (sources[lane], destinations[lane]);
                    let bytes = sizes[lane] as u32;
                    if !bytes.is_multiple_of(16) {
                        let message = format!("{bytes} bytes, which is not a multiple of 16");
                        return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
                    }
                    let pieces = |shared: u32, other: &dyn Fn(u32) -> Other| {
                        let piece = |n| Piece { shared: shared + n, other: other(n), bytes: 16 };
                        (0..bytes).step_by(16).map(piece).collect::<Vec<_>>()
                    };
                    let global = |address: u64| {
                        if address.is_multiple_of(16) {
                            return Ok(move |n: u32| Other::Global(address + u64::from(n)));
                        }
                        let message = format!("{address:#x}, which is not a multiple of 16");
                        Err(Stop::new(Hazard::Misaligned, lane as u32, message))
                    };
                    if *to == Space::Global {
                        let (_, at) = self.bulk_place(w, lane, *from, source, bytes, 16)?;
                        self.issue_store(w, lane, pieces(at, &global(destination)?))?;
                        continue;
                    }
                    let place = self.bulk_place(w, lane, *to, destination, bytes, 16)?;
                    let pieces = if *from == Space::Global {
                        pieces(place.1, &global(source)?)
                    } else {
                        let (cta, at) = self.bulk_place(w, lane, *from, source, bytes, 16)?;
                        if cta == place.0 {
                            let message =
                                "a copy to shared memory of its own CTA, which must be that of another";
                            return Err(Stop::new(Hazard::Operand, lane as u32, message));
                        }
                        pieces(place.1, &|n| Other::Shared(cta, at + n))
                    };
                    let barrier = barrier.expect("what comes to shared memory has an mbarrier");
                    self.issue_loads(w, pc, lane, place.0, &pieces, barrier, *ctas)?;
                }
            }
            Op::BulkTensor { loads, shared, map, coordinates, barrier, ctas } => {
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
                    let space = if *loads { Space::Cluster } else { Space::Shared };
                    let (cta, at) = self.bulk_place(w, lane, space, at[lane], tiles.bytes(), align)?;
                    let first: Vec<i32> = coordinates.iter().map(|values| values[lane] as i32).collect();
                    let pieces = tiles.elements(&first).into_iter().map(|(offset, global)| Piece {
                        shared: tiles.swizzle.apply(at + offset),
                        other: global.map_or(Other::Nothing, Other::Global),
                        bytes: tiles.element_bytes,
                    });
                    let pieces = merged(&pieces.collect::<Vec<_>>());
                    match barrier {
                        Some(barrier) => self.issue_loads(w, pc, lane, cta, &pieces, *barrier, *ctas)?,
                        None => self.issue_store(w, lane, pieces)?,
                    }
                }
            }
            Op::StoreAsync { space, ty, address, a, barrier } => {
                let (at, size) = (self.addresses(w, *address), ty.bytes());
                let values: Vec<_> = a.iter().map(|operand| self.value(w, *operand)).collect();
                let barriers = self.addresses(w, *barrier);
                for lane in lanes(active) {
                    let (cta, at) =
                        self.shared_place(w, *space, lane, at[lane], size * values.len() as u32)?;
                    let barrier = self.met(w, lane, *space, barriers[lane])?;
                    let pieces = values.iter().zip(0..).map(|(values, n)| Piece {
                        shared: at + n * size,
                        other: Other::Value(values[lane]),
                        bytes: size,
                    });
                    self.issue_load(w, pc, lane, cta, pieces.collect(), barrier)?;
                }
            }
            Op::BulkCommit => {
                for lane in lanes(active) {
                    let group = self.warps[w].stores_open[lane].take();
                    self.warps[w].stores[lane].push_back(group);
                }
            }
            Op::BulkWait { pending, reads } => {
                for lane in lanes(active) {
                    self.wait_for_stores(w, lane, *pending as usize, *reads);
                }
            }
            Op::ProxyFence => {
                for lane in lanes(active) {
                    let mut clock = self.tell(w, lane);
                    Arc::make_mut(&mut clock).hand_over();
                    self.warps[w].clocks[lane] = clock;
                }
            }
            other => unreachable!("{other:?} is not a bulk copy"),
        }
        Ok(Flow::Next)
    }

    /// Waits until stores have read their source, or are done, in all but so many groups. Stores of a lane
    /// come in the order of their stamps, so word of the last is enough.
    fn wait_for_stores(&mut self, w: usize, lane: usize, pending: usize, reads: bool) {
        let warp = &mut self.warps[w];
        let groups = &mut warp.stores[lane];
        let done = groups.len().saturating_sub(pending);
        let Some(store) = groups.iter().take(done).rev().find_map(|group| *group) else {
            return;
        };
        let clock = Arc::make_mut(&mut warp.clocks[lane]);
        clock.note(store.reads);
        if !reads {
            clock.note(store.writes);
            groups.drain(..done);
        }
    }

    fn bulk_place(
        &self,
        w: usize,
        lane: usize,
        space: Space,
        address: u64,
        bytes: u32,
        align: u32,
    ) -> Result<At, Stop> {
        let stop = |hazard, message| Err(Stop::new(hazard, lane as u32, message));
        if !address.is_multiple_of(align.into()) {
            let message = format!("{address:#x} in shared memory, which is not a multiple of {align}");
            return stop(Hazard::Misaligned, message);
        }
        let (cta, at) = self.shared_place(w, space, lane, address, 1)?;
        let size = self.ctas[cta].shared.len();
        if u64::from(at) + u64::from(bytes) > size.into() {
            return stop(
                Hazard::OutOfBounds,
                format!("{bytes} bytes at {at:#x} of {size} bytes of shared memory"),
            );
        }
        Ok((cta, at))
    }

    /// The tensor map at a generic address.
    fn tiles(&mut self, w: usize, lane: usize, address: u64) -> Result<Tiles, Stop> {
        let mut bytes = [0; 128];
        if !address.is_multiple_of(64) {
            let message = format!("a tensor map at {address:#x}, which is not a multiple of 64");
            return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
        }
        if address & !(WINDOW - 1) == LOCAL_WINDOW {
            let message = "a tensor map lies in local memory, where engines cannot read it";
            return Err(Stop::new(Hazard::Operand, lane as u32, message));
        }
        for (n, byte) in bytes.iter_mut().enumerate() {
            *byte = self.generic_byte(w, lane, address + n as u64)?;
        }
        Tiles::decode(&bytes).ok_or_else(|| {
            Stop::new(Hazard::Operand, lane as u32, format!("there is no tensor map at {address:#x}"))
        })
    }

    /// Issues a copy to one CTA, or to the same place in each that a mask names.
    fn issue_loads(
        &mut self,
        w: usize,
        pc: u32,
        lane: usize,
        cta: usize,
        pieces: &[Piece],
        barrier: Address,
        ctas: Option<Operand>,
    ) -> Result<(), Stop> {
        self.count_copy(pieces);
        let address = self.addresses(w, barrier)[lane];
        let Some(ctas) = ctas else {
            let barrier = self.met(w, lane, Space::Cluster, address)?;
            return self.issue_load(w, pc, lane, cta, pieces.to_vec(), barrier);
        };
        let (_, at) = self.shared_place(w, Space::Cluster, lane, address, 8)?;
        let mask = self.value(w, ctas)[lane] as u16;
        if mask == 0 || u32::from(mask) >> self.ctas.len() != 0 {
            let message = format!("the mask {mask:#06x} for a cluster of {} CTAs", self.ctas.len());
            return Err(Stop::new(Hazard::Operand, lane as u32, message));
        }
        for cta in lanes(mask.into()) {
            self.meet(w, lane, (cta, at))?;
            self.issue_load(w, pc, lane, cta, pieces.to_vec(), (cta, at))?;
        }
        Ok(())
    }

    fn count_copy(&mut self, pieces: &[Piece]) {
        self.counters.bulk_copy(pieces.iter().filter_map(|piece| match piece.other {
            Other::Global(at) => Some((at, piece.bytes)),
            _ => None,
        }));
    }

    /// The stamp of what an engine does next.
    fn engine_stamp(&mut self, w: usize, engine: u32) -> Stamp {
        let threads = self.run.threads();
        let cta = self.cta_mut(w);
        cta.copies += 1;
        Stamp::new(cta.number, threads + engine, cta.copies, false)
    }

    fn issue_load(
        &mut self,
        w: usize,
        pc: u32,
        lane: usize,
        cta: usize,
        pieces: Vec<Piece>,
        barrier: At,
    ) -> Result<(), Stop> {
        // Copies to one mbarrier share an engine.
        let stamp = self.engine_stamp(w, barrier.1 / 8 % 16);
        for peer in [cta, barrier.0] {
            if peer == self.warps[w].cta {
                self.ctas[peer].visits.note(stamp);
            } else {
                self.visit_peer(w, lane, peer, stamp)?;
            }
        }
        for piece in &pieces {
            match piece.other {
                Other::Global(address) => drop(self.engine_access(w, lane, address, piece.bytes, None)?),
                Other::Shared(_, at) => self.engine_reads(w, lane, at, piece.bytes, stamp)?,
                Other::Nothing | Other::Value(_) => {}
            }
            let is_proxy = !matches!(piece.other, Other::Value(_));
            self.engine_writes(w, lane, (cta, piece.shared), piece.bytes, stamp, is_proxy)?;
        }
        for piece in &pieces {
            let states = &mut self.ctas[cta].shared.states;
            states[piece.shared as usize..][..piece.bytes as usize].fill(Byte::InFlight);
        }
        let bytes = pieces.iter().map(|piece| piece.bytes).sum();
        self.counters.bulk_bytes += u64::from(bytes);
        self.flights.push_back(Flight { w, lane, pc, cta, pieces, stamp, barrier, bytes });
        if self.run.schedule == Schedule::Eager {
            self.land_flight(self.flights.len() - 1)?;
        }
        Ok(())
    }

    fn issue_store(&mut self, w: usize, lane: usize, pieces: Vec<Piece>) -> Result<(), Stop> {
        let engine = self.warps[w].place % 16;
        self.count_copy(&pieces);
        let reads = self.engine_stamp(w, READERS + engine);
        let writes = self.engine_stamp(w, WRITERS + engine);
        for piece in pieces {
            let Other::Global(global) = piece.other else {
                continue;
            };
            self.counters.bulk_bytes += u64::from(piece.bytes);
            self.engine_reads(w, lane, piece.shared, piece.bytes, reads)?;
            for n in (0..piece.bytes).step_by(8) {
                let bytes = (piece.bytes - n).min(8);
                let value = self.cta(w).shared.load(piece.shared + n, bytes);
                let address = global + u64::from(n);
                let (allocation, offset) = self.engine_access(w, lane, address, bytes, Some(writes))?;
                self.run.memory.allocations()[allocation].store(offset, bytes, value);
            }
        }
        self.warps[w].stores_open[lane] = Some(Store { reads, writes });
        Ok(())
    }

    /// That an engine may write bytes of shared memory for a thread: it may where the thread may, and what
    /// threads wrote there it only overwrites behind a proxy fence, unless it is no proxy.
    fn engine_writes(
        &mut self,
        w: usize,
        lane: usize,
        (cta, at): At,
        bytes: u32,
        engine: Stamp,
        is_proxy: bool,
    ) -> Result<(), Stop> {
        let stop = |hazard, message| Err(Stop::new(hazard, lane as u32, message));
        match self.ctas[cta].shared.unreadable(at, bytes) {
            Some((at, Byte::InFlight)) => {
                let message =
                    format!("byte {at:#x} of shared memory belongs to another copy that is under way");
                return stop(Hazard::Async, message);
            }
            Some((at, Byte::Barrier)) => {
                return stop(Hazard::Async, format!("byte {at:#x} of shared memory belongs to an mbarrier"));
            }
            _ => {}
        }
        let stamp = self.stamp(w, lane, false);
        let by = Accessor { clock: &self.warps[w].clocks[lane], stamp };
        let threads = self.run.threads();
        let clock = &self.warps[w].clocks[lane];
        let mut unfenced = false;
        let checked = self.ctas[cta].shared.visit(at, bytes, |cell, mask| {
            unfenced |= is_proxy && cell.any_writer(mask, |writer| is_unseen(clock, writer, threads));
            cell.write_by_engine(&by, engine, mask)
        });
        if let Err(conflict) = checked {
            let what = format!("a bulk copy of {at:#x} in shared memory");
            return stop(Hazard::Race, self.race_message(&what, true, conflict));
        }
        if unfenced { stop(Hazard::Async, unfenced_message("shared", at.into())) } else { Ok(()) }
    }

    /// That an engine may read bytes of the CTA's shared memory for a thread: it may where the thread may,
    /// if a proxy fence has handed it what threads wrote there.
    pub(super) fn engine_reads(
        &mut self,
        w: usize,
        lane: usize,
        at: u32,
        bytes: u32,
        engine: Stamp,
    ) -> Result<(), Stop> {
        let threads = self.run.threads();
        let stamp = self.stamp(w, lane, false);
        let stop = |hazard, message| Err(Stop::new(hazard, lane as u32, message));
        let cta = &mut self.ctas[self.warps[w].cta];
        if at + bytes > cta.shared.len() {
            let message = format!("{bytes} bytes at {at:#x} of {} bytes of shared memory", cta.shared.len());
            return stop(Hazard::OutOfBounds, message);
        }
        match cta.shared.unreadable(at, bytes) {
            Some((at, Byte::Uninitialised)) => {
                return stop(
                    Hazard::Uninitialised,
                    format!("byte {at:#x} of shared memory was never written"),
                );
            }
            Some((at, state)) => {
                let owner = if state == Byte::Barrier { "an mbarrier" } else { "a copy that is under way" };
                return stop(Hazard::Async, format!("byte {at:#x} of shared memory belongs to {owner}"));
            }
            None => {}
        }
        let clock = &self.warps[w].clocks[lane];
        let by = Accessor { clock, stamp };
        let mut unfenced = false;
        let checked = cta.shared.visit(at, bytes, |cell, mask| {
            unfenced |= cell.any_writer(mask, |writer| is_unseen(clock, writer, threads));
            cell.read_by_engine(&by, engine, mask)
        });
        if let Err(conflict) = checked {
            let what = format!("{bytes} bytes at {at:#x} in shared memory by an engine");
            return stop(Hazard::Race, self.race_message(&what, false, conflict));
        }
        if unfenced { stop(Hazard::Async, unfenced_message("shared", at.into())) } else { Ok(()) }
    }

    /// A copy arrives.
    fn land_flight(&mut self, index: usize) -> Result<(), Stop> {
        let flight = self.flights.remove(index).expect("a copy under way");
        for piece in &flight.pieces {
            for n in (0..piece.bytes).step_by(8) {
                let bytes = (piece.bytes - n).min(8);
                let value = match piece.other {
                    Other::Nothing => 0,
                    Other::Value(value) => value,
                    Other::Shared(cta, at) => self.ctas[cta].shared.load(at + n, bytes),
                    Other::Global(global) => {
                        let found = self.run.memory.locate(global + u64::from(n), bytes.into());
                        let (allocation, offset) = found
                            .map_err(|message| Stop::new(Hazard::OutOfBounds, flight.lane as u32, message))?;
                        self.run.memory.allocations()[allocation].load(offset, bytes)
                    }
                };
                self.ctas[flight.cta].shared.store(piece.shared + n, bytes, value);
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
            let adjacent = match (last.other, piece.other) {
                (Other::Nothing, Other::Nothing) => true,
                (Other::Global(last_at), Other::Global(at)) => {
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
