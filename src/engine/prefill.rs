//! The layerwise prefill. A layer's full keys and values live only while that layer runs: score,
//! select, gather, free.

use std::borrow::Cow;
use std::cell::Cell;
use std::mem;
use std::sync::Arc;

use super::check::check_plan;
use super::layer_cache::{LayerCache, count_entries};
use super::llama::{Layer, Llama, Places};
use super::named::before_reading;
use super::reading::{Reading, attend_all, attend_selected, read_keys};
use super::restart::Restarting;
use super::settling::Settling;
use super::trace::{LayerTrace, Trace};
use super::{Control, Engine, EngineError, MemoryEstimate, MemoryOptions, check_tokens};
use crate::backend::{Backend, BackendError};
use crate::cache::{Cache, Decoding, Steer, Tokens};
use crate::policy::{LayerPlan, Plan};

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
    /// The layer that tokens went on from, where it was picked among candidates; `None` also where it is the last
    /// candidate and the model's last layer.
    pub tsp_layer: Option<usize>,
    /// What was kept, where [`PrefillOptions::trace`] asks for it.
    pub trace: Option<Trace>,
}

/// A prompt, and how it is to be read.
#[derive(Clone, Copy, Debug)]
pub struct Prompt<'a> {
    /// Its tokens.
    pub ids: &'a [u32],
    /// Its plan.
    pub plan: &'a Plan,
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
        Ok(self.prefill_batch(&[Prompt { ids, plan }], options, control)?.remove(0))
    }

    /// Reads prompts of any lengths, each as its own plan says, layer by layer: matrix products take the rows of
    /// all of them at once, all else looks at each as if it were alone. What is left for each, in their order, is
    /// what it would be alone, up to the rounding of products of another number of rows.
    ///
    /// # Errors
    /// As for [`prefill`](Self::prefill), of the first prompt that cannot be read.
    pub fn prefill_batch(
        &self,
        prompts: &[Prompt<'_>],
        options: &PrefillOptions,
        control: &Control<'_>,
    ) -> Result<Vec<Prefill<B>>, EngineError> {
        let (backend, llama) = (&self.backend, &self.llama);
        for Prompt { ids, plan } in prompts {
            check_tokens(&llama.config, ids, 0)?;
            check_plan(plan, llama.shape(), ids.len())?;
        }
        control.check()?;
        if prompts.is_empty() {
            return Ok(Vec::new());
        }
        let plans: Vec<&Plan> = prompts.iter().map(|prompt| prompt.plan).collect();
        let memory = MemoryOptions::new(backend, 0, options.slack);
        backend.reserve(MemoryEstimate::together(&llama.config, &plans, &memory).total());
        let total = prompts.iter().map(rows_read).sum();
        let meter = Meter { control, done: Cell::new(0), total: Cell::new(total) };
        let lists = prompts.iter().map(|prompt| Lists::upload(backend, prompt));
        let lists = lists.collect::<Result<Vec<_>, BackendError>>()?;
        let mut runs = Vec::with_capacity(prompts.len());
        for (prompt, lists) in prompts.iter().zip(lists) {
            runs.push(Run::start(backend, llama, prompt, lists, options, &meter)?);
        }
        for (run, prompt) in runs.iter_mut().zip(prompts) {
            run.start_anew(prompt.plan)?;
        }
        for (index, layer) in llama.layers.iter().enumerate() {
            let rules = runs.iter().zip(prompts).map(|(run, prompt)| run.rules(prompt.plan, index));
            let rules: Vec<Cow<'_, LayerPlan>> = rules.collect();
            read_layer(index, layer, &mut runs, &rules)?;
        }
        let streams: Vec<&B::Tensor> = runs.iter().map(|run| &run.hidden).collect();
        let logits = llama.logits(backend, &streams)?;
        runs.into_iter().zip(logits).map(|(run, logits)| run.finish(logits)).collect()
    }
}

/// How far prompts are, in rows times layers.
pub(super) struct Meter<'a> {
    pub(super) control: &'a Control<'a>,
    done: Cell<usize>,
    total: Cell<usize>,
}

impl Meter<'_> {
    pub(super) fn advance(&self, rows: usize) {
        self.done.set(self.done.get() + rows);
        self.control.report(self.done.get(), self.total.get());
    }

    /// That many rows need not be read after all.
    fn spare(&self, rows: usize) {
        self.total.set(self.total.get() - rows);
    }
}

/// Rows of all layers that read a prompt.
fn rows_read(prompt: &Prompt<'_>) -> usize {
    let first_pass = prompt.plan.restart.map_or(0, |restart| (restart.layer + 1) * prompt.ids.len());
    prompt.plan.layers.iter().fold(first_pass, |total, layer| total + layer.rows)
}

/// What is long of a prompt. It goes to the device before any work is queued there, for which a device may let the host
/// wait.
struct Lists<B: Backend> {
    ids: B::Indices,
    positions: B::Indices,
    /// Positions behind a restart.
    restart: Option<B::Indices>,
    /// By layer, rows that stay and are named by their place.
    named: Vec<Option<B::Indices>>,
}

impl<B: Backend> Lists<B> {
    fn upload(backend: &B, &Prompt { ids, plan }: &Prompt<'_>) -> Result<Self, BackendError> {
        let up_to = |end: usize| backend.indices(vec![(0..end as u32).collect()]);
        Ok(Self {
            ids: backend.indices(vec![ids.to_vec()])?,
            positions: up_to(ids.len())?,
            restart: plan.restart.map(|rule| up_to(rule.count)).transpose()?,
            named: before_reading(backend, plan)?,
        })
    }
}

/// A prefill under way.
pub(super) struct Run<'a, B: Backend> {
    pub(super) backend: &'a B,
    pub(super) llama: &'a Llama<B>,
    pub(super) options: &'a PrefillOptions,
    pub(super) meter: &'a Meter<'a>,
    pub(super) prompt_tokens: usize,
    /// The residual stream of the tokens that got this far.
    pub(super) hidden: B::Tensor,
    pub(super) rows: usize,
    pub(super) places: Places<B>,
    /// The positions of `places`, where the host knows them.
    pub(super) positions: Option<Arc<[u32]>>,
    /// Of the layers so far.
    pub(super) caches: Vec<LayerCache<B>>,
    /// By layer, rows that stay and were named before.
    pub(super) named: Vec<Option<B::Indices>>,
    pub(super) decoding: Decoding<B>,
    /// Set until the first pass of a restart is done.
    pub(super) restart: Option<Restarting<'a, B>>,
    /// Positions of the prompt that are read anew, where the host knows them.
    pub(super) restarted: Option<Vec<u32>>,
    /// The most bytes of keys and values in a first pass.
    pub(super) first_pass_bytes: usize,
    pub(super) trace: Option<Trace>,
    settling: Option<Settling<'a>>,
}

/// One layer for all prompts.
fn read_layer<B: Backend>(
    index: usize,
    layer: &Layer<B>,
    runs: &mut [Run<'_, B>],
    rules: &[Cow<'_, LayerPlan>],
) -> Result<(), EngineError> {
    let steers: Vec<Option<Steer>> = runs.iter().map(|run| run.decoding.steer.clone()).collect();
    let begun = runs.iter_mut().zip(rules).zip(&steers).map(|((run, rules), steer)| {
        let trace = run.options.trace;
        Reading::begin(run, index, rules, steer.as_ref(), trace)
    });
    let begun = begun.collect::<Result<Vec<_>, EngineError>>()?;
    let (mut ahead, mut whole): (Vec<_>, Vec<_>) =
        begun.into_iter().partition(|reading| reading.chooses_first(index));

    attend_all(layer, &mut whole)?;
    for mut reading in whole {
        let (choice, going_on) = reading.choose(index)?;
        if let Some(rows) = &going_on {
            reading.run.go_on_with(rows)?;
        }
        reading.compact(choice)?;
    }

    read_keys(layer, &mut ahead)?;
    let (mut choices, mut selected) = (Vec::new(), Vec::new());
    for reading in &mut ahead {
        let (choice, going_on) = reading.choose(index)?;
        let last = reading.rows as u32 - 1;
        let narrowed = match going_on {
            None if index + 1 == reading.run.llama.layers.len() => {
                Some(reading.run.backend.indices(vec![vec![last]])?)
            }
            going_on => going_on,
        };
        let rows = match narrowed {
            Some(rows) => {
                reading.run.go_on_with(&rows)?;
                rows
            }
            // A candidate for the TSP layer that did not become it.
            None => reading.run.backend.indices(vec![(0..=last).collect()])?,
        };
        choices.push(choice);
        selected.push(rows);
    }
    attend_selected(layer, &mut ahead, &selected)?;
    ahead.into_iter().zip(choices).try_for_each(|(reading, choice)| reading.compact(choice))
}

impl<'a, B: Backend> Run<'a, B> {
    fn start(
        backend: &'a B,
        llama: &'a Llama<B>,
        &Prompt { ids, plan }: &Prompt<'a>,
        lists: Lists<B>,
        options: &'a PrefillOptions,
        meter: &'a Meter<'a>,
    ) -> Result<Self, EngineError> {
        let highlighted = plan.highlighted();
        let tokens = Tokens { classes: plan.classes.clone(), ids: ids.to_vec(), highlighted };
        let steer = plan.steering.as_ref().map(|steering| Steer::new(steering, plan.shape, ids.len()));
        let places = llama.places(backend, lists.positions, ids.len())?;
        let hidden = backend.embed_list(&llama.embedding, &lists.ids)?;
        let restart = plan.restart.as_ref().zip(lists.restart);
        let restart = restart.map(|(rule, positions)| Restarting { rule, ids: lists.ids, positions });
        Ok(Self {
            backend,
            llama,
            options,
            meter,
            prompt_tokens: ids.len(),
            hidden,
            rows: ids.len(),
            places,
            positions: Some((0..ids.len() as u32).collect()),
            named: lists.named,
            restart,
            caches: Vec::with_capacity(plan.layers.len()),
            decoding: Decoding { steer, evictions: Vec::new(), tokens },
            restarted: None,
            first_pass_bytes: 0,
            trace: options.trace.then(Trace::default),
            settling: plan.candidates.as_ref().map(Settling::new),
        })
    }

    /// Adds a layer to the trace.
    pub(super) fn note(&mut self, mut layer: LayerTrace) {
        let Some(trace) = &mut self.trace else { return };
        if let Some(restarted) = &self.restarted {
            let original = |position: &mut u32| *position = restarted[*position as usize];
            layer.kept.iter_mut().chain(&mut layer.propagated).flatten().for_each(original);
        }
        trace.layers.push(layer);
    }

    /// What a layer of the plan is to do, as things stand.
    fn rules<'p>(&self, plan: &'p Plan, layer: usize) -> Cow<'p, LayerPlan> {
        plan.rules(layer, self.settling.as_ref().and_then(|settling| settling.found.layer))
    }

    /// Whether tokens go on with the rows that a layer chose: a candidate for the TSP layer may leave it at
    /// that. Waits for the device where it is one.
    pub(super) fn settles(&mut self, layer: usize, rows: &B::Indices) -> Result<bool, EngineError> {
        let Some(settling) = self.settling.as_mut().filter(|settling| settling.is_open(layer)) else {
            return Ok(true);
        };
        // A candidate reads all tokens, so that a row's number is its position.
        let chosen = self.backend.read_indices(rows)?.concat();
        let settles = settling.settles(layer, chosen, &self.decoding.tokens.highlighted);
        if settles {
            self.meter.spare(settling.spared(layer, self.rows));
        }
        Ok(settles)
    }

    /// The original positions of the rows. Waits for the device after the stream was narrowed.
    pub(super) fn positions(&mut self) -> Result<Arc<[u32]>, EngineError> {
        if let Some(known) = &self.positions {
            return Ok(Arc::clone(known));
        }
        let read: Arc<[u32]> = self.backend.read_indices(&self.places.positions)?.concat().into();
        self.positions = Some(Arc::clone(&read));
        Ok(read)
    }

    /// Narrows the residual stream to some of its rows.
    pub(super) fn go_on_with(&mut self, rows: &B::Indices) -> Result<(), EngineError> {
        self.hidden = self.backend.gather_rows(&self.hidden, rows)?;
        let positions = self.backend.gather_indices(&self.places.positions, rows)?;
        self.places = self.llama.places(self.backend, positions, self.prompt_tokens)?;
        self.positions = None;
        self.rows = self.backend.rows(&self.hidden);
        Ok(())
    }

    fn finish(mut self, logits: Vec<f32>) -> Result<Prefill<B>, EngineError> {
        let caches = mem::take(&mut self.caches);
        let (layers, peak_kv_bytes) = count_entries(self.backend, caches, |kv| self.kv_bytes(kv))?;
        let peak_kv_bytes = peak_kv_bytes.max(self.first_pass_bytes);
        let Self { backend, hidden, prompt_tokens, mut trace, settling, .. } = self;
        let settled = settling.map(|settling| settling.found);
        let tsp_layer = settled.as_ref().and_then(|settled| settled.layer);
        if let Some(trace) = &mut trace {
            trace.restarted = self.restarted;
            trace.settled = settled;
            trace.hidden = backend.read(&backend.last_rows(&hidden, 1)?)?;
        }
        let (shape, element_bytes) = (self.llama.shape(), backend.kv_element_bytes());
        let cache = Cache::new(layers, shape, prompt_tokens, element_bytes, self.decoding);
        Ok(Prefill { cache, logits, peak_kv_bytes, tsp_layer, trace })
    }

    pub(super) fn kv_bytes(&self, kv: &B::Kv) -> usize {
        let entries: usize = self.backend.kv_lengths(kv).iter().sum();
        entries * 2 * self.llama.config.head_dim * self.backend.kv_element_bytes()
    }
}
