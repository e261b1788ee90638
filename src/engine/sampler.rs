//! From logits to the next token.

use serde::{Deserialize, Serialize};

use super::EngineError;
use crate::random::SplitMix64;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Softmax temperature; 0 takes the most likely token.
    pub temperature: f32,
    /// Draws from the smallest set of most likely tokens whose probabilities reach this sum.
    pub top_p: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    /// Greedy.
    fn default() -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0 }
    }
}

/// A stream of choices.
#[derive(Clone, Debug)]
pub struct Sampler {
    sampling: Sampling,
    random: SplitMix64,
}

impl Sampler {
    /// A sampler at the beginning of its stream.
    ///
    /// # Errors
    /// A temperature below 0 or not finite, a top-p outside (0, 1].
    pub fn new(sampling: Sampling) -> Result<Self, EngineError> {
        let Sampling { temperature, top_p, seed } = sampling;
        if !(temperature.is_finite() && temperature >= 0.0) {
            let want = "a temperature is a number from 0 (greedy) up";
            return Err(EngineError::Sampling { option: "temperature", value: temperature, want });
        }
        if !(top_p > 0.0 && top_p <= 1.0) {
            let want = "top-p is a share above 0 and at most 1";
            return Err(EngineError::Sampling { option: "top-p", value: top_p, want });
        }
        Ok(Self { sampling, random: SplitMix64::new(seed) })
    }

    /// The next token. Of equal logits the lower token is first; of none at all, 0.
    pub fn choose(&mut self, logits: &[f32]) -> u32 {
        let Sampling { temperature, top_p, .. } = self.sampling;
        if temperature == 0.0 || logits.is_empty() {
            return most_likely(logits);
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: f32| (f64::from(logit - max) / f64::from(temperature)).exp();
        let mut tokens: Vec<(u32, f64)> =
            logits.iter().enumerate().map(|(token, &logit)| (token as u32, weight(logit))).collect();
        tokens.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
        let total: f64 = tokens.iter().map(|(_, weight)| weight).sum();
        let mut nucleus = 0.0;
        let count = tokens
            .iter()
            .position(|(_, weight)| {
                nucleus += weight;
                nucleus >= f64::from(top_p) * total
            })
            .map_or(tokens.len(), |last| last + 1);
        let mut left = self.random.unit() * nucleus;
        tokens[..count]
            .iter()
            .find(|(_, weight)| {
                left -= weight;
                left < 0.0
            })
            .map_or(tokens[count - 1].0, |(token, _)| *token)
    }
}

/// The token of the largest logit; of equal ones the lowest.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32) -> Sampler {
        Sampler::new(Sampling { temperature, top_p, seed: 3 }).expect("valid")
    }

    #[test]
    fn greedy_takes_the_lowest_of_equal_logits() {
        assert_eq!(sampler(0.0, 1.0).choose(&[1.0, 3.0, 3.0]), 1);
    }

    #[test]
    fn frequencies_follow_the_softmax_and_top_p_cuts_the_tail() {
        let logits = [2.0_f32.ln(), 5.0_f32.ln(), 3.0_f32.ln()];
        let count = |top_p: f32| {
            let mut sampler = sampler(1.0, top_p);
            let mut counts = [0; 3];
            (0..20_000).for_each(|_| counts[sampler.choose(&logits) as usize] += 1);
            counts
        };
        for (count, expected) in count(1.0).into_iter().zip([4_000_i32, 10_000, 6_000]) {
            assert!((count - expected).abs() < 300, "{count} draws, {expected} expected");
        }
        let [low, high, middle] = count(0.79);
        assert_eq!(low, 0, "5/10 + 3/10 reach 0.79 without the least likely token");
        assert!((high - 12_500).abs() < 300 && (middle - 7_500).abs() < 300);
        assert_eq!(count(0.5)[1], 20_000);
    }

    #[test]
    fn same_seed_same_draws() {
        let logits = [0.1, 0.4, 0.3, 0.2];
        let draw = || (0..50).map(|_| sampler(1.5, 0.9).choose(&logits)).collect::<Vec<_>>();
        assert_eq!(draw(), draw());
    }

    #[test]
    fn parameters_out_of_range_are_named() {
        for (temperature, top_p, name) in [
            (-0.1, 1.0, "temperature is -0.1"),
            (f32::NAN, 1.0, "temperature"),
            (1.0, 0.0, "top-p is 0"),
            (1.0, 1.1, "top-p"),
        ] {
            let error = Sampler::new(Sampling { temperature, top_p, seed: 0 }).expect_err("out of range");
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
