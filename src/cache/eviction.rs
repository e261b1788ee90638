//! What some policies go on doing in decoding: entries leave the cache.

use std::sync::Arc;

use serde::Serialize;

use crate::backend::{Backend, BackendError, Select};
use crate::policy::{Pooling, PoolingKind, SINKS, TokenClasses, share};

/// The rule of one layer, and what it goes by.
#[derive(Debug)]
pub(crate) struct Eviction<B: Backend> {
    pub(crate) rule: EvictionRule,
    /// The attention that each entry has had so far: `[kv heads, entries]`.
    pub(crate) sums: B::Scores,
}

/// Which entries stay behind a step.
#[derive(Clone, Debug)]
pub(crate) enum EvictionRule {
    /// The newest, and those with the largest sums, up to a number.
    Heavy { count: usize, window: usize },
    /// A set for each kv head, whose shares are of what the layer read.
    Sets { sets: Vec<TokenSet>, local: f64, frequent: f64, read: Read },
}

/// The tokens that a layer read: some of the prompt, and all behind it.
#[derive(Clone, Debug)]
pub(crate) struct Read {
    /// Positions, ascending.
    pub(crate) of_prompt: Arc<[u32]>,
    /// Tokens of the prompt that were left out.
    pub(crate) left_out: usize,
}

impl Read {
    /// What the shares `local` and `frequent` come to, where the sequence has so many tokens.
    pub(crate) fn shares(&self, tokens: usize, (local, frequent): (f64, f64)) -> Shares {
        let read = tokens - self.left_out;
        let first = read - share(read, local);
        let behind = first + self.left_out;
        Shares {
            nearest: self.of_prompt.get(first).map_or(behind, |position| *position as usize),
            frequent: share(read, frequent),
        }
    }
}

/// What FastGen's shares come to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shares {
    /// The position where local tokens begin.
    nearest: usize,
    /// Tokens with the most attention.
    frequent: usize,
}

/// The tokens that FastGen keeps of a head, each set with all of the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TokenSet {
    /// Special tokens and the first four.
    Special,
    /// Punctuation.
    Punctuation,
    /// The tokens with the most attention.
    Frequent,
    /// The newest tokens.
    Local,
    /// Everything.
    Full,
}

/// Single scores, not pooled.
pub(crate) const UNPOOLED: Pooling = Pooling { kind: PoolingKind::Max, kernel: 1 };

/// What sets are made of, beside scores.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tokens {
    pub(crate) classes: TokenClasses,
    /// Tokens of the sequence, by position, where a rule goes by them.
    pub(crate) ids: Vec<u32>,
    /// Highlighted tokens of the prompt, which stay in any case.
    pub(crate) highlighted: Vec<u32>,
}

impl Tokens {
    /// Entries of a set, ascending: their original positions and their sums are given.
    pub(crate) fn of_set(
        &self,
        set: TokenSet,
        positions: &[u32],
        sums: &[f32],
        Shares { nearest, frequent }: Shares,
    ) -> Vec<u32> {
        let entries = 0..positions.len() as u32;
        if set == TokenSet::Full {
            return entries.collect();
        }
        let mut kept: Vec<bool> = positions.iter().map(|position| self.is_of_class(set, *position)).collect();
        if set >= TokenSet::Frequent {
            let mut ranked: Vec<usize> = (0..positions.len()).collect();
            // Not a number is the least there is.
            let sum = |entry: &usize| if sums[*entry].is_nan() { f32::NEG_INFINITY } else { sums[*entry] };
            ranked.sort_by(|a, b| sum(b).total_cmp(&sum(a)));
            ranked.iter().take(frequent).for_each(|entry| kept[*entry] = true);
        }
        if set >= TokenSet::Local {
            positions
                .iter()
                .zip(&mut kept)
                .for_each(|(position, kept)| *kept |= *position as usize >= nearest);
        }
        entries.filter(|entry| kept[*entry as usize]).collect()
    }

    fn is_of_class(&self, set: TokenSet, position: u32) -> bool {
        let id = self.ids.get(position as usize);
        let among = |ids: &std::collections::BTreeSet<u32>| id.is_some_and(|id| ids.contains(id));
        (position as usize) < SINKS
            || self.highlighted.binary_search(&position).is_ok()
            || among(&self.classes.special)
            || set >= TokenSet::Punctuation && among(&self.classes.punctuation)
    }
}

impl EvictionRule {
    /// The entries that stay, by kv head; `None`: all.
    pub(crate) fn choose<B: Backend>(
        &self,
        backend: &B,
        kv: &B::Kv,
        sums: &B::Scores,
        tokens: &Tokens,
    ) -> Result<Option<B::Indices>, BackendError> {
        match self {
            Self::Heavy { count, window } => {
                let lengths = backend.kv_lengths(kv);
                // Every head keeps as many as the others.
                let length = lengths.first().copied().unwrap_or(0);
                if length <= *count {
                    return Ok(None);
                }
                let older = backend.pool_groups(sums, lengths.len(), length - window, UNPOOLED)?;
                backend.select(&older, Select { count: count - window, tail: *window }).map(Some)
            }
            Self::Sets { sets, local, frequent, read } => {
                let positions = backend.kv_positions(kv)?;
                let sums = backend.read_scores(sums)?;
                let shares = read.shares(tokens.ids.len(), (*local, *frequent));
                let list = |((set, positions), sums): ((&TokenSet, &Vec<u32>), &Vec<f32>)| {
                    tokens.of_set(*set, positions, sums, shares)
                };
                backend.indices(sets.iter().zip(&positions).zip(&sums).map(list).collect()).map(Some)
            }
        }
    }
}
