//! Tasks whose answers are known, made from a seed or read from a file, and their scoring.
//!
//! [`Task`]s are RULER-style (arXiv 2404.06654) and for any tokenizer; a small model with few words has
//! a [`Dialect`] of its own. Words and random stream differ from the official generators, so scores
//! cannot be held against their tables.

mod dialect;
mod error;
mod file;
mod haystack;
mod heads;
mod longbench;
mod measures;
mod needle;
mod question;
mod score;
mod selection;
mod tasks;
mod words;

pub use dialect::{Dialect, DialectError};
pub use error::EvalError;
pub use file::{FileQuestion, read_questions};
pub use haystack::Prose;
pub use heads::HeadScoring;
pub use needle::{NeedlePrompt, NeedleTask, Planted};
pub use question::Question;
pub use score::{Key, Scoring};
pub use selection::{Numbers, OutputError, Scene, SelectionError};
pub use tasks::{Measure, Needles, Size, TASKS_VERSION, Task};

/// Whether a prediction is the reference, blanks at either end aside.
pub fn is_exact(prediction: &str, reference: &str) -> bool {
    prediction.trim() == reference.trim()
}
