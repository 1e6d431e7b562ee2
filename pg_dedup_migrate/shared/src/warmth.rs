//! Whether the filter may be believed when it says "absent".
//!
//! After a restart the filter is empty. It is *cold* for a database's segment table until
//! everything in that table has been read into it: then it is *warm*. Three parties act here:
//!
//! - *claims* set filter bits, cold or warm, so what they write is covered from the start;
//! - a *warm-up* calls [`Warmth::begin_warm_up`], then takes a snapshot, sets the bits of every entry that
//!   the snapshot shows, and calls [`Warmth::end_warm_up`];
//! - a *stranger* is a transaction that brings in entries in any other way (restore, logical apply, by
//!   hand). It [marks](Warmth::mark) the table before its first entry, and [settles](Warmth::settle) after it has
//!   become visible to others.
//!
//! # Why warm is right
//!
//! Say a stranger *S* had committed an entry whose bits are not set when a reader asked, and the answer was
//! "warm". *S* marked before it wrote. Until it settled, its mark kept the answer at "cold"; when it
//! settled it made the table cold under a new generation. So a warm-up ended after that, and it also began after
//! that, because a generation from before does not count at the end. *S* was visible to everybody before
//! it settled, so the warm-up's snapshot showed *S*, and it set the bits: a contradiction.
//!
//! An *S* that commits after the reader asked is later than the reader, as it would be without any filter.
//! A reader therefore asks *after* its sweep, before it relies on an "absent" of the filter, and not earlier.
//!
//! The table has a fixed number of places. Where there is none left, the answer is "cold", which is slow
//! and always right; strangers that got no place are counted, and nothing at all is warm meanwhile.

/// Places for segment tables.
pub const PLACES: usize = 64;

/// A segment table of a database, by their OIDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[repr(C)]
pub struct Area {
    /// The database's OID.
    pub database: u32,
    /// The OID of its table `dedup.segment`.
    pub segment: u32,
}

/// A warm-up that is on its way; worthless once its table has been marked cold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a warm-up counts only when it is ended"]
pub struct Generation {
    area: Area,
    number: u64,
}

/// How a stranger was noted down; needed to settle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a mark keeps the filter cold until it is settled"]
pub struct Mark {
    area: Area,
    placed: bool,
}

impl Mark {
    /// What was marked.
    pub fn area(self) -> Area {
        self.area
    }
}

/// What is known of all segment tables. All zero is the state after a restart. To be used under a lock.
#[derive(Debug)]
#[repr(C)]
pub struct Warmth {
    /// The last generation number given out.
    generation: u64,
    /// Strangers in flight that found no place.
    unplaced: u64,
    places: [Place; PLACES],
}

#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Place {
    area: Area,
    /// Changes whenever the table is marked cold; 0 in a free place.
    generation: u64,
    /// Strangers in flight.
    dirty: u32,
    /// 1 after a warm-up that still holds.
    warm: u32,
}

impl Default for Warmth {
    fn default() -> Self {
        Self { generation: 0, unplaced: 0, places: [Place::default(); PLACES] }
    }
}

impl Warmth {
    /// Whether the filter covers everything that is committed in this table.
    pub fn is_warm(&self, area: Area) -> bool {
        self.unplaced == 0 && self.find(area).is_some_and(|place| place.warm == 1 && place.dirty == 0)
    }

    /// Begins a warm-up; the snapshot it reads with must be taken after this. `None`: no place, stay cold.
    pub fn begin_warm_up(&mut self, area: Area) -> Option<Generation> {
        let number = self.place(area)?.generation;
        Some(Generation { area, number })
    }

    /// Gives the places of databases free that are gone.
    pub fn forget(&mut self, is_gone: impl Fn(u32) -> bool) {
        let gone =
            |place: &&mut Place| place.generation != 0 && place.dirty == 0 && is_gone(place.area.database);
        self.places.iter_mut().filter(gone).for_each(|place| *place = Place::default());
    }

    /// Ends a warm-up: every entry its snapshot showed is in the filter. `false` if the table was marked cold
    /// meanwhile, so that the work must be done anew.
    pub fn end_warm_up(&mut self, generation: Generation) -> bool {
        match self.find_mut(generation.area) {
            Some(place) if place.generation == generation.number => {
                place.warm = 1;
                true
            }
            _ => false,
        }
    }

    /// A stranger is about to bring in entries: cold until it is settled.
    pub fn mark(&mut self, area: Area) -> Mark {
        let placed = match self.place(area) {
            Some(place) => {
                place.dirty += 1;
                true
            }
            None => {
                self.unplaced += 1;
                false
            }
        };
        Mark { area, placed }
    }

    /// A stranger has ended, and if it committed its entries are visible to others already.
    pub fn settle(&mut self, mark: Mark, committed: bool) {
        let generation = self.generation + 1;
        if let Some(place) = self.find_mut(mark.area) {
            if mark.placed {
                place.dirty = place.dirty.saturating_sub(1);
            }
            if committed {
                place.warm = 0;
                place.generation = generation;
                self.generation = generation;
            }
        }
        if !mark.placed {
            self.unplaced = self.unplaced.saturating_sub(1);
        }
    }

    /// How many segment tables are warm.
    pub fn warm_areas(&self) -> usize {
        self.places.iter().filter(|place| place.generation != 0 && self.is_warm(place.area)).count()
    }

    fn find(&self, area: Area) -> Option<&Place> {
        self.places.iter().find(|place| place.generation != 0 && place.area == area)
    }

    fn find_mut(&mut self, area: Area) -> Option<&mut Place> {
        self.places.iter_mut().find(|place| place.generation != 0 && place.area == area)
    }

    /// The place of this table, or a new one: a free one, else one that says nothing but "cold", since a
    /// table without a place is cold too.
    fn place(&mut self, area: Area) -> Option<&mut Place> {
        let known = self.places.iter().position(|place| place.generation != 0 && place.area == area);
        if let Some(index) = known {
            return Some(&mut self.places[index]);
        }
        let index = (self.places.iter().position(|place| place.generation == 0))
            .or_else(|| self.places.iter().position(|place| place.warm == 0 && place.dirty == 0))?;
        self.generation += 1;
        self.places[index] = Place { area, generation: self.generation, dirty: 0, warm: 0 };
        Some(&mut self.places[index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(segment: u32) -> Area {
        Area { database: 5, segment }
    }

    fn warm_up(warmth: &mut Warmth, area: Area) -> bool {
        warmth.begin_warm_up(area).is_some_and(|generation| warmth.end_warm_up(generation))
    }

    #[test]
    fn warm_after_a_warm_up_and_only_there() {
        let mut warmth = Warmth::default();
        assert!(!warmth.is_warm(area(1)));
        assert!(warm_up(&mut warmth, area(1)));
        assert!(warmth.is_warm(area(1)));
        assert!(!warmth.is_warm(area(2)));
        assert!(!warmth.is_warm(Area { database: 6, segment: 1 }));
        assert_eq!(warmth.warm_areas(), 1);
    }

    #[test]
    fn places_of_databases_that_are_gone_are_free() {
        let mut warmth = Warmth::default();
        let of = |database: u32| Area { database, segment: 1 };
        for database in 1..=PLACES as u32 {
            assert!(warm_up(&mut warmth, of(database)));
        }
        assert!(!warm_up(&mut warmth, of(1000)));
        warmth.forget(|database| database == 7);
        assert!(warm_up(&mut warmth, of(1000)));
        assert!(!warmth.is_warm(of(7)));
        assert!(warmth.is_warm(of(8)));
    }

    #[test]
    fn a_stranger_keeps_it_cold_and_leaves_it_cold_if_it_commits() {
        let mut warmth = Warmth::default();
        assert!(warm_up(&mut warmth, area(1)));
        let first = warmth.mark(area(1));
        let second = warmth.mark(area(1));
        assert!(!warmth.is_warm(area(1)));
        warmth.settle(first, false);
        assert!(!warmth.is_warm(area(1)));
        warmth.settle(second, false);
        assert!(warmth.is_warm(area(1)));
        let third = warmth.mark(area(1));
        warmth.settle(third, true);
        assert!(!warmth.is_warm(area(1)));
    }

    #[test]
    fn a_warm_up_that_a_stranger_overtakes_does_not_count() {
        let mut warmth = Warmth::default();
        let mark = warmth.mark(area(1));
        let early = warmth.begin_warm_up(area(1)).unwrap();
        warmth.settle(mark, true);
        assert!(!warmth.end_warm_up(early));
        assert!(!warmth.is_warm(area(1)));
        assert!(warm_up(&mut warmth, area(1)));
    }

    #[test]
    fn a_warm_up_that_ends_before_the_stranger_waits_for_it() {
        let mut warmth = Warmth::default();
        let mark = warmth.mark(area(1));
        assert!(warm_up(&mut warmth, area(1)));
        assert!(!warmth.is_warm(area(1)));
        warmth.settle(mark, true);
        assert!(!warmth.is_warm(area(1)));
    }

    #[test]
    fn a_full_table_is_never_warm_for_others_and_cold_places_are_used_again() {
        let mut warmth = Warmth::default();
        for segment in 0..PLACES as u32 {
            assert!(warm_up(&mut warmth, area(segment)));
        }
        assert_eq!(warmth.begin_warm_up(area(1000)), None);
        let unplaced = warmth.mark(area(1000));
        assert!(!warmth.is_warm(area(0)));
        // A place falls free while the unplaced stranger is in flight; its table is warmed up in it.
        let mark = warmth.mark(area(3));
        warmth.settle(mark, true);
        let generation = warmth.begin_warm_up(area(1000)).unwrap();
        assert!(warmth.end_warm_up(generation));
        assert!(!warmth.is_warm(area(1000)));
        warmth.settle(unplaced, true);
        assert!(!warmth.is_warm(area(1000)));
        assert!(warmth.is_warm(area(0)));
        assert_eq!(warmth.begin_warm_up(area(3)).map(|g| g.area), Some(area(3)));
        assert!(!warmth.end_warm_up(generation), "its place belongs to another table now");
    }
}
