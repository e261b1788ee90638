//! Selections: descriptions of work, the definition in plain f64 loops, and a run on a device.

use fastkv::{
    abi::{self, Pooling},
    kernels::{
        Device,
        batch::{self, ScoreRows},
        scores::{self, PoolScores},
        select::{self, Form, Reduction, SelectTopk},
    },
};

use super::{
    Check, all,
    memory::{Memory, Spread},
    random::Random,
};

/// How a device learns the keys of each sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lengths {
    /// All sequences have `keys`.
    Same,
    Listed,
    /// By the boundaries of a packed batch.
    Cumulative,
}

/// One selection. Names are those of [`SelectTopk`].
#[derive(Clone)]
pub(crate) struct Case {
    pub(crate) lengths: Lengths,
    /// Keys of each sequence as the device is told, and so perhaps out of range.
    pub(crate) tokens: Vec<i32>,
    pub(crate) keys: usize,
    pub(crate) rows: usize,
    pub(crate) groups: usize,
    pub(crate) heads: usize,
    pub(crate) window: usize,
    pub(crate) tail: usize,
    pub(crate) sinks: usize,
    pub(crate) pooling: Pooling,
    pub(crate) reduction: Reduction,
    pub(crate) page: usize,
    /// One for all rows, or one for each, as the device is told.
    pub(crate) counts: Vec<i32>,
    pub(crate) capacity: usize,
    /// Elements before the first row of scores.
    pub(crate) offset: usize,
    /// Elements from one row of scores to the next.
    pub(crate) stride: usize,
    /// Whether rows of scores lie far apart.
    pub(crate) far: bool,
    /// Scores of each score head of each sequence, as many as a sequence of `keys` has.
    pub(crate) scores: Vec<Vec<f32>>,
    /// How far scores that the kernel reduces may be from exact ones, relatively.
    pub(crate) tolerance: f64,
}

impl std::fmt::Debug for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { lengths, tokens, keys, rows, groups, heads, window, tail, sinks, .. } = self;
        let Self { pooling, reduction, page, counts, capacity, offset, stride, .. } = self;
        write!(
            f,
            "{tokens:?} of {keys} keys ({lengths:?}), {rows} rows of {groups} x {heads} heads, window {window}, tail {tail}, \
             sinks {sinks}, {pooling:?}, {reduction:?}, page {page}, keep {counts:?}, capacity {capacity}, \
             offset {offset}, stride {stride}"
        )
    }
}

/// Rank of an item: NaN, numbers, items that are kept in any case.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Rank {
    Nan,
    Number(f64),
    Forced,
}

impl Rank {
    fn of(score: f64) -> Self {
        if score.is_nan() { Self::Nan } else { Self::Number(score) }
    }

    /// Whether it may stand before `other` if scores are only known to this relative error.
    fn may_precede(self, other: Self, tolerance: f64) -> bool {
        match (self, other) {
            (Self::Number(a), Self::Number(b)) => a >= b || a * (1.0 + tolerance) >= b * (1.0 - tolerance),
            _ => self >= other,
        }
    }
}

impl Case {
    /// Rows with the same number of scored keys and nothing special, one for each list of scores.
    pub(crate) fn plain(scores: Vec<Vec<f32>>, counts: Vec<i32>) -> Self {
        let keys = scores[0].len();
        Self {
            lengths: Lengths::Same,
            tokens: vec![keys as i32],
            keys,
            rows: scores.len(),
            groups: 1,
            heads: 1,
            window: 0,
            tail: 0,
            sinks: 0,
            pooling: Pooling::NONE,
            reduction: Reduction::Sum,
            page: 1,
            capacity: counts.iter().copied().max().unwrap_or(0).max(0) as usize,
            counts,
            offset: 0,
            stride: keys.next_multiple_of(4),
            far: false,
            scores,
            tolerance: 0.0,
        }
    }

    /// The same for small whole numbers, which are often equal, and which any reduction keeps exact.
    pub(crate) fn whole(
        seed: u64,
        [sequences, rows, groups, heads, keys]: [usize; 5],
        pooling: Pooling,
        counts: Vec<i32>,
    ) -> Self {
        let mut random = Random(seed);
        // Multiples of the kernel, so that a mean is whole too.
        let mut score = || (random.below(12) as i32 - 4) as f32 * pooling.kernel as f32;
        let scores =
            (0..sequences * rows * groups * heads).map(|_| (0..keys).map(|_| score()).collect()).collect();
        let tokens = vec![keys as i32; sequences];
        Self { tokens, rows, groups, heads, pooling, ..Self::plain(scores, counts) }
    }

    /// Probabilities as a softmax leaves them: a few large ones, many that are tiny.
    pub(crate) fn softmax(seed: u64, shape: [usize; 5], pooling: Pooling, counts: Vec<i32>) -> Self {
        let mut random = Random(seed);
        let case = Self::whole(seed, shape, pooling, counts);
        let mut score = || {
            let logit = f64::from(random.symmetric() + random.symmetric() + random.symmetric()) * 8.0;
            (logit - 20.0).exp() as f32
        };
        let scores = case.scores.iter().map(|row| row.iter().map(|_| score()).collect()).collect();
        // One rounding of 2^-24 for each sum, one for the division; all terms are positive. Where there is
        // nothing to add there is nothing to round.
        let roundings = match (case.pooling.kind, case.groups * case.heads) {
            (abi::POOLING_MAX, 1) => 0,
            _ => case.pooling.kernel as usize + 1 + case.heads + case.groups,
        };
        Self { scores, tolerance: roundings as f64 * 1.01 * 2_f64.powi(-24), ..case }
    }

    /// Everything that may vary, drawn from `seed`.
    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let kernel = random.of(&[1, 1, 3, 5, 7, 7, 13, 63]);
        let pooling = random.of(&[Pooling::max(kernel), Pooling::average(kernel)]);
        let keys = match random.below(4) {
            0 => random.below(20),
            1 => 4090 + random.below(12),
            _ => random.below(1500),
        };
        let sequences = 1 + random.below(3);
        let shape =
            [sequences, 1 + random.below(3), random.of(&[1, 1, 2, 3]), random.of(&[1, 1, 2, 4]), keys];
        let page = random.of(&[1, 1, 1, 2, 3, 16, 64, 300]);
        let mut count = || random.below(2 * keys.div_ceil(page) + 3) as i32 * 3 / 5 - 1;
        let counts: Vec<_> = (0..sequences * shape[1]).map(|_| count()).collect();
        let counts = if count() % 2 == 0 { vec![counts[0].max(0)] } else { counts };
        let window = random.below(20);
        let part = random.below(window + 1);
        let stride = keys.next_multiple_of(4) + random.of(&[0, 0, 4, 1, 3]);
        let case = if random.below(2) == 0 {
            Self::whole(seed, shape, pooling, counts)
        } else {
            Self::softmax(seed, shape, pooling, counts)
        };
        let tokens = (0..sequences)
            .map(|_| match random.below(4) {
                0 => keys as i32,
                1 => random.below(keys + 1).min(20) as i32,
                _ => random.below(keys + 1) as i32,
            })
            .collect();
        Self {
            lengths: random.of(&[Lengths::Listed, Lengths::Cumulative]),
            tokens,
            window,
            tail: random.of(&[0, part, window]),
            sinks: random.of(&[0, 0, 4, 9]),
            reduction: random.of(&[Reduction::Sum, Reduction::Max]),
            page,
            capacity: random.below(keys.div_ceil(page) + 9),
            offset: random.below(4),
            stride,
            ..case
        }
    }

    fn all_rows(&self) -> usize {
        self.tokens.len() * self.rows
    }

    /// Scored keys of a sequence, and the ones it chooses from.
    fn extent(&self, sequence: usize) -> (usize, usize) {
        let length = match self.lengths {
            Lengths::Same => self.keys,
            Lengths::Listed | Lengths::Cumulative => (self.tokens[sequence].max(0) as usize).min(self.keys),
        };
        let scored = length.saturating_sub(self.window);
        (scored, length.min(scored + self.tail))
    }

    /// What a score head has for the first `scored` keys, pooled: stride 1, half the kernel on either side.
    fn pooled(&self, head: usize, scored: usize) -> Vec<f64> {
        let scores: Vec<f64> = self.scores[head][..scored].iter().map(|score| f64::from(*score)).collect();
        let reach = self.pooling.kernel as usize / 2;
        if reach == 0 {
            return scores;
        }
        (0..scored)
            .map(|key| {
                let near = &scores[key.saturating_sub(reach)..scored.min(key + reach + 1)];
                if self.pooling.kind == abi::POOLING_MAX {
                    near.iter().copied().fold(f64::NEG_INFINITY, f64::max)
                } else {
                    near.iter().sum::<f64>() / f64::from(self.pooling.kernel)
                }
            })
            .collect()
    }

    /// Ranks of the items of a row.
    fn ranks(&self, row: usize) -> Vec<Rank> {
        let (scored, keys) = self.extent(row / self.rows);
        let group = |number: usize| {
            let heads =
                (number * self.heads..(number + 1) * self.heads).map(|head| self.pooled(head, scored));
            heads.reduce(|sum, head| sum.iter().zip(head).map(|(a, b)| a + b).collect()).expect("a head")
        };
        let groups: Vec<Vec<f64>> = (row * self.groups..(row + 1) * self.groups).map(group).collect();
        let rank = |key: usize| {
            if key < self.sinks || key >= scored {
                return Rank::Forced;
            }
            let scores = groups.iter().map(|group| group[key]);
            Rank::of(match self.reduction {
                Reduction::Sum => scores.sum(),
                Reduction::Max => scores.fold(f64::NAN, f64::max),
            })
        };
        let keys: Vec<_> = (0..keys).map(rank).collect();
        let best =
            |page: &[Rank]| page.iter().fold(Rank::Nan, |best, rank| if *rank > best { *rank } else { best });
        keys.chunks(self.page).map(best).collect()
    }

    fn count(&self, row: usize, items: usize) -> usize {
        let count = self.counts[if self.counts.len() == 1 { 0 } else { row }].max(0) as usize;
        count.min(items).min(self.capacity)
    }

    /// Whether `kept` is what a row should keep: the best by a stable sort, or, where scores are rounded,
    /// nothing that may not be among the best.
    fn check_row(&self, row: usize, kept: &[i32], length: i32) -> Result<(), String> {
        let ranks = self.ranks(row);
        let count = self.count(row, ranks.len());
        if length != count as i32 || kept[count..].iter().any(|index| *index != -1) {
            return Err(format!("row {row} keeps {length}, not {count}, and ends in {:?}", &kept[count..]));
        }
        let mut order: Vec<_> = (0..ranks.len() as i32).collect();
        let rank = |item: &i32| ranks[*item as usize];
        order.sort_by(|a, b| rank(b).partial_cmp(&rank(a)).expect("NaN has a rank of its own"));
        let mut best = order[..count].to_vec();
        best.sort_unstable();
        let Some(at) = (0..count).find(|at| kept[*at] != best[*at]) else {
            return Ok(());
        };
        let (kept, dropped): (Vec<i32>, Vec<i32>) =
            (0..ranks.len() as i32).partition(|item| kept[..count].binary_search(item).is_ok());
        let worst = |a: Rank, b: Rank| if b < a { b } else { a };
        let better = |a: Rank, b: Rank| if b > a { b } else { a };
        let kept_from = kept.iter().map(rank).fold(Rank::Forced, worst);
        let dropped_to = dropped.iter().map(rank).fold(Rank::Nan, better);
        if kept.len() == count && self.tolerance > 0.0 && kept_from.may_precede(dropped_to, self.tolerance) {
            return Ok(());
        }
        Err(format!("row {row} keeps {:?} at {at} of {count}, not {}", kept.get(at), best[at]))
    }

    /// Uploads the scores and lists and describes the work.
    fn work<D: Device>(&self, memory: &mut Memory<'_, D>) -> SelectTopk {
        let heads = self.rows * self.groups * self.heads;
        // What no selection may look at is larger than all it may; nothing lies behind the last row.
        let end = self.scores.len() * self.stride + self.keys - self.stride;
        let mut scores = vec![f32::MAX; self.offset + end];
        for (row, of_row) in self.scores.iter().enumerate() {
            scores[self.offset + row * self.stride..][..of_row.len()].copy_from_slice(of_row);
        }
        let spread = Spread::apart_if(self.far, 4 * self.stride, 4 * scores.len());
        let stride = spread.stride(4).unwrap_or(self.stride as i64);
        let mut put = |values: &[i32]| memory.put(bytemuck::cast_slice(values));
        let listed = self.lengths == Lengths::Listed;
        let lengths = if listed { put(&self.tokens) } else { 0 };
        let cumulative: Vec<i32> = (0..=self.tokens.len())
            .map(|n| self.tokens[..n].iter().fold(0_i32, |sum, tokens| sum.wrapping_add(*tokens)))
            .collect();
        let longest = self.keys as u32;
        let keys = match self.lengths {
            Lengths::Same | Lengths::Listed => batch::Lengths::dense(longest),
            Lengths::Cumulative => batch::Lengths::packed(put(&cumulative), longest, longest),
        };
        let counts = if self.counts.len() == 1 { 0 } else { put(&self.counts) };
        SelectTopk {
            scores: ScoreRows {
                base: memory.put_spread(bytemuck::cast_slice(&scores), spread) + 4 * self.offset as u64,
                sequence_stride: heads as i64 * stride,
                head_stride: stride,
            },
            sequences: self.tokens.len() as u32,
            rows: self.rows as u32,
            groups: self.groups as u32,
            heads: self.heads as u32,
            keys,
            lengths,
            window: self.window as u32,
            tail: self.tail as u32,
            sinks: self.sinks as u32,
            pooling: self.pooling,
            reduction: self.reduction,
            page: self.page as u32,
            count: self.counts[0].max(0) as u32,
            counts,
            kept: memory.untouched(self.all_rows() * self.capacity * 4),
            kept_lengths: memory.untouched(self.all_rows() * 4),
            capacity: self.capacity as u32,
            workspace: 0,
            workspace_bytes: 0,
            form: None,
        }
    }

    /// What a device keeps: indices and lengths of all rows.
    fn run<D: Device>(&self, device: &D, form: Option<Form>) -> Result<(Vec<i32>, Vec<i32>), String> {
        let mut memory = Memory::new(device);
        let mut work = SelectTopk { form, ..self.work(&mut memory) };
        work.workspace_bytes =
            select::select_topk_workspace(device, &work).map_err(|error| error.to_string())?;
        work.workspace = memory.reserve(work.workspace_bytes);
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { select::select_topk(device, &work) }.map_err(|error| error.to_string())?;
        let read = |address, elements| Ok::<_, String>(ints(&memory.get(address, elements * 4)?));
        Ok((read(work.kept, self.all_rows() * self.capacity)?, read(work.kept_lengths, self.all_rows())?))
    }

    /// A row as a batch of its own.
    fn row(&self, row: usize) -> Self {
        let heads = self.groups * self.heads;
        Self {
            tokens: vec![self.tokens[row / self.rows]],
            rows: 1,
            counts: vec![self.counts[if self.counts.len() == 1 { 0 } else { row }]],
            scores: self.scores[row * heads..(row + 1) * heads].to_vec(),
            ..self.clone()
        }
    }
}

/// That pooling on the way into a selection and pooling before it give the same bits, for kv heads and for
/// the sum over them. All keys would be equal but for rounding: for a mean every reach holds the same
/// scores in another order, for a maximum the heads of a key do.
fn check_fused<D: Device>(device: &D) -> Result<(), String> {
    const KEYS: usize = 400;
    const HEADS: usize = 12;
    let mut random = Random(11);
    let values: Vec<f32> = (0..HEADS * 5).map(|_| random.symmetric()).collect();
    for (pooling, rows) in
        [(Pooling::max(7), 3), (Pooling::max(7), 1), (Pooling::average(5), 3), (Pooling::NONE, 1)]
    {
        let score = |head: usize, key: usize| match pooling.kind {
            abi::POOLING_AVERAGE => values[head * 5 + key % 5],
            _ => values[head / 4 * 4 + (head + key / 40) % 4],
        };
        let scores = (0..2 * HEADS).map(|head| (0..KEYS).map(|key| score(head % HEADS, key)).collect());
        let plain = Case { tokens: vec![KEYS as i32; 2], ..Case::plain(scores.collect(), vec![100]) };
        let case = Case { rows, groups: 3 / rows, heads: 4, pooling, ..plain.clone() };

        let mut memory = Memory::new(device);
        let elements = 2 * rows * KEYS;
        let base = memory.untouched(elements * 4);
        let out = ScoreRows { base, sequence_stride: (rows * KEYS) as i64, head_stride: KEYS as i64 };
        let work = PoolScores {
            scores: case.work(&mut memory).scores,
            sequences: 2,
            query_heads: HEADS as u32,
            kv_heads: 3,
            keys: batch::Lengths::dense(KEYS as u32),
            pooling,
            groups: (rows == 3).then_some(out),
            total: (rows == 1).then_some(out),
            ..Default::default()
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { scores::pool_scores(device, &work) }.map_err(|error| error.to_string())?;
        let pooled: Vec<f32> =
            ints(&memory.get(base, elements * 4)?).iter().map(|bits| f32::from_bits(*bits as u32)).collect();
        let apart = Case { rows, scores: pooled.chunks(KEYS).map(<[f32]>::to_vec).collect(), ..plain };
        if case.run(device, Some(Form::Block))? != apart.run(device, Some(Form::Block))? {
            return Err(format!("{pooling:?}, {rows} rows: pooled apart, other keys are kept"));
        }
    }
    Ok(())
}

fn ints(bytes: &[u8]) -> Vec<i32> {
    bytes.chunks_exact(4).map(|bytes| i32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

/// Whether a device has a form at all.
fn has<D: Device>(device: &D, form: Form) -> bool {
    form != Form::Cluster || device.compute_capability() == (9, 0)
}

/// Runs cases in a form and checks every row.
pub(crate) fn check<D: Device>(device: &D, form: Form, cases: Vec<Case>) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    all(cases, |case| {
        let (kept, lengths) = case.run(device, Some(form))?;
        (0..case.all_rows()).try_for_each(|row| {
            case.check_row(row, &kept[row * case.capacity..(row + 1) * case.capacity], lengths[row])
        })
    })
}

/// That each row of a batch keeps what it keeps alone, as another form does it.
fn check_alone<D: Device>(device: &D, form: Form, cases: Vec<Case>) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    all(cases, |case| {
        let (kept, lengths) = case.run(device, Some(form))?;
        (0..case.all_rows()).try_for_each(|row| {
            let alone = case.row(row).run(device, Some(Form::Block))?;
            let kept = kept[row * case.capacity..(row + 1) * case.capacity].to_vec();
            let differs = || format!("row {row} keeps something else alone");
            if (kept, vec![lengths[row]]) == alone { Ok(()) } else { Err(differs()) }
        })
    })
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    use Form::{Block, Cluster, Grid};
    vec![
        Check::portable("select_block_sizes", |device, _| {
            // The last is long enough that a thread asks for several vectors at once.
            check(device, Block, sizes(&[0, 1, 2, 3, 4, 5, 2047, 2048, 2049, 4100, 8191]))
        }),
        Check::portable("select_block_rows", |device, _| check(device, Block, rows())),
        Check::portable("select_block_contents", |device, _| check(device, Block, contents())),
        Check::portable("select_block_pooling", |device, _| check(device, Block, pooling())),
        Check::portable("select_block_forced", |device, _| check(device, Block, forced())),
        Check::portable("select_block_random", |device, seed| check(device, Block, random(seed))),
        Check::portable("select_block_fused", |device, _| check_fused(device)),
        Check::portable("select_block_far_apart", |device, _| check(device, Block, far_apart())).far(),
        Check::portable("select_grid_sizes", |device, _| {
            check(device, Grid, sizes(&[0, 1, 3, 5, 2049, 4095, 4096, 4097, 8193]))
        }),
        Check::portable("select_grid_contents", |device, _| check(device, Grid, contents())),
        Check::portable("select_grid_pages", |device, _| check(device, Grid, pages())),
        Check::portable("select_grid_random", |device, seed| check(device, Grid, random(seed))),
        Check::portable("select_grid_alone", |device, seed| check_alone(device, Grid, few(seed))),
        Check::portable("select_grid_far_apart", |device, _| check(device, Grid, far_apart())).far(),
        Check::portable("select_grid_long", |device, seed| check(device, Grid, long(seed, MORE_CHUNKS))),
        Check::hopper("select_cluster_sizes", |device, _| {
            check(device, Cluster, sizes(&[0, 1, 3, 5, 31, 32, 33, 2049, 16381, 16389]))
        }),
        Check::hopper("select_cluster_contents", |device, _| check(device, Cluster, contents())),
        Check::hopper("select_cluster_pages", |device, _| check(device, Cluster, pages())),
        Check::hopper("select_cluster_random", |device, seed| check(device, Cluster, random(seed))),
        Check::hopper("select_cluster_alone", |device, seed| check_alone(device, Cluster, few(seed))),
        Check::hopper("select_cluster_far_apart", |device, _| check(device, Cluster, far_apart())).far(),
        Check::hopper("select_cluster_long", |device, seed| {
            check(device, Cluster, long(seed, MOST_OF_A_CLUSTER))
        }),
    ]
}

/// Lengths around vectors, tiles and chunks, each with counts at the edges and between.
fn sizes(lengths: &[usize]) -> Vec<Case> {
    let case = |n: &usize| {
        let keys = *n as i32;
        let counts = vec![0, 1, keys / 2, keys - 1, keys, keys + 5];
        Case::whole(*n as u64, [1, counts.len(), 1, 1, *n], Pooling::NONE, counts)
    };
    lengths.iter().map(case).collect()
}

/// Rows that begin anywhere, with fewer places than are wanted, or none.
fn rows() -> Vec<Case> {
    let mut cases = Vec::new();
    for (offset, stride) in [(1, 700), (2, 701), (0, 702), (3, 703)] {
        let case = Case::whole(7, [2, 2, 1, 2, 699], Pooling::max(3), vec![50]);
        cases.push(Case { offset, stride, ..case });
    }
    for capacity in [0, 1, 33] {
        cases.push(Case { capacity, ..Case::whole(8, [1, 3, 1, 1, 100], Pooling::NONE, vec![5, 40, 200]) });
    }
    cases
}

fn random(seed: u64) -> Vec<Case> {
    (0..12).map(|n| Case::random(seed * 12 + n)).collect()
}

fn few(seed: u64) -> Vec<Case> {
    (0..4).map(|n| Case::random(1000 + seed * 4 + n)).collect()
}

/// Keys of so many chunks of a grid that a thread of the last looks at two of those before it.
const MORE_CHUNKS: usize = (abi::SELECT_THREADS as usize + 2) * abi::SELECT_CHUNK as usize - 5;

/// Items of the longest row that a cluster takes.
const MOST_OF_A_CLUSTER: usize = abi::SELECT_CLUSTER as usize * (48 << 10);

/// In one schedule of each chip: the order of things is tried on shorter ones.
fn long(seed: u64, most: usize) -> Vec<Case> {
    if !seed.is_multiple_of(4) {
        return Vec::new();
    }
    vec![
        Case::softmax(seed, [1, 1, 1, 2, 100_003], Pooling::max(7), vec![2048]),
        Case::softmax(seed, [1, 1, 1, 1, most], Pooling::NONE, vec![most as i32 / 10]),
    ]
}

/// What scores may be, in rows of two chunks, long enough that threads ask for several vectors at once; the boundary
/// of a tie lies before, in and behind each chunk.
fn contents() -> Vec<Case> {
    const KEYS: usize = 6500;
    let mut random = Random(3);
    let special = [
        f32::NAN,
        -f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        0.0,
        -0.0,
        f32::from_bits(1),
        -f32::from_bits(1),
        f32::MIN_POSITIVE,
        f32::MAX,
        f32::MIN,
        1.0,
    ];
    let of = |score: &dyn Fn(usize) -> f32| (0..KEYS).map(score).collect::<Vec<_>>();
    let mut rows = vec![
        of(&|_| 0.25),
        of(&|_| f32::NAN),
        of(&|key| if key == KEYS - 1 { 2.0 } else { 1.0 }),
        of(&|key| if key == 17 { -1.0 } else { 0.0 }),
        of(&|key| key as f32),
        of(&|key| -(key as f32)),
        of(&|key| if key % 2 == 0 { 0.0 } else { -0.0 }),
        // Ranks that differ in the last digit alone, then in the middle one.
        of(&|key| f32::from_bits(0x3f80_0000 + key as u32 * 7 % 1000)),
        of(&|key| f32::from_bits(0x3f80_0000 + ((key as u32 * 7 % 1500) << 10))),
        (0..KEYS).map(|_| f32::from_bits(random.next() as u32)).collect(),
    ];
    rows.extend((0..2).map(|_| (0..KEYS).map(|_| random.of(&special)).collect()));
    let height = rows.len() as i32;
    let counts = [1, 500, 4095, 4096, 4097, KEYS as i32 - 1];
    let mut cases: Vec<_> = (0..2)
        .map(|shift| {
            let counts = (0..height).map(|row| counts[(row + 3 * shift) as usize % counts.len()]).collect();
            Case::plain(rows.clone(), counts)
        })
        .collect();
    // Infinities and NaN among pooled and reduced scores.
    for (pooling, reduction) in [
        (Pooling::max(3), Reduction::Sum),
        (Pooling::average(3), Reduction::Sum),
        (Pooling::NONE, Reduction::Sum),
        (Pooling::NONE, Reduction::Max),
        (Pooling::max(3), Reduction::Max),
    ] {
        let few = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3.0, -3.0, 0.0, 9.0];
        let rows = (0..4).map(|_| (0..301).map(|_| random.of(&few)).collect()).collect();
        let case = Case::plain(rows, vec![40, 290]);
        cases.push(Case { rows: 2, groups: 2, pooling, reduction, ..case });
    }
    cases
}

/// Kernels of every width, wider than the row too, and neighbours on both sides of a tile.
fn pooling() -> Vec<Case> {
    let mut cases = Vec::new();
    for kernel in [1, 3, 7, 9, 21, 63] {
        for pooling in [Pooling::max(kernel), Pooling::average(kernel)] {
            for (keys, reduction) in [(1, Reduction::Sum), (30, Reduction::Max), (257, Reduction::Sum)] {
                let counts = vec![1, (keys as i32 + 1) / 3];
                let case = Case::whole(kernel as u64, [1, 2, 2, 3, keys], pooling, counts);
                cases.push(Case { reduction, ..case });
            }
            cases.push(Case::softmax(kernel as u64, [1, 1, 2, 4, 500], pooling, vec![100]));
        }
    }
    cases.push(Case::whole(1, [1, 1, 1, 2, 2100], Pooling::average(63), vec![300]));
    cases.push(Case::softmax(2, [1, 1, 1, 2, 4100], Pooling::max(7), vec![300]));
    cases
}

/// Rows of scores further apart than 32 bits count: heads, groups, rows and sequences; as they lie, and pooled in vectors.
fn far_apart() -> Vec<Case> {
    let case = |shape, pooling| Case { far: true, ..Case::whole(4, shape, pooling, vec![30]) };
    vec![
        case([1, 2, 1, 1, 300], Pooling::NONE),
        case([2, 1, 1, 1, 300], Pooling::NONE),
        case([1, 1, 1, 2, 300], Pooling::max(7)),
        case([1, 1, 2, 1, 301], Pooling::average(5)),
        case([2, 2, 2, 3, 200], Pooling::max(7)),
        Case { page: 16, ..case([2, 2, 1, 1, 300], Pooling::NONE) },
    ]
}

/// Pages smaller than a vector, larger than a chunk, larger than the row.
fn pages() -> Vec<Case> {
    let mut cases = Vec::new();
    for page in [2_usize, 3, 16, 100, 5000] {
        for keys in [17_usize, 640, 4700] {
            let pages = keys.div_ceil(page) as i32;
            let case =
                Case::softmax(keys as u64, [1, 2, 1, 1, keys], Pooling::NONE, vec![pages / 3, pages - 1]);
            cases.push(Case { page, sinks: 3, window: 10, tail: 10, ..case });
        }
    }
    let case = Case::whole(5, [1, 1, 2, 1, 1500], Pooling::max(5), vec![13]);
    cases.push(Case { page: 16, reduction: Reduction::Max, ..case });
    cases
}

/// Sinks and windows: apart, touching, overlapping, more than there is room for; lengths and counts that
/// make no sense.
fn forced() -> Vec<Case> {
    let mut cases = Vec::new();
    let tokens = vec![0, 3, 8, 9, 12, 50, 100, i32::MIN, i32::MAX];
    let forced = [(8, 8, 0), (8, 8, 4), (8, 3, 2), (8, 0, 5), (0, 0, 90), (200, 60, 0)];
    for (n, (window, tail, sinks)) in forced.into_iter().enumerate() {
        for (count, page) in [(3, 1 + n % 2), (60, 1)] {
            let lengths = [Lengths::Listed, Lengths::Cumulative][n / 2 % 2];
            let tokens = tokens.clone();
            let case = Case::whole(6, [tokens.len(), 1, 1, 1, 100], Pooling::max(3), vec![count]);
            cases.push(Case { lengths, tokens, window, tail, sinks, page, ..case });
        }
    }
    let case = Case::whole(9, [2, 3, 1, 1, 60], Pooling::NONE, vec![i32::MIN, -1, 0, 5, 60, i32::MAX]);
    cases.push(Case { capacity: 40, window: 4, tail: 4, ..case });
    cases
}
