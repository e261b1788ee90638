//! A model directory as a whole.

use std::path::{Path, PathBuf};

#[cfg(feature = "text")]
use super::{ChatTemplate, Tokenizer};
use super::{Checkpoint, GenerationConfig, LlamaConfig, LlamaWeights, ModelError};

/// A directory with `config.json`, safetensors and what else Hugging Face models come with.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ModelDir {
    /// Where it lies.
    pub path: PathBuf,
    /// `config.json`.
    pub config: LlamaConfig,
    /// All tensors there are.
    pub checkpoint: Checkpoint,
    /// The tensors of the model.
    pub weights: LlamaWeights,
    /// `generation_config.json`, or the defaults.
    pub generation: GenerationConfig,
}

impl ModelDir {
    /// Reads the configuration and maps the weights, headers only: no weight is read from disk yet.
    /// Text files are left for [`Self::tokenizer`] and [`Self::chat_template`], so that a model
    /// without them can be run on token ids.
    ///
    /// # Errors
    /// `path` is not a directory, or one of the files is missing or wrong; see [`LlamaConfig::from_json`],
    /// [`Checkpoint::open`], [`LlamaWeights::find`] and [`GenerationConfig::from_directory`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ModelError> {
        let path = path.as_ref();
        let metadata =
            std::fs::metadata(path).map_err(|source| ModelError::Io { path: path.to_path_buf(), source })?;
        if !metadata.is_dir() {
            return Err(ModelError::NotADirectory { path: path.to_path_buf() });
        }
        let config = LlamaConfig::from_file(&path.join("config.json"))?;
        let generation = GenerationConfig::from_directory(path, &config)?;
        let checkpoint = Checkpoint::open(path)?;
        let weights = LlamaWeights::find(&checkpoint, &config)?;
        Ok(Self { path: path.to_path_buf(), config, checkpoint, weights, generation })
    }

    /// Reads `tokenizer.json` and checks that its ids fit the embedding.
    ///
    /// # Errors
    /// The file is missing or wrong, or belongs to another model.
    #[cfg(feature = "text")]
    pub fn tokenizer(&self) -> Result<Tokenizer, ModelError> {
        Tokenizer::from_file(&self.path.join("tokenizer.json"), self.config.vocab_size)
    }

    /// Reads the chat template; none where the model comes without.
    ///
    /// # Errors
    /// The files are wrong or the template does not parse.
    #[cfg(feature = "text")]
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ModelError> {
        ChatTemplate::from_directory(&self.path)
    }
}
