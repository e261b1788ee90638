//! Loops over rows that must run at the width of the machine. They are plain Rust; `pulp` compiles
//! each for every instruction set it knows and picks one at run time.

// The macro makes a struct of the arguments, so it wants their lifetimes spelled out.
#![allow(clippy::needless_lifetimes)]

use pulp::{Arch, Simd};

/// One step of a running softmax over a row of scores: `scores` become `2^(score·scale − max)`, where
/// `max` is the larger of `running_max` and the row's own. Returns that maximum and the sum.
#[pulp::with_simd(softmax_step = Arch::new())]
#[inline(always)]
pub(super) fn softmax_step_with<'a, S: Simd>(
    _: S,
    scores: &'a mut [f32],
    scale: f32,
    running_max: f32,
) -> (f32, f32) {
    let max = (max(scores) * scale).max(running_max);
    // A row of −∞ has no finite reference; its weights are 0 whatever it is.
    let reference = if max == f32::NEG_INFINITY { 0.0 } else { max };
    let mut sums = [0.0; LANES];
    let (blocks, rest) = scores.as_chunks_mut::<LANES>();
    for block in blocks {
        for (score, sum) in block.iter_mut().zip(&mut sums) {
            *score = exp2(*score * scale - reference);
            *sum += *score;
        }
    }
    let mut sum: f32 = sums.iter().sum();
    for score in rest {
        *score = exp2(*score * scale - reference);
        sum += *score;
    }
    (max, sum)
}

/// `values *= factor`.
#[pulp::with_simd(scale = Arch::new())]
#[inline(always)]
pub(super) fn scale_with<'a, S: Simd>(_: S, values: &'a mut [f32], factor: f32) {
    for value in values {
        *value *= factor;
    }
}

/// `sums += values · factor`.
#[pulp::with_simd(add_scaled = Arch::new())]
#[inline(always)]
pub(super) fn add_scaled_with<'a, S: Simd>(_: S, sums: &'a mut [f32], values: &'a [f32], factor: f32) {
    for (sum, value) in sums.iter_mut().zip(values) {
        *sum += value * factor;
    }
}

/// `gate = silu(gate) · up`.
#[pulp::with_simd(swiglu = Arch::new())]
#[inline(always)]
pub(super) fn swiglu_with<'a, S: Simd>(_: S, gate: &'a mut [f32], up: &'a [f32]) {
    for (gate, up) in gate.iter_mut().zip(up) {
        *gate = *gate / (1.0 + exp2(*gate * -std::f32::consts::LOG2_E)) * up;
    }
}

/// `out = x / sqrt(mean(x²) + epsilon) · weight`.
#[pulp::with_simd(rms_norm = Arch::new())]
#[inline(always)]
pub(super) fn rms_norm_with<'a, S: Simd>(
    _: S,
    out: &'a mut [f32],
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
) {
    let mut sums = [0.0; LANES];
    let (blocks, rest) = x.as_chunks::<LANES>();
    for block in blocks {
        for (value, sum) in block.iter().zip(&mut sums) {
            *sum += value * value;
        }
    }
    let squares = sums.iter().sum::<f32>() + rest.iter().map(|value| value * value).sum::<f32>();
    let factor = 1.0 / (squares / x.len() as f32 + epsilon).sqrt();
    for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
        *out = x * factor * weight;
    }
}

/// bf16 in little-endian bytes to f32: the upper half of its bits.
#[pulp::with_simd(widen_bf16 = Arch::new())]
#[inline(always)]
pub(super) fn widen_bf16_with<'a, S: Simd>(_: S, narrow: &'a [[u8; 2]], wide: &'a mut [f32]) {
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = f32::from_bits(u32::from(u16::from_le_bytes(*narrow)) << 16);
    }
}

/// Turns the pairs (i, i + half) of one head by the angles whose cosines and sines are given.
pub(super) fn rotate(head: &mut [f32], cosines: &[f32], sines: &[f32]) {
    let (first, second) = head.split_at_mut(cosines.len());
    for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cosines).zip(sines) {
        (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
    }
}

/// Independent running values of a reduction: wide enough for two registers of the widest machine.
const LANES: usize = 32;

#[inline(always)]
fn max(values: &[f32]) -> f32 {
    let mut maxima = [f32::NEG_INFINITY; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for (value, max) in block.iter().zip(&mut maxima) {
            *max = if *value > *max { *value } else { *max };
        }
    }
    rest.iter().chain(&maxima).copied().fold(f32::NEG_INFINITY, f32::max)
}

/// 2^x with a relative error below 2·10⁻⁷ from −126 to 127; 0 below −127, +∞ above 128, NaN for NaN.
#[inline(always)]
fn exp2(x: f32) -> f32 {
    // Adding 1.5·2^23 rounds to an integer that then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x < -127.0 { -127.0 } else { x };
    let clamped = if clamped > 128.0 { 128.0 } else { clamped };
    let shifted = clamped + ROUND;
    let fraction = clamped - (shifted - ROUND);
    // Taylor's series ln(2)^k / k! to degree 8, its two highest terms replaced by their Chebyshev
    // approximations on [−1/2, 1/2]: off by less than 10⁻⁸ there, where six terms alone are off by 2·10⁻⁷.
    let mut power = 1.546_960_8e-4;
    power = power * fraction + 1.340_028_8e-3;
    power = power * fraction + 9.618_026e-3;
    power = power * fraction + 5.550_327_5e-2;
    power = power * fraction + 2.402_265e-1;
    power = power * fraction + 6.931_472e-1;
    power = power * fraction + 1.0;
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32).wrapping_add(127) << 23;
    power * f32::from_bits(exponent as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp2_is_accurate_and_saturates() {
        for step in -1_260_000..1_270_000 {
            let x = step as f32 * 1e-4;
            let exact = f64::from(x).exp2();
            let error = (f64::from(exp2(x)) - exact).abs() / exact;
            assert!(error < 2e-7, "2^{x}: relative error {error:e}");
        }
        assert_eq!(exp2(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp2(-1e30), 0.0);
        assert_eq!(exp2(f32::INFINITY), f32::INFINITY);
        assert!(exp2(f32::NAN).is_nan());
    }

    #[test]
    fn softmax_step_of_hidden_keys_is_zero() {
        let mut row = [f32::NEG_INFINITY; 3];
        assert_eq!(softmax_step(&mut row, 1.0, f32::NEG_INFINITY), (f32::NEG_INFINITY, 0.0));
        assert_eq!(row, [0.0; 3]);
    }
}
