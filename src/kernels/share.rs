//! How many keys each head keeps where all heads share a number of them: the budgets of AdaKV (arXiv 2407.11550).

use super::{
    Error, Kernel, Launch, Launcher,
    check::{Presence, apart, count, range},
};
use crate::abi::ShareKeysParams;

/// A head with `picks` of the best keys of all heads keeps
/// `min(sure + round((picks − sure) · (1 − floor) + int((mean − assured) · floor)), keys) + tail`, where `sure` is
/// `min(assured, picks)`, computed in f64 and rounded half to even.
///
/// The best keys are what [`select_topk`](super::select::select_topk) leaves of the scores of all heads as one row,
/// with a count of `mean · heads`. What comes out are the counts of a second selection, head by head, and the lengths
/// and starts of the lists that [`gather_kv`](super::gather::gather_kv) fills then: no host looks at any of it.
#[derive(Clone, Copy, Debug, Default)]
pub struct ShareKeys {
    /// Address of i32 `[count]`, ascending: the best keys of all heads, `head · keys + key`.
    pub best: u64,
    /// How many there are.
    pub count: u32,
    /// Heads that share.
    pub heads: u32,
    /// Keys of each head.
    pub keys: u32,
    /// Keys of a head on average.
    pub mean: u32,
    /// Keys among those that every head keeps beside its share: its best, such as what a caller raised above all else.
    pub assured: u32,
    /// The share of the mean that every head gets, from 0 to 1.
    pub floor: f64,
    /// Keys behind those, which every head keeps.
    pub tail: u32,
    /// Rows between a list and the next.
    pub slack: u32,
    /// Address of i32 `[heads]`: receives how many each keeps.
    pub counts: u64,
    /// Address of i64 `[heads]`: receives the first row of each list, where one lies behind the other.
    pub starts: u64,
}

impl ShareKeys {
    /// What a pick is worth, and what a head gets without one.
    fn shares(&self) -> (f64, u32) {
        (1.0 - self.floor, (f64::from(self.mean.saturating_sub(self.assured)) * self.floor).floor() as u32)
    }

    /// The most that one head can keep.
    pub fn most_of_head(&self) -> u64 {
        let (share, every) = self.shares();
        let picks = self.count.min(self.keys);
        let sure = picks.min(self.assured);
        let shared = (f64::from(picks - sure) * share + f64::from(every)).round_ties_even() as u64;
        (shared + u64::from(sure)).min(self.keys.into()) + u64::from(self.tail)
    }

    /// The most rows that all lists can take, each with its slack: every head's share is rounded, by a half at most.
    pub fn most_rows(&self) -> u64 {
        let [heads, keys, mean] = [self.heads, self.keys, self.mean].map(u64::from);
        let shared = (heads.saturating_mul(mean).saturating_add(heads / 2)).min(heads.saturating_mul(keys));
        let more = u64::from(self.tail) + u64::from(self.slack);
        shared.saturating_add(heads.saturating_mul(more))
    }
}

/// Queues the count. Without heads it launches nothing.
///
/// # Errors
/// [`Error::Argument`] for a description that cannot be right; nothing was launched then. Otherwise
/// what the device says.
///
/// # Safety
/// Every address in `work` is device memory of the size its comment states until the kernel is done. Nothing
/// else touches `counts` and `starts` meanwhile, and nothing writes the best keys.
pub unsafe fn share_keys<D: Launcher + ?Sized>(device: &D, work: &ShareKeys) -> Result<(), Error> {
    let ShareKeys { best, heads, keys, mean, floor, tail, slack, counts, starts, .. } = *work;
    if !(0.0..=1.0).contains(&floor) {
        return Err(Error::argument("floor", floor, "from 0 to 1"));
    }
    let all = u64::from(heads) * u64::from(keys);
    if all > MOST_KEYS {
        return Err(Error::argument("heads * keys", all, format!("at most {MOST_KEYS}")));
    }
    let most = all.min(u64::from(mean) * u64::from(heads));
    if u64::from(work.count) > most {
        return Err(Error::argument(
            "count",
            work.count,
            format!("at most {most}: heads * mean, and the keys"),
        ));
    }
    if heads == 0 {
        return Ok(());
    }
    let (share, every) = work.shares();
    let params = ShareKeysParams {
        best,
        counts,
        starts,
        share,
        count: count("count", work.count)?,
        heads: count("heads", heads)?,
        keys: count("keys", keys)?,
        // A head has no more keys than that, here and below.
        assured: count("assured", work.assured.min(keys))?,
        every: count("every", every.min(keys))?,
        tail: count("tail", tail)?,
        slack: count("slack", slack)?,
        reserved: 0,
    };
    if work.most_of_head() > i32::MAX as u64 {
        return Err(Error::argument(
            "tail",
            tail,
            format!("at most {} behind {keys} keys", i32::MAX as u32 - keys),
        ));
    }
    let needed = if work.count > 0 { Presence::Needed } else { Presence::Optional };
    let outputs = [
        ("counts", range("counts", counts, heads.into(), 4, Presence::Needed)?),
        ("starts", range("starts", starts, heads.into(), 8, Presence::Needed)?),
    ];
    apart(&outputs, &[("best", range("best", best, work.count.into(), 4, needed)?)])?;
    let launch = Launch {
        kernel: Kernel::ShareKeys,
        grid: [1, 1, 1],
        cluster: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 0,
        params: bytemuck::bytes_of(&params),
    };
    // SAFETY: the struct is this kernel's, and the caller vouches for the addresses in it.
    unsafe { device.launch(&launch) }
}

/// What the numbers of keys are counted in.
const MOST_KEYS: u64 = i32::MAX as u64;
