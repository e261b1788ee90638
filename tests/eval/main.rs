//! Tasks with known answers, their files, and measures without a model.

#![cfg(feature = "pipeline")]

#[path = "../oracle/mod.rs"]
mod oracle;

mod files;
mod selection;
mod tasks;
