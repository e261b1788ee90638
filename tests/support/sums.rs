//! Scores added up, gathered and raised, and keys marked by position: plain loops, and runs on a device.

use fastkv::kernels::{
    Device,
    sums::{self, AddScores, GatherScores, MarkKeys, RaiseScores, ScoreTable},
};

use super::{
    Check, all,
    memory::{Memory, Spread, UNTOUCHED},
    random::Random,
};

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("add_scores", |device, seed| all(sizes(seed), |sizes| add(device, sizes))),
        Check::portable("gather_scores", |device, seed| all(sizes(seed), |sizes| gather(device, sizes))),
        Check::portable("raise_scores", |device, seed| all(sizes(seed), |sizes| raise(device, sizes))),
        Check::portable("mark_keys", |device, seed| all(sizes(seed), |sizes| mark(device, sizes))),
        Check::portable("sums_far_apart", |device, seed| {
            let far = Sizes { heads: 3, keys: [40, 50], seed, far: true };
            [add, gather, raise, mark].into_iter().try_for_each(|check| check(device, &far))
        })
        .far(),
    ]
}

#[derive(Clone, Copy, Debug)]
struct Sizes {
    heads: usize,
    /// Two numbers of them.
    keys: [usize; 2],
    seed: u64,
    /// Whether heads lie far apart, and lists far behind the first row.
    far: bool,
}

impl Sizes {
    /// How bytes lie of which so many belong to a head.
    fn spread(&self, head: usize) -> Spread {
        Spread::apart_if(self.far, head, self.heads * head)
    }
}

fn sizes(seed: u64) -> Vec<Sizes> {
    let mut random = Random(seed);
    let keys = [0, 1, 31, 32, 33, 255, 256, 257, 300];
    let mut sizes = vec![(1, [1, 1], 1), (3, [256, 257], 2), (2, [300, 5], 3), (2, [0, 40], 4)];
    sizes.extend((0..6).map(|_| (1 + random.below(5), [random.of(&keys), random.of(&keys)], random.next())));
    sizes.into_iter().map(|(heads, keys, seed)| Sizes { heads, keys, seed, far: false }).collect()
}

/// Scores on the host, and where they lie: rows stand apart, and what is between them is nobody's.
struct Table {
    numbers: Vec<Vec<f32>>,
    table: ScoreTable,
}

impl Table {
    fn random<D: Device>(
        memory: &mut Memory<'_, D>,
        random: &mut Random,
        sizes: &Sizes,
        keys: usize,
    ) -> Self {
        let of = |random: &mut Random| match random.below(20) {
            0 => f32::NAN,
            1 => f32::INFINITY,
            _ => random.symmetric(),
        };
        let numbers: Vec<Vec<f32>> =
            (0..sizes.heads).map(|_| (0..keys).map(|_| of(random)).collect()).collect();
        let stride = keys + 3;
        let mut bytes = vec![UNTOUCHED; 4 * sizes.heads * stride];
        for (head, numbers) in numbers.iter().enumerate() {
            bytes[4 * head * stride..][..4 * keys].copy_from_slice(bytemuck::cast_slice(numbers));
        }
        Self { numbers, table: Self::put(memory, sizes, keys, &bytes) }
    }

    fn untouched<D: Device>(memory: &mut Memory<'_, D>, sizes: &Sizes, keys: usize) -> ScoreTable {
        Self::put(memory, sizes, keys, &vec![UNTOUCHED; 4 * sizes.heads * (keys + 3)])
    }

    fn put<D: Device>(memory: &mut Memory<'_, D>, sizes: &Sizes, keys: usize, bytes: &[u8]) -> ScoreTable {
        let spread = sizes.spread(4 * (keys + 3));
        let head_stride = spread.stride(4).unwrap_or(keys as i64 + 3);
        ScoreTable { base: memory.put_spread(bytes, spread), head_stride, keys: keys as u32 }
    }
}

/// Every bit, and nothing written between the rows.
fn expect<D: Device>(
    memory: &Memory<'_, D>,
    sizes: &Sizes,
    table: ScoreTable,
    expected: &[Vec<f32>],
) -> Result<(), String> {
    let stride = table.keys as usize + 3;
    let found = memory.floats_spread(table.base, expected.len() * stride, sizes.spread(4 * stride))?;
    let untouched = f32::from_ne_bytes([UNTOUCHED; 4]);
    for (head, expected) in expected.iter().enumerate() {
        for (key, found) in found[head * stride..][..stride].iter().enumerate() {
            let expected = *expected.get(key).unwrap_or(&untouched);
            if found.to_bits() != expected.to_bits() && !(found.is_nan() && expected.is_nan()) {
                return Err(format!("head {head}, key {key} is {found}, not {expected}"));
            }
        }
    }
    Ok(())
}

fn add<D: Device>(device: &D, sizes: &Sizes) -> Result<(), String> {
    let Sizes { heads, keys: [a_keys, b_keys], seed, .. } = *sizes;
    let (mut memory, mut random) = (Memory::new(device), Random(seed));
    let a = Table::random(&mut memory, &mut random, sizes, a_keys);
    let b = Table::random(&mut memory, &mut random, sizes, b_keys);
    let keys = a_keys.max(b_keys);
    let out = Table::untouched(&mut memory, sizes, keys);
    let work = AddScores { a: a.table, b: b.table, out, heads: heads as u32 };
    // SAFETY: blocks of `memory` of the sizes stated, here and below.
    unsafe { sums::add_scores(device, &work) }.map_err(|error| error.to_string())?;
    let of = |numbers: &[f32], key: usize| numbers.get(key).copied().unwrap_or(0.0);
    let sum = |(a, b): (&Vec<f32>, &Vec<f32>)| (0..keys).map(|key| of(a, key) + of(b, key)).collect();
    expect(&memory, sizes, out, &a.numbers.iter().zip(&b.numbers).map(sum).collect::<Vec<_>>())
}

fn gather<D: Device>(device: &D, sizes: &Sizes) -> Result<(), String> {
    let Sizes { heads, keys: [keys, listed], seed, .. } = *sizes;
    let (mut memory, mut random) = (Memory::new(device), Random(seed));
    let scores = Table::random(&mut memory, &mut random, sizes, keys);
    let stride = listed + 2;
    let entry = |random: &mut Random| match random.below(8) {
        0 => random.of(&[-1, i32::MIN, i32::MAX, keys as i32]),
        _ => random.below(keys.max(1)) as i32,
    };
    let entries: Vec<i32> = (0..heads * stride).map(|_| entry(&mut random)).collect();
    let out = Table::untouched(&mut memory, sizes, listed);
    let spread = sizes.spread(4 * stride);
    let work = GatherScores {
        scores: scores.table,
        out,
        entries: memory.put_spread(bytemuck::cast_slice(&entries), spread),
        entry_stride: spread.stride(4).unwrap_or(stride as i64),
        heads: heads as u32,
    };
    // SAFETY: as above.
    unsafe { sums::gather_scores(device, &work) }.map_err(|error| error.to_string())?;
    let expected = entries.chunks(stride).zip(&scores.numbers).map(|(entries, numbers)| {
        let of = |entry: &i32| {
            usize::try_from(*entry).ok().and_then(|entry| numbers.get(entry)).copied().unwrap_or(0.0)
        };
        entries[..listed].iter().map(of).collect()
    });
    expect(&memory, sizes, out, &expected.collect::<Vec<_>>())
}

fn raise<D: Device>(device: &D, sizes: &Sizes) -> Result<(), String> {
    let Sizes { heads, keys: [keys, positions], seed, .. } = *sizes;
    let (mut memory, mut random) = (Memory::new(device), Random(seed));
    let mut scores = Table::random(&mut memory, &mut random, sizes, keys);
    let (of_keys, marked) = (some_positions(&mut random, keys, positions), bits(&mut random, positions));
    let work = RaiseScores {
        scores: scores.table,
        positions: memory.put(bytemuck::cast_slice(&of_keys)),
        marked: memory.put(bytemuck::cast_slice(&marked)),
        marked_positions: positions as u32,
        heads: heads as u32,
    };
    // SAFETY: as above.
    unsafe { sums::raise_scores(device, &work) }.map_err(|error| error.to_string())?;
    for numbers in &mut scores.numbers {
        for (number, position) in numbers.iter_mut().zip(&of_keys) {
            if bit(&marked, positions, *position) == Some(false) {
                *number = f32::INFINITY;
            }
        }
    }
    expect(&memory, sizes, scores.table, &scores.numbers)
}

/// So many positions, some of them where there is none.
fn some_positions(random: &mut Random, count: usize, positions: usize) -> Vec<i32> {
    let position = |_| match random.below(8) {
        0 => random.of(&[-1, i32::MAX, i32::MIN, positions as i32]),
        _ => random.below(positions.max(1)) as i32,
    };
    (0..count).map(position).collect()
}

/// Words with a bit for each position.
fn bits(random: &mut Random, positions: usize) -> Vec<u32> {
    (0..positions.div_ceil(32)).map(|_| random.next() as u32).collect()
}

/// The bit of a position, where it has one.
fn bit(words: &[u32], positions: usize, position: i32) -> Option<bool> {
    let position = usize::try_from(position).ok().filter(|position| *position < positions)?;
    Some(words[position / 32] >> (position % 32) & 1 == 1)
}

/// Lists that lie apart, some of them where there is nothing.
fn mark<D: Device>(device: &D, sizes: &Sizes) -> Result<(), String> {
    let Sizes { heads: lists, keys: [longest, positions], seed, far } = *sizes;
    let (mut memory, mut random) = (Memory::new(device), Random(seed));
    let words = longest.div_ceil(32);
    let rows = lists * (longest + 2);
    let starts: Vec<i64> = (0..lists as i64)
        .map(|list| match random.below(10) {
            0 => random.of(&[-1, i64::MIN, rows as i64 - 3, i64::MAX / 2]),
            _ => list * (longest as i64 + 2),
        })
        .collect();
    let lengths: Vec<i32> = (0..lists)
        .map(|_| random.of(&[longest as i32, longest as i32 / 2, 0, -5, 32 * words as i32]))
        .collect();
    let (of_rows, marked) = (some_positions(&mut random, rows, positions), bits(&mut random, positions));
    let out = memory.untouched(4 * (lists * words + 1));
    let spread = if far { Spread::BEHIND } else { Spread::NEAR };
    let before = spread.rows_before(4);
    let on_device: Vec<_> = starts
        .iter()
        .map(|start| if *start < 0 { *start } else { start.saturating_add(before as i64) })
        .collect();
    let work = MarkKeys {
        positions: memory.put_spread(bytemuck::cast_slice(&of_rows), spread),
        starts: memory.put(bytemuck::cast_slice(&on_device)),
        lengths: memory.put(bytemuck::cast_slice(&lengths)),
        marked: memory.put(bytemuck::cast_slice(&marked)),
        out,
        rows: (before + rows) as u64,
        marked_positions: positions as u32,
        lists: lists as u32,
        words: words as u32,
    };
    // SAFETY: as above.
    unsafe { sums::mark_keys(device, &work) }.map_err(|error| error.to_string())?;
    let mut expected = vec![0_u32; lists * words];
    for (list, (start, length)) in starts.iter().zip(&lengths).enumerate() {
        for key in 0..32 * words {
            let row = usize::try_from(*start).ok().map(|start| start + key).filter(|row| *row < rows);
            let Some(row) = row.filter(|_| (key as i64) < i64::from(*length)) else { continue };
            if bit(&marked, positions, of_rows[row]) == Some(true) {
                expected[list * words + key / 32] |= 1 << (key % 32);
            }
        }
    }
    let mut bytes: Vec<u8> = bytemuck::cast_slice(&expected).to_vec();
    bytes.extend([UNTOUCHED; 4]);
    memory.expect("marks", out, &bytes)
}
