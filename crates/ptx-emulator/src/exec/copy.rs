//! `cp.async`: copies of a thread that go on while it does other things.
//!
//! From its issue until its thread has waited for it, a copy owns its destination: any access there is
//! a bug. In the eager schedule it reads its source when it is issued, in the delayed one when it is
//! waited for; both are allowed to a GPU.

use super::{Cluster, lanes};
use crate::{
    error::{Hazard, Stop},
    isa::{Address, Guard, Op, Operand},
    memory::Byte,
    schedule::Schedule,
};

/// Copies that are waited for together.
#[derive(Clone, Debug, Default)]
pub(super) struct Group {
    copies: Vec<Copy>,
}

#[derive(Clone, Debug)]
struct Copy {
    to: u32,
    bytes: u32,
    /// Where it still has to read: allocation, offset and bytes; the rest is zero.
    from: Option<(usize, u64, u32)>,
}

impl Cluster<'_> {
    pub(super) fn copy_op(&mut self, w: usize, active: u32, op: &Op) -> Result<(), Stop> {
        match op {
            Op::CopyAsync { bytes, to, from, size, ignore } => {
                self.issue(w, active, *bytes, [*to, *from], *size, *ignore)
            }
            Op::CommitGroup => {
                for lane in lanes(active) {
                    let group = std::mem::take(&mut self.warps[w].open[lane]);
                    self.warps[w].groups[lane].push_back(group);
                }
                Ok(())
            }
            Op::WaitGroup { pending } => {
                for lane in lanes(active) {
                    match pending {
                        None => self.land_all(w, lane),
                        Some(pending) => {
                            while self.warps[w].groups[lane].len() > *pending as usize {
                                let group = self.warps[w].groups[lane].pop_front().expect("a group");
                                self.land_group(w, lane, group);
                            }
                        }
                    }
                }
                Ok(())
            }
            other => unreachable!("{other:?} is not a copy"),
        }
    }

    fn issue(
        &mut self,
        w: usize,
        active: u32,
        bytes: u32,
        [to, from]: [Address; 2],
        size: Option<Operand>,
        ignore: Option<Guard>,
    ) -> Result<(), Stop> {
        let (to, from) = (self.addresses(w, to), self.addresses(w, from));
        let sizes = size.map(|size| self.value(w, size));
        let ignored = ignore.map_or(0, |guard| self.warps[w].guard(guard));
        self.counters.global_request(&from, active, bytes);
        self.counters.shared_request(&to, active, bytes);
        for lane in lanes(active) {
            let wanted = match sizes {
                _ if ignored >> lane & 1 == 1 => 0,
                None => bytes,
                Some(sizes) => sizes[lane] as u32,
            };
            if wanted > bytes {
                let message = format!("{wanted} source bytes of a copy of {bytes}");
                return Err(Stop::new(Hazard::Operand, lane as u32, message));
            }
            if !from[lane].is_multiple_of(u64::from(bytes)) {
                let message = format!("{:#x} is not a multiple of {bytes}", from[lane]);
                return Err(Stop::new(Hazard::Misaligned, lane as u32, message));
            }
            let at = self.access_shared(w, lane, to[lane], bytes, true)?;
            let mut copy = Copy { to: at, bytes, from: None };
            // What is not wanted may lie anywhere.
            if wanted > 0 {
                let mut found = (0, 0);
                for byte in 0..wanted {
                    let place = self.read_global(w, lane, from[lane] + u64::from(byte), 1)?;
                    if byte == 0 {
                        found = place;
                    }
                }
                copy.from = Some((found.0, found.1, wanted));
            }
            if self.run.schedule != Schedule::Delayed {
                self.transfer(w, &mut copy);
            }
            self.cta_mut(w).shared.states[at as usize..][..bytes as usize].fill(Byte::InFlight);
            self.warps[w].open[lane].copies.push(copy);
        }
        Ok(())
    }

    /// Moves the bytes of a copy, once.
    fn transfer(&mut self, w: usize, copy: &mut Copy) {
        let source = copy.from.take();
        for byte in 0..copy.bytes {
            let value = match source {
                Some((index, offset, wanted)) if byte < wanted => {
                    self.run.memory.allocations()[index].load(offset + u64::from(byte), 1)
                }
                _ => 0,
            };
            self.cta_mut(w).shared.store(copy.to + byte, 1, value);
        }
    }

    fn land_group(&mut self, w: usize, lane: usize, group: Group) {
        let stamp = self.stamp(w, lane, false);
        for mut copy in group.copies {
            if self.run.schedule == Schedule::Delayed {
                self.transfer(w, &mut copy);
            }
            self.land(w, copy.to, copy.bytes, stamp);
        }
    }

    /// All copies of a lane, committed or not.
    pub(super) fn land_all(&mut self, w: usize, lane: usize) {
        while let Some(group) = self.warps[w].groups[lane].pop_front() {
            self.land_group(w, lane, group);
        }
        let open = std::mem::take(&mut self.warps[w].open[lane]);
        self.land_group(w, lane, open);
    }
}
