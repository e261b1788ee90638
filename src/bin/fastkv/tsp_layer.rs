//! The option `--tsp-layer`: a layer, or candidates.

use fastkv::policy::Settling;

/// Where token-selective propagation happens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum TspLayer {
    /// At this layer.
    Fixed(usize),
    /// Picked during prefill, out of these where they are given: the first and the last.
    Auto(Option<(usize, usize)>),
}

impl TspLayer {
    /// Reads a layer, `auto`, or the first and the last candidate.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let candidates = |(first, last): (&str, &str)| Some((first.parse().ok()?, last.parse().ok()?));
        let found = match text.split_once('-') {
            Some(range) => candidates(range).map(|range| Self::Auto(Some(range))),
            None if text == "auto" => Some(Self::Auto(None)),
            None => text.parse().map(Self::Fixed).ok(),
        };
        let want = "give the number of a layer, auto, or the first and last candidate, such as 8-24";
        found.ok_or_else(|| want.to_owned())
    }

    /// Gives a policy's fields what the options say, and takes it from these.
    pub(crate) fn take(
        option: &mut Option<Self>,
        overlap: &mut Option<f64>,
        tsp_layer: &mut Option<usize>,
        settling: &mut Option<Settling>,
    ) {
        match option.take() {
            None => {}
            Some(Self::Fixed(layer)) => *tsp_layer = Some(layer),
            Some(Self::Auto(candidates)) => {
                let default = Settling::default();
                let overlap = overlap.take().unwrap_or(default.overlap);
                *settling = Some(Settling { first: candidates.map(|(first, _)| first), overlap });
                *tsp_layer = candidates.map(|(_, last)| last);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::TspLayer;

    #[test]
    fn layers_and_candidates_are_read() {
        assert_eq!(TspLayer::parse("12"), Ok(TspLayer::Fixed(12)));
        assert_eq!(TspLayer::parse("auto"), Ok(TspLayer::Auto(None)));
        assert_eq!(TspLayer::parse("8-24"), Ok(TspLayer::Auto(Some((8, 24)))));
        for text in ["", "-1", "8-", "8-24-30", "half"] {
            assert!(TspLayer::parse(text).is_err(), "{text}");
        }
    }
}
