//! Calls, `printf` and `assert`. `tests/ptx/functions.cu` is the source of the PTX.

use ptx_emulator::{Counters, Device, Error, Hazard, Launch, Schedule};

const SCHEDULES: [Schedule; 4] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2)];

fn launch(device: &mut Device, kernel: &str, threads: u32, params: &[u8]) -> Result<Counters, Error> {
    let (grid, block) = ([1; 3], [threads, 1, 1]);
    device.launch(&Launch { kernel, grid, cluster: [1; 3], block, shared_bytes: 0, params })
}

fn device(schedule: Schedule) -> Device {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(include_str!("ptx/functions.ptx")).unwrap();
    device
}

fn add(a: i32, b: i32) -> i32 {
    if a > 20 { b } else { a + b * 2 }
}

fn packed((mut weight, mut sides): (f64, [i32; 3]), by: i32) -> i32 {
    weight *= f64::from(by);
    sides[by as usize % 3] = add(by, sides[0]);
    // The other thread's `by`, since all call with i, or all with 63 - i.
    sides[2] += 63 - by;
    weight as i32 * 2 + sides[0] * 2 + 20 * sides[1] + 200 * sides[2] + (weight.fract() * 2.0) as i32
}

#[test]
fn calls() {
    let x = 0.5_f32;
    for schedule in SCHEDULES {
        let mut device = device(schedule);
        let (out, flags) = (device.alloc(256), device.alloc(256));
        let params = [&out.to_le_bytes()[..], &flags.to_le_bytes(), &x.to_le_bytes()].concat();
        launch(&mut device, "calls", 64, &params).unwrap_or_else(|error| panic!("{error}"));
        let (out, flags) = (device.read(out, 256).unwrap(), device.read(flags, 256).unwrap());
        for (i, (out, flag)) in (0..64).zip(out.chunks(4).zip(flags.chunks(4))) {
            let mut values = [0.0_f32; 8];
            (0..8).for_each(|n| values[(n * 3 + i as usize) & 7] = n as f32 * x);
            let total: f32 = values[..4 + i as usize % 5].iter().sum();
            let boxes = packed((1.5, [1, 2, 3]), i) + packed((0.5, [4, 5, 6]), 63 - i);
            let expected = add(i, 7) as f32 + total + boxes as f32 / 2.0 + 1.0;
            assert_eq!(f32::from_le_bytes(out.try_into().unwrap()), expected, "{schedule:?} thread {i}");
            let expected = [0, i, 2 * i][i as usize % 3];
            assert_eq!(i32::from_le_bytes(flag.try_into().unwrap()), expected, "{schedule:?} thread {i}");
        }
    }
}

#[test]
fn assertions() {
    for schedule in SCHEDULES {
        let mut device = device(schedule);
        let input = device.alloc(128);
        device.fill(input, 0, 128).unwrap();
        launch(&mut device, "asserts", 32, &input.to_le_bytes()).unwrap();
        device.write(input + 40, &[6, 0, 0, 0]).unwrap();
        match launch(&mut device, "asserts", 32, &input.to_le_bytes()) {
            Err(Error::Fault(fault)) => {
                assert_eq!((fault.hazard, fault.thread), (Hazard::Trap, [10, 0, 0]));
                let expected = "the assertion `in[threadIdx.x] < 5` fails, functions.cu:";
                assert!(fault.message.starts_with(expected), "{fault}");
                assert!(fault.message.ends_with("void asserts(const int *)"), "{fault}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn calls_that_are_not_implemented() {
    let header = ".version 9.0\n.target sm_90\n.address_size 64\n";
    let function = ".func (.param .b32 r) f (.param .b32 a) {\n.reg .b32 %r;\nld.param.b32 %r, [a];\nBODY\nst.param.b32 [r], %r;\nret;\n}\n";
    let entry = ".entry k() {\n.reg .b32 %r; .reg .b64 %rd;\n{ .param .b32 x; .param .b32 y; st.param.b32 [x], 3;\nCALL;\nld.param.b32 %r, [y]; }\nret;\n}\n";
    let load = |body: &str, call: &str| {
        let text = [header, &function.replace("BODY", body), &entry.replace("CALL", call)].concat();
        Device::new().load(&text)
    };
    load("add.s32 %r, %r, 1;", "call (y), f, (x)").unwrap();
    for (body, call, line, says) in [
        ("{ .param .b32 p; .param .b32 q; call (p), f, (q); }", "call (y), f, (x)", 7, "recursion is not"),
        ("frobnicate;", "call (y), f, (x)", 7, "this instruction is not implemented"),
        ("", "call (y), f, (x, x)", 14, "another number of parameters"),
        ("", "call f, (x)", 14, "another number of parameters"),
        ("", "call (y), g, (x)", 14, "not a function that is declared here"),
        ("", "call (y), f, (%r)", 14, "only variables of param space"),
        ("", "call (y), %rd, (x), f", 14, "only calls of functions by their name"),
    ] {
        match load(body, call) {
            Err(Error::Parse { line: at, reason, .. }) => {
                assert!(reason.starts_with(says), "{call}: {reason}");
                assert_eq!(at, line, "{call}");
            }
            other => panic!("{body} {call}: {other:?}"),
        }
    }
}
