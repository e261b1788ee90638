//! Files of results, as the program writes them, found in a directory and checked.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::measure::StageSeconds;
use crate::messages::{count, json_problem};
use crate::policy::Policy;

/// What `fastkv bench` measured. docs/json.md names the fields.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "fastkv", rename = "bench")]
#[allow(missing_docs)]
pub struct Bench {
    pub version: String,
    /// The directory; none for random weights.
    pub model: Option<String>,
    /// The shape that random weights have.
    pub shape: Option<String>,
    pub device: String,
    pub device_reason: String,
    pub settings: BenchSettings,
    pub weights_bytes: u64,
    /// Whether Ctrl-C left runs out.
    pub cancelled: bool,
    pub measured: Vec<Measured>,
    pub skipped: Vec<Skipped>,
}

/// How a bench was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct BenchSettings {
    pub lengths: Vec<usize>,
    pub policies: Vec<String>,
    /// Prompts that are read and answered together.
    pub batch: usize,
    pub repeat: usize,
    /// Runs of each policy and length before those that count.
    pub warm_up: usize,
    pub decode_tokens: usize,
    pub exact_shortcuts: bool,
    pub seed: u64,
}

/// A policy at a length. Bytes and FLOP are those of the whole batch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Measured {
    pub policy: String,
    pub options: Value,
    pub tokens: usize,
    /// Median of the runs.
    pub ttft_s: f64,
    pub ttft_runs_s: Vec<f64>,
    /// TTFT of full context over this one.
    pub ttft_speedup: Option<f64>,
    /// Of the last run; none where marks would take time themselves.
    pub stages_s: Option<StageSeconds>,
    /// Multiplications and additions of the prefill's products.
    pub flops: f64,
    /// Those of full context over these: the speed-up at one rate.
    pub flop_bound: f64,
    /// Median of the runs, all sequences together.
    pub decode_tokens_per_s: Option<f64>,
    pub decode_runs_tokens_per_s: Vec<f64>,
    pub kv_full_bytes: u64,
    pub kv_kept_bytes: u64,
    pub kv_peak_bytes: u64,
    /// The most device memory in use; none where the device does not say.
    pub memory_peak_bytes: Option<u64>,
}

/// A policy that was not measured at a length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Skipped {
    pub policy: String,
    pub tokens: usize,
    pub reason: String,
}

/// What `fastkv eval --out` wrote.
#[derive(Clone, Debug)]
pub(super) struct Evaluation {
    pub(super) header: Header,
    pub(super) answers: Vec<Answer>,
    /// Whether the last line was cut off in writing, and left out.
    pub(super) cut: bool,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Header {
    pub(super) version: String,
    pub(super) model: String,
    pub(super) device: String,
    pub(super) settings: Map<String, Value>,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct Answer {
    pub(super) policy: String,
    pub(super) options: Value,
    pub(super) retention: Value,
    pub(super) task: String,
    pub(super) tokens: usize,
    pub(super) depth: Option<f64>,
    pub(super) score: f64,
    pub(super) exact: bool,
    pub(super) kv_kept_bytes: Option<u64>,
    pub(super) kv_full_bytes: u64,
    pub(super) ttft_s: Option<f64>,
}

/// What `fastkv inspect --out` wrote, as far as there is something to draw.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Inspection {
    pub(super) model: String,
    pub(super) device: String,
    pub(super) policy: String,
    pub(super) prompt_tokens: usize,
    pub(super) kv_full_bytes: u64,
    pub(super) kv_kept_bytes: u64,
    pub(super) kv_peak_bytes: u64,
    pub(super) rows: Vec<usize>,
    pub(super) kept: Vec<Vec<Vec<u32>>>,
    pub(super) propagated: Vec<Option<Vec<u32>>>,
    pub(super) mass: Vec<Vec<f32>>,
    pub(super) plan: InspectedPlan,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct InspectedPlan {
    pub(super) policy: Policy,
}

#[derive(Clone, Debug)]
pub(super) enum Results {
    Bench(Bench),
    Evaluation(Evaluation),
    Inspection(Inspection),
}

/// The results of a directory.
#[derive(Debug)]
pub(super) struct Found {
    /// By file name, in order of name.
    pub(super) files: Vec<(String, Results)>,
    /// Files that are no results, and what they lack.
    pub(super) ignored: Vec<(String, String)>,
}

/// Why no report was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReportError {
    /// A directory or a file that cannot be read.
    #[error("{} cannot be read: {source}", path.display())]
    Unreadable {
        /// Which one.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of results that is broken.
    #[error("{}, line {line}: {problem}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong, and where in the line.
        problem: String,
    },
    /// A directory without results.
    #[error(
        "{} has no results: give a directory with files that `fastkv bench --out`, `fastkv eval --out` or \
         `fastkv inspect --out` wrote (other files there: {ignored})", path.display()
    )]
    Nothing {
        /// The directory.
        path: PathBuf,
        /// Files that are no results.
        ignored: usize,
    },
}

/// Bytes at the beginning of a file in which its first field is looked for.
const BEGINNING: u64 = 4096;

pub(super) fn read_directory(directory: &Path) -> Result<Found, ReportError> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        move |source| ReportError::Unreadable { path, source }
    };
    let entries = fs::read_dir(directory).and_then(|entries| entries.collect::<Result<Vec<_>, _>>());
    let mut paths: Vec<PathBuf> =
        entries.map_err(unreadable(directory))?.iter().map(fs::DirEntry::path).collect();
    paths.sort();
    let mut found = Found { files: Vec::new(), ignored: Vec::new() };
    for path in paths {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        // Links to files, too; pipes would not end.
        match fs::metadata(&path) {
            Ok(metadata) if metadata.is_file() => {}
            Ok(_) => continue,
            Err(_) if path.is_symlink() => {
                found.ignored.push((name, "is a link that leads nowhere".to_owned()));
                continue;
            }
            Err(error) => return Err(unreadable(&path)(error)),
        }
        let mut beginning = Vec::new();
        let opened = File::open(&path).and_then(|file| file.take(BEGINNING).read_to_end(&mut beginning));
        opened.map_err(unreadable(&path))?;
        if !is_named(&beginning) {
            found.ignored.push((name, "has no first field \"fastkv\"".to_owned()));
            continue;
        }
        let bytes = fs::read(&path).map_err(unreadable(&path))?;
        match read(&bytes).map_err(|Problem { line, text }| ReportError::Broken {
            path: path.clone(),
            line,
            problem: text,
        })? {
            Ok(results) => found.files.push((name, results)),
            Err(kind) => found.ignored.push((name, format!("is of the kind {kind}, which is not drawn"))),
        }
    }
    match found.files.is_empty() {
        true => Err(ReportError::Nothing { path: directory.to_owned(), ignored: found.ignored.len() }),
        false => Ok(found),
    }
}

/// Whether a file calls itself one of ours: an object whose first field is `fastkv`.
fn is_named(beginning: &[u8]) -> bool {
    let behind = |text: &[u8], start: &[u8]| text.trim_ascii_start().strip_prefix(start).map(<[u8]>::to_vec);
    behind(beginning, b"{").and_then(|fields| behind(&fields, b"\"fastkv\"")).is_some()
}

/// What is wrong with a file, and in which line.
#[derive(Debug)]
struct Problem {
    line: usize,
    text: String,
}

impl Problem {
    fn new(line: usize, text: impl Into<String>) -> Self {
        Self { line, text: text.into() }
    }

    /// What serde_json says, of text that begins in a line.
    fn of_json(error: &serde_json::Error, first_line: usize) -> Self {
        Self::new(first_line + error.line().max(1) - 1, json_problem(error))
    }
}

/// The results in a file, or their kind where it is another.
fn read(bytes: &[u8]) -> Result<Result<Results, String>, Problem> {
    // One object over any number of lines, or the first line of several.
    let mut values = serde_json::Deserializer::from_slice(bytes).into_iter::<Value>();
    let first = values.next().unwrap_or(Ok(Value::Null)).map_err(|error| Problem::of_json(&error, 1))?;
    let rest = &bytes[values.byte_offset()..];
    let kind = first["fastkv"].as_str().unwrap_or_default().to_owned();
    if kind == "eval" {
        return evaluation(bytes).map(Results::Evaluation).map(Ok);
    }
    if !["bench", "inspect"].contains(&kind.as_str()) {
        return Ok(Err(first["fastkv"].to_string()));
    }
    if !rest.trim_ascii().is_empty() {
        let line = 1 + bytes[..values.byte_offset()].iter().filter(|byte| **byte == b'\n').count();
        return Err(Problem::new(line, "there is more behind the JSON object"));
    }
    let of_json = |error: serde_json::Error| Problem::of_json(&error, 1);
    Ok(Ok(match kind.as_str() {
        "bench" => {
            let bench: Bench = serde_json::from_slice(bytes).map_err(of_json)?;
            bench.check().map_err(|text| Problem::new(1, text))?;
            Results::Bench(bench)
        }
        _ => {
            let inspection: Inspection = serde_json::from_slice(bytes).map_err(of_json)?;
            inspection.check().map_err(|text| Problem::new(1, text))?;
            Results::Inspection(inspection)
        }
    }))
}

fn evaluation(bytes: &[u8]) -> Result<Evaluation, Problem> {
    let (mut lines, mut cut) = (bytes.split(|byte| *byte == b'\n').enumerate(), false);
    let header = lines.next().map_or(&b""[..], |(_, line)| line);
    let header: Header = serde_json::from_slice(header).map_err(|error| Problem::of_json(&error, 1))?;
    let mut answers = Vec::new();
    let last = bytes.iter().filter(|byte| **byte == b'\n').count();
    for (index, line) in lines.filter(|(_, line)| !line.trim_ascii().is_empty()) {
        match serde_json::from_slice::<Answer>(line) {
            Ok(answer) => {
                answer.check().map_err(|text| Problem::new(index + 1, text))?;
                answers.push(answer);
            }
            // A last line without its line break.
            Err(error) if index == last && error.is_eof() => cut = true,
            Err(error) => return Err(Problem::of_json(&error, index + 1)),
        }
    }
    Ok(Evaluation { header, answers, cut })
}

impl Answer {
    fn check(&self) -> Result<(), String> {
        within("score", self.score, 0.0, 100.0)?;
        self.depth.map_or(Ok(()), |depth| within("depth", depth, 0.0, 1.0))?;
        self.ttft_s.map_or(Ok(()), |time| above_nought("ttft_s", time))?;
        positive("tokens", self.tokens as u64)?;
        positive("kv_full_bytes", self.kv_full_bytes)
    }

    /// The share of the cache that was kept.
    pub(super) fn kept_share(&self) -> Option<f64> {
        Some(self.kv_kept_bytes? as f64 / self.kv_full_bytes as f64)
    }
}

impl Bench {
    fn check(&self) -> Result<(), String> {
        for (index, row) in self.measured.iter().enumerate() {
            row.check().map_err(|problem| format!("measured[{index}]: {problem}"))?;
        }
        Ok(())
    }
}

impl Measured {
    fn check(&self) -> Result<(), String> {
        positive("tokens", self.tokens as u64)?;
        positive("kv_full_bytes", self.kv_full_bytes)?;
        if self.ttft_runs_s.is_empty() {
            return Err("ttft_runs_s is empty: there is at least one run".to_owned());
        }
        let times = self.ttft_runs_s.iter().map(|value| ("ttft_runs_s", *value));
        let rates = self.decode_runs_tokens_per_s.iter().map(|value| ("decode_runs_tokens_per_s", *value));
        let one = [("ttft_s", self.ttft_s), ("flops", self.flops), ("flop_bound", self.flop_bound)];
        let optional =
            [("ttft_speedup", self.ttft_speedup), ("decode_tokens_per_s", self.decode_tokens_per_s)];
        let optional = optional.into_iter().filter_map(|(name, value)| Some((name, value?)));
        let mut all = times.chain(rates).chain(one).chain(optional);
        all.try_for_each(|(name, value)| above_nought(name, value))?;
        let mut stages = self.stages_s.iter().flat_map(StageSeconds::named);
        stages.try_for_each(|(name, value)| within(&format!("stages_s.{name}"), value, 0.0, f64::MAX))
    }
}

impl Inspection {
    fn check(&self) -> Result<(), String> {
        let layers = self.rows.len();
        let lists =
            [("kept", self.kept.len()), ("propagated", self.propagated.len()), ("mass", self.mass.len())];
        if let Some((name, count)) = lists.into_iter().find(|(_, count)| *count != layers) {
            return Err(format!("{name} has {count} layers, rows has {layers}"));
        }
        positive("prompt_tokens", self.prompt_tokens as u64)?;
        positive("kv_full_bytes", self.kv_full_bytes)?;
        let most = 1 << 31;
        if self.prompt_tokens > most {
            return Err(format!("prompt_tokens is {}: give at most {most}", self.prompt_tokens));
        }
        let kept = self.kept.iter().flatten().flatten();
        let propagated = self.propagated.iter().flatten().flatten();
        match kept.chain(propagated).find(|position| **position as usize >= self.prompt_tokens) {
            Some(position) => Err(format!(
                "the position {position} is not in a prompt of {}",
                count(self.prompt_tokens, "token")
            )),
            None => Ok(()),
        }
    }
}

fn within(name: &str, value: f64, low: f64, high: f64) -> Result<(), String> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}: it lies between {low} and {high}")),
    }
}

fn above_nought(name: &str, value: f64) -> Result<(), String> {
    match value > 0.0 && value.is_finite() {
        true => Ok(()),
        false => Err(format!("{name} is {value}: it is above 0")),
    }
}

fn positive(name: &str, value: u64) -> Result<(), String> {
    if value > 0 { Ok(()) } else { Err(format!("{name} is 0: it is at least 1")) }
}
