//! The sixteen numbered barriers of a CTA.

use std::sync::Arc;

use super::{Cluster, Flow, Step, Wait, lanes};
use crate::{
    clock::Clock,
    error::{Hazard, Stop},
    isa::{Guard, Op, Operand, Reduce},
};

#[derive(Debug, Default)]
pub(super) struct Barrier {
    /// Threads that it waits for; absent for all that have not ended.
    expected: Option<u32>,
    arrived: u32,
    /// The instruction that all threads of the CTA are to execute, where it is aligned and for all.
    place: Option<u32>,
    /// Warps and lanes that wait at it.
    waiting: Vec<(usize, u32)>,
    /// What those who arrived have done and heard of.
    told: Option<Clock>,
    last_joined: Option<Arc<Clock>>,
    fenced: Option<Clock>,
    /// Threads whose predicate held, and where the result goes in each warp.
    held: u32,
    results: Vec<(usize, u32, Reduce, u32)>,
}

impl Barrier {
    pub(super) fn describe(&self) -> String {
        match self.expected {
            Some(expected) => format!(" ({} of {expected} have arrived)", self.arrived),
            None => format!(" ({} have arrived, all are expected)", self.arrived),
        }
    }
}

impl Cluster<'_> {
    pub(super) fn barrier_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        let Op::Barrier { waits, aligned, id, threads, reduce } = op else {
            unreachable!("{op:?} is not a barrier");
        };
        let live = self.warps[w].live;
        let mask = if *aligned { live } else { active };
        if *aligned && !self.rendezvous(w, pc, active, live)? {
            return Ok(Flow::Block(active));
        }
        let lane = mask.trailing_zeros();
        let id = self.uniform(w, mask, *id, "the barrier's number")?;
        let Some(id) = u32::try_from(id).ok().filter(|id| *id < 16) else {
            return Err(Stop::new(Hazard::Operand, lane, format!("there is no barrier {id}, only 0 to 15")));
        };
        let expected = match threads {
            None => None,
            Some(threads) => {
                let count = self.uniform(w, mask, *threads, "the barrier's thread count")? as u32;
                let all = self.run.threads().next_multiple_of(32);
                if count == 0 || !count.is_multiple_of(32) || count > all {
                    let message =
                        format!("{count} threads at a barrier; it must be a multiple of 32 up to {all}");
                    return Err(Stop::new(Hazard::Arrival, lane, message));
                }
                Some(count)
            }
        };
        if *aligned && expected.is_none() {
            let barrier = &mut self.cta_mut(w).barriers[id as usize];
            let place = *barrier.place.get_or_insert(pc);
            if place != pc {
                let line = self.run.kernel.instructions[place as usize].line;
                let message = format!(
                    "all threads of the CTA must come to one and the same instruction, and others are at line {line}"
                );
                return Err(Stop::new(Hazard::NotConverged, lane, message));
            }
        }
        self.arrive(w, mask, id, expected, *waits, *aligned, reduce.as_ref())?;
        if *waits {
            for lane in lanes(mask) {
                self.warps[w].counters[lane] = pc;
                self.warps[w].waits[lane] = Wait::Barrier(id);
            }
            self.warps[w].waiting |= mask;
        }
        self.complete_barriers(self.warps[w].cta);
        Ok(if self.warps[w].waiting & active != 0 { Flow::Block(active) } else { Flow::Regroup })
    }

    fn arrive(
        &mut self,
        w: usize,
        mask: u32,
        id: u32,
        expected: Option<u32>,
        waits: bool,
        aligned: bool,
        reduce: Option<&(Reduce, u32, Guard)>,
    ) -> Result<(), Stop> {
        let lane = mask.trailing_zeros();
        let cta = self.warps[w].cta;
        let barrier = &self.ctas[cta].barriers[id as usize];
        if barrier.arrived != 0 && barrier.expected != expected {
            let name = |count: Option<u32>| count.map_or("all".to_string(), |count| count.to_string());
            let message = format!(
                "barrier {id} was begun for {} threads and is now used for {}",
                name(barrier.expected),
                name(expected)
            );
            return Err(Stop::new(Hazard::Arrival, lane, message));
        }
        for lane in lanes(mask) {
            let thread = self.thread(w, lane);
            let barrier = &mut self.ctas[cta].barriers[id as usize];
            let warp = &mut self.warps[w];
            let clock = &warp.clocks[lane];
            let told = barrier.told.get_or_insert_with(|| Clock::clone(clock));
            if !barrier.last_joined.as_ref().is_some_and(|last| Arc::ptr_eq(last, clock)) {
                told.join(clock);
                barrier.last_joined = Some(clock.clone());
            }
            told.set(thread, warp.epochs[lane]);
            warp.epochs[lane] += 1;
            if let Some(fenced) = &warp.fenced[lane] {
                barrier.fenced.get_or_insert_with(|| Clock::clone(fenced)).join(fenced);
            }
        }
        // A warp counts as a whole where it comes as a whole.
        let count = if aligned && expected.is_some() { 32 } else { mask.count_ones() };
        let held = reduce.map_or(0, |(_, _, guard)| (self.warps[w].guard(*guard) & mask).count_ones());
        let barrier = &mut self.ctas[cta].barriers[id as usize];
        barrier.expected = expected;
        barrier.arrived += count;
        barrier.held += held;
        if let Some((how, d, _)) = reduce {
            barrier.results.push((w, mask, *how, *d));
        }
        if waits {
            barrier.waiting.push((w, mask));
        }
        if expected.is_some_and(|expected| barrier.arrived > expected) {
            let message =
                format!("{} threads arrived at barrier {id} for {}", barrier.arrived, expected.unwrap_or(0));
            return Err(Stop::new(Hazard::Arrival, lane, message));
        }
        Ok(())
    }

    /// Lets everybody in a CTA go on whose barrier is complete.
    pub(super) fn complete_barriers(&mut self, cta: usize) {
        let cta = &mut self.ctas[cta];
        let live: u32 = self.warps[cta.warps.clone()].iter().map(|warp| warp.live.count_ones()).sum();
        for barrier in &mut cta.barriers {
            if barrier.arrived == 0 || barrier.arrived < barrier.expected.unwrap_or(live) {
                continue;
            }
            let barrier = std::mem::take(barrier);
            let told = Arc::new(barrier.told.expect("somebody arrived"));
            let fenced = barrier.fenced.map(Arc::new);
            let arrived = barrier.arrived;
            for (w, mask, how, d) in barrier.results {
                let warp = &mut self.warps[w];
                match how {
                    Reduce::Count => warp.set(d, &[u64::from(barrier.held); 32], mask),
                    Reduce::And => {
                        warp.set_predicate(d, if barrier.held == arrived { u32::MAX } else { 0 }, mask)
                    }
                    Reduce::Or => warp.set_predicate(d, if barrier.held > 0 { u32::MAX } else { 0 }, mask),
                }
            }
            for (w, mask) in barrier.waiting {
                let warp = &mut self.warps[w];
                warp.waiting &= !mask;
                for lane in lanes(mask) {
                    warp.waits[lane] = Wait::Nothing;
                    warp.counters[lane] += 1;
                    warp.clocks[lane] = told.clone();
                    if fenced.is_some() {
                        warp.fenced[lane] = fenced.clone();
                    }
                }
            }
        }
    }

    /// A value that must be the same in all lanes.
    pub(super) fn uniform(&self, w: usize, mask: u32, operand: Operand, what: &str) -> Result<u64, Stop> {
        let values = self.value(w, operand);
        let first = values[mask.trailing_zeros() as usize & 31];
        match lanes(mask).find(|lane| values[*lane] != first) {
            None => Ok(first),
            Some(lane) => {
                let message = format!("{what} is {} here and {first} in another lane", values[lane]);
                Err(Stop::new(Hazard::Operand, lane as u32, message))
            }
        }
    }
}
