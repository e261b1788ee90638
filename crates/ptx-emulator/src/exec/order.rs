//! Who hears of what through strong accesses and fences.

use std::{
    collections::{HashMap, hash_map::Entry},
    hash::Hash,
    sync::{Arc, PoisonError},
};

use super::{Cluster, check::Place};
use crate::{clock::Clock, isa::Order};

impl Cluster<'_> {
    /// A fence: what the lane did so far is what its next strong write tells, and what its strong
    /// reads saw told is now heard.
    pub(super) fn fence(&mut self, w: usize, lane: usize) {
        if let Some(rumour) = self.warps[w].rumours[lane].take() {
            self.hear(w, lane, &rumour);
        }
        let told = self.tell(w, lane);
        self.warps[w].fenced[lane] = Some(told);
    }

    /// A strong read hears, or will at the next fence, what was told at the address.
    pub(super) fn hear_at(&mut self, w: usize, lane: usize, place: Place, address: u64, order: Order) {
        let heard = match place {
            Place::Global(..) => {
                let told = self.run.shadow.told.lock().unwrap_or_else(PoisonError::into_inner);
                told.get(&address).cloned()
            }
            Place::Shared(cta, at) => self.ctas[cta].told.get(&at).cloned(),
            Place::Local(_) | Place::Param(_) => None,
        };
        let Some(heard) = heard else {
            return;
        };
        if order.acquires() {
            self.hear(w, lane, &heard);
            return;
        }
        match &mut self.warps[w].rumours[lane] {
            Some(known) => Arc::make_mut(known).join(&heard),
            none => *none = Some(heard),
        }
    }

    /// A strong write tells what it releases; a read-modify-write hands on what was told before.
    pub(super) fn tell_at(
        &mut self,
        w: usize,
        lane: usize,
        place: Place,
        address: u64,
        order: Order,
        keeps: bool,
    ) {
        let released =
            if order.releases() { Some(self.tell(w, lane)) } else { self.warps[w].fenced[lane].clone() };
        match place {
            Place::Global(..) => {
                let mut told = self.run.shadow.told.lock().unwrap_or_else(PoisonError::into_inner);
                hand_on(&mut told, address, released, keeps);
            }
            Place::Shared(cta, at) => hand_on(&mut self.ctas[cta].told, at, released, keeps),
            Place::Local(_) | Place::Param(_) => {}
        }
    }
}

/// What is told at an address from now on: what is released there, and, if that is kept, what was before.
fn hand_on<Key: Eq + Hash>(
    told: &mut HashMap<Key, Arc<Clock>>,
    at: Key,
    released: Option<Arc<Clock>>,
    keeps: bool,
) {
    match (told.entry(at), released) {
        (Entry::Occupied(before), None) if !keeps => drop(before.remove()),
        (Entry::Occupied(mut before), Some(new)) if keeps => Arc::make_mut(before.get_mut()).join(&new),
        (_, None) => {}
        (entry, Some(new)) => drop(entry.insert_entry(new)),
    }
}
