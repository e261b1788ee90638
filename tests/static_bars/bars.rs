//! The bars, and the table of what was found.

use std::fmt::Write as _;

use crate::{
    launches::{self, Block},
    sass::{Compiled, Loop},
};

/// What the machine code of kernels has to keep to.
pub(crate) struct Bar {
    /// The entry; `*` stands for either element type.
    pub(crate) kernels: &'static str,
    /// Architectures it is said of; all where empty.
    archs: &'static [&'static str],
    /// Registers of a thread, at most.
    registers: u32,
    /// Blocks, as the driver launches them, that an SM of sm_80, of sm_89 and of sm_90 has to hold at once.
    blocks: [u32; 3],
    /// Instructions of the whole kernel, 16 bytes each, at most: what it fetches, and what an image grows by.
    size: usize,
    /// How many of some kinds the whole kernel has.
    has: Mix,
    /// The instruction that marks the main loops: those that hold the most of it. Empty where the work stands in no
    /// loop.
    marker: &'static str,
    /// Instructions of each main loop at most, the shortest first: there are to be as many.
    loops: &'static [usize],
    /// How many of these, the longest, run seldom: of them only the length is said.
    seldom: usize,
    /// How many of some kinds each of them has.
    mix: Mix,
    /// Vector loads from global memory that each of them starts before it stores anything.
    in_flight: usize,
    /// Exponentials of each of them between the wait for its logits and that for the products of its values.
    overlapped: usize,
}

#[derive(Clone, Copy)]
enum Bound {
    Exactly(usize),
    AtMost(usize),
}

use Bound::{AtMost, Exactly};

const NONE: Bound = Exactly(0);

type Mix = &'static [(&'static str, Bound)];

/// Without loops: a thread does a number's work, or a piece's.
const fn plain(kernels: &'static str, registers: u32, blocks: [u32; 3], size: usize) -> Bar {
    Bar {
        kernels,
        archs: &[],
        registers,
        blocks,
        size,
        has: &[],
        marker: "",
        loops: &[],
        seldom: 0,
        mix: &[],
        in_flight: 0,
        overlapped: 0,
    }
}

/// Loops whose every access to global memory is a vector: so many loads, and so many stores.
const fn vectors(loads: usize, stores: usize) -> [(&'static str, Bound); 4] {
    [
        ("LDG", Exactly(loads)),
        ("LDG.128", Exactly(loads)),
        ("STG", Exactly(stores)),
        ("STG.128", Exactly(stores)),
    ]
}

/// Scores on the way into ranks, eight vectors of a thread at once.
const fn ranks(kernels: &'static str, registers: u32, blocks: [u32; 3], size: usize) -> Bar {
    Bar {
        marker: "STS.128",
        loops: &[241],
        mix: &[("LDG", Exactly(8)), ("LDG.128", Exactly(8)), ("STS.128", Exactly(8))],
        ..plain(kernels, registers, blocks, size)
    }
}

/// Scores of four heads at once that are pooled by the largest of 7, or by their mean.
const fn pools(kernels: &'static str, registers: u32, blocks: [u32; 3], size: usize) -> Bar {
    Bar {
        marker: "LDG.128",
        loops: &[189, 444],
        mix: &[("LDG", Exactly(12)), ("LDG.128", Exactly(12)), ("STG", NONE)],
        in_flight: 12,
        ..plain(kernels, registers, blocks, size)
    }
}

/// Products by `mma` of a tile of keys: fragments come from shared memory by `ldmatrix`, tiles by `cp.async`. The softmax
/// is an exponential for each logit and one more for each row, or for each of two.
const fn products(
    mma: usize,
    ldmatrix: usize,
    cp_async: usize,
    exponentials: usize,
    shuffles: usize,
) -> [(&'static str, Bound); 5] {
    [
        ("HMMA", Exactly(mma)),
        ("LDSM", AtMost(ldmatrix)),
        ("LDGSTS", Exactly(cp_async)),
        ("MUFU", AtMost(exponentials)),
        ("SHFL", AtMost(shuffles)),
    ]
}

/// Loops that multiply by `mma`.
const fn multiplies(
    kernels: &'static str,
    registers: u32,
    blocks: [u32; 3],
    size: usize,
    loops: &'static [usize],
    mix: Mix,
) -> Bar {
    Bar { marker: "HMMA", loops, mix, ..plain(kernels, registers, blocks, size) }
}

/// Hopper's form: as many registers as three warpgroups have before they share them out anew, and loops without a mask,
/// with one, with a bias, with both, and both of these where keys have no page. A warp issues an instruction a clock at
/// most, and two warps of each scheduler have to be through within the 2,048 clocks of the products of a tile of 128 wide
/// heads; only the last two loops may take longer, which few tiles need.
const fn sm90_attention(
    kernels: &'static str,
    size: usize,
    has: Mix,
    loops: &'static [usize],
    mix: Mix,
) -> Bar {
    Bar {
        has,
        marker: "HGMMA",
        loops,
        seldom: 2,
        mix,
        // All of them, so that the softmax runs beside these products.
        overlapped: 66,
        ..plain(kernels, 168, [0, 0, 1], size)
    }
}

/// Keys, values and queries come by the copy engine; warps take registers, or give them up.
const fn sm90_has(copies: usize) -> [(&'static str, Bound); 2] {
    [("UTMALDG", Exactly(copies)), ("USETMAXREG", Exactly(2))]
}

/// Products of a tile, and its softmax: 64 logits of a lane in two rows, which become 32 words of probabilities.
const fn sm90_mix(products: usize) -> [(&'static str, Bound); 10] {
    [
        ("HGMMA", Exactly(products)),
        ("HMMA", NONE),
        ("LDS", NONE),
        ("STS", NONE),
        ("R2UR", NONE),
        ("SYNCS", Exactly(4)),
        ("MUFU", AtMost(66)),
        ("SHFL", AtMost(4)),
        ("F2FP", AtMost(32)),
        ("FMNMX", AtMost(68)),
    ]
}

pub(crate) static BARS: &[Bar] = &[
    // Tiles without a mask, and with one.
    multiplies(
        "fastkv_prefill_attention_*_64",
        219,
        [2, 2, 2],
        7016,
        &[652, 1482],
        &products(128, 40, 8, 68, 8),
    ),
    multiplies(
        "fastkv_prefill_attention_*_96",
        254,
        [2, 1, 2],
        7448,
        &[779, 1686],
        &products(192, 60, 12, 68, 8),
    ),
    Bar {
        archs: &["sm_80", "sm_89"],
        ..multiplies(
            "fastkv_prefill_attention_*_128",
            255,
            [2, 1, 0],
            7704,
            &[926, 2078],
            &products(256, 80, 16, 68, 8),
        )
    },
    Bar {
        archs: &["sm_90"],
        ..multiplies(
            "fastkv_prefill_attention_*_128",
            205,
            [0, 0, 2],
            6888,
            &[527, 1461],
            &products(128, 72, 16, 34, 4),
        )
    },
    multiplies(
        "fastkv_prefill_attention_*_256",
        255,
        [1, 1, 2],
        8448,
        &[989, 2398],
        &products(256, 144, 32, 34, 4),
    ),
    // Keys in pages, whose places are found in the loop and read from shared memory.
    multiplies(
        "fastkv_paged_attention_*_64",
        222,
        [2, 2, 2],
        9056,
        &[838, 1796],
        &products(128, 40, 8, 70, 8),
    ),
    multiplies(
        "fastkv_paged_attention_*_96",
        254,
        [2, 1, 2],
        9168,
        &[923, 1953],
        &products(192, 60, 12, 70, 8),
    ),
    Bar {
        archs: &["sm_80", "sm_89"],
        ..multiplies(
            "fastkv_paged_attention_*_128",
            255,
            [2, 1, 0],
            10_056,
            &[1221, 2484],
            &products(256, 80, 16, 70, 8),
        )
    },
    Bar {
        archs: &["sm_90"],
        ..multiplies(
            "fastkv_paged_attention_*_128",
            222,
            [0, 0, 2],
            9312,
            &[839, 1844],
            &products(128, 72, 16, 36, 4),
        )
    },
    multiplies(
        "fastkv_paged_attention_*_256",
        254,
        [1, 1, 2],
        11_096,
        &[1465, 2993],
        &products(256, 144, 32, 36, 4),
    ),
    sm90_attention(
        "fastkv_sm90_attention_*_64",
        13_848,
        &sm90_has(10),
        &[428, 560, 621, 754, 891, 960],
        &sm90_mix(12),
    ),
    sm90_attention(
        "fastkv_sm90_attention_*_128",
        15_512,
        &sm90_has(14),
        &[478, 610, 683, 817, 971, 1041],
        &sm90_mix(16),
    ),
    // Walks over the chunks of ragged lists and of paged ones, which end and merge chunks too. The blocks are as many as
    // the driver's grid counts on, registers those of three blocks, or of four where d = 128 and queries fill one tile.
    multiplies("fastkv_decode_*_64_q8", 126, [3, 2, 3], 11384, &[3005, 3320], &products(8, 10, 23, 51, 38)),
    multiplies("fastkv_decode_*_64_q16", 138, [3, 2, 3], 12568, &[3453, 3828], &products(16, 12, 23, 63, 50)),
    multiplies("fastkv_decode_*_96_q8", 152, [2, 1, 3], 12400, &[3129, 3442], &products(12, 15, 31, 51, 46)),
    multiplies("fastkv_decode_*_96_q16", 168, [2, 1, 3], 13720, &[3594, 3981], &products(24, 18, 31, 63, 58)),
    multiplies("fastkv_decode_*_128_q8", 128, [2, 1, 3], 12896, &[3263, 3660], &products(16, 20, 39, 51, 54)),
    multiplies(
        "fastkv_decode_*_128_q16",
        168,
        [2, 1, 2],
        14344,
        &[3762, 4298],
        &products(32, 24, 39, 63, 66),
    ),
    multiplies("fastkv_decode_*_256_q8", 191, [2, 1, 3], 14704, &[3529, 4033], &products(32, 40, 71, 49, 86)),
    multiplies(
        "fastkv_decode_*_256_q16",
        255,
        [1, 1, 2],
        15952,
        &[4073, 4312],
        &products(64, 48, 71, 61, 98),
    ),
    // Products of 32 keys (16 of long rows) with the queries of a step.
    multiplies("fastkv_window_scores_*_64", 122, [4, 3, 4], 2072, &[389], &products(16, 4, 0, 32, 6)),
    multiplies("fastkv_window_scores_*_96", 146, [3, 2, 3], 1864, &[394], &products(24, 6, 0, 32, 6)),
    multiplies("fastkv_window_scores_*_128", 162, [3, 2, 3], 2400, &[407], &products(32, 8, 0, 32, 6)),
    multiplies("fastkv_window_scores_*_256", 160, [2, 1, 3], 2056, &[325], &products(32, 16, 0, 16, 4)),
    multiplies("fastkv_column_sums_*_64", 144, [3, 2, 3], 2144, &[449], &products(16, 4, 0, 32, 6)),
    multiplies("fastkv_column_sums_*_96", 155, [3, 2, 3], 1960, &[456], &products(24, 6, 0, 32, 6)),
    multiplies("fastkv_column_sums_*_128", 168, [2, 1, 3], 2464, &[474], &products(32, 8, 0, 32, 6)),
    multiplies("fastkv_column_sums_*_256", 162, [1, 1, 2], 2128, &[374], &products(32, 16, 0, 16, 4)),
    // The same, for maxima and sums of rows.
    multiplies("fastkv_window_partials_*_64", 110, [4, 2, 4], 1976, &[419], &products(16, 4, 0, 26, 24)),
    multiplies("fastkv_window_partials_*_96", 122, [3, 1, 4], 1712, &[379], &products(24, 6, 0, 26, 24)),
    multiplies("fastkv_window_partials_*_128", 139, [2, 1, 3], 2280, &[437], &products(32, 8, 0, 26, 24)),
    multiplies("fastkv_window_partials_*_256", 140, [2, 1, 3], 1936, &[380], &products(32, 16, 0, 18, 24)),
    Bar { marker: "LDG", loops: &[61], ..plain("fastkv_window_lse", 35, [16, 12, 16], 280) },
    Bar {
        marker: "LDG.128",
        loops: &[32],
        mix: &vectors(4, 4),
        in_flight: 4,
        ..plain("fastkv_gather_kv", 56, [9, 9, 9], 928)
    },
    Bar {
        marker: "LDG.128",
        loops: &[52],
        mix: &vectors(4, 4),
        in_flight: 4,
        ..plain("fastkv_gather_rows", 40, [12, 12, 12], 200)
    },
    // Ragged lists and paged ones; positions are no vectors.
    Bar {
        marker: "LDG.128",
        loops: &[53, 56],
        mix: &[("LDG", Exactly(4)), ("LDG.128", Exactly(4)), ("STG", Exactly(8)), ("STG.128", Exactly(4))],
        in_flight: 4,
        ..plain("fastkv_compact", 84, [1, 1, 1], 1512)
    },
    plain("fastkv_gather_indices", 12, [8, 6, 8], 40),
    // Scores that are read as they lie; then ranks.
    Bar { archs: &["sm_90a"], ..ranks("fastkv_select_cluster", 114, [0, 0, 1], 4816) },
    ranks("fastkv_select_block", 111, [1, 1, 1], 4272),
    ranks("fastkv_select_rank", 113, [1, 1, 1], 3312),
    pools("fastkv_pool_scores", 76, [3, 3, 3], 2088),
    Bar { archs: &["sm_90a"], ..pools("fastkv_select_cluster", 114, [0, 0, 1], 4816) },
    pools("fastkv_select_block", 111, [1, 1, 1], 4272),
    pools("fastkv_select_rank", 113, [1, 1, 1], 3312),
    Bar {
        marker: "LDG.128",
        loops: &[90],
        mix: &vectors(2, 0),
        ..plain("fastkv_select_digit", 35, [4, 3, 4], 640)
    },
    Bar {
        marker: "LDG.128",
        loops: &[84],
        mix: &vectors(4, 0),
        ..plain("fastkv_select_split", 40, [4, 3, 4], 360)
    },
    Bar {
        marker: "LDG.128",
        loops: &[84],
        mix: &vectors(4, 0),
        ..plain("fastkv_select_write", 44, [4, 3, 2], 976)
    },
    // Rows of 16 bits from a table of 16, and to or from 32.
    Bar { marker: "LDG.128", loops: &[20, 23, 23], ..plain("fastkv_embed", 28, [8, 6, 8], 440) },
    // A type of logits each.
    Bar {
        marker: "LDG.128",
        loops: &[80, 99, 144, 459, 477],
        ..plain("fastkv_sample", 64, [1, 1, 1], 10_352)
    },
    Bar { marker: "LDG", loops: &[243, 243, 243], ..plain("fastkv_rope", 48, [5, 5, 5], 3160) },
    plain("fastkv_rms_norm", 64, [2, 2, 2], 4664),
    plain("fastkv_silu_mul", 33, [8, 6, 8], 360),
    plain("fastkv_add", 26, [8, 6, 8], 384),
    plain("fastkv_convert", 22, [8, 6, 8], 256),
    plain("fastkv_add_scores", 20, [8, 6, 8], 64),
    plain("fastkv_gather_scores", 16, [8, 6, 8], 56),
    plain("fastkv_raise_scores", 10, [8, 6, 8], 48),
    plain("fastkv_mark_keys", 14, [8, 6, 8], 64),
    plain("fastkv_share_keys", 24, [32, 24, 32], 168),
];

impl Bar {
    pub(crate) fn covers(&self, kernel: &Compiled) -> bool {
        let (head, tail) = self.kernels.split_once('*').unwrap_or((self.kernels, ""));
        let dtype = kernel.entry.strip_prefix(head).and_then(|rest| rest.strip_suffix(tail));
        let is_covered = dtype.is_some_and(|dtype| self.kernels.contains('*') != dtype.is_empty());
        is_covered && (self.archs.is_empty() || self.archs.contains(&&*kernel.arch))
    }

    pub(crate) fn check(&self, compiled: &[Compiled]) -> Result<(), String> {
        let covered = compiled.iter().filter(|kernel| self.covers(kernel)).collect::<Vec<_>>();
        if covered.is_empty() {
            return Err(format!("there is no {}", self.kernels));
        }
        covered.into_iter().try_for_each(|kernel| {
            self.check_one(kernel).map_err(|error| format!("{} on {}: {error}", kernel.entry, kernel.arch))
        })
    }

    fn check_one(&self, kernel: &Compiled) -> Result<(), String> {
        at_most("registers", kernel.registers as usize, self.registers as usize)?;
        at_most("instructions", kernel.code.len(), self.size)?;
        check_mix(self.has, |opcode| kernel.count(opcode))?;
        let (blocks, least) = (blocks_of(kernel)?, self.blocks[Sm::of(kernel).number]);
        if blocks < least {
            return Err(format!("{blocks} blocks fit an SM, the bar is {least}"));
        }
        let loops = self.main_loops(kernel);
        if loops.len() != self.loops.len() {
            let (found, marker) = (loops.len(), self.marker);
            return Err(format!("{found} main loops with {marker}, the bar is {}", self.loops.len()));
        }
        for (number, (found, most)) in loops.iter().zip(self.loops).enumerate() {
            let check = || {
                at_most("instructions", found.len(), *most)?;
                if number >= loops.len() - self.seldom {
                    return Ok(());
                }
                check_mix(self.mix, |opcode| found.count(opcode))?;
                at_least(
                    "vector loads before the first store",
                    found.before("LDG.128", "STG"),
                    self.in_flight,
                )?;
                let overlapped = found.between("MUFU", "WARPGROUP.DEPBAR");
                at_least("exponentials beside products", overlapped, self.overlapped)
            };
            check().map_err(|error: String| format!("a main loop of {}: {error}", found.len()))?;
        }
        Ok(())
    }

    /// The shortest first.
    fn main_loops<'a>(&self, kernel: &'a Compiled) -> Vec<Loop<'a>> {
        let mut loops = if self.marker.is_empty() { Vec::new() } else { kernel.loops_with(self.marker) };
        let most = loops.iter().map(|found| found.count(self.marker)).max();
        loops.retain(|found| Some(found.count(self.marker)) == most);
        loops
    }
}

fn at_most(what: &str, found: usize, bar: usize) -> Result<(), String> {
    if found <= bar { Ok(()) } else { Err(format!("{found} {what}, the bar is {bar}")) }
}

fn at_least(what: &str, found: usize, bar: usize) -> Result<(), String> {
    if found >= bar { Ok(()) } else { Err(format!("{found} {what}, the bar is {bar}")) }
}

fn check_mix(mix: Mix, count: impl Fn(&str) -> usize) -> Result<(), String> {
    mix.iter().try_for_each(|(opcode, bound)| match (count(opcode), *bound) {
        (found, Exactly(n)) if found != n => Err(format!("{found} {opcode}, the bar is exactly {n}")),
        (found, AtMost(n)) => at_most(opcode, found, n),
        _ => Ok(()),
    })
}

/// What a streaming multiprocessor has, from the table of compute capabilities in the CUDA programming guide.
struct Sm {
    /// In the order of [`Bar::blocks`].
    number: usize,
    threads: u32,
    blocks: u32,
    shared_bytes: u32,
}

impl Sm {
    fn of(kernel: &Compiled) -> Self {
        match &*kernel.arch {
            "sm_80" => Self { number: 0, threads: 2048, blocks: 32, shared_bytes: 164 << 10 },
            "sm_89" => Self { number: 1, threads: 1536, blocks: 24, shared_bytes: 100 << 10 },
            _ => Self { number: 2, threads: 2048, blocks: 32, shared_bytes: 228 << 10 },
        }
    }
}

fn launched(kernel: &Compiled) -> Result<Block, String> {
    launches::block(kernel).ok_or("no driver launches it in tests/static_bars/launches.rs".into())
}

/// Blocks that fit an SM. A quarter of its registers is each scheduler's, which hands them to warps in units of 256; of
/// shared memory the system takes 1 KB for each block, and units are of 128 bytes.
fn blocks_of(kernel: &Compiled) -> Result<u32, String> {
    let Block { shared_bytes, threads } = launched(kernel)?;
    let sm = Sm::of(kernel);
    let warps = 4 * (16_384 / (kernel.registers * 32).next_multiple_of(256));
    let by_registers = warps / threads.div_ceil(32);
    let by_shared = sm.shared_bytes / (shared_bytes + kernel.shared_bytes + 1024).next_multiple_of(128);
    Ok(by_registers.min(by_shared).min(sm.threads / threads).min(sm.blocks))
}

/// One line for each kernel and architecture.
pub(crate) fn table(compiled: &[Compiled]) -> Result<String, String> {
    let mut table = String::from(
        "| kernel | chip | registers | threads | shared, B | blocks/SM | instructions | main loops | MMA | LDSM | LDG \
         | MUFU | SHFL |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut rows = compiled.iter().collect::<Vec<_>>();
    rows.sort_by_key(|kernel| (kernel.entry.clone(), kernel.arch.clone()));
    for kernel in rows {
        let Some(bar) = BARS.iter().find(|bar| bar.covers(kernel)) else { continue };
        let Compiled { entry, arch, registers, code, .. } = kernel;
        let Block { threads, shared_bytes } = launched(kernel)?;
        let (shared, blocks, size) = (shared_bytes + kernel.shared_bytes, blocks_of(kernel)?, code.len());
        let loops = bar.main_loops(kernel);
        let lengths = loops.iter().map(|found| found.len().to_string()).collect::<Vec<_>>().join(", ");
        write!(
            table,
            "| {entry} | {arch} | {registers} | {threads} | {shared} | {blocks} | {size} | {lengths} |"
        )
        .expect("a string");
        for opcodes in [&["HMMA", "HGMMA"][..], &["LDSM"], &["LDG", "LDGSTS"], &["MUFU"], &["SHFL"]] {
            let count = |main: &Loop<'_>| opcodes.iter().map(|opcode| main.count(opcode)).sum::<usize>();
            let count = loops.first().map_or_else(String::new, |main| format!("{} ", count(main)));
            write!(table, " {count}|").expect("a string");
        }
        table.push('\n');
    }
    Ok(table)
}
