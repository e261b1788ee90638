//! Integer, bit and byte instructions.

use super::{binary, ternary, unary};
use crate::{
    isa::{Binary, Ternary, Type, Unary, Update},
    number::{Lanes, Scalar},
};

/// The same body for every width and signedness.
macro_rules! integers {
    ($ty:expr, $make:ident, |$($x:ident),+| $body:expr) => {
        match $ty {
            Type::B16 | Type::U16 => Some($make!(u16, |$($x),+| $body)),
            Type::B32 | Type::U32 => Some($make!(u32, |$($x),+| $body)),
            Type::B64 | Type::U64 => Some($make!(u64, |$($x),+| $body)),
            Type::S16 => Some($make!(i16, |$($x),+| $body)),
            Type::S32 => Some($make!(i32, |$($x),+| $body)),
            Type::S64 => Some($make!(i64, |$($x),+| $body)),
            _ => None,
        }
    };
}

/// A shift takes its amount as 32 bits whatever it shifts.
macro_rules! shift {
    ($t:ty, |$a:ident, $n:ident| $body:expr) => {{
        fn apply(a: &Lanes, b: &Lanes) -> Lanes {
            std::array::from_fn(|lane| {
                let ($a, $n) = (<$t as Scalar>::get(a[lane]), b[lane] as u32);
                Scalar::put($body)
            })
        }
        apply as Binary
    }};
}
fn ty(word: &str) -> Option<Type> {
    Type::parse(word)
}

pub(super) fn one(words: &[&str]) -> Option<Unary> {
    let (name, last) = (*words.first()?, ty(words.last()?)?);
    match (name, words.len()) {
        // Also what `cvta` does where spaces have one address each.
        ("mov", 2) => match last.bytes() {
            1 => None,
            2 => Some(unary!(u16, |a| a)),
            4 => Some(unary!(u32, |a| a)),
            _ => Some(unary!(u64, |a| a)),
        },
        ("neg", 2) => integers!(last, unary, |a| a.wrapping_neg()),
        ("not", 2) => integers!(last, unary, |a| !a),
        ("cnot", 2) => integers!(last, unary, |a| u64::from(a == 0)),
        ("abs", 2) => match last {
            Type::S16 => Some(unary!(i16, |a| a.wrapping_abs())),
            Type::S32 => Some(unary!(i32, |a| a.wrapping_abs())),
            Type::S64 => Some(unary!(i64, |a| a.wrapping_abs())),
            _ => None,
        },
        ("popc", 2) => integers!(last, unary, |a| a.count_ones()),
        ("clz", 2) => integers!(last, unary, |a| a.leading_zeros()),
        ("brev", 2) => integers!(last, unary, |a| a.reverse_bits()),
        // The place of the highest bit that differs from the sign, -1 for none.
        ("bfind", 2) => match last {
            Type::U32 => Some(unary!(u32, |a| 31_u32.wrapping_sub(a.leading_zeros()))),
            Type::U64 => Some(unary!(u64, |a| 63_u32.wrapping_sub(a.leading_zeros()))),
            Type::S32 => Some(unary!(i32, |a| 31_u32.wrapping_sub((a ^ (a >> 31)).leading_zeros()))),
            Type::S64 => Some(unary!(i64, |a| 63_u32.wrapping_sub((a ^ (a >> 63)).leading_zeros()))),
            _ => None,
        },
        ("bfind", 3) if words[1] == "shiftamt" => match last {
            Type::U32 => Some(unary!(u32, |a| if a == 0 { u32::MAX } else { a.leading_zeros() })),
            Type::U64 => Some(unary!(u64, |a| if a == 0 { u32::MAX } else { a.leading_zeros() })),
            _ => None,
        },
        _ => None,
    }
}

pub(super) fn two(words: &[&str]) -> Option<Binary> {
    let (name, last) = (*words.first()?, ty(words.last()?)?);
    match (name, &words[1..words.len() - 1]) {
        ("add", []) => integers!(last, binary, |a, b| a.wrapping_add(b)),
        ("sub", []) => integers!(last, binary, |a, b| a.wrapping_sub(b)),
        ("add", ["sat"]) if last == Type::S32 => Some(binary!(i32, |a, b| a.saturating_add(b))),
        ("sub", ["sat"]) if last == Type::S32 => Some(binary!(i32, |a, b| a.saturating_sub(b))),
        ("mul", ["lo"]) => integers!(last, binary, |a, b| a.wrapping_mul(b)),
        ("mul", ["hi"]) => high(last),
        ("mul", ["wide"]) => match last {
            Type::U16 => Some(binary!(u16, |a, b| u32::from(a) * u32::from(b))),
            Type::S16 => Some(binary!(i16, |a, b| i32::from(a) * i32::from(b))),
            Type::U32 => Some(binary!(u32, |a, b| u64::from(a) * u64::from(b))),
            Type::S32 => Some(binary!(i32, |a, b| i64::from(a) * i64::from(b))),
            _ => None,
        },
        ("mul24", ["lo"]) => match last {
            Type::U32 => Some(binary!(u32, |a, b| (a & 0xff_ffff).wrapping_mul(b & 0xff_ffff))),
            Type::S32 => Some(binary!(i32, |a, b| (a << 8 >> 8).wrapping_mul(b << 8 >> 8))),
            _ => None,
        },
        // A GPU answers a division by zero with all ones.
        ("div", []) => {
            integers!(last, binary, |a, b| a.checked_div(b).unwrap_or(if b == 0 { !0 } else { a }))
        }
        ("rem", []) => {
            integers!(last, binary, |a, b| a.checked_rem(b).unwrap_or(if b == 0 { a } else { 0 }))
        }
        ("min", []) => integers!(last, binary, |a, b| a.min(b)),
        ("max", []) => integers!(last, binary, |a, b| a.max(b)),
        ("and", []) => integers!(last, binary, |a, b| a & b),
        ("or", []) => integers!(last, binary, |a, b| a | b),
        ("xor", []) => integers!(last, binary, |a, b| a ^ b),
        ("shl", []) => match last {
            Type::B16 => Some(shift!(u16, |a, n| if n < 16 { a << n } else { 0 })),
            Type::B32 => Some(shift!(u32, |a, n| if n < 32 { a << n } else { 0 })),
            Type::B64 => Some(shift!(u64, |a, n| if n < 64 { a << n } else { 0 })),
            _ => None,
        },
        ("shr", []) => match last {
            Type::B16 | Type::U16 => Some(shift!(u16, |a, n| if n < 16 { a >> n } else { 0 })),
            Type::B32 | Type::U32 => Some(shift!(u32, |a, n| if n < 32 { a >> n } else { 0 })),
            Type::B64 | Type::U64 => Some(shift!(u64, |a, n| if n < 64 { a >> n } else { 0 })),
            Type::S16 => Some(shift!(i16, |a, n| a >> n.min(15))),
            Type::S32 => Some(shift!(i32, |a, n| a >> n.min(31))),
            Type::S64 => Some(shift!(i64, |a, n| a >> n.min(63))),
            _ => None,
        },
        ("bmsk", ["clamp"]) if last == Type::B32 => Some(binary!(u32, |a, b| mask(a, b))),
        ("szext", ["clamp"]) => match last {
            Type::U32 => Some(binary!(u32, |a, b| if b < 32 { a & ((1 << b) - 1) } else { a })),
            Type::S32 => Some(binary!(u32, |a, b| match b {
                0 => 0,
                1..32 => ((a << (32 - b)) as i32 >> (32 - b)) as u32,
                _ => a,
            })),
            _ => None,
        },
        _ => None,
    }
}

fn high(ty: Type) -> Option<Binary> {
    Some(match ty {
        Type::U16 => binary!(u16, |a, b| ((u32::from(a) * u32::from(b)) >> 16) as u16),
        Type::S16 => binary!(i16, |a, b| ((i32::from(a) * i32::from(b)) >> 16) as i16),
        Type::U32 => binary!(u32, |a, b| ((u64::from(a) * u64::from(b)) >> 32) as u32),
        Type::S32 => binary!(i32, |a, b| ((i64::from(a) * i64::from(b)) >> 32) as i32),
        Type::U64 => binary!(u64, |a, b| ((u128::from(a) * u128::from(b)) >> 64) as u64),
        Type::S64 => binary!(i64, |a, b| ((i128::from(a) * i128::from(b)) >> 64) as i64),
        _ => return None,
    })
}

pub(super) fn three(words: &[&str]) -> Option<Ternary> {
    let (name, last) = (*words.first()?, ty(words.last()?)?);
    match (name, &words[1..words.len() - 1]) {
        ("mad", ["lo"]) => integers!(last, ternary, |a, b, c| a.wrapping_mul(b).wrapping_add(c)),
        ("mad", ["hi"]) => match last {
            Type::U32 => {
                Some(ternary!(u32, |a, b, c| (((u64::from(a) * u64::from(b)) >> 32) as u32).wrapping_add(c)))
            }
            Type::S32 => {
                Some(ternary!(i32, |a, b, c| (((i64::from(a) * i64::from(b)) >> 32) as i32).wrapping_add(c)))
            }
            Type::U64 => {
                Some(ternary!(u64, |a, b, c| (((u128::from(a) * u128::from(b)) >> 64) as u64).wrapping_add(c)))
            }
            _ => None,
        },
        ("mad", ["wide"]) => match last {
            Type::U16 => {
                Some(ternary!((u16, u16, u32), |a, b, c| (u32::from(a) * u32::from(b)).wrapping_add(c)))
            }
            Type::S16 => {
                Some(ternary!((i16, i16, i32), |a, b, c| (i32::from(a) * i32::from(b)).wrapping_add(c)))
            }
            Type::U32 => {
                Some(ternary!((u32, u32, u64), |a, b, c| (u64::from(a) * u64::from(b)).wrapping_add(c)))
            }
            Type::S32 => {
                Some(ternary!((i32, i32, i64), |a, b, c| (i64::from(a) * i64::from(b)).wrapping_add(c)))
            }
            _ => None,
        },
        ("sad", []) => match last {
            Type::U32 => Some(ternary!(u32, |a, b, c| a.abs_diff(b).wrapping_add(c))),
            Type::S32 => Some(ternary!((i32, i32, u32), |a, b, c| a.abs_diff(b).wrapping_add(c))),
            _ => None,
        },
        ("bfe", []) => match last {
            Type::U32 => Some(ternary!(u32, |a, b, c| extract(a.into(), b, c, 32, false))),
            Type::S32 => Some(ternary!(u32, |a, b, c| extract(a.into(), b, c, 32, true) as u32)),
            Type::U64 => Some(ternary!((u64, u32, u32), |a, b, c| extract(a, b, c, 64, false))),
            Type::S64 => Some(ternary!((u64, u32, u32), |a, b, c| extract(a, b, c, 64, true))),
            _ => None,
        },
        ("shf", ["l", "wrap"]) => Some(ternary!(u32, |a, b, c| (pair(a, b) << (c & 31) >> 32) as u32)),
        ("shf", ["r", "wrap"]) => Some(ternary!(u32, |a, b, c| (pair(a, b) >> (c & 31)) as u32)),
        ("shf", ["l", "clamp"]) => Some(ternary!(u32, |a, b, c| (pair(a, b) << c.min(32) >> 32) as u32)),
        ("shf", ["r", "clamp"]) => Some(ternary!(u32, |a, b, c| (pair(a, b) >> c.min(32)) as u32)),
        ("prmt", []) if last == Type::B32 => Some(ternary!(u32, |a, b, c| permute(a, b, c))),
        _ => None,
    }
}

/// `lop3.b32` with its truth table: bit `4a + 2b + c` of it is the result.
pub(crate) fn lop3(a: &Lanes, b: &Lanes, c: &Lanes, table: u8) -> Lanes {
    let mut result = [0; 32];
    for row in (0..8).filter(|row| table >> row & 1 == 1) {
        let flip = |bit: u8| if row & bit == 0 { u64::MAX } else { 0 };
        let (fa, fb, fc) = (flip(4), flip(2), flip(1));
        for lane in 0..32 {
            result[lane] |= (a[lane] ^ fa) & (b[lane] ^ fb) & (c[lane] ^ fc);
        }
    }
    result.map(|bits| bits & 0xffff_ffff)
}

/// `bfi`: the low `length` bits of `a` into `b` at `position`.
pub(crate) fn insert(a: u64, b: u64, position: u64, length: u64, bits: u32) -> u64 {
    let (position, length) = ((position & 0xff) as u32, (length & 0xff) as u32);
    if position >= bits || length == 0 {
        return b;
    }
    let length = length.min(bits - position);
    let field = if length == 64 { u64::MAX } else { (1 << length) - 1 };
    (b & !(field << position)) | (a & field) << position
}

/// How a `d = op(d, b)` atomic of these words computes.
pub(crate) fn atomic(name: &str, ty: Type) -> Option<Update> {
    macro_rules! update {
        ($t:ty, |$a:ident, $b:ident| $body:expr) => {
            (|a, b| {
                let ($a, $b) = (<$t as Scalar>::get(a), <$t as Scalar>::get(b));
                Scalar::put($body)
            }) as Update
        };
    }
    match name {
        "add" if ty == Type::F32 => Some(update!(f32, |a, b| a + b)),
        "add" if ty == Type::F64 => Some(update!(f64, |a, b| a + b)),
        "add" => integers!(ty, update, |a, b| a.wrapping_add(b)),
        "min" => integers!(ty, update, |a, b| a.min(b)),
        "max" => integers!(ty, update, |a, b| a.max(b)),
        "and" => integers!(ty, update, |a, b| a & b),
        "or" => integers!(ty, update, |a, b| a | b),
        "xor" => integers!(ty, update, |a, b| a ^ b),
        "exch" => integers!(ty, update, |_a, b| b),
        "inc" if ty == Type::U32 => Some(update!(u32, |a, b| if a >= b { 0 } else { a + 1 })),
        "dec" if ty == Type::U32 => Some(update!(u32, |a, b| if a == 0 || a > b { b } else { a - 1 })),
        _ => None,
    }
}

/// How `redux.sync` combines lanes.
pub(crate) fn reduction(name: &str, ty: Type) -> Option<Update> {
    let allowed = match name {
        "add" | "min" | "max" => matches!(ty, Type::U32 | Type::S32),
        "and" | "or" | "xor" => ty == Type::B32,
        _ => false,
    };
    if allowed { atomic(name, ty) } else { None }
}

fn pair(low: u32, high: u32) -> u64 {
    u64::from(high) << 32 | u64::from(low)
}

fn mask(position: u32, length: u32) -> u32 {
    let ones = if length >= 32 { u32::MAX } else { (1 << length) - 1 };
    if position >= 32 { 0 } else { ones << position }
}

/// `bfe`: bits beyond the top repeat the sign of a signed field.
fn extract(a: u64, position: u32, length: u32, bits: u32, signed: bool) -> u64 {
    let (position, length) = (position & 0xff, length & 0xff);
    let top = (position + length).saturating_sub(1).min(bits - 1);
    let sign = if signed && length > 0 && a >> top & 1 == 1 { u64::MAX } else { 0 };
    let all = if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    if position >= bits {
        return sign & all;
    }
    let kept = length.min(bits - position);
    let field = if kept == 64 { u64::MAX } else { (1 << kept) - 1 };
    let value = a >> position & field;
    (value | sign & !field) & all
}

/// `prmt`: each nibble of the selector names a byte of `{b, a}`, its top bit replicates the sign.
fn permute(a: u32, b: u32, selector: u32) -> u32 {
    let bytes = pair(a, b).to_le_bytes();
    let picked: [u8; 4] = std::array::from_fn(|i| {
        let nibble = selector >> (4 * i) & 0xf;
        let byte = bytes[nibble as usize & 7];
        if nibble & 8 == 0 { byte } else { (byte as i8 >> 7) as u8 }
    });
    u32::from_le_bytes(picked)
}
