//! The program `fastkv`, from the outside: what it prints, writes and returns.

mod bad_input;
mod bench;
mod eval;
mod interrupt;
mod report;
mod results;
mod support;
