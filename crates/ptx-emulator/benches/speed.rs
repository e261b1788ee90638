//! Thread instructions per second, all checks on, on one core of the host.

// What criterion's macros write has no documentation.
#![allow(missing_docs)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
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

/// A product of 64 x 128 x 64 by a warpgroup: four `wgmma`, of which an attention tile of 128 x 128 with
/// heads of 128 has 32, and the loops that fill and empty shared memory.
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

criterion_group!(benches, tiles, products);
criterion_main!(benches);
