//! Descriptions of tensors in device memory that bulk tensor copies follow.

use crate::error::Error;

/// How a bulk tensor copy permutes 16-byte chunks in shared memory: within spans of this many bytes,
/// by the bits of the address above bit 6.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Swizzle {
    /// Rows as they are.
    #[default]
    None,
    /// `CU_TENSOR_MAP_SWIZZLE_32B`.
    Bytes32,
    /// `CU_TENSOR_MAP_SWIZZLE_64B`.
    Bytes64,
    /// `CU_TENSOR_MAP_SWIZZLE_128B`.
    Bytes128,
}

impl Swizzle {
    /// The bits of a chunk's place that are permuted, counted from bit 4.
    const fn bits(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Bytes32 => 0b001,
            Self::Bytes64 => 0b011,
            Self::Bytes128 => 0b111,
        }
    }

    /// Bytes within which chunks change places.
    pub(crate) const fn span(self) -> u32 {
        16 * (self.bits() + 1)
    }

    /// Where a byte that would lie at this address of shared memory lies.
    pub(crate) const fn apply(self, address: u32) -> u32 {
        address ^ ((address >> 7 & self.bits()) << 4)
    }
}

/// A tensor and the box of it that one copy moves: what `cuTensorMapEncodeTiled` is told, without
/// interleaving, with element strides of 1, and with zeros outside the tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorMap<'a> {
    /// Device address, a multiple of 16.
    pub address: u64,
    /// Bytes of an element: 1, 2, 4 or 8.
    pub element_bytes: u32,
    /// Elements along each dimension, innermost first; 1 to 5 dimensions.
    pub sizes: &'a [u64],
    /// Bytes from one to the next along each dimension but the innermost; multiples of 16.
    pub strides: &'a [u64],
    /// Elements of the box along each dimension, at most 256.
    pub box_sizes: &'a [u32],
    /// Order of chunks in shared memory.
    pub swizzle: Swizzle,
}

/// First bytes of an encoded map, so that others are told apart.
const MARK: [u8; 4] = *b"PTXM";

impl TensorMap<'_> {
    /// The 128 bytes that a kernel takes. Their layout is this crate's own.
    ///
    /// # Errors
    /// [`Error::Request`] where CUDA would refuse too.
    pub fn encode(&self) -> Result<[u8; 128], Error> {
        let Self { address, element_bytes, sizes, strides, box_sizes, swizzle } = *self;
        let refuse = |reason: String| Err(Error::Request(format!("tensor map: {reason}")));
        let rank = sizes.len();
        if !(1..=5).contains(&rank) || strides.len() != rank - 1 || box_sizes.len() != rank {
            return refuse(format!(
                "{rank} sizes, {} strides and {} box sizes; there must be 1 to 5, one less, and as many",
                strides.len(),
                box_sizes.len()
            ));
        }
        if !address.is_multiple_of(16) {
            return refuse(format!("the address {address:#x}; it must be a multiple of 16"));
        }
        if ![1, 2, 4, 8].contains(&element_bytes) {
            return refuse(format!("elements of {element_bytes} bytes; they must have 1, 2, 4 or 8"));
        }
        if let Some(size) = sizes.iter().find(|size| **size == 0 || **size > 1 << 32) {
            return refuse(format!("a size of {size}; it must be from 1 to 2^32"));
        }
        if let Some(stride) = strides.iter().find(|stride| !stride.is_multiple_of(16) || **stride >= 1 << 40)
        {
            return refuse(format!("a stride of {stride}; it must be a multiple of 16 below 2^40"));
        }
        if let Some(size) = box_sizes.iter().find(|size| **size == 0 || **size > 256) {
            return refuse(format!("a box size of {size}; it must be from 1 to 256"));
        }
        let inner = box_sizes[0] * element_bytes;
        let most = if swizzle == Swizzle::None { u32::MAX } else { swizzle.span() };
        if !inner.is_multiple_of(16) || inner > most {
            return refuse(format!(
                "{inner} bytes along the innermost side of the box; they must be a multiple of 16, and no more than the swizzle's span"
            ));
        }
        let mut bytes = [0; 128];
        bytes[..4].copy_from_slice(&MARK);
        bytes[4] = element_bytes as u8;
        bytes[5] = rank as u8;
        bytes[6] = swizzle as u8;
        bytes[8..16].copy_from_slice(&address.to_le_bytes());
        for (n, size) in sizes.iter().enumerate() {
            bytes[16 + 8 * n..][..8].copy_from_slice(&size.to_le_bytes());
        }
        for (n, stride) in strides.iter().enumerate() {
            bytes[56 + 8 * n..][..8].copy_from_slice(&stride.to_le_bytes());
        }
        for (n, size) in box_sizes.iter().enumerate() {
            bytes[88 + 4 * n..][..4].copy_from_slice(&size.to_le_bytes());
        }
        Ok(bytes)
    }
}

/// A map as a copy reads it.
#[derive(Clone, Debug)]
pub(crate) struct Tiles {
    pub(crate) address: u64,
    pub(crate) element_bytes: u32,
    pub(crate) sizes: Vec<u64>,
    /// Of all dimensions, the innermost included.
    pub(crate) strides: Vec<u64>,
    pub(crate) box_sizes: Vec<u32>,
    pub(crate) swizzle: Swizzle,
}

impl Tiles {
    /// The map in these bytes, if it is one.
    pub(crate) fn decode(bytes: &[u8; 128]) -> Option<Self> {
        if bytes[..4] != MARK {
            return None;
        }
        let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
        let rank = usize::from(bytes[5]);
        let element_bytes = u32::from(bytes[4]);
        let strides = (0..rank - 1).map(|n| long(56 + 8 * n));
        Some(Self {
            address: long(8),
            element_bytes,
            sizes: (0..rank).map(|n| long(16 + 8 * n)).collect(),
            strides: std::iter::once(u64::from(element_bytes)).chain(strides).collect(),
            box_sizes: (0..rank).map(|n| long(88 + 4 * n) as u32).collect(),
            swizzle: [Swizzle::None, Swizzle::Bytes32, Swizzle::Bytes64, Swizzle::Bytes128]
                [usize::from(bytes[6] & 3)],
        })
    }

    /// Bytes of the whole box.
    pub(crate) fn bytes(&self) -> u32 {
        self.box_sizes.iter().product::<u32>() * self.element_bytes
    }

    /// Each element of the box that begins at these coordinates: where it lies in the
    /// box, and its address, or none outside the tensor.
    pub(crate) fn elements(&self, coordinates: &[i32]) -> Vec<(u32, Option<u64>)> {
        let mut found = Vec::new();
        let inner = self.box_sizes[0];
        let rows = self.box_sizes[1..].iter().product::<u32>();
        for row in 0..rows {
            let mut rest = row;
            let mut address = Some(self.address);
            for (n, first) in coordinates.iter().enumerate().skip(1) {
                let place = i64::from(*first) + i64::from(rest % self.box_sizes[n]);
                rest /= self.box_sizes[n];
                let inside = place >= 0 && (place as u64) < self.sizes[n];
                address = address.filter(|_| inside).map(|address| address + place as u64 * self.strides[n]);
            }
            for element in 0..inner {
                let place = i64::from(coordinates[0]) + i64::from(element);
                let inside = place >= 0 && (place as u64) < self.sizes[0];
                let address =
                    address.filter(|_| inside).map(|address| address + place as u64 * self.strides[0]);
                found.push(((row * inner + element) * self.element_bytes, address));
            }
        }
        found
    }
}
