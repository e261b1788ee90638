//! Where an access goes, and that it may: bounds, alignment, what is there, and who else was.

use super::{
    Cluster,
    memory::{LOCAL_WINDOW, OWN, PARAM_WINDOW, SHARED_WINDOW, WINDOW},
};
use crate::{
    cell::Conflict,
    clock::{Accessor, Clock, Stamp},
    error::{Hazard, Stop},
    isa::{Order, Space},
    memory::Byte,
};

/// Where an access goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
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
pub(super) struct Access {
    pub(super) lane: usize,
    pub(super) address: u64,
    pub(super) bytes: u32,
}

impl Access {
    pub(super) fn stop(self, hazard: Hazard, message: String) -> Stop {
        Stop::new(hazard, self.lane as u32, message)
    }
}

impl Cluster<'_> {
    /// Finds where an access goes and checks that it may.
    pub(super) fn resolve(&self, w: usize, space: Space, access: Access) -> Result<Place, Stop> {
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

    pub(super) fn check_global(
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

    pub(super) fn check_shared(
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

    /// That bytes of shared memory are in a state that an access may meet.
    pub(super) fn check_shared_state(
        &self,
        access: Access,
        cta: usize,
        at: u32,
        reads: bool,
    ) -> Result<(), Stop> {
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

    pub(super) fn race(&self, access: Access, space: &str, writes: bool, conflict: Conflict) -> Stop {
        let what = format!("{} bytes at {:#x} in {space} memory", access.bytes, access.address);
        access.stop(Hazard::Race, self.race_message(&what, writes, conflict))
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
