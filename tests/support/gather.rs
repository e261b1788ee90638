//! Gathers: descriptions of work, plain loops that say what should come out, and a run on a device.

use fastkv::{
    abi::{Cache, Kept, Pages, Rows, Slots},
    kernels::{DType, Device, Error, Launch, gather},
};

use super::{
    Check, all,
    memory::{Memory, Spread, UNTOUCHED},
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

/// What lies far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Far {
    /// The source along its outermost axis, or its pages.
    Source,
    /// All of a destination behind its first row, or its pages.
    Destination,
    /// Lists of indices.
    Indices,
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
    pub(crate) far: Option<Far>,
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
            far: None,
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
            far: None,
            seed,
        }
    }

    fn elements(&self) -> usize {
        let tokens = self.tokens.iter().sum::<usize>();
        self.table.as_ref().map_or(tokens, |table| table.pages * table.page_size) * self.heads * self.width
    }

    fn row_bytes(&self) -> usize {
        self.width * self.dtype.bytes() as usize
    }

    /// How the source lies.
    fn source_spread(&self) -> Spread {
        let step = *self.outermost(&mut self.dense_rows()) as usize * self.dtype.bytes() as usize;
        Spread::apart_if(self.far == Some(Far::Source), step, self.elements() * self.dtype.bytes() as usize)
    }

    /// How the destinations lie.
    fn out_spread(&self) -> Spread {
        match &self.slots {
            Some(map) => {
                let step = map.page_size * map.heads(self) * self.row_bytes();
                Spread::apart_if(self.far == Some(Far::Destination), step, self.places() * self.row_bytes())
            }
            None if self.far == Some(Far::Destination) => Spread::BEHIND,
            None => Spread::NEAR,
        }
    }

    /// Rows of a dense destination before the first that the host knows.
    fn rows_before(&self) -> usize {
        self.out_spread().rows_before(self.row_bytes())
    }

    /// How positions of the destination lie.
    fn positions_spread(&self) -> Spread {
        Spread::behind(4 * self.rows_before())
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
        let row_bytes = self.row_bytes();
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

    /// The source without gaps.
    fn dense_rows(&self) -> Rows {
        let (heads, width) = (self.heads as u32, self.width as u32);
        let tokens = self.tokens.first().map_or(0, |tokens| *tokens as u32);
        if let Some(table) = &self.table {
            return Rows::token_major(0, table.page_size as u32, heads, width);
        }
        match self.layout {
            Layout::TokenMajor => Rows::token_major(0, tokens, heads, width),
            Layout::HeadMajor => Rows::head_major(0, heads, tokens, width),
            Layout::Packed => Rows::packed(0, heads, width),
        }
    }

    /// The stride of the outermost axis.
    fn outermost<'a>(&self, rows: &'a mut Rows) -> &'a mut i64 {
        match self.layout {
            Layout::Packed => &mut rows.token_stride,
            Layout::HeadMajor if self.table.is_none() && self.tokens.len() == 1 => &mut rows.head_stride,
            _ => &mut rows.sequence_stride,
        }
    }

    /// Uploads a source and describes it.
    fn put_rows<D: Device>(&self, memory: &mut Memory<'_, D>, source: &[u8]) -> Rows {
        let (spread, mut rows) = (self.source_spread(), self.dense_rows());
        let outermost = self.outermost(&mut rows);
        *outermost = spread.stride(self.dtype.bytes() as usize).unwrap_or(*outermost);
        rows.base = memory.put_spread(source, spread);
        rows
    }

    /// Uploads the lists and describes them.
    fn kept<D: Device>(&self, memory: &mut Memory<'_, D>) -> Kept {
        let packed = self.layout == Layout::Packed;
        let per_sequence = if self.shared { 1 } else { self.heads };
        let cu_seqlens: Vec<i32> =
            (0..=self.tokens.len()).map(|n| self.tokens[..n].iter().sum::<usize>() as i32).collect();
        let tokens =
            if packed { self.tokens.iter().sum() } else { self.tokens.first().copied().unwrap_or(0) };
        let before = self.rows_before();
        let starts = self.starts.as_ref().map_or(0, |starts| {
            let starts: Vec<_> = starts.iter().map(|start| start.saturating_add(before as i64)).collect();
            memory.put(bytemuck::cast_slice(&starts))
        });
        let lists = Lists { sequences: self.tokens.len(), per_sequence, capacity: self.capacity };
        let (indices, index_sequence_stride, index_head_stride) =
            lists.put(memory, &self.indices, self.far == Some(Far::Indices));
        Kept {
            indices,
            index_sequence_stride,
            index_head_stride,
            lengths: self.lengths.as_ref().map_or(0, |lengths| memory.put(bytemuck::cast_slice(lengths))),
            starts,
            cu_seqlens: if packed { memory.put(bytemuck::cast_slice(&cu_seqlens)) } else { 0 },
            positions: self.positions.as_ref().map_or(0, |p| memory.put(bytemuck::cast_slice(p))),
            positions_out: memory.untouched_spread(self.places() * 4, self.positions_spread()),
            out_rows: (before + self.out_rows) as i64,
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
            let stride = self.out_spread().stride(self.dtype.bytes() as usize);
            Slots {
                slots: memory.put(bytemuck::cast_slice(&map.slots)),
                page_stride: stride.unwrap_or(map.page_size as i64 * row),
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

/// Lists of indices, `capacity` in each.
struct Lists {
    sequences: usize,
    /// Lists of a sequence: one for each head, or one that they share.
    per_sequence: usize,
    capacity: usize,
}

impl Lists {
    /// The address, and the elements from one sequence to the next and from one head to the next.
    fn put<D: Device>(&self, memory: &mut Memory<'_, D>, indices: &[i32], far: bool) -> (u64, i64, i64) {
        let Self { sequences, per_sequence, capacity } = *self;
        let mut of_sequence = (per_sequence * capacity) as i64;
        let mut of_head = if per_sequence == 1 { 0 } else { capacity as i64 };
        let outermost = if sequences > 1 { &mut of_sequence } else { &mut of_head };
        let spread = Spread::apart_if(far, 4 * *outermost as usize, 4 * indices.len());
        *outermost = spread.stride(4).unwrap_or(*outermost);
        (memory.put_spread(bytemuck::cast_slice(indices), spread), of_sequence, of_head)
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
        Check::portable("gather_kv_far_apart", |device, _| all(far_apart(), |case| check_kv(device, case)))
            .far(),
        Check::portable("gather_rows_far_apart", |device, _| {
            let cases = far_apart().into_iter().filter(|case| case.heads == 1 && case.table.is_none());
            all(cases.filter(|case| case.slots.is_none()), |case| check_rows(device, case))
        })
        .far(),
        Check::portable("compact_far_apart", |device, _| {
            all(compact_far_apart(), |case| check_compact(device, case))
        })
        .far(),
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
    let out_bytes = case.places() * case.row_bytes();
    let out_spread = case.out_spread();
    let kept = case.kept(&mut memory);
    let work = gather::GatherKv {
        kept,
        k: case.put_rows(&mut memory, &k),
        v: case.put_rows(&mut memory, &v),
        pages: case.pages(&mut memory),
        slots: case.slots(&mut memory),
        k_out: memory.untouched_spread(out_bytes, out_spread),
        v_out: memory.untouched_spread(out_bytes, out_spread),
        head_dim: case.width as u32,
        dtype: case.dtype,
    };
    launch(&work).map_err(|error| error.to_string())?;
    memory.expect_spread("k_out", work.k_out, &case.moved(&k), out_spread)?;
    memory.expect_spread("v_out", work.v_out, &case.moved(&v), out_spread)?;
    let positions = case.moved_positions();
    memory.expect_spread("positions_out", kept.positions_out, &positions, case.positions_spread())
}

/// Runs `gather_rows` on a case of one head and compares every byte of the destination.
pub(crate) fn check_rows<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let source = case.source(3);
    let kept = case.kept(&mut memory);
    let work = gather::GatherRows {
        kept,
        rows: case.put_rows(&mut memory, &source),
        out: memory.untouched_spread(case.out_rows * case.row_bytes(), case.out_spread()),
        width: case.width as u32,
        dtype: case.dtype,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { gather::gather_rows(device, &work) }.map_err(|error| error.to_string())?;
    memory.expect_spread("out", work.out, &case.moved(&source), case.out_spread())?;
    let positions = case.moved_positions();
    memory.expect_spread("positions_out", kept.positions_out, &positions, case.positions_spread())
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

/// Sequences, heads, tokens, pages and lists further apart than 32 bits count, destinations that begin as far behind.
fn far_apart() -> Vec<Case> {
    let positions = |case: Case| Case {
        positions: Some((0..case.tokens.iter().sum::<usize>() as i32).map(|n| 3 * n).collect()),
        starts: Some(
            (0..(case.tokens.len() * case.heads) as i64).map(|n| n * case.capacity as i64).collect(),
        ),
        ..case
    };
    let of_sequences = positions(Case::plain(Layout::TokenMajor, DType::BF16, [2, 2, 40, 20, 64]));
    let of_heads = positions(Case::plain(Layout::HeadMajor, DType::F16, [1, 2, 40, 20, 128]));
    let of_tokens = Case {
        tokens: vec![40, 7],
        indices: (0..2 * 20).map(|i| i % 20 * 2).collect(),
        ..positions(Case::plain(Layout::Packed, DType::BF16, [2, 1, 40, 20, 64]))
    };
    let of_two = positions(Case::plain(Layout::Packed, DType::F32, [1, 1, 2, 2, 64]));
    let of_rows = positions(Case::plain(Layout::TokenMajor, DType::F32, [2, 1, 40, 20, 256]));
    let table = Table::random(&mut Random(3), 2, 40);
    let slots = SlotMap::random(&mut Random(6), of_sequences.out_rows);
    let in_pages = Case { table: Some(table), slots: Some(slots), ..of_sequences.clone() };
    [of_sequences, of_heads, of_tokens, of_two, of_rows, in_pages]
        .into_iter()
        .flat_map(|case| {
            [Far::Source, Far::Destination, Far::Indices].map(|far| Case { far: Some(far), ..case.clone() })
        })
        // One list is not apart from another.
        .filter(|case| case.far != Some(Far::Indices) || case.tokens.len() * case.heads > 1)
        .collect()
}

/// A cache of lists and what is to stay of it.
#[derive(Clone, Debug)]
struct Compaction {
    dtype: DType,
    width: usize,
    heads: usize,
    /// Room of every list, at most; lists stand that far apart, one behind the other but for `starts`.
    capacity: usize,
    /// First row of each list, as the device is told.
    starts: Option<Vec<i64>>,
    /// Room of each list, as the device is told.
    capacities: Option<Vec<i32>>,
    /// Of each list, or of each sequence where the cache is paged.
    lengths: Vec<i32>,
    table: Option<Table>,
    /// `index_capacity` for each list, or for each sequence where heads share.
    indices: Vec<i32>,
    index_capacity: usize,
    shared: bool,
    kept: Option<Vec<i32>>,
    far: Option<FarEntries>,
    seed: u64,
}

/// What lies far apart of a cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum FarEntries {
    /// All lists, or pages, behind the first row there is.
    Behind,
    /// Rows of K and V, or their pages.
    Apart,
    /// Lists of indices.
    Indices,
}

impl Compaction {
    /// A list of 16-bit rows, from its length and the indices that stay.
    fn list(length: i32, indices: Vec<i32>) -> Self {
        Self {
            dtype: DType::BF16,
            width: 64,
            heads: 1,
            capacity: 300,
            starts: None,
            capacities: None,
            lengths: vec![length],
            table: None,
            index_capacity: indices.len(),
            indices,
            shared: false,
            kept: None,
            far: None,
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
        let (dtype, width) =
            (random.of(&[DType::F16, DType::BF16, DType::F32]), random.of(&[8, 64, 80, 128, 256, 576]));
        let rows = lists * capacity;
        // In no order, some where nothing is, the last perhaps cut off.
        let starts = (table.is_none() && random.below(2) == 0).then(|| {
            let mut free: Vec<_> = (0..lists).collect();
            let start = |_| {
                let place = free.swap_remove(random.below(free.len()));
                match random.below(8) {
                    0 => random.of(&[-1, i64::MIN, i64::MAX, rows as i64]),
                    1 | 2 if place + 1 == lists => (rows - random.below(capacity)) as i64,
                    _ => (place * capacity) as i64,
                }
            };
            (0..lists).map(start).collect()
        });
        let capacities = (table.is_none() && random.below(2) == 0)
            .then(|| (0..lists).map(|_| random.below(capacity + 3) as i32 - 1).collect());
        Self {
            dtype,
            width,
            heads,
            capacity,
            starts,
            capacities,
            lengths,
            table,
            indices,
            index_capacity,
            shared,
            kept,
            far: None,
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
            return Some(self.start(sequence * self.heads + head) as usize + entry);
        };
        let of_sequence = table.entries.len() / self.sequences();
        let page = table.entries[sequence * of_sequence + entry / table.page_size];
        let page = usize::try_from(page).ok().filter(|page| *page < table.pages)?;
        Some((page * table.page_size + entry % table.page_size) * self.heads + head)
    }

    fn start(&self, list: usize) -> i64 {
        self.starts.as_ref().map_or((list * self.capacity) as i64, |starts| starts[list])
    }

    /// Entries that a list could have.
    fn room(&self, list: usize) -> i32 {
        let capacity = self.capacities.as_ref().map_or(i32::MAX, |capacities| capacities[list]);
        let behind = match self.start(list) {
            _ if self.table.is_some() => i64::MAX,
            ..0 => 0,
            start => self.rows() as i64 - start,
        };
        behind.min(capacity.into()).clamp(0, self.capacity as i64) as i32
    }

    /// The rows that move, from one to the other, and how many entries each list keeps.
    fn moves(&self) -> (Vec<(usize, usize)>, Vec<i32>) {
        let (mut moves, mut lengths) = (Vec::new(), Vec::new());
        for sequence in 0..self.sequences() {
            for head in 0..self.heads {
                let list = sequence * self.heads + head;
                let length = self.lengths[if self.table.is_some() { sequence } else { list }];
                let length = length.min(self.room(list));
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

/// Lists that keep nothing, one, all; tiles of 128 rows and wider ones; order that breaks; lists in no order, of any
/// room, and where nothing is.
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
    let lists = Compaction {
        heads: 2,
        lengths: vec![300, 250, 90, 300],
        indices: (0..4).flat_map(|list| (0..70).map(move |i| i * 4 + list)).collect(),
        index_capacity: 70,
        ..Compaction::list(0, Vec::new())
    };
    let rooms = [i32::MAX, 90, i32::MIN, 1];
    for (starts, capacities) in [
        (Some([600, 0, 900, 300]), None),
        (Some([600, 0, 900, 300]), Some(rooms)),
        (None, Some(rooms)),
        (Some([-1, i64::MIN, i64::MAX, 300]), None),
        // The first is cut off by the end of the cache, after 97 entries, the third before its first.
        (Some([1103, 0, 1200, 300]), Some([300, i32::MAX, 300, -1])),
    ] {
        let (starts, capacities) = (starts.map(Vec::from), capacities.map(Vec::from));
        cases.push(Compaction { starts, capacities, ..lists.clone() });
    }
    cases
}

/// Lists, rows, pages and indices further apart than 32 bits count.
fn compact_far_apart() -> Vec<Compaction> {
    let ragged = Compaction {
        heads: 2,
        capacity: 40,
        lengths: vec![40, 30, 7, 40],
        indices: (0..4).flat_map(|list| (0..15).map(move |i| i * 2 + list % 2)).collect(),
        index_capacity: 15,
        ..Compaction::list(0, Vec::new())
    };
    let table = Table { page_size: 8, pages: 12, entries: vec![3, 11, 0, -1, 7, 2, 9, 1, 12, 5] };
    let paged = Compaction { lengths: vec![40, 30], table: Some(table), ..ragged.clone() };
    [ragged, paged]
        .into_iter()
        .flat_map(|case| {
            [FarEntries::Behind, FarEntries::Apart, FarEntries::Indices]
                .map(|far| Compaction { far: Some(far), ..case.clone() })
        })
        .collect()
}

/// Compacts a cache and compares every byte of it.
fn check_compact<D: Device>(device: &D, case: &Compaction) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let row_bytes = case.width * case.dtype.bytes() as usize;
    let mut random = Random(case.seed ^ 11);
    let mut bytes = |count: usize| (0..count).map(|_| random.next() as u8).collect::<Vec<_>>();
    let mut tensors =
        [bytes(case.rows() * row_bytes), bytes(case.rows() * row_bytes), bytes(case.rows() * 4)];
    let of_page = case.table.as_ref().map_or(1, |table| table.page_size * case.heads);
    let spread = match case.far {
        Some(FarEntries::Behind) => Spread::BEHIND,
        Some(FarEntries::Apart) => Spread::apart(of_page * row_bytes, tensors[0].len()),
        Some(FarEntries::Indices) | None => Spread::NEAR,
    };
    // Rows, or pages, that the host does not know.
    let before = spread.rows_before(of_page * row_bytes);
    let spreads = [spread, spread, Spread::behind(4 * before * of_page)];
    let [k, v, positions] = [0, 1, 2].map(|which| memory.put_spread(&tensors[which], spreads[which]));
    let width = case.width as i64;
    let row = case.heads as i64 * width;
    let stride = spread.stride(case.dtype.bytes() as usize);
    let rows = |base| match &case.table {
        None => Rows { base, token_stride: stride.unwrap_or(width), ..Rows::default() },
        Some(table) => {
            let sequence_stride = stride.unwrap_or(table.page_size as i64 * row);
            Rows { base, sequence_stride, head_stride: width, token_stride: row }
        }
    };
    let pages = case.table.as_ref().map_or(Pages::default(), |table| {
        let entries: Vec<_> = table
            .entries
            .iter()
            .map(|page| if *page < 0 { *page } else { page.saturating_add(before as i32) })
            .collect();
        Pages {
            table: memory.put(bytemuck::cast_slice(&entries)),
            table_pages: (table.entries.len() / case.sequences()) as i32,
            pages: (before + table.pages) as i32,
            page_size: table.page_size as i32,
            reserved: 0,
        }
    });
    let lists = case.sequences() * case.heads;
    let starts: Vec<_> = (0..lists)
        .map(|list| match case.start(list) {
            start @ ..0 => start,
            start => start.saturating_add(before as i64),
        })
        .collect();
    let (indices, index_sequence_stride, index_head_stride) = Lists {
        sequences: case.sequences(),
        per_sequence: if case.shared { 1 } else { case.heads },
        capacity: case.index_capacity,
    }
    .put(&mut memory, &case.indices, case.far == Some(FarEntries::Indices));
    let work = gather::Compact {
        cache: Cache {
            k: rows(k),
            v: rows(v),
            starts: if (before > 0 || case.starts.is_some()) && case.table.is_none() {
                memory.put(bytemuck::cast_slice(&starts))
            } else {
                0
            },
            lengths: memory.put(bytemuck::cast_slice(&case.lengths)),
            capacities: case
                .capacities
                .as_ref()
                .map_or(0, |capacities| memory.put(bytemuck::cast_slice(capacities))),
            positions,
            pages,
            rows: (before + case.rows()) as i64,
            capacity: case.capacity as i32,
            sequences: case.sequences() as i32,
            heads: case.heads as i32,
            reserved: 0,
        },
        indices,
        index_sequence_stride,
        index_head_stride,
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
    for (which, (name, address)) in [("k", k), ("v", v), ("positions", positions)].into_iter().enumerate() {
        memory.expect_spread(name, address, &tensors[which], spreads[which])?;
    }
    memory.expect("lengths_out", work.lengths_out, bytemuck::cast_slice(&lengths))
}
