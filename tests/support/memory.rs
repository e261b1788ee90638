//! Blocks of device memory that are given back together.

use std::ops::Range;

use fastkv::kernels::Device;

/// What a destination holds where a kernel is not to write.
pub(crate) const UNTOUCHED: u8 = 0xEE;

/// Bytes between what lies far apart: more than 32 bits count, also of elements of 16 bits, and more than 31 bits of those
/// of 32. Cut to 32 bits, such an offset leads to where nothing was put.
const FAR: usize = (8 << 30) + (4 << 20);

/// What a check takes of which at most four tensors are so large at once.
pub(crate) const FAR_ROOM: u64 = 4 * FAR as u64 + (1 << 30);

/// How the bytes of a block lie in memory: in pieces of one size, the last perhaps shorter, at equal distances. What lies
/// between them is reserved, and neither read nor written here, however much it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Spread {
    /// Bytes before the first piece.
    before: usize,
    piece: usize,
    distance: usize,
}

impl Spread {
    /// One piece.
    pub(crate) const NEAR: Self = Self { before: 0, piece: usize::MAX, distance: 0 };

    /// One piece, far behind the beginning.
    pub(crate) const BEHIND: Self = Self { before: FAR, ..Self::NEAR };

    /// Pieces of so many bytes, of `bytes` in all, the last of them far behind the first.
    pub(crate) fn apart(piece: usize, bytes: usize) -> Self {
        let steps = bytes.div_ceil(piece).saturating_sub(1);
        Self { before: 0, piece, distance: (FAR / steps.max(1)).next_multiple_of(256) }
    }

    /// Pieces apart, or one.
    pub(crate) fn apart_if(far: bool, piece: usize, bytes: usize) -> Self {
        if far { Self::apart(piece, bytes) } else { Self::NEAR }
    }

    /// One piece, so many bytes behind the beginning.
    pub(crate) fn behind(before: usize) -> Self {
        Self { before, ..Self::NEAR }
    }

    /// The same pieces with distances of their own.
    pub(crate) fn at_distances(self, piece: usize, distance: usize) -> Self {
        Self { piece, distance, ..self }
    }

    /// Rows of so many bytes before the first piece.
    pub(crate) fn rows_before(self, bytes: usize) -> usize {
        assert!(self.before.is_multiple_of(bytes), "{self:?} in rows of {bytes} bytes");
        self.before / bytes
    }

    /// Elements of so many bytes from one piece to the next, where there are pieces.
    pub(crate) fn stride(self, bytes: usize) -> Option<i64> {
        (self.distance > 0).then_some((self.distance / bytes) as i64)
    }

    /// Where the pieces of `bytes` begin, and what part of the bytes each is.
    fn pieces(self, bytes: usize) -> impl DoubleEndedIterator<Item = (usize, Range<usize>)> {
        (0..bytes.div_ceil(self.piece)).map(move |number| {
            let first = number * self.piece;
            (self.before + number * self.distance, first..bytes.min(first.saturating_add(self.piece)))
        })
    }
}

pub(crate) struct Memory<'a, D: Device> {
    device: &'a D,
    blocks: Vec<u64>,
}

impl<'a, D: Device> Memory<'a, D> {
    pub(crate) fn new(device: &'a D) -> Self {
        Self { device, blocks: Vec::new() }
    }

    /// A block that nothing has written to.
    pub(crate) fn reserve(&mut self, bytes: usize) -> u64 {
        let address = self.device.alloc(bytes).expect("room on the device");
        self.blocks.push(address);
        address
    }

    pub(crate) fn put(&mut self, bytes: &[u8]) -> u64 {
        self.put_spread(bytes, Spread::NEAR)
    }

    pub(crate) fn put_spread(&mut self, bytes: &[u8], spread: Spread) -> u64 {
        let last = spread.pieces(bytes.len()).next_back();
        let address = self.reserve(last.map_or(0, |(at, part)| at + part.len()));
        self.write_spread(address, bytes, spread);
        address
    }

    /// Writes a block again that was put like that.
    pub(crate) fn write_spread(&mut self, address: u64, bytes: &[u8], spread: Spread) {
        for (at, part) in spread.pieces(bytes.len()) {
            // SAFETY: a block of this memory that lies so.
            unsafe { self.device.upload(address + at as u64, &bytes[part]) }.expect("an upload");
        }
    }

    /// A block of [`UNTOUCHED`] bytes.
    pub(crate) fn untouched(&mut self, bytes: usize) -> u64 {
        self.untouched_spread(bytes, Spread::NEAR)
    }

    pub(crate) fn untouched_spread(&mut self, bytes: usize, spread: Spread) -> u64 {
        self.put_spread(&vec![UNTOUCHED; bytes], spread)
    }

    /// The bytes of a block.
    pub(crate) fn get(&self, address: u64, bytes: usize) -> Result<Vec<u8>, String> {
        self.get_spread(address, bytes, Spread::NEAR)
    }

    pub(crate) fn get_spread(&self, address: u64, bytes: usize, spread: Spread) -> Result<Vec<u8>, String> {
        let mut found = vec![0; bytes];
        for (at, part) in spread.pieces(bytes) {
            // SAFETY: a block of this memory of at least that size that lies so.
            unsafe { self.device.download(&mut found[part], address + at as u64) }
                .map_err(|error| error.to_string())?;
        }
        Ok(found)
    }

    /// The numbers of a block.
    pub(crate) fn floats(&self, address: u64, count: usize) -> Result<Vec<f32>, String> {
        self.floats_spread(address, count, Spread::NEAR)
    }

    pub(crate) fn floats_spread(
        &self,
        address: u64,
        count: usize,
        spread: Spread,
    ) -> Result<Vec<f32>, String> {
        let bytes = self.get_spread(address, count * 4, spread)?;
        Ok(bytes
            .chunks_exact(4)
            .map(|bytes| f32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
            .collect())
    }

    pub(crate) fn expect(&self, what: &str, address: u64, expected: &[u8]) -> Result<(), String> {
        self.expect_spread(what, address, expected, Spread::NEAR)
    }

    pub(crate) fn expect_spread(
        &self,
        what: &str,
        address: u64,
        expected: &[u8],
        spread: Spread,
    ) -> Result<(), String> {
        let found = self.get_spread(address, expected.len(), spread)?;
        match found.iter().zip(expected).position(|(found, expected)| found != expected) {
            None => Ok(()),
            Some(at) => Err(format!("{what}: byte {at} is {:#04x}, not {:#04x}", found[at], expected[at])),
        }
    }
}

impl<D: Device> Drop for Memory<'_, D> {
    fn drop(&mut self) {
        for address in self.blocks.drain(..) {
            // SAFETY: from `alloc`, once; a device that failed fails again here, which tells nothing new.
            let _ = unsafe { self.device.free(address) };
        }
    }
}
