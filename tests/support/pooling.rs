//! Pooling of scores: descriptions of work, plain loops in f64 that say what should come out, and runs on a device.

use fastkv::{
    abi::Pooling,
    kernels::{
        Device,
        batch::{Lengths, ScoreRows},
        scores::{PoolScores, pool_scores},
    },
};

use super::{
    Check, all,
    memory::{Memory, Spread, UNTOUCHED},
    random::Random,
    scores::{HOSTILE_LENGTHS, ULP},
};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("pool_scores", |device, seed| {
            all((0..25).map(|n| Case::random(seed * 25 + n)), |case| check(device, case))
        }),
        Check::portable("pool_scores_hostile", |device, _| hostile(device)),
        Check::portable("pool_scores_far_apart", |device, _| all(far_apart(), |case| check(device, case)))
            .far(),
    ]
}

/// One run of `pool_scores`.
#[derive(Clone, Debug)]
struct Case {
    kv_heads: usize,
    group: usize,
    packed: bool,
    keys: Vec<usize>,
    /// Whether the device alone knows how many these are: there is room for some more.
    lengths: bool,
    tail: usize,
    pooling: Pooling,
    groups: bool,
    total: bool,
    /// Whether rows begin at multiples of 16 bytes.
    aligned: bool,
    /// Whether rows, or sequences of them where there are several, lie far apart.
    far: bool,
    seed: u64,
}

impl Case {
    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let packed = random.below(2) == 0;
        let keys = |random: &mut Random| random.of(&[0, 1, 3, 7, 8, 127, 128, 129, 300]) + random.below(3);
        let uniform = keys(&mut random);
        let on_device = random.below(2) == 0;
        let kernel = random.of(&[1, 3, 5, 7, 9, 21, 31, 63]);
        Self {
            kv_heads: random.of(&[1, 2, 7, 8, 9, 17]),
            group: random.of(&[1, 2, 3, 4, 7]),
            packed,
            keys: (0..1 + random.below(3))
                .map(|_| if packed || on_device { keys(&mut random) } else { uniform })
                .collect(),
            lengths: on_device,
            tail: random.of(&[0, 1, 8, 64]),
            pooling: if random.below(2) == 0 { Pooling::max(kernel) } else { Pooling::average(kernel) },
            groups: random.below(4) > 0,
            total: random.below(3) > 0,
            aligned: random.below(2) == 0,
            far: false,
            seed,
        }
    }
}

/// Heads and sequences further apart than 32 bits count, in vectors and not.
fn far_apart() -> Vec<Case> {
    let case = Case {
        kv_heads: 2,
        group: 2,
        packed: false,
        keys: vec![300],
        lengths: false,
        tail: 0,
        pooling: Pooling::max(7),
        groups: true,
        total: true,
        aligned: true,
        far: true,
        seed: 8,
    };
    vec![
        case.clone(),
        // Two heads in all: their stride itself is larger.
        Case { kv_heads: 1, ..case.clone() },
        Case { keys: vec![300; 2], pooling: Pooling::average(5), ..case.clone() },
        Case { keys: vec![40; 3], pooling: Pooling::NONE, aligned: false, ..case },
    ]
}

/// Runs a pooling and compares it with plain loops.
fn check<D: Device>(device: &D, case: &Case) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let mut random = Random(case.seed);
    let room = if case.lengths { 5 } else { 0 };
    let longest = case.keys.iter().copied().max().unwrap_or(0) + room;
    let sequences = case.keys.len();
    let query_heads = case.kv_heads * case.group;
    let stride = if case.aligned { longest.next_multiple_of(4) } else { longest + 1 };
    let score = |random: &mut Random| match random.below(50) {
        0 => random.of(&[f32::NAN, f32::INFINITY, f32::NEG_INFINITY]),
        _ => random.symmetric(),
    };
    let scores: Vec<f32> = (0..sequences * query_heads * stride).map(|_| score(&mut random)).collect();
    let mut starts = vec![0];
    for keys in &case.keys {
        starts.push(starts.last().unwrap() + (keys + room) as i32);
    }
    let keys = if case.packed {
        let total = *starts.last().unwrap() as u32;
        Lengths::packed(memory.put(bytemuck::cast_slice(&starts)), total, longest as u32)
    } else {
        Lengths::dense(longest as u32)
    };
    let lengths = if case.lengths {
        let each: Vec<_> = case.keys.iter().map(|keys| *keys as i32).collect();
        memory.put(bytemuck::cast_slice(&each))
    } else {
        0
    };
    let spread = |heads: usize| {
        let step = if sequences > 1 { heads * stride } else { stride };
        Spread::apart_if(case.far, 4 * step, 4 * sequences * heads * stride)
    };
    let mut rows = |heads: usize, contents: Option<&[f32]>| {
        let (mut sequence_stride, mut head_stride) = ((heads * stride) as i64, stride as i64);
        let outermost = if sequences > 1 { &mut sequence_stride } else { &mut head_stride };
        *outermost = spread(heads).stride(4).unwrap_or(*outermost);
        let bytes = (sequences * heads * stride * 4).max(1);
        let base = match contents {
            Some(contents) => memory.put_spread(bytemuck::cast_slice(contents), spread(heads)),
            None => memory.untouched_spread(bytes, spread(heads)),
        };
        ScoreRows { base, sequence_stride, head_stride }
    };
    let work = PoolScores {
        // Nothing lies behind the last score.
        scores: rows(query_heads, Some(&scores[..scores.len() + longest - stride])),
        sequences: sequences as u32,
        query_heads: query_heads as u32,
        kv_heads: case.kv_heads as u32,
        keys,
        lengths,
        tail: case.tail as u32,
        pooling: case.pooling,
        groups: case.groups.then(|| rows(case.kv_heads, None)),
        total: case.total.then(|| rows(1, None)),
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { pool_scores(device, &work) }.map_err(|error| error.to_string())?;

    let untouched =
        Expected { bits: Some(f32::from_ne_bytes([UNTOUCHED; 4]).to_bits()), ..Expected::default() };
    let mut groups = vec![untouched; sequences * case.kv_heads * stride];
    let mut total = vec![untouched; sequences * stride];
    for (sequence, keys) in case.keys.iter().enumerate() {
        let keys = keys.saturating_sub(case.tail);
        for key in 0..keys {
            let mut all_heads = Expected::default();
            for kv_head in 0..case.kv_heads {
                let mut group = Expected::default();
                for head in kv_head * case.group..(kv_head + 1) * case.group {
                    let row = &scores[(sequence * query_heads + head) * stride..][..keys];
                    group = group.plus(pooled(case.pooling, row, key));
                }
                groups[(sequence * case.kv_heads + kv_head) * stride + key] = group;
                all_heads = all_heads.plus(group);
            }
            total[sequence * stride + key] = all_heads;
        }
    }
    let outputs = [(work.groups, case.kv_heads, groups), (work.total, 1, total)];
    let read = |memory: &Memory<'_, D>| -> Result<Vec<Vec<f32>>, String> {
        let wanted =
            outputs.iter().filter_map(|(rows, heads, expected)| Some((rows.as_ref()?, *heads, expected)));
        wanted
            .map(|(rows, heads, expected)| memory.floats_spread(rows.base, expected.len(), spread(heads)))
            .collect()
    };
    let together = read(&memory)?;
    let wanted = outputs.iter().filter(|(rows, ..)| rows.is_some());
    for ((_, heads, expected), found) in wanted.zip(&together) {
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            if !expected.holds(*found) {
                return Err(format!("{heads} heads: element {at} is {found}, not {expected:?}"));
            }
        }
    }

    // Each sequence alone: the same bits.
    for (rows, heads, expected) in &outputs {
        if let Some(rows) = rows {
            memory.write_spread(rows.base, &vec![UNTOUCHED; 4 * expected.len()], spread(*heads));
        }
    }
    for sequence in 0..sequences as u64 {
        let of = |rows: ScoreRows| ScoreRows {
            base: rows.base + 4 * sequence * rows.sequence_stride as u64,
            ..rows
        };
        let entry = |address: u64| if address == 0 { 0 } else { address + 4 * sequence };
        let alone = PoolScores {
            scores: of(work.scores),
            sequences: 1,
            keys: Lengths { cu_seqlens: entry(keys.cu_seqlens), ..keys },
            lengths: entry(lengths),
            groups: work.groups.map(of),
            total: work.total.map(of),
            ..work
        };
        // SAFETY: a sequence of what is described above.
        unsafe { pool_scores(device, &alone) }.map_err(|error| error.to_string())?;
    }
    let bits = |found: Vec<Vec<f32>>| found.concat().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    if bits(read(&memory)?) != bits(together) {
        return Err("a sequence differs from what it is in a batch".to_owned());
    }
    Ok(())
}

/// What a pooled score should be.
#[derive(Clone, Copy, Debug, Default)]
struct Expected {
    value: f64,
    error: f64,
    /// The very bits, where nothing is to be written.
    bits: Option<u32>,
}

impl Expected {
    fn plus(self, other: Self) -> Self {
        let value = self.value + other.value;
        // Each addition rounds to half an ulp of its result, which no sum of magnitudes falls short of.
        Self {
            value,
            error: self.error + other.error + (self.value.abs() + other.value.abs()) * ULP,
            bits: None,
        }
    }

    fn holds(self, found: f32) -> bool {
        match self.bits {
            Some(bits) => found.to_bits() == bits,
            None if self.value.is_finite() => (f64::from(found) - self.value).abs() <= self.error,
            None => f64::from(found).total_cmp(&self.value).is_eq() || found.is_nan() && self.value.is_nan(),
        }
    }
}

/// Pooled score of a key: max passes over NaN and is -inf where there is nothing else, but a kernel of 1
/// leaves scores as they are.
fn pooled(pooling: Pooling, row: &[f32], key: usize) -> Expected {
    let reach = pooling.kernel as usize / 2;
    let near = row[key.saturating_sub(reach)..(key + reach + 1).min(row.len())]
        .iter()
        .map(|score| f64::from(*score));
    if pooling.kernel == 1 {
        Expected { value: f64::from(row[key]), ..Expected::default() }
    } else if pooling == Pooling::max(pooling.kernel) {
        Expected { value: near.fold(f64::NEG_INFINITY, f64::max), ..Expected::default() }
    } else {
        let magnitude: f64 = near.clone().map(f64::abs).sum();
        let width = f64::from(pooling.kernel);
        Expected {
            value: near.sum::<f64>() / width,
            error: (width + 1.0) * magnitude / width * ULP,
            bits: None,
        }
    }
}

/// Lengths that no sequence has.
fn hostile<D: Device>(device: &D) -> Result<(), String> {
    for lengths in HOSTILE_LENGTHS {
        let mut memory = Memory::new(device);
        let mut rows = |heads: i64| ScoreRows {
            base: memory.put(&vec![0; 3 * heads as usize * 40 * 4]),
            sequence_stride: heads * 40,
            head_stride: 40,
        };
        let (scores, groups, total) = (rows(4), rows(2), rows(1));
        let work = PoolScores {
            scores,
            sequences: 3,
            query_heads: 4,
            kv_heads: 2,
            keys: Lengths::packed(memory.put(bytemuck::cast_slice(&[0, 30, 50, 90])), 90, 40),
            lengths: memory.put(bytemuck::cast_slice(&lengths)),
            tail: 8,
            pooling: Pooling::max(7),
            groups: Some(groups),
            total: Some(total),
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { pool_scores(device, &work) }
            .and_then(|()| device.synchronize())
            .map_err(|error| format!("{lengths:?}: {error}"))?;
    }
    Ok(())
}
