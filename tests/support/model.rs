//! A model of a GPU in host memory: it allocates, copies, and runs launches by walking over every block
//! and thread with the arithmetic that the kernels' comments promise. It checks that every access lies in
//! a block of memory, that every 16 bytes of a destination are written at most once per launch, and that
//! nothing is read that was never written.

use std::cell::RefCell;

use fastkv::{
    abi::{self, GatherKvParams, GatherRowsParams, Kept},
    kernels::{Device, Error, Kernel, Launch},
};

#[derive(Default)]
pub(crate) struct Model {
    records_only: bool,
    fails: bool,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    blocks: Vec<Block>,
    next: u64,
    launches: Vec<Recorded>,
}

struct Block {
    address: u64,
    bytes: Vec<u8>,
    initialised: Vec<bool>,
    /// Writes of the present launch.
    writes: Vec<u8>,
}

/// A launch, parameters included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) kernel: Kernel,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) params: Vec<u8>,
}

impl Model {
    /// Remembers launches and touches no memory.
    pub(crate) fn recorder() -> Self {
        Self { records_only: true, ..Self::default() }
    }

    /// Fails every launch as a GPU would.
    pub(crate) fn failing() -> Self {
        Self { fails: true, ..Self::default() }
    }

    /// The launches so far.
    pub(crate) fn launches(&self) -> Vec<Recorded> {
        self.state.borrow().launches.clone()
    }
}

impl Device for Model {
    type Event = ();

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        let mut state = self.state.borrow_mut();
        // A gap between blocks, so that running past one is not landing in the next.
        let address = (state.next + 4096).next_multiple_of(256);
        state.next = address + bytes as u64;
        state.blocks.push(Block {
            address,
            bytes: vec![0; bytes],
            initialised: vec![false; bytes],
            writes: vec![0; bytes],
        });
        Ok(address)
    }

    unsafe fn free(&self, address: u64) -> Result<(), Error> {
        self.state.borrow_mut().blocks.retain(|block| block.address != address);
        Ok(())
    }

    unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        self.state.borrow_mut().write(to, from);
        Ok(())
    }

    unsafe fn download(&self, to: &mut [u8], from: u64) -> Result<(), Error> {
        let bytes = self.state.borrow().read(from, to.len());
        to.copy_from_slice(&bytes);
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        let mut state = self.state.borrow_mut();
        let read = state.read(from, bytes);
        state.write(to, &read);
        Ok(())
    }

    unsafe fn fill(&self, to: u64, value: u8, bytes: usize) -> Result<(), Error> {
        self.state.borrow_mut().write(to, &vec![value; bytes]);
        Ok(())
    }

    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Error> {
        let Launch { kernel, grid, block, .. } = *launch;
        assert!(grid.iter().chain(&block).all(|n| *n > 0), "{launch:?}");
        assert!(grid[0] < 1 << 31 && grid[1] < 1 << 16 && grid[2] < 1 << 16, "{launch:?}");
        assert!(block.iter().product::<u32>() <= 1024, "{launch:?}");
        let mut state = self.state.borrow_mut();
        if self.fails {
            return Err(Error::Driver { operation: "cuLaunchKernelEx", code: 719 });
        }
        state.launches.push(Recorded { kernel, grid, block, params: launch.params.to_vec() });
        if self.records_only {
            return Ok(());
        }
        for block in &mut state.blocks {
            block.writes.fill(0);
        }
        match kernel {
            Kernel::GatherKv => {
                gather_kv(&mut state, grid, block[0], bytemuck::pod_read_unaligned(launch.params));
            }
            Kernel::GatherRows => {
                gather_rows(&mut state, grid, block[0], bytemuck::pod_read_unaligned(launch.params));
            }
            other => panic!("no model of {other:?}"),
        }
        let twice = state.blocks.iter().any(|block| block.writes.iter().any(|writes| *writes > 1));
        assert!(!twice, "a launch wrote the same byte twice");
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }

    fn record(&self) -> Result<(), Error> {
        Ok(())
    }

    fn elapsed_ms(&self, _: &(), _: &()) -> Result<f32, Error> {
        Ok(0.0)
    }

    fn compute_capability(&self) -> (u32, u32) {
        (8, 0)
    }

    fn multiprocessors(&self) -> u32 {
        108
    }
}

impl State {
    fn block(&self, address: u64, bytes: usize) -> usize {
        let inside = |block: &Block| {
            block.address <= address
                && address
                    .checked_add(bytes as u64)
                    .is_some_and(|end| end <= block.address + block.bytes.len() as u64)
        };
        let found = self.blocks.iter().position(inside);
        found.unwrap_or_else(|| panic!("{address:#x}: {bytes} bytes outside every block"))
    }

    fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        if bytes == 0 {
            return Vec::new();
        }
        let block = &self.blocks[self.block(address, bytes)];
        let from = (address - block.address) as usize;
        assert!(block.initialised[from..][..bytes].iter().all(|set| *set), "{address:#x} was never written");
        block.bytes[from..][..bytes].to_vec()
    }

    fn write(&mut self, address: u64, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        let index = self.block(address, bytes.len());
        let block = &mut self.blocks[index];
        let from = (address - block.address) as usize;
        block.bytes[from..][..bytes.len()].copy_from_slice(bytes);
        block.initialised[from..][..bytes.len()].fill(true);
        block.writes[from..][..bytes.len()].iter_mut().for_each(|writes| *writes = writes.saturating_add(1));
    }

    fn vector(&mut self, to: u64, from: u64) {
        assert!(to.is_multiple_of(16) && from.is_multiple_of(16), "{from:#x} to {to:#x} is not aligned");
        let vector = self.read(from, 16);
        self.write(to, &vector);
    }

    fn i32(&self, base: u64, index: i64) -> i32 {
        i32::from_ne_bytes(self.read((base as i64 + index * 4) as u64, 4).try_into().unwrap())
    }

    fn i64(&self, base: u64, index: i64) -> i64 {
        i64::from_ne_bytes(self.read((base as i64 + index * 8) as u64, 8).try_into().unwrap())
    }
}

/// The limits of one list, as the header describes them.
struct List {
    indices: i64,
    length: i64,
    start: i64,
    first_token: i64,
    tokens: i64,
    position: i64,
}

fn list(state: &State, kept: &Kept, sequence: i64, head: i64) -> List {
    let list = sequence * i64::from(kept.heads) + head;
    let start = match kept.starts {
        0 => list * i64::from(kept.capacity),
        starts => state.i64(starts, list),
    };
    let wanted = match kept.lengths {
        0 => kept.capacity,
        lengths => state.i32(lengths, list).clamp(0, kept.capacity),
    };
    let room = if start < 0 { 0 } else { (kept.out_rows - start).max(0) };
    let (first_token, end) = match kept.cu_seqlens {
        0 => (0, i64::from(kept.tokens)),
        cu => (state.i32(cu, sequence).into(), state.i32(cu, sequence + 1).into()),
    };
    let packed = kept.cu_seqlens != 0;
    List {
        indices: sequence * kept.index_sequence_stride + head * kept.index_head_stride,
        length: room.min(wanted.into()),
        start,
        first_token,
        tokens: end - first_token,
        position: if packed { first_token } else { sequence * i64::from(kept.tokens) },
    }
}

/// The index to follow, or none.
fn index(state: &State, kept: &Kept, list: &List, row: i64) -> Option<i64> {
    let index = i64::from(state.i32(kept.indices, list.indices + row));
    (0..list.tokens).contains(&index).then_some(index)
}

fn position(state: &mut State, kept: &Kept, list: &List, row: i64, index: i64) {
    let position = match kept.positions {
        0 => index as i32,
        positions => state.i32(positions, list.position + index),
    };
    if kept.positions_out != 0 {
        state.write((kept.positions_out as i64 + 4 * (list.start + row)) as u64, &position.to_ne_bytes());
    }
}

fn gather_kv(state: &mut State, [xs, ys, zs]: [u32; 3], threads: u32, p: GatherKvParams) {
    assert_eq!(threads, abi::GATHER_KV_THREADS as u32);
    let rows_in_flight = i64::from(abi::GATHER_KV_ROWS);
    let lanes = 1_i64 << p.lane_shift;
    let groups = i64::from(threads) / lanes;
    for (x, y, z) in (0..xs).flat_map(|x| (0..ys).flat_map(move |y| (0..zs).map(move |z| (x, y, z)))) {
        let (sequence, head) = (i64::from(x / p.kept.heads as u32), i64::from(x % p.kept.heads as u32));
        let list = list(state, &p.kept, sequence, head);
        let (rows, out) = if z == 0 { (p.k, p.k_out) } else { (p.v, p.v_out) };
        for thread in 0..i64::from(threads) {
            let tile = groups * rows_in_flight;
            let mut first = i64::from(y) * tile;
            while first < list.length {
                for i in 0..rows_in_flight {
                    let row = first + i * groups + thread / lanes;
                    if row >= list.length {
                        continue;
                    }
                    let Some(index) = index(state, &p.kept, &list, row) else {
                        continue;
                    };
                    let offset = sequence * rows.sequence_stride
                        + head * rows.head_stride
                        + (list.first_token + index) * rows.token_stride;
                    let source = rows.base as i64 + offset * i64::from(p.element_bytes);
                    let target = out as i64 + (list.start + row) * i64::from(p.row_bytes);
                    let mut byte = thread % lanes * 16;
                    if z == 0 && byte == 0 {
                        position(state, &p.kept, &list, row, index);
                    }
                    while byte < p.row_bytes.into() {
                        state.vector((target + byte) as u64, (source + byte) as u64);
                        byte += lanes * 16;
                    }
                }
                first += i64::from(ys) * tile;
            }
        }
    }
}

fn gather_rows(state: &mut State, [xs, ys, zs]: [u32; 3], threads: u32, p: GatherRowsParams) {
    assert!(zs == 1 && threads <= 256);
    for (row, sequence) in (0..xs).flat_map(|x| (0..ys).map(move |y| (i64::from(x), i64::from(y)))) {
        let list = list(state, &p.kept, sequence, 0);
        if row >= list.length {
            continue;
        }
        let Some(index) = index(state, &p.kept, &list, row) else {
            continue;
        };
        let offset = sequence * p.rows.sequence_stride + (list.first_token + index) * p.rows.token_stride;
        let source = p.rows.base as i64 + offset * i64::from(p.element_bytes);
        let target = p.out as i64 + (list.start + row) * i64::from(p.row_bytes);
        for thread in 0..i64::from(threads) {
            let mut byte = thread * 16;
            while byte < p.row_bytes.into() {
                state.vector((target + byte) as u64, (source + byte) as u64);
                byte += i64::from(threads) * 16;
            }
        }
        position(state, &p.kept, &list, row, index);
    }
}
