//! The bars, and the table of what was found.

use std::fmt::Write as _;

use crate::sass::{Compiled, Loop};

/// What the machine code of kernels has to keep to.
pub(crate) struct Bar {
    /// Entries that begin like this.
    pub(crate) kernels: &'static str,
    /// Architectures it is said of; all where empty.
    pub(crate) archs: &'static [&'static str],
    /// Threads of a block and the dynamic shared memory it asks for, at their most.
    pub(crate) threads: u32,
    pub(crate) dynamic_shared: u32,
    /// Blocks that an SM has to hold at once.
    pub(crate) blocks: u32,
    /// Registers of a thread, at most.
    pub(crate) registers: u32,
    /// The instruction that marks the main loop: the inner loop with the most of it. Empty where the work
    /// stands in no inner loop.
    pub(crate) marker: &'static str,
    /// Of the main loop: instructions at most, then bounds for some kinds.
    pub(crate) instructions: usize,
    pub(crate) mix: Mix,
    /// Vector loads from global memory that the main loop starts before it stores anything.
    pub(crate) in_flight: usize,
}

#[derive(Clone, Copy)]
pub(crate) enum Bound {
    Exactly(usize),
    AtMost(usize),
}

const NONE: Bound = Bound::Exactly(0);

type Mix = &'static [(&'static str, Bound)];

/// Four warps that multiply with `mma`.
const fn products(
    kernels: &'static str,
    dynamic_shared: u32,
    registers: u32,
    instructions: usize,
    mix: Mix,
) -> Bar {
    Bar {
        kernels,
        archs: &[],
        threads: 128,
        dynamic_shared,
        blocks: 1,
        registers,
        marker: "HMMA",
        instructions,
        mix,
        in_flight: 0,
    }
}

/// The portable form: two blocks of a chip with much shared memory, one of the others. The softmax of a block is an
/// exponential for each logit, one more and two shuffles for each row.
const fn attention(kernels: &'static str, dynamic_shared: u32, instructions: usize) -> Bar {
    const MIX: Mix = &[("HGMMA", NONE), ("MUFU", Bound::AtMost(68)), ("SHFL", Bound::AtMost(8))];
    products(kernels, dynamic_shared, 255, instructions, MIX)
}

/// Hopper's form: as many registers as three warpgroups have before they share them out anew, and a loop
/// whose softmax fits under its products: a warp issues an instruction a clock at most, and two warps of each
/// scheduler have to be through within the 2,048 clocks of the tile's products.
const fn sm90_attention(kernels: &'static str, head_dim: u32, instructions: usize, mix: Mix) -> Bar {
    Bar {
        kernels,
        archs: &["sm_90a"],
        threads: 384,
        dynamic_shared: 6 * 256 * head_dim + 1024,
        blocks: 1,
        registers: 168,
        marker: "HGMMA",
        instructions,
        mix,
        in_flight: 0,
    }
}

/// Products of a tile, and its softmax: 64 logits of a lane in two rows, which become 32 words of probabilities.
const fn sm90_mix(products: usize) -> [(&'static str, Bound); 7] {
    [
        ("HGMMA", Bound::Exactly(products)),
        ("LDS", NONE),
        ("STS", NONE),
        ("MUFU", Bound::AtMost(66)),
        ("SHFL", Bound::AtMost(4)),
        ("F2FP", Bound::AtMost(32)),
        ("FMNMX", Bound::AtMost(70)),
    ]
}

/// Products of 32 keys (16 of long rows) with the queries of a step; an exponential for each logit, and shuffles for
/// each head.
const SCORES: Mix = &[("HMMA", Bound::AtMost(32)), ("MUFU", Bound::AtMost(32)), ("SHFL", Bound::AtMost(6))];
/// The same, for maxima and sums of rows.
const PARTIALS: Mix =
    &[("HMMA", Bound::AtMost(32)), ("MUFU", Bound::AtMost(26)), ("SHFL", Bound::AtMost(24))];

/// A thread does a number's work, in no loop.
const fn small(kernels: &'static str) -> Bar {
    Bar {
        kernels,
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 6,
        registers: 40,
        marker: "",
        instructions: 400,
        mix: &[],
        in_flight: 0,
    }
}

pub(crate) static BARS: &[Bar] = &[
    attention("fastkv_prefill_attention_f16_64", 33 << 10, 660),
    attention("fastkv_prefill_attention_f16_96", 49 << 10, 790),
    attention("fastkv_prefill_attention_f16_128", 65 << 10, 935),
    attention("fastkv_prefill_attention_f16_256", 97 << 10, 1000),
    attention("fastkv_prefill_attention_bf16_64", 33 << 10, 660),
    attention("fastkv_prefill_attention_bf16_96", 49 << 10, 790),
    attention("fastkv_prefill_attention_bf16_128", 65 << 10, 935),
    attention("fastkv_prefill_attention_bf16_256", 97 << 10, 1000),
    sm90_attention("fastkv_sm90_attention_f16_64", 64, 430, &sm90_mix(12)),
    sm90_attention("fastkv_sm90_attention_f16_128", 128, 480, &sm90_mix(16)),
    sm90_attention("fastkv_sm90_attention_bf16_64", 64, 430, &sm90_mix(12)),
    sm90_attention("fastkv_sm90_attention_bf16_128", 128, 480, &sm90_mix(16)),
    Bar {
        kernels: "fastkv_decode_f16_256",
        archs: &[],
        threads: 64,
        dynamic_shared: 96 << 10,
        blocks: 1,
        registers: 255,
        marker: "",
        instructions: 4000,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_decode_bf16_256",
        archs: &[],
        threads: 64,
        dynamic_shared: 96 << 10,
        blocks: 1,
        registers: 255,
        marker: "",
        instructions: 4000,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_decode",
        archs: &[],
        threads: 128,
        dynamic_shared: 72 << 10,
        blocks: 1,
        registers: 255,
        marker: "",
        instructions: 4000,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_gather_kv",
        archs: &[],
        threads: 128,
        dynamic_shared: 0,
        blocks: 6,
        registers: 64,
        marker: "LDG.128",
        instructions: 60,
        mix: &[("LDG", Bound::Exactly(4)), ("LDG.128", Bound::Exactly(4)), ("STG.128", Bound::Exactly(4))],
        in_flight: 4,
    },
    Bar {
        kernels: "fastkv_gather_rows",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 6,
        registers: 40,
        marker: "LDG.128",
        instructions: 52,
        mix: &[("LDG", Bound::Exactly(4)), ("LDG.128", Bound::Exactly(4)), ("STG.128", Bound::Exactly(4))],
        in_flight: 4,
    },
    small("fastkv_gather_indices"),
    Bar {
        kernels: "fastkv_compact",
        archs: &[],
        threads: 512,
        dynamic_shared: 0,
        blocks: 1,
        registers: 128,
        marker: "LDG.128",
        instructions: 60,
        mix: &[],
        in_flight: 0,
    },
    products("fastkv_window_partials", 66 << 10, 168, 440, PARTIALS),
    products("fastkv_window_scores", 49 << 10, 168, 415, SCORES),
    products("fastkv_column_sums", 66 << 10, 168, 480, SCORES),
    Bar {
        kernels: "fastkv_window_lse",
        archs: &[],
        threads: 128,
        dynamic_shared: 0,
        blocks: 6,
        registers: 40,
        marker: "LDG",
        instructions: 66,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_pool_scores",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 4,
        registers: 64,
        marker: "LDG",
        instructions: 180,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_select_cluster",
        archs: &[],
        threads: 512,
        dynamic_shared: 200 << 10,
        blocks: 1,
        registers: 128,
        marker: "LDS",
        instructions: 205,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_select",
        archs: &[],
        threads: 512,
        dynamic_shared: 72 << 10,
        blocks: 1,
        registers: 128,
        marker: "LDG",
        instructions: 245,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_rms_norm",
        archs: &[],
        threads: 512,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "",
        instructions: 400,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_sample",
        archs: &[],
        threads: 1024,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "LDG",
        instructions: 85,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_rope",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "LDG",
        instructions: 245,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_embed",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "LDG",
        instructions: 24,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_silu_mul",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "",
        instructions: 400,
        mix: &[],
        in_flight: 0,
    },
    small("fastkv_add_scores"),
    small("fastkv_gather_scores"),
    small("fastkv_raise_scores"),
    Bar { threads: 32, blocks: 16, ..small("fastkv_share_keys") },
    small("fastkv_mark_keys"),
    Bar {
        kernels: "fastkv_add",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "",
        instructions: 400,
        mix: &[],
        in_flight: 0,
    },
    Bar {
        kernels: "fastkv_convert",
        archs: &[],
        threads: 256,
        dynamic_shared: 0,
        blocks: 1,
        registers: 64,
        marker: "",
        instructions: 400,
        mix: &[],
        in_flight: 0,
    },
];

/// Where tiles with a mask, with a bias, and with both have loops of their own beside the main one, and are held to its
/// mix: their instructions at most.
static OTHER_LOOPS: &[(&str, [usize; 3])] = &[
    ("fastkv_sm90_attention_f16_64", [570, 625, 760]),
    ("fastkv_sm90_attention_f16_128", [615, 690, 825]),
    ("fastkv_sm90_attention_bf16_64", [570, 625, 760]),
    ("fastkv_sm90_attention_bf16_128", [615, 690, 825]),
];

/// Exponentials of such a loop between the wait for its logits and that for the products of its values: all of them, so
/// that the softmax runs beside these products.
const OVERLAPPED: usize = 66;

impl Bar {
    pub(crate) fn covers(&self, kernel: &Compiled) -> bool {
        kernel.entry.starts_with(self.kernels)
            && (self.archs.is_empty() || self.archs.contains(&&*kernel.arch))
    }

    pub(crate) fn check(&self, compiled: &[Compiled]) -> Result<(), String> {
        // A kernel keeps to the first bar that names it.
        let first = |kernel: &Compiled| {
            BARS.iter().find(|bar| bar.covers(kernel)).is_some_and(|bar| std::ptr::eq(bar, self))
        };
        let covered = compiled.iter().filter(|kernel| first(kernel)).collect::<Vec<_>>();
        if covered.is_empty() {
            return Err(format!("there is no {}", self.kernels));
        }
        covered.into_iter().try_for_each(|kernel| {
            self.check_one(kernel).map_err(|error| format!("{} on {}: {error}", kernel.entry, kernel.arch))
        })
    }

    fn check_one(&self, kernel: &Compiled) -> Result<(), String> {
        if kernel.registers > self.registers {
            return Err(format!("{} registers, the bar is {}", kernel.registers, self.registers));
        }
        let blocks = self.blocks_of(kernel);
        if blocks < self.blocks {
            return Err(format!("{blocks} blocks fit an SM, the bar is {}", self.blocks));
        }
        if self.marker.is_empty() {
            return Ok(());
        }
        let main = main_loop(kernel, self.marker).ok_or_else(|| format!("no loop with {}", self.marker))?;
        if main.len() > self.instructions {
            return Err(format!(
                "{} instructions in the main loop, the bar is {}",
                main.len(),
                self.instructions
            ));
        }
        self.check_mix(&main, "main loop")?;
        if let Some((_, bars)) = OTHER_LOOPS.iter().find(|(entry, _)| *entry == kernel.entry) {
            let mut loops = kernel.inner_loops();
            loops.retain(|found| found.count(self.marker) > 0);
            loops.sort_by_key(Loop::len);
            // A loop with another inside is none of these, and must not pass for one that is not there.
            if loops.len() != 1 + bars.len() {
                return Err(format!(
                    "{} loops with {} and no loop inside, not {}: with masks and biases and without",
                    loops.len(),
                    self.marker,
                    1 + bars.len()
                ));
            }
            for ((found, most), what) in
                loops[1..].iter().zip(bars).zip(["masked", "biased", "biased, masked"])
            {
                if found.len() > *most {
                    return Err(format!(
                        "{} instructions in the {what} loop, the bar is {most}",
                        found.len()
                    ));
                }
                self.check_mix(found, &format!("{what} loop"))?;
            }
            for found in &loops {
                let overlapped = found.between("MUFU", "WARPGROUP.DEPBAR");
                if overlapped < OVERLAPPED {
                    return Err(format!(
                        "{overlapped} exponentials beside products in a loop of {}, the bar is {OVERLAPPED}",
                        found.len()
                    ));
                }
            }
        }
        let in_flight = main.before("LDG.128", "STG");
        if in_flight < self.in_flight {
            return Err(format!(
                "{in_flight} vector loads before the first store, the bar is {}",
                self.in_flight
            ));
        }
        Ok(())
    }

    fn check_mix(&self, of: &Loop<'_>, name: &str) -> Result<(), String> {
        self.mix.iter().try_for_each(|(opcode, bound)| {
            let found = of.count(opcode);
            let (holds, words) = match *bound {
                Bound::Exactly(n) => (found == n, format!("exactly {n}")),
                Bound::AtMost(n) => (found <= n, format!("at most {n}")),
            };
            if holds { Ok(()) } else { Err(format!("{found} {opcode} in the {name}, the bar is {words}")) }
        })
    }

    /// Blocks that fit an SM: registers are handed out by warps in units of 256, an SM has 2,048 threads
    /// and, less 1 KB for each block, 227 KB of shared memory (163 KB and 1,536 threads where it is smaller).
    fn blocks_of(&self, kernel: &Compiled) -> u32 {
        let (threads, shared) = match &*kernel.arch {
            "sm_80" => (2048, 164 << 10),
            "sm_89" => (1536, 100 << 10),
            _ => (2048, 228 << 10),
        };
        let warps = self.threads.div_ceil(32);
        let by_registers = (65_536 / (kernel.registers * 32).next_multiple_of(256)) / warps;
        let by_shared = shared / (self.dynamic_shared + kernel.shared_bytes + 1024);
        by_registers.min(by_shared).min(threads / self.threads).min(32)
    }
}

fn main_loop<'a>(kernel: &'a Compiled, marker: &str) -> Option<Loop<'a>> {
    if marker.is_empty() {
        return None;
    }
    let loops = kernel.inner_loops().into_iter().filter(|found| found.count(marker) > 0);
    // Of equals the shorter: the one without the work that only some iterations need.
    loops.max_by_key(|found| (found.count(marker), usize::MAX - found.len()))
}

/// One line for each kernel and architecture.
pub(crate) fn table(compiled: &[Compiled]) -> String {
    let mut table = String::from(
        "| kernel | chip | registers | static shared, B | blocks/SM | main loop | MMA | LDSM | LDG | MUFU | SHFL |\n\
         |---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let mut rows = compiled.iter().collect::<Vec<_>>();
    rows.sort_by_key(|kernel| (kernel.entry.clone(), kernel.arch.clone()));
    for kernel in rows {
        let Some(bar) = BARS.iter().find(|bar| bar.covers(kernel)) else { continue };
        let Compiled { entry, arch, registers, shared_bytes, .. } = kernel;
        let blocks = bar.blocks_of(kernel);
        write!(table, "| {entry} | {arch} | {registers} | {shared_bytes} | {blocks} |").expect("a string");
        if let Some(main) = main_loop(kernel, bar.marker) {
            let n = |opcodes: &[&str]| opcodes.iter().map(|opcode| main.count(opcode)).sum::<usize>();
            let counts =
                [n(&["HMMA", "HGMMA"]), n(&["LDSM"]), n(&["LDG", "LDGSTS"]), n(&["MUFU"]), n(&["SHFL"])];
            write!(table, " {} |", main.len()).expect("a string");
            counts.iter().for_each(|count| write!(table, " {count} |").expect("a string"));
        } else {
            table.push_str(" | | | | | |");
        }
        table.push('\n');
    }
    table
}
