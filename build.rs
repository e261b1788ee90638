//! Compiles `kernels/*.cu` into one fatbin each and writes the table that embeds them.
//!
//! `FASTKV_CUDA=require|auto|off` says what to do where there is no nvcc: fail, go on without kernels
//! and say so (the default), or never look. Nothing here touches the network or a GPU.

use std::{
    env::{self, VarError, consts::EXE_SUFFIX},
    ffi::OsString,
    fmt::Write as _,
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result, bail, ensure};

/// The compiler whose every warning is an error under `FASTKV_CUDA=require`; people have others.
const PINNED_NVCC: (u32, u32) = (13, 0);
/// Compute capabilities with machine code of their own; newer chips compile the PTX of the lowest.
const ARCHITECTURES: &str = "80,89,90";
/// In a checkout; the published package has no tools.
const SETUP: &str = "tools/setup-toolchain";

fn main() {
    if let Err(error) = build() {
        for line in format!("{error:#}").lines() {
            println!("cargo::error={line}");
        }
    }
}

fn build() -> Result<()> {
    println!("cargo::rustc-check-cfg=cfg(fastkv_kernels)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=kernels");
    #[cfg(feature = "bindgen")]
    abi::generate()?;

    let mode = variable("FASTKV_CUDA")?.unwrap_or_else(|| "auto".into());
    ensure!(
        ["require", "auto", "off"].contains(&mode.as_str()),
        "FASTKV_CUDA is \"{mode}\"; it must be \"require\", \"auto\" or \"off\""
    );
    if env::var_os("CARGO_FEATURE_KERNELS").is_none() || env::var_os("DOCS_RS").is_some() || mode == "off" {
        return Ok(());
    }
    let Some(nvcc) = find_nvcc()? else {
        let setup = match manifest_folder()?.join(SETUP).is_file() {
            true => format!("run {SETUP}, or set NVCC"),
            false => "install the CUDA toolkit, or set NVCC".to_string(),
        };
        ensure!(
            mode == "auto",
            "FASTKV_CUDA=require, but there is no nvcc in NVCC, CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda or \
             .toolchain: {setup}"
        );
        println!(
            "cargo::warning=no nvcc found: building without CUDA kernels, for the CPU alone ({setup}, to have them; \
             cargo looks again when NVCC, CUDA_HOME, CUDA_PATH, PATH or FASTKV_CUDA changes; FASTKV_CUDA=off silences \
             this)"
        );
        return Ok(());
    };
    println!("cargo::rerun-if-changed={}", nvcc.display());
    compile(&nvcc, mode == "require")
}

/// A variable that is set and not empty; cargo runs this program again when it changes.
fn variable(name: &str) -> Result<Option<String>> {
    println!("cargo::rerun-if-env-changed={name}");
    match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(VarError::NotPresent) => Ok(None),
        Err(VarError::NotUnicode(value)) => bail!("{name} is {}; it must be UTF-8", value.display()),
    }
}

fn manifest_folder() -> Result<PathBuf> {
    Ok(PathBuf::from(env::var("CARGO_MANIFEST_DIR")?))
}

fn find_nvcc() -> Result<Option<PathBuf>> {
    if let Some(named) = variable("NVCC")? {
        let found = [PathBuf::from(&named)].into_iter().chain(on_path(&named)).find(|path| path.is_file());
        return Ok(Some(found.with_context(|| format!("NVCC is \"{named}\", which is no file"))?));
    }
    let nvcc = format!("nvcc{EXE_SUFFIX}");
    let of_toolkit = |toolkit: &Path| toolkit.join("bin").join(&nvcc);
    let mut places = Vec::new();
    for name in ["CUDA_HOME", "CUDA_PATH"] {
        places.extend(variable(name)?.map(|toolkit| of_toolkit(Path::new(&toolkit))));
    }
    places.extend(on_path(&nvcc));
    places.push(of_toolkit(Path::new("/usr/local/cuda")));
    places.push(of_toolkit(&manifest_folder()?.join(".toolchain/cuda")));
    Ok(places.into_iter().find(|path| path.is_file()))
}

fn on_path(program: &str) -> Vec<PathBuf> {
    println!("cargo::rerun-if-env-changed=PATH");
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).map(|folder| folder.join(program)).collect()
}

/// One run of nvcc: a fatbin, or PTX in a file of its own for whoever reads or interprets it.
struct Job {
    arguments: Vec<OsString>,
    output: PathBuf,
    source: PathBuf,
}

fn compile(nvcc: &Path, require: bool) -> Result<()> {
    let out = PathBuf::from(env::var("OUT_DIR")?);
    let version = nvcc_version(nvcc)?;
    let strict = require && version == PINNED_NVCC;
    let capabilities = compute_capabilities()?;
    // For tests, which interpret it: a program has no use for more than its fatbins hold.
    let with_ptx = variable("FASTKV_PTX")?.is_some_and(|value| value != "0");

    let mut common = ["-O3", "-std=c++17", "-Ikernels"].map(String::from).to_vec();
    if strict {
        common.extend(["-Werror", "all-warnings", "-Xptxas", "-v"].map(String::from));
    }
    if let Some(compiler) = variable("NVCC_CCBIN")? {
        common.extend(["-ccbin".into(), compiler]);
    }
    if let Some(flags) = variable("FASTKV_NVCC_FLAGS")? {
        common.extend(flags.split_whitespace().map(String::from));
    }

    let sources = kernel_files()?;
    let mut jobs = Vec::new();
    let (mut images, mut ptxs) = (String::new(), String::new());
    for source in &sources {
        let name =
            source.file_stem().and_then(|stem| stem.to_str()).context("a kernel file needs a plain name")?;
        // Hopper's own instructions run on compute capability 9.0 and nowhere else.
        let hopper = name.starts_with("sm90_");
        if hopper && !capabilities.contains(&90) {
            continue;
        }
        let targets = match hopper {
            true => vec!["90a".to_string()],
            false => capabilities.iter().map(u32::to_string).collect(),
        };
        let ptx = |target: &String| format!("-gencode=arch=compute_{target},code=compute_{target}");
        let mut fatbin = vec!["--fatbin".to_string()];
        fatbin
            .extend(targets.iter().map(|target| format!("-gencode=arch=compute_{target},code=sm_{target}")));
        if !hopper {
            fatbin.push(ptx(&targets[0]));
        }
        let mut runs = vec![(fatbin, "fatbin".to_string())];
        for target in targets.iter().filter(|_| with_ptx) {
            runs.push((vec!["--ptx".into(), ptx(target)], format!("sm_{target}.ptx")));
            writeln!(ptxs, "(\"{name}\", \"sm_{target}\", include_str!(\"{name}.sm_{target}.ptx\")),")?;
        }
        for (arguments, extension) in runs {
            let output = out.join(format!("{name}.{extension}"));
            let mut arguments =
                [arguments, common.clone()].concat().into_iter().map(OsString::from).collect::<Vec<_>>();
            arguments.extend(["-o".into(), output.clone().into(), source.clone().into()]);
            jobs.push(Job { arguments, output, source: source.clone() });
        }
        let names = targets.iter().map(|target| format!("\"sm_{target}\",")).collect::<String>();
        writeln!(
            images,
            "Image {{ name: \"{name}\", archs: &[{names}], \
             fatbin: &Aligned(*include_bytes!(\"{name}.fatbin\")).0 }},"
        )?;
    }

    let queue = Mutex::new(jobs.into_iter());
    let workers = env::var("NUM_JOBS").ok().and_then(|count| count.parse().ok()).unwrap_or(1);
    thread::scope(|scope| {
        let work = || -> Result<()> {
            loop {
                let Some(job) = queue.lock().expect("no worker panics").next() else {
                    return Ok(());
                };
                run(nvcc, version, &job, strict)?;
            }
        };
        let workers = (0..workers).map(|_| scope.spawn(work)).collect::<Vec<_>>();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no worker panics"))
    })?;

    let (major, minor) = version;
    fs::write(
        out.join("kernels.rs"),
        format!(
            "const NVCC: Option<(u32, u32)> = Some(({major}, {minor}));\n\
             static IMAGES: &[Image] = &[\n{images}];\n\
             static PTX: &[(&str, &str, &str)] = &[\n{ptxs}];\n"
        ),
    )?;
    println!("cargo::rustc-cfg=fastkv_kernels");
    Ok(())
}

/// What to compile for, ascending. Other crates read `CUDA_COMPUTE_CAP` too, and some as a single number, so that a list
/// can have a name of its own. Of `90a` the suffix is left to those kernels that need it.
fn compute_capabilities() -> Result<Vec<u32>> {
    let mut named = ("FASTKV_COMPUTE_CAP", variable("FASTKV_COMPUTE_CAP")?);
    if named.1.is_none() {
        named = ("CUDA_COMPUTE_CAP", variable("CUDA_COMPUTE_CAP")?);
    }
    let (name, list) = (named.0, named.1.unwrap_or_else(|| ARCHITECTURES.into()));
    let number = |text: &str| {
        let text = text.trim();
        let number = text.strip_suffix('a').unwrap_or(text).parse().ok();
        number.filter(|number| (80..1000).contains(number)).with_context(|| {
            format!("{name} holds \"{text}\"; it must be a list such as 80,89,90 of 80 and above")
        })
    };
    let mut numbers = list.split([',', ';']).map(number).collect::<Result<Vec<u32>>>()?;
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// The sources of kernels, in a fixed order.
fn kernel_files() -> Result<Vec<PathBuf>> {
    let mut sources = Vec::new();
    for entry in fs::read_dir("kernels").context("cannot list kernels")? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "cu") {
            sources.push(path);
        }
    }
    sources.sort();
    Ok(sources)
}

fn nvcc_version(nvcc: &Path) -> Result<(u32, u32)> {
    let output = Command::new(nvcc).arg("--version").output();
    let output = output.with_context(|| format!("cannot start {}", nvcc.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let release = text.split("release ").nth(1).and_then(|rest| rest.split(',').next());
    let numbers = release.and_then(|release| release.split_once('.'));
    numbers
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)))
        .with_context(|| format!("{} --version names no release:\n{text}", nvcc.display()))
}

/// Of a source and of all that it includes, which nvcc looks for beside the file and in kernels/.
fn digest(source: &Path) -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    let mut files = vec![fs::canonicalize(source)?];
    let mut next = 0;
    while next < files.len() {
        let file = files[next].clone();
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        text.hash(&mut hasher);
        let beside = file.parent().context("a file lies in a folder")?;
        let names =
            text.lines().filter_map(|line| line.trim().strip_prefix("#include \"")?.strip_suffix('"'));
        for name in names {
            let found = [beside, Path::new("kernels")].map(|folder| folder.join(name).canonicalize());
            if let Some(header) = found.into_iter().flatten().next().filter(|path| !files.contains(path)) {
                files.push(header);
            }
        }
        next += 1;
    }
    Ok(hasher.finish())
}

/// Runs nvcc unless the output was made from the same source, headers, compiler and flags.
fn run(nvcc: &Path, version: (u32, u32), job: &Job, strict: bool) -> Result<()> {
    let mut hasher = DefaultHasher::new();
    (nvcc, version, &job.arguments, digest(&job.source)?).hash(&mut hasher);
    let made_from = hasher.finish().to_string();
    let stamp = job.output.with_added_extension("stamp");
    if job.output.is_file() && fs::read_to_string(&stamp).is_ok_and(|old| old == made_from) {
        return Ok(());
    }
    // Whatever nvcc leaves when it fails is not to be taken for an output.
    let _ = fs::remove_file(&stamp);
    let output = Command::new(nvcc).args(&job.arguments).output()?;
    let log = [output.stdout, output.stderr].concat();
    let log = String::from_utf8_lossy(&log);
    ensure!(
        output.status.success(),
        "{} failed on {} (FASTKV_CUDA=off builds without kernels):\n{log}",
        nvcc.display(),
        job.source.display()
    );
    if strict {
        let complaints = log.lines().filter(|line| complains(line)).collect::<Vec<_>>();
        ensure!(
            complaints.is_empty(),
            "{} does not compile cleanly:\n{}",
            job.source.display(),
            complaints.join("\n")
        );
    }
    fs::write(stamp, made_from)?;
    Ok(())
}

/// What ptxas says in passing and yet costs: warnings, dropped wgmma or setmaxnreg (C75xx), spills.
fn complains(line: &str) -> bool {
    let spills =
        line.split(',').any(|part| part.contains("spill") && !part.trim_start().starts_with("0 bytes"));
    line.contains("warning") || line.contains("C75") || spills
}

#[cfg(feature = "bindgen")]
mod abi {
    use super::*;
    use bindgen::callbacks::{DeriveInfo, ItemInfo, ParseCallbacks};

    /// Writes `$OUT_DIR/abi.rs`, which tests/bindings.rs compares with src/abi.rs.
    pub(super) fn generate() -> Result<()> {
        let own = manifest_folder()?.join(".toolchain/libclang");
        if variable("LIBCLANG_PATH")?.is_none() && own.is_dir() {
            // SAFETY: no other thread runs yet.
            unsafe { env::set_var("LIBCLANG_PATH", own) };
        }
        bindgen::Builder::default()
            .header("kernels/abi.h")
            .raw_line("//! Parameter structs and constants shared with the kernels, generated from `kernels/abi.h`.")
            .use_core()
            .derive_default(true)
            .derive_eq(true)
            .derive_hash(true)
            .allowlist_item("(FASTKV|fastkv)_.*")
            .disable_header_comment()
            .formatter(bindgen::Formatter::Prettyplease)
            .parse_callbacks(Box::new(Names))
            .generate()
            .context("kernels/abi.h")?
            .write_to_file(Path::new(&env::var("OUT_DIR")?).join("abi.rs"))
            .context("cannot write abi.rs")
    }

    #[derive(Debug)]
    struct Names;

    impl ParseCallbacks for Names {
        fn add_derives(&self, _: &DeriveInfo<'_>) -> Vec<String> {
            vec!["bytemuck::Pod".into(), "bytemuck::Zeroable".into()]
        }

        /// `fastkv_gather_kv_params` is `GatherKvParams` in Rust, and `FASTKV_X` is `X`.
        fn item_name(&self, item: ItemInfo<'_>) -> Option<String> {
            if let Some(constant) = item.name.strip_prefix("FASTKV_") {
                return Some(constant.into());
            }
            let words = item.name.strip_prefix("fastkv_")?.split('_');
            Some(words.map(|word| word[..1].to_uppercase() + &word[1..]).collect())
        }
    }
}
