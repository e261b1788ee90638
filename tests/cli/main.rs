//! The program `fastkv`, from the outside: what it prints, writes and returns.

mod bad_input;
mod interrupt;
mod results;
mod support;
