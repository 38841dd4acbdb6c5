//! Withdrawals: a hospital takes back what it brought to a data set, staged uploads too.
//!
//! The numbers are written down first (`withdrawn/NAME/HOSPITAL.bin`) and never given again: then
//! everything can be repeated, a start finishes what was interrupted, and a party that missed the
//! upload refuses it later all the same. Jobs that read the rows are ended in
//! `members/withdraw.rs`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use trefoil_consortium::check_name;
use trefoil_consortium::wire::{Contribution, Withdrawal};
use trefoil_transport::Pin;

use super::staging::{NUMBERS_END, REMOVED};
use super::{Entry, Store, StoreError, at, file, info, vault::Vault};

/// Longest file of withdrawn numbers.
const MAX_BYTES: u64 = 1 << 20;
/// Most numbers that are kept one by one.
const ONES_MAX: usize = 1 << 16;

/// A hospital's upload numbers in one data set that are withdrawn.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Withdrawn {
    /// All below this.
    below: u64,
    /// And these.
    ones: BTreeSet<u64>,
}

impl Withdrawn {
    pub(super) fn has(&self, number: u64) -> bool {
        number < self.below || self.ones.contains(&number)
    }

    /// The largest of them.
    pub(super) fn last(&self) -> Option<u64> {
        let below = self.below.checked_sub(1).filter(|last| *last > 0);
        self.ones.last().copied().max(below)
    }

    /// Adds numbers; whether there is anything new.
    fn add(&mut self, what: Withdrawal) -> Result<bool, StoreError> {
        let before = self.clone();
        match what {
            Withdrawal::One(number) if (1..NUMBERS_END).contains(&number) => {
                self.ones.insert(number);
            }
            Withdrawal::Below(end) if end <= NUMBERS_END => self.below = self.below.max(end),
            _ => {
                let detail = "there are no uploads of such numbers".into();
                return Err(StoreError::Refused(detail));
            }
        }
        self.ones.retain(|number| *number >= self.below);
        if self.ones.len() > ONES_MAX {
            let detail = format!("{ONES_MAX} uploads are withdrawn one by one: withdraw all");
            return Err(StoreError::Refused(detail));
        }
        Ok(*self != before)
    }
}

/// By data set and hospital.
pub(super) type AllWithdrawn = BTreeMap<(String, Pin), Withdrawn>;

/// What a withdrawal has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Gone {
    /// Numbers of contributions that were part of the data set until now.
    pub(crate) committed: Vec<u64>,
    /// Numbers of staged uploads.
    pub(crate) staged: Vec<u64>,
    /// The data set's snapshot until now.
    pub(crate) before: [u8; 32],
    /// The hospital's contributions that remain.
    pub(crate) left: Vec<Contribution>,
}

/// Reads what earlier runs have noted.
pub(super) fn read_all(home: &std::path::Path, vault: &Vault) -> Result<AllWithdrawn, StoreError> {
    let mut all = AllWithdrawn::new();
    let root = home.join("withdrawn");
    if !root.try_exists().map_err(at(&root))? {
        return Ok(all);
    }
    for folder in file::list(&root)? {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        for path in file::list(&folder)? {
            if path.extension().is_none_or(|ending| ending != "bin") {
                continue; // one that was being written
            }
            let bytes = vault.read(&path, MAX_BYTES)?;
            let read = postcard::from_bytes::<(Pin, Withdrawn)>(&bytes);
            let (hospital, withdrawn) = read.map_err(|err| StoreError::Damaged {
                path: path.clone(),
                detail: err.to_string(),
            })?;
            all.insert((name.clone().into_owned(), hospital), withdrawn);
        }
    }
    Ok(all)
}

impl Store {
    /// Takes a hospital's contributions and staged uploads out of the catalog and sets their files
    /// aside; [`Store::remove_aside`] deletes them, after the jobs that read them were ended. `note` is called with the numbers that
    /// are here before anything changes, where anything does; its error stops the withdrawal.
    pub(crate) fn withdraw(
        &self,
        dataset: &str,
        hospital: Pin,
        what: Withdrawal,
        note: impl FnOnce(&[u64]) -> Result<(), StoreError>,
    ) -> Result<Gone, StoreError> {
        check_name(dataset).map_err(StoreError::Refused)?;
        let gone = {
            let mut catalog = self.lock();
            let mut gone = Gone {
                committed: Vec::new(),
                staged: Vec::new(),
                before: catalog.info(dataset).snapshot,
                left: Vec::new(),
            };
            let entries = catalog.datasets.get(dataset).into_iter().flatten();
            let entries = entries.filter(|((pin, _), _)| *pin == hospital);
            for ((_, number), entry) in entries {
                match what.covers(*number) {
                    true => gone.committed.push(*number),
                    false => gone.left.push(entry.contribution.clone()),
                }
            }
            let staged = catalog.staged.iter().filter(|((pin, _), place)| {
                let begin = &place.begin;
                *pin == hospital && begin.dataset == dataset && what.covers(begin.number)
            });
            let staged: Vec<_> = staged
                .map(|(key, place)| (*key, place.begin.number))
                .collect();
            gone.staged = staged.iter().map(|(_, number)| *number).collect();

            let key = (dataset.to_owned(), hospital);
            let mut withdrawn = catalog.withdrawn.get(&key).cloned().unwrap_or_default();
            let new = withdrawn.add(what)?;
            if new || !gone.committed.is_empty() || !staged.is_empty() {
                note(&[&gone.committed[..], &gone.staged[..]].concat())?;
            }
            if new {
                let folder = self.home.join("withdrawn").join(dataset);
                file::make_folder(&folder)?;
                file::sync_folder(&self.home.join("withdrawn"))?;
                let bytes = postcard::to_stdvec(&(hospital, &withdrawn))
                    .map_err(|err| StoreError::Refused(err.to_string()))?;
                self.vault
                    .write(&folder.join(format!("{hospital}.bin")), &[&bytes])?;
                catalog.withdrawn.insert(key, withdrawn);
            }
            for number in &gone.committed {
                let entries = catalog.datasets.entry(dataset.to_owned()).or_default();
                if let Some(entry) = entries.get(&(hospital, *number)) {
                    self.set_aside(&entry.folder)?;
                    entries.remove(&(hospital, *number));
                }
            }
            for (key, _) in staged {
                let folder = self.staged_folder(&key);
                if folder.try_exists().map_err(at(&folder))? {
                    self.set_aside(&folder)?;
                }
                catalog.staged.remove(&key);
            }
            gone
        };
        Ok(gone)
    }

    /// Removes what was set aside, now or when a removal failed.
    pub(crate) fn remove_aside(&self) -> Result<(), StoreError> {
        for path in file::list(&self.home.join("staging"))? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.starts_with(REMOVED) {
                self.remove_folder(&path)?;
            }
        }
        Ok(())
    }

    /// Finishes withdrawals that were interrupted: removes what a later look has found.
    pub(super) fn finish_withdrawals(&self) -> Result<(), StoreError> {
        let found: Vec<(String, Pin)> = self.lock().withdrawn.keys().cloned().collect();
        for (dataset, hospital) in found {
            let of = |(pin, number): &(Pin, u64)| (*pin == hospital).then_some(*number);
            let numbers: Vec<u64> = {
                let catalog = self.lock();
                let key = (dataset.clone(), hospital);
                let withdrawn = catalog.withdrawn.get(&key).cloned().unwrap_or_default();
                let entries = catalog.datasets.get(&dataset).into_iter().flatten();
                let committed = entries.filter_map(|(key, _)| of(key));
                let staged = catalog.staged.iter().filter_map(|((pin, _), place)| {
                    let of_it = *pin == hospital && place.begin.dataset == dataset;
                    of_it.then_some(place.begin.number)
                });
                let all = committed.chain(staged);
                all.filter(|number| withdrawn.has(*number)).collect()
            };
            for number in numbers {
                tracing::info!(%dataset, %hospital, number, "finished an interrupted withdrawal");
                self.withdraw(&dataset, hospital, Withdrawal::One(number), |_| Ok(()))?;
            }
        }
        self.remove_aside()
    }

    /// Whether contributions are part of a data set.
    pub(crate) fn holds(&self, dataset: &str, contributions: &[(Pin, u64)]) -> bool {
        let catalog = self.lock();
        let entries = catalog.datasets.get(dataset);
        contributions
            .iter()
            .all(|key| entries.is_some_and(|entries| entries.contains_key(key)))
    }
}

impl super::Catalog {
    /// Whether a hospital has withdrawn this number.
    pub(super) fn is_withdrawn(&self, dataset: &str, hospital: Pin, number: u64) -> bool {
        let withdrawn = self.withdrawn.get(&(dataset.to_owned(), hospital));
        withdrawn.is_some_and(|withdrawn| withdrawn.has(number))
    }

    pub(super) fn info(&self, dataset: &str) -> trefoil_consortium::DatasetInfo {
        let entries = self.datasets.get(dataset).into_iter();
        info(&entries.flat_map(BTreeMap::values).collect::<Vec<&Entry>>())
    }
}

#[cfg(test)]
mod tests {
    use super::super::staging::tests::{anna, begin, bernd, commit, stage};
    use super::super::{Found, Store};
    use super::*;

    fn home() -> (tempfile::TempDir, Store) {
        let home = tempfile::tempdir().unwrap();
        let store = Store::open(home.path()).unwrap();
        (home, store)
    }

    fn files(home: &std::path::Path) -> Vec<std::path::PathBuf> {
        let mut all = Vec::new();
        for kind in ["staging", "datasets"] {
            let mut open = vec![home.join(kind)];
            while let Some(folder) = open.pop() {
                for path in file::list(&folder).unwrap() {
                    if path.is_dir() {
                        open.push(path)
                    } else {
                        all.push(path)
                    }
                }
            }
        }
        all
    }

    fn withdraw(store: &Store, what: Withdrawal) -> Gone {
        let gone = store.withdraw("shapes", anna(), what, |_| Ok(())).unwrap();
        store.remove_aside().unwrap();
        gone
    }

    #[test]
    fn what_is_withdrawn_is_gone_for_good_and_nobody_elses_is() {
        let (home, store) = home();
        commit(&store, begin(1, 1), anna());
        commit(&store, begin(2, 2), anna());
        commit(&store, begin(3, 1), bernd());
        stage(&store, begin(4, 3), 2);
        let all = files(home.path()).len();
        let before = store.dataset("shapes").unwrap();
        assert_eq!(before.contributions.len(), 3);

        let gone = withdraw(&store, Withdrawal::One(1));
        assert_eq!((gone.committed, gone.staged.len()), (vec![1], 0));
        assert_eq!(gone.before, before.snapshot);
        assert_eq!(gone.left.len(), 1);
        assert_eq!(files(home.path()).len(), all - 5);
        let after = store.dataset("shapes").unwrap();
        assert_ne!(after.snapshot, before.snapshot);
        assert!(!store.holds("shapes", &[(anna(), 1)]) && store.holds("shapes", &[(bernd(), 1)]));
        // Again: nothing more happens, and nothing is noted.
        let again = store.withdraw("shapes", anna(), Withdrawal::One(1), |_| {
            panic!("noted twice")
        });
        assert_eq!(again.unwrap().left, gone.left);

        let gone = withdraw(
            &store,
            Withdrawal::Below(store.next_number("shapes", anna()).unwrap()),
        );
        assert_eq!(
            (gone.committed, gone.staged, gone.left),
            (vec![2], vec![3], vec![])
        );
        assert_eq!(files(home.path()).len(), 5, "Bernd's chunks and records");
        // The numbers are spent, here and after a restart.
        for store in [store, Store::open(home.path()).unwrap()] {
            assert_eq!(store.next_number("shapes", anna()).unwrap(), 4);
            assert_eq!(store.next_number("shapes", bernd()).unwrap(), 2);
            for (name, number) in [(1, 1), (9, 1), (4, 3)] {
                let refused = store.begin(begin(name, number), anna());
                assert!(
                    matches!(refused, Err(StoreError::NumberTaken(_))),
                    "{number}"
                );
            }
        }
    }

    #[test]
    fn a_number_that_never_came_here_is_withdrawn_all_the_same() {
        let (_home, store) = home();
        withdraw(&store, Withdrawal::One(7));
        let refused = store.begin(begin(1, 7), anna());
        assert!(matches!(refused, Err(StoreError::NumberTaken(7))));
        assert_eq!(store.next_number("shapes", anna()).unwrap(), 8);
        for wrong in [
            Withdrawal::One(0),
            Withdrawal::One(u64::MAX),
            Withdrawal::Below(u64::MAX),
        ] {
            assert!(store.withdraw("shapes", anna(), wrong, |_| Ok(())).is_err());
        }
        assert!(
            store
                .withdraw("../shapes", anna(), Withdrawal::One(1), |_| Ok(()))
                .is_err()
        );
    }

    #[test]
    fn an_upload_under_way_ends_and_leaves_nothing() {
        let (home, store) = home();
        let Found::Staged(mut staging) = store.begin(begin(1, 1), anna()).unwrap() else {
            panic!("it is new");
        };
        for number in 0..3 {
            staging
                .stage(super::super::staging::tests::chunk(number, 5))
                .unwrap();
        }
        withdraw(&store, Withdrawal::Below(2));
        let refused = staging.stage(super::super::staging::tests::chunk(2, 6));
        assert!(refused.unwrap_err().to_string().contains("withdrawn"));
        assert!(store.commit(&staging, [0; 32]).is_err());
        drop(staging);
        assert_eq!(files(home.path()), Vec::<std::path::PathBuf>::new());
    }

    #[test]
    fn a_deletion_that_failed_is_made_up_for_by_the_next_attempt_or_start() {
        for again in [true, false] {
            let (home, store) = home();
            commit(&store, begin(1, 1), anna());
            let what = Withdrawal::One(1);
            // The rows are out of the catalog, and their files are still there.
            let gone = store.withdraw("shapes", anna(), what, |_| Ok(())).unwrap();
            assert_eq!(gone.committed, [1]);
            assert!(!store.holds("shapes", &[(anna(), 1)]) && !files(home.path()).is_empty());
            if again {
                let gone = withdraw(&store, what);
                assert!(gone.committed.is_empty() && gone.staged.is_empty());
            } else {
                drop(store);
                Store::open(home.path()).unwrap();
            }
            assert_eq!(files(home.path()), Vec::<std::path::PathBuf>::new());
        }
    }

    #[test]
    fn a_withdrawal_that_was_interrupted_is_finished_at_the_next_start() {
        let (home, store) = home();
        commit(&store, begin(1, 1), anna());
        stage(&store, begin(2, 2), 1);
        // Noted, and then the machine went down.
        let mut withdrawn = Withdrawn::default();
        withdrawn.add(Withdrawal::Below(3)).unwrap();
        let bytes = postcard::to_stdvec(&(anna(), &withdrawn)).unwrap();
        let folder = home.path().join("withdrawn/shapes");
        file::make_folder(&folder).unwrap();
        let path = folder.join(format!("{}.bin", anna()));
        store.vault.write(&path, &[&bytes]).unwrap();
        drop(store);
        let store = Store::open(home.path()).unwrap();
        assert_eq!(store.dataset("shapes").unwrap().schema, None);
        assert_eq!(files(home.path()), Vec::<std::path::PathBuf>::new());
    }

    #[test]
    fn a_withdrawal_that_cannot_be_noted_does_not_happen() {
        let (_home, store) = home();
        commit(&store, begin(1, 1), anna());
        let what = Withdrawal::One(1);
        let no = |_: &[u64]| Err(StoreError::Refused("the disk is full".into()));
        assert!(store.withdraw("shapes", anna(), what, no).is_err());
        assert!(store.holds("shapes", &[(anna(), 1)]));
        assert_eq!(store.next_number("shapes", anna()).unwrap(), 2);
    }
}
