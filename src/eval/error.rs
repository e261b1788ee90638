use std::path::PathBuf;

use super::DialectError;
use crate::messages::count;

/// What can go wrong when questions are made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EvalError {
    /// A length with no room for the least there is to a task.
    #[error(
        "{task}: no room in {} for the shortest prompt and its answer, which take {least}", count(*.length, "token")
    )]
    TooShort {
        /// The task.
        task: &'static str,
        /// Tokens asked for.
        length: usize,
        /// The least that works.
        least: usize,
    },
    /// A sample that stayed too long, however often it was cut.
    #[error("{task}: no prompt of seed {seed} fits {}: its size varies too much with the seed", count(*.length, "token"))]
    NothingFits {
        /// The task.
        task: &'static str,
        /// Tokens asked for.
        length: usize,
        /// The sample's seed.
        seed: u64,
    },
    /// More different words than the lists have.
    #[error("{wanted} different words are needed, but {there_are} can be made")]
    Words {
        /// Words needed.
        wanted: usize,
        /// Words there are.
        there_are: usize,
    },
    /// A text that nothing can be hidden in.
    #[error("{}: {reason}", path.display())]
    Haystack {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A line of a file of questions that is none.
    #[error("{}, line {line}: {problem}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, and with which field.
        problem: String,
    },
    /// A file of questions that cannot be read, or has none.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A dialect that has no such prompt.
    #[error(transparent)]
    Dialect(#[from] DialectError),
    /// Whoever counts tokens could not.
    #[error("{0}")]
    Tokens(String),
}
