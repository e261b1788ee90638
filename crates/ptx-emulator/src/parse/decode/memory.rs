//! Loads, stores and atomics: their spaces, orders and types.

use super::{Operands, Result, UNKNOWN};
use crate::{
    alu,
    isa::{AtomicUpdate, Op, Order, Space, Type},
};

/// The words behind `ld` or `st`.
pub(super) struct Access {
    pub(super) space: Space,
    pub(super) ty: Type,
    pub(super) order: Order,
    pub(super) constant: bool,
    pub(super) count: usize,
    /// Whether a hint for the cache follows the operands.
    pub(super) hint: bool,
}

pub(super) fn access(words: &[&str]) -> Result<Access> {
    let mut found = Access {
        space: Space::Generic,
        ty: Type::B32,
        order: Order::Weak,
        constant: false,
        count: 1,
        hint: false,
    };
    let (ty, middle) = words.split_last().ok_or(UNKNOWN)?;
    found.ty = Type::parse(ty).filter(|ty| *ty != Type::Pred && *ty != Type::B128).ok_or(UNKNOWN)?;
    for word in middle {
        match *word {
            "global" => found.space = Space::Global,
            "shared" | "shared::cta" => found.space = Space::Shared,
            "shared::cluster" => found.space = Space::Cluster,
            "local" => found.space = Space::Local,
            "const" => found.space = Space::Const,
            "param" | "param::entry" => found.space = Space::Param,
            "volatile" | "relaxed" | "mmio" => found.order = Order::Relaxed,
            "acquire" => found.order = Order::Acquire,
            "release" => found.order = Order::Release,
            "nc" => found.constant = true,
            "v2" => found.count = 2,
            "v4" => found.count = 4,
            // Scopes: any two threads of a launch are taken to be in each other's.
            "weak" | "cta" | "cluster" | "gpu" | "sys" => {}
            // Where caches keep it shows in time alone.
            "ca" | "cg" | "cs" | "lu" | "cv" | "wb" | "wt" => {}
            "L2::cache_hint" => found.hint = true,
            hint if hint.starts_with("L1::") || hint.starts_with("L2::") => {}
            _ => return Err(UNKNOWN.into()),
        }
    }
    Ok(found)
}

pub(super) fn atomic(returns: bool, words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let (ty, middle) = words.split_last().ok_or(UNKNOWN)?;
    let ty = Type::parse(ty).ok_or(UNKNOWN)?;
    let mut space = Space::Generic;
    let mut order = Order::Relaxed;
    let mut name = None;
    for word in middle {
        match *word {
            "global" => space = Space::Global,
            "shared" | "shared::cta" => space = Space::Shared,
            "shared::cluster" => space = Space::Cluster,
            "relaxed" => order = Order::Relaxed,
            "acquire" => order = Order::Acquire,
            "release" => order = Order::Release,
            "acq_rel" => order = Order::AcquireRelease,
            "cta" | "cluster" | "gpu" | "sys" => {}
            word if name.is_none() => name = Some(word),
            _ => return Err(UNKNOWN.into()),
        }
    }
    let name = name.ok_or(UNKNOWN)?;
    let d = if returns { o.registers()?.first().copied().flatten() } else { None };
    let address = o.address()?;
    let b = o.value()?;
    let update = if name == "cas" && matches!(ty, Type::B16 | Type::B32 | Type::B64) {
        let new = o.value()?;
        return Ok(Op::Atomic { space, ty, order, update: AtomicUpdate::CompareSwap(b), d, address, b: new });
    } else {
        alu::atomic(name, ty).ok_or(UNKNOWN)?
    };
    Ok(Op::Atomic { space, ty, order, update: AtomicUpdate::Apply(update), d, address, b })
}
