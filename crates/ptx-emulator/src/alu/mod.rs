//! Arithmetic: from the words of an opcode to a function over the lanes of a warp. Every function is
//! total, since it also runs for lanes that take no part.

mod compare;
mod convert;
mod float;
mod half;
mod integer;

pub(crate) use compare::{comparison, logic};
pub(crate) use convert::{Conversion, conversion};
pub(crate) use integer::{atomic, insert, lop3, reduction};

use crate::isa::{Binary, Ternary, Unary};

/// One argument.
macro_rules! unary {
    ($t:ty, |$a:ident| $body:expr) => {{
        fn apply(a: &Lanes) -> Lanes {
            std::array::from_fn(|lane| {
                let $a = <$t as Scalar>::get(a[lane]);
                Scalar::put($body)
            })
        }
        apply as Unary
    }};
}

/// Two arguments of a type.
macro_rules! binary {
    ($t:ty, |$a:ident, $b:ident| $body:expr) => {{
        fn apply(a: &Lanes, b: &Lanes) -> Lanes {
            std::array::from_fn(|lane| {
                let ($a, $b) = (<$t as Scalar>::get(a[lane]), <$t as Scalar>::get(b[lane]));
                Scalar::put($body)
            })
        }
        apply as Binary
    }};
}

/// Three arguments, each of its type.
macro_rules! ternary {
    (($t:ty, $u:ty, $v:ty), |$a:ident, $b:ident, $c:ident| $body:expr) => {{
        fn apply(a: &Lanes, b: &Lanes, c: &Lanes) -> Lanes {
            std::array::from_fn(|lane| {
                let $a = <$t as Scalar>::get(a[lane]);
                let $b = <$u as Scalar>::get(b[lane]);
                let $c = <$v as Scalar>::get(c[lane]);
                Scalar::put($body)
            })
        }
        apply as Ternary
    }};
    ($t:ty, |$a:ident, $b:ident, $c:ident| $body:expr) => {
        ternary!(($t, $t, $t), |$a, $b, $c| $body)
    };
}

use {binary, ternary, unary};

/// An opcode of one argument, without predicates.
pub(crate) fn one(words: &[&str]) -> Option<Unary> {
    integer::one(words).or_else(|| float::one(words)).or_else(|| half::one(words))
}

/// An opcode of two arguments.
pub(crate) fn two(words: &[&str]) -> Option<Binary> {
    integer::two(words).or_else(|| float::two(words)).or_else(|| half::two(words))
}

/// An opcode of three arguments.
pub(crate) fn three(words: &[&str]) -> Option<Ternary> {
    integer::three(words).or_else(|| float::three(words)).or_else(|| half::three(words))
}
