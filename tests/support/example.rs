//! The example that the kernels' documentation shows: an engine's layer, held to the oracle step by step.

use fastkv::kernels::{DType, Device};

#[allow(unreachable_pub)]
#[path = "../../src/kernels/example.rs"]
mod engine;

use engine::{Choice, Layer, Prompts, Step, Workspace};

use super::{
    Check,
    memory::Memory,
    number::{decode, encode, within},
    oracle::{self, Pool},
    random::Random,
};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![Check::portable("example_of_an_engine", run), Check::hopper("example_of_an_engine", run)]
}

const HEAD_DIM: usize = 64;
const KV_HEADS: usize = 2;
const GROUP: usize = 3;
const QUERY_HEADS: usize = KV_HEADS * GROUP;
const WINDOW: usize = 8;
const TOKENS: [usize; 3] = [70, 5, 37];
const CAPACITY: usize = 24;
const PAGE_SIZE: usize = 8;
const TABLE_PAGES: usize = 4;
const HIDDEN: usize = 16;

/// Of each kv head of each sequence: one more than there is room for, and one less than the window, are clipped.
const COUNTS: [[usize; KV_HEADS]; 3] = [[24, 17], [10, 3], [12, 25]];
/// Of the TSP layer.
const PASSED: [usize; 3] = [20, 9, 15];

/// Outputs are sums of values below 1 in magnitude, with weights and results in bf16.
const TOLERANCE: f64 = 0.02;

fn bytes_of<const N: usize, T>(numbers: &[T], bytes: impl Fn(&T) -> [u8; N]) -> Vec<u8> {
    numbers.iter().flat_map(bytes).collect()
}

/// Vectors of a head at a time: `[token][head]`, from `[token, head, HEAD_DIM]`.
fn heads(numbers: &[f64], heads: usize) -> Vec<Vec<Vec<f64>>> {
    let token = |token: &[f64]| token.chunks(HEAD_DIM).map(<[f64]>::to_vec).collect();
    numbers.chunks(heads * HEAD_DIM).map(token).collect()
}

fn run<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    let mut memory = Memory::new(device);
    let mut numbers = |count: usize, scale: f32| -> Vec<u8> {
        encode(DType::BF16, (0..count).map(|_| (scale * random.symmetric()).into()))
    };
    let sequences = TOKENS.len();
    let lists = sequences * KV_HEADS;
    let tokens: usize = TOKENS.iter().sum();
    let longest = *TOKENS.iter().max().expect("sequences");
    let starts: Vec<usize> = TOKENS.iter().scan(0, |end, n| Some(std::mem::replace(end, *end + n))).collect();
    let ends: Vec<usize> = starts.iter().zip(TOKENS).map(|(start, n)| start + n).collect();
    let boundaries: Vec<usize> = [0].into_iter().chain(ends).collect();
    let i32s = |numbers: &[usize]| bytes_of(numbers, |n| (*n as i32).to_ne_bytes());
    let i64s = |numbers: &[i64]| bytes_of(numbers, |n| n.to_ne_bytes());

    // Bounds above what this batch has, as a graph that serves others would have them.
    let layer = Layer {
        query_heads: QUERY_HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        sequences: sequences as u32,
        tokens: tokens as u32 + 5,
        longest: longest as u32 + 3,
        capacity: CAPACITY as u32,
        page_size: PAGE_SIZE as u32,
        pages: (lists * TABLE_PAGES) as u32,
        table_pages: TABLE_PAGES as u32,
    };
    let row = longest + 3;

    let width = QUERY_HEADS + 2 * KV_HEADS;
    let qkv = numbers(tokens * width * HEAD_DIM, 1.0);
    let mut all = qkv.clone();
    all.resize(layer.tokens as usize * width * HEAD_DIM * 2, 0xFF);
    let prompts = Prompts {
        qkv: memory.put(&all),
        cu_seqlens: memory.put(&i32s(&boundaries)),
        out: memory.untouched(layer.tokens as usize * QUERY_HEADS * HEAD_DIM * 2),
        scores: memory.reserve(sequences * QUERY_HEADS * row * 4),
    };
    let mut choice = |rows: usize, counts: &[usize]| Choice {
        rows: rows as u32,
        counts: memory.put(&i32s(counts)),
        kept: memory.reserve(sequences * rows * CAPACITY * 4),
        kept_lengths: memory.reserve(sequences * rows * 4),
    };
    let choices = [choice(KV_HEADS, &COUNTS.concat()), choice(1, &PASSED)];
    // Pages in no order; each list has room for one or two steps more than it keeps at most.
    let pages = lists * TABLE_PAGES;
    let table: Vec<usize> = (0..pages).map(|i| (i * 7 + 3) % pages).collect();
    let slot = |list: usize, i: usize| table[list * TABLE_PAGES + i / PAGE_SIZE] * PAGE_SIZE + i % PAGE_SIZE;
    let slots: Vec<i64> =
        (0..lists).flat_map(|list| (0..CAPACITY).map(move |i| slot(list, i) as i64)).collect();
    let new: [Vec<u8>; 3] = [QUERY_HEADS, KV_HEADS, KV_HEADS].map(|n| numbers(sequences * n * HEAD_DIM, 1.0));
    let step = Step {
        k_pages: memory.untouched(pages * PAGE_SIZE * HEAD_DIM * 2),
        v_pages: memory.untouched(pages * PAGE_SIZE * HEAD_DIM * 2),
        table: memory.put(&i32s(&table)),
        lengths: choices[0].kept_lengths,
        q: memory.put(&new[0]),
        k: memory.put(&new[1]),
        v: memory.put(&new[2]),
        out: memory.untouched(sequences * QUERY_HEADS * HEAD_DIM * 2),
        full: memory.put(&[0; 4]),
        counters: memory.put(&vec![0; 4 * (lists + 1)]),
    };
    let error = |error: fastkv::kernels::Error| error.to_string();
    let bytes = layer.workspace(device, &prompts, &choices[0], &step).map_err(error)?;
    let workspace = Workspace { address: memory.reserve(bytes), bytes };

    // Attention, and the scores of every key.
    // SAFETY: blocks of the sizes that `engine` says, which live until the end.
    unsafe { layer.attend(device, &prompts, workspace) }.map_err(error)?;
    let vectors = heads(&decode(DType::BF16, &qkv), width);
    let of = |sequence: usize, head: usize| -> Vec<Vec<f64>> {
        (starts[sequence]..boundaries[sequence + 1]).map(|token| vectors[token][head].clone()).collect()
    };
    let mut attended = Vec::new();
    let mut window_scores = Vec::new();
    for (sequence, n) in TOKENS.into_iter().enumerate() {
        for query in 0..n {
            for head in 0..QUERY_HEADS {
                let (k, v) =
                    (of(sequence, QUERY_HEADS + head / GROUP), QUERY_HEADS + KV_HEADS + head / GROUP);
                attended.extend(oracle::attend(&of(sequence, head)[query], &k, &of(sequence, v), query + 1));
            }
        }
        for head in 0..QUERY_HEADS {
            let queries = of(sequence, head).split_off(n.saturating_sub(WINDOW));
            window_scores.push(oracle::window_scores(&queries, &of(sequence, QUERY_HEADS + head / GROUP)));
        }
    }
    let found = decode(DType::BF16, &memory.get(prompts.out, attended.len() * 2)?);
    let near = |numbers: &[f64]| numbers.iter().map(|x| (*x, TOLERANCE)).collect::<Vec<_>>();
    within("out", &found, &near(&attended))?;
    let mut scores = Vec::new();
    for (at, expected) in window_scores.iter().enumerate() {
        let found = memory.floats(prompts.scores + (at * row * 4) as u64, expected.len())?;
        let found = oracle::wide(&found);
        within(&format!("scores[{at}]"), &found, &near(expected))?;
        scores.push(found);
    }

    // What is kept, by the scores that were found.
    let keep = |sequence: usize, heads: std::ops::Range<usize>, count: usize| -> Vec<usize> {
        let scored = TOKENS[sequence].saturating_sub(WINDOW);
        let count = count.min(CAPACITY).min(TOKENS[sequence]);
        let pooled =
            heads.map(|head| oracle::pool(&scores[sequence * QUERY_HEADS + head][..scored], Pool::Max, 7));
        let mut kept =
            oracle::top(&oracle::sum_lists(&pooled.collect::<Vec<_>>()), count.saturating_sub(WINDOW));
        kept.extend((scored..TOKENS[sequence]).take(count));
        kept
    };
    let padded = |kept: &[Vec<usize>]| -> Vec<u8> {
        let one = |kept: &Vec<usize>| {
            let mut kept: Vec<i32> = kept.iter().map(|i| *i as i32).collect();
            kept.resize(CAPACITY, -1);
            kept
        };
        bytes_of(&kept.iter().flat_map(one).collect::<Vec<_>>(), |i| i.to_ne_bytes())
    };
    let kept: Vec<Vec<usize>> = (0..lists)
        .map(|list| {
            let (sequence, head) = (list / KV_HEADS, list % KV_HEADS);
            keep(sequence, head * GROUP..(head + 1) * GROUP, COUNTS[sequence][head])
        })
        .collect();
    let slots = memory.put(&i64s(&slots));
    // SAFETY: as above.
    unsafe { layer.compress(device, &prompts, &choices[0], &step, slots, workspace) }.map_err(error)?;
    memory.expect("kept", choices[0].kept, &padded(&kept))?;
    let lengths: Vec<usize> = kept.iter().map(Vec::len).collect();
    memory.expect("kept_lengths", choices[0].kept_lengths, &i32s(&lengths))?;

    // One set for a sequence goes on, packed.
    let passed: Vec<Vec<usize>> =
        (0..sequences).map(|sequence| keep(sequence, 0..QUERY_HEADS, PASSED[sequence])).collect();
    let hidden: Vec<f64> = (0..tokens * HIDDEN).map(|i| i as f64).collect();
    let firsts: Vec<i64> =
        passed.iter().scan(0, |end, kept| Some(std::mem::replace(end, *end + kept.len() as i64))).collect();
    let total: usize = passed.iter().map(Vec::len).sum();
    let mut all = encode(DType::F32, hidden.iter().copied());
    all.resize(layer.tokens as usize * HIDDEN * 4, 0xFF);
    let rows = sequences * CAPACITY;
    let [hidden_at, starts_at] = [memory.put(&all), memory.put(&i64s(&firsts))];
    let [out, positions] = [memory.untouched(rows * HIDDEN * 4), memory.untouched(rows * 4)];
    let addresses = [hidden_at, starts_at, out, positions];
    // SAFETY: as above.
    unsafe { layer.hand_on(device, &prompts, &choices[1], addresses, HIDDEN as u32, workspace) }
        .map_err(error)?;
    let sources = passed.iter().zip(&starts).flat_map(|(kept, start)| kept.iter().map(move |i| start + i));
    let moved = sources.flat_map(|token| hidden[token * HIDDEN..(token + 1) * HIDDEN].to_vec());
    memory.expect("hidden states", out, &encode(DType::F32, moved))?;
    memory.expect("positions", positions, &i32s(&passed.concat()))?;
    memory.expect(
        "behind them",
        positions + total as u64 * 4,
        &vec![super::memory::UNTOUCHED; (rows - total) * 4],
    )?;

    // Steps over what was kept; a graph where the device makes them.
    let [q, k, v] = [QUERY_HEADS, KV_HEADS, KV_HEADS];
    let new =
        [(&new[0], q), (&new[1], k), (&new[2], v)].map(|(bytes, n)| heads(&decode(DType::BF16, bytes), n));
    // SAFETY: as above.
    let graph = unsafe { device.capture(&mut || layer.decode(device, &step, workspace)) }.map_err(error)?;
    for steps in 1..=2 {
        // SAFETY: as above.
        unsafe {
            match &graph {
                Some(graph) => graph.launch(),
                None => layer.decode(device, &step, workspace),
            }
        }
        .map_err(error)?;
        let mut expected = Vec::new();
        for head in 0..sequences * QUERY_HEADS {
            let (sequence, head) = (head / QUERY_HEADS, head % QUERY_HEADS);
            let kv_head = head / GROUP;
            let entries = |first: usize, new: &Vec<Vec<Vec<f64>>>| -> Vec<Vec<f64>> {
                let prompt = of(sequence, first + kv_head);
                let kept = kept[sequence * KV_HEADS + kv_head].iter().map(|i| prompt[*i].clone());
                kept.chain((0..steps).map(|_| new[sequence][kv_head].clone())).collect()
            };
            let (keys, values) = (entries(QUERY_HEADS, &new[1]), entries(QUERY_HEADS + KV_HEADS, &new[2]));
            expected.extend(oracle::attend(&new[0][sequence][head], &keys, &values, keys.len()));
        }
        let found = decode(DType::BF16, &memory.get(step.out, expected.len() * 2)?);
        within(&format!("step {steps}"), &found, &near(&expected))?;
        let lengths: Vec<usize> = kept.iter().map(|kept| kept.len() + steps).collect();
        memory.expect("lengths", step.lengths, &i32s(&lengths))?;
        memory.expect("full", step.full, &[0; 4])?;
    }
    Ok(())
}
