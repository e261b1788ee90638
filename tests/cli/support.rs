//! Running the program, and models to run it on.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// The program, with nothing of the caller's environment that it reads.
pub(crate) fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_fastkv"));
    command.env_remove("FASTKV_MODEL").stdin(Stdio::null());
    command
}

/// Runs it to the end.
pub(crate) fn run<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Output {
    program().args(arguments).output().expect("the program starts")
}

/// Runs it, holds it to success, and returns stdout.
pub(crate) fn stdout_of<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> String {
    let output = run(arguments);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// Runs it, holds it to success, and reads stdout as JSON.
pub(crate) fn json_of<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Value {
    serde_json::from_str(&stdout_of(arguments)).expect("JSON")
}

/// What it said on stderr.
pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs it and holds it to a refusal: the exit code, a message with all of the parts, nothing on stdout.
pub(crate) fn refused<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>, code: i32, parts: &[&str]) {
    let output = run(arguments);
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{message}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{message}");
    assert!(!message.contains("panicked"), "{message}");
    for part in parts {
        assert!(message.contains(part), "`{part}` is not in: {message}");
    }
}

/// A tiny random model; of its two prompts `expected.json` knows the answers.
pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models").join(name)
}

/// The model that ships here.
pub(crate) fn needle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/needle")
}

/// The longest prompt of a fixture.
pub(crate) fn prompt_of(model: &str) -> Value {
    let expected = read_json(&fixture(model).join("expected.json"));
    let prompts = expected["prompts"].as_array().expect("prompts").clone();
    prompts.into_iter().max_by_key(|prompt| prompt["ids"].as_array().map(Vec::len)).expect("a prompt")
}

pub(crate) fn read_json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).expect("JSON")
}

/// Numbers of a JSON array.
pub(crate) fn floats(value: &Value) -> Vec<f64> {
    value.as_array().expect("an array").iter().map(|value| value.as_f64().expect("a number")).collect()
}

/// A directory of a test's own: for token files, outputs, and models to spoil.
pub(crate) struct Scratch(TempDir);

impl Scratch {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    /// A path inside.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The path of a new file.
    pub(crate) fn file(&self, name: &str, contents: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, contents).expect("writable");
        path
    }

    /// Names of what lies inside.
    pub(crate) fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.0.path()).expect("readable");
        entries.map(|entry| entry.expect("readable").file_name().to_string_lossy().into_owned()).collect()
    }

    /// A copy of a fixture.
    pub(crate) fn model(&self, fixture_name: &str) -> PathBuf {
        let copy = self.path("model");
        fs::create_dir(&copy).expect("writable");
        for entry in fs::read_dir(fixture(fixture_name)).expect("readable") {
            let entry = entry.expect("readable");
            fs::copy(entry.path(), copy.join(entry.file_name())).expect("writable");
        }
        copy
    }
}

/// Changes a JSON file in place.
pub(crate) fn edit_json(file: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = read_json(file);
    edit(&mut value);
    fs::write(file, value.to_string()).expect("writable");
}

/// Changes the header of a safetensors file in place.
pub(crate) fn edit_header(file: &Path, edit: impl FnOnce(&mut Value)) {
    let bytes = fs::read(file).expect("readable");
    let end = 8 + u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let mut header = serde_json::from_slice(&bytes[8..end]).expect("JSON");
    edit(&mut header);
    let mut header = header.to_string();
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let length = (header.len() as u64).to_le_bytes();
    fs::write(file, [&length, header.as_bytes(), &bytes[end..]].concat()).expect("writable");
}

/// Holds text to being well-formed XML: elements nest, attributes are quoted, `&` and `<` are escaped.
pub(crate) fn assert_well_formed(text: &str) {
    let mut rest = text.trim_start().strip_prefix("<!DOCTYPE html>").unwrap_or(text);
    let mut open = Vec::new();
    let mut roots = 0;
    while let Some(start) = rest.find('<') {
        assert_text(&rest[..start]);
        assert!(!open.is_empty() || rest[..start].trim().is_empty(), "text outside the root");
        let tag_end = rest.find('>').expect("a tag ends");
        let tag = &rest[start + 1..tag_end];
        rest = &rest[tag_end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "before {:?}", &rest[..rest.len().min(60)]);
            continue;
        }
        let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let name = tag.split_ascii_whitespace().next().expect("a tag has a name");
        assert!(name.chars().all(|char| char.is_ascii_alphanumeric()), "{name}");
        assert_attributes(&tag[name.len()..]);
        roots += usize::from(open.is_empty());
        if !empty {
            open.push(name);
        }
    }
    assert_eq!((open, roots, rest.trim()), (Vec::new(), 1, ""));
}

fn assert_attributes(mut text: &str) {
    while !text.trim().is_empty() {
        let (name, rest) = text.split_once("=\"").unwrap_or_else(|| panic!("attributes {text:?}"));
        let name = name.strip_prefix(char::is_whitespace).expect("a blank before an attribute").trim();
        assert!(name.chars().all(|char| char.is_ascii_alphabetic() || "-:".contains(char)), "{name}");
        let (value, rest) = rest.split_once('"').expect("a quote ends");
        assert!(!value.contains('<'), "{value}");
        assert_text(value);
        text = rest;
    }
}

fn assert_text(text: &str) {
    for reference in text.split('&').skip(1) {
        let name = reference.split_once(';').expect("a reference ends").0;
        assert!(["amp", "lt", "gt", "quot", "#39", "#13"].contains(&name), "&{name};");
    }
    assert!(!text.chars().any(|char| char.is_control() && !"\n\t".contains(char)), "{text:?}");
}
