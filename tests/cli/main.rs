//! The program `fastkv`, from the outside: what it prints, writes and returns.

#[path = "../tiny/mod.rs"]
mod tiny;

mod answers;
mod bad_input;
mod batch;
mod bench;
mod eval;
mod interrupt;
mod profile;
mod report;
mod results;
mod support;
