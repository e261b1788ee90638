//! Barriers of a CTA, of a cluster, and in shared memory.

use super::{Operands, Result, UNKNOWN};
use crate::isa::{Op, Operand, Reduce, Space};

/// `bar.*` is aligned, `barrier.*` where it says so.
pub(super) fn barrier(always_aligned: bool, words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let words: Vec<&str> = words.iter().copied().filter(|word| *word != "cta").collect();
    let aligned = always_aligned || words.contains(&"aligned");
    let words: Vec<&str> = words.into_iter().filter(|word| *word != "aligned").collect();
    match words.as_slice() {
        ["warp", "sync"] => Ok(Op::WarpSync { mask: o.value()? }),
        ["sync"] => {
            let id = o.value()?;
            let threads = if o.is_empty() { None } else { Some(o.value()?) };
            Ok(Op::Barrier { waits: true, aligned, id, threads, reduce: None })
        }
        ["arrive"] => {
            let (id, threads) = (o.value()?, Some(o.value()?));
            Ok(Op::Barrier { waits: false, aligned, id, threads, reduce: None })
        }
        ["red", how, _] => {
            let how = match *how {
                "popc" => Reduce::Count,
                "and" => Reduce::And,
                "or" => Reduce::Or,
                _ => return Err(UNKNOWN.into()),
            };
            let d = if how == Reduce::Count { o.register()? } else { o.predicate()? };
            let id = o.value()?;
            let threads = if o.left.len() > 1 { Some(o.value()?) } else { None };
            Ok(Op::Barrier { waits: true, aligned, id, threads, reduce: Some((how, d, o.guard()?)) })
        }
        _ => Err(UNKNOWN.into()),
    }
}

pub(super) fn mbarrier(words: &[&str], o: &mut Operands<'_>) -> Result<Op> {
    let space = match () {
        () if words.contains(&"shared::cluster") => Space::Cluster,
        () if words.iter().any(|word| matches!(*word, "shared" | "shared::cta")) => Space::Shared,
        () => Space::Generic,
    };
    // Beside the space, orders and scopes that are the defaults, or as good as they are.
    let kept = |word: &&&str| {
        let (space, order) =
            (word.starts_with("shared"), matches!(**word, "release" | "acquire" | "cta" | "cluster"));
        !(space || order || **word == "b64")
    };
    let relaxed = words.contains(&"relaxed");
    let names: Vec<&str> = words.iter().filter(kept).copied().filter(|word| *word != "relaxed").collect();
    // Only what counts bytes may be relaxed: it orders nothing here anyway.
    if relaxed && !matches!(names.as_slice(), ["expect_tx" | "complete_tx"]) {
        return Err(UNKNOWN.into());
    }
    match names.as_slice() {
        ["init"] => Ok(Op::BarrierInit { space, address: o.address()?, count: o.value()? }),
        ["inval"] => Ok(Op::BarrierInvalidate { space, address: o.address()? }),
        ["expect_tx"] => Ok(Op::BarrierExpect { space, address: o.address()?, bytes: o.value()? }),
        ["complete_tx"] => Ok(Op::BarrierComplete { space, address: o.address()?, bytes: o.value()? }),
        ["arrive" | "arrive_drop", rest @ ..] => {
            let drop = names[0] == "arrive_drop";
            let state = o.registers()?.first().copied().flatten();
            if state.is_some() && space == Space::Cluster {
                return Err("an arrival in shared::cluster gives no state, so `_` stands there".into());
            }
            let address = o.address()?;
            let (complete, expect) = match rest {
                [] => (true, None),
                ["noComplete"] => (false, None),
                ["expect_tx"] => (true, Some(o.value()?)),
                _ => return Err(UNKNOWN.into()),
            };
            let count = if o.is_empty() || expect.is_some() { Operand::Immediate(1) } else { o.value()? };
            Ok(Op::BarrierArrive { space, address, state, count, expect, drop, complete })
        }
        ["test_wait" | "try_wait", rest @ ..] => {
            let parity = match rest {
                [] => false,
                ["parity"] => true,
                _ => return Err(UNKNOWN.into()),
            };
            let blocks = names[0] == "try_wait";
            let p = o.predicate()?;
            let (address, phase) = (o.address()?, o.value()?);
            if blocks && !o.is_empty() {
                o.value()?;
            }
            Ok(Op::BarrierTest { space, address, p, phase, parity, blocks })
        }
        _ => Err(UNKNOWN.into()),
    }
}

/// `barrier.cluster.*`.
pub(super) fn cluster_barrier(words: &[&str]) -> Result<Op> {
    let aligned = words.last() == Some(&"aligned");
    match if aligned { &words[..words.len() - 1] } else { words } {
        ["arrive"] | ["arrive", "release"] => Ok(Op::ClusterArrive { aligned, releases: true }),
        ["arrive", "relaxed"] => Ok(Op::ClusterArrive { aligned, releases: false }),
        ["wait"] | ["wait", "acquire"] => Ok(Op::ClusterWait { aligned }),
        _ => Err(UNKNOWN.into()),
    }
}
