//! The clock.

use std::time::Instant;

use super::{Measurable, StageSeconds, Staged};
use crate::backend::Backend;
use crate::engine::{
    Control, Engine, EngineError, FinishReason, GenerationOptions, Prefill, PrefillOptions, Prompt, Turn,
};

/// Reads prompts together; returns what is left of them, and the seconds from the ids on the host to the logits on the
/// host, by the device's clock.
///
/// # Errors
/// As [`Engine::prefill_batch`].
pub fn prefill<B: Measurable>(
    engine: &Engine<B>,
    prompts: &[Prompt<'_>],
    options: &PrefillOptions,
    control: &Control<'_>,
) -> Result<(Vec<Prefill<B>>, f64), EngineError> {
    let backend = engine.backend();
    let begin = backend.mark()?;
    let prefills = engine.prefill_batch(prompts, options, control)?;
    let end = backend.mark()?;
    Ok((prefills, backend.seconds(&begin, &end)?))
}

/// Prompts that were read together.
#[derive(Debug)]
pub struct TimedPrefill<B: Measurable> {
    /// What is left of them.
    pub prefills: Vec<Prefill<Staged<B>>>,
    /// As of [`prefill`].
    pub seconds: f64,
    /// The same by stage; `None` where that was not taken.
    pub stages: Option<StageSeconds>,
}

/// [`prefill`] and its time by stage, where prompts have so many rows together that marks take none of it.
///
/// # Errors
/// As [`Engine::prefill_batch`].
pub fn prefill_by_stage<B: Measurable>(
    engine: &Engine<Staged<B>>,
    prompts: &[Prompt<'_>],
    options: &PrefillOptions,
    control: &Control<'_>,
    marked_rows: usize,
) -> Result<TimedPrefill<B>, EngineError> {
    let backend = engine.backend();
    let is_marked = prompts.iter().map(|prompt| prompt.ids.len()).sum::<usize>() >= marked_rows;
    if is_marked {
        backend.start()?;
    }
    let read = prefill(engine, prompts, options, control);
    // One that fails takes no time either.
    let stages = is_marked.then(|| backend.stop());
    let (prefills, seconds) = read?;
    Ok(TimedPrefill { prefills, seconds, stages: stages.transpose()? })
}

/// Answers prompts together, greedily; returns tokens per second, of all together. The first two steps, which prepare
/// what the others find (on a GPU the second is captured), do not count; `None` where no other was taken.
///
/// # Errors
/// As [`Engine::generate_batch`], and cancellation.
pub fn decode<B: Backend>(
    engine: &Engine<B>,
    prefills: &mut [Prefill<B>],
    tokens: usize,
    control: &Control<'_>,
) -> Result<Option<f64>, EngineError> {
    let options = GenerationOptions { max_tokens: tokens, ..GenerationOptions::default() };
    let uncounted = 3 * prefills.len();
    let turns = prefills.iter_mut().map(|prefill| Turn {
        cache: &mut prefill.cache,
        logits: prefill.logits.clone(),
        options: &options,
    });
    let (mut count, mut begin, mut seconds) = (0, Instant::now(), 0.0);
    let answers = engine.generate_batch(turns.collect(), control, |_, _| {
        count += 1;
        if count == uncounted {
            begin = Instant::now();
        }
        seconds = begin.elapsed().as_secs_f64();
    })?;
    if answers.iter().any(|answer| answer.finish == FinishReason::Cancelled) {
        return Err(EngineError::Cancelled);
    }
    Ok((count > uncounted && seconds > 0.0).then(|| (count - uncounted) as f64 / seconds))
}

/// The middle value, or the mean of the two in the middle.
pub fn median(values: &[f64]) -> Option<f64> {
    let mut values = values.to_vec();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        odd if odd % 2 == 1 => Some(values[middle]),
        _ => Some((values[middle - 1] + values[middle]) / 2.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::CpuBackend;
    use crate::measure::{random_engine, random_tokens, shape};
    use crate::policy::Policy;

    #[test]
    fn medians_lie_in_the_middle() {
        assert_eq!(median(&[5.0, 1.0, 3.0]), Some(3.0));
        assert_eq!(median(&[4.0, 2.0]), Some(3.0));
        assert_eq!(median(&[]), None);
    }

    #[test]
    fn steps_behind_the_first_two_have_a_rate() {
        let config = shape("tiny").expect("a shape");
        let backend = CpuBackend::new(Some(1)).expect("a thread");
        let engine = random_engine(backend, config.clone(), 1, |_| ()).expect("it fits");
        let ids = [1, 2].map(|seed| random_tokens(30, config.vocab_size, seed));
        let plan = Policy::Full.plan(engine.shape(), 30).expect("valid");
        let prompts: Vec<Prompt<'_>> = ids.iter().map(|ids| Prompt { ids, plan: &plan }).collect();
        for (tokens, has_rate) in [(0, false), (1, false), (3, false), (4, true), (8, true)] {
            let (mut prefills, seconds) =
                prefill(&engine, &prompts, &PrefillOptions::default(), &Control::default()).expect("it runs");
            assert!(seconds > 0.0 && prefills.len() == 2);
            let rate = decode(&engine, &mut prefills, tokens, &Control::default()).expect("it runs");
            assert_eq!(rate.is_some(), has_rate, "{tokens}: {rate:?}");
        }
    }
}
