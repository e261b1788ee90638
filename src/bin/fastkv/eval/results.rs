//! The file of answers: a line of settings, and a line for each answer as it comes.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use fastkv::messages::json_problem;
use fastkv::utf8;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::exit::Usage;

/// The first line.
#[derive(Debug, Serialize)]
pub(super) struct Header<'a> {
    /// `eval`: what wrote the file.
    pub(super) fastkv: &'static str,
    pub(super) version: &'static str,
    pub(super) model: &'a Path,
    pub(super) device: &'a str,
    /// What has to agree for answers to go into one file.
    pub(super) settings: &'a Map<String, Value>,
}

/// An answer.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) policy: String,
    pub(super) options: Value,
    /// A rate, a number of tokens, or `null` where the policy has no such budget.
    pub(super) retention: Value,
    pub(super) task: String,
    /// The length asked for.
    pub(super) tokens: usize,
    /// The question's number, from 0, within its task and length.
    pub(super) sample: u32,
    pub(super) depth: Option<f64>,
    pub(super) prompt_tokens: usize,
    pub(super) prediction: String,
    pub(super) references: Vec<String>,
    pub(super) score: f64,
    pub(super) exact: bool,
    pub(super) kv_kept_bytes: Option<usize>,
    pub(super) kv_full_bytes: u64,
    pub(super) kv_peak_bytes: Option<usize>,
    pub(super) ttft_s: Option<f64>,
}

/// A file that answers are added to.
#[derive(Debug)]
pub(super) struct Results {
    file: File,
}

/// Finds out early whether a file may be written: an existing one only to go on with.
pub(super) fn check(path: &Path, resume: bool) -> Result<()> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => bail!("{} cannot be written: it is no plain file", path.display()),
        Ok(_) if !resume => bail!(Usage(format!(
            "--out {}: the file is there already; go on with it by --resume, or give another name",
            path.display()
        ))),
        Ok(_) => Ok(()),
        Err(_) => {
            let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
            let found = fs::metadata(folder.unwrap_or(Path::new(".")));
            found.with_context(|| format!("{} cannot be written", path.display())).map(|_| ())
        }
    }
}

/// What a file holds before anything is written to it.
#[derive(Debug)]
pub(super) struct Kept {
    path: PathBuf,
    /// The header as this run writes it.
    header: Vec<u8>,
    /// Bytes of the lines that stay; `None` where there is no file yet.
    end: Option<usize>,
    pub(super) records: Vec<Record>,
}

impl Kept {
    /// Reads a file to go on with. A last line without its line break was cut off in writing, and does not
    /// count.
    pub(super) fn read(path: &Path, resume: bool, header: &Header<'_>) -> Result<Self> {
        let mut kept =
            Self { path: path.to_path_buf(), header: line(header)?, end: None, records: Vec::new() };
        if resume && path.exists() {
            let bytes = fs::read(path).with_context(|| path.display().to_string())?;
            let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
            if end > 0 {
                kept.records = read(path, &bytes[..end], &kept.header)?;
            } else if !kept.header.starts_with(&bytes) {
                bail!("--resume {}: this is no file of answers", path.display());
            }
            kept.end = Some(end);
        }
        Ok(kept)
    }

    /// Opens the file behind what is kept.
    pub(super) fn go_on(self) -> Result<Results> {
        let opened = || {
            let mut file = match self.end {
                None => File::create_new(&self.path)?,
                Some(end) => {
                    let file = File::options().append(true).open(&self.path)?;
                    file.set_len(end as u64)?;
                    file
                }
            };
            if self.end.unwrap_or(0) == 0 {
                file.write_all(&self.header)?;
            }
            Ok::<_, std::io::Error>(Results { file })
        };
        opened().with_context(|| format!("{} cannot be written", self.path.display()))
    }
}

impl Results {
    /// Adds an answer.
    pub(super) fn add(&mut self, record: &Record) -> Result<()> {
        self.file.write_all(&line(record)?).context("--out: the answer cannot be written")
    }
}

fn line(value: &impl Serialize) -> Result<Vec<u8>> {
    crate::output::json(value)
}

fn read(path: &Path, bytes: &[u8], first: &[u8]) -> Result<Vec<Record>> {
    let text = utf8::text(bytes.to_vec()).with_context(|| format!("--resume {}", path.display()))?;
    let mut lines = text.lines();
    let there: Value = lines.next().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();
    if there["fastkv"] != "eval" {
        bail!(
            "--resume {}: this is no file of answers: its first line is not `fastkv eval`'s",
            path.display()
        );
    }
    let here: Value = serde_json::from_slice(first)?;
    let differences = differences(&there, &here);
    if !differences.is_empty() {
        bail!(Usage(format!(
            "--resume {}: the file is of other settings, and is left as it is:\n{}",
            path.display(),
            differences.join("\n")
        )));
    }
    lines
        .enumerate()
        .map(|(index, line)| {
            serde_json::from_str(line).map_err(|error| {
                let (path, line) = (path.display(), index + 2);
                anyhow!("--resume {path}, line {line}: no answer: {}", json_problem(&error))
            })
        })
        .collect()
}

/// What differs between two headers, a line each. Where the model lies may.
fn differences(there: &Value, here: &Value) -> Vec<String> {
    let flat = |header: &Value| {
        let mut fields = header["settings"].as_object().cloned().unwrap_or_default();
        for name in ["version", "device"] {
            fields.insert(name.to_owned(), header[name].clone());
        }
        fields
    };
    let (there, here) = (flat(there), flat(here));
    let names = here.keys().chain(there.keys().filter(|name| !here.contains_key(*name)));
    names
        .filter(|name| there.get(*name) != here.get(*name))
        .map(|name| {
            let [there, here] = [(&there, &here), (&here, &there)].map(|(fields, others)| {
                fields.get(name).map_or("nothing".to_owned(), |value| apart(value, others.get(name)))
            });
            format!("  {name}: {there} there, {here} here")
        })
        .collect()
}

/// A value for a message; of a list what the other one does not have.
fn apart(value: &Value, other: Option<&Value>) -> String {
    match (value, other) {
        (Value::Array(values), Some(Value::Array(others))) => {
            let own: Vec<String> =
                values.iter().filter(|value| !others.contains(value)).map(Value::to_string).collect();
            if own.is_empty() { format!("{} of these", values.len()) } else { own.join(", ") }
        }
        _ => value.to_string(),
    }
}
