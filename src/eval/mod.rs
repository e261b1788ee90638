//! Tasks whose answers are known, made from a seed, and their scoring. The needle tasks follow RULER
//! (arXiv 2404.06654) in structure; the words are a model's own [`Dialect`], so scores cannot be held
//! against the official tables.

mod dialect;
mod heads;
mod needle;

pub use dialect::{Dialect, DialectError};
pub use heads::HeadScoring;
pub use needle::{NeedlePrompt, NeedleTask, Planted};

/// Whether a prediction is the reference, blanks at either end aside.
pub fn is_exact(prediction: &str, reference: &str) -> bool {
    prediction.trim() == reference.trim()
}
