//! Where the prompt comes from.

use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use fastkv::engine::check_tokens;
use fastkv::model::{ChatMessage, ModelDir, ModelError, Tokenizer};
use fastkv::utf8;

use crate::exit::Usage;

/// The prompt: an argument, a file, token ids, or else stdin.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Prompt")]
pub(crate) struct PromptOptions {
    /// The prompt; without it, --file and --tokens: stdin
    #[arg(conflicts_with_all = ["file", "tokens"])]
    prompt: Option<String>,
    /// Read the prompt from a file, less one line break at its end
    #[arg(long, value_name = "FILE", conflicts_with = "tokens")]
    file: Option<PathBuf>,
    /// Read token ids, a JSON array, instead of text; needs no tokenizer.json
    #[arg(long, value_name = "FILE.json")]
    tokens: Option<PathBuf>,
    /// Give the prompt to the model's chat template as a user's message
    #[arg(long, conflicts_with = "tokens")]
    chat: bool,
}

/// What the model reads.
#[derive(Debug)]
pub(crate) struct Prompt {
    /// Tokens that a policy compresses.
    pub(crate) ids: Vec<u32>,
    /// Tokens that are read behind them, in full.
    pub(crate) question: Vec<u32>,
    /// The model's tokenizer, if it has one.
    pub(crate) tokenizer: Option<Tokenizer>,
}

impl Prompt {
    /// The text of each token; without a tokenizer, its id.
    pub(crate) fn pieces(&self) -> Result<Vec<String>> {
        let Some(tokenizer) = &self.tokenizer else {
            return Ok(self.ids.iter().map(|id| format!("{id} ")).collect());
        };
        let mut stream = tokenizer.stream(false);
        let mut pieces = self.ids.iter().map(|id| stream.push(*id)).collect::<Result<Vec<_>, _>>()?;
        if let Some(last) = pieces.last_mut() {
            *last += &stream.finish()?;
        }
        Ok(pieces)
    }
}

impl PromptOptions {
    /// Reads the prompt and checks that the model can take it.
    pub(crate) fn read(&self, model: &ModelDir, question: Option<&str>) -> Result<Prompt> {
        check_question(question)?;
        let tokenizer = match model.tokenizer() {
            Err(ModelError::FileMissing { .. }) if self.tokens.is_some() && question.is_none() => None,
            other => Some(other?),
        };
        let (ids, question) = match (&self.tokens, &tokenizer) {
            (Some(file), tokenizer) => {
                let question = match (question, tokenizer) {
                    (Some(question), Some(tokenizer)) => tokenizer.encode(question, false)?,
                    _ => Vec::new(),
                };
                (read_tokens(file)?, question)
            }
            (None, Some(tokenizer)) => encode(model, tokenizer, self.text()?, question, self.chat)?,
            (None, None) => unreachable!("without --tokens a missing tokenizer is an error"),
        };
        check_length(model, &ids, &question)?;
        Ok(Prompt { ids, question, tokenizer })
    }

    fn text(&self) -> Result<String> {
        let text = match (&self.prompt, &self.file) {
            (Some(prompt), _) => return Ok(prompt.clone()),
            (None, Some(file)) => utf8::read(file).with_context(|| format!("--file {}", file.display()))?,
            (None, None) if std::io::stdin().is_terminal() => {
                let message = "no prompt: give it as an argument, with --file or --tokens, or on stdin";
                return Err(Usage(message.to_owned()).into());
            }
            (None, None) => text_of_stdin().context("the prompt on stdin")?,
        };
        // Editors and `echo` end a file with a line break that nobody meant.
        let text =
            text.strip_suffix('\n').map(|text| text.strip_suffix('\r').unwrap_or(text)).unwrap_or(&text);
        Ok(text.to_owned())
    }
}

/// Stdin as text.
pub(crate) fn text_of_stdin() -> Result<String> {
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    Ok(utf8::text(bytes)?)
}

/// The question of `--question`, if there is one, asks something.
pub(crate) fn check_question(question: Option<&str>) -> Result<()> {
    match question.is_some_and(|question| question.trim().is_empty()) {
        true => bail!(Usage("--question is empty: leave it out, or ask something".to_owned())),
        false => Ok(()),
    }
}

/// The model can read these tokens, and the question behind them.
pub(crate) fn check_length(model: &ModelDir, ids: &[u32], question: &[u32]) -> Result<()> {
    check_tokens(&model.config, ids, 0)?;
    if !question.is_empty() {
        check_tokens(&model.config, question, ids.len())?;
    }
    Ok(())
}

/// The tokens of a prompt, and of the question behind it.
pub(crate) fn encode(
    model: &ModelDir,
    tokenizer: &Tokenizer,
    text: String,
    question: Option<&str>,
    chat: bool,
) -> Result<(Vec<u32>, Vec<u32>)> {
    if text.is_empty() {
        bail!("the prompt is empty: give some text");
    }
    if !chat {
        let question = question.map(|question| tokenizer.encode(question, false)).transpose()?;
        return Ok((tokenizer.encode(&text, true)?, question.unwrap_or_default()));
    }
    let Some(template) = model.chat_template()? else {
        bail!("--chat: {} has no chat template; leave --chat out", model.path.display());
    };
    // Templates trim what they are given; the question has to be found again behind them.
    let question = question.unwrap_or_default().trim();
    let content = if question.is_empty() { text } else { format!("{text}\n\n{question}") };
    let rendered = template.render(&[ChatMessage::new("user", content)], true)?;
    let split = match question {
        "" => rendered.len(),
        question => rendered
            .rfind(question)
            .with_context(|| format!("--question: the chat template alters {question:?}"))?,
    };
    let (context, rest) = rendered.split_at(split);
    let rest = if rest.is_empty() { Vec::new() } else { tokenizer.encode(rest, false)? };
    Ok((tokenizer.encode(context, false)?, rest))
}

fn read_tokens(file: &Path) -> Result<Vec<u32>> {
    let name = format!("--tokens {}", file.display());
    let text = std::fs::read(file).with_context(|| name.clone())?;
    let value: serde_json::Value = serde_json::from_slice(&text).with_context(|| name.clone())?;
    let wanted = "a JSON array of token ids such as [1, 15043] is wanted";
    let Some(list) = value.as_array() else {
        bail!("{name}: {wanted}");
    };
    let id = |(position, id): (usize, &serde_json::Value)| {
        id.as_u64()
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| anyhow!("{name}: element {position} is {id}, no token id; {wanted}"))
    };
    list.iter().enumerate().map(id).collect()
}
