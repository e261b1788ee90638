//! A cluster of CTAs as it runs: its warps, what they wait for, and the loop that picks lanes and
//! executes. A CTA of a launch without clusters is a cluster of one.
//!
//! Every lane has its own program counter. The lanes of a warp that stand at one instruction execute it
//! together; of several groups the one furthest behind goes first, so that branches meet again. An
//! instruction that needs other lanes, warps or copies makes its lanes wait where they stand.

mod barrier;
mod bulk;
mod check;
mod cluster;
mod copy;
mod counters;
mod descriptor;
mod fragments;
mod matrix;
mod mbarrier;
mod memory;
mod order;
mod print;
mod report;
mod scalar;
mod warp;
mod warpgroup;
mod wgmma;

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    ops::Range,
    sync::Arc,
};

use self::{barrier::Barrier, copy::Group, fragments::Fragments, mbarrier::Phased, warpgroup::Warpgroup};
pub use counters::Counters;
pub(crate) use counters::{Class, class};

use crate::{
    clock::{Accessor, Clock, Stamp},
    error::{Fault, Hazard, Stop},
    isa::{Op, Operand},
    memory::{Memory, Shadow, Shared},
    number::Registers,
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
    /// CTAs of a cluster along each axis, and whether the launch or the kernel asked for clusters.
    pub(crate) cluster: [u32; 3],
    pub(crate) explicit_cluster: bool,
    pub(crate) block: [u32; 3],
    pub(crate) dynamic_shared: u32,
    pub(crate) schedule: Schedule,
    pub(crate) jitter: Option<u64>,
    /// Warp instructions that one cluster may execute.
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

    /// Memory that each thread has for itself: local space, and param space for calls.
    fn frame(&self) -> usize {
        (self.kernel.local_bytes + self.kernel.call_bytes.next_multiple_of(8)) as usize
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

/// What a cluster did with its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Every thread has ended.
    Done,
    /// There is more to do.
    Running,
    /// Whoever can run asked for something again that had not changed: others should run first.
    Idle,
}

/// Why a lane does not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    Nothing,
    /// For other lanes of its warp, those in the mask, to come to the same instruction.
    Lanes(u32),
    /// For other warps, at a numbered barrier.
    Barrier(u32),
    /// For all threads of the cluster to arrive.
    Cluster,
    /// For a phase of the mbarrier at this address of its CTA to end.
    Phase {
        address: u32,
        parity: u64,
    },
    /// For the other warps of its warpgroup to issue so many products.
    Products(u32),
    /// For other warps to give registers back, so that each thread can have so many.
    Registers(u32),
}

struct Warp {
    /// The rank of its CTA in the cluster, and which of the CTA's warps it is.
    cta: usize,
    place: u32,
    registers: Registers,
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
    /// Local memory, lane after lane, and behind each lane's its param space for calls.
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
    /// Bulk stores of each lane, the last in each committed group, oldest first, and in the open one.
    stores: Vec<VecDeque<Option<bulk::Store>>>,
    stores_open: Vec<Option<bulk::Store>>,
    /// Lanes that have arrived at the cluster's barrier in this phase, and lanes that still have to wait
    /// for the phase before, which has ended.
    arrived: u32,
    passing: u32,
    /// The registers that products of the warpgroup use, and how many products had been issued at each commit
    /// not yet waited for.
    fragments: Fragments,
    product_groups: VecDeque<u32>,
    /// Instructions of the warpgroup that this warp has executed.
    steps: u32,
    /// Registers that each of its threads has, as far as `setmaxnreg` counts them.
    registers_held: u32,
}

impl Warp {
    fn new(run: &Run<'_>, cta: usize, place: u32, live: u32, silent: &Arc<Clock>) -> Self {
        Self {
            cta,
            place,
            registers: Registers::new(run.kernel.registers as usize),
            predicates: vec![0; run.kernel.predicates as usize],
            carry: 0,
            counters: [0; 32],
            live,
            waiting: 0,
            waits: [Wait::Nothing; 32],
            tired: 0,
            local: vec![0; run.frame() * 32],
            clocks: vec![silent.clone(); 32],
            epochs: [1; 32],
            fenced: vec![None; 32],
            rumours: vec![None; 32],
            groups: vec![VecDeque::new(); 32],
            open: vec![Group::default(); 32],
            stores: vec![VecDeque::new(); 32],
            stores_open: vec![None; 32],
            arrived: 0,
            passing: 0,
            fragments: Fragments::new(if run.kernel.has_products {
                run.kernel.registers as usize
            } else {
                0
            }),
            product_groups: VecDeque::new(),
            steps: 0,
            registers_held: run.kernel.launch_registers,
        }
    }

    /// Lets lanes go on that wait for something of this kind, to ask again whether it has come.
    fn wake(&mut self, wakes: impl Fn(Wait) -> bool) {
        for lane in lanes(self.waiting) {
            if wakes(self.waits[lane]) {
                self.waits[lane] = Wait::Nothing;
                self.waiting &= !(1 << lane);
            }
        }
    }
}

/// How an instruction ended.
enum Flow {
    Next,
    /// On, but others first: this was asked before, and the answer has not changed.
    Yield,
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

/// A CTA of the cluster: what its threads share.
struct Cta {
    /// Place in the grid, x fastest.
    number: u32,
    id: [u32; 3],
    /// Which warps of the cluster are its own.
    warps: Range<usize>,
    shared: Shared,
    barriers: Vec<Barrier>,
    groups: Vec<Warpgroup>,
    /// Registers that `setmaxnreg` gave back and nobody has taken.
    registers_free: u32,
    phased: BTreeMap<u32, Phased>,
    /// What releases at an address of its shared memory have told.
    told: HashMap<u32, Arc<Clock>>,
    /// Bulk copies that its threads have ever issued.
    copies: u32,
    /// What engines wrote into its shared memory and threads of other CTAs did to it, and what its own
    /// threads had heard of when they ended.
    visits: Clock,
    heard: Clock,
}

pub(crate) struct Cluster<'a> {
    run: &'a Run<'a>,
    ctas: Vec<Cta>,
    /// Those of the first CTA first.
    warps: Vec<Warp>,
    /// The barrier of the whole cluster.
    barrier: cluster::Barrier,
    /// Arrivals that copies still owe to an mbarrier.
    owed: VecDeque<mbarrier::Owed>,
    /// Bulk copies under way.
    flights: VecDeque<bulk::Flight>,
    pub(crate) counters: Counters,
    random: Random,
    steps: u64,
    next_warp: usize,
}

impl<'a> Cluster<'a> {
    /// The cluster with this place among the clusters of the grid, x fastest.
    pub(crate) fn new(run: &'a Run<'a>, number: u32) -> Self {
        let threads = run.threads();
        let in_cta = threads.div_ceil(32) as usize;
        let [x, y, _] = run.grid;
        let [columns, rows, _] = std::array::from_fn(|axis| run.grid[axis] / run.cluster[axis]);
        let first = [number % columns, number / columns % rows, number / columns / rows];
        let [width, height, _] = run.cluster;
        let mut ctas = Vec::new();
        let mut warps = Vec::new();
        for rank in 0..run.cluster.iter().product::<u32>() {
            let within = [rank % width, rank / width % height, rank / width / height];
            let id: [u32; 3] = std::array::from_fn(|axis| first[axis] * run.cluster[axis] + within[axis]);
            let number = id[0] + x * (id[1] + y * id[2]);
            let silent = Clock::new(number, run.clock_size());
            let clock = Arc::new(silent.clone());
            warps.extend((0..in_cta as u32).map(|place| {
                let lanes = (threads - place * 32).min(32);
                Warp::new(run, rank as usize, place, u32::MAX >> (32 - lanes), &clock)
            }));
            ctas.push(Cta {
                number,
                id,
                warps: warps.len() - in_cta..warps.len(),
                shared: Shared::new(run.shared_bytes()),
                barriers: (0..16).map(|_| Barrier::default()).collect(),
                groups: (0..in_cta.div_ceil(4)).map(|_| Warpgroup::default()).collect(),
                registers_free: 0,
                phased: BTreeMap::new(),
                told: HashMap::new(),
                copies: 0,
                visits: silent.clone(),
                heard: silent,
            });
        }
        Self {
            run,
            ctas,
            warps,
            barrier: cluster::Barrier::default(),
            owed: VecDeque::new(),
            flights: VecDeque::new(),
            counters: Counters::default(),
            random: Random::new(run.schedule.seed() ^ u64::from(number).wrapping_mul(0x9E37_79B9_7F4A_7C15)),
            steps: 0,
            next_warp: 0,
        }
    }

    /// The CTA of a warp.
    fn cta(&self, w: usize) -> &Cta {
        &self.ctas[self.warps[w].cta]
    }

    fn cta_mut(&mut self, w: usize) -> &mut Cta {
        &mut self.ctas[self.warps[w].cta]
    }

    /// The warps of the warpgroup that a warp belongs to.
    fn warpgroup(&self, w: usize) -> Range<usize> {
        let first = w - self.warps[w].place as usize % 4;
        first..self.cta(w).warps.end.min(first + 4)
    }

    /// Runs some warps for a time slice each.
    pub(crate) fn advance(&mut self) -> Result<Progress, Fault> {
        let random = matches!(self.run.schedule, Schedule::Random(_));
        let runnable = |warp: &Warp| warp.live & !warp.waiting != 0;
        // Slices in a row that were given up.
        let mut given_up = 0;
        for _ in 0..64 {
            let count = self.warps.len();
            let first = if random { self.random.below(count as u64) as usize } else { self.next_warp };
            let picked = (0..count).map(|n| (first + n) % count).find(|n| runnable(&self.warps[*n]));
            let Some(warp) = picked else {
                if self.warps.iter().all(|warp| warp.live == 0) {
                    return Ok(Progress::Done);
                }
                if self.land_oldest()? {
                    continue;
                }
                return Err(self.stuck());
            };
            if random && !self.flights.is_empty() && self.random.below(4) == 0 {
                let index = self.random.below(self.flights.len() as u64) as usize;
                self.land_any(Some(index))?;
            }
            let budget = if random { 1 + self.random.below(64) as u32 } else { 20_000 };
            given_up = if self.run_warp(warp, budget, random)? { given_up + 1 } else { 0 };
            if given_up > 0 && given_up >= self.warps.iter().filter(|warp| runnable(warp)).count() {
                // What everybody asks for may be that a copy arrives.
                if !self.land_oldest()? {
                    return Ok(Progress::Idle);
                }
                given_up = 0;
            }
            // Eagerly, a warp that can still run has used up its slice: the others come first.
            self.next_warp = (warp + usize::from(runnable(&self.warps[warp]))) % count;
        }
        Ok(Progress::Running)
    }

    /// Copies that are late arrive where nothing else can happen: the oldest of them, if there is one.
    fn land_oldest(&mut self) -> Result<bool, Fault> {
        Ok(self.land_owed()? || self.land_any(None)?)
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

    /// Whether the warp gave up the rest of its slice.
    fn run_warp(&mut self, w: usize, mut budget: u32, random: bool) -> Result<bool, Fault> {
        let mut gave_up = false;
        let code = &self.run.kernel.instructions;
        while budget > 0 {
            let Some((mut pc, mask, limit)) = self.pick(w, random) else {
                return Ok(false);
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
                    self.warps[w].note_registers(instruction).map_err(|stop| self.fault(w, pc, stop))?;
                    self.execute(w, pc, active, &instruction.op).map_err(|stop| self.fault(w, pc, stop))?
                };
                match flow {
                    Flow::Next => pc += 1,
                    Flow::Yield => {
                        pc += 1;
                        budget = 0;
                        gave_up = true;
                    }
                    Flow::Jump(taken, target) if taken == mask => pc = target,
                    Flow::Jump(taken, target) => {
                        self.place(w, taken, target);
                        self.place(w, mask & !taken, pc + 1);
                        break;
                    }
                    Flow::Exit(lanes) => {
                        self.place(w, mask & !lanes, pc + 1);
                        self.end(w, lanes).map_err(|stop| self.fault(w, pc, stop))?;
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
        Ok(gave_up)
    }

    fn place(&mut self, w: usize, mask: u32, pc: u32) {
        for lane in lanes(mask) {
            self.warps[w].counters[lane] = pc;
        }
    }

    /// Lanes end: their copies land, and barriers no longer count on them.
    fn end(&mut self, w: usize, mask: u32) -> Result<(), Stop> {
        for lane in lanes(mask) {
            self.land_all(w, lane);
        }
        let cta = self.warps[w].cta;
        let warp = &mut self.warps[w];
        warp.live &= !mask;
        // Who waits for lanes of this warp asks again whom to wait for.
        warp.wake(|wait| matches!(wait, Wait::Lanes(_)));
        self.complete_barriers(cta);
        self.check_steps(w)?;
        self.leave(w, mask)
    }

    fn execute(&mut self, w: usize, pc: u32, active: u32, op: &Op) -> Step {
        match op {
            Op::Branch { target } => Ok(Flow::Jump(active, *target)),
            Op::BranchTable { index, targets } => self.branch_table(w, active, *index, targets),
            Op::Exit => Ok(Flow::Exit(active)),
            Op::Trap => Err(Stop::new(Hazard::Trap, active.trailing_zeros(), "the kernel executed a trap")),
            Op::Print { result, params } => {
                for lane in lanes(active) {
                    let params = params.map(|at| self.param(w, lane, at));
                    self.print(w, lane, params)?;
                    self.set_param(w, lane, *result, 0);
                }
                Ok(Flow::Next)
            }
            Op::AssertFail { params } => {
                let lane = active.trailing_zeros() as usize;
                let params = params.map(|at| self.param(w, lane, at));
                Err(self.assertion(w, lane, params)?)
            }
            Op::Nothing => Ok(Flow::Next),
            Op::Yield => Ok(Flow::Yield),
            Op::Load { .. } | Op::Store { .. } | Op::Atomic { .. } | Op::Fence => {
                self.memory_op(w, active, op)
            }
            Op::SetRegisters { increases, count } => self.set_registers(w, pc, active, *increases, *count),
            Op::WarpSync { .. }
            | Op::Shuffle { .. }
            | Op::Vote { .. }
            | Op::Match { .. }
            | Op::Redux { .. }
            | Op::Elect { .. } => self.warp_op(w, pc, active, op),
            Op::Barrier { .. } => self.barrier_op(w, pc, active, op),
            Op::LoadMatrix { .. }
            | Op::StoreMatrix { .. }
            | Op::TransposeMatrix { .. }
            | Op::MultiplyMatrix { .. } => self.matrix_op(w, pc, active, op),
            Op::CopyAsync { .. } | Op::CommitGroup | Op::WaitGroup { .. } => {
                self.copy_op(w, active, op).map(|()| Flow::Next)
            }
            Op::ClusterArrive { .. }
            | Op::ClusterWait { .. }
            | Op::MapAddress { .. }
            | Op::AddressRank { .. } => self.cluster_op(w, pc, active, op),
            Op::Bulk { .. }
            | Op::BulkTensor { .. }
            | Op::StoreAsync { .. }
            | Op::BulkCommit
            | Op::BulkWait { .. }
            | Op::ProxyFence => self.bulk_op(w, pc, active, op),
            Op::Product(_) | Op::ProductFence | Op::ProductCommit | Op::ProductWait { .. } => {
                self.product_op(w, pc, active, op)
            }
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

    /// A lane's number among the threads of its CTA.
    fn thread(&self, w: usize, lane: usize) -> u32 {
        self.warps[w].place * 32 + lane as u32
    }

    /// A lane as the maker of an access.
    fn stamp(&self, w: usize, lane: usize, strong: bool) -> Stamp {
        Stamp::new(self.cta(w).number, self.thread(w, lane), self.warps[w].epochs[lane], strong)
    }

    fn accessor(&self, w: usize, lane: usize, strong: bool) -> Accessor<'_> {
        Accessor { clock: &self.warps[w].clocks[lane], stamp: self.stamp(w, lane, strong) }
    }

    /// All that a lane did and heard of until now; what it does next is not part of it.
    fn tell(&mut self, w: usize, lane: usize) -> Arc<Clock> {
        let thread = self.thread(w, lane);
        let warp = &mut self.warps[w];
        let mut clock = Clock::clone(&warp.clocks[lane]);
        clock.set(thread, warp.epochs[lane]);
        warp.epochs[lane] += 1;
        Arc::new(clock)
    }

    /// A lane hears of all that is in a clock.
    fn hear(&mut self, w: usize, lane: usize, clock: &Arc<Clock>) {
        let known = &mut self.warps[w].clocks[lane];
        if !Arc::ptr_eq(known, clock) {
            Arc::make_mut(known).join(clock);
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
