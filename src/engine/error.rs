use super::{Bytes, MemoryEstimate};
use crate::backend::BackendError;
use crate::policy::{ModelShape, PolicyError};

/// What can go wrong in the engine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// Nothing to read.
    #[error("there are no tokens to read: give at least one")]
    NoTokens,
    /// A token that the model does not know.
    #[error("token {id} at position {position} is outside the model's vocabulary of {vocabulary}")]
    TokenOutOfRange {
        /// The token.
        id: u32,
        /// Where it stands.
        position: usize,
        /// Tokens the model knows.
        vocabulary: usize,
    },
    /// More tokens than the model can tell apart.
    #[error("{tokens} tokens are more than the {limit} of the model's context ({reason})")]
    ContextExceeded {
        /// Tokens of the sequence.
        tokens: usize,
        /// The most there may be.
        limit: usize,
        /// What sets the limit.
        reason: String,
    },
    /// A plan for another model or another prompt.
    #[error("the plan is for {plan_tokens} tokens of {plan:?}, but there are {tokens} tokens of {model:?}")]
    WrongPlan {
        /// The plan's model.
        plan: ModelShape,
        /// The plan's prompt.
        plan_tokens: usize,
        /// The model.
        model: ModelShape,
        /// The prompt.
        tokens: usize,
    },
    /// A plan whose numbers contradict each other.
    #[error("the plan's layer {layer} {problem}")]
    BrokenPlan {
        /// The layer, 0-based.
        layer: usize,
        /// What is wrong with it.
        problem: String,
    },
    /// A plan that steers what is not there.
    #[error("the plan cannot steer: {0}")]
    Steering(#[from] PolicyError),
    /// A cache of another model.
    #[error("the cache is of {cache:?}, but the model is {model:?}")]
    WrongCache {
        /// The cache's model.
        cache: ModelShape,
        /// The model.
        model: ModelShape,
    },
    /// A cache of another backend, whose keys and values may lie on another device.
    #[error(
        "the cache was filled by another backend than this engine's ({backend}): read its tokens with this one"
    )]
    ForeignCache {
        /// What the engine runs on.
        backend: String,
    },
    /// A cache whose entries went down with a backend.
    #[error("the cache was lost when the backend failed: read its tokens anew")]
    LostCache,
    /// Logits of another vocabulary.
    #[error("there are {logits} logits, but the model's vocabulary is {vocabulary}")]
    WrongLogits {
        /// How many were given.
        logits: usize,
        /// Tokens the model knows.
        vocabulary: usize,
    },
    /// Sampling parameters out of range.
    #[error("{option} is {value}: {want}")]
    Sampling {
        /// The parameter.
        option: &'static str,
        /// Its value.
        value: f32,
        /// What would be right.
        want: &'static str,
    },
    /// Logits that are no numbers: weights or activations overflowed.
    #[error("the model's logits hold {value} at token {token}: its weights or activations overflowed")]
    NotFinite {
        /// The first such value.
        value: f32,
        /// Its token.
        token: usize,
    },
    /// A model and a prompt for a bigger machine.
    #[error("too large for memory: {needed} are needed, {} are available", Bytes(*.available))]
    TooLarge {
        /// What it takes.
        needed: MemoryEstimate,
        /// Bytes there are.
        available: u64,
    },
    /// The caller asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// The backend failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}
