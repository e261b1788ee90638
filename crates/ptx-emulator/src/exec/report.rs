//! What is said of a bug: where it showed, and where everybody stands.

use std::{collections::BTreeMap, fmt::Write as _};

use super::{Cluster, Wait, lanes, mbarrier::Phased};
use crate::error::{Fault, Hazard, Stop};

impl Cluster<'_> {
    pub(super) fn fault(&self, w: usize, pc: u32, stop: Stop) -> Fault {
        let instruction = &self.run.kernel.instructions[pc as usize];
        let [x, y, _] = self.run.block;
        let thread = self.warps[w].place * 32 + stop.lane;
        Fault {
            hazard: stop.hazard,
            kernel: self.run.kernel.name.clone(),
            line: instruction.line,
            text: instruction.text.clone(),
            cta: self.cta(w).id,
            thread: [thread % x, thread / x % y, thread / x / y],
            message: stop.message,
        }
    }

    /// What to say when nothing can run: where everybody stands, and the likeliest reason.
    pub(super) fn stuck(&self) -> Fault {
        let mut stands: BTreeMap<u32, (u32, String)> = BTreeMap::new();
        let mut reason = None;
        for (w, warp) in self.warps.iter().enumerate() {
            for lane in lanes(warp.live) {
                let pc = warp.counters[lane];
                let threads = stands.entry(pc).or_insert_with(|| (0, self.waits_for(w, warp.waits[lane])));
                threads.0 += 1;
                if let (Wait::Lanes(mask), None) = (warp.waits[lane], &reason) {
                    let gone = mask & !warp.live;
                    let stop = if gone != 0 {
                        (
                            Hazard::LaneMask,
                            format!("the lanes {gone:#010x} of the mask {mask:#010x} have ended"),
                        )
                    } else {
                        (
                            Hazard::NotConverged,
                            format!("the lanes {mask:#010x} of the warp never all come to this instruction"),
                        )
                    };
                    reason = Some((w, pc, lane, stop));
                }
            }
        }
        let (w, pc, lane, (hazard, mut message)) = reason.unwrap_or_else(|| {
            let w = self.warps.iter().position(|warp| warp.live != 0).expect("a thread that waits");
            let lane = self.warps[w].live.trailing_zeros() as usize;
            let pc = self.warps[w].counters[lane];
            (
                w,
                pc,
                lane,
                (
                    Hazard::Deadlock,
                    format!(
                        "no thread of the {} can go on",
                        if self.ctas.len() > 1 { "cluster" } else { "CTA" }
                    ),
                ),
            )
        });
        for (pc, (threads, what)) in stands {
            let instruction = &self.run.kernel.instructions[pc as usize];
            let _ = write!(
                message,
                "; {threads} threads at line {}, `{}`{what}",
                instruction.line, instruction.text
            );
        }
        self.fault(w, pc, Stop { hazard, lane: lane as u32, message })
    }

    fn waits_for(&self, w: usize, wait: Wait) -> String {
        match wait {
            Wait::Nothing | Wait::Lanes(_) => String::new(),
            Wait::Products(count) => format!(" (for all warps of the warpgroup to issue {count} products)"),
            Wait::Registers(count) => {
                let free = self.cta(w).registers_free;
                format!(" (for {count} registers a thread; {free} are free)")
            }
            Wait::Barrier(id) => self.cta(w).barriers[id as usize].describe(),
            Wait::Cluster => {
                let missing: u32 =
                    self.warps.iter().map(|warp| (warp.live & !warp.arrived).count_ones()).sum();
                format!(" ({missing} threads of the cluster have not arrived)")
            }
            Wait::Phase { address, parity } => {
                let found = self.cta(w).phased.get(&address).map_or_else(String::new, Phased::describe);
                format!(" (parity {parity} of {address:#x}{found})")
            }
        }
    }
}
