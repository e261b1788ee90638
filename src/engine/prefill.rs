//! The layerwise prefill. A layer's full keys and values live only while that layer runs: score,
//! select, gather, free.

use super::llama::{Layer, Llama, Places, chunks};
use super::observe::Observer;
use super::trace::{LayerTrace, Trace, retained_mass};
use super::{Control, Engine, EngineError, check_tokens};
use crate::backend::{Backend, Select, Share, Visible};
use crate::cache::Cache;
use crate::policy::{Keep, LayerPlan, ModelShape, Plan, Propagate, Saliency, random_positions};

/// How a prefill runs.
#[derive(Clone, Copy, Debug)]
pub struct PrefillOptions {
    /// Leave out rows that cannot change the logits: the TSP layer attends only for the rows that go
    /// on, the last layer only for the last row. Same result up to rounding; off, every layer runs
    /// as published.
    pub exact_shortcuts: bool,
    /// Note what was kept; see [`Trace`].
    pub trace: bool,
    /// Tokens to leave room for in each kv head, so that decoding need not move the cache.
    pub slack: usize,
}

impl Default for PrefillOptions {
    fn default() -> Self {
        Self { exact_shortcuts: true, trace: false, slack: 0 }
    }
}

/// What a prefill leaves.
#[derive(Debug)]
pub struct Prefill<B: Backend> {
    /// Keys and values for decoding.
    pub cache: Cache<B>,
    /// Logits of the token behind the prompt, in f32.
    pub logits: Vec<f32>,
    /// The most bytes of keys and values that were alive at once.
    pub peak_kv_bytes: usize,
    /// What was kept, where [`PrefillOptions::trace`] asks for it.
    pub trace: Option<Trace>,
}

impl<B: Backend> Engine<B> {
    /// Reads a prompt as the plan says.
    ///
    /// # Errors
    /// No tokens, an id outside the vocabulary, more tokens than the model's context takes, a plan
    /// for another model or length, cancellation, or a failure of the backend.
    pub fn prefill(
        &self,
        ids: &[u32],
        plan: &Plan,
        options: &PrefillOptions,
        control: &Control<'_>,
    ) -> Result<Prefill<B>, EngineError> {
        let backend = &self.backend;
        let llama = &self.llama;
        check_tokens(&llama.config, ids, 0)?;
        check_plan(plan, llama.shape(), ids.len())?;
        control.check()?;

        let mut run = Run::start(backend, llama, ids, options, control, plan)?;
        for (index, (layer, rules)) in llama.layers.iter().zip(&plan.layers).enumerate() {
            run.layer(index, layer, rules)?;
        }
        let logits = llama.logits(backend, &run.hidden, run.rows - 1)?;
        let cache = Cache::new(run.caches, llama.shape(), ids.len(), backend.kv_element_bytes());
        Ok(Prefill { cache, logits, peak_kv_bytes: run.peak_kv_bytes, trace: run.trace })
    }
}

/// A prefill under way.
struct Run<'a, B: Backend> {
    backend: &'a B,
    llama: &'a Llama<B>,
    options: &'a PrefillOptions,
    control: &'a Control<'a>,
    prompt_tokens: usize,
    /// The residual stream of the tokens that got this far.
    hidden: B::Tensor,
    rows: usize,
    places: Places<B>,
    caches: Vec<B::Kv>,
    kept_kv_bytes: usize,
    peak_kv_bytes: usize,
    done: usize,
    total: usize,
    trace: Option<Trace>,
}

/// What a layer's scores led to.
struct Choice<B: Backend> {
    /// Rows kept for each kv head, by score.
    kept: Option<B::Indices>,
    /// Rows that go on.
    propagated: Option<B::Indices>,
}

impl<'a, B: Backend> Run<'a, B> {
    fn start(
        backend: &'a B,
        llama: &'a Llama<B>,
        ids: &[u32],
        options: &'a PrefillOptions,
        control: &'a Control<'a>,
        plan: &Plan,
    ) -> Result<Self, EngineError> {
        let positions = backend.indices(vec![(0..ids.len() as u32).collect()])?;
        Ok(Self {
            backend,
            llama,
            options,
            control,
            prompt_tokens: ids.len(),
            hidden: backend.embed(&llama.embedding, ids)?,
            rows: ids.len(),
            places: llama.places(backend, positions, ids.len())?,
            caches: Vec::with_capacity(plan.layers.len()),
            kept_kv_bytes: 0,
            peak_kv_bytes: 0,
            done: 0,
            total: plan.layers.iter().map(|layer| layer.rows).sum(),
            trace: options.trace.then(Trace::default),
        })
    }

    fn layer(&mut self, index: usize, layer: &Layer<B>, rules: &LayerPlan) -> Result<(), EngineError> {
        let shape = self.llama.shape();
        let slack = if rules.keep == Keep::All { self.options.slack } else { 0 };
        let mut kv = self.backend.new_kv(shape.kv_heads, shape.head_dim, self.rows.saturating_add(slack))?;
        let mut observer = Observer::new(self.backend, rules, self.options.trace);
        let is_last = index + 1 == shape.layers;
        let read_rows = self.rows;

        let choice = if self.options.exact_shortcuts && (is_last || rules.propagate.is_some()) {
            self.read_keys(layer, &mut kv, &mut observer)?;
            let choice = self.choose(rules, &observer)?;
            let last_row;
            let going_on = match &choice.propagated {
                Some(rows) => rows,
                None => {
                    last_row = self.backend.indices(vec![vec![self.rows as u32 - 1]])?;
                    &last_row
                }
            };
            self.go_on_with(going_on)?;
            self.attend_selected(layer, &kv, going_on)?;
            choice
        } else {
            self.attend_all(layer, &mut kv, &mut observer)?;
            let choice = self.choose(rules, &observer)?;
            if let Some(rows) = &choice.propagated {
                self.go_on_with(rows)?;
            }
            choice
        };
        self.compact(index, rules, read_rows, kv, choice, &observer)?;
        self.done += read_rows;
        self.control.report(self.done, self.total);
        Ok(())
    }

    /// Keys and values of every row, and what is to be observed, without attention.
    fn read_keys(
        &mut self,
        layer: &Layer<B>,
        kv: &mut B::Kv,
        observer: &mut Observer<'_, B>,
    ) -> Result<(), EngineError> {
        let first_observer = self.rows - observer.observers();
        for rows in chunks(self.rows, self.backend.chunk_rows()) {
            self.control.check()?;
            let end = rows.end;
            let normed =
                layer.attention_input(self.backend, &self.llama.config, &self.hidden, rows.clone())?;
            layer.append_kv(self.backend, kv, &normed, &self.places, rows.start)?;
            let count = rows.len().min(end.saturating_sub(first_observer));
            if count > 0 {
                let observers = self.backend.last_rows(&normed, count)?;
                let queries = layer.queries(self.backend, &observers, &self.places, end - count)?;
                observer.look(&queries, kv, end)?;
            }
        }
        Ok(())
    }

    /// Attention and MLP of rows that [`go_on_with`](Self::go_on_with) left.
    fn attend_selected(
        &mut self,
        layer: &Layer<B>,
        kv: &B::Kv,
        selected: &B::Indices,
    ) -> Result<(), EngineError> {
        let config = &self.llama.config;
        for rows in chunks(self.rows, self.backend.chunk_rows()) {
            self.control.check()?;
            let normed = layer.attention_input(self.backend, config, &self.hidden, rows.clone())?;
            let queries = layer.queries(self.backend, &normed, &self.places, rows.start)?;
            let visible = Visible::Rows { rows: selected, first: rows.start };
            let attended = self.backend.attention(&queries, kv, visible)?;
            layer.finish(self.backend, config, &mut self.hidden, rows, &attended)?;
        }
        Ok(())
    }

    /// The whole layer for every row, and what is to be observed in passing.
    fn attend_all(
        &mut self,
        layer: &Layer<B>,
        kv: &mut B::Kv,
        observer: &mut Observer<'_, B>,
    ) -> Result<(), EngineError> {
        for rows in chunks(self.rows, self.backend.chunk_rows()) {
            self.control.check()?;
            let (end, config) = (rows.end, &self.llama.config);
            layer.read(self.backend, config, &mut self.hidden, rows, &self.places, kv, |queries, kv| {
                observer.attend(queries, kv, end)
            })?;
            self.control.report(self.done + end, self.total);
        }
        Ok(())
    }

    /// Which rows the scores choose.
    fn choose(&self, rules: &LayerPlan, observer: &Observer<'_, B>) -> Result<Choice<B>, EngineError> {
        let backend = self.backend;
        let mut choice = Choice { kept: None, propagated: None };
        // Pooled scores of the rows before the window, by kv head, and the window.
        let pooled = |saliency: Saliency| {
            let window = saliency.window.min(self.rows);
            let Some(scores) = observer.window(window) else { return Ok(None) };
            let (heads, keys) = (self.llama.config.kv_heads, self.rows - window);
            let groups = backend.pool_groups(scores, heads, keys, saliency.pooling)?;
            Ok::<_, EngineError>(Some((groups, window)))
        };
        if let Some((groups, window)) = rules.saliency().map(pooled).transpose()?.flatten() {
            choice.kept = match &rules.keep {
                Keep::Top { count, .. } => {
                    Some(backend.select(&groups, Select { count: count - window, tail: window })?)
                }
                Keep::Each { counts, .. } => {
                    let counts: Vec<usize> = counts.iter().map(|count| count - window).collect();
                    Some(backend.select_each(&groups, &counts, window)?)
                }
                Keep::Shared { count, floor, .. } => {
                    let share = Share { mean: count - window, floor: *floor, tail: window };
                    Some(backend.select_shared(&groups, share)?)
                }
                Keep::All | Keep::Ends { .. } | Keep::Random { .. } => None,
            };
        }
        if let Some(Propagate { count, saliency }) = rules.propagate
            && let Some((groups, window)) = pooled(saliency)?
        {
            let select = Select { count: count - window, tail: window };
            choice.propagated = Some(backend.select(&backend.sum_heads(&groups)?, select)?);
        }
        Ok(choice)
    }

    /// Narrows the residual stream to some of its rows.
    fn go_on_with(&mut self, rows: &B::Indices) -> Result<(), EngineError> {
        self.hidden = self.backend.gather_rows(&self.hidden, rows)?;
        let positions = self.backend.gather_indices(&self.places.positions, rows)?;
        self.places = self.llama.places(self.backend, positions, self.prompt_tokens)?;
        self.rows = self.backend.rows(&self.hidden);
        Ok(())
    }

    /// Leaves in the cache what the rules keep of a layer's keys and values.
    fn compact(
        &mut self,
        index: usize,
        rules: &LayerPlan,
        rows: usize,
        kv: B::Kv,
        choice: Choice<B>,
        observer: &Observer<'_, B>,
    ) -> Result<(), EngineError> {
        let full_bytes = self.kv_bytes(&kv);
        let kept = match choice.kept {
            Some(kept) => Some(kept),
            None => match self.listed(index, &rules.keep, rows) {
                Some(lists) => Some(self.backend.indices(lists)?),
                None => None,
            },
        };
        let mass = match (&self.trace, observer.measure()) {
            (Some(_), Some((window, scores))) => {
                let lists = kept.as_ref().map(|kept| self.backend.read_indices(kept)).transpose()?;
                let scores = self.backend.read_scores(scores)?;
                retained_mass(&scores, self.llama.config.kv_heads, window, lists.as_deref())
            }
            _ => Vec::new(),
        };
        let (kv, at_work) = match kept {
            Some(kept) => {
                let compacted = self.backend.gather_kv(&kv, &kept, self.options.slack)?;
                let at_work = full_bytes + self.kv_bytes(&compacted);
                (compacted, at_work)
            }
            None => (kv, full_bytes),
        };
        self.peak_kv_bytes = self.peak_kv_bytes.max(self.kept_kv_bytes + at_work);
        self.kept_kv_bytes += self.kv_bytes(&kv);
        if let Some(trace) = &mut self.trace {
            let propagated = match &choice.propagated {
                Some(_) => self.backend.read_indices(&self.places.positions)?.into_iter().next(),
                None => None,
            };
            let kept = self.backend.kv_positions(&kv)?;
            trace.layers.push(LayerTrace { rows, kept, mass, propagated });
        }
        self.caches.push(kv);
        Ok(())
    }

    /// Rows that a rule names without scores, for each kv head; `None`: all.
    fn listed(&self, layer: usize, keep: &Keep, rows: usize) -> Option<Vec<Vec<u32>>> {
        let end = rows as u32;
        let heads = 0..self.llama.config.kv_heads;
        match *keep {
            Keep::All | Keep::Top { .. } | Keep::Each { .. } | Keep::Shared { .. } => None,
            Keep::Ends { sinks, recent } => {
                let list: Vec<u32> = (0..sinks as u32).chain(end - recent as u32..end).collect();
                Some(heads.map(|_| list.clone()).collect())
            }
            Keep::Random { count, window, seed } => {
                let choose = |head| {
                    let mut list = random_positions(rows - window, count - window, seed, layer, head);
                    list.extend(end - window as u32..end);
                    list
                };
                Some(heads.map(choose).collect())
            }
        }
    }

    fn kv_bytes(&self, kv: &B::Kv) -> usize {
        let entries: usize = self.backend.kv_lengths(kv).iter().sum();
        entries * 2 * self.llama.config.head_dim * self.backend.kv_element_bytes()
    }
}

/// The plan is for this model and prompt, and its numbers fit together.
fn check_plan(plan: &Plan, model: ModelShape, tokens: usize) -> Result<(), EngineError> {
    if plan.shape != model || plan.prompt_tokens != tokens || plan.layers.len() != model.layers {
        let plan_tokens = plan.prompt_tokens;
        return Err(EngineError::WrongPlan { plan: plan.shape, plan_tokens, model, tokens });
    }
    let mut rows = tokens;
    for (layer, rules) in plan.layers.iter().enumerate() {
        let broken = |problem: String| EngineError::BrokenPlan { layer, problem };
        if rules.rows != rows {
            return Err(broken(format!("reads {} tokens, but {rows} reach it", rules.rows)));
        }
        check_keep(&rules.keep, model, rows).map_err(broken)?;
        if let Some(Propagate { count, saliency }) = rules.propagate {
            saliency.check().map_err(|error| broken(format!("cannot score: {error}")))?;
            if !(saliency.window..=rows).contains(&count) {
                return Err(broken(format!("hands on {count} of {rows} tokens, window {}", saliency.window)));
            }
            rows = count;
        }
    }
    Ok(())
}

/// A rule can be followed in a layer of this many rows; else what is wrong with it.
fn check_keep(keep: &Keep, model: ModelShape, rows: usize) -> Result<(), String> {
    let fits = |count: usize, window: usize| match count {
        count if count > rows => Err(format!("keeps {count} of {rows} tokens")),
        count if count < window => Err(format!("keeps {count} tokens, fewer than the window's {window}")),
        _ => Ok(()),
    };
    let scored = |saliency: &Saliency| saliency.check().map_err(|error| format!("cannot score: {error}"));
    match keep {
        Keep::All => Ok(()),
        Keep::Ends { sinks, recent } => fits(sinks.saturating_add(*recent), 0),
        Keep::Random { count, window, .. } => fits(*count, *window),
        Keep::Top { count, saliency } => scored(saliency).and_then(|()| fits(*count, saliency.window)),
        Keep::Each { counts, saliency } => {
            scored(saliency)?;
            if counts.len() != model.kv_heads {
                return Err(format!("has {} budgets for {} kv heads", counts.len(), model.kv_heads));
            }
            counts.iter().try_for_each(|count| fits(*count, saliency.window))
        }
        Keep::Shared { count, floor, saliency } => {
            scored(saliency)?;
            if !(0.0..=1.0).contains(floor) {
                return Err(format!("gives every head {floor} of the mean, no share from 0 to 1"));
            }
            fits(*count, saliency.window)
        }
    }
}
