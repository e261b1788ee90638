//! The model layer against what transformers makes of the same files (tests/fixtures, written by
//! tools/fixtures/make.py), and against files that are damaged, absurd or hostile.

#![cfg(feature = "pipeline")]

mod checkpoint;
mod config;
mod directory;
mod rope;
#[cfg(feature = "text")]
mod text;

use std::fmt::Debug;
use std::fs;
use std::path::{Path, PathBuf};

use fastkv::model::ModelError;
use serde_json::Value;
use tempfile::TempDir;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn read_json(path: &Path) -> Value {
    let text = fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Directories below `folder` of the fixtures, in order.
fn fixture_dirs(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(fixtures().join(folder)).expect("fixtures are there");
    let mut dirs: Vec<_> = entries.map(|entry| entry.expect("readable").path()).collect();
    dirs.sort();
    assert!(!dirs.is_empty());
    dirs
}

/// A copy of a model fixture, to be damaged.
fn copy_of_model(name: &str) -> TempDir {
    let copy = TempDir::new().expect("temporary directory");
    for entry in fs::read_dir(fixtures().join("models").join(name)).expect("fixture") {
        let from = entry.expect("readable").path();
        fs::copy(&from, copy.path().join(from.file_name().expect("name"))).expect("copied");
    }
    copy
}

/// Asserts that `result` is an error whose message has all of `parts`.
#[track_caller]
fn assert_refused<T: Debug>(result: Result<T, ModelError>, parts: &[&str]) {
    match result {
        Ok(value) => panic!("accepted: {value:?}; expected an error with {parts:?}"),
        Err(error) => {
            let message = error.to_string();
            for part in parts {
                assert!(message.contains(part), "no {part:?} in: {message}");
            }
        }
    }
}

fn floats(value: &Value) -> Vec<f32> {
    let numbers = value.as_array().expect("a list");
    numbers.iter().map(|number| number.as_f64().expect("a number") as f32).collect()
}
