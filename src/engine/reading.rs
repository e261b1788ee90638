//! A layer for several prompts at once, in passes of a limited number of rows.

use std::sync::Arc;

use super::EngineError;
use super::choice::Choice;
use super::llama::{Layer, Llama, Part, Pass, Projected, Span, passes};
use super::observe::Observer;
use super::prefill::{Meter, Run};
use crate::backend::{Backend, Visible};
use crate::cache::Steer;
use crate::policy::{Keep, LayerPlan};

/// A layer under way for one prompt.
pub(super) struct Reading<'r, 'a, B: Backend> {
    pub(super) run: &'r mut Run<'a, B>,
    rules: &'r LayerPlan,
    pub(super) kv: B::Kv,
    observer: Observer<'r, B>,
    /// Original positions of the rows, where the host goes by them.
    positions: Arc<[u32]>,
    /// Rows that the layer reads.
    pub(super) rows: usize,
}

/// What all runs have in common.
type Common<'a, B> = (&'a B, &'a Llama<B>, &'a Meter<'a>);

/// What all have in common, and the passes that their rows take; nothing for no prompts.
fn under_way<'a, B: Backend>(readings: &[Reading<'_, 'a, B>]) -> Option<(Common<'a, B>, Vec<Pass>)> {
    let Run { backend, llama, meter, .. } = &*readings.first()?.run;
    let rows: Vec<usize> = readings.iter().map(|reading| reading.run.rows).collect();
    Some(((backend, llama, meter), passes(&rows, backend.chunk_rows())))
}

/// Where the keys and values of a part go, and who watches its queries.
type Store<'p, 'r, B> = (&'p mut <B as Backend>::Kv, &'p mut Observer<'r, B>);

/// The rows of a pass, and the store of each part.
fn gather<'p, 'r, B: Backend>(
    readings: &'p mut [Reading<'r, '_, B>],
    pass: &Pass,
) -> (Vec<Part<'p, B>>, Vec<Store<'p, 'r, B>>) {
    let mut pass = pass.iter().peekable();
    let takes_part = |(index, reading): (usize, &'p mut Reading<'r, '_, B>)| {
        let (_, rows) = pass.next_if(|(sequence, _)| *sequence == index)?;
        let Reading { run, kv, observer, .. } = reading;
        let Run { hidden, places, .. } = &mut **run;
        Some((Part { hidden, span: places.span(rows.clone()) }, (kv, observer)))
    };
    readings.iter_mut().enumerate().filter_map(takes_part).unzip()
}

/// Keys and values of every row, and what is to be observed, without attention.
pub(super) fn read_keys<B: Backend>(
    layer: &Layer<B>,
    readings: &mut [Reading<'_, '_, B>],
) -> Result<(), EngineError> {
    let Some(((backend, llama, meter), passes)) = under_way(readings) else { return Ok(()) };
    for pass in passes {
        meter.control.check()?;
        let (parts, stores) = gather(readings, &pass);
        let normed = layer.attention_input(backend, &llama.config, &parts)?;
        let spans: Vec<Span<'_, B>> = parts.iter().map(|part| part.span.clone()).collect();
        let mut end_of_part = 0;
        let [keys, values] = layer.keys_values(backend, &normed, &spans)?;
        let read = keys.iter().zip(&values).zip(stores).zip(&spans);
        for (((keys, values), (kv, observer)), span) in read {
            let rows = &span.rows;
            backend.append_kv(kv, keys, values, span.positions, rows.start)?;
            end_of_part += rows.len();
            let count = observer.watched(rows);
            if count > 0 {
                let observers = backend.slice_rows(&normed, end_of_part - count..end_of_part)?;
                let span = Span { rows: rows.end - count..rows.end, ..span.clone() };
                for queries in layer.queries(backend, &observers, &[span])? {
                    observer.look(&queries, kv, rows.end)?;
                }
            }
        }
        meter.advance(pass.iter().map(|(_, rows)| rows.len()).sum());
    }
    Ok(())
}

/// Attention and MLP of the rows that go on.
pub(super) fn attend_selected<B: Backend>(
    layer: &Layer<B>,
    readings: &mut [Reading<'_, '_, B>],
    selected: &[B::Indices],
) -> Result<(), EngineError> {
    let Some(((backend, llama, meter), passes)) = under_way(readings) else { return Ok(()) };
    for pass in passes {
        meter.control.check()?;
        let (mut parts, stores) = gather(readings, &pass);
        let normed = layer.attention_input(backend, &llama.config, &parts)?;
        let spans: Vec<Span<'_, B>> = parts.iter().map(|part| part.span.clone()).collect();
        let mut attended = Vec::with_capacity(parts.len());
        for (queries, ((sequence, rows), (kv, observer))) in
            layer.queries(backend, &normed, &spans)?.iter().zip(pass.iter().zip(stores))
        {
            let visible = Visible::Rows { rows: &selected[*sequence], first: rows.start };
            attended.push(observer.attention(queries, kv, visible)?);
        }
        layer.finish(backend, &llama.config, &mut parts, attended)?;
    }
    Ok(())
}

/// The whole layer for every row, and what is to be observed in passing.
pub(super) fn attend_all<B: Backend>(
    layer: &Layer<B>,
    readings: &mut [Reading<'_, '_, B>],
) -> Result<(), EngineError> {
    let Some(((backend, llama, meter), passes)) = under_way(readings) else { return Ok(()) };
    for pass in passes {
        meter.control.check()?;
        let (mut parts, mut stores) = gather(readings, &pass);
        layer.read(backend, &llama.config, &mut parts, |part, span, projected| {
            let (kv, observer) = &mut stores[part];
            let Projected { queries, keys, values } = projected;
            backend.append_kv(kv, &keys, &values, span.positions, span.rows.start)?;
            observer.attend(&queries, kv, span.rows.end)
        })?;
        meter.advance(pass.iter().map(|(_, rows)| rows.len()).sum());
    }
    Ok(())
}

impl<'r, 'a, B: Backend> Reading<'r, 'a, B> {
    pub(super) fn begin(
        run: &'r mut Run<'a, B>,
        index: usize,
        rules: &'r LayerPlan,
        steer: Option<&'r Steer>,
        trace: bool,
    ) -> Result<Self, EngineError> {
        let (backend, shape, rows) = (run.backend, run.llama.shape(), run.rows);
        let slack = if rules.keep == Keep::All { run.options.slack } else { 0 };
        let kv = backend.new_kv(shape.kv_heads, shape.head_dim, rows.saturating_add(slack))?;
        let bias = steer.and_then(|steer| steer.bias(index));
        let observer = Observer::new(backend, rules, bias, trace);
        let by_position = match rules.keep {
            Keep::Recovered { .. } => true,
            Keep::Ends { .. } | Keep::Random { .. } if run.named[index].is_none() => trace || steer.is_some(),
            _ => trace,
        };
        let positions = if by_position { run.positions()? } else { Arc::default() };
        Ok(Self { run, rules, kv, observer, positions, rows })
    }

    /// Whether scores come before attention, so that rows which do not go on need none.
    pub(super) fn chooses_first(&self, index: usize) -> bool {
        let is_last = index + 1 == self.run.llama.layers.len();
        self.run.options.exact_shortcuts && (is_last || self.rules.propagate.is_some())
    }

    /// Bytes of keys and values that the layer has by now.
    pub(super) fn kv_bytes(&self) -> usize {
        self.run.kv_bytes(&self.kv)
    }

    /// What the scores choose to keep, and which rows go on where not all do.
    pub(super) fn choose(&mut self, index: usize) -> Result<(Choice<B>, Option<B::Indices>), EngineError> {
        let (mut choice, going_on) = self.run.choose(index, self.rules, &self.observer, &self.positions)?;
        match going_on {
            Some(rows) if !self.run.settles(index, &rows)? => {
                choice.narrows = false;
                Ok((choice, None))
            }
            going_on => Ok((choice, going_on)),
        }
    }

    /// Leaves in the cache what is kept.
    pub(super) fn compact(self, choice: Choice<B>) -> Result<(), EngineError> {
        let Self { run, kv, observer, positions, rows, .. } = self;
        run.compact(rows, kv, choice, &observer, &positions)
    }
}
