//! The plan: what the engine does in each layer, and upper bounds of the memory it takes.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{MAX_POOLING, ModelShape, Policy, PolicyError, check_window};

/// The rules of every layer for one prompt. Comparable, serialisable, and printed as a short table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// Where the plan comes from.
    pub policy: Policy,
    /// The model it is for.
    pub shape: ModelShape,
    /// Tokens of the prompt it is for.
    pub prompt_tokens: usize,
    /// One entry for each layer, the first layer first.
    pub layers: Vec<LayerPlan>,
}

/// The rules of one layer.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LayerPlan {
    /// Tokens the layer reads.
    pub rows: usize,
    /// Which of them stay in its KV cache, for each kv head.
    pub keep: Keep,
    /// Which of them the next layer reads; `None`: all.
    pub propagate: Option<Propagate>,
}

/// Which tokens of a layer stay in its KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
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

/// Which tokens go on to the next layer: the window and the most salient tokens before it, scores
/// summed over all heads. One set for the sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Propagate {
    /// Tokens that go on, the window included.
    pub count: usize,
    /// How tokens are scored.
    pub saliency: Saliency,
}

impl LayerPlan {
    /// A layer that reads `rows` tokens, keeps and hands on all of them.
    pub fn full(rows: usize) -> Self {
        Self { rows, keep: Keep::All, propagate: None }
    }

    /// Entries of a kv head's cache after prefill.
    pub fn kept(&self) -> usize {
        match self.keep {
            Keep::All => self.rows,
            Keep::Ends { sinks, recent } => sinks.saturating_add(recent),
            Keep::Top { count, .. } | Keep::Random { count, .. } => count,
        }
    }

    /// How this layer's tokens are scored, where a rule needs scores.
    pub fn saliency(&self) -> Option<Saliency> {
        match (self.keep, self.propagate) {
            (Keep::Top { saliency, .. }, _) | (_, Some(Propagate { saliency, .. })) => Some(saliency),
            _ => None,
        }
    }
}

impl Plan {
    /// Bytes of the KV cache that prefill leaves, at this many bytes an element.
    pub fn kept_kv_bytes(&self, element_bytes: usize) -> usize {
        self.layers.iter().map(|layer| self.kv_bytes(layer.kept(), element_bytes)).sum()
    }

    /// Upper bound of the bytes of K and V alive at any moment of prefill: the layer at work in full,
    /// its own compacted copy, and the caches of the layers before it.
    pub fn peak_kv_bytes(&self, element_bytes: usize) -> usize {
        let mut kept = 0;
        let mut peak = 0;
        for layer in &self.layers {
            let full = self.kv_bytes(layer.rows, element_bytes);
            let compacted = self.kv_bytes(layer.kept(), element_bytes);
            let at_work = if layer.keep == Keep::All { full } else { full + compacted };
            peak = peak.max(kept + at_work);
            kept += compacted;
        }
        peak
    }

    fn kv_bytes(&self, tokens: usize, element_bytes: usize) -> usize {
        tokens * self.shape.kv_elements() * element_bytes
    }
}

impl Saliency {
    pub(crate) fn check(&self) -> Result<(), PolicyError> {
        check_window(self.window)?;
        let kernel = self.pooling.kernel;
        if kernel % 2 == 1 && kernel <= MAX_POOLING {
            Ok(())
        } else {
            Err(PolicyError::PoolingKernel(kernel))
        }
    }
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {} tokens, {} layers", self.policy.name(), self.prompt_tokens, self.layers.len())?;
        let mut first = 0;
        while first < self.layers.len() {
            let layer = self.layers[first];
            let run = self.layers[first..].iter().take_while(|other| **other == layer).count();
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
        match self.keep {
            Keep::All => write!(f, "keeps all")?,
            Keep::Ends { sinks, recent } => write!(f, "keeps the first {sinks} and the last {recent}")?,
            Keep::Top { count, saliency } => write!(f, "keeps {count} per kv head ({saliency})")?,
            Keep::Random { count, window, seed } => {
                write!(f, "keeps {count} per kv head at random (last {window}, seed {seed})")?;
            }
        }
        if let Some(Propagate { count, saliency }) = self.propagate {
            write!(f, ", {count} tokens go on ({saliency})")?;
        }
        Ok(())
    }
}

impl fmt::Display for Saliency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.pooling.kind {
            PoolingKind::Max => "max",
            PoolingKind::Average => "average",
        };
        write!(f, "window {}, {kind} pooling {}", self.window, self.pooling.kernel)
    }
}
