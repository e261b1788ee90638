//! The device as its user sees it: memory, modules, launches.

use std::{
    num::NonZero,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
    thread,
};

use crate::{
    error::{Error, Fault},
    exec::{Cluster, Counters, Progress, Run},
    isa::{Op, Space},
    memory::{Memory, Shadow},
    parse::{self, Kernel, Module},
    schedule::Schedule,
};

/// A device with memory of its own, on which kernels run one after the other.
#[derive(Debug)]
pub struct Device {
    memory: Memory,
    modules: Vec<Module>,
    schedule: Schedule,
    jitter: Option<u64>,
    step_limit: u64,
    cores: usize,
}

/// How to start a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch<'a> {
    /// Name of the entry point.
    pub kernel: &'a str,
    /// CTAs along x, y, z.
    pub grid: [u32; 3],
    /// CTAs of a cluster along x, y, z, at most 16 in all. `[1, 1, 1]` leaves it to the kernel, which may
    /// ask for clusters itself (`__cluster_dims__`).
    pub cluster: [u32; 3],
    /// Threads of a CTA along x, y, z.
    pub block: [u32; 3],
    /// Shared memory of a CTA beside what the kernel declares, in bytes.
    pub shared_bytes: u32,
    /// The parameters, laid out as the kernel declares them.
    pub params: &'a [u8],
}

/// CTAs that are under way at once where they may talk to each other, and clusters that are in the random
/// schedule, as long as they get on.
const RESIDENT: usize = 132;
const FEW: usize = 8;
/// CTAs that a cluster can have on an H100, if the kernel is allowed more than the portable 8.
const MOST_CTAS: u32 = 16;
/// Shared memory that a CTA can have, as on an H100.
const MOST_SHARED: u64 = 227 * 1024;

impl Default for Device {
    fn default() -> Self {
        Self {
            memory: Memory::default(),
            modules: Vec::new(),
            schedule: Schedule::Eager,
            jitter: None,
            step_limit: 1 << 30,
            cores: thread::available_parallelism().map_or(1, NonZero::get),
        }
    }
}

impl Device {
    /// A device without memory in use and without modules, in the eager schedule.
    pub fn new() -> Self {
        Self::default()
    }

    /// The order of things in launches from now on.
    pub fn set_schedule(&mut self, schedule: Schedule) {
        self.schedule = schedule;
    }

    /// Moves the results of approximated functions (`ex2`, `lg2`, `rcp`, `rsqrt`, ...) by up to two
    /// units in the last place, drawn from the seed and the argument. `None`, as it is at first: they
    /// are rounded from the exact result.
    pub fn set_jitter(&mut self, seed: Option<u64>) {
        self.jitter = seed;
    }

    /// Warp instructions that each cluster (each CTA, where there are none) may execute before it is taken
    /// to run for ever.
    pub fn set_step_limit(&mut self, steps: u64) {
        self.step_limit = steps;
    }

    /// Threads of the host that CTAs are spread over. Results do not depend on it.
    pub fn set_cores(&mut self, cores: usize) {
        self.cores = cores.max(1);
    }

    /// Reads PTX and makes its entries known. An entry hides one of the same name from before.
    ///
    /// # Errors
    /// [`Error::Parse`] with the line of what is not PTX or not implemented.
    pub fn load(&mut self, ptx: &str) -> Result<(), Error> {
        let module = parse::parse(ptx, self.memory.next_address())?;
        for variable in &module.variables {
            self.memory.insert(variable.address, variable.bytes.len() as u64);
            self.memory.write(variable.address, &variable.bytes).map_err(Error::Request)?;
        }
        self.modules.push(module);
        Ok(())
    }

    /// Names of the entries that are loaded.
    pub fn kernels(&self) -> impl Iterator<Item = &str> {
        self.modules.iter().flat_map(|module| module.kernels.iter().map(|kernel| kernel.name.as_str()))
    }

    /// Reserves memory, aligned to 256 bytes. What it holds is undefined, and reading it before
    /// writing is a fault.
    pub fn alloc(&mut self, bytes: usize) -> u64 {
        self.memory.alloc(bytes as u64)
    }

    /// Gives memory back.
    ///
    /// # Errors
    /// [`Error::Request`] where no allocation begins.
    pub fn free(&mut self, address: u64) -> Result<(), Error> {
        self.memory.free(address).map_err(Error::Request)
    }

    /// Copies host bytes to the device.
    ///
    /// # Errors
    /// [`Error::Request`] where they do not lie in one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Error> {
        self.memory.write(address, bytes).map_err(Error::Request)
    }

    /// Copies device bytes to the host.
    ///
    /// # Errors
    /// [`Error::Request`] where they do not lie in one allocation or were never written.
    pub fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Error> {
        self.memory.read(address, bytes).map_err(Error::Request)
    }

    /// Sets every byte of a range.
    ///
    /// # Errors
    /// [`Error::Request`] where it does not lie in one allocation.
    pub fn fill(&mut self, address: u64, value: u8, bytes: usize) -> Result<(), Error> {
        self.write(address, &vec![value; bytes])
    }

    /// Runs a kernel to its end.
    ///
    /// CTAs are spread over the cores of the host, except where the kernel has atomics, fences or
    /// strong accesses to global memory: there the order of CTAs is part of the run, so they take turns
    /// on one core, in an order that the schedule alone decides.
    ///
    /// # Errors
    /// [`Error::Request`] for a launch that a driver would refuse, [`Error::Fault`] for a bug in the
    /// kernel: of several, that of the first CTA.
    pub fn launch(&mut self, launch: &Launch<'_>) -> Result<Counters, Error> {
        let kernel = self.checked(launch)?;
        let shadow = Shadow::new(&self.memory);
        let cluster = kernel.required_cluster.unwrap_or(launch.cluster);
        let explicit_cluster = kernel.required_cluster.is_some() || cluster != [1; 3];
        let run = Run {
            kernel,
            memory: &self.memory,
            shadow: &shadow,
            params: launch.params,
            grid: launch.grid,
            cluster,
            explicit_cluster,
            block: launch.block,
            dynamic_shared: launch.shared_bytes,
            schedule: self.schedule,
            jitter: self.jitter,
            step_limit: self.step_limit,
        };
        let clusters = launch.grid.iter().product::<u32>() / cluster.iter().product::<u32>();
        let result =
            if talks(kernel) { in_turns(&run, clusters) } else { spread(&run, clusters, self.cores) };
        result.map_err(|fault| Error::Fault(Box::new(fault)))
    }

    /// The kernel, if the launch fits it.
    fn checked(&self, launch: &Launch<'_>) -> Result<&Kernel, Error> {
        let Launch { kernel: name, grid, cluster, block, shared_bytes, params } = *launch;
        let found =
            self.modules.iter().rev().flat_map(|module| &module.kernels).find(|kernel| kernel.name == name);
        let Some(kernel) = found else {
            let kernels = self.modules.iter().flat_map(|module| &module.kernels);
            let loaded: Vec<String> =
                kernels.map(|kernel| format!("{} (line {})", kernel.name, kernel.line)).collect();
            let there =
                if loaded.is_empty() { "is none".into() } else { format!("are: {}", loaded.join(", ")) };
            return Err(Error::Request(format!("no entry {name} is loaded; there {there}")));
        };
        let refuse = |reason: String| Err(Error::Request(format!("{name} (line {}): {reason}", kernel.line)));
        if params.len() != kernel.param_bytes as usize {
            return refuse(format!(
                "{} bytes of parameters were given, the entry takes {}",
                params.len(),
                kernel.param_bytes
            ));
        }
        let count = |extents: [u32; 3]| extents.into_iter().map(u64::from).product::<u64>();
        if count(grid) == 0 || count(grid) >= 1 << 23 || grid[1] > 65_535 || grid[2] > 65_535 {
            return refuse(format!("a grid of {grid:?}; it must have from 1 to 2^23 - 1 CTAs"));
        }
        if count(block) == 0 || count(block) > 1024 || block[2] > 64 {
            return refuse(format!("a block of {block:?}; it must have from 1 to 1024 threads"));
        }
        let required = kernel.required_cluster.unwrap_or(cluster);
        if cluster != [1; 3] && cluster != required {
            return refuse(format!("a cluster of {cluster:?}, and .reqnctapercluster says {required:?}"));
        }
        let most = kernel.most_ctas.unwrap_or(MOST_CTAS).min(MOST_CTAS);
        if !(1..=u64::from(most)).contains(&count(required)) {
            return refuse(format!("a cluster of {required:?}; it must have from 1 to {most} CTAs"));
        }
        if grid.iter().zip(required).any(|(grid, cluster)| !grid.is_multiple_of(cluster)) {
            return refuse(format!("a grid of {grid:?}, which clusters of {required:?} do not divide"));
        }
        if let Some(most) = kernel.most_threads.filter(|most| count(block) > u64::from(*most)) {
            return refuse(format!("a block of {block:?}, and .maxntid says {most}"));
        }
        if let Some(required) = kernel.required_threads.filter(|required| *required != block) {
            return refuse(format!("a block of {block:?}, and .reqntid says {required:?}"));
        }
        let shared = u64::from(shared_bytes) + u64::from(kernel.shared_bytes);
        if shared > MOST_SHARED {
            return refuse(format!("{shared} bytes of shared memory; a CTA can have {MOST_SHARED}"));
        }
        Ok(kernel)
    }
}

/// Whether CTAs of a kernel can tell in which order they run: without strong accesses to memory that
/// they share, all they could do is race.
fn talks(kernel: &Kernel) -> bool {
    use crate::isa::Order;
    kernel.instructions.iter().any(|instruction| match &instruction.op {
        Op::Atomic { space, .. } => *space != Space::Shared,
        Op::Load { space, order, .. } | Op::Store { space, order, .. } => {
            *order != Order::Weak && matches!(space, Space::Global | Space::Generic)
        }
        _ => false,
    })
}

/// Clusters on several cores, each as far as it gets.
fn spread(run: &Run<'_>, clusters: u32, cores: usize) -> Result<Counters, Fault> {
    let next = AtomicU32::new(0);
    // Clusters from here on are not run: one before them has failed.
    let end = AtomicU32::new(clusters);
    let failed: Mutex<Option<(u32, Fault)>> = Mutex::new(None);
    let work = || {
        let mut counters = Counters::default();
        loop {
            let number = next.fetch_add(1, Relaxed);
            if number >= end.load(Relaxed) {
                return counters;
            }
            let mut cluster = Cluster::new(run, number);
            let result = loop {
                match cluster.advance() {
                    Ok(Progress::Running | Progress::Idle) => {}
                    Ok(Progress::Done) => break None,
                    Err(fault) => break Some(fault),
                }
            };
            counters.add(&cluster.counters);
            if let Some(fault) = result {
                end.fetch_min(number, Relaxed);
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(first, _)| *first > number) {
                    *failed = Some((number, fault));
                }
            }
        }
    };
    let cores = cores.min(clusters as usize);
    let mut counters = Counters::default();
    if cores <= 1 {
        counters = work();
    } else {
        thread::scope(|scope| {
            let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
            for worker in workers {
                match worker.join() {
                    Ok(its) => counters.add(&its),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
        });
    }
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some((_, fault)) => Err(fault),
        None => Ok(counters),
    }
}

/// Clusters that take turns.
fn in_turns(run: &Run<'_>, clusters: u32) -> Result<Counters, Fault> {
    let mut random = crate::schedule::Random::new(run.schedule.seed());
    let mut counters = Counters::default();
    let mut waiting = 0..clusters;
    let mut resident: Vec<Cluster<'_>> = Vec::new();
    let mut turn = 0;
    let most = (RESIDENT / run.cluster.iter().product::<u32>() as usize).max(1);
    let seeded = matches!(run.schedule, Schedule::Random(_));
    // What waits may wait for what has not begun.
    let mut idle = false;
    loop {
        // Eagerly, a cluster begins when those before it have had their turn and are not done.
        let begins = if seeded { resident.len() < FEW || idle } else { turn >= resident.len() };
        if begins
            && resident.len() < most
            && let Some(number) = waiting.next()
        {
            resident.push(Cluster::new(run, number));
        }
        if resident.is_empty() {
            return Ok(counters);
        }
        if seeded {
            turn = random.below(resident.len() as u64) as usize;
        } else if turn >= resident.len() {
            turn = 0;
        }
        let progress = resident[turn].advance()?;
        idle = progress == Progress::Idle;
        match progress {
            Progress::Running | Progress::Idle => turn += 1,
            Progress::Done => {
                let done = resident.remove(turn);
                counters.add(&done.counters);
            }
        }
    }
}
