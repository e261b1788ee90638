//! What the policies choose, from their definitions.

use super::ranking;

/// AdaKV: all heads' scores sorted together, the picks of each head counted among the best heads · C',
/// then `round(picks · (1 − α) + floor(C' · α))`, half to even.
///
/// Every head keeps its `assured` best keys beside that, which are among the ones that all share.
pub(crate) fn shared_counts(scores: &[Vec<f64>], mean: usize, assured: usize, alpha: f64) -> Vec<usize> {
    // One list, head after head: the rule for ties prefers the lower head, then the lower key.
    let together: Vec<f64> = scores.iter().flatten().copied().collect();
    let mut picks = vec![0; scores.len()];
    for place in ranking(&together).into_iter().take(mean * scores.len()) {
        picks[place / scores[0].len()] += 1;
    }
    let count = |picks: usize| {
        let more = picks.saturating_sub(assured);
        let share = more as f64 * (1.0 - alpha) + (mean.saturating_sub(assured) as f64 * alpha).floor();
        let whole = share.floor();
        let half = share - whole;
        picks - more + whole as usize + usize::from(half > 0.5 || half == 0.5 && whole as usize % 2 == 1)
    };
    picks.into_iter().map(count).collect()
}

/// H2O: the `count − window` largest column sums before the window, and the window.
pub(crate) fn heavy_hitters(sums: &[f64], count: usize, window: usize) -> Vec<usize> {
    let n = sums.len();
    if n <= count {
        return (0..n).collect();
    }
    let mut kept = super::top(&sums[..n - window], count - window);
    kept.extend(n - window..n);
    kept
}

/// What FastGen tells apart.
#[derive(Clone, Debug, Default)]
pub(crate) struct Classes {
    pub(crate) special: Vec<u32>,
    pub(crate) punctuation: Vec<u32>,
}

/// A kv head's set in FastGen: its number in order of cost (4 is everything) and its rows.
pub(crate) struct FastGenSet {
    pub(crate) set: usize,
    pub(crate) kept: Vec<usize>,
    pub(crate) recovered: [f64; 4],
}

/// FastGen of one kv head. `attention[query head of the group][query][key]`.
pub(crate) fn fastgen(
    attention: &[Vec<Vec<f64>>],
    ids: &[u32],
    positions: &[usize],
    classes: &Classes,
    forced: &[usize],
    (recovery, local, frequent): (f64, f64, f64),
) -> FastGenSet {
    let n = ids.len();
    let share = |rate: f64| (n as f64 * rate).floor() as usize;
    let special = |j: usize| positions[j] < 4 || forced.contains(&j) || classes.special.contains(&ids[j]);
    let punctuation = |j: usize| special(j) || classes.punctuation.contains(&ids[j]);
    let sums = column_sums(attention, n);
    let most_attended = super::top(&sums, share(frequent));
    let with_frequent = |j: usize| punctuation(j) || most_attended.contains(&j);
    let near = share(local);

    // Mean over the queries of all heads of the group, of what a query gives to the set.
    let mass = |in_set: &dyn Fn(usize, usize) -> bool| {
        let mut sum = 0.0;
        for head in attention {
            for (i, row) in head.iter().enumerate() {
                for (j, a) in row.iter().enumerate() {
                    if in_set(i, j) {
                        sum += a;
                    }
                }
            }
        }
        sum / (attention.len() * n) as f64
    };
    let recovered = [
        mass(&|_, j| special(j)),
        mass(&|_, j| punctuation(j)),
        mass(&|_, j| with_frequent(j)),
        mass(&|i, j| with_frequent(j) || i - j < near),
    ];
    let set = recovered.iter().position(|mass| *mass >= recovery).unwrap_or(4);
    let is_kept = |j: &usize| match set {
        0 => special(*j),
        1 => punctuation(*j),
        2 => with_frequent(*j),
        3 => with_frequent(*j) || *j >= n - near,
        _ => true,
    };
    FastGenSet { set, kept: (0..n).filter(is_kept).collect(), recovered }
}

/// The attention each key gets from all queries of a group's heads.
pub(crate) fn column_sums(attention: &[Vec<Vec<f64>>], keys: usize) -> Vec<f64> {
    let mut sums = vec![0.0; keys];
    for row in attention.iter().flatten() {
        for (j, a) in row.iter().enumerate() {
            sums[j] += a;
        }
    }
    sums
}

/// PyramidInfer: the rows that go on. `attention[query head][query][key]`; the newest `recent` queries
/// rank the rows before them with weights from 1 to 1.2, and the first 4 go on in any case.
pub(crate) fn pyramid_infer(
    attention: &[Vec<Vec<f64>>],
    count: usize,
    recent: usize,
    forced: &[usize],
) -> (Vec<usize>, f64) {
    let n = attention[0].len();
    let older = n - recent;
    let mut scores = vec![0.0; older];
    for head in attention {
        for i in 0..recent {
            let weight = if recent == 1 { 1.0 } else { 1.0 + 0.2 * i as f64 / (recent - 1) as f64 };
            for j in 0..older {
                scores[j] += weight * head[older + i][j] / attention.len() as f64;
            }
        }
    }
    let first = older.min(4);
    scores[..first].fill(f64::INFINITY);
    forced.iter().filter(|row| **row < older).for_each(|row| scores[*row] = f64::INFINITY);
    let nearest = super::margin(&scores, count - recent);
    let mut kept = super::top(&scores, count - recent);
    kept.extend(older..n);
    (kept, nearest)
}

/// GemFilter: the tokens read anew. `products[query head][key]` of the last query.
pub(crate) fn gemfilter(
    products: &[Vec<f64>],
    kernel: usize,
    count: usize,
    forced: impl Fn(usize) -> bool,
) -> (Vec<usize>, f64) {
    let sums = super::sum_lists(products);
    let mut pooled = super::pool(&sums, super::Pool::Average, kernel);
    for (token, score) in pooled.iter_mut().enumerate() {
        if forced(token) {
            *score = f64::INFINITY;
        }
    }
    (super::top(&pooled, count), super::margin(&pooled, count))
}
