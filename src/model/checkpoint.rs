//! The safetensors files of a model.

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::ModelError;
use super::json;
use super::shard::{Entry, Shard};
use super::stored::{StoredTensor, check_finite};

/// The tensors of a model directory: one `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists. Opening reads the headers only.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The single file, or the index: what a message about a missing tensor names.
    file: PathBuf,
    tensors: BTreeMap<String, Entry>,
}

impl Checkpoint {
    /// Maps the safetensors files of a model directory and checks their headers: that each tensor's
    /// shape, type and place agree, and that together they fill the file exactly.
    ///
    /// As transformers does, prefers `model.safetensors` where there is an index as well.
    ///
    /// # Errors
    /// [`ModelError`] for files that are missing, truncated or contradict themselves, and for an index
    /// that names a missing shard, a tensor the shard lacks, or a file outside the directory.
    pub fn open(directory: &Path) -> Result<Self, ModelError> {
        let single = directory.join(SINGLE);
        let index = directory.join(INDEX);
        if single.exists() {
            Self::open_single(single)
        } else if index.exists() {
            Self::open_sharded(directory, index)
        } else {
            let hint = if ["pytorch_model.bin", "pytorch_model.bin.index.json"]
                .iter()
                .any(|name| directory.join(name).exists())
            {
                "there is a pytorch_model.bin: save the model again with transformers to get safetensors"
                    .to_owned()
            } else {
                format!("a model has its weights there, or in shards listed by {INDEX}")
            };
            Err(ModelError::FileMissing { path: single, hint })
        }
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// It is missing, has another shape than `shape`, or is stored as something other than
    /// [`Dtype`](super::Dtype) knows.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, ModelError> {
        let Some((name, entry)) = self.tensors.get_key_value(name) else {
            return Err(ModelError::TensorMissing {
                file: self.file.clone(),
                tensor: name.to_owned(),
                hint: String::new(),
            });
        };
        let tensor = entry.stored(name)?;
        if tensor.shape() != shape {
            return Err(ModelError::TensorShape {
                file: entry.file().to_path_buf(),
                tensor: name.clone(),
                found: tensor.shape().to_vec(),
                expected: shape.to_vec(),
            });
        }
        Ok(tensor)
    }

    /// The single file, or the index of a sharded checkpoint.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// Names of all tensors, in order of name.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// The file that holds a tensor.
    pub fn file_of(&self, name: &str) -> Option<&Path> {
        self.tensors.get(name).map(Entry::file)
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(Entry::bytes).sum()
    }

    /// Looks for NaN and infinity in every tensor, on the threads of the current rayon pool.
    ///
    /// `progress` is told the bytes read so far and in all, from any thread; `Break` stops the scan.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] for the first such element in the order of names,
    /// [`ModelError::TensorDtype`] where a tensor is not of a floating-point type of [`Dtype`](super::Dtype),
    /// [`ModelError::Cancelled`] after a `Break`.
    pub fn check_finite(
        &self,
        progress: impl Fn(u64, u64) -> ControlFlow<()> + Sync,
    ) -> Result<(), ModelError> {
        let tensors = self
            .tensors
            .iter()
            .map(|(name, entry)| entry.stored(name))
            .collect::<Result<Vec<_>, ModelError>>()?;
        check_finite(tensors.iter(), progress)
    }

    fn open_single(file: PathBuf) -> Result<Self, ModelError> {
        let tensors = Shard::open(&file)?.into_iter().collect();
        Ok(Self { file, tensors })
    }

    fn open_sharded(directory: &Path, file: PathBuf) -> Result<Self, ModelError> {
        let index = json::object(&file, &json::read(&file, "")?)?;
        let fields = json::Fields::new(&file, &index);
        let Some(map) = fields.object("weight_map")? else {
            return Err(fields.missing("weight_map", "an object from tensor names to file names"));
        };
        let mut shards: BTreeMap<&str, BTreeMap<String, Entry>> = BTreeMap::new();
        let mut tensors = BTreeMap::new();
        for (tensor, shard) in map.iter() {
            let wrong = |reason: &str| ModelError::Index {
                file: file.clone(),
                tensor: tensor.clone(),
                shard: shard.as_str().map_or_else(|| json::shown(shard), str::to_owned),
                reason: reason.to_owned(),
            };
            let Value::String(shard) = shard else {
                return Err(wrong("not a file name"));
            };
            // Anything but a plain name could point outside the model.
            let mut components = Path::new(shard).components();
            if !matches!((components.next(), components.next()), (Some(Component::Normal(name)), None) if name == shard.as_str())
            {
                return Err(wrong("a shard must be a file name in the same directory, without any path"));
            }
            if !shards.contains_key(shard.as_str()) {
                let path = directory.join(shard);
                if !path.exists() {
                    return Err(wrong(
                        "no such file; the download is incomplete or the index is of another model",
                    ));
                }
                shards.insert(shard, Shard::open(&path)?);
            }
            let entry = shards.get(shard.as_str()).and_then(|shard| shard.get(tensor));
            let entry = entry.ok_or_else(|| wrong("the file has no such tensor"))?;
            tensors.insert(tensor.clone(), entry.clone());
        }
        Ok(Self { file, tensors })
    }
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
