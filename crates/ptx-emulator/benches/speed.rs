//! Thread instructions per second, all checks on, on one core of the host; and tiles of attention.

// What criterion's macros write has no documentation.
#![allow(missing_docs)]

#[allow(dead_code, reason = "what is right is for tests and mutants")]
#[path = "../tests/attention/problem.rs"]
mod problem;

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use problem::Problem;
use ptx_emulator::{Device, Launch};

/// Tiles of 128 words through shared memory, 128 steps of arithmetic each.
fn tiles(criterion: &mut Criterion) {
    let mut device = Device::new();
    device.set_cores(1);
    device.load(include_str!("../tests/ptx/hazards.ptx")).expect("PTX of the tests");
    let count = 16_u32;
    let (input, output) = (device.alloc(count as usize * 512), device.alloc(512));
    device.fill(input, 1, count as usize * 512).expect("memory just reserved");
    let params = [&input.to_le_bytes()[..], &output.to_le_bytes(), &count.to_le_bytes()].concat();
    let launch = Launch {
        kernel: "tiles_correct",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [128, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let counters = device.launch(&launch).expect("a correct kernel");
    let mut group = criterion.benchmark_group("thread_instructions");
    group.throughput(Throughput::Elements(counters.thread_instructions));
    group.bench_function("tiles", |bencher| bencher.iter(|| black_box(device.launch(&launch))));
    group.finish();
}

/// A product of 64 x 128 x 64 by a warpgroup: four `wgmma`, and the loops that fill and empty shared memory.
fn products(criterion: &mut Criterion) {
    let mut device = Device::new();
    device.set_cores(1);
    device.load(include_str!("../tests/ptx/hopper.ptx")).expect("PTX of the tests");
    let [a, b, out] = [64 * 64 * 2, 128 * 64 * 2, 64 * 128 * 4].map(|bytes| device.alloc(bytes));
    device.fill(a, 0, 64 * 64 * 2).expect("memory just reserved");
    device.fill(b, 0, 128 * 64 * 2).expect("memory just reserved");
    let params = [a, b, out].map(u64::to_le_bytes).concat();
    let launch = Launch {
        kernel: "gemm_shared",
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [128, 1, 1],
        shared_bytes: 0,
        params: &params,
    };
    let counters = device.launch(&launch).expect("a correct kernel");
    let mut group = criterion.benchmark_group("thread_instructions");
    group.throughput(Throughput::Elements(counters.thread_instructions));
    group.bench_function("products", |bencher| bencher.iter(|| black_box(device.launch(&launch))));
    group.finish();
}

/// A warp-specialised attention kernel: 128 queries and 8 tiles of 128 keys, heads of 128. Once counted in
/// thread instructions, once in tiles.
fn attention(criterion: &mut Criterion) {
    const TILES: usize = 8;
    let mut device = Device::new();
    device.set_cores(1);
    device.load(include_str!("../tests/ptx/attention.ptx")).expect("PTX of the tests");
    let problem = Problem::new(&[[128, TILES * 128]], 1, 1, 1);
    let uploaded = problem.upload(&mut device).expect("maps that CUDA would take");
    let counters = uploaded.launch(&mut device, 1).expect("a correct kernel");
    for (name, elements) in
        [("thread_instructions", counters.thread_instructions), ("tiles_of_128_by_128", TILES as u64)]
    {
        let mut group = criterion.benchmark_group(name);
        group.throughput(Throughput::Elements(elements));
        group.bench_function("attention", |bencher| {
            bencher.iter(|| black_box(uploaded.launch(&mut device, 1)));
        });
        group.finish();
    }
}

criterion_group!(benches, tiles, products, attention);
criterion_main!(benches);
