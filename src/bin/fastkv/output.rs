//! Files that come out whole or not at all.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::exit::Usage;

/// A file to be written when the work is done.
#[derive(Debug)]
pub(crate) struct Output {
    path: PathBuf,
    /// Beside the file, so that a rename moves it into place; none for pipes and devices.
    temporary: Option<PathBuf>,
}

impl Output {
    /// Finds out now whether the file can be written.
    pub(crate) fn prepare(path: &Path) -> Result<Self> {
        let unwritable = || format!("{} cannot be written", path.display());
        let found = fs::metadata(path);
        match &found {
            Ok(found) if found.is_dir() => bail!("{} cannot be written: it is a directory", path.display()),
            Ok(found) if !is_replaceable(path, found) => {
                return Ok(Self { path: path.to_path_buf(), temporary: None });
            }
            _ => {}
        }
        // Not the link to a file gives way, but the file.
        let path = match &found {
            Ok(_) => fs::canonicalize(path).with_context(unwritable)?,
            Err(_) => path.to_path_buf(),
        };
        if found.is_ok() {
            File::options().append(true).open(&path).with_context(unwritable)?;
        }
        let name = path.file_name().with_context(unwritable)?.to_string_lossy();
        let temporary = path.with_file_name(format!(".{name}.{}", std::process::id()));
        File::create_new(&temporary).with_context(unwritable)?;
        fs::remove_file(&temporary).with_context(unwritable)?;
        Ok(Self { path, temporary: Some(temporary) })
    }

    /// Writes it.
    pub(crate) fn write(&self, contents: &[u8]) -> Result<()> {
        let unwritable = || format!("{} cannot be written", self.path.display());
        let Some(temporary) = &self.temporary else {
            let file = File::options().append(true).open(&self.path);
            return file.and_then(|mut file| file.write_all(contents)).with_context(unwritable);
        };
        let written = File::create(temporary)
            .and_then(|mut file| {
                file.write_all(contents)?;
                if let Ok(before) = fs::metadata(&self.path) {
                    file.set_permissions(before.permissions())?;
                }
                file.sync_all()
            })
            .and_then(|()| fs::rename(temporary, &self.path));
        if written.is_err() {
            let _ = fs::remove_file(temporary);
        }
        written.with_context(unwritable)
    }
}

/// Whether another file can take its place: not that of a pipe or a device, nor what a name such as /dev/stdout leads to.
fn is_replaceable(path: &Path, found: &fs::Metadata) -> bool {
    found.is_file() && !path.starts_with("/dev")
}

/// What becomes of files that are there already.
#[derive(Args, Clone, Copy, Debug)]
pub(crate) struct OverwriteOptions {
    /// Write over files that are there already
    #[arg(long, help_heading = "Output")]
    force: bool,
}

impl OverwriteOptions {
    /// [`Output::prepare`] for an option, that spares what was measured before.
    pub(crate) fn prepare(self, option: &str, path: &Path) -> Result<Output> {
        let holds_something = |found: fs::Metadata| is_replaceable(path, &found) && found.len() > 0;
        if !self.force && fs::metadata(path).is_ok_and(holds_something) {
            bail!(Usage(format!(
                "{option} {}: the file is there already; give another name, or write over it with --force",
                path.display()
            )));
        }
        Output::prepare(path)
    }

    /// [`prepare`](Self::prepare) for an option that may not be given.
    pub(crate) fn prepare_if(self, option: &str, path: Option<&PathBuf>) -> Result<Option<Output>> {
        path.map(|path| self.prepare(option, path)).transpose()
    }
}

/// Refuses to write the JSON object and the picture to one file.
pub(crate) fn check_apart(out: Option<&PathBuf>, picture: Option<&PathBuf>) -> Result<()> {
    match picture.filter(|picture| out == Some(picture)) {
        Some(path) => {
            bail!(Usage(format!("--out and --picture are both {}: give two files", path.display())))
        }
        None => Ok(()),
    }
}

/// A value as JSON with a line break behind it.
pub(crate) fn json(value: &impl serde::Serialize) -> Result<Vec<u8>> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    Ok(text)
}

/// Writes to stdout; a closed pipe is an error here, not a panic.
pub(crate) fn print(contents: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout().lock();
    stdout.write_all(contents).and_then(|()| stdout.flush()).context("stdout cannot be written")
}
