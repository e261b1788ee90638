//! What to keep of a prompt. A [`Policy`] is a name and its options; [`Policy::plan`] turns it, with
//! the model's shape and the prompt's length, into a [`Plan`]: rules for each layer, with no data in
//! them. Everything here is a pure function of numbers.

mod adakv;
mod fastgen;
mod fastkv;
mod gemfilter;
mod h2o;
mod headkv;
mod plan;
mod pyramidinfer;
mod pyramidkv;
mod random;
mod settling;
mod snapkv;
mod steering;
mod streaming;
mod tsp;

use serde::{Deserialize, Serialize};

use crate::messages::count;

pub use adakv::AdaKv;
pub use fastgen::FastGen;
pub use fastkv::FastKv;
pub use gemfilter::GemFilter;
pub use h2o::H2o;
pub use headkv::{HeadKv, HeadScores, HeadScoresError};
pub use plan::{
    Keep, LayerPlan, Plan, Pooling, PoolingKind, Propagate, Restart, SINKS, Saliency, TokenClasses,
};
pub use pyramidinfer::PyramidInfer;
pub use pyramidkv::PyramidKv;
pub use random::{Random, random_positions};
pub use settling::{Candidates, Settling};
pub use snapkv::SnapKv;
pub use steering::{DEFAULT_ALPHA, Steering};
pub use streaming::StreamingLlm;
pub use tsp::Tsp;

/// The numbers of a model that a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelShape {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// Key/value heads of a layer; query heads / kv heads is the size of a GQA group.
    pub kv_heads: usize,
    /// Elements of one head's query, key or value.
    pub head_dim: usize,
}

impl ModelShape {
    /// Query heads that share one kv head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Elements of K and V of one token in one layer.
    pub fn kv_elements(&self) -> usize {
        self.kv_heads.saturating_mul(self.head_dim).saturating_mul(2)
    }
}

/// How many tokens: a number, or a share of the prompt. Window tokens are included.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Budget {
    /// This many tokens.
    Tokens(usize),
    /// This share of the prompt, in (0, 1]: `int(prompt · rate)` tokens.
    Rate(f64),
}

/// A compression policy with its options.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "name", rename_all = "lowercase")]
pub enum Policy {
    /// Keep everything: the baseline.
    Full,
    /// FastKV: token-selective propagation and a cache chosen per GQA group.
    FastKv(FastKv),
    /// SnapKV: a cache chosen per GQA group, every layer reads the whole prompt.
    SnapKv(SnapKv),
    /// PyramidKV: SnapKV whose budget falls from the first layer to the last.
    PyramidKv(PyramidKv),
    /// AdaKV: SnapKV whose heads share the budget of a layer.
    AdaKv(AdaKv),
    /// HeadKV: SnapKV with budgets from measured scores of the heads.
    HeadKv(HeadKv),
    /// H2O: the tokens that all queries attend to most, also in decoding.
    H2o(H2o),
    /// FastGen: each head gets the cheapest set of tokens that recovers its attention.
    FastGen(FastGen),
    /// GemFilter: early layers pick tokens, and the model starts anew with these.
    GemFilter(GemFilter),
    /// PyramidInfer: every layer hands on fewer tokens than it read.
    PyramidInfer(PyramidInfer),
    /// StreamingLLM: the first tokens and the last ones.
    StreamingLlm(StreamingLlm),
    /// A seeded uniform choice and the window: the control.
    Random(Random),
    /// FastKV's token-selective propagation in front of another policy's caches.
    Tsp(Tsp),
}

/// Options that no plan can be made from.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// A prompt of no tokens has nothing to keep.
    #[error("the prompt is empty: a plan needs at least one token")]
    EmptyPrompt,
    /// A model shape with a zero, or query heads that do not divide into kv heads.
    #[error(
        "{0:?} is not a model: every number must be at least 1, and the query heads a multiple of the kv heads"
    )]
    Shape(ModelShape),
    /// A rate that is no share of a prompt.
    #[error("{option} is {value}: a rate must be above 0 and at most 1")]
    Rate {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f64,
    },
    /// A number of tokens that leaves no room beside the tokens that are always kept.
    #[error(
        "{option} is {}, but what is always kept takes {reserved} ({reason}): give at least {least}",
        count(*.value, "token")
    )]
    Budget {
        /// The option.
        option: &'static str,
        /// Its value.
        value: usize,
        /// Tokens kept in any case.
        reserved: usize,
        /// Which ones those are.
        reason: &'static str,
        /// The smallest value that works.
        least: usize,
    },
    /// An observation window outside what the kernels take.
    #[error("the observation window is {}: give 1 to {max}", count(*.0, "token"), max = MAX_WINDOW)]
    Window(usize),
    /// A pooling kernel without a middle, or too wide.
    #[error("the pooling kernel is {0} wide: give an odd number from 1 to {max}", max = MAX_POOLING)]
    PoolingKernel(usize),
    /// A share outside what its formula takes.
    #[error("{option} is {value}: give {want}")]
    Share {
        /// The option.
        option: &'static str,
        /// Its value.
        value: f64,
        /// What would be right.
        want: &'static str,
    },
    /// Head scores of another model, or of none.
    #[error("the head scores do not fit: {0}")]
    HeadScores(#[from] HeadScoresError),
    /// A highlighted span that is empty or not in the prompt.
    #[error(
        "the span {start}..{end} is not in the prompt: give positions of its {}, the end above the start",
        count(*.tokens, "token")
    )]
    Span {
        /// Its first position.
        start: usize,
        /// The position behind its last.
        end: usize,
        /// Tokens of the prompt.
        tokens: usize,
    },
    /// A head that the model does not have.
    #[error("there is no head {layer}-{head}: the model has {layers} layers of {query_heads} query heads")]
    Head {
        /// Its layer.
        layer: usize,
        /// Its number among the query heads.
        head: usize,
        /// Layers of the model.
        layers: usize,
        /// Query heads of a layer.
        query_heads: usize,
    },
    /// A policy that is no policy of caches alone.
    #[error(
        "token-selective propagation does not go with {0}: give a policy that only chooses what a layer keeps"
    )]
    Composition(&'static str),
    /// Steering without a span, or without a head.
    #[error("steering needs at least one span and one head")]
    NothingToSteer,
    /// A layer that the model does not have, to rank tokens.
    #[error("the filter layer is {layer}, but the model's layers are 0 to {last}")]
    FilterLayer {
        /// The layer asked for, 0-based.
        layer: usize,
        /// The model's last layer.
        last: usize,
    },
    /// A first candidate for the TSP layer behind the last one.
    #[error(
        "the candidates for the TSP layer are {first} to {last}: give a first that is not above the last"
    )]
    Candidates {
        /// The first candidate, 0-based.
        first: usize,
        /// The last one.
        last: usize,
    },
    /// A layer that the model does not have.
    #[error("the TSP layer is {layer}, but the model's layers are 0 to {last}")]
    TspLayer {
        /// The layer asked for, 0-based.
        layer: usize,
        /// The model's last layer.
        last: usize,
    },
}

/// The widest observation window: queries whose probabilities are summed.
pub const MAX_WINDOW: usize = 64;
/// The widest pooling kernel.
pub const MAX_POOLING: usize = 63;
/// Retention rate of the latest FastKV paper, and the default of every policy here.
pub const DEFAULT_RETENTION: f64 = 0.1;

impl Policy {
    /// The policy's name, as the command line spells it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::FastKv(_) => "fastkv",
            Self::SnapKv(_) => "snapkv",
            Self::PyramidKv(_) => "pyramidkv",
            Self::AdaKv(_) => "adakv",
            Self::HeadKv(_) => "headkv",
            Self::H2o(_) => "h2o",
            Self::FastGen(_) => "fastgen",
            Self::GemFilter(_) => "gemfilter",
            Self::PyramidInfer(_) => "pyramidinfer",
            Self::StreamingLlm(_) => "streamingllm",
            Self::Random(_) => "random",
            Self::Tsp(options) => match *options.cache {
                Self::SnapKv(_) => "fastkv+snapkv",
                Self::PyramidKv(_) => "fastkv+pyramidkv",
                Self::AdaKv(_) => "fastkv+adakv",
                Self::HeadKv(_) => "fastkv+headkv",
                Self::H2o(_) => "fastkv+h2o",
                Self::FastGen(_) => "fastkv+fastgen",
                Self::StreamingLlm(_) => "fastkv+streamingllm",
                Self::Random(_) => "fastkv+random",
                _ => "fastkv+?",
            },
        }
    }

    /// What each layer keeps of the prompt for a kv head, where the policy has such a budget.
    pub fn retention(&self) -> Option<Budget> {
        match self {
            Self::Full | Self::FastGen(_) | Self::PyramidInfer(_) => None,
            Self::FastKv(options) => Some(options.retention),
            Self::SnapKv(options) => Some(options.retention),
            Self::PyramidKv(options) => Some(options.retention),
            Self::AdaKv(options) => Some(options.retention),
            Self::HeadKv(options) => Some(options.retention),
            Self::H2o(options) => Some(options.retention),
            Self::GemFilter(options) => Some(options.retention),
            Self::StreamingLlm(options) => Some(options.retention),
            Self::Random(options) => Some(options.retention),
            Self::Tsp(options) => options.cache.retention(),
        }
    }

    /// The tokens that the policy tells apart, where it does: they are a tokenizer's, so somebody has to
    /// name them.
    pub fn token_classes_mut(&mut self) -> Option<&mut TokenClasses> {
        match self {
            Self::FastGen(options) => Some(&mut options.classes),
            Self::Tsp(options) => options.cache.token_classes_mut(),
            _ => None,
        }
    }

    /// The head scores that the policy goes by, where it does: they are a model's, so somebody has to
    /// measure them.
    pub fn head_scores_mut(&mut self) -> Option<&mut HeadScores> {
        match self {
            Self::HeadKv(options) => Some(&mut options.heads),
            Self::Tsp(options) => options.cache.head_scores_mut(),
            _ => None,
        }
    }

    /// The rules for each layer of a model of this shape and a prompt of this many tokens.
    ///
    /// # Errors
    /// Options out of range, whatever the prompt: see [`PolicyError`].
    pub fn plan(&self, shape: ModelShape, prompt_tokens: usize) -> Result<Plan, PolicyError> {
        if prompt_tokens == 0 {
            return Err(PolicyError::EmptyPrompt);
        }
        let ModelShape { layers, query_heads, kv_heads, head_dim } = shape;
        if [layers, query_heads, kv_heads, head_dim].contains(&0) || !query_heads.is_multiple_of(kv_heads) {
            return Err(PolicyError::Shape(shape));
        }
        let (mut restart, mut candidates) = (None, None);
        let mut classes = TokenClasses::default();
        let layers = match self {
            Self::Full => vec![LayerPlan::full(prompt_tokens); shape.layers],
            Self::FastKv(options) => {
                let (layers, among) = options.plan(shape, prompt_tokens)?;
                candidates = among;
                layers
            }
            Self::SnapKv(options) => options.layers(shape, prompt_tokens)?,
            Self::PyramidKv(options) => options.layers(shape, prompt_tokens)?,
            Self::AdaKv(options) => options.layers(shape, prompt_tokens)?,
            Self::HeadKv(options) => options.layers(shape, prompt_tokens)?,
            Self::H2o(options) => options.layers(shape, prompt_tokens)?,
            Self::FastGen(options) => {
                classes = options.classes.clone();
                options.layers(shape, prompt_tokens)?
            }
            Self::GemFilter(options) => {
                let (again, layers) = options.plan(shape, prompt_tokens)?;
                restart = again;
                layers
            }
            Self::PyramidInfer(options) => options.layers(shape, prompt_tokens)?,
            Self::StreamingLlm(options) => options.layers(shape, prompt_tokens)?,
            Self::Random(options) => options.layers(shape, prompt_tokens)?,
            Self::Tsp(options) => {
                return Ok(Plan { policy: self.clone(), ..options.plan(shape, prompt_tokens)? });
            }
        };
        let policy = self.clone();
        Ok(Plan { policy, shape, prompt_tokens, restart, layers, candidates, classes, steering: None })
    }
}

/// `int(tokens · rate)` as the authors compute it, in f64.
pub(crate) fn share(tokens: usize, rate: f64) -> usize {
    (tokens as f64 * rate) as usize
}

impl Budget {
    /// The tokens this budget allows of a prompt. A rate gives at least `reserved + 1`; a number
    /// that does not exceed `reserved` is an error.
    fn tokens(
        self,
        option: &'static str,
        prompt_tokens: usize,
        reserved: usize,
        reason: &'static str,
    ) -> Result<usize, PolicyError> {
        match self {
            Self::Rate(rate) => {
                check_rate(option, rate)?;
                Ok(share(prompt_tokens, rate).max(reserved.saturating_add(1)))
            }
            Self::Tokens(value) if value <= reserved => Err(PolicyError::Budget {
                option,
                value,
                reserved,
                reason,
                least: reserved.saturating_add(1),
            }),
            Self::Tokens(value) => Ok(value),
        }
    }
}

fn check_rate(option: &'static str, value: f64) -> Result<(), PolicyError> {
    if value > 0.0 && value <= 1.0 { Ok(()) } else { Err(PolicyError::Rate { option, value }) }
}

/// Checks an option that is no share of the prompt.
fn check_share(option: &'static str, value: f64, fits: bool, want: &'static str) -> Result<(), PolicyError> {
    if fits { Ok(()) } else { Err(PolicyError::Share { option, value, want }) }
}

fn check_window(window: usize) -> Result<(), PolicyError> {
    if (1..=MAX_WINDOW).contains(&window) { Ok(()) } else { Err(PolicyError::Window(window)) }
}
