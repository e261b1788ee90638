//! Comparisons: one bit for each lane.

use std::cmp::Ordering;

use crate::{
    isa::{Compare, Logic, Type},
    number::{BF16, F16, Lanes, Scalar, flush},
};

macro_rules! compare {
    ($t:ty, |$a:ident, $b:ident| $body:expr) => {{
        fn apply(a: &Lanes, b: &Lanes) -> u32 {
            let mut bits = 0;
            for lane in 0..32 {
                let ($a, $b) = (<$t as Scalar>::get(a[lane]), <$t as Scalar>::get(b[lane]));
                bits |= u32::from($body) << lane;
            }
            bits
        }
        apply as Compare
    }};
}

/// `setp.eq.u32`: the words `eq`, `u32`.
pub(crate) fn comparison(operator: &str, ty: Type, ftz: bool) -> Option<Compare> {
    macro_rules! integers {
        (|$a:ident, $b:ident| $body:expr) => {
            match ty {
                Type::B16 | Type::U16 => Some(compare!(u16, |$a, $b| $body)),
                Type::B32 | Type::U32 => Some(compare!(u32, |$a, $b| $body)),
                Type::B64 | Type::U64 => Some(compare!(u64, |$a, $b| $body)),
                Type::S16 => Some(compare!(i16, |$a, $b| $body)),
                Type::S32 => Some(compare!(i32, |$a, $b| $body)),
                Type::S64 => Some(compare!(i64, |$a, $b| $body)),
                _ => None,
            }
        };
    }
    macro_rules! floats {
        (|$a:ident, $b:ident| $body:expr) => {
            match ty {
                Type::F16 => Some(compare!(u64, |a, b| {
                    let ($a, $b) = (F16.decode(a), F16.decode(b));
                    $body
                })),
                Type::BF16 => Some(compare!(u64, |a, b| {
                    let ($a, $b) = (BF16.decode(a), BF16.decode(b));
                    $body
                })),
                Type::F32 if ftz => Some(compare!(f32, |a, b| {
                    let ($a, $b) = (flush(a), flush(b));
                    $body
                })),
                Type::F32 => Some(compare!(f32, |$a, $b| $body)),
                Type::F64 => Some(compare!(f64, |$a, $b| $body)),
                _ => None,
            }
        };
    }
    let is_float = matches!(ty, Type::F16 | Type::BF16 | Type::F32 | Type::F64);
    if is_float {
        return match operator {
            "eq" => floats!(|a, b| a == b),
            "ne" => floats!(|a, b| a.partial_cmp(&b).is_some_and(Ordering::is_ne)),
            "lt" => floats!(|a, b| a < b),
            "le" => floats!(|a, b| a <= b),
            "gt" => floats!(|a, b| a > b),
            "ge" => floats!(|a, b| a >= b),
            "equ" => floats!(|a, b| a.partial_cmp(&b).is_none_or(Ordering::is_eq)),
            "neu" => floats!(|a, b| a != b),
            "ltu" => floats!(|a, b| a < b || a.is_nan() || b.is_nan()),
            "leu" => floats!(|a, b| a <= b || a.is_nan() || b.is_nan()),
            "gtu" => floats!(|a, b| a > b || a.is_nan() || b.is_nan()),
            "geu" => floats!(|a, b| a >= b || a.is_nan() || b.is_nan()),
            "num" => floats!(|a, b| !a.is_nan() && !b.is_nan()),
            "nan" => floats!(|a, b| a.is_nan() || b.is_nan()),
            _ => None,
        };
    }
    match operator {
        "eq" => integers!(|a, b| a == b),
        "ne" => integers!(|a, b| a != b),
        "lt" | "lo" => integers!(|a, b| a < b),
        "le" | "ls" => integers!(|a, b| a <= b),
        "gt" | "hi" => integers!(|a, b| a > b),
        "ge" | "hs" => integers!(|a, b| a >= b),
        _ => None,
    }
}

pub(crate) fn logic(word: &str) -> Option<Logic> {
    Some(match word {
        "and" => Logic::And,
        "or" => Logic::Or,
        "xor" => Logic::Xor,
        _ => return None,
    })
}
