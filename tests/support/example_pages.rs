//! The example of an engine with attention of its own over a paged cache, held to the oracle step by step.

use fastkv::kernels::{DType, Device};

#[allow(unreachable_pub)]
#[path = "../../src/kernels/example_pages.rs"]
mod engine;

use engine::{Choice, Layer, Prompts, Workspace};

use super::{
    Check,
    memory::Memory,
    number::{decode, encode, within},
    oracle,
    random::Random,
};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![Check::portable("example_of_pages", run)]
}

const HEAD_DIM: usize = 64;
const KV_HEADS: usize = 2;
const GROUP: usize = 3;
const QUERY_HEADS: usize = KV_HEADS * GROUP;
const WINDOW: usize = 8;
/// Tokens of each prompt, and of its last chunk: longer than what is kept, shorter than the window; then as long as what
/// is kept, an unused place, as long as the window.
const BATCHES: [[[usize; 3]; 2]; 2] = [[[70, 5, 37], [16, 5, 37]], [[20, 0, 8], [9, 0, 8]]];
const CAPACITY: usize = 20;
const PAGE_SIZE: usize = 8;
const TABLE_PAGES: usize = 10;
/// Of the last chunks of all prompts, at most.
const CHUNK_TOKENS: usize = 64;
const KEPT_PAGES: usize = CAPACITY.div_ceil(PAGE_SIZE);
/// LSE comes rounded to f32, and a logit is a sum of 64 products.
const TOLERANCE: f64 = 1e-4;

fn run<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    BATCHES.into_iter().try_for_each(|[tokens, chunks]| compress(device, seed, tokens, chunks))
}

fn compress<D: Device>(device: &D, seed: u64, tokens: [usize; 3], chunks: [usize; 3]) -> Result<(), String> {
    let mut random = Random(seed);
    let mut memory = Memory::new(device);
    let sequences = tokens.len();
    let mut vectors = |tokens: usize, heads: usize| -> Vec<Vec<Vec<f64>>> {
        let mut one = || decode(DType::BF16, &encode(DType::BF16, [(2.0 * random.symmetric()).into()]))[0];
        (0..tokens).map(|_| (0..heads).map(|_| (0..HEAD_DIM).map(|_| one()).collect()).collect()).collect()
    };
    // Of each prompt: `[token][head]`.
    let [keys, values] = [(); 2].map(|()| tokens.map(|tokens| vectors(tokens, KV_HEADS)));
    let queries = chunks.map(|tokens| vectors(tokens, QUERY_HEADS));

    // Prompts lie in the first half of the pages, as these are counted here, which is in no order.
    let pages = 2 * sequences * TABLE_PAGES;
    let page = |at: usize| (at * 7 + 3) % pages;
    let table: Vec<i32> = (0..sequences * TABLE_PAGES)
        .map(|at| if at % TABLE_PAGES * PAGE_SIZE < tokens[at / TABLE_PAGES] { page(at) as i32 } else { -1 })
        .collect();
    let row = |slot: usize| slot * KV_HEADS * HEAD_DIM..(slot + 1) * KV_HEADS * HEAD_DIM;
    let slot_of =
        |pages: &[i32], token: usize| pages[token / PAGE_SIZE] as usize * PAGE_SIZE + token % PAGE_SIZE;
    let pool = |of: &[Vec<Vec<Vec<f64>>>; 3]| {
        let mut pool = vec![f64::NAN; pages * PAGE_SIZE * KV_HEADS * HEAD_DIM];
        for (prompt, pages) in of.iter().zip(table.chunks(TABLE_PAGES)) {
            for (token, heads) in prompt.iter().enumerate() {
                pool[row(slot_of(pages, token))].copy_from_slice(&heads.concat());
            }
        }
        pool
    };
    let [k_pool, v_pool] = [pool(&keys), pool(&values)];
    let kept_pages: Vec<i32> =
        (0..sequences * KEPT_PAGES).map(|at| page(sequences * TABLE_PAGES + at) as i32).collect();
    let slots: Vec<u8> = kept_pages
        .chunks(KEPT_PAGES)
        .flat_map(|pages| (0..CAPACITY).map(|i| slot_of(pages, i) as i64))
        .flat_map(i64::to_ne_bytes)
        .collect();
    let starts: Vec<u8> = (0..sequences * KV_HEADS)
        .flat_map(|list| ((list / KV_HEADS * CAPACITY) as i64).to_ne_bytes())
        .collect();

    // What attention leaves: LSE of base 2, `[tokens, heads]`.
    let of_head = |vectors: &[Vec<Vec<f64>>], head: usize| -> Vec<Vec<f64>> {
        vectors.iter().map(|heads| heads[head].clone()).collect()
    };
    let mut lse = Vec::new();
    for (sequence, queries) in queries.iter().enumerate() {
        for (query, heads) in queries.iter().enumerate() {
            let seen = tokens[sequence] - chunks[sequence] + query + 1;
            lse.extend(heads.iter().enumerate().map(|(head, query)| {
                let keys = of_head(&keys[sequence], head / GROUP);
                let logits =
                    keys[..seen].iter().map(|key| oracle::dot(query, key) / (HEAD_DIM as f64).sqrt());
                logits.map(f64::exp).sum::<f64>().log2()
            }));
        }
    }

    // Bounds above what this batch has, as a graph that serves others would have them.
    let longest = TABLE_PAGES * PAGE_SIZE;
    let layer = Layer {
        query_heads: QUERY_HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        sequences: sequences as u32,
        chunk_tokens: CHUNK_TOKENS as u32,
        longest_chunk: 40,
        longest: longest as u32,
        capacity: CAPACITY as u32,
        page_size: PAGE_SIZE as u32,
        pages: pages as u32,
        table_pages: TABLE_PAGES as u32,
    };
    let i32s =
        |numbers: &[usize]| -> Vec<u8> { numbers.iter().flat_map(|n| (*n as i32).to_ne_bytes()).collect() };
    let boundaries: Vec<usize> = (0..=sequences).map(|n| chunks[..n].iter().sum()).collect();
    let room = |mut bytes: Vec<u8>, row: usize| {
        bytes.resize(CHUNK_TOKENS * row, 0xFF);
        bytes
    };
    let q = encode(DType::BF16, queries.concat().concat().concat());
    let prompts = Prompts {
        q: memory.put(&room(q, QUERY_HEADS * HEAD_DIM * 2)),
        lse: memory.put(&room(encode(DType::F32, lse), QUERY_HEADS * 4)),
        cu_seqlens: memory.put(&i32s(&boundaries)),
        k_pages: memory.put(&encode(DType::BF16, k_pool.iter().copied())),
        v_pages: memory.put(&encode(DType::BF16, v_pool.iter().copied())),
        table: memory.put(bytemuck::cast_slice(&table)),
        lengths: memory.put(&i32s(&tokens)),
    };
    let choice = Choice {
        scores: memory.reserve(sequences * QUERY_HEADS * longest * 4),
        kept: memory.reserve(sequences * CAPACITY * 4),
        kept_lengths: memory.reserve(sequences * 4),
        slots: memory.put(&slots),
        starts: memory.put(&starts),
    };
    let error = |error: fastkv::kernels::Error| error.to_string();
    let bytes = layer.workspace(device, &prompts, &choice).map_err(error)?;
    let workspace = Workspace { address: memory.reserve(bytes), bytes };
    // SAFETY: blocks of the sizes that `engine` says, which live until the end.
    unsafe { layer.compress(device, &prompts, &choice, workspace) }.map_err(error)?;

    let (mut k_expected, mut v_expected) = (k_pool, v_pool);
    let mut lists = Vec::new();
    let mut lengths = Vec::new();
    for (sequence, tokens) in tokens.into_iter().enumerate() {
        let scored = tokens.saturating_sub(WINDOW);
        let mut pooled = Vec::new();
        for head in 0..QUERY_HEADS {
            let at = (sequence * QUERY_HEADS + head) * longest * 4;
            let found = oracle::wide(&memory.floats(choice.scores + at as u64, tokens)?);
            let observing =
                of_head(&queries[sequence], head).split_off(chunks[sequence].saturating_sub(WINDOW));
            let expected = oracle::window_scores(&observing, &of_head(&keys[sequence], head / GROUP));
            let expected: Vec<_> = expected.into_iter().map(|score| (score, TOLERANCE)).collect();
            within(&format!("scores of head {head} of prompt {sequence}"), &found, &expected)?;
            pooled.push(oracle::pool(&found[..scored], oracle::Pool::Max, 7));
        }
        let mut kept = oracle::top(&oracle::sum_lists(&pooled), CAPACITY.min(tokens).saturating_sub(WINDOW));
        kept.extend(scored..tokens);
        for (to, from) in kept.iter().enumerate() {
            let slot = slot_of(&kept_pages[sequence * KEPT_PAGES..], to);
            k_expected[row(slot)].copy_from_slice(&keys[sequence][*from].concat());
            v_expected[row(slot)].copy_from_slice(&values[sequence][*from].concat());
        }
        lengths.push(kept.len());
        lists.extend((0..CAPACITY).flat_map(|i| kept.get(i).map_or(-1, |key| *key as i32).to_ne_bytes()));
    }
    memory.expect("kept", choice.kept, &lists)?;
    memory.expect("kept_lengths", choice.kept_lengths, &i32s(&lengths))?;
    memory.expect("keys", prompts.k_pages, &encode(DType::BF16, k_expected))?;
    memory.expect("values", prompts.v_pages, &encode(DType::BF16, v_expected))
}
