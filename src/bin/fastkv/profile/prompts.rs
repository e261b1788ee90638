//! The prompts that a model is measured by, and its answers.

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::Args;
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Engine};
use fastkv::eval::{Dialect, Prose, Size};
use fastkv::model::ModelDir;
use fastkv::policy::{ModelShape, Policy};

use crate::exam::{self, Asked, Exam, Material};
use crate::exit::Usage;
use crate::loading::ModelOptions;
use crate::reading::Reader;

/// The prompts, those of a task of `fastkv eval`, and the model.
#[derive(Args, Debug)]
pub(super) struct Prompts {
    /// Task of `fastkv eval` [default: multikey of the model's dialect; without one, multikey_1]
    #[arg(long, value_name = "TASK")]
    task: Option<String>,
    /// Tokens of a prompt and its answer at most [default: 1024 in a dialect; else 4096, or what the
    /// context takes]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,
    /// Prompts
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) samples: u32,
    /// Seed of the prompts
    #[arg(long, value_name = "SEED", default_value_t = 1)]
    prompt_seed: u64,
    /// Hide needles in this text instead of the one that comes with the program
    #[arg(long, value_name = "FILE")]
    haystack: Option<PathBuf>,
    /// Do not use the model's chat template
    #[arg(long)]
    no_chat: bool,
    #[command(flatten)]
    pub(super) model: ModelOptions,
}

/// The prompts of a task and a length, for a model.
pub(super) struct Questions {
    pub(super) exam: Exam,
    pub(super) reader: Reader,
    pub(super) length: usize,
    material: Material,
    size: Option<Size>,
    samples: u32,
}

/// An answer: of a right one the tokens up to where it is, since models may write on; else all.
#[derive(Debug, PartialEq)]
pub(super) struct Answer {
    pub(super) tokens: Vec<u32>,
    pub(super) right: bool,
}

/// Task and length, in a dialect and without one.
const DEFAULTS: [(&str, usize); 2] = [("multikey", 1024), ("multikey_1", 4096)];

/// Where `depth_map` plants, from one prompt to the next.
const DEPTHS: [f64; 5] = [0.0, 0.25, 0.5, 0.75, 1.0];

/// Tokens that an answer may have beside what is right.
const BESIDE: usize = 16;

impl Prompts {
    /// Refuses what cannot be asked, before a model is loaded, and first of all what `check` says of the task.
    pub(super) fn questions(
        &self,
        model: &ModelDir,
        check: impl FnOnce(&Exam, Option<&Dialect>) -> Result<()>,
    ) -> Result<Questions> {
        let dialect = exam::dialect(model)?;
        let (task, length) = DEFAULTS[usize::from(dialect.is_none())];
        let limit = model.config.context_limit();
        let length = self.tokens.unwrap_or(length.min(limit.tokens));
        if length > limit.tokens {
            bail!(Usage(format!("--tokens {length}: give at most {} ({})", limit.tokens, limit.reason)));
        }
        let exam = Exam::from_name(self.task.as_deref().unwrap_or(task), dialect.as_ref())?;
        check(&exam, dialect.as_ref())?;
        let prose = self.haystack.as_deref().map(Prose::from_file).transpose()?.unwrap_or_default();
        let material = Material { dialect, prose, seed: self.prompt_seed, depths: DEPTHS.to_vec() };
        let template = if self.no_chat { None } else { model.chat_template()? };
        let reader = Reader { tokenizer: model.tokenizer()?, template, query_agnostic: false };
        exam.longest(length, &material, &reader)?;
        let size = exam.size(length, &material, &reader)?;
        Ok(Questions { exam, reader, length, material, size, samples: self.samples })
    }

    /// Loads the model, once it is clear that the prompts fit into memory.
    pub(super) fn load<B: Backend>(
        &self,
        model: &ModelDir,
        backend: B,
        questions: &Questions,
        cancel: &Cancel,
    ) -> Result<Engine<B>> {
        let plan = Policy::Full.plan(ModelShape::from(&model.config), questions.length)?;
        self.model.load(model, backend, [&plan], questions.exam.answer_tokens(), false, cancel)
    }
}

impl Questions {
    /// A prompt by its number, from 0.
    pub(super) fn nth(&self, sample: u32) -> Result<Asked> {
        let Self { exam, reader, length, material, size, samples } = self;
        let number = exam.in_turn(sample, *samples, material);
        exam.question(number, *length, *size, *samples, material, reader)
    }

    /// Tokens that an answer may take: fewer than in `eval`, since what comes behind it is not looked at.
    pub(super) fn room(&self, asked: &Asked) -> Result<usize> {
        let right = self.reader.tokenizer.encode(&asked.question.references.join(", "), false)?;
        Ok((right.len() + BESIDE).min(asked.question.answer_tokens))
    }

    /// What a model wrote, as an answer.
    pub(super) fn answer(&self, asked: &Asked, tokens: Vec<u32>) -> Result<Answer> {
        Answer::new(tokens, |tokens| {
            let text = self.reader.tokenizer.decode(tokens, true)?;
            Ok(self.exam.score(asked, &text).0 == 100.0)
        })
    }
}

impl Answer {
    fn new(mut tokens: Vec<u32>, is_right: impl Fn(&[u32]) -> Result<bool>) -> Result<Self> {
        let right = is_right(&tokens)?;
        if right {
            let mut length = 0;
            while !is_right(&tokens[..length])? {
                length += 1;
            }
            tokens.truncate(length);
        }
        Ok(Self { tokens, right })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_answer_ends_where_it_is_right() {
        let answer = |tokens: &[u32]| {
            let is_right = |tokens: &[u32]| Ok(tokens.windows(2).any(|pair| pair == [7, 8]));
            Answer::new(tokens.to_vec(), is_right).expect("no error")
        };
        assert_eq!(answer(&[1, 7, 8, 2, 3]), Answer { tokens: vec![1, 7, 8], right: true });
        assert_eq!(answer(&[1, 7, 8, 2, 3]), answer(&[1, 7, 8, 7, 8]));
        assert_eq!(answer(&[1, 7, 2, 8]), Answer { tokens: vec![1, 7, 2, 8], right: false });
        assert_eq!(answer(&[]), Answer { tokens: vec![], right: false });
    }
}
