//! What can be wrong with a model directory.

use std::path::PathBuf;

use super::Dtype;

/// Why a model could not be read. Each message names the file, what in it is wrong, and what would
/// be right.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// A file or directory could not be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The path of the model is not a directory.
    #[error("{}: not a directory; a model is a directory with config.json and model.safetensors", path.display())]
    NotADirectory {
        /// The path given.
        path: PathBuf,
    },
    /// A file that is needed is not there.
    #[error("{}: no such file; {hint}", path.display())]
    FileMissing {
        /// The file that was looked for.
        path: PathBuf,
        /// What the file is for and how to come by it.
        hint: String,
    },
    /// A file is not JSON, or not UTF-8.
    #[error("{}: not valid JSON: {source}", file.display())]
    Json {
        /// The file.
        file: PathBuf,
        /// What and where: carries the line and column.
        source: serde_json::Error,
    },
    /// A field that has no default is missing, or null.
    #[error("{}: field `{field}` is missing; it must be {expected}", file.display())]
    FieldMissing {
        /// The file.
        file: PathBuf,
        /// The field, with dots between levels.
        field: String,
        /// What belongs there.
        expected: String,
    },
    /// A field holds something that makes no sense.
    #[error("{}: field `{field}` is {value}; it must be {expected}", file.display())]
    Field {
        /// The file.
        file: PathBuf,
        /// The field, with dots between levels.
        field: String,
        /// The value found, as JSON, cut if long.
        value: String,
        /// What belongs there.
        expected: String,
    },
    /// A field asks for something sensible that this crate does not do.
    #[error("{}: field `{field}` is {value}, which is not supported; supported: {supported}", file.display())]
    Unsupported {
        /// The file.
        file: PathBuf,
        /// The field, with dots between levels.
        field: String,
        /// The value found, as JSON, cut if long.
        value: String,
        /// The values that are supported.
        supported: String,
    },
    /// A safetensors file is damaged or not one at all.
    #[error("{}: not a valid safetensors file: {reason}", file.display())]
    Safetensors {
        /// The file.
        file: PathBuf,
        /// What is wrong, with the tensor's name where one is to blame.
        reason: String,
    },
    /// `model.safetensors.index.json` and the shards do not fit each other.
    #[error("{}: tensor `{tensor}` is mapped to `{shard}`: {reason}", file.display())]
    Index {
        /// The index file.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shard's file name as the index has it.
        shard: String,
        /// What is wrong.
        reason: String,
    },
    /// The checkpoint has no tensor of that name.
    #[error("{}: tensor `{tensor}` is missing{hint}", file.display())]
    TensorMissing {
        /// The safetensors file, or the index of a sharded checkpoint.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Empty, or `; ` and why the tensor is needed.
        hint: String,
    },
    /// The checkpoint has a tensor that the configuration says is not part of the model.
    #[error("{}: tensor `{tensor}` is there, but {reason}", file.display())]
    TensorUnexpected {
        /// The safetensors file that holds it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// Which statement it contradicts.
        reason: String,
    },
    /// A tensor has another shape than the configuration implies.
    #[error("{}: tensor `{tensor}` has shape {found:?}, but config.json implies {expected:?}", file.display())]
    TensorShape {
        /// The safetensors file that holds it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape wanted.
        expected: Vec<usize>,
    },
    /// A tensor is stored in a type that weights cannot have here.
    #[error("{}: tensor `{tensor}` is stored as {found}; supported: BF16, F16, F32", file.display())]
    TensorDtype {
        /// The safetensors file that holds it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// The type's name in the file.
        found: String,
    },
    /// A weight is NaN or infinite.
    #[error("{}: tensor `{tensor}` ({dtype}) holds {value} at element {element}; weights must be finite", file.display())]
    NonFinite {
        /// The safetensors file that holds it.
        file: PathBuf,
        /// The tensor's name.
        tensor: String,
        /// How it is stored.
        dtype: Dtype,
        /// Index of the first such element, row-major.
        element: usize,
        /// `NaN`, `inf` or `-inf`.
        value: f32,
    },
    /// The caller's progress callback asked to stop.
    #[error("cancelled")]
    Cancelled,
    /// `tokenizer.json` cannot be used.
    #[error("{}: {reason}", file.display())]
    Tokenizer {
        /// The file.
        file: PathBuf,
        /// What the tokenizer library said.
        reason: String,
    },
    /// The tokenizer can produce ids that the model has no embedding for.
    #[error(
        "{}: token {token:?} has id {id}, but config.json says vocab_size = {vocab_size}: \
         the tokenizer belongs to another model, or the embedding was not resized", file.display()
    )]
    Vocabulary {
        /// The tokenizer file.
        file: PathBuf,
        /// The token with the highest id.
        token: String,
        /// Its id.
        id: u32,
        /// Rows of the embedding.
        vocab_size: usize,
    },
    /// A chat template does not parse, or refuses the messages.
    #[error("{}: chat template{}: {reason}", file.display(), line.map(|line| format!(", line {line}")).unwrap_or_default())]
    ChatTemplate {
        /// The file that holds the template.
        file: PathBuf,
        /// Line within the template, from 1.
        line: Option<usize>,
        /// What the template engine, or the template's own `raise_exception`, said.
        reason: String,
    },
}
