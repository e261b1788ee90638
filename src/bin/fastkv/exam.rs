//! The tasks that were chosen, and their questions.

use std::ops::Range;
use std::path::Path;

use anyhow::{Context, Result, bail};
use fastkv::eval::{
    Dialect, EvalError, FileQuestion, Key, NeedlePrompt, NeedleTask, Prose, Question, Size, Task,
    read_questions,
};
use fastkv::model::ModelDir;

use crate::exit::Usage;
use crate::reading::{Reader, Tokens};
use crate::suggest::suggestion;

/// A task and where its questions come from.
pub(crate) struct Exam {
    pub(crate) name: String,
    source: Source,
}

enum Source {
    /// In the sentences of the model's dialect; `at_depths`: planted where the depth says.
    Dialect { task: NeedleTask, at_depths: bool },
    /// Generated for any tokenizer.
    Generated(Task),
    /// Lines of a file.
    File(Vec<FileQuestion>),
}

/// What questions are made from.
pub(crate) struct Material {
    pub(crate) dialect: Option<Dialect>,
    pub(crate) prose: Prose,
    pub(crate) seed: u64,
    pub(crate) depths: Vec<f64>,
}

/// A question, as the model reads it.
pub(crate) struct Asked {
    number: u32,
    pub(crate) question: Question,
    /// Whether it went through the chat template, where the model has one.
    chat: bool,
    pub(crate) tokens: Tokens,
}

/// Tokens that an answer in a dialect may take; they are shorter.
const DIALECT_ANSWER: usize = 8;

/// The name of the task that plants at given depths, in a dialect too.
const DEPTH_MAP: &str = "depth_map";

impl Exam {
    /// The exam of a task's name: the dialect's, or one of those for any tokenizer.
    pub(crate) fn from_name(name: &str, dialect: Option<&Dialect>) -> Result<Self> {
        let source = match dialect {
            Some(dialect) if dialect.tasks().any(|task| task == name) => {
                Source::Dialect { task: dialect.task(name)?, at_depths: false }
            }
            Some(_) if name == DEPTH_MAP => {
                let task = NeedleTask { needles: 1, adjectives_drawn: None, animals_drawn: None };
                Source::Dialect { task, at_depths: true }
            }
            dialect => match Task::from_name(name) {
                Some(task) => Source::Generated(task),
                None => {
                    let of_dialect = dialect.into_iter().flat_map(Dialect::tasks);
                    let names: Vec<&str> = of_dialect.chain(Task::ALL.map(Task::name)).collect();
                    let nearest = suggestion(name, &names);
                    bail!(Usage(format!("there is no task '{name}'{nearest} ({})", names.join(", "))));
                }
            },
        };
        Ok(Self { name: name.to_owned(), source })
    }

    /// The exams of a file, one for each of its tasks, of `most` questions each at most.
    pub(crate) fn from_file(path: &Path, most: Option<u32>) -> Result<Vec<Self>> {
        let mut exams: Vec<(String, Vec<FileQuestion>)> = Vec::new();
        for question in read_questions(path)? {
            match exams.iter_mut().find(|(name, _)| *name == question.task) {
                Some((_, questions)) if most.is_some_and(|most| questions.len() >= most as usize) => {}
                Some((_, questions)) => questions.push(question),
                None => exams.push((question.task.clone(), vec![question])),
            }
        }
        Ok(exams
            .into_iter()
            .map(|(name, questions)| Self { name, source: Source::File(questions) })
            .collect())
    }

    /// How many questions it has at a length, where a generated one has `samples`.
    pub(crate) fn questions(&self, samples: u32, material: &Material) -> u32 {
        match &self.source {
            Source::File(questions) => questions.len() as u32,
            _ if self.has_depths() => samples.saturating_mul(material.depths.len() as u32),
            _ => samples,
        }
    }

    /// Tokens that an answer may take.
    pub(crate) fn answer_tokens(&self) -> usize {
        match &self.source {
            Source::Dialect { .. } => DIALECT_ANSWER,
            Source::Generated(task) => task.answer_tokens(),
            Source::File(questions) => {
                questions.iter().map(|question| question.question.answer_tokens).max().unwrap_or(0)
            }
        }
    }

    /// Tokens of a generated question.
    fn measure(&self, question: &Question, reader: &Reader) -> Result<usize, EvalError> {
        let tokens = reader.read(question, true);
        let tokens = tokens.map_err(|error| EvalError::Tokens(format!("{}: {error:#}", self.name)))?;
        Ok(tokens.len())
    }

    /// Whether its questions go by depth.
    pub(crate) fn has_depths(&self) -> bool {
        match &self.source {
            Source::Dialect { at_depths, .. } => *at_depths,
            Source::Generated(task) => task.has_depths(),
            Source::File(_) => false,
        }
    }

    /// Tokens of the longest prompt and its answer at a length.
    ///
    /// Refuses what cannot be asked, before a model is loaded.
    pub(crate) fn longest(&self, length: usize, material: &Material, reader: &Reader) -> Result<usize> {
        match &self.source {
            Source::Dialect { .. } => self.question(0, length, None, 1, material, reader).map(|_| length),
            Source::Generated(task) => {
                let measure = |question: &Question| self.measure(question, reader);
                let least = Size::least(*task, length, &material.prose, &measure);
                Ok(least.map(|_| length)?)
            }
            Source::File(questions) => {
                let mut longest = 0;
                for FileQuestion { question, chat, line, .. } in questions {
                    let at = || format!("line {line} of {}", self.name);
                    let cut = reader.cut(question, *chat, length).with_context(at)?;
                    longest = longest.max(reader.read(&cut, *chat)?.len() + question.answer_tokens);
                }
                Ok(longest)
            }
        }
    }

    /// Finds how large the prompts of a length are.
    pub(crate) fn size(&self, length: usize, material: &Material, reader: &Reader) -> Result<Option<Size>> {
        let Source::Generated(task) = self.source else { return Ok(None) };
        let measure = |question: &Question| self.measure(question, reader);
        let size = Size::find(task, length, &material.prose, &measure);
        Ok(Some(size?))
    }

    /// The question of a number, at most `length` tokens long with its answer.
    pub(crate) fn question(
        &self,
        number: u32,
        length: usize,
        size: Option<Size>,
        samples: u32,
        material: &Material,
        reader: &Reader,
    ) -> Result<Asked> {
        // A depth map goes through all samples of a depth before the next one.
        let (sample, depth) = match self.has_depths() {
            true => (number % samples, Some(material.depths[(number / samples) as usize])),
            false => (number, None),
        };
        let seed = material.seed.wrapping_mul(1 << 32).wrapping_add(u64::from(sample));
        let (mut question, chat) = match &self.source {
            Source::Dialect { task, .. } => {
                let Some(dialect) = &material.dialect else { bail!("the model has no dialect") };
                // The tokenizer's first token, and the answer.
                let beside = DIALECT_ANSWER + 1;
                let room = length.saturating_sub(beside);
                let prompt = NeedlePrompt::generate_at(dialect, *task, room, seed, depth)
                    .map_err(|error| error.among(length, beside))?;
                (prompt.into_question(DIALECT_ANSWER), false)
            }
            Source::Generated(_) => {
                let Some(size) = size else { bail!("the task {} was not sized", self.name) };
                let measure = |question: &Question| self.measure(question, reader);
                (size.question(&material.prose, seed, depth.unwrap_or(0.5), &measure)?, true)
            }
            Source::File(questions) => {
                let FileQuestion { question, chat, line, .. } = &questions[number as usize];
                let cut = reader.cut(question, *chat, length);
                (cut.with_context(|| format!("line {line} of {}", self.name))?, *chat)
            }
        };
        if depth.is_some() {
            question.depth = depth;
        }
        let tokens = reader.read(&question, chat)?;
        Ok(Asked { number, question, chat, tokens })
    }

    /// The number of one of `samples` questions that go through the depths in turn, where there are any.
    pub(crate) fn in_turn(&self, sample: u32, samples: u32, material: &Material) -> u32 {
        match self.has_depths() {
            true => (sample % material.depths.len() as u32) * samples + sample,
            false => sample,
        }
    }

    /// Whether one place of a prompt says the answer.
    pub(crate) fn has_needle(&self) -> bool {
        match &self.source {
            Source::Dialect { .. } => true,
            Source::Generated(task) => task.has_needle(),
            Source::File(_) => false,
        }
    }

    /// Which tokens of a question say its answer.
    pub(crate) fn needle(&self, asked: &Asked, reader: &Reader) -> Result<Range<usize>> {
        let needle = reader.needle(&asked.question, asked.chat)?;
        needle.with_context(|| format!("the task {} says its answer in no single place", self.name))
    }

    /// The score of an answer, and whether it is exactly right.
    pub(crate) fn score(&self, asked: &Asked, prediction: &str) -> (f64, bool) {
        let Asked { number, question, .. } = asked;
        match &self.source {
            Source::File(questions) => questions[*number as usize].score(prediction),
            _ => {
                let key = Key { references: &question.references, classes: &[] };
                (question.scoring.score(prediction, key), question.scoring.is_exact(prediction, key))
            }
        }
    }
}

/// The model's dialect, where it has one.
pub(crate) fn dialect(model: &ModelDir) -> Result<Option<Dialect>> {
    let there = model.path.join("dialect.json").exists();
    Ok(there.then(|| Dialect::from_directory(&model.path)).transpose()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_go_through_the_depths_in_turn() {
        let depths = vec![0.0, 0.5, 1.0];
        let material = Material { dialect: None, prose: Prose::default(), seed: 0, depths };
        let numbers = |name: &str| -> Vec<u32> {
            let exam = Exam::from_name(name, None).expect("a task");
            (0..5).map(|sample| exam.in_turn(sample, 5, &material)).collect()
        };
        assert_eq!(numbers("single_2"), [0, 1, 2, 3, 4]);
        // Five samples of the first depth, then those of the next.
        assert_eq!(numbers("depth_map"), [0, 5 + 1, 10 + 2, 3, 5 + 4]);
    }
}
