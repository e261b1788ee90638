//! Attention with an eye on its probabilities: what a layer's rules choose by.

use super::EngineError;
use crate::backend::{Backend, Visible};
use crate::policy::LayerPlan;

/// Watches the attention of one layer, chunk by chunk.
pub(super) struct Observer<'a, B: Backend> {
    backend: &'a B,
    /// Rows of the layer.
    rows: usize,
    /// Observation windows and, behind the last chunk, their scores; those of the kept tokens first.
    windows: Vec<(usize, Option<B::Scores>)>,
}

/// Queries whose probabilities a trace looks at where the policy itself looks at none.
const TRACE_WINDOW: usize = 8;

impl<'a, B: Backend> Observer<'a, B> {
    pub(super) fn new(backend: &'a B, rules: &LayerPlan, trace: bool) -> Self {
        let mut windows = rules.windows();
        if windows.is_empty() && trace {
            windows.push(TRACE_WINDOW);
        }
        let windows = windows.into_iter().map(|window| (window.min(rules.rows), None)).collect();
        Self { backend, rows: rules.rows, windows }
    }

    /// How many of the last rows are watched.
    pub(super) fn observers(&self) -> usize {
        self.windows.iter().map(|(window, _)| *window).max().unwrap_or(0)
    }

    /// Attention of the rows up to `end`, whose keys are the last of the store.
    pub(super) fn attend(
        &mut self,
        queries: &B::Tensor,
        kv: &B::Kv,
        end: usize,
    ) -> Result<B::Tensor, EngineError> {
        if let Some((window, scores)) = self.windows.first_mut().filter(|_| end == self.rows) {
            let (attended, seen) = self.backend.attention_with_scores(queries, kv, *window)?;
            *scores = Some(seen);
            self.look(queries, kv, end)?;
            return Ok(attended);
        }
        self.look(queries, kv, end)?;
        Ok(self.backend.attention(queries, kv, Visible::Aligned)?)
    }

    /// Looks at queries of the rows up to `end`; not at what was seen already.
    pub(super) fn look(&mut self, queries: &B::Tensor, kv: &B::Kv, end: usize) -> Result<(), EngineError> {
        if end == self.rows {
            for (window, scores) in self.windows.iter_mut().filter(|(_, scores)| scores.is_none()) {
                let observers = self.backend.last_rows(queries, *window)?;
                *scores = Some(self.backend.window_scores(&observers, kv)?);
            }
        }
        Ok(())
    }

    /// The scores of an observation window `[query heads, rows]`.
    pub(super) fn window(&self, window: usize) -> Option<&B::Scores> {
        let window = window.min(self.rows);
        self.windows.iter().find(|(width, _)| *width == window).and_then(|(_, scores)| scores.as_ref())
    }

    /// The window that the mass on kept tokens is measured by, and its scores.
    pub(super) fn measure(&self) -> Option<(usize, &B::Scores)> {
        let (window, scores) = self.windows.first()?;
        Some((*window, scores.as_ref()?))
    }
}
