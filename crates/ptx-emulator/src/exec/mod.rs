//! A CTA as it runs: its warps, what they wait for, and the loop that picks lanes and executes.
//!
//! Every lane has its own program counter. The lanes of a warp that stand at one instruction execute it
//! together; of several groups the one furthest behind goes first, so that branches meet again. An
//! instruction that needs other lanes, warps or copies makes its lanes wait where they stand.

mod barrier;
mod bulk;
mod copy;
mod counters;
mod matrix;
mod mbarrier;
mod memory;
mod scalar;
mod warp;
mod wgmma;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt::Write as _,
    sync::Arc,
};

use self::{barrier::Barrier, copy::Group, mbarrier::Phased};
pub use counters::Counters;
pub(crate) use counters::{Class, class};

use crate::{
    clock::{Accessor, Clock, Stamp},
    error::{Fault, Hazard, Stop},
    isa::{Op, Operand},
    memory::{Memory, Shadow, Shared},
    number::Lanes,
    parse::Kernel,
    schedule::{Random, Schedule},
};

/// Everything about a launch that its CTAs share.
pub(crate) struct Run<'a> {
    pub(crate) kernel: &'a Kernel,
    pub(crate) memory: &'a Memory,
    pub(crate) shadow: &'a Shadow,
    pub(crate) params: &'a [u8],
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) schedule: Schedule,
    pub(crate) jitter: Option<u64>,
    /// Warp instructions that one CTA may execute.
    pub(crate) step_limit: u64,
}

impl Run<'_> {
    fn threads(&self) -> u32 {
        self.block.iter().product()
    }

    /// Threads and copy engines of a CTA.
    fn clock_size(&self) -> u32 {
        self.threads() + bulk::ENGINES
    }

    /// Where the launch's own shared memory begins.
    fn dynamic_base(&self) -> u32 {
        self.kernel.shared_bytes.next_multiple_of(self.kernel.dynamic_align.max(16))
    }

    fn shared_bytes(&self) -> u32 {
        if self.dynamic_shared == 0 {
            self.kernel.shared_bytes
        } else {
            self.dynamic_base() + self.dynamic_shared
        }
    }
}

/// What a CTA did with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Every thread has ended.
    Done,
    /// There is more to do.
    Running,
}

/// Why a lane does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Nothing,
    /// For other lanes of its warp, those in the mask, to come to the same instruction.
    Lanes(u32),
    /// For other warps, at a numbered barrier.
    Barrier(u32),
    /// For a phase of the mbarrier at this address to end.
    Phase {
        address: u32,
        parity: u64,
    },
    /// For the other warps of its warpgroup to issue so many products.
    Products(u32),
}

struct Warp {
    registers: Vec<Lanes>,
    /// A bit for each lane.
    predicates: Vec<u32>,
    carry: u32,
    counters: [u32; 32],
    /// Lanes that have not ended.
    live: u32,
    /// Lanes that wait, and for what.
    waiting: u32,
    waits: [Wait; 32],
    /// Lanes that used up a whole time slice; others go first.
    tired: u32,
    /// Local memory, lane after lane.
    local: Vec<u8>,
    clocks: Vec<Arc<Clock>>,
    epochs: [u32; 32],
    /// What each lane's last fence covers: what its next strong write tells.
    fenced: Vec<Option<Arc<Clock>>>,
    /// What strong reads saw told: heard of at the next fence.
    rumours: Vec<Option<Arc<Clock>>>,
    /// `cp.async` of each lane: committed groups, oldest first, and the open one.
    groups: Vec<VecDeque<Group>>,
    open: Vec<Group>,
    /// Bulk stores of each lane: committed groups, oldest first, and the open one.
    stores: Vec<VecDeque<Vec<Stamp>>>,
    stores_open: Vec<Vec<Stamp>>,
    /// Products of the warpgroup that this warp has issued, in all and at each commit not yet waited for.
    products: u32,
    product_groups: VecDeque<u32>,
    /// Registers that unfinished products own, and which product.
    taken: Vec<(u32, u32)>,
}

/// How an instruction ended.
enum Flow {
    Next,
    /// These lanes go elsewhere, the others on.
    Jump(u32, u32),
    /// These lanes have ended.
    Exit(u32),
    /// These lanes now wait where they stand.
    Block(u32),
    /// On to the next instruction, together with lanes that waited there.
    Regroup,
    /// The instruction set every program counter itself.
    Scattered,
}

type Step = Result<Flow, Stop>;

pub(crate) struct Cta<'a> {
    run: &'a Run<'a>,
    /// Place in the grid, x fastest.
    number: u32,
    id: [u32; 3],
    warps: Vec<Warp>,
    shared: Shared,
    barriers: Vec<Barrier>,
    phased: BTreeMap<u32, Phased>,
    /// What releases at an address of shared memory have told.
    told: HashMap<u32, Arc<Clock>>,
    /// Arrivals that copies still owe to an mbarrier.
    owed: VecDeque<mbarrier::Owed>,
    /// Bulk copies under way, and how many there ever were.
    flights: VecDeque<bulk::Flight>,
    copies: u32,
    /// What a proxy fence has handed to the copy engines.
    proxied: Clock,
    pub(crate) counters: Counters,
    random: Random,
    steps: u64,
    next_warp: usize,
}

impl<'a> Cta<'a> {
    pub(crate) fn new(run: &'a Run<'a>, number: u32) -> Self {
        let [x, y, _] = run.grid;
        let id = [number % x, number / x % y, number / x / y];
        let threads = run.threads();
        let silent = Arc::new(Clock::new(run.clock_size()));
        let warps = (0..threads.div_ceil(32)).map(|warp| {
            let lanes = (threads - warp * 32).min(32);
            Warp {
                registers: vec![[0; 32]; run.kernel.registers as usize],
                predicates: vec![0; run.kernel.predicates as usize],
                carry: 0,
                counters: [0; 32],
                live: u32::MAX >> (32 - lanes),
                waiting: 0,
                waits: [Wait::Nothing; 32],
                tired: 0,
                local: vec![0; run.kernel.local_bytes as usize * 32],
                clocks: vec![silent.clone(); 32],
                epochs: [1; 32],
                fenced: vec![None; 32],
                rumours: vec![None; 32],
                groups: vec![VecDeque::new(); 32],
                open: vec![Group::default(); 32],
                stores: vec![VecDeque::new(); 32],
                stores_open: vec![Vec::new(); 32],
                products: 0,
                product_groups: VecDeque::new(),
                taken: Vec::new(),
            }
        });
        Self {
            run,
            number,
            id,
            warps: warps.collect(),
            shared: Shared::new(run.shared_bytes()),
            barriers: (0..16).map(|_| Barrier::default()).collect(),
            phased: BTreeMap::new(),
            told: HashMap::new(),
            owed: VecDeque::new(),
            flights: VecDeque::new(),
            copies: 0,
            proxied: Clock::new(run.clock_size()),
            counters: Counters::default(),
            random: Random::new(run.schedule.seed() ^ u64::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            steps: 0,
            next_warp: 0,
        }
    }

    /// Runs some warps for a time slice each.
    pub(crate) fn advance(&mut self) -> Result<Progress, Fault> {
        let random = matches!(self.run.schedule, Schedule::Random(_));
        for _ in 0..64 {
            let runnable = |warp: &Warp| warp.live & !warp.waiting != 0;
            let count = self.warps.len();
            let first = if random { self.random.below(count as u64) as usize } else { self.next_warp };
            let picked = (0..count).map(|n| (first + n) % count).find(|n| runnable(&self.warps[*n]));
            let Some(warp) = picked else {
                if self.warps.iter().all(|warp| warp.live == 0) {
                    return Ok(Progress::Done);
                }
                if self.land_owed()? || self.land_any(None)? {
                    continue;
                }
                return Err(self.stuck());
            };
            if random && !self.flights.is_empty() && self.random.below(4) == 0 {
                let index = self.random.below(self.flights.len() as u64) as usize;
                self.land_any(Some(index))?;
            }
            let budget = if random { 1 + self.random.below(64) as u32 } else { 20_000 };
            self.run_warp(warp, budget, random)?;
            // Eagerly, a warp that can still run has used up its slice: the others come first.
            self.next_warp = (warp + usize::from(runnable(&self.warps[warp]))) % count;
        }
        Ok(Progress::Running)
    }

    /// The lanes to run, where they stand, and where the next of the others stand.
    fn pick(&mut self, w: usize, random: bool) -> Option<(u32, u32, u32)> {
        let warp = &mut self.warps[w];
        let ready = warp.live & !warp.waiting;
        if ready == 0 {
            return None;
        }
        let fresh = if ready & !warp.tired == 0 { ready } else { ready & !warp.tired };
        let pc = if random {
            let chosen = self.random.below(u64::from(fresh.count_ones()));
            let lane = lanes(fresh).nth(chosen as usize).expect("one of these lanes");
            warp.counters[lane]
        } else {
            lanes(fresh).map(|lane| warp.counters[lane]).min().expect("a lane that can run")
        };
        let mut mask = 0;
        let mut limit = u32::MAX;
        for lane in lanes(ready) {
            let at = warp.counters[lane];
            if at == pc {
                mask |= 1 << lane;
            } else if at > pc {
                limit = limit.min(at);
            }
        }
        // Lanes need not keep together.
        if random && self.random.below(8) == 0 {
            let part = mask & self.random.next() as u32;
            if part != 0 {
                mask = part;
            }
        }
        Some((pc, mask, limit))
    }

    fn run_warp(&mut self, w: usize, mut budget: u32, random: bool) -> Result<(), Fault> {
        let code = &self.run.kernel.instructions;
        while budget > 0 {
            let Some((mut pc, mask, limit)) = self.pick(w, random) else {
                return Ok(());
            };
            loop {
                let instruction = &code[pc as usize];
                let active = match instruction.guard {
                    None => mask,
                    Some(guard) => {
                        let bits = self.warps[w].predicates[guard.register as usize];
                        mask & if guard.negated { !bits } else { bits }
                    }
                };
                budget -= 1;
                self.steps += 1;
                self.counters.count(instruction.class, active);
                let flow = if active == 0 {
                    Flow::Next
                } else {
                    if !self.warps[w].taken.is_empty() && !matches!(instruction.op, Op::Product(_)) {
                        self.check_taken(w, &instruction.registers)
                            .map_err(|stop| self.fault(w, pc, stop))?;
                    }
                    self.execute(w, pc, active, &instruction.op).map_err(|stop| self.fault(w, pc, stop))?
                };
                match flow {
                    Flow::Next => pc += 1,
                    Flow::Jump(taken, target) if taken == mask => pc = target,
                    Flow::Jump(taken, target) => {
                        self.place(w, taken, target);
                        self.place(w, mask & !taken, pc + 1);
                        break;
                    }
                    Flow::Exit(lanes) => {
                        self.place(w, mask & !lanes, pc + 1);
                        self.end(w, lanes);
                        break;
                    }
                    Flow::Block(lanes) => {
                        self.place(w, lanes, pc);
                        self.place(w, mask & !lanes, pc + 1);
                        break;
                    }
                    Flow::Regroup => {
                        self.place(w, mask, pc + 1);
                        break;
                    }
                    Flow::Scattered => {
                        self.place(w, mask & !active, pc + 1);
                        break;
                    }
                }
                if budget == 0 || pc >= limit {
                    self.place(w, mask, pc);
                    let warp = &mut self.warps[w];
                    warp.tired = if budget == 0 { mask } else { 0 };
                    break;
                }
            }
        }
        if self.steps > self.run.step_limit {
            let lane = self.warps[w].live.trailing_zeros() & 31;
            let message =
                format!("the CTA has executed {} warp instructions, the limit of this launch", self.steps);
            let pc = self.warps[w].counters[lane as usize];
            return Err(self.fault(w, pc, Stop::new(Hazard::Endless, lane, message)));
        }
        Ok(())
    }

    fn place(&mut self, w: usize, mask: u32, pc: u32) {
        for lane in lanes(mask) {
            self.warps[w].counters[lane] = pc;
        }
    }

    /// Lanes end: their copies land, and barriers no longer count on them.
    fn end(&mut self, w: usize, mask: u32) {
        for lane in lanes(mask) {
            self.land_all(w, lane);
        }
        let warp = &mut self.warps[w];
        warp.live &= !mask;
        // Who waits for lanes of this warp asks again whom to wait for.
        for lane in lanes(warp.live & warp.waiting) {
            if matches!(warp.waits[lane], Wait::Lanes(_)) {
                warp.waits[lane] = Wait::Nothing;
                warp.waiting &= !(1 << lane);
            }
        }
        self.complete_barriers();
    }

    fn execute(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        match op {
            Op::Branch { target } => Ok(Flow::Jump(active, *target)),
            Op::BranchTable { index, targets } => self.branch_table(w, active, *index, targets),
            Op::Exit => Ok(Flow::Exit(active)),
            Op::Trap => Err(Stop::new(Hazard::Trap, active.trailing_zeros(), "the kernel executed a trap")),
            Op::Nothing => Ok(Flow::Next),
            Op::Load { .. } | Op::Store { .. } | Op::Atomic { .. } | Op::Fence => {
                self.memory_op(w, active, op).map(|()| Flow::Next)
            }
            Op::Aligned
            | Op::WarpSync { .. }
            | Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::Elect { .. } => self.warp_op(w, pc, active, op),
            Op::Barrier { .. } => self.barrier_op(w, pc, active, op),
            Op::LoadMatrix { .. } | Op::StoreMatrix { .. } | Op::MultiplyMatrix { .. } => {
                self.matrix_op(w, pc, active, op)
            }
            Op::CopyAsync { .. } | Op::CommitGroup | Op::WaitGroup { .. } => {
                self.copy_op(w, active, op).map(|()| Flow::Next)
            }
            Op::Bulk { .. }
            | Op::BulkTensor { .. }
            | Op::BulkCommit
            | Op::BulkWait { .. }
            | Op::ProxyFence => self.bulk_op(w, pc, active, op),
            Op::Product(_) | Op::ProductCommit | Op::ProductWait { .. } => self.product_op(w, pc, active, op),
            Op::BarrierInit { .. }
            | Op::BarrierInvalidate { .. }
            | Op::BarrierArrive { .. }
            | Op::BarrierExpect { .. }
            | Op::BarrierComplete { .. }
            | Op::BarrierTest { .. }
            | Op::BarrierCopies { .. } => self.mbarrier_op(w, pc, active, op),
            _ => {
                self.scalar_op(w, active, op);
                Ok(Flow::Next)
            }
        }
    }

    fn branch_table(&mut self, w: usize, active: u32, index: Operand, targets: &[u32]) -> Step {
        let index = self.value(w, index);
        let mut chosen = 0;
        let first = active.trailing_zeros() as usize;
        for lane in lanes(active) {
            let Some(target) = targets.get(index[lane] as usize) else {
                let message = format!("branch {} of a table of {}", index[lane], targets.len());
                return Err(Stop::new(Hazard::Operand, lane as u32, message));
            };
            self.warps[w].counters[lane] = *target;
            chosen |= u32::from(index[lane] == index[first]) << lane;
        }
        if chosen == active {
            Ok(Flow::Jump(active, targets[index[first] as usize]))
        } else {
            Ok(Flow::Scattered)
        }
    }

    /// A lane as the maker of an access.
    fn stamp(&self, w: usize, lane: usize, strong: bool) -> Stamp {
        Stamp::new(self.number, (w * 32 + lane) as u32, self.warps[w].epochs[lane], strong)
    }

    fn accessor(&self, w: usize, lane: usize, strong: bool) -> Accessor<'_> {
        Accessor { clock: &self.warps[w].clocks[lane], stamp: self.stamp(w, lane, strong) }
    }

    /// All that a lane did and heard of until now; what it does next is not part of it.
    fn tell(&mut self, w: usize, lane: usize) -> Arc<Clock> {
        let warp = &mut self.warps[w];
        let mut clock = Clock::clone(&warp.clocks[lane]);
        clock.set((w * 32 + lane) as u32, warp.epochs[lane]);
        warp.epochs[lane] += 1;
        Arc::new(clock)
    }

    /// A lane hears of all that is in a clock of its CTA.
    fn hear(&mut self, w: usize, lane: usize, clock: &Arc<Clock>) {
        let known = &mut self.warps[w].clocks[lane];
        if !Arc::ptr_eq(known, clock) {
            Arc::make_mut(known).join(clock);
        }
    }

    fn fault(&self, w: usize, pc: u32, stop: Stop) -> Fault {
        let instruction = &self.run.kernel.instructions[pc as usize];
        let [x, y, _] = self.run.block;
        let thread = w as u32 * 32 + stop.lane;
        Fault {
            hazard: stop.hazard,
            kernel: self.run.kernel.name.clone(),
            line: instruction.line,
            text: instruction.text.clone(),
            cta: self.id,
            thread: [thread % x, thread / x % y, thread / x / y],
            message: stop.message,
        }
    }

    /// What to say when nothing can run: where everybody stands, and the likeliest reason.
    fn stuck(&self) -> Fault {
        let mut stands: BTreeMap<u32, (u32, String)> = BTreeMap::new();
        let mut reason = None;
        for (w, warp) in self.warps.iter().enumerate() {
            for lane in lanes(warp.live) {
                let pc = warp.counters[lane];
                let threads = stands.entry(pc).or_insert_with(|| (0, self.waits_for(warp.waits[lane])));
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
            (w, pc, lane, (Hazard::Deadlock, "no thread of the CTA can go on".to_string()))
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

    fn waits_for(&self, wait: Wait) -> String {
        match wait {
            Wait::Nothing | Wait::Lanes(_) => String::new(),
            Wait::Products(count) => format!(" (for all warps of the warpgroup to issue {count} products)"),
            Wait::Barrier(id) => self.barriers[id as usize].describe(),
            Wait::Phase { address, parity } => {
                let found = self.phased.get(&address).map_or_else(String::new, Phased::describe);
                format!(" (parity {parity} of {address:#x}{found})")
            }
        }
    }
}

/// The lanes of a mask, ascending.
fn lanes(mask: u32) -> impl Iterator<Item = usize> {
    let mut rest = mask;
    std::iter::from_fn(move || {
        let lane = rest.trailing_zeros();
        if rest == 0 {
            return None;
        }
        rest &= rest - 1;
        Some(lane as usize)
    })
}
