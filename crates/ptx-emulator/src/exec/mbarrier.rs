//! Barriers in shared memory that count arrivals and bytes, in phases.

use std::sync::Arc;

use super::{Cluster, Flow, Step, Wait, lanes};
use crate::{
    clock::{Accessor, Clock, Stamp},
    error::{Hazard, Stop},
    isa::{Op, Space},
    memory::Byte,
    schedule::Schedule,
};

/// The largest count that fits an mbarrier.
const MOST: u32 = (1 << 20) - 1;

/// Rank of a CTA, and an address in its shared memory.
pub(super) type At = (usize, u32);

#[derive(Debug)]
pub(super) struct Phased {
    /// Arrivals that end a phase.
    expected: u32,
    /// Those still missing in this one.
    pending: u32,
    /// Bytes that copies still owe to this phase.
    bytes: i64,
    phase: u64,
    /// What those who arrived in this phase have done and heard of.
    arriving: Clock,
    /// The same of the phases that ended.
    ended: Arc<Clock>,
}

impl Phased {
    pub(super) fn describe(&self) -> String {
        format!(
            ": phase {}, {} of {} arrivals missing, {} bytes",
            self.phase, self.pending, self.expected, self.bytes
        )
    }

    fn has_ended(&self, parity: u64) -> bool {
        self.phase & 1 != parity & 1
    }
}

/// An arrival that happens when the copies of a lane are done.
#[derive(Debug)]
pub(super) struct Owed {
    w: usize,
    lane: usize,
    pc: u32,
    address: u32,
}

impl Cluster<'_> {
    pub(super) fn mbarrier_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        let (Op::BarrierInit { space, address, .. }
        | Op::BarrierInvalidate { space, address }
        | Op::BarrierArrive { space, address, .. }
        | Op::BarrierExpect { space, address, .. }
        | Op::BarrierComplete { space, address, .. }
        | Op::BarrierTest { space, address, .. }
        | Op::BarrierCopies { space, address, .. }) = op
        else {
            unreachable!("{op:?} is not about an mbarrier");
        };
        let addresses = self.addresses(w, *address);
        let mut blocked = 0;
        let mut asks_again = false;
        for lane in lanes(active) {
            let at = self.phased_at(w, lane, *space, addresses[lane])?;
            let elsewhere = at.0 != self.warps[w].cta;
            let local = !matches!(
                op,
                Op::BarrierArrive { state: None, .. } | Op::BarrierExpect { .. } | Op::BarrierComplete { .. }
            );
            if elsewhere && local {
                let message = format!("the mbarrier at {:#x} belongs to another CTA", addresses[lane]);
                return Err(Stop::new(Hazard::Operand, lane as u32, message));
            }
            match op {
                Op::BarrierInit { count, .. } => {
                    let count = self.value(w, *count)[lane] as u32;
                    self.init(w, lane, at, count)?;
                    continue;
                }
                _ => self.meet(w, lane, at)?,
            }
            match op {
                Op::BarrierInvalidate { .. } => {
                    let cta = &mut self.ctas[at.0];
                    cta.phased.remove(&at.1);
                    cta.shared.states[at.1 as usize..][..8].fill(Byte::Uninitialised);
                }
                Op::BarrierArrive { state, count, expect, drop, complete, .. } => {
                    let count = self.value(w, *count)[lane] as u32;
                    if let Some(expect) = expect {
                        let bytes = self.value(w, *expect)[lane] as u32;
                        self.known(at).bytes += i64::from(bytes);
                    }
                    let phase = self.known(at).phase;
                    self.arrive_at(w, lane, at, count, *drop)?;
                    if !complete && self.known(at).phase != phase {
                        let message =
                            format!("an arrival that must not end a phase ended one of {:#x}", at.1);
                        return Err(Stop::new(Hazard::Arrival, lane as u32, message));
                    }
                    if let Some(state) = state {
                        self.warps[w].registers[*state as usize][lane] = phase;
                    }
                }
                Op::BarrierExpect { bytes, .. } => {
                    let bytes = self.value(w, *bytes)[lane] as u32;
                    self.known(at).bytes += i64::from(bytes);
                }
                Op::BarrierComplete { bytes, .. } => {
                    let bytes = self.value(w, *bytes)[lane] as u32;
                    self.known(at).bytes -= i64::from(bytes);
                    self.end_phase(at);
                }
                Op::BarrierTest { p, phase, parity, blocks, .. } => {
                    let phase = self.value(w, *phase)[lane];
                    let barrier = self.known(at);
                    let ended = if *parity { barrier.has_ended(phase) } else { barrier.phase > phase };
                    let heard = barrier.ended.clone();
                    // A wait may give up early, so programs have to ask again.
                    let random = matches!(self.run.schedule, Schedule::Random(_));
                    let gives_up = random && self.random.below(8) == 0;
                    if !ended && *blocks && !gives_up {
                        self.warps[w].waits[lane] = Wait::Phase { address: at.1, parity: phase & 1 };
                        self.warps[w].waiting |= 1 << lane;
                        blocked |= 1 << lane;
                        continue;
                    }
                    if ended {
                        self.hear(w, lane, &heard);
                    }
                    asks_again |= !ended;
                    self.warps[w].set_predicate(*p, if ended { u32::MAX } else { 0 }, 1 << lane);
                }
                Op::BarrierCopies { counted, .. } => {
                    if *counted {
                        self.known(at).pending += 1;
                    }
                    self.owed.push_back(Owed { w, lane, pc, address: at.1 });
                    if self.run.schedule != Schedule::Delayed {
                        self.pay()?;
                    }
                }
                _ => {}
            }
        }
        Ok(match blocked {
            0 if asks_again => Flow::Yield,
            0 => Flow::Next,
            blocked => Flow::Block(blocked),
        })
    }

    /// Where an mbarrier lies, if one can lie there: rank of the CTA, and address there.
    fn phased_at(&self, w: usize, lane: usize, space: Space, address: u64) -> Result<At, Stop> {
        self.shared_place(w, space, lane, address, 8)
    }

    fn init(&mut self, w: usize, lane: usize, (cta, at): At, count: u32) -> Result<(), Stop> {
        if self.ctas[cta].phased.contains_key(&at) {
            let message = format!("there is an mbarrier at {at:#x} already");
            return Err(Stop::new(Hazard::Arrival, lane as u32, message));
        }
        if count == 0 || count > MOST {
            let message = format!("an mbarrier for {count} arrivals; it must be from 1 to {MOST}");
            return Err(Stop::new(Hazard::Arrival, lane as u32, message));
        }
        self.access_shared(w, lane, at.into(), 8, true)?;
        let cta = &mut self.ctas[cta];
        cta.shared.states[at as usize..][..8].fill(Byte::Barrier);
        let silent = Clock::new(cta.number, self.run.clock_size());
        let barrier = Phased {
            expected: count,
            pending: count,
            bytes: 0,
            phase: 0,
            arriving: silent.clone(),
            ended: Arc::new(silent),
        };
        cta.phased.insert(at, barrier);
        Ok(())
    }

    /// That there is an mbarrier, and that this thread has heard of its beginning.
    pub(super) fn meet(&mut self, w: usize, lane: usize, (cta, at): At) -> Result<(), Stop> {
        self.reach(w, lane, cta)?;
        if !self.ctas[cta].phased.contains_key(&at) {
            let message = format!("there is no mbarrier at {at:#x}");
            return Err(Stop::new(Hazard::Uninitialised, lane as u32, message));
        }
        let stamp = self.stamp(w, lane, true);
        let by = Accessor { clock: &self.warps[w].clocks[lane], stamp };
        let met = self.ctas[cta].shared.visit(at, 8, |cell, mask| cell.read(&by, mask));
        met.map_err(|conflict| {
            let message = self.race_message(&format!("the mbarrier at {at:#x}"), false, conflict);
            Stop::new(Hazard::Race, lane as u32, message)
        })
    }

    /// Where an mbarrier lies that this thread may use.
    pub(super) fn met(&mut self, w: usize, lane: usize, space: Space, address: u64) -> Result<At, Stop> {
        let at = self.phased_at(w, lane, space, address)?;
        self.meet(w, lane, at)?;
        Ok(at)
    }

    /// Bytes of a copy arrive, and with them word of what it wrote.
    pub(super) fn complete_bytes(
        &mut self,
        lane: usize,
        at: At,
        bytes: u32,
        stamp: Stamp,
    ) -> Result<(), Stop> {
        let Some(barrier) = self.ctas[at.0].phased.get_mut(&at.1) else {
            let message = format!("the mbarrier at {:#x} that a copy arrives at is gone", at.1);
            return Err(Stop::new(Hazard::Arrival, lane as u32, message));
        };
        barrier.bytes -= i64::from(bytes);
        barrier.arriving.note(stamp);
        self.end_phase(at);
        Ok(())
    }

    /// An mbarrier that was met.
    fn known(&mut self, (cta, at): At) -> &mut Phased {
        self.ctas[cta].phased.get_mut(&at).expect("an mbarrier that was met")
    }

    fn arrive_at(&mut self, w: usize, lane: usize, at: At, count: u32, drop: bool) -> Result<(), Stop> {
        let told = self.tell(w, lane);
        let barrier = self.known(at);
        if count == 0 || count > barrier.pending {
            let message = format!("{count} arrivals at {:#x}, where {} are missing", at.1, barrier.pending);
            return Err(Stop::new(Hazard::Arrival, lane as u32, message));
        }
        barrier.arriving.join(&told);
        barrier.pending -= count;
        if drop {
            barrier.expected -= count;
        }
        self.end_phase(at);
        Ok(())
    }

    /// Ends the phase if nothing is missing, and wakes who waits for that.
    fn end_phase(&mut self, at: At) {
        let barrier = self.known(at);
        if barrier.pending != 0 || barrier.bytes != 0 {
            return;
        }
        barrier.phase += 1;
        barrier.pending = barrier.expected;
        barrier.ended = Arc::new(barrier.arriving.clone());
        let cta = &self.ctas[at.0];
        for warp in &mut self.warps[cta.warps.clone()] {
            warp.wake(|wait| matches!(wait, Wait::Phase { address, .. } if address == at.1));
        }
    }

    /// The arrival that has been owed longest, if there is one.
    fn pay(&mut self) -> Result<bool, Stop> {
        let Some(Owed { w, lane, address, .. }) = self.owed.pop_front() else {
            return Ok(false);
        };
        self.land_all(w, lane);
        let at = (self.warps[w].cta, address);
        if !self.ctas[at.0].phased.contains_key(&address) {
            let message = format!("the mbarrier at {address:#x} that copies arrive at is gone");
            return Err(Stop::new(Hazard::Arrival, lane as u32, message));
        }
        self.arrive_at(w, lane, at, 1, false)?;
        Ok(true)
    }

    /// The same, outside of an instruction.
    pub(super) fn land_owed(&mut self) -> Result<bool, crate::error::Fault> {
        let Some((w, pc)) = self.owed.front().map(|owed| (owed.w, owed.pc)) else {
            return Ok(false);
        };
        self.pay().map_err(|stop| self.fault(w, pc, stop))
    }
}
