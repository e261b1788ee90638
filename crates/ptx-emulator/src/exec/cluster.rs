//! What CTAs of a cluster share: a barrier, and each other's shared memory.
//!
//! Shared memory of another CTA may be used once that CTA has surely begun, and until it may have ended:
//! the thread must have heard of the CTA before, and some thread of the CTA of the access before the last
//! of them ends.

use std::sync::Arc;

use super::{Cluster, Flow, Step, Wait, lanes, memory, warp::then};
use crate::{
    clock::{Clock, Stamp},
    error::{Hazard, Stop},
    isa::{Op, Space},
    number::Lanes,
};

/// The barrier of all threads of the cluster. Which lanes have arrived their warps know.
#[derive(Debug, Default)]
pub(super) struct Barrier {
    /// What those who arrived in this phase have done and heard of.
    told: Option<Clock>,
    fenced: Option<Clock>,
    last_joined: Option<Arc<Clock>>,
    /// The same of the phase before.
    ended: Option<Arc<Clock>>,
    ended_fenced: Option<Arc<Clock>>,
    /// A clock before and after it heard that: many threads have the same.
    last_heard: Option<[Arc<Clock>; 2]>,
}

impl Cluster<'_> {
    pub(super) fn cluster_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        match op {
            Op::ClusterArrive { aligned, releases } => {
                let mask = if *aligned { self.warps[w].live } else { active };
                if *aligned && !self.rendezvous(w, pc, active, mask)? {
                    return Ok(Flow::Block(active));
                }
                self.arrive_at_cluster(w, mask, *releases)?;
                Ok(then(active, mask))
            }
            Op::ClusterWait { aligned } => {
                let mask = if *aligned { self.warps[w].live } else { active };
                if *aligned && !self.rendezvous(w, pc, active, mask)? {
                    return Ok(Flow::Block(active));
                }
                self.wait_for_cluster(w, pc, active, mask)
            }
            Op::MapAddress { space, d, a, rank } => {
                let (a, ranks) = (self.value(w, *a), self.value(w, *rank));
                let mut result = [0; 32];
                for lane in lanes(active) {
                    self.known_rank(w, lane, *space, a[lane])?;
                    let rank = ranks[lane] & 0xffff_ffff;
                    if rank >= self.ctas.len() as u64 {
                        let message = format!("rank {rank} in a cluster of {} CTAs", self.ctas.len());
                        return Err(Stop::new(Hazard::Operand, lane as u32, message));
                    }
                    let within = a[lane] & (memory::OWN - 1);
                    let window = a[lane] & !(memory::WINDOW - 1);
                    result[lane] = window | (rank + 1) << memory::RANK_SHIFT | within;
                }
                self.warps[w].set(*d, &result, active);
                Ok(Flow::Next)
            }
            Op::AddressRank { space, d, a } => {
                let a = self.value(w, *a);
                let mut result = [0; 32];
                for lane in lanes(active) {
                    result[lane] = self.known_rank(w, lane, *space, a[lane])? as u64;
                }
                self.warps[w].set(*d, &result, active);
                Ok(Flow::Next)
            }
            other => unreachable!("{other:?} is not about a cluster"),
        }
    }

    /// The rank of the CTA that an address in the space or window of shared memory belongs to.
    pub(super) fn rank(&self, w: usize, address: u64) -> Option<usize> {
        match (address & (memory::WINDOW - 1)) >> memory::RANK_SHIFT {
            0 => Some(self.warps[w].cta),
            part => usize::try_from(part - 1).ok().filter(|rank| *rank < self.ctas.len()),
        }
    }

    fn known_rank(&self, w: usize, lane: usize, space: Space, address: u64) -> Result<usize, Stop> {
        let window = if space == Space::Generic { memory::SHARED_WINDOW } else { 0 };
        let rank = if address & !(memory::WINDOW - 1) == window { self.rank(w, address) } else { None };
        rank.ok_or_else(|| {
            let message = format!("{address:#x} is not an address of shared memory in this cluster");
            Stop::new(Hazard::Operand, lane as u32, message)
        })
    }

    /// That a thread may use the shared memory of a CTA now, and that it does.
    pub(super) fn reach(&mut self, w: usize, lane: usize, cta: usize) -> Result<(), Stop> {
        if cta == self.warps[w].cta {
            return Ok(());
        }
        let stamp = self.stamp(w, lane, false);
        self.visit_peer(w, lane, cta, stamp)
    }

    /// The same for what an engine does on behalf of a thread.
    pub(super) fn visit_peer(&mut self, w: usize, lane: usize, cta: usize, by: Stamp) -> Result<(), Stop> {
        let peer = &mut self.ctas[cta];
        let stop = |reason: &str| {
            let message = format!("shared memory of CTA {:?}, {reason}", peer.id);
            Err(Stop::new(Hazard::Peer, lane as u32, message))
        };
        if !self.warps[w].clocks[lane].has_met(peer.number) {
            return stop("which may not have begun: no barrier of the cluster stands before");
        }
        if self.warps[peer.warps.clone()].iter().all(|warp| warp.live == 0) {
            return stop("which has ended");
        }
        peer.visits.note(by);
        Ok(())
    }

    /// Lanes have ended: the barrier no longer counts on them, and if they were the last of their CTA its
    /// shared memory is gone.
    pub(super) fn leave(&mut self, w: usize, mask: u32) -> Result<(), Stop> {
        let warp = &mut self.warps[w];
        let cta = &mut self.ctas[warp.cta];
        warp.arrived &= !mask;
        warp.passing &= !mask;
        let mut last = None;
        for lane in lanes(mask) {
            let clock = &warp.clocks[lane];
            let stores = warp.stores[lane].back().copied().flatten();
            let store = warp.stores_open[lane].or(stores);
            if store.is_some_and(|store| !clock.has_heard(store.reads)) {
                let message = "this thread ends, and a bulk store may still have to read shared memory";
                return Err(Stop::new(Hazard::Async, lane as u32, message));
            }
            if !last.is_some_and(|last| Arc::ptr_eq(last, clock)) {
                cta.heard.join(clock);
                last = Some(clock);
            }
        }
        self.complete_cluster();
        let cta = self.cta(w);
        if self.warps[cta.warps.clone()].iter().any(|warp| warp.live != 0) {
            return Ok(());
        }
        match cta.visits.unheard_by(&cta.heard) {
            None => Ok(()),
            Some(stamp) => {
                let message = format!(
                    "this CTA ends, and nothing orders that behind an access to its shared memory by {}",
                    self.name(stamp)
                );
                let hazard = if stamp.cta() == cta.number { Hazard::Async } else { Hazard::Peer };
                Err(Stop::new(hazard, mask.trailing_zeros(), message))
            }
        }
    }

    /// Requests to shared memory some of whose lanes may go to other CTAs; banks are counted at home only.
    pub(super) fn count_cluster_access(&mut self, w: usize, addresses: &Lanes, active: u32, bytes: u32) {
        let own = lanes(active).filter(|lane| self.rank(w, addresses[*lane]) == Some(self.warps[w].cta));
        let own = own.fold(0, |own, lane| own | 1 << lane);
        if own != 0 {
            self.counters.shared_request(addresses, own, bytes);
        }
        if own != active {
            self.counters.cluster_requests += 1;
        }
    }

    fn arrive_at_cluster(&mut self, w: usize, mask: u32, releases: bool) -> Result<(), Stop> {
        let twice = mask & (self.warps[w].arrived | self.warps[w].passing);
        if twice != 0 {
            let message = "this thread has not waited for the barrier of the cluster since it arrived last";
            return Err(Stop::new(Hazard::Arrival, twice.trailing_zeros(), message));
        }
        let thread = self.thread(w, 0);
        let home = &self.ctas[self.warps[w].cta];
        let barrier = &mut self.barrier;
        let warp = &mut self.warps[w];
        let told = barrier.told.get_or_insert_with(|| Clock::new(home.number, self.run.clock_size()));
        told.meet(home.number);
        for lane in lanes(mask) {
            let (clock, fenced) = (&warp.clocks[lane], &warp.fenced[lane]);
            if releases {
                if !barrier.last_joined.as_ref().is_some_and(|last| Arc::ptr_eq(last, clock)) {
                    told.join(clock);
                    barrier.last_joined = Some(clock.clone());
                }
                told.note(Stamp::new(home.number, thread + lane as u32, warp.epochs[lane], false));
                warp.epochs[lane] += 1;
            } else if let Some(fenced) = fenced {
                told.join(fenced);
            }
            if let Some(fenced) = fenced {
                barrier.fenced.get_or_insert_with(|| Clock::clone(fenced)).join(fenced);
            }
        }
        warp.arrived |= mask;
        self.complete_cluster();
        Ok(())
    }

    /// Ends the phase of the cluster's barrier if nobody is missing.
    fn complete_cluster(&mut self) {
        let missing = self.warps.iter().any(|warp| warp.live & !warp.arrived != 0);
        if missing || self.warps.iter().all(|warp| warp.arrived == 0) {
            return;
        }
        let ended = std::mem::take(&mut self.barrier);
        self.barrier.ended = ended.told.map(Arc::new);
        self.barrier.ended_fenced = ended.fenced.map(Arc::new);
        for warp in &mut self.warps {
            warp.passing = std::mem::take(&mut warp.arrived);
            warp.wake(|wait| wait == Wait::Cluster);
        }
    }

    fn wait_for_cluster(&mut self, w: usize, pc: u32, active: u32, mask: u32) -> Step {
        let warp = &mut self.warps[w];
        let missing = mask & !warp.passing;
        if missing & !warp.arrived != 0 {
            let message = "this thread waits for the barrier of the cluster without having arrived there";
            return Err(Stop::new(Hazard::Arrival, (missing & !warp.arrived).trailing_zeros(), message));
        }
        if missing != 0 {
            // Everybody asks again, so all stand where they came from.
            for lane in lanes(mask) {
                warp.counters[lane] = pc;
                warp.waits[lane] = Wait::Cluster;
            }
            warp.waiting |= mask;
            return Ok(Flow::Block(active));
        }
        warp.passing &= !mask;
        for lane in lanes(mask) {
            let barrier = &mut self.barrier;
            let warp = &mut self.warps[w];
            if let Some(ended) = &barrier.ended {
                let before = warp.clocks[lane].clone();
                match &barrier.last_heard {
                    Some([known, after]) if Arc::ptr_eq(known, &before) => warp.clocks[lane] = after.clone(),
                    _ => {
                        let mut after = Clock::clone(&before);
                        after.join(ended);
                        let after = Arc::new(after);
                        warp.clocks[lane] = after.clone();
                        barrier.last_heard = Some([before, after]);
                    }
                }
            }
            if let Some(fenced) = &barrier.ended_fenced {
                warp.fenced[lane] = Some(fenced.clone());
            }
        }
        Ok(then(active, mask))
    }
}
