//! Copies that go on by themselves: `cp.async`, `cp.async.bulk`, `st.async`.

use super::{Operands, Result, UNKNOWN, operands::value};
use crate::{
    isa::{Address, Op, Operand, Space, Type},
    parse::Argument,
};

pub(super) fn copy_async(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    match words {
        ["bulk", rest @ ..] => bulk(rest, o),
        ["commit_group"] => Ok(Op::CommitGroup),
        ["wait_group"] => Ok(Op::WaitGroup { pending: Some(o.immediate()? as u32) }),
        ["wait_all"] => Ok(Op::WaitGroup { pending: None }),
        ["mbarrier", "arrive", rest @ .., "b64"] => {
            let counted = !rest.starts_with(&["noinc"]);
            let space = match rest.strip_prefix(&["noinc"]).unwrap_or(rest) {
                [] => Space::Generic,
                ["shared" | "shared::cta"] => Space::Shared,
                _ => return Err(UNKNOWN.into()),
            };
            Ok(Op::BarrierCopies { space, address: o.address()?, counted })
        }
        ["ca" | "cg", "shared" | "shared::cta", "global", hints @ ..]
            if hints.iter().all(|hint| hint.starts_with("L2::")) =>
        {
            let (to, from) = (o.address()?, o.address()?);
            let bytes = o.immediate()?;
            if !(bytes == 16 || matches!(bytes, 4 | 8) && words[0] == "ca") {
                return Err("cp.async copies 4, 8 or 16 bytes, and .cg only 16".into());
            }
            let hint = hints.contains(&"L2::cache_hint");
            let (mut size, mut ignore) = (None, None);
            match o.left {
                [Argument::Predicate(_), ..] => ignore = Some(o.guard()?),
                [_, ..] if o.left.len() > usize::from(hint) => size = Some(o.value()?),
                _ => {}
            }
            if hint {
                o.value()?;
            }
            Ok(Op::CopyAsync { bytes: bytes as u32, to, from, size, ignore })
        }
        _ => Err(UNKNOWN.into()),
    }
}

/// How an mbarrier hears of bytes that arrive.
const COMPLETES: &str = "mbarrier::complete_tx::bytes";

/// `cp.async.bulk.*`.
fn bulk(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let shared = |space: &str| match space {
        "shared::cta" => Ok(Space::Shared),
        "shared::cluster" => Ok(Space::Cluster),
        _ => Err(UNKNOWN),
    };
    match words {
        ["prefetch", "L2", "global", hint @ ..] => {
            o.address()?;
            o.value()?;
            multicast(hint, Space::Global, o).map(|_| Op::Nothing)
        }
        ["prefetch", "tensor", rank, "L2", "global", rest @ ..] => {
            tensor(rank, o)?;
            multicast(rest.strip_prefix(&["tile"]).unwrap_or(rest), Space::Global, o).map(|_| Op::Nothing)
        }
        ["commit_group"] => Ok(Op::BulkCommit),
        ["wait_group"] => Ok(Op::BulkWait { pending: o.immediate()? as u32, reads: false }),
        ["wait_group", "read"] => Ok(Op::BulkWait { pending: o.immediate()? as u32, reads: true }),
        [to, from @ ("global" | "shared::cta"), COMPLETES, rest @ ..] if *to != "global" => {
            let to = shared(to)?;
            let from = if *from == "global" { Space::Global } else { Space::Shared };
            if from == Space::Shared && (to == Space::Shared || !rest.is_empty()) {
                return Err(UNKNOWN.into());
            }
            let (destination, source, bytes, barrier) =
                (o.address()?, o.address()?, o.value()?, o.address()?);
            let ctas = multicast(rest, to, o)?;
            Ok(Op::Bulk { from, to, source, destination, bytes, barrier: Some(barrier), ctas })
        }
        ["global", "shared::cta", "bulk_group"] => {
            let (destination, source, bytes) = (o.address()?, o.address()?, o.value()?);
            let (from, to) = (Space::Shared, Space::Global);
            Ok(Op::Bulk { from, to, source, destination, bytes, barrier: None, ctas: None })
        }
        ["tensor", rank, to @ ("shared::cluster" | "shared::cta"), "global", rest @ ..] => {
            let rest =
                rest.strip_prefix(&["tile"]).unwrap_or(rest).strip_prefix(&[COMPLETES]).ok_or(UNKNOWN)?;
            let shared_at = o.address()?;
            let (map, coordinates) = tensor(rank, o)?;
            let barrier = Some(o.address()?);
            let ctas = multicast(rest, shared(to)?, o)?;
            Ok(Op::BulkTensor { loads: true, shared: shared_at, map, coordinates, barrier, ctas })
        }
        ["tensor", rank, "global", "shared::cta", "bulk_group"]
        | ["tensor", rank, "global", "shared::cta", "tile", "bulk_group"] => {
            let (map, coordinates) = tensor(rank, o)?;
            let shared = o.address()?;
            Ok(Op::BulkTensor { loads: false, shared, map, coordinates, barrier: None, ctas: None })
        }
        _ => Err(UNKNOWN.into()),
    }
}

/// The mask of CTAs that a copy goes to, if it may have one, and a hint for the cache, which changes nothing here.
fn multicast(words: &[&str], to: Space, o: &mut Operands<'_>) -> Result<Option<Operand>> {
    let (many, hint) = match words {
        [] => (false, false),
        ["multicast::cluster"] => (true, false),
        ["L2::cache_hint"] => (false, true),
        ["multicast::cluster", "L2::cache_hint"] => (true, true),
        _ => return Err(UNKNOWN.into()),
    };
    if many && to != Space::Cluster {
        return Err(UNKNOWN.into());
    }
    let ctas = if many { Some(o.value()?) } else { None };
    if hint {
        o.value()?;
    }
    Ok(ctas)
}

/// `[map, {x, y}]` with as many coordinates as `2d` says.
fn tensor(rank: &str, o: &mut Operands<'_>) -> Result<(Address, Vec<Operand>)> {
    match o.next()? {
        Argument::Tensor(map, coordinates) if rank == format!("{}d", coordinates.len()) => {
            Ok((*map, coordinates.iter().map(value).collect::<Result<_>>()?))
        }
        _ => Err("this operand is a tensor map with its coordinates".into()),
    }
}

/// `st.async` to shared memory of the cluster.
pub(super) fn store_async(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let words = words.strip_prefix(&["weak"]).unwrap_or(words);
    let (space, rest) = match words {
        ["shared::cluster", COMPLETES, rest @ ..] => (Space::Cluster, rest),
        [COMPLETES, rest @ ..] => (Space::Generic, rest),
        _ => return Err(UNKNOWN.into()),
    };
    let (count, ty) = match rest {
        [ty] => (1, ty),
        ["v2", ty] => (2, ty),
        ["v4", ty] => (4, ty),
        _ => return Err(UNKNOWN.into()),
    };
    let ty = Type::parse(ty).filter(|ty| matches!(ty.bytes(), 4 | 8)).ok_or(UNKNOWN)?;
    let (address, a, barrier) = (o.address()?, o.values()?, o.address()?);
    if a.len() != count || count as u32 * ty.bytes() > 16 {
        return Err("the vector of registers has another size than the access".into());
    }
    Ok(Op::StoreAsync { space, ty, address, a, barrier })
}
