//! Safetensors files, mapped.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use half::{bf16, f16};
use memmap2::Mmap;
use rayon::prelude::*;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as StoredDtype, SafeTensorError};
use serde::Serialize;
use serde_json::Value;

use super::ModelError;
use super::json;

/// The tensors of a model directory: one `model.safetensors`, or the shards that
/// `model.safetensors.index.json` lists. Opening reads the headers only.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    /// The single file, or the index: what a message about a missing tensor names.
    file: PathBuf,
    tensors: BTreeMap<String, Entry>,
}

/// A tensor of a [`Checkpoint`]: a handle on the mapped file that can be cloned, sent and kept. The
/// bytes are paged in when touched; the mapping goes when the last handle goes.
#[derive(Clone)]
pub struct StoredTensor {
    name: Arc<str>,
    dtype: Dtype,
    shape: Vec<usize>,
    shard: Arc<Shard>,
    range: Range<usize>,
}

/// How a weight is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize)]
pub enum Dtype {
    /// bfloat16.
    Bf16,
    /// IEEE half precision.
    F16,
    /// IEEE single precision.
    F32,
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
    /// [`Dtype`] knows.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<StoredTensor, ModelError> {
        let Some((name, entry)) = self.tensors.get_key_value(name) else {
            return Err(ModelError::TensorMissing {
                file: self.file.clone(),
                tensor: name.to_owned(),
                hint: String::new(),
            });
        };
        let tensor = entry.stored(name)?;
        if tensor.shape != shape {
            return Err(ModelError::TensorShape {
                file: entry.shard.file.clone(),
                tensor: name.clone(),
                found: tensor.shape,
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
        self.tensors.get(name).map(|entry| entry.shard.file.as_path())
    }

    /// Bytes of all tensors together, headers not counted.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|entry| entry.range.len() as u64).sum()
    }

    /// Looks for NaN and infinity in every tensor, on the threads of the current rayon pool.
    ///
    /// `progress` is told the bytes read so far and in all, from any thread; `Break` stops the scan.
    ///
    /// # Errors
    /// [`ModelError::NonFinite`] for the first such element in the order of names,
    /// [`ModelError::TensorDtype`] where a tensor is not of a floating-point type of [`Dtype`],
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

impl StoredTensor {
    /// Numbers that no file holds, as a row-major tensor of f32.
    ///
    /// # Errors
    /// [`ModelError::Io`] where the machine has no memory for them.
    ///
    /// # Panics
    /// If the sizes do not multiply to as many numbers, or there are none.
    pub fn from_f32(name: &str, shape: &[usize], numbers: &[f32]) -> Result<Self, ModelError> {
        assert!(!numbers.is_empty() && shape.iter().product::<usize>() == numbers.len(), "{name}: {shape:?}");
        let file = PathBuf::from("(memory)");
        let bytes = size_of_val(numbers);
        let map = memmap2::MmapMut::map_anon(bytes).and_then(|mut map| {
            for (bytes, number) in map.chunks_exact_mut(size_of::<f32>()).zip(numbers) {
                bytes.copy_from_slice(&number.to_le_bytes());
            }
            map.make_read_only()
        });
        let map = map.map_err(|source| ModelError::Io { path: file.clone(), source })?;
        let shard = Arc::new(Shard { file, map });
        Ok(Self { name: name.into(), dtype: Dtype::F32, shape: shape.to_vec(), shard, range: 0..bytes })
    }

    /// The name in the checkpoint.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How the elements are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Sizes, outermost first; the elements are row-major. A linear layer is `[outputs, inputs]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.range.len() / self.dtype.size()
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// The elements, little-endian, `len() · dtype().size()` bytes. Nothing is promised about their
    /// alignment: writers pad the header so that it normally suits the type, but the format does not
    /// ask for it. [`Self::elements`] and [`Self::read_f32`] take any.
    pub fn bytes(&self) -> &[u8] {
        &self.shard.map[self.range.clone()]
    }

    /// The elements without a copy where they are aligned in the mapping, else copied; none where the
    /// tensor is stored as another type than `T`.
    pub fn elements<T: Element>(&self) -> Option<Cow<'_, [T]>> {
        if T::DTYPE != self.dtype {
            return None;
        }
        Some(match bytemuck::try_cast_slice(self.bytes()) {
            Ok(elements) if cfg!(target_endian = "little") => Cow::Borrowed(elements),
            _ => Cow::Owned(self.bytes().chunks_exact(size_of::<T>()).map(T::from_le_bytes).collect()),
        })
    }

    /// Widens (exactly) the elements from `start` on into `out`.
    ///
    /// # Panics
    /// If `start + out.len()` is beyond the end.
    pub fn read_f32(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::Bf16 => widen::<bf16>(bytes, out),
            Dtype::F16 => widen::<f16>(bytes, out),
            Dtype::F32 => widen::<f32>(bytes, out),
        }
    }

    /// All elements, widened.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        out.par_chunks_mut(SCAN_BYTES)
            .enumerate()
            .for_each(|(chunk, out)| self.read_f32(chunk * SCAN_BYTES, out));
        out
    }

    /// The file that holds the tensor.
    pub fn file(&self) -> &Path {
        &self.shard.file
    }

    /// Index within `elements` of the first NaN or infinity.
    fn first_non_finite(&self, elements: Range<usize>) -> Option<usize> {
        let size = self.dtype.size();
        let bytes = &self.bytes()[elements.start * size..elements.end * size];
        // All exponent bits set: infinity or NaN.
        let found = match self.dtype {
            Dtype::Bf16 => first_masked(bytes, 0x7f80),
            Dtype::F16 => first_masked(bytes, 0x7c00),
            Dtype::F32 => bytes.chunks_exact(4).position(|bytes| {
                u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) & 0x7f80_0000 == 0x7f80_0000
            }),
        };
        found.map(|index| elements.start + index)
    }
}

impl fmt::Debug for StoredTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?} in {}", self.name, self.dtype, self.shape, self.shard.file.display())
    }
}

impl Dtype {
    /// Bytes of an element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Bf16 => "BF16",
            Self::F16 => "F16",
            Self::F32 => "F32",
        })
    }
}

/// The Rust types of [`Dtype`].
pub trait Element: bytemuck::Pod + private::Sealed {
    /// The type's tag.
    const DTYPE: Dtype;
    /// From exactly `size_of::<Self>()` bytes.
    #[doc(hidden)]
    fn from_le_bytes(bytes: &[u8]) -> Self;
    /// Exact.
    #[doc(hidden)]
    fn widen(self) -> f32;
}

mod private {
    pub trait Sealed {}
    impl Sealed for half::bf16 {}
    impl Sealed for half::f16 {}
    impl Sealed for f32 {}
}

impl Element for bf16 {
    const DTYPE: Dtype = Dtype::Bf16;

    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_bits(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f16 {
    const DTYPE: Dtype = Dtype::F16;

    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_bits(u16::from_le_bytes([bytes[0], bytes[1]]))
    }

    fn widen(self) -> f32 {
        self.to_f32()
    }
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;

    fn from_le_bytes(bytes: &[u8]) -> Self {
        Self::from_bits(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    fn widen(self) -> f32 {
        self
    }
}

/// Scans tensors in the order given; see [`Checkpoint::check_finite`].
pub(super) fn check_finite<'a>(
    tensors: impl Iterator<Item = &'a StoredTensor>,
    progress: impl Fn(u64, u64) -> ControlFlow<()> + Sync,
) -> Result<(), ModelError> {
    let pieces: Vec<(&StoredTensor, Range<usize>)> = tensors
        .flat_map(|tensor| {
            let step = SCAN_BYTES / tensor.dtype.size();
            (0..tensor.len())
                .step_by(step)
                .map(move |start| (tensor, start..(start + step).min(tensor.len())))
        })
        .collect();
    let total = pieces.iter().map(|(tensor, elements)| (elements.len() * tensor.dtype.size()) as u64).sum();
    let done = AtomicU64::new(0);
    let cancelled = AtomicBool::new(false);
    let found = pieces.par_iter().find_map_first(|(tensor, elements)| {
        if cancelled.load(Ordering::Relaxed) {
            return None;
        }
        let found = tensor.first_non_finite(elements.clone());
        let bytes = (elements.len() * tensor.dtype.size()) as u64;
        if progress(done.fetch_add(bytes, Ordering::Relaxed) + bytes, total).is_break() {
            cancelled.store(true, Ordering::Relaxed);
        }
        found.map(|element| (*tensor, element))
    });
    if cancelled.into_inner() {
        return Err(ModelError::Cancelled);
    }
    match found {
        None => Ok(()),
        Some((tensor, element)) => {
            let mut value = [0.0];
            tensor.read_f32(element, &mut value);
            Err(ModelError::NonFinite {
                file: tensor.shard.file.clone(),
                tensor: tensor.name.to_string(),
                dtype: tensor.dtype,
                element,
                value: value[0],
            })
        }
    }
}

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Piece of a tensor that one task scans: enough work for a task, small enough to spread.
const SCAN_BYTES: usize = 1 << 20;

/// A tensor as its header describes it, of whatever type.
#[derive(Clone, Debug)]
struct Entry {
    dtype: StoredDtype,
    shape: Vec<usize>,
    shard: Arc<Shard>,
    /// In the file.
    range: Range<usize>,
}

impl Entry {
    fn stored(&self, name: &str) -> Result<StoredTensor, ModelError> {
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

struct Shard {
    file: PathBuf,
    map: Mmap,
}

impl fmt::Debug for Shard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes)", self.file.display(), self.map.len())
    }
}

impl Shard {
    fn open(path: &Path) -> Result<BTreeMap<String, Entry>, ModelError> {
        let io = |source| ModelError::Io { path: path.to_path_buf(), source };
        let handle = File::open(path).map_err(io)?;
        let metadata = handle.metadata().map_err(io)?;
        if !metadata.is_file() {
            return Err(ModelError::Safetensors {
                file: path.to_path_buf(),
                reason: "not a regular file".to_owned(),
            });
        }
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

fn widen<T: Element>(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
        *out = T::from_le_bytes(bytes).widen();
    }
}

fn first_masked(bytes: &[u8], mask: u16) -> Option<usize> {
    bytes.chunks_exact(2).position(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]) & mask == mask)
}
