//! The kernels on the PTX emulator, against plain loops: the cases of the GPU tests in every schedule.
//! Where the library was built without nvcc there are no kernels to run, and every test is ignored.

mod support;

use ptx_emulator::Schedule;
use support::{
    emulator::Emulator,
    gather::{self, Case},
};

/// Eager, late copies, and two orders of preemption.
const SCHEDULES: [Schedule; 4] =
    [Schedule::Eager, Schedule::Delayed, Schedule::Random(1), Schedule::Random(2)];

#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn gather_kv_edges() {
    for schedule in SCHEDULES {
        let device = Emulator::new(schedule);
        for case in gather::edges() {
            gather::check_kv(&device, &case)
                .unwrap_or_else(|error| panic!("{schedule:?}: {error}\n{case:?}"));
        }
    }
}

#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn gather_rows_edges() {
    for schedule in SCHEDULES {
        let device = Emulator::new(schedule);
        for case in gather::edges().iter().filter(|case| case.heads == 1) {
            gather::check_rows(&device, case)
                .unwrap_or_else(|error| panic!("{schedule:?}: {error}\n{case:?}"));
        }
    }
}

/// A share of the random cases for each schedule.
#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn gather_kv_random() {
    for (number, schedule) in SCHEDULES.into_iter().enumerate() {
        let device = Emulator::new(schedule);
        for seed in (number as u64..200).step_by(SCHEDULES.len()) {
            let case = Case::random(seed, 1 + seed as usize % 9);
            gather::check_kv(&device, &case)
                .unwrap_or_else(|error| panic!("{schedule:?}: {error}\n{case:?}"));
        }
    }
}

#[test]
#[cfg_attr(not(fastkv_kernels), ignore = "built without nvcc")]
fn gather_rows_random() {
    for (number, schedule) in SCHEDULES.into_iter().enumerate() {
        let device = Emulator::new(schedule);
        for seed in (number as u64..200).step_by(SCHEDULES.len()) {
            let case = Case::random(seed, 1);
            gather::check_rows(&device, &case)
                .unwrap_or_else(|error| panic!("{schedule:?}: {error}\n{case:?}"));
        }
    }
}
