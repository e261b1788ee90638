#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod alu;
mod cell;
mod clock;
mod error;
mod exec;
mod isa;
mod launch;
mod memory;
mod number;
mod parse;
mod schedule;
mod tensor_map;

pub use error::{Error, Fault, Hazard};
pub use exec::Counters;
pub use launch::{Device, Launch};
pub use schedule::Schedule;
pub use tensor_map::{Swizzle, TensorMap};
