//! Who has heard of what: vector clocks over the threads of a launch, and the accesses they order.
//!
//! A thread's clock says, for every other thread, up to which of that thread's epochs it has heard of
//! it. An epoch ends whenever a thread tells others what it did: at barriers, fences and releases. An
//! access carries thread and epoch; a later one is ordered behind it if its thread's clock has reached
//! that epoch. Clocks are shared until they change, since most threads leave a barrier with the same.

use std::{collections::BTreeMap, sync::Arc};

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

    /// Whether both are of one thread of one CTA.
    const fn is_same_thread(self, other: Self) -> bool {
        self.0 >> 30 == other.0 >> 30
    }

    const fn strong(self) -> bool {
        self.0 >> 29 & 1 == 1
    }

    pub(crate) const fn epoch(self) -> u32 {
        self.0 as u32 & 0x1fff_ffff
    }
}

/// What a thread has heard of all others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Clock {
    /// The epochs of the threads of its own CTA.
    own: Vec<u32>,
    /// Those of other CTAs that it has heard of.
    foreign: BTreeMap<u32, Arc<Vec<u32>>>,
}

impl Clock {
    pub(crate) fn new(threads: u32) -> Self {
        Self { own: vec![0; threads as usize], foreign: BTreeMap::new() }
    }

    pub(crate) fn set(&mut self, thread: u32, epoch: u32) {
        let known = &mut self.own[thread as usize];
        *known = (*known).max(epoch);
    }

    /// Hears all that a thread of the same CTA has heard.
    pub(crate) fn join(&mut self, other: &Self) {
        raise(&mut self.own, &other.own);
        for (cta, epochs) in &other.foreign {
            self.hear(*cta, epochs);
        }
    }

    /// Hears all that a thread of CTA `from` has heard, this being a clock of CTA `to`.
    pub(crate) fn join_from(&mut self, to: u32, from: u32, other: &Self) {
        if to == from {
            return self.join(other);
        }
        self.hear(from, &Arc::new(other.own.clone()));
        for (cta, epochs) in &other.foreign {
            if *cta == to {
                raise(&mut self.own, epochs);
            } else {
                self.hear(*cta, epochs);
            }
        }
    }

    fn hear(&mut self, cta: u32, epochs: &Arc<Vec<u32>>) {
        let known = self.foreign.entry(cta).or_insert_with(|| epochs.clone());
        if !Arc::ptr_eq(known, epochs) {
            raise(Arc::<Vec<u32>>::make_mut(known).as_mut_slice(), epochs);
        }
    }
}

fn raise(epochs: &mut [u32], others: &[u32]) {
    for (epoch, other) in epochs.iter_mut().zip(others) {
        *epoch = (*epoch).max(*other);
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
        // Thread and CTA in one comparison.
        if other.0 >> 30 == self.stamp.0 >> 30 || other == Stamp::NOBODY {
            return true;
        }
        let known = if other.cta() == self.stamp.cta() {
            &self.clock.own
        } else {
            match self.clock.foreign.get(&other.cta()) {
                Some(epochs) => &**epochs,
                None => return false,
            }
        };
        known.get(other.thread() as usize).is_some_and(|epoch| *epoch >= other.epoch())
    }

    fn races(&self, other: Stamp) -> bool {
        !(self.follows(other) || self.stamp.strong() && other.strong())
    }
}

/// The last accesses to four bytes.
///
/// One writer and two readers are remembered: a race with a third reader of the same word can go
/// unseen. Bytes are told apart where the accesses are narrower than the word.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Cell {
    writer: Stamp,
    readers: [Stamp; 2],
    written: u8,
    read: [u8; 2],
}

/// An access that nothing orders against the present one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conflict {
    pub(crate) other: Stamp,
    pub(crate) wrote: bool,
}

impl Cell {
    /// Notes a read of the bytes in `mask`.
    #[inline]
    pub(crate) fn read(&mut self, by: &Accessor<'_>, mask: u8) -> Result<(), Conflict> {
        if self.written & mask != 0 && by.races(self.writer) {
            return Err(Conflict { other: self.writer, wrote: true });
        }
        // A reader that everybody behind this one will have heard of too need not be remembered.
        let slot = usize::from(!by.follows(self.readers[0]));
        self.readers[slot] = by.stamp;
        self.read[slot] = mask;
        Ok(())
    }

    /// Notes that an engine reads for a thread: it may where the thread may, and is who has read.
    #[inline]
    pub(crate) fn read_by_engine(
        &mut self,
        by: &Accessor<'_>,
        engine: Stamp,
        mask: u8,
    ) -> Result<(), Conflict> {
        if self.written & mask != 0 && by.races(self.writer) {
            return Err(Conflict { other: self.writer, wrote: true });
        }
        let first = self.readers[0];
        let replaces = first.is_same_thread(engine) || by.follows(first);
        let slot = usize::from(!replaces);
        self.readers[slot] = engine;
        self.read[slot] = mask;
        Ok(())
    }

    /// Notes a write of the bytes in `mask`.
    #[inline]
    pub(crate) fn write(&mut self, by: &Accessor<'_>, mask: u8) -> Result<(), Conflict> {
        if self.written & mask != 0 && by.races(self.writer) {
            return Err(Conflict { other: self.writer, wrote: true });
        }
        for (reader, read) in self.readers.iter().zip(self.read) {
            if read & mask != 0 && by.races(*reader) {
                return Err(Conflict { other: *reader, wrote: false });
            }
        }
        self.writer = by.stamp;
        self.written = mask;
        self.readers = [Stamp::NOBODY; 2];
        Ok(())
    }

    /// Who wrote here last.
    pub(crate) fn writer(&self) -> Stamp {
        self.writer
    }

    /// Whether anybody has written here since the launch began.
    pub(crate) fn is_written(&self) -> bool {
        self.writer != Stamp::NOBODY
    }

    /// A copy that ran on its own is finished: it counts as written now, by whoever waited for it.
    pub(crate) fn land(&mut self, by: Stamp) {
        self.writer = by;
        self.written = 0xf;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_what_was_heard() {
        let (mut mine, other) = (Clock::new(2), Stamp::new(0, 1, 5, false));
        let mut cell = Cell::default();
        let nobody = Clock::new(2);
        cell.write(&Accessor { clock: &nobody, stamp: other }, 0xf).unwrap();
        let stamp = Stamp::new(0, 0, 1, false);
        assert!(cell.read(&Accessor { clock: &mine, stamp }, 0xf).is_err());
        assert!(cell.read(&Accessor { clock: &mine, stamp: Stamp::new(0, 1, 6, false) }, 0xf).is_ok());
        mine.set(1, 5);
        assert!(cell.read(&Accessor { clock: &mine, stamp }, 0xf).is_ok());
        // The other thread has not heard of that read.
        assert!(cell.write(&Accessor { clock: &nobody, stamp: Stamp::new(0, 1, 7, false) }, 0xf).is_err());
    }

    #[test]
    fn hears_across_ctas() {
        let mut released = Clock::new(4);
        released.set(3, 9);
        let mut mine = Clock::new(4);
        mine.join_from(1, 0, &released);
        let by = Accessor { clock: &mine, stamp: Stamp::new(1, 0, 1, false) };
        assert!(by.follows(Stamp::new(0, 3, 9, false)));
        assert!(!by.follows(Stamp::new(0, 3, 10, false)));
        assert!(!by.follows(Stamp::new(2, 3, 1, false)));
        let mut back = Clock::new(4);
        back.join_from(0, 1, &mine);
        assert_eq!(back, Clock { own: vec![0, 0, 0, 9], foreign: [(1, Arc::new(vec![0; 4]))].into() });
    }

    #[test]
    fn tells_bytes_apart() {
        let clock = Clock::new(2);
        let mut cell = Cell::default();
        let by = |thread| Accessor { clock: &clock, stamp: Stamp::new(0, thread, 1, false) };
        cell.write(&by(0), 0b0011).unwrap();
        cell.write(&by(1), 0b1100).unwrap();
        assert!(cell.write(&by(0), 0b1000).is_err());
    }
}
