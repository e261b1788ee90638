//! The arithmetic of budgets.

/// A number of tokens or a share of the prompt.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Budget {
    Tokens(usize),
    Rate(f64),
}

/// What one layer does.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Layer {
    /// Tokens it reads.
    pub(crate) rows: usize,
    /// What stays in its cache.
    pub(crate) keep: Keep,
    /// Tokens that go on, where not all do.
    pub(crate) hands_on: Option<usize>,
    /// Newest tokens that choose those, where it is not the window: PyramidInfer.
    pub(crate) recent: Option<usize>,
}

/// What stays in a cache.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Keep {
    All,
    /// This many by score or by chance, the window included.
    Chosen(usize),
    /// The first and the last.
    Ends(usize, usize),
    /// This many by score for each kv head, the window included.
    Each(Vec<usize>),
    /// This many on average, the window included, and AdaKV's α.
    Shared(usize, f64),
    /// H2O: this many, and the recent ones among them; in decoding too.
    Heavy(usize, usize),
    /// FastGen: T_rec, r_l and r_f.
    Recovered(f64, f64, f64),
}

const LARGEST_WINDOW: usize = 64;
const LARGEST_KERNEL: usize = 63;

/// `int(n · rate)`.
fn int(tokens: usize, rate: f64) -> usize {
    (tokens as f64 * rate).floor() as usize
}

fn is_rate(rate: f64) -> bool {
    rate > 0.0 && rate <= 1.0
}

/// Windows and pooling kernels that are legal.
pub(crate) fn is_observation(window: usize, kernel: usize) -> bool {
    is_window(window) && kernel % 2 == 1 && kernel <= LARGEST_KERNEL
}

pub(crate) fn is_window(window: usize) -> bool {
    window > 0 && window <= LARGEST_WINDOW
}

/// C: at least W + 1 for a rate; a constant C ≤ W is an error.
pub(crate) fn capacity(retention: Budget, n: usize, window: usize) -> Option<usize> {
    match retention {
        Budget::Rate(rate) if !is_rate(rate) => None,
        Budget::Rate(rate) => {
            let capacity = int(n, rate);
            Some(if capacity <= window { window + 1 } else { capacity })
        }
        Budget::Tokens(tokens) if tokens <= window => None,
        Budget::Tokens(tokens) => Some(tokens),
    }
}

/// T, clamped to [W, n]; a constant below W is an error.
pub(crate) fn propagated(propagation: Budget, n: usize, window: usize) -> Option<usize> {
    let tokens = match propagation {
        Budget::Rate(rate) if !is_rate(rate) => return None,
        Budget::Rate(rate) if int(n, rate) < window => window,
        Budget::Rate(rate) => int(n, rate),
        Budget::Tokens(tokens) if tokens < window => return None,
        Budget::Tokens(tokens) => tokens,
    };
    Some(if tokens > n { n } else { tokens })
}

/// A layer of n tokens is left uncompressed when n ≤ C.
fn chosen(n: usize, capacity: usize) -> Keep {
    if n <= capacity { Keep::All } else { Keep::Chosen(capacity) }
}

/// The authors' TSP layer: 15 of 32, 17 of 36, 19 of 40; 0 where there is no half.
pub(crate) fn half_depth(layers: usize) -> usize {
    match layers / 2 {
        0 => 0,
        half => half - 1,
    }
}

/// FastKV; `None` is an error.
pub(crate) fn fastkv(
    layers: usize,
    n: usize,
    (window, kernel): (usize, usize),
    retention: Budget,
    propagation: Budget,
    tsp_layer: Option<usize>,
) -> Option<Vec<Layer>> {
    let tsp_layer = tsp_layer.unwrap_or(half_depth(layers));
    if !is_observation(window, kernel) || tsp_layer >= layers || n == 0 {
        return None;
    }
    let early = capacity(retention, n, window)?;
    let t = propagated(propagation, n, window)?;
    let mut plan = Vec::new();
    for layer in 0..layers {
        if layer <= tsp_layer {
            let hands_on = layer == tsp_layer && layer + 1 < layers && t < n;
            plan.push(Layer {
                rows: n,
                keep: chosen(n, early),
                hands_on: hands_on.then_some(t),
                recent: None,
            });
            continue;
        }
        let late = match (retention, propagation) {
            (Budget::Rate(r), Budget::Rate(rho)) => {
                let rate = r / rho;
                if rate >= 1.0 { t } else { int(t, rate).max(window + 1) }
            }
            _ => early,
        };
        plan.push(Layer { rows: t, keep: chosen(t, late), hands_on: None, recent: None });
    }
    Some(plan)
}

/// SnapKV, and the random choice: every layer reads all, keeps C.
pub(crate) fn uniform(layers: usize, n: usize, window: usize, retention: Budget) -> Option<Vec<Layer>> {
    if n == 0 || !is_window(window) {
        return None;
    }
    let keep = chosen(n, capacity(retention, n, window)?);
    Some(vec![Layer { rows: n, keep, hands_on: None, recent: None }; layers])
}

/// PyramidKV, for an average of C' = C − W beside the window: each layer's share of a straight line.
pub(crate) fn pyramid(
    layers: usize,
    n: usize,
    window: usize,
    retention: Budget,
    beta: f64,
) -> Option<Vec<Layer>> {
    if n == 0 || !is_window(window) || !(1.0..=1e6).contains(&beta) {
        return None;
    }
    let c = capacity(retention, n, window)?;
    let mut plan = Vec::new();
    for l in 0..layers {
        let keep = if n <= c {
            Keep::All
        } else {
            let mean = c - window;
            let mut min = (mean as f64 / beta) as usize;
            let mut max = 2 * mean - min;
            if max >= n - window {
                max = n - window;
                // May fall below 0 where the line is not used.
                min = (2 * mean).saturating_sub(max);
            }
            let share = if layers == 1 || n < 2 * mean {
                mean
            } else {
                // max − l·(max − min)/(L − 1), a half rounded up, in integers.
                let steps = layers - 1;
                (2 * max * steps - 2 * l * (max - min) + steps) / (2 * steps)
            };
            chosen(n, window + share)
        };
        plan.push(Layer { rows: n, keep, hands_on: None, recent: None });
    }
    Some(plan)
}

/// AdaKV.
pub(crate) fn shared(
    layers: usize,
    n: usize,
    window: usize,
    retention: Budget,
    alpha: f64,
) -> Option<Vec<Layer>> {
    if n == 0 || !is_window(window) || !(0.0..=1.0).contains(&alpha) {
        return None;
    }
    let c = capacity(retention, n, window)?;
    let keep = if n <= c { Keep::All } else { Keep::Shared(c, alpha) };
    Some(vec![Layer { rows: n, keep, hands_on: None, recent: None }; layers])
}

/// HeadKV; `scores[layer][query head]` are means over samples.
pub(crate) fn by_head(
    scores: &[Vec<f64>],
    kv_heads: usize,
    n: usize,
    window: usize,
    retention: Budget,
    beta: f64,
) -> Option<Vec<Layer>> {
    if n == 0 || !is_window(window) || !(1.0..=1e6).contains(&beta) {
        return None;
    }
    let c = capacity(retention, n, window)?;
    let layers = scores.len();
    if n <= c {
        return Some(full(layers, n));
    }
    let total: f64 = scores.iter().flatten().sum();
    let b = c - window;
    let from_pool = (b as f64 / beta).floor();
    let mut plan = Vec::new();
    for scores in scores {
        let group = scores.len() / kv_heads;
        let mut counts = Vec::new();
        for head in 0..kv_heads {
            let score: f64 = scores[head * group..(head + 1) * group].iter().sum();
            let cap = score / total * from_pool * (layers * kv_heads) as f64 + (b as f64 - from_pool);
            let whole = cap.floor();
            let up = cap - whole > 0.5 || (cap - whole == 0.5 && whole as usize % 2 == 1);
            let cap = whole as usize + usize::from(up);
            counts.push(window + if cap > n - window { n - window } else { cap });
        }
        let keep = if counts.iter().all(|count| *count == n) { Keep::All } else { Keep::Each(counts) };
        plan.push(Layer { rows: n, keep, hands_on: None, recent: None });
    }
    Some(plan)
}

/// H2O: the budget is there in decoding too, so that a short prompt has the rule as well.
pub(crate) fn heavy(layers: usize, n: usize, window: usize, retention: Budget) -> Option<Vec<Layer>> {
    if n == 0 || !is_window(window) {
        return None;
    }
    let keep = Keep::Heavy(capacity(retention, n, window)?, window);
    Some(vec![Layer { rows: n, keep, hands_on: None, recent: None }; layers])
}

/// FastGen.
pub(crate) fn recovered(layers: usize, n: usize, shares: (f64, f64, f64)) -> Option<Vec<Layer>> {
    let (recovery, local, frequent) = shares;
    if n == 0 || [recovery, local, frequent].iter().any(|share| !(0.0..=1.0).contains(share)) {
        return None;
    }
    let keep = Keep::Recovered(recovery, local, frequent);
    Some(vec![Layer { rows: n, keep, hands_on: None, recent: None }; layers])
}

/// A first pass as (layer, count), where there is one, and the layers.
pub(crate) type Planned = (Option<(usize, usize)>, Vec<Layer>);

/// GemFilter: the layer that ranks and how many tokens are read anew, where not all are.
pub(crate) fn gemfilter(
    layers: usize,
    n: usize,
    filter_layer: Option<usize>,
    retention: Budget,
    kernel: usize,
) -> Option<Planned> {
    // round(13 · layers / 32), a half up, and no layer beyond the last.
    let layer = filter_layer.unwrap_or(((26 * layers + 32) / 64).min(layers - 1));
    if n == 0 || layer >= layers || !is_observation(1, kernel) {
        return None;
    }
    let c = capacity(retention, n, 0)?;
    Some(if c < n { (Some((layer, c)), full(layers, c)) } else { (None, full(layers, n)) })
}

/// PyramidInfer.
pub(crate) fn pyramid_infer(layers: usize, n: usize, recent: f64, rho: f64) -> Option<Vec<Layer>> {
    if n == 0 || !(0.0..=1.0).contains(&recent) || !(0.0..=1.0).contains(&rho) {
        return None;
    }
    let r = 1 + int(n, recent);
    let mut plan = Vec::new();
    let mut rows = n;
    for l in 0..layers {
        let c = rows.saturating_sub(r);
        let decay = (1.0 - rho) * ((std::f64::consts::PI * l as f64 / layers as f64).cos() + 1.0) / 2.0 + rho;
        let kept = int(c, decay);
        let goes_on = c > 64 && kept > 64 && kept < c && l + 1 < layers;
        let hands_on = goes_on.then_some(kept + r);
        plan.push(Layer { rows, keep: Keep::All, hands_on, recent: hands_on.map(|_| r) });
        rows = hands_on.unwrap_or(rows);
    }
    Some(plan)
}

/// StreamingLLM: the sinks and the last C − sinks, beside which at least one is always kept; C also
/// exceeds the default window of 8.
pub(crate) fn streaming(layers: usize, n: usize, sinks: usize, retention: Budget) -> Option<Vec<Layer>> {
    if n == 0 {
        return None;
    }
    let keep = match chosen(n, capacity(retention, n, if sinks > 8 { sinks } else { 8 })?) {
        Keep::Chosen(capacity) => Keep::Ends(sinks, capacity - sinks),
        other => other,
    };
    Some(vec![Layer { rows: n, keep, hands_on: None, recent: None }; layers])
}

/// TSP in front of another policy's caches: its layers for the prompt up to the TSP layer, and behind it
/// its layers for T tokens.
pub(crate) fn composed(early: &[Layer], late: &[Layer], tsp_layer: usize, t: usize) -> Vec<Layer> {
    let mut plan = Vec::new();
    for layer in 0..early.len() {
        if t == early[0].rows || tsp_layer + 1 == early.len() || layer < tsp_layer {
            plan.push(early[layer].clone());
        } else if layer == tsp_layer {
            plan.push(Layer { hands_on: Some(t), ..early[layer].clone() });
        } else {
            plan.push(late[layer].clone());
        }
    }
    plan
}

/// The rate behind the TSP layer.
pub(crate) fn late_rate(retention: Budget, propagation: Budget) -> Budget {
    match (retention, propagation) {
        (Budget::Rate(r), Budget::Rate(rho)) => Budget::Rate(if r > rho { 1.0 } else { r / rho }),
        _ => retention,
    }
}

/// Everything.
pub(crate) fn full(layers: usize, n: usize) -> Vec<Layer> {
    vec![Layer { rows: n, keep: Keep::All, hands_on: None, recent: None }; layers]
}

impl Layer {
    /// Entries of all kv heads, at most.
    pub(crate) fn entries(&self, kv_heads: usize) -> usize {
        match &self.keep {
            Keep::All => self.rows * kv_heads,
            Keep::Chosen(count) => count * kv_heads,
            Keep::Ends(first, last) => (first + last) * kv_heads,
            Keep::Each(counts) => counts.iter().sum(),
            Keep::Heavy(count, _) => self.rows.min(*count) * kv_heads,
            Keep::Recovered(..) => self.rows * kv_heads,
            // Each of the heads may be rounded up by a half.
            Keep::Shared(count, _) => (count * kv_heads + kv_heads / 2).min(self.rows * kv_heads),
        }
    }
}

/// The most bytes of K and V alive at once: a layer in full, its compacted copy where there is one, and
/// the caches before it.
pub(crate) fn peak_kv_bytes(layers: &[Layer], kv_heads: usize, bytes_of_an_entry: usize) -> usize {
    let mut peak = 0;
    for (index, layer) in layers.iter().enumerate() {
        let mut alive: usize = layers[..index].iter().map(|layer| layer.entries(kv_heads)).sum();
        alive += layer.rows * kv_heads;
        if layer.keep != Keep::All {
            alive += layer.entries(kv_heads);
        }
        peak = peak.max(alive * bytes_of_an_entry);
    }
    peak
}
