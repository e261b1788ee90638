//! The small operations of a Llama forward: plain loops in f64 that say what should come out, and runs on a
//! device.

use fastkv::{
    abi::{Draw, Rows},
    kernels::{DType, Device, activation, embed, norm, rope, sample},
};

use super::{
    Check, all,
    memory::{Memory, Spread, UNTOUCHED},
    number::{decode, encode, rounded, rounding, within},
    random::Random,
};

/// Unit roundoff of f32, in which the kernels compute.
const U: f64 = 1.0 / (1 << 24) as f64;

const DTYPES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

pub(crate) fn checks<D: Device>() -> Vec<Check<D>> {
    vec![
        Check::portable("add", |device, seed| all(matrices(seed), |case| check_add(device, case))),
        Check::portable("convert", |device, seed| all(matrices(seed), |case| check_convert(device, case))),
        Check::portable("embed", |device, seed| check_embed(device, seed, false)),
        Check::portable("embed_far_apart", |device, seed| check_embed(device, seed, true)).far(),
        Check::portable("matrices_far_apart", far_apart).far(),
        Check::portable("rms_norm_edges", |device, seed| {
            all(norm_edges(seed), |case| check_norm(device, case))
        }),
        Check::portable("rms_norm_random", |device, seed| {
            all((0..12).map(|n| NormCase::random(seed * 12 + n)), |case| check_norm(device, case))
        }),
        Check::portable("rope_angles", check_angles),
        Check::portable("rope_edges", |device, _| all(rope_edges(), |case| check_rope(device, case))),
        Check::portable("rope_far_apart", |device, _| all(rope_far_apart(), |case| check_rope(device, case)))
            .far(),
        Check::portable("rope_hostile", |device, _| rope_hostile(device)),
        Check::portable("rope_random", |device, seed| {
            all((0..16).map(|n| RopeCase::random(seed * 16 + n)), |case| check_rope(device, case))
        }),
        Check::portable("sample_greedy", |device, seed| {
            all(greedy_cases(seed), |case| check_sample(device, case))
        }),
        Check::portable("sample_edges", |device, seed| {
            all(draw_edges(seed), |case| check_sample(device, case))
        }),
        Check::portable("sample_forbidden", |device, seed| {
            all(forbidden_cases(seed), |case| check_sample(device, case))
        }),
        Check::portable("sample_random", |device, seed| {
            all((0..3).map(|n| SampleCase::random(seed * 3 + n)), |case| check_sample(device, case))
        }),
        Check::portable("sample_large", |device, seed| {
            all(large_vocabularies(seed), |case| check_sample(device, case))
        }),
        Check::portable("sample_alone", sample_alone),
        Check::portable("silu_mul", |device, seed| all(matrices(seed), |case| check_silu_mul(device, case))),
    ]
}

/// Normal numbers, roughly, as a type holds them.
fn normals(random: &mut Random, dtype: DType, scale: f64, count: usize) -> Vec<f64> {
    let mut normal = || (0..4).map(|_| f64::from(random.symmetric())).sum::<f64>();
    (0..count).map(|_| rounded(dtype, normal() * scale)).collect()
}

/// Whether numbers have the same bits.
fn same(a: &[f64], b: &[f64]) -> bool {
    a.iter().map(|a| a.to_bits()).eq(b.iter().map(|b| b.to_bits()))
}

// ---------------------------------------------------------------------------------------------
// Matrices with rows further apart than they are wide

#[derive(Clone, Copy, Debug)]
struct Matrix {
    rows: usize,
    width: usize,
    stride: usize,
    dtype: DType,
    /// Whether rows lie far apart.
    far: bool,
}

impl Matrix {
    fn describe(&self, base: u64) -> Rows {
        let stride = self.spread().stride(self.dtype.bytes() as usize);
        Rows { base, token_stride: stride.unwrap_or(self.stride as i64), ..Rows::default() }
    }

    fn spread(&self) -> Spread {
        Spread::apart_if(self.far, self.stride * self.dtype.bytes() as usize, self.size())
    }

    /// The bytes of rows, and [`UNTOUCHED`] between them; none behind the last.
    fn bytes(&self, numbers: &[f64]) -> Vec<u8> {
        let bytes = self.dtype.bytes() as usize;
        let mut stored = vec![UNTOUCHED; self.size()];
        for (row, numbers) in numbers.chunks(self.width).enumerate() {
            let numbers = encode(self.dtype, numbers.iter().copied());
            stored[row * self.stride * bytes..][..numbers.len()].copy_from_slice(&numbers);
        }
        stored
    }

    fn size(&self) -> usize {
        match self.rows {
            0 => 0,
            rows => ((rows - 1) * self.stride + self.width) * self.dtype.bytes() as usize,
        }
    }

    fn put<D: Device>(&self, memory: &mut Memory<'_, D>, numbers: &[f64]) -> Rows {
        let address = memory.put_spread(&self.bytes(numbers), self.spread());
        self.describe(address)
    }

    fn untouched<D: Device>(&self, memory: &mut Memory<'_, D>) -> Rows {
        let address = memory.untouched_spread(self.size(), self.spread());
        self.describe(address)
    }

    /// The numbers of the rows; what is between them must be as it was.
    fn get<D: Device>(&self, memory: &Memory<'_, D>, matrix: &Rows) -> Result<Vec<f64>, String> {
        let bytes = self.dtype.bytes() as usize;
        let mut numbers = Vec::new();
        let stored = memory.get_spread(matrix.base, self.size(), self.spread())?;
        for row in stored.chunks(self.stride * bytes) {
            let (row, gap) = row.split_at(self.width * bytes);
            if gap.iter().any(|byte| *byte != UNTOUCHED) {
                return Err("something was written between rows".to_owned());
            }
            numbers.extend(decode(self.dtype, row));
        }
        Ok(numbers)
    }
}

/// One piece, a block's worth of pieces and one more or less, several tiles, no row, many rows.
fn matrices(seed: u64) -> Vec<(Matrix, DType, u64)> {
    let shapes = [
        (1, 8, 8),
        (3, 2040, 2040),
        (2, 2048, 2064),
        (3, 2056, 2056),
        (1, 6152, 6152),
        (0, 8, 8),
        (70, 24, 32),
    ];
    shapes
        .into_iter()
        .flat_map(|(rows, width, stride)| {
            DTYPES.into_iter().map(move |dtype| Matrix { rows, width, stride, dtype, far: false })
        })
        .enumerate()
        .map(|(n, matrix)| (matrix, DTYPES[(n + n / 3 + seed as usize) % 3], seed * 100 + n as u64))
        .collect()
}

/// Two rows, and some more, further apart than 32 bits count.
fn far_matrices(seed: u64) -> Vec<(Matrix, DType, u64)> {
    let matrices = DTYPES.map(|dtype| Matrix { rows: 2, width: 24, stride: 32, dtype, far: true });
    let more = Matrix { rows: 5, width: 2056, stride: 2056, dtype: DType::BF16, far: true };
    matrices
        .into_iter()
        .chain([more])
        .zip(DTYPES.into_iter().cycle().skip(1))
        .map(|(x, y)| (x, y, seed))
        .collect()
}

/// Everything that takes matrices, of rows far apart.
fn far_apart<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    for check in [check_add, check_convert, check_silu_mul] {
        all(far_matrices(seed), |case| check(device, case))?;
    }
    let norms = far_matrices(seed).into_iter().map(|(x, dtype, seed)| NormCase {
        x,
        dtype,
        fused: true,
        scale: 1.0,
        epsilon: 1e-5,
        not_finite: false,
        seed,
    });
    all(norms, |case| check_norm(device, case))?;
    let logits = |dtype| (0..3).map(|n| normals(&mut Random(seed + n), dtype, 1.0, 301)).collect();
    all(DTYPES.map(|dtype| SampleCase { far: true, ..SampleCase::new(dtype, logits(dtype), None) }), |case| {
        check_sample(device, case)
    })
}

fn check_add<D: Device>(device: &D, (x, y_dtype, seed): &(Matrix, DType, u64)) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let mut random = Random(*seed);
    let y = Matrix { stride: x.width, dtype: *y_dtype, ..*x };
    let mut a = normals(&mut random, x.dtype, 1.0, x.rows * x.width);
    let mut b = normals(&mut random, y.dtype, 1.0, x.rows * x.width);
    // What is not finite, and sums that are too large.
    const EDGES: [(f64, f64); 8] = [
        (f64::INFINITY, 1.0),
        (1.0, f64::NEG_INFINITY),
        (f64::INFINITY, f64::NEG_INFINITY),
        (f64::NEG_INFINITY, f64::NEG_INFINITY),
        (f64::NAN, 1.0),
        (1.0, f64::NAN),
        (6e4, 6e4),
        (-3e38, -3e38),
    ];
    for ((a, b), edge) in a.iter_mut().zip(&mut b).zip(EDGES) {
        (*a, *b) = (rounded(x.dtype, edge.0), rounded(y.dtype, edge.1));
    }
    let (on_x, on_y) = (x.put(&mut memory, &a), y.put(&mut memory, &b));
    let work = activation::Add {
        x: on_x,
        y: on_y,
        rows: x.rows as u32,
        width: x.width as u32,
        x_dtype: x.dtype,
        y_dtype: y.dtype,
    };
    // SAFETY: both matrices are blocks of `memory` of their size.
    unsafe { activation::add(device, &work) }.map_err(|error| error.to_string())?;
    // Rounded to f32, and once more on the way out.
    let sums = a.iter().zip(&b).map(|(a, b)| a + b);
    let sums = sums.map(|sum| if rounded(x.dtype, sum).is_finite() { sum } else { rounded(x.dtype, sum) });
    let expected: Vec<_> = sums.map(|sum| (sum, rounding(x.dtype, sum) + U * sum.abs())).collect();
    within("sum", &x.get(&memory, &on_x)?, &expected)
}

/// Exact but for one rounding, which is not to be off by a bit.
fn check_convert<D: Device>(device: &D, (x, out_dtype, seed): &(Matrix, DType, u64)) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let mut numbers = normals(&mut Random(*seed), x.dtype, 1.0, x.rows * x.width);
    // Halfway cases, too small and too large ones, and what is no number.
    let edges = [
        0.0,
        -0.0,
        1.0 + 3.0 / 512.0,
        1.0 + 1.0 / 4096.0,
        1e-30,
        65519.9,
        65520.0,
        3e38,
        f64::INFINITY,
        f64::NAN,
    ];
    for (number, edge) in numbers.iter_mut().zip(edges) {
        *number = rounded(x.dtype, edge);
    }
    let out = Matrix { stride: x.width + 8, dtype: *out_dtype, ..*x };
    let work = activation::Convert {
        x: x.put(&mut memory, &numbers),
        out: out.untouched(&mut memory),
        rows: x.rows as u32,
        width: x.width as u32,
        x_dtype: x.dtype,
        out_dtype: out.dtype,
    };
    // SAFETY: both matrices are blocks of `memory` of their size.
    unsafe { activation::convert(device, &work) }.map_err(|error| error.to_string())?;
    let expected: Vec<_> = numbers.iter().map(|number| (rounded(out.dtype, *number), 0.0)).collect();
    within("out", &out.get(&memory, &work.out)?, &expected)
}

fn check_silu_mul<D: Device>(device: &D, (gate, _, seed): &(Matrix, DType, u64)) -> Result<(), String> {
    let mut memory = Memory::new(device);
    let mut random = Random(*seed);
    let (count, dtype) = (gate.rows * gate.width, gate.dtype);
    let mut g = normals(&mut random, dtype, 3.0, count);
    let edges = [0.0, -0.0, 20.0, -20.0, 88.0, -88.0, -88.5, -104.0, 1e4, -1e4, 3e-8, -3e-8];
    for (g, edge) in g.iter_mut().zip(edges) {
        *g = rounded(dtype, edge);
    }
    let mut u = normals(&mut random, dtype, 1.0, count);
    // What is not finite, from the end.
    const NOT_FINITE: [(f64, f64); 8] = [
        (f64::INFINITY, -1.0),
        (f64::INFINITY, 0.0),
        (f64::NEG_INFINITY, 1.0),
        (f64::NAN, 1.0),
        (1.0, f64::NAN),
        (-1.0, f64::INFINITY),
        (0.0, f64::INFINITY),
        (f64::INFINITY, f64::INFINITY),
    ];
    for ((g, u), edge) in g.iter_mut().zip(&mut u).rev().zip(NOT_FINITE) {
        (*g, *u) = edge;
    }
    let up = Matrix { stride: gate.width, ..*gate };
    let (on_gate, on_up) = (gate.put(&mut memory, &g), up.put(&mut memory, &u));
    let on_out = gate.untouched(&mut memory);
    // The power's argument is g times a constant, both rounded: 2 |g| U in the power. Then the power's and
    // the quotient's own errors, up to 2 units of 2^-23 each, a sum, a product.
    let expected: Vec<_> = g
        .iter()
        .zip(&u)
        .map(|(g, u)| {
            let product = g / (1.0 + (-g).exp()) * u;
            let relative = (2.0 * g.abs() + 12.0) * U;
            // Where the power overflows f32 there is nothing left; a subnormal power may be taken for 0.
            let vanished = if *g < -86.0 { g.abs() * (-86.0_f64).exp() * u.abs() } else { 0.0 };
            (product, rounding(dtype, product) + relative * product.abs() + vanished)
        })
        .collect();
    // Apart, in place of the gate, in place of what it lets through.
    for (matrix, out) in [(gate, on_out), (gate, on_gate), (&up, on_up)] {
        memory.write_spread(on_gate.base, &gate.bytes(&g), gate.spread());
        let work = activation::SiluMul {
            gate: on_gate,
            up: on_up,
            out,
            rows: gate.rows as u32,
            width: gate.width as u32,
            dtype,
        };
        // SAFETY: the matrices are blocks of `memory` of their size.
        unsafe { activation::silu_mul(device, &work) }.map_err(|error| error.to_string())?;
        within("product", &matrix.get(&memory, &out)?, &expected)?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Embedding

/// `far`: all rows that are taken stand further behind the first of the table than 32 bits count.
fn check_embed<D: Device>(device: &D, seed: u64, far: bool) -> Result<(), String> {
    let mut random = Random(seed);
    let widths = if far { [8, 64, 2048, 8192] } else { [8, 24, 2048, 2056] };
    let spread = if far { Spread::BEHIND } else { Spread::NEAR };
    for (n, width) in widths.into_iter().enumerate() {
        let (table_dtype, out_dtype) = (DTYPES[n % 3], random.of(&DTYPES));
        let first = spread.rows_before(width * table_dtype.bytes() as usize);
        let vocabulary = 1 + random.below(20);
        let table = normals(&mut random, table_dtype, 1.0, vocabulary * width);
        let known: Vec<i32> = (0..5).map(|_| (first + random.below(vocabulary)) as i32).collect();
        let wrong = [(first + vocabulary) as i32, -1, i32::MIN, i32::MAX];
        for (ids, before, after) in [
            (known.clone(), 0, 0),
            (vec![], 0, 0),
            ([&wrong[..], &known].concat(), 0, 4),
            ([&known[..2], &wrong[..1]].concat(), 2, 3),
            ([&known[..2], &wrong[..1]].concat(), 7, 7),
        ] {
            let mut memory = Memory::new(device);
            let bytes = ids.len() * width * out_dtype.bytes() as usize;
            let mut work = embed::Embed {
                table: memory.put_spread(&encode(table_dtype, table.iter().copied()), spread),
                ids: memory.put(bytemuck::cast_slice(&ids)),
                out: memory.untouched(bytes),
                fault: memory.put(&i32::to_ne_bytes(before)),
                rows: ids.len() as u32,
                vocabulary: (first + vocabulary) as u32,
                width: width as u32,
                table_dtype,
                out_dtype,
            };
            let rows = ids.iter().flat_map(|id| match usize::try_from(*id).map(|id| id.checked_sub(first)) {
                Ok(Some(id)) if id < vocabulary => table[id * width..][..width].to_vec(),
                _ => vec![0.0; width],
            });
            let expected = encode(out_dtype, rows);
            for fault in [work.fault, 0] {
                work.fault = fault;
                // SAFETY: every address is a block of `memory` of the size that its field states.
                unsafe { embed::embed(device, &work) }.map_err(|error| error.to_string())?;
                memory.expect("out", work.out, &expected)?;
                if fault != 0 {
                    memory.expect("fault", fault, &i32::to_ne_bytes(after))?;
                }
            }
        }
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// RMSNorm

#[derive(Clone, Copy, Debug)]
struct NormCase {
    x: Matrix,
    dtype: DType,
    fused: bool,
    scale: f64,
    epsilon: f32,
    /// Whether some rows and columns have NaN and infinities.
    not_finite: bool,
    seed: u64,
}

impl NormCase {
    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let width = 8 * (1 + random.below(400));
        let x = Matrix {
            rows: 1 + random.below(6),
            width,
            stride: width + 8 * random.below(3),
            dtype: random.of(&DTYPES),
            far: false,
        };
        let scale = random.of(&[1.0, 1e-3, 30.0]);
        let (dtype, fused) = (random.of(&DTYPES), random.below(2) == 0);
        Self { x, dtype, fused, scale, epsilon: 1e-5, not_finite: false, seed }
    }
}

/// One piece; a warp and a piece; the widths at which threads and pieces a thread change; zeros; what is not finite.
fn norm_edges(seed: u64) -> Vec<NormCase> {
    let case = |rows, width, dtype, fused| NormCase {
        x: Matrix { rows, width, stride: width, dtype: DType::F32, far: false },
        dtype,
        fused,
        scale: 1.0,
        epsilon: 1e-5,
        not_finite: false,
        seed: seed + width as u64,
    };
    let mut cases = Vec::new();
    for (n, width) in [8, 248, 256, 264, 512, 520, 1032, 4096, 8192, 8200, 16384].into_iter().enumerate() {
        cases.push(case(1 + n % 2, width, DTYPES[n % 2], n % 3 > 0));
    }
    cases.push(NormCase { scale: 0.0, ..case(2, 64, DType::BF16, true) });
    cases.push(NormCase { scale: 1e-12, epsilon: 0.0, ..case(2, 64, DType::BF16, false) });
    cases.push(NormCase { scale: 1e10, ..case(2, 64, DType::BF16, false) });
    cases.push(case(0, 64, DType::F16, true));
    for (dtype, fused) in DTYPES.into_iter().flat_map(|dtype| [(dtype, false), (dtype, true)]) {
        cases.push(NormCase { not_finite: true, ..case(5, 264, dtype, fused) });
    }
    cases
}

fn check_norm<D: Device>(device: &D, case: &NormCase) -> Result<(), String> {
    let NormCase { x, dtype, fused, scale, epsilon, not_finite, seed } = *case;
    let mut random = Random(seed);
    let (rows, width) = (x.rows, x.width);
    let mut stream = normals(&mut random, x.dtype, scale, rows * width);
    let mut added = normals(&mut random, dtype, if scale > 100.0 { 1.0 } else { scale }, rows * width);
    let mut weight = normals(&mut random, dtype, 1.0, width);
    if not_finite {
        // Of a row each, but for the last, and of two columns of all rows.
        stream[3] = f64::NAN;
        stream[2 * width - 1] = f64::INFINITY;
        (stream[2 * width + 9], added[2 * width + 9]) = (f64::NEG_INFINITY, f64::INFINITY);
        added[3 * width] = f64::NAN;
        (weight[5], weight[width - 2]) = (f64::NAN, f64::NEG_INFINITY);
    }
    let matrix = Matrix { stride: width, dtype, ..x };
    let out = Matrix { stride: width + 8, ..matrix };

    let mut memory = Memory::new(device);
    let mut work = norm::RmsNorm {
        x: x.put(&mut memory, &stream),
        added: fused.then(|| matrix.put(&mut memory, &added)),
        out: out.untouched(&mut memory),
        weight: memory.put(&encode(dtype, weight.iter().copied())),
        rows: rows as u32,
        width: width as u32,
        x_dtype: x.dtype,
        dtype,
        epsilon,
    };
    // SAFETY: every address is a block of `memory` of the size that is described.
    unsafe { norm::rms_norm(device, &work) }.map_err(|error| error.to_string())?;
    let found_stream = x.get(&memory, &work.x)?;
    if fused {
        let sums = stream.iter().zip(&added).map(|(x, added)| x + added);
        let sums: Vec<_> = sums.map(|sum| (sum, rounding(x.dtype, sum) + U * sum.abs())).collect();
        within("x", &found_stream, &sums)?;
        stream = found_stream;
    } else if !same(&found_stream, &stream) {
        return Err("x was written".to_owned());
    }
    // Squares: at most 32 in a row and 10 levels above them, half of that behind the root; then a
    // quotient, a sum, an approximate root of up to 2^-22, and two products.
    let relative = 30.0 * U;
    let expected: Vec<_> = stream
        .chunks(width)
        .flat_map(|row| {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / width as f64;
            let root = (mean + f64::from(epsilon)).sqrt();
            row.iter().zip(&weight).map(move |(x, weight)| x / root * weight)
        })
        .map(|normed| (normed, rounding(dtype, normed) + relative * normed.abs()))
        .collect();
    let found = out.get(&memory, &work.out)?;
    within("out", &found, &expected)?;
    // Without the sum, of the sums: the same bits.
    work.added = None;
    // SAFETY: as above.
    unsafe { norm::rms_norm(device, &work) }.map_err(|error| error.to_string())?;
    if !same(&out.get(&memory, &work.out)?, &found) {
        return Err("the norm differs with the sum fused into it".to_owned());
    }
    // Each row alone: again the same bits.
    memory.write_spread(work.out.base, &vec![UNTOUCHED; out.size()], out.spread());
    let row_of = |matrix: &Matrix, rows: Rows, row: usize| {
        let bytes = rows.token_stride as u64 * u64::from(matrix.dtype.bytes());
        Rows { base: rows.base + row as u64 * bytes, ..rows }
    };
    for row in 0..rows {
        let alone =
            norm::RmsNorm { x: row_of(&x, work.x, row), out: row_of(&out, work.out, row), rows: 1, ..work };
        // SAFETY: a row of what is described above.
        unsafe { norm::rms_norm(device, &alone) }.map_err(|error| error.to_string())?;
    }
    if !same(&out.get(&memory, &work.out)?, &found) {
        return Err("the norm of a row differs from that in a batch".to_owned());
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// RoPE

/// What lies far apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Far {
    /// Queries, keys and values along their outermost axis.
    Heads,
    /// All rows of the cache behind its first.
    Cache,
}

#[derive(Clone, Debug)]
struct RopeCase {
    query_heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Of each sequence.
    tokens: Vec<usize>,
    packed: bool,
    head_major: bool,
    in_place: bool,
    dtype: DType,
    starts: Vec<i64>,
    lengths: Option<Vec<i32>>,
    lengths_out: bool,
    turns: bool,
    out_rows: usize,
    /// Of either sign.
    largest_position: usize,
    /// Whether some elements are NaN or infinities.
    not_finite: bool,
    far: Option<Far>,
    seed: u64,
}

impl RopeCase {
    /// Sequences of one length, caches one after the other with a row of slack.
    fn plain(dtype: DType, [query_heads, kv_heads, head_dim, sequences, tokens]: [usize; 5]) -> Self {
        let lists = sequences * kv_heads;
        Self {
            query_heads,
            kv_heads,
            head_dim,
            tokens: vec![tokens; sequences],
            packed: false,
            head_major: false,
            in_place: true,
            dtype,
            starts: (0..lists).map(|list| (list * (tokens + 1)) as i64).collect(),
            lengths: None,
            lengths_out: true,
            turns: true,
            out_rows: lists * (tokens + 1),
            largest_position: 1 << 17,
            not_finite: false,
            far: None,
            seed: 1,
        }
    }

    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let kv_heads = random.below(4);
        let query_heads = if kv_heads == 0 { 1 + random.below(3) } else { kv_heads * random.below(5) };
        let packed = random.below(2) == 0;
        let sequences = 1 + random.below(4);
        let uniform = random.below(12);
        let tokens: Vec<_> =
            (0..sequences).map(|_| if packed { random.below(12) } else { uniform }).collect();
        let lengths: Vec<i32> = (0..sequences * kv_heads).map(|_| random.below(9) as i32).collect();
        let mut out_rows = 0;
        let starts = (0..sequences * kv_heads)
            .map(|list| {
                let start = out_rows + random.below(3);
                out_rows = start + lengths[list] as usize + tokens[list / kv_heads];
                start as i64
            })
            .collect();
        if random.below(4) == 0 {
            // A cache that is too small loses rows, and nothing else.
            out_rows -= random.below(out_rows + 1);
        }
        Self {
            query_heads,
            kv_heads,
            head_dim: random.of(&[16, 64, 80, 96, 128, 256]),
            tokens,
            packed,
            head_major: random.below(2) == 0,
            in_place: random.below(2) == 0,
            dtype: random.of(&DTYPES),
            starts,
            lengths: Some(lengths),
            lengths_out: random.below(2) == 0,
            turns: random.below(4) > 0,
            out_rows,
            largest_position: random.of(&[100, 1 << 17, 1 << 20]),
            not_finite: false,
            far: None,
            seed,
        }
    }

    fn all_tokens(&self) -> usize {
        self.tokens.iter().sum()
    }

    fn tensor(&self, heads: usize, base: u64) -> Rows {
        let mut rows = Rows { base, ..self.dense(heads) };
        let outermost = self.outermost(&mut rows);
        *outermost = self.spread(heads).stride(self.dtype.bytes() as usize).unwrap_or(*outermost);
        rows
    }

    /// The stride of the outermost axis.
    fn outermost<'a>(&self, rows: &'a mut Rows) -> &'a mut i64 {
        match (self.packed, self.head_major) {
            (true, true) => &mut rows.head_stride,
            (true, false) => &mut rows.token_stride,
            (false, _) => &mut rows.sequence_stride,
        }
    }

    /// How a tensor of so many heads lies.
    fn spread(&self, heads: usize) -> Spread {
        let bytes = self.dtype.bytes() as usize;
        let step = *self.outermost(&mut self.dense(heads)) as usize;
        let all = self.all_tokens() * heads * self.head_dim;
        Spread::apart_if(self.far == Some(Far::Heads), step * bytes, all * bytes)
    }

    /// A tensor without gaps.
    fn dense(&self, heads: usize) -> Rows {
        let (heads, width) = (heads as u32, self.head_dim as u32);
        let tokens = self.tokens[0] as u32;
        match (self.packed, self.head_major) {
            (true, true) => {
                let head_stride = (self.all_tokens() * self.head_dim) as i64;
                Rows { base: 0, sequence_stride: 0, head_stride, token_stride: width.into() }
            }
            (true, false) => Rows::packed(0, heads, width),
            (false, true) => Rows::head_major(0, heads, tokens, width),
            (false, false) => Rows::token_major(0, tokens, heads, width),
        }
    }

    /// First element of a token's head. `token` counts over all sequences.
    fn element(&self, heads: usize, sequence: usize, head: usize, token: usize) -> usize {
        let before: usize = self.tokens[..sequence].iter().sum();
        let row = match (self.packed, self.head_major) {
            (true, true) => head * self.all_tokens() + before + token,
            (false, true) => before * heads + head * self.tokens[sequence] + token,
            (_, false) => (before + token) * heads + head,
        };
        row * self.head_dim
    }

    /// Where a token's entry goes.
    fn row(&self, sequence: usize, head: usize, token: usize) -> Option<usize> {
        let list = sequence * self.kv_heads + head;
        let length = self.lengths.as_ref().map_or(0, |lengths| lengths[list]);
        let start = usize::try_from(self.starts[list]).ok()?;
        let row = start.checked_add(usize::try_from(length).ok()?)?.checked_add(token)?;
        (start < self.out_rows && row < self.out_rows).then_some(row)
    }
}

/// Cosine and sine of a position's angles, which are rounded to f32.
fn turns(position: i32, frequencies: &[f32]) -> Vec<(f64, f64)> {
    frequencies
        .iter()
        .map(|f| f64::from(position as f32 * f))
        .map(|angle| (angle.cos(), angle.sin()))
        .collect()
}

/// A head at a position, with the error that is allowed.
fn turned(head: &[f64], turns: &[(f64, f64)], dtype: DType) -> Vec<(f64, f64)> {
    let half = turns.len();
    let mut out = vec![(0.0, 0.0); 2 * half];
    for (i, (cos, sin)) in turns.iter().enumerate() {
        let (a, b) = (head[i], head[i + half]);
        // Each function is good to 4 units, then two products and a sum.
        let error = (a.abs() + b.abs()) * 8.0 * U;
        for (at, value) in [(i, a * cos - b * sin), (i + half, b * cos + a * sin)] {
            out[at] = (value, error + rounding(dtype, value));
        }
    }
    out
}

/// Those of Llama 3, but for its scaling.
fn frequencies(head_dim: usize) -> Vec<f32> {
    (0..head_dim / 2).map(|i| 500_000_f64.powf(-2.0 * i as f64 / head_dim as f64) as f32).collect()
}

/// Multiples of quarter turns and what f32 makes of them, large positions, and positions of all sizes, of either sign.
fn check_angles<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    let mut random = Random(seed);
    // Continued fractions of pi/2: angles closest to a multiple of it.
    let mut positions = vec![0, 1, 2, 11, 22, 33, 355, 710, 103_993, 104_348, 105_615, 105_616, 1_000_000];
    positions.extend([1 << 20, 5_419_351, 16_777_216, 245_850_922, 411_557_987, 1_068_966_896, i32::MAX]);
    positions.extend((0..12).map(|bits| random.below(4 << (2 * bits)) as i32));
    positions.extend(positions.clone().into_iter().map(|position: i32| -position).chain([i32::MIN]));
    let mut frequencies = vec![1.0, 0.5, 0.25, 0.75, 1e-3, 0.999_999_94, std::f32::consts::FRAC_1_PI, 0.1];
    frequencies.extend(self::frequencies(16));
    let (head_dim, count) = (2 * frequencies.len(), positions.len());
    let mut memory = Memory::new(device);
    // A head of (1, 0) pairs becomes cosines and sines.
    let head: Vec<f64> = (0..head_dim).map(|i| if i < head_dim / 2 { 1.0 } else { 0.0 }).collect();
    let heads: Vec<f64> = positions.iter().flat_map(|_| head.clone()).collect();
    let base = memory.put(&encode(DType::F32, heads));
    let tensor = Rows::packed(base, 1, head_dim as u32);
    let work = rope::Rope {
        q: tensor,
        q_out: tensor,
        query_heads: 1,
        append: None,
        positions: memory.put(bytemuck::cast_slice(&positions)),
        inverse_frequencies: memory.put(bytemuck::cast_slice(&frequencies)),
        cu_seqlens: 0,
        sequences: 1,
        tokens: count as u32,
        total_tokens: 0,
        head_dim: head_dim as u32,
        dtype: DType::F32,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { rope::rope(device, &work) }.map_err(|error| error.to_string())?;
    let found = decode(DType::F32, &memory.get(base, count * head_dim * 4)?);
    for (position, found) in positions.into_iter().zip(found.chunks(head_dim)) {
        let turns = turns(position, &frequencies);
        // Reduced to f32 (up to pi/4), and three or four rounded steps on numbers up to 1.
        let expected: Vec<_> = turns
            .iter()
            .map(|turn| turn.0)
            .chain(turns.iter().map(|turn| turn.1))
            .map(|x| (x, 3.0 * U))
            .collect();
        within(&format!("position {position}"), found, &expected)?;
    }
    Ok(())
}

/// One token, a tile and one more or less; no queries, no keys; nothing; what is not finite; hostile lists.
fn rope_edges() -> Vec<RopeCase> {
    let mut cases = Vec::new();
    for (n, tokens) in [0, 1, 3, 4, 5, 9].into_iter().enumerate() {
        cases.push(RopeCase::plain(DTYPES[n % 3], [4, 2, 64, 2, tokens]));
    }
    cases.push(RopeCase::plain(DType::BF16, [3, 0, 128, 1, 6]));
    cases.push(RopeCase::plain(DType::F16, [0, 3, 128, 2, 6]));
    cases.push(RopeCase::plain(DType::F32, [33, 1, 256, 1, 5]));
    for dtype in DTYPES {
        let plain = RopeCase::plain(dtype, [2, 1, 64, 2, 5]);
        cases.push(RopeCase { not_finite: true, in_place: false, ..plain });
    }
    let hostile = RopeCase::plain(DType::BF16, [2, 2, 16, 3, 5]);
    cases.push(RopeCase { starts: vec![-1, i64::MIN, i64::MAX, 35, 36, 0], ..hostile.clone() });
    let lengths = Some(vec![-1, i32::MIN, i32::MAX - 5, 2, 30, 30]);
    cases.push(RopeCase { lengths, starts: vec![0, 0, 0, 6, 0, 5], ..hostile.clone() });
    cases.push(RopeCase { out_rows: 0, ..hostile });
    cases
}

/// Sequences, heads and tokens further apart than 32 bits count, and caches as far behind the first row.
fn rope_far_apart() -> Vec<RopeCase> {
    let case = |dtype, tokens| RopeCase::plain(dtype, [2, 2, 64, 2, tokens]);
    let packed = RopeCase { packed: true, ..case(DType::BF16, 5) };
    let heads = [
        RopeCase { head_major: true, in_place: false, ..case(DType::F16, 5) },
        case(DType::F32, 3),
        RopeCase { head_major: true, ..packed.clone() },
        RopeCase { in_place: false, ..packed.clone() },
        // The stride of a token itself is more than 32 bits count.
        RopeCase { packed: true, ..case(DType::BF16, 1) },
    ];
    let lengths = Some(vec![1, 0, 2, 3]);
    let caches = [case(DType::F32, 5), packed, RopeCase { lengths, ..case(DType::F16, 2) }];
    let far = |far| move |case| RopeCase { far: Some(far), ..case };
    heads.into_iter().map(far(Far::Heads)).chain(caches.into_iter().map(far(Far::Cache))).collect()
}

fn check_rope<D: Device>(device: &D, case: &RopeCase) -> Result<(), String> {
    let RopeCase { query_heads, kv_heads, head_dim, dtype, out_rows, .. } = *case;
    let sequences = case.tokens.len();
    let mut memory = Memory::new(device);
    let mut random = Random(case.seed);
    let tokens = case.all_tokens();
    let mut tensor = |heads: usize| normals(&mut random, dtype, 1.0, tokens * heads * head_dim);
    let mut qkv = [tensor(query_heads), tensor(kv_heads), tensor(kv_heads)];
    if case.not_finite {
        for (n, x) in qkv.iter_mut().flatten().enumerate().filter(|(n, _)| n % 37 == 3) {
            *x = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY][n / 37 % 3];
        }
    }
    let [q, k, v] = qkv;
    let largest = case.largest_position as i32;
    let positions: Vec<i32> =
        (0..tokens).map(|_| random.below(2 * case.largest_position) as i32 - largest).collect();
    let frequencies = frequencies(head_dim);
    let cu_seqlens: Vec<i32> =
        (0..=sequences).map(|n| case.tokens[..n].iter().sum::<usize>() as i32).collect();

    let mut put = |numbers: &[f64], heads| {
        memory.put_spread(&encode(dtype, numbers.iter().copied()), case.spread(heads))
    };
    let (on_q, on_k, on_v) = (put(&q, query_heads), put(&k, kv_heads), put(&v, kv_heads));
    let bytes = dtype.bytes() as usize;
    let q_spread = case.spread(query_heads);
    let on_q_out = if case.in_place { on_q } else { memory.untouched_spread(q.len() * bytes, q_spread) };
    let out_spread = if case.far == Some(Far::Cache) { Spread::BEHIND } else { Spread::NEAR };
    let before = out_spread.rows_before(head_dim * bytes);
    let positions_spread = Spread::behind(4 * before);
    let starts: Vec<_> = case.starts.iter().map(|start| start.saturating_add(before as i64)).collect();
    let append = rope::Append {
        k: case.tensor(kv_heads, on_k),
        v: case.tensor(kv_heads, on_v),
        k_out: memory.untouched_spread(out_rows * head_dim * bytes, out_spread),
        v_out: memory.untouched_spread(out_rows * head_dim * bytes, out_spread),
        starts: memory.put(bytemuck::cast_slice(&starts)),
        lengths: case.lengths.as_ref().map_or(0, |lengths| memory.put(bytemuck::cast_slice(lengths))),
        lengths_out: if case.lengths_out { memory.untouched(sequences * kv_heads * 4) } else { 0 },
        positions_out: memory.untouched_spread(out_rows * 4, positions_spread),
        out_rows: (before + out_rows) as u64,
        kv_heads: kv_heads as u32,
    };
    let work = rope::Rope {
        q: case.tensor(query_heads, on_q),
        q_out: case.tensor(query_heads, on_q_out),
        query_heads: query_heads as u32,
        append: Some(append),
        positions: memory.put(bytemuck::cast_slice(&positions)),
        inverse_frequencies: if case.turns { memory.put(bytemuck::cast_slice(&frequencies)) } else { 0 },
        cu_seqlens: if case.packed { memory.put(bytemuck::cast_slice(&cu_seqlens)) } else { 0 },
        sequences: sequences as u32,
        tokens: *case.tokens.iter().max().expect("a sequence") as u32,
        total_tokens: tokens as u32,
        head_dim: head_dim as u32,
        dtype,
    };
    // SAFETY: every address is a block of `memory` of the size that its field states.
    unsafe { rope::rope(device, &work) }.map_err(|error| error.to_string())?;

    let mut expected_q = vec![(0.0, 0.0); q.len()];
    let mut rows_k = vec![None; out_rows];
    let mut rows_v = vec![None; out_rows];
    let mut expected_positions = vec![i32::from_ne_bytes([UNTOUCHED; 4]); out_rows];
    for sequence in 0..sequences {
        for token in 0..case.tokens[sequence] {
            let position = positions[cu_seqlens[sequence] as usize + token];
            let turns = match case.turns {
                true => turns(position, &frequencies),
                false => vec![(1.0, 0.0); head_dim / 2],
            };
            for head in 0..query_heads {
                let at = case.element(query_heads, sequence, head, token);
                let values = turned(&q[at..at + head_dim], &turns, dtype);
                expected_q[at..at + head_dim].copy_from_slice(&values);
            }
            for head in 0..kv_heads {
                let at = case.element(kv_heads, sequence, head, token);
                if let Some(row) = case.row(sequence, head, token) {
                    rows_k[row] = Some(turned(&k[at..at + head_dim], &turns, dtype));
                    rows_v[row] = Some(v[at..at + head_dim].iter().map(|v| (*v, 0.0)).collect());
                    expected_positions[row] = position;
                }
            }
        }
    }
    let found_q = memory.get_spread(on_q_out, q.len() * bytes, q_spread)?;
    within("q_out", &decode(dtype, &found_q), &expected_q)?;
    if !case.in_place {
        memory.expect_spread("q", on_q, &encode(dtype, q), q_spread)?;
    }
    let untouched: Vec<_> =
        decode(dtype, &vec![UNTOUCHED; head_dim * bytes]).into_iter().map(|x| (x, 0.0)).collect();
    for (name, address, rows) in [("k_out", append.k_out, rows_k), ("v_out", append.v_out, rows_v)] {
        let expected: Vec<_> =
            rows.into_iter().flat_map(|row| row.unwrap_or_else(|| untouched.clone())).collect();
        let found = memory.get_spread(address, out_rows * head_dim * bytes, out_spread)?;
        within(name, &decode(dtype, &found), &expected)?;
    }
    let expected_positions = bytemuck::cast_slice(&expected_positions);
    memory.expect_spread("positions_out", append.positions_out, expected_positions, positions_spread)?;
    if case.lengths_out {
        let before = |list: usize| case.lengths.as_ref().map_or(0, |lengths| lengths[list]);
        // A place of the batch that is not in use stays so.
        let after = |list: usize| match before(list) {
            before @ ..0 => before,
            before => before.wrapping_add(case.tokens[list / kv_heads] as i32),
        };
        let lengths: Vec<i32> = (0..sequences * kv_heads).map(after).collect();
        memory.expect("lengths_out", append.lengths_out, bytemuck::cast_slice(&lengths))?;
    }
    if case.in_place {
        return Ok(());
    }
    // Each sequence alone: the same bits.
    let outputs = [
        (on_q_out, found_q.len(), q_spread),
        (append.k_out, out_rows * head_dim * bytes, out_spread),
        (append.v_out, out_rows * head_dim * bytes, out_spread),
    ];
    let read = |memory: &Memory<'_, D>| -> Result<Vec<_>, String> {
        outputs.iter().map(|(address, bytes, spread)| memory.get_spread(*address, *bytes, *spread)).collect()
    };
    let together = read(&memory)?;
    for (address, bytes, spread) in outputs {
        memory.write_spread(address, &vec![UNTOUCHED; bytes], spread);
    }
    for sequence in 0..sequences {
        let rows = |rows: Rows| {
            let elements = if case.packed { 0 } else { sequence as u64 * rows.sequence_stride as u64 };
            Rows { base: rows.base + elements * bytes as u64, ..rows }
        };
        let lists = (sequence * kv_heads) as u64;
        let entry = |address: u64, bytes: u64| if address == 0 { 0 } else { address + lists * bytes };
        let alone = rope::Rope {
            q: rows(work.q),
            q_out: rows(work.q_out),
            append: Some(rope::Append {
                k: rows(append.k),
                v: rows(append.v),
                starts: entry(append.starts, 8),
                lengths: entry(append.lengths, 4),
                lengths_out: entry(append.lengths_out, 4),
                ..append
            }),
            positions: if case.packed {
                work.positions
            } else {
                work.positions + (4 * sequence * case.tokens[0]) as u64
            },
            cu_seqlens: if case.packed { work.cu_seqlens + 4 * sequence as u64 } else { 0 },
            sequences: 1,
            ..work
        };
        // SAFETY: a sequence of what is described above.
        unsafe { rope::rope(device, &alone) }.map_err(|error| error.to_string())?;
    }
    if read(&memory)? != together {
        return Err("a sequence differs from what it is in a batch".to_owned());
    }
    Ok(())
}

/// Starts of sequences that make no sense: nothing outside the tensors is touched, and lengths grow by the tokens
/// there are.
fn rope_hostile<D: Device>(device: &D) -> Result<(), String> {
    const TOTAL: i32 = 30;
    const MOST: i32 = 9;
    for starts in [[-5, 10, 5, 40], [i32::MIN, i32::MAX, 3, i32::MIN], [0, 9, 19, 29], [25, 31, 31, i32::MAX]]
    {
        let mut memory = Memory::new(device);
        let mut rows = || Rows::packed(memory.put(&[0; TOTAL as usize * 16 * 2]), 1, 16);
        let (k, v) = (rows(), rows());
        let append = rope::Append {
            k,
            v,
            k_out: memory.reserve(3 * 12 * 16 * 2),
            v_out: memory.reserve(3 * 12 * 16 * 2),
            starts: memory.put(bytemuck::cast_slice(&[0_i64, 12, 24])),
            lengths: memory.put(bytemuck::cast_slice(&[1_i32, 2, 3])),
            lengths_out: memory.untouched(12),
            positions_out: 0,
            out_rows: 36,
            kv_heads: 1,
        };
        let work = rope::Rope {
            q: Rows::default(),
            q_out: Rows::default(),
            query_heads: 0,
            append: Some(append),
            positions: memory.put(&[0; 4 * TOTAL as usize]),
            inverse_frequencies: memory.put(&[0; 32]),
            cu_seqlens: memory.put(bytemuck::cast_slice(&starts)),
            sequences: 3,
            tokens: MOST as u32,
            total_tokens: TOTAL as u32,
            head_dim: 16,
            dtype: DType::BF16,
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { rope::rope(device, &work) }.map_err(|error| format!("{starts:?}: {error}"))?;
        let tokens = |n: usize| match starts[n] {
            0.. => i64::from(starts[n + 1].min(TOTAL)) - i64::from(starts[n]),
            _ => 0,
        };
        let lengths = [0, 1, 2].map(|n| n as i32 + 1 + tokens(n).clamp(0, MOST.into()) as i32);
        memory
            .expect("lengths_out", append.lengths_out, bytemuck::cast_slice(&lengths))
            .map_err(|error| format!("{starts:?}: {error}"))?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------
// Sampling

#[derive(Clone, Debug)]
struct SampleCase {
    logits: Vec<Vec<f64>>,
    /// Elements from one row to the next.
    stride: usize,
    dtype: DType,
    draws: Option<Vec<Draw>>,
    /// Whether rows lie far apart.
    far: bool,
}

impl SampleCase {
    fn new(dtype: DType, logits: Vec<Vec<f64>>, draws: Option<Vec<Draw>>) -> Self {
        let round = |row: Vec<f64>| row.into_iter().map(|logit| rounded(dtype, logit)).collect();
        let logits: Vec<Vec<f64>> = logits.into_iter().map(round).collect();
        Self { stride: logits[0].len().next_multiple_of(8), logits, dtype, draws, far: false }
    }

    fn random(seed: u64) -> Self {
        let mut random = Random(seed);
        let dtype = random.of(&DTYPES);
        let vocabulary = random.of(&[1, 7, 8, 9, 300, 1023, 3001]);
        let spread = random.of(&[0.01, 1.0, 3.0]);
        let rows = 1 + random.below(2);
        let logits = (0..rows).map(|_| normals(&mut random, dtype, spread, vocabulary)).collect();
        let draws = (0..rows).map(|_| Draw {
            temperature: random.of(&[0.3, 1.0, 4.0]),
            top_p: random.of(&[0.1, 0.7, 0.95, 1.0]),
            uniform: (random.next() >> 40) as f32 / (1 << 24) as f32,
            top_k: random.of(&[0, 1, 5, 40, 1000]),
        });
        let draws = draws.collect();
        Self::new(dtype, logits, Some(draws))
    }

    fn run<D: Device>(&self, device: &D) -> Result<Vec<i32>, String> {
        let mut memory = Memory::new(device);
        let (rows, width) = (self.logits.len(), self.logits[0].len());
        let matrix = Matrix { rows, width, stride: self.stride, dtype: self.dtype, far: self.far };
        let work = sample::Sample {
            logits: matrix.put(&mut memory, &self.logits.concat()),
            draws: self.draws.as_ref().map_or(0, |draws| memory.put(bytemuck::cast_slice(draws))),
            tokens: memory.reserve(rows * 4),
            rows: rows as u32,
            vocabulary: width as u32,
            dtype: self.dtype,
        };
        // SAFETY: every address is a block of `memory` of the size that its field states.
        unsafe { sample::sample(device, &work) }.map_err(|error| error.to_string())?;
        let tokens = memory.get(work.tokens, rows * 4)?;
        Ok(tokens.chunks(4).map(|b| i32::from_ne_bytes([b[0], b[1], b[2], b[3]])).collect())
    }
}

/// Relative error of probabilities: the exponent is up to 40, off by 3 U of itself.
const MASS_ERROR: f64 = 40.0 * 3.0 * U;

/// What a probability may lose, as a share of the largest.
const MASS_LOST: f64 = 1.0 / (1_u64 << 40) as f64;

/// Whether a row may give this token.
fn allowed(logits: &[f64], draw: Option<Draw>, token: i32) -> bool {
    let mut tokens: Vec<usize> = (0..logits.len()).filter(|token| !logits[*token].is_nan()).collect();
    let Some(max) = tokens.iter().map(|token| logits[*token]).reduce(f64::max) else { return token == -1 };
    // The distance is an f32.
    let distance =
        |token: usize| if logits[token] == max { 0.0 } else { (max as f32 - logits[token] as f32).into() };
    tokens.sort_by(|a, b| f64::total_cmp(&distance(*a), &distance(*b)).then(a.cmp(b)));
    let draw = match draw {
        Some(draw) if draw.temperature > 0.0 => draw,
        _ => return tokens[0] as i32 == token,
    };
    if draw.top_k > 0 {
        tokens.truncate(draw.top_k as usize);
    }
    let mut sum = 0.0;
    let sums: Vec<f64> = tokens
        .iter()
        .map(|token| {
            let distance: f64 = distance(*token);
            sum += match distance {
                0.0 => 1.0,
                // Whatever the temperature: it may be infinite, too.
                f64::INFINITY => 0.0,
                _ => (-distance / f64::from(draw.temperature)).exp(),
            };
            sum
        })
        .collect();
    // Those that are as likely as the most likely one are exact.
    let ties = tokens.iter().filter(|token| distance(**token) == 0.0).count();
    let error = MASS_ERROR * (sum - ties as f64) + MASS_LOST * (tokens.len() - ties) as f64;
    let nucleus = |share: f64| sums.iter().position(|s| *s >= share).unwrap_or(sums.len() - 1);
    let (least, most) = if draw.top_p < 1.0 {
        let share = f64::from(draw.top_p) * sum;
        (nucleus(share - error), nucleus(share + error))
    } else {
        (sums.len() - 1, sums.len() - 1)
    };
    let Some(place) = tokens.iter().position(|candidate| *candidate as i32 == token) else { return false };
    if distance(token as usize) == f64::INFINITY {
        return false;
    }
    let before = if place == 0 { 0.0 } else { sums[place - 1] };
    let uniform = f64::min(draw.uniform.max(0.0).into(), 1.0);
    place <= most && before <= uniform * sums[most] + error && sums[place] >= uniform * sums[least] - error
}

fn check_sample<D: Device>(device: &D, case: &SampleCase) -> Result<(), String> {
    for (row, token) in case.run(device)?.into_iter().enumerate() {
        let draw = case.draws.as_ref().map(|draws| draws[row]);
        if !allowed(&case.logits[row], draw, token) {
            return Err(format!("row {row} gave token {token}"));
        }
    }
    Ok(())
}

/// The best logit first, last, in the tail behind whole pieces; ties; infinities; NaN.
fn greedy_cases(seed: u64) -> Vec<SampleCase> {
    let mut random = Random(seed);
    let mut cases = Vec::new();
    for (n, vocabulary) in [1, 2, 7, 8, 9, 255, 8191, 8192, 8200, 8205].into_iter().enumerate() {
        let dtype = DTYPES[n % 3];
        let mut rows = Vec::new();
        for best in [0, vocabulary / 2, vocabulary - 1] {
            let mut row = normals(&mut random, dtype, 1.0, vocabulary);
            row[best] = 9.0;
            rows.push(row);
        }
        // In 16 bits there are ties enough.
        rows.push(normals(&mut random, dtype, 1.0, vocabulary));
        cases.push(SampleCase::new(dtype, rows, None));
    }
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let rows = [
        [nan, -1.0, nan, -1.0, -2.0],
        [nan; 5],
        [-inf, -inf, nan, -inf, -inf],
        [0.0, inf, -inf, inf, nan],
        [-0.0, 0.0, -1.0, nan, -0.0],
        [-1.0, -0.0, 0.0, nan, -5.0],
        [-3.0, -2.0, -2.0, -2.5, -1e30],
    ];
    for dtype in DTYPES {
        let rows: Vec<_> = rows.iter().map(|row| row.to_vec()).collect();
        cases.push(SampleCase::new(dtype, rows.clone(), None));
        let draw = Draw { temperature: 0.0, top_p: 0.5, uniform: 0.9, top_k: 3 };
        let draws = [0.0, -1.0, f32::NAN, 0.0, -0.0, f32::NEG_INFINITY, 0.0];
        let draws = draws.map(|temperature| Draw { temperature, ..draw }).to_vec();
        cases.push(SampleCase::new(dtype, rows, Some(draws)));
    }
    cases
}

fn draw_edges(seed: u64) -> Vec<SampleCase> {
    let mut random = Random(seed);
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    let plain = Draw { temperature: 1.0, top_p: 1.0, uniform: 0.5, top_k: 0 };
    let uniforms = [0.0, 0.25, 0.999_999_94, 1.0, f32::NAN, -3.0, 1e30, f32::INFINITY];
    let each_uniform = |draw: Draw| uniforms.map(|uniform| Draw { uniform, ..draw }).to_vec();
    let repeat = |row: &[f64]| vec![row.to_vec(); uniforms.len()];
    // Ties at both ends of the nucleus, in exact shares: 1, 1/2 (three), 1/4 (two).
    let two = 2_f64.ln();
    let ties = [-two, -2.0 * two, 0.0, -two, nan, -2.0 * two, -two];
    let mut cases = Vec::new();
    for draw in [
        plain,
        Draw { top_k: 3, ..plain },
        Draw { top_k: 100, ..plain },
        Draw { top_k: -4, top_p: 0.6, ..plain },
        Draw { top_p: 0.0, ..plain },
        Draw { top_p: -1.0, ..plain },
        Draw { top_p: f32::NAN, ..plain },
        Draw { top_k: 5, top_p: 0.8, ..plain },
        Draw { temperature: 1e-30, ..plain },
        Draw { temperature: 1e-40, ..plain },
        Draw { temperature: f32::MAX, ..plain },
        Draw { temperature: f32::INFINITY, ..plain },
        Draw { temperature: f32::NAN, top_k: 3, top_p: 0.5, ..plain },
        Draw { temperature: f32::NEG_INFINITY, top_k: 3, top_p: 0.5, ..plain },
    ] {
        cases.push(SampleCase::new(DType::F32, repeat(&ties), Some(each_uniform(draw))));
    }
    for row in [
        vec![nan; 3],
        vec![inf, 0.0, inf, -inf, nan, inf],
        vec![-inf, 3.0, -inf, 2.0],
        vec![-inf; 9],
        vec![1.0; 1030],
        vec![-1e30, 1e30, 0.0, 1e30],
    ] {
        cases.push(SampleCase::new(
            DType::F32,
            repeat(&row)[..3].to_vec(),
            Some(each_uniform(plain)[..3].to_vec()),
        ));
    }
    // Several at no distance, of which a temperature of almost 0 leaves no other.
    let equal = vec![1.0, 2.0, 2.0, -1.0, 2.0];
    cases.push(SampleCase::new(
        DType::F32,
        repeat(&equal),
        Some(each_uniform(Draw { temperature: 1e-40, ..plain })),
    ));
    // The last distance of a bin of the first histogram, and the first of the next, for the lower token.
    let bin = |bits: u32| (f32::from_bits(bits) * std::f32::consts::LOG2_E * 25.6) as i32;
    let first = 1.0_f32.to_bits();
    let next = (first..).find(|bits| bin(*bits) > bin(first)).expect("an end of the bin");
    let at = |bits: u32| -f64::from(f32::from_bits(bits));
    let around = vec![0.0, at(next), at(next - 1), at(next - 1000)];
    let draws = [0.6, 0.74, 0.9].map(|uniform| Draw { uniform, ..plain });
    cases.push(SampleCase::new(DType::F32, repeat(&around)[..3].to_vec(), Some(draws.to_vec())));
    // Distances that share a bin of the first histogram, and of the next.
    let close: Vec<f64> = (0..600).map(|_| 20.0 + f64::from(random.below(40) as f32 * 2e-6)).collect();
    cases.push(SampleCase::new(
        DType::F32,
        repeat(&close)[..3].to_vec(),
        Some(each_uniform(plain)[..3].to_vec()),
    ));
    cases
}

/// Tokens with a logit of -inf, as a grammar forbids them, are not drawn at any temperature: few are left, one is, or
/// all but one.
fn forbidden_cases(seed: u64) -> Vec<SampleCase> {
    let mut random = Random(seed ^ 55);
    let mut cases = Vec::new();
    for (n, left) in [1, 3, 40, 299].into_iter().enumerate() {
        let dtype = DTYPES[n % 3];
        let mut row = normals(&mut random, dtype, 2.0, 300);
        let mut allowed: Vec<usize> = (0..row.len()).collect();
        while allowed.len() > left {
            row[allowed.swap_remove(random.below(allowed.len()))] = f64::NEG_INFINITY;
        }
        for temperature in [0.5, 1.0, f32::MAX, f32::INFINITY] {
            for (top_k, top_p) in [(0, 1.0), (2, 1.0), (100, 0.9)] {
                let draws = [0.0, 0.5, 0.999_999_94, 1.0];
                let draws = draws.map(|uniform| Draw { temperature, top_p, uniform, top_k }).to_vec();
                cases.push(SampleCase::new(dtype, vec![row.clone(); draws.len()], Some(draws)));
            }
        }
    }
    cases
}

/// More than a piece for each thread, and a few times as much: ties, NaN and forbidden tokens everywhere, of which top-k
/// and top-p leave a few or most.
fn large_vocabularies(seed: u64) -> Vec<SampleCase> {
    let mut random = Random(seed ^ 77);
    let plain = Draw { temperature: 1.0, top_p: 1.0, uniform: 0.75, top_k: 0 };
    let case = |(n, vocabulary): (usize, usize)| {
        let dtype = DTYPES[(n + seed as usize) % 3];
        let mut row = |mut logits: Vec<f64>| {
            for _ in 0..vocabulary / 5 {
                logits[random.below(vocabulary)] = random.of(&[f64::NAN, f64::NEG_INFINITY]);
            }
            logits
        };
        let equal = row(vec![-3.0; vocabulary]);
        let few = row(normals(&mut Random(seed), dtype, 3.0, vocabulary));
        // In 16 bits several times as many tokens as there are numbers, and so in f32.
        let many = row(normals(&mut Random(!seed), DType::F16, 0.25, vocabulary));
        let most = vocabulary as i32 * 2 / 3;
        let mut rows = vec![
            (equal.clone(), plain),
            (equal, Draw { top_k: most, uniform: 1.0, ..plain }),
            (few.clone(), Draw { top_k: 50, top_p: 0.9, ..plain }),
            (few, Draw { temperature: 0.0, ..plain }),
            (many.clone(), Draw { top_p: 0.97, ..plain }),
            (many, Draw { top_k: most, top_p: 0.999, uniform: 0.999_999_94, ..plain }),
        ];
        // One of all that a model has takes long enough.
        if vocabulary > 100_000 {
            rows = rows.into_iter().skip(seed as usize % 2).step_by(3).collect();
        }
        let (logits, draws) = rows.into_iter().unzip();
        SampleCase::new(dtype, logits, Some(draws))
    };
    [8200, 20_000, 128_256].into_iter().enumerate().map(case).collect()
}

/// Rows of a batch give what they give alone.
fn sample_alone<D: Device>(device: &D, seed: u64) -> Result<(), String> {
    let mut random = Random(seed ^ 99);
    let logits: Vec<_> = (0..3).map(|_| normals(&mut random, DType::BF16, 1.0, 500)).collect();
    let draws: Vec<_> = (0..3)
        .map(|_| Draw { temperature: 2.0, top_p: 0.9, uniform: random.symmetric().abs(), top_k: 200 })
        .collect();
    let together = SampleCase::new(DType::BF16, logits.clone(), Some(draws.clone())).run(device)?;
    for row in 0..3 {
        let alone = SampleCase::new(DType::BF16, vec![logits[row].clone()], Some(vec![draws[row]]));
        if alone.run(device)? != [together[row]] {
            return Err(format!("row {row} depends on the others"));
        }
    }
    Ok(())
}
