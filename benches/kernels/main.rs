//! Every kernel on a GPU: time, and the share of its floor that it reaches. The floor is what its bytes or its
//! products cost at the rates that this run measures first: a copy within the device, and a matrix
//! product; kernels/README.md has their formulas. Without a GPU nothing is measured, and that is said; `--test`
//! then runs every work once on the PTX emulator, where kernels were built and the profile is that of tests.
//!
//! `cargo bench --bench kernels -- attention` measures one family. `FASTKV_BENCH_JSON=file` writes the figures for
//! programs, such as those of benches/peers/.

mod attention;
mod decode;
mod emulated;
mod gather;
mod llama;
mod memory;
#[path = "../support/random.rs"]
mod random;
mod scores;
mod select;
mod shape;
mod sums;

use std::{cell::RefCell, fmt, time::Duration};

use anyhow::{Context, Result};
use criterion::{Criterion, Throughput};
use fastkv::{
    abi::Rows,
    backend::cuda::CudaLauncher,
    kernels::{DType, Device, Error, Matmul, MatrixProduct, images},
};
use memory::Memory;
use shape::Shape;

fn main() -> Result<()> {
    let device = match CudaLauncher::new(0) {
        Ok(device) => device,
        Err(unavailable) => {
            println!("no kernel is measured: {unavailable}");
            let once = std::env::args().any(|argument| argument == "--test");
            // A bundle for GPU hosts does not carry the emulator and what it reads.
            let emulates = cfg!(debug_assertions) && once && images::built();
            return if emulates { emulated::check() } else { Ok(()) };
        }
    };
    // Launches take microseconds to milliseconds, and there are many.
    let (warm_up, measurement) = (Duration::from_millis(500), Duration::from_secs(1));
    let mut criterion =
        Criterion::default().warm_up_time(warm_up).measurement_time(measurement).configure_from_args();
    let ceilings = Ceilings::measure(&device)?;
    println!("copy within the device: {:.2} TB/s, read and written", ceilings.bytes_per_second / 1e12);
    println!("bf16 product of 8192 x 8192 x 8192: {:.0} TFLOP/s", ceilings.flops_per_second / 1e12);
    let shape = Shape::LLAMA_3_1_8B;
    let mut table = Vec::new();
    // One family's tensors at a time.
    for works in families() {
        for work in works(&device, &shape)? {
            table.extend(measure(&mut criterion, &device, &ceilings, &work));
        }
    }
    for (name, without, with) in attention::scoring(&device, &shape)? {
        println!("{name}: {:.2} % of the attention", 100.0 * added(&device, &without, &with)?);
    }
    criterion.final_summary();
    for line in &table {
        println!("{line}");
    }
    if let Some(path) = std::env::var_os("FASTKV_BENCH_JSON") {
        std::fs::write(&path, serde_json::to_string_pretty(&table)?).with_context(|| format!("{path:?}"))?;
    }
    Ok(())
}

/// Makes what is to be measured of a family of kernels, ready to run on a device.
type Works<D> = for<'a> fn(&'a D, &Shape) -> Result<Vec<Work<'a>>>;

fn families<D: Device>() -> [Works<D>; 7] {
    [attention::works, decode::works, gather::works, llama::works, scores::works, select::works, sums::works]
}

/// One launch, or the few that belong together, to be measured.
struct Work<'a> {
    /// Family and shape, as `gather_kv/32K, 2K kept`.
    name: String,
    /// What has to be moved between memory and chip, whatever the kernel does.
    bytes: f64,
    /// Multiplications and additions of its matrix products.
    flops: f64,
    run: Box<dyn Fn() -> Result<(), Error> + 'a>,
}

impl<'a> Work<'a> {
    /// Without products. `run` works on what `memory` holds.
    fn new<D: Device>(
        name: String,
        bytes: f64,
        memory: Memory<'a, D>,
        run: impl Fn() -> Result<(), Error> + 'a,
    ) -> Self {
        let run = move || {
            let _alive = &memory;
            run()
        };
        Self { name, bytes, flops: 0.0, run: Box::new(run) }
    }

    fn with_flops(self, flops: f64) -> Self {
        Self { flops, ..self }
    }
}

/// What was measured of a kernel, in microseconds.
#[derive(serde::Serialize)]
struct Measured {
    name: String,
    median_us: f64,
    least_us: f64,
    most_us: f64,
    floor_us: f64,
    /// Of what the floor counts, in the median.
    rate: f64,
    unit: &'static str,
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, median_us, least_us, most_us, floor_us, rate, unit } = self;
        let share = 100.0 * floor_us / median_us;
        write!(f, "{name}: median {median_us:.2} us ({least_us:.2} to {most_us:.2}), {rate:.2} {unit}, ")?;
        write!(f, "floor {floor_us:.2} us, {share:.0} % of it reached")
    }
}

/// What this device reaches at its best.
struct Ceilings {
    bytes_per_second: f64,
    flops_per_second: f64,
}

impl Ceilings {
    fn measure(device: &CudaLauncher) -> Result<Self> {
        const BYTES: usize = 1 << 30;
        const SIDE: u32 = 8192;
        let memory = Memory::new(device);
        let (from, to) = (memory.filled(BYTES, 1)?, memory.filled(BYTES, 0)?);
        // SAFETY: two blocks of that size.
        let copy = best(device, &|| unsafe { device.copy(to, from, BYTES) })?;

        let elements = (SIDE * SIDE) as usize;
        let square = |base: u64| Rows { base, token_stride: SIDE.into(), ..Rows::default() };
        let workspace_bytes = device.matmul_workspace()?;
        let product = Matmul {
            x: square(memory.normal(elements, 1)?),
            weight: square(memory.normal(elements, 2)?),
            bias: 0,
            out: square(memory.filled(elements * 2, 0)?),
            accumulate: false,
            rows: SIDE,
            columns: SIDE,
            inner: SIDE,
            dtype: DType::BF16,
            out_dtype: DType::BF16,
            workspace: memory.filled(workspace_bytes, 0)?,
            workspace_bytes,
        };
        // SAFETY: three squares and a workspace of the sizes stated.
        let product = best(device, &|| unsafe { device.matmul(&product) })?;
        Ok(Self {
            bytes_per_second: 2.0 * BYTES as f64 / copy,
            flops_per_second: 2.0 * f64::from(SIDE).powi(3) / product,
        })
    }

    /// What bounds a kernel.
    fn floor(&self, work: &Work<'_>) -> Floor {
        let of =
            |amount, per_second, unit, counted| Floor { seconds: amount / per_second, amount, unit, counted };
        let bytes = of(work.bytes, self.bytes_per_second, "TB/s", Throughput::Bytes as fn(_) -> _);
        let products = of(work.flops, self.flops_per_second, "TFLOP/s", Throughput::Elements);
        if bytes.seconds < products.seconds { products } else { bytes }
    }
}

/// The least time that a kernel takes.
struct Floor {
    seconds: f64,
    /// Bytes or FLOP.
    amount: f64,
    /// Of 10^12 of them a second.
    unit: &'static str,
    /// How criterion takes them.
    counted: fn(u64) -> Throughput,
}

/// Seconds of a launch, in the best of five rows of ten.
fn best(device: &CudaLauncher, run: &dyn Fn() -> Result<(), Error>) -> Result<f64, Error> {
    let times = (0..5).map(|_| time(device, 10, run)).collect::<Result<Vec<_>, _>>()?;
    Ok(times.into_iter().min().expect("five of them").as_secs_f64() / 10.0)
}

/// Device time of `launches` launches in a row.
fn time(
    device: &CudaLauncher,
    launches: u64,
    run: &dyn Fn() -> Result<(), Error>,
) -> Result<Duration, Error> {
    let start = device.record()?;
    (0..launches).try_for_each(|_| run())?;
    let milliseconds = device.elapsed_ms(&start, &device.record()?)?;
    Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1e3))
}

/// Measures one kernel; nothing where a filter left it out.
fn measure(
    criterion: &mut Criterion,
    device: &CudaLauncher,
    ceilings: &Ceilings,
    work: &Work<'_>,
) -> Option<Measured> {
    let times = RefCell::new(Vec::new());
    let floor = ceilings.floor(work);
    let (group, shape) = work.name.split_once('/').expect("a family and a shape");
    let mut group = criterion.benchmark_group(group);
    group.sample_size(20).throughput((floor.counted)(floor.amount as u64));
    group.bench_function(shape, |bencher| {
        bencher.iter_custom(|launches| {
            let taken = time(device, launches, &work.run).expect("a launch that is right");
            times.borrow_mut().push(taken.as_secs_f64() / launches as f64);
            taken
        });
    });
    group.finish();
    let mut times = times.into_inner();
    times.sort_by(f64::total_cmp);
    let median = *times.get(times.len() / 2)?;
    Some(Measured {
        name: work.name.clone(),
        median_us: median * 1e6,
        least_us: times[0] * 1e6,
        most_us: times[times.len() - 1] * 1e6,
        floor_us: floor.seconds * 1e6,
        rate: floor.amount / median / 1e12,
        unit: floor.unit,
    })
}

/// The share of a launch's time that another takes longer, in the middle of rounds in which they take turns:
/// a chip that gets warm slows down by more than what is looked for here.
fn added(device: &CudaLauncher, without: &Work<'_>, with: &Work<'_>) -> Result<f64> {
    let once = |work: &Work<'_>| Ok::<_, Error>(time(device, 1, &work.run)?.as_secs_f64());
    let mut shares = Vec::new();
    for _ in 0..15 {
        let (without, with) = (once(without)?, once(with)?);
        shares.push(with / without - 1.0);
    }
    shares.sort_by(f64::total_cmp);
    Ok(shares[shares.len() / 2])
}
