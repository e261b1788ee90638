//! Keys and values in pages of a pool.

use fastkv::{
    abi::{Pages, Rows},
    kernels::Device,
};

use super::memory::{Memory, Spread};

/// How keys lie in pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paging {
    /// Slots of a page.
    pub(crate) size: usize,
    /// Whether some pages of a sequence are nowhere.
    pub(crate) holes: bool,
}

impl Paging {
    /// Whether a page of a sequence is nowhere.
    fn is_hole(self, sequence: usize, page: usize) -> bool {
        self.holes && (page + sequence) % 3 == 1
    }

    /// Whether a key is nowhere, with its page.
    pub(crate) fn is_absent(self, sequence: usize, key: usize) -> bool {
        self.is_hole(sequence, key / self.size)
    }
}

/// A pool of pages, some of sequences, all in no order, some of nobody.
pub(crate) struct Pool<'a> {
    pub(crate) paging: Paging,
    pub(crate) heads: usize,
    pub(crate) head_dim: usize,
    /// Whether the slots of a head lie together, else the heads of a slot.
    pub(crate) head_major: bool,
    /// Keys of each sequence.
    pub(crate) counts: &'a [usize],
    /// Keys that a sequence has room for.
    pub(crate) room: usize,
    /// Whether pages lie far apart.
    pub(crate) far: bool,
}

impl Pool<'_> {
    fn table_pages(&self) -> usize {
        self.room.div_ceil(self.paging.size) + 2
    }

    fn pages(&self) -> usize {
        self.counts.len() * self.table_pages() + 3
    }

    fn page_of(&self, sequence: usize, page: usize) -> i32 {
        let pages = self.pages();
        if page * self.paging.size >= self.counts[sequence] || self.paging.is_hole(sequence, page) {
            [-1, i32::MIN, pages as i32, i32::MAX][(sequence + page) % 4]
        } else {
            // Neighbours lie apart.
            (pages - 1 - (sequence + page * self.counts.len())) as i32
        }
    }

    /// Puts the table.
    pub(crate) fn describe<D: Device>(&self, memory: &mut Memory<'_, D>) -> Pages {
        let of_sequence = |sequence| (0..self.table_pages()).map(move |page| self.page_of(sequence, page));
        let table: Vec<_> = (0..self.counts.len()).flat_map(of_sequence).collect();
        Pages {
            table: memory.put(bytemuck::cast_slice(&table)),
            table_pages: self.table_pages() as i32,
            pages: self.pages() as i32,
            page_size: self.paging.size as i32,
            reserved: 0,
        }
    }

    /// Puts a tensor of 16-bit elements, of which `row` gives those of a sequence, head and key, with `gap` between rows.
    /// NaN is where no key is.
    pub(crate) fn put<'a, D: Device>(
        &self,
        memory: &mut Memory<'_, D>,
        gap: usize,
        row: impl Fn([usize; 3]) -> &'a [u16],
    ) -> Rows {
        let (size, width) = (self.paging.size, self.head_dim + gap);
        let [head_stride, token_stride] =
            if self.head_major { [size * width, width] } else { [width, self.heads * width] };
        let page_stride = self.heads * size * width + 16;
        let mut pool = vec![0x7FFF; self.pages() * page_stride];
        for (sequence, count) in self.counts.iter().enumerate() {
            for key in (0..*count).filter(|key| !self.paging.is_absent(sequence, *key)) {
                let page = self.page_of(sequence, key / size) as usize;
                for head in 0..self.heads {
                    let to = page * page_stride + head * head_stride + key % size * token_stride;
                    pool[to..to + self.head_dim].copy_from_slice(row([sequence, head, key]));
                }
            }
        }
        let spread = Spread::apart_if(self.far, 2 * page_stride, 2 * pool.len());
        Rows {
            base: memory.put_spread(bytemuck::cast_slice(&pool), spread),
            sequence_stride: spread.stride(2).unwrap_or(page_stride as i64),
            head_stride: head_stride as i64,
            token_stride: token_stride as i64,
        }
    }
}
