//! Decoding: caches of lists, plain f64 loops that say what a step gives and leaves, and runs on a device.

use fastkv::{
    abi::{Cache, Pages, Rows},
    kernels::{
        DType, Device,
        batch::Bias,
        decode::{self, Decode},
    },
};
use half::{bf16, f16};

use super::{
    Check, all,
    lse::{LseLayout, Order, Queries},
    memory::{Memory, Spread, UNTOUCHED},
    processors::Processors,
    random::Random,
};

/// Elements and positions that nobody may look at: NaN in both element types, and a wild number.
const POISON: u16 = u16::MAX;
const UNTOUCHED_POSITION: i32 = i32::from_ne_bytes([UNTOUCHED; 4]);

/// Positions that have a bias bit.
const BIASED_POSITIONS: u32 = 70;

/// What is added where head and position are biased.
const BIAS: f32 = -1.5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    Ragged,
    /// The same, rows of V further from each other than those of K.
    Apart,
    /// `[pages, page_size, heads, d]`, K and V apart.
    Paged(usize),
    /// `[pages, 2, page_size, heads, d]`, K and V of a page side by side.
    PagedTogether(usize),
}

/// What lies far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Far {
    /// All lists, behind the first row there is.
    Lists,
    /// Rows of K and V, or their pages.
    Rows,
    /// Sequences of queries, new keys and values, and the output; heads where there is one.
    Tokens,
    /// Bits of the bias.
    Bias,
    /// Entries of the positions, of pages that share their memory.
    Positions,
}

/// Some steps of decoding over one batch.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) layout: Layout,
    pub(crate) dtype: DType,
    pub(crate) head_dim: usize,
    pub(crate) heads: usize,
    pub(crate) group: usize,
    pub(crate) tokens: usize,
    /// Entries of each list at the start, `[sequence][head]`; in a paged cache those of head 0 hold.
    pub(crate) lengths: Vec<Vec<usize>>,
    /// Free entries behind each list.
    pub(crate) slack: usize,
    /// Whether the new tokens are given and appended; else the last entries are theirs.
    pub(crate) appends: bool,
    /// Whether pages are missing here and there.
    pub(crate) holes: bool,
    pub(crate) bias: bool,
    /// Whether the cache says where each list begins, else one list follows the other; in a ragged one.
    pub(crate) starts: bool,
    /// Whether lists have capacities of their own, else all have the largest; in a ragged cache.
    pub(crate) capacities: bool,
    /// Whether the cache keeps positions, else entries count as theirs.
    pub(crate) positions: bool,
    /// Whether keys grow from tile to tile: maxima that a kernel has taken do not last.
    pub(crate) rising: bool,
    pub(crate) steps: usize,
    /// Whether the launches have counters to themselves, which nobody clears between them.
    pub(crate) counters: bool,
    pub(crate) far: Option<Far>,
    pub(crate) lse_layout: LseLayout,
    /// What the contents of each sequence are drawn from.
    pub(crate) seeds: Vec<u64>,
}

impl Case {
    /// One step over lists of these lengths, one sequence for each row of them.
    pub(crate) fn new(head_dim: usize, group: usize, lengths: &[&[usize]]) -> Self {
        Self {
            layout: Layout::Ragged,
            dtype: DType::BF16,
            head_dim,
            heads: lengths[0].len(),
            group,
            tokens: 1,
            lengths: lengths.iter().map(|sequence| sequence.to_vec()).collect(),
            slack: 1,
            appends: true,
            holes: false,
            bias: false,
            starts: true,
            capacities: true,
            positions: true,
            rising: false,
            steps: 1,
            counters: false,
            far: None,
            lse_layout: LseLayout { order: Order::Padded, ..LseLayout::PLAIN },
            seeds: (1..=lengths.len() as u64).collect(),
        }
    }

    /// Everything that may vary.
    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let heads = 1 + random.below(3);
        let sequences = 1 + random.below(3);
        let length = |random: &mut Random| match random.below(4) {
            0 => random.below(4),
            1 => 60 + random.below(10),
            2 => random.below(200),
            _ => random.below(40),
        };
        let lengths = (0..sequences).map(|_| (0..heads).map(|_| length(&mut random)).collect()).collect();
        let layout = match random.below(4) {
            0 => Layout::Paged(random.of(&[1, 7, 16, 64])),
            1 => Layout::PagedTogether(random.of(&[8, 16])),
            2 => Layout::Apart,
            _ => Layout::Ragged,
        };
        Self {
            layout,
            dtype: random.of(&[DType::F16, DType::BF16]),
            head_dim: random.of(&[64, 96, 128, 256]),
            heads,
            group: random.of(&[1, 2, 3, 4, 7, 8, 16]),
            tokens: random.of(&[1, 1, 1, 2, 3, 8]),
            lengths,
            slack: random.below(12),
            appends: random.below(4) > 0,
            holes: random.below(2) == 0,
            bias: random.below(3) == 0,
            rising: random.below(3) == 0,
            steps: 1 + random.below(2),
            counters: random.below(2) == 0,
            far: None,
            lse_layout: LseLayout::random(&mut random),
            seeds: (0..sequences).map(|_| random.next()).collect(),
            starts: random.below(4) > 0,
            capacities: random.below(4) > 0,
            positions: random.below(4) > 0,
        }
    }

    fn lists(&self) -> usize {
        self.lengths.len() * self.heads
    }

    /// Those whose LSE is wanted.
    fn lse_queries(&self) -> Queries {
        let counts = vec![self.tokens; self.lengths.len()];
        Queries { heads: self.heads * self.group, skipped: 0, counts, room: self.tokens }
    }

    /// Counters as they are before each step, and after it: one of each list and 16 rows of queries, and one.
    fn counter_bytes(&self) -> Vec<u8> {
        vec![0; 4 * (self.lists() * (self.group * self.tokens).div_ceil(16) + 1)]
    }

    /// Elements from a row of K to the next, and of V, where no other lies between.
    fn strides(&self) -> [usize; 2] {
        let more = if self.layout == Layout::Apart { 8 } else { 0 };
        [self.head_dim, self.head_dim + more]
    }

    fn page_size(&self) -> Option<usize> {
        match self.layout {
            Layout::Ragged | Layout::Apart => None,
            Layout::Paged(size) | Layout::PagedTogether(size) => Some(size),
        }
    }
}

/// A cache as a host sees it. Entries of a list are in their places in `tensors`.
struct State {
    /// K and V, or both in the first.
    tensors: [Vec<u16>; 2],
    positions: Vec<i32>,
    /// Of each list, or of each sequence where the cache is paged.
    lengths: Vec<i32>,
    /// Of each list where the cache is ragged.
    starts: Vec<i64>,
    capacities: Vec<i32>,
    table: Vec<i32>,
    pages: usize,
    table_pages: usize,
    full: i32,
}

/// Where an entry is: tensor and element of its K and V rows, and its index among the positions.
struct Place {
    rows: [(usize, usize); 2],
    position: usize,
}

impl State {
    /// Lists in a scrambled order with holes between them that hold poison.
    fn new(case: &Case) -> Self {
        let mut random = Random(case.seeds.iter().fold(case.head_dim as u64, |a, b| a.rotate_left(7) ^ b));
        let mut state = Self {
            tensors: [Vec::new(), Vec::new()],
            positions: Vec::new(),
            lengths: Vec::new(),
            starts: vec![0; case.lists()],
            capacities: vec![0; case.lists()],
            table: Vec::new(),
            pages: 0,
            table_pages: 0,
            full: 0,
        };
        let mut rows = 0;
        if let Some(size) = case.page_size() {
            let longest = case.lengths.iter().map(|sequence| sequence[0]).max().unwrap_or(0);
            state.lengths = case.lengths.iter().map(|sequence| sequence[0] as i32).collect();
            state.table_pages = (longest + case.slack).div_ceil(size);
            state.pages = state.table_pages * case.lengths.len() + 2;
            let mut free: Vec<_> = (0..state.pages as i32).collect();
            for _ in 0..state.table_pages * case.lengths.len() {
                state.table.push(free.swap_remove(random.below(free.len())));
            }
            for entry in &mut state.table {
                match random.below(if case.holes { 12 } else { usize::MAX }) {
                    0 => *entry = -1,
                    1 => *entry = state.pages as i32,
                    2 => *entry = i32::MIN,
                    _ => {}
                }
            }
            rows = state.pages * size * case.heads;
        } else {
            state.lengths = case.lengths.iter().flatten().map(|length| *length as i32).collect();
            let longest = case.lengths.iter().flatten().max().unwrap_or(&0) + case.slack;
            let mut order: Vec<_> = (0..case.lists()).collect();
            while !order.is_empty() {
                let list = order.swap_remove(random.below(order.len()));
                let room = if case.capacities { state.lengths[list] as usize + case.slack } else { longest };
                rows += random.below(3);
                state.starts[list] = if case.starts { rows } else { list * longest } as i64;
                state.capacities[list] = room as i32;
                rows += room;
            }
            if !case.starts {
                rows = case.lists() * longest;
            }
        }
        let together = matches!(case.layout, Layout::PagedTogether(_));
        state.tensors = if together {
            [vec![POISON; 2 * rows * case.head_dim], Vec::new()]
        } else {
            case.strides().map(|stride| vec![POISON; rows * stride])
        };
        state.positions = vec![UNTOUCHED_POSITION; rows];
        for (sequence, seed) in case.seeds.iter().enumerate() {
            for head in 0..case.heads {
                let mut random = Random(seed ^ (head as u64 + 1) << 32);
                let mut position = -1;
                for entry in 0..state.length(case, sequence, head) {
                    // Drawn whether or not there is a place for it, so that holes change nothing else.
                    position += 1 + random.below(3) as i32;
                    let scale = if case.rising { 1.0 + 6.0 * (entry / 64 % 4) as f32 } else { 1.0 };
                    let row = [scale, 1.0].map(|scale| draw(&mut random, case.dtype, case.head_dim, scale));
                    if let Some(place) = state.place(case, sequence, head, entry) {
                        state.put(&place, &row, position);
                    }
                }
            }
        }
        state
    }

    fn capacity(&self, case: &Case) -> usize {
        match case.page_size() {
            Some(size) => self.table_pages * size,
            None => self.capacities.iter().copied().max().unwrap_or(0).max(0) as usize,
        }
    }

    /// Entries that a list could have.
    fn room(&self, case: &Case, sequence: usize, head: usize) -> usize {
        if case.page_size().is_some() {
            return self.capacity(case);
        }
        let list = sequence * case.heads + head;
        let start = self.starts[list];
        let behind = if start < 0 { 0 } else { (self.positions.len() as i64).saturating_sub(start) };
        behind.min(self.capacities[list].into()).max(0) as usize
    }

    fn length_index(&self, case: &Case, sequence: usize, head: usize) -> usize {
        if case.page_size().is_some() { sequence } else { sequence * case.heads + head }
    }

    fn length(&self, case: &Case, sequence: usize, head: usize) -> usize {
        let length = self.lengths[self.length_index(case, sequence, head)];
        (length.max(0) as usize).min(self.room(case, sequence, head))
    }

    fn place(&self, case: &Case, sequence: usize, head: usize, entry: usize) -> Option<Place> {
        let d = case.head_dim;
        let Some(size) = case.page_size() else {
            let row = self.starts[sequence * case.heads + head] as usize + entry;
            let [k, v] = case.strides().map(|stride| row * stride);
            return Some(Place { rows: [(0, k), (1, v)], position: row });
        };
        let page = self.table[sequence * self.table_pages + entry / size];
        let page = usize::try_from(page).ok().filter(|page| *page < self.pages)?;
        let row = (page * size + entry % size) * case.heads + head;
        let rows = if matches!(case.layout, Layout::Paged(_)) {
            [(0, row * d), (1, row * d)]
        } else {
            let of_page = size * case.heads;
            let in_page = row % of_page;
            [0, 1].map(|which| (0, ((2 * page + which) * of_page + in_page) * d))
        };
        Some(Place { rows, position: row })
    }

    fn put(&mut self, place: &Place, rows: &[Vec<u16>; 2], position: i32) {
        for ((tensor, element), row) in place.rows.iter().zip(rows) {
            self.tensors[*tensor][*element..][..row.len()].copy_from_slice(row);
        }
        self.positions[place.position] = position;
    }

    /// Whether a place of the batch holds a list at all.
    fn is_in_use(&self, case: &Case, sequence: usize, head: usize) -> bool {
        self.lengths[self.length_index(case, sequence, head)] >= 0
    }

    /// Whether all new tokens of a list fit.
    fn has_room(&self, case: &Case, sequence: usize, head: usize) -> bool {
        let length = self.length(case, sequence, head);
        self.is_in_use(case, sequence, head)
            && length + case.tokens <= self.room(case, sequence, head)
            && (0..case.tokens).all(|token| self.place(case, sequence, head, length + token).is_some())
    }
}

/// What comes with a step: rows by sequence, head and token.
struct Step {
    q: Vec<u16>,
    k: Vec<u16>,
    v: Vec<u16>,
    positions: Vec<i32>,
}

impl Step {
    fn new(case: &Case, number: usize) -> Self {
        let mut step = Self { q: Vec::new(), k: Vec::new(), v: Vec::new(), positions: Vec::new() };
        for seed in &case.seeds {
            let mut random = Random(seed ^ (number as u64 + 1) << 48);
            let mut rows =
                |heads: usize| draw(&mut random, case.dtype, heads * case.tokens * case.head_dim, 1.0);
            step.q.extend(rows(case.heads * case.group));
            step.k.extend(rows(case.heads));
            step.v.extend(rows(case.heads));
            step.positions.extend((0..case.tokens).map(|token| (1000 + 10 * number + token) as i32));
        }
        step
    }
}

/// Uniform in [-2, 2) times `scale`, so that some keys outweigh others.
fn draw(random: &mut Random, dtype: DType, count: usize, scale: f32) -> Vec<u16> {
    (0..count).map(|_| encode_element(dtype, 2.0 * scale * random.symmetric())).collect()
}

fn encode_element(dtype: DType, value: f32) -> u16 {
    if dtype == DType::F16 { f16::from_f32(value).to_bits() } else { bf16::from_f32(value).to_bits() }
}

fn decode_element(dtype: DType, bits: u16) -> f64 {
    if dtype == DType::F16 { f16::from_bits(bits).to_f64() } else { bf16::from_bits(bits).to_f64() }
}

fn bias_bit(words: &[u32], index: usize) -> bool {
    words[index / 32] >> (index % 32) & 1 == 1
}

/// Every third head and a scattering of positions, for each sequence.
fn bias_words(case: &Case) -> (Vec<u32>, Vec<u32>) {
    let heads = (0..(case.heads * case.group).div_ceil(32)).map(|_| 0x9249_2492).collect();
    let keys = case.seeds.iter().flat_map(|seed| {
        let mut random = Random(seed ^ 77);
        (0..BIASED_POSITIONS.div_ceil(32)).map(move |_| random.next() as u32)
    });
    (heads, keys.collect())
}

fn scale(case: &Case) -> f32 {
    1.0 / (case.head_dim as f32).sqrt()
}

/// Output and LSE of one query, and how far each may be off.
struct Expected {
    out: Vec<f64>,
    out_error: Vec<f64>,
    lse: f64,
    lse_error: f64,
}

/// Attention of one query over rows of K and V, with a bias for each.
///
/// The kernel's error, with u the rounding unit of the element type and e = 2^-24 that of f32:
/// * a logit is a sum of d products in d/16 steps, and hardware truncates where it adds: at most
///   d/16 + 4 times 2 e of the sum of absolute products; then it is scaled, shifted and put through ex2,
///   8 e of its magnitude and 4 e more;
/// * probabilities are rounded to 16 bits for the second product (u, and 2^-25 below the f16 range),
///   not for their sum; sums over keys, warps and chunks are in f32, 2 e each;
/// * the output is rounded once: u, and 2^-25 or 2^-134 where numbers of its type end.
///
/// What is not finite spreads as IEEE arithmetic says; where every logit is -inf, it is as if there were no key.
fn attend(case: &Case, q: &[f64], keys: &[(Vec<f64>, Vec<f64>, f64)]) -> Expected {
    let d = case.head_dim;
    let (unit, least, smallest) = if case.dtype == DType::F16 {
        (2_f64.powi(-11), 2_f64.powi(-25), 2_f64.powi(-25))
    } else {
        (2_f64.powi(-8), 0.0, 2_f64.powi(-134))
    };
    let e = 2_f64.powi(-24);
    let scale = f64::from(scale(case));
    let mut logit_error = 0.0_f64;
    let logits: Vec<f64> = keys
        .iter()
        .map(|(k, _, bias)| {
            let products = q.iter().zip(k).map(|(q, k)| q * k);
            let magnitude: f64 = products.clone().map(f64::abs).sum::<f64>() * scale + bias.abs();
            // An infinite product has no error.
            if magnitude.is_finite() {
                logit_error =
                    logit_error.max(magnitude * (2.0 * (d as f64 / 16.0 + 4.0) + 8.0) * e + 4.0 * e);
            }
            products.sum::<f64>() * scale + bias
        })
        .collect();
    let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - most).exp()).sum();
    if logits.iter().all(|logit| *logit == f64::NEG_INFINITY) {
        return Expected {
            out: vec![0.0; d],
            out_error: vec![0.0; d],
            lse: f64::NEG_INFINITY,
            lse_error: 0.0,
        };
    }
    let sums = 2.0 * e * (keys.len() as f64 + 80.0);
    let (mut out, mut out_error) = (vec![0.0; d], vec![0.0; d]);
    for i in 0..d {
        let mut magnitude = 0.0;
        for ((_, v, _), logit) in keys.iter().zip(&logits) {
            let p = (logit - most).exp() / sum;
            out[i] += p * v[i];
            magnitude += (p * (unit + 2.0 * logit_error + sums) + least) * v[i].abs();
        }
        out_error[i] = magnitude + unit * out[i].abs() + smallest;
    }
    let lse = most + sum.ln();
    Expected { out, out_error, lse, lse_error: 2.0 * logit_error + sums + 4.0 * e * (1.0 + lse.abs()) }
}

/// What a query of a list gives, before the list takes in the new tokens.
fn expected(
    case: &Case,
    state: &State,
    step: &Step,
    [sequence, head, in_group, token]: [usize; 4],
) -> Expected {
    let d = case.head_dim;
    let widen = |row: &[u16]| row.iter().map(|bits| decode_element(case.dtype, *bits)).collect::<Vec<_>>();
    let query_head = head * case.group + in_group;
    let q = ((sequence * case.heads * case.group + query_head) * case.tokens + token) * d;
    let (heads, biased) = bias_words(case);
    let biased = &biased[sequence * BIASED_POSITIONS.div_ceil(32) as usize..];
    let length = state.length(case, sequence, head);
    let seen =
        if case.appends { length } else { (length + token + 1).saturating_sub(case.tokens).min(length) };
    let mut keys = Vec::new();
    for entry in 0..seen {
        if let Some(place) = state.place(case, sequence, head, entry) {
            let [k, v] = place.rows.map(|(tensor, element)| widen(&state.tensors[tensor][element..][..d]));
            let position = if case.positions { state.positions[place.position] as usize } else { entry };
            let is_biased = case.bias
                && bias_bit(&heads, query_head)
                && position < BIASED_POSITIONS as usize
                && bias_bit(biased, position);
            keys.push((k, v, if is_biased { f64::from(BIAS) } else { 0.0 }));
        }
    }
    for new in 0..=token {
        if case.appends {
            let row = ((sequence * case.heads + head) * case.tokens + new) * d;
            keys.push((widen(&step.k[row..][..d]), widen(&step.v[row..][..d]), 0.0));
        }
    }
    attend(case, &widen(&step.q[q..][..d]), &keys)
}

/// Lets the lists of a host's cache grow as the kernel is to.
fn grow(case: &Case, state: &mut State, step: &Step) {
    let d = case.head_dim;
    for sequence in 0..case.lengths.len() {
        // In a paged cache the heads share a length.
        let mut lengths = Vec::new();
        for head in 0..case.heads {
            if !state.has_room(case, sequence, head) {
                state.full |= i32::from(state.is_in_use(case, sequence, head));
                continue;
            }
            let length = state.length(case, sequence, head);
            for token in 0..case.tokens {
                let place = state.place(case, sequence, head, length + token).expect("there is room");
                let row = ((sequence * case.heads + head) * case.tokens + token) * d;
                let rows = [step.k[row..][..d].to_vec(), step.v[row..][..d].to_vec()];
                state.put(&place, &rows, step.positions[sequence * case.tokens + token]);
            }
            lengths.push((state.length_index(case, sequence, head), (length + case.tokens) as i32));
        }
        for (index, length) in lengths {
            state.lengths[index] = length;
        }
    }
}

/// Where the rows of a cache lie.
struct Places {
    /// Of K and V, or of both in the first.
    tensors: [Spread; 2],
    positions: Spread,
    /// Rows, or pages, before those of the host.
    before: usize,
    /// Pages from one of the host's to the next.
    step: usize,
}

impl Places {
    fn new(case: &Case, state: &State) -> Self {
        let (strides, size) = (case.strides(), case.page_size());
        let of_page = size.map(|size| size * case.heads);
        let together = matches!(case.layout, Layout::PagedTogether(_));
        // Bytes of a row of K and V, or of a page, and of its positions.
        let steps = strides.map(|stride| 2 * stride * of_page.unwrap_or(1) * (1 + usize::from(together)));
        let step_positions = 4 * of_page.unwrap_or(1);
        let near = Self { tensors: [Spread::NEAR; 2], positions: Spread::NEAR, before: 0, step: 1 };
        match case.far {
            Some(Far::Lists) => {
                let before = Spread::BEHIND.rows_before(steps[0]);
                let positions = Spread::behind(before * step_positions);
                Self { tensors: [Spread::BEHIND; 2], positions, before, ..near }
            }
            Some(Far::Rows) => {
                let apart = |which: usize| Spread::apart(steps[which], 2 * state.tensors[which].len());
                Self { tensors: [0, 1].map(apart), ..near }
            }
            Some(Far::Positions) => {
                let before = Spread::BEHIND.rows_before(step_positions);
                let step = steps[0] / VECTOR;
                let positions = Spread::BEHIND.at_distances(step_positions, step * step_positions);
                Self { tensors: [Spread::behind(before * VECTOR); 2], positions, before, step }
            }
            Some(Far::Tokens | Far::Bias) | None => near,
        }
    }

    /// A page, or what stands in its place, as a device has it.
    fn page(&self, page: i32) -> i32 {
        if page < 0 { page } else { (self.before + page as usize * self.step) as i32 }
    }
}

/// Bytes from one page to the next where pages share their memory: the least there are.
const VECTOR: usize = 16;

/// Addresses of a cache on a device.
struct OnDevice {
    cache: Cache,
    tensors: [u64; 2],
    places: Places,
    full: u64,
    /// 0 where the workspace is to hold them.
    counters: u64,
    bias: Option<Bias>,
}

impl OnDevice {
    fn new<D: Device>(case: &Case, state: &State, memory: &mut Memory<'_, D>) -> Self {
        let (d, heads) = (case.head_dim as i64, case.heads as i64);
        let places = Places::new(case, state);
        let tensors = [0, 1].map(|which| {
            let tensor: &Vec<u16> = &state.tensors[which];
            let spread = places.tensors[which];
            if tensor.is_empty() { 0 } else { memory.put_spread(bytemuck::cast_slice(tensor), spread) }
        });
        let size = case.page_size().unwrap_or(0) as i64;
        let strides = case.strides();
        let together = matches!(case.layout, Layout::PagedTogether(_));
        let rows = |base, which: usize| {
            let stride = places.tensors[if together { 0 } else { which }].stride(2);
            match case.layout {
                Layout::Ragged | Layout::Apart => {
                    let token_stride = stride.unwrap_or(strides[which] as i64);
                    Rows { base, token_stride, ..Rows::default() }
                }
                Layout::Paged(_) | Layout::PagedTogether(_) => {
                    let of_page = size * heads * d * if together { 2 } else { 1 };
                    let shared = VECTOR as i64 / 2;
                    let sequence_stride = match case.far {
                        Some(Far::Positions) => shared,
                        _ => stride.unwrap_or(of_page),
                    };
                    Rows { base, sequence_stride, head_stride: d, token_stride: heads * d }
                }
            }
        };
        let v = if together { tensors[0] + 2 * (size * heads * d) as u64 } else { tensors[1] };
        let paged = case.page_size().is_some();
        let starts: Vec<_> = state.starts.iter().map(|start| start + places.before as i64).collect();
        let table: Vec<_> = state.table.iter().map(|page| places.page(*page)).collect();
        let positions = match case.positions {
            true => memory.put_spread(bytemuck::cast_slice(&state.positions), places.positions),
            false => 0,
        };
        let mut put = |bytes: &[u8], present: bool| if present { memory.put(bytes) } else { 0 };
        let cache = Cache {
            k: rows(tensors[0], 0),
            v: rows(v, 1),
            starts: put(bytemuck::cast_slice(&starts), !paged && case.starts),
            lengths: put(bytemuck::cast_slice(&state.lengths), true),
            capacities: put(bytemuck::cast_slice(&state.capacities), !paged && case.capacities),
            positions,
            pages: Pages {
                table: put(bytemuck::cast_slice(&table), paged),
                table_pages: state.table_pages as i32,
                pages: places.page(state.pages as i32 - 1) + 1,
                page_size: size as i32,
                reserved: 0,
            },
            rows: if paged { 0 } else { (places.before + state.positions.len()) as i64 },
            capacity: state.capacity(case) as i32,
            sequences: case.lengths.len() as i32,
            heads: case.heads as i32,
            reserved: 0,
        };
        let (head_words, key_words) = bias_words(case);
        let full = put(bytemuck::bytes_of(&state.full), true);
        let counters = put(&case.counter_bytes(), case.counters);
        let bias = case.bias.then(|| {
            let stride = BIASED_POSITIONS.div_ceil(32) as usize;
            let spread = Spread::apart_if(case.far == Some(Far::Bias), 4 * stride, 4 * key_words.len());
            Bias {
                heads: memory.put(bytemuck::cast_slice(&head_words)),
                keys: memory.put_spread(bytemuck::cast_slice(&key_words), spread),
                key_stride: spread.stride(4).unwrap_or(stride as i64),
                value: BIAS,
            }
        });
        Self { cache, tensors, places, full, counters, bias }
    }

    /// Everything that a step may change, against what it should be.
    fn expect<D: Device>(&self, case: &Case, state: &State, memory: &Memory<'_, D>) -> Result<(), String> {
        if self.counters != 0 {
            memory.expect("counters", self.counters, &case.counter_bytes())?;
        }
        let Places { tensors, positions, .. } = &self.places;
        for (which, name) in ["k", "v"].into_iter().enumerate() {
            let tensor = bytemuck::cast_slice(&state.tensors[which]);
            memory.expect_spread(name, self.tensors[which], tensor, tensors[which])?;
        }
        if case.positions {
            let of_host = bytemuck::cast_slice(&state.positions);
            memory.expect_spread("positions", self.cache.positions, of_host, *positions)?;
        }
        memory.expect("lengths", self.cache.lengths, bytemuck::cast_slice(&state.lengths))?;
        memory.expect("full", self.full, bytemuck::bytes_of(&state.full))
    }
}

/// The bytes that a step gave, `[sequence][query head][token]`.
#[derive(Debug, PartialEq)]
struct Outputs {
    out: Vec<u8>,
    lse: Vec<u8>,
}

/// Runs one step. Rows of tensors lie token by token or head by head, as the step's number says.
fn run<D: Device>(
    device: &D,
    memory: &mut Memory<'_, D>,
    case: &Case,
    on: &OnDevice,
    step: &Step,
) -> Result<Outputs, String> {
    let query_heads = case.heads * case.group;
    let (tokens, d) = (case.tokens as u32, case.head_dim as u32);
    let of_head = case.tokens * case.head_dim;
    let spread = |heads: usize| {
        let count = case.lengths.len() * heads;
        let step = if case.lengths.len() > 1 { heads * of_head } else { of_head };
        Spread::apart_if(case.far == Some(Far::Tokens), 2 * step, 2 * count * of_head)
    };
    let rows = |base, heads: usize| {
        let mut rows = Rows::head_major(base, heads as u32, tokens, d);
        let outermost =
            if case.lengths.len() > 1 { &mut rows.sequence_stride } else { &mut rows.head_stride };
        *outermost = spread(heads).stride(2).unwrap_or(*outermost);
        rows
    };
    let put = |memory: &mut Memory<'_, D>, elements: &[u16], heads| {
        rows(memory.put_spread(bytemuck::cast_slice(elements), spread(heads)), heads)
    };
    let new = |memory: &mut Memory<'_, D>, elements: &[u16]| {
        if case.appends { put(memory, elements, case.heads) } else { rows(0, case.heads) }
    };
    let queries = case.lse_queries();
    let lse_bytes = 4 * case.lse_layout.elements(&queries);
    let lse = case.lse_layout.describe(memory.untouched(lse_bytes), &queries);
    let mut work = Decode {
        cache: on.cache,
        q: put(memory, &step.q, query_heads),
        k_new: new(memory, &step.k),
        v_new: new(memory, &step.v),
        out: rows(memory.untouched_spread(2 * step.q.len(), spread(query_heads)), query_heads),
        positions_new: if case.positions { memory.put(bytemuck::cast_slice(&step.positions)) } else { 0 },
        lse: Some(lse),
        full: on.full,
        bias: on.bias,
        bias_positions: BIASED_POSITIONS,
        scale: scale(case),
        query_heads: query_heads as u32,
        tokens,
        head_dim: d,
        dtype: case.dtype,
        counters: on.counters,
        workspace: 0,
        workspace_bytes: 0,
    };
    let counters = decode::decode_counters(&work).map_err(|error| error.to_string())?;
    if 4 * counters != case.counter_bytes().len() {
        return Err(format!("{counters} counters"));
    }
    work.workspace_bytes = decode::decode_workspace(&work).map_err(|error| error.to_string())?;
    work.workspace = memory.reserve(work.workspace_bytes);
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { decode::decode(device, &work) }.map_err(|error| error.to_string())?;
    let out = memory.get_spread(work.out.base, 2 * step.q.len(), spread(query_heads))?;
    let mut stored = memory.get(lse.base, lse_bytes)?;
    let mut of_queries = Vec::new();
    for place in case.lse_layout.places(&queries) {
        let bytes = &mut stored[4 * place..][..4];
        of_queries.extend_from_slice(bytes);
        bytes.fill(UNTOUCHED);
    }
    if stored.iter().any(|byte| *byte != UNTOUCHED) {
        return Err("lse is written where none belongs".into());
    }
    Ok(Outputs { out, lse: of_queries })
}

/// Of a NaN any NaN, of an infinity only itself.
fn is_near(found: f64, expected: f64, error: f64) -> bool {
    if expected.is_nan() {
        return found.is_nan();
    }
    found == expected || expected.is_finite() && (found - expected).abs() <= error
}

fn compare(case: &Case, state: &State, step: &Step, found: &Outputs) -> Result<(), String> {
    let out: Vec<u16> = found.out.chunks_exact(2).map(bytemuck::pod_read_unaligned).collect();
    let lse: Vec<f32> = found.lse.chunks_exact(4).map(bytemuck::pod_read_unaligned).collect();
    for sequence in 0..case.lengths.len() {
        for head in 0..case.heads {
            for in_group in 0..case.group {
                for token in 0..case.tokens {
                    let which = [sequence, head, in_group, token];
                    let expected = expected(case, state, step, which);
                    let row = ((sequence * case.heads + head) * case.group + in_group) * case.tokens + token;
                    let found = lse[row];
                    let [value, error] =
                        [expected.lse, expected.lse_error].map(|natural| case.lse_layout.value(natural));
                    let error = error + 2_f64.powi(-23) * value.abs();
                    if !is_near(found.into(), value, error) {
                        return Err(format!("lse of {which:?}: {found} instead of {value} +- {error:e}"));
                    }
                    for i in 0..case.head_dim {
                        let found = decode_element(case.dtype, out[row * case.head_dim + i]);
                        if !is_near(found, expected.out[i], expected.out_error[i]) {
                            return Err(format!(
                                "out of {which:?} at {i}: {found} instead of {} +- {:e}",
                                expected.out[i], expected.out_error[i]
                            ));
                        }
                    }
                }
            }
        }
    }
    Ok(())
}

/// Runs the steps of a case; compares outputs, and all that the cache holds, after each.
pub(crate) fn check<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    check_from(device, case, State::new(case)).map(drop)
}

fn check_from<D: Device>(device: &D, case: &Case, state: State) -> Result<Vec<Outputs>, String> {
    check_steps(device, case, state, (0..case.steps).map(|number| Step::new(case, number)))
}

fn check_steps<D: Device>(
    device: &D,
    case: &Case,
    mut state: State,
    steps: impl Iterator<Item = Step>,
) -> Result<Vec<Outputs>, String> {
    let mut memory = Memory::new(device);
    let on = OnDevice::new(case, &state, &mut memory);
    steps
        .map(|step| {
            let found = run(device, &mut memory, case, &on, &step)?;
            compare(case, &state, &step, &found)?;
            if case.appends {
                grow(case, &mut state, &step);
            }
            on.expect(case, &state, &memory)?;
            Ok(found)
        })
        .collect()
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("decode_lengths", |device, _| all(lengths(), |case| check(device, case))),
        Check::portable("decode_shapes", |device, _| all(shapes(), |case| check(device, case))),
        Check::portable("decode_paged", |device, _| all(paged(), |case| check(device, case))),
        Check::portable("decode_absent", |device, _| all(absent(), |case| check(device, case))),
        Check::portable("decode_many_lists", |device, _| {
            all(many_lists(), |case| check_from(device, case, full_at_the_end(case)).map(drop))
        }),
        Check::portable("decode_hostile", |device, _| hostile(device)),
        Check::portable("decode_places_not_in_use", |device, _| places_not_in_use(device)),
        Check::portable("decode_infinite_values", |device, _| infinite_values(device)),
        Check::portable("decode_not_seen", |device, _| all(not_seen(), |case| check_not_seen(device, case))),
        Check::portable("decode_contents", |device, _| all(contents(), |case| check_contents(device, case))),
        Check::portable("decode_same_bits", |device, _| same_bits(device)),
        Check::portable("decode_far_apart", |device, _| {
            all(far_apart(), |case| check_far_apart(device, case))
        })
        .far(),
        Check::portable("decode_random", |device, seed| {
            all((0..12).map(|n| Case::random(seed * 12 + n)), |case| check(device, case))
        }),
    ]
}

/// Lists of 0 and 1 entries, a block and a chunk more or less, several chunks, all in one batch; lists
/// that fill up.
fn lengths() -> Vec<Case> {
    let unequal = Case::new(128, 4, &[&[0, 1, 63, 64], &[65, 640, 15, 16], &[17, 127, 128, 0]]);
    vec![
        unequal.clone(),
        Case { dtype: DType::F16, steps: 3, slack: 2, ..unequal.clone() },
        Case { steps: 3, slack: 3, counters: true, ..unequal.clone() },
        Case { tokens: 5, steps: 2, slack: 10, counters: true, ..unequal.clone() },
        Case { appends: false, ..unequal },
        // 64 blocks and the new key: chunks of four blocks, the last with one key; chunks of three, and of five.
        Case::new(64, 1, &[&[4096], &[4095]]),
        Case::new(64, 1, &[&[2100], &[64 * 256]]),
        Case { slack: 0, ..Case::new(64, 2, &[&[0, 64], &[100, 3]]) },
        // Chunks of two tiles, whose maxima differ by more than f16 can hold.
        Case { rising: true, ..Case::new(64, 4, &[&[1100], &[70]]) },
        Case { rising: true, dtype: DType::F16, layout: Layout::Apart, ..Case::new(64, 16, &[&[1100, 70]]) },
    ]
}

/// Head sizes, GQA groups, several tokens at once.
fn shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    // Every group that there is.
    for (group, head_dim) in (1..=16).zip([64, 96, 128, 256].into_iter().cycle()) {
        cases.push(Case { bias: true, ..Case::new(head_dim, group, &[&[70, 5], &[33, 130]]) });
    }
    for (tokens, group) in [(2, 1), (3, 4), (8, 1), (8, 7), (5, 16)] {
        for appends in [false, true] {
            let case = Case::new(64, group, &[&[60, 2], &[0, 125]]);
            cases.push(Case { tokens, appends, slack: tokens + 3, steps: 2, bias: true, ..case });
        }
    }
    cases
}

fn paged() -> Vec<Case> {
    let case = Case { slack: 3, steps: 2, ..Case::new(64, 4, &[&[70, 70], &[0, 0], &[129, 129]]) };
    let mut cases = Vec::new();
    for layout in [Layout::Paged(16), Layout::Paged(1), Layout::Paged(5), Layout::PagedTogether(8)] {
        for holes in [false, true] {
            cases.push(Case { layout, holes, bias: holes, ..case.clone() });
        }
    }
    // Holes among pages that are copied whole.
    for layout in [Layout::Paged(16), Layout::PagedTogether(32)] {
        cases.push(Case { layout, holes: true, ..Case::new(64, 4, &[&[400, 400], &[333, 333]]) });
    }
    // The second token of the second sequence has no page.
    cases.push(Case { layout: Layout::Paged(8), tokens: 2, slack: 2, holes: true, ..case });
    cases
}

/// A cache that says less of its lists, biased by positions or by entries.
fn absent() -> Vec<Case> {
    let ragged =
        Case { slack: 2, steps: 2, bias: true, ..Case::new(64, 3, &[&[20, 3], &[0, 130], &[66, 7]]) };
    let paged = Case { layout: Layout::Paged(16), holes: true, ..ragged.clone() };
    let mut cases = vec![Case { positions: false, tokens: 2, slack: 4, ..paged }];
    for (starts, capacities) in [(true, false), (false, true), (false, false)] {
        for positions in [true, false] {
            cases.push(Case { starts, capacities, positions, ..ragged.clone() });
        }
    }
    cases.push(Case { positions: false, ..ragged.clone() });
    cases.push(Case { starts: false, capacities: false, appends: false, layout: Layout::Apart, ..ragged });
    cases
}

/// More than two lists for each thread of a block, which find where its work begins, and more lengths than threads.
fn many_lists() -> Vec<Case> {
    let mut cases = Vec::new();
    for (head_dim, sequences, dtype) in [(64, 131, DType::BF16), (256, 71, DType::F16)] {
        let mut random = Random(head_dim as u64);
        let lengths = (0..sequences).map(|n| match n {
            _ if n == sequences - 1 => vec![0; 2],
            _ => (0..2).map(|_| random.of(&[0, 0, 1, 3, 9, 15, 17, 40, 140])).collect(),
        });
        let case = Case {
            dtype,
            lengths: lengths.collect(),
            slack: 2,
            steps: 2,
            seeds: (1..=sequences).collect(),
            ..Case::new(head_dim, 2, &[&[0, 0]])
        };
        cases.extend([Layout::Ragged, Layout::Paged(8)].map(|layout| Case { layout, ..case.clone() }));
    }
    cases
}

/// The cache of a case whose last lists are empty and have no room.
fn full_at_the_end(case: &Case) -> State {
    let mut state = State::new(case);
    match case.page_size() {
        Some(_) => state.table[(case.lengths.len() - 1) * state.table_pages] = -1,
        None => state.capacities[case.lists() - 1] = 0,
    }
    state
}

/// Lists, rows, pages and tokens further apart than 32 bits count, and table entries as large.
fn far_apart() -> Vec<(Far, Case)> {
    let ragged = Case { steps: 2, slack: 2, ..Case::new(64, 2, &[&[70, 3], &[20, 300]]) };
    let paged = Case {
        layout: Layout::Paged(16),
        holes: true,
        steps: 2,
        slack: 4,
        ..Case::new(64, 2, &[&[70, 70], &[33, 33]])
    };
    let together = Case { layout: Layout::PagedTogether(16), ..paged.clone() };
    let biased = |case: &Case| Case { bias: true, ..case.clone() };
    let one = Case { tokens: 2, slack: 2, ..Case::new(128, 4, &[&[70, 3]]) };
    vec![
        (Far::Lists, ragged.clone()),
        (Far::Lists, paged.clone()),
        (Far::Lists, biased(&together)),
        (Far::Rows, ragged.clone()),
        (Far::Rows, Case { layout: Layout::Apart, tokens: 3, slack: 4, ..biased(&ragged) }),
        // As few rows as a warp takes together (no other stands before these), and fewer: the strides are as large as there
        // is room for.
        (Far::Rows, Case { appends: false, slack: 0, seeds: vec![3], ..Case::new(64, 2, &[&[16]]) }),
        (Far::Rows, Case { slack: 0, ..Case::new(256, 1, &[&[2]]) }),
        (Far::Rows, Case { holes: false, ..paged.clone() }),
        (Far::Rows, together),
        (Far::Tokens, Case { steps: 1, ..ragged.clone() }),
        (Far::Tokens, one),
        (Far::Bias, biased(&ragged)),
        // Nothing is appended to pages that share their memory.
        (Far::Positions, Case { appends: false, ..biased(&paged) }),
    ]
}

/// A case close together, then with the same bits far apart.
fn check_far_apart<D: Device>(device: &D, (far, case): &(Far, Case)) -> Result<(), String> {
    let expected = check_from(device, case, State::new(case))?;
    let apart = Case { far: Some(*far), ..case.clone() };
    let found = check_from(device, &apart, State::new(&apart))?;
    if found == expected { Ok(()) } else { Err("other bits than close together".to_owned()) }
}

/// Places of a batch without a sequence: nothing is written there, and nothing is full.
fn places_not_in_use<D: Device>(device: &D) -> Result<(), String> {
    let lengths: &[&[usize]] = &[&[20, 20], &[0, 0], &[70, 70], &[0, 0]];
    let case = Case { steps: 2, slack: 4, counters: true, ..Case::new(64, 4, lengths) };
    for layout in [Layout::Ragged, Layout::Paged(8)] {
        let case = Case { layout, ..case.clone() };
        let mut state = State::new(&case);
        let lists = state.lengths.len() / lengths.len();
        for sequence in [1, 3] {
            state.lengths[sequence * lists..][..lists].fill(-1);
            let pages = state.table_pages;
            state.table[sequence * pages..][..pages].fill(-1);
        }
        check_from(device, &case, state).map_err(|error| format!("{error}\n{layout:?}"))?;
    }
    Ok(())
}

/// Lengths, starts and capacities that make no sense: clipped lists, and nothing beside them is touched.
fn hostile<D: Device>(device: &D) -> Result<(), String> {
    let case = Case { slack: 4, ..Case::new(64, 2, &[&[20, 20, 20], &[70, 20, 20]]) };
    type Change = fn(&mut State);
    let changes: [Change; 6] = [
        |state| state.lengths[1] = -7,
        |state| state.lengths[4] = i32::MIN,
        |state| state.starts[2] = -1,
        |state| state.starts[0] = i64::MIN,
        |state| (state.starts[3], state.lengths[3]) = (i64::MAX, 3),
        |state| state.capacities[5] = i32::MIN,
    ];
    for (number, change) in changes.into_iter().enumerate() {
        let mut state = State::new(&case);
        change(&mut state);
        check_from(device, &case, state).map_err(|error| format!("{error}\nchange {number}"))?;
    }
    // Longer than the list's room: everything there is seen, and nothing can be appended.
    let full = Case { slack: 0, ..case };
    let mut state = State::new(&full);
    state.lengths[3] = i32::MAX;
    state.lengths[0] = 21;
    check_from(device, &full, state).map(drop)
}

/// An infinite value among the last keys makes its column infinite, whatever the number of chunks before it.
fn infinite_values<D: Device>(device: &D) -> Result<(), String> {
    for length in [100, 200, 300, 450] {
        let case = Case::new(64, 2, &[&[length]]);
        let mut state = State::new(&case);
        let place = state.place(&case, 0, 0, length - 1).ok_or("an entry")?;
        let (tensor, element) = place.rows[1];
        state.tensors[tensor][element + 5] = bf16::INFINITY.to_bits();
        check_from(device, &case, state).map_err(|error| format!("{error}\n{length} entries"))?;
    }
    Ok(())
}

/// A key of a list, or the key of a new token behind it.
#[derive(Clone, Copy)]
struct Key {
    sequence: usize,
    head: usize,
    index: usize,
    /// The new token whose key it is.
    token: Option<usize>,
}

/// Lets `change` have every key that is there, with its value.
fn rewrite(
    case: &Case,
    state: &mut State,
    step: &mut Step,
    change: impl Fn(Key, &mut [u16], &mut [u16], &mut [u16]),
) {
    let (d, tokens, group) = (case.head_dim, case.tokens, case.group);
    for sequence in 0..case.lengths.len() {
        for head in 0..case.heads {
            let list = sequence * case.heads + head;
            let queries = &mut step.q[list * group * tokens * d..][..group * tokens * d];
            let length = state.length(case, sequence, head);
            let count = length + if case.appends { tokens } else { 0 };
            for index in 0..count {
                let key = Key { sequence, head, index, token: (index + tokens).checked_sub(count) };
                if index >= length {
                    let row = (list * tokens + index - length) * d;
                    change(key, &mut step.k[row..][..d], &mut step.v[row..][..d], queries);
                } else if let Some(place) = state.place(case, sequence, head, index) {
                    let mut rows =
                        place.rows.map(|(tensor, element)| state.tensors[tensor][element..][..d].to_vec());
                    let [k, v] = &mut rows;
                    change(key, k, v, queries);
                    let position = state.positions[place.position];
                    state.put(&place, &rows, position);
                }
            }
        }
    }
}

/// Several tokens whose keys lie with one warp, with two, on both sides of a chunk's end, and alone in a list; with
/// those before them in the list already, too.
fn not_seen() -> Vec<Case> {
    let ragged: &[&[usize]] = &[&[61, 0], &[13, 90]];
    let paged: &[&[usize]] = &[&[61, 61], &[9, 9]];
    let mut cases = Vec::new();
    for (n, tokens) in (2..=8).enumerate() {
        let layout =
            [Layout::Ragged, Layout::Paged(16), Layout::Apart, Layout::Paged(5), Layout::PagedTogether(8)]
                [n % 5];
        let (head_dim, group) = [(64, 2), (128, 4), (96, 3), (256, 2)][n % 4];
        let lengths = if matches!(layout, Layout::Ragged | Layout::Apart) { ragged } else { paged };
        let case =
            Case { layout, tokens, slack: tokens, bias: n % 3 == 1, ..Case::new(head_dim, group, lengths) };
        for dtype in [DType::F16, DType::BF16] {
            let appends = (dtype == DType::F16) == (n % 2 == 0);
            cases.push(Case { dtype, appends, ..case.clone() });
        }
        cases.push(Case { holes: true, ..case });
    }
    cases
}

/// NaN and infinities in keys and values of tokens that earlier ones do not see. Values leave everything else as it
/// was, bit for bit. An infinite key may move the maxima of rows that share a warp with it: these are as exact.
fn check_not_seen<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    const PLANTED: [f32; 3] = [f32::INFINITY, f32::NAN, f32::NEG_INFINITY];
    let d = case.head_dim;
    let fresh = || (State::new(case), Step::new(case, 0));
    let run =
        |state, step| check_steps(device, case, state, [step].into_iter()).map(|mut found| found.remove(0));
    let (state, step) = fresh();
    let usual = all_expected(case, &state, &step);
    let without = run(state, step)?;
    for in_keys in [false, true] {
        let (mut state, mut step) = fresh();
        rewrite(case, &mut state, &mut step, |key, k, v, _| {
            let Some(token @ 1..) = key.token else { return };
            let value = |n: usize| encode_element(case.dtype, PLANTED[(n + key.sequence) % 3]);
            if in_keys {
                k[(11 * token) % d] = value(token + key.head);
                return;
            }
            v[(7 * token + 3 * key.head) % d] = value(token);
            // Rows that see two of these have NaN.
            v[d - 1] = value(2 * token);
        });
        let expected = all_expected(case, &state, &step);
        if expected.iter().all(|expected| expected.is_finite()) {
            return Err("no row sees what is not finite".to_owned());
        }
        let found = run(state, step)?;
        let out = found.out.chunks_exact(2).zip(without.out.chunks_exact(2)).zip(expected.iter().zip(&usual));
        for (at, ((found, without), (expected, usual))) in out.enumerate() {
            if !in_keys && expected == usual && found != without {
                return Err(format!("out[{at}] changed, which sees nothing that did"));
            }
        }
        if !in_keys && found.lse != without.lse {
            return Err("the LSE changed by values".to_owned());
        }
    }
    Ok(())
}

/// Every element of the output, as it lies there.
fn all_expected(case: &Case, state: &State, step: &Step) -> Vec<f64> {
    let rows = case.lists() * case.group;
    (0..rows * case.tokens)
        .flat_map(|row| {
            let (of_heads, token) = (row / case.tokens, row % case.tokens);
            let (list, in_group) = (of_heads / case.group, of_heads % case.group);
            expected(case, state, step, [list / case.heads, list % case.heads, in_group, token]).out
        })
        .collect()
}

/// Contents that draws do not give.
#[derive(Clone, Copy, Debug)]
enum Contents {
    EqualKeys,
    /// Every third key has an element of -inf where queries are positive: its probability is 0.
    LeftOut,
    /// So has every key.
    AllLeftOut,
    /// Subnormal numbers in keys and values.
    Subnormal,
    /// A NaN in a key of one list that all tokens see.
    NanKey,
    /// NaN in everything.
    Nan,
}

fn contents() -> Vec<(Case, Contents)> {
    use Contents::{AllLeftOut, EqualKeys, LeftOut, Nan, NanKey, Subnormal};
    let mut cases = Vec::new();
    for (n, contents) in [EqualKeys, LeftOut, AllLeftOut, Subnormal, NanKey, Nan].into_iter().enumerate() {
        for (m, dtype) in [DType::F16, DType::BF16].into_iter().enumerate() {
            let (head_dim, group) = [(64, 4), (96, 5), (128, 2), (256, 3)][(n + m) % 4];
            let tokens = [1, 3][m];
            let case =
                Case { dtype, tokens, slack: tokens, ..Case::new(head_dim, group, &[&[150, 7], &[33, 64]]) };
            cases.push((case.clone(), contents));
            let lengths: &[&[usize]] = &[&[150, 150], &[20, 20]];
            let paged = Case::new(head_dim, group, lengths);
            cases.push((Case { layout: Layout::Paged(16), lengths: paged.lengths, ..case }, contents));
        }
    }
    cases
}

fn check_contents<D: Device>(device: &D, (case, contents): &(Case, Contents)) -> Result<(), String> {
    const COLUMN: usize = 21;
    let (mut state, mut step) = (State::new(case), Step::new(case, 0));
    let first = step.k[..case.head_dim].to_vec();
    rewrite(case, &mut state, &mut step, |key, k, v, queries| match contents {
        Contents::EqualKeys => k.copy_from_slice(&first),
        Contents::LeftOut if key.index % 3 != 1 => {}
        Contents::LeftOut | Contents::AllLeftOut => {
            k[COLUMN] = encode_element(case.dtype, f32::NEG_INFINITY);
            for row in queries.chunks_mut(case.head_dim) {
                row[COLUMN] = encode_element(case.dtype, 0.5);
            }
        }
        // The bits of an exponent are left out.
        Contents::Subnormal => {
            k.iter_mut().chain(v).for_each(|x| *x &= if case.dtype == DType::F16 { 0x83FF } else { 0x807F })
        }
        Contents::NanKey => {
            if (key.sequence, key.head, key.index) == (0, 1, 3) {
                k[COLUMN] = encode_element(case.dtype, f32::NAN);
            }
        }
        Contents::Nan => {
            for x in k.iter_mut().chain(v).chain(queries) {
                *x = encode_element(case.dtype, f32::NAN);
            }
        }
    });
    check_steps(device, case, state, [step].into_iter()).map(drop)
}

/// A sequence gives the same bits alone as in a batch, and on devices of other sizes.
fn same_bits<D: Device>(device: &D) -> Result<(), String> {
    let batch =
        Case { steps: 2, slack: 2, ..Case::new(128, 4, &[&[3, 200], &[300, 64], &[0, 1], &[65, 90]]) };
    let found = check_from(device, &batch, State::new(&batch))?;
    for processors in [1, 3, 50] {
        let other = Processors { device, count: processors };
        if check_from(&other, &batch, State::new(&batch))? != found {
            return Err(format!("other bits with {processors} multiprocessors"));
        }
    }
    for sequence in 0..batch.lengths.len() {
        let alone = Case {
            lengths: vec![batch.lengths[sequence].clone()],
            seeds: vec![batch.seeds[sequence]],
            ..batch.clone()
        };
        for (batch, alone) in found.iter().zip(check_from(device, &alone, State::new(&alone))?) {
            let part = |all: &[u8], own: &[u8]| all[sequence * own.len()..][..own.len()] == *own;
            if !part(&batch.out, &alone.out) || !part(&batch.lse, &alone.lse) {
                return Err(format!("other bits of sequence {sequence} alone"));
            }
        }
    }
    Ok(())
}
