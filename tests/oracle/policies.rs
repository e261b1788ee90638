//! What the policies choose, from their definitions.

use super::ranking;

/// AdaKV: all heads' scores sorted together, the picks of each head counted among the best heads · C',
/// then `round(picks · (1 − α) + floor(C' · α))`, half to even.
pub(crate) fn shared_counts(scores: &[Vec<f64>], mean: usize, alpha: f64) -> Vec<usize> {
    // One list, head after head: the rule for ties prefers the lower head, then the lower key.
    let together: Vec<f64> = scores.iter().flatten().copied().collect();
    let mut picks = vec![0; scores.len()];
    for place in ranking(&together).into_iter().take(mean * scores.len()) {
        picks[place / scores[0].len()] += 1;
    }
    let count = |picks: usize| {
        let share = picks as f64 * (1.0 - alpha) + (mean as f64 * alpha).floor();
        let whole = share.floor();
        let half = share - whole;
        whole as usize + usize::from(half > 0.5 || half == 0.5 && whole as usize % 2 == 1)
    };
    picks.into_iter().map(count).collect()
}
