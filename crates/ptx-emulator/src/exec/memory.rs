//! Loads, stores, atomics and fences.

use super::{
    Cluster, Flow, Step,
    check::{Access, Place},
    lanes,
};
use crate::{
    clock::Stamp,
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

    pub(super) fn land(&mut self, w: usize, at: u32, bytes: u32, by: Stamp) {
        let shared = &mut self.cta_mut(w).shared;
        for cell in &mut shared.cells[at as usize / 4..][..bytes as usize / 4] {
            cell.land(by);
        }
        shared.states[at as usize..][..bytes as usize].fill(Byte::Written);
    }
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
