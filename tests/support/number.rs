//! Numbers of every element type, as bytes and as f64.

use fastkv::kernels::DType;
use half::{bf16, f16};

/// The bytes of numbers, each rounded once, to even.
pub(crate) fn encode(dtype: DType, numbers: impl IntoIterator<Item = f64>) -> Vec<u8> {
    let numbers = numbers.into_iter();
    match dtype {
        DType::F16 => numbers.flat_map(|x| f16::from_f64(x).to_ne_bytes()).collect(),
        DType::BF16 => numbers.flat_map(|x| bf16::from_f64(x).to_ne_bytes()).collect(),
        DType::F32 => numbers.flat_map(|x| (x as f32).to_ne_bytes()).collect(),
    }
}

/// The numbers that bytes hold.
pub(crate) fn decode(dtype: DType, bytes: &[u8]) -> Vec<f64> {
    let two = |bytes: &[u8]| [bytes[0], bytes[1]];
    match dtype {
        DType::F16 => bytes.chunks(2).map(|b| f16::from_ne_bytes(two(b)).to_f64()).collect(),
        DType::BF16 => bytes.chunks(2).map(|b| bf16::from_ne_bytes(two(b)).to_f64()).collect(),
        DType::F32 => bytes.chunks(4).map(|b| f32::from_ne_bytes([b[0], b[1], b[2], b[3]]).into()).collect(),
    }
}

/// The number that a number becomes when it is stored.
pub(crate) fn rounded(dtype: DType, number: f64) -> f64 {
    decode(dtype, &encode(dtype, [number]))[0]
}

/// What rounding to a type may change a number by.
pub(crate) fn rounding(dtype: DType, number: f64) -> f64 {
    let (relative, least) = match dtype {
        DType::F16 => (2_f64.powi(-11), 2_f64.powi(-25)),
        DType::BF16 => (2_f64.powi(-8), 2_f64.powi(-134)),
        DType::F32 => (2_f64.powi(-24), 2_f64.powi(-150)),
    };
    number.abs() * relative + least
}

/// Holds what a device computed to what it should be, `tolerance` given beside each number; both NaN is
/// equal, and so are infinities.
pub(crate) fn within(what: &str, found: &[f64], expected: &[(f64, f64)]) -> Result<(), String> {
    if found.len() != expected.len() {
        return Err(format!("{what}: {} numbers, not {}", found.len(), expected.len()));
    }
    for (at, (found, (expected, tolerance))) in found.iter().zip(expected).enumerate() {
        let off = (found - expected).abs();
        let equal = found == expected || found.is_nan() && expected.is_nan();
        // An infinity has a tolerance without end.
        let near = off.is_finite() && off <= *tolerance;
        if !equal && !near {
            return Err(format!(
                "{what}[{at}] is {found:e}, not {expected:e}: off by {off:e} of {tolerance:e}"
            ));
        }
    }
    Ok(())
}
