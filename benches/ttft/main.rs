//! Time to first token by policy and prompt length, every policy against the full context at the same length in the
//! same run: a Llama 3.1 8B on a GPU; where there is none, the shipped model on the CPU, and with `--test` a tiny one on
//! the PTX emulator before, where kernels were built and the profile is that of tests.
//!
//! Floor: the products of the layers that a policy leaves. A causal attention layer takes
//! `2 · n² · query heads · head_dim` FLOP, a matrix `2 · n · elements`.

#[cfg(feature = "cuda")]
mod gpu;
mod shipped;

use criterion::Criterion;

fn main() -> anyhow::Result<()> {
    #[cfg(feature = "cuda")]
    match fastkv::backend::cuda::CudaLauncher::new(0) {
        Ok(device) => return gpu::measure(device),
        Err(unavailable) => {
            println!("no GPU is measured: {unavailable}");
            let once = std::env::args().any(|argument| argument == "--test");
            // A bundle for GPU hosts does not carry the emulator and what it reads.
            if cfg!(debug_assertions) && once && fastkv::kernels::images::built() {
                gpu::emulated::check()?;
            }
        }
    }
    let mut criterion = Criterion::default().configure_from_args();
    shipped::measure(&mut criterion);
    criterion.final_summary();
    Ok(())
}
