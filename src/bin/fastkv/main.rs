//! The program `fastkv`: long prompts with a compressed KV cache, from the command line.

mod answer;
mod batch;
mod bench;
mod compare;
mod device;
mod eval;
mod exam;
mod exit;
mod generate;
mod info;
mod input;
mod inspect;
mod interrupt;
mod loading;
mod options;
mod output;
mod profile;
mod progress;
mod prompt;
mod reading;
mod report;
mod steering;
mod suggest;
mod tsp_layer;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Long prompts with a compressed KV cache: FastKV and its relatives for Llama models.
#[derive(Parser)]
#[command(name = "fastkv", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Generate(generate::Arguments),
    Batch(batch::Arguments),
    Compare(compare::Arguments),
    Inspect(inspect::Arguments),
    Info(info::Arguments),
    Prompt(prompt::Arguments),
    Eval(eval::Arguments),
    Profile(profile::Arguments),
    Bench(bench::Arguments),
    Report(report::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let cancel = interrupt::on_ctrl_c();
    let result = match &cli.command {
        Command::Generate(arguments) => generate::run(arguments, &cancel),
        Command::Batch(arguments) => batch::run(arguments, &cancel),
        Command::Compare(arguments) => compare::run(arguments, &cancel),
        Command::Inspect(arguments) => inspect::run(arguments, &cancel),
        Command::Info(arguments) => info::run(arguments),
        Command::Prompt(arguments) => prompt::run(arguments),
        Command::Eval(arguments) => eval::run(arguments, &cancel),
        Command::Profile(arguments) => profile::run(arguments, &cancel),
        Command::Bench(arguments) => bench::run(arguments, &cancel),
        Command::Report(arguments) => report::run(arguments),
    };
    exit::code(result, &cancel)
}
