//! The plan: what the engine does in each layer, and upper bounds of the memory it takes.

use std::collections::BTreeSet;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::settling::Candidates;
use super::steering::Steering;
use super::{MAX_POOLING, ModelShape, Policy, PolicyError, check_window};
use crate::messages;

/// The rules of every layer for one prompt. Comparable, serialisable, and printed as a short table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Where the plan comes from.
    pub policy: Policy,
    /// The model it is for.
    pub shape: ModelShape,
    /// Tokens of the prompt it is for.
    pub prompt_tokens: usize,
    /// The tokens that the layers read, where it is not the whole prompt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<Restart>,
    /// One entry for each layer, the first layer first.
    pub layers: Vec<LayerPlan>,
    /// Where the TSP layer is picked during prefill: what differs from `layers`, which are the rules for
    /// the last candidate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidates: Option<Candidates>,
    /// Tokens that [`Keep::Recovered`] tells apart.
    #[serde(default, skip_serializing_if = "TokenClasses::is_empty")]
    pub classes: TokenClasses,
    /// Tokens that heads are steered to, which every rule keeps first. Budgets count them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub steering: Option<Steering>,
}

/// A first pass that picks the tokens of a second one: layers 0 to `layer` read the prompt, its tokens
/// are ranked by the dot products of the last query with their keys, summed over heads and pooled, and
/// the best, in their order, are read anew as a prompt at positions 0, 1, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restart {
    /// The layer that ranks, 0-based.
    pub layer: usize,
    /// Tokens of the second pass.
    pub count: usize,
    /// Pooling along the prompt.
    pub pooling: Pooling,
}

/// Token ids with a part of their own in [`Keep::Recovered`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct TokenClasses {
    /// The begin of text and the tokenizer's other special tokens.
    pub special: BTreeSet<u32>,
    /// Tokens that are punctuation and nothing else.
    pub punctuation: BTreeSet<u32>,
}

impl TokenClasses {
    /// Whether no token is in a class.
    pub fn is_empty(&self) -> bool {
        self.special.is_empty() && self.punctuation.is_empty()
    }
}

/// The rules of one layer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Tokens the layer reads.
    pub rows: usize,
    /// Which of them stay in its KV cache, for each kv head.
    pub keep: Keep,
    /// Which of them the next layer reads; `None`: all.
    pub propagate: Option<Propagate>,
}

/// Which tokens of a layer stay in its KV cache.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "lowercase")]
pub enum Keep {
    /// Every token.
    All,
    /// The first and the last tokens.
    Ends {
        /// Tokens kept at the start.
        sinks: usize,
        /// Tokens kept at the end.
        recent: usize,
    },
    /// The window and the most salient tokens before it, for each kv head.
    Top {
        /// Tokens kept for a kv head, the window included.
        count: usize,
        /// How tokens are scored.
        saliency: Saliency,
    },
    /// [`Top`](Self::Top) with a number of tokens for each kv head.
    Each {
        /// Tokens kept for each kv head, the window included.
        counts: Vec<usize>,
        /// How tokens are scored.
        saliency: Saliency,
    },
    /// [`Top`](Self::Top) with numbers of tokens that follow from the scores: all heads' scores are
    /// ranked together, and a head gets `round(picks · (1 − floor) + int(mean · floor))` tokens beside
    /// the window, where `picks` is how many of the best `heads · mean` scores are its own.
    Shared {
        /// Tokens kept for a kv head on average, the window included.
        count: usize,
        /// The share of the mean that every head gets.
        floor: f64,
        /// How tokens are scored.
        saliency: Saliency,
    },
    /// The window and the tokens that all queries together attend to most, for each kv head. In
    /// decoding, each step's probabilities are added and the tokens with the least go, so that no more
    /// stay than these.
    Heavy {
        /// Tokens kept for a kv head, the window included.
        count: usize,
        /// The newest tokens, which are kept in any case.
        window: usize,
    },
    /// For each kv head the cheapest of these sets that recovers enough of its attention: special
    /// tokens and the first four; punctuation with them; frequent tokens with these; local tokens with
    /// all of these; everything. In decoding a head goes on with its set.
    Recovered {
        /// The share of attention, averaged over queries, that a set has to hold.
        recovery: f64,
        /// The share of tokens, the newest, that are local.
        local: f64,
        /// The share of tokens, the most attended, that are frequent.
        frequent: f64,
    },
    /// The window and a seeded uniform choice before it, for each kv head.
    Random {
        /// Tokens kept for a kv head, the window included.
        count: usize,
        /// Tokens kept at the end.
        window: usize,
        /// Seed of the choice.
        seed: u64,
    },
}

/// How tokens are scored: attention probabilities of the last `window` queries, summed, pooled along
/// the prompt per query head, then summed over the query heads of each kv head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Saliency {
    /// Queries that observe, the last of the prompt.
    pub window: usize,
    /// Pooling along the prompt.
    pub pooling: Pooling,
}

/// Pooling of scores along the prompt, stride 1, padded by half the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pooling {
    /// What a pooled score is.
    pub kind: PoolingKind,
    /// Width, odd; 1 leaves scores as they are.
    pub kernel: usize,
}

/// What a pooled score is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PoolingKind {
    /// The largest score in reach.
    Max,
    /// The mean score in reach; the zeros of the padding count.
    Average,
}

/// Which tokens go on to the next layer. One set for the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "rule", rename_all = "lowercase")]
pub enum Propagate {
    /// The window and the most salient tokens before it, scores summed over all heads.
    Top {
        /// Tokens that go on, the window included.
        count: usize,
        /// How tokens are scored.
        saliency: Saliency,
    },
    /// The newest tokens, and of those before them the first [`SINKS`] and the ones that the newest
    /// attend to most: probabilities summed over all heads and over the newest queries, which count
    /// from 1 for the first to 1.2 for the last.
    Recent {
        /// Tokens that go on, the newest included.
        count: usize,
        /// The newest tokens.
        recent: usize,
    },
}

/// Tokens at the start that [`Propagate::Recent`] and [`Keep::Recovered`] always keep.
pub const SINKS: usize = 4;

impl Propagate {
    /// Tokens that go on.
    pub fn count(&self) -> usize {
        match self {
            Self::Top { count, .. } | Self::Recent { count, .. } => *count,
        }
    }

    /// Tokens among them that go on in any case, at the end.
    pub fn reserved(&self) -> usize {
        match self {
            Self::Top { saliency, .. } => saliency.window,
            Self::Recent { recent, .. } => *recent,
        }
    }

    pub(super) fn count_mut(&mut self) -> &mut usize {
        match self {
            Self::Top { count, .. } | Self::Recent { count, .. } => count,
        }
    }
}

impl LayerPlan {
    /// A layer that reads `rows` tokens, keeps and hands on all of them.
    pub fn full(rows: usize) -> Self {
        Self { rows, keep: Keep::All, propagate: None }
    }

    /// The most entries that a kv head's cache has after prefill.
    pub fn kept(&self) -> usize {
        match &self.keep {
            Keep::All | Keep::Shared { .. } | Keep::Recovered { .. } => self.rows,
            Keep::Heavy { count, .. } => self.rows.min(*count),
            Keep::Ends { sinks, recent } => sinks.saturating_add(*recent),
            Keep::Top { count, .. } | Keep::Random { count, .. } => *count,
            Keep::Each { counts, .. } => counts.iter().copied().max().unwrap_or(0),
        }
    }

    /// The most entries that all kv heads' caches have together after prefill.
    pub fn entries(&self, kv_heads: usize) -> usize {
        match &self.keep {
            Keep::Each { counts, .. } => counts.iter().fold(0, |sum, count| sum.saturating_add(*count)),
            // Every head's share is rounded, by a half at most.
            Keep::Shared { count, .. } => {
                let shared = count.saturating_mul(kv_heads).saturating_add(kv_heads / 2);
                shared.min(self.rows.saturating_mul(kv_heads))
            }
            _ => self.kept().saturating_mul(kv_heads),
        }
    }

    /// How this layer's tokens are scored for its cache, where the rule needs scores.
    pub fn saliency(&self) -> Option<Saliency> {
        match &self.keep {
            Keep::Top { saliency, .. } | Keep::Each { saliency, .. } | Keep::Shared { saliency, .. } => {
                Some(*saliency)
            }
            _ => None,
        }
    }

    /// Whether a rule needs the attention of every row to score by.
    pub fn sums_columns(&self) -> bool {
        let keeps = matches!(self.keep, Keep::Heavy { .. } | Keep::Recovered { .. });
        keeps || matches!(self.propagate, Some(Propagate::Recent { .. }))
    }

    /// The observation windows that the rules need scores of, each once.
    pub fn windows(&self) -> Vec<usize> {
        let kept = self.saliency().map(|saliency| saliency.window);
        let handed_on = match self.propagate {
            Some(Propagate::Top { saliency, .. }) => Some(saliency.window),
            _ => None,
        };
        kept.into_iter().chain(handed_on.filter(|window| Some(*window) != kept)).collect()
    }
}

impl Plan {
    /// Upper bound of the bytes of the KV cache that prefill leaves, at this many bytes an element.
    pub fn kept_kv_bytes(&self, element_bytes: usize) -> usize {
        let most = |layer| self.either(layer).map(|rules| self.kept_bytes(rules, element_bytes)).max();
        (0..self.layers.len()).filter_map(most).fold(0, usize::saturating_add)
    }

    /// Upper bound of the bytes of K and V alive at any moment of prefill: the layer at work in full,
    /// its own compacted copy, and the caches of the layers before it.
    pub fn peak_kv_bytes(&self, element_bytes: usize) -> usize {
        let mut kept = 0_usize;
        let all = |rows: usize| rows.saturating_mul(self.shape.kv_elements()).saturating_mul(element_bytes);
        // The first pass of a restart keeps nothing.
        let mut peak = self.restart.map_or(0, |_| all(self.prompt_tokens));
        for layer in 0..self.layers.len() {
            let mut most = 0;
            for rules in self.either(layer) {
                let full = all(rules.rows);
                let compacted = self.kept_bytes(rules, element_bytes);
                let at_work = if rules.keep == Keep::All { full } else { full.saturating_add(compacted) };
                peak = peak.max(kept.saturating_add(at_work));
                most = most.max(compacted);
            }
            kept = kept.saturating_add(most);
        }
        peak
    }

    /// The rules of a layer, and those it has where the TSP layer comes earlier.
    fn either(&self, layer: usize) -> impl Iterator<Item = &LayerPlan> {
        let late = self.candidates.as_ref().and_then(|candidates| candidates.late(layer, candidates.first));
        [&self.layers[layer]].into_iter().chain(late)
    }

    fn kept_bytes(&self, layer: &LayerPlan, element_bytes: usize) -> usize {
        let heads = self.shape.kv_heads;
        let entries = match (&layer.keep, &self.steering) {
            // Budgets of the other rules have grown.
            (Keep::Ends { .. } | Keep::Random { .. }, Some(steering)) => {
                let highlighted = heads.saturating_mul(steering.positions(self.prompt_tokens).len());
                layer.entries(heads).saturating_add(highlighted).min(layer.rows.saturating_mul(heads))
            }
            _ => layer.entries(heads),
        };
        [2, self.shape.head_dim, element_bytes].into_iter().fold(entries, usize::saturating_mul)
    }
}

impl Saliency {
    pub(crate) fn check(&self) -> Result<(), PolicyError> {
        check_window(self.window)?;
        self.pooling.check()
    }
}

impl Pooling {
    pub(crate) fn check(&self) -> Result<(), PolicyError> {
        let kernel = self.kernel;
        if kernel % 2 == 1 && kernel <= MAX_POOLING {
            Ok(())
        } else {
            Err(PolicyError::PoolingKernel(kernel))
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let tokens = messages::count(self.prompt_tokens, "token");
        let layers = messages::count(self.layers.len(), "layer");
        writeln!(f, "{}: {tokens}, {layers}", self.policy.name())?;
        if let Some(Restart { layer, count, pooling }) = self.restart {
            writeln!(
                f,
                "  first pass: layers 0-{layer} pick {count} tokens ({pooling}), which are read anew"
            )?;
        }
        if let Some(steering) = &self.steering {
            writeln!(f, "  {steering}")?;
        }
        if let Some(Candidates { first, last, overlap, .. }) = self.candidates {
            writeln!(
                f,
                "  the TSP layer is one of {first}-{last}, where {overlap} of the tokens stay the same; at the last:"
            )?;
        }
        let mut first = 0;
        while first < self.layers.len() {
            let layer = &self.layers[first];
            let run = self.layers[first..].iter().take_while(|other| *other == layer).count();
            if run == 1 {
                write!(f, "  layer {first}")?;
            } else {
                write!(f, "  layers {first}-{}", first + run - 1)?;
            }
            writeln!(f, ": {layer}")?;
            first += run;
        }
        Ok(())
    }
}

impl fmt::Display for LayerPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "reads {}, ", self.rows)?;
        match &self.keep {
            Keep::All => write!(f, "keeps all")?,
            Keep::Ends { sinks, recent } => write!(f, "keeps the first {sinks} and the last {recent}")?,
            Keep::Top { count, saliency } => write!(f, "keeps {count} per kv head ({saliency})")?,
            Keep::Each { counts, saliency } => {
                let counts: Vec<String> = counts.iter().map(usize::to_string).collect();
                write!(f, "keeps {} by kv head ({saliency})", counts.join(", "))?;
            }
            Keep::Shared { count, floor, saliency } => {
                write!(f, "keeps {count} per kv head, shared above {floor} of it ({saliency})")?;
            }
            Keep::Heavy { count, window } => {
                write!(f, "keeps {count} per kv head by all attention (last {window})")?;
            }
            Keep::Recovered { recovery, local, frequent } => write!(
                f,
                "keeps what recovers {recovery} of a head's attention (local {local}, frequent {frequent})"
            )?,
            Keep::Random { count, window, seed } => {
                write!(f, "keeps {count} per kv head at random (last {window}, seed {seed})")?;
            }
        }
        match self.propagate {
            None => Ok(()),
            Some(Propagate::Top { count, saliency }) => write!(f, ", {count} tokens go on ({saliency})"),
            Some(Propagate::Recent { count, recent }) => write!(f, ", {count} tokens go on (last {recent})"),
        }
    }
}

impl fmt::Display for Saliency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "window {}, {}", self.window, self.pooling)
    }
}

impl fmt::Display for Pooling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            PoolingKind::Max => "max",
            PoolingKind::Average => "average",
        };
        write!(f, "{kind} pooling {}", self.kernel)
    }
}
