//! How many units fill a length.

use super::{Question, Task};
use crate::eval::{EvalError, Prose};

/// Counts the tokens of a question, as a model will read it.
pub type Measure<'a> = dyn Fn(&Question) -> Result<usize, EvalError> + 'a;

/// The largest prompts of a task within a length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    task: Task,
    /// Tokens of a prompt and its answer at most.
    length: usize,
    /// Units that fill the length with the seed they were measured with.
    units: usize,
    tokens_per_unit: f64,
}

/// Units between the two prompts that tokens per unit are measured by.
const STEP: usize = 50;

/// How often a sample is cut before it is given up.
const CUTS: usize = 32;

impl Size {
    /// Tokens of a task's shortest prompt and its answer.
    ///
    /// # Errors
    /// [`EvalError::TooShort`] where that is more than `length`, or what `measure` says.
    pub fn least(
        task: Task,
        length: usize,
        prose: &Prose,
        measure: &Measure<'_>,
    ) -> Result<usize, EvalError> {
        let shortest = task.question(prose, length, task.units().0, 0, 0.5)?;
        let least = measure(&shortest)? + task.answer_tokens();
        if least <= length {
            Ok(least)
        } else {
            Err(EvalError::TooShort { task: task.name(), length, least })
        }
    }

    /// Finds how many units fill `length` tokens, the answer's included, by bisection.
    ///
    /// # Errors
    /// As for [`least`](Self::least).
    pub fn find(task: Task, length: usize, prose: &Prose, measure: &Measure<'_>) -> Result<Self, EvalError> {
        let (fewest, most) = task.units();
        let tokens = |units: usize| measure(&task.question(prose, length, units, 0, 0.5)?);
        let least = Self::least(task, length, prose, measure)? - task.answer_tokens();
        let room = length - task.answer_tokens();
        let step = STEP.min(most - fewest).max(1);
        let tokens_per_unit = (tokens(fewest.saturating_add(step).min(most))?.saturating_sub(least) as f64
            / step as f64)
            .max(0.01);
        let guess = fewest.saturating_add(((room - least) as f64 / tokens_per_unit) as usize);
        // `fits` does fit; `too_many` does not, or there are no more.
        let (mut fits, mut too_many) = (fewest, most.saturating_add(1));
        let margin = 2 + guess / 64;
        let mut above = guess.saturating_add(margin);
        while above < too_many {
            if tokens(above)? <= room {
                fits = above;
                above = above.saturating_mul(2);
            } else {
                too_many = above;
            }
        }
        let mut next = guess.saturating_sub(margin);
        while too_many - fits > 1 {
            next = if (fits + 1..too_many).contains(&next) { next } else { fits + (too_many - fits) / 2 };
            if tokens(next)? <= room {
                fits = next;
            } else {
                too_many = next;
            }
        }
        Ok(Self { task, length, units: fits, tokens_per_unit })
    }

    /// The prompt of a seed: units are taken off until it fits.
    ///
    /// # Errors
    /// [`EvalError::NothingFits`] where that takes too long, or what `measure` says.
    pub fn question(
        &self,
        prose: &Prose,
        seed: u64,
        depth: f64,
        measure: &Measure<'_>,
    ) -> Result<Question, EvalError> {
        let Self { task, length, tokens_per_unit, .. } = *self;
        let fewest = task.units().0;
        let mut units = self.units;
        for _ in 0..CUTS {
            let question = task.question(prose, length, units, seed, depth)?;
            let over = (measure(&question)? + task.answer_tokens()).saturating_sub(length);
            if over == 0 {
                return Ok(question);
            }
            if units == fewest {
                break;
            }
            units = units.saturating_sub(((over as f64 / tokens_per_unit) as usize).max(1)).max(fewest);
        }
        Err(EvalError::NothingFits { task: task.name(), length, seed })
    }
}
