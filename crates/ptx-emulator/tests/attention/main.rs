//! A whole attention kernel for Hopper, `tests/ptx/attention.cu`, against plain loops.

mod problem;

use problem::{Problem, SCHEDULES};
use ptx_emulator::{Counters, Device, Error, Hazard, Schedule};

const PTX: &str = include_str!("../ptx/attention.ptx");

fn check(lengths: &[[usize; 2]], query_heads: usize, kv_heads: usize, blocks: u32) -> Vec<Counters> {
    let problem = Problem::new(lengths, query_heads, kv_heads, 1);
    let run = |schedule: Schedule| {
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.load(PTX).unwrap_or_else(|error| panic!("{error}"));
        let (attention, counters) =
            problem.run(&mut device, blocks).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        problem.check(&attention).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        counters
    };
    SCHEDULES.map(run).to_vec()
}

/// Two tiles of queries, the second partly filled; both rings wrap twice.
#[test]
fn square() {
    check(&[[200, 200]], 1, 1, 1);
}

/// Fewer queries than a consumer has rows, six tiles of keys: rings wrap within an item.
#[test]
fn few_queries_many_keys() {
    check(&[[77, 733]], 2, 1, 1);
}

/// One query and a tile of one key; a diagonal that crosses three tiles; two blocks share the queue.
#[test]
fn diagonals_beside_tiles() {
    check(&[[1, 129], [130, 230]], 2, 2, 2);
}

/// Sequences without queries, without keys, and with queries that see none.
#[test]
fn nothing_to_see() {
    check(&[[0, 0], [3, 0], [0, 5], [140, 9], [1, 1], [0, 0]], 2, 1, 2);
    check(&[[0, 7]], 1, 1, 3);
}

/// What is right does not hang on how approximated functions round.
#[test]
fn other_roundings() {
    let problem = Problem::new(&[[130, 230]], 2, 1, 1);
    let run = |jitter| {
        let mut device = Device::new();
        device.set_jitter(jitter);
        device.load(PTX).unwrap_or_else(|error| panic!("{error}"));
        let (attention, _) = problem.run(&mut device, 1).unwrap_or_else(|error| panic!("{error}"));
        problem.check(&attention).unwrap_or_else(|error| panic!("{jitter:?}: {error}"));
        attention.lse
    };
    assert_ne!(run(None), run(Some(1)));
    run(Some(2));
}

/// Bugs planted in the PTX. `examples/mutants.rs` plants many more, in the source.
#[test]
fn finds_planted_bugs() {
    let problem = Problem::new(&[[77, 733]], 2, 1, 1);
    let run = |ptx: &str, schedule: Schedule| {
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.load(ptx).unwrap_or_else(|error| panic!("{error}"));
        problem.run(&mut device, 1)
    };
    let commit = "wgmma.commit_group.sync.aligned;";
    for (from, to, hazard) in [
        ("wgmma.wait_group.sync.aligned 1;", "", Hazard::Async),
        ("wgmma.wait_group.sync.aligned 0;", "wgmma.wait_group.sync.aligned 1;", Hazard::Async),
        (commit, "", Hazard::Async),
        ("fence.proxy.async.shared::cta;", "", Hazard::Async),
        ("bar.warp.sync \t-1;", "", Hazard::Race),
        ("bar.arrive ", "bar.sync ", Hazard::Deadlock),
        ("setmaxnreg.dec.sync.aligned.u32 24;", "ret;", Hazard::Deadlock),
    ] {
        assert!(PTX.contains(from), "{from}");
        for schedule in SCHEDULES {
            match run(&PTX.replace(from, to), schedule) {
                Err(Error::Fault(fault)) => assert_eq!(fault.hazard, hazard, "{schedule:?}: {fault}"),
                other => panic!("{from}, {schedule:?}: not found: {:?}", other.map(|(_, counters)| counters)),
            }
        }
    }
    for (from, to) in [
        // Values as if their rows came first; the logarithm of a sum as a power.
        (", 1, 1, 1, 1;", ", 1, 1, 1, 0;"),
        ("lg2.approx", "ex2.approx"),
    ] {
        assert!(PTX.contains(from), "{from}");
        let (attention, _) = run(&PTX.replace(from, to), Schedule::Eager).expect("no hazard");
        problem.check(&attention).expect_err(from);
    }
}
