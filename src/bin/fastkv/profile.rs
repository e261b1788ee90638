//! `fastkv profile`.

mod fastgen;
mod heads;
mod prompts;
mod selection;
mod tsp;

use anyhow::Result;
use clap::{Args, Subcommand};
use fastkv::engine::Cancel;

/// Measure a model, to choose a policy's options by.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Heads(Box<heads::Arguments>),
    Fastgen(Box<fastgen::Arguments>),
    Tsp(Box<tsp::Arguments>),
    Selection(selection::Arguments),
}

pub(crate) fn run(arguments: &Arguments, cancel: &Cancel) -> Result<()> {
    match &arguments.command {
        Command::Heads(arguments) => heads::run(arguments, cancel),
        Command::Fastgen(arguments) => fastgen::run(arguments, cancel),
        Command::Tsp(arguments) => tsp::run(arguments, cancel),
        Command::Selection(arguments) => selection::run(arguments, cancel),
    }
}
