//! Gathers: descriptions of work, plain loops that say what should come out, and a run on a device.

use fastkv::{
    abi::{Kept, Rows},
    kernels::{DType, Device, gather},
};

use super::{
    Check, all,
    memory::{Memory, UNTOUCHED},
    random::Random,
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
    pub(crate) seed: u64,
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
            seed: 1,
        }
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
            seed,
        }
    }

    fn elements(&self) -> usize {
        self.tokens.iter().sum::<usize>() * self.heads * self.width
    }

    /// First element of the row of a token.
    fn element(&self, sequence: usize, head: usize, token: usize) -> usize {
        let before: usize = self.tokens[..sequence].iter().sum();
        match self.layout {
            Layout::HeadMajor => (before * self.heads + head * self.tokens[sequence] + token) * self.width,
            Layout::TokenMajor | Layout::Packed => ((before + token) * self.heads + head) * self.width,
        }
    }

    /// Every (sequence, head, token, destination row) that is to be moved.
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
                    if token_exists && start >= 0 && row < self.out_rows as i64 {
                        moves.push((sequence, head, index as usize, row as usize));
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
        let mut out = vec![UNTOUCHED; self.out_rows * row_bytes];
        for (sequence, head, token, row) in self.moves() {
            let from = self.element(sequence, head, token) * element;
            out[row * row_bytes..][..row_bytes].copy_from_slice(&source[from..][..row_bytes]);
        }
        out
    }

    fn moved_positions(&self) -> Vec<u8> {
        let mut out = vec![i32::from_ne_bytes([UNTOUCHED; 4]); self.out_rows];
        for (sequence, _, token, row) in self.moves() {
            let before: usize = self.tokens[..sequence].iter().sum();
            out[row] = self.positions.as_ref().map_or(token as i32, |positions| positions[before + token]);
        }
        bytemuck::cast_slice(&out).to_vec()
    }

    fn rows(&self, base: u64) -> Rows {
        let (heads, width) = (self.heads as u32, self.width as u32);
        let tokens = self.tokens.first().map_or(0, |tokens| *tokens as u32);
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
            positions_out: memory.untouched(self.out_rows * 4),
            out_rows: self.out_rows as i64,
            sequences: self.tokens.len() as i32,
            heads: self.heads as i32,
            tokens: tokens as i32,
            capacity: self.capacity as i32,
        }
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
        Check::portable("gather_kv_random", |device, seed| {
            all((0..50).map(|n| Case::random(seed * 50 + n, 1 + n as usize % 9)), |case| {
                check_kv(device, case)
            })
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
    let mut memory = Memory::new(device);
    let (k, v) = (case.source(1), case.source(2));
    let out_bytes = case.out_rows * case.width * case.dtype.bytes() as usize;
    let kept = case.kept(&mut memory);
    let work = gather::GatherKv {
        kept,
        k: case.rows(memory.put(&k)),
        v: case.rows(memory.put(&v)),
        k_out: memory.untouched(out_bytes),
        v_out: memory.untouched(out_bytes),
        head_dim: case.width as u32,
        dtype: case.dtype,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { gather::gather_kv(device, &work) }.map_err(|error| error.to_string())?;
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
