//! Planted bugs: for each hazard a kernel that has it, and beside it the same kernel without.
//! `tests/ptx/hazards.cu` is the source of the PTX.

use ptx_emulator::{Counters, Device, Error, Fault, Hazard, Launch, Schedule};

const SCHEDULES: [Schedule; 5] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2), Schedule::Random(3)];

/// A launch in the making: buffers of u32 and numbers in the order of the kernel's parameters.
struct Bench {
    schedule: Schedule,
    device: Device,
    params: Vec<u8>,
    buffers: Vec<(u64, usize)>,
}

impl Bench {
    fn new(schedule: Schedule) -> Self {
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.load(include_str!("ptx/hazards.ptx")).unwrap();
        Self { schedule, device, params: Vec::new(), buffers: Vec::new() }
    }

    fn input(self, values: &[u32]) -> Self {
        let mut with = self.room(values.len());
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        with.device.write(with.buffers.last().unwrap().0, &bytes).unwrap();
        with
    }

    /// Memory that nothing wrote.
    fn room(mut self, words: usize) -> Self {
        let address = self.device.alloc(words * 4);
        self.buffers.push((address, words));
        self.params.resize(self.params.len().next_multiple_of(8), 0);
        self.params.extend(address.to_le_bytes());
        self
    }

    fn number(mut self, value: u32) -> Self {
        self.params.extend(value.to_le_bytes());
        self
    }

    fn run(&mut self, kernel: &str, grid: u32, block: u32) -> Result<Counters, Error> {
        self.device.launch(&Launch {
            kernel,
            grid: [grid, 1, 1],
            cluster: [1, 1, 1],
            block: [block, 1, 1],
            shared_bytes: 0,
            params: &self.params,
        })
    }

    fn words(&self, buffer: usize) -> Vec<u32> {
        let (address, words) = self.buffers[buffer];
        let bytes = self.device.read(address, words * 4).unwrap();
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    }
}

#[track_caller]
fn fault(result: Result<Counters, Error>) -> Fault {
    match result {
        Err(Error::Fault(fault)) => *fault,
        other => panic!("a bug was not found: {other:?}"),
    }
}

/// The bug shows in every schedule.
#[track_caller]
fn found(hazard: Hazard, run: impl Fn(Bench) -> Result<Counters, Error>) -> Fault {
    let faults: Vec<Fault> = SCHEDULES.iter().map(|schedule| fault(run(Bench::new(*schedule)))).collect();
    for (fault, schedule) in faults.iter().zip(SCHEDULES) {
        assert_eq!(fault.hazard, hazard, "{schedule:?}: {fault}");
    }
    faults.into_iter().next().unwrap()
}

#[test]
fn out_of_bounds() {
    let run = |bench: Bench, grid| bench.room(64).run("fill", grid, 32);
    for schedule in SCHEDULES {
        run(Bench::new(schedule), 2).unwrap();
    }
    let fault = found(Hazard::OutOfBounds, |bench| run(bench, 3));
    assert_eq!((fault.cta, fault.thread), ([2, 0, 0], [0, 0, 0]));
    assert!(fault.text.starts_with("st.global.u32"), "{fault}");
    assert!(fault.message.contains("begin at byte 256 of the 256 bytes allocated at"), "{fault}");

    let fault = found(Hazard::OutOfBounds, |bench| bench.room(32).run("past_the_end", 1, 32));
    assert_eq!(fault.thread, [31, 0, 0]);
}

#[test]
fn given_back() {
    let mut bench = Bench::new(Schedule::Eager).room(32);
    bench.device.free(bench.buffers[0].0).unwrap();
    let fault = fault(bench.run("fill", 1, 32));
    assert_eq!(fault.hazard, Hazard::OutOfBounds);
    assert!(fault.message.ends_with("were given back") || fault.message.contains("given back"), "{fault}");
    assert!(bench.device.free(bench.buffers[0].0).is_err());
}

#[test]
fn misaligned() {
    let fault = found(Hazard::Misaligned, |bench| bench.room(64).run("misaligned_vector", 1, 4));
    assert_eq!(fault.thread, [1, 0, 0]);
}

#[test]
fn uninitialised_global() {
    for schedule in SCHEDULES {
        let mut bench = Bench::new(schedule).input(&[7; 32]).room(32);
        bench.run("reads_input", 1, 32).unwrap();
        assert_eq!(bench.words(1), [8; 32]);
    }
    found(Hazard::Uninitialised, |bench| bench.room(32).room(32).run("reads_input", 1, 32));
    let bench = Bench::new(Schedule::Eager).room(4);
    assert!(bench.device.read(bench.buffers[0].0, 16).is_err());
}

#[test]
fn uninitialised_shared() {
    let fault = found(Hazard::Uninitialised, |bench| bench.room(64).run("shared_uninitialised", 1, 64));
    assert_eq!(fault.message, "byte 0x80 of shared memory was never written");
}

#[test]
fn shared_race() {
    for schedule in SCHEDULES {
        let mut bench = Bench::new(schedule).room(256);
        bench.run("neighbour_correct", 1, 256).unwrap();
        assert_eq!(bench.words(0)[0], 37 * 3);
    }
    for schedule in SCHEDULES {
        let fault = fault(Bench::new(schedule).room(256).run("neighbour_without_barrier", 1, 256));
        // The neighbour may not have written yet.
        assert!(matches!(fault.hazard, Hazard::Race | Hazard::Uninitialised), "{fault}");
    }
}

#[test]
fn overwritten_while_read() {
    let input: Vec<u32> = (0..512).collect();
    let run = |bench: Bench, kernel| bench.input(&input).room(128).number(4).run(kernel, 1, 128);
    for schedule in SCHEDULES {
        run(Bench::new(schedule), "tiles_correct").unwrap();
    }
    let fault = found(Hazard::Race, |bench| run(bench, "tiles_one_barrier"));
    assert!(fault.message.contains("are not ordered"), "{fault}");
}

#[test]
fn every_reader_and_every_byte_counts() {
    for schedule in SCHEDULES {
        Bench::new(schedule).room(96).run("readers_correct", 1, 128).unwrap();
        let mut bench = Bench::new(schedule).room(32);
        bench.run("halves_correct", 1, 64).unwrap();
        assert_eq!(bench.words(0), (0..32).collect::<Vec<u32>>());
        let fault = fault(Bench::new(schedule).room(32).run("halves_without_barrier", 1, 64));
        assert!(matches!(fault.hazard, Hazard::Race | Hazard::Uninitialised), "{fault}");
    }
    found(Hazard::Race, |bench| bench.room(96).run("readers_one_left", 1, 128));
}

#[test]
fn race_within_a_warp() {
    for schedule in SCHEDULES {
        Bench::new(schedule).room(32).run("warp_exchange_correct", 1, 32).unwrap();
    }
    for schedule in SCHEDULES {
        let fault = fault(Bench::new(schedule).room(32).run("warp_exchange_without_sync", 1, 32));
        assert!(matches!(fault.hazard, Hazard::Race | Hazard::Uninitialised), "{fault}");
    }
}

#[test]
fn race_between_ctas() {
    found(Hazard::Race, |bench| bench.room(128).run("ctas_collide", 2, 64));
}

#[test]
fn order_through_atomics_and_fences() {
    let input: Vec<u32> = (0..256).collect();
    let run = |mut bench: Bench, kernel| {
        let result = bench.run(kernel, 8, 32);
        result.map(|_| bench.words(3)[0])
    };
    let bench = |schedule| Bench::new(schedule).input(&input).room(8).input(&[0]).room(1);
    for schedule in SCHEDULES {
        assert_eq!(run(bench(schedule), "last_block_correct").unwrap(), 255 * 128, "{schedule:?}");
        match run(bench(schedule), "last_block_without_fence") {
            Err(Error::Fault(fault)) => assert_eq!(fault.hazard, Hazard::Race, "{fault}"),
            other => panic!("a bug was not found: {other:?}"),
        }
    }
}

#[test]
fn a_cta_may_wait_for_an_earlier_one() {
    for schedule in SCHEDULES {
        let mut bench = Bench::new(schedule).room(1).input(&[0]).room(1);
        bench.run("flag", 2, 1).unwrap();
        assert_eq!(bench.words(2), [42]);
    }
}

/// Persistent CTAs that spin on what others do cost little, in every schedule.
#[test]
fn queues_and_barriers_of_the_grid() {
    const COUNT: usize = 300;
    let input: Vec<u32> = (0..COUNT as u32).map(|i| i * 3 + 1).collect();
    let mut expected = vec![1_u32];
    for i in 1..COUNT {
        let before = expected[i / 2].wrapping_add(expected[i - 1].wrapping_mul(3));
        expected.push(input[i].wrapping_add(before));
    }
    let run = |schedule, kernel, ctas| {
        let bench = Bench::new(schedule).input(&input).input(&[0]).input(&[0; COUNT]).room(COUNT * 32);
        let mut bench = bench.number(COUNT as u32);
        bench.device.set_step_limit(200_000);
        bench.run(kernel, ctas, 32).map(|counters| (bench.words(3), counters))
    };
    for schedule in SCHEDULES {
        for ctas in [1, 7, 132, 200] {
            let (found, counters) =
                run(schedule, "queue_correct", ctas).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
            for (i, row) in found.chunks(32).enumerate() {
                assert_eq!(row, [expected[i]; 32], "{schedule:?}: item {i}");
            }
            assert!(counters.warp_instructions < 2_000_000, "{schedule:?} {ctas}: {counters:?}");
        }
        let mut bench = Bench::new(schedule).input(&[0]).room(2 * 132).number(5);
        bench.device.set_step_limit(200_000);
        bench.run("grid_barrier", 132, 1).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        let expected: Vec<u32> = (0..132).map(|cta| (cta + 4) % 132 + 4).collect();
        assert_eq!(bench.words(1)[132..], expected);
    }
    found(Hazard::Race, |bench| run(bench.schedule, "queue_untold", 7).map(|run| run.1));
    found(Hazard::Race, |bench| run(bench.schedule, "queue_unheard", 7).map(|run| run.1));
    found(Hazard::Endless, |bench| run(bench.schedule, "queue_backwards", 1).map(|run| run.1));
}

#[test]
fn read_only_path() {
    found(Hazard::Race, |bench| bench.room(64).room(64).run("stale_read", 1, 64));
}

#[test]
fn divergent_barrier() {
    found(Hazard::NotConverged, |bench| bench.room(32).run("divergent_barrier", 1, 32));
}

/// What is aligned and for the whole CTA stands at one place; barriers of some of the warps may not.
#[test]
fn one_barrier_for_all() {
    let run = |schedule, [here, there]: [&str; 2]| {
        let ptx = format!(
            ".version 9.0\n.target sm_90\n.address_size 64\n.visible .entry k() {{\n.reg .b32 %r; .reg .pred %p;\n\
             mov.u32 %r, %tid.x; setp.lt.u32 %p, %r, 32; @%p bra HERE;\n{there};\nbra END;\nHERE: {here};\nEND: ret;\n}}"
        );
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.load(&ptx).unwrap();
        let (grid, block) = ([1; 3], [64, 1, 1]);
        device.launch(&Launch { kernel: "k", grid, cluster: [1; 3], block, shared_bytes: 0, params: &[] })
    };
    for schedule in SCHEDULES {
        for places in [["bar.sync 0, 64", "bar.sync 0, 64"], ["barrier.sync 0", "barrier.sync 0"]] {
            run(schedule, places).unwrap_or_else(|error| panic!("{places:?} {schedule:?}: {error}"));
        }
        for places in [["bar.sync 0", "bar.sync 0"], ["barrier.sync.aligned 0", "bar.sync 0"]] {
            let fault = fault(run(schedule, places));
            assert_eq!(fault.hazard, Hazard::NotConverged, "{fault}");
        }
    }
}

#[test]
fn lane_masks() {
    found(Hazard::LaneMask, |bench| bench.room(32).run("shuffle_source", 1, 32));
    let fault = found(Hazard::LaneMask, |bench| bench.room(32).run("shuffle_mask", 1, 32));
    assert!(fault.message.contains("have ended"), "{fault}");
}

#[test]
fn deadlock() {
    let fault = found(Hazard::Deadlock, |bench| bench.room(96).run("barrier_count", 1, 96));
    assert!(
        fault.message.contains("64 threads at line") && fault.message.contains("(64 of 96 have arrived)"),
        "{fault}"
    );
}

#[test]
fn barrier_counts() {
    found(Hazard::Arrival, |bench| bench.room(96).run("barrier_mismatch", 1, 96));
    // More threads than the CTA has.
    found(Hazard::Arrival, |bench| bench.room(64).run("barrier_count", 1, 64));
    for schedule in SCHEDULES {
        Bench::new(schedule).room(32).run("handover_correct", 1, 64).unwrap();
        let fault = fault(Bench::new(schedule).room(32).run("handover_early", 1, 64));
        assert!(matches!(fault.hazard, Hazard::Race | Hazard::Uninitialised), "{fault}");
    }
}

#[test]
fn traps_and_endless_loops() {
    let fault = found(Hazard::Trap, |bench| bench.room(32).run("trap_if", 1, 32));
    assert_eq!(fault.thread, [7, 0, 0]);
    found(Hazard::Endless, |mut bench| {
        bench.device.set_step_limit(10_000);
        bench.input(&[0, 0]).run("endless", 1, 1)
    });
}

#[test]
fn asynchronous_copies() {
    let input: Vec<u32> = (0..4 * 256).collect();
    for schedule in SCHEDULES {
        for wanted in [16, 12, 4, 0] {
            let mut bench = Bench::new(schedule).input(&input).room(4 * 256).number(4).number(wanted);
            bench.run("copies_correct", 1, 64).unwrap();
            let expected: Vec<u32> = (0..4_u32 * 256)
                .map(|at| {
                    let (tile, thread, word) = (at / 256, at / 4 % 64, at % 4);
                    if word * 4 < wanted { tile * 256 + (63 - thread) * 4 + word } else { 0 }
                })
                .collect();
            assert_eq!(bench.words(1), expected, "{schedule:?} {wanted}");
        }
    }
    found(Hazard::Async, |bench| {
        bench.input(&input).room(4 * 256).number(4).number(16).run("copies_early", 1, 64)
    });
    let fault = found(Hazard::Operand, |bench| {
        bench.input(&input).room(4 * 256).number(4).number(17).run("copies_correct", 1, 64)
    });
    assert!(fault.message.contains("17 source bytes"), "{fault}");
}

#[test]
fn late_copies_see_late_changes() {
    for (schedule, expected) in [(Schedule::Eager, 5), (Schedule::Delayed, 99)] {
        let mut bench = Bench::new(schedule).input(&[5; 32]).room(32);
        bench.run("copy_then_change", 1, 32).unwrap();
        assert_eq!(bench.words(1), [expected; 32], "{schedule:?}");
    }
}

#[test]
fn mbarriers() {
    let input: Vec<u32> = (0..6 * 32).collect();
    let run = |bench: Bench, kernel| {
        let mut bench = bench.input(&input).room(6 * 32).number(6);
        bench.run(kernel, 1, 64).map(|_| bench.words(1))
    };
    let expected: Vec<u32> = (0..6 * 32).map(|at| at / 32 * 32 + 31 - at % 32).collect();
    for schedule in SCHEDULES {
        assert_eq!(run(Bench::new(schedule), "ring_correct").unwrap(), expected, "{schedule:?}");
        for (kernel, hazards) in [
            ("ring_consumer_early", &[Hazard::Race, Hazard::Uninitialised] as &[Hazard]),
            // Where the producer is fast the consumer misses whole phases.
            ("ring_producer_early", &[Hazard::Race, Hazard::Deadlock]),
            ("ring_count", &[Hazard::Race, Hazard::Arrival]),
            ("ring_parity", &[Hazard::Race, Hazard::Uninitialised, Hazard::Deadlock]),
        ] {
            match run(Bench::new(schedule), kernel) {
                Err(Error::Fault(fault)) => {
                    assert!(hazards.contains(&fault.hazard), "{kernel} {schedule:?}: {fault}");
                }
                other => panic!("{kernel} {schedule:?}: {other:?}"),
            }
        }
        let mut bench = Bench::new(schedule).input(&input[..64]).room(64);
        bench.run("copies_arrive", 1, 64).unwrap();
        assert_eq!(bench.words(1), (0..64).rev().collect::<Vec<u32>>());
    }
}

/// A kernel of one CTA with an mbarrier `full` for 32 arrivals, which thread 0 makes.
fn with_mbarrier(schedule: Schedule, body: &str) -> Result<Counters, Error> {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(&format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry one() {{\n\
         .reg .b32 %r<8>; .reg .b64 %state<4>; .reg .pred %p<4>; .shared .align 8 .b64 full; .shared .align 8 .b64 box;\n\
         mov.u32 %r0, %tid.x; setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [full], 32;\n{body}\nret;\n}}"
    ))?;
    device.launch(&Launch {
        kernel: "one",
        grid: [1; 3],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: &[],
    })
}

#[test]
fn mbarrier_rules() {
    for schedule in SCHEDULES {
        for (body, hazard) in [
            // Correct: a token of the phase, and a count of two from half of the lanes in the next.
            (
                "bar.sync 0; mbarrier.arrive.shared::cta.b64 %state0, [full];\nW: mbarrier.test_wait.shared::cta.b64 %p1, [full], %state0; @!%p1 bra W;\n\
              bar.sync 0; setp.lt.u32 %p2, %r0, 16; @%p2 mbarrier.arrive.shared::cta.b64 %state0, [full], 2;\n\
              V: mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 1; @!%p1 bra V;",
                None,
            ),
            // Correct: one leaves, so 31 end the next phase.
            (
                "bar.sync 0; @%p0 mbarrier.arrive_drop.shared::cta.b64 %state0, [full]; @!%p0 mbarrier.arrive.shared::cta.b64 %state0, [full];\n\
              V: mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0; @!%p1 bra V;\nbar.sync 0;\n\
              @!%p0 mbarrier.arrive.shared::cta.b64 %state0, [full];\n\
              U: mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 1; @!%p1 bra U;",
                None,
            ),
            ("mbarrier.arrive.shared::cta.b64 %state0, [full];", Some(Hazard::Race)),
            ("bar.sync 0; ld.shared.u64 %state0, [full];", Some(Hazard::Async)),
            ("bar.sync 0; mbarrier.arrive.shared::cta.b64 %state0, [full], 33;", Some(Hazard::Arrival)),
            ("bar.sync 0; mbarrier.arrive.shared::cta.b64 %state0, [box];", Some(Hazard::Uninitialised)),
            (
                "bar.sync 0; mbarrier.arrive.noComplete.shared::cta.b64 %state0, [full], 32;",
                Some(Hazard::Arrival),
            ),
            ("bar.sync 0; @%p0 mbarrier.init.shared::cta.b64 [full], 1;", Some(Hazard::Arrival)),
            (
                "bar.sync 0; W: mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0; @!%p1 bra W;",
                Some(Hazard::Deadlock),
            ),
        ] {
            match (with_mbarrier(schedule, body), hazard) {
                (Ok(_), None) => {}
                (Err(Error::Fault(fault)), Some(hazard)) if fault.hazard == hazard => {}
                (found, _) => panic!("{schedule:?} {body}: {found:?}"),
            }
        }
    }
}

#[test]
fn other_spaces() {
    for schedule in SCHEDULES {
        let mut bench = Bench::new(schedule).room(32).number(3);
        bench.run("local_array", 1, 32).unwrap();
        let expected = |thread: u32| -> u32 {
            let mut values = [0; 16];
            (0..16).for_each(|i| values[(i * 5) & 15] = i as u32 * thread);
            (0..16).map(|i| values[(i + 3) & 15] * i as u32).sum()
        };
        assert_eq!(bench.words(0), (0..32).map(expected).collect::<Vec<u32>>());

        let mut bench = Bench::new(schedule).room(8);
        bench.run("variables", 1, 8).unwrap();
        assert_eq!(bench.words(0), [10, 20, 30, 40, 10, 20, 30, 40]);

        let mut bench = Bench::new(schedule).input(&[0, 2, 3, 4, 5, 6, 7, 9]).room(9);
        bench.run("cases", 1, 8).unwrap();
        let (address, _) = bench.buffers[1];
        let bytes = bench.device.read(address + 4, 32).unwrap();
        let words: Vec<u32> =
            bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [7, 101, 3 << 20, !4, 5_u32.reverse_bits(), 216, 1234, 9]);
    }
}

/// The same seed gives the same run, faults included, and the number of cores changes nothing.
#[test]
fn repeatable() {
    let input: Vec<u32> = (0..512).collect();
    let run = |schedule, kernel, cores| {
        let mut bench = Bench::new(schedule).input(&input).room(128).number(4);
        bench.device.set_cores(cores);
        bench.run(kernel, 1, 128)
    };
    for seed in 0..10 {
        for kernel in ["tiles_correct", "tiles_one_barrier"] {
            let first = run(Schedule::Random(seed), kernel, 1);
            assert_eq!(first, run(Schedule::Random(seed), kernel, 1));
            assert_eq!(first, run(Schedule::Random(seed), kernel, 4));
        }
    }
}
