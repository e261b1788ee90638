//! Cases and oracles that every device runs, and a model of a device.
//! Each test program uses its share of this.
#![allow(dead_code)]

pub(crate) mod emulator;
pub(crate) mod gather;
pub(crate) mod model;
