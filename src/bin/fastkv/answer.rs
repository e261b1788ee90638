//! One prompt, one plan, one answer, and what it took.

use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;
use fastkv::backend::Backend;
use fastkv::engine::{
    Cancel, Control, Engine, FinishReason, GenerationOptions, PrefillOptions, Progress, Sampler, Sampling,
};
use fastkv::model::{ModelDir, TextStream, Tokenizer};
use fastkv::policy::Plan;
use serde::Serialize;

use crate::exit::{self, Usage};
use crate::input::Prompt;

/// How an answer is generated.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Answer")]
pub(crate) struct AnswerOptions {
    /// Compress the prompt alone, then read this question behind it and answer
    #[arg(long, value_name = "TEXT")]
    pub(crate) question: Option<String>,
    /// Tokens of the answer at most
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: usize,
    /// Softmax temperature; 0 takes the most likely token
    #[arg(long, default_value_t = 0.0, allow_negative_numbers = true)]
    temperature: f32,
    /// Draw from the most likely tokens whose probabilities reach this sum
    #[arg(long, default_value_t = 1.0, allow_negative_numbers = true)]
    top_p: f32,
    /// Seed of the draws
    #[arg(long, value_name = "SEED", default_value_t = 0)]
    sampling_seed: u64,
    /// Also end the answer at this text or token id, which is left out; may be repeated
    #[arg(long, value_name = "TEXT|ID")]
    pub(crate) stop: Vec<String>,
}

impl AnswerOptions {
    /// The sampling parameters, checked.
    pub(crate) fn sampling(&self) -> Result<Sampling> {
        let Self { temperature, top_p, sampling_seed: seed, .. } = *self;
        let sampling = Sampling { temperature, top_p, seed };
        Sampler::new(sampling)?;
        Ok(sampling)
    }
}

/// How a prompt is answered, whatever the policy.
#[derive(Debug)]
pub(crate) struct Task<'a> {
    pub(crate) prompt: &'a Prompt,
    pub(crate) exact_shortcuts: bool,
    pub(crate) generation: GenerationOptions,
    pub(crate) stop_texts: Vec<String>,
    pub(crate) cancel: &'a Cancel,
}

/// An answer and its figures; those that the run did not get to are `None`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Answer {
    /// Its tokens, without the one that ended it.
    pub(crate) tokens: Vec<u32>,
    /// Its text, where the model has a tokenizer.
    pub(crate) text: Option<String>,
    pub(crate) finish: FinishReason,
    /// Seconds from the first token read to the choice of the first one written.
    pub(crate) ttft_s: Option<f64>,
    pub(crate) decode_tokens_per_s: Option<f64>,
    /// Bytes of the KV cache behind the prompt, the question not counted.
    pub(crate) kv_kept_bytes: Option<usize>,
    /// The most bytes of keys and values alive at once in prefill.
    pub(crate) kv_peak_bytes: Option<usize>,
}

impl<'a> Task<'a> {
    /// The task that the options ask for.
    pub(crate) fn new(
        model: &ModelDir,
        prompt: &'a Prompt,
        options: &AnswerOptions,
        exact_shortcuts: bool,
        cancel: &'a Cancel,
    ) -> Result<Self> {
        let (generation, stop_texts) = generation(model, prompt.tokenizer.as_ref(), options)?;
        Ok(Self { prompt, exact_shortcuts, generation, stop_texts, cancel })
    }

    /// Reads and answers. Cancelled, it returns what there is by then.
    pub(crate) fn run<B: Backend>(
        &self,
        engine: &Engine<B>,
        plan: &Plan,
        progress: &dyn Fn(Progress),
        show: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<Answer> {
        let mut answer = self.cancelled();
        match self.run_into(&mut answer, engine, plan, progress, show) {
            Err(error) if exit::is_cancelled(&error) => {}
            result => result?,
        }
        Ok(answer)
    }

    /// The answer of a run that was stopped before it began.
    pub(crate) fn cancelled(&self) -> Answer {
        Answer {
            tokens: Vec::new(),
            text: self.prompt.tokenizer.is_some().then(String::new),
            finish: FinishReason::Cancelled,
            ttft_s: None,
            decode_tokens_per_s: None,
            kv_kept_bytes: None,
            kv_peak_bytes: None,
        }
    }

    fn run_into<B: Backend>(
        &self,
        answer: &mut Answer,
        engine: &Engine<B>,
        plan: &Plan,
        progress: &dyn Fn(Progress),
        show: &mut dyn FnMut(&str) -> Result<()>,
    ) -> Result<()> {
        let Prompt { ids, question, tokenizer } = self.prompt;
        let control = Control { cancel: Some(self.cancel), progress: Some(progress) };
        let slack = question.len() + self.generation.max_tokens.min(engine.config().context_limit().tokens);
        let options = PrefillOptions { exact_shortcuts: self.exact_shortcuts, trace: false, slack };

        let start = Instant::now();
        let prefill = engine.prefill(ids, plan, &options, &control)?;
        let mut cache = prefill.cache;
        answer.kv_kept_bytes = Some(cache.bytes(engine.backend()));
        answer.kv_peak_bytes = Some(prefill.peak_kv_bytes);
        let logits = match question.is_empty() {
            true => prefill.logits,
            false => {
                engine.append(&mut cache, question, &Control { cancel: Some(self.cancel), progress: None })?
            }
        };
        let read = cache.logical_length();

        // Ctrl-C, a stop text and a closed pipe end this answer alone.
        let end = Cancel::default();
        let mut text = AnswerText::new(tokenizer.as_ref(), &self.stop_texts);
        let mut shown = Ok(());
        let mut first_token = None;
        let on_token = |token| {
            first_token.get_or_insert_with(Instant::now);
            shown = text.push(token).and_then(|piece| show(&piece));
            if text.stopped || shown.is_err() || self.cancel.is_cancelled() {
                end.cancel();
            }
        };
        let control = Control { cancel: Some(&end), progress: None };
        let generated = engine.generate(&mut cache, logits, &self.generation, &control, on_token)?;
        let decoding = first_token.unwrap_or_else(Instant::now);
        let seconds = decoding.elapsed().as_secs_f64();
        shown?;
        show(&text.finish()?)?;

        answer.ttft_s = Some((decoding - start).as_secs_f64());
        let steps = cache.logical_length() - read;
        answer.decode_tokens_per_s = (steps > 0).then(|| steps as f64 / seconds);
        answer.finish = if text.stopped { FinishReason::Stop } else { generated.finish };
        answer.tokens = generated.tokens;
        answer.text = tokenizer.is_some().then_some(text.text);
        Ok(())
    }
}

/// What the options ask for, and the texts that end an answer.
pub(crate) fn generation(
    model: &ModelDir,
    tokenizer: Option<&Tokenizer>,
    options: &AnswerOptions,
) -> Result<(GenerationOptions, Vec<String>)> {
    let mut stop_tokens = model.generation.stop_tokens.clone();
    let mut stop_texts = Vec::new();
    for stop in &options.stop {
        match (stop.parse(), tokenizer) {
            (Ok(id), _) if (id as usize) < model.config.vocab_size => stop_tokens.push(id),
            (Ok(id), _) => {
                let vocabulary = model.config.vocab_size;
                bail!(Usage(format!("--stop {id} is no token: the model's are 0 to {}", vocabulary - 1)));
            }
            (Err(_), Some(_)) if stop.is_empty() => bail!(Usage("--stop is empty".to_owned())),
            (Err(_), Some(tokenizer)) => match tokenizer.token_id(stop) {
                Some(id) if tokenizer.is_special(id) => stop_tokens.push(id),
                _ => stop_texts.push(stop.clone()),
            },
            (Err(_), None) => {
                bail!(Usage(format!("--stop {stop:?}: the model has no tokenizer, so give a token id")))
            }
        }
    }
    let generation =
        GenerationOptions { max_tokens: options.max_tokens, sampling: options.sampling()?, stop_tokens };
    Ok((generation, stop_texts))
}

/// The text of an answer as it grows, up to a stop text.
pub(crate) struct AnswerText<'a> {
    stream: Option<TextStream<'a>>,
    stop_texts: &'a [String],
    pub(crate) text: String,
    /// Bytes of it that were handed out: not those that may turn out to begin a stop text.
    shown: usize,
    pub(crate) stopped: bool,
}

impl<'a> AnswerText<'a> {
    pub(crate) fn new(tokenizer: Option<&'a Tokenizer>, stop_texts: &'a [String]) -> Self {
        let stream = tokenizer.map(|tokenizer| tokenizer.stream(true));
        Self { stream, stop_texts, text: String::new(), shown: 0, stopped: false }
    }

    /// Takes a token and returns what can be shown now.
    pub(crate) fn push(&mut self, token: u32) -> Result<String> {
        match &mut self.stream {
            Some(stream) => self.text += &stream.push(token)?,
            // Without a tokenizer the ids are the text.
            None if self.text.is_empty() => self.text = token.to_string(),
            None => self.text += &format!(" {token}"),
        }
        let begin = self.stop_texts.iter().filter_map(|stop| self.text.find(stop.as_str())).min();
        let certain = match begin {
            Some(begin) => {
                self.stopped = true;
                self.text.truncate(begin);
                begin
            }
            None => self.text.len() - self.pending(),
        };
        Ok(self.show_to(certain))
    }

    /// What is left to show.
    pub(crate) fn finish(&mut self) -> Result<String> {
        if let (Some(stream), false) = (self.stream.take(), self.stopped) {
            self.text += &stream.finish()?;
        }
        Ok(self.show_to(self.text.len()))
    }

    fn show_to(&mut self, end: usize) -> String {
        let piece = self.text[self.shown.min(end)..end].to_owned();
        self.shown = self.shown.max(end);
        piece
    }

    /// Bytes at the end of the text that are the beginning of a stop text.
    fn pending(&self) -> usize {
        let begins = |length: &usize| {
            let start = self.text.len() - length;
            self.text.is_char_boundary(start)
                && self.stop_texts.iter().any(|stop| stop.starts_with(&self.text[start..]))
        };
        let longest = self.stop_texts.iter().map(String::len).max().unwrap_or(0);
        (1..=longest.min(self.text.len())).rev().find(begins).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is shown for each token, and the text in the end.
    fn shown(stops: &[&str], tokens: &[u32]) -> (Vec<String>, String, bool) {
        let stops: Vec<String> = stops.iter().copied().map(str::to_owned).collect();
        let mut text = AnswerText::new(None, &stops);
        let mut pieces = Vec::new();
        for token in tokens {
            pieces.push(text.push(*token).expect("no tokenizer"));
            if text.stopped {
                break;
            }
        }
        pieces.push(text.finish().expect("no tokenizer"));
        (pieces, text.text, text.stopped)
    }

    #[test]
    fn a_stop_text_is_never_shown() {
        let (pieces, text, stopped) = shown(&["5 7", "9"], &[1, 5, 6, 5, 7, 8]);
        assert_eq!(pieces, ["1", " ", "5 6", " ", "", ""]);
        assert_eq!((text.as_str(), stopped), ("1 5 6 ", true));
    }

    #[test]
    fn what_only_began_like_a_stop_text_is_shown_in_the_end() {
        let (pieces, text, stopped) = shown(&["5 7"], &[1, 5]);
        assert_eq!(pieces, ["1", " ", "5"]);
        assert_eq!((text.as_str(), stopped), ("1 5", false));
    }
}
