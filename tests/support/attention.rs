//! Prefill attention with scores: descriptions of work, an oracle in f64, and a run on a device.
//!
//! Where memory holds more than a tensor, gaps between heads and rows past the end, it holds NaN.

use std::ops::Range;

use fastkv::{
    abi::{Pages, Rows},
    kernels::{
        DType, Device,
        attention::{self, Form, PrefillAttention},
        batch::{Bias, Lengths, ScoreHeads, Scores, Window, default_scale},
        scores::{self, WindowScores},
    },
};
use half::{bf16, f16};

use super::{
    Check, all,
    lse::{LseLayout, Order, Queries},
    memory::{Memory, Spread, UNTOUCHED},
    pages::{Paging, Pool},
    random::Random,
    scores::{Far, HOSTILE_LENGTHS},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// `[sequences, tokens, heads, d]`.
    TokenMajor,
    /// `[sequences, heads, tokens, d]`.
    HeadMajor,
    /// `[tokens, heads, d]`, sequences of different lengths one after the other.
    Packed,
}

/// What queries, keys and values hold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Contents {
    /// Numbers in [-1, 1), queries times this factor.
    Random(f32),
    /// The same number everywhere in queries and keys: every key gets the same probability.
    Equal,
    /// One key that nothing comes near.
    Huge,
    /// Numbers below the smallest normal one.
    Denormal,
    /// NaN in everything.
    Nan,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    Query,
    Key,
    Value,
}

/// A number in the place of an element of some tokens, of a query head or of a kv head.
#[derive(Clone, Debug)]
pub(crate) struct Planted {
    operand: Operand,
    head: usize,
    sequence: usize,
    tokens: Range<usize>,
    column: usize,
    number: f32,
}

/// One launch.
#[derive(Clone, Debug)]
pub(crate) struct Case {
    pub(crate) dtype: DType,
    pub(crate) head_dim: usize,
    pub(crate) kv_heads: usize,
    /// Query heads for each kv head.
    pub(crate) group: usize,
    pub(crate) layout: Layout,
    /// Heads in memory between those of one token and those of the next, as in packed QKV.
    pub(crate) gap: usize,
    /// Queries and keys of each sequence; all the same unless packed.
    pub(crate) lengths: Vec<(usize, usize)>,
    /// How far `longest` exceeds the longest sequence.
    pub(crate) slack: usize,
    /// Keys that each sequence has room for behind its own, where the device alone knows how many it has.
    pub(crate) spare: Option<usize>,
    /// Pages that keys and values lie in, where there is such room.
    pub(crate) pages: Option<Paging>,
    /// Last key that each query sees, sequence after sequence.
    pub(crate) positions: Option<Vec<i32>>,
    pub(crate) contents: Contents,
    pub(crate) planted: Vec<Planted>,
    pub(crate) bias: Option<BiasBits>,
    pub(crate) lse: bool,
    /// Where it goes.
    pub(crate) lse_layout: LseLayout,
    pub(crate) scores: Option<(Window, ScoreHeads)>,
    pub(crate) form: Option<Form>,
    /// What lies far apart along its outermost axis.
    pub(crate) far: Option<Far>,
    pub(crate) seed: u64,
}

#[derive(Clone, Debug)]
pub(crate) struct BiasBits {
    pub(crate) heads: Vec<bool>,
    /// Of each sequence.
    pub(crate) keys: Vec<Vec<bool>>,
    pub(crate) value: f32,
}

impl Case {
    /// Packed sequences, queries last, output and LSE.
    pub(crate) fn plain(
        dtype: DType,
        head_dim: usize,
        [kv_heads, group]: [usize; 2],
        lengths: &[(usize, usize)],
    ) -> Self {
        Self {
            dtype,
            head_dim,
            kv_heads,
            group,
            layout: Layout::Packed,
            gap: 0,
            lengths: lengths.to_vec(),
            slack: 0,
            spare: None,
            pages: None,
            positions: None,
            contents: Contents::Random(4.0),
            planted: Vec::new(),
            bias: None,
            lse: true,
            lse_layout: LseLayout { gap: 5, ..LseLayout::PLAIN },
            scores: None,
            form: Some(Form::Portable),
            far: None,
            seed: 1,
        }
    }

    /// Everything that may vary, drawn from `seed`.
    pub(crate) fn random(seed: u64, head_dims: &[usize]) -> Self {
        let mut random = Random(seed);
        let layout = random.of(&[Layout::TokenMajor, Layout::HeadMajor, Layout::Packed, Layout::Packed]);
        let mut length = || {
            let queries = random.of(&[0, 1, 7, 33, 64, 65, 100, 130]);
            (queries, if random.below(2) == 0 { queries } else { random.below(200) })
        };
        let lengths = match layout {
            Layout::Packed => (0..3).map(|_| length()).collect(),
            _ => vec![length(); 2],
        };
        let [kv_heads, group] = random.of(&[[1, 1], [1, 2], [2, 1], [1, 3], [1, 5]]);
        let queries: usize = lengths.iter().map(|(queries, _)| queries).sum();
        let longest = lengths.iter().map(|(_, keys)| *keys).max().unwrap_or(0);
        let positions = (random.below(2) == 0)
            .then(|| (0..queries).map(|_| random.below(longest + 20) as i32 - 10).collect());
        let bias = (random.below(3) == 0).then(|| BiasBits {
            heads: (0..kv_heads * group).map(|_| random.below(2) == 0).collect(),
            keys: lengths
                .iter()
                .map(|(_, keys)| (0..*keys).map(|_| random.below(3) == 0).collect())
                .collect(),
            value: random.symmetric() * 5.0,
        });
        let window = random.of(&[Window::Last(1), Window::Last(8), Window::Last(33), Window::All]);
        let heads = random.of(&[ScoreHeads::Query, ScoreHeads::Group]);
        let spare = (random.below(3) == 0).then(|| random.below(90));
        let size = random.of(&[8, 16, 32, 64, 128, 256]);
        let size = if random.below(3) == 0 { 1 + random.below(70) } else { size };
        let pages = Paging { size, holes: random.below(2) == 0 };
        Self {
            layout,
            gap: random.below(3),
            slack: random.below(100),
            spare,
            pages: spare.filter(|_| random.below(3) > 0).map(|_| pages),
            positions,
            contents: Contents::Random(random.of(&[1.0, 8.0])),
            bias,
            lse: random.below(2) == 0,
            lse_layout: LseLayout::random(&mut random),
            scores: (random.below(3) > 0).then_some((window, heads)),
            seed,
            ..Self::plain(
                random.of(&[DType::F16, DType::BF16]),
                random.of(head_dims),
                [kv_heads, group],
                &lengths,
            )
        }
    }

    /// A form, or whichever can where there are no keys, or pages that make up no tile, which Hopper's does not do.
    fn possible(&self, form: Form) -> Option<Form> {
        let has_keys = self.pages.is_some() || self.key_rooms().iter().sum::<usize>() > 0;
        let in_tiles = self.pages.is_none_or(|pages| [8, 16, 32, 64, 128, 256].contains(&pages.size));
        (form == Form::Portable || has_keys && in_tiles).then_some(form)
    }

    fn query_heads(&self) -> usize {
        self.kv_heads * self.group
    }

    fn queries(&self) -> Vec<usize> {
        self.lengths.iter().map(|(queries, _)| *queries).collect()
    }

    fn keys(&self) -> Vec<usize> {
        self.lengths.iter().map(|(_, keys)| *keys).collect()
    }

    /// Keys that sequences have room for.
    fn key_rooms(&self) -> Vec<usize> {
        self.keys().iter().map(|keys| keys + self.spare.unwrap_or(0)).collect()
    }

    /// Keys and values outside pages.
    fn key_tensor(&self) -> Tensor {
        self.tensor(self.kv_heads, self.key_rooms())
    }

    /// Whether a key is nowhere, with its page.
    fn is_absent(&self, sequence: usize, key: usize) -> bool {
        self.pages.is_some_and(|pages| pages.is_absent(sequence, key))
    }

    fn tensor(&self, heads: usize, tokens: Vec<usize>) -> Tensor {
        Tensor { layout: self.layout, heads, gap: self.gap, tokens, width: self.head_dim }
    }

    /// Those whose LSE is wanted, where sequences have room for `longest`.
    fn lse_queries(&self, longest: u32) -> Queries {
        Queries { heads: self.query_heads(), skipped: 0, counts: self.queries(), room: longest as usize }
    }

    /// The last key that a query sees, -1 for none.
    fn last_key(&self, sequence: usize, query: usize) -> i64 {
        let (queries, keys) = self.lengths[sequence];
        let before: usize = self.queries()[..sequence].iter().sum();
        let last = match &self.positions {
            Some(positions) => i64::from(positions[before + query]),
            None => query as i64 + keys as i64 - queries as i64,
        };
        last.min(keys as i64 - 1).max(-1)
    }

    fn lengths_of(&self, tokens: &[usize], cu_seqlens: impl FnOnce(&[i32]) -> u64) -> Lengths {
        if self.layout == Layout::Packed {
            let starts: Vec<i32> =
                (0..=tokens.len()).map(|n| tokens[..n].iter().sum::<usize>() as i32).collect();
            let total = starts[tokens.len()] as usize;
            let longest = tokens.iter().max().copied().unwrap_or(0);
            Lengths::packed(cu_seqlens(&starts), total as u32, (longest + self.slack).min(total) as u32)
        } else {
            Lengths::dense(tokens.first().copied().unwrap_or(0) as u32)
        }
    }
}

/// A tensor of rows as it lies in memory.
struct Tensor {
    layout: Layout,
    heads: usize,
    gap: usize,
    tokens: Vec<usize>,
    width: usize,
}

impl Tensor {
    /// First element of a row.
    fn element(&self, sequence: usize, head: usize, token: usize) -> usize {
        let before: usize = self.tokens[..sequence].iter().sum();
        let row = match self.layout {
            Layout::HeadMajor => {
                let tokens = self.tokens[sequence] + self.gap;
                (sequence * self.heads + head) * tokens + token
            }
            Layout::TokenMajor | Layout::Packed => (before + token) * (self.heads + self.gap) + head,
        };
        row * self.width
    }

    fn elements(&self) -> usize {
        let tokens = self.tokens.iter().sum::<usize>();
        match self.layout {
            Layout::HeadMajor => (tokens + self.gap * self.tokens.len()) * self.heads * self.width,
            Layout::TokenMajor | Layout::Packed => tokens * (self.heads + self.gap) * self.width,
        }
    }

    fn rows(&self, base: u64) -> Rows {
        let tokens = self.tokens.first().map_or(0, |tokens| *tokens);
        let (heads, width) = ((self.heads + self.gap) as u32, self.width as u32);
        match self.layout {
            Layout::TokenMajor => Rows::token_major(base, tokens as u32, heads, width),
            Layout::HeadMajor => Rows::head_major(base, self.heads as u32, (tokens + self.gap) as u32, width),
            Layout::Packed => Rows::packed(base, heads, width),
        }
    }

    /// The stride of the outermost axis.
    fn outermost<'a>(&self, rows: &'a mut Rows) -> &'a mut i64 {
        match self.layout {
            Layout::TokenMajor => &mut rows.sequence_stride,
            Layout::HeadMajor if self.tokens.len() > 1 => &mut rows.sequence_stride,
            Layout::HeadMajor => &mut rows.head_stride,
            Layout::Packed => &mut rows.token_stride,
        }
    }

    fn spread(&self, far: bool) -> Spread {
        let step = *self.outermost(&mut self.rows(0)) as usize;
        Spread::apart_if(far, 2 * step, 2 * self.elements())
    }

    fn spread_rows(&self, base: u64, spread: Spread) -> Rows {
        let mut rows = self.rows(base);
        if let Some(stride) = spread.stride(2) {
            *self.outermost(&mut rows) = stride;
        }
        rows
    }

    /// Every (sequence, head, token).
    fn each(&self, mut visit: impl FnMut(usize, usize, usize)) {
        for (sequence, tokens) in self.tokens.iter().enumerate() {
            for head in 0..self.heads {
                for token in 0..*tokens {
                    visit(sequence, head, token);
                }
            }
        }
    }
}

/// In either type.
const NAN: u16 = 0x7FFF;

/// Elements of a 16-bit type in memory, NaN where nothing is put.
struct Elements {
    dtype: DType,
    bits: Vec<u16>,
}

impl Elements {
    fn new(dtype: DType, count: usize) -> Self {
        Self { dtype, bits: vec![NAN; count] }
    }

    fn put(&mut self, at: usize, value: f32) {
        self.bits[at] = match self.dtype {
            DType::F16 => f16::from_f32(value).to_bits(),
            _ => bf16::from_f32(value).to_bits(),
        };
    }

    fn get(&self, at: usize) -> f64 {
        match self.dtype {
            DType::F16 => f16::from_bits(self.bits[at]).to_f64(),
            _ => bf16::from_bits(self.bits[at]).to_f64(),
        }
    }
}

/// Queries, keys and values.
struct Inputs {
    q: Elements,
    k: Elements,
    v: Elements,
}

impl Inputs {
    fn new(case: &Case) -> Self {
        let smallest = if case.dtype == DType::F16 { 6e-5 } else { 1e-38 };
        let mut random = Random(case.seed ^ 0xA77E);
        let mut fill = |tensor: &Tensor, factor: f32, same: bool| {
            let mut elements = Elements::new(case.dtype, tensor.elements());
            tensor.each(|sequence, head, token| {
                let first = tensor.element(sequence, head, token);
                for i in 0..tensor.width {
                    let value = if same { 1.0 } else { random.symmetric() };
                    elements.put(first + i, value * factor);
                }
            });
            elements
        };
        let (of_queries, of_keys) = match case.contents {
            Contents::Random(factor) => (factor, 1.0),
            Contents::Equal | Contents::Huge => (1.0, 1.0),
            Contents::Denormal => (1.0, smallest),
            Contents::Nan => (f32::NAN, f32::NAN),
        };
        let same = case.contents == Contents::Equal;
        let queries = case.tensor(case.query_heads(), case.queries());
        let keys = case.key_tensor();
        let mut inputs = Self {
            q: fill(&queries, of_queries, same),
            k: fill(&keys, of_keys, same),
            v: fill(&keys, of_keys, false),
        };
        // Behind a sequence's own keys.
        keys.each(|sequence, head, token| {
            if token >= case.lengths[sequence].1 {
                let first = keys.element(sequence, head, token);
                for elements in [&mut inputs.k, &mut inputs.v] {
                    elements.bits[first..first + keys.width].fill(NAN);
                }
            }
        });
        if case.contents == Contents::Huge {
            // Logits of some thousands, of either sign.
            keys.each(|sequence, head, token| {
                if token == 3 {
                    let first = keys.element(sequence, head, token);
                    (0..keys.width).for_each(|i| inputs.k.put(first + i, 2000.0 * (i % 7) as f32));
                }
            });
        }
        for Planted { operand, head, sequence, tokens, column, number } in &case.planted {
            let (tensor, elements) = match operand {
                Operand::Query => (&queries, &mut inputs.q),
                Operand::Key => (&keys, &mut inputs.k),
                Operand::Value => (&keys, &mut inputs.v),
            };
            for token in tokens.clone() {
                elements.put(tensor.element(*sequence, *head, token) + column, *number);
            }
        }
        inputs
    }
}

/// A number and how far from it a kernel may be.
#[derive(Clone, Copy, Debug, Default)]
struct Bound {
    value: f64,
    error: f64,
}

/// What a launch is to write: outputs `[sequence][query head][query][d]`, LSE and scores in the same
/// manner.
struct Expected {
    out: Vec<Bound>,
    lse: Vec<Bound>,
    scores: Vec<Bound>,
}

impl Expected {
    /// Plain loops in f64 over inputs as the kernel gets them.
    ///
    /// Where errors come from. Logits: products of 16-bit numbers are exact in f32, sums of d of them round
    /// d times, by less than 2^-23 of the sum of magnitudes, whether hardware rounds or cuts off; scale and
    /// base 2 cost some roundings of the logit and of the maximum. An error in the logits is a relative
    /// error of probabilities, once for the term and once for the denominator. Probabilities are rounded
    /// to 16 bits before they meet values, which dominates; each block of 64 keys rescales what was
    /// there; n terms are summed in f32. The output is rounded once more. Where a number is not finite none
    /// of this matters: it is met, or it is not.
    fn new(case: &Case, inputs: &Inputs) -> Self {
        let (unit, tiny) = match case.dtype {
            DType::F16 => (2_f64.powi(-11), 2_f64.powi(-25)),
            _ => (2_f64.powi(-8), 2_f64.powi(-134)),
        };
        let single = 2_f64.powi(-23);
        let queries = case.tensor(case.query_heads(), case.queries());
        let keys = case.key_tensor();
        let scale = f64::from(default_scale(case.head_dim as u32));
        let mut expected = Self { out: Vec::new(), lse: Vec::new(), scores: Vec::new() };
        for (sequence, (query_count, key_count)) in case.lengths.iter().copied().enumerate() {
            for kv_head in 0..case.kv_heads {
                let mut group = vec![Bound::default(); key_count];
                for head in kv_head * case.group..(kv_head + 1) * case.group {
                    let mut sums = vec![Bound::default(); key_count];
                    for query in 0..query_count {
                        let seen = (case.last_key(sequence, query) + 1) as usize;
                        let q = queries.element(sequence, head, query);
                        let mut logits = vec![0.0; seen];
                        let (mut magnitude, mut largest) = (0_f64, 0_f64);
                        for (key, logit) in logits.iter_mut().enumerate() {
                            if case.is_absent(sequence, key) {
                                *logit = f64::NEG_INFINITY;
                                continue;
                            }
                            let k = keys.element(sequence, kv_head, key);
                            let products =
                                (0..case.head_dim).map(|i| inputs.q.get(q + i) * inputs.k.get(k + i));
                            *logit = products.clone().sum::<f64>() * scale;
                            if logit.is_finite() {
                                magnitude = magnitude.max(products.map(f64::abs).sum::<f64>() * scale);
                            }
                            if let Some(bias) = &case.bias
                                && bias.heads[head]
                                && bias.keys[sequence][key]
                            {
                                *logit += f64::from(bias.value);
                                largest = largest.max(f64::from(bias.value.abs()));
                            }
                            if logit.is_finite() {
                                largest = largest.max(logit.abs());
                            }
                        }
                        let most = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let sum = logits.iter().map(|logit| weight(*logit, most)).sum::<f64>();
                        let lse = most + sum.ln();
                        let of_logit = single * (case.head_dim as f64 * magnitude + 4.0 * largest + 2.0);
                        let blocks = (seen / 64 + 2) as f64;
                        let of_sum = single * (seen as f64 + blocks * (4.0 + largest));
                        let of_lse = of_logit + of_sum + 2.0 * single * lse.abs();
                        let relative = 2.0 * of_logit + of_sum + 4.0 * single;

                        for i in 0..case.head_dim {
                            let (mut out, mut absolute, mut widest) = (0.0, 0.0, 0_f64);
                            for (key, logit) in logits.iter().enumerate() {
                                let value = inputs.v.get(keys.element(sequence, kv_head, key) + i);
                                let probability = weight(*logit, lse);
                                out += probability * value;
                                absolute += probability * value.abs();
                                widest = widest.max(value.abs());
                            }
                            let error = (unit + 2.0 * relative) * absolute
                                + unit * out.abs()
                                + tiny * (1.0 + seen as f64 * widest);
                            expected.out.push(Bound { value: out, error });
                        }
                        expected.lse.push(Bound { value: lse, error: of_lse });

                        let window = case.scores.map_or(0, |(window, _)| match window {
                            Window::Last(window) => window as usize,
                            Window::All => usize::MAX,
                        });
                        if query >= query_count.saturating_sub(window) {
                            for (sum, logit) in sums.iter_mut().zip(&logits) {
                                let probability = weight(*logit, lse);
                                let relative = of_logit + of_lse + 2.0 * single * (2.0 + largest + lse.abs());
                                sum.value += probability;
                                sum.error += probability * (relative + single * query_count as f64) + 1e-37;
                            }
                        }
                    }
                    match case.scores {
                        Some((_, ScoreHeads::Query)) => expected.scores.extend(sums),
                        Some((_, ScoreHeads::Group)) => {
                            for (group, sum) in group.iter_mut().zip(sums) {
                                group.value += sum.value;
                                group.error += sum.error + single * case.group as f64 * sum.value;
                            }
                        }
                        None => {}
                    }
                }
                if let Some((_, ScoreHeads::Group)) = case.scores {
                    expected.scores.extend(group);
                }
            }
        }
        expected
    }
}

/// e^(logit - base), and 0 where both are -inf: where every logit is, it is as if the query saw no key.
fn weight(logit: f64, base: f64) -> f64 {
    if logit == f64::NEG_INFINITY && base == logit { 0.0 } else { (logit - base).exp() }
}

/// What a launch wrote, in the order of [`Expected`].
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Written {
    /// Bits of the outputs.
    out: Vec<u16>,
    lse: Vec<u32>,
    scores: Vec<u32>,
}

impl Written {
    fn compare(&self, case: &Case, expected: &Expected) -> Result<(), String> {
        let out = Elements { dtype: case.dtype, bits: self.out.clone() };
        compare("out", (0..out.bits.len()).map(|at| out.get(at)), &expected.out)?;
        let single = |bits: &u32| f64::from(f32::from_bits(*bits));
        if case.lse {
            let stored = |natural: &Bound| {
                let value = case.lse_layout.value(natural.value);
                let rounding = 2_f64.powi(-23) * value.abs();
                Bound { value, error: case.lse_layout.value(natural.error) + rounding }
            };
            let expected: Vec<_> = expected.lse.iter().map(stored).collect();
            compare("lse", self.lse.iter().map(single), &expected)?;
        }
        if case.scores.is_some() && query_total(case) > 0 {
            compare("scores", self.scores.iter().map(single), &expected.scores)?;
        }
        Ok(())
    }
}

/// Bits of memory that nothing wrote to.
const UNTOUCHED_HALF: u16 = u16::from_ne_bytes([UNTOUCHED; 2]);
const UNTOUCHED_WORD: u32 = u32::from_ne_bytes([UNTOUCHED; 4]);

fn bits_of(flags: &[bool]) -> Vec<u32> {
    flags
        .chunks(32)
        .map(|flags| flags.iter().enumerate().map(|(bit, set)| u32::from(*set) << bit).sum())
        .collect()
}

/// Runs a case and fetches what it wrote; an error where it wrote anything else.
pub(crate) fn run<D: Device>(device: &D, case: &Case) -> Result<Written, String> {
    launch(device, case, &Inputs::new(case))
}

fn launch<D: Device>(device: &D, case: &Case, inputs: &Inputs) -> Result<Written, String> {
    launch_with(device, case, inputs, None)
}

/// Launches with other `cu_seqlens` than the case's, if there are any.
fn launch_with<D: Device>(
    device: &D,
    case: &Case,
    inputs: &Inputs,
    starts: Option<&[i32]>,
) -> Result<Written, String> {
    let mut memory = Memory::new(device);
    let queries = case.tensor(case.query_heads(), case.queries());
    let keys = case.key_tensor();
    let rooms = case.key_rooms();
    let mut put = |own: &[i32]| memory.put(bytemuck::cast_slice(starts.unwrap_or(own)));
    let of_queries = case.lengths_of(&case.queries(), &mut put);
    let of_keys = match case.pages {
        Some(_) => Lengths::dense(rooms.iter().max().copied().unwrap_or(0) as u32),
        None => case.lengths_of(&rooms, &mut put),
    };
    let key_counts = case.keys();
    let pool = case.pages.map(|paging| Pool {
        paging,
        heads: case.kv_heads,
        head_dim: case.head_dim,
        head_major: case.layout == Layout::HeadMajor,
        counts: &key_counts,
        room: of_keys.tokens as usize,
        far: case.far == Some(Far::Keys),
    });
    let lse_queries = case.lse_queries(of_queries.longest);
    let lse_places = case.lse_layout.places(&lse_queries);
    let lse_elements = case.lse_layout.elements(&lse_queries);
    let far_sums = case.far == Some(Far::Sums);
    let lse_step = case.lse_layout.outermost(&lse_queries);
    let lse_spread = Spread::apart_if(far_sums, 4 * lse_step, 4 * lse_elements);
    let score_heads = match case.scores {
        Some((_, ScoreHeads::Group)) => case.kv_heads,
        _ => case.query_heads(),
    };
    let score_stride = of_keys.longest as usize + 3;
    let sequence_stride = score_heads * score_stride + 2;
    let score_elements = case.lengths.len() * sequence_stride;
    let of_heads = case.lengths.len() == 1;
    let score_step = if of_heads { score_stride } else { sequence_stride };
    let score_spread = Spread::apart_if(far_sums, 4 * score_step, 4 * score_elements);
    let query_spread = queries.spread(case.far == Some(Far::Queries));
    let key_spread = keys.spread(case.far == Some(Far::Keys));
    let out = memory.untouched_spread(queries.elements() * 2, query_spread);
    let lse = memory.untouched_spread(lse_elements * 4, lse_spread);
    let scores = memory.untouched_spread(score_elements * 4, score_spread);
    let bias = case.bias.as_ref().map(|bias| {
        let key_stride = (of_keys.longest as usize).div_ceil(32) + case.gap;
        let words: Vec<u32> = bias
            .keys
            .iter()
            .flat_map(|keys| {
                let mut words = bits_of(keys);
                words.resize(key_stride, !0);
                words
            })
            .collect();
        let spread = Spread::apart_if(far_sums, 4 * key_stride, 4 * words.len());
        Bias {
            heads: memory.put(bytemuck::cast_slice(&bits_of(&bias.heads))),
            keys: memory.put_spread(bytemuck::cast_slice(&words), spread),
            key_stride: spread.stride(4).unwrap_or(key_stride as i64),
            value: bias.value,
        }
    });
    // A pool, where there is one, has other strides for values.
    let mut put = |tensor: &Tensor, elements: &Elements, pool: Option<(&Pool, usize)>, spread| match pool {
        Some((pool, gap)) => pool.put(&mut memory, gap, |[sequence, head, token]| {
            &elements.bits[tensor.element(sequence, head, token)..][..case.head_dim]
        }),
        None => tensor.spread_rows(memory.put_spread(bytemuck::cast_slice(&elements.bits), spread), spread),
    };
    let q = put(&queries, &inputs.q, None, query_spread);
    let k = put(&keys, &inputs.k, pool.as_ref().map(|pool| (pool, 8)), key_spread);
    let v = put(&keys, &inputs.v, pool.as_ref().map(|pool| (pool, 16)), key_spread);
    let counts: Vec<_> = key_counts.iter().map(|keys| *keys as i32).collect();
    let mut work = PrefillAttention {
        q,
        k,
        v,
        pages: pool.as_ref().map_or(Pages::default(), |pool| pool.describe(&mut memory)),
        lengths: case.spare.map_or(0, |_| memory.put(bytemuck::cast_slice(&counts))),
        out: queries.spread_rows(out, query_spread),
        sequences: case.lengths.len() as u32,
        query_heads: case.query_heads() as u32,
        kv_heads: case.kv_heads as u32,
        head_dim: case.head_dim as u32,
        dtype: case.dtype,
        queries: of_queries,
        keys: of_keys,
        positions: case.positions.as_ref().map_or(0, |p| memory.put(bytemuck::cast_slice(p))),
        scale: default_scale(case.head_dim as u32),
        bias,
        lse: case.lse.then(|| case.lse_layout.describe_spread(lse, &lse_queries, lse_spread)),
        scores: case.scores.map(|(window, heads)| {
            let [mut sequence_stride, mut head_stride] = [sequence_stride, score_stride].map(|n| n as i64);
            if let Some(stride) = score_spread.stride(4) {
                *(if of_heads { &mut head_stride } else { &mut sequence_stride }) = stride;
            }
            Scores { base: scores, sequence_stride, head_stride, window, heads }
        }),
        workspace: 0,
        workspace_bytes: 0,
        form: case.form,
    };
    work.workspace_bytes =
        attention::prefill_attention_workspace(&work).map_err(|error| error.to_string())?;
    work.workspace = memory.reserve(work.workspace_bytes);
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { attention::prefill_attention(device, &work) }.map_err(|error| error.to_string())?;

    let bytes = memory.get_spread(out, queries.elements() * 2, query_spread)?;
    let mut found_out: Vec<_> = bytes.chunks_exact(2).map(|b| u16::from_ne_bytes([b[0], b[1]])).collect();
    let words = |address, count: usize, spread| -> Result<Vec<u32>, String> {
        let bytes = memory.get_spread(address, count * 4, spread)?;
        Ok(bytes.chunks_exact(4).map(|b| u32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
    };
    let mut found_lse = words(lse, lse_elements, lse_spread)?;
    let mut found_scores = words(scores, score_elements, score_spread)?;

    // Takes what was to be written, and leaves what was not.
    let mut written = Written { out: Vec::new(), lse: Vec::new(), scores: Vec::new() };
    let take = |found: &mut Vec<u32>, into: &mut Vec<u32>, first: usize, count: usize| {
        into.extend_from_slice(&found[first..first + count]);
        found[first..first + count].fill(UNTOUCHED_WORD);
    };
    if case.lse {
        for place in lse_places {
            take(&mut found_lse, &mut written.lse, place, 1);
        }
    }
    for (sequence, (query_count, key_count)) in case.lengths.iter().copied().enumerate() {
        for head in 0..case.query_heads() {
            for query in 0..query_count {
                let first = queries.element(sequence, head, query);
                written.out.extend_from_slice(&found_out[first..first + case.head_dim]);
                found_out[first..first + case.head_dim].fill(UNTOUCHED_HALF);
            }
        }
        if case.scores.is_some() && query_total(case) > 0 {
            for head in 0..score_heads {
                let first = sequence * sequence_stride + head * score_stride;
                take(&mut found_scores, &mut written.scores, first, key_count);
            }
        }
    }
    if starts.is_some() {
        return Ok(written);
    }
    if found_out.iter().any(|bits| *bits != UNTOUCHED_HALF) {
        return Err("something was written beside the output".into());
    }
    if found_lse.iter().any(|bits| *bits != UNTOUCHED_WORD) {
        return Err("something was written beside the LSE".into());
    }
    if found_scores.iter().any(|bits| *bits != UNTOUCHED_WORD) {
        return Err("something was written beside the scores".into());
    }
    Ok(written)
}

fn query_total(case: &Case) -> usize {
    case.queries().iter().sum()
}

fn compare(what: &str, found: impl ExactSizeIterator<Item = f64>, expected: &[Bound]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} numbers, not {}", found.len(), expected.len()));
    }
    for (at, (found, Bound { value, error })) in found.zip(expected).enumerate() {
        let right = if value.is_nan() {
            found.is_nan()
        } else {
            found == *value || value.is_finite() && (found - value).abs() <= *error
        };
        if !right {
            return Err(format!("{what}[{at}] is {found}, not {value} to within {error}"));
        }
    }
    Ok(())
}

/// Runs a case and compares it with the oracle.
pub(crate) fn check<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let inputs = Inputs::new(case);
    let written = launch(device, case, &inputs)?;
    written.compare(case, &Expected::new(case, &inputs))
}

/// Runs cases in a form; those that Hopper's form does not do it leaves out.
fn check_all<D: Device>(device: &D, form: Form, cases: impl IntoIterator<Item = Case>) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let is_done = |case: &Case| form == Form::Portable || matches!(case.head_dim, 64 | 128);
    let cases = cases.into_iter().filter(is_done);
    all(cases.map(|case| Case { form: case.possible(form), ..case }), |case| check(device, case))
}

/// Whether a device has a form at all.
fn has<D: Device>(device: &D, form: Form) -> bool {
    form != Form::Hopper || device.compute_capability() == (9, 0)
}

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    use Form::{Hopper, Portable};
    vec![
        Check::portable("prefill_attention_lengths", |device, _| check_all(device, Portable, lengths())),
        Check::portable("prefill_attention_shapes", |device, _| check_all(device, Portable, shapes())),
        Check::portable("prefill_attention_groups", |device, seed| {
            check_all(device, Portable, groups(seed, (66, 70)))
        }),
        Check::portable("prefill_attention_positions", |device, _| check_all(device, Portable, positions())),
        Check::portable("prefill_attention_extremes", |device, _| check_all(device, Portable, extremes())),
        Check::portable("prefill_attention_scores", |device, _| check_all(device, Portable, windows())),
        Check::portable("prefill_attention_lse", |device, _| check_all(device, Portable, lse_layouts())),
        Check::portable("prefill_attention_random", |device, seed| {
            check_all(device, Portable, (0..8).map(|n| Case::random(seed * 8 + n, &[64, 64, 96, 128, 256])))
        }),
        Check::portable("prefill_attention_not_finite", |device, _| not_finite(device, Portable)),
        Check::portable("prefill_attention_windows_sum_to_their_queries", |device, seed| {
            sums(device, Portable, seed)
        }),
        Check::portable("prefill_attention_repeats", |device, seed| repeats(device, Portable, seed)),
        Check::portable("prefill_attention_scores_as_scoring_does", |device, seed| {
            same_scores(device, Portable, seed)
        }),
        Check::portable("prefill_attention_pages", |device, _| pages(device, Portable)),
        Check::portable("prefill_attention_hostile", |device, _| hostile(device, Portable)),
        Check::portable("prefill_attention_far_apart", |device, _| far_apart(device, Portable)).far(),
        Check::hopper("sm90_attention_lengths", |device, _| {
            check_all(device, Hopper, lengths().into_iter().chain(long_lengths()))
        }),
        Check::hopper("sm90_attention_shapes", |device, _| check_all(device, Hopper, shapes())),
        Check::hopper("sm90_attention_groups", |device, seed| {
            check_all(device, Hopper, groups(seed, (130, 134)))
        }),
        Check::hopper("sm90_attention_lse", |device, _| check_all(device, Hopper, lse_layouts())),
        Check::hopper("sm90_attention_positions", |device, _| check_all(device, Hopper, positions())),
        Check::hopper("sm90_attention_extremes", |device, _| check_all(device, Hopper, extremes())),
        Check::hopper("sm90_attention_scores", |device, _| {
            check_all(device, Hopper, windows().into_iter().chain(all_queries()))
        }),
        Check::hopper("sm90_attention_bias", |device, seed| check_all(device, Hopper, biased(seed))),
        Check::hopper("sm90_attention_random", |device, seed| {
            check_all(device, Hopper, (0..16).map(|n| Case::random(seed * 16 + n, &[64, 128])))
        }),
        Check::hopper("sm90_attention_not_finite", |device, _| not_finite(device, Hopper)),
        Check::hopper("sm90_attention_windows_sum_to_their_queries", |device, seed| {
            sums(device, Hopper, seed)
        }),
        Check::hopper("sm90_attention_repeats", |device, seed| repeats(device, Hopper, seed)),
        Check::hopper("sm90_attention_scores_as_scoring_does", |device, seed| {
            same_scores(device, Hopper, seed)
        }),
        Check::hopper("sm90_attention_pages", |device, _| pages(device, Hopper)),
        Check::hopper("sm90_attention_hostile", |device, _| hostile(device, Hopper)),
        Check::hopper("sm90_attention_far_apart", |device, _| far_apart(device, Hopper)).far(),
    ]
}

/// Lengths at the edges of tiles of queries (64 and 128) and blocks of keys (64): few queries, one, none;
/// prefixes that are no multiple of a tile; buffers that are used again and again.
fn lengths() -> Vec<Case> {
    vec![
        Case::plain(DType::BF16, 64, [1, 2], &[(64, 64), (1, 129), (0, 0), (130, 230)]),
        Case::plain(DType::F16, 128, [1, 2], &[(63, 63), (0, 70), (3, 0), (65, 128)]),
        Case::plain(DType::BF16, 128, [1, 1], &[(129, 129), (5, 321), (70, 20)]),
        Case::plain(DType::F16, 64, [1, 1], &[(127, 127), (128, 128)]),
        // More sequences than lanes of a warp.
        Case::plain(DType::BF16, 64, [1, 1], &[(0, 3), (2, 5), (1, 1)].repeat(12)),
    ]
}

/// Rings of tiles of 128 keys that go round several times; last tiles with 1, 127 and 128 keys, seen by
/// queries that end at none of these. Tiles of 128 queries that are full, or lack one.
fn long_lengths() -> Vec<Case> {
    vec![
        Case::plain(DType::BF16, 128, [1, 1], &[(127, 127), (128, 128), (128, 255)]),
        Case::plain(DType::F16, 64, [1, 1], &[(256, 256), (255, 300)]),
        Case::plain(DType::BF16, 128, [1, 2], &[(130, 769), (200, 895)]),
        Case::plain(DType::F16, 128, [1, 1], &[(300, 896), (1, 130)]),
        Case::plain(DType::BF16, 64, [1, 1], &[(260, 1025), (77, 733)]),
    ]
}

/// A bias of some heads in tiles that every row sees and in those that not all do, of sequences that end within a word
/// of its bits.
fn biased(seed: u64) -> Vec<Case> {
    let mut random = Random(seed);
    // Nothing lies behind the last bits.
    let lengths = [(70, 203), (130, 520)];
    let bits = |is_biased: &mut dyn FnMut(usize) -> bool| -> Vec<Vec<bool>> {
        lengths.iter().map(|(_, keys)| (0..*keys).map(&mut *is_biased).collect()).collect()
    };
    let scattered =
        BiasBits { heads: vec![true, false, true], keys: bits(&mut |_| random.below(3) == 0), value: -4.5 };
    let nearly_all = BiasBits { heads: vec![false, true], keys: bits(&mut |key| key / 50 != 3), value: 2.0 };
    vec![
        Case { bias: Some(scattered), gap: 1, ..Case::plain(DType::BF16, 64, [1, 3], &lengths) },
        Case {
            bias: Some(nearly_all),
            positions: Some((0..200).map(|row| row * 211 % 521).collect()),
            scores: Some((Window::Last(8), ScoreHeads::Group)),
            ..Case::plain(DType::F16, 128, [2, 1], &lengths)
        },
    ]
}

/// Every head size, type, layout and many GQA ratios.
fn shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    for (number, head_dim) in [64, 96, 128, 256].into_iter().enumerate() {
        for (dtype, layout) in [(DType::BF16, Layout::TokenMajor), (DType::F16, Layout::HeadMajor)] {
            let heads = [[2, 3], [1, 7], [1, 4], [3, 1]][number];
            cases.push(Case {
                layout,
                gap: number % 3,
                ..Case::plain(dtype, head_dim, heads, &[(20, 70); 2])
            });
        }
    }
    cases.extend((1..=16).map(|group| Case {
        scores: Some((Window::Last(4), ScoreHeads::Group)),
        ..Case::plain([DType::F16, DType::BF16][group % 2], 64, [1, group], &[(9, 17)])
    }));
    cases
}

/// Larger groups whose queries are more than a tile, as are those that scores sum over; a part of them for each seed.
fn groups(seed: u64, lengths: (usize, usize)) -> Vec<Case> {
    let groups = (6..=16).filter(|group| group % 4 == seed as usize % 4);
    groups
        .map(|group| {
            let dtype = [DType::F16, DType::BF16][group / 4 % 2];
            let scores = match (group + group / 4) % 2 {
                0 => (Window::Last(60), ScoreHeads::Query),
                _ => (Window::All, ScoreHeads::Group),
            };
            Case { scores: Some(scores), ..Case::plain(dtype, 128, [1, group], &[lengths]) }
        })
        .collect()
}

/// Tokens of one head with d = 64 whose keys and values fill a section.
const SECTION_TOKENS: usize = (32 << 20) / (4 * 64);

/// Queries that were picked from a sequence, in any order; positions outside it.
fn positions() -> Vec<Case> {
    let gathered = |positions: Vec<i32>, lengths: &[(usize, usize)]| Case {
        positions: Some(positions),
        scores: Some((Window::Last(5), ScoreHeads::Query)),
        ..Case::plain(DType::BF16, 64, [1, 2], lengths)
    };
    vec![
        gathered((0..70).map(|i| i * 7 % 200).collect(), &[(70, 200)]),
        gathered((0..70).map(|i| i * 2).collect(), &[(70, 140)]),
        gathered(vec![i32::MIN, -1, 0, 63, 64, 129, 130, i32::MAX], &[(8, 130)]),
        gathered(vec![-1; 12], &[(3, 70), (9, 70)]),
        Case { head_dim: 256, ..gathered((0..70).map(|i| i * 7 % 90).collect(), &[(70, 90)]) },
        Case { head_dim: 96, ..gathered((0..9).map(|i| i * 7 % 70).collect(), &[(9, 70)]) },
        // A section of two kv heads, and one of one, with two tiles of queries each.
        Case {
            positions: Some((0..130).collect()),
            ..Case::plain(DType::BF16, 64, [3, 1], &[(130, SECTION_TOKENS * 2 / 5)])
        },
    ]
}

fn extremes() -> Vec<Case> {
    let mut cases = Vec::new();
    let contents =
        [Contents::Equal, Contents::Huge, Contents::Denormal, Contents::Random(60.0), Contents::Nan];
    for (contents, dtype) in
        contents.into_iter().flat_map(|contents| [(contents, DType::F16), (contents, DType::BF16)])
    {
        for head_dim in [64, 96, 128, 256] {
            let scores = Some((Window::Last(4), ScoreHeads::Group));
            cases.push(Case { contents, scores, ..Case::plain(dtype, head_dim, [1, 2], &[(20, 140)]) });
        }
    }
    // Logits of -inf in all keys but the first ones, which are read last.
    for (head_dim, tokens) in [(64, 100..384), (128, 1..384), (128, 0..384)] {
        let number = f32::NEG_INFINITY;
        let planted = Planted { operand: Operand::Key, head: 0, sequence: 0, tokens, column: 9, number };
        cases.push(Case {
            contents: Contents::Equal,
            planted: vec![planted],
            scores: Some((Window::Last(2), ScoreHeads::Query)),
            ..Case::plain(DType::BF16, head_dim, [1, 1], &[(3, 384)])
        });
    }
    cases
}

/// Windows that straddle tiles of queries, are shorter than asked for, and of every length; more keys than
/// a score item has; the bias.
fn windows() -> Vec<Case> {
    let with = |window, heads, case| Case { scores: Some((window, heads)), ..case };
    let bf16 = |head_dim, heads, lengths: &[_]| Case::plain(DType::BF16, head_dim, heads, lengths);
    // Of the first tile the last query alone is in the window.
    let straddling = [(135, 230), (5, 40), (0, 30)];
    vec![
        with(Window::Last(8), ScoreHeads::Query, bf16(64, [1, 3], &straddling)),
        Case {
            lse: false,
            ..with(Window::Last(64), ScoreHeads::Group, Case::plain(DType::F16, 128, [2, 1], &[(66, 70)]))
        },
        with(Window::Last(1), ScoreHeads::Query, bf16(96, [1, 1], &[(1, 513)])),
        with(Window::Last(33), ScoreHeads::Group, bf16(256, [1, 5], &[(40, 40)])),
        with(Window::All, ScoreHeads::Group, bf16(64, [1, 2], &[(130, 200), (3, 3)])),
        with(Window::All, ScoreHeads::Group, Case::plain(DType::F16, 96, [1, 2], &[(70, 90)])),
        with(Window::All, ScoreHeads::Group, Case::plain(DType::F16, 256, [1, 2], &[(66, 70)])),
        Case {
            bias: Some(BiasBits {
                heads: vec![true, false, true],
                keys: vec![(0..160).map(|key| key % 3 == 0).collect()],
                value: 3.0,
            }),
            ..with(Window::Last(10), ScoreHeads::Query, bf16(128, [1, 3], &[(70, 160)]))
        },
    ]
}

/// All queries of two tiles, and keys of three score items.
fn all_queries() -> Vec<Case> {
    let scores = Some((Window::All, ScoreHeads::Group));
    vec![
        Case { scores, ..Case::plain(DType::BF16, 128, [1, 2], &[(150, 600)]) },
        Case { scores, ..Case::plain(DType::F16, 64, [1, 1], &[(30, 600)]) },
    ]
}

/// Keys and values in pages of any size, all there or not, of sequences with lengths of their own; and such lengths alone.
fn paged() -> Vec<Case> {
    let with = |size, holes, case| Case { spare: Some(20), pages: Some(Paging { size, holes }), ..case };
    let scored = |window, heads, case| Case { scores: Some((window, heads)), ..case };
    let lengths = [(70, 203), (1, 9), (0, 40), (130, 300)];
    let mut cases = vec![
        Case { spare: Some(37), ..Case::plain(DType::BF16, 64, [1, 2], &lengths) },
        Case {
            spare: Some(90),
            layout: Layout::HeadMajor,
            scores: Some((Window::Last(8), ScoreHeads::Group)),
            ..Case::plain(DType::F16, 128, [2, 1], &[(40, 70); 2])
        },
    ];
    for (number, size) in [16, 1, 64, 8, 100, 128, 32, 256, 24].into_iter().enumerate() {
        let dtype = [DType::BF16, DType::F16][number % 2];
        let layout = [Layout::Packed, Layout::HeadMajor][number / 2 % 2];
        let lengths = if layout == Layout::Packed { &lengths } else { &[(70, 150); 4] };
        let heads = [[1, 2], [2, 1], [1, 3]][number % 3];
        for head_dim in [64, 128] {
            let plain = Case { layout, ..Case::plain(dtype, head_dim, heads, lengths) };
            let heads = [ScoreHeads::Query, ScoreHeads::Group][number % 2];
            cases.push(with(size, number % 2 == head_dim / 128, scored(Window::Last(8), heads, plain)));
        }
    }
    for (head_dim, dtype) in [96, 256].into_iter().flat_map(|d| [(d, DType::BF16), (d, DType::F16)]) {
        let plain = Case::plain(dtype, head_dim, [1, 2], &[(20, 140), (70, 66)]);
        cases.push(with(16, dtype == DType::F16, scored(Window::All, ScoreHeads::Group, plain)));
    }
    // Queries at places of their own, some of which see nothing but what is absent, with a bias.
    let gathered = Case {
        positions: Some((0..70).map(|i| i * 7 % 200).collect()),
        bias: Some(BiasBits {
            heads: vec![true, false],
            keys: vec![(0..200).map(|key| key % 3 == 0).collect()],
            value: 3.0,
        }),
        ..Case::plain(DType::BF16, 128, [1, 2], &[(70, 200)])
    };
    cases.push(with(32, true, scored(Window::Last(5), ScoreHeads::Query, gathered)));
    let second =
        |dtype| Case { lengths: vec![(0, 8), (0, 8), (9, 16)], ..Case::plain(dtype, 64, [1, 1], &[]) };
    cases.push(with(16, true, scored(Window::Last(9), ScoreHeads::Query, second(DType::F16))));
    cases
}

/// Against the oracle; the same bits as outside of pages, where all are there; tables and lengths that make no sense.
fn pages<D: Device>(device: &D, form: Form) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    check_all(device, form, paged())?;
    for (head_dim, size) in [(64, 16), (128, 128)] {
        let apart = Case {
            scores: Some((Window::Last(8), ScoreHeads::Query)),
            form: Some(form),
            ..Case::plain(DType::BF16, head_dim, [2, 2], &[(70, 203), (3, 64)])
        };
        let inputs = Inputs::new(&apart);
        let expected = launch(device, &apart, &inputs)?;
        // Pages end in NaN.
        let paged = Case { spare: Some(0), pages: Some(Paging { size, holes: false }), ..apart };
        if launch(device, &paged, &inputs)? != expected {
            return Err(format!("other bits than outside of pages\n{paged:?}"));
        }
    }
    for (lengths, head_dim) in HOSTILE_LENGTHS.into_iter().zip([64, 128, 64, 128].into_iter().cycle()) {
        let mut memory = Memory::new(device);
        let table = [i32::MIN, -1, 4, i32::MAX, 5, 3].repeat(6);
        let mut rows = |tokens: u32, heads: u32, sequences: usize| {
            let elements = sequences * (tokens * heads * head_dim) as usize;
            Rows::token_major(memory.put(&vec![0; elements * 2]), tokens, heads, head_dim)
        };
        let (q, out, k, v) = (rows(9, 4, 3), rows(9, 4, 3), rows(8, 2, 4), rows(8, 2, 4));
        let mut work = PrefillAttention {
            q,
            k,
            v,
            out,
            pages: Pages {
                table: memory.put(bytemuck::cast_slice(&table)),
                table_pages: 12,
                pages: 4,
                page_size: 8,
                reserved: 0,
            },
            sequences: 3,
            query_heads: 4,
            kv_heads: 2,
            head_dim,
            queries: Lengths::dense(9),
            keys: Lengths::dense(96),
            lengths: memory.put(bytemuck::cast_slice(&lengths)),
            scale: default_scale(head_dim),
            scores: Some(Scores {
                base: memory.untouched(3 * 4 * 96 * 4),
                sequence_stride: 4 * 96,
                head_stride: 96,
                window: Window::Last(8),
                heads: ScoreHeads::Query,
            }),
            form: Some(form),
            ..Default::default()
        };
        let needed = attention::prefill_attention_workspace(&work).map_err(|error| error.to_string())?;
        (work.workspace, work.workspace_bytes) = (memory.reserve(needed), needed);
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { attention::prefill_attention(device, &work) }
            .and_then(|()| device.synchronize())
            .map_err(|error| format!("{lengths:?}: {error}"))?;
    }
    Ok(())
}

/// LSE in every place and of either kind, which scores are made of; of sequences with other lengths, and of the same.
fn lse_layouts() -> Vec<Case> {
    let packed = Case::plain(DType::BF16, 64, [2, 2], &[(70, 140), (0, 5), (20, 20)]);
    let dense = Case { layout: Layout::HeadMajor, ..Case::plain(DType::F16, 128, [1, 3], &[(37, 37); 2]) };
    let scores = Some((Window::Last(8), ScoreHeads::Query));
    // More items than there are blocks: one that scored a head scores another, whose LSE stands between that head's.
    let lse_layout = LseLayout { order: Order::TokenMajor, ..LseLayout::PLAIN };
    let many = Case::plain(DType::BF16, 64, [8, 1], &[(9, 12); 40]);
    let many = Case { lse_layout, scores, ..many };
    LseLayout::each()
        .zip([packed, dense].iter().cycle())
        .flat_map(|(lse_layout, case)| {
            [Case { lse_layout, ..case.clone() }, Case { lse_layout, scores, ..case.clone() }]
        })
        .chain([many])
        .collect()
}

/// NaN and infinities in queries, keys and values, each kind in kv heads of its own: rows that see them have what IEEE
/// arithmetic says. Everything else has the bits that it has without them; on Hopper, in the columns of such
/// values of its own sequence, what it has up to rounding.
fn not_finite<D: Device>(device: &D, form: Form) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let lengths = [(70, 100), (33, 50)];
    // Keys that rows see wherever they stand; the first row of each sequence sees none, the last key is seen by none.
    let spread: Vec<i32> = lengths
        .iter()
        .flat_map(|&(queries, keys)| {
            (0..queries).map(move |i| (i * keys / queries) as i32 - i32::from(i == 0))
        })
        .collect();
    let works = match form {
        Form::Portable => [
            (DType::BF16, 64, false),
            (DType::F16, 256, true),
            (DType::F16, 96, false),
            (DType::BF16, 128, true),
        ],
        Form::Hopper => [
            (DType::BF16, 64, false),
            (DType::F16, 128, true),
            (DType::F16, 64, true),
            (DType::BF16, 128, false),
        ],
    };
    for (dtype, head_dim, is_spread) in works {
        let clean = Case {
            form: Some(form),
            positions: is_spread.then(|| spread.clone()),
            bias: is_spread.then(|| BiasBits {
                heads: (0..10).map(|head| head % 3 == 0).collect(),
                keys: lengths.iter().map(|(_, keys)| (0..*keys).map(|key| key % 3 != 1).collect()).collect(),
                value: -2.5,
            }),
            scores: Some((Window::Last(5), ScoreHeads::Query)),
            ..Case::plain(dtype, head_dim, [5, if is_spread { 2 } else { 1 }], &lengths)
        };
        let case = Case { planted: planted(head_dim), ..clean.clone() };
        let describe = |error| format!("{error}\n{case:?}");
        let (inputs, clean_inputs) = (Inputs::new(&case), Inputs::new(&clean));
        let (found, without) = (launch(device, &case, &inputs)?, launch(device, &clean, &clean_inputs)?);
        let (expected, usual) = (Expected::new(&case, &inputs), Expected::new(&clean, &clean_inputs));
        found.compare(&case, &expected).map_err(describe)?;
        let same = |at: usize, expected: &[Bound], usual: &[Bound]| expected[at].value == usual[at].value;
        let is_anew = |at: usize| {
            let sequence = at / (lengths[0].0 * case.query_heads() * head_dim);
            let of_values = |planted: &Planted| {
                planted.operand == Operand::Value
                    && planted.sequence == usize::from(sequence > 0)
                    && planted.column == at % head_dim
                    && form == Form::Hopper
            };
            case.planted.iter().any(of_values)
        };
        let changed = (0..found.out.len())
            .filter(|at| same(*at, &expected.out, &usual.out) && !is_anew(*at))
            .find(|at| found.out[*at] != without.out[*at]);
        if let Some(at) = changed {
            return Err(describe(format!("out[{at}] changed, which sees nothing that did")));
        }
        let words = [
            ("lse", &found.lse, &without.lse, &expected.lse, &usual.lse),
            ("scores", &found.scores, &without.scores, &expected.scores, &usual.scores),
        ];
        for (what, found, without, expected, usual) in words {
            let changed =
                (0..found.len()).find(|at| same(*at, expected, usual) && found[*at] != without[*at]);
            if let Some(at) = changed {
                return Err(describe(format!("{what}[{at}] changed, which sees nothing that did")));
            }
        }
    }
    Ok(())
}

/// Of heads 0..5: values, then keys with NaN, inf and -inf, then queries and a value; in keys that every row sees, some,
/// one or none, and in the sequence behind, which a tile may hold too. Some blocks of keys have such values in
/// even columns alone, some in odd ones, in the upper half, or in their last key.
fn planted(head_dim: usize) -> Vec<Planted> {
    use Operand::{Key, Query, Value};
    const NAN: f32 = f32::NAN;
    const INF: f32 = f32::INFINITY;
    let (middle, last) = (head_dim / 2 + 3, head_dim - 1);
    [
        (Value, 0, (0, 10), 2, INF),
        (Value, 0, (0, 40), last - 1, NAN),
        (Value, 0, (0, 85), middle, -INF),
        (Value, 0, (0, 90), 1, NAN),
        // Rows that see both have NaN.
        (Value, 0, (0, 70), last, -INF),
        (Value, 0, (0, 95), last, INF),
        (Value, 0, (0, 99), 7, NAN),
        (Value, 0, (1, 0), middle, INF),
        (Value, 0, (1, 49), last - 2, -INF),
        (Value, 4, (0, 63), 2, -INF),
        (Key, 1, (0, 64), 0, NAN),
        (Key, 1, (1, 0), last, NAN),
        (Key, 2, (0, 80), last, INF),
        (Key, 2, (1, 30), 1, INF),
        (Key, 3, (0, 85), middle, -INF),
        (Key, 3, (0, 99), 2, NAN),
        (Key, 3, (1, 49), 0, -INF),
        (Query, 4, (0, 0), 3, NAN),
        (Query, 4, (0, 40), last, INF),
        (Query, 4, (0, 68), 0, -INF),
        (Query, 4, (1, 0), middle, INF),
        (Query, 4, (1, 31), 1, NAN),
    ]
    .map(|(operand, head, (sequence, token), column, number)| Planted {
        operand,
        head,
        sequence,
        tokens: token..token + 1,
        column,
        number,
    })
    .to_vec()
}

/// Probabilities of a query add up to 1, so those of a window to its queries.
fn sums<D: Device>(device: &D, form: Form, seed: u64) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let lengths = [(20, 130), (3, 60)];
    let case = Case {
        scores: Some((Window::Last(9), ScoreHeads::Group)),
        form: Some(form),
        seed,
        ..Case::plain(DType::BF16, 128, [1, 4], &lengths)
    };
    let written = run(device, &case)?;
    let mut scores = written.scores.iter().map(|bits| f64::from(f32::from_bits(*bits)));
    for (queries, keys) in lengths {
        let sum: f64 = scores.by_ref().take(keys).sum();
        let expected = (4 * queries.min(9)) as f64;
        // LSE and logits of magnitude 4 each cost a few units in the last place of f32.
        if (sum - expected).abs() > 1e-5 * expected {
            return Err(format!("scores add up to {sum}, not {expected}"));
        }
    }
    Ok(())
}

/// The same bits in every run, and whatever else is in the batch.
fn repeats<D: Device>(device: &D, form: Form, seed: u64) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let lengths = [(70, 150), (0, 9), (33, 33), (3, 200)];
    let case = Case {
        scores: Some((Window::Last(8), ScoreHeads::Query)),
        positions: Some((0..106).map(|i| i * 37 % 150).collect()),
        form: Some(form),
        seed,
        ..Case::plain(DType::BF16, 64, [1, 2], &lengths)
    };
    let inputs = Inputs::new(&case);
    let whole = launch(device, &case, &inputs)?;
    if launch(device, &case, &inputs)? != whole {
        return Err("two runs differ".into());
    }
    let mut rest = whole;
    let (mut first_query, mut first_key) = (0, 0);
    for (queries, keys) in lengths {
        let part = |elements: &Elements, first: usize, count: usize, heads: usize| Elements {
            dtype: elements.dtype,
            bits: elements.bits[first * heads * case.head_dim..(first + count) * heads * case.head_dim]
                .to_vec(),
        };
        let alone = Case {
            lengths: vec![(queries, keys)],
            positions: case.positions.as_ref().map(|p| p[first_query..first_query + queries].to_vec()),
            ..case.clone()
        };
        let inputs = Inputs {
            q: part(&inputs.q, first_query, queries, 2),
            k: part(&inputs.k, first_key, keys, 1),
            v: part(&inputs.v, first_key, keys, 1),
        };
        let found = launch(device, &alone, &inputs)?;
        (first_query, first_key) = (first_query + queries, first_key + keys);
        let out = rest.out.split_off(2 * queries * case.head_dim);
        let lse = rest.lse.split_off(2 * queries);
        let scores = rest.scores.split_off(2 * keys);
        // Without a query in the batch nothing is launched, and nothing written.
        if queries > 0 && found != rest {
            return Err(format!("({queries}, {keys}) differs alone"));
        }
        rest = Written { out, lse, scores };
    }
    Ok(())
}

/// Scores are bit for bit those of the kernel that only scores, given the LSE that attention found.
fn same_scores<D: Device>(device: &D, form: Form, seed: u64) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let cases = [
        (64, Window::Last(8), ScoreHeads::Query),
        (128, Window::Last(40), ScoreHeads::Group),
        (64, Window::All, ScoreHeads::Group),
    ];
    for (head_dim, window, heads) in cases {
        let case = Case {
            scores: Some((window, heads)),
            form: Some(form),
            seed,
            ..Case::plain(DType::BF16, head_dim, [1, 4], &[(70, 140), (20, 20)])
        };
        let inputs = Inputs::new(&case);
        let fused = launch(device, &case, &inputs)?;
        let mut memory = Memory::new(device);
        let queries = case.tensor(case.query_heads(), case.queries());
        let keys = case.tensor(case.kv_heads, case.keys());
        let lse_queries = case.lse_queries(70);
        let mut lse = vec![0; 4 * 90];
        for (place, bits) in LseLayout::PLAIN.places(&lse_queries).into_iter().zip(&fused.lse) {
            lse[place] = *bits;
        }
        let count = if heads == ScoreHeads::Query { 4 } else { 1 };
        let base = memory.untouched(2 * count * 140 * 4);
        let work = WindowScores {
            q: queries.rows(memory.put(bytemuck::cast_slice(&inputs.q.bits))),
            k: keys.rows(memory.put(bytemuck::cast_slice(&inputs.k.bits))),
            sequences: 2,
            query_heads: 4,
            kv_heads: 1,
            head_dim: head_dim as u32,
            dtype: case.dtype,
            queries: case.lengths_of(&case.queries(), |starts| memory.put(bytemuck::cast_slice(starts))),
            keys: case.lengths_of(&case.keys(), |starts| memory.put(bytemuck::cast_slice(starts))),
            scale: default_scale(head_dim as u32),
            lse: Some(LseLayout::PLAIN.describe(memory.put(bytemuck::cast_slice(&lse)), &lse_queries)),
            scores: Scores { base, sequence_stride: count as i64 * 140, head_stride: 140, window, heads },
            ..Default::default()
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { scores::window_scores(device, &work) }.map_err(|error| error.to_string())?;
        let mut expected = vec![UNTOUCHED; 2 * count * 140 * 4];
        let mut from = bytemuck::cast_slice::<_, u8>(&fused.scores);
        for (sequence, keys) in [140, 20].into_iter().enumerate() {
            for head in 0..count {
                let row;
                (row, from) = from.split_at(keys * 4);
                expected[(sequence * count + head) * 140 * 4..][..keys * 4].copy_from_slice(row);
            }
        }
        memory.expect("scores", base, &expected).map_err(|error| format!("{error}\n{case:?}"))?;
    }
    Ok(())
}

/// Sequences, heads and tokens of every tensor further apart than 32 bits count: the same bits as close together. The last
/// key has a value that is not finite, which some rows of its tile do not see.
fn far_apart<D: Device>(device: &D, form: Form) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let of_sequences = Case {
        layout: Layout::TokenMajor,
        lse_layout: LseLayout { order: Order::Padded, ..LseLayout::PLAIN },
        bias: Some(BiasBits {
            heads: vec![true, false],
            keys: vec![(0..70).map(|key| key % 3 == 0).collect(); 2],
            value: 2.0,
        }),
        scores: Some((Window::Last(8), ScoreHeads::Group)),
        ..Case::plain(DType::BF16, 64, [1, 2], &[(40, 70); 2])
    };
    let of_heads = Case {
        layout: Layout::HeadMajor,
        lse_layout: LseLayout::PLAIN,
        scores: Some((Window::Last(3), ScoreHeads::Query)),
        ..Case::plain(DType::F16, 128, [2, 1], &[(20, 135)])
    };
    let of_tokens = Case {
        layout: Layout::Packed,
        lse_layout: LseLayout { order: Order::TokenMajor, ..LseLayout::PLAIN },
        scores: Some((Window::Last(8), ScoreHeads::Query)),
        ..Case::plain(DType::BF16, 128, [1, 2], &[(70, 130), (5, 9)])
    };
    // Rows of one thread lie so far apart that their distances together are too large for 32 bits.
    let of_few_tokens = Case { lengths: vec![(12, 12)], ..of_tokens.clone() };
    let in_pages =
        Case { spare: Some(9), pages: Some(Paging { size: 16, holes: false }), ..of_tokens.clone() };
    for case in [of_sequences, of_heads, of_tokens, of_few_tokens, in_pages] {
        let (queries, keys) = case.lengths[0];
        let value = Planted {
            operand: Operand::Value,
            head: 0,
            sequence: 0,
            tokens: keys - 1..keys,
            column: 5,
            number: f32::INFINITY,
        };
        let near = Case { planted: vec![value], form: Some(form), seed: queries as u64, ..case };
        let inputs = Inputs::new(&near);
        let expected = launch(device, &near, &inputs)?;
        expected
            .compare(&near, &Expected::new(&near, &inputs))
            .map_err(|error| format!("{error}\n{near:?}"))?;
        for far in [Far::Queries, Far::Keys, Far::Sums] {
            let case = Case { far: Some(far), ..near.clone() };
            if launch(device, &case, &inputs).map_err(|error| format!("{error}\n{case:?}"))? != expected {
                return Err(format!("other bits than close together\n{case:?}"));
            }
        }
    }
    Ok(())
}

/// Starts of sequences that make no sense: nothing outside the tensors is touched.
fn hostile<D: Device>(device: &D, form: Form) -> Result<(), String> {
    if !has(device, form) {
        return Ok(());
    }
    let case = Case {
        bias: Some(BiasBits {
            heads: vec![true, false],
            keys: [80, 50, 0].map(|keys| vec![true; keys]).to_vec(),
            value: 1.0,
        }),
        scores: Some((Window::Last(8), ScoreHeads::Query)),
        form: Some(form),
        ..Case::plain(DType::BF16, 64, [1, 2], &[(40, 80), (30, 50), (0, 0)])
    };
    let padded = Case { lse_layout: LseLayout { order: Order::Padded, ..case.lse_layout }, ..case.clone() };
    let inputs = Inputs::new(&case);
    for starts in [
        [i32::MIN, i32::MAX, -1, 70],
        [0, i32::MAX, i32::MIN, 10],
        [60, 30, 500, 20],
        [0, 70, 70, 70],
        [i32::MAX, i32::MAX, i32::MAX, i32::MAX],
    ] {
        for case in [&case, &padded] {
            launch_with(device, case, &inputs, Some(&starts))?;
        }
    }
    Ok(())
}
