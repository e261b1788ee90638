//! What a layer's scores choose, and what is left in the cache by it.

use std::sync::Arc;

use super::EngineError;
use super::layer_cache::{Entries, LayerCache};
use super::named::named_rows;
use super::observe::{Observer, Purpose};
use super::prefill::Run;
use super::trace::{HeadSet, LayerTrace, retained_mass};
use crate::backend::{Backend, BackendError, Select, Share};
use crate::cache::{Eviction, EvictionRule, Read, Shares, Steer, TokenSet, UNPOOLED};
use crate::policy::{Keep, LayerPlan, Propagate, SINKS, Saliency};

/// What a layer's rules led to.
pub(super) struct Choice<B: Backend> {
    kept: Chosen<B>,
    /// Whether some rows do not go on.
    pub(super) narrows: bool,
    /// The set of each kv head, where heads have sets.
    sets: Option<Vec<HeadSet>>,
    /// What the rule goes on doing in decoding.
    eviction: Option<Eviction<B>>,
}

/// The rows that stay in the cache.
enum Chosen<B: Backend> {
    All,
    /// These, for each kv head.
    Listed(B::Indices),
    /// The best of these scores, which share a number of rows.
    Shared(B::Scores, Share),
}

impl<B: Backend> Run<'_, B> {
    /// Which rows stay and which go on, where not all do. Original positions of the rows are given where a rule
    /// goes by them.
    pub(super) fn choose(
        &mut self,
        index: usize,
        rules: &LayerPlan,
        observer: &Observer<'_, B>,
        positions: &Arc<[u32]>,
    ) -> Result<(Choice<B>, Option<B::Indices>), EngineError> {
        let backend = self.backend;
        let heads = self.llama.config.kv_heads;
        let mut choice =
            Choice { kept: Chosen::All, sets: None, eviction: None, narrows: rules.propagate.is_some() };
        // Pooled scores of the rows before the window, by kv head, and the window.
        let pooled = |saliency: Saliency| {
            let window = saliency.window.min(self.rows);
            let Some(scores) = observer.window(window) else { return Ok(None) };
            let groups = backend.pool_groups(scores, heads, self.rows - window, saliency.pooling)?;
            Ok::<_, EngineError>(Some((groups, window)))
        };
        let raise = |scores: &mut B::Scores| match &self.decoding.steer {
            Some(steer) => backend.raise_scores(scores, &self.places.positions, steer.highlighted()),
            None => Ok(()),
        };
        if let Some((mut groups, window)) = rules.saliency().map(pooled).transpose()?.flatten() {
            raise(&mut groups)?;
            choice.kept = match &rules.keep {
                Keep::Top { count, .. } => {
                    let select = Select { count: count - window, tail: window };
                    Chosen::Listed(backend.select(&groups, select)?)
                }
                Keep::Each { counts, .. } => {
                    let counts: Vec<usize> = counts.iter().map(|count| count - window).collect();
                    Chosen::Listed(backend.select_each(&groups, &counts, window)?)
                }
                Keep::Shared { count, floor, .. } => {
                    let assured = self.decoding.steer.as_ref().map_or(0, Steer::highlighted_tokens);
                    Chosen::Shared(
                        groups,
                        Share { mean: count - window, assured, floor: *floor, tail: window },
                    )
                }
                _ => Chosen::All,
            };
        }
        if let Some(named) = self.named[index].take() {
            choice.kept = Chosen::Listed(named);
        } else {
            let steer = self.decoding.steer.as_ref();
            let highlighted = steer.map_or_else(Vec::new, |steer| steer.rows(positions));
            if let Some(lists) = named_rows(index, &rules.keep, self.rows, heads, &highlighted) {
                choice.kept = Chosen::Listed(backend.indices(lists)?);
            }
        }
        match (&rules.keep, observer.sums(Purpose::Attention), observer.sums(Purpose::Local)) {
            (&Keep::Heavy { count, window }, Some(sums), _) => {
                if count < self.rows {
                    let mut older = backend.pool_groups(sums, heads, self.rows - window, UNPOOLED)?;
                    raise(&mut older)?;
                    let select = Select { count: count - window, tail: window };
                    choice.kept = Chosen::Listed(backend.select(&older, select)?);
                }
                let rule = EvictionRule::Heavy { count, window };
                choice.eviction = Some(self.eviction(rule, sums, &choice.kept, raise)?);
            }
            (Keep::Recovered { recovery, local, frequent }, Some(sums), Some(near)) => {
                let (local, frequent) = (*local, *frequent);
                let (of_all, near) = (backend.read_scores(sums)?, backend.read_scores(near)?);
                let left_out = self.prompt_tokens - self.rows;
                let read = Read { of_prompt: Arc::clone(positions), left_out };
                let shares = read.shares(self.prompt_tokens, (local, frequent));
                let of_head = |(of_all, near): (&Vec<f32>, &Vec<f32>)| {
                    self.recovering_set(*recovery, shares, positions, of_all, near)
                };
                let (lists, of_heads): (_, Vec<HeadSet>) = of_all.iter().zip(&near).map(of_head).unzip();
                choice.kept = Chosen::Listed(backend.indices(lists)?);
                let sets = of_heads.iter().map(|head| head.set).collect();
                let rule = EvictionRule::Sets { sets, local, frequent, read };
                // Highlighted tokens are in every set, beside those with the most attention.
                choice.eviction = Some(self.eviction(rule, sums, &choice.kept, |_| Ok(()))?);
                choice.sets = Some(of_heads);
            }
            _ => {}
        }
        let mut going_on = None;
        match rules.propagate {
            Some(Propagate::Top { count, saliency }) => {
                if let Some((groups, window)) = pooled(saliency)? {
                    let mut all = backend.sum_heads(&groups)?;
                    raise(&mut all)?;
                    let select = Select { count: count - window, tail: window };
                    going_on = Some(backend.select(&all, select)?);
                }
            }
            Some(Propagate::Recent { count, recent }) => {
                if let Some(sums) = observer.sums(Purpose::Recent) {
                    let all = backend.sum_heads(sums)?;
                    let mut older = backend.pool_groups(&all, 1, self.rows - recent, UNPOOLED)?;
                    backend.raise_scores(&mut older, &self.places.positions, &[true; SINKS])?;
                    raise(&mut older)?;
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
        shares: Shares,
        positions: &[u32],
        sums: &[f32],
        near: &[f32],
    ) -> (Vec<u32>, HeadSet) {
        let tokens = &self.decoding.tokens;
        let rows = positions.len();
        let list = |set: TokenSet| tokens.of_set(set, positions, sums, shares);
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
        (list(set), HeadSet { set, recovered })
    }

    /// Leaves in the cache what was chosen of a layer's keys and values. A trace wants the original positions of the
    /// rows.
    pub(super) fn compact(
        &mut self,
        rows: usize,
        kv: B::Kv,
        choice: Choice<B>,
        observer: &Observer<'_, B>,
        positions: &[u32],
    ) -> Result<(), EngineError> {
        let (backend, slack) = (self.backend, self.options.slack);
        let full_bytes = self.kv_bytes(&kv);
        let (mut kv, full_bytes) = match choice.kept {
            Chosen::All => (Entries::Counted(kv), 0),
            Chosen::Listed(kept) => (Entries::Counted(backend.gather_kv(&kv, &kept, slack)?), full_bytes),
            Chosen::Shared(scores, share) => {
                (Entries::Uncounted(backend.gather_kv_shared(&kv, &scores, share, slack)?), full_bytes)
            }
        };
        if self.trace.is_some() {
            let counted = kv.counted(backend)?;
            let kept = backend.kv_positions(&counted)?;
            kv = Entries::Counted(counted);
            let mass = match observer.measure() {
                Some((window, scores)) => {
                    retained_mass(&backend.read_scores(scores)?, window, positions, &kept)
                }
                None => Vec::new(),
            };
            let propagated = match choice.narrows {
                true => backend.read_indices(&self.places.positions)?.into_iter().next(),
                false => None,
            };
            self.note(LayerTrace { rows, kept, mass, propagated, sets: choice.sets });
        }
        self.caches.push(LayerCache { kv, full_bytes });
        self.decoding.evictions.push(choice.eviction);
        Ok(())
    }

    /// What a rule goes on doing in decoding, with what each entry has had of attention so far.
    fn eviction(
        &self,
        rule: EvictionRule,
        sums: &B::Scores,
        kept: &Chosen<B>,
        raise: impl Fn(&mut B::Scores) -> Result<(), BackendError>,
    ) -> Result<Eviction<B>, EngineError> {
        let (backend, heads) = (self.backend, self.llama.config.kv_heads);
        let mut sums = backend.pool_groups(sums, heads, self.rows, UNPOOLED)?;
        raise(&mut sums)?;
        if let Chosen::Listed(kept) = kept {
            sums = backend.gather_scores(&sums, kept)?;
        }
        Ok(Eviction { rule, sums })
    }
}
