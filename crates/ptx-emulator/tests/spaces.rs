//! The bounds and the alignment of every space, for every kind of instruction that names an address: each
//! access once at the last place that it may go to, and once or twice beyond.

use ptx_emulator::{Device, Error, Fault, Hazard, Launch, Schedule, Swizzle, TensorMap};

const SCHEDULES: [Schedule; 3] = [Schedule::Eager, Schedule::Delayed, Schedule::Random(1)];

/// Runs one instruction, or some, in the first thread of a warp; `%at` is the address of 64 bytes that have
/// been written, in device memory between two others; `own` has 32 bytes, `table` and `variable` 16,
/// `numbers` 16; shared memory has 320 in all, of which `box` are the first 128 and `dynamic` the last 64.
fn run(schedule: Schedule, body: &str) -> Result<(), Error> {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(&format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n\
         .extern .shared .align 128 .b8 dynamic[];\n\
         .const .align 4 .b32 table[4] = {{1, 2, 3, 4}}; .global .align 4 .b32 variable[4];\n\
         .visible .entry k(.param .u64 given, .param .align 8 .b8 numbers[16]) {{\n\
         .reg .b32 %r<4>, %row; .reg .b64 %at, %wide; .reg .pred %first;\n\
         .local .align 16 .b8 own[32]; .shared .align 128 .b8 box[128]; .shared .align 8 .b64 full;\n\
         ld.param.u64 %at, [given]; mov.u32 %r0, %tid.x; setp.eq.u32 %first, %r0, 0; mul.lo.u32 %row, %r0, 16;\n\
         mov.b32 %r1, dynamic; @%first mbarrier.init.shared::cta.b64 [full], 1; bar.sync 0;\n\
         {body}\nret;\n}}"
    ))?;
    let [before, at, behind] = [0; 3].map(|_| device.alloc(64));
    for address in [before, at, behind] {
        device.fill(address, 1, 64)?;
    }
    let params = [&at.to_le_bytes()[..], &[5; 16]].concat();
    let (grid, block) = ([1; 3], [32, 1, 1]);
    device
        .launch(&Launch { kernel: "k", grid, cluster: [1; 3], block, shared_bytes: 64, params: &params })
        .map(drop)
}

/// The text with `AT` in it is right with the first place and has the hazard with each of the others.
#[track_caller]
fn check(text: &str, right: &str, wrong: &[(&str, Hazard)]) {
    for schedule in SCHEDULES {
        run(schedule, &text.replace("AT", right)).unwrap_or_else(|error| panic!("{schedule:?}: {error}"));
        for (place, hazard) in wrong {
            let body = text.replace("AT", place);
            match run(schedule, &body) {
                Err(Error::Fault(fault)) => {
                    let Fault { hazard: found, line, .. } = *fault;
                    assert_eq!((found, line), (*hazard, 11), "{schedule:?} {body}: {fault}");
                }
                other => panic!("{schedule:?} {body}: {other:?}"),
            }
        }
    }
}

const OUT: Hazard = Hazard::OutOfBounds;
const ODD: Hazard = Hazard::Misaligned;

#[test]
fn device_memory() {
    for text in
        ["st.global.u32 [AT], %r0;", "st.u32 [AT], %r0;", "ld.global.nc.u32 %r0, [AT];", "ld.u32 %r0, [AT];"]
    {
        let text = format!("@%first {text}");
        check(&text, "%at+60", &[("%at+64", OUT), ("%at+-4", OUT), ("%at+62", ODD), ("0", OUT)]);
    }
    check(
        "@%first st.global.v4.u32 [AT], {%r0, %r0, %r0, %r0};",
        "%at+48",
        &[("%at+56", ODD), ("%at+64", OUT)],
    );
    check("@%first ld.global.u16 %r0, [AT];", "%at+62", &[("%at+61", ODD), ("%at+64", OUT)]);
    check("@%first atom.global.add.u32 %r0, [AT], 1;", "%at+60", &[("%at+64", OUT), ("%at+62", ODD)]);
    check("@%first red.global.add.u32 [AT], 1;", "%at+60", &[("%at+64", OUT), ("%at+62", ODD)]);
    check("@%first st.global.u32 [AT], %r0;", "variable+12", &[("variable+16", OUT), ("variable+13", ODD)]);
    check("@%first ld.const.u32 %r0, [AT];", "table+12", &[("table+16", OUT), ("table+14", ODD)]);
}

#[test]
fn shared_memory() {
    for text in ["st.shared.u32 [AT], %r0;", "st.release.cta.shared.u32 [AT], %r0;"] {
        check(&format!("@%first {text}"), "box+316", &[("box+320", OUT), ("box+126", ODD)]);
    }
    for text in
        ["ld.shared.u32 %r0, [AT];", "atom.shared.add.u32 %r0, [AT], 1;", "red.shared.add.u32 [AT], 1;"]
    {
        let text = format!("@%first st.shared.u32 [box+28], %r0; @%first {text}");
        check(&text, "box+28", &[("box+320", OUT), ("box+30", ODD)]);
    }
    check("@%first st.shared.u32 [AT], %r0;", "%r1+60", &[("%r1+64", OUT), ("%r1+1", ODD)]);
    check(
        "cvta.shared.u64 %wide, box; @%first st.u32 [AT], %r0;",
        "%wide+316",
        &[("%wide+320", OUT), ("%wide+2", ODD)],
    );
    check("@%first mbarrier.init.shared::cta.b64 [AT], 1;", "box+312", &[("box+320", OUT), ("box+4", ODD)]);
    // Rows of a matrix, 16 bytes in each of eight lanes.
    let matrix = "stmatrix.sync.aligned.m8n8.x1.shared.b16 [AT], {%r0};";
    check(matrix, "%row", &[("%row+208", OUT), ("%row+8", ODD)]);
    let loads = matrix.replace("AT", "%row") + " ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r0}, [AT];";
    check(&loads, "%row", &[("%row+320", OUT), ("%row+8", ODD)]);
}

#[test]
fn memory_of_a_thread() {
    for text in ["st.local.u32 [AT], %r0;", "ld.local.u32 %r0, [AT];"] {
        check(text, "own+28", &[("own+32", OUT), ("own+30", ODD)]);
    }
    check(
        "cvta.local.u64 %wide, own; st.u32 [AT], %r0;",
        "%wide+28",
        &[("%wide+32", OUT), ("%wide+30", ODD)],
    );
    check("ld.param.u32 %r0, [AT];", "numbers+12", &[("numbers+16", OUT), ("numbers+14", ODD)]);
    check(
        "cvta.param.u64 %wide, numbers; ld.u32 %r0, [AT];",
        "%wide+12",
        &[("%wide+16", OUT), ("%wide+14", ODD)],
    );
}

#[test]
fn copies() {
    let copy = |to: &str, from: &str| {
        format!("@%first cp.async.ca.shared.global [{to}], [{from}], 8;\ncp.async.wait_all;")
    };
    check(&copy("AT", "%at"), "box+312", &[("box+320", OUT), ("box+4", ODD)]);
    check(&copy("box", "AT"), "%at+56", &[("%at+64", OUT), ("%at+60", ODD), ("%at+-8", OUT)]);
    let bulk = |to: &str, from: &str| {
        format!(
            "@%first cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [{to}], [{from}], 32, [full];\n\
             @%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 32;\n\
             W: mbarrier.try_wait.parity.shared::cta.b64 %first, [full], 0; @!%first bra W;"
        )
    };
    check(&bulk("AT", "%at"), "box+288", &[("box+304", OUT), ("box+8", ODD)]);
    check(&bulk("box", "AT"), "%at+32", &[("%at+48", OUT), ("%at+8", ODD), ("%at+-16", OUT)]);
}

/// Tiles land at multiples of 128 bytes, with a swizzle of 128 bytes at multiples of 1024.
#[test]
fn tiles_of_tensors() {
    for (swizzle, align) in [(Swizzle::None, 128_u32), (Swizzle::Bytes128, 1024)] {
        for (place, is_odd) in [(0, false), (align, false), (align / 2, true), (16, true)] {
            for schedule in SCHEDULES {
                let mut device = Device::new();
                device.set_schedule(schedule);
                let text = format!(
                    ".version 9.0\n.target sm_90a\n.address_size 64\n\
                     .visible .entry k(.param .align 64 .b8 map[128]) {{\n\
                     .reg .b32 %r, %zero; .reg .b64 %map; .reg .pred %first, %done;\n\
                     .shared .align 1024 .b8 tile[2048]; .shared .align 8 .b64 full;\n\
                     mov.b64 %map, map; cvta.param.u64 %map, %map; mov.u32 %zero, 0; mov.u32 %r, %tid.x;\n\
                     setp.eq.u32 %first, %r, 0; @%first mbarrier.init.shared::cta.b64 [full], 1;\n\
                     @%first fence.mbarrier_init.release.cluster; bar.sync 0;\n\
                     @%first mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], 1024;\n\
                     @%first cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes \
                     [tile+{place}], [%map, {{%zero, %zero}}], [full];\n\
                     WAIT: mbarrier.try_wait.parity.shared::cta.b64 %done, [full], 0;\n\
                     @!%done bra WAIT;\nret;\n}}"
                );
                device.load(&text).expect("PTX");
                let address = device.alloc(1024);
                device.fill(address, 1, 1024).expect("1024 bytes");
                let map = TensorMap {
                    address,
                    element_bytes: 2,
                    sizes: &[64, 8],
                    strides: &[128],
                    box_sizes: &[64, 8],
                    swizzle,
                };
                let params = map.encode().expect("a map");
                let (grid, block) = ([1; 3], [32, 1, 1]);
                let launch =
                    Launch { kernel: "k", grid, cluster: [1; 3], block, shared_bytes: 0, params: &params };
                match device.launch(&launch) {
                    Ok(_) if !is_odd => {}
                    Err(Error::Fault(fault)) if is_odd => {
                        assert_eq!((fault.hazard, fault.line), (ODD, 11), "{fault}")
                    }
                    other => panic!("{swizzle:?} at {place}, {schedule:?}: {other:?}"),
                }
            }
        }
    }
}
