//! Attention with an eye on its probabilities: what a layer's rules choose by.

use std::ops::Range;

use super::EngineError;
use super::append::EVERY_QUERY;
use crate::backend::{Backend, Bias, Columns, Visible};
use crate::policy::{Keep, LayerPlan, Propagate};

/// Watches the attention of one layer, chunk by chunk.
pub(super) struct Observer<'a, B: Backend> {
    backend: &'a B,
    bias: Option<Bias<'a>>,
    /// Rows of the layer.
    rows: usize,
    /// Observation windows and, behind the last chunk, their scores; those of the kept tokens first.
    windows: Vec<(usize, Option<B::Scores>)>,
    sums: Vec<Sums<B>>,
}

/// What sums over many queries are for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// All attention that a key gets.
    Attention,
    /// The part of it that comes from near by.
    Local,
    /// What the newest queries say of the others.
    Recent,
}

struct Sums<B: Backend> {
    purpose: Purpose,
    /// How many of the last rows count.
    queries: usize,
    columns: Columns,
    scores: Option<B::Scores>,
}

/// Queries whose probabilities a trace looks at where the policy itself looks at none.
const TRACE_WINDOW: usize = 8;

impl<'a, B: Backend> Observer<'a, B> {
    pub(super) fn new(backend: &'a B, rules: &LayerPlan, bias: Option<Bias<'a>>, trace: bool) -> Self {
        let mut windows = rules.windows();
        if windows.is_empty() && trace {
            windows.push(TRACE_WINDOW);
        }
        let rows = rules.rows;
        let windows = windows.into_iter().map(|window| (window.min(rows), None)).collect();
        let mut observer = Self { backend, bias, rows, windows, sums: Vec::new() };
        match rules.keep {
            Keep::Heavy { .. } => observer.add(Purpose::Attention, rows, EVERY_QUERY),
            Keep::Recovered { local, .. } => {
                let band = Some(crate::policy::share(rows, local));
                observer.add(Purpose::Attention, rows, EVERY_QUERY);
                observer.add(Purpose::Local, rows, Columns { band, ..EVERY_QUERY });
            }
            _ => {}
        }
        if let Some(Propagate::Recent { recent, .. }) = rules.propagate {
            // From 1 for the first of them to 1.2 for the last.
            let step = 0.2 / (recent.max(2) - 1) as f32;
            observer.add(Purpose::Recent, recent.min(rows), Columns { weight: 1.0, step, band: None });
        }
        observer
    }

    fn add(&mut self, purpose: Purpose, queries: usize, columns: Columns) {
        self.sums.push(Sums { purpose, queries, columns, scores: None });
    }

    /// How many of these rows are watched: the last of them.
    pub(super) fn watched(&self, rows: &Range<usize>) -> usize {
        let windows = self.windows.iter().map(|(window, _)| *window);
        let watched = windows.chain(self.sums.iter().map(|sums| sums.queries)).max().unwrap_or(0);
        rows.len().min(rows.end.saturating_sub(self.rows - watched))
    }

    /// Attention of the rows up to `end`, whose keys are the last of the store.
    pub(super) fn attend(
        &mut self,
        queries: &B::Tensor,
        kv: &B::Kv,
        end: usize,
    ) -> Result<B::Tensor, EngineError> {
        let at_once = end == self.rows && self.bias.is_none();
        if let Some((window, scores)) = self.windows.first_mut().filter(|_| at_once) {
            let (attended, seen) = self.backend.attention_with_scores(queries, kv, *window)?;
            *scores = Some(seen);
            self.look(queries, kv, end)?;
            return Ok(attended);
        }
        let Self { backend, bias, rows, sums, .. } = self;
        if sums.is_empty() || sums.iter().any(|sums| sums.queries < *rows) {
            self.look(queries, kv, end)?;
            return self.attention(queries, kv, Visible::Aligned);
        }
        // Every query counts, so that attention and sums are of the same ones.
        let first = end - backend.rows(queries);
        let columns: Vec<Columns> = sums.iter().map(|sums| sums.columns_from(first)).collect();
        let (attended, seen) = backend.attention_with_columns(queries, kv, &columns, bias.as_ref())?;
        sums.iter_mut().zip(seen).try_for_each(|(sums, seen)| sums.add(*backend, seen))?;
        self.look_by_windows(queries, kv, end)?;
        Ok(attended)
    }

    /// Attention, steered where this layer is.
    pub(super) fn attention(
        &self,
        queries: &B::Tensor,
        kv: &B::Kv,
        visible: Visible<'_, B::Indices>,
    ) -> Result<B::Tensor, EngineError> {
        Ok(match &self.bias {
            Some(bias) => self.backend.biased_attention(queries, kv, visible, bias)?,
            None => self.backend.attention(queries, kv, visible)?,
        })
    }

    /// Looks at queries of the rows up to `end`; not at what was seen already.
    pub(super) fn look(&mut self, queries: &B::Tensor, kv: &B::Kv, end: usize) -> Result<(), EngineError> {
        self.look_by_windows(queries, kv, end)?;
        let Self { backend, bias, rows, sums, .. } = self;
        for sums in sums {
            let first = *rows - sums.queries;
            let here = backend.rows(queries).min(end.saturating_sub(first));
            if here == 0 {
                continue;
            }
            let observers = backend.last_rows(queries, here)?;
            let columns = sums.columns_from(end - here - first);
            let seen = backend.column_sums(&observers, kv, columns, bias.as_ref())?;
            sums.add(*backend, seen)?;
        }
        Ok(())
    }

    fn look_by_windows(&mut self, queries: &B::Tensor, kv: &B::Kv, end: usize) -> Result<(), EngineError> {
        let Self { backend, bias, rows, windows, .. } = self;
        if end == *rows {
            for (window, scores) in windows.iter_mut().filter(|(_, scores)| scores.is_none()) {
                let observers = backend.last_rows(queries, *window)?;
                *scores = Some(match bias {
                    Some(bias) => backend.biased_window_scores(&observers, kv, bias)?,
                    None => backend.window_scores(&observers, kv)?,
                });
            }
        }
        Ok(())
    }

    /// The scores of an observation window `[query heads, rows]`.
    pub(super) fn window(&self, window: usize) -> Option<&B::Scores> {
        let window = window.min(self.rows);
        self.windows.iter().find(|(width, _)| *width == window).and_then(|(_, scores)| scores.as_ref())
    }

    /// Sums over many queries `[kv heads, rows]`.
    pub(super) fn sums(&self, purpose: Purpose) -> Option<&B::Scores> {
        self.sums.iter().find(|sums| sums.purpose == purpose).and_then(|sums| sums.scores.as_ref())
    }

    /// The window that the mass on kept tokens is measured by, and its scores.
    pub(super) fn measure(&self) -> Option<(usize, &B::Scores)> {
        let (window, scores) = self.windows.first()?;
        Some((*window, scores.as_ref()?))
    }
}

impl<B: Backend> Sums<B> {
    /// How queries count from one of those that do.
    fn columns_from(&self, query: usize) -> Columns {
        let weight = self.columns.weight + self.columns.step * query as f32;
        Columns { weight, ..self.columns }
    }

    fn add(&mut self, backend: &B, seen: B::Scores) -> Result<(), EngineError> {
        self.scores = Some(match &self.scores {
            Some(before) => backend.add_scores(before, &seen)?,
            None => seen,
        });
        Ok(())
    }
}
