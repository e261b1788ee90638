//! Numbers as registers hold them: a register is 64 bits, a value sits in the low ones, the rest is 0.

use std::ops::{Index, IndexMut};

/// One register of all lanes of a warp.
pub(crate) type Lanes = [u64; 32];

/// Registers of a warp. They lie in one piece, so that the host need not fill those that nobody uses.
#[derive(Debug)]
pub(crate) struct Registers(Vec<u64>);

impl Registers {
    pub(crate) fn new(count: usize) -> Self {
        Self(vec![0; count * 32])
    }
}

impl Index<usize> for Registers {
    type Output = Lanes;

    #[inline]
    fn index(&self, number: usize) -> &Lanes {
        &self.0.as_chunks().0[number]
    }
}

impl IndexMut<usize> for Registers {
    #[inline]
    fn index_mut(&mut self, number: usize) -> &mut Lanes {
        &mut self.0.as_chunks_mut().0[number]
    }
}

/// A value that a register can hold.
pub(crate) trait Scalar: Copy {
    fn get(bits: u64) -> Self;
    fn put(self) -> u64;
}

macro_rules! integers {
    ($($signed:ty, $unsigned:ty);*) => {$(
        impl Scalar for $unsigned {
            fn get(bits: u64) -> Self { bits as Self }
            fn put(self) -> u64 { u64::from(self) }
        }
        impl Scalar for $signed {
            fn get(bits: u64) -> Self { bits as Self }
            fn put(self) -> u64 { u64::from(self as $unsigned) }
        }
    )*};
}
integers!(i8, u8; i16, u16; i32, u32; i64, u64);

/// Every NaN that an f32 operation makes, as on the GPU.
const NAN_F32: u32 = 0x7fff_ffff;

impl Scalar for f32 {
    fn get(bits: u64) -> Self {
        Self::from_bits(bits as u32)
    }
    fn put(self) -> u64 {
        u64::from(if self.is_nan() { NAN_F32 } else { self.to_bits() })
    }
}

impl Scalar for f64 {
    fn get(bits: u64) -> Self {
        Self::from_bits(bits)
    }
    fn put(self) -> u64 {
        if self.is_nan() { 0x7fff_ffff_ffff_ffff } else { self.to_bits() }
    }
}

/// How a result that does not fit is rounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// To nearest, ties away from zero.
    NearestAway,
    Zero,
    Down,
    Up,
}

/// A binary floating-point format with an implicit leading bit, subnormals, infinities and NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    exponent_bits: u32,
    fraction_bits: u32,
}

pub(crate) const F16: Format = Format { exponent_bits: 5, fraction_bits: 10 };
pub(crate) const BF16: Format = Format { exponent_bits: 8, fraction_bits: 7 };
pub(crate) const F32: Format = Format { exponent_bits: 8, fraction_bits: 23 };
pub(crate) const TF32: Format = Format { exponent_bits: 8, fraction_bits: 10 };

impl Format {
    /// Bits of a number in this format.
    const fn bits(self) -> u32 {
        1 + self.exponent_bits + self.fraction_bits
    }

    /// The NaN of an operation: all bits but the sign.
    const fn nan(self) -> u64 {
        (1 << (self.bits() - 1)) - 1
    }

    const fn infinity(self) -> u64 {
        ((1 << self.exponent_bits) - 1) << self.fraction_bits
    }

    /// The exact value of a number in this format.
    pub(crate) fn decode(self, bits: u64) -> f64 {
        if self == BF16 {
            return f64::from(f32::from_bits((bits as u32 & 0xffff) << 16));
        }
        let exponent = (bits >> self.fraction_bits) & ((1 << self.exponent_bits) - 1);
        let fraction = bits & ((1 << self.fraction_bits) - 1);
        let sign = if bits >> (self.bits() - 1) & 1 == 1 { -1.0 } else { 1.0 };
        let bias = (1_i32 << (self.exponent_bits - 1)) - 1;
        let scale = |power: i32| f64::from_bits(((power + 1023) as u64) << 52);
        let magnitude = match exponent {
            0 => fraction as f64 * scale(1 - bias - self.fraction_bits as i32),
            e if e + 1 == 1 << self.exponent_bits => {
                if fraction == 0 {
                    f64::INFINITY
                } else {
                    f64::NAN
                }
            }
            e => {
                (fraction | 1 << self.fraction_bits) as f64
                    * scale(e as i32 - bias - self.fraction_bits as i32)
            }
        };
        sign * magnitude
    }

    /// Rounds a value to this format.
    pub(crate) fn encode(self, value: f64, rounding: Rounding) -> u64 {
        if value.is_nan() {
            return self.nan();
        }
        let sign = u64::from(value.is_sign_negative()) << (self.bits() - 1);
        if value.is_infinite() {
            return sign | self.infinity();
        }
        if value == 0.0 {
            return sign;
        }
        let bits = value.abs().to_bits();
        let bias = (1_i32 << (self.exponent_bits - 1)) - 1;
        // An f64 subnormal is far below the least number of every format here.
        let power = ((bits >> 52) as i32 - 1023).max(-1022);
        let significand = (bits & ((1 << 52) - 1)) | u64::from(bits >> 52 != 0) << 52;
        let least = 1 - bias;
        let shift = (52 - self.fraction_bits as i32 + (least - power).max(0)).min(63) as u32;
        let (kept, lost) = (significand >> shift, significand & ((1 << shift) - 1));
        let half = 1_u64 << (shift - 1);
        let away = match rounding {
            Rounding::Nearest => lost > half || lost == half && kept & 1 == 1,
            Rounding::NearestAway => lost >= half,
            Rounding::Zero => false,
            Rounding::Down => sign != 0 && lost != 0,
            Rounding::Up => sign == 0 && lost != 0,
        };
        // A carry out of the fraction moves into the exponent, which is what it should do. A normal
        // number brings its leading bit along, hence the `- 1`.
        let exponent = (power.max(least) + bias - 1) as u64;
        let magnitude = (exponent << self.fraction_bits) + kept + u64::from(away);
        if magnitude < self.infinity() {
            return sign | magnitude;
        }
        let to_infinity = match rounding {
            Rounding::Nearest | Rounding::NearestAway => true,
            Rounding::Zero => false,
            Rounding::Down => sign != 0,
            Rounding::Up => sign == 0,
        };
        sign | if to_infinity { self.infinity() } else { self.infinity() - 1 }
    }
}

/// `a + b` with the last bit set where the sum is not exact: rounding it again, to half the bits or
/// fewer, gives what one rounding would.
pub(crate) fn add_to_odd(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    let b_part = sum - a;
    let error = (a - (sum - b_part)) + (b - b_part);
    if error == 0.0 || sum.to_bits() & 1 == 1 {
        return sum;
    }
    // The exact sum lies between this even number and its neighbour on the side of the error.
    if (error > 0.0) == (sum > 0.0) {
        f64::from_bits(sum.to_bits() + 1)
    } else {
        f64::from_bits(sum.to_bits() - 1)
    }
}

/// A subnormal becomes a zero of its sign.
pub(crate) fn flush(value: f32) -> f32 {
    if value.is_subnormal() { 0.0_f32.copysign(value) } else { value }
}

/// `[0, 1]`; NaN and -0 are 0.
pub(crate) fn saturate(value: f64) -> f64 {
    if value > 0.0 { value.min(1.0) } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_survives() {
        for bits in 0..=u64::from(u16::MAX) {
            for format in [F16, BF16] {
                let value = format.decode(bits);
                let expected = if value.is_nan() { format.nan() } else { bits };
                assert_eq!(format.encode(value, Rounding::Nearest), expected, "{format:?} {bits:#x}");
                assert_eq!(format.encode(value, Rounding::Zero), expected);
            }
        }
    }

    #[test]
    fn rounds_f32_as_the_host_does() {
        let mut state = 1_u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let near_f32 = (state >> 20 & 0x8000_000f_ffff_ffff) | (0x380 + state % 0x100) << 52;
            for value in [f64::from_bits(state), f64::from_bits(near_f32)] {
                if !value.is_nan() {
                    assert_eq!(F32.encode(value, Rounding::Nearest), u64::from((value as f32).to_bits()));
                }
            }
        }
    }

    #[test]
    fn directed_rounding_brackets() {
        for value in [1.0 + 1e-9, -1.0 - 1e-9, 65519.0, 65520.0, 1e-8, 5.96e-8, -3e-8, 2e5, -2e5] {
            let [down, up, zero] = [Rounding::Down, Rounding::Up, Rounding::Zero]
                .map(|rounding| F16.decode(F16.encode(value, rounding)));
            assert!(down <= value && value <= up, "{value}");
            assert!(zero.abs() <= value.abs());
        }
    }

    #[test]
    fn odd_sums_round_like_fma() {
        let mut state = 7_u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let [a, b, c] = [0, 13, 29].map(|n| {
                let bits = state.rotate_left(n) as u32;
                f32::from_bits(bits & 0x80ff_ffff | (100 + bits % 50) << 23)
            });
            let ours = F32.encode(add_to_odd(f64::from(a) * f64::from(b), f64::from(c)), Rounding::Nearest);
            assert_eq!(ours, u64::from(a.mul_add(b, c).to_bits()), "{a} {b} {c}");
        }
    }
}
