//! Several drivers in one CUDA graph, which is captured once and launched for other lengths, counts and contents, as an
//! engine does: the bits that calls of the drivers give.

use bytemuck::NoUninit;
use fastkv::{
    abi::{Cache, Kept, Pages, Pooling, Rows},
    kernels::{
        DType, Device, Error,
        attention::{self, PrefillAttention},
        batch::{Bias, Lengths, Lse, ScoreHeads, ScoreRows, Scores, Window, default_scale},
        decode::{self, Decode},
        gather::{self, Compact, GatherKv},
        scores::{self, WindowScores},
        select::{self, Form, Reduction, SelectTopk},
    },
};
use half::{bf16, f16};

use super::{
    Check,
    memory::{Memory, Spread, UNTOUCHED},
    random::Random,
};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("captured_prompt", prompt),
        Check::portable("captured_pages", pages),
        Check::portable("captured_steps", |device, seed| {
            [false, true].into_iter().try_for_each(|counters| {
                steps(device, seed, counters).map_err(|error| format!("{error}\ncounters {counters}"))
            })
        }),
    ]
}

/// Memory that drivers work on, as it is before each of two runs.
struct Scene<'a, D: Device> {
    device: &'a D,
    memory: Memory<'a, D>,
    random: Random,
    blocks: Vec<Block>,
    scratch: Vec<(u64, usize)>,
}

struct Block {
    /// Of what is read when a run is done.
    name: Option<&'static str>,
    address: u64,
    before: [Vec<u8>; 2],
}

impl<'a, D: Device> Scene<'a, D> {
    fn new(device: &'a D, seed: u64) -> Self {
        let memory = Memory::new(device);
        Self { device, memory, random: Random(seed), blocks: Vec::new(), scratch: Vec::new() }
    }

    fn block(&mut self, name: Option<&'static str>, before: [Vec<u8>; 2]) -> u64 {
        let address = self.memory.reserve(before[0].len());
        self.blocks.push(Block { name, address, before });
        address
    }

    fn input<T: NoUninit, const N: usize>(&mut self, before: [[T; N]; 2]) -> u64 {
        self.block(None, before.map(|before| bytemuck::cast_slice(&before).to_vec()))
    }

    fn in_place<T: NoUninit, const N: usize>(&mut self, name: &'static str, before: [[T; N]; 2]) -> u64 {
        self.block(Some(name), before.map(|before| bytemuck::cast_slice(&before).to_vec()))
    }

    /// Numbers in [-2, 2), others in each run.
    fn numbers(&mut self, name: Option<&'static str>, dtype: DType, count: usize) -> u64 {
        let before = [(); 2].map(|()| {
            let number = |_| 2.0 * self.random.symmetric();
            (0..count)
                .map(number)
                .flat_map(|number| match dtype {
                    DType::F16 => f16::from_f32(number).to_ne_bytes(),
                    _ => bf16::from_f32(number).to_ne_bytes(),
                })
                .collect()
        });
        self.block(name, before)
    }

    fn output(&mut self, name: &'static str, bytes: usize) -> u64 {
        self.block(Some(name), [(); 2].map(|()| vec![UNTOUCHED; bytes]))
    }

    /// A workspace: each run finds what the one before left.
    fn scratch(&mut self, bytes: Result<usize, Error>) -> Result<(u64, usize), String> {
        let bytes = bytes.map_err(|error| error.to_string())?;
        let address = self.memory.reserve(bytes);
        self.scratch.push((address, bytes));
        Ok((address, bytes))
    }

    /// What a run leaves.
    fn run(
        &mut self,
        run: usize,
        work: &mut dyn FnMut() -> Result<(), Error>,
    ) -> Result<Vec<Vec<u8>>, String> {
        for block in &self.blocks {
            self.memory.write_spread(block.address, &block.before[run], Spread::NEAR);
        }
        work().map_err(|error| error.to_string())?;
        let read = self.blocks.iter().filter(|block| block.name.is_some());
        read.map(|block| self.memory.get(block.address, block.before[run].len())).collect()
    }

    /// Captures `work` before its memory holds anything, launches it twice, and compares that with calls.
    fn check(mut self, mut work: impl FnMut() -> Result<(), Error>) -> Result<(), String> {
        // SAFETY: the scene describes memory that is there as long as it, here and below.
        let graph = unsafe { self.device.capture(&mut work) }
            .map_err(|error| error.to_string())?
            .ok_or("the device keeps no graph")?;
        // SAFETY: as above.
        let mut launch = || unsafe { graph.launch() };
        let replayed = [self.run(0, &mut launch)?, self.run(1, &mut launch)?];
        for (address, bytes) in self.scratch.clone() {
            self.memory.write_spread(address, &vec![UNTOUCHED; bytes], Spread::NEAR);
        }
        let called = [self.run(0, &mut work)?, self.run(1, &mut work)?];
        for (at, name) in self.blocks.iter().filter_map(|block| block.name).enumerate() {
            if called[0][at] == called[1][at] {
                return Err(format!("{name}: both runs give the same, which shows nothing"));
            }
            for run in 0..2 {
                if replayed[run][at] != called[run][at] {
                    return Err(format!(
                        "{name}: launch {run} of the graph gives something else than a call"
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Attention with scores, a selection in five launches, and a gather of what it keeps.
fn prompt<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    const QUERIES: u32 = 90;
    const KEYS: u32 = 150;
    const LONGEST: u32 = 100;
    const CAPACITY: u32 = 60;
    const D: u32 = 64;
    let mut scene = Scene::new(device, seed);
    let queries = Lengths::packed(scene.input([[0, 50, 90], [0, 30, 85]]), QUERIES, 60);
    let keys = Lengths::packed(scene.input([[0, 90, 150], [0, 45, 140]]), KEYS, LONGEST);
    let mut rows = |name, tokens: u32, heads: u32| {
        Rows::packed(scene.numbers(name, DType::BF16, (tokens * heads * D) as usize), heads, D)
    };
    let (q, k, v) = (rows(None, QUERIES, 4), rows(None, KEYS, 2), rows(None, KEYS, 2));
    let out = Rows::packed(scene.output("out", (QUERIES * 4 * D * 2) as usize), 4, D);
    let lse = Lse::head_major(scene.output("lse", (4 * QUERIES * 4) as usize), QUERIES);
    let of_scores = ScoreRows {
        base: scene.output("scores", (2 * 2 * LONGEST * 4) as usize),
        sequence_stride: i64::from(2 * LONGEST),
        head_stride: LONGEST.into(),
    };
    let ScoreRows { base, sequence_stride, head_stride } = of_scores;
    let bias = Bias {
        heads: scene.input([[0b0110_u32], [0b1010]]),
        keys: scene.input([[0x1234_5678_u32; 8], [0x0F0F_0FF0; 8]]),
        key_stride: 4,
        value: -1.5,
    };
    let mut attention = PrefillAttention {
        q,
        k,
        v,
        out,
        sequences: 2,
        query_heads: 4,
        kv_heads: 2,
        head_dim: D,
        dtype: DType::BF16,
        queries,
        keys,
        scale: default_scale(D),
        bias: Some(bias),
        lse: Some(lse),
        scores: Some(Scores {
            base,
            sequence_stride,
            head_stride,
            window: Window::Last(8),
            heads: ScoreHeads::Group,
        }),
        ..Default::default()
    };
    (attention.workspace, attention.workspace_bytes) =
        scene.scratch(attention::prefill_attention_workspace(&attention))?;
    let mut selection = SelectTopk {
        scores: of_scores,
        sequences: 2,
        rows: 2,
        groups: 1,
        heads: 1,
        keys,
        window: 8,
        tail: 8,
        sinks: 2,
        pooling: Pooling::max(5),
        reduction: Reduction::Sum,
        page: 1,
        counts: scene.input([[20, 33, 12, 60], [40, 9, 51, 10]]),
        kept: scene.output("kept", (2 * 2 * CAPACITY * 4) as usize),
        kept_lengths: scene.output("kept_lengths", 2 * 2 * 4),
        capacity: CAPACITY,
        form: Some(Form::Grid),
        ..Default::default()
    };
    (selection.workspace, selection.workspace_bytes) =
        scene.scratch(select::select_topk_workspace(device, &selection))?;
    let out_bytes = (2 * 2 * CAPACITY * D * 2) as usize;
    let gathering = GatherKv {
        kept: Kept {
            indices: selection.kept,
            index_sequence_stride: i64::from(2 * CAPACITY),
            index_head_stride: CAPACITY.into(),
            lengths: selection.kept_lengths,
            starts: scene.input([[0_i64, 60, 120, 180], [150, 90, 0, 210]]),
            cu_seqlens: keys.cu_seqlens,
            positions: scene.input([7, 13].map(ascending::<{ KEYS as usize }>)),
            positions_out: scene.output("positions_out", (2 * 2 * CAPACITY * 4) as usize),
            out_rows: i64::from(2 * 2 * CAPACITY),
            sequences: 2,
            heads: 2,
            tokens: KEYS as i32,
            capacity: CAPACITY as i32,
        },
        k,
        v,
        k_out: scene.output("k_out", out_bytes),
        v_out: scene.output("v_out", out_bytes),
        head_dim: D,
        dtype: DType::BF16,
        ..Default::default()
    };
    // SAFETY: every address is a block of the scene of the size that its field states.
    scene.check(|| unsafe {
        attention::prefill_attention(device, &attention)?;
        select::select_topk(device, &selection)?;
        gather::gather_kv(device, &gathering)
    })
}

/// Scores of keys in pages by queries whose LSE is found first, a selection, and its entries moved to the front.
fn pages<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    const PAGE: u32 = 16;
    const PAGES: u32 = 13;
    const KEYS: u32 = 96;
    const D: u32 = 128;
    let mut scene = Scene::new(device, seed);
    let lengths = scene.input([[70, 33], [96, 12]]);
    let pages = Pages {
        table: scene
            .input([[3, 9, 0, 12, 5, -1, 7, 1, 11, -1, -1, -1], [8, 2, 10, 6, 1, 4, 0, -1, 3, 5, 7, 9]]),
        table_pages: 6,
        pages: PAGES as i32,
        page_size: PAGE as i32,
        reserved: 0,
    };
    let mut rows = |name, tokens: u32, of_one: u32, heads: u32| {
        let count = (tokens * heads * D) as usize;
        Rows::token_major(scene.numbers(name, DType::F16, count), of_one, heads, D)
    };
    let (q, k, v) = (
        rows(None, 2 * 8, 8, 6),
        rows(Some("k"), PAGES * PAGE, PAGE, 2),
        rows(Some("v"), PAGES * PAGE, PAGE, 2),
    );
    let of_scores = ScoreRows {
        base: scene.output("scores", (2 * 6 * KEYS * 4) as usize),
        sequence_stride: i64::from(6 * KEYS),
        head_stride: KEYS.into(),
    };
    let ScoreRows { base, sequence_stride, head_stride } = of_scores;
    let mut scoring = WindowScores {
        q,
        k,
        pages,
        sequences: 2,
        query_heads: 6,
        kv_heads: 2,
        head_dim: D,
        dtype: DType::F16,
        queries: Lengths::dense(8),
        keys: Lengths::dense(KEYS),
        lengths,
        scale: default_scale(D),
        scores: Scores {
            base,
            sequence_stride,
            head_stride,
            window: Window::Last(8),
            heads: ScoreHeads::Query,
        },
        ..Default::default()
    };
    (scoring.workspace, scoring.workspace_bytes) =
        scene.scratch(scores::window_scores_workspace(&scoring))?;
    let selection = SelectTopk {
        scores: of_scores,
        sequences: 2,
        rows: 2,
        groups: 1,
        heads: 3,
        keys: Lengths::dense(KEYS),
        lengths,
        window: 8,
        tail: 8,
        pooling: Pooling::average(3),
        reduction: Reduction::Sum,
        page: 1,
        counts: scene.input([[30, 30, 14, 14], [50, 50, 9, 9]]),
        kept: scene.output("kept", (2 * 2 * KEYS * 4) as usize),
        kept_lengths: scene.output("kept_lengths", 2 * 2 * 4),
        capacity: KEYS,
        // Hopper's own where there is one.
        form: Some(if device.compute_capability() == (9, 0) { Form::Cluster } else { Form::Block }),
        ..Default::default()
    };
    let compaction = Compact {
        cache: Cache {
            k,
            v,
            lengths,
            positions: scene.in_place("positions", [1, 2].map(ascending::<{ (PAGES * PAGE * 2) as usize }>)),
            pages,
            capacity: KEYS as i32,
            sequences: 2,
            heads: 2,
            ..Cache::default()
        },
        indices: selection.kept,
        index_sequence_stride: i64::from(2 * KEYS),
        index_head_stride: KEYS.into(),
        index_capacity: KEYS,
        kept: selection.kept_lengths,
        lengths_out: scene.output("lengths_out", 2 * 2 * 4),
        head_dim: D,
        dtype: DType::F16,
    };
    // SAFETY: every address is a block of the scene of the size that its field states.
    scene.check(|| unsafe {
        scores::window_scores(device, &scoring)?;
        select::select_topk(device, &selection)?;
        gather::compact(device, &compaction)
    })
}

/// A step of decoding, over lists that it lets grow; one of them is full in the second run.
fn steps<D: Device>(device: &D, seed: u64, counters: bool) -> Result<(), String> {
    const ROOM: usize = 200;
    const D: u32 = 128;
    let mut scene = Scene::new(device, seed);
    let mut rows = |name, tokens: usize, heads: u32| {
        let count = tokens * (heads * D) as usize;
        Rows::head_major(scene.numbers(name, DType::BF16, count), heads, 1, D)
    };
    let (k, v) = (rows(Some("k"), 4 * ROOM, 1), rows(Some("v"), 4 * ROOM, 1));
    let (q, k_new, v_new) = (rows(None, 2, 8), rows(None, 2, 2), rows(None, 2, 2));
    let [k, v] = [k, v].map(|rows| Rows { sequence_stride: 0, head_stride: 0, ..rows });
    let mut work = Decode {
        cache: Cache {
            k,
            v,
            lengths: scene.in_place("lengths", [[150, 20, 0, 199], [3, 199, 200, 64]]),
            positions: scene.in_place("positions", [1, 2].map(ascending::<{ 4 * ROOM }>)),
            rows: 4 * ROOM as i64,
            capacity: ROOM as i32,
            sequences: 2,
            heads: 2,
            ..Cache::default()
        },
        q,
        k_new,
        v_new,
        out: Rows::head_major(scene.output("out", (2 * 8 * D * 2) as usize), 8, 1, D),
        positions_new: scene.input([[1000, 2000], [3000, 4000]]),
        lse: Some(Lse::padded(scene.output("lse", 2 * 8 * 4), 8, 1)),
        full: scene.in_place("full", [[0], [0]]),
        scale: default_scale(D),
        query_heads: 8,
        tokens: 1,
        head_dim: D,
        dtype: DType::BF16,
        ..Default::default()
    };
    if counters {
        let count = decode::decode_counters(&work).map_err(|error| error.to_string())?;
        work.counters = scene.memory.put(&vec![0; 4 * count]);
    }
    (work.workspace, work.workspace_bytes) = scene.scratch(decode::decode_workspace(&work))?;
    // SAFETY: every address is a block of the scene of the size that its field states.
    scene.check(|| unsafe { decode::decode(device, &work) })
}

/// Multiples of a number.
fn ascending<const N: usize>(step: i32) -> [i32; N] {
    std::array::from_fn(|at| step * at as i32)
}
