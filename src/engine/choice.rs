//! What a layer's scores choose, and what is left in the cache by it.

use super::EngineError;
use super::observe::{Observer, Purpose};
use super::prefill::Run;
use super::trace::{HeadSet, LayerTrace, retained_mass};
use crate::backend::{Backend, Select, Share};
use crate::cache::{Eviction, EvictionRule, TokenSet, UNPOOLED, share};
use crate::policy::{Keep, LayerPlan, Propagate, SINKS, Saliency, random_positions};

/// What a layer's scores led to.
pub(super) struct Choice<B: Backend> {
    /// Rows kept for each kv head, by score.
    kept: Option<B::Indices>,
    /// Whether some rows do not go on.
    pub(super) narrows: bool,
    /// The set of each kv head, where heads have sets.
    sets: Option<Vec<HeadSet>>,
}

impl<B: Backend> Run<'_, B> {
    /// Which rows the scores choose. The rows' original positions are given, and those that stay in any
    /// case.
    pub(super) fn choose(
        &self,
        rules: &LayerPlan,
        observer: &Observer<'_, B>,
        positions: &[u32],
        forced: &[u32],
    ) -> Result<(Choice<B>, Option<B::Indices>), EngineError> {
        let backend = self.backend;
        let heads = self.llama.config.kv_heads;
        let mut choice = Choice { kept: None, sets: None, narrows: rules.propagate.is_some() };
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
        let mut going_on = None;
        match rules.propagate {
            Some(Propagate::Top { count, saliency }) => {
                if let Some((groups, window)) = pooled(saliency)? {
                    let mut all = backend.sum_heads(&groups)?;
                    raise(&mut all, forced)?;
                    let select = Select { count: count - window, tail: window };
                    going_on = Some(backend.select(&all, select)?);
                }
            }
            Some(Propagate::Recent { count, recent }) => {
                if let Some(sums) = observer.sums(Purpose::Recent) {
                    let all = backend.sum_heads(sums)?;
                    let mut older = backend.pool_groups(&all, 1, self.rows - recent, UNPOOLED)?;
                    raise(&mut older, &(0..SINKS as u32).collect::<Vec<_>>())?;
                    raise(&mut older, forced)?;
                    let select = Select { count: count - recent, tail: recent };
                    going_on = Some(backend.select(&older, select)?);
                }
            }
            None => {}
        }
        Ok((choice, going_on))
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

    /// Leaves in the cache what the rules keep of a layer's keys and values.
    pub(super) fn compact(
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
            let propagated = match choice.narrows {
                true => self.backend.read_indices(&self.places.positions)?.into_iter().next(),
                false => None,
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
}
