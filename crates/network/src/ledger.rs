//! Every change made to the host, written down before it is made.
//!
//! Taking everything back means walking the ledger backwards; proving that nothing is left means looking
//! for each thing it ever named. The ledger lives as long as the changes: until the next boot.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::state::StateFile;

/// The host's changes, kept in one file.
pub struct Ledger {
    file: StateFile<Vec<Change>>,
}

/// One change to the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Change {
    /// A kernel setting below `/proc/sys`, and what it was before us.
    Sysctl { path: String, before: String, after: String },
    /// A network device we made; deleting it takes its addresses, routes and settings along.
    Device { name: String },
    /// An `inet` table in nftables we made.
    Table { name: String },
}

impl Ledger {
    /// The ledger kept in `dir`.
    pub fn new(dir: &Path) -> Ledger {
        Ledger { file: StateFile::new(dir, "changes.json") }
    }

    /// Writes a change down; call it before making the change. Something already written down keeps its
    /// first entry, so the state before *us* survives restarts.
    pub fn record(&self, change: Change) -> Result<()> {
        self.file.update(|changes| {
            if !changes.iter().any(|known| known.same_thing(&change)) {
                changes.push(change);
            }
            Ok(())
        })
    }

    /// Strikes a change that was taken back.
    pub fn strike(&self, change: &Change) -> Result<()> {
        self.file.update(|changes| {
            changes.retain(|known| !known.same_thing(change));
            Ok(())
        })
    }

    /// All changes, oldest first.
    pub fn changes(&self) -> Result<Vec<Change>> {
        self.file.read()
    }
}

impl Change {
    fn same_thing(&self, other: &Change) -> bool {
        match (self, other) {
            (Change::Sysctl { path: a, .. }, Change::Sysctl { path: b, .. }) => a == b,
            (a, b) => a == b,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_value_before_us_survives_a_second_start() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path());
        let change = |before: &str| Change::Sysctl {
            path: "net/ipv4/ip_forward".into(),
            before: before.into(),
            after: "1".into(),
        };
        ledger.record(change("0")).unwrap();
        ledger.record(change("1")).unwrap();
        assert_eq!(ledger.changes().unwrap(), [change("0")]);
        ledger.strike(&change("1")).unwrap();
        assert!(ledger.changes().unwrap().is_empty());
    }
}
