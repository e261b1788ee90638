//! The kernels on a GPU, against plain loops. Where there is none every test shows as ignored, and the
//! reason stands above them.

mod support;

use std::{process::ExitCode, sync::Arc};

use fastkv::{
    backend::cuda::CudaLauncher,
    kernels::{DType, Device},
};
use libtest_mimic::{Arguments, Failed, Trial};
use support::gather::{self, Case, Layout};

type Test = fn(&CudaLauncher) -> Result<(), Failed>;

const TESTS: &[(&str, Test)] = &[
    ("gather_kv_edges", gather_kv_edges),
    ("gather_kv_random", gather_kv_random),
    ("gather_kv_llama", gather_kv_llama),
    ("gather_rows_edges", gather_rows_edges),
    ("gather_rows_random", gather_rows_random),
    ("gather_rows_llama", gather_rows_llama),
    ("copies_and_events", copies_and_events),
];

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One device: tests that share it would only disturb each other.
    arguments.test_threads = Some(1);
    let device = CudaLauncher::new(0).map(Arc::new);
    if let Err(unavailable) = &device {
        eprintln!("GPU tests are ignored: {unavailable}");
    }
    let trials = TESTS
        .iter()
        .map(|(name, test)| {
            let device = device.clone();
            let ignored = device.is_err();
            Trial::test(*name, move || test(&*device?)).with_ignored_flag(ignored)
        })
        .collect();
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn gather_kv_edges(device: &CudaLauncher) -> Result<(), Failed> {
    gather::edges().iter().try_for_each(|case| checked(case, gather::check_kv(device, case)))
}

fn gather_kv_random(device: &CudaLauncher) -> Result<(), Failed> {
    (0..200).map(|seed| Case::random(seed, 1 + seed as usize % 9)).try_for_each(|case| {
        let result = gather::check_kv(device, &case);
        checked(&case, result)
    })
}

/// A layer of Llama 3.1 8B at 32K, keeping 2K and 16K of each head.
fn gather_kv_llama(device: &CudaLauncher) -> Result<(), Failed> {
    for kept in [2048, 16384] {
        let case = Case::plain(Layout::TokenMajor, DType::BF16, [1, 8, 32768, kept, 128]);
        gather::check_kv(device, &case)?;
    }
    Ok(())
}

fn gather_rows_edges(device: &CudaLauncher) -> Result<(), Failed> {
    let cases = gather::edges().into_iter().filter(|case| case.heads == 1);
    cases.into_iter().try_for_each(|case| checked(&case, gather::check_rows(device, &case)))
}

fn gather_rows_random(device: &CudaLauncher) -> Result<(), Failed> {
    (0..200).map(|seed| Case::random(seed, 1)).try_for_each(|case| {
        let result = gather::check_rows(device, &case);
        checked(&case, result)
    })
}

/// The hidden states of Llama 3.1 8B at 16K, keeping a quarter.
fn gather_rows_llama(device: &CudaLauncher) -> Result<(), Failed> {
    let case = Case::plain(Layout::Packed, DType::BF16, [1, 1, 16384, 4096, 4096]);
    Ok(gather::check_rows(device, &case)?)
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

fn checked(case: &Case, result: Result<(), String>) -> Result<(), Failed> {
    result.map_err(|error| format!("{error}\n{case:?}").into())
}
