//! The oracle: what the published formulas give, in plain f64 loops. Nothing here comes from the
//! crate, so that the crate can be held to it.
//!
//! A matrix is a list of rows. Scores of a head are a list over keys.

#![allow(dead_code, reason = "every test binary uses its own part")]

pub(crate) mod checkpoint;
pub(crate) mod llama;
pub(crate) mod plan;
pub(crate) mod policies;

/// Rows of numbers.
pub(crate) type Matrix = Vec<Vec<f64>>;

/// How scores are pooled along the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pool {
    /// Padded with −∞.
    Max,
    /// Padded with zeros that count in the divisor.
    Average,
}

/// `x / sqrt(mean(x²) + epsilon) · weight`.
pub(crate) fn rms_norm(x: &[f64], weight: &[f64], epsilon: f64) -> Vec<f64> {
    let mut squares = 0.0;
    for value in x {
        squares += value * value;
    }
    let root = (squares / x.len() as f64 + epsilon).sqrt();
    (0..x.len()).map(|i| x[i] / root * weight[i]).collect()
}

/// `weight · x + bias`.
pub(crate) fn linear(x: &[f64], weight: &Matrix, bias: Option<&[f64]>) -> Vec<f64> {
    (0..weight.len()).map(|out| dot(x, &weight[out]) + bias.map_or(0.0, |bias| bias[out])).collect()
}

/// `a · b`.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    let mut sum = 0.0;
    for i in 0..a.len() {
        sum += a[i] * b[i];
    }
    sum
}

/// Σ|a·b|: what rounding errors of a dot product are proportional to.
pub(crate) fn dot_of_magnitudes(a: &[f64], b: &[f64]) -> f64 {
    let magnitudes = |values: &[f64]| values.iter().map(|value| value.abs()).collect::<Vec<_>>();
    dot(&magnitudes(a), &magnitudes(b))
}

/// `silu(gate) · up`.
pub(crate) fn swiglu(gate: &[f64], up: &[f64]) -> Vec<f64> {
    (0..gate.len()).map(|i| gate[i] / (1.0 + (-gate[i]).exp()) * up[i]).collect()
}

/// Turns the pairs (i, i + d/2) of one head by `position · inverse_frequencies[i]`.
pub(crate) fn rope(head: &[f64], position: usize, inverse_frequencies: &[f64]) -> Vec<f64> {
    let half = head.len() / 2;
    let mut turned = vec![0.0; head.len()];
    for i in 0..half {
        let angle = position as f64 * inverse_frequencies[i];
        turned[i] = head[i] * angle.cos() - head[i + half] * angle.sin();
        turned[i + half] = head[i + half] * angle.cos() + head[i] * angle.sin();
    }
    turned
}

/// `softmax(query · keysᵀ / √d)` over the first `visible` keys; no keys, no probabilities.
pub(crate) fn probabilities(query: &[f64], keys: &[Vec<f64>], visible: usize) -> Vec<f64> {
    let scale = (query.len() as f64).sqrt();
    let scores: Vec<f64> = keys[..visible].iter().map(|key| dot(query, key) / scale).collect();
    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// [`probabilities`] over all of the keys, with something added to their logits.
pub(crate) fn biased_probabilities(query: &[f64], keys: &[Vec<f64>], bias: &[f64]) -> Vec<f64> {
    let scale = (query.len() as f64).sqrt();
    let mut logits = Vec::new();
    for (key, bias) in keys.iter().zip(bias) {
        logits.push(dot(query, key) / scale + bias);
    }
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - max).exp()).collect();
    let sum: f64 = weights.iter().sum();
    weights.iter().map(|weight| weight / sum).collect()
}

/// Values, weighted.
pub(crate) fn weighted(weights: &[f64], values: &[Vec<f64>]) -> Vec<f64> {
    let mut out = vec![0.0; values[0].len()];
    for (weight, value) in weights.iter().zip(values) {
        for i in 0..out.len() {
            out[i] += weight * value[i];
        }
    }
    out
}

/// Attention of one query of one head over the first `visible` keys.
pub(crate) fn attend(query: &[f64], keys: &[Vec<f64>], values: &[Vec<f64>], visible: usize) -> Vec<f64> {
    let probabilities = probabilities(query, keys, visible);
    let mut out = vec![0.0; query.len()];
    for (probability, value) in probabilities.iter().zip(values) {
        for i in 0..out.len() {
            out[i] += probability * value[i];
        }
    }
    out
}

/// Steps 1 to 3: attention probabilities of the window's queries over all keys, causal inside the
/// window, summed over the queries. `queries` belong to the last keys.
pub(crate) fn window_scores(queries: &[Vec<f64>], keys: &[Vec<f64>]) -> Vec<f64> {
    let mut sums = vec![0.0; keys.len()];
    for (row, query) in queries.iter().enumerate() {
        let visible = keys.len() - queries.len() + row + 1;
        for (key, probability) in probabilities(query, keys, visible).into_iter().enumerate() {
            sums[key] += probability;
        }
    }
    sums
}

/// Step 4: pooling, stride 1, padded by half the kernel on both sides.
pub(crate) fn pool(scores: &[f64], kind: Pool, kernel: usize) -> Vec<f64> {
    let padding = kernel as isize / 2;
    let mut pooled = Vec::new();
    for center in 0..scores.len() as isize {
        let mut max = f64::NEG_INFINITY;
        let mut sum = 0.0;
        for index in center - padding..=center + padding {
            if index >= 0 && index < scores.len() as isize {
                max = max.max(scores[index as usize]);
                sum += scores[index as usize];
            }
        }
        pooled.push(match kind {
            Pool::Max => max,
            Pool::Average => sum / kernel as f64,
        });
    }
    pooled
}

/// Sums of lists, element by element: step 5 over the heads of a group, step 8 over kv heads.
pub(crate) fn sum_lists(lists: &[Vec<f64>]) -> Vec<f64> {
    let mut sum = vec![0.0; lists[0].len()];
    for list in lists {
        for (sum, value) in sum.iter_mut().zip(list) {
            *sum += value;
        }
    }
    sum
}

/// The keys in the order of rank: by score, ties by key, NaN last.
pub(crate) fn ranking(scores: &[f64]) -> Vec<usize> {
    let mut order: Vec<usize> = Vec::new();
    for key in 0..scores.len() {
        let better = |other: usize| match (scores[other].is_nan(), scores[key].is_nan()) {
            (false, true) | (true, true) => true,
            (true, false) => false,
            (false, false) => scores[other] >= scores[key],
        };
        let place = order.iter().position(|&other| !better(other)).unwrap_or(order.len());
        order.insert(place, key);
    }
    order
}

/// The `count` best keys, ascending.
pub(crate) fn top(scores: &[f64], count: usize) -> Vec<usize> {
    let mut chosen: Vec<usize> = ranking(scores).into_iter().take(count).collect();
    chosen.sort_unstable();
    chosen
}

/// How near a choice of `count` keys was, as a share of the last chosen score: the distance from it to
/// the nearest score that differs. Equal scores are no near tie: pooling makes them from one number, and
/// the rule for ties decides.
pub(crate) fn margin(scores: &[f64], count: usize) -> f64 {
    if count == 0 || count >= scores.len() {
        return f64::INFINITY;
    }
    let threshold = scores[ranking(scores)[count - 1]];
    let distances = scores.iter().map(|score| (score - threshold).abs()).filter(|distance| *distance > 0.0);
    distances.fold(f64::INFINITY, f64::min) / threshold.abs()
}

/// Numbers in f64.
pub(crate) fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

/// Rows of `width` in f64.
pub(crate) fn matrix(values: &[f32], width: usize) -> Matrix {
    values.chunks(width).map(wide).collect()
}

/// The largest difference over the largest magnitude of `expected`; infinite where one is not a number.
pub(crate) fn relative_distance(actual: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(actual.len(), expected.len());
    if actual.iter().any(|value| !value.is_finite()) || expected.iter().any(|value| !value.is_finite()) {
        return f64::INFINITY;
    }
    let largest = expected.iter().map(|value| value.abs()).fold(0.0, f64::max);
    let distances = actual.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).abs());
    distances.fold(0.0, f64::max) / largest
}
