//! Loads, stores, atomics and fences, with all that is checked about them.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::{Arc, PoisonError},
};

use super::{Cluster, Flow, Step, lanes};
use crate::{
    cell::Conflict,
    clock::{Accessor, Clock, Stamp},
    error::{Hazard, Stop},
    isa::{Address, AtomicUpdate, Op, Operand, Order, Space, Type},
    memory::Byte,
    number::Lanes,
};

/// Generic addresses of shared, local and param space lie in windows of this size. In the window of
/// shared memory a CTA finds its own at the beginning, and that of rank r of its cluster from
/// `(r + 1) << RANK_SHIFT` on; addresses in shared space are the same without the window.
pub(super) const WINDOW: u64 = 1 << 56;
pub(super) const SHARED_WINDOW: u64 = 1 << 56;
pub(super) const RANK_SHIFT: u32 = 24;
/// What lies within one CTA's part of that window.
pub(super) const OWN: u64 = 1 << RANK_SHIFT;
pub(super) const LOCAL_WINDOW: u64 = 2 << 56;
pub(super) const PARAM_WINDOW: u64 = 3 << 56;

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Number of the allocation, and where in it.
    Global(usize, u64),
    /// Rank of the CTA whose it is, and where in it.
    Shared(usize, u32),
    /// Where in the local memory of the lane.
    Local(usize),
    Param(usize),
}

/// An access of one lane: `bytes` are all that it touches.
#[derive(Clone, Copy, Debug)]
struct Access {
    lane: usize,
    address: u64,
    bytes: u32,
}

impl Access {
    fn stop(self, hazard: Hazard, message: String) -> Stop {
        Stop::new(hazard, self.lane as u32, message)
    }
}

impl Cluster<'_> {
    pub(super) fn memory_op(&mut self, w: usize, active: u32, op: &Op) -> Step {
        match op {
            Op::Load { space, ty, order, constant, d, address } => {
                let addresses = self.addresses(w, *address);
                let bytes = ty.bytes() * d.len() as u32;
                let space = if *space == Space::Const { Space::Global } else { *space };
                self.count_access(w, space, &addresses, active, bytes);
                let asked = d[0].filter(|_| *order != Order::Weak);
                let before = asked.map(|d| self.warps[w].registers[d as usize]);
                for lane in lanes(active) {
                    let access = Access { lane, address: addresses[lane], bytes };
                    self.load(w, space, access, *ty, *order, *constant, d)?;
                }
                Ok(self.answered(w, asked, before))
            }
            Op::Store { space, ty, order, address, a } => {
                let addresses = self.addresses(w, *address);
                let bytes = ty.bytes() * a.len() as u32;
                self.count_access(w, *space, &addresses, active, bytes);
                for lane in lanes(active) {
                    let access = Access { lane, address: addresses[lane], bytes };
                    self.store(w, *space, access, *ty, *order, a)?;
                }
                Ok(Flow::Next)
            }
            Op::Atomic { space, ty, order, update, d, address, b } => {
                let addresses = self.addresses(w, *address);
                let b = self.value(w, *b);
                let compared = match update {
                    AtomicUpdate::CompareSwap(compared) => self.value(w, *compared),
                    AtomicUpdate::Apply(_) => [0; 32],
                };
                self.count_access(w, *space, &addresses, active, ty.bytes());
                let before = d.map(|d| self.warps[w].registers[d as usize]);
                for lane in lanes(active) {
                    let access = Access { lane, address: addresses[lane], bytes: ty.bytes() };
                    let old = self.atomic(w, *space, access, *order, *update, b[lane], compared[lane])?;
                    if let Some(d) = d {
                        self.warps[w].registers[*d as usize][lane] = old;
                    }
                }
                Ok(self.answered(w, *d, before))
            }
            Op::Fence => {
                for lane in lanes(active) {
                    self.fence(w, lane);
                }
                Ok(Flow::Next)
            }
            other => unreachable!("{other:?} is not a memory access"),
        }
    }

    /// Who is told again what it knew lets the others run: it may be waiting for them.
    fn answered(&self, w: usize, d: Option<u32>, before: Option<Lanes>) -> Flow {
        match d.zip(before) {
            Some((d, before)) if self.warps[w].registers[d as usize] == before => Flow::Yield,
            _ => Flow::Next,
        }
    }

    /// Addresses of 32 bits wrap there: of `4080 - 16 * tid`, a compiler may have 4080 as the offset.
    pub(super) fn addresses(&self, w: usize, address: Address) -> Lanes {
        let base = self.value(w, address.base);
        base.map(|base| match u32::try_from(base) {
            Ok(base) => base.wrapping_add_signed(address.offset as i32).into(),
            Err(_) => base.wrapping_add_signed(address.offset),
        })
    }

    fn count_access(&mut self, w: usize, space: Space, addresses: &Lanes, active: u32, bytes: u32) {
        let first = addresses[active.trailing_zeros() as usize & 31];
        match space {
            Space::Shared => self.counters.shared_request(addresses, active, bytes),
            Space::Cluster => self.count_cluster_access(w, addresses, active, bytes),
            Space::Generic if first & !(WINDOW - 1) == SHARED_WINDOW => {
                self.count_cluster_access(w, addresses, active, bytes);
            }
            Space::Global => self.counters.global_request(addresses, active, bytes),
            Space::Generic if first < WINDOW => self.counters.global_request(addresses, active, bytes),
            _ => {}
        }
    }

    /// Finds where an access goes and checks that it may.
    fn resolve(&self, w: usize, space: Space, access: Access) -> Result<Place, Stop> {
        let Access { address, bytes, .. } = access;
        if !address.is_multiple_of(u64::from(bytes)) {
            let message = format!("{bytes} bytes at {address:#x}, which is not a multiple of {bytes}");
            return Err(access.stop(Hazard::Misaligned, message));
        }
        let (space, offset) = match space {
            Space::Generic => match address & !(WINDOW - 1) {
                SHARED_WINDOW => (Space::Cluster, address - SHARED_WINDOW),
                LOCAL_WINDOW => (Space::Local, address - LOCAL_WINDOW),
                PARAM_WINDOW => (Space::Param, address - PARAM_WINDOW),
                _ => (Space::Global, address),
            },
            space => (space, address),
        };
        let within = |size: u64, name: &str| {
            if offset.checked_add(u64::from(bytes)).is_some_and(|end| end <= size) {
                Ok(())
            } else {
                let message = format!("{bytes} bytes at {offset:#x} of {size} bytes of {name} memory");
                Err(access.stop(Hazard::OutOfBounds, message))
            }
        };
        match space {
            Space::Shared => {
                within(self.cta(w).shared.len().into(), "shared")?;
                Ok(Place::Shared(self.warps[w].cta, offset as u32))
            }
            Space::Cluster => match self.rank(w, offset) {
                Some(rank) => {
                    let at = offset & (OWN - 1);
                    if at + u64::from(bytes) <= self.ctas[rank].shared.len().into() {
                        Ok(Place::Shared(rank, at as u32))
                    } else {
                        let size = self.ctas[rank].shared.len();
                        let message = format!(
                            "{bytes} bytes at {at:#x} of {size} bytes of shared memory of rank {rank}"
                        );
                        Err(access.stop(Hazard::OutOfBounds, message))
                    }
                }
                None => {
                    let message = format!("{offset:#x} belongs to no CTA of the cluster");
                    Err(access.stop(Hazard::OutOfBounds, message))
                }
            },
            Space::Local => {
                within(self.run.kernel.local_bytes.into(), "local")?;
                Ok(Place::Local(access.lane * self.run.frame() + offset as usize))
            }
            Space::Param if offset >= self.run.kernel.calls_at.into() => {
                let kernel = self.run.kernel;
                within((kernel.calls_at + kernel.call_bytes).into(), "param")?;
                let within = kernel.local_bytes as usize + (offset as usize - kernel.calls_at as usize);
                Ok(Place::Local(access.lane * self.run.frame() + within))
            }
            Space::Param => {
                within(self.run.params.len() as u64, "param")?;
                Ok(Place::Param(offset as usize))
            }
            _ => match self.run.memory.locate(address, bytes.into()) {
                Ok((allocation, offset)) => Ok(Place::Global(allocation, offset)),
                Err(message) => Err(access.stop(Hazard::OutOfBounds, message)),
            },
        }
    }

    fn load(
        &mut self,
        w: usize,
        space: Space,
        access: Access,
        ty: Type,
        order: Order,
        constant: bool,
        d: &[Option<u32>],
    ) -> Result<(), Stop> {
        let place = self.resolve(w, space, access)?;
        let size = ty.bytes();
        let mut values = [0_u64; 4];
        match place {
            Place::Global(index, offset) => {
                let memory = self.run.memory;
                let allocation = &memory.allocations()[index];
                for at in 0..d.len() as u32 {
                    if !allocation.is_initialised(offset + u64::from(at * size), size) {
                        let base = allocation.address();
                        let message = format!(
                            "{size} bytes at {:#x}, byte {} of the allocation at {base:#x}, were never written",
                            access.address + u64::from(at * size),
                            offset + u64::from(at * size)
                        );
                        return Err(access.stop(Hazard::Uninitialised, message));
                    }
                }
                self.check_global(w, access, index, offset, false, order, constant)?;
                let _whole = (order != Order::Weak).then(|| allocation.lock());
                for (at, value) in (0..d.len() as u64).zip(&mut values) {
                    *value = allocation.load(offset + at * u64::from(size), size);
                }
            }
            Place::Shared(cta, at) => {
                self.check_shared(w, access, cta, at, false, order)?;
                for (n, value) in (0..d.len() as u32).zip(&mut values) {
                    *value = self.ctas[cta].shared.load(at + n * size, size);
                }
            }
            Place::Local(at) => {
                for (n, value) in (0..d.len()).zip(&mut values) {
                    *value = from_bytes(&self.warps[w].local[at + n * size as usize..][..size as usize]);
                }
            }
            Place::Param(at) => {
                for (n, value) in (0..d.len()).zip(&mut values) {
                    *value = from_bytes(&self.run.params[at + n * size as usize..][..size as usize]);
                }
            }
        }
        if order != Order::Weak {
            self.hear_at(w, access.lane, place, access.address, order);
        }
        for (d, value) in d.iter().zip(values) {
            if let Some(d) = d {
                self.warps[w].registers[*d as usize][access.lane] = extend(value, ty);
            }
        }
        Ok(())
    }

    fn store(
        &mut self,
        w: usize,
        space: Space,
        access: Access,
        ty: Type,
        order: Order,
        a: &[Operand],
    ) -> Result<(), Stop> {
        let place = self.resolve(w, space, access)?;
        let (lane, size) = (access.lane, ty.bytes());
        let mut values = [0_u64; 4];
        for (value, operand) in values.iter_mut().zip(a) {
            *value = match operand {
                Operand::Register(number) => self.warps[w].registers[*number as usize][lane],
                Operand::Immediate(value) => *value,
                Operand::Special(_) => self.value(w, *operand)[lane],
            };
        }
        let values = &values[..a.len()];
        if order != Order::Weak {
            self.tell_at(w, lane, place, access.address, order, false);
        }
        match place {
            Place::Global(index, offset) => {
                self.check_global(w, access, index, offset, true, order, false)?;
                let allocation = &self.run.memory.allocations()[index];
                let _whole = (order != Order::Weak).then(|| allocation.lock());
                for (at, value) in (0..).zip(values) {
                    allocation.store(offset + at * u64::from(size), size, *value);
                }
            }
            Place::Shared(cta, at) => {
                self.check_shared(w, access, cta, at, true, order)?;
                for (n, value) in (0..).zip(values) {
                    self.ctas[cta].shared.store(at + n * size, size, *value);
                }
            }
            Place::Local(at) => {
                for (n, value) in values.iter().enumerate() {
                    let bytes = value.to_le_bytes();
                    self.warps[w].local[at + n * size as usize..][..size as usize]
                        .copy_from_slice(&bytes[..size as usize]);
                }
            }
            Place::Param(_) => {
                return Err(access.stop(Hazard::OutOfBounds, "parameters cannot be written".into()));
            }
        }
        Ok(())
    }

    fn atomic(
        &mut self,
        w: usize,
        space: Space,
        access: Access,
        order: Order,
        update: AtomicUpdate,
        b: u64,
        compared: u64,
    ) -> Result<u64, Stop> {
        let place = self.resolve(w, space, access)?;
        let bytes = access.bytes;
        let mask = if bytes == 8 { u64::MAX } else { (1 << (8 * bytes)) - 1 };
        let new = |old: u64| match update {
            AtomicUpdate::Apply(update) => update(old, b) & mask,
            AtomicUpdate::CompareSwap(_) if old == compared & mask => b & mask,
            AtomicUpdate::CompareSwap(_) => old,
        };
        let old = match place {
            Place::Global(index, offset) => {
                let memory = self.run.memory;
                let allocation = &memory.allocations()[index];
                if !allocation.is_initialised(offset, bytes) {
                    let message = format!("{bytes} bytes at {:#x} were never written", access.address);
                    return Err(access.stop(Hazard::Uninitialised, message));
                }
                self.check_global(w, access, index, offset, true, order, false)?;
                let _whole = allocation.lock();
                let old = allocation.load(offset, bytes);
                allocation.store(offset, bytes, new(old));
                old
            }
            Place::Shared(cta, at) => {
                self.reach(w, access.lane, cta)?;
                self.check_shared_state(access, cta, at, true)?;
                self.check_shared(w, access, cta, at, true, order)?;
                let shared = &mut self.ctas[cta].shared;
                let old = shared.load(at, bytes);
                shared.store(at, bytes, new(old));
                old
            }
            Place::Local(_) | Place::Param(_) => {
                let message = "an atomic needs global or shared memory".into();
                return Err(access.stop(Hazard::OutOfBounds, message));
            }
        };
        self.hear_at(w, access.lane, place, access.address, order);
        self.tell_at(w, access.lane, place, access.address, order, true);
        Ok(old)
    }

    fn check_global(
        &mut self,
        w: usize,
        access: Access,
        index: usize,
        offset: u64,
        writes: bool,
        order: Order,
        constant: bool,
    ) -> Result<(), Stop> {
        let by = self.accessor(w, access.lane, order != Order::Weak);
        let shadow = self.run.shadow;
        let checked = if writes {
            shadow.write(index, offset, access.bytes, &by)
        } else if constant {
            // Even an ordered write may not be seen on this path.
            let mut stale = false;
            let checked = shadow.visit(index, offset, access.bytes, |cell, mask| {
                stale |= cell.is_written();
                cell.read(&by, mask)
            });
            if stale && checked.is_ok() {
                let message = format!(
                    "{} bytes at {:#x} are read past the coherent caches (.nc), and this launch writes them",
                    access.bytes, access.address
                );
                return Err(access.stop(Hazard::Race, message));
            }
            checked
        } else {
            shadow.read(index, offset, access.bytes, &by)
        };
        checked.map_err(|conflict| self.race(access, "global", writes, conflict))
    }

    pub(super) fn race_message(&self, what: &str, writes: bool, conflict: Conflict) -> String {
        let verb = if writes { "the write of" } else { "the read of" };
        let (other, wrote) = (conflict.other, conflict.wrote);
        let done = match (other.thread() >= self.run.threads(), wrote) {
            (true, _) => "",
            (false, true) => "a write by ",
            (false, false) => "a read by ",
        };
        format!("{verb} {what} and {done}{} are not ordered", self.name(other))
    }

    /// Who made an access, for a message.
    pub(super) fn name(&self, stamp: Stamp) -> String {
        let (cta, thread) = (stamp.cta(), stamp.thread());
        let [x, y, _] = self.run.grid;
        let cta = [cta % x, cta / x % y, cta / x / y];
        if thread >= self.run.threads() {
            let whose = if self.ctas.len() > 1 { format!(" of CTA {cta:?}") } else { String::new() };
            return format!("an asynchronous copy{whose} that this thread has not waited for");
        }
        let [x, y, _] = self.run.block;
        format!("thread {:?} of CTA {cta:?}", [thread % x, thread / x % y, thread / x / y])
    }

    fn race(&self, access: Access, space: &str, writes: bool, conflict: Conflict) -> Stop {
        let what = format!("{} bytes at {:#x} in {space} memory", access.bytes, access.address);
        access.stop(Hazard::Race, self.race_message(&what, writes, conflict))
    }

    /// That bytes of shared memory are in a state that an access may meet.
    fn check_shared_state(&self, access: Access, cta: usize, at: u32, reads: bool) -> Result<(), Stop> {
        match self.ctas[cta].shared.unreadable(at, access.bytes) {
            Some((byte, Byte::Uninitialised)) if reads => {
                let message = format!("byte {byte:#x} of shared memory was never written");
                Err(access.stop(Hazard::Uninitialised, message))
            }
            Some((byte, Byte::InFlight)) => {
                let message = format!(
                    "byte {byte:#x} of shared memory belongs to an asynchronous copy that nobody waited for"
                );
                Err(access.stop(Hazard::Async, message))
            }
            Some((byte, Byte::Barrier)) => {
                let message = format!("byte {byte:#x} of shared memory belongs to an mbarrier");
                Err(access.stop(Hazard::Async, message))
            }
            _ => Ok(()),
        }
    }

    fn check_shared(
        &mut self,
        w: usize,
        access: Access,
        cta: usize,
        at: u32,
        writes: bool,
        order: Order,
    ) -> Result<(), Stop> {
        self.reach(w, access.lane, cta)?;
        self.check_shared_state(access, cta, at, !writes)?;
        let stamp = self.stamp(w, access.lane, order != Order::Weak);
        let by = Accessor { clock: &self.warps[w].clocks[access.lane], stamp };
        let checked = self.ctas[cta].shared.visit(at, access.bytes, |cell, mask| {
            if writes { cell.write(&by, mask) } else { cell.read(&by, mask) }
        });
        checked.map_err(|conflict| self.race(access, "shared", writes, conflict))
    }

    /// Where aligned bytes of shared memory lie: rank of the CTA, and place in it.
    pub(super) fn shared_place(
        &self,
        w: usize,
        space: Space,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<(usize, u32), Stop> {
        let access = Access { lane, address, bytes };
        match self.resolve(w, space, access)? {
            Place::Shared(cta, at) => Ok((cta, at)),
            _ => Err(access.stop(Hazard::OutOfBounds, format!("{address:#x} is not in shared memory"))),
        }
    }

    /// An access to a matrix row or the like: aligned bytes of the CTA's own shared memory, all checks made.
    pub(super) fn access_shared(
        &mut self,
        w: usize,
        lane: usize,
        address: u64,
        bytes: u32,
        writes: bool,
    ) -> Result<u32, Stop> {
        let (cta, at) = self.shared_place(w, Space::Shared, lane, address, bytes)?;
        let access = Access { lane, address, bytes };
        self.check_shared(w, access, cta, at, writes, Order::Weak).map(|()| at)
    }

    /// Checks a read of device memory, and where it is.
    pub(super) fn read_global(
        &mut self,
        w: usize,
        lane: usize,
        address: u64,
        bytes: u32,
    ) -> Result<(usize, u64), Stop> {
        let access = Access { lane, address, bytes };
        let Place::Global(index, offset) = self.resolve(w, Space::Global, access)? else {
            unreachable!("global space is global");
        };
        let allocation = &self.run.memory.allocations()[index];
        if !allocation.is_initialised(offset, bytes) {
            let message = format!("{bytes} bytes at {address:#x} hold some that were never written");
            return Err(access.stop(Hazard::Uninitialised, message));
        }
        self.check_global(w, access, index, offset, false, Order::Weak, false)?;
        Ok((index, offset))
    }

    /// Checks an access of an engine to device memory on behalf of a thread, and where it is. What threads
    /// wrote there in this launch it meets only behind a proxy fence.
    pub(super) fn engine_access(
        &self,
        w: usize,
        lane: usize,
        address: u64,
        bytes: u32,
        writes: Option<Stamp>,
    ) -> Result<(usize, u64), Stop> {
        let access = Access { lane, address, bytes };
        let Place::Global(index, offset) = self.resolve(w, Space::Global, access)? else {
            unreachable!("global space is global");
        };
        let allocation = &self.run.memory.allocations()[index];
        if writes.is_none() && !allocation.is_initialised(offset, bytes) {
            let message = format!("{bytes} bytes at {address:#x} hold some that were never written");
            return Err(access.stop(Hazard::Uninitialised, message));
        }
        let threads = self.run.threads();
        let by = self.accessor(w, lane, false);
        let mut unfenced = false;
        let checked = self.run.shadow.visit(index, offset, bytes, |cell, mask| {
            unfenced |= cell.any_writer(mask, |writer| is_unseen(by.clock, writer, threads));
            match writes {
                Some(engine) => cell.write_by_engine(&by, engine, mask),
                None => cell.read(&by, mask),
            }
        });
        checked.map_err(|conflict| self.race(access, "global", writes.is_some(), conflict))?;
        if unfenced {
            return Err(access.stop(Hazard::Async, unfenced_message("global", address)));
        }
        Ok((index, offset))
    }

    /// A byte at a generic address.
    pub(super) fn generic_byte(&mut self, w: usize, lane: usize, address: u64) -> Result<u8, Stop> {
        let access = Access { lane, address, bytes: 1 };
        match self.resolve(w, Space::Generic, access)? {
            Place::Param(at) => Ok(self.run.params[at]),
            Place::Local(at) => Ok(self.warps[w].local[at]),
            Place::Global(..) => {
                let (index, offset) = self.read_global(w, lane, address, 1)?;
                Ok(self.run.memory.allocations()[index].load(offset, 1) as u8)
            }
            other => Err(access.stop(
                Hazard::Operand,
                format!("{other:?} lies in neither param nor global nor local memory"),
            )),
        }
    }

    /// A value in a thread's own param space, where the parser has put it.
    pub(super) fn param(&self, w: usize, lane: usize, at: u64) -> u64 {
        let place = self.param_place(lane, at);
        let end = (place + 8).min((lane + 1) * self.run.frame());
        from_bytes(&self.warps[w].local[place..end])
    }

    /// Sets 4 bytes there.
    pub(super) fn set_param(&mut self, w: usize, lane: usize, at: u64, value: u32) {
        let place = self.param_place(lane, at);
        self.warps[w].local[place..][..4].copy_from_slice(&value.to_le_bytes());
    }

    fn param_place(&self, lane: usize, at: u64) -> usize {
        let kernel = self.run.kernel;
        lane * self.run.frame() + kernel.local_bytes as usize + at as usize - kernel.calls_at as usize
    }

    /// A fence: what the lane did so far is what its next strong write tells, and what its strong
    /// reads saw told is now heard.
    fn fence(&mut self, w: usize, lane: usize) {
        if let Some(rumour) = self.warps[w].rumours[lane].take() {
            self.hear(w, lane, &rumour);
        }
        let told = self.tell(w, lane);
        self.warps[w].fenced[lane] = Some(told);
    }

    /// A strong read hears, or will at the next fence, what was told at the address.
    fn hear_at(&mut self, w: usize, lane: usize, place: Place, address: u64, order: Order) {
        let heard = match place {
            Place::Global(..) => {
                let told = self.run.shadow.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.get(&address).cloned()
            }
            Place::Shared(cta, at) => self.ctas[cta].told.get(&at).cloned(),
            Place::Local(_) | Place::Param(_) => None,
        };
        let Some(heard) = heard else {
            return;
        };
        if order.acquires() {
            self.hear(w, lane, &heard);
            return;
        }
        match &mut self.warps[w].rumours[lane] {
            Some(known) => Arc::make_mut(known).join(&heard),
            none => *none = Some(heard),
        }
    }

    /// A strong write tells what it releases; a read-modify-write hands on what was told before.
    fn tell_at(&mut self, w: usize, lane: usize, place: Place, address: u64, order: Order, keeps: bool) {
        let released =
            if order.releases() { Some(self.tell(w, lane)) } else { self.warps[w].fenced[lane].clone() };
        match place {
            Place::Global(..) => {
                let mut told = self.run.shadow.told.lock().unwrap_or_else(PoisonError::into_inner);
                hand_on(&mut told, address, released, keeps);
            }
            Place::Shared(cta, at) => hand_on(&mut self.ctas[cta].told, at, released, keeps),
            Place::Local(_) | Place::Param(_) => {}
        }
    }

    pub(super) fn land(&mut self, w: usize, at: u32, bytes: u32, by: Stamp) {
        let shared = &mut self.cta_mut(w).shared;
        for cell in &mut shared.cells[at as usize / 4..][..bytes as usize / 4] {
            cell.land(by);
        }
        shared.states[at as usize..][..bytes as usize].fill(Byte::Written);
    }
}

/// What is told at an address from now on: what is released there, and, if that is kept, what was before.
fn hand_on<Key: Eq + Hash>(
    told: &mut HashMap<Key, Arc<Clock>>,
    at: Key,
    released: Option<Arc<Clock>>,
    keeps: bool,
) {
    match (told.entry(at), released) {
        (Entry::Occupied(before), None) if !keeps => drop(before.remove()),
        (Entry::Occupied(mut before), Some(new)) if keeps => Arc::make_mut(before.get_mut()).join(&new),
        (_, None) => {}
        (entry, Some(new)) => drop(entry.insert_entry(new)),
    }
}

/// Whether engines may not see what somebody wrote: a thread without a proxy fence behind it.
pub(super) fn is_unseen(clock: &Clock, writer: Stamp, threads: u32) -> bool {
    writer.thread() < threads && !clock.has_handed_over(writer)
}

/// What to say where an engine meets what it may not see.
pub(super) fn unfenced_message(space: &str, at: u64) -> String {
    format!(
        "bytes at {at:#x} of {space} memory were written by a thread, and no fence.proxy.async stands between"
    )
}

fn from_bytes(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(value)
}

/// Signed types fill the register with their sign: it may be wider.
fn extend(value: u64, ty: Type) -> u64 {
    match ty {
        Type::S8 => value as i8 as i64 as u64,
        Type::S16 => value as i16 as i64 as u64,
        Type::S32 => value as i32 as i64 as u64,
        _ => value,
    }
}
