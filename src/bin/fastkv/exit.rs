//! Exit codes: 0 fine, 1 failure, 2 usage, 130 after Ctrl-C.

use std::fmt::Write;
use std::io;
use std::process::ExitCode;

use fastkv::engine::{Cancel, EngineError};
use fastkv::model::ModelError;
use fastkv::policy::PolicyError;

/// A command line that makes no sense, beyond what clap can tell.
#[derive(Debug)]
pub(crate) struct Usage(pub(crate) String);

impl std::fmt::Display for Usage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Usage {}

/// The exit code of Ctrl-C: 128 + SIGINT.
pub(crate) const INTERRUPTED: u8 = 130;

/// Reports what went wrong, and says it to the shell.
pub(crate) fn code(result: anyhow::Result<()>, cancel: &Cancel) -> ExitCode {
    match result {
        Ok(()) if cancel.is_cancelled() => INTERRUPTED.into(),
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if is_cancelled(&error) => {
            eprintln!("fastkv: stopped before there was anything to show");
            INTERRUPTED.into()
        }
        // The reader has seen enough, as in `fastkv … | head`.
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("fastkv: {}", message(&error));
            if is_usage(&error) { 2.into() } else { 1.into() }
        }
    }
}

/// Whether an error is Ctrl-C in disguise.
pub(crate) fn is_cancelled(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(EngineError::Cancelled))
        || matches!(error.downcast_ref(), Some(ModelError::Cancelled))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn is_usage(error: &anyhow::Error) -> bool {
    error.is::<Usage>()
        || error.is::<PolicyError>()
        || matches!(error.downcast_ref(), Some(EngineError::Sampling { .. }))
}

/// The chain of causes; those that the message before them repeats are left out.
fn message(error: &anyhow::Error) -> String {
    let mut message = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !message.contains(&cause) {
            let _ = write!(message, ": {cause}");
        }
    }
    message
}
