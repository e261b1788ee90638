//! The decode loop.

use serde::Serialize;

use super::decode::Together;
use super::{Control, Engine, EngineError, Sampler, Sampling};
use crate::backend::Backend;
use crate::cache::Cache;

/// How an answer is generated.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationOptions {
    /// Tokens at most.
    pub max_tokens: usize,
    /// How each is chosen.
    pub sampling: Sampling,
    /// Tokens that end the answer.
    pub stop_tokens: Vec<u32>,
}

/// An answer. The cache holds all its tokens but the last.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Generation {
    /// Its tokens, without the one that ended it.
    pub tokens: Vec<u32>,
    /// Why it ended.
    pub finish: FinishReason,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// As many tokens as asked for.
    MaxTokens,
    /// The model's context is full.
    ContextFull,
    /// The caller asked to stop.
    Cancelled,
}

/// A filled cache and what is to be generated behind it.
#[derive(Debug)]
pub struct Turn<'a, B: Backend> {
    /// Keys and values of all that was read.
    pub cache: &'a mut Cache<B>,
    /// The logits that its last token led to.
    pub logits: Vec<f32>,
    /// What is wanted.
    pub options: &'a GenerationOptions,
}

impl<B: Backend> Engine<B> {
    /// Generates behind a filled cache, whose last token led to these logits. `on_token` is told of
    /// every token as it comes, but for the one that ends the answer.
    ///
    /// # Errors
    /// Sampling parameters out of range, logits that are not this model's, a cache of another model or another
    /// backend, or a failure of the backend. Cancellation is no error: what was generated so far is returned.
    pub fn generate(
        &self,
        cache: &mut Cache<B>,
        logits: Vec<f32>,
        options: &GenerationOptions,
        control: &Control<'_>,
        mut on_token: impl FnMut(u32),
    ) -> Result<Generation, EngineError> {
        let turn = Turn { cache, logits, options };
        Ok(self.generate_batch(vec![turn], control, |_, token| on_token(token))?.remove(0))
    }

    /// Generates behind several caches at once: a step reads a token of each, and the weights once for all of them.
    /// Every answer is what it would be alone, up to the rounding of products of another number of rows.
    /// `on_token` is also told the number of the turn.
    ///
    /// Caches that evict while they decode, or that are steered, and those of a model whose angles change with the
    /// length (dynamic NTK), take their steps one by one.
    ///
    /// # Errors
    /// As for [`generate`](Self::generate). After a failure of the backend a cache holds the tokens before the step
    /// that failed; one whose entries could not be saved says so when it is used.
    pub fn generate_batch(
        &self,
        turns: Vec<Turn<'_, B>>,
        control: &Control<'_>,
        mut on_token: impl FnMut(usize, u32),
    ) -> Result<Vec<Generation>, EngineError> {
        let mut answers = turns.into_iter().map(|turn| self.begin(turn)).collect::<Result<Vec<_>, _>>()?;
        let total = answers.iter().map(|answer| answer.options.max_tokens).sum();
        let limit = self.config().context_limit().tokens;
        // Only the caller's own cancellation is of interest inside a step; progress is the tokens.
        let step = Control { cancel: control.cancel, progress: None };
        let mut together: Option<(Vec<usize>, Together<B>)> = None;
        let failed = loop {
            for index in 0..answers.len() {
                if let Some(token) = answers[index].choose(control) {
                    on_token(index, token);
                    control.report(answers.iter().map(|answer| answer.tokens.len()).sum(), total);
                    answers[index].end_where_full(limit);
                }
            }
            let going_on = |index: &usize| answers[*index].finish.is_none();
            let (plain, others): (Vec<usize>, Vec<usize>) = (0..answers.len())
                .filter(going_on)
                .partition(|index| self.steps_plainly(answers[*index].cache));
            if plain.is_empty() && others.is_empty() {
                break None;
            }
            let stepped = self
                .step_together(&mut answers, plain, &mut together)
                .and_then(|()| self.step_apart(&mut answers, &others, &step));
            if let Err(error) = stepped {
                break Some(error);
            }
        };
        let parted = self.part_all(&mut answers, together.take());
        match failed {
            Some(error) => Err(error),
            None => parted.map(|()| answers.into_iter().map(Answer::generation).collect()),
        }
    }

    fn begin<'a>(&self, turn: Turn<'a, B>) -> Result<Answer<'a, B>, EngineError> {
        let Turn { cache, logits, options } = turn;
        let sampler = Sampler::new(options.sampling)?;
        self.llama.check_logits(&logits)?;
        self.check_cache(cache)?;
        Ok(Answer { cache, logits, options, sampler, tokens: Vec::new(), finish: None })
    }

    /// A step of those that are named, joined as they are or anew.
    fn step_together(
        &self,
        answers: &mut [Answer<'_, B>],
        members: Vec<usize>,
        together: &mut Option<(Vec<usize>, Together<B>)>,
    ) -> Result<(), EngineError> {
        if together.as_ref().is_none_or(|(joined, steps)| *joined != members || !steps.has_room()) {
            self.part_all(answers, together.take())?;
        }
        if members.is_empty() {
            return Ok(());
        }
        let tokens: Vec<u32> =
            members.iter().flat_map(|index| answers[*index].tokens.last().copied()).collect();
        let (_, joined) = match together {
            Some(joined) => joined,
            None => {
                let left = members.iter().map(|index| answers[*index].steps_left()).max().unwrap_or(0);
                let joined = self.join(&mut caches(answers, &members), left)?;
                together.insert((members.clone(), joined))
            }
        };
        let logits = self.step(joined, &mut caches(answers, &members), &tokens)?;
        members.iter().zip(logits).for_each(|(index, logits)| answers[*index].logits = logits);
        Ok(())
    }

    /// A step of each of those that are named.
    fn step_apart(
        &self,
        answers: &mut [Answer<'_, B>],
        members: &[usize],
        control: &Control<'_>,
    ) -> Result<(), EngineError> {
        for index in members {
            let answer = &mut answers[*index];
            let Some(token) = answer.tokens.last() else { continue };
            match self.append(answer.cache, &[*token], control) {
                Err(EngineError::Cancelled) => answer.finish = Some(FinishReason::Cancelled),
                logits => answer.logits = logits?,
            }
        }
        Ok(())
    }

    fn part_all(
        &self,
        answers: &mut [Answer<'_, B>],
        together: Option<(Vec<usize>, Together<B>)>,
    ) -> Result<(), EngineError> {
        together.map_or(Ok(()), |(members, joined)| self.part(joined, &mut caches(answers, &members)))
    }
}

/// An answer on its way.
#[derive(Debug)]
struct Answer<'a, B: Backend> {
    cache: &'a mut Cache<B>,
    logits: Vec<f32>,
    options: &'a GenerationOptions,
    sampler: Sampler,
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
}

impl<B: Backend> Answer<'_, B> {
    /// The next token, unless the answer ends.
    fn choose(&mut self, control: &Control<'_>) -> Option<u32> {
        if self.finish.is_some() {
            return None;
        }
        if self.tokens.len() == self.options.max_tokens {
            self.finish = Some(FinishReason::MaxTokens);
        } else if control.check().is_err() {
            self.finish = Some(FinishReason::Cancelled);
        } else {
            let token = self.sampler.choose(&self.logits);
            if self.options.stop_tokens.contains(&token) {
                self.finish = Some(FinishReason::Stop);
            } else {
                self.tokens.push(token);
                return Some(token);
            }
        }
        None
    }

    /// Ends the answer where its last token need not, or cannot, be read.
    fn end_where_full(&mut self, limit: usize) {
        if self.tokens.len() == self.options.max_tokens {
            self.finish = Some(FinishReason::MaxTokens);
        } else if self.cache.logical_length() == limit {
            self.finish = Some(FinishReason::ContextFull);
        }
    }

    /// Tokens that may yet have to be read.
    fn steps_left(&self) -> usize {
        self.options.max_tokens - self.tokens.len()
    }

    fn generation(self) -> Generation {
        Generation { tokens: self.tokens, finish: self.finish.unwrap_or(FinishReason::MaxTokens) }
    }
}

/// The caches of some answers, whose numbers ascend.
fn caches<'p, B: Backend>(answers: &'p mut [Answer<'_, B>], members: &[usize]) -> Vec<&'p mut Cache<B>> {
    let named = answers.iter_mut().enumerate().filter(|(index, _)| members.contains(index));
    named.map(|(_, answer)| &mut *answer.cache).collect()
}
