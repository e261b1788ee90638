//! `fastkv prompt`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use fastkv::eval::{Dialect, NeedlePrompt, NeedleTask};

use crate::output;

/// Make a prompt with planted facts and a question about one of them.
///
/// In the sentences of a small model's `dialect.json`, where a word is a token.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Directory of a model with a dialect.json
    #[arg(long, value_name = "DIR", env = "FASTKV_MODEL")]
    model: PathBuf,
    /// Tokens of the prompt at most
    #[arg(long, value_name = "N", default_value_t = 4096, value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    tokens: u64,
    /// Facts to plant; the question is about one of them
    #[arg(long, value_name = "N", default_value_t = 8)]
    facts: usize,
    /// Seed of words and places
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Print a JSON object: context, question, answer and the facts with their places
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let dialect = Dialect::from_directory(&arguments.model)?;
    let task = NeedleTask { needles: arguments.facts, adjectives_drawn: None, animals_drawn: None };
    // The tokenizer puts its begin-of-text token before the words.
    let (tokens, beside) = (arguments.tokens as usize, 1);
    let prompt = NeedlePrompt::generate(&dialect, task, tokens - beside, arguments.seed)
        .map_err(|error| error.among(tokens, beside))?;
    if arguments.json {
        output::print(&output::json(&prompt)?)
    } else {
        output::print(format!("{}\n", prompt.text()).as_bytes())
    }
}
