//! How much one member's uploads may take at this party.

use trefoil_consortium::wire::UploadBegin;
use trefoil_transport::Pin;

use super::staging::{chunk_bytes, rows_of};
use super::{Catalog, Store, StoreError};

/// Bytes in the megabyte of a configuration.
pub(super) const MEGABYTE: u64 = 1_000_000;

impl Store {
    /// Whether a new upload fits beside what its owner has here; all of it counts from its beginning.
    pub(super) fn check_quota(
        &self,
        catalog: &Catalog,
        owner: Pin,
        begin: &UploadBegin,
    ) -> Result<(), StoreError> {
        let Some(quota) = self.quota_bytes else {
            return Ok(());
        };
        let (used, new) = (catalog.used_bytes(owner), bytes_of(begin));
        if used.saturating_add(new) <= quota {
            return Ok(());
        }
        // Rounded so that the sum is never said to fit.
        let up = |bytes: u64| bytes.div_ceil(MEGABYTE);
        Err(StoreError::Refused(format!(
            "this upload takes {} MB; of this hospital's quota of {} MB here, {} MB are used and {} MB \
             free: withdraw what is not needed, or ask this party for more",
            up(new),
            quota / MEGABYTE,
            up(used),
            quota.saturating_sub(used) / MEGABYTE
        )))
    }
}

fn bytes_of(begin: &UploadBegin) -> u64 {
    let rows = rows_of(begin).unwrap_or_default();
    let chunks = rows.iter().map(|rows| chunk_bytes(&begin.schema, *rows));
    chunks.sum()
}

impl Catalog {
    /// What a member's uploads take, those under way as if they were complete.
    fn used_bytes(&self, owner: Pin) -> u64 {
        let entries = self.datasets.values().flat_map(|entries| entries.values());
        let entries = entries.chain(self.uploads.values());
        let own = entries.filter(|entry| entry.contribution.hospital == owner);
        let committed = own.flat_map(|entry| {
            let chunks = entry.chunks.iter();
            chunks.map(|chunk| chunk_bytes(&entry.schema, chunk.rows))
        });
        let staged = self.staged.iter().filter(|((pin, _), _)| *pin == owner);
        let staged = staged.map(|(_, place)| bytes_of(&place.begin));
        committed.chain(staged).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::super::staging::tests::{anna, begin, bernd, commit, stage};
    use super::*;
    use trefoil_consortium::wire::Withdrawal;

    #[test]
    fn what_is_committed_and_what_is_staged_count_for_their_owner_alone() {
        let home = tempfile::tempdir().unwrap();
        // 2,500 rows of 6 words are 120,000 bytes.
        let store = Store {
            quota_bytes: Some(MEGABYTE),
            ..Store::open(home.path()).unwrap()
        };
        for number in 1..=7 {
            commit(&store, begin(number as u8, number), anna());
        }
        // An eighth that has only begun takes 960,000 in all.
        stage(&store, begin(8, 8), 1);
        let refused = store.begin(begin(9, 9), anna()).unwrap_err().to_string();
        for part in ["takes 1 MB", "quota of 1 MB", "1 MB are used", "0 MB free"] {
            assert!(refused.contains(part), "{part:?} is not in {refused}");
        }
        assert!(store.begin(begin(8, 8), anna()).is_ok(), "it has its place");
        assert!(store.begin(begin(9, 1), bernd()).is_ok());
        store
            .withdraw("shapes", anna(), Withdrawal::One(3), |_| Ok(()))
            .unwrap();
        assert!(store.begin(begin(9, 9), anna()).is_ok());
    }
}
