//! Who has heard of what: vector clocks over the threads of a launch, and the stamps of the accesses they
//! order.
//!
//! A thread's clock says, for every other thread, up to which of that thread's epochs it has heard of
//! it. An epoch ends whenever a thread tells others what it did: at barriers, fences and releases. An
//! access carries thread and epoch; a later one is ordered behind it if its thread's clock has reached
//! that epoch. Clocks are shared until they change, since most threads leave a barrier with the same.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    sync::Arc,
};

/// A thread of the launch, an epoch of it, and whether the access may meet other strong ones:
/// 23 bits of CTA, 11 of thread, 1, 29 of epoch. Zero is nobody.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp(u64);

impl Stamp {
    pub(crate) const NOBODY: Self = Self(0);

    pub(crate) fn new(cta: u32, thread: u32, epoch: u32, strong: bool) -> Self {
        Self(u64::from(cta) << 41 | u64::from(thread) << 30 | u64::from(strong) << 29 | u64::from(epoch))
    }

    pub(crate) const fn cta(self) -> u32 {
        (self.0 >> 41) as u32
    }

    pub(crate) const fn thread(self) -> u32 {
        (self.0 >> 30) as u32 & 0x7ff
    }

    pub(crate) const fn lane(self) -> u32 {
        self.thread() % 32
    }

    /// The same in another lane of the warp.
    pub(crate) const fn of_lane(self, lane: u32) -> Self {
        Self(self.0 & !(31 << 30) | (lane as u64) << 30)
    }

    pub(crate) const fn is_same_warp(self, other: Self) -> bool {
        self.0 >> 35 == other.0 >> 35
    }

    /// Whether both are of one thread of one CTA.
    const fn is_same_thread(self, other: Self) -> bool {
        self.0 >> 30 == other.0 >> 30
    }

    pub(crate) const fn strong(self) -> bool {
        self.0 >> 29 & 1 == 1
    }

    pub(crate) const fn epoch(self) -> u32 {
        self.0 as u32 & 0x1fff_ffff
    }
}

/// What a thread has heard of all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Clock {
    /// The CTA of the thread.
    home: u32,
    /// The epochs of the threads of that CTA.
    own: Arc<[u32]>,
    /// Those of the other CTAs that it has heard of.
    foreign: BTreeMap<u32, Arc<[u32]>>,
    /// The part of all this that a proxy fence stands behind, so that engines see it too.
    proxied: Option<Arc<Self>>,
}

impl Clock {
    /// A clock of a thread of CTA `home` that has heard of nobody.
    pub(crate) fn new(home: u32, threads: u32) -> Self {
        Self { home, own: vec![0; threads as usize].into(), foreign: BTreeMap::new(), proxied: None }
    }

    /// Hears of a thread of its own CTA up to an epoch.
    pub(crate) fn set(&mut self, thread: u32, epoch: u32) {
        let known = &mut Arc::make_mut(&mut self.own)[thread as usize];
        *known = (*known).max(epoch);
    }

    /// Hears of an access, wherever it was made.
    pub(crate) fn note(&mut self, stamp: Stamp) {
        if stamp.cta() == self.home {
            return self.set(stamp.thread(), stamp.epoch());
        }
        let threads = self.own.len();
        let epochs = self.foreign.entry(stamp.cta()).or_insert_with(|| vec![0; threads].into());
        let known = &mut Arc::make_mut(epochs)[stamp.thread() as usize];
        *known = (*known).max(stamp.epoch());
    }

    /// Hears that a CTA is there.
    pub(crate) fn meet(&mut self, cta: u32) {
        if cta != self.home && !self.foreign.contains_key(&cta) {
            self.foreign.insert(cta, vec![0; self.own.len()].into());
        }
    }

    /// Whether it has heard that a CTA is there.
    pub(crate) fn has_met(&self, cta: u32) -> bool {
        cta == self.home || self.foreign.contains_key(&cta)
    }

    /// Hears all that another has heard.
    pub(crate) fn join(&mut self, other: &Self) {
        self.hear(other.home, &other.own);
        for (cta, epochs) in &other.foreign {
            self.hear(*cta, epochs);
        }
        match (&mut self.proxied, &other.proxied) {
            (Some(known), Some(proxied)) if !Arc::ptr_eq(known, proxied) => {
                Arc::make_mut(known).join(proxied)
            }
            (none @ None, proxied) => *none = proxied.clone(),
            _ => {}
        }
    }

    /// A proxy fence: engines may see all that was heard of until now.
    pub(crate) fn hand_over(&mut self) {
        self.proxied = None;
        self.proxied = Some(Arc::new(self.clone()));
    }

    /// Whether an engine sees what this access wrote.
    pub(crate) fn has_handed_over(&self, other: Stamp) -> bool {
        other == Stamp::NOBODY || self.proxied.as_ref().is_some_and(|proxied| proxied.has_heard(other))
    }

    fn hear(&mut self, cta: u32, epochs: &Arc<[u32]>) {
        let known = if cta == self.home {
            &mut self.own
        } else {
            match self.foreign.entry(cta) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(none) => {
                    none.insert(epochs.clone());
                    return;
                }
            }
        };
        if Arc::ptr_eq(known, epochs) {
            return;
        }
        // Who hears of more than it knew shares what it heard.
        if known.iter().zip(epochs.iter()).all(|(known, epoch)| known <= epoch) {
            *known = epochs.clone();
        } else {
            for (known, epoch) in Arc::make_mut(known).iter_mut().zip(epochs.iter()) {
                *known = (*known).max(*epoch);
            }
        }
    }

    /// Whether it has heard of an access.
    pub(crate) fn has_heard(&self, other: Stamp) -> bool {
        if other == Stamp::NOBODY {
            return true;
        }
        let epochs = if other.cta() == self.home {
            &self.own
        } else {
            match self.foreign.get(&other.cta()) {
                Some(epochs) => epochs,
                None => return false,
            }
        };
        epochs.get(other.thread() as usize).is_some_and(|epoch| *epoch >= other.epoch())
    }

    /// An access noted here that `other` has not heard of.
    pub(crate) fn unheard_by(&self, other: &Self) -> Option<Stamp> {
        let mut all = self.foreign.iter().chain(std::iter::once((&self.home, &self.own)));
        all.find_map(|(cta, epochs)| {
            let stamps = epochs.iter().zip(0..).filter(|(epoch, _)| **epoch > 0);
            let mut stamps = stamps.map(|(epoch, thread)| Stamp::new(*cta, thread, *epoch, false));
            stamps.find(|stamp| !other.has_heard(*stamp))
        })
    }
}

/// The thread that makes an access.
#[derive(Clone, Copy)]
pub(crate) struct Accessor<'a> {
    pub(crate) clock: &'a Clock,
    pub(crate) stamp: Stamp,
}

impl Accessor<'_> {
    /// Whether the access of `other` came before this one in every schedule.
    pub(crate) fn follows(&self, other: Stamp) -> bool {
        other.is_same_thread(self.stamp) || self.clock.has_heard(other)
    }

    /// Whether nothing orders this access behind that of `other`, and they may not meet either.
    pub(crate) fn races(&self, other: Stamp) -> bool {
        !(self.follows(other) || self.stamp.strong() && other.strong())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hears_across_ctas() {
        let mut released = Clock::new(0, 4);
        released.set(3, 9);
        let mut mine = Clock::new(1, 4);
        assert!(!mine.has_met(0));
        mine.join(&released);
        let by = Accessor { clock: &mine, stamp: Stamp::new(1, 0, 1, false) };
        assert!(by.follows(Stamp::new(0, 3, 9, false)));
        assert!(!by.follows(Stamp::new(0, 3, 10, false)));
        assert!(!by.follows(Stamp::new(2, 3, 1, false)));
        mine.note(Stamp::new(2, 3, 1, false));
        assert!(mine.has_heard(Stamp::new(2, 3, 1, false)));
        let mut back = Clock::new(0, 4);
        back.join(&mine);
        assert!(back.has_heard(Stamp::new(0, 3, 9, false)) && back.has_met(1) && !back.has_met(3));
        assert_eq!(mine.unheard_by(&back), None);
        assert_eq!(mine.unheard_by(&released), Some(Stamp::new(2, 3, 1, false)));
    }

    #[test]
    fn hands_over_what_was_heard_before() {
        let mut mine = Clock::new(0, 4);
        mine.set(1, 5);
        assert!(!mine.has_handed_over(Stamp::new(0, 1, 5, false)));
        mine.hand_over();
        mine.set(1, 6);
        let mut other = Clock::new(1, 4);
        other.join(&mine);
        for clock in [&mine, &other] {
            assert!(clock.has_handed_over(Stamp::new(0, 1, 5, false)));
            assert!(!clock.has_handed_over(Stamp::new(0, 1, 6, false)));
        }
    }
}
