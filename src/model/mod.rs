//! Hugging Face model directories: what the files of a Llama or Mistral checkpoint say, checked.
//!
//! * [`LlamaConfig`] and [`RopeConfig`] read `config.json`;
//! * [`Checkpoint`] maps the safetensors files, [`LlamaWeights`] finds the tensors of the model in them;
//! * [`GenerationConfig`] reads `generation_config.json`;
//! * `Tokenizer` and `ChatTemplate` (feature `text`) turn text into token ids and back;
//! * [`ModelDir`] ties them together.
//!
//! Every file is treated as hostile: whatever is in it, the outcome is a checked value or a
//! [`ModelError`] that names the file, the field or tensor, the value and what would be right.

mod checkpoint;
mod config;
mod directory;
mod error;
mod generation;
pub(crate) mod json;
mod rope;
mod shard;
mod stored;
mod weights;

pub use checkpoint::Checkpoint;
pub use config::{Architecture, ContextLimit, LlamaConfig, MAX_GQA_RATIO, MAX_HEAD_DIM};
pub use directory::ModelDir;
pub use error::ModelError;
pub use generation::GenerationConfig;
pub use rope::{RopeConfig, RopeScaling};
pub use stored::{Dtype, Element, StoredTensor};
pub use weights::{LayerWeights, Linear, LlamaWeights};

#[cfg(feature = "text")]
mod chat;
#[cfg(feature = "text")]
mod tokenizer;

#[cfg(feature = "text")]
pub use chat::{ChatMessage, ChatTemplate};
#[cfg(feature = "text")]
pub use tokenizer::{TextStream, Tokenizer};
