//! Device memory: separate allocations with space between them, a bit for each byte that was written,
//! and, during a launch, the last accesses to each word. Memory that nothing touches takes next to none of the
//! host's, so an allocation may be as large as those of a GPU.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering::Relaxed},
    },
};

use crate::{
    cell::{Cell, Conflict},
    clock::{Accessor, Clock},
};

/// The least distance between two allocations, so that running past one is not landing in the next.
const GAP: u64 = 4096;
/// Addresses of device memory begin here.
const FIRST: u64 = 0x10_0000_0000;
/// Bytes of an allocation that the host makes room for together, once one of them is touched.
const PAGE: u64 = 64 << 10;
/// Words whose last accesses are kept together.
const CELLS: usize = 256;

#[derive(Debug, Default)]
pub(crate) struct Memory {
    /// Ascending by address.
    allocations: Vec<Allocation>,
    next: u64,
    /// Addresses and sizes of memory that was given back, for messages.
    freed: Vec<(u64, u64)>,
}

/// One allocation. Several CTAs use it at once, so everything inside is atomic; two CTAs that use the
/// same word without order are a race, which is found and reported, not relied on.
#[derive(Debug)]
pub(crate) struct Allocation {
    address: u64,
    bytes: u64,
    /// In their order, each from the first write to it on.
    pages: Vec<OnceLock<Page>>,
    /// Held by whoever reads or writes more than a word at once and must not be torn.
    whole: Mutex<()>,
}

/// [`PAGE`] bytes of an allocation, or what is left of them at its end.
#[derive(Debug)]
struct Page {
    words: Box<[AtomicU32]>,
    /// A bit for each byte that something wrote.
    initialised: Box<[AtomicU32]>,
}

impl Memory {
    pub(crate) fn alloc(&mut self, bytes: u64) -> u64 {
        let address = self.next_address();
        self.insert(address, bytes);
        address
    }

    /// Where the next allocation will begin.
    pub(crate) fn next_address(&self) -> u64 {
        self.next.max(FIRST)
    }

    /// An allocation at an address that is not before the next one.
    pub(crate) fn insert(&mut self, address: u64, bytes: u64) {
        self.next = (address + bytes + GAP).next_multiple_of(256);
        let pages = (0..bytes.div_ceil(PAGE)).map(|_| OnceLock::new()).collect();
        self.allocations.push(Allocation { address, bytes, pages, whole: Mutex::new(()) });
    }

    pub(crate) fn free(&mut self, address: u64) -> Result<(), String> {
        match self.allocations.binary_search_by_key(&address, |allocation| allocation.address) {
            Ok(found) => {
                let allocation = self.allocations.remove(found);
                self.freed.push((address, allocation.bytes));
                Ok(())
            }
            Err(_) => Err(format!("{address:#x} is not the beginning of an allocation")),
        }
    }

    pub(crate) fn allocations(&self) -> &[Allocation] {
        &self.allocations
    }

    /// The allocation that holds all of these bytes, and where in it they begin.
    pub(crate) fn locate(&self, address: u64, bytes: u64) -> Result<(usize, u64), String> {
        let after = self.allocations.partition_point(|allocation| allocation.address <= address);
        if let Some(index) = after.checked_sub(1) {
            let allocation = &self.allocations[index];
            let offset = address - allocation.address;
            if offset + bytes <= allocation.bytes {
                return Ok((index, offset));
            }
        }
        Err(self.describe(address, bytes))
    }

    /// What an address outside every allocation lies near.
    fn describe(&self, address: u64, bytes: u64) -> String {
        let what = format!("{bytes} bytes at {address:#x}");
        if let Some((at, size)) =
            self.freed.iter().find(|(at, size)| (*at..at + (*size).max(1)).contains(&address))
        {
            return format!("{what} lie in {size} bytes at {at:#x} that were given back");
        }
        let after = self.allocations.partition_point(|allocation| allocation.address <= address);
        let near = [after.checked_sub(1), Some(after)].into_iter().flatten();
        let near = near.filter_map(|index| self.allocations.get(index)).min_by_key(|near| {
            if address < near.address {
                near.address - address
            } else {
                address - near.address - near.bytes.min(address - near.address)
            }
        });
        match near {
            Some(near) if address >= near.address => format!(
                "{what} begin at byte {} of the {} bytes allocated at {:#x}",
                address - near.address,
                near.bytes,
                near.address
            ),
            Some(near) => {
                format!(
                    "{what} begin {} bytes before the {} bytes allocated at {:#x}",
                    near.address - address,
                    near.bytes,
                    near.address
                )
            }
            None => format!("{what} lie outside every allocation, there being none"),
        }
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), String> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (index, offset) = self.locate(address, bytes.len() as u64)?;
        let allocation = &self.allocations[index];
        for (at, size) in pieces(offset, bytes.len() as u64) {
            let mut value = [0; 8];
            value[..size as usize].copy_from_slice(&bytes[(at - offset) as usize..][..size as usize]);
            allocation.store(at, size, u64::from_le_bytes(value));
        }
        Ok(())
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, String> {
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let (index, offset) = self.locate(address, bytes as u64)?;
        let allocation = &self.allocations[index];
        let mut read = Vec::with_capacity(bytes);
        for (at, size) in pieces(offset, bytes as u64) {
            if !allocation.is_initialised(at, size) {
                let unwritten = (at..at + u64::from(size)).find(|at| !allocation.is_initialised(*at, 1));
                let byte = unwritten.unwrap_or(at) - offset;
                return Err(format!("byte {byte} of {bytes} at {address:#x} was never written"));
            }
            read.extend_from_slice(&allocation.load(at, size).to_le_bytes()[..size as usize]);
        }
        Ok(read)
    }
}

/// A range as aligned pieces of 1 and 8 bytes.
fn pieces(from: u64, bytes: u64) -> impl Iterator<Item = (u64, u32)> {
    let end = from + bytes;
    let mut next = from;
    std::iter::from_fn(move || {
        let at = next;
        let size = if at.is_multiple_of(8) && at + 8 <= end { 8 } else { 1 };
        next += u64::from(size);
        (at < end).then_some((at, size))
    })
}

/// The page of a byte, and where in it the byte is.
fn place(offset: u64) -> (usize, usize) {
    ((offset / PAGE) as usize, (offset % PAGE) as usize)
}

impl Allocation {
    pub(crate) const fn address(&self) -> u64 {
        self.address
    }

    /// Words of a page.
    fn words(&self, page: usize) -> usize {
        (self.bytes - page as u64 * PAGE).min(PAGE).div_ceil(4) as usize
    }

    /// Up to 8 aligned bytes; zeros where nothing was written.
    pub(crate) fn load(&self, offset: u64, bytes: u32) -> u64 {
        let (page, at) = place(offset);
        self.pages[page].get().map_or(0, |page| page.load(at, bytes))
    }

    /// Up to 8 aligned bytes.
    pub(crate) fn store(&self, offset: u64, bytes: u32, value: u64) {
        let (page, at) = place(offset);
        self.pages[page].get_or_init(|| Page::new(self.words(page))).store(at, bytes, value);
    }

    pub(crate) fn is_initialised(&self, offset: u64, bytes: u32) -> bool {
        let (page, at) = place(offset);
        self.pages[page].get().is_some_and(|page| page.is_initialised(at, bytes))
    }

    /// Reads and writes that are one step for all others that ask for this too.
    pub(crate) fn lock(&self) -> MutexGuard<'_, ()> {
        self.whole.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Page {
    fn new(words: usize) -> Self {
        let zeros = |count| (0..count).map(|_| AtomicU32::new(0)).collect();
        Self { words: zeros(words), initialised: zeros(words.div_ceil(8)) }
    }

    fn load(&self, at: usize, bytes: u32) -> u64 {
        let word = at / 4;
        match bytes {
            8 => {
                let high = self.words[word + 1].load(Relaxed);
                u64::from(self.words[word].load(Relaxed)) | u64::from(high) << 32
            }
            4 => u64::from(self.words[word].load(Relaxed)),
            _ => {
                let shifted = self.words[word].load(Relaxed) >> (8 * (at % 4));
                u64::from(shifted & ((1 << (8 * bytes)) - 1))
            }
        }
    }

    fn store(&self, at: usize, bytes: u32, value: u64) {
        let word = at / 4;
        match bytes {
            8 => {
                self.words[word].store(value as u32, Relaxed);
                self.words[word + 1].store((value >> 32) as u32, Relaxed);
            }
            4 => self.words[word].store(value as u32, Relaxed),
            _ => {
                let shift = 8 * (at % 4);
                let mask = ((1_u32 << (8 * bytes)) - 1) << shift;
                self.words[word].fetch_and(!mask, Relaxed);
                self.words[word].fetch_or((value as u32) << shift & mask, Relaxed);
            }
        }
        let (word, mask) = bit_range(at, bytes);
        if self.initialised[word].load(Relaxed) & mask != mask {
            self.initialised[word].fetch_or(mask, Relaxed);
        }
    }

    fn is_initialised(&self, at: usize, bytes: u32) -> bool {
        let (word, mask) = bit_range(at, bytes);
        self.initialised[word].load(Relaxed) & mask == mask
    }
}

/// The word of bits and the bits in it for aligned bytes.
fn bit_range(at: usize, bytes: u32) -> (usize, u32) {
    (at / 32, ((1_u32 << bytes) - 1) << (at % 32))
}

/// The last accesses to neighbouring words, once there are some.
type Cells = Mutex<Option<Box<[Cell; CELLS]>>>;

/// The last accesses to device memory in a launch.
pub(crate) struct Shadow {
    /// Of each page of each allocation, once it is touched.
    pages: Vec<Vec<OnceLock<Box<[Cells]>>>>,
    /// What releases at an address have told, for those who acquire there.
    pub(crate) told: Mutex<HashMap<u64, Arc<Clock>>>,
}

impl Shadow {
    pub(crate) fn new(memory: &Memory) -> Self {
        let pages = |allocation: &Allocation| allocation.pages.iter().map(|_| OnceLock::new()).collect();
        Self { pages: memory.allocations.iter().map(pages).collect(), told: Mutex::default() }
    }

    fn page() -> Box<[Cells]> {
        (0..PAGE as usize / 4 / CELLS).map(|_| Cells::default()).collect()
    }

    /// Runs `check` on the cell of each word that an access touches, with the bytes it touches.
    pub(crate) fn visit(
        &self,
        allocation: usize,
        offset: u64,
        bytes: u32,
        mut check: impl FnMut(&mut Cell, u8) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let (page, at) = place(offset);
        let first = at / 4;
        let page = self.pages[allocation][page].get_or_init(Self::page);
        // Aligned accesses of at most 16 bytes never leave their cells.
        let mut cells = page[first / CELLS].lock().unwrap_or_else(PoisonError::into_inner);
        let cells = cells.get_or_insert_with(|| Box::new(std::array::from_fn(|_| Cell::default())));
        let first = first % CELLS;
        if bytes < 4 {
            return check(&mut cells[first], (((1 << bytes) - 1) << (offset % 4)) as u8);
        }
        cells[first..][..bytes as usize / 4].iter_mut().try_for_each(|cell| check(cell, 0xf))
    }

    pub(crate) fn read(
        &self,
        allocation: usize,
        offset: u64,
        bytes: u32,
        by: &Accessor<'_>,
    ) -> Result<(), Conflict> {
        self.visit(allocation, offset, bytes, |cell, mask| cell.read(by, mask))
    }

    pub(crate) fn write(
        &self,
        allocation: usize,
        offset: u64,
        bytes: u32,
        by: &Accessor<'_>,
    ) -> Result<(), Conflict> {
        self.visit(allocation, offset, bytes, |cell, mask| cell.write(by, mask))
    }
}

/// The state of a byte of shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Byte {
    Uninitialised,
    Written,
    /// The destination of a copy that nobody has waited for.
    InFlight,
    /// Part of an mbarrier, which only mbarrier instructions may touch.
    Barrier,
}

/// The shared memory of a CTA.
#[derive(Debug)]
pub(crate) struct Shared {
    bytes: Vec<u8>,
    pub(crate) states: Vec<Byte>,
    pub(crate) cells: Vec<Cell>,
}

impl Shared {
    pub(crate) fn new(bytes: u32) -> Self {
        let bytes = bytes as usize;
        Self {
            bytes: vec![0; bytes],
            states: vec![Byte::Uninitialised; bytes],
            cells: vec![Cell::default(); bytes.div_ceil(4)],
        }
    }

    pub(crate) fn len(&self) -> u32 {
        self.bytes.len() as u32
    }

    /// A range of up to 8 bytes.
    #[inline]
    pub(crate) fn load(&self, at: u32, bytes: u32) -> u64 {
        let bytes = self.bytes(at, bytes);
        match *bytes {
            [a] => a.into(),
            [a, b] => u16::from_le_bytes([a, b]).into(),
            [a, b, c, d] => u32::from_le_bytes([a, b, c, d]).into(),
            _ => {
                let mut value = [0; 8];
                value[..bytes.len()].copy_from_slice(bytes);
                u64::from_le_bytes(value)
            }
        }
    }

    pub(crate) fn bytes(&self, at: u32, bytes: u32) -> &[u8] {
        &self.bytes[at as usize..][..bytes as usize]
    }

    pub(crate) fn store(&mut self, at: u32, bytes: u32, value: u64) {
        self.bytes[at as usize..][..bytes as usize].copy_from_slice(&value.to_le_bytes()[..bytes as usize]);
        self.states[at as usize..][..bytes as usize].fill(Byte::Written);
    }

    /// The first byte of a range that is not what an ordinary read may meet.
    pub(crate) fn unreadable(&self, at: u32, bytes: u32) -> Option<(u32, Byte)> {
        let states = &self.states[at as usize..][..bytes as usize];
        let found = states.iter().position(|state| *state != Byte::Written)?;
        Some((at + found as u32, states[found]))
    }

    /// Runs `check` on the cell of each word that an access touches, with the bytes it touches.
    pub(crate) fn visit(
        &mut self,
        at: u32,
        bytes: u32,
        mut check: impl FnMut(&mut Cell, u8) -> Result<(), Conflict>,
    ) -> Result<(), Conflict> {
        let first = (at / 4) as usize;
        if bytes < 4 {
            return check(&mut self.cells[first], (((1 << bytes) - 1) << (at % 4)) as u8);
        }
        self.cells[first..][..bytes as usize / 4].iter_mut().try_for_each(|cell| check(cell, 0xf))
    }
}
