//! The disk under the store: it keeps what was appended, shows every record to the history, and fails as told.
//! A failed append may end the server's life; then the record may have reached the disk or not.

use crate::world::World;
use knarr_store::Revision;
use knarr_store::engine::{Engine, EngineError, Marks, Record};
use parking_lot::Mutex;
use rand::Rng;
use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

/// What survives the server.
#[derive(Clone, Default)]
pub struct Disk {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    records: BTreeMap<Revision, Record>,
    marks: Marks,
    /// Removals that a crash may undo: they need not be durable until the next append.
    unsynced: Vec<Record>,
    unsynced_marks: Option<Marks>,
    /// Writes fail until somebody makes room.
    pub full: bool,
}

impl Disk {
    /// The engine of one life of the server.
    pub fn engine(&self, world: &Arc<World>) -> impl Engine + use<> {
        Opened { disk: self.clone(), world: Arc::downgrade(world), dead: false }
    }

    pub fn set_full(&self, full: bool) {
        self.state.lock().full = full;
    }

    /// The power is cut: what was not made durable is as it was before, or not.
    pub fn cut(&self, undo: bool) {
        let mut state = self.state.lock();
        let (records, marks) = (std::mem::take(&mut state.unsynced), state.unsynced_marks.take());
        if undo {
            for record in records {
                state.records.insert(record.revision, record);
            }
            state.marks = marks.unwrap_or(state.marks);
        }
    }

    /// A planted bug: the newest record vanishes although it was acknowledged.
    pub fn lose_newest(&self) {
        self.state.lock().records.pop_last();
    }
}

struct Opened {
    disk: Disk,
    world: Weak<World>,
    /// The server died at an append: whatever of it still runs until the simulation ends its tasks writes no more.
    dead: bool,
}

/// What becomes of an append.
enum Fate {
    Stored,
    /// Refused, nothing stored; the server lives on.
    Refused(&'static str),
    /// The server dies at it.
    Dies {
        stored: bool,
    },
}

impl Opened {
    fn fate(&self, world: &World) -> Fate {
        if self.disk.state.lock().full {
            return Fate::Refused("no space left on device");
        }
        let rates = world.rates();
        let mut dice = world.dice.lock();
        if dice.random_bool(rates.disk_error) {
            return Fate::Refused("input/output error");
        }
        if dice.random_bool(rates.disk_death) {
            return Fate::Dies { stored: dice.random_bool(0.5) };
        }
        Fate::Stored
    }

    fn store(&self, world: &World, records: &[Record]) {
        let mut state = self.disk.state.lock();
        state.unsynced.clear();
        state.unsynced_marks = None;
        for record in records {
            state.marks.highest = state.marks.highest.max(record.revision);
            state.records.insert(record.revision, record.clone());
        }
        drop(state);
        records.iter().for_each(|record| world.recorded(record));
    }
}

impl Engine for Opened {
    fn load(&mut self, visit: &mut dyn FnMut(Record)) -> Result<Marks, EngineError> {
        let state = self.disk.state.lock();
        state.records.values().cloned().for_each(visit);
        Ok(state.marks)
    }

    fn append(&mut self, records: &[Record]) -> Result<(), EngineError> {
        let Some(world) = self.world.upgrade() else {
            return Err(EngineError::Injected("the simulation ended"));
        };
        if self.dead {
            return Err(EngineError::Injected("the server is dead"));
        }
        match self.fate(&world) {
            Fate::Stored => {
                self.store(&world, records);
                Ok(())
            }
            Fate::Refused(why) => {
                world.trace.line("disk", why);
                Err(EngineError::Injected(why))
            }
            Fate::Dies { stored } => {
                world.trace.line(
                    "disk",
                    &format!("the server dies at a write that is {}stored", if stored { "" } else { "not " }),
                );
                if stored {
                    self.store(&world, records);
                }
                self.dead = true;
                world.server_died();
                Err(EngineError::Injected("the server died"))
            }
        }
    }

    fn remove(&mut self, revisions: &[Revision], marks: Marks) -> Result<(), EngineError> {
        if self.dead {
            return Err(EngineError::Injected("the server is dead"));
        }
        let mut state = self.disk.state.lock();
        let before = state.marks;
        state.unsynced_marks.get_or_insert(before);
        for revision in revisions {
            if let Some(record) = state.records.remove(revision) {
                state.unsynced.push(record);
            }
        }
        state.marks = marks;
        Ok(())
    }
}
