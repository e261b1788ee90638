//! The asking of all questions under all policies.

use std::collections::HashMap;

use anyhow::{Result, bail};
use fastkv::backend::Backend;
use fastkv::engine::{Cancel, Engine, FinishReason, GenerationOptions};
use fastkv::model::ModelDir;

use super::arms::Arm;
use super::results::{Record, Results};
use super::summary::Row;
use crate::answer::Task;
use crate::exam::{Asked, Exam, Material};
use crate::input::Prompt;
use crate::reading::Reader;
use crate::{loading, progress};

/// Score and exactness by arm, exam, length and number.
pub(super) type Answered = HashMap<(usize, usize, usize, u32), (f64, bool)>;

/// The answers of a file, each to a question of this run.
pub(super) fn answered(
    records: &[Record],
    exams: &[Exam],
    lengths: &[usize],
    arms: &[Arm],
    samples: u32,
    material: &Material,
) -> Result<Answered> {
    let mut answered = Answered::new();
    for (index, record) in records.iter().enumerate() {
        let arm = arms.iter().position(|arm| arm.is(&record.policy, &record.options));
        let exam = exams.iter().position(|exam| exam.name == record.task);
        let number = record.sample;
        let place = match (arm, exam, lengths.contains(&record.tokens)) {
            (Some(arm), Some(exam), true) if number < exams[exam].questions(samples, material) => {
                (arm, exam, record.tokens, number)
            }
            _ => bail!("--resume: line {} answers no question of this run", index + 2),
        };
        if answered.insert(place, (record.score, record.exact)).is_some() {
            bail!("--resume: line {} answers a question that is answered before it", index + 2);
        }
    }
    Ok(answered)
}

/// The asking of all questions.
pub(super) struct Run<'a, B: Backend> {
    pub(super) model: &'a ModelDir,
    pub(super) engine: &'a Engine<B>,
    pub(super) exact_shortcuts: bool,
    pub(super) reader: &'a Reader,
    pub(super) material: &'a Material,
    pub(super) samples: u32,
    pub(super) arms: &'a [Arm],
    pub(super) rows: Vec<Row>,
    /// Scores that a file has.
    pub(super) answered: Answered,
    pub(super) results: Option<Results>,
    pub(super) cancel: &'a Cancel,
}

impl<B: Backend> Run<'_, B> {
    /// Asks what is not answered yet, until Ctrl-C.
    pub(super) fn ask(
        &mut self,
        exams: &[Exam],
        lengths: &[usize],
        prompt: &mut Prompt,
        hide_progress: bool,
    ) -> Result<()> {
        let questions = exams.iter().map(|exam| u64::from(exam.questions(self.samples, self.material)));
        let all = questions.sum::<u64>() * (lengths.len() * self.arms.len()) as u64;
        let bar = progress::bar(hide_progress, all, "answering");
        for length in lengths {
            for (index, exam) in exams.iter().enumerate() {
                bar.set_message(format!("{} {length}", exam.name));
                // Sizing reads prompts of every size: not where all is answered.
                let mut size = None;
                for number in 0..exam.questions(self.samples, self.material) {
                    let place = |arm| (arm, index, *length, number);
                    let mut asked = None;
                    if (0..self.arms.len()).any(|arm| !self.answered.contains_key(&place(arm))) {
                        let known =
                            size.map_or_else(|| exam.size(*length, self.material, self.reader), Ok)?;
                        size = Some(known);
                        let &mut Self { samples, material, reader, .. } = self;
                        asked = Some(exam.question(number, *length, known, samples, material, reader)?);
                    }
                    for arm in 0..self.arms.len() {
                        let scored = match (&asked, self.answered.get(&place(arm))) {
                            (Some(asked), None) => self.answer(exam, number, *length, asked, arm, prompt)?,
                            (_, answered) => answered.copied(),
                        };
                        let Some((score, exact)) = scored else {
                            bar.finish_and_clear();
                            return Ok(());
                        };
                        self.rows[arm].add(&exam.name, *length, score, exact);
                        bar.inc(1);
                    }
                }
            }
        }
        bar.finish_and_clear();
        Ok(())
    }

    /// Asks one policy one question, and notes the answer; `None` after Ctrl-C.
    fn answer(
        &mut self,
        exam: &Exam,
        number: u32,
        length: usize,
        asked: &Asked,
        arm: usize,
        prompt: &mut Prompt,
    ) -> Result<Option<(f64, bool)>> {
        let arm = &self.arms[arm];
        let Asked { question, tokens, .. } = asked;
        prompt.ids.clone_from(&tokens.ids);
        prompt.question.clone_from(&tokens.question);
        let plan = arm.policy.plan(self.engine.shape(), tokens.ids.len())?;
        let task = Task {
            prompt,
            exact_shortcuts: self.exact_shortcuts,
            generation: GenerationOptions {
                max_tokens: question.answer_tokens,
                stop_tokens: self.model.generation.stop_tokens.clone(),
                ..Default::default()
            },
            stop_texts: Vec::new(),
            cancel: self.cancel,
        };
        let answer = task.run(self.engine, &plan, &|_| (), &mut |_| Ok(()))?;
        if answer.finish == FinishReason::Cancelled || self.cancel.is_cancelled() {
            return Ok(None);
        }
        let prediction = answer.text.unwrap_or_default();
        let (score, exact) = exam.score(asked, &prediction);
        if let Some(results) = &mut self.results {
            results.add(&Record {
                policy: arm.name.clone(),
                options: arm.options.clone(),
                retention: arm.retention.clone(),
                task: exam.name.clone(),
                tokens: length,
                sample: number,
                depth: question.depth,
                prompt_tokens: tokens.len(),
                prediction,
                references: question.references.clone(),
                score,
                exact,
                kv_kept_bytes: answer.kv_kept_bytes,
                kv_full_bytes: loading::estimate(self.model, &plan, 0, self.engine.backend()).kv_full,
                kv_peak_bytes: answer.kv_peak_bytes,
                ttft_s: answer.ttft_s,
            })?;
        }
        Ok(Some((score, exact)))
    }
}
