//! A safetensors file, mapped, and what is wrong with it.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredDtype, SafeTensorError};
use serde_json::Value;

use super::ModelError;
use super::stored::{Dtype, StoredTensor};

/// A tensor as its header describes it, of whatever type.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    dtype: StoredDtype,
    shape: Vec<usize>,
    shard: Arc<Shard>,
    /// In the file.
    range: Range<usize>,
}

impl Entry {
    /// The file that holds it.
    pub(super) fn file(&self) -> &Path {
        &self.shard.file
    }

    /// Bytes of its elements.
    pub(super) fn bytes(&self) -> u64 {
        self.range.len() as u64
    }

    /// The tensor, where it is of a type that weights may have.
    pub(super) fn stored(&self, name: &str) -> Result<StoredTensor, ModelError> {
        let dtype = match self.dtype {
            StoredDtype::BF16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
            StoredDtype::F32 => Dtype::F32,
            other => {
                return Err(ModelError::TensorDtype {
                    file: self.shard.file.clone(),
                    tensor: name.to_owned(),
                    found: other.to_string(),
                });
            }
        };
        Ok(StoredTensor {
            name: name.into(),
            dtype,
            shape: self.shape.clone(),
            shard: Arc::clone(&self.shard),
            range: self.range.clone(),
        })
    }
}

/// A mapped file.
pub(super) struct Shard {
    pub(super) file: PathBuf,
    pub(super) map: Mmap,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.file.display(), self.map.len())
    }
}

impl Shard {
    /// Maps a file and checks its header; the tensors by name.
    pub(super) fn open(path: &Path) -> Result<BTreeMap<String, Entry>, ModelError> {
        let io = |source| ModelError::Io { path: path.to_path_buf(), source };
        // Asked before it is opened: a pipe would wait for somebody to write.
        if !fs::metadata(path).map_err(io)?.is_file() {
            return Err(ModelError::Safetensors {
                file: path.to_path_buf(),
                reason: "not a regular file".to_owned(),
            });
        }
        let handle = File::open(path).map_err(io)?;
        // SAFETY: the mapping is private and read-only. Rust asks besides that nobody changes the file
        // while it is mapped, which no program can enforce; all values of the bytes are valid for the
        // types read from them, so the worst a writer can do is to alter weights, or to end the
        // process by truncating the file.
        let map = unsafe { Mmap::map(&handle) }.map_err(io)?;
        let shard = Arc::new(Self { file: path.to_path_buf(), map });
        let (header, metadata) = SafeTensors::read_metadata(&shard.map).map_err(|error| {
            ModelError::Safetensors { file: path.to_path_buf(), reason: explain(&error, &shard.map) }
        })?;
        let data = header + LENGTH_BYTES;
        Ok(metadata
            .tensors()
            .into_iter()
            .map(|(name, info)| {
                let (start, end) = info.data_offsets;
                let entry = Entry {
                    dtype: info.dtype,
                    shape: info.shape.clone(),
                    shard: Arc::clone(&shard),
                    range: data + start..data + end,
                };
                (name, entry)
            })
            .collect())
    }
}

/// The header begins with its own length, a u64.
const LENGTH_BYTES: usize = 8;

/// Says which tensor is to blame for an error that the safetensors crate reports for the file.
fn explain(error: &SafeTensorError, file: &[u8]) -> String {
    let bytes = file.len();
    match error {
        SafeTensorError::HeaderTooSmall => {
            return format!(
                "{bytes} bytes are too few; the file begins with the 8-byte length of its header"
            );
        }
        SafeTensorError::InvalidHeaderLength | SafeTensorError::HeaderTooLarge => {
            let length = file.first_chunk().map_or(0, |length| u64::from_le_bytes(*length));
            return format!("the header is said to be {length} bytes long, but the file has {bytes}");
        }
        _ => {}
    }
    blame(file).unwrap_or_else(|| error.to_string())
}

/// Walks the header as untyped JSON, in the order of the data, to the first tensor that does not fit.
fn blame(file: &[u8]) -> Option<String> {
    let length = usize::try_from(u64::from_le_bytes(*file.first_chunk()?)).ok()?;
    let end = length.checked_add(LENGTH_BYTES)?;
    let header: serde_json::Map<String, Value> = serde_json::from_slice(file.get(LENGTH_BYTES..end)?).ok()?;
    let data = (file.len() - end) as u64;
    let mut tensors = Vec::new();
    for (name, info) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let offset = |at: usize| info.get("data_offsets")?.as_array()?.get(at)?.as_u64();
        match (offset(0), offset(1)) {
            (Some(start), Some(end)) => tensors.push((start, end, name, info)),
            _ => return Some(format!("tensor `{name}` has no pair of data_offsets")),
        }
    }
    tensors.sort_by_key(|(start, end, ..)| (*start, *end));
    let mut filled = 0;
    for (start, end, name, info) in tensors {
        if end < start || end > data {
            return Some(format!(
                "tensor `{name}` is said to lie at bytes {start}..{end} of the data, but the file has {data}: \
                 it is truncated, or the header is damaged"
            ));
        }
        if start != filled {
            let what =
                if start < filled { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Some(format!("tensor `{name}` at bytes {start}..{end} {what}, which ends at {filled}"));
        }
        let dtype =
            serde_json::from_value::<StoredDtype>(info.get("dtype").cloned().unwrap_or_default()).ok();
        let Some(dtype) = dtype else {
            return Some(format!("tensor `{name}` has an unknown dtype"));
        };
        let shape = info
            .get("shape")
            .and_then(Value::as_array)
            .and_then(|shape| shape.iter().map(Value::as_u64).collect::<Option<Vec<_>>>());
        let Some(shape) = shape else {
            return Some(format!("tensor `{name}` has no valid shape"));
        };
        let bits = shape.iter().try_fold(dtype.bitsize() as u64, |bits, size| bits.checked_mul(*size));
        if bits != (end - start).checked_mul(8) {
            return Some(format!(
                "tensor `{name}` ({dtype} {shape:?}) does not fill its {} bytes exactly",
                end - start
            ));
        }
        filled = end;
    }
    (filled != data).then(|| format!("the tensors end at byte {filled} of the data, but the file has {data}"))
}
