//! Questions as tokens.

use std::ops::Range;

use anyhow::{Context, Result, bail};
use fastkv::eval::Question;
use fastkv::model::{ChatMessage, ChatTemplate, Tokenizer};

/// How a model reads questions.
pub(crate) struct Reader {
    pub(crate) tokenizer: Tokenizer,
    pub(crate) template: Option<ChatTemplate>,
    /// Whether the context is compressed before the question is read.
    pub(crate) query_agnostic: bool,
}

/// What is compressed, and what is read behind it in full.
pub(crate) struct Tokens {
    pub(crate) ids: Vec<u32>,
    pub(crate) question: Vec<u32>,
}

/// The text of both.
struct Texts {
    front: String,
    /// Whether the tokenizer puts its special tokens around the front.
    special: bool,
    behind: String,
}

impl Tokens {
    pub(crate) fn len(&self) -> usize {
        self.ids.len() + self.question.len()
    }
}

impl Reader {
    /// The tokens of a question; with `chat` through the chat template, where the model has one.
    pub(crate) fn read(&self, question: &Question, chat: bool) -> Result<Tokens> {
        if self.query_agnostic && question.context.trim().is_empty() {
            bail!("--query-agnostic: there is no context to compress before the question is read");
        }
        let Texts { front, special, behind } = self.texts(question, chat)?;
        let ids = self.encode(&front, special)?;
        let question = if behind.is_empty() { Vec::new() } else { self.encode(&behind, false)? };
        Ok(Tokens { ids, question })
    }

    /// Which of [`Tokens::ids`] reach into the needle, where the question has one.
    pub(crate) fn needle(&self, question: &Question, chat: bool) -> Result<Option<Range<usize>>> {
        let Some(needle) = &question.needle else { return Ok(None) };
        let value = &question.context[needle.clone()];
        let Texts { front, special, .. } = self.texts(question, chat)?;
        let context = front.find(&question.context);
        let context = context.with_context(|| format!("the chat template alters the text around {value}"))?;
        let (first, end) = (context + needle.start, context + needle.end);
        let (ids, offsets) = self.tokenizer.encode_with_offsets(&front, special)?;
        let reaches = |bytes: &Range<usize>| bytes.start < end && first < bytes.end;
        let tokens = match (offsets.iter().position(reaches), offsets.iter().rposition(reaches)) {
            (Some(first), Some(last)) => first..last + 1,
            _ => 0..0,
        };
        // Offsets are what the tokenizer's file makes of them: some normalizers leave none.
        let plain = |text: &str| text.split_whitespace().collect::<String>();
        if !plain(&self.tokenizer.decode(&ids[tokens.clone()], false)?).contains(&plain(value)) {
            bail!("the tokenizer does not say which tokens {value} has");
        }
        Ok(Some(tokens))
    }

    /// A question of at most so many tokens with its answer: from the middle of a longer context, tokens
    /// are left out, as LongBench does.
    pub(crate) fn cut(&self, question: &Question, chat: bool, length: usize) -> Result<Question> {
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

    fn texts(&self, question: &Question, chat: bool) -> Result<Texts> {
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
        Ok(Texts { front, special: template.is_none(), behind })
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
