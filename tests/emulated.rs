//! Every kernel on the PTX emulator, in every schedule, on the chip that it is for.
//! Where the library was built without nvcc there are no kernels to run, and every test is ignored.

mod support;

use std::process::ExitCode;

use fastkv::kernels::{Kernel, images};
use libtest_mimic::{Arguments, Failed, Trial};
use ptx_emulator::Schedule;
use support::emulator::{Emulator, LAUNCHED};

/// Eager, late copies, and two orders of preemption.
const SCHEDULES: [(&str, Schedule); 4] = [
    ("eager", Schedule::Eager),
    ("delayed", Schedule::Delayed),
    ("random_1", Schedule::Random(1)),
    ("random_2", Schedule::Random(2)),
];

const AMPERE: (&str, (u32, u32)) = ("sm_80", (8, 0));
const HOPPER: (&str, (u32, u32)) = ("sm_90", (9, 0));

/// Families whose kernels copy in the background or find their places together: Hopper's code for them runs with late
/// copies, too. An eager run would differ in its copies alone; other families have none, and their loops over whole
/// models take the most time.
const COPIES_OR_PLACES: [&str; 8] = [
    "captured",
    "column_sums",
    "compact",
    "decode",
    "gather",
    "prefill_attention",
    "select",
    "window_scores",
];

fn main() -> ExitCode {
    let mut trials = Vec::new();
    for check in support::checks::<Emulator>() {
        let mut add = |(chip, compute_capability), seed, (name, schedule)| {
            let run =
                move || (check.run)(&Emulator::new(schedule, compute_capability), seed).map_err(Failed::from);
            let name = format!("{}::{chip}::{name}", check.name);
            trials.push(Trial::test(name, run).with_ignored_flag(!images::built()));
        };
        for (seed, schedule) in (0..).zip(SCHEDULES) {
            add(if check.hopper { HOPPER } else { AMPERE }, seed, schedule);
        }
        // Code for Hopper is another where the kernel is the same.
        if !check.hopper {
            add(HOPPER, 4, ("random_3", Schedule::Random(3)));
            if COPIES_OR_PLACES.iter().any(|family| check.name.starts_with(family)) {
                add(HOPPER, 5, ("delayed", Schedule::Delayed));
            }
        }
    }
    let all = trials.len() as u64;
    let conclusion = libtest_mimic::run(&Arguments::from_args(), trials);
    let launched = LAUNCHED.lock().expect("a lock");
    let chips = [AMPERE, HOPPER].map(|(_, chip)| Emulator::new(Schedule::Eager, chip));
    let code = |kernel: &Kernel| {
        chips.each_ref().map(|chip| (kernel.entry(), chip.arch(kernel.image()).unwrap_or_default()))
    };
    let left: Vec<_> = Kernel::ALL.iter().flat_map(code).filter(|code| !launched.contains(code)).collect();
    if conclusion.num_passed == all && !left.is_empty() {
        eprintln!("no check launches {left:?}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}
