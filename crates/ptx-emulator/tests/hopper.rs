//! Copies by engines, with tensor maps. `tests/ptx/hopper.cu` is the source of the PTX.

use ptx_emulator::{Counters, Device, Error, Hazard, Launch, Schedule, Swizzle, TensorMap};

const SCHEDULES: [Schedule; 5] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2), Schedule::Random(3)];

fn device(schedule: Schedule) -> Device {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(include_str!("ptx/hopper.ptx")).unwrap();
    device
}

fn launch(device: &mut Device, kernel: &str, threads: u32, params: &[u8]) -> Result<Counters, Error> {
    let launch =
        Launch { kernel, grid: [1; 3], cluster: [1; 3], block: [threads, 1, 1], shared_bytes: 0, params };
    device.launch(&launch)
}

/// A tensor of 40 rows of 100 halves, 208 bytes apart, and its map with boxes of 16 x 64.
const ROWS: u64 = 40;
const COLUMNS: u64 = 100;
const STRIDE: u64 = 208;

fn map(address: u64) -> [u8; 128] {
    TensorMap {
        address,
        element_bytes: 2,
        sizes: &[COLUMNS, ROWS],
        strides: &[STRIDE],
        box_sizes: &[64, 16],
        swizzle: Swizzle::Bytes128,
    }
    .encode()
    .unwrap()
}

fn element(row: i64, column: i64) -> u16 {
    if (0..ROWS as i64).contains(&row) && (0..COLUMNS as i64).contains(&column) {
        (row * 256 + column + 1) as u16
    } else {
        0
    }
}

fn tiles(schedule: Schedule, kernel: &str, place: [i32; 3]) -> Result<Vec<u16>, Error> {
    counted_tiles(schedule, kernel, place).map(|(found, _)| found)
}

fn counted_tiles(
    schedule: Schedule,
    kernel: &str,
    [x, y, count]: [i32; 3],
) -> Result<(Vec<u16>, Counters), Error> {
    let mut device = device(schedule);
    let (tensor, out) = (device.alloc((ROWS * STRIDE) as usize), device.alloc(count as usize * 2048));
    for row in 0..ROWS {
        let bytes: Vec<u8> =
            (0..COLUMNS).flat_map(|column| element(row as i64, column as i64).to_le_bytes()).collect();
        device.write(tensor + row * STRIDE, &bytes)?;
    }
    let numbers: Vec<u8> = [x, y, count].iter().flat_map(|number| number.to_le_bytes()).collect();
    let params = [&map(tensor)[..], &out.to_le_bytes(), &numbers].concat();
    let counters = launch(&mut device, kernel, 64, &params)?;
    let bytes = device.read(out, count as usize * 2048)?;
    let found = bytes.chunks(2).map(|half| u16::from_le_bytes(half.try_into().unwrap()));
    Ok((found.collect(), counters))
}

#[test]
fn counts_copies() {
    for schedule in SCHEDULES {
        let (_, counters) = counted_tiles(schedule, "tiles_correct", [0, 0, 2]).unwrap();
        // Rows of 128 bytes every 208: they begin at the half of a sector in every second row.
        let sectors: u64 = (0..32).map(|row| if row % 2 == 0 { 4 } else { 5 }).sum();
        let found = (counters.bulk_copies, counters.bulk_bytes, counters.bulk_sectors);
        assert_eq!(found, (2, 4096, sectors), "{schedule:?}");
        // At the end of rows of 100 halves: 8 bytes of each, which a sector or two of them hold.
        let (_, counters) = counted_tiles(schedule, "tiles_correct", [96, 0, 1]).unwrap();
        assert_eq!((counters.bulk_copies, counters.bulk_bytes, counters.bulk_sectors), (1, 2048, 16));
    }
}

#[test]
fn loads_tiles_with_zeros_outside() {
    for schedule in SCHEDULES {
        for [x, y, count] in [[0, 0, 2], [64, 16, 2], [-5, -3, 1], [90, 39, 1], [200, 0, 1], [0, -16, 4]] {
            let found =
                tiles(schedule, "tiles_correct", [x, y, count]).unwrap_or_else(|error| panic!("{error}"));
            for (n, value) in found.into_iter().enumerate() {
                let (row, column) = (i64::from(y) + n as i64 / 64, i64::from(x) + n as i64 % 64);
                assert_eq!(value, element(row, column), "{schedule:?}: row {row}, column {column}");
            }
        }
    }
}

#[track_caller]
fn finds(kernel: &str, hazards: &[Hazard], run: impl Fn(Schedule) -> Result<(), Error>) {
    for schedule in SCHEDULES {
        match run(schedule) {
            Err(Error::Fault(fault)) => {
                assert!(hazards.contains(&fault.hazard), "{kernel} {schedule:?}: {fault}")
            }
            other => panic!("{kernel} {schedule:?}: a bug was not found: {other:?}"),
        }
    }
}

#[test]
fn finds_bugs_around_loads() {
    for (kernel, hazards) in [
        ("tiles_early", &[Hazard::Race, Hazard::Async, Hazard::Uninitialised] as &[Hazard]),
        ("tiles_few", &[Hazard::Deadlock, Hazard::Race]),
        ("tiles_many", &[Hazard::Deadlock]),
        ("tiles_overwritten", &[Hazard::Race]),
        ("tiles_unfenced", &[Hazard::Async]),
        ("tiles_left", &[Hazard::Async]),
    ] {
        finds(kernel, hazards, |schedule| tiles(schedule, kernel, [0, 0, 2]).map(drop));
    }
}

fn stores(schedule: Schedule, kernel: &str, x: i32, y: i32) -> Result<Vec<u8>, Error> {
    let mut device = device(schedule);
    let tensor = device.alloc((ROWS * STRIDE) as usize);
    device.fill(tensor, 0xEE, (ROWS * STRIDE) as usize)?;
    let params = [&map(tensor)[..], &x.to_le_bytes(), &y.to_le_bytes()].concat();
    launch(&mut device, kernel, 64, &params)?;
    device.read(tensor, (ROWS * STRIDE) as usize)
}

#[test]
fn stores_tiles_and_nothing_outside() {
    for schedule in SCHEDULES {
        for [x, y] in [[0, 0], [60, 30], [-8, -4]] {
            let found = stores(schedule, "stores_correct", x, y).unwrap_or_else(|error| panic!("{error}"));
            let mut expected = vec![0xEE; (ROWS * STRIDE) as usize];
            for n in 0..1024_u16 {
                let (row, column) = (i64::from(y) + i64::from(n) / 64, i64::from(x) + i64::from(n) % 64);
                if element(row, column) != 0 {
                    let at = row as usize * STRIDE as usize + column as usize * 2;
                    expected[at..at + 2].copy_from_slice(&n.to_le_bytes());
                }
            }
            assert_eq!(found, expected, "{schedule:?} {x} {y}");
        }
    }
}

#[test]
fn finds_bugs_around_stores() {
    for (kernel, hazards) in [
        ("stores_unfenced", &[Hazard::Async] as &[Hazard]),
        ("stores_early", &[Hazard::Race, Hazard::Async, Hazard::Uninitialised]),
        ("stores_changed", &[Hazard::Race]),
    ] {
        finds(kernel, hazards, |schedule| stores(schedule, kernel, 0, 0).map(drop));
    }
}

fn relay(schedule: Schedule, kernel: &str) -> Result<(), Error> {
    let mut device = device(schedule);
    let [there, back, out] = [256; 3].map(|bytes| device.alloc(bytes));
    launch(&mut device, kernel, 64, &[there, back, out].map(u64::to_le_bytes).concat())?;
    let expected: Vec<u8> = (0..64_u32).flat_map(|n| ((63 - n) * 3).to_le_bytes()).collect();
    assert_eq!(device.read(out, 256)?, expected, "{schedule:?}");
    Ok(())
}

#[test]
fn engines_and_threads_share_device_memory() {
    for schedule in SCHEDULES {
        relay(schedule, "relay_correct").unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
    }
    for (kernel, hazard) in
        [("relay_unfenced", Hazard::Async), ("relay_early", Hazard::Race), ("relay_left", Hazard::Async)]
    {
        finds(kernel, &[hazard], |schedule| relay(schedule, kernel));
    }
}

#[test]
fn moves_rows() {
    let bytes: Vec<u8> = (0..4096_u32).map(|n| (n * 7 + n / 256) as u8).collect();
    for schedule in SCHEDULES {
        for count in [16, 2048, 4096_u32] {
            let mut device = device(schedule);
            let (from, to) = (device.alloc(4096), device.alloc(count as usize));
            device.write(from, &bytes).unwrap();
            let params = [&from.to_le_bytes()[..], &to.to_le_bytes(), &count.to_le_bytes()].concat();
            launch(&mut device, "row", 32, &params).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(device.read(to, count as usize).unwrap(), bytes[..count as usize]);
            // A size that is no multiple of 16, and a source that is too short.
            for (bad, hazard) in [(24_u32, Hazard::Misaligned), (4112, Hazard::OutOfBounds)] {
                let params = [&from.to_le_bytes()[..], &to.to_le_bytes(), &bad.to_le_bytes()].concat();
                match launch(&mut device, "row", 32, &params) {
                    Err(Error::Fault(fault)) => assert_eq!(fault.hazard, hazard, "{fault}"),
                    other => panic!("{other:?}"),
                }
            }
        }
    }
}

#[test]
fn refuses_maps_that_cuda_refuses() {
    let good = TensorMap {
        address: 4096,
        element_bytes: 2,
        sizes: &[64, 8],
        strides: &[128],
        box_sizes: &[64, 8],
        swizzle: Swizzle::Bytes128,
    };
    good.encode().unwrap();
    for bad in [
        TensorMap { address: 4104, ..good },
        TensorMap { element_bytes: 3, ..good },
        TensorMap { strides: &[], ..good },
        TensorMap { strides: &[136], ..good },
        TensorMap { sizes: &[0, 8], ..good },
        TensorMap { box_sizes: &[64, 257], ..good },
        TensorMap { box_sizes: &[128, 8], ..good },
        TensorMap { box_sizes: &[4, 8], ..good },
        TensorMap { swizzle: Swizzle::Bytes64, ..good },
    ] {
        assert!(matches!(bad.encode(), Err(Error::Request(_))), "{bad:?}");
    }
}

/// Products of small whole numbers, which are exact in any order.
fn gemm(schedule: Schedule, kernel: &str, transposed: bool) -> Result<(), Error> {
    let value = |n: usize, salt: usize| ((n * 7 + n / 64 * 3 + salt) % 13) as i32 - 6;
    let bytes = |count: usize, salt: usize| -> Vec<u8> {
        (0..count).flat_map(|n| (((value(n, salt) as f32).to_bits() >> 16) as u16).to_le_bytes()).collect()
    };
    let mut device = device(schedule);
    let (a, b, out) = (device.alloc(64 * 64 * 2), device.alloc(128 * 64 * 2), device.alloc(64 * 128 * 4));
    device.write(a, &bytes(64 * 64, 1))?;
    device.write(b, &bytes(128 * 64, 5))?;
    launch(&mut device, kernel, 128, &[a, b, out].map(u64::to_le_bytes).concat())?;
    let found = device.read(out, 64 * 128 * 4)?;
    for (n, found) in found.chunks(4).enumerate() {
        let (row, column) = (n / 128, n % 128);
        let expected: i32 = (0..64)
            .map(|k| {
                value(row * 64 + k, 1) * value(if transposed { k * 128 + column } else { column * 64 + k }, 5)
            })
            .sum();
        let times = if kernel.starts_with("gemm_twice") { 4 } else { 1 };
        assert_eq!(
            f32::from_le_bytes(found.try_into().unwrap()),
            (times * expected) as f32,
            "{kernel} ({row}, {column})"
        );
    }
    Ok(())
}

#[test]
fn multiplies_with_warpgroups() {
    for schedule in SCHEDULES {
        for (kernel, transposed) in [
            ("gemm_shared", false),
            ("gemm_transposed", true),
            ("gemm_registers", false),
            ("gemm_registers_transposed", true),
            ("gemm_twice", false),
        ] {
            gemm(schedule, kernel, transposed).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        }
    }
}

#[test]
fn finds_bugs_around_products() {
    for (kernel, hazard) in [
        ("gemm_unfenced", Hazard::Async),
        ("gemm_unwaited", Hazard::Async),
        ("gemm_overwritten", Hazard::Race),
        ("gemm_one_left", Hazard::Async),
        ("gemm_three_warps", Hazard::NotConverged),
        ("gemm_unequal", Hazard::Operand),
        ("gemm_unordered", Hazard::Async),
        ("gemm_twice_unordered", Hazard::Async),
    ] {
        finds(kernel, &[hazard], |schedule| gemm(schedule, kernel, false));
    }
}

#[test]
fn shares_out_registers() {
    let run = |schedule, kernel| {
        let mut device = device(schedule);
        let out = device.alloc(1024);
        launch(&mut device, kernel, 256, &out.to_le_bytes())
    };
    for schedule in SCHEDULES {
        run(schedule, "registers_correct").unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
    }
    for (kernel, hazard) in [
        ("registers_kept", Hazard::Deadlock),
        ("registers_grown", Hazard::Operand),
        ("registers_shrunk", Hazard::Operand),
        ("registers_unequal", Hazard::NotConverged),
        ("registers_alone", Hazard::NotConverged),
    ] {
        finds(kernel, &[hazard], |schedule| run(schedule, kernel).map(drop));
    }
    let entry = |directive: &str, count: u32| {
        let ptx = format!(
            ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k()\n{directive}\n{{\n\
             setmaxnreg.dec.sync.aligned.u32 {count};\nret;\n}}"
        );
        Device::new().load(&ptx)
    };
    entry(".maxntid 128, 1, 1", 24).unwrap();
    entry(".reqntid 128", 240).unwrap();
    entry(".maxnreg 64", 24).unwrap();
    for (directive, count, says) in [
        ("", 24, "setmaxnreg needs an entry with .maxntid"),
        (".maxntid 128, 1, 1", 20, "a register count is a multiple of 8"),
        (".maxntid 128, 1, 1", 16, "from 24 to 256"),
        (".maxntid 128, 1, 1", 264, "from 24 to 256"),
    ] {
        match entry(directive, count) {
            Err(Error::Parse { line: 7, reason, .. }) => assert!(reason.contains(says), "{reason}"),
            other => panic!("{directive} {count}: {other:?}"),
        }
    }
}

/// A thread that asks again and again does not keep copies from landing, whatever it asks.
#[test]
fn copies_land_while_threads_poll() {
    let bulk = "@%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 16;\n\
        @%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [box], [%in], 16, [full];";
    let each = "@%first cp.async.ca.shared.global [box], [%in], 16;\n\
        @%first cp.async.mbarrier.arrive.noinc.shared::cta.b64 [full];";
    let asked = "POLL: mbarrier.test_wait.parity.shared::cta.b64 %p, [full], 0; @!%p bra POLL;";
    let slept =
        "POLL: nanosleep.u32 20; mbarrier.test_wait.parity.shared::cta.b64 %p, [full], 0; @!%p bra POLL;";
    // One warp waits for the copy and tells the other, which spins.
    let told = |load: &str, store: &str| {
        format!(
            "setp.lt.u32 %p, %r, 32; @%p bra WAITS;\nSPINS: {load} %r, [FLAG]; setp.eq.u32 %p, %r, 0; @%p bra SPINS; bra GO;\n\
             WAITS: mbarrier.try_wait.parity.shared::cta.b64 %p, [full], 0; @!%p bra WAITS; @%first {store} [FLAG], 1;\nGO:"
        )
    };
    let shared = told("ld.acquire.cta.shared.u32", "st.release.cta.shared.u32").replace("FLAG", "flag");
    let global = told("ld.acquire.gpu.global.u32", "st.release.gpu.global.u32").replace("FLAG", "%in+16");
    for schedule in SCHEDULES {
        for (copy, wait) in [bulk, each]
            .iter()
            .flat_map(|copy| [asked, slept, &shared, &global].map(|wait| (*copy, wait.to_string())))
        {
            let mut device = Device::new();
            device.set_schedule(schedule);
            device.set_step_limit(20_000);
            let ptx = format!(
                ".version 9.0\n.target sm_90a\n.address_size 64\n.visible .entry k(.param .u64 at) {{\n\
                 .reg .b32 %r; .reg .b64 %in; .reg .pred %p; .reg .pred %first;\n\
                 .shared .align 8 .b64 full; .shared .align 16 .b8 box[16]; .shared .align 4 .b32 flag;\n\
                 ld.param.u64 %in, [at]; mov.u32 %r, %tid.x; setp.eq.u32 %first, %r, 0;\n\
                 @%first mbarrier.init.shared::cta.b64 [full], 1; @%first st.shared.u32 [flag], 0; bar.sync 0;\n\
                 {copy}\n{wait}\nld.shared.u32 %r, [box+12]; @%first st.global.u32 [%in+20], %r;\nret;\n}}"
            );
            device.load(&ptx).unwrap();
            let words = device.alloc(24);
            device.write(words, &[7; 16]).unwrap();
            device.fill(words + 16, 0, 4).unwrap();
            launch(&mut device, "k", 64, &words.to_le_bytes())
                .unwrap_or_else(|error| panic!("{schedule:?}: {error}\n{copy}\n{wait}"));
            assert_eq!(device.read(words + 20, 4).unwrap(), [7; 4]);
        }
    }
}
