//! `cvt`: between all number types, with rounding, saturation and flushing.

use crate::{
    isa::{Type, rounding},
    number::{BF16, F16, F32, Format, Rounding, Scalar, TF32, flush, saturate},
};

/// What a `cvt` does.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conversion {
    to: Type,
    from: Type,
    rounding: Rounding,
    flush: bool,
    saturate: bool,
    relu: bool,
    tf32: bool,
}

/// The opcode behind `cvt.`; types with a rounding where PTX asks for one.
pub(crate) fn conversion(words: &[&str]) -> Option<Conversion> {
    let [middle @ .., to, from] = words else { return None };
    let tf32 = *to == "tf32";
    let to = if tf32 { Type::B32 } else { Type::parse(to)? };
    let from = Type::parse(from)?;
    let mut found = Conversion {
        to,
        from,
        rounding: Rounding::Nearest,
        flush: false,
        saturate: false,
        relu: false,
        tf32,
    };
    let mut rounded = false;
    for word in middle {
        match *word {
            "ftz" => found.flush = true,
            "sat" => found.saturate = true,
            "relu" => found.relu = true,
            word => (found.rounding, rounded) = (rounding(word)?, true),
        }
    }
    let is_float = |ty| matches!(ty, Type::F16 | Type::BF16 | Type::F32 | Type::F64);
    let packed = matches!(to, Type::F16x2 | Type::BF16x2);
    let known = match (to, from) {
        _ if tf32 => from == Type::F32 && rounded,
        _ if packed => from == Type::F32 && rounded,
        (Type::B8 | Type::B16 | Type::B32 | Type::B64 | Type::B128 | Type::Pred, _) => false,
        (_, Type::B8 | Type::B16 | Type::B32 | Type::B64 | Type::B128 | Type::Pred) => false,
        (_, Type::F16x2 | Type::BF16x2) => false,
        _ if is_float(from) && !is_float(to) => rounded,
        _ => true,
    };
    known.then_some(found)
}

impl Conversion {
    /// Whether two values become one.
    pub(crate) const fn packs(self) -> bool {
        matches!(self.to, Type::F16x2 | Type::BF16x2)
    }

    /// The first source goes to the high half.
    pub(crate) fn pack(self, high: u64, low: u64) -> u64 {
        self.narrow(high) << 16 | self.narrow(low)
    }

    fn narrow(self, bits: u64) -> u64 {
        let format = if self.to == Type::F16x2 { F16 } else { BF16 };
        self.round(format, f64::from(f32::from_bits(bits as u32)))
    }

    fn round(self, format: Format, value: f64) -> u64 {
        let value = if self.relu && value < 0.0 { 0.0 } else { value };
        let value = if self.saturate { saturate(value) } else { value };
        format.encode(value, self.rounding)
    }

    pub(crate) fn apply(self, bits: u64) -> u64 {
        match self.from {
            Type::F16 => self.float(F16.decode(bits)),
            Type::BF16 => self.float(BF16.decode(bits)),
            Type::F32 => {
                let value = f32::from_bits(bits as u32);
                self.float(f64::from(if self.flush { flush(value) } else { value }))
            }
            Type::F64 => self.float(f64::from_bits(bits)),
            Type::U8 => self.integer(i128::from(bits as u8)),
            Type::S8 => self.integer(i128::from(bits as i8)),
            Type::U16 => self.integer(i128::from(bits as u16)),
            Type::S16 => self.integer(i128::from(bits as i16)),
            Type::U32 => self.integer(i128::from(bits as u32)),
            Type::S32 => self.integer(i128::from(bits as i32)),
            Type::U64 => self.integer(i128::from(bits)),
            _ => self.integer(i128::from(bits as i64)),
        }
    }

    fn float(self, value: f64) -> u64 {
        match self.to {
            _ if self.tf32 => self.round(TF32, value) << 13,
            Type::F16 => self.round(F16, self.whole(value)),
            Type::BF16 => self.round(BF16, self.whole(value)),
            Type::F32 => {
                let bits = self.round(F32, self.whole(value));
                if self.flush { u64::from(flush(f32::from_bits(bits as u32)).to_bits()) } else { bits }
            }
            Type::F64 => {
                Scalar::put(if self.saturate { saturate(self.whole(value)) } else { self.whole(value) })
            }
            // Out of range goes to the nearest bound, NaN to 0 (to the top for 64 bits, as GPUs have it).
            _ => {
                let (least, most) = bounds(self.to);
                if value.is_nan() {
                    return match self.to {
                        Type::U64 | Type::S64 => 1 << 63,
                        _ => 0,
                    };
                }
                let whole = integral(value, self.rounding);
                let clamped = if whole >= most as f64 {
                    most
                } else if whole <= least as f64 {
                    least
                } else {
                    whole as i128
                };
                truncated(clamped, self.to)
            }
        }
    }

    /// `cvt.rni.f32.f32` and its like round to a whole number.
    fn whole(self, value: f64) -> f64 {
        if self.from == self.to { integral(value, self.rounding) } else { value }
    }

    fn integer(self, value: i128) -> u64 {
        match self.to {
            // i128 to f64 may round, to odd it does no harm.
            Type::F16 => self.round(F16, to_odd(value)),
            Type::BF16 => self.round(BF16, to_odd(value)),
            Type::F32 => self.round(F32, to_odd(value)),
            Type::F64 => Scalar::put(value as f64),
            to if self.saturate => {
                let (least, most) = bounds(to);
                truncated(value.clamp(least, most), to)
            }
            to => truncated(value, to),
        }
    }
}

/// An integer of up to 64 bits as f64, the last bit set where bits were lost.
fn to_odd(value: i128) -> f64 {
    let magnitude = value.unsigned_abs();
    let shift = (128 - magnitude.leading_zeros()).saturating_sub(53);
    let kept = magnitude >> shift;
    let lost = magnitude != kept << shift;
    let rounded = ((kept | u128::from(lost)) << shift) as f64;
    if value < 0 { -rounded } else { rounded }
}

fn integral(value: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest => value.round_ties_even(),
        Rounding::NearestAway => value.round(),
        Rounding::Zero => value.trunc(),
        Rounding::Down => value.floor(),
        Rounding::Up => value.ceil(),
    }
}

fn bounds(ty: Type) -> (i128, i128) {
    let bits = ty.bytes() * 8;
    if ty.is_signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}

/// A register is as wide as its type or 32 bits: a signed byte fills it with its sign.
fn truncated(value: i128, ty: Type) -> u64 {
    match ty {
        Type::U8 => u64::from(value as u8),
        Type::S8 => u64::from(i16::from(value as i8) as u16),
        Type::U16 | Type::S16 => u64::from(value as u16),
        Type::U32 | Type::S32 => u64::from(value as u32),
        _ => value as u64,
    }
}
