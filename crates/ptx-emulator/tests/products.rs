//! `wgmma` in all layouts of shared memory. Where elements lie in shared memory and in registers is written
//! down here from the figures of the PTX manual's chapter "Asynchronous warpgroup-level matrix
//! instructions": core matrices, strides, fragments of A and D.

use ptx_emulator::{Device, Error, Hazard, Launch, Schedule};

const SCHEDULES: [Schedule; 3] = [Schedule::Eager, Schedule::Delayed, Schedule::Random(1)];

/// Bytes of a row of chunks: 16 without a swizzle, else its span.
const SPANS: [usize; 4] = [16, 32, 64, 128];

/// An operand in shared memory.
#[derive(Clone, Copy, Debug)]
struct Operand {
    span: usize,
    /// Whether k runs along the row, or m (n) does.
    k_major: bool,
    /// Where it begins, and the two offsets of its descriptor, in bytes.
    start: usize,
    leading: usize,
    stride: usize,
}

impl Operand {
    /// An operand with gaps that only its own offsets jump over.
    fn new(span: usize, k_major: bool, start: usize) -> Self {
        let group = 8 * span;
        let (leading, stride) = match (span, k_major) {
            // Core matrices of 8 rows of 16 bytes: the two along k, then those along m.
            (16, true) => (group, 2 * group + 128),
            // Core matrices along k one behind the other for all of m.
            (16, false) => (33 * group, group),
            (_, true) => (16, group),
            // All groups of m of the first eight k, then those of the next.
            (_, false) => (2 * group + 1024, group),
        };
        Self { span, k_major, start, leading, stride }
    }

    /// Where an element lies, before the swizzle: counted in core matrices.
    fn plain(self, mn: usize, k: usize) -> usize {
        let Self { span, k_major, leading, stride, .. } = self;
        let per_row = span / 2;
        match (k_major, span) {
            (true, 16) => mn / 8 * stride + k / 8 * leading + mn % 8 * 16 + k % 8 * 2,
            (true, _) => mn / 8 * stride + mn % 8 * span + k * 2,
            (false, 16) => mn / 8 * stride + k / 8 * leading + k % 8 * 16 + mn % 8 * 2,
            (false, _) => mn / per_row * leading + k / 8 * stride + k % 8 * span + mn % per_row * 2,
        }
    }

    /// The same with chunks swapped within a row, as the figures of the swizzles show it: in rows of 128 bytes by
    /// the row, in shorter ones by the pair or the four of rows that fill 128 bytes.
    fn place(self, mn: usize, k: usize) -> usize {
        let plain = self.plain(mn, k);
        let (line, chunk, byte) = (plain / 128, plain % 128 / 16, plain % 16);
        let by = line % (self.span / 16);
        self.start + line * 128 + (chunk ^ by) * 16 + byte
    }

    fn descriptor(self) -> u64 {
        let mode = [0, 3, 2, 1][self.span.ilog2() as usize - 4];
        let field = |bytes: usize| (bytes as u64 >> 4) & 0x3fff;
        field(self.start) | field(self.leading) << 16 | field(self.stride) << 32 | mode << 62
    }
}

/// What one launch multiplies.
#[derive(Clone, Copy, Debug)]
struct Case {
    n: usize,
    a: Operand,
    b: Operand,
    a_in_registers: bool,
    half: bool,
    half_result: bool,
    accumulates: bool,
    signs: [i32; 2],
}

const BYTES: usize = 64 * 1024;

fn value(row: usize, column: usize, salt: usize) -> i32 {
    ((row * 31 + column * 17 + row * column * 5 + salt) % 15) as i32 - 7
}

fn half(value: i32) -> u16 {
    let magnitude = value.unsigned_abs();
    if magnitude == 0 {
        return 0;
    }
    let exponent = magnitude.ilog2();
    let sign = if value < 0 { 0x8000 } else { 0 };
    sign | ((exponent + 15) << 10) as u16 | ((magnitude << (10 - exponent)) & 0x3ff) as u16
}

fn bits(case: &Case, value: i32) -> u16 {
    if case.half { half(value) } else { ((value as f32).to_bits() >> 16) as u16 }
}

fn ptx(case: &Case) -> String {
    let results = case.n / if case.half_result { 4 } else { 2 };
    let list =
        |name: &str, count: usize| (0..count).map(|n| format!("%{name}{n}")).collect::<Vec<_>>().join(", ");
    let d = list("d", results);
    let ty = if case.half { "f16" } else { "bf16" };
    let result = if case.half_result { "f16" } else { "f32" };
    let a = if case.a_in_registers { "{%a0, %a1, %a2, %a3}" } else { "%descriptor" };
    let transpose_a =
        if case.a_in_registers { String::new() } else { format!(", {}", u8::from(!case.a.k_major)) };
    let each = |text: &dyn Fn(usize) -> String| (0..results).map(text).collect::<String>();
    format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry one(.param .u64 image, .param .u64 fragments, .param .u64 results) {{\n\
         .shared .align 1024 .b8 box[{BYTES}]; .reg .b32 %n, %at, %d<{results}>, %a<4>, %v<4>;\n\
         .reg .b64 %from, %fragments, %results, %wide, %descriptor, %b; .reg .pred %p, %adds;\n\
         ld.param.u64 %from, [image]; ld.param.u64 %fragments, [fragments]; ld.param.u64 %results, [results];\n\
         mov.u32 %n, %tid.x; mul.wide.u32 %wide, %n, 16; add.u64 %from, %from, %wide; add.u64 %fragments, %fragments, %wide;\n\
         mul.wide.u32 %wide, %n, {}; add.u64 %results, %results, %wide; mul.lo.u32 %at, %n, 16;\n\
         COPY: ld.global.v4.u32 {{%v0, %v1, %v2, %v3}}, [%from]; st.shared.v4.u32 [%at], {{%v0, %v1, %v2, %v3}};\n\
         add.u32 %at, %at, 2048; add.u64 %from, %from, 2048; setp.lt.u32 %p, %at, {BYTES}; @%p bra COPY;\n\
         fence.proxy.async.shared::cta; bar.sync 0;\n\
         ld.global.v4.u32 {{%a0, %a1, %a2, %a3}}, [%fragments];\n{}\
         mov.b64 %descriptor, {:#x}; mov.b64 %b, {:#x}; setp.eq.u32 %adds, {}, 1;\n\
         wgmma.fence.sync.aligned;\n\
         wgmma.mma_async.sync.aligned.m64n{}k16.{result}.{ty}.{ty} {{{d}}}, {a}, %b, %adds, {}, {}{transpose_a}, {};\n\
         wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n{}ret;\n}}\n",
        results * 4,
        each(&|n| format!("ld.global.u32 %d{n}, [%results+{}];\n", 4 * n)),
        case.a.descriptor(),
        case.b.descriptor(),
        u8::from(case.accumulates),
        case.n,
        case.signs[0],
        case.signs[1],
        u8::from(!case.b.k_major),
        each(&|n| format!("st.global.u32 [%results+{}], %d{n};\n", 4 * n)),
    )
}

/// Row and column of D that thread `t` holds as its element `i`: a warp has 16 rows, four threads a row of
/// it, and each two neighbours of every eight columns, then the same two eight rows further down.
fn d_element(t: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (t / 32, t % 32);
    (warp * 16 + lane / 4 + if i % 4 >= 2 { 8 } else { 0 }, i / 4 * 8 + lane % 4 * 2 + i % 2)
}

/// The same of A: two neighbours of the first eight k, of the row eight further down, then both of the last
/// eight k.
fn a_element(t: usize, i: usize) -> (usize, usize) {
    let (warp, lane) = (t / 32, t % 32);
    let row = warp * 16 + lane / 4 + if i / 2 % 2 == 1 { 8 } else { 0 };
    (row, lane % 4 * 2 + i % 2 + if i >= 4 { 8 } else { 0 })
}

fn run(schedule: Schedule, case: &Case) -> Result<(), Error> {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(&ptx(case))?;
    let mut image = vec![0xee; BYTES];
    let mut put = |at: usize, value: u16| {
        assert_eq!(image[at..at + 2], [0xee; 2], "{case:?}: two elements in one place");
        image[at..at + 2].copy_from_slice(&value.to_le_bytes());
    };
    for (m, k) in (0..64).flat_map(|m| (0..16).map(move |k| (m, k))) {
        put(case.a.place(m, k), bits(case, value(m, k, 3)));
    }
    for (n, k) in (0..case.n).flat_map(|n| (0..16).map(move |k| (n, k))) {
        put(case.b.place(n, k), bits(case, value(n, k, 8)));
    }
    let fragments: Vec<u8> = (0..128 * 8)
        .flat_map(|n| {
            let (row, k) = a_element(n / 8, n % 8);
            bits(case, value(row, k, 3)).to_le_bytes()
        })
        .collect();
    let elements = case.n / 2;
    let before = |row, column| value(row, column, 1);
    let bytes: Vec<u8> = (0..128 * elements)
        .flat_map(|n| {
            let (row, column) = d_element(n / elements, n % elements);
            let value = before(row, column);
            if case.half_result {
                half(value).to_le_bytes().to_vec()
            } else {
                (value as f32).to_le_bytes().to_vec()
            }
        })
        .collect();
    let [from, registers, results] =
        [image.len(), fragments.len(), bytes.len()].map(|size| device.alloc(size));
    for (at, bytes) in [(from, &image), (registers, &fragments), (results, &bytes)] {
        device.write(at, bytes)?;
    }
    let params = [from, registers, results].map(u64::to_le_bytes).concat();
    let (grid, block) = ([1; 3], [128, 1, 1]);
    device.launch(&Launch {
        kernel: "one",
        grid,
        cluster: [1; 3],
        block,
        shared_bytes: 0,
        params: &params,
    })?;
    let found = device.read(results, bytes.len())?;
    let size = if case.half_result { 2 } else { 4 };
    for (n, found) in found.chunks(size).enumerate() {
        let (row, column) = d_element(n / elements, n % elements);
        let sum: i32 = (0..16).map(|k| value(row, k, 3) * value(column, k, 8)).sum();
        let expected =
            case.signs[0] * case.signs[1] * sum + if case.accumulates { before(row, column) } else { 0 };
        let expected = if case.half_result {
            half(expected).to_le_bytes().to_vec()
        } else {
            (expected as f32).to_le_bytes().to_vec()
        };
        assert_eq!(found, expected, "{schedule:?} {case:?}: row {row}, column {column}");
    }
    Ok(())
}

fn case(n: usize, a: Operand, b: Operand) -> Case {
    let (half, half_result, accumulates, signs) = (false, false, true, [1, 1]);
    Case { n, a, b, a_in_registers: false, half, half_result, accumulates, signs }
}

#[track_caller]
fn check(case: Case) {
    for schedule in SCHEDULES {
        run(schedule, &case).unwrap_or_else(|error| panic!("{schedule:?} {case:?}: {error}"));
    }
}

#[test]
fn every_layout() {
    for a_span in SPANS {
        for b_span in SPANS {
            for (a_major, b_major) in [(true, true), (true, false), (false, true), (false, false)] {
                check(case(
                    80,
                    Operand::new(a_span, a_major, 1024),
                    Operand::new(b_span, b_major, 32 * 1024),
                ));
            }
        }
    }
}

#[test]
fn factors_in_registers() {
    let a = Operand::new(128, true, 0);
    for half in [false, true] {
        for span in SPANS {
            let b = Operand::new(span, span < 64, 32 * 1024);
            check(Case { a_in_registers: true, half, ..case(64, a, b) });
        }
    }
}

#[test]
fn every_width() {
    let (a, b) = (Operand::new(128, true, 0), Operand::new(64, true, 16 * 1024));
    for n in (8..=256).step_by(8) {
        run(Schedule::Eager, &case(n, a, b)).unwrap_or_else(|error| panic!("{n}: {error}"));
    }
}

#[test]
fn results_of_each_type() {
    let (a, b) = (Operand::new(64, true, 0), Operand::new(32, false, 32 * 1024));
    for half_result in [false, true] {
        for accumulates in [false, true] {
            for signs in [[1, 1], [-1, 1], [1, -1], [-1, -1]] {
                check(Case { half: true, half_result, accumulates, signs, ..case(16, a, b) });
            }
        }
    }
}

#[test]
fn refuses_what_is_not_wgmma() {
    let (a, b) = (Operand::new(64, true, 0), Operand::new(32, false, 32 * 1024));
    let good = ptx(&Case { half: true, half_result: true, ..case(16, a, b) });
    Device::new().load(&good).unwrap();
    for (from, to) in [
        ("m64n16k16", "m64n12k16"),
        ("m64n16k16", "m64n24k16"),
        ("m64n16k16", "m32n16k16"),
        ("f16.f16.f16", "f16.bf16.bf16"),
        ("f16.f16.f16", "f64.f16.f16"),
        ("%adds, 1, 1", "%adds, 2, 1"),
    ] {
        match Device::new().load(&good.replace(from, to)) {
            Err(Error::Parse { text, .. }) => assert!(text.starts_with("wgmma.mma_async"), "{text}"),
            other => panic!("{to}: {other:?}"),
        }
    }
}

/// Runs a text over zeros, as many as the cases of this file need at most.
fn over_zeros(schedule: Schedule, text: &str) -> Result<(), Error> {
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(text)?;
    let mut params = Vec::new();
    for bytes in [BYTES, 128 * 16, 128 * 512] {
        let address = device.alloc(bytes);
        device.fill(address, 0, bytes)?;
        params.extend(address.to_le_bytes());
    }
    let (grid, cluster, block) = ([1; 3], [1; 3], [128, 1, 1]);
    device.launch(&Launch { kernel: "one", grid, cluster, block, shared_bytes: 0, params: &params }).map(drop)
}

#[track_caller]
fn finds(hazards: &[Hazard], schedule: Schedule, text: &str) {
    match over_zeros(schedule, text) {
        Err(Error::Fault(fault)) => assert!(hazards.contains(&fault.hazard), "{schedule:?}: {fault}"),
        other => panic!("{schedule:?}: {other:?}"),
    }
}

/// A descriptor of rows that lie behind the end of shared memory.
#[test]
fn operands_outside() {
    let good = case(16, Operand::new(128, true, 0), Operand::new(128, true, 16 * 1024));
    let text = ptx(&good);
    // Sixteen rows of 128 bytes, of which the first eight are the last of shared memory.
    let outside = Operand::new(128, true, BYTES - 1024);
    let [from, to] = [good.b, outside].map(|operand| format!("{:#x}", operand.descriptor()));
    assert_eq!(text.matches(&from).count(), 1);
    for schedule in SCHEDULES {
        over_zeros(schedule, &text).unwrap_or_else(|error| panic!("{error}"));
        finds(&[Hazard::OutOfBounds], schedule, &text.replace(&from, &to));
    }
}

/// Three warps wait for what all have written, and the last does not: it has not heard of it, whichever of them
/// reads it first.
#[test]
fn every_warp_has_to_wait() {
    let b = Operand::new(128, true, 16 * 1024);
    let text = ptx(&Case { a_in_registers: true, ..case(16, Operand::new(128, true, 0), b) });
    assert_eq!(text.matches("bar.sync 0;").count(), 1);
    let last = |passes: &str| {
        let barrier = format!(
            "setp.ge.u32 %p, %n, 96; @!%p bar.sync 0, 128; @%p bar.arrive 0, 128; {passes} @%p nanosleep.u32 1;"
        );
        text.replace("bar.sync 0;", &barrier)
    };
    for schedule in SCHEDULES.into_iter().chain((2..20).map(Schedule::Random)) {
        over_zeros(schedule, &text).unwrap_or_else(|error| panic!("{error}"));
        over_zeros(schedule, &last("@%p bar.sync 1, 32;").replace("bar.arrive 0", "bar.sync 0"))
            .unwrap_or_else(|error| panic!("{error}"));
        // The others may not have written yet.
        finds(&[Hazard::Race, Hazard::Uninitialised], schedule, &last(""));
    }
}
