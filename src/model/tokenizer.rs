//! `tokenizer.json`: text to token ids and back.

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::ModelError;
use super::json;

/// The tokenizer of a model.
pub struct Tokenizer {
    file: PathBuf,
    inner: tokenizers::Tokenizer,
    special: HashSet<u32>,
    unknown: Option<u32>,
}

/// What `tokenizer.json` says of text that it has no token for: a token, or for Unigram its id.
#[derive(Default, Deserialize)]
#[serde(default)]
struct File {
    model: Unknown,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Unknown {
    unk_token: Value,
    unk_id: Value,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` for a model with `vocab_size` rows of embedding. Truncation and padding
    /// that the file asks for are left out, as transformers does unless told otherwise.
    ///
    /// # Errors
    /// The file is missing or not a tokenizer, or has a token with an id of `vocab_size` or more.
    pub fn from_file(file: &Path, vocab_size: usize) -> Result<Self, ModelError> {
        let text = json::read(file, "text needs the model's tokenizer; without one, give token ids")?;
        let refused = |reason: String| ModelError::Tokenizer { file: file.to_path_buf(), reason };
        // The tokenizers crate panics on some malformed files, most of which are not JSON to begin with.
        serde_json::from_slice::<serde::de::IgnoredAny>(&text)
            .map_err(|source| ModelError::Json { file: file.to_path_buf(), source })?;
        let inner = without_panic(|| {
            let mut inner = tokenizers::Tokenizer::from_bytes(&text)?;
            inner.with_padding(None);
            inner.with_truncation(None)?;
            Ok(inner)
        });
        let inner = inner.map_err(|reason| refused(format!("not a tokenizer that can be read: {reason}")))?;

        let highest = inner.get_vocab(true).into_iter().max_by_key(|(_, id)| *id);
        let Some((token, id)) = highest else {
            return Err(refused("the vocabulary is empty".to_owned()));
        };
        if id as usize >= vocab_size {
            return Err(ModelError::Vocabulary { file: file.to_path_buf(), token, id, vocab_size });
        }
        let special = inner
            .get_added_tokens_decoder()
            .into_iter()
            .filter_map(|(id, token)| token.special.then_some(id))
            .collect();
        let File { model } = serde_json::from_slice(&text).unwrap_or_default();
        let unknown = match (model.unk_token.as_str(), model.unk_id.as_u64()) {
            (Some(token), _) => inner.token_to_id(token),
            (None, id) => id.and_then(|id| u32::try_from(id).ok()),
        };
        Ok(Self { file: file.to_path_buf(), inner, special, unknown })
    }

    /// Token ids of `text`. Names of special tokens in the text become those tokens.
    ///
    /// `add_special_tokens` puts the model's begin-of-text and the like around it. Text rendered by a
    /// chat template has them already: encode that with `false`.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] where the tokenizer has no way to write the text.
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, ModelError> {
        let encoding = without_panic(|| self.inner.encode_fast(text, add_special_tokens));
        let encoding = encoding.map_err(|reason| self.refused(reason))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// What [`Tokenizer::encode`] gives, and the bytes of `text` that each token stands for; none for
    /// tokens that are put around it.
    ///
    /// # Errors
    /// As [`Tokenizer::encode`].
    pub fn encode_with_offsets(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>), ModelError> {
        let encoding = without_panic(|| self.inner.encode(text, add_special_tokens));
        let encoding = encoding.map_err(|reason| self.refused(reason))?;
        let offsets = encoding.get_offsets().iter().map(|(first, end)| *first..*end).collect();
        Ok((encoding.get_ids().to_vec(), offsets))
    }

    /// The text of token ids; ids that the tokenizer does not know give nothing, bytes that are not
    /// UTF-8 give U+FFFD.
    ///
    /// # Errors
    /// [`ModelError::Tokenizer`] where the decoder refuses the tokens.
    pub fn decode(&self, ids: &[u32], skip_special_tokens: bool) -> Result<String, ModelError> {
        without_panic(|| self.inner.decode(ids, skip_special_tokens)).map_err(|reason| self.refused(reason))
    }

    /// The id of a token by its spelling in the vocabulary, such as `<|eot_id|>`.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token that stands for text without a token of its own, where there is one.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// The spelling of a token in the vocabulary, which for byte-level tokenizers is not its text.
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// Whether decoding with `skip_special_tokens` leaves this id out.
    pub fn is_special(&self, id: u32) -> bool {
        self.special.contains(&id)
    }

    /// Decodes an answer token by token.
    pub fn stream(&self, skip_special_tokens: bool) -> TextStream<'_> {
        TextStream { tokenizer: self, skip_special_tokens, ids: Vec::new(), shown: 0, context: String::new() }
    }

    fn refused(&self, reason: String) -> ModelError {
        ModelError::Tokenizer { file: self.file.clone(), reason }
    }
}

impl fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tokenizer({})", self.file.display())
    }
}

/// Text of a growing answer, in pieces that are whole characters. The pieces together are what
/// [`Tokenizer::decode`] gives for all ids at once.
///
/// A token may hold part of a character, and how a token reads may depend on the one before it; so
/// the tokens since the last piece are decoded together with those of that piece.
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    skip_special_tokens: bool,
    /// Tokens of the last piece, then those not shown yet.
    ids: Vec<u32>,
    /// How many of `ids` belong to the last piece.
    shown: usize,
    /// Text of those.
    context: String,
}

impl TextStream<'_> {
    /// Takes the next token and returns the text that is now certain, often that of the token, empty
    /// while a character is incomplete.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> Result<String, ModelError> {
        if self.skip_special_tokens && self.tokenizer.is_special(id) {
            return Ok(String::new());
        }
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        // U+FFFD at the end is a character whose bytes are still to come, unless it goes on for long.
        if text.ends_with(char::REPLACEMENT_CHARACTER) && self.ids.len() - self.shown < MOST_PENDING {
            return Ok(String::new());
        }
        let piece = self.beyond_context(&text);
        self.ids.drain(..self.shown);
        self.shown = self.ids.len();
        self.context = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(piece)
    }

    /// The text of what is still held back: U+FFFD for an incomplete character.
    ///
    /// # Errors
    /// As [`Tokenizer::decode`].
    pub fn finish(self) -> Result<String, ModelError> {
        let text = self.tokenizer.decode(&self.ids, self.skip_special_tokens)?;
        Ok(self.beyond_context(&text))
    }

    fn beyond_context(&self, text: &str) -> String {
        // Some decoders rewrite earlier text (spaces before punctuation); then only the rest is new.
        let same = text.chars().zip(self.context.chars()).take_while(|(a, b)| a == b);
        text[same.map(|(char, _)| char.len_utf8()).sum()..].to_owned()
    }
}

/// Turns a panic of the tokenizers crate, which expects its files to be well made, into an error. The
/// tokenizer is only read in there, so nothing half-changed is left behind.
fn without_panic<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => Err(match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(text), _) => text.clone(),
            (None, Some(text)) => (*text).to_owned(),
            (None, None) => "the tokenizer failed".to_owned(),
        }),
    }
}

/// Tokens held back for one character. UTF-8 needs four; the rest allows for tokens without text.
const MOST_PENDING: usize = 64;
