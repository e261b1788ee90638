//! Batches for the attention kernel in `tests/ptx/attention.cu`, what it makes of them, and what is right.

use ptx_emulator::{Counters, Device, Error, Launch, Schedule, Swizzle, TensorMap};

/// Elements of a head, rows of a tile, and bytes of one.
const HEAD: usize = 128;
const ROWS: usize = 128;
const TILE_BYTES: usize = ROWS * HEAD * 2;

pub(crate) const SCHEDULES: [Schedule; 4] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2)];

/// Sequences of one batch, with queries, keys and values for them.
pub(crate) struct Problem {
    /// Queries and keys of each sequence; the last query sees the last key.
    pub(crate) lengths: Vec<[usize; 2]>,
    pub(crate) query_heads: usize,
    pub(crate) kv_heads: usize,
    scale: f32,
    /// `[tokens, heads, HEAD]`, bf16.
    q: Vec<u16>,
    k: Vec<u16>,
    v: Vec<u16>,
}

/// Rows of the output, `[tokens, heads, HEAD]`, and logarithms of the sums, `[heads, tokens]`.
pub(crate) struct Attention {
    pub(crate) out: Vec<u16>,
    pub(crate) lse: Vec<f32>,
}

impl Problem {
    /// Numbers drawn from a seed: queries up to 4, so that some weights are far from equal, keys and
    /// values up to 1.
    pub(crate) fn new(lengths: &[[usize; 2]], query_heads: usize, kv_heads: usize, seed: u64) -> Self {
        let mut state = seed;
        let mut draw = |tokens: usize, heads: usize, most: f32| -> Vec<u16> {
            let mut next = || {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let unit = (state >> 40) as f32 / (1 << 23) as f32 - 1.0;
                to_bf16(most * unit)
            };
            // A map has at least one token.
            (0..tokens.max(1) * heads * HEAD).map(|_| next()).collect()
        };
        let queries = lengths.iter().map(|[queries, _]| queries).sum();
        let keys = lengths.iter().map(|[_, keys]| keys).sum();
        Self {
            lengths: lengths.to_vec(),
            query_heads,
            kv_heads,
            scale: (HEAD as f32).sqrt().recip(),
            q: draw(queries, query_heads, 4.0),
            k: draw(keys, kv_heads, 1.0),
            v: draw(keys, kv_heads, 1.0),
        }
    }

    pub(crate) fn queries(&self) -> usize {
        self.lengths.iter().map(|[queries, _]| queries).sum()
    }

    /// Runs `attention`, which the device has loaded, with so many blocks.
    pub(crate) fn run(&self, device: &mut Device, blocks: u32) -> Result<(Attention, Counters), Error> {
        let uploaded = self.upload(device)?;
        let counters = uploaded.launch(device, blocks)?;
        Ok((uploaded.attention(device)?, counters))
    }

    /// Puts everything on a device.
    pub(crate) fn upload(&self, device: &mut Device) -> Result<Uploaded, Error> {
        let upload = |device: &mut Device, bytes: &[u8]| {
            let address = device.alloc(bytes.len());
            device.write(address, bytes).map(|()| address)
        };
        let map = |device: &mut Device, values: &[u16], heads: usize| {
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let row = heads as u64 * HEAD as u64 * 2;
            TensorMap {
                address: upload(device, &bytes)?,
                element_bytes: 2,
                sizes: &[64, (values.len() / heads / HEAD) as u64, HEAD as u64 / 64, heads as u64],
                strides: &[row, 128, HEAD as u64 * 2],
                box_sizes: &[64, ROWS as u32, HEAD as u32 / 64, 1],
                swizzle: Swizzle::Bytes128,
            }
            .encode()
        };
        let starts = |device: &mut Device, which: usize| {
            let ends = self.lengths.iter().scan(0, |end, lengths| {
                *end += lengths[which] as i32;
                Some(*end)
            });
            let bytes: Vec<u8> = std::iter::once(0).chain(ends).flat_map(i32::to_le_bytes).collect();
            upload(device, &bytes)
        };
        let queries = self.queries();
        let mut params = Vec::new();
        params.extend(map(device, &self.q, self.query_heads)?);
        params.extend(map(device, &self.k, self.kv_heads)?);
        params.extend(map(device, &self.v, self.kv_heads)?);
        let out_bytes = queries * self.query_heads * HEAD * 2;
        let lse_bytes = queries * self.query_heads * 4;
        let [out, lse] = [out_bytes, lse_bytes].map(|bytes| device.alloc(bytes.max(1)));
        let (cu_queries, cu_keys) = (starts(device, 0)?, starts(device, 1)?);
        let queue = upload(device, &[0; 4])?;
        params
            .extend([out, lse, cu_queries, cu_keys, queue].iter().flat_map(|address| address.to_le_bytes()));
        let numbers = [self.lengths.len(), self.query_heads, self.kv_heads, queries];
        params.extend(numbers.iter().flat_map(|number| (*number as i32).to_le_bytes()));
        params.extend(self.scale.to_le_bytes());
        params.extend([0; 4]);
        Ok(Uploaded { params, queue, out, out_bytes, lse, lse_bytes })
    }

    /// Compares with the formula, in f64 and plain loops.
    ///
    /// What the kernel may be off by. Weights are rounded to bf16, and so are results: 2^-8 of each, in
    /// relation to the sum of weight · |value| and to the result. A score is a sum of 128 products in f32
    /// steps of 16, and its exponential is taken of a rounded product: with 8 additions, 2 more
    /// roundings and terms that add up to `size`, 10 · 2^-24 · size, a relation that weights inherit.
    /// Sums of up to n weights add n · 2^-24. Of the approximate functions ex2 and lg2 2^-21 is enough.
    pub(crate) fn check(&self, found: &Attention) -> Result<(), String> {
        let queries_of_all = self.queries();
        let (mut first_query, mut first_key) = (0, 0);
        for (sequence, [queries, keys]) in self.lengths.iter().copied().enumerate() {
            for (head, row) in (0..self.query_heads).flat_map(|head| (0..queries).map(move |row| (head, row)))
            {
                let kv_head = head / (self.query_heads / self.kv_heads);
                let place = |token: usize, heads: usize, head: usize| (token * heads + head) * HEAD;
                let q = &self.q[place(first_query + row, self.query_heads, head)..][..HEAD];
                let visible = (row + keys + 1).saturating_sub(queries);
                let mut size = 0.0_f64;
                let scores: Vec<f64> = (0..visible)
                    .map(|key| {
                        let k = &self.k[place(first_key + key, self.kv_heads, kv_head)..][..HEAD];
                        let terms =
                            q.iter().zip(k).map(|(q, k)| f64::from(of_bf16(*q)) * f64::from(of_bf16(*k)));
                        let (sum, absolute) =
                            terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                        size = size.max(absolute * f64::from(self.scale));
                        sum * f64::from(self.scale)
                    })
                    .collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let total: f64 = scores.iter().map(|score| (score - most).exp()).sum();
                let in_f32 = (10.0 * size + visible as f64) * 2_f64.powi(-24) + 2_f64.powi(-21);

                let lse = found.lse[head * queries_of_all + first_query + row];
                let expected = most + total.ln();
                let same = visible == 0 && lse == f32::NEG_INFINITY;
                // A logarithm turns relations into differences, and is rounded itself.
                let room = in_f32 + expected.abs() * 2_f64.powi(-23);
                if !same && !within(lse, expected, room) {
                    return Err(format!(
                        "sequence {sequence}, head {head}, row {row}: lse {lse}, expected {expected} within {room:e}"
                    ));
                }
                for column in 0..HEAD {
                    let (mut expected, mut absolute) = (0.0, 0.0);
                    for (key, score) in scores.iter().enumerate() {
                        let v = self.v[place(first_key + key, self.kv_heads, kv_head) + column];
                        let term = (score - most).exp() / total * f64::from(of_bf16(v));
                        expected += term;
                        absolute += term.abs();
                    }
                    let out = of_bf16(found.out[place(first_query + row, self.query_heads, head) + column]);
                    let unrounded = absolute * (2_f64.powi(-8) + 2.0 * in_f32);
                    let room = unrounded + (expected.abs() + unrounded) * 2_f64.powi(-8);
                    if !within(out, expected, room) {
                        return Err(format!(
                            "sequence {sequence}, head {head}, row {row}, column {column}: {out}, expected {expected} within {room:e}"
                        ));
                    }
                }
            }
            first_query += queries;
            first_key += keys;
        }
        Ok(())
    }
}

/// A problem on a device.
pub(crate) struct Uploaded {
    params: Vec<u8>,
    queue: u64,
    out: u64,
    out_bytes: usize,
    lse: u64,
    lse_bytes: usize,
}

impl Uploaded {
    pub(crate) fn launch(&self, device: &mut Device, blocks: u32) -> Result<Counters, Error> {
        device.fill(self.queue, 0, 4)?;
        device.launch(&Launch {
            kernel: "attention",
            grid: [blocks, 1, 1],
            cluster: [1; 3],
            block: [384, 1, 1],
            shared_bytes: 5 * TILE_BYTES as u32 + 1024,
            params: &self.params,
        })
    }

    fn attention(&self, device: &Device) -> Result<Attention, Error> {
        let out = device.read(self.out, self.out_bytes)?;
        let lse = device.read(self.lse, self.lse_bytes)?;
        let word = |bytes: &[u8]| f32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        Ok(Attention {
            out: out.chunks(2).map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])).collect(),
            lse: lse.chunks(4).map(word).collect(),
        })
    }
}

/// Not so for what is no number.
fn within(found: f32, expected: f64, room: f64) -> bool {
    (f64::from(found) - expected).abs() <= room
}

fn to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}

fn of_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}
