//! The kernels on a GPU, against plain loops. Where there is none every test shows as ignored, and the
//! reason stands above them.

mod support;

use std::{process::ExitCode, sync::Arc};

use fastkv::{
    abi::Pooling,
    backend::cuda::CudaLauncher,
    kernels::{DType, Device, Launcher, batch::Window, select::Form},
};
use libtest_mimic::{Arguments, Failed, Trial};
use support::{
    gather::{self, Case, Layout},
    memory::FAR_ROOM,
    scores, select,
};

type Test = fn(&CudaLauncher) -> Result<(), Failed>;

type Run = Box<dyn Fn(&CudaLauncher) -> Result<(), Failed> + Send>;

/// What is too large for the emulator, or not a kernel's.
const TESTS: &[(&str, Test)] = &[
    ("copies_and_events", copies_and_events),
    ("memory_had_ready", memory_had_ready),
    ("gather_kv_llama", gather_kv_llama),
    ("gather_rows_llama", gather_rows_llama),
    ("select_llama", select_llama),
    ("window_scores_llama", window_scores_llama),
    ("column_scores_llama", column_scores_llama),
    #[cfg(feature = "pipeline")]
    ("backend_llama", |device| Ok(support::backend::llama(device)?)),
    #[cfg(feature = "text")]
    ("backend_shipped_llama", |device| Ok(support::backend::needle(device)?)),
];

/// Draws of shapes and contents for each check, unless `FASTKV_GPU_SEEDS` says how many.
const SEEDS: u64 = 4;

fn main() -> ExitCode {
    let seeds = match std::env::var("FASTKV_GPU_SEEDS").map(|seeds| seeds.parse()) {
        Ok(Ok(seeds)) => seeds,
        Ok(Err(_)) => {
            eprintln!("FASTKV_GPU_SEEDS: a number of draws for each check, such as 1");
            return ExitCode::FAILURE;
        }
        Err(_) => SEEDS,
    };
    let mut arguments = Arguments::from_args();
    // One device: tests that share it would only disturb each other.
    arguments.test_threads = Some(1);
    let device = CudaLauncher::new(0).map(Arc::new);
    if let Err(unavailable) = &device {
        eprintln!("GPU tests are ignored: {unavailable}");
    }
    let free = device.as_ref().ok().and_then(|device| device.free_memory());
    if let Some(free) = free.filter(|free| *free < FAR_ROOM) {
        let [needed, free] = [FAR_ROOM, free].map(|bytes| bytes >> 30);
        eprintln!("tests of what lies far apart are ignored: they take {needed} GiB, and {free} are free");
    }
    let trial = |name: &str, room: u64, run: Run| {
        let device = device.clone();
        let ignored = device.is_err() || free.is_some_and(|free| free < room);
        Trial::test(name, move || run(&*device?)).with_ignored_flag(ignored)
    };
    let checks = support::checks().into_iter().map(|check| {
        let run = move |device: &_| (0..seeds).try_for_each(|seed| Ok((check.run)(device, seed)?));
        trial(check.name, check.room, Box::new(run))
    });
    let trials = checks.chain(TESTS.iter().map(|(name, test)| trial(name, 0, Box::new(test)))).collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A layer of Llama 3.1 8B at 32K, keeping 2K and 16K of each head.
fn gather_kv_llama(device: &CudaLauncher) -> Result<(), Failed> {
    for kept in [2048, 16384] {
        let case = Case::plain(Layout::TokenMajor, DType::BF16, [1, 8, 32768, kept, 128]);
        gather::check_kv(device, &case)?;
    }
    Ok(())
}

/// The hidden states of Llama 3.1 8B at 16K, keeping a quarter.
fn gather_rows_llama(device: &CudaLauncher) -> Result<(), Failed> {
    let case = Case::plain(Layout::Packed, DType::BF16, [1, 1, 16384, 4096, 4096]);
    Ok(gather::check_rows(device, &case)?)
}

/// A tenth of the keys of each kv head of Llama 3.1 8B at 128K, and of one set for all heads at 1M.
fn select_llama(device: &CudaLauncher) -> Result<(), Failed> {
    let heads = || select::Case::softmax(1, [1, 8, 1, 4, 131_072], Pooling::max(7), vec![13_107]);
    let plain = || select::Case::softmax(3, [1, 8, 1, 1, 131_072], Pooling::NONE, vec![13_107]);
    let sequence = select::Case::softmax(2, [1, 1, 8, 4, 1 << 20], Pooling::max(7), vec![104_857]);
    select::check(device, Form::Cluster, vec![heads(), plain()])?;
    Ok(select::check(device, Form::Grid, vec![heads(), plain(), sequence])?)
}

/// Two kv heads of Llama 3.1 8B at 20K, by the windows of FastKV and SnapKV.
fn window_scores_llama(device: &CudaLauncher) -> Result<(), Failed> {
    for window in [8, 32] {
        for lse in [true, false] {
            let case = scores::Case::plain(DType::BF16, 128, 4, window, 20_000);
            scores::check(device, &scores::Case { kv_heads: 2, lse, ..case })?;
        }
    }
    Ok(())
}

/// Probabilities of all queries, as H2O sums them.
fn column_scores_llama(device: &CudaLauncher) -> Result<(), Failed> {
    let case = scores::Case::plain(DType::BF16, 128, 4, 2000, 2000);
    Ok(scores::check(device, &scores::Case { window: Window::All, ..case })?)
}

/// Memory had ready, and memory given back, count as free and can be had; more than there is changes nothing.
fn memory_had_ready(device: &CudaLauncher) -> Result<(), Failed> {
    const BYTES: usize = 256 << 20;
    device.synchronize()?;
    let free = || device.free_memory().ok_or("a GPU says how much memory is free");
    let before = free()?;
    device.reserve(BYTES)?;
    device.synchronize()?;
    let ready = free()?;
    let block = device.alloc(BYTES)?;
    let taken = free()?;
    // SAFETY: allocated above, and used by nobody.
    unsafe { device.free(block) }?;
    device.synchronize()?;
    let after = free()?;
    // Other programs may take and give memory meanwhile, but hardly so much.
    let near = |bytes: u64, expected: u64| bytes.abs_diff(expected) < BYTES as u64 / 2;
    if !near(ready, before) || !near(taken, before - BYTES as u64) || !near(after, before) {
        return Err(format!("{before} bytes free, then {ready}, {taken} with a block, {after}").into());
    }
    device.reserve(usize::MAX / 2)?;
    match free()? {
        now if near(now, before) => Ok(()),
        now => Err(format!("{before} bytes free, and {now} after more than there is was asked for").into()),
    }
}

fn copies_and_events(device: &CudaLauncher) -> Result<(), Failed> {
    let (mut a, mut b) = ([0_u8; 4096], [0_u8; 4096]);
    let from = device.alloc(4096)?;
    let to = device.alloc(4096)?;
    let start = device.record()?;
    // SAFETY: both blocks have 4096 bytes.
    unsafe {
        device.fill(from, 7, 4096)?;
        device.copy(to, from, 4096)?;
        device.upload(from, &[9; 4096])?;
        device.download(&mut a, from)?;
        device.download(&mut b, to)?;
        device.free(from)?;
        device.free(to)?;
    }
    let milliseconds = device.elapsed_ms(&start, &device.record()?)?;
    if a != [9; 4096] || b != [7; 4096] || !(0.0..10_000.0).contains(&milliseconds) {
        return Err("copies or times are wrong".into());
    }
    Ok(())
}
