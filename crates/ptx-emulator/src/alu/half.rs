//! f16, bf16 and pairs of them: computed in f64, where sums are rounded to odd, and rounded once.

use super::{binary, ternary, unary};
use crate::{
    isa::{Binary, Ternary, Unary},
    number::{BF16, F16, Format, Lanes, Rounding, Scalar, add_to_odd, saturate},
};

/// Applies `f` to each of `count` 16-bit parts.
#[inline(always)]
fn parts<const N: usize>(values: [u64; N], pair: bool, f: impl Fn([u64; N]) -> u64) -> u64 {
    let low = f(values.map(|value| value & 0xffff));
    if pair { low | f(values.map(|value| value >> 16 & 0xffff)) << 16 } else { low }
}

/// One function for each of the four types.
macro_rules! types {
    ($last:expr, $make:ident, |$($x:ident),+| $f:expr) => {
        match $last {
            "f16" => Some($make!(u64, |$($x),+| parts([$($x),+], false, |x| $f(F16, x)))),
            "f16x2" => Some($make!(u64, |$($x),+| parts([$($x),+], true, |x| $f(F16, x)))),
            "bf16" => Some($make!(u64, |$($x),+| parts([$($x),+], false, |x| $f(BF16, x)))),
            "bf16x2" => Some($make!(u64, |$($x),+| parts([$($x),+], true, |x| $f(BF16, x)))),
            _ => None,
        }
    };
}

pub(super) fn one(words: &[&str]) -> Option<Unary> {
    let [name, middle @ .., last] = words else { return None };
    match (*name, middle) {
        ("neg", []) => types!(*last, unary, |a| |_: Format, [a]: [u64; 1]| a ^ 0x8000),
        ("abs", []) => types!(*last, unary, |a| |_: Format, [a]: [u64; 1]| a & 0x7fff),
        _ => None,
    }
}

pub(super) fn two(words: &[&str]) -> Option<Binary> {
    let [name, middle @ .., last] = words else { return None };
    match (*name, middle) {
        ("add", [] | ["rn"]) => types!(*last, binary, |a, b| |f, x| compute(f, x, add_to_odd)),
        ("sub", [] | ["rn"]) => types!(*last, binary, |a, b| |f, x| compute(f, x, |a, b| add_to_odd(a, -b))),
        ("mul", [] | ["rn"]) => types!(*last, binary, |a, b| |f, x| compute(f, x, |a, b| a * b)),
        ("min", []) => types!(*last, binary, |a, b| |f, x| pick(f, x, false, false)),
        ("max", []) => types!(*last, binary, |a, b| |f, x| pick(f, x, true, false)),
        ("min", ["NaN"]) => types!(*last, binary, |a, b| |f, x| pick(f, x, false, true)),
        ("max", ["NaN"]) => types!(*last, binary, |a, b| |f, x| pick(f, x, true, true)),
        _ => None,
    }
}

pub(super) fn three(words: &[&str]) -> Option<Ternary> {
    let [name, middle @ .., last] = words else { return None };
    match (*name, middle) {
        ("fma", ["rn"]) => types!(*last, ternary, |a, b, c| |f, x| fused(f, x, |value| value)),
        ("fma", ["rn", "relu"]) => types!(*last, ternary, |a, b, c| |f, x| fused(f, x, relu)),
        ("fma", ["rn", "sat"]) => types!(*last, ternary, |a, b, c| |f, x| fused(f, x, saturate)),
        _ => None,
    }
}

fn compute(format: Format, [a, b]: [u64; 2], f: impl Fn(f64, f64) -> f64) -> u64 {
    format.encode(f(format.decode(a), format.decode(b)), Rounding::Nearest)
}

fn fused(format: Format, x: [u64; 3], finish: impl Fn(f64) -> f64) -> u64 {
    let [a, b, c] = x.map(|bits| format.decode(bits));
    format.encode(finish(add_to_odd(a * b, c)), Rounding::Nearest)
}

fn relu(value: f64) -> f64 {
    if value < 0.0 { 0.0 } else { value }
}

fn pick(format: Format, [a, b]: [u64; 2], greater: bool, nan: bool) -> u64 {
    let (x, y) = (format.decode(a), format.decode(b));
    if x.is_nan() || y.is_nan() {
        return match (x.is_nan(), y.is_nan()) {
            (true, false) if !nan => b,
            (false, true) if !nan => a,
            _ => format.encode(f64::NAN, Rounding::Nearest),
        };
    }
    let a_is_less = x < y || x == y && x.is_sign_negative();
    if a_is_less == greater { b } else { a }
}
