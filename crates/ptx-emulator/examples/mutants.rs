//! Plants bugs in the attention kernel of the tests, one at a time, and prints what finds each.
//!
//! `cargo run --release -p ptx-emulator --example mutants [part of a name]`. Needs nvcc: `$NVCC`, or what
//! `tools/setup-toolchain` installs, or the one on the path.

#[path = "../tests/attention/problem.rs"]
mod problem;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::Mutex,
    thread,
};

use problem::{Problem, SCHEDULES};
use ptx_emulator::{Device, Error, Schedule};

/// A bug: its name, what stands in the kernel, and what is put there instead.
struct Mutant(&'static str, &'static str, &'static str);

const MUTANTS: &[Mutant] = &[
    Mutant("values: wrong leading offset", "stage * TILE_BYTES), HALF_BYTES)", "stage * TILE_BYTES), 1024)"),
    Mutant("descriptors: wrong stride offset", "high(1024 >> 4", "high(512 >> 4"),
    Mutant("keys: wrong step along k", "step % 4 * 32", "step % 4 * 16"),
    Mutant("keys: second half never read", "step / 4 * HALF_BYTES", "step / 8 * HALF_BYTES"),
    Mutant("values: wrong step along k", "v.plus(step * 16 * 128)", "v.plus(step * 8 * 128)"),
    Mutant("values: transpose flag missing", "%68, 1, 1, 1, 1;", "%68, 1, 1, 1, 0;"),
    Mutant("keys: accumulates on old scores", "k.plus(at), step > 0)", "k.plus(at), true)"),
    Mutant(
        "wgmma: fence before keys missing",
        "products_fence();\n#pragma unroll\n        for (int32_t step = 0; step < HEAD",
        "#pragma unroll\n        for (int32_t step = 0; step < HEAD",
    ),
    Mutant(
        "wgmma: fence before values missing",
        "products_fence();\n#pragma unroll\n        for (int32_t step = 0; step < ROWS",
        "#pragma unroll\n        for (int32_t step = 0; step < ROWS",
    ),
    Mutant(
        "wgmma: keys not committed",
        "k.plus(at), step > 0);\n        }\n        products_commit();",
        "k.plus(at), step > 0);\n        }",
    ),
    Mutant("wgmma: scores not waited for", "products_wait<1>(scores);", ""),
    Mutant(
        "wgmma: wait for scores leaves two groups",
        "products_wait<1>(scores);",
        "products_wait<2>(scores);",
    ),
    Mutant(
        "wgmma: wait for sums leaves a group",
        "products_wait<0>(sums);\n        release(shared.empty_v[before",
        "products_wait<1>(sums);\n        release(shared.empty_v[before",
    ),
    Mutant(
        "wgmma: last sums not waited for",
        "products_wait<0>(sums);\n        release(shared.empty_v[turn",
        "release(shared.empty_v[turn",
    ),
    Mutant(
        "keys: released before the wait",
        "products_wait<1>(scores);\n        release(shared.empty_k[turn % STAGES]);",
        "release(shared.empty_k[turn % STAGES]);\n        products_wait<1>(scores);",
    ),
    Mutant(
        "values: released before the wait",
        "products_wait<0>(sums);\n        release(shared.empty_v[before % STAGES]);",
        "release(shared.empty_v[before % STAGES]);\n        products_wait<0>(sums);",
    ),
    Mutant(
        "keys: never released",
        "products_wait<1>(scores);\n        release(shared.empty_k[turn % STAGES]);",
        "products_wait<1>(scores);",
    ),
    Mutant(
        "values: never released",
        "products_wait<0>(sums);\n        release(shared.empty_v[before % STAGES]);",
        "products_wait<0>(sums);",
    ),
    Mutant(
        "keys: not waited for",
        "wait(shared.full_k[turn % STAGES], turn / STAGES % 2);\n        barrier_sync",
        "barrier_sync",
    ),
    Mutant("values: not waited for", "wait(shared.full_v[before % STAGES], before / STAGES % 2);", ""),
    Mutant("queries: not waited for", "wait(shared.full_q, round % 2);", ""),
    Mutant(
        "keys: parity without the ring",
        "wait(shared.full_k[turn % STAGES], turn / STAGES % 2);\n        barrier_sync",
        "wait(shared.full_k[turn % STAGES], turn % 2);\n        barrier_sync",
    ),
    Mutant("values: parity of the tile at hand", "before / STAGES % 2);", "turn / STAGES % 2);"),
    Mutant(
        "producer: parity of values inverted",
        "wait(shared.empty_v[stage], ~turn / STAGES % 2);",
        "wait(shared.empty_v[stage], turn / STAGES % 2);",
    ),
    Mutant("producer: keys overwritten", "wait(shared.empty_k[stage], ~turn / STAGES % 2);", ""),
    Mutant("producer: values overwritten", "wait(shared.empty_v[stage], ~turn / STAGES % 2);", ""),
    Mutant("producer: queries overwritten", "wait(shared.empty_q, ~round % 2);", ""),
    Mutant(
        "producer: item told too early",
        "wait(shared.empty_q, ~round % 2);\n            shared.tile = tile;",
        "shared.tile = tile;\n            wait(shared.empty_q, ~round % 2);",
    ),
    Mutant(
        "producer: expects half a tile",
        "arrive_expecting(shared.full_k[stage], TILE_BYTES);",
        "arrive_expecting(shared.full_k[stage], HALF_BYTES);",
    ),
    Mutant(
        "producer: expects two tiles",
        "arrive_expecting(shared.full_v[stage], TILE_BYTES);",
        "arrive_expecting(shared.full_v[stage], 2 * TILE_BYTES);",
    ),
    Mutant(
        "producer: values announced as keys",
        "token, head, shared.full_v[stage]);",
        "token, head, shared.full_k[stage]);",
    ),
    Mutant(
        "producer: values of the next tile",
        "load_v(turn, key, kv_head);\n            }",
        "load_v(turn, key - ROWS, kv_head);\n            }",
    ),
    Mutant(
        "barriers: an arrival too few",
        "init(shared.empty_k[stage], CONSUMER_WARPS);",
        "init(shared.empty_k[stage], CONSUMER_WARPS - 1);",
    ),
    Mutant(
        "barriers: used before they are ready",
        "    __syncthreads();\n    if (threadIdx.x < 128)",
        "    if (threadIdx.x < 128)",
    ),
    Mutant("turns: passed to oneself", "barrier_arrive(2 - number);", "barrier_arrive(1 + number);"),
    Mutant("turns: nobody begins", "if (number == 1) barrier_arrive(1);", ""),
    Mutant("turns: wrong thread count", "bar.arrive %0, 256;", "bar.arrive %0, 128;"),
    Mutant(
        "mask: a key too many",
        "tile.limit = first + keys - queries;",
        "tile.limit = first + keys - queries + 1;",
    ),
    Mutant(
        "mask: a key too few",
        "limit[0] = tile.limit + row - column;",
        "limit[0] = tile.limit + row - column - 1;",
    ),
    Mutant("mask: second row as the first", "limit[1] = limit[0] + 8;", "limit[1] = limit[0];"),
    Mutant(
        "mask: one masked tile too few",
        "max(0, tile.limit + number * 64 + 1) / ROWS",
        "max(0, tile.limit + number * 64 + ROWS) / ROWS",
    ),
    Mutant(
        "mask: second consumer as the first",
        "max(0, tile.limit + number * 64 + 1) / ROWS",
        "max(0, tile.limit + 64 + 1) / ROWS",
    ),
    Mutant(
        "softmax: rows that see nothing yet",
        "MASKED && most == -INFINITY ? 0.0f : most * scale",
        "most * scale",
    ),
    Mutant("softmax: total not rescaled", "fmaf(total[row], rescale[row], sum)", "total[row] + sum"),
    Mutant("softmax: sums not rescaled", "sums[n] *= rescale[n / 2 % 2]", "sums[n] *= 1.0f"),
    Mutant(
        "softmax: sums rescaled by the other row",
        "sums[n] *= rescale[n / 2 % 2]",
        "sums[n] *= rescale[1 - n / 2 % 2]",
    ),
    Mutant("softmax: half of the columns compared", "most = fmaxf(most, __shfl_xor_sync(~0u, most, 2));", ""),
    Mutant("softmax: weights swapped in pairs", "\"f\"(second), \"f\"(first)", "\"f\"(first), \"f\"(second)"),
    Mutant(
        "softmax: weights packed under way",
        "products_wait<0>(sums);\n        release(shared.empty_v[before % STAGES]);\n        pack_weights();",
        "pack_weights();\n        products_wait<0>(sums);\n        release(shared.empty_v[before % STAGES]);",
    ),
    Mutant(
        "heads: wrong kv head",
        "tile.head = kv_head * group + rest % group;",
        "tile.head = rest % group * params.kv_heads + kv_head;",
    ),
    Mutant(
        "heads: first key of another sequence",
        "key_token = params.cu_keys[sequence];",
        "key_token = params.cu_queries[sequence];",
    ),
    Mutant(
        "queue: item taken twice",
        "item = atomicAdd(params.queue, 1);\n            //",
        "item = atomicAdd(params.queue, 1) - (round == 0 && item > 0);\n            //",
    ),
    Mutant("results: guard of rows missing", "if (to < tile.rows) {", "if (to < ROWS) {"),
    Mutant(
        "results: guard of lse missing",
        "if (lane % 4 == 0 && row + 8 * n < tile.rows)",
        "if (lane % 4 == 0)",
    ),
    Mutant("results: read without swizzle", "(chunk % 8 ^ to % 8) * 16", "chunk % 8 * 16"),
    Mutant(
        "results: written with another swizzle",
        "(n % 4 * 2 + lane / 16) ^ lane % 8",
        "(n % 4 * 2 + lane / 16) ^ lane / 2 % 8",
    ),
    Mutant("results: read before all are written", "__syncwarp();\n        // Half", "// Half"),
    Mutant("results: proxy fence missing", "fence_proxy();\n        __syncwarp();", "__syncwarp();"),
    Mutant("results: released while lanes read", "fence_proxy();\n        __syncwarp();", "fence_proxy();"),
    Mutant(
        "results: released before they are read",
        "__syncwarp();\n        // Half",
        "__syncwarp();\n        release(shared.empty_q);\n        // Half",
    ),
    Mutant("results: lse to base 2", "log2_approx(total[n]) * 0.6931471805599453f", "log2_approx(total[n])"),
    Mutant("results: totals of a quarter", "total[n] += __shfl_xor_sync(~0u, total[n], 2);", ""),
    Mutant(
        "results: rows without keys",
        "inverse[n] = total[n] == 0.0f ? 0.0f : 1.0f / total[n]",
        "inverse[n] = 1.0f / total[n]",
    ),
];

fn main() -> ExitCode {
    let filter = env::args().nth(1).unwrap_or_default();
    let source = include_str!("../tests/ptx/attention.cu");
    let chosen: Vec<&Mutant> = MUTANTS.iter().filter(|mutant| mutant.0.contains(&filter)).collect();
    let problems = problems();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let next = Mutex::new(chosen.iter().enumerate());
    let rows = Mutex::new(vec![[const { String::new() }; SCHEDULES.len()]; chosen.len()]);
    thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let Some((number, mutant)) = next.lock().expect("no panic").next() else { return };
                    let ptx = compile(source, mutant, number);
                    let row = SCHEDULES.map(|schedule| outcome(&ptx, &problems, schedule));
                    rows.lock().expect("no panic")[number] = row;
                }
            });
        }
    });
    let rows = rows.into_inner().expect("no panic");
    println!("{:44}{:16}{:16}{:16}{:16}", "bug", "eager", "delayed", "random 1", "random 2");
    for (mutant, row) in chosen.iter().zip(&rows) {
        println!("{:44}{:16}{:16}{:16}{:16}", mutant.0, row[0], row[1], row[2], row[3]);
    }
    let survivors = rows.iter().filter(|row| row.iter().all(|outcome| outcome == SURVIVED)).count();
    println!("{} of {} found", rows.len() - survivors, rows.len());
    ExitCode::SUCCESS
}

const SURVIVED: &str = "-";

/// Shapes that between them reach every line of the kernel: rings that wrap within an item and between
/// items, partly filled tiles, diagonals beside tiles, rows and sequences that see nothing.
fn problems() -> Vec<Problem> {
    vec![
        Problem::new(&[[200, 200]], 1, 1, 1),
        Problem::new(&[[77, 733]], 2, 1, 1),
        Problem::new(&[[1, 129], [130, 230]], 4, 2, 1),
        Problem::new(&[[0, 0], [140, 9], [3, 0]], 2, 1, 1),
    ]
}

/// The PTX of the kernel with a bug.
fn compile(source: &str, Mutant(name, from, to): &Mutant, number: usize) -> String {
    assert_eq!(source.matches(from).count(), 1, "{name}: the kernel must have this text once: {from}");
    let stem = env::temp_dir().join(format!("ptx-emulator-mutant-{}-{number}", std::process::id()));
    let (cu, ptx) = (stem.with_extension("cu"), stem.with_extension("ptx"));
    fs::write(&cu, source.replacen(from, to, 1)).expect("a folder for temporary files");
    let mut nvcc = Command::new(nvcc());
    nvcc.args(["--ptx", "-arch=compute_90a", "-O3", "-std=c++17", "-w", "-o"]).arg(&ptx).arg(&cu);
    let output = nvcc.output().unwrap_or_else(|error| panic!("{nvcc:?}: {error}; run tools/setup-toolchain"));
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
    let text = fs::read_to_string(&ptx).expect("nvcc has written it");
    for path in [cu, ptx] {
        fs::remove_file(path).expect("nobody else knows this file");
    }
    text
}

fn nvcc() -> PathBuf {
    let installed = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../.toolchain/cuda/bin/nvcc");
    match env::var_os("NVCC") {
        Some(path) => path.into(),
        None if installed.is_file() => installed,
        None => "nvcc".into(),
    }
}

/// What shows in the first problem where something does.
fn outcome(ptx: &str, problems: &[Problem], schedule: Schedule) -> String {
    for problem in problems {
        let mut device = Device::new();
        device.set_schedule(schedule);
        device.set_step_limit(3_000_000);
        if let Err(error) = device.load(ptx) {
            return error.to_string();
        }
        match problem.run(&mut device, 2) {
            Ok((attention, _)) if problem.check(&attention).is_ok() => {}
            Ok(_) => return "wrong result".into(),
            Err(Error::Fault(fault)) => return format!("{:?}", fault.hazard),
            // Results that nothing wrote cannot be read.
            Err(_) => return "unwritten".into(),
        }
    }
    SURVIVED.into()
}
