//! The TSP layer picked during prefill: candidates choose in turn what would go on, until two agree.

use super::trace::{Overlap, Settled};
use crate::policy::Candidates;

/// The choice among candidates, under way.
pub(super) struct Settling<'a> {
    candidates: &'a Candidates,
    /// Rows that the candidate before chose of its own accord.
    before: Option<Vec<u32>>,
    pub(super) found: Settled,
}

impl<'a> Settling<'a> {
    pub(super) fn new(candidates: &'a Candidates) -> Self {
        Self { candidates, before: None, found: Settled::default() }
    }

    /// Whether this layer is still to choose, and may be told to keep all rows for the next one.
    pub(super) fn is_open(&self, layer: usize) -> bool {
        self.found.layer.is_none() && (self.candidates.first..=self.candidates.last).contains(&layer)
    }

    /// Whether tokens go on from this layer with the rows that it chose, ascending. Those that every layer has to
    /// choose say nothing: the newest, and highlighted ones.
    pub(super) fn settles(&mut self, layer: usize, mut chosen: Vec<u32>, highlighted: &[u32]) -> bool {
        chosen.truncate(chosen.len().saturating_sub(self.candidates.propagate.reserved()));
        chosen.retain(|row| highlighted.binary_search(row).is_err());
        let mut settles = layer == self.candidates.last;
        if let Some(before) = &self.before {
            let share = overlap(before, &chosen);
            self.found.overlaps.push(Overlap { layer, share });
            settles |= share >= self.candidates.overlap;
        }
        self.before = Some(chosen);
        if settles {
            self.found.layer = Some(layer);
        }
        settles
    }

    /// Rows that need not be read, if tokens go on from this layer instead of the last candidate, which as
    /// many rows reach.
    pub(super) fn spared(&self, layer: usize, rows: usize) -> usize {
        let late = &self.candidates.late[layer - self.candidates.first..];
        late.iter().map(|late| rows - late.rows).sum()
    }
}

/// The share of chosen rows that both sets have.
fn overlap(before: &[u32], chosen: &[u32]) -> f64 {
    let common = chosen.iter().filter(|row| before.binary_search(row).is_ok()).count();
    if chosen.is_empty() { 1.0 } else { common as f64 / chosen.len() as f64 }
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn an_overlap_is_of_the_rows_chosen_last() {
        assert_eq!(overlap(&[0, 1], &[2, 3]), 0.0);
        assert_eq!(overlap(&[0, 1], &[1, 3]), 0.5);
        assert_eq!(overlap(&[0, 1], &[0, 1]), 1.0);
        assert_eq!(overlap(&[], &[]), 1.0, "none to choose");
    }
}
