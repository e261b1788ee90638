//! Questions as tokens.

use anyhow::{Context, Result, bail};
use fastkv::eval::Question;
use fastkv::model::{ChatMessage, ChatTemplate, Tokenizer};

/// How a model reads questions.
pub(super) struct Reader<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    pub(super) template: Option<ChatTemplate>,
    /// Whether the context is compressed before the question is read.
    pub(super) query_agnostic: bool,
}

/// What is compressed, and what is read behind it in full.
pub(super) struct Tokens {
    pub(super) ids: Vec<u32>,
    pub(super) question: Vec<u32>,
}

impl Tokens {
    pub(super) fn len(&self) -> usize {
        self.ids.len() + self.question.len()
    }
}

impl Reader<'_> {
    /// The tokens of a question; with `chat` through the chat template, where the model has one.
    pub(super) fn read(&self, question: &Question, chat: bool) -> Result<Tokens> {
        if self.query_agnostic && question.context.trim().is_empty() {
            bail!("--query-agnostic: there is no context to compress before the question is read");
        }
        let template = self.template.as_ref().filter(|_| chat);
        let (front, behind) = match template {
            Some(template) => self.chat(template, question)?,
            None if self.query_agnostic => {
                let asked = Question { context: String::new(), ..question.clone() };
                (question.context.clone(), format!("{}{}", question.separator, asked.text()))
            }
            None => (question.text(), String::new()),
        };
        // A chat template brings its own special tokens.
        let ids = self.encode(&front, template.is_none())?;
        let question = if behind.is_empty() { Vec::new() } else { self.encode(&behind, false)? };
        Ok(Tokens { ids, question })
    }

    /// A question of at most so many tokens with its answer: from the middle of a longer context, tokens
    /// are left out, as LongBench does.
    pub(super) fn cut(&self, question: &Question, chat: bool, length: usize) -> Result<Question> {
        let room = length.saturating_sub(question.answer_tokens);
        let mut cut = question.clone();
        if self.read(&cut, chat)?.len() <= room {
            return Ok(cut);
        }
        let ids = self.encode(&question.context, false)?;
        let mut kept = ids.len();
        loop {
            let over = self.read(&cut, chat)?.len().saturating_sub(room);
            if over == 0 {
                return Ok(cut);
            }
            // Where halves meet, text may take other tokens than it did: so more than once.
            kept = kept.checked_sub(over).filter(|kept| *kept > 0).with_context(|| {
                let answer = question.answer_tokens;
                format!("{length} tokens have no room for the question and an answer of {answer}")
            })?;
            let [first, last] = [&ids[..kept / 2], &ids[ids.len() - (kept - kept / 2)..]];
            let (first, last) = (self.tokenizer.decode(first, true)?, self.tokenizer.decode(last, true)?);
            // Two words must not become one.
            let apart = first.ends_with(char::is_whitespace) || last.starts_with(char::is_whitespace);
            cut.context = first + if apart { "" } else { " " } + &last;
        }
    }

    /// The text up to where the cache is compressed, and that behind it.
    fn chat(&self, template: &ChatTemplate, question: &Question) -> Result<(String, String)> {
        let message = Question { prefix: String::new(), ..question.clone() }.text();
        let mut text = template.render(&[ChatMessage::new("user", message)], true)?;
        if !question.prefix.is_empty() && !text.ends_with(char::is_whitespace) {
            text.push(' ');
        }
        if !self.query_agnostic {
            return Ok((text + &question.prefix, String::new()));
        }
        // Templates trim what they are given; the question has to be found again.
        let asked = question.question.trim();
        let at =
            text.rfind(asked).with_context(|| format!("the chat template alters the question {asked:?}"))?;
        let behind = text.split_off(at) + &question.prefix;
        Ok((text, behind))
    }

    fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        let ids = self.tokenizer.encode(text, special)?;
        let Some(unknown) = self.tokenizer.unknown().filter(|unknown| ids.contains(unknown)) else {
            return Ok(ids);
        };
        let has = |word: &&str| self.tokenizer.encode(word, false).is_ok_and(|ids| ids.contains(&unknown));
        let word = text.split_whitespace().find(has).unwrap_or_default();
        bail!("the tokenizer has no token for {word:?}: the model cannot be asked this");
    }
}
