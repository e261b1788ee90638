//! A whole attention kernel for Hopper, `tests/ptx/attention.cu`, against plain loops.

mod problem;

use problem::{Problem, SCHEDULES};
use ptx_emulator::{Counters, Device, Schedule};

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
