//! Every kernel on the PTX emulator, in every schedule, on the chip that it is for.
//! Where the library was built without nvcc there are no kernels to run, and every test is ignored.

mod support;

use std::process::ExitCode;

use fastkv::kernels::images;
use libtest_mimic::{Arguments, Failed, Trial};
use ptx_emulator::Schedule;
use support::emulator::Emulator;

/// Eager, late copies, and two orders of preemption.
const SCHEDULES: [(&str, Schedule); 4] = [
    ("eager", Schedule::Eager),
    ("delayed", Schedule::Delayed),
    ("random_1", Schedule::Random(1)),
    ("random_2", Schedule::Random(2)),
];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for check in support::checks::<Emulator>() {
        let (chip, compute_capability) = if check.hopper { ("sm_90", (9, 0)) } else { ("sm_80", (8, 0)) };
        for (seed, (name, schedule)) in SCHEDULES.into_iter().enumerate() {
            let run = move || {
                (check.run)(&Emulator::new(schedule, compute_capability), seed as u64).map_err(Failed::from)
            };
            let name = format!("{}::{chip}::{name}", check.name);
            trials.push(Trial::test(name, run).with_ignored_flag(!images::built()));
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
