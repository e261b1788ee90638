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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use fastkv::eval::{Prose, Task};
    use serde_json::{Value, json};

    use super::*;

    /// Bytes and some merges, as most models have them.
    fn byte_level() -> Tokenizer {
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers");
        Tokenizer::from_file(&fixtures.join("byte-level/tokenizer.json"), 341).expect("a tokenizer")
    }

    /// Letters and some merges, where a blank is a letter in front of its word, as Llama 2 has them.
    fn sentence_pieces(masks_digits: bool) -> Tokenizer {
        let letters = (0x20..0x7f).map(char::from).chain(['\n', '▁']).map(String::from);
        let merges = [["▁", "1"], ["▁", "\""], ["1", "2"], ["▁", "t"], ["3", "."], ["h", "e"], ["▁t", "he"]];
        let tokens = ["<s>".to_owned()].into_iter().chain(letters).chain(merges.map(|pair| pair.concat()));
        let vocabulary: serde_json::Map<String, Value> =
            tokens.enumerate().map(|(id, token)| (token, json!(id))).collect();
        let begin = json!({ "id": 0, "content": "<s>", "special": true, "single_word": false, "lstrip": false,
                            "rstrip": false, "normalized": false });
        let file = json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": [begin],
            "pre_tokenizer": null,
            "normalizer": { "type": "Sequence", "normalizers": [
                { "type": "Prepend", "prepend": "▁" },
                { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
                { "type": "Replace", "pattern": { "Regex": if masks_digits { "[0-9]" } else { "~" } }, "content": "#" },
            ] },
            "post_processor": {
                "type": "TemplateProcessing",
                "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
                "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
                "special_tokens": { "<s>": { "id": "<s>", "ids": [0], "tokens": ["<s>"] } },
            },
            "decoder": { "type": "Sequence", "decoders": [
                { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
                { "type": "Fuse" },
                { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
            ] },
            "model": { "type": "BPE", "vocab": vocabulary, "merges": merges },
        });
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("tokenizer.json");
        std::fs::write(&path, file.to_string()).expect("writable");
        Tokenizer::from_file(&path, 1000).expect("a tokenizer")
    }

    fn template() -> ChatTemplate {
        let directory = tempfile::tempdir().expect("a directory");
        let text = "{% for message in messages %}[{{ message.role }}] {{ message.content | trim }}\n{% endfor %}[me]";
        std::fs::write(directory.path().join("chat_template.jinja"), text).expect("writable");
        ChatTemplate::from_directory(directory.path()).expect("readable").expect("a template")
    }

    /// The text of each token, from the decoder alone.
    fn texts(tokenizer: &Tokenizer, ids: &[u32]) -> Vec<String> {
        let mut stream = tokenizer.stream(false);
        ids.iter().map(|id| stream.push(*id).expect("decodes")).collect()
    }

    #[test]
    fn a_needle_is_the_tokens_whose_texts_reach_into_it() {
        let prose = Prose::default();
        for (tokenizer, template) in [
            (byte_level(), None),
            (byte_level(), Some(template())),
            (sentence_pieces(false), None),
            (sentence_pieces(false), Some(template())),
        ] {
            let reader = Reader { tokenizer, template, query_agnostic: false };
            for task in Task::ALL {
                for seed in 0..4 {
                    let question = task.question(&prose, 4096, 60, seed, 0.3).expect("a question");
                    let needle = reader.needle(&question, true).expect("offsets");
                    assert_eq!(needle.is_some(), task.has_needle());
                    let Some(needle) = needle else { continue };
                    let ids = reader.read(&question, true).expect("readable").ids;
                    let texts = texts(&reader.tokenizer, &ids);
                    let text = texts.concat();
                    let value = &question.references[0];
                    let (first, end) = text.find(value).map(|at| (at, at + value.len())).expect("it is said");
                    assert_eq!(text.rfind(value), Some(first), "once");
                    let mut byte = 0;
                    let reaches = texts.iter().enumerate().filter(|(_, text)| {
                        let start = byte;
                        byte += text.len();
                        start < end && first < byte
                    });
                    let tokens: Vec<usize> = reaches.map(|(token, _)| token).collect();
                    assert_eq!(needle.collect::<Vec<_>>(), tokens, "{task:?}, {value}");
                }
            }
        }
    }

    #[test]
    fn a_needle_that_cannot_be_found_is_an_error() {
        let question = Task::ALL[0].question(&Prose::default(), 4096, 10, 1, 0.5).expect("a question");
        let value = &question.references[0];
        let directory = tempfile::tempdir().expect("a directory");
        let text = "{{ messages[0].content | upper }}";
        std::fs::write(directory.path().join("chat_template.jinja"), text).expect("writable");
        let template = ChatTemplate::from_directory(directory.path()).expect("readable");
        let reader = Reader { tokenizer: byte_level(), template, query_agnostic: false };
        let error = reader.needle(&question, true).expect_err("altered").to_string();
        assert!(error.contains("chat template") && error.contains(value), "{error}");
        assert!(reader.needle(&question, false).expect("without it").is_some());
        let reader = Reader { tokenizer: sentence_pieces(true), ..reader };
        let error = reader.needle(&question, false).expect_err("no digit is left").to_string();
        assert!(error.contains("the tokenizer does not say") && error.contains(value), "{error}");
    }
}
