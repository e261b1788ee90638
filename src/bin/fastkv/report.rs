//! `fastkv report`.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;
use fastkv::messages::count;
use fastkv::report::Report;
use serde::Serialize;

use crate::exit::Usage;
use crate::output::{self, Output};

/// Draw the results in a directory: one HTML page with pictures and tables.
///
/// Results are what `fastkv bench --out`, `fastkv eval --out` and `fastkv inspect --out` wrote; other files
/// are passed over. The page loads nothing and runs nothing.
#[derive(Args, Debug)]
pub(crate) struct Arguments {
    /// Directory of the results
    directory: PathBuf,
    /// The page
    #[arg(long, value_name = "FILE.html", default_value = "report.html", help_heading = "Output")]
    out: PathBuf,
    /// Write each picture to a file of its own as well
    #[arg(long, value_name = "DIRECTORY", help_heading = "Output")]
    svg: Option<PathBuf>,
    /// Print one JSON object of what was read and written
    #[arg(long, help_heading = "Output")]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary<'a> {
    /// Files of results.
    read: usize,
    ignored: Vec<Ignored<'a>>,
    page: &'a Path,
    pictures: Vec<PathBuf>,
}

#[derive(Serialize)]
struct Ignored<'a> {
    file: &'a str,
    reason: &'a str,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    if arguments.out.extension().is_none_or(|extension| extension != "html" && extension != "htm") {
        bail!(Usage(format!("--out {}: the name must end in .html", arguments.out.display())));
    }
    let page = Output::prepare(&arguments.out)?;
    let report = Report::of_directory(&arguments.directory)?;
    let mut pictures = Vec::new();
    if let Some(directory) = &arguments.svg {
        let unwritable = || format!("--svg {}", directory.display());
        fs::create_dir_all(directory).with_context(unwritable)?;
        for (name, svg) in report.pictures() {
            let path = directory.join(name);
            Output::prepare(&path)?.write(svg.as_bytes())?;
            pictures.push(path);
        }
    }
    page.write(report.html().as_bytes())?;
    let (read, ignored) = report.files();
    let ignored = ignored.iter().map(|(file, reason)| Ignored { file, reason });
    let summary = Summary { read, ignored: ignored.collect(), page: &arguments.out, pictures };
    output::print(&if arguments.json { output::json(&summary)? } else { summary.readable().into_bytes() })
}

impl Summary<'_> {
    fn readable(&self) -> String {
        let mut text = format!("{}: {} of results\n", self.page.display(), count(self.read, "file"));
        for Ignored { file, reason } in &self.ignored {
            // A file's name is the file system's, not the terminal's.
            text += &format!("passed over: {} {reason}\n", file.escape_debug());
        }
        if let [first, rest @ ..] = &self.pictures[..] {
            let directory = first.parent().unwrap_or(Path::new("."));
            text += &format!("{}: {}\n", directory.display(), count(1 + rest.len(), "picture"));
        }
        text
    }
}
