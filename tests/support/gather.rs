//! Gathers: descriptions of work, plain loops that say what should come out, and a run on a device.

use fastkv::{
    abi::{Cache, Kept, Pages, Rows, Slots},
    kernels::{DType, Device, Error, Launch, gather},
};

use super::{
    Check, all,
    memory::{Memory, UNTOUCHED},
    random::Random,
    recorder::{Recorded, Recorder},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    TokenMajor,
    HeadMajor,
    /// Token-major with sequences of different lengths, one after the other.
    Packed,
}

/// One gather. `sequences`, `heads` and so on are as in `fastkv_kept`.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) layout: Layout,
    pub(crate) dtype: DType,
    pub(crate) heads: usize,
    pub(crate) width: usize,
    /// Tokens of each sequence; all the same unless packed.
    pub(crate) tokens: Vec<usize>,
    pub(crate) capacity: usize,
    /// `capacity` indices for each (sequence, head), or for each sequence where heads share.
    pub(crate) indices: Vec<i32>,
    pub(crate) shared: bool,
    pub(crate) lengths: Option<Vec<i32>>,
    pub(crate) starts: Option<Vec<i64>>,
    pub(crate) out_rows: usize,
    /// Positions of the tokens, sequence after sequence.
    pub(crate) positions: Option<Vec<i32>>,
    /// Where tokens lie that are paged, `[pages, page_size, heads, width]`.
    pub(crate) table: Option<Table>,
    /// Where rows of K and V go that are paged, `[pages, page_size, heads, width]`, or without heads.
    pub(crate) slots: Option<SlotMap>,
    pub(crate) seed: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct Table {
    page_size: usize,
    pages: usize,
    /// As many for each sequence.
    entries: Vec<i32>,
}

#[derive(Clone, Debug)]
pub(crate) struct SlotMap {
    page_size: usize,
    pages: usize,
    /// Whether a page belongs to one head.
    of_one_head: bool,
    /// One for each row of the destination.
    slots: Vec<i64>,
}

impl Table {
    /// Pages for `tokens` of each sequence in no order, some missing.
    fn random(random: &mut Random, sequences: usize, tokens: usize) -> Self {
        let page_size = random.of(&[1, 3, 16, 64]);
        let needed = sequences * tokens.div_ceil(page_size).max(1);
        let pages = needed + random.below(3);
        let mut free: Vec<_> = (0..pages as i32).collect();
        let entries = (0..needed).map(|_| match random.below(16) {
            0 => random.of(&[-1, i32::MIN, pages as i32, i32::MAX]),
            _ => free.swap_remove(random.below(free.len())),
        });
        Self { page_size, pages, entries: entries.collect() }
    }
}

impl SlotMap {
    /// A slot of its own for each row, some missing.
    fn random(random: &mut Random, rows: usize) -> Self {
        let page_size = random.of(&[1, 3, 16, 64]);
        let pages = rows.div_ceil(page_size) + 1;
        let mut free: Vec<_> = (0..(pages * page_size) as i64).collect();
        let slots = (0..rows).map(|_| match random.below(16) {
            0 => random.of(&[-1, i64::MIN, (pages * page_size) as i64, i64::MAX]),
            _ => free.swap_remove(random.below(free.len())),
        });
        let slots = slots.collect();
        Self { page_size, pages, of_one_head: random.below(2) == 0, slots }
    }

    /// Heads that share a slot.
    fn heads(&self, case: &Case) -> usize {
        if self.of_one_head { 1 } else { case.heads }
    }
}

impl Case {
    /// Ascending lists of `kept` of `tokens` for each of `sequences` x `heads`, stored without gaps.
    pub(crate) fn plain(
        layout: Layout,
        dtype: DType,
        [sequences, heads, tokens, kept, width]: [usize; 5],
    ) -> Self {
        let list = (0..kept).map(|i| (i * tokens / kept) as i32);
        Self {
            layout,
            dtype,
            heads,
            width,
            tokens: vec![tokens; sequences],
            capacity: kept,
            indices: (0..sequences * heads).flat_map(|_| list.clone()).collect(),
            shared: false,
            lengths: None,
            starts: None,
            out_rows: sequences * heads * kept,
            positions: None,
            table: None,
            slots: None,
            seed: 1,
        }
    }

    /// The same with K and V paged, before or after the move or both.
    fn paged(mut self) -> Self {
        let mut random = Random(self.seed ^ 5);
        let which = random.below(3);
        if which != 1 && self.layout != Layout::Packed && !self.tokens.is_empty() {
            self.table = Some(Table::random(&mut random, self.tokens.len(), self.tokens[0]));
        }
        if which != 0 {
            self.slots = Some(SlotMap::random(&mut random, self.out_rows));
        }
        self
    }

    /// Everything that may vary, drawn from `seed`; about one index in eight is -1 or out of range.
    pub(crate) fn random(seed: u64, heads: usize) -> Self {
        let mut random = Random(seed);
        let layout = [Layout::TokenMajor, Layout::HeadMajor, Layout::Packed][random.below(3)];
        let dtype = [DType::F16, DType::BF16, DType::F32][random.below(3)];
        let width = [8, 16, 64, 80, 96, 128, 256, 576][random.below(8)];
        let sequences = 1 + random.below(4);
        let uniform = random.below(300);
        let tokens: Vec<_> = (0..sequences)
            .map(|_| if layout == Layout::Packed { random.below(300) } else { uniform })
            .collect();
        let capacity = random.below(200);
        let shared = random.below(4) == 0;
        let lists = if shared { sequences } else { sequences * heads };
        let indices = (0..lists * capacity)
            .map(|i| {
                let tokens = tokens[i / (capacity * if shared { 1 } else { heads })];
                match random.below(16) {
                    0 => -1,
                    1 => tokens as i32 + random.below(3) as i32,
                    _ => random.below(tokens.max(1)) as i32,
                }
            })
            .collect();
        let lengths: Option<Vec<i32>> = (random.below(3) > 0)
            .then(|| (0..sequences * heads).map(|_| random.below(capacity + 4) as i32 - 2).collect());
        let mut out_rows = 0;
        let starts = (random.below(3) > 0).then(|| {
            (0..sequences * heads)
                .map(|_| {
                    let start = out_rows + random.below(3);
                    out_rows = start + capacity;
                    start as i64
                })
                .collect()
        });
        if starts.is_none() {
            out_rows = sequences * heads * capacity;
        } else if random.below(4) == 0 {
            // A destination that is too small loses rows, and nothing else.
            out_rows -= random.below(out_rows + 1);
        }
        let total = tokens.iter().sum::<usize>();
        let positions =
            (random.below(2) == 0).then(|| (0..total).map(|_| random.below(1 << 20) as i32).collect());
        Self {
            layout,
            dtype,
            heads,
            width,
            tokens,
            capacity,
            indices,
            shared,
            lengths,
            starts,
            out_rows,
            positions,
            table: None,
            slots: None,
            seed,
        }
    }

    fn elements(&self) -> usize {
        let tokens = self.tokens.iter().sum::<usize>();
        self.table.as_ref().map_or(tokens, |table| table.pages * table.page_size) * self.heads * self.width
    }

    /// Rows of K that the destination has for each head, or for all together where it is dense.
    fn places(&self) -> usize {
        self.slots.as_ref().map_or(self.out_rows, |map| map.pages * map.page_size * map.heads(self))
    }

    /// Place of a destination row.
    fn place(&self, head: usize, row: usize) -> Option<usize> {
        let Some(map) = &self.slots else { return Some(row) };
        let slot = usize::try_from(map.slots[row]).ok().filter(|slot| *slot < map.pages * map.page_size)?;
        Some(if map.of_one_head { slot } else { slot * self.heads + head })
    }

    /// Whether a token lies anywhere.
    fn exists(&self, sequence: usize, token: usize) -> bool {
        let Some(table) = &self.table else { return true };
        let page =
            table.entries[sequence * (table.entries.len() / self.tokens.len()) + token / table.page_size];
        (0..table.pages as i32).contains(&page)
    }

    /// First element of the row of a token.
    fn element(&self, sequence: usize, head: usize, token: usize) -> usize {
        if let Some(table) = &self.table {
            let of_sequence = table.entries.len() / self.tokens.len();
            let page = table.entries[sequence * of_sequence + token / table.page_size] as usize;
            let slot = page * table.page_size + token % table.page_size;
            return (slot * self.heads + head) * self.width;
        }
        let before: usize = self.tokens[..sequence].iter().sum();
        match self.layout {
            Layout::HeadMajor => (before * self.heads + head * self.tokens[sequence] + token) * self.width,
            Layout::TokenMajor | Layout::Packed => ((before + token) * self.heads + head) * self.width,
        }
    }

    /// Every (sequence, head, token, place in the destination) that is to be moved.
    fn moves(&self) -> Vec<(usize, usize, usize, usize)> {
        let mut moves = Vec::new();
        for sequence in 0..self.tokens.len() {
            for head in 0..self.heads {
                let list = sequence * self.heads + head;
                let length = self.lengths.as_ref().map_or(self.capacity as i32, |lengths| lengths[list]);
                let start = self.starts.as_ref().map_or((list * self.capacity) as i64, |starts| starts[list]);
                for i in 0..self.capacity.min(length.max(0) as usize) {
                    let index = self.indices[if self.shared { sequence } else { list } * self.capacity + i];
                    let row = start.saturating_add(i as i64);
                    let token_exists = index >= 0 && (index as usize) < self.tokens[sequence];
                    if !token_exists || start < 0 || row >= self.out_rows as i64 {
                        continue;
                    }
                    let place =
                        self.place(head, row as usize).filter(|_| self.exists(sequence, index as usize));
                    if let Some(place) = place {
                        moves.push((sequence, head, index as usize, place));
                    }
                }
            }
        }
        moves
    }

    /// What the destination should hold, from bytes of [`UNTOUCHED`] and this source.
    fn moved(&self, source: &[u8]) -> Vec<u8> {
        let element = self.dtype.bytes() as usize;
        let row_bytes = self.width * element;
        let mut out = vec![UNTOUCHED; self.places() * row_bytes];
        for (sequence, head, token, row) in self.moves() {
            let from = self.element(sequence, head, token) * element;
            out[row * row_bytes..][..row_bytes].copy_from_slice(&source[from..][..row_bytes]);
        }
        out
    }

    fn moved_positions(&self) -> Vec<u8> {
        let mut out = vec![i32::from_ne_bytes([UNTOUCHED; 4]); self.places()];
        for (sequence, _, token, row) in self.moves() {
            let before: usize = self.tokens[..sequence].iter().sum();
            out[row] = self.positions.as_ref().map_or(token as i32, |positions| positions[before + token]);
        }
        bytemuck::cast_slice(&out).to_vec()
    }

    fn rows(&self, base: u64) -> Rows {
        let (heads, width) = (self.heads as u32, self.width as u32);
        let tokens = self.tokens.first().map_or(0, |tokens| *tokens as u32);
        if let Some(table) = &self.table {
            return Rows::token_major(base, table.page_size as u32, heads, width);
        }
        match self.layout {
            Layout::TokenMajor => Rows::token_major(base, tokens, heads, width),
            Layout::HeadMajor => Rows::head_major(base, heads, tokens, width),
            Layout::Packed => Rows::packed(base, heads, width),
        }
    }

    /// Uploads the lists and describes them.
    fn kept<D: Device>(&self, memory: &mut Memory<'_, D>) -> Kept {
        let packed = self.layout == Layout::Packed;
        let per_sequence = self.capacity * if self.shared { 1 } else { self.heads };
        let cu_seqlens: Vec<i32> =
            (0..=self.tokens.len()).map(|n| self.tokens[..n].iter().sum::<usize>() as i32).collect();
        let tokens =
            if packed { self.tokens.iter().sum() } else { self.tokens.first().copied().unwrap_or(0) };
        Kept {
            indices: memory.put(bytemuck::cast_slice(&self.indices)),
            index_sequence_stride: per_sequence as i64,
            index_head_stride: if self.shared { 0 } else { self.capacity as i64 },
            lengths: self.lengths.as_ref().map_or(0, |lengths| memory.put(bytemuck::cast_slice(lengths))),
            starts: self.starts.as_ref().map_or(0, |starts| memory.put(bytemuck::cast_slice(starts))),
            cu_seqlens: if packed { memory.put(bytemuck::cast_slice(&cu_seqlens)) } else { 0 },
            positions: self.positions.as_ref().map_or(0, |p| memory.put(bytemuck::cast_slice(p))),
            positions_out: memory.untouched(self.places() * 4),
            out_rows: self.out_rows as i64,
            sequences: self.tokens.len() as i32,
            heads: self.heads as i32,
            tokens: tokens as i32,
            capacity: self.capacity as i32,
        }
    }

    fn pages<D: Device>(&self, memory: &mut Memory<'_, D>) -> Pages {
        self.table.as_ref().map_or(Pages::default(), |table| Pages {
            table: memory.put(bytemuck::cast_slice(&table.entries)),
            table_pages: (table.entries.len() / self.tokens.len()) as i32,
            pages: table.pages as i32,
            page_size: table.page_size as i32,
            reserved: 0,
        })
    }

    fn slots<D: Device>(&self, memory: &mut Memory<'_, D>) -> Slots {
        self.slots.as_ref().map_or(Slots::default(), |map| {
            let row = (map.heads(self) * self.width) as i64;
            Slots {
                slots: memory.put(bytemuck::cast_slice(&map.slots)),
                page_stride: map.page_size as i64 * row,
                head_stride: if map.of_one_head { 0 } else { self.width as i64 },
                slot_stride: row,
                pages: map.pages as i32,
                page_size: map.page_size as i32,
            }
        })
    }

    fn source(&self, salt: u64) -> Vec<u8> {
        let mut random = Random(self.seed ^ salt);
        (0..self.elements() * self.dtype.bytes() as usize).map(|_| random.next() as u8).collect()
    }
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("gather_indices", check_indices),
        Check::portable("gather_kv_edges", |device, _| all(edges(), |case| check_kv(device, case))),
        Check::portable("gather_kv_walks", |device, _| walks(device)),
        Check::portable("gather_hostile", |device, _| hostile(device)),
        Check::portable("gather_kv_random", |device, seed| {
            all((0..50).map(|n| Case::random(seed * 50 + n, 1 + n as usize % 9)), |case| {
                check_kv(device, case)
            })
        }),
        Check::portable("gather_kv_paged", |device, seed| {
            all(shared_slots(), |case| check_kv(device, case))?;
            all((0..40).map(|n| Case::random(seed * 40 + n, 1 + n as usize % 5).paged()), |case| {
                check_kv(device, case)
            })
        }),
        Check::portable("gather_kv_within_a_pool", |device, _| within_a_pool(device)),
        Check::portable("compact_edges", |device, _| {
            all(compact_edges(), |case| check_compact(device, case))
        }),
        Check::portable("compact_random", |device, seed| {
            all((0..40).map(|n| Compaction::random(seed * 40 + n)), |case| check_compact(device, case))
        }),
        Check::portable("gather_rows_edges", |device, _| {
            let cases = edges().into_iter().filter(|case| case.heads == 1);
            all(cases, |case| check_rows(device, case))
        }),
        Check::portable("gather_rows_random", |device, seed| {
            all((0..50).map(|n| Case::random(seed * 50 + n, 1)), |case| check_rows(device, case))
        }),
    ]
}

/// Lists and rows of several lengths, about one row in eight outside the list.
fn check_indices<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    for (length, count) in [(0, 0), (0, 5), (1, 1), (7, 255), (300, 256), (300, 257), (40, 1000)] {
        let list: Vec<i32> = (0..length).map(|_| random.next() as i32).collect();
        let rows: Vec<i32> = (0..count)
            .map(|_| match random.below(16) {
                0 => -1 - random.below(1 << 30) as i32,
                1 => (length + random.below(3)) as i32,
                _ => random.below(length.max(1)) as i32,
            })
            .collect();
        let mut memory = Memory::new(device);
        let work = gather::GatherIndices {
            list: memory.put(bytemuck::cast_slice(&list)),
            rows: memory.put(bytemuck::cast_slice(&rows)),
            out: memory.untouched(count * 4),
            length: length as u32,
            count: count as u32,
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { gather::gather_indices(device, &work) }.map_err(|error| error.to_string())?;
        let number = |row: &i32| usize::try_from(*row).ok().and_then(|row| list.get(row)).copied();
        let expected: Vec<i32> = rows.iter().map(|row| number(row).unwrap_or(-1)).collect();
        memory.expect("out", work.out, bytemuck::cast_slice(&expected))?;
    }
    Ok(())
}

/// Runs `gather_kv` and compares every byte of the destinations.
pub(crate) fn check_kv<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    // SAFETY: `check_kv_by` describes memory that is there.
    check_kv_by(device, case, |work| unsafe { gather::gather_kv(device, work) })
}

/// The same where a grid is too low for the lists, as a very long list makes it.
fn walks<D: Device>(device: &D) -> Result<(), String> {
    let case = Case::plain(Layout::TokenMajor, DType::BF16, [2, 2, 300, 280, 64]);
    check_kv_by(device, &case, |work| {
        let recorder = Recorder::default();
        // SAFETY: the recorder touches no memory.
        unsafe { gather::gather_kv(&recorder, work) }?;
        let Recorded { kernel, grid, block, params } = recorder.last();
        assert!(grid[1] > 2, "{grid:?}");
        // SAFETY: fewer blocks do the same.
        unsafe {
            device.launch(&Launch {
                kernel,
                grid: [grid[0], 2, grid[2]],
                cluster: [1; 3],
                block,
                shared_bytes: 0,
                params: &params,
            })
        }
    })
}

/// From pages to other pages of the same tensors.
fn within_a_pool<D: Device>(device: &D) -> Result<(), String> {
    const HEADS: usize = 2;
    const WIDTH: usize = 64;
    const PAGES: usize = 12;
    const PAGE_SIZE: usize = 4;
    const KEPT: usize = 8;
    let table: [i32; 5] = [7, 2, 9, 0, 4];
    let pages_out = [3, 5];
    let indices: [[i32; KEPT]; HEADS] = [[0, 1, 4, 9, 10, 17, 18, 19], [2, 3, 5, 6, 7, 11, 12, 16]];
    let slots: Vec<i64> = pages_out
        .iter()
        .flat_map(|page| (0..PAGE_SIZE).map(move |i| (page * PAGE_SIZE + i) as i64))
        .collect();
    let mut memory = Memory::new(device);
    let mut random = Random(4);
    let pools = [0, 1].map(|_| -> Vec<u16> {
        (0..PAGES * PAGE_SIZE * HEADS * WIDTH).map(|_| random.next() as u16).collect()
    });
    let [k, v] = pools.each_ref().map(|pool| memory.put(bytemuck::cast_slice(pool)));
    let row = (HEADS * WIDTH) as i64;
    let work = gather::GatherKv {
        kept: Kept {
            indices: memory.put(bytemuck::cast_slice(&indices)),
            index_head_stride: KEPT as i64,
            // Both heads at the same slots.
            starts: memory.put(&[0; 8 * HEADS]),
            out_rows: KEPT as i64,
            sequences: 1,
            heads: HEADS as i32,
            tokens: (table.len() * PAGE_SIZE) as i32,
            capacity: KEPT as i32,
            ..Kept::default()
        },
        k: Rows::token_major(k, PAGE_SIZE as u32, HEADS as u32, WIDTH as u32),
        v: Rows::token_major(v, PAGE_SIZE as u32, HEADS as u32, WIDTH as u32),
        pages: Pages {
            table: memory.put(bytemuck::cast_slice(&table)),
            table_pages: table.len() as i32,
            pages: PAGES as i32,
            page_size: PAGE_SIZE as i32,
            reserved: 0,
        },
        slots: Slots {
            slots: memory.put(bytemuck::cast_slice(&slots)),
            page_stride: PAGE_SIZE as i64 * row,
            head_stride: WIDTH as i64,
            slot_stride: row,
            pages: PAGES as i32,
            page_size: PAGE_SIZE as i32,
        },
        k_out: k,
        v_out: v,
        head_dim: WIDTH as u32,
        dtype: DType::BF16,
    };
    // SAFETY: blocks of `memory`; the pages of the table and those written are apart.
    unsafe { gather::gather_kv(device, &work) }.map_err(|error| error.to_string())?;
    for (name, address, pool) in [("k", k, &pools[0]), ("v", v, &pools[1])] {
        let mut expected = pool.clone();
        for (head, indices) in indices.iter().enumerate() {
            for (index, slot) in indices.iter().zip(&slots) {
                let from =
                    table[*index as usize / PAGE_SIZE] as usize * PAGE_SIZE + *index as usize % PAGE_SIZE;
                let [from, to] = [from, *slot as usize].map(|slot| (slot * HEADS + head) * WIDTH);
                expected[to..to + WIDTH].copy_from_slice(&pool[from..from + WIDTH]);
            }
        }
        memory.expect(name, address, bytemuck::cast_slice(&expected))?;
    }
    Ok(())
}

/// Starts of sequences that make no sense lead nowhere outside the tensors.
fn hostile<D: Device>(device: &D) -> Result<(), String> {
    for starts in [[-5, 10, 40], [10, 5, 2], [15, 25, i32::MAX], [i32::MIN, i32::MIN, i32::MAX]] {
        let mut memory = Memory::new(device);
        let indices: Vec<i32> = (0..40).map(|index| index % 20).collect();
        let kept = Kept {
            indices: memory.put(bytemuck::cast_slice(&indices)),
            index_sequence_stride: 20,
            cu_seqlens: memory.put(bytemuck::cast_slice(&starts)),
            positions: memory.put(&[0; 4 * 20]),
            positions_out: memory.untouched(4 * 40),
            out_rows: 40,
            sequences: 2,
            heads: 1,
            tokens: 20,
            capacity: 20,
            ..Kept::default()
        };
        let work = gather::GatherRows {
            kept,
            rows: Rows::packed(memory.put(&[0; 20 * 16]), 1, 8),
            out: memory.untouched(40 * 16),
            width: 8,
            dtype: DType::BF16,
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { gather::gather_rows(device, &work) }.map_err(|error| format!("{starts:?}: {error}"))?;
    }
    Ok(())
}

/// Runs `gather_kv` by a launch of it.
fn check_kv_by<D: Device>(
    device: &D,
    case: &Case,
    launch: impl Fn(&gather::GatherKv) -> Result<(), Error>,
) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let (k, v) = (case.source(1), case.source(2));
    let out_bytes = case.places() * case.width * case.dtype.bytes() as usize;
    let kept = case.kept(&mut memory);
    let work = gather::GatherKv {
        kept,
        k: case.rows(memory.put(&k)),
        v: case.rows(memory.put(&v)),
        pages: case.pages(&mut memory),
        slots: case.slots(&mut memory),
        k_out: memory.untouched(out_bytes),
        v_out: memory.untouched(out_bytes),
        head_dim: case.width as u32,
        dtype: case.dtype,
    };
    launch(&work).map_err(|error| error.to_string())?;
    memory.expect("k_out", work.k_out, &case.moved(&k))?;
    memory.expect("v_out", work.v_out, &case.moved(&v))?;
    memory.expect("positions_out", kept.positions_out, &case.moved_positions())
}

/// Runs `gather_rows` on a case of one head and compares every byte of the destination.
pub(crate) fn check_rows<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let source = case.source(3);
    let kept = case.kept(&mut memory);
    let work = gather::GatherRows {
        kept,
        rows: case.rows(memory.put(&source)),
        out: memory.untouched(case.out_rows * case.width * case.dtype.bytes() as usize),
        width: case.width as u32,
        dtype: case.dtype,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { gather::gather_rows(device, &work) }.map_err(|error| error.to_string())?;
    memory.expect("out", work.out, &case.moved(&source))?;
    memory.expect("positions_out", kept.positions_out, &case.moved_positions())
}

/// Sizes at the edges: nothing kept, one, all; one token; more rows than a tile; skipped rows alone.
fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    for layout in [Layout::TokenMajor, Layout::HeadMajor, Layout::Packed] {
        for dtype in [DType::F16, DType::F32] {
            for kept in [0, 1, 31, 32, 33, 64, 65, 100] {
                cases.push(Case::plain(layout, dtype, [2, 3, 100, kept, 128]));
            }
            cases.push(Case::plain(layout, dtype, [1, 1, 1, 1, 64]));
            cases.push(Case::plain(layout, dtype, [1, 2, 5, 5, 1024]));
            cases.push(Case {
                indices: vec![-1; 2 * 3 * 40],
                ..Case::plain(layout, dtype, [2, 3, 50, 40, 128])
            });
            cases.push(Case {
                starts: Some(vec![-5, i64::MIN, i64::MAX, 70]),
                ..Case::plain(layout, dtype, [2, 2, 30, 20, 80])
            });
            cases.push(Case {
                lengths: Some(vec![i32::MIN, -1, 0, i32::MAX]),
                ..Case::plain(layout, dtype, [2, 2, 30, 20, 80])
            });
        }
    }
    cases
}

/// Slots that all heads of a sequence share, as engines map them.
fn shared_slots() -> Vec<Case> {
    let slots = |slots| Some(SlotMap { page_size: 16, pages: 6, of_one_head: false, slots });
    let plain = Case::plain(Layout::TokenMajor, DType::BF16, [2, 3, 100, 30, 64]);
    let starts = Some(vec![0, 0, 0, 30, 30, 30]);
    vec![
        Case { starts: starts.clone(), out_rows: 60, slots: slots((0..60).rev().collect()), ..plain.clone() },
        Case { starts, out_rows: 60, slots: slots(vec![-1; 60]), ..plain },
    ]
}

/// A cache of lists and what is to stay of it.
#[derive(Clone, Debug)]
struct Compaction {
    dtype: DType,
    width: usize,
    heads: usize,
    /// Room of every list; lists stand that far apart.
    capacity: usize,
    /// Of each list, or of each sequence where the cache is paged.
    lengths: Vec<i32>,
    table: Option<Table>,
    /// `index_capacity` for each list, or for each sequence where heads share.
    indices: Vec<i32>,
    index_capacity: usize,
    shared: bool,
    kept: Option<Vec<i32>>,
    seed: u64,
}

impl Compaction {
    /// A list of 16-bit rows, from its length and the indices that stay.
    fn list(length: i32, indices: Vec<i32>) -> Self {
        Self {
            dtype: DType::BF16,
            width: 64,
            heads: 1,
            capacity: 300,
            lengths: vec![length],
            table: None,
            index_capacity: indices.len(),
            indices,
            shared: false,
            kept: None,
            seed: 9,
        }
    }

    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let (sequences, heads) = (1 + random.below(3), 1 + random.below(3));
        let capacity = 1 + random.below(400);
        let table = (random.below(3) == 0).then(|| Table::random(&mut random, sequences, capacity));
        let lists = if table.is_some() { sequences } else { sequences * heads };
        let lengths = (0..lists).map(|_| random.below(capacity + 2) as i32 - 1).collect();
        let index_capacity = random.below(capacity + 10);
        let shared = random.below(3) == 0;
        let dense = 1 + random.below(4);
        let mut indices = Vec::new();
        for _ in 0..if shared { sequences } else { sequences * heads } {
            let mut index = -1;
            for _ in 0..index_capacity {
                index += 1 + random.below(dense) as i32;
                // Now and then a list breaks its order.
                indices.push(if random.below(200) == 0 { random.below(capacity) as i32 - 1 } else { index });
            }
        }
        let kept = (random.below(2) == 0)
            .then(|| (0..sequences * heads).map(|_| random.below(index_capacity + 4) as i32 - 2).collect());
        Self {
            dtype: random.of(&[DType::F16, DType::BF16, DType::F32]),
            width: random.of(&[8, 64, 80, 128, 256, 576]),
            heads,
            capacity,
            lengths,
            table,
            indices,
            index_capacity,
            shared,
            kept,
            seed,
        }
    }

    fn sequences(&self) -> usize {
        self.lengths.len() / if self.table.is_some() { 1 } else { self.heads }
    }

    /// Rows of K.
    fn rows(&self) -> usize {
        let lists = self.sequences() * self.heads;
        self.table.as_ref().map_or(lists * self.capacity, |table| table.pages * table.page_size * self.heads)
    }

    fn row(&self, sequence: usize, head: usize, entry: usize) -> Option<usize> {
        let Some(table) = &self.table else {
            return Some((sequence * self.heads + head) * self.capacity + entry);
        };
        let of_sequence = table.entries.len() / self.sequences();
        let page = table.entries[sequence * of_sequence + entry / table.page_size];
        let page = usize::try_from(page).ok().filter(|page| *page < table.pages)?;
        Some((page * table.page_size + entry % table.page_size) * self.heads + head)
    }

    /// The rows that move, from one to the other, and how many entries each list keeps.
    fn moves(&self) -> (Vec<(usize, usize)>, Vec<i32>) {
        let (mut moves, mut lengths) = (Vec::new(), Vec::new());
        for sequence in 0..self.sequences() {
            for head in 0..self.heads {
                let list = sequence * self.heads + head;
                let length = self.lengths[if self.table.is_some() { sequence } else { list }];
                let length = length.min(self.capacity as i32);
                let indices = if self.shared { sequence } else { list } * self.index_capacity;
                let kept = self.kept.as_ref().map_or(self.index_capacity as i32, |kept| kept[list]);
                let (mut before, mut count) = (-1, 0);
                while count < kept.min(self.index_capacity as i32) {
                    let index = self.indices[indices + count as usize];
                    if index <= before || index >= length {
                        break;
                    }
                    let rows = [index, count].map(|entry| self.row(sequence, head, entry as usize));
                    if let [Some(from), Some(to)] = rows {
                        moves.push((from, to));
                    }
                    (before, count) = (index, count + 1);
                }
                lengths.push(if length < 0 { length } else { count });
            }
        }
        (moves, lengths)
    }
}

/// Lists that keep nothing, one, all; tiles of 128 rows and wider ones; order that breaks.
fn compact_edges() -> Vec<Compaction> {
    let every = |step: i32, count: i32| (0..count).map(|i| i * step).collect::<Vec<_>>();
    let mut cases = vec![
        Compaction::list(300, every(1, 300)),
        Compaction::list(300, every(2, 150)),
        Compaction::list(300, vec![299]),
        Compaction::list(300, (1..300).collect()),
        Compaction::list(300, (0..299).map(|i| if i < 256 { i } else { i + 1 }).collect()),
        Compaction::list(200, every(1, 300)),
        Compaction::list(0, every(1, 5)),
        Compaction::list(-3, every(1, 5)),
        Compaction::list(i32::MAX, every(1, 300)),
        Compaction::list(300, vec![5, 6, 6, 7]),
        Compaction::list(300, vec![5, 9, 8, 100]),
        Compaction::list(300, vec![-1, 1, 2]),
        Compaction::list(300, vec![3, 300, 301]),
        Compaction::list(300, vec![i32::MIN, i32::MAX]),
    ];
    for kept in [i32::MIN, -1, 0, 3, i32::MAX] {
        cases.push(Compaction { kept: Some(vec![kept]), ..Compaction::list(300, every(3, 40)) });
    }
    cases.push(Compaction { width: 1024, ..Compaction::list(300, every(2, 150)) });
    cases
}

/// Compacts a cache and compares every byte of it.
fn check_compact<D: Device>(device: &D, case: &Compaction) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let row_bytes = case.width * case.dtype.bytes() as usize;
    let mut random = Random(case.seed ^ 11);
    let mut bytes = |count: usize| (0..count).map(|_| random.next() as u8).collect::<Vec<_>>();
    let mut tensors =
        [bytes(case.rows() * row_bytes), bytes(case.rows() * row_bytes), bytes(case.rows() * 4)];
    let [k, v, positions] = [0, 1, 2].map(|which| memory.put(&tensors[which]));
    let width = case.width as i64;
    let row = case.heads as i64 * width;
    let page_size = case.table.as_ref().map_or(0, |table| table.page_size);
    let rows = |base| match case.table {
        None => Rows { base, token_stride: width, ..Rows::default() },
        Some(_) => {
            Rows { base, sequence_stride: page_size as i64 * row, head_stride: width, token_stride: row }
        }
    };
    let pages = case.table.as_ref().map_or(Pages::default(), |table| Pages {
        table: memory.put(bytemuck::cast_slice(&table.entries)),
        table_pages: (table.entries.len() / case.sequences()) as i32,
        pages: table.pages as i32,
        page_size: table.page_size as i32,
        reserved: 0,
    });
    let per_sequence = case.index_capacity * if case.shared { 1 } else { case.heads };
    let lists = case.sequences() * case.heads;
    let work = gather::Compact {
        cache: Cache {
            k: rows(k),
            v: rows(v),
            starts: 0,
            lengths: memory.put(bytemuck::cast_slice(&case.lengths)),
            capacities: 0,
            positions,
            pages,
            rows: case.rows() as i64,
            capacity: case.capacity as i32,
            sequences: case.sequences() as i32,
            heads: case.heads as i32,
            reserved: 0,
        },
        indices: memory.put(bytemuck::cast_slice(&case.indices)),
        index_sequence_stride: per_sequence as i64,
        index_head_stride: if case.shared { 0 } else { case.index_capacity as i64 },
        index_capacity: case.index_capacity as u32,
        kept: case.kept.as_ref().map_or(0, |kept| memory.put(bytemuck::cast_slice(kept))),
        lengths_out: memory.untouched(4 * lists),
        head_dim: case.width as u32,
        dtype: case.dtype,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { gather::compact(device, &work) }.map_err(|error| error.to_string())?;

    let (moves, lengths) = case.moves();
    for (tensor, bytes) in tensors.iter_mut().zip([row_bytes, row_bytes, 4]) {
        let before = tensor.clone();
        for (from, to) in &moves {
            tensor[to * bytes..][..bytes].copy_from_slice(&before[from * bytes..][..bytes]);
        }
    }
    memory.expect("k", k, &tensors[0])?;
    memory.expect("v", v, &tensors[1])?;
    memory.expect("positions", positions, &tensors[2])?;
    memory.expect("lengths_out", work.lengths_out, bytemuck::cast_slice(&lengths))
}
