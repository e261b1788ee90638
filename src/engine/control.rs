//! How a caller follows and stops a long call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::EngineError;

/// Asks a call to stop, from any thread or a signal handler.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Stops every call that looks at this token.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked for.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// How far a call is, in rows times layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Work done.
    pub done: usize,
    /// All of it.
    pub total: usize,
}

/// What a long call looks at and reports to. [`Default`] does neither.
#[derive(Clone, Copy, Default)]
pub struct Control<'a> {
    /// Looked at between chunks of rows.
    pub cancel: Option<&'a Cancel>,
    /// Told of each step forward.
    pub progress: Option<&'a dyn Fn(Progress)>,
}

impl std::fmt::Debug for Control<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Control").field("cancel", &self.cancel).finish_non_exhaustive()
    }
}

impl Control<'_> {
    pub(super) fn check(&self) -> Result<(), EngineError> {
        if self.cancel.is_some_and(Cancel::is_cancelled) { Err(EngineError::Cancelled) } else { Ok(()) }
    }

    pub(super) fn report(&self, done: usize, total: usize) {
        if let Some(progress) = self.progress {
            progress(Progress { done, total });
        }
    }
}
