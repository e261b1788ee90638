//! What can be said of the kernels' machine code without a GPU: registers, spills, shared memory, blocks
//! that fit an SM as the drivers launch them, and instructions, of the whole and of the main loops. `docs/kernels.md` holds the table;
//! `FASTKV_UPDATE=1` writes it anew.
//!
//! The figures are those of the pinned nvcc. With another compiler, or without cuobjdump, the tests are
//! ignored.

mod bars;
mod launches;
#[allow(dead_code)]
#[path = "../support/recorder.rs"]
mod recorder;
mod sass;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};

use fastkv::kernels::images;
use libtest_mimic::{Arguments, Failed, Trial};
use sass::Compiled;

/// The compiler that the bars were set with.
const PINNED_NVCC: (u32, u32) = (13, 0);

fn main() -> ExitCode {
    let tool = cuobjdump();
    let pinned = images::nvcc_version() == Some(PINNED_NVCC);
    let ready = tool.is_some() && pinned;
    if !ready {
        // CI has both; what is missing there is a failure.
        if env::var("FASTKV_CUDA").is_ok_and(|mode| mode == "require") && pinned {
            eprintln!("FASTKV_CUDA=require, but there is no cuobjdump: run tools/setup-toolchain");
            return ExitCode::FAILURE;
        }
        eprintln!("static bars are ignored: they need nvcc 13.0 at build time, and cuobjdump");
    }
    let compiled = if ready { all(&tool.expect("ready")) } else { Vec::new() };
    let compiled: &'static [Compiled] = compiled.leak();
    let mut trials = Vec::new();
    for bar in bars::BARS {
        let run = move || bar.check(compiled).map_err(Failed::from);
        trials.push(Trial::test(bar.kernels, run).with_ignored_flag(!ready));
    }
    for (name, run) in [
        ("no_kernel_spills", no_kernel_spills as fn(&[Compiled]) -> Result<(), String>),
        ("every_kernel_has_a_bar", every_kernel_has_a_bar),
        ("table_is_current", table_is_current),
    ] {
        let run = move || run(compiled).map_err(Failed::from);
        trials.push(Trial::test(name, run).with_ignored_flag(!ready));
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn cuobjdump() -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).join(".toolchain/cuda/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = std::iter::once(own).chain(env::split_paths(&path));
    folders.map(|folder| folder.join("cuobjdump")).find(|file| file.is_file())
}

fn all(tool: &Path) -> Vec<Compiled> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut compiled = Vec::new();
    for image in images::images() {
        let file = folder.path().join(format!("{}.fatbin", image.name));
        fs::write(&file, image.fatbin).expect("a temporary file");
        compiled.extend(sass::read(tool, &file));
    }
    compiled
}

/// No spills and no stack.
fn no_kernel_spills(compiled: &[Compiled]) -> Result<(), String> {
    for kernel in compiled {
        let local = kernel.count("LDL") + kernel.count("STL");
        if kernel.local_bytes > 0 || local > 0 {
            let bytes = kernel.local_bytes;
            return Err(format!(
                "{} on {}: {bytes} bytes of local memory, {local} accesses",
                kernel.entry, kernel.arch
            ));
        }
    }
    Ok(())
}

fn every_kernel_has_a_bar(compiled: &[Compiled]) -> Result<(), String> {
    compiled.iter().try_for_each(|kernel| {
        let Compiled { entry, arch, .. } = kernel;
        match bars::BARS.iter().any(|bar| bar.covers(kernel)) {
            true => Ok(()),
            false => Err(format!("{entry} on {arch} has no bar in tests/static_bars/bars.rs")),
        }
    })
}

/// The table between two marks of docs/kernels.md is the one of this build.
fn table_is_current(compiled: &[Compiled]) -> Result<(), String> {
    const BEGIN: &str = "<!-- static figures: FASTKV_UPDATE=1 cargo test --test static_bars -->\n";
    const END: &str = "<!-- end of static figures -->";
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/kernels.md");
    let text = fs::read_to_string(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let (head, rest) = text.split_once(BEGIN).ok_or("docs/kernels.md has lost the mark before the table")?;
    let (table, tail) = rest.split_once(END).ok_or("docs/kernels.md has lost the mark behind the table")?;
    let current = bars::table(compiled)?;
    if table == current {
        Ok(())
    } else if env::var_os("FASTKV_UPDATE").is_some() {
        fs::write(&path, [head, BEGIN, &current, END, tail].concat()).map_err(|error| error.to_string())
    } else {
        Err("docs/kernels.md holds other figures; FASTKV_UPDATE=1 cargo test --test static_bars writes these"
            .into())
    }
}
