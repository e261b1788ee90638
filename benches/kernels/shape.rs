//! The sizes that are measured, and the same benches at sizes for an emulator.

use fastkv::{
    abi::{Cache, Pages, Rows},
    kernels::{Device, Error},
};

use crate::{memory::Memory, random::Random};

/// A model, and by how much its prompts are shortened.
pub(crate) struct Shape {
    pub(crate) query_heads: u32,
    pub(crate) kv_heads: u32,
    pub(crate) head_dim: u32,
    pub(crate) hidden: u32,
    pub(crate) mlp: u32,
    pub(crate) vocabulary: u32,
    divisor: u32,
}

/// Tokens of a page of a paged cache.
pub(crate) const PAGE: u32 = 16;

impl Shape {
    pub(crate) const LLAMA_3_1_8B: Self = Self {
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        hidden: 4096,
        mlp: 14_336,
        vocabulary: 128_256,
        divisor: 1,
    };

    /// Few heads, narrow rows, short prompts.
    pub(crate) const SMALL: Self = Self {
        query_heads: 4,
        kv_heads: 2,
        head_dim: 128,
        hidden: 512,
        mlp: 1792,
        vocabulary: 1000,
        divisor: 128,
    };

    /// The length that takes the place of this one.
    pub(crate) fn length(&self, measured: u32) -> u32 {
        (measured / self.divisor).max(1)
    }

    /// Query heads of a kv head.
    pub(crate) fn group(&self) -> u32 {
        self.query_heads / self.kv_heads
    }

    /// Elements of the queries of so many tokens.
    pub(crate) fn query_elements(&self, tokens: u32) -> usize {
        tokens as usize * (self.query_heads * self.head_dim) as usize
    }

    /// Elements of the keys, or of the values, of so many tokens.
    pub(crate) fn key_elements(&self, tokens: u32) -> usize {
        tokens as usize * (self.kv_heads * self.head_dim) as usize
    }

    /// Lists of so many entries, one after the other, all full.
    pub(crate) fn cache<D: Device>(
        &self,
        memory: &Memory<'_, D>,
        sequences: u32,
        entries: u32,
    ) -> Result<Cache, Error> {
        let lists = sequences * self.kv_heads;
        let elements = self.key_elements(sequences * entries);
        let dense = |base| Rows { base, token_stride: self.head_dim.into(), ..Rows::default() };
        Ok(Cache {
            k: dense(memory.normal(elements, 1)?),
            v: dense(memory.normal(elements, 2)?),
            lengths: memory.put(&vec![entries as i32; lists as usize])?,
            rows: i64::from(lists) * i64::from(entries),
            capacity: entries as i32,
            sequences: sequences as i32,
            heads: self.kv_heads as i32,
            ..Cache::default()
        })
    }

    /// The same in pages of `[slot, head, d]`, which lie in no order.
    pub(crate) fn paged_cache<D: Device>(
        &self,
        memory: &Memory<'_, D>,
        sequences: u32,
        entries: u32,
    ) -> Result<Cache, Error> {
        let table_pages = entries.div_ceil(PAGE);
        let pages = sequences * table_pages;
        let mut random = Random(3);
        let mut table: Vec<i32> = (0..pages as i32).collect();
        (1..table.len()).for_each(|last| table.swap(last, random.below(last + 1) as usize));
        let tensor = |seed| {
            let base = memory.normal(self.key_elements(pages * PAGE), seed)?;
            Ok::<_, Error>(Rows::token_major(base, PAGE, self.kv_heads, self.head_dim))
        };
        Ok(Cache {
            k: tensor(1)?,
            v: tensor(2)?,
            lengths: memory.put(&vec![entries as i32; sequences as usize])?,
            pages: Pages {
                table: memory.put(&table)?,
                table_pages: table_pages as i32,
                pages: pages as i32,
                page_size: PAGE as i32,
                reserved: 0,
            },
            capacity: entries as i32,
            sequences: sequences as i32,
            heads: self.kv_heads as i32,
            ..Cache::default()
        })
    }
}
