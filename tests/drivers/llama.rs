//! The small operations of a Llama forward, and matrix products.

use crate::support::recorder::{Recorded, Recorder};
use fastkv::{
    abi::{
        AddParams, ConvertParams, EmbedParams, RmsNormParams, RopeParams, Rows, SampleParams, SiluMulParams,
    },
    kernels::{
        DType, Error, Kernel, Matmul,
        activation::{self, Add, Convert, SiluMul},
        embed::{self, Embed},
        norm::{self, RmsNorm},
        rope::{self, Append, Rope},
        sample::{self, Sample},
    },
};
use proptest::prelude::*;

/// Runs a driver on work that was changed, and expects this of it.
macro_rules! refuses {
    ($driver:path, $work:expr, $($change:expr => $message:expr),* $(,)?) => {
        $(Recorder::refuses($driver, $work, $change, $message);)*
    };
}

/// The only launch of a driver.
fn launched(run: impl FnOnce(&Recorder) -> Result<(), Error>) -> Recorded {
    let recorder = Recorder::default();
    run(&recorder).expect("work that fits");
    let launches = recorder.launches();
    assert_eq!(launches.len(), 1);
    launches[0].clone()
}

fn params<P: bytemuck::AnyBitPattern>(launch: &Recorded) -> P {
    bytemuck::pod_read_unaligned(&launch.params)
}

fn matrix(base: u64, width: u32) -> Rows {
    Rows::token_major(base, 0, 1, width)
}

const WIDTHS: &str = "a multiple of 8 from 8 to 67108864";

// ---------------------------------------------------------------------------------------------

fn add() -> Add {
    Add {
        x: matrix(1 << 40, 4096),
        y: matrix(1 << 41, 4096),
        rows: 1000,
        width: 4096,
        x_dtype: DType::F32,
        y_dtype: DType::BF16,
    }
}

fn convert() -> Convert {
    Convert {
        x: matrix(1 << 40, 4096),
        out: matrix(1 << 41, 4096),
        rows: 1000,
        width: 4096,
        x_dtype: DType::F32,
        out_dtype: DType::F16,
    }
}

fn silu_mul() -> SiluMul {
    SiluMul {
        gate: matrix(1 << 40, 14336),
        up: matrix(1 << 41, 14336),
        out: matrix(1 << 40, 14336),
        rows: 1000,
        width: 14336,
        dtype: DType::F16,
    }
}

#[test]
fn elementwise_launches() {
    // SAFETY: the recorder touches no memory, here and below.
    let launch = launched(|device| unsafe { activation::add(device, &add()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::Add, [1000, 2, 1], [256, 1, 1]));
    let expected = AddParams { x: add().x, y: add().y, width: 4096, x_dtype: 2, y_dtype: 1, reserved: 0 };
    assert_eq!(params::<AddParams>(&launch), expected);
    // SAFETY: as above.
    let launch = launched(|device| unsafe { activation::silu_mul(device, &silu_mul()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::SiluMul, [1000, 7, 1], [256, 1, 1]));
    let SiluMul { gate, up, out, .. } = silu_mul();
    assert_eq!(params::<SiluMulParams>(&launch), SiluMulParams { gate, up, out, width: 14336, dtype: 0 });
    // As wide as it gets.
    let work = Add { rows: 1, width: 1 << 26, ..add() };
    // SAFETY: as above.
    let launch = launched(|device| unsafe { activation::add(device, &work) });
    assert_eq!(launch.grid, [1, 1 << 15, 1]);
    // SAFETY: as above.
    let launch = launched(|device| unsafe { activation::convert(device, &convert()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::Convert, [1000, 2, 1], [256, 1, 1]));
    let Convert { x, out, .. } = convert();
    let expected = ConvertParams { x, out, width: 4096, x_dtype: 2, out_dtype: 0, reserved: 0 };
    assert_eq!(params::<ConvertParams>(&launch), expected);
}

#[test]
fn elementwise_refuses() {
    refuses!(
        activation::add, add(),
        |w: &mut Add| w.width = 12 => &format!("width is 12; it must be {WIDTHS}"),
        |w: &mut Add| w.width = 0 => &format!("width is 0; it must be {WIDTHS}"),
        |w: &mut Add| w.width = u32::MAX - 7 => &format!("width is 4294967288; it must be {WIDTHS}"),
        |w: &mut Add| w.rows = 1 << 31 => "rows is 2147483648; it must be at most 2147483647",
        |w: &mut Add| w.x.base = 8 => "x is 0x8; it must be a device address, a multiple of 16",
        |w: &mut Add| w.y.token_stride = 4092 =>
            "y.token_stride is 4092; it must be 0 or a positive multiple of 8 for BF16 (16 bytes)",
        |w: &mut Add| w.y.token_stride = 4088 => "y.token_stride is 4088; it must be 4096 or more: rows must not overlap",
        |w: &mut Add| w.x.token_stride = 4088 => "x.token_stride is 4088; it must be 4096 or more: rows must not overlap",
        |w: &mut Add| w.y.base = w.x.base + 16 =>
            "x is 0x10000000000..0x10000fa0000; it must be apart from y, 0x10000000010..0x100007d0010",
    );
    refuses!(
        activation::convert, convert(),
        |w: &mut Convert| w.width = 4 => &format!("width is 4; it must be {WIDTHS}"),
        |w: &mut Convert| w.out.token_stride = 4088 =>
            "out.token_stride is 4088; it must be 4096 or more: rows must not overlap",
        |w: &mut Convert| w.out = w.x =>
            "out is 0x10000000000..0x100007d0000; it must be apart from x, 0x10000000000..0x10000fa0000",
    );
    refuses!(
        activation::silu_mul, silu_mul(),
        |w: &mut SiluMul| w.width = 4 => &format!("width is 4; it must be {WIDTHS}"),
        |w: &mut SiluMul| w.up.base = 0 => "up is 0x0; it must be a device address, a multiple of 16",
        |w: &mut SiluMul| w.out.token_stride = 8 =>
            "out.token_stride is 8; it must be 14336 or more: rows must not overlap",
        |w: &mut SiluMul| w.out.base += 16 =>
            "out is 0x10000000010..0x10001b58010; it must be apart from gate, 0x10000000000..0x10001b58000",
        |w: &mut SiluMul| w.out.token_stride += 8 =>
            "out is 0x10000000000..0x10001b5be70; it must be apart from gate, 0x10000000000..0x10001b58000",
    );
}

// ---------------------------------------------------------------------------------------------

fn embedding() -> Embed {
    Embed {
        table: 1 << 40,
        ids: 1 << 20,
        out: 1 << 41,
        fault: 0,
        rows: 10,
        vocabulary: 128_256,
        width: 4096,
        table_dtype: DType::BF16,
        out_dtype: DType::F32,
    }
}

#[test]
fn embed_launches() {
    // SAFETY: the recorder touches no memory.
    let launch = launched(|device| unsafe { embed::embed(device, &embedding()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::Embed, [10, 1, 1], [256, 1, 1]));
    let expected = EmbedParams {
        table: 1 << 40,
        ids: 1 << 20,
        out: 1 << 41,
        fault: 0,
        vocabulary: 128_256,
        width: 4096,
        table_dtype: 1,
        out_dtype: 2,
    };
    assert_eq!(params::<EmbedParams>(&launch), expected);
}

#[test]
fn embed_refuses() {
    refuses!(
        embed::embed, embedding(),
        |w: &mut Embed| w.width = 1 => &format!("width is 1; it must be {WIDTHS}"),
        |w: &mut Embed| w.vocabulary = u32::MAX => "vocabulary is 4294967295; it must be at most 2147483647",
        |w: &mut Embed| w.table = 0 => "table is 0x0; it must be a device address, a multiple of 16",
        |w: &mut Embed| w.ids = 2 => "ids is 0x2; it must be a device address, a multiple of 4",
        |w: &mut Embed| w.fault = 2 => "fault is 0x2; it must be a device address, a multiple of 4",
        |w: &mut Embed| w.fault = w.ids =>
            "fault is 0x100000..0x100004; it must be apart from ids, 0x100000..0x100028",
        |w: &mut Embed| w.fault = w.out =>
            "fault is 0x20000000000..0x20000000004; it must be apart from out, 0x20000000000..0x20000028000",
        |w: &mut Embed| w.out = w.table + (1 << 29) =>
            "out is 0x10020000000..0x10020028000; it must be apart from table, 0x10000000000..0x1003ea00000",
    );
}

// ---------------------------------------------------------------------------------------------

fn rms_norm() -> RmsNorm {
    RmsNorm {
        x: matrix(1 << 40, 4096),
        added: Some(matrix(1 << 41, 4096)),
        out: matrix(1 << 42, 4096),
        weight: 1 << 43,
        rows: 1000,
        width: 4096,
        x_dtype: DType::F32,
        dtype: DType::BF16,
        epsilon: 1e-5,
    }
}

#[test]
fn rms_norm_launches() {
    // SAFETY: the recorder touches no memory, here and below.
    let launch = launched(|device| unsafe { norm::rms_norm(device, &rms_norm()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::RmsNorm, [1000, 1, 1], [256, 1, 1]));
    let found: RmsNormParams = params(&launch);
    let RmsNorm { x, added, out, weight, .. } = rms_norm();
    let added = added.expect("a sum");
    let expected = RmsNormParams { x, added, out, weight, width: 4096, x_dtype: 2, dtype: 1, epsilon: 1e-5 };
    assert_eq!(found, expected);
    // SAFETY: as above.
    let launch = launched(|device| unsafe { norm::rms_norm(device, &RmsNorm { added: None, ..rms_norm() }) });
    assert_eq!(params::<RmsNormParams>(&launch).added.base, 0);
}

#[test]
fn rms_norm_refuses() {
    refuses!(
        norm::rms_norm, rms_norm(),
        |w: &mut RmsNorm| w.width = 20 => &format!("width is 20; it must be {WIDTHS}"),
        |w: &mut RmsNorm| w.width = 16392 => "width is 16392; it must be at most 16384",
        |w: &mut RmsNorm| w.epsilon = -1.0 => "epsilon is -1; it must be a number from 0 up",
        |w: &mut RmsNorm| w.epsilon = f32::NAN => "epsilon is NaN; it must be a number from 0 up",
        |w: &mut RmsNorm| w.epsilon = f32::INFINITY => "epsilon is inf; it must be a number from 0 up",
        |w: &mut RmsNorm| w.weight = 8 => "weight is 0x8; it must be a device address, a multiple of 16",
        |w: &mut RmsNorm| w.out.token_stride = 8 =>
            "out.token_stride is 8; it must be 4096 or more: rows must not overlap",
        |w: &mut RmsNorm| w.out = w.x =>
            "out is 0x10000000000..0x100007d0000; it must be apart from x, 0x10000000000..0x10000fa0000",
        |w: &mut RmsNorm| w.out.base = w.weight =>
            "out is 0x80000000000..0x800007d0000; it must be apart from weight, 0x80000000000..0x80000002000",
        |w: &mut RmsNorm| w.weight = w.x.base =>
            "x is 0x10000000000..0x10000fa0000; it must be apart from weight, 0x10000000000..0x10000002000",
        |w: &mut RmsNorm| w.added = Some(w.x) =>
            "x is 0x10000000000..0x10000fa0000; it must be apart from added, 0x10000000000..0x100007d0000",
        |w: &mut RmsNorm| w.added = Some(w.out) =>
            "out is 0x40000000000..0x400007d0000; it must be apart from added, 0x40000000000..0x400007d0000",
        |w: &mut RmsNorm| w.added = Some(Rows::default()) =>
            "added.token_stride is 0; it must be 4096 or more: rows must not overlap",
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Every piece of a row has a thread.
    #[test]
    fn norms_hold_whole_rows(pieces in 1_u32..=2048) {
        let width = 8 * pieces;
        let work = RmsNorm { width, x: matrix(1 << 40, width), added: None, out: matrix(1 << 42, width), ..rms_norm() };
        // SAFETY: the recorder touches no memory.
        let launch = launched(|device| unsafe { norm::rms_norm(device, &work) });
        prop_assert!(launch.block[0] * 4 >= pieces && launch.block[0].is_multiple_of(32) && launch.block[0] <= 512);
    }
}

// ---------------------------------------------------------------------------------------------

fn rotation() -> Rope {
    Rope {
        q: Rows::packed(1 << 40, 32, 128),
        q_out: Rows::packed(1 << 40, 32, 128),
        query_heads: 32,
        append: Some(append()),
        positions: 1 << 20,
        inverse_frequencies: 1 << 21,
        cu_seqlens: 1 << 22,
        sequences: 3,
        tokens: 1001,
        total_tokens: 2000,
        head_dim: 128,
        dtype: DType::BF16,
    }
}

fn append() -> Append {
    Append {
        k: Rows::packed(1 << 41, 8, 128),
        v: Rows::packed(1 << 42, 8, 128),
        k_out: 1 << 43,
        v_out: 1 << 44,
        starts: 1 << 23,
        lengths: 1 << 24,
        lengths_out: 1 << 25,
        positions_out: 1 << 26,
        out_rows: 100_000,
        kv_heads: 8,
    }
}

#[test]
fn rope_launches() {
    // SAFETY: the recorder touches no memory, here and below.
    let launch = launched(|device| unsafe { rope::rope(device, &rotation()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::Rope, [251, 3, 1], [256, 1, 1]));
    let expected = RopeParams {
        q: rotation().q,
        q_out: rotation().q_out,
        k: append().k,
        v: append().v,
        k_out: 1 << 43,
        v_out: 1 << 44,
        starts: 1 << 23,
        lengths: 1 << 24,
        lengths_out: 1 << 25,
        positions_out: 1 << 26,
        positions: 1 << 20,
        inverse_frequencies: 1 << 21,
        cu_seqlens: 1 << 22,
        out_rows: 100_000,
        sequences: 3,
        tokens: 1001,
        total_tokens: 2000,
        query_heads: 32,
        kv_heads: 8,
        head_dim: 128,
        dtype: 1,
        reserved: 0,
    };
    assert_eq!(params::<RopeParams>(&launch), expected);
    // No tokens, or no room: the lengths are carried over all the same.
    let none = Rows::default();
    let work = Rope { tokens: 0, total_tokens: 0, q: none, q_out: none, ..rotation() };
    // SAFETY: as above.
    assert_eq!(launched(|device| unsafe { rope::rope(device, &work) }).grid, [1, 3, 1]);
    let append = Append { out_rows: 0, k_out: 0, v_out: 0, ..append() };
    let work = Rope { append: Some(append), ..rotation() };
    // SAFETY: as above.
    assert_eq!(launched(|device| unsafe { rope::rope(device, &work) }).grid, [251, 3, 1]);
}

/// Queries, keys and values of a token side by side.
fn among_keys() -> Rope {
    let view = |first: u64| Rows { base: (1 << 40) + 256 * first, ..Rows::packed(0, 48, 128) };
    let append = Append { k: view(32), v: view(40), ..append() };
    Rope { q: view(0), q_out: view(0), append: Some(append), ..rotation() }
}

/// In place, queries may lie between keys and values.
#[test]
fn rope_launches_among_keys() {
    // SAFETY: the recorder touches no memory.
    let launch = launched(|device| unsafe { rope::rope(device, &among_keys()) });
    assert_eq!(launch.grid, [251, 3, 1]);
}

#[test]
fn rope_refuses() {
    const HEAD_DIMS: &str = "a multiple of 16 from 16 to 256";
    fn appended(work: &mut Rope) -> &mut Append {
        work.append.as_mut().expect("an append")
    }
    refuses!(
        rope::rope, rotation(),
        |w: &mut Rope| w.head_dim = 0 => &format!("head_dim is 0; it must be {HEAD_DIMS}"),
        |w: &mut Rope| w.head_dim = 72 => &format!("head_dim is 72; it must be {HEAD_DIMS}"),
        |w: &mut Rope| w.head_dim = 272 => &format!("head_dim is 272; it must be {HEAD_DIMS}"),
        |w: &mut Rope| w.sequences = 65_536 => "sequences is 65536; it must be at most 65535",
        |w: &mut Rope| w.tokens = 1 << 31 => "tokens is 2147483648; it must be at most 2147483647",
        |w: &mut Rope| w.total_tokens = 1 << 31 => "total_tokens is 2147483648; it must be at most 2147483647",
        |w: &mut Rope| w.query_heads = 65_537 => "query_heads is 65537; it must be at most 65536",
        |w: &mut Rope| appended(w).kv_heads = 65_537 => "kv_heads is 65537; it must be at most 65536",
        |w: &mut Rope| w.positions = 0 => "positions is 0x0; it must be a device address, a multiple of 4",
        |w: &mut Rope| w.inverse_frequencies = 2 =>
            "inverse_frequencies is 0x2; it must be a device address, a multiple of 4",
        |w: &mut Rope| w.cu_seqlens = 2 => "cu_seqlens is 0x2; it must be a device address, a multiple of 4",
        |w: &mut Rope| w.q_out.base += 16 =>
            "q_out is 0x10000000010..0x10000fa0010; it must be apart from q, 0x10000000000..0x10000fa0000",
        |w: &mut Rope| w.q_out.head_stride = 64 =>
            "q_out.head_stride is 64; it must be 128 or more: rows must not overlap",
        |w: &mut Rope| w.q_out.token_stride = 31 * 128 =>
            "q_out.token_stride is 3968; it must be 4096 or more: rows must not overlap",
        |w: &mut Rope| {
            (w.cu_seqlens, w.tokens) = (0, 700);
            w.q_out = Rows { sequence_stride: 699 * 4096, ..Rows::token_major(1 << 50, 700, 32, 128) };
        } => "q_out.sequence_stride is 2863104; it must be 2867200 or more: rows must not overlap",
        |w: &mut Rope| w.q.sequence_stride = 8 =>
            "q.sequence_stride is 8; it must be 0 where cu_seqlens packs the sequences along the token axis",
        |w: &mut Rope| appended(w).starts = 0 => "starts is 0x0; it must be a device address, a multiple of 8",
        |w: &mut Rope| appended(w).lengths = 1 => "lengths is 0x1; it must be a device address, a multiple of 4",
        |w: &mut Rope| appended(w).lengths_out = 1 << 24 =>
            "lengths_out is 0x1000000..0x1000060; it must be apart from lengths, 0x1000000..0x1000060",
        |w: &mut Rope| appended(w).out_rows = u64::MAX =>
            "out_rows is 18446744073709551615; it must be at most 9223372036854775807",
        |w: &mut Rope| appended(w).positions_out = 2 =>
            "positions_out is 0x2; it must be a device address, a multiple of 4",
        |w: &mut Rope| appended(w).k_out = 0 => "k_out is 0x0; it must be a device address, a multiple of 16",
        |w: &mut Rope| appended(w).v_out = 1 << 43 =>
            "v_out is 0x80000000000..0x8000186a000; it must be apart from k_out, 0x80000000000..0x8000186a000",
        |w: &mut Rope| appended(w).k_out = 1 << 42 =>
            "k_out is 0x40000000000..0x4000186a000; it must be apart from v, 0x40000000000..0x400003e8000",
        |w: &mut Rope| appended(w).v_out = 1 << 40 =>
            "v_out is 0x10000000000..0x1000186a000; it must be apart from q_out, 0x10000000000..0x10000fa0000",
        |w: &mut Rope| appended(w).positions_out = w.positions =>
            "positions_out is 0x100000..0x161a80; it must be apart from positions, 0x100000..0x101f40",
        |w: &mut Rope| appended(w).positions_out = 1 << 23 =>
            "positions_out is 0x800000..0x861a80; it must be apart from starts, 0x800000..0x8000c0",
        |w: &mut Rope| appended(w).positions_out = 1 << 25 =>
            "positions_out is 0x2000000..0x2061a80; it must be apart from lengths_out, 0x2000000..0x2000060",
        |w: &mut Rope| appended(w).positions_out = 1 << 41 =>
            "positions_out is 0x20000000000..0x20000061a80; it must be apart from k, 0x20000000000..0x200003e8000",
        |w: &mut Rope| appended(w).positions_out = 1 << 43 =>
            "k_out is 0x80000000000..0x8000186a000; it must be apart from positions_out, \
             0x80000000000..0x80000061a80",
        |w: &mut Rope| *w = Rope { q: Rows::packed(1 << 50, 32, 128), ..among_keys() } =>
            "q_out is 0x10000000000..0x1000176f000; it must be apart from k, 0x10000002000..0x1000176f800",
    );
}

// ---------------------------------------------------------------------------------------------

fn choice() -> Sample {
    Sample {
        logits: matrix(1 << 40, 128_256),
        draws: 1 << 20,
        tokens: 1 << 21,
        rows: 3,
        vocabulary: 128_256,
        dtype: DType::F32,
    }
}

#[test]
fn sample_launches() {
    // SAFETY: the recorder touches no memory.
    let launch = launched(|device| unsafe { sample::sample(device, &choice()) });
    assert_eq!((launch.kernel, launch.grid, launch.block), (Kernel::Sample, [3, 1, 1], [1024, 1, 1]));
    let expected = SampleParams {
        logits: choice().logits,
        draws: 1 << 20,
        tokens: 1 << 21,
        vocabulary: 128_256,
        dtype: 2,
    };
    assert_eq!(params::<SampleParams>(&launch), expected);
}

#[test]
fn sample_refuses() {
    refuses!(
        sample::sample, choice(),
        |w: &mut Sample| w.vocabulary = 0 => "vocabulary is 0; it must be from 1 to 4194304",
        |w: &mut Sample| w.vocabulary = (1 << 22) + 1 => "vocabulary is 4194305; it must be from 1 to 4194304",
        |w: &mut Sample| w.tokens = 0 => "tokens is 0x0; it must be a device address, a multiple of 4",
        |w: &mut Sample| w.tokens = w.logits.base =>
            "tokens is 0x10000000000..0x1000000000c; it must be apart from logits, 0x10000000000..0x10000177c00",
        |w: &mut Sample| w.tokens = w.draws + 44 =>
            "tokens is 0x10002c..0x100038; it must be apart from draws, 0x100000..0x100030",
        |w: &mut Sample| w.draws = 3 => "draws is 0x3; it must be a device address, a multiple of 16",
        |w: &mut Sample| w.logits.base = 4 => "logits is 0x4; it must be a device address, a multiple of 16",
        |w: &mut Sample| w.logits.token_stride = 8 =>
            "logits.token_stride is 8; it must be 128256 or more: rows must not overlap",
    );
}

// ---------------------------------------------------------------------------------------------

fn product() -> Matmul {
    Matmul {
        x: matrix(1 << 40, 4096),
        weight: matrix(1 << 41, 4096),
        bias: 0,
        out: matrix(1 << 42, 14336),
        accumulate: false,
        rows: 100,
        columns: 14336,
        inner: 4096,
        dtype: DType::BF16,
        out_dtype: DType::F32,
        workspace: 1 << 43,
        workspace_bytes: 1 << 25,
    }
}

#[test]
fn products_are_checked() {
    assert_eq!(product().check(), Ok(true));
    assert_eq!(Matmul { rows: 0, ..product() }.check(), Ok(false));
    let refuses = |change: fn(&mut Matmul), message: &str| {
        let mut work = product();
        change(&mut work);
        assert_eq!(work.check().expect_err(message).to_string(), message);
    };
    refuses(|w| w.inner = 12, &format!("inner is 12; it must be {WIDTHS}"));
    refuses(|w| w.columns = 0, "columns is 0; it must be from 1 to 268435456");
    refuses(|w| w.dtype = DType::F32, "dtype is F32; it must be F16 or BF16");
    refuses(|w| w.out_dtype = DType::F16, "out_dtype is F16; it must be BF16 or F32");
    let rounds_twice = "out_dtype is BF16; it must be F32, to accumulate without rounding twice";
    refuses(|w| (w.accumulate, w.out_dtype) = (true, DType::BF16), rounds_twice);
    refuses(|w| w.rows = u32::MAX, "rows is 4294967295; it must be at most 2147483647");
    refuses(|w| w.x.base = 1, "x is 0x1; it must be a device address, a multiple of 16");
    refuses(|w| w.bias = 1, "bias is 0x1; it must be a device address, a multiple of 4");
    refuses(|w| w.workspace = 128, "workspace is 0x80; it must be a multiple of 256");
    refuses(|w| w.out = w.x, "out.token_stride is 4096; it must be 14336 or more: rows must not overlap");
    refuses(
        |w| w.workspace = w.out.base,
        "out is 0x40000000000..0x40000578000; it must be apart from workspace, 0x40000000000..0x40002000000",
    );
}

// ---------------------------------------------------------------------------------------------

#[test]
fn nothing_to_do_launches_nothing() {
    let recorder = Recorder::default();
    // SAFETY: the recorder touches no memory.
    unsafe {
        activation::add(&recorder, &Add { rows: 0, ..add() }).unwrap();
        activation::silu_mul(&recorder, &SiluMul { rows: 0, ..silu_mul() }).unwrap();
        activation::convert(&recorder, &Convert { rows: 0, ..convert() }).unwrap();
        embed::embed(&recorder, &Embed { rows: 0, out: 0, ..embedding() }).unwrap();
        norm::rms_norm(&recorder, &RmsNorm { rows: 0, weight: 0, ..rms_norm() }).unwrap();
        sample::sample(&recorder, &Sample { rows: 0, tokens: 0, ..choice() }).unwrap();
        rope::rope(&recorder, &Rope { sequences: 0, positions: 0, ..rotation() }).unwrap();
        rope::rope(&recorder, &Rope { query_heads: 0, append: None, ..rotation() }).unwrap();
        rope::rope(&recorder, &Rope { total_tokens: 0, append: None, positions: 0, ..rotation() }).unwrap();
    }
    assert!(recorder.launches().is_empty());
}

/// A failure of the device reaches the caller as it is.
#[test]
fn device_errors_pass() {
    let recorder = Recorder::failing();
    // SAFETY: the recorder touches no memory.
    let errors = unsafe {
        [
            activation::add(&recorder, &add()),
            activation::silu_mul(&recorder, &silu_mul()),
            activation::convert(&recorder, &convert()),
            embed::embed(&recorder, &embedding()),
            norm::rms_norm(&recorder, &rms_norm()),
            rope::rope(&recorder, &rotation()),
            sample::sample(&recorder, &choice()),
        ]
    };
    for error in errors {
        let message = error.expect_err("a device that fails").to_string();
        assert!(message.contains("failed: CUDA error 719 (LAUNCH_FAILED)"), "{message}");
    }
}
