//! A tensor of a file, as it is stored.

use std::borrow::Cow;
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use half::{bf16, f16};
use rayon::prelude::*;
use serde::Serialize;

use super::ModelError;
use super::shard::Shard;

/// A tensor of a [`Checkpoint`](super::Checkpoint): a handle on the mapped file that can be cloned, sent and kept. The
/// bytes are paged in when touched; the mapping goes when the last handle goes.
#[derive(Clone)]
pub struct StoredTensor {
    pub(super) name: Arc<str>,
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) shard: Arc<Shard>,
    /// In the file.
    pub(super) range: Range<usize>,
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

/// Scans tensors in the order given; see [`Checkpoint::check_finite`](super::Checkpoint::check_finite).
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

/// Piece of a tensor that one task scans: enough work for a task, small enough to spread.
const SCAN_BYTES: usize = 1 << 20;

fn widen<T: Element>(bytes: &[u8], out: &mut [f32]) {
    for (out, bytes) in out.iter_mut().zip(bytes.chunks_exact(size_of::<T>())) {
        *out = T::from_le_bytes(bytes).widen();
    }
}

fn first_masked(bytes: &[u8], mask: u16) -> Option<usize> {
    bytes.chunks_exact(2).position(|bytes| u16::from_le_bytes([bytes[0], bytes[1]]) & mask == mask)
}
