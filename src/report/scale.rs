//! From values to places along an axis, and numbers for its ticks.

/// How values lie along an axis.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// Evenly, from nought or `from` on.
    Linear,
    /// Evenly from 0 to 100.
    Percent,
    /// By their logarithm; values that are not above nought have no place.
    Log,
}

/// An axis of a plot: where values go between 0 and 1, and which of them are marked.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Scale {
    kind: Kind,
    low: f64,
    high: f64,
    pub(super) ticks: Vec<f64>,
}

/// Ticks that a linear axis has about.
const TICKS: f64 = 5.0;
/// What an axis has room for: what lies beyond cannot be told apart from nought, or from the infinite.
const DRAWN: std::ops::Range<f64> = 1e-100..1e100;
/// Values that are marked themselves, where they are no more than these.
const OWN_TICKS: usize = 8;

impl Scale {
    /// An axis that has room for all of these.
    pub(super) fn new(kind: Kind, values: impl IntoIterator<Item = f64>) -> Self {
        let values = values.into_iter().filter(|value| DRAWN.contains(&value.abs()));
        match kind {
            Kind::Percent => Self {
                kind,
                low: 0.0,
                high: 100.0,
                ticks: (0..=5).map(|tick| f64::from(tick) * 20.0).collect(),
            },
            Kind::Linear => {
                let high = values.fold(0.0, f64::max);
                let high = if high > 0.0 { high } else { 1.0 };
                let step = nice_step(high / TICKS);
                let count = (high / step - 1e-9).ceil();
                let ticks = (0..=count as usize).map(|tick| tick as f64 * step).collect();
                Self { kind, low: 0.0, high: count * step, ticks }
            }
            Kind::Log => Self::log(values.filter(|value| *value > 0.0).collect()),
        }
    }

    /// A logarithmic axis whose ticks are the values themselves, where they are few.
    pub(super) fn of_lengths(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().filter(|value| DRAWN.contains(value)).collect();
        values.sort_by(f64::total_cmp);
        values.dedup();
        let mut scale = Self::log(values.clone());
        if values.len() <= OWN_TICKS && values.windows(2).all(|pair| pair[1] / pair[0] > 1.2) {
            scale.ticks = values;
        }
        scale
    }

    fn log(values: Vec<f64>) -> Self {
        let low = values.iter().copied().fold(f64::INFINITY, f64::min);
        let high = values.iter().copied().fold(0.0, f64::max);
        let (low, high) = if low <= high { (low, high) } else { (1.0, 10.0) };
        // Room on both sides, so that no mark lies on the frame.
        let (low, high) = (low / 1.15, high * 1.15);
        let decades = (high / low).log10();
        let digits: &[f64] = match decades {
            ..1.5 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
            ..3.5 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let powers = low.log10().floor() as i32..=high.log10().ceil() as i32;
        // Powers are parsed, since repeated products round.
        let power = |power: i32| format!("1e{power}").parse().unwrap_or(f64::NAN);
        let ticks = powers.flat_map(|exponent| digits.iter().map(move |digit| digit * power(exponent)));
        let ticks = ticks.filter(|tick| (low..=high).contains(tick)).collect();
        Self { kind: Kind::Log, low, high, ticks }
    }

    /// Where a value lies: 0 at the beginning of the axis, 1 at its end.
    pub(super) fn place(&self, value: f64) -> Option<f64> {
        let place = match self.kind {
            Kind::Log if value > 0.0 => (value / self.low).ln() / (self.high / self.low).ln(),
            Kind::Log => return None,
            _ => (value - self.low) / (self.high - self.low),
        };
        place.is_finite().then_some(place)
    }
}

/// 1, 2 or 5 times a power of ten, no less than this.
fn nice_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power);
    steps.into_iter().find(|step| *step >= least * (1.0 - 1e-9)).unwrap_or(steps[3])
}

/// A number with three digits, more where it is large.
pub(super) fn figures(value: f64) -> String {
    if value == 0.0 || !value.is_finite() {
        return value.to_string();
    }
    let decimals = (2.0 - value.abs().log10().floor()).clamp(0.0, 9.0) as usize;
    let text = format!("{value:.decimals$}");
    match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    }
}

/// A number of tokens: 32K is 32768.
pub(super) fn tokens(count: f64) -> String {
    let thousands = count / 1024.0;
    if thousands >= 1.0 && thousands.fract() == 0.0 { format!("{thousands}K") } else { figures(count) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn linear_ticks_are_round_and_cover_the_values() {
        let ticks = |high: f64| Scale::new(Kind::Linear, [high]).ticks;
        assert_eq!(ticks(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(ticks(11.0), [0.0, 5.0, 10.0, 15.0]);
        assert_eq!(ticks(1.9).len(), 5);
        assert_eq!(*ticks(0.0).last().expect("some"), 1.0, "nothing to show has an axis too");
        for value in [1e-9, 3e-4, 0.7, 1.88, 123.4, 9.9e12] {
            let scale = Scale::new(Kind::Linear, [value]);
            assert!((3..=7).contains(&scale.ticks.len()), "{value}: {:?}", scale.ticks);
            assert!(scale.place(value).expect("a place") <= 1.0 + 1e-9, "{value}");
        }
    }

    #[test]
    fn logarithms_put_equal_ratios_at_equal_distances() {
        let scale = Scale::new(Kind::Log, [0.125, 8.0]);
        let place = |value| scale.place(value).expect("a place");
        assert!(((place(1.0) - place(0.25)) - (place(4.0) - place(1.0))).abs() < 1e-12);
        assert!((place(0.125) - (1.15_f64.ln() / (64.0 * 1.15 * 1.15_f64).ln())).abs() < 1e-12);
        assert_eq!(scale.place(0.0), None);
        assert_eq!(scale.place(-1.0), None);
        assert_eq!(scale.ticks, [0.2, 0.5, 1.0, 2.0, 5.0]);
        assert_eq!(Scale::new(Kind::Log, [1.0, 1e6]).ticks.len(), 7);
        for extreme in [5e-324, f64::MAX, f64::INFINITY, f64::NAN] {
            for kind in [Kind::Linear, Kind::Log] {
                assert!(Scale::new(kind, [extreme]).ticks.len() < 10, "{extreme}");
            }
        }
        for narrow in [[3.0, 3.0], [0.09, 0.1], [1e-9, 1.1e-9]] {
            assert!(!Scale::new(Kind::Log, narrow).ticks.is_empty(), "{narrow:?}");
        }
    }

    #[test]
    fn lengths_are_their_own_ticks_where_there_is_room() {
        assert_eq!(Scale::of_lengths([8192.0, 4096.0, 8192.0]).ticks, [4096.0, 8192.0]);
        assert_ne!(Scale::of_lengths((1..=20).map(f64::from)).ticks.len(), 20);
    }

    #[test]
    fn numbers_are_short() {
        let cases = [
            (0.0, "0"),
            (0.203, "0.203"),
            (0.000_512_3, "0.000512"),
            (1.5, "1.5"),
            (20.0, "20"),
            (123.4, "123"),
            (131_072.0, "131072"),
        ];
        for (value, text) in cases {
            assert_eq!(figures(value), text);
        }
        assert_eq!([512.0, 1024.0, 1536.0, 131_072.0].map(tokens), ["512", "1K", "1536", "128K"]);
    }
}
