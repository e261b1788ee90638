//! Models and prompts that no file holds.

use super::Measurable;
use crate::engine::{Engine, EngineError};
use crate::model::LlamaConfig;
use crate::random::SplitMix64;

/// A model of random weights whose activations are of about one, as are its embeddings: no smaller than what the
/// layers add. `made` is told of the elements of each weight.
///
/// # Errors
/// Where there is no room for them.
pub fn random_engine<B: Measurable>(
    backend: B,
    config: LlamaConfig,
    seed: u64,
    mut made: impl FnMut(usize),
) -> Result<Engine<B>, EngineError> {
    let mut source = backend.source(seed);
    let engine = Engine::with_weights(backend, config, |backend, name, shape| {
        let fan_in = if name.contains("embed") { 1 } else { shape.last().copied().unwrap_or(1) };
        let weight = backend.random_weight(&mut source, shape, fan_in)?;
        made(shape.iter().product());
        Ok(weight)
    })?;
    engine.backend().finish()?;
    Ok(engine)
}

/// Tokens of a vocabulary, which is not empty, each as likely as any other: their attention has no ties.
pub fn random_tokens(count: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
    let mut random = SplitMix64::new(seed);
    (0..count).map(|_| random.below(vocabulary) as u32).collect()
}

/// Prompts of one length: [`random_tokens`] of this seed, of the next one, and so on.
pub fn random_prompts(count: usize, tokens: usize, vocabulary: usize, seed: u64) -> Vec<Vec<u32>> {
    let seeds = (0..count as u64).map(|prompt| seed.wrapping_add(prompt));
    seeds.map(|seed| random_tokens(tokens, vocabulary, seed)).collect()
}

/// Normal random numbers: mean 0, deviation 1.
#[derive(Clone, Debug)]
pub struct Normals(SplitMix64);

impl Normals {
    /// A seed always gives the same ones.
    pub fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }
}

impl Iterator for Normals {
    type Item = f32;

    /// By Box and Muller's transform.
    fn next(&mut self) -> Option<f32> {
        let radius = (-2.0 * (1.0 - self.0.unit()).ln()).sqrt();
        Some((radius * (std::f64::consts::TAU * self.0.unit()).cos()) as f32)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::engine::{Control, PrefillOptions};
    use crate::measure::shape;
    use crate::policy::Policy;

    #[test]
    fn normals_have_their_moments() {
        let numbers: Vec<f64> = Normals::new(3).take(100_000).map(f64::from).collect();
        let mean = |power: i32| numbers.iter().map(|number| number.powi(power)).sum::<f64>() / 1e5;
        // Five deviations of each mean: 1, √2 and √96 over √n.
        for (power, expected, deviation) in [(1, 0.0, 1.0), (2, 1.0, 1.5), (4, 3.0, 9.8)] {
            assert!(
                (mean(power) - expected).abs() < 5.0 * deviation / 1e5_f64.sqrt(),
                "{power}: {}",
                mean(power)
            );
        }
    }

    #[test]
    fn tokens_follow_their_seed_and_fill_the_vocabulary() {
        let tokens = random_tokens(4000, 100, 7);
        assert_eq!(tokens, random_tokens(4000, 100, 7));
        assert_ne!(tokens, random_tokens(4000, 100, 8));
        assert!((0..100).all(|id| tokens.contains(&id)) && tokens.iter().all(|id| *id < 100));
        let seeds = [u64::MAX, 0, 1];
        assert_eq!(random_prompts(3, 50, 100, u64::MAX), seeds.map(|seed| random_tokens(50, 100, seed)));
    }

    #[test]
    fn random_models_answer_differently_to_different_prompts() {
        let backend = CpuBackend::new(Some(1)).expect("a thread");
        let mut elements = 0;
        let config = shape("tiny").expect("a shape");
        let engine =
            random_engine(backend, config.clone(), 1, |made| elements += made as u64).expect("it fits");
        assert_eq!(elements, crate::measure::parameters(&config));
        let logits = |seed| {
            let ids = random_tokens(40, config.vocab_size, seed);
            let plan = Policy::Full.plan(engine.shape(), ids.len()).expect("valid");
            engine
                .prefill(&ids, &plan, &PrefillOptions::default(), &Control::default())
                .expect("it runs")
                .logits
        };
        let (one, two) = (logits(1), logits(2));
        let spread =
            |logits: &[f32]| logits.iter().map(|logit| logit * logit).sum::<f32>() / logits.len() as f32;
        assert_ne!(one, two);
        assert!((0.3..3.0).contains(&spread(&one)), "logits are of about one: {}", spread(&one));
    }
}
