//! Clusters of CTAs: barriers, shared memory of other CTAs, copies to it. `tests/ptx/clusters.cu` is the
//! source of the PTX.

use ptx_emulator::{Counters, Device, Error, Hazard, Launch, Schedule, Swizzle, TensorMap};

const SCHEDULES: [Schedule; 5] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2), Schedule::Random(3)];

/// A device with the kernels, and the parameters of a launch in the making.
struct Bench {
    device: Device,
    params: Vec<u8>,
}

impl Bench {
    fn new(schedule: Schedule) -> Self {
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.load(include_str!("ptx/clusters.ptx")).unwrap();
        Self { device, params: Vec::new() }
    }

    fn input(&mut self, values: &[u32]) {
        let address = self.room(values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.device.write(address, &bytes).unwrap();
    }

    fn room(&mut self, words: usize) -> u64 {
        let address = self.device.alloc(words * 4);
        self.params.extend(address.to_le_bytes());
        address
    }

    fn run(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        cluster: [u32; 3],
        threads: u32,
    ) -> Result<Counters, Error> {
        let block = [threads, 1, 1];
        self.device.launch(&Launch { kernel, grid, cluster, block, shared_bytes: 0, params: &self.params })
    }

    fn words(&self, address: u64, words: usize) -> Vec<u32> {
        let bytes = self.device.read(address, words * 4).unwrap_or_else(|error| panic!("{error}"));
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

/// The bug shows in every schedule, as one of these hazards.
#[track_caller]
fn finds<T>(kernel: &str, hazards: &[Hazard], run: impl Fn(Schedule) -> Result<T, Error>) {
    for schedule in SCHEDULES {
        match run(schedule) {
            Err(Error::Fault(fault)) => {
                assert!(hazards.contains(&fault.hazard), "{kernel} {schedule:?}: {fault}");
            }
            Err(error) => panic!("{kernel} {schedule:?}: {error}"),
            Ok(_) => panic!("{kernel} {schedule:?}: a bug was not found"),
        }
    }
}

#[test]
fn places() {
    for (grid, cluster) in
        [([4, 6, 2], [2, 3, 1]), ([4, 2, 4], [1, 2, 4]), ([16, 1, 1], [16, 1, 1]), ([3, 2, 1], [1, 1, 1])]
    {
        let mut bench = Bench::new(Schedule::Eager);
        let ctas: u32 = grid.iter().product();
        let out = bench.room(ctas as usize * 16);
        bench.run("places", grid, cluster, 1).unwrap_or_else(|error| panic!("{error}"));
        let size: u32 = cluster.iter().product();
        for (number, words) in (0..).zip(bench.words(out, ctas as usize * 16).chunks(16)) {
            let id = [number % grid[0], number / grid[0] % grid[1], number / grid[0] / grid[1]];
            let within: [u32; 3] = std::array::from_fn(|axis| id[axis] % cluster[axis]);
            let rank = within[0] + cluster[0] * (within[1] + cluster[1] * within[2]);
            let of = |f: &dyn Fn(usize) -> u32| [f(0), f(1), f(2)];
            let expected = [
                of(&|axis| within[axis]),
                of(&|axis| cluster[axis]),
                of(&|axis| id[axis] / cluster[axis]),
                [grid[0] / cluster[0], grid[1] / cluster[1], u32::from(size > 1)],
                // The last word: whether the last CTA's memory is its own, in the cluster, and where mapa says.
                [rank, size, (size - 1) * 16 + rank],
            ];
            assert_eq!(words[..15], expected.concat(), "CTA {id:?} in clusters of {cluster:?}");
            assert_eq!(words[15], if rank == size - 1 { 7 } else { 5 });
        }
    }
}

fn histogram(schedule: Schedule, kernel: &str, cores: usize) -> Result<(Vec<u32>, Counters), Error> {
    let (ctas, size, count) = (8, 4, 200);
    let input: Vec<u32> = (0..ctas * count).map(|n| n * n / 7 + n).collect();
    let mut bench = Bench::new(schedule);
    bench.device.set_cores(cores);
    bench.input(&input);
    let out = bench.room(ctas as usize * 32);
    bench.params.extend(count.to_le_bytes());
    let cluster = if kernel == "histogram_of_four" { [1; 3] } else { [size, 1, 1] };
    let counters = bench.run(kernel, [ctas, 1, 1], cluster, 64)?;
    let found = bench.words(out, ctas as usize * 32);
    for (at, found) in (0..).zip(&found) {
        let (cta, bin) = (at / 32, at % 32);
        let (first, rank) = (cta / size * size, cta % size);
        let bin = (rank + 1) % size * 32 + bin;
        let own = &input[(first * count) as usize..][..(size * count) as usize];
        let expected = own.iter().filter(|value| **value % (32 * size) == bin).count();
        assert_eq!(*found, expected as u32, "{schedule:?}: bin {bin} of cluster {}", first / size);
    }
    Ok((found, counters))
}

#[test]
fn counts_in_shared_memory_of_the_cluster() {
    for schedule in SCHEDULES {
        for kernel in ["histogram_correct", "histogram_of_four"] {
            let runs = [1, 4].map(|cores| {
                histogram(schedule, kernel, cores).unwrap_or_else(|error| panic!("{schedule:?}: {error}"))
            });
            assert_eq!(runs[0], runs[1], "the host's cores make no difference");
            // 200 values make 7 requests of a warp, most to several CTAs, and one reads the neighbour's bins.
            if schedule == Schedule::Eager {
                assert_eq!(runs[0].1.cluster_requests, 8 * (7 + 1));
            }
        }
    }
    for (kernel, hazards) in [
        ("histogram_uncleared", &[Hazard::Peer, Hazard::Race, Hazard::Uninitialised] as &[Hazard]),
        ("histogram_early", &[Hazard::Race]),
        ("histogram_ctas", &[Hazard::Peer]),
        ("histogram_left", &[Hazard::Peer]),
    ] {
        finds(kernel, hazards, |schedule| histogram(schedule, kernel, 1));
    }
}

fn exchange(schedule: Schedule, kernel: &str) -> Result<(), Error> {
    let mut bench = Bench::new(schedule);
    let out = bench.room(6 * 64);
    bench.run(kernel, [6, 1, 1], [3, 1, 1], 64)?;
    for (at, found) in (0..).zip(bench.words(out, 6 * 64)) {
        assert_eq!(found, (at / 64 + 2) % 3 * 100 + at % 64, "{kernel} {schedule:?}");
    }
    Ok(())
}

#[test]
fn barriers_of_the_cluster() {
    for schedule in SCHEDULES {
        // Threads that have ended are not waited for.
        for kernel in ["exchange_correct", "exchange_one_less"] {
            exchange(schedule, kernel).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        }
    }
    for (kernel, hazards) in [
        ("exchange_relaxed", &[Hazard::Race, Hazard::Uninitialised] as &[Hazard]),
        ("exchange_between", &[Hazard::Race, Hazard::Uninitialised]),
        ("exchange_twice", &[Hazard::Arrival]),
        ("exchange_unarrived", &[Hazard::Arrival]),
        ("exchange_ended", &[Hazard::Peer]),
        ("exchange_misnamed", &[Hazard::OutOfBounds]),
    ] {
        finds(kernel, hazards, |schedule| exchange(schedule, kernel));
    }
}

fn ring(schedule: Schedule, kernel: &str) -> Result<(), Error> {
    let input: Vec<u32> = (0..7 * 32).map(|n| n * 5 + 1).collect();
    let mut bench = Bench::new(schedule);
    bench.input(&input);
    let out = bench.room(input.len());
    bench.params.extend(7_u32.to_le_bytes());
    bench.run(kernel, [2, 1, 1], [2, 1, 1], 32)?;
    let expected: Vec<u32> = (0..7 * 32).map(|at| input[at / 32 * 32 + 31 - at % 32]).collect();
    assert_eq!(bench.words(out, input.len()), expected, "{kernel} {schedule:?}");
    Ok(())
}

#[test]
fn mbarriers_of_other_ctas() {
    for schedule in SCHEDULES {
        for kernel in ["ring_correct", "ring_async"] {
            ring(schedule, kernel).unwrap_or_else(|error| panic!("{kernel} {schedule:?}: {error}"));
        }
    }
    for (kernel, hazards) in [
        // Where the writer is fast the reader misses whole phases.
        ("ring_full", &[Hazard::Race, Hazard::Deadlock] as &[Hazard]),
        ("ring_async_full", &[Hazard::Race, Hazard::Async, Hazard::Deadlock]),
        ("ring_unmet", &[Hazard::Peer]),
        ("ring_many", &[Hazard::Deadlock]),
        ("ring_stuck", &[Hazard::Deadlock]),
        ("ring_left", &[Hazard::Peer]),
    ] {
        finds(kernel, hazards, |schedule| ring(schedule, kernel));
    }
}

fn multicast(schedule: Schedule, kernel: &str, size: u32) -> Result<Counters, Error> {
    const COUNT: u32 = 3;
    let mut bench = Bench::new(schedule);
    let tensor = bench.device.alloc(COUNT as usize * 4096);
    let value = |n: u32| (n * 7 + n / 64) as u16;
    let bytes: Vec<u8> = (0..COUNT * 2048).flat_map(|n| value(n).to_le_bytes()).collect();
    bench.device.write(tensor, &bytes)?;
    let map = TensorMap {
        address: tensor,
        element_bytes: 2,
        sizes: &[64, u64::from(COUNT) * 32],
        strides: &[128],
        box_sizes: &[64, 32 / size],
        swizzle: Swizzle::Bytes128,
    };
    bench.params.extend(map.encode()?);
    let out = bench.room((2 * size * COUNT) as usize * 1024);
    bench.params.extend(COUNT.to_le_bytes());
    let counters = bench.run(kernel, [2 * size, 1, 1], [size, 1, 1], 64)?;
    let found = bench.device.read(out, (2 * size * COUNT) as usize * 4096)?;
    for (n, found) in (0..).zip(found.chunks(2)) {
        assert_eq!(u16::from_le_bytes(found.try_into().unwrap()), value(n % (COUNT * 2048)), "{schedule:?}");
    }
    Ok(counters)
}

#[test]
fn copies_to_many_ctas() {
    for schedule in SCHEDULES {
        for size in [1, 2, 4] {
            let counters = multicast(schedule, "multicast_correct", size);
            let counters = counters.unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
            // Two clusters, three tiles of 4096 bytes: everybody gets them, device memory is read once.
            let (copies, bytes, sectors) = (2 * 3 * size, 2 * 3 * size * 4096, 2 * 3 * 128);
            let found = [counters.bulk_copies, counters.bulk_bytes, counters.bulk_sectors];
            assert_eq!(found, [copies, bytes, sectors].map(u64::from));
        }
    }
    for (kernel, hazards) in [
        ("multicast_overwritten", &[Hazard::Race] as &[Hazard]),
        ("multicast_one_less", &[Hazard::Deadlock, Hazard::Race]),
        ("multicast_one_more", &[Hazard::Operand]),
        ("multicast_few", &[Hazard::Race, Hazard::Async, Hazard::Uninitialised, Hazard::Deadlock]),
    ] {
        finds(kernel, hazards, |schedule| multicast(schedule, kernel, 4));
    }
}

fn push(schedule: Schedule, kernel: &str) -> Result<(), Error> {
    let mut bench = Bench::new(schedule);
    let out = bench.room(3 * 64);
    bench.run(kernel, [3, 1, 1], [3, 1, 1], 64)?;
    for (at, found) in (0..).zip(bench.words(out, 3 * 64)) {
        assert_eq!(found, (at / 64 + 2) % 3 * 1000 + 63 - at % 64, "{kernel} {schedule:?}");
    }
    Ok(())
}

#[test]
fn copies_from_cta_to_cta() {
    for schedule in SCHEDULES {
        push(schedule, "push_correct").unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
    }
    for (kernel, hazard) in
        [("push_unfenced", Hazard::Async), ("push_changed", Hazard::Race), ("push_home", Hazard::Operand)]
    {
        finds(kernel, &[hazard], |schedule| push(schedule, kernel));
    }
}

#[test]
fn launches_that_make_no_sense() {
    for (kernel, grid, cluster, expected) in [
        ("places", [6, 1, 1], [4, 1, 1], "which clusters of [4, 1, 1] do not divide"),
        ("places", [17, 1, 1], [17, 1, 1], "it must have from 1 to 16 CTAs"),
        ("places", [4, 1, 1], [0, 1, 1], "it must have from 1 to 16 CTAs"),
        ("histogram_of_four", [8, 1, 1], [2, 1, 1], ".reqnctapercluster says [4, 1, 1]"),
        ("histogram_of_four", [6, 1, 1], [1, 1, 1], "which clusters of [4, 1, 1] do not divide"),
    ] {
        let mut bench = Bench::new(Schedule::Eager);
        bench.room(256);
        if kernel != "places" {
            bench.room(256);
            bench.params.extend(1_u32.to_le_bytes());
        }
        match bench.run(kernel, grid, cluster, 32) {
            Err(Error::Request(reason)) => assert!(reason.contains(expected), "{reason}"),
            other => panic!("{kernel} {grid:?} {cluster:?}: {other:?}"),
        }
    }
}
