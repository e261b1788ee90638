//! The same on the PTX emulator: a tiny model and short prompts, whose times mean nothing.

#[allow(dead_code)]
#[path = "../../../tests/support/emulator.rs"]
mod emulator;
#[allow(dead_code)]
#[path = "../../../tests/support/number.rs"]
mod number;

use anyhow::{Result, ensure};
use ptx_emulator::Schedule;

use super::{Case, DECODED, POLICIES, Setting, measure_all};
use emulator::Emulator;

/// Fails where a policy cannot be measured, alone or with prompts together.
pub(crate) fn check() -> Result<()> {
    let (alone, together) = (Case { batch: 1, tokens: 24 }, Case { batch: 2, tokens: 16 });
    let setting = Setting {
        shape: "tiny",
        cases: vec!["24".parse()?, "2x16".parse()?],
        policies: POLICIES.to_vec(),
        answer: 4,
        staged: together.rows(),
    };
    let device = Emulator::new(Schedule::Eager, (9, 0));
    let name = "the PTX emulator, whose times mean nothing".to_owned();
    let mut saved = 0;
    let report = measure_all(device, name, &setting, |report| {
        saved = report.measured.len();
        Ok(())
    })?;
    ensure!(report.skipped.is_empty() && saved == 2 * POLICIES.len(), "{saved} figures were saved");
    let expected = [alone, together].into_iter().flat_map(|case| POLICIES.map(|policy| (policy, case)));
    for (line, (policy, case)) in report.measured.iter().zip(expected) {
        let found = Case { batch: line.batch, tokens: line.tokens };
        ensure!((line.policy, found) == (policy, case), "{}, {found}: not {policy}, {case}", line.policy);
        ensure!(line.stages_s.is_some() == (case == together), "{policy}, {case}: {:?}", line.stages_s);
        let timed = line.stages_s.is_none_or(|stages| stages.attention > 0.0 && stages.products > 0.0);
        ensure!(line.ttft_s > 0.0 && timed, "{policy}, {case}: {} s, {:?}", line.ttft_s, line.stages_s);
        // K and V of 2 heads of 64 in 4 layers, in 16 bits.
        let of_all = 2048 * case.rows();
        ensure!(policy != "full" || line.kv_peak_bytes == of_all, "{case}: {} bytes", line.kv_peak_bytes);
        ensure!(
            line.decode_tokens_per_s.is_some() == DECODED.contains(&policy),
            "{policy}, {case}: decoding"
        );
    }
    for wrong in ["", "8K", "0", "x8192", "4x", "0x8192", "4x8192x2", "-1"] {
        ensure!(wrong.parse::<Case>().is_err(), "{wrong:?} passes for prompts");
    }
    Ok(())
}
