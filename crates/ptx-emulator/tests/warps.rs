//! What the lanes of a warp do together. Fragment layouts are those of the figures in the PTX manual
//! (chapters "Matrix fragments for mma.m16n8k16", "ldmatrix"), element by element.

use ptx_emulator::{Counters, Device, Launch, Schedule};

/// Runs a body for one warp. It finds its lane's row of `input` (`words` u32) at `%in`, its row of the
/// output at `%out`, registers `%r0` to `%r31`, `%p0` to `%p3`, and 1 KB of shared memory at `box`.
fn run(schedule: Schedule, body: &str, input: &[Vec<u32>], outputs: usize) -> (Vec<Vec<u32>>, Counters) {
    let words = input[0].len();
    let ptx = format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry one(.param .u64 input, .param .u64 output) {{\n\
         .reg .b64 %in, %out, %wide; .reg .b32 %lane, %r<32>, %offset; .reg .pred %p<4>;\n\
         .shared .align 16 .b8 box[1024];\n\
         mov.u32 %lane, %laneid; ld.param.u64 %in, [input]; ld.param.u64 %out, [output];\n\
         mul.wide.u32 %wide, %lane, {}; add.u64 %in, %in, %wide;\n\
         mul.wide.u32 %wide, %lane, {}; add.u64 %out, %out, %wide;\n{body}\nret;\n}}\n",
        words * 4,
        outputs * 4
    );
    let mut device = Device::new();
    device.set_schedule(schedule);
    device.load(&ptx).unwrap();
    let (from, to) = (device.alloc(32 * words * 4), device.alloc(32 * outputs * 4));
    let bytes: Vec<u8> = input.iter().flatten().flat_map(|word| word.to_le_bytes()).collect();
    device.write(from, &bytes).unwrap();
    let launch = Launch {
        kernel: "one",
        grid: [1; 3],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: &[from.to_le_bytes(), to.to_le_bytes()].concat(),
    };
    let counters = device.launch(&launch).unwrap_or_else(|error| panic!("{error}"));
    let bytes = device.read(to, 32 * outputs * 4).unwrap_or_default();
    let words: Vec<u32> = bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
    (words.chunks(outputs).map(<[u32]>::to_vec).collect(), counters)
}

const SCHEDULES: [Schedule; 3] = [Schedule::Eager, Schedule::Random(1), Schedule::Random(2)];

fn random(count: usize) -> Vec<u32> {
    let mut state = 12_345_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    (0..count).map(|_| next()).collect()
}

/// Small whole numbers as bf16 and f16, so that sums are exact in any order.
fn small(count: usize) -> Vec<i32> {
    random(count).into_iter().map(|word| (word % 17) as i32 - 8).collect()
}

fn bf16(value: i32) -> u32 {
    (value as f32).to_bits() >> 16
}

fn f16(value: i32) -> u32 {
    let sign = if value < 0 { 0x8000 } else { 0 };
    let magnitude = value.unsigned_abs();
    if magnitude == 0 {
        return sign;
    }
    let exponent = magnitude.ilog2();
    sign | (exponent + 15) << 10 | (magnitude << (10 - exponent)) & 0x3ff
}

#[test]
fn shuffles() {
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![lane * 3 + 1]).collect();
    for schedule in SCHEDULES {
        for (mode, width, by) in [
            ("up", 32_u32, 3_u32),
            ("up", 8, 2),
            ("down", 32, 5),
            ("down", 16, 4),
            ("bfly", 32, 16),
            ("bfly", 4, 1),
            ("idx", 32, 9),
            ("idx", 8, 13),
        ] {
            // As the CUDA functions encode the width.
            let segment = (32 - width) << 8;
            let c = if mode == "up" { segment } else { segment | 31 };
            let body = format!(
                "ld.global.u32 %r0, [%in]; shfl.sync.{mode}.b32 %r1|%p0, %r0, {by}, {c}, -1; selp.u32 %r2, 1, 0, %p0; st.global.v2.u32 [%out], {{%r1, %r2}};"
            );
            let (found, _) = run(schedule, &body, &input, 2);
            for lane in 0..32_u32 {
                let (first, last) = (lane / width * width, lane / width * width + width - 1);
                let source = match mode {
                    "up" => lane.checked_sub(by).filter(|source| *source >= first),
                    "down" => Some(lane + by).filter(|source| *source <= last),
                    "bfly" => Some(lane ^ by).filter(|source| *source <= last),
                    _ => Some(first + by % width),
                };
                let expected = [source.unwrap_or(lane) * 3 + 1, u32::from(source.is_some())];
                assert_eq!(found[lane as usize], expected, "{mode} {width} {by} lane {lane}");
            }
        }
    }
}

#[test]
fn votes_matches_and_sums() {
    let input: Vec<Vec<u32>> = random(32).into_iter().map(|word| vec![word % 5]).collect();
    let body = "ld.global.u32 %r0, [%in]; setp.lt.u32 %p0, %r0, 2;\n\
        vote.sync.ballot.b32 %r1, %p0, -1; vote.sync.any.pred %p1, %p0, -1; vote.sync.all.pred %p2, !%p0, -1;\n\
        selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 1, 0, %p2;\n\
        match.any.sync.b32 %r4, %r0, -1; match.all.sync.b32 %r5|%p3, %r0, -1;\n\
        redux.sync.add.s32 %r6, %r0, -1; redux.sync.max.u32 %r7, %r0, -1; redux.sync.xor.b32 %r8, %r0, -1;\n\
        elect.sync _|%p3, -1; selp.u32 %r9, 1, 0, %p3;\n\
        st.global.u32 [%out], %r1; st.global.u32 [%out+4], %r2; st.global.u32 [%out+8], %r3; st.global.u32 [%out+12], %r4;\n\
        st.global.u32 [%out+16], %r5; st.global.u32 [%out+20], %r6; st.global.u32 [%out+24], %r7; st.global.u32 [%out+28], %r8;\n\
        st.global.u32 [%out+32], %r9;";
    let values: Vec<u32> = input.iter().map(|row| row[0]).collect();
    let mask = |holds: &dyn Fn(u32) -> bool| {
        (0..32).filter(|lane| holds(values[*lane])).map(|lane| 1_u32 << lane).sum::<u32>()
    };
    for schedule in SCHEDULES {
        let (found, _) = run(schedule, body, &input, 9);
        for lane in 0..32 {
            let expected = [
                mask(&|value| value < 2),
                1,
                0,
                mask(&|value| value == values[lane]),
                0,
                values.iter().sum(),
                *values.iter().max().unwrap(),
                values.iter().fold(0, |all, value| all ^ value),
                u32::from(lane == 0),
            ];
            assert_eq!(found[lane], expected, "lane {lane}");
        }
    }
}

/// Only some lanes, in two groups that use one instruction at different times.
#[test]
fn partial_masks() {
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![lane]).collect();
    let body = "ld.global.u32 %r0, [%in]; and.b32 %r1, %r0, 1; setp.eq.u32 %p0, %r1, 0; @%p0 bra EVEN;\n\
        redux.sync.add.u32 %r2, %r0, 0xaaaaaaaa; bra END;\n\
        EVEN: redux.sync.add.u32 %r2, %r0, 0x55555555;\n\
        END: bar.warp.sync -1; st.global.u32 [%out], %r2;";
    for schedule in SCHEDULES {
        let (found, _) = run(schedule, body, &input, 1);
        for (lane, row) in found.iter().enumerate() {
            assert_eq!(row[0], if lane % 2 == 0 { 240 } else { 256 });
        }
    }
}

#[test]
fn matrices_from_shared_memory() {
    // Row r of the 32 rows of 8 halves is the lane's own input; element (r, c) is 8 r + c.
    let input: Vec<Vec<u32>> = (0..32)
        .map(|row| (0..4).map(|pair| (8 * row + 2 * pair) | ((8 * row + 2 * pair + 1) << 16)).collect())
        .collect();
    let store = "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%in]; mov.u32 %offset, box; mad.lo.u32 %offset, %lane, 16, %offset;\n\
        st.shared.v4.u32 [%offset], {%r0, %r1, %r2, %r3}; bar.sync 0;\n";
    for transposed in [false, true] {
        let body = format!(
            "{store}ldmatrix.sync.aligned.m8n8.x4{}.shared.b16 {{%r4, %r5, %r6, %r7}}, [%offset]; st.global.v4.u32 [%out], {{%r4, %r5, %r6, %r7}};",
            if transposed { ".trans" } else { "" }
        );
        for schedule in SCHEDULES {
            let (found, counters) = run(schedule, &body, &input, 4);
            for (lane, row) in found.iter().enumerate() {
                for (matrix, register) in row.iter().enumerate() {
                    for half in 0..2 {
                        // Thread T holds row T / 4, columns 2 (T % 4) and the next; .trans swaps the two.
                        let (mut r, mut c) = (lane / 4, lane % 4 * 2 + half);
                        if transposed {
                            (r, c) = (c, r);
                        }
                        assert_eq!(
                            register >> (16 * half) & 0xffff,
                            (8 * (8 * matrix + r) + c) as u32,
                            "lane {lane}"
                        );
                    }
                }
            }
            if schedule == Schedule::Eager {
                // Four passes for the store, four for the matrices: rows of 16 bytes in a line never collide.
                assert_eq!(
                    (counters.shared_requests, counters.shared_passes, counters.bank_conflicts),
                    (2, 8, 0)
                );
            }
        }
    }
    // There and back.
    let body = format!(
        "{store}ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r4, %r5, %r6, %r7}}, [%offset];\nbar.sync 0;\n\
         stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%offset], {{%r4, %r5, %r6, %r7}};\nbar.sync 0;\n\
         ld.shared.v4.u32 {{%r8, %r9, %r10, %r11}}, [%offset]; st.global.v4.u32 [%out], {{%r8, %r9, %r10, %r11}};"
    );
    let (found, _) = run(Schedule::Eager, &body, &input, 4);
    for (row, words) in found.iter().enumerate() {
        let (matrix, r) = (row / 8, row % 8);
        let element = |column: usize| (8 * (8 * matrix + column) + r) as u32;
        let expected: Vec<u32> = (0..4).map(|pair| element(2 * pair) | element(2 * pair + 1) << 16).collect();
        assert_eq!(words, &expected);
    }
}

#[test]
fn matrices_transposed() {
    // Thread T holds elements (T / 4, 2 (T % 4)) and the next; element (r, c) is 8 r + c.
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![(2 * lane) | ((2 * lane + 1) << 16)]).collect();
    let body = "ld.global.u32 %r0, [%in]; movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0; st.global.u32 [%out], %r1;";
    for schedule in SCHEDULES {
        let (found, _) = run(schedule, body, &input, 1);
        for (lane, row) in found.iter().enumerate() {
            let (r, c) = (lane as u32 / 4, lane as u32 % 4 * 2);
            assert_eq!([row[0] & 0xffff, row[0] >> 16], [8 * c + r, 8 * (c + 1) + r], "lane {lane}");
        }
    }
}

#[test]
fn matrix_products() {
    let (a, b, c) = (small(16 * 16), small(16 * 8), small(16 * 8));
    for (ty, convert) in [("bf16", bf16 as fn(i32) -> u32), ("f16", f16)] {
        for k in [16_usize, 8] {
            let input: Vec<Vec<u32>> = (0..32)
                .map(|lane| {
                    let (group, thread) = (lane >> 2, lane % 4);
                    let pair = |element: &dyn Fn(usize) -> i32, i: usize| {
                        convert(element(i)) | convert(element(i + 1)) << 16
                    };
                    // a_i: row groupID for i = 0, 1, 4, 5, else groupID + 8; columns from 8 on for i >= 4.
                    let a_element = |i: usize| {
                        let row = if i < 2 || (4..6).contains(&i) { group } else { group + 8 };
                        let column = thread * 2 + (i & 1) + if i >= 4 { 8 } else { 0 };
                        a[row * 16 + column]
                    };
                    let b_element =
                        |i: usize| b[(thread * 2 + (i & 1) + if i >= 2 { 8 } else { 0 }) * 8 + group];
                    let c_element =
                        |i: usize| c[(if i < 2 { group } else { group + 8 }) * 8 + thread * 2 + (i & 1)];
                    let mut words: Vec<u32> = (0..4).map(|n| pair(&a_element, 2 * n)).collect();
                    words.extend((0..2).map(|n| pair(&b_element, 2 * n)));
                    words.extend((0..4).map(|i| (c_element(i) as f32).to_bits()));
                    // f16 accumulators: two registers of two.
                    words.extend((0..2).map(|n| f16(c_element(2 * n)) | f16(c_element(2 * n + 1)) << 16));
                    words
                })
                .collect();
            let load: String = (0..12).map(|n| format!("ld.global.u32 %r{n}, [%in+{}];\n", 4 * n)).collect();
            let fragments = if k == 16 { "{%r0, %r1, %r2, %r3}, {%r4, %r5}" } else { "{%r0, %r1}, {%r4}" };
            let body = format!(
                "{load}mma.sync.aligned.m16n8k{k}.row.col.f32.{ty}.{ty}.f32 {{%r16, %r17, %r18, %r19}}, {fragments}, {{%r6, %r7, %r8, %r9}};\n\
                 st.global.v4.u32 [%out], {{%r16, %r17, %r18, %r19}};"
            );
            let product = |row: usize, column: usize| {
                (0..k).map(|n| a[row * 16 + n] * b[n * 8 + column]).sum::<i32>() + c[row * 8 + column]
            };
            for schedule in SCHEDULES {
                let (found, counters) = run(schedule, &body, &input, 4);
                assert_eq!(counters.matrix_products, 1);
                for (lane, words) in found.iter().enumerate() {
                    for (i, word) in words.iter().enumerate() {
                        let row = lane / 4 + if i < 2 { 0 } else { 8 };
                        let expected = product(row, lane % 4 * 2 + (i & 1)) as f32;
                        assert_eq!(f32::from_bits(*word), expected, "{ty} k{k} lane {lane} d{i}");
                    }
                }
            }
            if ty == "f16" {
                let body = format!(
                    "{load}mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16 {{%r16, %r17}}, {fragments}, {{%r10, %r11}};\n\
                     st.global.v2.u32 [%out], {{%r16, %r17}};"
                );
                let (found, _) = run(Schedule::Eager, &body, &input, 2);
                for (lane, words) in found.iter().enumerate() {
                    for i in 0..4 {
                        let row = lane / 4 + if i < 2 { 0 } else { 8 };
                        let expected = f16(product(row, lane % 4 * 2 + (i & 1)));
                        assert_eq!(words[i / 2] >> (16 * (i & 1)) & 0xffff, expected, "lane {lane} d{i}");
                    }
                }
            }
        }
    }
}

/// Barriers that reduce, and the generic addresses of each space.
#[test]
fn reductions_and_address_spaces() {
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![lane]).collect();
    let body = "ld.global.u32 %r0, [%in]; setp.lt.u32 %p0, %r0, 5;\n\
        barrier.cta.red.popc.aligned.u32 %r1, 0, %p0; bar.red.and.pred %p1, 0, %p0; bar.red.or.pred %p2, 0, %p0;\n\
        selp.u32 %r2, 1, 0, %p1; selp.u32 %r3, 1, 0, %p2;\n\
        mov.b64 %wide, box; cvta.shared.u64 %wide, %wide; isspacep.shared %p0, %wide; isspacep.global %p1, %in;\n\
        selp.u32 %r4, 1, 0, %p0; selp.u32 %r5, 1, 0, %p1; mul.wide.u32 %in, %lane, 4; add.u64 %in, %in, %wide;\n\
        st.u32 [%in], %lane; cvta.to.shared.u64 %in, %in; ld.shared.u32 %r6, [%in];\n\
        st.global.v4.u32 [%out], {%r1, %r2, %r3, %r4}; st.global.v4.u32 [%out+16], {%r5, %r6, %r6, %r6};";
    for schedule in SCHEDULES {
        let (found, _) = run(schedule, body, &input, 8);
        for (lane, words) in found.iter().enumerate() {
            assert_eq!(words[..6], [5, 0, 1, 1, 1, lane as u32], "lane {lane}");
        }
    }
}

/// Strides through shared memory have the conflicts that the manual of the hardware counts.
#[test]
fn bank_conflicts_and_sectors() {
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![lane; 4]).collect();
    for (stride, passes) in [(4, 1), (8, 2), (16, 4), (32, 8), (0, 1)] {
        // Stride 0 would be a race of writes; reads of one word are a broadcast.
        let body = format!(
            "mul.lo.u32 %r0, %lane, {stride}; mov.u32 %offset, box; add.u32 %r1, %offset, %r0;\n\
             mad.lo.u32 %r2, %lane, 4, %offset; st.shared.u32 [%r2], %lane; st.shared.u32 [%r2+128], %lane; \n\
             st.shared.u32 [%r2+256], %lane; st.shared.u32 [%r2+384], %lane; st.shared.u32 [%r2+512], %lane; st.shared.u32 [%r2+640], %lane;\n\
             st.shared.u32 [%r2+768], %lane; st.shared.u32 [%r2+896], %lane; bar.sync 0; ld.shared.u32 %r3, [%r1]; st.global.u32 [%out], %r3;"
        );
        let (_, counters) = run(Schedule::Eager, &body, &input, 1);
        assert_eq!((counters.shared_requests, counters.shared_passes), (9, 8 + passes), "stride {stride}");
        assert_eq!(counters.bank_conflicts, passes - 1);
        assert_eq!((counters.global_requests, counters.global_sectors), (1, 4));
    }
    let (_, counters) = run(
        Schedule::Eager,
        "ld.global.v4.u32 {%r0, %r1, %r2, %r3}, [%in]; st.global.u32 [%out], %r0;",
        &input,
        8,
    );
    // 32 x 16 bytes in a line are 16 sectors; words 32 bytes apart are one each.
    assert_eq!((counters.global_requests, counters.global_sectors), (2, 16 + 32));
}

/// What is said to caches changes no result.
#[test]
fn hints() {
    let input: Vec<Vec<u32>> = (0..32).map(|lane| vec![lane, lane + 1, lane + 2, lane + 3]).collect();
    let body = "createpolicy.fractional.L2::evict_last.L2::evict_first.b64 %wide, 0.5;\n\
        createpolicy.fractional.L2::evict_first.b64 %wide;\n\
        cp.async.bulk.prefetch.L2.global [%in], 16; cp.async.bulk.prefetch.L2.global.L2::cache_hint [%in], 16, %wide;\n\
        prefetch.global.L2 [%in]; prefetch.tensormap [%in]; mov.u32 %offset, box; mad.lo.u32 %offset, %lane, 16, %offset;\n\
        cp.async.cg.shared.global.L2::cache_hint.L2::128B [%offset], [%in], 16, %wide;\n\
        cp.async.wait_all; ld.shared.v2.u32 {%r0, %r1}, [%offset];\n\
        cp.async.ca.shared.global.L2::cache_hint [%offset], [%in], 16, 8, %wide;\n\
        cp.async.wait_all; ld.shared.u32 %r2, [%offset+8];\n\
        ld.global.nc.L1::no_allocate.L2::cache_hint.v4.u32 {_, _, _, %r3}, [%in], %wide;\n\
        st.global.L2::cache_hint.v4.u32 [%out], {%r0, %r1, %r2, %r3}, %wide;";
    let (found, _) = run(Schedule::Eager, body, &input, 4);
    for (lane, words) in (0..).zip(found) {
        assert_eq!(words, [lane, lane + 1, 0, lane + 3]);
    }
}
