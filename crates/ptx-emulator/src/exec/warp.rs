//! Instructions that the lanes of a warp execute together.

use super::{Cluster, Flow, Step, Wait, lanes};
use crate::{
    clock::Clock,
    error::{Hazard, Stop},
    isa::{Op, Operand, Shuffle, Type, Vote},
};
use std::sync::Arc;

impl Cluster<'_> {
    /// Whether all of `required` stand at this instruction, now that `active` do. If so the others go
    /// on from it, if not `active` wait.
    pub(super) fn rendezvous(&mut self, w: usize, pc: u32, active: u32, required: u32) -> Result<bool, Stop> {
        let warp = &mut self.warps[w];
        if active == required {
            return Ok(true);
        }
        let lane = active.trailing_zeros();
        if active & !required != 0 {
            let outside = (active & !required).trailing_zeros();
            let message = format!("the mask {required:#010x} does not name this lane");
            return Err(Stop::new(Hazard::LaneMask, outside, message));
        }
        if required & !warp.live != 0 {
            let gone = required & !warp.live;
            let message = format!("the lanes {gone:#010x} of the mask {required:#010x} have ended");
            return Err(Stop::new(Hazard::LaneMask, lane, message));
        }
        let mut here = active;
        for lane in lanes(warp.waiting & required) {
            if warp.counters[lane] != pc {
                continue;
            }
            match warp.waits[lane] {
                Wait::Lanes(mask) if mask == required => here |= 1 << lane,
                Wait::Lanes(mask) => {
                    let message =
                        format!("the mask is {required:#010x} here and {mask:#010x} in lane {lane}");
                    return Err(Stop::new(Hazard::LaneMask, active.trailing_zeros(), message));
                }
                _ => {}
            }
        }
        if here != required {
            for lane in lanes(active) {
                warp.waits[lane] = Wait::Lanes(required);
            }
            warp.waiting |= active;
            return Ok(false);
        }
        for lane in lanes(required & !active) {
            warp.waits[lane] = Wait::Nothing;
            warp.counters[lane] = pc + 1;
        }
        warp.waiting &= !required;
        Ok(true)
    }

    pub(super) fn warp_op(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        let mask = match op {
            Op::WarpSync { mask }
            | Op::Shuffle { mask, .. }
            | Op::Vote { mask, .. }
            | Op::Match { mask, .. }
            | Op::Redux { mask, .. }
            | Op::Elect { mask, .. } => *mask,
            other => unreachable!("{other:?} is not executed together"),
        };
        let mask = self.lane_mask(w, active, mask)?;
        if !self.rendezvous(w, pc, active, mask)? {
            return Ok(Flow::Block(active));
        }
        match op {
            Op::WarpSync { .. } => self.synchronise(w, mask),
            Op::Shuffle { mode, d, p, a, b, c, .. } => {
                self.shuffle(w, mask, *mode, (*d, *p), [*a, *b, *c])?;
            }
            Op::Vote { mode, d, a, .. } => {
                let warp = &mut self.warps[w];
                let held = warp.guard(*a) & mask;
                let yes = match mode {
                    Vote::All => held == mask,
                    Vote::Any => held != 0,
                    Vote::Uniform => held == mask || held == 0,
                    Vote::Ballot => {
                        warp.set(*d, &[u64::from(held); 32], mask);
                        return Ok(then(active, mask));
                    }
                };
                warp.set_predicate(*d, if yes { u32::MAX } else { 0 }, mask);
            }
            Op::Match { all, ty, d, p, a, .. } => {
                let keep = if *ty == Type::B64 { u64::MAX } else { 0xffff_ffff };
                let a = self.value(w, *a).map(|a| a & keep);
                let same = |lane: usize| {
                    lanes(mask).fold(0_u32, |same, other| same | u32::from(a[other] == a[lane]) << other)
                };
                let warp = &mut self.warps[w];
                if *all {
                    let agreed = same(mask.trailing_zeros() as usize) == mask;
                    warp.set(*d, &[if agreed { mask.into() } else { 0 }; 32], mask);
                    if let Some(p) = p {
                        warp.set_predicate(*p, if agreed { u32::MAX } else { 0 }, mask);
                    }
                } else {
                    warp.set(*d, &std::array::from_fn(|lane| u64::from(same(lane))), mask);
                }
            }
            Op::Redux { combine, d, a, .. } => {
                let a = self.value(w, *a);
                let result = lanes(mask).map(|lane| a[lane]).reduce(combine).expect("a lane");
                self.warps[w].set(*d, &[result & 0xffff_ffff; 32], mask);
            }
            Op::Elect { d, p, .. } => {
                let leader = mask.trailing_zeros();
                if let Some(d) = d {
                    self.warps[w].set(*d, &[u64::from(leader); 32], mask);
                }
                self.warps[w].set_predicate(*p, 1 << leader, mask);
            }
            _ => {}
        }
        Ok(then(active, mask))
    }

    /// The lanes that an instruction names, which must be the same in all that execute it.
    pub(super) fn lane_mask(&self, w: usize, active: u32, mask: Operand) -> Result<u32, Stop> {
        let masks = self.value(w, mask);
        let first = active.trailing_zeros();
        let mask = masks[first as usize] as u32;
        for lane in lanes(active) {
            if masks[lane] as u32 >> lane & 1 == 0 {
                let message = format!("the mask {:#010x} does not name this lane", masks[lane] as u32);
                return Err(Stop::new(Hazard::LaneMask, lane as u32, message));
            }
            if masks[lane] as u32 != mask {
                let message =
                    format!("the mask is {:#010x} here and {mask:#010x} in lane {first}", masks[lane] as u32);
                return Err(Stop::new(Hazard::LaneMask, lane as u32, message));
            }
        }
        Ok(mask)
    }

    /// `bar.warp.sync`: what one did before, all have heard of.
    fn synchronise(&mut self, w: usize, mask: u32) {
        let thread = self.thread(w, 0);
        let warp = &mut self.warps[w];
        let first = mask.trailing_zeros() as usize;
        let mut told = Clock::clone(&warp.clocks[first]);
        let mut joined = warp.clocks[first].clone();
        for lane in lanes(mask) {
            if !Arc::ptr_eq(&warp.clocks[lane], &joined) {
                joined = warp.clocks[lane].clone();
                told.join(&joined);
            }
            told.set(thread + lane as u32, warp.epochs[lane]);
            warp.epochs[lane] += 1;
        }
        let told = Arc::new(told);
        for lane in lanes(mask) {
            warp.clocks[lane] = told.clone();
        }
        // A fence of one covers what the barrier hands on to the others.
        let fenced = lanes(mask).filter_map(|lane| warp.fenced[lane].clone()).reduce(|a, b| {
            if Arc::ptr_eq(&a, &b) {
                return a;
            }
            let mut both = Clock::clone(&a);
            both.join(&b);
            Arc::new(both)
        });
        if let Some(fenced) = fenced {
            for lane in lanes(mask) {
                warp.fenced[lane] = Some(fenced.clone());
            }
        }
    }

    fn shuffle(
        &mut self,
        w: usize,
        mask: u32,
        mode: Shuffle,
        (d, p): (u32, Option<u32>),
        [a, b, c]: [Operand; 3],
    ) -> Result<(), Stop> {
        let [a, b, c] = [a, b, c].map(|operand| self.value(w, operand));
        let mut result = a.map(|a| a & 0xffff_ffff);
        let mut within = 0;
        for lane in lanes(mask) {
            // The segment that the lane belongs to, and the last lane it may reach.
            let (clamp, segment) = (c[lane] as u32 & 31, c[lane] as u32 >> 8 & 31);
            let (lane32, by) = (lane as u32, b[lane] as u32 & 31);
            let first = lane32 & segment;
            let last = first | clamp & !segment;
            let (source, inside) = match mode {
                Shuffle::Up => (lane32.wrapping_sub(by), lane32 as i32 - by as i32 >= last as i32),
                Shuffle::Down => (lane32 + by, lane32 + by <= last),
                Shuffle::Butterfly => (lane32 ^ by, lane32 ^ by <= last),
                Shuffle::Index => (first | by & !segment, (first | by & !segment) <= last),
            };
            let source = if inside { source } else { lane32 };
            if mask >> source & 1 == 0 {
                let message = format!("lane {source} is read, and the mask {mask:#010x} does not name it");
                return Err(Stop::new(Hazard::LaneMask, lane32, message));
            }
            result[lane] = a[source as usize] & 0xffff_ffff;
            within |= u32::from(inside) << lane;
        }
        let warp = &mut self.warps[w];
        warp.set(d, &result, mask);
        if let Some(p) = p {
            warp.set_predicate(p, within, mask);
        }
        Ok(())
    }
}

/// On: alone, or with lanes that had waited.
pub(super) const fn then(active: u32, mask: u32) -> Flow {
    if active == mask { Flow::Next } else { Flow::Regroup }
}
