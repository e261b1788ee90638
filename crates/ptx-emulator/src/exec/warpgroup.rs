//! What four warps have to do in step: `wgmma` and `setmaxnreg`. They need not come together, but each must
//! execute the same instructions with the same operands in the same order.

use std::{collections::VecDeque, sync::Arc};

use super::{Cluster, Flow, Step, Wait, warp::then, wgmma::Columns};
use crate::error::{Hazard, Stop};

/// Registers of a warp's lanes.
const LANES: u32 = 32;

/// The instructions of a warpgroup that some of its warps have executed and others have not.
#[derive(Debug, Default)]
pub(super) struct Warpgroup {
    /// How many all of them have executed.
    done: u32,
    ahead: VecDeque<Ahead>,
}

/// An instruction that one of the warps has executed.
#[derive(Debug)]
struct Ahead {
    place: u32,
    operands: [u64; 3],
    /// What a product has found in shared memory for all of them.
    columns: Option<Arc<Columns>>,
}

impl Cluster<'_> {
    /// Executes an instruction of the warpgroup in one of its warps.
    pub(super) fn in_step(&mut self, w: usize, pc: u32, operands: [u64; 3]) -> Result<(), Stop> {
        let stop = |hazard, message: String| Err(Stop::new(hazard, 0, message));
        let warps = self.warpgroup(w);
        if warps.len() < 4 {
            return stop(Hazard::NotConverged, "the warpgroup has fewer than four warps".into());
        }
        let number = self.warps[w].steps;
        if self.warps[warps.clone()].iter().any(|warp| warp.live == 0 && warp.steps <= number) {
            return stop(Hazard::NotConverged, "a warp of the warpgroup has ended".into());
        }
        let Self { run, ctas, warps: all, .. } = self;
        let group = &mut ctas[all[w].cta].groups[all[w].place as usize / 4];
        match group.ahead.get((number - group.done) as usize) {
            None => group.ahead.push_back(Ahead { place: pc, operands, columns: None }),
            Some(other) if other.place != pc => {
                let line = run.kernel.instructions[other.place as usize].line;
                let message = format!("another warp of the warpgroup executed line {line} instead");
                return stop(Hazard::NotConverged, message);
            }
            Some(Ahead { operands: others, .. }) if *others != operands => {
                let message = format!(
                    "the operands are {operands:#x?}, and {others:#x?} in another warp of the warpgroup"
                );
                return stop(Hazard::Operand, message);
            }
            Some(_) => {}
        }
        all[w].steps += 1;
        let least = all[warps].iter().map(|warp| warp.steps).min().expect("a warp");
        group.ahead.drain(..(least - group.done) as usize);
        group.done = least;
        Ok(())
    }

    /// The instruction of the warpgroup with this number, if some of its warps have executed it and others not.
    fn ahead(&mut self, w: usize, number: u32) -> Option<&mut Ahead> {
        let Self { ctas, warps, .. } = self;
        let group = &mut ctas[warps[w].cta].groups[warps[w].place as usize / 4];
        group.ahead.get_mut(number.checked_sub(group.done)? as usize)
    }

    /// What another warp found for the instruction that this one executes next.
    pub(super) fn found_columns(&mut self, w: usize) -> Option<Arc<Columns>> {
        self.ahead(w, self.warps[w].steps)?.columns.clone()
    }

    /// Keeps for the other warps what this one found for the instruction that it has just executed.
    pub(super) fn keep_columns(&mut self, w: usize, columns: &Arc<Columns>) {
        if let Some(ahead) = self.ahead(w, self.warps[w].steps - 1) {
            ahead.columns = Some(columns.clone());
        }
    }

    /// That a warp that ends leaves no others of its warpgroup behind.
    pub(super) fn check_steps(&self, w: usize) -> Result<(), Stop> {
        let warp = &self.warps[w];
        let group = &self.cta(w).groups[warp.place as usize / 4];
        match group.ahead.get((warp.steps - group.done) as usize) {
            Some(other) if warp.live == 0 => {
                let line = self.run.kernel.instructions[other.place as usize].line;
                let message =
                    format!("this warp ends, and others of its warpgroup have executed line {line}");
                Err(Stop::new(Hazard::NotConverged, 0, message))
            }
            _ => Ok(()),
        }
    }

    /// `setmaxnreg`: gives registers back to the CTA, or waits until it has as many.
    pub(super) fn set_registers(
        &mut self,
        w: usize,
        pc: u32,
        active: u32,
        increases: bool,
        count: u32,
    ) -> Step {
        if !self.rendezvous(w, pc, active, u32::MAX)? {
            return Ok(Flow::Block(active));
        }
        let Self { ctas, warps, .. } = self;
        let warp = &mut warps[w];
        let cta = &mut ctas[warp.cta];
        let held = warp.registers_held;
        if increases && count < held || !increases && count > held {
            let message = format!("{count} registers, where this warp has {held} a thread");
            return Err(Stop::new(Hazard::Operand, 0, message));
        }
        if increases && (count - held) * LANES > cta.registers_free {
            for lane in 0..32 {
                warp.counters[lane] = pc;
                warp.waits[lane] = Wait::Registers(count);
            }
            warp.waiting = u32::MAX;
            return Ok(Flow::Block(active));
        }
        warp.registers_held = count;
        cta.registers_free = cta.registers_free + held * LANES - count * LANES;
        if !increases {
            let all = cta.warps.clone();
            warps[all].iter_mut().for_each(|warp| warp.wake(|wait| matches!(wait, Wait::Registers(_))));
        }
        self.in_step(w, pc, [u64::from(count), 0, 0])?;
        Ok(then(active, u32::MAX))
    }
}
