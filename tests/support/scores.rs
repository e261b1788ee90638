//! Scores of keys: descriptions of work, plain loops in f64 that say what should come out, and runs on a device.

use fastkv::{
    abi::{Pages, Rows, WindowScoresParams},
    kernels::{
        DType, Device, Error, Launch,
        batch::{Bias, Lengths, Lse, ScoreHeads, Scores, Window, default_scale},
        columns, scores,
    },
};
use half::{bf16, f16};

use super::{
    Check, all,
    lse::{LseLayout, Order, Queries},
    memory::{Memory, Spread, UNTOUCHED},
    pages::{Paging, Pool},
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

/// What queries and keys hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Contents {
    /// Numbers in [-2, 2).
    Random,
    /// Keys that make logits of thousands, of either sign.
    Huge,
    /// The same key everywhere.
    Equal,
    /// Keys of numbers below the smallest normal one.
    Denormal,
    /// Keys of NaN.
    Nan,
    /// This infinity in an element of some keys of the first kv head, which every query meets with a positive one.
    Infinite(f32),
}

/// What lies far apart along its outermost axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Far {
    /// Queries, and the output of attention.
    Queries,
    /// Keys, or their pages, and values.
    Keys,
    /// LSE, scores, and the bits of the bias.
    Sums,
}

/// One run of `window_scores`.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) layout: Layout,
    pub(crate) dtype: DType,
    pub(crate) head_dim: usize,
    pub(crate) kv_heads: usize,
    pub(crate) group: usize,
    /// Queries and keys of each sequence; all the same unless packed, but for keys with `lengths`.
    pub(crate) sequences: Vec<[usize; 2]>,
    /// Tokens of no sequence before the first, where sequences are packed.
    pub(crate) skipped: usize,
    /// Whether the device alone knows how many keys a sequence has.
    pub(crate) lengths: bool,
    /// Pages that the keys lie in, with `lengths`.
    pub(crate) pages: Option<Paging>,
    pub(crate) window: Window,
    /// Of every query, sequence after sequence.
    pub(crate) positions: Option<Vec<i32>>,
    pub(crate) bias: Option<f32>,
    pub(crate) heads: ScoreHeads,
    /// Whether LSE is given; otherwise the driver finds it.
    pub(crate) lse: bool,
    /// Where it is.
    pub(crate) lse_layout: LseLayout,
    /// How queries count, where it is sums over columns.
    pub(crate) columns: Option<Columns>,
    pub(crate) contents: Contents,
    pub(crate) far: Option<Far>,
    pub(crate) seed: u64,
}

/// Weight of the first query, what the next ones weigh more, and the keys that each counts on.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Columns {
    pub(crate) weight: f32,
    pub(crate) step: f32,
    pub(crate) band: Option<usize>,
}

impl Case {
    /// One sequence, its queries the last of the keys, LSE given, scores of every query head.
    pub(crate) fn plain(dtype: DType, head_dim: usize, group: usize, window: usize, keys: usize) -> Self {
        Self {
            layout: Layout::TokenMajor,
            dtype,
            head_dim,
            kv_heads: 1,
            group,
            sequences: vec![[window.min(keys), keys]],
            skipped: 0,
            lengths: false,
            pages: None,
            window: Window::Last(window as u32),
            positions: None,
            bias: None,
            heads: ScoreHeads::Query,
            lse: true,
            lse_layout: LseLayout::PLAIN,
            columns: None,
            contents: Contents::Random,
            far: None,
            seed: (head_dim * 31 + group * 7 + window * 1000 + keys) as u64,
        }
    }

    /// Everything that may vary, drawn from `seed`.
    pub(crate) fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let layout = random.of(&[Layout::TokenMajor, Layout::HeadMajor, Layout::Packed]);
        let lengths = |random: &mut Random| {
            let keys = random.below(300);
            let queries = match random.below(3) {
                0 => random.below(keys + 1),
                1 => random.below(80),
                _ => random.below(12),
            };
            [queries, keys]
        };
        let uniform = lengths(&mut random);
        let on_device = random.below(3) == 0;
        let paged = Paging { size: 1 + random.below(40), holes: random.below(2) == 0 };
        let sequences: Vec<_> = (0..1 + random.below(3))
            .map(|_| match layout {
                Layout::Packed => lengths(&mut random),
                _ if on_device => [uniform[0], random.below(300)],
                _ => uniform,
            })
            .collect();
        let window =
            if random.below(4) == 0 { Window::All } else { Window::Last(1 + random.below(64) as u32) };
        let skipped = if layout == Layout::Packed { random.of(&[0, 0, 5]) } else { 0 };
        let positions = (random.below(3) == 0).then(|| {
            let keys = sequences.iter().flat_map(|&[queries, keys]| std::iter::repeat_n(keys, queries));
            let keys = std::iter::repeat_n(1, skipped).chain(keys);
            keys.map(|keys| random.below(keys + 8) as i32 - 4).collect()
        });
        Self {
            layout,
            dtype: random.of(&[DType::F16, DType::BF16]),
            head_dim: random.of(&[64, 96, 128, 256]),
            kv_heads: 1 + random.below(2),
            group: random.of(&[1, 2, 3, 4, 5, 8]),
            sequences,
            skipped,
            lengths: on_device,
            pages: (on_device && random.below(2) == 0).then_some(paged),
            window,
            positions,
            bias: (random.below(3) == 0).then(|| random.symmetric() * 5.0),
            heads: random.of(&[ScoreHeads::Query, ScoreHeads::Group]),
            lse: window == Window::All || random.below(2) == 0,
            lse_layout: LseLayout::random(&mut random),
            columns: None,
            contents: Contents::Random,
            far: None,
            seed,
        }
    }

    /// The same, as sums over columns.
    pub(crate) fn random_columns(seed: u64) -> Self {
        let case = Self::random(seed);
        let mut random = Random(!seed);
        let longest = case.longest(1);
        let columns = Columns {
            weight: random.symmetric(),
            step: [0.0, 0.02, -0.01][random.below(3)],
            band: (random.below(3) > 0).then(|| random.below(longest + 2)),
        };
        Self { columns: Some(columns), ..case }.summed()
    }

    /// Over all queries of a group, which are the last of the keys.
    fn summed(self) -> Self {
        Self { window: Window::All, heads: ScoreHeads::Group, lse: true, positions: None, ..self }
    }

    /// What a query's probability of a key counts, if it does, given how many keys the query sees.
    fn weight(&self, query: usize, seen: usize, key: usize) -> Option<f64> {
        match self.columns {
            Some(Columns { band: Some(band), .. }) if key + band < seen => None,
            Some(Columns { weight, step, .. }) => Some(f64::from(weight) + f64::from(step) * query as f64),
            None => Some(1.0),
        }
    }

    fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    /// Whether a key is nowhere, with its page.
    fn is_absent(&self, sequence: usize, key: usize) -> bool {
        self.pages.is_some_and(|pages| pages.is_absent(sequence, key))
    }

    /// Tokens before those of a sequence.
    fn before(&self, sequence: usize, axis: usize) -> usize {
        self.skipped + self.sequences[..sequence].iter().map(|lengths| lengths[axis]).sum::<usize>()
    }

    fn longest(&self, axis: usize) -> usize {
        self.sequences.iter().map(|lengths| lengths[axis]).max().unwrap_or(0)
    }

    /// First query of a sequence's window, and its queries.
    fn window(&self, sequence: usize) -> std::ops::Range<usize> {
        let queries = self.sequences[sequence][0];
        match self.window {
            Window::Last(window) => queries.saturating_sub(window as usize)..queries,
            Window::All => 0..queries,
        }
    }

    /// How many keys a query sees.
    fn seen(&self, sequence: usize, query: usize) -> usize {
        let [queries, keys] = self.sequences[sequence];
        let last = match &self.positions {
            Some(positions) => i64::from(positions[self.before(sequence, 0) + query]),
            None => query as i64 + keys as i64 - queries as i64,
        };
        (last + 1).clamp(0, keys as i64) as usize
    }

    /// Whether the bias applies, by a rule that has no pattern in common with tiles.
    fn biased(&self, sequence: usize, head: usize, key: usize) -> bool {
        self.bias.is_some() && Self::biased_head(head) && self.biased_key(sequence, key)
    }

    fn biased_head(head: usize) -> bool {
        head % 3 != 1
    }

    fn biased_key(&self, sequence: usize, key: usize) -> bool {
        Random(self.seed ^ (key / 5 + 1000 * sequence) as u64).next() & 3 == 0
    }

    /// Elements from one row to the next: the heads of a token, and a gap that no kernel may read.
    fn rows(&self, base: u64, heads: usize, axis: usize) -> Rows {
        let tokens = self.longest(axis);
        let width = self.head_dim + 8;
        let token_stride = heads * width;
        match self.layout {
            Layout::TokenMajor | Layout::Packed => Rows {
                base,
                sequence_stride: if self.layout == Layout::Packed { 0 } else { tokens * token_stride } as i64,
                head_stride: width as i64,
                token_stride: token_stride as i64,
            },
            Layout::HeadMajor => Rows {
                base,
                sequence_stride: (tokens * token_stride) as i64,
                head_stride: (tokens * width) as i64,
                token_stride: width as i64,
            },
        }
    }

    /// The stride of the outermost axis of a tensor, or of scores.
    fn outermost<'a>(&self, sequence_stride: &'a mut i64, head_stride: &'a mut i64) -> &'a mut i64 {
        if self.sequences.len() > 1 { sequence_stride } else { head_stride }
    }

    /// Puts a tensor where the case has it.
    fn put<D: Device>(
        &self,
        memory: &mut Memory<'_, D>,
        far: Far,
        tensor: &Tensor,
        [heads, axis]: [usize; 2],
    ) -> Rows {
        let mut rows = self.rows(0, heads, axis);
        let outermost = match self.layout {
            Layout::Packed => &mut rows.token_stride,
            Layout::TokenMajor => &mut rows.sequence_stride,
            Layout::HeadMajor => self.outermost(&mut rows.sequence_stride, &mut rows.head_stride),
        };
        let spread = Spread::apart_if(self.far == Some(far), 2 * *outermost as usize, 2 * tensor.bits.len());
        *outermost = spread.stride(2).unwrap_or(*outermost);
        rows.base = memory.put_spread(bytemuck::cast_slice(&tensor.bits), spread);
        rows
    }

    /// Index of the first element of a token's row.
    fn element(&self, rows: &Rows, axis: usize, [sequence, head, token]: [usize; 3]) -> usize {
        let token = token + if self.layout == Layout::Packed { self.before(sequence, axis) } else { 0 };
        sequence * rows.sequence_stride as usize
            + head * rows.head_stride as usize
            + token * rows.token_stride as usize
    }

    /// An element of a query or a key, made of a number in [-2, 2).
    fn content(&self, axis: usize, [head, token, element]: [usize; 3], number: f32) -> f32 {
        let denormal = if self.dtype == DType::F16 { 3e-5 } else { 5e-39 };
        match (self.contents, axis) {
            (Contents::Huge, 1) => number * 1500.0,
            (Contents::Equal, 1) => (element % 7) as f32 - 2.5,
            (Contents::Denormal, 1) => number * denormal,
            (Contents::Nan, 1) => f32::NAN,
            (Contents::Infinite(_), 0) if element == 3 => number.abs() + 0.25,
            (Contents::Infinite(infinity), 1) if element == 3 && head == 0 && token % 300 == 0 => infinity,
            _ => number,
        }
    }

    /// A tensor of elements with NaN in the gaps.
    fn tensor(&self, salt: u64, heads: usize, axis: usize) -> Tensor {
        let mut random = Random(self.seed ^ salt);
        let rows = self.rows(0, heads, axis);
        let tokens = match self.layout {
            Layout::Packed => self.before(self.sequences.len(), axis),
            _ => self.sequences.len() * self.longest(axis),
        };
        let mut tensor =
            Tensor { dtype: self.dtype, bits: vec![0x7FFF; tokens * heads * (self.head_dim + 8)] };
        for (sequence, lengths) in self.sequences.iter().enumerate() {
            for head in 0..heads {
                for token in 0..lengths[axis] {
                    let first = self.element(&rows, axis, [sequence, head, token]);
                    for element in 0..self.head_dim {
                        let number = self.content(axis, [head, token, element], 2.0 * random.symmetric());
                        tensor.set(first + element, number);
                    }
                }
            }
        }
        tensor
    }

    /// What should come out.
    fn oracle(&self, q: &Tensor, k: &Tensor) -> Oracle {
        let (q_rows, k_rows) = (self.rows(0, self.query_heads(), 0), self.rows(0, self.kv_heads, 1));
        let scale = f64::from(default_scale(self.head_dim as u32));
        let mut oracle = Oracle { lse: Vec::new(), scores: Vec::new() };
        for head in 0..self.query_heads() {
            for (sequence, &[queries, keys]) in self.sequences.iter().enumerate() {
                let mut scores = vec![Bounded::default(); keys];
                let mut magnitudes = vec![0.0; keys];
                for query in 0..queries {
                    let q_row = self.element(&q_rows, 0, [sequence, head, query]);
                    let logits: Vec<_> = (0..self.seen(sequence, query))
                        .map(|key| {
                            if self.is_absent(sequence, key) {
                                return Bounded { value: f64::NEG_INFINITY, error: 0.0 };
                            }
                            let k_row = self.element(&k_rows, 1, [sequence, head / self.group, key]);
                            let products = (0..self.head_dim).map(|i| q.get(q_row + i) * k.get(k_row + i));
                            let bias =
                                if self.biased(sequence, head, key) { self.bias.unwrap() } else { 0.0 };
                            let magnitude: f64 = products.clone().map(f64::abs).sum();
                            let logit = products.sum::<f64>() * scale + f64::from(bias);
                            if logit.is_infinite() {
                                return Bounded { value: logit, error: 0.0 };
                            }
                            // Of the accumulation; then of the factor, of adding the bias, and of the result.
                            let steps = (self.head_dim / 16 + 1) as f64;
                            let error = steps * magnitude * scale * 2.0 * ULP
                                + 4.0 * (logit.abs() + 2.0 * f64::from(bias).abs()) * ULP;
                            Bounded { value: logit, error }
                        })
                        .collect();
                    let most = logits.iter().map(|logit| logit.value).fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = logits.iter().map(|logit| (logit.value - most).exp()).sum();
                    let sees_none = logits.iter().all(|logit| logit.value == f64::NEG_INFINITY);
                    let lse = if sees_none { most } else { most + sum.ln() };
                    // Rounded when given, and once more in the kernel. When found: as far off as a logit and
                    // the sum, which has at most 512 / 128 + 8 additions in a block and one for each block.
                    let mut lse_error = 3.0 * lse.abs() * ULP;
                    if !self.lse {
                        let logit = logits.iter().map(|logit| logit.error).fold(0.0, f64::max);
                        let additions = 16.0 + (keys / 512) as f64;
                        lse_error += logit + additions * ULP + 2.0 * APPROXIMATION + 2.0 * lse.abs() * ULP;
                    }
                    oracle.lse.push(lse);
                    if self.window(sequence).contains(&query) && !sees_none {
                        for (key, (score, logit)) in scores.iter_mut().zip(&logits).enumerate() {
                            let probability = (logit.value - lse).exp();
                            let Some(weight) = self.weight(query, logits.len(), key) else { continue };
                            score.value += probability * weight;
                            score.error += probability
                                * (weight.abs() * (logit.error + lse_error + APPROXIMATION) + 3.0 * ULP)
                                + f64::from(f32::MIN_POSITIVE);
                            magnitudes[key] += probability * weight.abs();
                        }
                    }
                }
                // A lane adds 16 columns of a block, four lanes come together, then the blocks.
                let additions = (20 + queries / 64) as f64;
                for (score, magnitude) in scores.iter_mut().zip(magnitudes) {
                    score.error += magnitude * additions * ULP;
                }
                oracle.scores.push(scores);
            }
        }
        oracle
    }
}

/// Half a unit in the last place of an f32, relative.
pub(crate) const ULP: f64 = 1.0 / (1 << 24) as f64;

/// Of `ex2.approx` and `lg2.approx`, 2 ulp each.
const APPROXIMATION: f64 = 4.0 * ULP;

/// A number and how far off an f32 computation of it may be.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Bounded {
    value: f64,
    error: f64,
}

/// Results by query head, then sequence, then query or key.
struct Oracle {
    lse: Vec<f64>,
    scores: Vec<Vec<Bounded>>,
}

/// 16-bit elements.
#[derive(Clone)]
pub(crate) struct Tensor {
    dtype: DType,
    bits: Vec<u16>,
}

impl Tensor {
    fn get(&self, element: usize) -> f64 {
        let bits = self.bits[element];
        match self.dtype {
            DType::F16 => f16::from_bits(bits).to_f64(),
            _ => bf16::from_bits(bits).to_f64(),
        }
    }

    fn set(&mut self, element: usize, value: f32) {
        self.bits[element] = match self.dtype {
            DType::F16 => f16::from_f32(value).to_bits(),
            _ => bf16::from_f32(value).to_bits(),
        };
    }
}

/// The tensors of a case.
#[derive(Clone)]
struct Inputs {
    q: Tensor,
    k: Tensor,
    /// `[query head][query]`, those of no sequence left out.
    lse: Vec<f32>,
}

impl Inputs {
    fn of(case: &Case) -> (Self, Oracle) {
        let q = case.tensor(1, case.query_heads(), 0);
        let k = case.tensor(2, case.kv_heads, 1);
        let oracle = case.oracle(&q, &k);
        let lse = oracle.lse.iter().map(|lse| *lse as f32).collect();
        (Self { q, k, lse }, oracle)
    }
}

/// Scores by sequence, then head, then key.
type Found = Vec<Vec<Vec<f32>>>;

/// Runs the driver.
fn run<D: Device>(device: &D, case: &Case, inputs: &Inputs) -> Result<Found, String> {
    run_by(device, case, inputs, |work| match case.columns {
        // SAFETY: `run_by` describes memory that is there, here and below.
        None => unsafe { scores::window_scores(device, work) },
        Some(Columns { weight, step, band }) => {
            let band = band.map(|band| band as u32);
            // SAFETY: as above.
            unsafe { columns::column_sums(device, &columns::ColumnSums { sums: *work, weight, step, band }) }
        }
    })
}

/// Puts a case into memory, and takes the scores out that `launch` leaves there.
fn run_by<D: Device>(
    device: &D,
    case: &Case,
    inputs: &Inputs,
    launch: impl Fn(&scores::WindowScores) -> Result<(), Error>,
) -> Result<Found, String> {
    let mut memory = Memory::new(device);
    let packed = case.layout == Layout::Packed;
    let count = case.sequences.len();
    let mut lengths = |axis| {
        let longest = case.longest(axis) as u32;
        if packed {
            let starts: Vec<_> = (0..=count).map(|sequence| case.before(sequence, axis) as i32).collect();
            let starts = memory.put(bytemuck::cast_slice(&starts));
            Lengths::packed(starts, case.before(count, axis) as u32, longest)
        } else {
            Lengths::dense(longest)
        }
    };
    let queries = lengths(0);
    let (keys, key_lengths) = if case.lengths {
        let each: Vec<_> = case.sequences.iter().map(|lengths| lengths[1] as i32).collect();
        let at_most =
            if case.pages.is_some() || !packed { Lengths::dense(case.longest(1) as u32) } else { lengths(1) };
        (at_most, memory.put(bytemuck::cast_slice(&each)))
    } else {
        (lengths(1), 0)
    };
    let score_heads = if case.heads == ScoreHeads::Query { case.query_heads() } else { case.kv_heads };
    let (k, pages) = match case.pages {
        Some(paging) => {
            let counts: Vec<_> = case.sequences.iter().map(|lengths| lengths[1]).collect();
            let pool = Pool {
                paging,
                heads: case.kv_heads,
                head_dim: case.head_dim,
                head_major: case.layout == Layout::HeadMajor,
                counts: &counts,
                room: case.longest(1),
                far: case.far == Some(Far::Keys),
            };
            let of_keys = case.rows(0, case.kv_heads, 1);
            let row = |at| &inputs.k.bits[case.element(&of_keys, 1, at)..][..case.head_dim];
            (pool.put(&mut memory, 8, row), pool.describe(&mut memory))
        }
        None => (case.put(&mut memory, Far::Keys, &inputs.k, [case.kv_heads, 1]), Pages::default()),
    };
    // Rows stand apart, and not in steps of vectors.
    let head_stride = case.longest(1) + 3;
    let sequence_stride = score_heads * head_stride + 5;
    let score_bytes = (count * sequence_stride).max(1) * 4;
    let [mut of_sequences, mut of_heads] = [sequence_stride, head_stride].map(|stride| stride as i64);
    let outermost = case.outermost(&mut of_sequences, &mut of_heads);
    let score_spread = Spread::apart_if(case.far == Some(Far::Sums), 4 * *outermost as usize, score_bytes);
    *outermost = score_spread.stride(4).unwrap_or(*outermost);
    let mut work = scores::WindowScores {
        q: case.put(&mut memory, Far::Queries, &inputs.q, [case.query_heads(), 0]),
        k,
        pages,
        sequences: count as u32,
        query_heads: case.query_heads() as u32,
        kv_heads: case.kv_heads as u32,
        head_dim: case.head_dim as u32,
        dtype: case.dtype,
        queries,
        keys,
        lengths: key_lengths,
        positions: case.positions.as_ref().map_or(0, |p| memory.put(bytemuck::cast_slice(p))),
        scale: default_scale(case.head_dim as u32),
        bias: case.bias.map(|value| put_bias(&mut memory, case, value)),
        lse: case.lse.then(|| put_lse(&mut memory, case, &inputs.lse)),
        scores: Scores {
            base: memory.untouched_spread(score_bytes, score_spread),
            sequence_stride: of_sequences,
            head_stride: of_heads,
            window: case.window,
            heads: case.heads,
        },
        ..Default::default()
    };
    work.workspace_bytes = scores::window_scores_workspace(&work).map_err(|error| error.to_string())?;
    work.workspace = memory.reserve(work.workspace_bytes);
    launch(&work).map_err(|error| error.to_string())?;

    let found = memory.floats_spread(work.scores.base, score_bytes / 4, score_spread)?;
    let untouched = f32::from_ne_bytes([UNTOUCHED; 4]).to_bits();
    let mut expected_untouched = vec![true; found.len()];
    let scores = (0..count)
        .map(|sequence| {
            (0..score_heads)
                .map(|head| {
                    let first = sequence * sequence_stride + head * head_stride;
                    let keys = first..first + case.sequences[sequence][1];
                    expected_untouched[keys.clone()].fill(false);
                    found[keys].to_vec()
                })
                .collect()
        })
        .collect();
    let changed = (0..found.len()).find(|&at| expected_untouched[at] && found[at].to_bits() != untouched);
    match changed {
        None => Ok(scores),
        Some(at) => Err(format!("element {at} of the scores belongs to no key and was written")),
    }
}

/// Puts LSE where the case has it, with NaN in between.
fn put_lse<D: Device>(memory: &mut Memory<'_, D>, case: &Case, lse: &[f32]) -> Lse {
    let counts: Vec<_> = case.sequences.iter().map(|lengths| lengths[0]).collect();
    let queries = Queries { heads: case.query_heads(), skipped: case.skipped, counts, room: case.longest(0) };
    let before = |sequence: usize| case.before(sequence, 0) - case.skipped;
    let total = before(case.sequences.len());
    let in_order = (0..case.sequences.len()).flat_map(|sequence| {
        (0..case.query_heads()).flat_map(move |head| {
            (0..case.sequences[sequence][0]).map(move |query| head * total + before(sequence) + query)
        })
    });
    let mut stored = vec![f32::NAN; case.lse_layout.elements(&queries)];
    for (place, from) in case.lse_layout.places(&queries).into_iter().zip(in_order) {
        stored[place] = case.lse_layout.value(lse[from].into()) as f32;
    }
    let step = case.lse_layout.outermost(&queries);
    let spread = Spread::apart_if(case.far == Some(Far::Sums), 4 * step, 4 * stored.len());
    let base = memory.put_spread(bytemuck::cast_slice(&stored), spread);
    case.lse_layout.describe_spread(base, &queries, spread)
}

fn put_bias<D: Device>(memory: &mut Memory<'_, D>, case: &Case, value: f32) -> Bias {
    let words = |bits: &dyn Fn(usize) -> bool, count: usize| -> Vec<u32> {
        // Bits behind the last are set, and mean nothing.
        (0..count.div_ceil(32))
            .map(|word| {
                (0..32).map(|bit| u32::from(word * 32 + bit >= count || bits(word * 32 + bit)) << bit).sum()
            })
            .collect()
    };
    let key_stride = case.longest(1).div_ceil(32) + 1;
    let mut keys = vec![u32::MAX; key_stride * case.sequences.len()];
    for (sequence, &[_, count]) in case.sequences.iter().enumerate() {
        let words = words(&|key| case.biased_key(sequence, key), count);
        keys[sequence * key_stride..][..words.len()].copy_from_slice(&words);
    }
    let spread = Spread::apart_if(case.far == Some(Far::Sums), 4 * key_stride, 4 * keys.len());
    Bias {
        heads: memory.put(bytemuck::cast_slice(&words(&Case::biased_head, case.query_heads()))),
        keys: memory.put_spread(bytemuck::cast_slice(&keys), spread),
        key_stride: spread.stride(4).unwrap_or(key_stride as i64),
        value,
    }
}

/// Runs a case and compares it with the oracle.
pub(crate) fn check<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let (inputs, oracle) = Inputs::of(case);
    let found = run(device, case, &inputs)?;
    for (sequence, found) in found.iter().enumerate() {
        for (head, found) in found.iter().enumerate() {
            let heads = match case.heads {
                ScoreHeads::Query => head..head + 1,
                ScoreHeads::Group => head * case.group..(head + 1) * case.group,
            };
            for (key, found) in found.iter().enumerate() {
                let mut expected = Bounded::default();
                for head in heads.clone() {
                    let one = oracle.scores[head * case.sequences.len() + sequence][key];
                    expected.value += one.value;
                    expected.error += one.error + expected.value.abs() * ULP;
                }
                let off = (f64::from(*found) - expected.value).abs();
                let right = if expected.value.is_nan() { found.is_nan() } else { off <= expected.error };
                if !right {
                    return Err(format!(
                        "sequence {sequence}, head {head}, key {key}: {found}, not {} within {:e}",
                        expected.value, expected.error
                    ));
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("window_scores_edges", |device, _| all(edges(), |case| check(device, case))),
        Check::portable("window_scores_random", |device, seed| {
            all((0..12).map(|n| Case::random(seed * 12 + n)), |case| check(device, case))
        }),
        Check::portable("window_scores_contents", |device, _| all(contents(), |case| check(device, case))),
        Check::portable("window_scores_order_of_sums", |device, _| order_of_sums(device)),
        Check::portable("window_scores_nan", |device, _| nan(device)),
        Check::portable("window_scores_hostile", |device, _| hostile(device)),
        Check::portable("window_scores_far_apart", |device, _| {
            all(far_apart(), |case| check_far_apart(device, case))
        })
        .far(),
        Check::portable("column_sums_edges", |device, _| all(column_edges(), |case| check(device, case))),
        Check::portable("column_sums_random", |device, seed| {
            all((0..8).map(|n| Case::random_columns(seed * 8 + n)), |case| check(device, case))
        }),
        Check::portable("column_sums_contents", |device, _| {
            all(column_contents(), |case| check(device, case))
        }),
        Check::portable("column_sums_in_a_batch", |device, _| columns_in_a_batch(device)),
        Check::portable("column_sums_far_apart", |device, _| {
            let columns = Some(Columns { weight: 0.5, step: 0.125, band: Some(40) });
            let given = far_apart().into_iter().filter(|case| case.lse);
            all(given.map(|case| Case { columns, ..case }.summed()), |case| check_far_apart(device, case))
        })
        .far(),
    ]
}

/// Windows, groups and lengths around every tile and block there is.
fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let windows = [1, 7, 8, 9, 32, 63, 64];
    let groups = [1, 2, 3, 4, 7, 8, 16];
    let dims = [64, 96, 128, 256];
    let types = [DType::F16, DType::BF16];
    for (number, window) in windows.into_iter().enumerate() {
        for (other, group) in groups.into_iter().enumerate() {
            // Every window with every group, everything else in turn.
            let turn = number + 2 * other;
            let keys = [1, window - 1, 31, 33, 129][(number + other) % 5];
            cases.push(Case {
                heads: [ScoreHeads::Query, ScoreHeads::Group][other % 2],
                lse: turn % 3 > 0,
                ..Case::plain(types[number % 2], dims[turn % 4], group, window, keys)
            });
        }
    }
    // Groups of other sizes.
    for (number, group) in [6, 9, 15].into_iter().enumerate() {
        for (other, window) in [1, 9, 64].into_iter().enumerate() {
            let turn = number + other;
            cases.push(Case {
                heads: [ScoreHeads::Query, ScoreHeads::Group][other % 2],
                lse: turn % 2 > 0,
                ..Case::plain(
                    types[turn % 2],
                    dims[(turn + other) % 4],
                    group,
                    window,
                    [33, 70, 129][turn % 3],
                )
            });
        }
    }
    for (number, keys) in
        [0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 511, 512, 513, 1025].into_iter().enumerate()
    {
        for lse in [true, false] {
            let plain = Case::plain(types[number % 2], dims[(number + usize::from(lse)) % 4], 2, 8, keys);
            cases.push(Case { kv_heads: 1 + number % 2, lse, ..plain });
        }
    }
    // More columns than a block of the first pass takes, of which some heads are biased.
    for (window, head_dim) in [(64, 128), (33, 256)] {
        cases.push(Case { bias: Some(2.5), lse: false, ..Case::plain(DType::F16, head_dim, 4, window, 70) });
    }
    // All queries: blocks of 64 that see none, some and all of a block's keys.
    for (number, keys) in [1, 64, 130, 257, 70, 66, 65, 72].into_iter().enumerate() {
        // Every type with every size.
        let plain = Case::plain(types[(number + number / 4) % 2], dims[number % 4], 2, keys, keys);
        cases.push(Case { window: Window::All, ..plain.clone() });
        cases.push(Case {
            window: Window::All,
            sequences: vec![[keys / 2, keys]],
            heads: ScoreHeads::Group,
            ..plain.clone()
        });
        // Gathered queries, in no order.
        let positions = (0..keys).map(|query| ((query * 37 + 5) % (keys + 3)) as i32 - 1).collect();
        cases.push(Case { window: Window::All, positions: Some(positions), ..plain });
    }
    cases.extend(lse_layouts());
    cases.extend(paged());
    // Sequences without queries, without keys, with more queries than keys.
    for lse in [true, false] {
        cases.push(Case {
            layout: Layout::Packed,
            kv_heads: 2,
            sequences: vec![[3, 40], [0, 17], [5, 0], [30, 9], [0, 0], [9, 200]],
            bias: Some(-4.6),
            lse,
            ..Case::plain(DType::BF16, 64, 3, 9, 0)
        });
        cases.push(Case { sequences: vec![[0, 70]; 2], lse, ..Case::plain(DType::F16, 64, 2, 8, 0) });
    }
    cases
}

/// LSE given, or found in two passes, for keys of more than one block of the first, with logits of every kind.
fn contents() -> Vec<Case> {
    let kinds = [
        Contents::Huge,
        Contents::Equal,
        Contents::Denormal,
        Contents::Nan,
        Contents::Infinite(f32::NEG_INFINITY),
        Contents::Infinite(f32::INFINITY),
    ];
    let mut cases = Vec::new();
    for (number, contents) in kinds.into_iter().enumerate() {
        for (turn, dtype) in [DType::F16, DType::BF16].into_iter().enumerate() {
            let head_dim = [64, 96, 128, 256][(number + 2 * turn) % 4];
            let plain = Case { contents, ..Case::plain(dtype, head_dim, 2, 8, 1100) };
            // Queries that see the first key alone, a block of the first pass, and more.
            let positions = Some(vec![0, 511, 512, 299, 300, 600, -1, 1099]);
            for lse in [false, true] {
                cases.push(Case { kv_heads: 2, lse, ..plain.clone() });
                cases.push(Case { lse, positions: positions.clone(), ..plain.clone() });
            }
        }
    }
    cases
}

/// Queries that stay in shared memory and queries that stream, bands around tiles of them, weights.
fn column_edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let sizes = [
        (64, 4, [1, 1]),
        (128, 2, [1, 70]),
        (96, 3, [8, 130]),
        (256, 1, [65, 65]),
        (64, 4, [200, 260]),
        (128, 2, [300, 300]),
    ];
    for (number, (head_dim, group, lengths)) in sizes.into_iter().enumerate() {
        let dtype = [DType::F16, DType::BF16][number % 2];
        let plain = Case::plain(dtype, head_dim, group, lengths[0], lengths[1]);
        let bands = [None, Some(0), Some(1), Some(8), Some(33), Some(lengths[1])];
        for (turn, band) in bands.into_iter().enumerate() {
            // Streams take their time: each has its own.
            if turn % 3 == number % 3 || lengths[0] < 65 {
                let (weight, step) = [(1.0, 0.0), (0.5, 0.125), (1.0, -0.01)][(number + turn) % 3];
                let columns = Some(Columns { weight, step, band });
                let bias = (turn == 3).then_some(-2.5);
                cases.push(Case { sequences: vec![lengths], bias, columns, ..plain.clone() }.summed());
            }
        }
    }
    // Bands that end at a warp's last key, that begin at its first or before a step's last, for a query that is
    // the first of its tile, or alone.
    for (head_dim, group, lengths, band) in
        [(64, 1, [1, 32], 1), (64, 4, [200, 260], 43), (256, 2, [72, 72], 2)]
    {
        let columns = Some(Columns { weight: 1.0, step: 0.0, band: Some(band) });
        let plain = Case::plain(DType::BF16, head_dim, group, lengths[0], lengths[1]);
        cases.push(Case { sequences: vec![lengths], columns, ..plain }.summed());
    }
    // Larger groups, which stay and which stream.
    for (number, group) in (9..=16).enumerate() {
        let (dtype, head_dim) = ([DType::F16, DType::BF16][number % 2], [64, 96, 128, 256][number % 4]);
        let columns = Some(Columns { weight: 1.0, step: 0.125, band: [None, Some(33)][number / 4] });
        let plain = Case::plain(dtype, head_dim, group, 1, 1);
        let sequences = vec![[[12, 70], [66, 70]][number / 2 % 2]];
        cases.push(Case { sequences, columns, ..plain }.summed());
    }
    let packed = Case {
        layout: Layout::Packed,
        kv_heads: 2,
        sequences: vec![[3, 40], [0, 17], [5, 5], [0, 0], [90, 100]],
        bias: Some(-4.6),
        columns: Some(Columns { weight: 1.0, step: 0.25, band: Some(20) }),
        ..Case::plain(DType::BF16, 64, 3, 9, 0)
    };
    cases.push(packed.summed());
    let columns = Some(Columns { weight: 1.0, step: 0.125, band: None });
    cases.extend(lse_layouts().into_iter().map(|case| Case { columns, ..case }.summed()));
    cases.extend(paged().into_iter().step_by(3).map(|case| Case { columns, ..case }.summed()));
    // Queries that stream past keys in pages, some of which are nowhere, of sequences shorter than there is room for.
    let streaming = Case {
        layout: Layout::TokenMajor,
        sequences: vec![[200, 260], [200, 231]],
        lengths: true,
        pages: Some(Paging { size: 24, holes: true }),
        columns: Some(Columns { weight: 0.5, step: 0.01, band: Some(90) }),
        ..Case::plain(DType::F16, 64, 4, 9, 0)
    };
    cases.push(streaming.summed());
    cases
}

/// Logits of every kind, with bands that leave out some of what is not finite, and without.
fn column_contents() -> Vec<Case> {
    let given = contents().into_iter().filter(|case| case.lse && case.positions.is_none());
    given
        .enumerate()
        .map(|(number, case)| {
            let (queries, keys) = ([8, 150][number % 2], [400, 310][number % 2]);
            let band = [None, Some(20)][number / 2 % 2];
            let columns = Some(Columns { weight: 1.0, step: 0.125, band });
            Case { sequences: vec![[queries, keys]], columns, ..case }.summed()
        })
        .collect()
}

/// Keys in pages of any size, of sequences with lengths of their own, all there or not; and such lengths alone.
fn paged() -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, size) in [1, 7, 16, 24, 64, 100, 256].into_iter().enumerate() {
        for (other, head_dim) in [64, 96, 128, 256].into_iter().enumerate() {
            let turn = number + other;
            cases.push(Case {
                layout: [Layout::Packed, Layout::HeadMajor, Layout::TokenMajor][turn % 3],
                kv_heads: 2,
                sequences: vec![[9, 300], [9, 0], [9, 129]],
                lengths: true,
                pages: Some(Paging { size, holes: turn % 2 == 0 }),
                lse: (turn / 2 + other) % 2 == 0,
                bias: (number % 3 == 0).then_some(1.5),
                ..Case::plain([DType::F16, DType::BF16][number % 2], head_dim, 3, 9, 0)
            });
        }
    }
    for layout in [Layout::HeadMajor, Layout::TokenMajor, Layout::Packed] {
        let sequences = vec![[12, 70], [12, 0], [12, 7]];
        let plain = Case::plain(DType::F16, 64, 2, 8, 0);
        cases.push(Case { layout, sequences, lengths: true, ..plain });
    }
    // A sequence of which there is nothing, and a page in the middle of the one before.
    for lse in [false, true] {
        cases.push(Case {
            layout: Layout::Packed,
            sequences: vec![[5, 90], [3, 40]],
            lengths: true,
            pages: Some(Paging { size: 40, holes: true }),
            lse,
            ..Case::plain(DType::F16, 64, 2, 8, 0)
        });
    }
    cases
}

/// LSE in every place and of either kind, with queries before the window and sequences before the last.
fn lse_layouts() -> Vec<Case> {
    let case = |lse_layout, number: usize| {
        let layout = [Layout::Packed, Layout::TokenMajor][number % 2];
        let sequences =
            if layout == Layout::Packed { vec![[13, 40], [0, 7], [30, 61]] } else { vec![[21, 50]; 2] };
        Case { lse_layout, layout, sequences, kv_heads: 2, ..Case::plain(DType::BF16, 64, 3, 9, 0) }
    };
    LseLayout::each().enumerate().flat_map(|(n, layout)| [case(layout, n), case(layout, n + 1)]).collect()
}

/// Sequences, heads, tokens and pages of every tensor, to lie further apart than 32 bits count. Where there are two of
/// them in all the stride itself is larger.
fn far_apart() -> Vec<Case> {
    let plain = |dtype, head_dim, group| Case::plain(dtype, head_dim, group, 8, 0);
    let lse = |order| LseLayout { order, ..LseLayout::PLAIN };
    let of_sequences = Case {
        sequences: vec![[12, 40]; 2],
        bias: Some(1.5),
        lse_layout: lse(Order::Padded),
        ..plain(DType::BF16, 64, 2)
    };
    let of_heads = Case {
        layout: Layout::HeadMajor,
        kv_heads: 2,
        sequences: vec![[9, 300]],
        lse_layout: lse(Order::HeadMajor),
        ..plain(DType::F16, 128, 1)
    };
    let of_tokens = Case {
        layout: Layout::Packed,
        sequences: vec![[9, 150], [3, 7]],
        lse_layout: lse(Order::TokenMajor),
        ..plain(DType::BF16, 96, 2)
    };
    let of_two_tokens = Case { sequences: vec![[2, 2]], ..of_tokens.clone() };
    let of_a_group = Case { kv_heads: 1, group: 2, sequences: vec![[9, 40]], ..of_heads.clone() };
    let in_pages = Case {
        sequences: vec![[9, 70], [9, 33]],
        lengths: true,
        pages: Some(Paging { size: 16, holes: true }),
        ..plain(DType::F16, 64, 2)
    };
    [of_sequences, of_heads, of_a_group, of_tokens, of_two_tokens, in_pages]
        .into_iter()
        .flat_map(|case| [Case { lse: false, ..case.clone() }, case])
        .collect()
}

fn check_far_apart<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    check(device, case)?;
    let (inputs, _) = Inputs::of(case);
    let expected = run(device, case, &inputs)?;
    for far in [Far::Queries, Far::Keys, Far::Sums] {
        let found = run(device, &Case { far: Some(far), ..case.clone() }, &inputs);
        same("far apart", &found.map_err(|error| format!("{far:?}: {error}"))?, &expected)
            .map_err(|error| format!("{far:?}: {error}"))?;
    }
    Ok(())
}

/// A score has the same bits whatever the block, its memory and the rest of the batch; and the score of a
/// group is the sum of its heads' in their order.
fn order_of_sums<D: Device>(device: &D) -> Result<(), String> {
    let cases = [
        Case { bias: Some(1.5), ..Case::plain(DType::BF16, 128, 4, 64, 300) },
        Case { kv_heads: 2, ..Case::plain(DType::F16, 64, 7, 9, 200) },
        Case { window: Window::All, ..Case::plain(DType::F16, 96, 2, 150, 150) },
        Case { ..Case::plain(DType::BF16, 256, 3, 33, 140) },
    ];
    all(cases, |case| {
        let (inputs, _) = Inputs::of(case);
        let apart = run(device, case, &inputs)?;
        for (block_keys, slots) in [(32, 2), (64, 3), (96, 9), (128, 2), (512, 2), (512, 6)] {
            let found = run_by(device, case, &inputs, |work| divided(device, work, block_keys, slots))?;
            same("other blocks", &found, &apart)?;
        }

        for size in [16, 48] {
            let pages = Some(Paging { size, holes: false });
            let paged = Case { lengths: true, pages, ..case.clone() };
            same("in pages", &run(device, &paged, &inputs)?, &apart)?;
            if case.window != Window::All {
                let found = Case { lse: false, ..case.clone() };
                let found_in_pages = Case { lse: false, ..paged };
                let expected = run(device, &found, &inputs)?;
                same("LSE in pages", &run(device, &found_in_pages, &inputs)?, &expected)?;
            }
        }

        let group = Case { heads: ScoreHeads::Group, ..case.clone() };
        let sums = vec![
            apart[0]
                .chunks(case.group)
                .map(|heads| {
                    (0..heads[0].len())
                        .map(|key| heads.iter().fold(0.0, |sum, head| sum + head[key]))
                        .collect()
                })
                .collect::<Vec<Vec<f32>>>(),
        ];
        same("sums over a group", &run(device, &group, &inputs)?, &sums)?;
        for slots in [2, 9] {
            let found = run_by(device, &group, &inputs, |work| divided(device, work, 64, slots))?;
            same("sums in other blocks", &found, &sums)?;
        }

        // What the window gives away is what its queries have.
        let queries = case.window(0).len();
        for head in &apart[0] {
            let given: f64 = head.iter().map(|score| f64::from(*score)).sum();
            if (given - queries as f64).abs() > 1e-4 * queries as f64 {
                return Err(format!("{queries} queries gave {given}"));
            }
        }
        Ok(())
    })?;

    // Alone, and between others.
    all([true, false].map(|lse| Case { lse, ..Case::plain(DType::F16, 64, 2, 8, 600) }), |case| {
        in_a_batch(device, case, [20, 77])
    })
}

/// A sequence of one kv head has the bits that it has alone where it follows another and comes before a third.
fn in_a_batch<D: Device>(device: &D, alone: &Case, before: [usize; 2]) -> Result<(), String> {
    let alone = Case { layout: Layout::Packed, ..alone.clone() };
    let (inputs, _) = Inputs::of(&alone);
    let expected = run(device, &alone, &inputs)?;
    let batch = Case { sequences: vec![before, alone.sequences[0], [3, 9]], ..alone.clone() };
    let (mut others, _) = Inputs::of(&batch);
    let heads = alone.query_heads();
    for (axis, heads, to, from) in [(0, heads, &mut others.q, &inputs.q), (1, 1, &mut others.k, &inputs.k)] {
        let row = heads * (batch.head_dim + 8);
        let first = batch.before(1, axis) * row;
        to.bits[first..first + from.bits.len()].copy_from_slice(&from.bits);
    }
    let queries = alone.sequences[0][0];
    let total = batch.before(3, 0);
    for head in 0..heads {
        let place = head * total + before[0];
        others.lse[place..place + queries].copy_from_slice(&inputs.lse[head * queries..][..queries]);
    }
    same("in a batch", &run(device, &batch, &others)?[1..2], &expected)
}

/// The same of sums over columns: of queries that stay, of queries that stream, and of some that stream only in company.
fn columns_in_a_batch<D: Device>(device: &D) -> Result<(), String> {
    let columns = Some(Columns { weight: 1.0, step: 0.25, band: Some(90) });
    let cases = [([8, 300], [20, 77], 64), ([150, 200], [20, 77], 128), ([40, 300], [200, 210], 128)];
    all(cases, |&(lengths, before, head_dim)| {
        let plain = Case::plain(DType::BF16, head_dim, 4, 1, 1);
        in_a_batch(device, &Case { sequences: vec![lengths], columns, ..plain }.summed(), before)
    })
}

fn same(what: &str, found: &[Vec<Vec<f32>>], expected: &[Vec<Vec<f32>>]) -> Result<(), String> {
    for (found, expected) in found.iter().flatten().zip(expected.iter().flatten()) {
        if let Some(key) = (0..expected.len()).find(|&key| found[key].to_bits() != expected[key].to_bits()) {
            return Err(format!("{what}: key {key} has {}, not {}", found[key], expected[key]));
        }
    }
    Ok(())
}

/// NaN in a key, a query and an LSE reaches what it touches; infinities have the limits that they have.
fn nan<D: Device>(device: &D) -> Result<(), String> {
    for dtype in [DType::F16, DType::BF16] {
        let case = Case { sequences: vec![[20, 150]], ..Case::plain(dtype, 64, 2, 20, 150) };
        let (inputs, _) = Inputs::of(&case);
        let clean = run(device, &case, &inputs)?;
        let expect = |inputs: &Inputs, touched: &dyn Fn(usize, usize) -> bool| {
            let found = run(device, &case, inputs)?;
            for (head, found) in found[0].iter().enumerate() {
                for (key, found) in found.iter().enumerate() {
                    let clean = clean[0][head][key];
                    if touched(head, key) != found.is_nan() || !found.is_nan() && *found != clean {
                        return Err(format!("head {head}, key {key}: {found} where {clean} was"));
                    }
                }
            }
            Ok(())
        };
        let mut other = inputs.clone();
        other.k.set(37 * 72 + 3, f32::NAN);
        expect(&other, &|_, key| key == 37)?;
        // Query 5 of the second head is token 135 and sees the keys up to there.
        let mut other = inputs.clone();
        other.q.set(5 * 2 * 72 + 72, f32::NAN);
        expect(&other, &|head, key| head == 1 && key <= 135)?;
        let mut other = inputs.clone();
        other.lse[20 + 5] = f32::NAN;
        expect(&other, &|head, key| head == 1 && key <= 135)?;

        // LSE of either infinity takes a query out.
        let mut without = inputs.clone();
        for lse in &mut without.lse[..19] {
            *lse = f32::NEG_INFINITY;
        }
        let mut infinite = without.clone();
        for lse in &mut infinite.lse[..19] {
            *lse = f32::INFINITY;
        }
        // Of the first head the last query alone is left; what only others see is nothing to it.
        for inputs in [&mut without, &mut infinite] {
            inputs.q.set(7 * 2 * 72 + 3, f32::NAN);
        }
        let (without, infinite) = (run(device, &case, &without)?, run(device, &case, &infinite)?);
        same("LSE of infinity", &infinite, &without)?;
        let given: f64 = without[0][0].iter().map(|score| f64::from(*score)).sum();
        if (given - 1.0).abs() > 1e-4 {
            return Err(format!("one query gave {given}"));
        }
        // Without LSE a NaN makes every probability of a query that sees it NaN.
        let case = Case { lse: false, ..case.clone() };
        let mut other = inputs.clone();
        other.k.set(140 * 72 + 3, f32::NAN);
        let found = run(device, &case, &other)?;
        if !found[0].iter().flatten().all(|score| score.is_nan()) {
            return Err("a NaN that the last query sees must reach its every key".into());
        }
    }
    Ok(())
}

/// Lengths and positions on the device that nobody should write there lead nowhere outside the tensors.
fn hostile<D: Device>(device: &D) -> Result<(), String> {
    for starts in [
        [0, 50, 100, i32::MAX],
        [-5, 10, 5, 40],
        [i32::MIN, i32::MAX, 3, i32::MIN],
        [90, 100, 101, 200],
        [3, 9, 10, 100],
    ] {
        for lse in [None, Some(Lse::head_major(0, 100)), Some(Lse::padded(0, 4, 60))] {
            let mut memory = Memory::new(device);
            let cu_seqlens = memory.put(bytemuck::cast_slice(&starts));
            let lengths = Lengths::packed(cu_seqlens, 100, 60);
            let positions: Vec<i32> =
                (0..100).map(|query| [i32::MIN, -1, i32::MAX, 1 << 30, 7][query % 5]).collect();
            let work = scores::WindowScores {
                q: Rows::packed(memory.put(&[0; 100 * 4 * 64 * 2]), 4, 64),
                k: Rows::packed(memory.put(&[0; 100 * 2 * 64 * 2]), 2, 64),
                queries: lengths,
                keys: lengths,
                positions: memory.put(bytemuck::cast_slice(&positions)),
                lse: lse.map(|lse| Lse { base: memory.put(&[0; 3 * 4 * 60 * 4]), ..lse }),
                ..plain_work(&mut memory, 64)
            };
            finish(device, &mut memory, work).map_err(|error| format!("{starts:?}: {error}"))?;
        }
    }
    hostile_pages(device)?;
    hostile_lengths(device)
}

/// Pages that are nowhere, and lengths that no sequence has.
fn hostile_pages<D: Device>(device: &D) -> Result<(), String> {
    for (lengths, head_dim, lse) in HOSTILE_LENGTHS
        .into_iter()
        .flat_map(|lengths| [(lengths, 64, true), (lengths, 256, false), (lengths, 128, true)])
    {
        let mut memory = Memory::new(device);
        let table = [i32::MIN, -1, 4, i32::MAX, 5, 3].repeat(6);
        let rows = |memory: &mut Memory<'_, D>, tokens: usize, heads: u32| {
            let elements = tokens * heads as usize * head_dim as usize;
            Rows::token_major(memory.put(&vec![0; elements * 2]), 1, heads, head_dim)
        };
        let work = scores::WindowScores {
            q: Rows { sequence_stride: i64::from(9 * 4 * head_dim), ..rows(&mut memory, 3 * 9, 4) },
            k: Rows { sequence_stride: i64::from(5 * 2 * head_dim), ..rows(&mut memory, 4 * 5, 2) },
            pages: Pages {
                table: memory.put(bytemuck::cast_slice(&table)),
                table_pages: 12,
                pages: 4,
                page_size: 5,
                reserved: 0,
            },
            queries: Lengths::dense(9),
            keys: Lengths::dense(60),
            lengths: memory.put(bytemuck::cast_slice(&lengths)),
            bias: Some(Bias {
                heads: memory.put(&[0xFF; 4]),
                keys: memory.put(&[0xFF; 3 * 8]),
                key_stride: 2,
                value: 1.0,
            }),
            lse: lse.then(|| Lse::head_major(memory.put(&[0; 4 * 27 * 4]), 27)),
            ..plain_work(&mut memory, head_dim)
        };
        let described = |error| format!("{lengths:?}: {error}");
        finish(device, &mut memory, work).map_err(described)?;
        if lse {
            let scores = Scores { window: Window::All, heads: ScoreHeads::Group, ..work.scores };
            let sums = scores::WindowScores { scores, ..work };
            let work = columns::ColumnSums { sums, weight: 1.0, step: 0.5, band: Some(7) };
            // SAFETY: every address is a block of `memory` of the size that its field states.
            let done = unsafe { columns::column_sums(device, &work) }.and_then(|()| device.synchronize());
            done.map_err(|error| described(error.to_string()))?;
        }
    }
    Ok(())
}

/// Lengths that no sequence has, of packed keys.
fn hostile_lengths<D: Device>(device: &D) -> Result<(), String> {
    for lengths in HOSTILE_LENGTHS {
        let mut memory = Memory::new(device);
        let packed = Lengths::packed(memory.put(bytemuck::cast_slice(&[0, 30, 50, 90])), 90, 40);
        let work = scores::WindowScores {
            q: Rows::packed(memory.put(&[0; 90 * 4 * 64 * 2]), 4, 64),
            k: Rows::packed(memory.put(&[0; 90 * 2 * 64 * 2]), 2, 64),
            queries: packed,
            keys: packed,
            lengths: memory.put(bytemuck::cast_slice(&lengths)),
            ..plain_work(&mut memory, 64)
        };
        finish(device, &mut memory, work).map_err(|error| format!("{lengths:?}: {error}"))?;
    }
    Ok(())
}

/// Of three sequences that have at most 60 keys.
pub(crate) const HOSTILE_LENGTHS: [[i32; 3]; 2] = [[i32::MIN, -1, i32::MAX], [61, 60, 0]];

/// Three sequences with room for the scores of 60 keys; what lies where is still to be said.
fn plain_work<D: Device>(memory: &mut Memory<'_, D>, head_dim: u32) -> scores::WindowScores {
    scores::WindowScores {
        sequences: 3,
        query_heads: 4,
        kv_heads: 2,
        head_dim,
        dtype: DType::F16,
        scale: 1.0,
        scores: Scores {
            base: memory.reserve(3 * 4 * 60 * 4),
            sequence_stride: 240,
            head_stride: 60,
            window: Window::Last(9),
            heads: ScoreHeads::Query,
        },
        ..Default::default()
    }
}

/// Scores with a workspace, and waits for them.
fn finish<D: Device>(
    device: &D,
    memory: &mut Memory<'_, D>,
    mut work: scores::WindowScores,
) -> Result<(), String> {
    let error = |error: Error| error.to_string();
    work.workspace_bytes = scores::window_scores_workspace(&work).map_err(error)?;
    work.workspace = memory.reserve(work.workspace_bytes);
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { scores::window_scores(device, &work) }.and_then(|()| device.synchronize()).map_err(error)
}

/// The launch of a description with LSE, with the keys divided among blocks, and room for queries, other than
/// the driver chooses.
fn divided<D: Device>(
    device: &D,
    work: &scores::WindowScores,
    block_keys: u32,
    slots: u32,
) -> Result<(), Error> {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe { scores::window_scores(&recorder, work) }?;
    let Recorded { kernel, grid, block, params } = recorder.last();
    let mut params: WindowScoresParams = bytemuck::pod_read_unaligned(&params);
    let d = work.head_dim;
    let (keys, slot) = (if d == 256 { 64 } else { 128 } * 2 * d, 64 * (2 * d + 8));
    let slots = slots.min(((200 << 10) - keys) / slot);
    params.block_keys = block_keys as i32;
    params.slots = slots as i32;
    // SAFETY: the parameters differ in what leaves every access where it was.
    unsafe {
        device.launch(&Launch {
            kernel,
            grid: [work.keys.longest.div_ceil(block_keys), grid[1], grid[2]],
            cluster: [1, 1, 1],
            block,
            shared_bytes: keys + slots * slot,
            params: bytemuck::bytes_of(&params),
        })
    }
}
