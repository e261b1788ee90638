//! The layerwise prefill. A layer's full keys and values live only while that layer runs: score,
//! select, gather, free.

use super::llama::{Layer, Llama, Places, chunks};
use super::observe::{Observer, Purpose};
use super::trace::{HeadSet, LayerTrace, Trace, retained_mass};
use super::{Control, Engine, EngineError, check_tokens};
use crate::backend::{Backend, Select, Share, Visible};
use crate::cache::{Cache, Decoding, Eviction, EvictionRule, Steer, TokenSet, Tokens, UNPOOLED, share};
use crate::policy::{
    Keep, LayerPlan, ModelShape, Plan, Propagate, Restart, SINKS, Saliency, random_positions,
};

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

        let steer = plan.steering.as_ref().map(|steering| Steer::new(steering, plan.shape, ids.len()));
        let mut run = Run::start(backend, llama, ids, options, control, plan, steer)?;
        if let Some(restart) = &plan.restart {
            run.start_anew(ids, restart)?;
        }
        for (index, (layer, rules)) in llama.layers.iter().zip(&plan.layers).enumerate() {
            run.layer(index, layer, rules)?;
        }
        let logits = llama.logits(backend, &run.hidden, run.rows - 1)?;
        let Run { caches, prompt_tokens, peak_kv_bytes, mut trace, decoding, restarted, .. } = run;
        if let Some(trace) = &mut trace {
            trace.restarted = restarted;
        }
        let cache = Cache::new(caches, llama.shape(), prompt_tokens, backend.kv_element_bytes(), decoding);
        Ok(Prefill { cache, logits, peak_kv_bytes, trace })
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
    decoding: Decoding<B>,
    /// Positions of the prompt that are read anew.
    restarted: Option<Vec<u32>>,
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
    /// The set of each kv head, where heads have sets.
    sets: Option<Vec<HeadSet>>,
}

impl<'a, B: Backend> Run<'a, B> {
    fn start(
        backend: &'a B,
        llama: &'a Llama<B>,
        ids: &[u32],
        options: &'a PrefillOptions,
        control: &'a Control<'a>,
        plan: &Plan,
        steer: Option<Steer>,
    ) -> Result<Self, EngineError> {
        let highlighted =
            plan.steering.as_ref().map_or_else(Vec::new, |steering| steering.positions(ids.len()));
        let tokens = Tokens { classes: plan.classes.clone(), ids: ids.to_vec(), highlighted };
        let first_pass = plan.restart.map_or(0, |restart| (restart.layer + 1) * ids.len());
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
            decoding: Decoding { steer, evictions: Vec::new(), tokens },
            restarted: None,
            kept_kv_bytes: 0,
            peak_kv_bytes: 0,
            done: 0,
            total: plan.layers.iter().fold(first_pass, |total, layer| total + layer.rows),
            trace: options.trace.then(Trace::default),
        })
    }

    /// The first pass of a restart: picks tokens, and begins again with these as the prompt.
    fn start_anew(&mut self, ids: &[u32], restart: &Restart) -> Result<(), EngineError> {
        let (backend, llama) = (self.backend, self.llama);
        let shape = llama.shape();
        let rules = LayerPlan::full(self.rows);
        let steer = self.decoding.steer.clone();
        let mut kv = backend.new_kv(shape.kv_heads, shape.head_dim, self.rows)?;
        for (index, layer) in llama.layers[..restart.layer].iter().enumerate() {
            let bias = steer.as_ref().and_then(|steer| steer.bias(index));
            let mut observer = Observer::new(backend, &rules, bias, false);
            self.attend_all(layer, &mut kv, &mut observer)?;
            self.peak_kv_bytes = self.peak_kv_bytes.max(self.kv_bytes(&kv));
            backend.truncate_kv(&mut kv, &vec![0; shape.kv_heads])?;
            self.done += self.rows;
        }
        let layer = &llama.layers[restart.layer];
        self.read_keys(layer, &mut kv, &mut Observer::new(backend, &rules, None, false))?;
        self.peak_kv_bytes = self.peak_kv_bytes.max(self.kv_bytes(&kv));
        self.done += self.rows;
        self.control.report(self.done, self.total);

        let last = self.rows - 1;
        let normed = layer.attention_input(backend, &llama.config, &self.hidden, last..self.rows)?;
        let products =
            backend.query_key_products(&layer.queries(backend, &normed, &self.places, last)?, &kv)?;
        drop(kv);
        let pooled = backend.pool_groups(&products, shape.kv_heads, self.rows, restart.pooling)?;
        let mut ranked = backend.sum_heads(&pooled)?;
        if let Some(steer) = &steer {
            let positions: Vec<u32> = (0..ids.len() as u32).collect();
            backend.raise_scores(&mut ranked, &backend.indices(vec![steer.rows(&positions)])?)?;
        }
        let chosen = backend.select(&ranked, Select { count: restart.count, tail: 0 })?;
        let chosen = backend.read_indices(&chosen)?.concat();

        let ids: Vec<u32> = chosen.iter().map(|position| ids[*position as usize]).collect();
        let positions = backend.indices(vec![(0..ids.len() as u32).collect()])?;
        self.hidden = backend.embed(&llama.embedding, &ids)?;
        self.places = llama.places(backend, positions, ids.len())?;
        self.decoding.tokens.highlighted = steer.as_ref().map_or_else(Vec::new, |steer| steer.rows(&chosen));
        self.decoding.steer = steer.map(|steer| steer.of_tokens(&chosen));
        self.rows = ids.len();
        self.prompt_tokens = ids.len();
        self.decoding.tokens.ids = ids;
        self.restarted = Some(chosen);
        Ok(())
    }

    fn layer(&mut self, index: usize, layer: &Layer<B>, rules: &LayerPlan) -> Result<(), EngineError> {
        let shape = self.llama.shape();
        let slack = if rules.keep == Keep::All { self.options.slack } else { 0 };
        let mut kv = self.backend.new_kv(shape.kv_heads, shape.head_dim, self.rows.saturating_add(slack))?;
        let steer = self.decoding.steer.clone();
        let bias = steer.as_ref().and_then(|steer| steer.bias(index));
        let mut observer = Observer::new(self.backend, rules, bias, self.options.trace);
        // Highlighted rows are kept, whatever the scores.
        let (positions, forced) = match &steer {
            None => (None, Vec::new()),
            Some(steer) => {
                let positions = self.backend.read_indices(&self.places.positions)?.concat();
                let forced = steer.rows(&positions);
                (Some(positions), forced)
            }
        };
        let needs_positions = matches!(rules.keep, Keep::Recovered { .. });
        let positions = match positions {
            None if needs_positions => self.backend.read_indices(&self.places.positions)?.concat(),
            positions => positions.unwrap_or_default(),
        };
        let is_last = index + 1 == shape.layers;
        let read_rows = self.rows;

        let choice = if self.options.exact_shortcuts && (is_last || rules.propagate.is_some()) {
            self.read_keys(layer, &mut kv, &mut observer)?;
            let choice = self.choose(rules, &observer, &positions, &forced)?;
            let last_row;
            let going_on = match &choice.propagated {
                Some(rows) => rows,
                None => {
                    last_row = self.backend.indices(vec![vec![self.rows as u32 - 1]])?;
                    &last_row
                }
            };
            self.go_on_with(going_on)?;
            self.attend_selected(layer, &kv, going_on, &observer)?;
            choice
        } else {
            self.attend_all(layer, &mut kv, &mut observer)?;
            let choice = self.choose(rules, &observer, &positions, &forced)?;
            if let Some(rows) = &choice.propagated {
                self.go_on_with(rows)?;
            }
            choice
        };
        self.compact(index, rules, read_rows, kv, choice, &observer, &forced)?;
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
        observer: &Observer<'_, B>,
    ) -> Result<(), EngineError> {
        let config = &self.llama.config;
        for rows in chunks(self.rows, self.backend.chunk_rows()) {
            self.control.check()?;
            let normed = layer.attention_input(self.backend, config, &self.hidden, rows.clone())?;
            let queries = layer.queries(self.backend, &normed, &self.places, rows.start)?;
            let visible = Visible::Rows { rows: selected, first: rows.start };
            let attended = observer.attention(&queries, kv, visible)?;
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

    /// Which rows the scores choose. The rows' original positions are given, and those that stay in any
    /// case.
    fn choose(
        &self,
        rules: &LayerPlan,
        observer: &Observer<'_, B>,
        positions: &[u32],
        forced: &[u32],
    ) -> Result<Choice<B>, EngineError> {
        let backend = self.backend;
        let heads = self.llama.config.kv_heads;
        let mut choice = Choice { kept: None, propagated: None, sets: None };
        // Pooled scores of the rows before the window, by kv head, and the window.
        let pooled = |saliency: Saliency| {
            let window = saliency.window.min(self.rows);
            let Some(scores) = observer.window(window) else { return Ok(None) };
            let groups = backend.pool_groups(scores, heads, self.rows - window, saliency.pooling)?;
            Ok::<_, EngineError>(Some((groups, window)))
        };
        let raise = |scores: &mut B::Scores, rows: &[u32]| match rows.is_empty() {
            true => Ok(()),
            false => backend.raise_scores(scores, &backend.indices(vec![rows.to_vec()])?),
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
                _ => None,
            };
        }
        match (&rules.keep, observer.sums(Purpose::Attention), observer.sums(Purpose::Local)) {
            (Keep::Heavy { count, window }, Some(sums), _) if *count < self.rows => {
                let mut older = backend.pool_groups(sums, heads, self.rows - window, UNPOOLED)?;
                raise(&mut older, forced)?;
                choice.kept = Some(backend.select(&older, Select { count: count - window, tail: *window })?);
            }
            (Keep::Recovered { recovery, local, frequent }, Some(sums), Some(near)) => {
                let (sums, near) = (backend.read_scores(sums)?, backend.read_scores(near)?);
                let shares = (*local, *frequent);
                let of_head = |(sums, near): (&Vec<f32>, &Vec<f32>)| {
                    self.recovering_set(*recovery, shares, positions, sums, near)
                };
                let (lists, sets): (_, Vec<_>) = sums.iter().zip(&near).map(of_head).unzip();
                choice.kept = Some(backend.indices(lists)?);
                choice.sets = Some(sets);
            }
            _ => {}
        }
        match rules.propagate {
            Some(Propagate::Top { count, saliency }) => {
                if let Some((groups, window)) = pooled(saliency)? {
                    let mut all = backend.sum_heads(&groups)?;
                    raise(&mut all, forced)?;
                    let select = Select { count: count - window, tail: window };
                    choice.propagated = Some(backend.select(&all, select)?);
                }
            }
            Some(Propagate::Recent { count, recent }) => {
                if let Some(sums) = observer.sums(Purpose::Recent) {
                    let all = backend.sum_heads(sums)?;
                    let mut older = backend.pool_groups(&all, 1, self.rows - recent, UNPOOLED)?;
                    raise(&mut older, &(0..SINKS as u32).collect::<Vec<_>>())?;
                    raise(&mut older, forced)?;
                    let select = Select { count: count - recent, tail: recent };
                    choice.propagated = Some(backend.select(&older, select)?);
                }
            }
            None => {}
        }
        Ok(choice)
    }

    /// FastGen: the cheapest set that recovers enough of a kv head's attention, given for each row the
    /// attention it got and the part of it from near by.
    fn recovering_set(
        &self,
        recovery: f64,
        (local, frequent): (f64, f64),
        positions: &[u32],
        sums: &[f32],
        near: &[f32],
    ) -> (Vec<u32>, HeadSet) {
        let tokens = &self.decoding.tokens;
        let rows = positions.len();
        // Rows count as a sequence of their own: shares are of them.
        let list = |set: TokenSet| {
            let mut list =
                tokens.of_set(set.min(TokenSet::Frequent), positions, sums, rows, (local, frequent));
            if set == TokenSet::Local {
                list.extend((rows - share(rows, local)) as u32..rows as u32);
                list.sort_unstable();
                list.dedup();
            }
            list
        };
        let all: f64 = (self.llama.config.query_heads / self.llama.config.kv_heads * rows) as f64;
        let on = |scores: &[f32], list: &[u32]| -> f64 {
            list.iter().map(|row| f64::from(scores[*row as usize])).sum()
        };
        let classed = [TokenSet::Special, TokenSet::Punctuation, TokenSet::Frequent];
        let [special, punctuation, frequent] = classed.map(list);
        // What is not kept anyway is local to the queries near by.
        let nearby = near.iter().map(|near| f64::from(*near)).sum::<f64>() - on(near, &frequent);
        let of_frequent = on(sums, &frequent);
        let recovered = [on(sums, &special), on(sums, &punctuation), of_frequent, of_frequent + nearby]
            .map(|sum| sum / all);
        let sets = [TokenSet::Special, TokenSet::Punctuation, TokenSet::Frequent, TokenSet::Local];
        let enough = recovered.iter().position(|recovered| *recovered >= recovery);
        let set = enough.map_or(TokenSet::Full, |index| sets[index]);
        let kept = if set == TokenSet::Full { (0..rows as u32).collect() } else { list(set) };
        (kept, HeadSet { set, recovered })
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
        forced: &[u32],
    ) -> Result<(), EngineError> {
        let full_bytes = self.kv_bytes(&kv);
        let kept = match choice.kept {
            Some(kept) => Some(kept),
            None => match self.listed(index, &rules.keep, rows) {
                Some(lists) => Some(self.backend.indices(lists)?),
                None => None,
            },
        };
        let kept = match kept {
            Some(kept) if !forced.is_empty() && !matches!(rules.keep, Keep::Heavy { .. }) => {
                let mut lists = self.backend.read_indices(&kept)?;
                for list in &mut lists {
                    list.extend(forced);
                    list.sort_unstable();
                    list.dedup();
                }
                Some(self.backend.indices(lists)?)
            }
            kept => kept,
        };
        let eviction = self.eviction(rules, observer, kept.as_ref(), choice.sets.as_deref(), forced)?;
        self.decoding.evictions.push(eviction);
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
            let mut kept = self.backend.kv_positions(&kv)?;
            if let Some(restarted) = &self.restarted {
                let original = |position: &mut u32| *position = restarted[*position as usize];
                kept.iter_mut().flatten().for_each(original);
            }
            trace.layers.push(LayerTrace { rows, kept, mass, propagated, sets: choice.sets });
        }
        self.caches.push(kv);
        Ok(())
    }

    /// What a layer's rule goes on doing in decoding.
    fn eviction(
        &self,
        rules: &LayerPlan,
        observer: &Observer<'_, B>,
        kept: Option<&B::Indices>,
        sets: Option<&[HeadSet]>,
        forced: &[u32],
    ) -> Result<Option<Eviction<B>>, EngineError> {
        let backend = self.backend;
        let rule = match (&rules.keep, sets) {
            (&Keep::Heavy { count, window }, _) => EvictionRule::Heavy { count, window },
            (&Keep::Recovered { local, frequent, .. }, Some(sets)) => {
                let sets = sets.iter().map(|head| head.set).collect();
                EvictionRule::Sets { sets, local, frequent }
            }
            _ => return Ok(None),
        };
        let Some(sums) = observer.sums(Purpose::Attention) else { return Ok(None) };
        let all;
        let kept = match kept {
            Some(kept) => kept,
            None => {
                let rows: Vec<u32> = (0..rules.rows as u32).collect();
                all = backend.indices(vec![rows; self.llama.config.kv_heads])?;
                &all
            }
        };
        let mut sums = backend.pool_groups(sums, self.llama.config.kv_heads, rules.rows, UNPOOLED)?;
        if !forced.is_empty() {
            backend.raise_scores(&mut sums, &backend.indices(vec![forced.to_vec()])?)?;
        }
        Ok(Some(Eviction { rule, sums: backend.gather_scores(&sums, kept)? }))
    }

    /// Rows that a rule names without scores, for each kv head; `None`: all.
    fn listed(&self, layer: usize, keep: &Keep, rows: usize) -> Option<Vec<Vec<u32>>> {
        let end = rows as u32;
        let heads = 0..self.llama.config.kv_heads;
        match *keep {
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
            _ => None,
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
    if let Some(steering) = &plan.steering {
        plan.check_steering(steering)?;
    }
    let mut rows = tokens;
    if let Some(Restart { layer, count, pooling }) = plan.restart {
        let broken = |problem: String| EngineError::BrokenPlan { layer, problem };
        if layer >= model.layers {
            return Err(broken(format!("is to pick tokens, but the last is {}", model.layers - 1)));
        }
        if count == 0 || count > tokens {
            return Err(broken(format!("picks {count} of {tokens} tokens")));
        }
        pooling.check().map_err(|error| broken(format!("cannot rank: {error}")))?;
        rows = count;
    }
    for (layer, rules) in plan.layers.iter().enumerate() {
        let broken = |problem: String| EngineError::BrokenPlan { layer, problem };
        if rules.rows != rows {
            return Err(broken(format!("reads {} tokens, but {rows} reach it", rules.rows)));
        }
        check_keep(&rules.keep, model, rows).map_err(broken)?;
        if let Some(propagate) = rules.propagate {
            let (count, reserved) = (propagate.count(), propagate.reserved());
            if let Propagate::Top { saliency, .. } = propagate {
                saliency.check().map_err(|error| broken(format!("cannot score: {error}")))?;
            }
            if reserved == 0 || !(reserved..=rows).contains(&count) {
                return Err(broken(format!(
                    "hands on {count} of {rows} tokens, of which {reserved} are the newest"
                )));
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
        // Its budget may exceed the prompt, for the tokens to come.
        Keep::Heavy { count, window } if *window == 0 || count < window => {
            Err(format!("keeps {count} tokens, fewer than its window of {window}, or none in it"))
        }
        Keep::Heavy { .. } => Ok(()),
        Keep::Recovered { recovery, local, frequent } => {
            let share = |value: &f64| (0.0..=1.0).contains(value);
            match [recovery, local, frequent].into_iter().find(|value| !share(value)) {
                Some(value) => Err(format!("recovers by {value}, no share from 0 to 1")),
                None => Ok(()),
            }
        }
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
