//! f32 and f64. Results that are exactly rounded on a GPU are so here.

use super::{binary, ternary, unary};
use crate::{
    isa::{Binary, Ternary, Unary, rounding},
    number::{F32, Lanes, Rounding, Scalar, add_to_odd, flush, saturate},
};

/// The suffixes between name and type.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
struct Suffixes {
    rounding: Option<Rounding>,
    flush: bool,
    saturate: bool,
    nan: bool,
    xorsign: bool,
    approximate: bool,
}

fn suffixes(words: &[&str]) -> Option<Suffixes> {
    let mut found = Suffixes::default();
    for word in words {
        match *word {
            "ftz" => found.flush = true,
            "sat" => found.saturate = true,
            "NaN" => found.nan = true,
            "xorsign" => found.xorsign = true,
            "approx" | "full" => found.approximate = true,
            "abs" if found.xorsign => {}
            word => found.rounding = Some(rounding(word)?),
        }
    }
    Some(found)
}

/// One function for each combination of flushing and saturation that may be asked for.
macro_rules! variants {
    ($make:ident, $s:expr, |$($x:ident),+| $body:expr) => {
        match ($s.flush, $s.saturate) {
            (false, false) => $make!(f32, |$($x),+| $body),
            (true, false) => $make!(f32, |$($x),+| { $(let $x = flush($x);)+ flush($body) }),
            (false, true) => $make!(f32, |$($x),+| saturate(f64::from($body)) as f32),
            (true, true) => $make!(f32, |$($x),+| {
                $(let $x = flush($x);)+
                saturate(f64::from(flush($body))) as f32
            }),
        }
    };
}

/// The same with a rounding other than to nearest, from a result that is exact or rounded to odd.
macro_rules! directed {
    ($make:ident, $s:expr, |$($x:ident),+| $body:expr) => {{
        macro_rules! toward {
            ($mode:expr) => {{
                const MODE: Rounding = $mode;
                variants!($make, $s, |$($x),+| {
                    $(let $x = f64::from($x);)+
                    f32::from_bits(F32.encode($body, MODE) as u32)
                })
            }};
        }
        match $s.rounding {
            Some(Rounding::Zero) => Some(toward!(Rounding::Zero)),
            Some(Rounding::Down) => Some(toward!(Rounding::Down)),
            Some(Rounding::Up) => Some(toward!(Rounding::Up)),
            _ => None,
        }
    }};
}

fn nearest(suffixes: Suffixes) -> bool {
    matches!(suffixes.rounding, None | Some(Rounding::Nearest))
}

pub(super) fn one(words: &[&str]) -> Option<Unary> {
    let [name, middle @ .., last] = words else { return None };
    let s = suffixes(middle)?;
    match (*name, *last) {
        ("neg", "f32") => Some(if s.flush {
            unary!(u32, |a| flush(f32::from_bits(a)).to_bits() ^ 0x8000_0000)
        } else {
            unary!(u32, |a| a ^ 0x8000_0000)
        }),
        ("abs", "f32") => Some(if s.flush {
            unary!(u32, |a| flush(f32::from_bits(a)).to_bits() & 0x7fff_ffff)
        } else {
            unary!(u32, |a| a & 0x7fff_ffff)
        }),
        ("neg", "f64") => Some(unary!(u64, |a| a ^ 1 << 63)),
        ("abs", "f64") => Some(unary!(u64, |a| a & !(1 << 63))),
        ("sqrt", "f32") if s.rounding == Some(Rounding::Nearest) => Some(variants!(unary, s, |a| a.sqrt())),
        ("rcp", "f32") if s.rounding == Some(Rounding::Nearest) => Some(variants!(unary, s, |a| 1.0 / a)),
        ("sqrt", "f64") if s.rounding == Some(Rounding::Nearest) => Some(unary!(f64, |a| a.sqrt())),
        ("rcp", "f64") if s.rounding == Some(Rounding::Nearest) => Some(unary!(f64, |a| 1.0 / a)),
        _ => None,
    }
}

pub(super) fn two(words: &[&str]) -> Option<Binary> {
    let [name, middle @ .., last] = words else { return None };
    let s = suffixes(middle)?;
    if s.approximate {
        return None;
    }
    match (*name, *last) {
        ("add", "f32") if nearest(s) => Some(variants!(binary, s, |a, b| a + b)),
        ("sub", "f32") if nearest(s) => Some(variants!(binary, s, |a, b| a - b)),
        ("mul", "f32") if nearest(s) => Some(variants!(binary, s, |a, b| a * b)),
        ("div", "f32") if s.rounding == Some(Rounding::Nearest) => Some(variants!(binary, s, |a, b| a / b)),
        ("add", "f32") => directed!(binary, s, |a, b| sum(a, b, MODE)),
        ("sub", "f32") => directed!(binary, s, |a, b| sum(a, -b, MODE)),
        ("mul", "f32") => directed!(binary, s, |a, b| a * b),
        ("min", "f32") if !s.xorsign => Some(if s.nan {
            variants!(binary, s, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { least(a, b) })
        } else {
            variants!(binary, s, |a, b| least(a, b))
        }),
        ("max", "f32") if !s.xorsign => Some(if s.nan {
            variants!(binary, s, |a, b| if a.is_nan() || b.is_nan() { f32::NAN } else { -least(-a, -b) })
        } else {
            variants!(binary, s, |a, b| -least(-a, -b))
        }),
        ("copysign", "f32") => Some(binary!(u32, |a, b| a & 0x8000_0000 | b & 0x7fff_ffff)),
        ("add", "f64") if nearest(s) => Some(binary!(f64, |a, b| a + b)),
        ("sub", "f64") if nearest(s) => Some(binary!(f64, |a, b| a - b)),
        ("mul", "f64") if nearest(s) => Some(binary!(f64, |a, b| a * b)),
        ("div", "f64") if s.rounding == Some(Rounding::Nearest) => Some(binary!(f64, |a, b| a / b)),
        ("min", "f64") => Some(binary!(f64, |a, b| a.min(b))),
        ("max", "f64") => Some(binary!(f64, |a, b| a.max(b))),
        _ => None,
    }
}

pub(super) fn three(words: &[&str]) -> Option<Ternary> {
    let [name, middle @ .., last] = words else { return None };
    let s = suffixes(middle)?;
    match (*name, *last) {
        ("fma" | "mad", "f32") if nearest(s) => Some(variants!(ternary, s, |a, b, c| a.mul_add(b, c))),
        ("fma" | "mad", "f32") => directed!(ternary, s, |a, b, c| sum(a * b, c, MODE)),
        ("fma" | "mad", "f64") if nearest(s) => Some(ternary!(f64, |a, b, c| a.mul_add(b, c))),
        _ => None,
    }
}

/// A sum that is still to be rounded. One that is exactly 0 is -0 where rounding goes down.
fn sum(a: f64, b: f64, rounding: Rounding) -> f64 {
    let sum = add_to_odd(a, b);
    let both_positive = a.is_sign_positive() && b.is_sign_positive();
    if sum == 0.0 && rounding == Rounding::Down && !both_positive { -0.0 } else { sum }
}

/// The lesser number; a NaN loses, and -0 is less than +0.
fn least(a: f32, b: f32) -> f32 {
    if a.is_nan() {
        b
    } else if b.is_nan() || a < b || a == b && a.is_sign_negative() {
        a
    } else {
        b
    }
}
