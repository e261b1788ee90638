//! Rows that a rule names by their place, whatever their scores.

use crate::backend::{Backend, BackendError};
use crate::policy::{Keep, Plan, random_positions};

/// The rows of a layer that stay, for each kv head, and the highlighted ones beside them; `None` where the rule does
/// not name them.
pub(super) fn named_rows(
    layer: usize,
    keep: &Keep,
    rows: usize,
    kv_heads: usize,
    highlighted: &[u32],
) -> Option<Vec<Vec<u32>>> {
    let end = rows as u32;
    let mut lists: Vec<Vec<u32>> = match *keep {
        Keep::Ends { sinks, recent } => {
            vec![(0..sinks as u32).chain(end - recent as u32..end).collect(); kv_heads]
        }
        Keep::Random { count, window, seed } => {
            let choose = |head| {
                let mut list = random_positions(rows - window, count - window, seed, layer, head);
                list.extend(end - window as u32..end);
                list
            };
            (0..kv_heads).map(choose).collect()
        }
        _ => return None,
    };
    if !highlighted.is_empty() {
        for list in &mut lists {
            list.extend(highlighted);
            list.sort_unstable();
            list.dedup();
        }
    }
    Some(lists)
}

/// Such rows by layer, where they can be told before a layer is read. Those lists are long, and a device that has
/// work to do may let the host wait before it takes them.
pub(super) fn before_reading<B: Backend>(
    backend: &B,
    plan: &Plan,
) -> Result<Vec<Option<B::Indices>>, BackendError> {
    let highlighted = plan.highlighted();
    let named = plan.layers.iter().enumerate().map(|(index, layer)| {
        // Where the highlighted tokens lie among fewer is data, and so are the rows behind a candidate.
        let moved = plan.steering.is_some() && (layer.rows < plan.prompt_tokens || plan.restart.is_some());
        if moved || plan.candidates.is_some() {
            return Ok(None);
        }
        let lists = named_rows(index, &layer.keep, layer.rows, plan.shape.kv_heads, &highlighted);
        lists.map(|lists| backend.indices(lists)).transpose()
    });
    named.collect()
}
