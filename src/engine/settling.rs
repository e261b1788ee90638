//! The TSP layer picked during prefill: candidates choose in turn what would go on, until two agree.

use super::trace::{Overlap, Settled};
use crate::policy::Candidates;

/// The choice among candidates, under way.
pub(super) struct Settling<'a> {
    candidates: &'a Candidates,
    /// Rows that the candidate before chose.
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

    /// Whether tokens go on from this layer with the rows that it chose, ascending.
    pub(super) fn settles(&mut self, layer: usize, chosen: Vec<u32>) -> bool {
        let mut settles = layer == self.candidates.last;
        if let Some(before) = &self.before {
            let share = overlap(before, &chosen, self.candidates.propagate.reserved());
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

/// The share of chosen rows that both sets have, of those which are not chosen in any case.
fn overlap(a: &[u32], b: &[u32], reserved: usize) -> f64 {
    let common = b.iter().filter(|row| a.binary_search(row).is_ok()).count();
    match b.len().saturating_sub(reserved) {
        0 => 1.0,
        chosen => common.saturating_sub(reserved) as f64 / chosen as f64,
    }
}

#[cfg(test)]
mod tests {
    use super::overlap;

    #[test]
    fn reserved_rows_are_no_agreement() {
        assert_eq!(overlap(&[0, 1, 8, 9], &[2, 3, 8, 9], 2), 0.0);
        assert_eq!(overlap(&[0, 1, 8, 9], &[1, 3, 8, 9], 2), 0.5);
        assert_eq!(overlap(&[0, 1, 8, 9], &[0, 1, 8, 9], 2), 1.0);
        assert_eq!(overlap(&[8, 9], &[8, 9], 2), 1.0, "none to choose");
    }
}
