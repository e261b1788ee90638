//! The last accesses to a word of memory, as far as a later one may race with them.
//!
//! Remembered are who wrote each byte last, and all who read it since, save those whom a later reader had
//! heard of. Readers of a warp in one epoch are one group, so there are rarely more groups than warps. Of a
//! word that nobody has written in the launch two groups are kept: enough to find that somebody writes what
//! others read, and many may read it. Of accesses that are atomic with each other, the last is kept.

use crate::clock::{Accessor, Stamp};

/// Groups that are kept at most; beyond that the oldest is forgotten.
const MOST: usize = 64;

/// Threads of one warp that accessed a word in one epoch, and which bytes of it.
#[derive(Clone, Copy, Debug)]
struct Group {
    /// As if it were lane 0.
    stamp: Stamp,
    lanes: u32,
    bytes: u8,
    wrote: bool,
}

impl Group {
    fn new(by: Stamp, bytes: u8, wrote: bool) -> Self {
        Self { stamp: by.of_lane(0), lanes: 1 << by.lane(), bytes, wrote }
    }

    fn stamps(self) -> impl Iterator<Item = Stamp> {
        let mut rest = self.lanes;
        std::iter::from_fn(move || {
            let lane = rest.trailing_zeros();
            rest &= rest.checked_sub(1)?;
            Some(self.stamp.of_lane(lane))
        })
    }

    /// That a later access to some bytes does not race with this group.
    fn admits(self, by: &Accessor<'_>, bytes: u8) -> Result<(), Conflict> {
        let found = if self.bytes & bytes == 0 { None } else { self.stamps().find(|stamp| by.races(*stamp)) };
        found.map_or(Ok(()), |other| Err(Conflict { other, wrote: self.wrote }))
    }

    /// The lanes that need not be remembered beside a later reader: those it had heard of, and itself.
    fn remains(mut self, by: &Accessor<'_>, reader: Self) -> Self {
        let replaces = self.bytes & !reader.bytes == 0 && (self.stamp.strong() || !reader.stamp.strong());
        if replaces {
            if self.stamp.is_same_warp(reader.stamp) {
                self.lanes &= !reader.lanes;
            }
            if self.stamps().all(|stamp| by.follows(stamp)) {
                self.lanes = 0;
            }
        }
        self
    }
}

/// An access that nothing orders against the present one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Conflict {
    pub(crate) other: Stamp,
    pub(crate) wrote: bool,
}

/// Groups that a cell has no place for. Most cells have none, and a cell should be small.
#[derive(Clone, Debug, Default)]
struct Others {
    groups: Vec<Group>,
}

/// The last accesses to four bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Cell {
    writer: Stamp,
    /// Two groups of readers, the later first; a place without lanes is free.
    readers: [Stamp; 2],
    lanes: [u32; 2],
    read: [u8; 2],
    written: u8,
    /// Whether there are writers among the others.
    split: bool,
    /// Further groups of readers, and of who wrote bytes that the writer did not.
    others: Option<Box<Others>>,
}

impl Cell {
    /// Notes a read of the bytes in `mask`.
    #[inline]
    pub(crate) fn read(&mut self, by: &Accessor<'_>, mask: u8) -> Result<(), Conflict> {
        self.read_by_engine(by, by.stamp, mask)
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
        let warp = engine.of_lane(0);
        if self.readers[0] == warp && self.read[0] == mask && self.lanes[0] != 0 && !self.split {
            self.lanes[0] |= 1 << engine.lane();
            return Ok(());
        }
        self.note_reader(by, Group::new(engine, mask, false))
    }

    fn reader(&self, place: usize) -> Group {
        let (stamp, lanes, bytes) = (self.readers[place], self.lanes[place], self.read[place]);
        Group { stamp, lanes, bytes, wrote: false }
    }

    fn set_reader(&mut self, place: usize, group: Group) {
        (self.readers[place], self.lanes[place], self.read[place]) = (group.stamp, group.lanes, group.bytes);
    }

    /// A reader in a group other than the last: that comes first now.
    #[inline(never)]
    fn note_reader(&mut self, by: &Accessor<'_>, mut reader: Group) -> Result<(), Conflict> {
        if let (true, Some(others)) = (self.split, &self.others) {
            others
                .groups
                .iter()
                .filter(|group| group.wrote)
                .try_for_each(|group| group.admits(by, reader.bytes))?;
        }
        // Those of its own group join it, others are left out where it stands for them.
        let new = reader;
        let mut remains = |group: Group| {
            if group.wrote || group.lanes == 0 {
                return group;
            }
            if group.stamp == new.stamp && group.bytes == new.bytes {
                reader.lanes |= group.lanes;
                return Group { lanes: 0, ..group };
            }
            group.remains(by, new)
        };
        let kept = [0, 1].map(|place| remains(self.reader(place)));
        if let Some(others) = &mut self.others {
            others.groups.retain_mut(|group| {
                *group = remains(*group);
                group.lanes != 0
            });
        }
        self.set_reader(0, reader);
        match kept {
            [first, second] if first.lanes == 0 => self.set_reader(1, second),
            [first, second] => {
                self.set_reader(1, first);
                if second.lanes != 0 && self.is_written() {
                    self.remember(second);
                }
            }
        }
        Ok(())
    }

    fn remember(&mut self, group: Group) {
        let groups = &mut self.others.get_or_insert_default().groups;
        if groups.len() == MOST {
            groups.remove(0);
        }
        self.split |= group.wrote;
        groups.push(group);
    }

    /// Notes a write of the bytes in `mask`.
    #[inline]
    pub(crate) fn write(&mut self, by: &Accessor<'_>, mask: u8) -> Result<(), Conflict> {
        self.write_by_engine(by, by.stamp, mask)
    }

    /// Notes that an engine writes for a thread: it may where the thread may, and is who has written.
    #[inline]
    pub(crate) fn write_by_engine(
        &mut self,
        by: &Accessor<'_>,
        engine: Stamp,
        mask: u8,
    ) -> Result<(), Conflict> {
        if self.written & mask != 0 && by.races(self.writer) {
            return Err(Conflict { other: self.writer, wrote: true });
        }
        for place in 0..2 {
            if self.lanes[place] != 0 {
                self.reader(place).admits(by, mask)?;
                self.read[place] &= !mask;
                if self.read[place] == 0 {
                    self.lanes[place] = 0;
                }
            }
        }
        if self.others.is_some() || self.written & !mask != 0 {
            self.note_part(by, mask)?;
        }
        self.writer = engine;
        self.written = mask;
        Ok(())
    }

    /// What a write of some bytes leaves of the others.
    #[inline(never)]
    fn note_part(&mut self, by: &Accessor<'_>, mask: u8) -> Result<(), Conflict> {
        if let Some(Others { groups }) = self.others.as_deref_mut() {
            groups.iter().try_for_each(|group| group.admits(by, mask))?;
            groups.retain_mut(|group| {
                group.bytes &= !mask;
                group.bytes != 0
            });
            self.split = groups.iter().any(|group| group.wrote);
        }
        if self.written & !mask != 0 {
            self.remember(Group::new(self.writer, self.written & !mask, true));
        }
        Ok(())
    }

    /// Whether one of those who wrote the bytes in `mask` last is such a writer.
    #[inline]
    pub(crate) fn any_writer(&self, mask: u8, is_such: impl Fn(Stamp) -> bool) -> bool {
        if self.written & mask != 0 && is_such(self.writer) {
            return true;
        }
        let others = self.others.iter().filter(|_| self.split).flat_map(|others| &others.groups);
        let mut others = others.filter(|group| group.wrote && group.bytes & mask != 0);
        self.split && others.any(|group| group.stamps().any(&is_such))
    }

    /// Who wrote all four bytes last, if that was one thread.
    pub(crate) fn only_writer(&self) -> Option<Stamp> {
        Some(self.writer).filter(|_| self.written == 0xf && !self.split)
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
    use crate::clock::Clock;

    fn stamp(thread: u32, epoch: u32) -> Stamp {
        Stamp::new(0, thread, epoch, false)
    }

    /// A clock of a thread that has heard of these threads up to epoch 1.
    fn heard(threads: &[u32]) -> Clock {
        let mut clock = Clock::new(0, 1024);
        threads.iter().for_each(|thread| clock.set(*thread, 1));
        clock
    }

    #[test]
    fn orders_what_was_heard() {
        let mut cell = Cell::default();
        let nobody = heard(&[]);
        cell.write(&Accessor { clock: &nobody, stamp: stamp(1, 1) }, 0xf).unwrap();
        assert!(cell.read(&Accessor { clock: &nobody, stamp: stamp(0, 1) }, 0xf).is_err());
        assert!(cell.read(&Accessor { clock: &nobody, stamp: stamp(1, 2) }, 0xf).is_ok());
        assert!(cell.read(&Accessor { clock: &heard(&[1]), stamp: stamp(0, 1) }, 0xf).is_ok());
        // The other thread has not heard of that read.
        assert!(cell.write(&Accessor { clock: &nobody, stamp: stamp(1, 3) }, 0xf).is_err());
    }

    #[test]
    fn tells_bytes_apart() {
        let clock = heard(&[]);
        let mut cell = Cell::default();
        let by = |thread| Accessor { clock: &clock, stamp: stamp(thread, 1) };
        cell.write(&by(0), 0b0011).unwrap();
        cell.write(&by(1), 0b1100).unwrap();
        assert!(cell.write(&by(0), 0b1000).is_err());
        // Neither writer is forgotten.
        for (reader, mask, races) in
            [(0, 0b0011, false), (0, 0b0100, true), (1, 0b1000, false), (1, 0b0010, true), (2, 0b0001, true)]
        {
            assert_eq!(cell.clone().read(&by(reader), mask).is_err(), races, "{reader} {mask:04b}");
            assert_eq!(cell.clone().write(&by(reader), mask).is_err(), races, "{reader} {mask:04b}");
        }
        for (mask, writers) in [(0b0010, [true, false]), (0b0110, [true, true]), (0b1000, [false, true])] {
            let found = [0, 1].map(|thread| cell.any_writer(mask, |writer| writer == stamp(thread, 1)));
            assert_eq!(found, writers, "{mask:04b}");
        }
    }

    /// Whichever reader the next writer has not heard of, it is found.
    #[test]
    fn remembers_every_reader() {
        let readers: Vec<u32> = (0..20).map(|n| n * 37 % 512).collect();
        for missing in &readers {
            let mut cell = Cell::default();
            cell.write(&Accessor { clock: &heard(&[]), stamp: stamp(600, 1) }, 0xf).unwrap();
            for reader in &readers {
                cell.read(&Accessor { clock: &heard(&[600]), stamp: stamp(*reader, 1) }, 0xf).unwrap();
            }
            let others: Vec<u32> = readers.iter().copied().filter(|reader| reader != missing).collect();
            let conflict = cell.clone().write(
                &Accessor { clock: &heard(&[&others[..], &[600]].concat()), stamp: stamp(601, 1) },
                0xf,
            );
            assert_eq!(conflict.unwrap_err().other, stamp(*missing, 1));
            cell.write(
                &Accessor { clock: &heard(&[&readers[..], &[600]].concat()), stamp: stamp(601, 1) },
                0xf,
            )
            .unwrap();
        }
    }

    #[test]
    fn forgets_readers_that_a_later_one_heard_of() {
        let mut cell = Cell::default();
        cell.write(&Accessor { clock: &heard(&[]), stamp: stamp(600, 1) }, 0xf).unwrap();
        for round in 1..100 {
            for warp in 0..8 {
                let mut clock = heard(&[600]);
                (0..512).for_each(|thread| clock.set(thread, round - 1));
                for lane in 0..32 {
                    cell.read(&Accessor { clock: &clock, stamp: stamp(warp * 32 + lane, round) }, 0xf)
                        .unwrap();
                }
            }
            assert_eq!(cell.others.as_ref().unwrap().groups.len(), 6);
        }
    }
}
