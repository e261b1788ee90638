//! What single instructions compute, against arithmetic written here: wide integers, bit loops, and
//! the host's floats.

use ptx_emulator::{Device, Error, Launch};

/// What PTX calls a relation, and what it is.
type Relation<T> = (&'static str, fn(T, T) -> bool);
/// What PTX calls an atomic, its width, and what it does.
type Operation = (&'static str, u32, fn(u64, u64) -> u64);
/// What PTX calls a function, and what it is.
type Function<T> = (&'static str, fn(T) -> T);

/// Values at the edges of every width, and numbers without a pattern.
fn samples() -> Vec<u64> {
    let mut values = vec![
        0,
        1,
        2,
        3,
        7,
        8,
        15,
        16,
        31,
        32,
        33,
        63,
        64,
        127,
        128,
        255,
        256,
        0x7fff,
        0x8000,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        0xffff_ffff,
        0x1_0000_0000,
        u64::MAX >> 1,
        1 << 63,
        u64::MAX,
        u64::MAX - 1,
    ];
    let mut state = 88_172_645_463_325_252_u64;
    while values.len() < 61 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        values.push(state >> (state % 50));
    }
    values
}

/// Floats of every kind.
fn floats() -> Vec<u64> {
    let mut values: Vec<f32> = vec![
        0.0,
        -0.0,
        1.0,
        -1.0,
        1.5,
        2.5,
        -2.5,
        3.5,
        0.1,
        1e-3,
        65504.0,
        65519.0,
        65520.0,
        65536.0,
        -7e4,
        1e-8,
        6e-8,
        3.1e-5,
        1e-40,
        -1e-45,
        1e38,
        -3e38,
        2_147_483_648.0,
        -2_147_483_904.0,
        4_294_967_296.0,
        1e19,
        f32::MAX,
        f32::MIN_POSITIVE,
        f32::INFINITY,
        f32::NEG_INFINITY,
        f32::NAN,
        0.499_999_97,
        8_388_609.5,
        1.000_976_6,
        1.007_812_5,
        1.011_718_8,
    ];
    let mut state = 7_u32;
    while values.len() < 61 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let value = f32::from_bits(state & 0x9fff_ffff | 0x2000_0000);
        values.push(if value.is_nan() { 1.25 } else { value });
    }
    values.into_iter().map(|value| u64::from(value.to_bits())).collect()
}

/// Runs `body`, which turns `%a`, `%b`, `%c` of these widths into `%d`, for each triple of arguments.
fn run(widths: [u32; 4], body: &str, arguments: &[[u64; 3]]) -> Result<Vec<u64>, Error> {
    let [d, a, b, c] = widths;
    let load = |name: &str, width: u32, offset: u32| {
        format!(
            "ld.global.b64 %wide, [%at+{offset}]; {} %{name}, %wide;",
            if width == 64 { "mov.b64".into() } else { format!("cvt.u{width}.u64") }
        )
    };
    let ptx = format!(
        ".version 9.0\n.target sm_90a\n.address_size 64\n\
         .visible .entry one(.param .u64 input, .param .u64 output) {{\n\
         .reg .b64 %at, %to, %wide, %shift; .reg .b32 %n; .reg .pred %p, %q;\n\
         .reg .b{d} %d; .reg .b{a} %a; .reg .b{b} %b; .reg .b{c} %c;\n\
         mov.u32 %n, %ctaid.x; mad.lo.u32 %n, %n, 128, 0; \n\
         {{ .reg .b32 %t; mov.u32 %t, %tid.x; add.u32 %n, %n, %t; }}\n\
         ld.param.u64 %at, [input]; ld.param.u64 %to, [output];\n\
         mul.wide.u32 %shift, %n, 24; add.u64 %at, %at, %shift;\n\
         mul.wide.u32 %shift, %n, 8; add.u64 %to, %to, %shift;\n\
         {}\n{}\n{}\n{body}\n{}\nst.global.u64 [%to], %wide;\nret;\n}}\n",
        load("a", a, 0),
        load("b", b, 8),
        load("c", c, 16),
        if d == 64 { "mov.b64 %wide, %d;".to_string() } else { format!("cvt.u64.u{d} %wide, %d;") },
    );
    let mut device = Device::new();
    device.load(&ptx)?;
    let count = arguments.len();
    let padded = count.next_multiple_of(128);
    let (input, output) = (device.alloc(padded * 24), device.alloc(padded * 8));
    device.fill(input, 0, padded * 24)?;
    let bytes: Vec<u8> = arguments.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    device.write(input, &bytes)?;
    device.launch(&Launch {
        kernel: "one",
        grid: [padded as u32 / 128, 1, 1],
        cluster: [1; 3],
        block: [128, 1, 1],
        shared_bytes: 0,
        params: &[input.to_le_bytes(), output.to_le_bytes()].concat(),
    })?;
    let bytes = device.read(output, count * 8)?;
    Ok(bytes.chunks(8).map(|value| u64::from_le_bytes(value.try_into().unwrap())).collect())
}

fn triples(values: &[u64], others: &[u64]) -> Vec<[u64; 3]> {
    let third = |i: usize, j: usize| others[(i * 7 + j * 3) % others.len()];
    (0..values.len())
        .flat_map(|i| (0..others.len()).map(move |j| [values[i], others[j], third(i, j)]))
        .collect()
}

#[track_caller]
fn check(widths: [u32; 4], body: &str, arguments: &[[u64; 3]], expected: impl Fn([u64; 3]) -> u64) {
    let found = run(widths, body, arguments).unwrap_or_else(|error| panic!("{body}: {error}"));
    let mask = |width: u32| if width == 64 { u64::MAX } else { (1 << width) - 1 };
    for (argument, found) in arguments.iter().zip(found) {
        let [a, b, c] = [0, 1, 2].map(|n| argument[n] & mask(widths[n + 1]));
        let expected = expected([a, b, c]) & mask(widths[0]);
        assert_eq!(found, expected, "{body} of {a:#x}, {b:#x}, {c:#x}: {found:#x}, not {expected:#x}");
    }
}

/// A value of so many bits, signed or not, as a wide integer.
fn wide(value: u64, bits: u32, signed: bool) -> i128 {
    let value = i128::from(value) & ((1 << bits) - 1);
    if signed && value >> (bits - 1) == 1 { value - (1 << bits) } else { value }
}

#[test]
fn integers() {
    let arguments = triples(&samples(), &samples());
    for bits in [16, 32, 64] {
        for (letter, signed) in [("u", false), ("s", true)] {
            let ty = format!("{letter}{bits}");
            let w = move |value| wide(value, bits, signed);
            let same = [bits; 4];
            check(same, &format!("add.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| (w(a) + w(b)) as u64);
            check(same, &format!("sub.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| (w(a) - w(b)) as u64);
            check(same, &format!("mul.lo.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| {
                w(a).wrapping_mul(w(b)) as u64
            });
            check(same, &format!("mad.lo.{ty} %d, %a, %b, %c;"), &arguments, |[a, b, c]| {
                w(a).wrapping_mul(w(b)).wrapping_add(w(c)) as u64
            });
            check(same, &format!("min.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| w(a).min(w(b)) as u64);
            check(same, &format!("max.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| w(a).max(w(b)) as u64);
            // Both halves of the product from four partial ones, so that nothing overflows.
            check(same, &format!("mul.hi.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| {
                let (x, y) = (w(a), w(b));
                let (x1, x0, y1, y0) = (x >> 32, x & 0xffff_ffff, y >> 32, y & 0xffff_ffff);
                let middle = x1 * y0 + ((x0 * y0) >> 32);
                let low = ((middle & 0xffff_ffff) + x0 * y1) << 32 | (x0 * y0) & 0xffff_ffff;
                let high = x1 * y1 + (middle >> 32) + (((middle & 0xffff_ffff) + x0 * y1) >> 32);
                if bits == 64 { high as u64 } else { (low >> bits) as u64 }
            });
            let nonzero: Vec<[u64; 3]> =
                arguments.iter().copied().filter(|[_, b, _]| wide(*b, bits, false) != 0).collect();
            check(same, &format!("div.{ty} %d, %a, %b;"), &nonzero, |[a, b, _]| (w(a) / w(b)) as u64);
            check(same, &format!("rem.{ty} %d, %a, %b;"), &nonzero, |[a, b, _]| (w(a) % w(b)) as u64);
            check([bits, bits, 32, 32], &format!("shr.{ty} %d, %a, %b;"), &arguments, |[a, n, _]| {
                (w(a) >> n.min(100)) as u64
            });
            if bits < 64 {
                check(
                    [2 * bits, bits, bits, bits],
                    &format!("mul.wide.{ty} %d, %a, %b;"),
                    &arguments,
                    |[a, b, _]| (w(a) * w(b)) as u64,
                );
                check(
                    [2 * bits, bits, bits, 2 * bits],
                    &format!("mad.wide.{ty} %d, %a, %b, %c;"),
                    &arguments,
                    |[a, b, c]| (w(a) * w(b) + wide(c, 2 * bits, signed)) as u64,
                );
            }
            let relations: [Relation<i128>; 6] = [
                ("eq", |a, b| a == b),
                ("ne", |a, b| a != b),
                ("lt", |a, b| a < b),
                ("le", |a, b| a <= b),
                ("gt", |a, b| a > b),
                ("ge", |a, b| a >= b),
            ];
            for (name, holds) in relations {
                let body = format!(
                    "setp.{name}.{ty} %p|%q, %a, %b; selp.b{bits} %d, 1, 0, %p; @%q add.u{bits} %d, %d, 2;"
                );
                check(same, &body, &arguments, |[a, b, _]| if holds(w(a), w(b)) { 1 } else { 2 });
            }
        }
        let ty = format!("b{bits}");
        check([bits; 4], &format!("and.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| a & b);
        check([bits; 4], &format!("or.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| a | b);
        check([bits; 4], &format!("xor.{ty} %d, %a, %b;"), &arguments, |[a, b, _]| a ^ b);
        check([bits; 4], &format!("not.{ty} %d, %a;"), &arguments, |[a, ..]| !a);
        check([bits, bits, 32, 32], &format!("shl.{ty} %d, %a, %b;"), &arguments, |[a, n, _]| {
            if n < 64 { a << n } else { 0 }
        });
    }
}

#[test]
fn bits() {
    let arguments = triples(&samples(), &samples());
    let bit = |value: u64, n: u64| n < 64 && value >> n & 1 == 1;
    for size in [32_u32, 64] {
        let widths = [32, size, size, size];
        check(widths, &format!("popc.b{size} %d, %a;"), &arguments, |[a, ..]| {
            (0..64).filter(|n| bit(a, *n)).count() as u64
        });
        check(widths, &format!("clz.b{size} %d, %a;"), &arguments, |[a, ..]| {
            (0..u64::from(size)).rev().take_while(|n| !bit(a, *n)).count() as u64
        });
        check([size; 4], &format!("brev.b{size} %d, %a;"), &arguments, |[a, ..]| {
            (0..u64::from(size)).fold(0, |all, n| all | u64::from(bit(a, n)) << (u64::from(size) - 1 - n))
        });
        check(widths, &format!("bfind.u{size} %d, %a;"), &arguments, |[a, ..]| {
            (0..u64::from(size)).rev().find(|n| bit(a, *n)).unwrap_or(u64::MAX)
        });
        check(widths, &format!("bfind.s{size} %d, %a;"), &arguments, |[a, ..]| {
            let sign = bit(a, u64::from(size) - 1);
            (0..u64::from(size)).rev().find(|n| bit(a, *n) != sign).unwrap_or(u64::MAX)
        });
        for signed in [false, true] {
            let body = format!("bfe.{}{size} %d, %a, %b, %c;", if signed { "s" } else { "u" });
            check([size, size, 32, 32], &body, &arguments, |[a, position, length]| {
                // The manual's own loop.
                let (position, length) = (position & 0xff, length & 0xff);
                let top = u64::from(size) - 1;
                let sign = signed && length != 0 && bit(a, (position + length - 1).min(top));
                (0..=top).fold(0, |d, n| {
                    let inside = n < length && position + n <= top;
                    d | u64::from(if inside { bit(a, position + n) } else { sign }) << n
                })
            });
        }
        let body = format!("bfi.b{size} %d, %a, %b, %c, 13;");
        check([size, size, size, 32], &body, &arguments, |[a, b, position]| {
            let position = position & 0xff;
            (0..13).fold(b, |d, n| {
                if position + n >= u64::from(size) {
                    return d;
                }
                d & !(1 << (position + n)) | u64::from(bit(a, n)) << (position + n)
            })
        });
    }
    for table in [0x80_u64, 0xe8, 0x96, 0xca, 0xfe, 0x01, 0xaa] {
        check([32; 4], &format!("lop3.b32 %d, %a, %b, %c, {table};"), &arguments, |[a, b, c]| {
            (0..32).fold(0, |d, n| {
                let row = u64::from(bit(a, n)) * 4 + u64::from(bit(b, n)) * 2 + u64::from(bit(c, n));
                d | (table >> row & 1) << n
            })
        });
    }
    check([32; 4], "prmt.b32 %d, %a, %b, %c;", &arguments, |[a, b, selector]| {
        let bytes = [a.to_le_bytes(), b.to_le_bytes()];
        (0..4).fold(0, |d, n| {
            let nibble = selector >> (4 * n) & 15;
            let byte = bytes[(nibble >> 2 & 1) as usize][(nibble & 3) as usize];
            let byte = if nibble < 8 {
                byte
            } else if byte < 128 {
                0
            } else {
                0xff
            };
            d | u64::from(byte) << (8 * n)
        })
    });
    for (name, left) in [("l", true), ("r", false)] {
        for wraps in [false, true] {
            let body = format!("shf.{name}.{}.b32 %d, %a, %b, %c;", if wraps { "wrap" } else { "clamp" });
            check([32; 4], &body, &arguments, |[low, high, n]| {
                let n = if wraps { n & 31 } else { n.min(32) };
                let both = u128::from(high << 32 | low);
                (if left { (both << n) >> 32 } else { both >> n }) as u64
            });
        }
    }
    // The upper half of a 64-bit product from 32-bit ones.
    let body = "{ .reg .b32 %l, %h, %x, %y, %t, %u, %v, %w, %z; mov.b64 {%l, %h}, %a; mov.b64 {%x, %y}, %b; \
                mul.lo.u32 %t, %l, %x; mul.hi.u32 %u, %l, %x; mad.lo.cc.u32 %u, %h, %x, %u; madc.hi.u32 %v, %h, %x, 0; \
                mad.lo.cc.u32 %u, %l, %y, %u; madc.hi.cc.u32 %v, %l, %y, %v; addc.u32 %w, 0, 0; \
                mad.lo.cc.u32 %v, %h, %y, %v; madc.hi.u32 %w, %h, %y, %w; mov.b64 %d, {%v, %w}; }";
    check([64; 4], body, &arguments, |[a, b, _]| ((u128::from(a) * u128::from(b)) >> 64) as u64);
    for (name, expected) in [
        ("sad.u32 %d, %a, %b, %c;", (|[a, b, c]| a.abs_diff(b) + c) as fn([u64; 3]) -> u64),
        ("mad.hi.u32 %d, %a, %b, %c;", |[a, b, c]| ((a * b) >> 32) + c),
        ("mul24.lo.u32 %d, %a, %b;", |[a, b, _]| (a & 0xff_ffff) * (b & 0xff_ffff)),
        ("bmsk.clamp.b32 %d, %a, %b;", |[a, b, _]| {
            (0..32).filter(|n| *n >= a && *n - a < b).map(|n| 1 << n).sum()
        }),
        ("szext.clamp.u32 %d, %a, %b;", |[a, b, _]| if b < 32 { a & ((1 << b) - 1) } else { a }),
        ("set.lt.u32.u32 %d, %a, %b;", |[a, b, _]| if a < b { 0xffff_ffff } else { 0 }),
        ("cnot.b32 %d, %a;", |[a, ..]| u64::from(a == 0)),
    ] {
        check([32; 4], name, &arguments, expected);
    }
    // 128-bit sums in four parts, through the carry flag.
    let body = "{ .reg .b32 %l, %h, %x, %y, %z, %w; mov.b64 {%l, %h}, %a; mov.b64 {%x, %y}, %b; \
                add.cc.u32 %z, %l, %x; addc.u32 %w, %h, %y; mov.b64 %d, {%z, %w}; }";
    check([64; 4], body, &arguments, |[a, b, _]| a.wrapping_add(b));
    let body = "{ .reg .b32 %l, %h, %x, %y, %z, %w; mov.b64 {%l, %h}, %a; mov.b64 {%x, %y}, %b; \
                sub.cc.u32 %z, %l, %x; subc.u32 %w, %h, %y; mov.b64 %d, {%z, %w}; }";
    check([64; 4], body, &arguments, |[a, b, _]| a.wrapping_sub(b));
}

fn f(bits: u64) -> f32 {
    f32::from_bits(bits as u32)
}

fn put(value: f32) -> u64 {
    if value.is_nan() { 0x7fff_ffff } else { u64::from(value.to_bits()) }
}

#[test]
fn single_precision() {
    let arguments = triples(&floats(), &floats());
    let zero = |value: f32| if value.is_subnormal() { 0.0_f32.copysign(value) } else { value };
    check([32; 4], "add.f32 %d, %a, %b;", &arguments, |[a, b, _]| put(f(a) + f(b)));
    check([32; 4], "sub.rn.f32 %d, %a, %b;", &arguments, |[a, b, _]| put(f(a) - f(b)));
    check([32; 4], "mul.ftz.f32 %d, %a, %b;", &arguments, |[a, b, _]| put(zero(zero(f(a)) * zero(f(b)))));
    check([32; 4], "fma.rn.f32 %d, %a, %b, %c;", &arguments, |[a, b, c]| put(f(a).mul_add(f(b), f(c))));
    check([32; 4], "div.rn.f32 %d, %a, %b;", &arguments, |[a, b, _]| put(f(a) / f(b)));
    check([32; 4], "sqrt.rn.f32 %d, %a;", &arguments, |[a, ..]| put(f(a).sqrt()));
    check([32; 4], "add.sat.f32 %d, %a, %b;", &arguments, |[a, b, _]| {
        let sum = f(a) + f(b);
        put(if sum.is_nan() { 0.0 } else { sum.clamp(0.0, 1.0).abs() })
    });
    check([32; 4], "neg.f32 %d, %a;", &arguments, |[a, ..]| a ^ 0x8000_0000);
    check([32; 4], "abs.f32 %d, %a;", &arguments, |[a, ..]| a & 0x7fff_ffff);
    check([32; 4], "min.f32 %d, %a, %b;", &arguments, |[a, b, _]| {
        if f(a).is_nan() || f(b).is_nan() {
            return put(if f(a).is_nan() { f(b) } else { f(a) });
        }
        put(if f(a).total_cmp(&f(b)).is_le() { f(a) } else { f(b) })
    });
    check([32; 4], "max.NaN.f32 %d, %a, %b;", &arguments, |[a, b, _]| {
        if f(a).is_nan() || f(b).is_nan() {
            return 0x7fff_ffff;
        }
        put(if f(a).total_cmp(&f(b)).is_ge() { f(a) } else { f(b) })
    });
    // A directed sum is the nearest one or its neighbour on that side. What the nearest one misses is
    // exact in f32 (the two-sum of Knuth), where nothing overflows or is lost below.
    for (mode, up) in [("rm", false), ("rp", true)] {
        let ordinary: Vec<[u64; 3]> = arguments
            .iter()
            .copied()
            .filter(|[a, b, _]| [*a, *b].iter().all(|bits| f(*bits).abs() < 1e30))
            .collect();
        check([32; 4], &format!("add.{mode}.f32 %d, %a, %b;"), &ordinary, |[a, b, _]| {
            let (a, b) = (f(a), f(b));
            let nearest = a + b;
            let part = nearest - a;
            let missed = (a - (nearest - part)) + (b - part);
            put(if nearest == 0.0 && missed == 0.0 {
                // 0 + -0 and x - x are -0 downwards.
                if !up && (a.is_sign_negative() || b.is_sign_negative()) { -0.0 } else { nearest }
            } else if up && missed > 0.0 {
                nearest.next_up()
            } else if !up && missed < 0.0 {
                nearest.next_down()
            } else {
                nearest
            })
        });
    }
    let relations: [Relation<f32>; 8] = [
        ("eq", |a, b| a == b),
        ("ne", |a, b| !a.is_nan() && !b.is_nan() && a != b),
        ("lt", |a, b| a < b),
        ("ge", |a, b| a >= b),
        ("neu", |a, b| a != b),
        ("ltu", |a, b| a.is_nan() || b.is_nan() || a < b),
        ("num", |a, b| !(a.is_nan() || b.is_nan())),
        ("nan", |a, b| a.is_nan() || b.is_nan()),
    ];
    for (name, holds) in relations {
        let body = format!("setp.{name}.f32 %p, %a, %b; selp.b32 %d, 1, 0, %p;");
        check([32; 4], &body, &arguments, |[a, b, _]| u64::from(holds(f(a), f(b))));
    }
}

/// bf16 by cutting, then looking at what was cut; f16 by a search among its neighbours.
fn to_bf16(value: f32) -> u64 {
    if value.is_nan() {
        return 0x7fff;
    }
    let bits = value.to_bits();
    let (kept, lost) = (bits >> 16, bits & 0xffff);
    u64::from(kept + u32::from(lost > 0x8000 || lost == 0x8000 && kept & 1 == 1))
}

fn half_value(bits: u64) -> f64 {
    let (exponent, fraction) = ((bits >> 10 & 31) as i32, (bits & 1023) as f64);
    let magnitude = if exponent == 0 {
        fraction * 2_f64.powi(-24)
    } else {
        (1024.0 + fraction) * 2_f64.powi(exponent - 25)
    };
    if bits >> 15 & 1 == 1 { -magnitude } else { magnitude }
}

fn to_half(value: f32) -> u64 {
    if value.is_nan() {
        return 0x7fff;
    }
    let sign = u64::from(value.is_sign_negative()) << 15;
    let wanted = f64::from(value.abs()).min(1e5);
    // 0x7c00 stands for 2^16 here, which is what infinity is nearest to.
    let best = (0..=0x7c00_u64).min_by(|a, b| {
        let distance = |bits: u64| (half_value(bits) - wanted).abs();
        distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)))
    });
    sign | best.unwrap()
}

#[test]
fn conversions() {
    let arguments: Vec<[u64; 3]> =
        floats().iter().zip(floats().iter().rev()).map(|(a, b)| [*a, *b, 0]).collect();
    check([32; 4], "cvt.rn.bf16x2.f32 %d, %a, %b;", &arguments, |[a, b, _]| {
        to_bf16(f(a)) << 16 | to_bf16(f(b))
    });
    check([32; 4], "cvt.rn.f16x2.f32 %d, %a, %b;", &arguments, |[a, b, _]| {
        to_half(f(a)) << 16 | to_half(f(b))
    });
    check([16, 32, 32, 32], "cvt.rn.f16.f32 %d, %a;", &arguments, |[a, ..]| to_half(f(a)));
    check([16, 32, 32, 32], "cvt.rn.bf16.f32 %d, %a;", &arguments, |[a, ..]| to_bf16(f(a)));
    check([16, 32, 32, 32], "cvt.rz.bf16.f32 %d, %a;", &arguments, |[a, ..]| {
        if f(a).is_nan() { 0x7fff } else { a >> 16 }
    });
    let halves: Vec<[u64; 3]> = (0..=0xffff_u64).step_by(7).map(|bits| [bits, 0, 0]).collect();
    check([32, 16, 16, 16], "cvt.f32.f16 %d, %a;", &halves, |[a, ..]| match a & 0x7fff {
        0x7c00 => put(f32::INFINITY.copysign(half_value(a) as f32)),
        0x7c01.. => 0x7fff_ffff,
        _ => put(half_value(a) as f32),
    });
    check([32, 16, 16, 16], "cvt.f32.bf16 %d, %a;", &halves, |[a, ..]| put(f(a << 16)));
    for (ty, bits, least, most) in [
        ("s32", 32, i64::from(i32::MIN) as i128, i128::from(i32::MAX)),
        ("u32", 32, 0, i128::from(u32::MAX)),
        ("s64", 64, i128::from(i64::MIN), i128::from(i64::MAX)),
        ("u64", 64, 0, i128::from(u64::MAX)),
        ("u16", 16, 0, 65535),
        ("s16", 16, -32768, 32767),
    ] {
        let modes: [Function<f64>; 4] =
            [("rni", f64::round_ties_even), ("rzi", f64::trunc), ("rmi", f64::floor), ("rpi", f64::ceil)];
        for (mode, round) in modes {
            let numbers: Vec<[u64; 3]> =
                arguments.iter().copied().filter(|[a, ..]| !f(*a).is_nan()).collect();
            check([bits, 32, 32, 32], &format!("cvt.{mode}.{ty}.f32 %d, %a;"), &numbers, |[a, ..]| {
                (round(f64::from(f(a))) as i128).clamp(least, most) as u64
            });
        }
    }
    let numbers: Vec<[u64; 3]> = samples().into_iter().map(|a| [a, 0, 0]).collect();
    check([32, 32, 32, 32], "cvt.rn.f32.s32 %d, %a;", &numbers, |[a, ..]| put(a as i32 as f32));
    check([32, 64, 64, 64], "cvt.rn.f32.u64 %d, %a;", &numbers, |[a, ..]| put(a as f32));
    check([64, 64, 64, 64], "cvt.rn.f64.s64 %d, %a;", &numbers, |[a, ..]| (a as i64 as f64).to_bits());
    check([64, 32, 32, 32], "cvt.s64.s32 %d, %a;", &numbers, |[a, ..]| a as i32 as i64 as u64);
    check([32, 64, 64, 64], "cvt.u32.u64 %d, %a;", &numbers, |[a, ..]| a);
    check([32, 32, 32, 32], "cvt.s32.s8 %d, %a;", &numbers, |[a, ..]| a as i8 as i64 as u64);
    check([32, 32, 32, 32], "cvt.sat.u32.s32 %d, %a;", &numbers, |[a, ..]| (a as i32).max(0) as u64);
    check([16, 32, 32, 32], "cvt.sat.s16.s32 %d, %a;", &numbers, |[a, ..]| {
        (a as i32).clamp(-32768, 32767) as u64
    });
    check([32, 32, 32, 32], "cvt.rni.f32.f32 %d, %a;", &arguments, |[a, ..]| put(f(a).round_ties_even()));
}

#[test]
fn half_precision() {
    // Exact in f64 and rounded once: sums of halves need few bits, products too.
    let values: Vec<u64> = [0.0_f32, 1.0, -1.5, 0.333, 1000.0, -60000.0, 3e-5, 6e-8, 2048.0, 0.1]
        .iter()
        .map(|value| to_half(*value) | to_half(-value * 0.7) << 16)
        .collect();
    let arguments = triples(&values, &values);
    let both = |a: u64, b: u64, op: fn(f64, f64) -> f64| {
        [0, 16]
            .map(|n| to_half_f64(op(half_value(a >> n & 0xffff), half_value(b >> n & 0xffff))) << n)
            .iter()
            .sum::<u64>()
    };
    check([32; 4], "add.f16x2 %d, %a, %b;", &arguments, |[a, b, _]| both(a, b, |a, b| a + b));
    check([32; 4], "mul.rn.f16x2 %d, %a, %b;", &arguments, |[a, b, _]| both(a, b, |a, b| a * b));
    check([32; 4], "sub.f16x2 %d, %a, %b;", &arguments, |[a, b, _]| both(a, b, |a, b| a - b));
    let brain: Vec<u64> = floats()
        .into_iter()
        .filter(|bits| f(*bits).is_finite())
        .map(|bits| to_bf16(f(bits) * 1e-19))
        .collect();
    let arguments = triples(&brain, &brain[..20]);
    // A product of two bf16 is exact in f32, whose range is the same.
    check([16; 4], "mul.bf16 %d, %a, %b;", &arguments, |[a, b, _]| {
        let product = f(a << 16) * f(b << 16);
        if product.is_subnormal() || product == 0.0 {
            let scaled = f64::from(f(a << 16)) * f64::from(f(b << 16));
            let steps = (scaled.abs() * 2_f64.powi(133)).round_ties_even() as u64;
            return steps | u64::from(scaled.is_sign_negative()) << 15;
        }
        to_bf16(product)
    });
}

fn to_half_f64(value: f64) -> u64 {
    let sign = u64::from(value.is_sign_negative()) << 15;
    let best = (0..=0x7c00_u64).min_by(|a, b| {
        let distance = |bits: u64| (half_value(bits) - value.abs()).abs();
        distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1)))
    });
    sign | best.unwrap()
}

#[test]
fn approximations() {
    let arguments: Vec<[u64; 3]> = (1..60).map(|n| [u64::from((n as f32 * 0.37).to_bits()), 0, 0]).collect();
    let functions: [Function<f32>; 6] = [
        ("ex2.approx.ftz.f32", f32::exp2),
        ("lg2.approx.f32", f32::log2),
        ("rcp.approx.ftz.f32", f32::recip),
        ("rsqrt.approx.f32", |a| 1.0 / a.sqrt()),
        ("sqrt.approx.f32", f32::sqrt),
        ("tanh.approx.f32", f32::tanh),
    ];
    for (name, function) in functions {
        let found = run([32; 4], &format!("{name} %d, %a;"), &arguments).unwrap();
        for ([a, ..], found) in arguments.iter().zip(found) {
            let expected = function(f(*a));
            assert!(found.abs_diff(u64::from(expected.to_bits())) <= 1, "{name} of {}: {}", f(*a), f(found));
        }
    }
}

/// With jitter the results of each approximation move, by two units at most, and the same way for the same
/// argument and seed; what is exactly rounded stays.
#[test]
fn jitter() {
    let arguments: Vec<f32> = (0..512).map(|n| 0.3 + n as f32 * 0.011).collect();
    let run = |instruction: &str, seed| {
        let mut device = Device::new();
        device.set_jitter(seed);
        device
            .load(&format!(
                ".version 9.0\n.target sm_80\n.address_size 64\n\
                 .visible .entry one(.param .u64 at) {{ .reg .b64 %a, %n; .reg .b32 %t; .reg .f32 %f;\n\
                 ld.param.u64 %a, [at]; mov.u32 %t, %tid.x; mul.wide.u32 %n, %t, 4; add.u64 %a, %a, %n;\n\
                 ld.global.f32 %f, [%a]; {instruction} st.global.f32 [%a], %f; ret; }}"
            ))
            .unwrap_or_else(|error| panic!("{error}"));
        let at = device.alloc(2048);
        let bytes: Vec<u8> = arguments.iter().flat_map(|value| value.to_le_bytes()).collect();
        device.write(at, &bytes).unwrap();
        let params = at.to_le_bytes();
        let (grid, block) = ([1; 3], [512, 1, 1]);
        device
            .launch(&Launch { kernel: "one", grid, cluster: [1; 3], block, shared_bytes: 0, params: &params })
            .unwrap();
        let bytes = device.read(at, 2048).unwrap();
        bytes.chunks(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect::<Vec<u32>>()
    };
    for approximation in [
        "ex2.approx.ftz.f32 %f, %f;",
        "lg2.approx.f32 %f, %f;",
        "rcp.approx.ftz.f32 %f, %f;",
        "rsqrt.approx.f32 %f, %f;",
        "sqrt.approx.f32 %f, %f;",
        "sin.approx.f32 %f, %f;",
        "cos.approx.f32 %f, %f;",
        "tanh.approx.f32 %f, %f;",
        "div.approx.f32 %f, %f, 0f40400000;",
    ] {
        let exact = run(approximation, None);
        assert_eq!(exact, run(approximation, None));
        for seed in 0..4 {
            let moved = run(approximation, Some(seed));
            assert_eq!(moved, run(approximation, Some(seed)));
            let steps: Vec<i64> =
                moved.iter().zip(&exact).map(|(a, b)| i64::from(*a) - i64::from(*b)).collect();
            assert!(steps.iter().all(|step| step.abs() <= 2), "{approximation}");
            let often = |step: i64| steps.iter().filter(|found| **found == step).count() > 40;
            assert!((-2..=2).all(often), "{approximation} {steps:?}");
        }
        assert_ne!(run(approximation, Some(0)), run(approximation, Some(1)));
    }
    for exact in ["rcp.rn.f32 %f, %f;", "sqrt.rn.f32 %f, %f;", "fma.rn.f32 %f, %f, %f, %f;"] {
        assert_eq!(run(exact, Some(1)), run(exact, None), "{exact}");
    }
}

/// A shared address whose register lies below 0 until the offset is added.
#[test]
fn short_addresses_wrap() {
    let body = "{ .shared .align 8 .b64 cells[128]; .reg .b32 %i, %back; mov.u32 %i, %tid.x; mad.lo.u32 %i, %i, 8, cells;\n\
        mul.lo.u32 %back, %i, -1; st.shared.b32 [%i], %a; bar.sync 0; mov.u32 %i, cells; mad.lo.u32 %back, %i, 2, %back;\n\
        ld.shared.b32 %d, [%back+1016]; }";
    let count = 128;
    let arguments = (0..count).map(|n| [n, 0, 0]).collect::<Vec<_>>();
    let found = run([32; 4], body, &arguments).unwrap();
    assert_eq!(found, (0..count).rev().collect::<Vec<_>>());
}

/// Old values and results of each kind of atomic, in both spaces.
#[test]
fn atomics() {
    let arguments = triples(&samples(), &samples()[..40]);
    let operations: [Operation; 9] = [
        ("add.u32", 32, |a, b| a.wrapping_add(b)),
        ("min.s32", 32, |a, b| (a as i32).min(b as i32) as u32 as u64),
        ("max.u64", 64, |a, b| a.max(b)),
        ("and.b32", 32, |a, b| a & b),
        ("or.b64", 64, |a, b| a | b),
        ("xor.b32", 32, |a, b| a ^ b),
        ("exch.b64", 64, |_, b| b),
        ("inc.u32", 32, |a, b| if a >= b { 0 } else { a + 1 }),
        ("dec.u32", 32, |a, b| if a == 0 || a > b { b } else { a - 1 }),
    ];
    for (name, bits, update) in operations {
        for returns in [true, false] {
            // The sum of the old value, if it is returned, and the new one.
            let body = format!(
                "{{ .shared .align 8 .b64 cells[128]; .reg .b32 %i; .reg .b{bits} %old, %new; mov.u32 %i, %tid.x; mad.lo.u32 %i, %i, 8, cells;\n\
                 st.shared.b{bits} [%i], %a; mov.b{bits} %old, 0; {}; ld.shared.b{bits} %new, [%i]; add.u{bits} %d, %old, %new; }}",
                if returns {
                    format!("atom.shared.{name} %old, [%i], %b")
                } else {
                    format!("red.shared.{name} [%i], %b")
                }
            );
            if returns || !name.starts_with("exch") {
                check([bits; 4], &body, &arguments, |[a, b, _]| {
                    update(a, b).wrapping_add(if returns { a } else { 0 })
                });
            }
        }
    }
    let body = "{ .shared .align 8 .b64 cells[128]; .reg .b32 %i, %old, %new; mov.u32 %i, %tid.x; mad.lo.u32 %i, %i, 8, cells;\n\
        st.shared.b32 [%i], %a; atom.shared.cas.b32 %old, [%i], %b, %c; ld.shared.b32 %new, [%i]; add.u32 %d, %old, %new; }";
    check([32; 4], body, &arguments, |[a, b, c]| a.wrapping_add(if a == b { c } else { a }));
}

#[test]
fn bad_text() {
    let header = ".version 9.0\n.target sm_90a\n.address_size 64\n";
    let kernel = |body: &str| {
        format!("{header}.visible .entry k() {{\n.reg .b32 %r<4>;\n.reg .pred %p<2>;\n{body}\n}}\n")
    };
    let load = |text: &str| match Device::new().load(text) {
        Err(Error::Parse { line, text, reason }) => (line, text, reason),
        other => panic!("{other:?} of {text}"),
    };
    assert_eq!(load("").0, 1);
    assert_eq!(load(".version 12.0\n.target sm_90a").0, 1);
    assert_eq!(load(".version 9.0\n.target sm_100a\n.address_size 64").0, 2);
    assert_eq!(load(".version 9.0\n.target sm_90\n.address_size 32").0, 3);
    let (line, text, reason) = load(&kernel("add.u32 %r0, %r1, %r2;\nfrobnicate.b32 %r1, %r2;"));
    assert_eq!(
        (line, text.as_str(), reason.as_str()),
        (8, "frobnicate.b32 %r1, %r2;", "this instruction is not implemented")
    );
    let (line, _, reason) = load(&kernel("add.u32 %r0, %r9, 1;"));
    assert_eq!((line, reason.as_str()), (7, "not a register that is declared or known here (%r9)"));
    assert!(load(&kernel("bra NOWHERE;")).2.contains("there is no label NOWHERE"));
    assert!(load(&kernel("add.u32 %r0, %r1;")).2.contains("an operand is missing"));
    assert!(load(&kernel("add.u32 %r0, %r1, %r2, %r3;")).2.contains("more operands"));
    assert!(load(&kernel("add.u32 5, %r1, %r2;")).2.contains("a destination is a register"));
    assert!(load(&kernel("@%r1 bra L;\nL:")).2.contains("not a predicate"));
    assert!(load(&kernel("ld.global.v4.u32 {%r0, %r1}, [%r2];")).2.contains("another size"));
    let (line, text, reason) = load(&format!("{header}\n.visible .entry (.param .u64 at)\n{{\nret;\n}}"));
    assert_eq!((line, text.as_str()), (5, ".visible .entry (.param .u64 at)"));
    assert_eq!(reason, "an entry has a name (()");
    let (line, _, reason) = load(&format!("{header}.visible .entry k(.param .u65 at) {{ ret; }}"));
    assert_eq!((line, reason.as_str()), (4, "not a type that is known here (.u65)"));
}

/// Cut anywhere, text is an error at its last line, and never a panic.
#[test]
fn truncated_text() {
    let whole = include_str!("ptx/hazards.ptx");
    let (last, end) = (whole.rfind(".entry").unwrap(), whole.rfind('}').unwrap());
    for at in (0..end).step_by(97) {
        let cut = &whole[..at];
        match Device::new().load(cut) {
            // Between two kernels.
            Ok(()) => assert!(at <= last, "cut at {at}"),
            Err(Error::Parse { line, reason, .. }) => {
                let says_nothing = |line: &str| {
                    let line = line.trim();
                    line.is_empty() || line.starts_with("//") || line.starts_with(".loc")
                };
                assert!(
                    (1..=cut.lines().count().max(1) as u32).contains(&line),
                    "cut at {at}: {line}: {reason}"
                );
                assert!(cut.lines().skip(line as usize).all(says_nothing), "cut at {at}: {line}: {reason}");
            }
            other => panic!("cut at {at}: {other:?}"),
        }
    }
}

#[test]
fn bad_launches() {
    let mut device = Device::new();
    device.load(include_str!("ptx/hazards.ptx")).unwrap();
    let address = device.alloc(4096).to_le_bytes();
    let good = Launch {
        kernel: "fill",
        grid: [1; 3],
        cluster: [1; 3],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: &address,
    };
    device.launch(&good).unwrap();
    let line =
        1 + include_str!("ptx/hazards.ptx").lines().position(|line| line.contains(".entry fill(")).unwrap();
    let fill = |says: &str| format!("fill (line {line}): {says}");
    for (bad, says) in [
        (
            Launch { kernel: "nothing", ..good },
            format!("no entry nothing is loaded; there are: fill (line {line}), "),
        ),
        (
            Launch { params: &address[..4], ..good },
            fill("4 bytes of parameters were given, the entry takes 8"),
        ),
        (Launch { grid: [0, 1, 1], ..good }, fill("a grid of [0, 1, 1]")),
        (Launch { block: [1025, 1, 1], ..good }, fill("a block of [1025, 1, 1]")),
        (
            Launch { cluster: [2, 1, 1], ..good },
            fill("a grid of [1, 1, 1], which clusters of [2, 1, 1] do not"),
        ),
        (Launch { shared_bytes: 1 << 20, ..good }, fill("1048576 bytes of shared memory")),
    ] {
        match device.launch(&bad) {
            Err(Error::Request(reason)) => assert!(reason.starts_with(&says), "{reason}"),
            other => panic!("{other:?}"),
        }
    }
}
