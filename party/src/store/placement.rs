//! Where the files of a committed upload lie: in its folder, or, where the configuration names a
//! bucket, there, with a bounded cache in the home.
//!
//! A file that lies in the folder is read there: contributions from before a bucket was configured
//! stay. What lies in the bucket is fetched when a job reads it, and kept until others need the room.
//! Objects are put before an upload is committed and deleted before its folder is: whatever is
//! interrupted, the folder still says which objects there are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use trefoil_consortium::config::StoreConfig;
use trefoil_consortium::host;
use trefoil_transport::Pin;

use super::staging::{CHUNK_FILE_MAX_BYTES, chunk_bytes};
use super::upload::{COMMIT_FILE, chunk_path, read_entry};
use super::{Bucket, Entry, Staging, Store, StoreError, at, contribution_name, file, upload_name};

/// Copies of objects, by upload.
pub(super) const CACHE: &str = "cache";
/// What a sealed file has beyond its payload is less than this part of it, and this many bytes.
const SEALING: (u64, u64) = (256, 4096);

/// The files of one upload that a job reads, in the chunks' order.
#[derive(Debug)]
pub(super) struct Files {
    pub(super) chunks: Vec<PathBuf>,
    /// Whether they are copies of objects.
    copies: bool,
}

impl Store {
    /// Puts what is about to be committed into the bucket, its record last.
    pub(super) fn put_committed(&self, staging: &Staging) -> Result<(), StoreError> {
        let Some(bucket) = &self.bucket else {
            return Ok(());
        };
        let folder = staging.folder();
        let chunks = 0..staging.chunks().len();
        let mut files: Vec<PathBuf> = chunks.map(|number| chunk_path(folder, number)).collect();
        files.push(folder.join(COMMIT_FILE));
        bucket.put_upload(staging.owner(), &staging.begin().upload, &files)
    }

    /// Deletes the objects of an upload that could not be committed. What fails is repeated when its
    /// staged folder goes.
    pub(super) fn take_back(&self, staging: &Staging) {
        if let Some(bucket) = &self.bucket
            && let Err(err) = bucket.remove(staging.owner(), &staging.begin().upload)
        {
            tracing::warn!(%err, "objects of an upload that was not committed are still in the bucket");
        }
    }

    /// Frees the folder of an upload that was put into the bucket and committed.
    pub(super) fn drop_local(&self, entry: &Entry) {
        if self.bucket.is_none() {
            return;
        }
        for number in 0..entry.chunks.len() {
            let path = chunk_path(&entry.folder, number);
            if let Err(err) = fs::remove_file(&path) {
                // It is read here then, and not in the bucket.
                tracing::warn!(path = %path.display(), %err, "a chunk that is in the bucket stays here too");
            }
        }
    }

    /// Removes a folder that was set aside, its upload's objects and copies before it.
    pub(super) fn remove_folder(&self, folder: &Path) -> Result<(), StoreError> {
        match read_entry(folder, &self.vault) {
            Ok(entry) => {
                self.remove_objects(&entry)?;
                // First of all: without it what is left is of no upload that lies elsewhere.
                let record = folder.join(COMMIT_FILE);
                match fs::remove_file(&record) {
                    Err(err) if err.kind() != io::ErrorKind::NotFound => {
                        return Err(at(&record)(err));
                    }
                    _ => {}
                }
            }
            // Staged and never committed: nothing of it is anywhere else.
            Err(StoreError::File { .. }) => {}
            Err(err) => {
                tracing::warn!(%err, "objects of this upload may still be in the bucket");
            }
        }
        match fs::remove_dir_all(folder) {
            // Another thread removes it too.
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(at(folder)(err)),
            _ => Ok(()),
        }
    }

    fn remove_objects(&self, entry: &Entry) -> Result<(), StoreError> {
        match &self.bucket {
            Some(bucket) => bucket.remove(entry.contribution.hospital, &entry.upload)?,
            None if entry.is_whole() => {}
            // Another thread is removing it.
            None if !entry.folder.join(COMMIT_FILE).exists() => {}
            None => return Err(self.no_bucket(entry)),
        }
        // After the objects: a job that was being prepared may have fetched some meanwhile.
        let copies = self.copies(entry);
        match fs::remove_dir_all(&copies) {
            Err(err) if err.kind() != io::ErrorKind::NotFound => Err(at(&copies)(err)),
            _ => Ok(()),
        }
    }

    fn no_bucket(&self, entry: &Entry) -> StoreError {
        StoreError::Refused(format!(
            "the shares of upload {} of {} lie in a bucket, and [store] has no url: put it back",
            entry.contribution.number, entry.contribution.hospital
        ))
    }

    fn copies(&self, entry: &Entry) -> PathBuf {
        let name = upload_name(&entry.upload);
        let owner = contribution_name(entry.contribution.hospital, entry.contribution.number);
        self.home.join(CACHE).join(format!("{owner}-{name}"))
    }

    /// The files of an upload, fetched where they are not here.
    pub(super) fn files(&self, entry: &Entry) -> Result<Files, StoreError> {
        let numbers = 0..entry.chunks.len();
        if entry.is_whole() {
            let chunks = numbers.map(|number| chunk_path(&entry.folder, number));
            return Ok(Files {
                chunks: chunks.collect(),
                copies: false,
            });
        }
        let Some(bucket) = &self.bucket else {
            return Err(self.no_bucket(entry));
        };
        let folder = self.copies(entry);
        let chunks: Vec<PathBuf> = numbers.map(|number| chunk_path(&folder, number)).collect();
        let missing: Vec<&PathBuf> = chunks.iter().filter(|path| !path.exists()).collect();
        if !missing.is_empty() {
            file::make_folder(&folder)?;
        }
        for path in missing {
            let max_bytes = CHUNK_FILE_MAX_BYTES + CHUNK_FILE_MAX_BYTES / SEALING.0 + SEALING.1;
            bucket.fetch(entry.contribution.hospital, &entry.upload, path, max_bytes)?;
        }
        Ok(Files {
            chunks,
            copies: true,
        })
    }

    /// An error about a copy is one about its object; the copy goes, so that the next job fetches it
    /// anew.
    pub(super) fn about_object(&self, entry: &Entry, files: &Files, err: StoreError) -> StoreError {
        match (err, &self.bucket) {
            (StoreError::Damaged { path, detail }, Some(bucket)) if files.copies => {
                if let Err(err) = fs::remove_file(&path) {
                    tracing::warn!(path = %path.display(), %err, "a damaged copy stays");
                }
                let hospital = entry.contribution.hospital;
                StoreError::Damaged {
                    path: bucket.object_name(hospital, &entry.upload, &path),
                    detail,
                }
            }
            (err, _) => err,
        }
    }

    /// Removes copies that no job reads, oldest first, until what these uploads lack is within the
    /// cache's bound; checks that the disk has room for it. The caller holds [`Store::reads`] already.
    pub(super) fn make_room(&self, wanted: &[&Entry]) -> Result<(), StoreError> {
        let remote = wanted.iter().filter(|entry| !entry.is_whole());
        let wanted: Vec<(PathBuf, u64)> = remote
            .map(|entry| (self.copies(entry), entry.sealed_bytes()))
            .collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let cache = self.home.join(CACHE);
        let mut others = Vec::new();
        let (mut total, mut lacking) = (0, wanted.iter().map(|(_, bytes)| bytes).sum::<u64>());
        for folder in file::list(&cache)? {
            let used = file::bytes(&folder)?;
            total += used;
            if wanted.iter().any(|(copies, _)| *copies == folder) {
                lacking = lacking.saturating_sub(used);
                continue;
            }
            let modified = fs::metadata(&folder).and_then(|about| about.modified());
            others.push((modified.unwrap_or(SystemTime::UNIX_EPOCH), folder, used));
        }
        others.sort();
        for (_, folder, used) in others {
            let alone = Arc::strong_count(&self.reads) <= 2;
            if total.saturating_add(lacking) <= self.cache_bytes || !alone {
                break;
            }
            fs::remove_dir_all(&folder).map_err(at(&folder))?;
            total -= used;
        }
        match host::disk_free_bytes(&cache) {
            Some(free) if free < lacking => Err(StoreError::Refused(format!(
                "the shares in the bucket take {} MB here while a job reads them, {} MB are free: make \
                 room on the disk of this party's home",
                lacking.div_ceil(1_000_000),
                free / 1_000_000
            ))),
            _ => Ok(()),
        }
    }
}

impl Entry {
    /// Whether all chunks lie in the upload's own folder.
    pub(super) fn is_whole(&self) -> bool {
        (0..self.chunks.len()).all(|number| chunk_path(&self.folder, number).exists())
    }

    /// What its sealed chunks take, a little more than exactly.
    pub(super) fn sealed_bytes(&self) -> u64 {
        let payload = |rows| chunk_bytes(&self.schema, rows);
        let chunks = self.chunks.iter().map(|chunk| payload(chunk.rows));
        chunks
            .map(|bytes| bytes + bytes / SEALING.0 + SEALING.1)
            .sum()
    }
}

/// Tries the bucket that a party's configuration names, as the party would: writes, reads and deletes
/// an object. `None` if it names none.
///
/// # Errors
/// The bucket cannot be used; the text says what to do.
pub fn probe_bucket(config: &StoreConfig, me: Pin) -> Result<Option<String>, StoreError> {
    let Some(bucket) = Bucket::open(config, me)? else {
        return Ok(None);
    };
    bucket.probe()?;
    Ok(config.url.clone())
}

#[cfg(all(test, feature = "s3"))]
mod tests {
    use object_store::memory::InMemory;
    use object_store::path::Path as Key;
    use object_store::{ObjectStore, ObjectStoreExt, PutPayload};
    use tempfile::TempDir;
    use trefoil_consortium::wire::Withdrawal;
    use trefoil_models::schedule::{TRAIN_IMAGES, TRAIN_LABELS};

    use super::super::Found;
    use super::super::staging::tests::{anna, begin, bernd, chunk, commit};
    use super::*;

    const URL: &str = "s3://shares/p0";

    /// A home, and a bucket that outlives the store.
    struct World {
        home: TempDir,
        objects: Arc<InMemory>,
        runtime: tokio::runtime::Runtime,
    }

    impl World {
        fn new() -> World {
            World {
                home: tempfile::tempdir().unwrap(),
                objects: Arc::default(),
                runtime: tokio::runtime::Builder::new_current_thread()
                    .build()
                    .unwrap(),
            }
        }

        fn bucket(&self) -> Bucket {
            let bucket = Bucket::at(self.objects.clone(), URL, "p0").unwrap();
            bucket.claim(Pin::from_bytes([9; 32])).unwrap();
            bucket
        }

        fn open(&self, cache_bytes: u64) -> Store {
            Store::open_with(self.home.path(), Some(self.bucket()), cache_bytes).unwrap()
        }

        /// Names of the objects below a prefix.
        fn listed(&self, prefix: &str) -> Vec<String> {
            let mut folders = vec![Key::from(prefix)];
            let mut names = Vec::new();
            while let Some(folder) = folders.pop() {
                let listed = self.objects.list_with_delimiter(Some(&folder));
                let listed = self.runtime.block_on(listed).unwrap();
                folders.extend(listed.common_prefixes);
                names.extend(
                    listed
                        .objects
                        .iter()
                        .map(|object| object.location.to_string()),
                );
            }
            names.sort();
            names
        }

        fn put(&self, name: &str, bytes: Vec<u8>) {
            let key = Key::from(name);
            let put = self.objects.put(&key, PutPayload::from(bytes));
            self.runtime.block_on(put).unwrap();
        }

        fn get(&self, name: &str) -> Vec<u8> {
            let key = Key::from(name);
            let got = async { self.objects.get(&key).await?.bytes().await };
            self.runtime.block_on(got).unwrap().to_vec()
        }

        fn chunks_at_home(&self) -> usize {
            let mut open = vec![self.home.path().join("datasets")];
            let mut count = 0;
            while let Some(folder) = open.pop() {
                for path in file::list(&folder).unwrap() {
                    let name = path.file_name().unwrap().to_string_lossy().into_owned();
                    count += usize::from(name.starts_with("chunk"));
                    if path.is_dir() {
                        open.push(path);
                    }
                }
            }
            count
        }
    }

    fn rows(store: &Store) -> Vec<u64> {
        let mut tables = store.tables(Some("shapes"), None).unwrap();
        let (_, rows) = tables.size(TRAIN_IMAGES).unwrap();
        let all: Vec<u32> = (0..rows as u32).collect();
        let mut words = tables.gather(TRAIN_IMAGES, &all).unwrap();
        words.extend(tables.gather(TRAIN_LABELS, &all).unwrap());
        words
    }

    #[test]
    fn rows_in_a_bucket_are_those_of_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let folder = Store::open(folder.path()).unwrap();
        let world = World::new();
        let store = world.open(u64::MAX);
        for store in [&folder, &store] {
            commit(store, begin(1, 1), anna());
            commit(store, begin(2, 1), bernd());
        }
        let expected = rows(&folder);
        assert_eq!(rows(&store), expected);
        assert_eq!(world.chunks_at_home(), 0);
        let objects = world.listed("p0");
        // The prefix's owner, and three chunks and a record of each upload.
        assert_eq!(objects.len(), 1 + 2 * 4, "{objects:?}");
        assert_eq!(
            store.dataset("shapes").unwrap().snapshot,
            folder.dataset("shapes").unwrap().snapshot
        );
        // After a restart with an empty cache, and from the copies.
        drop(store);
        fs::remove_dir_all(world.home.path().join(CACHE)).unwrap();
        let store = world.open(u64::MAX);
        assert_eq!(rows(&store), expected);
        assert_eq!(rows(&store), expected);
        // What is listed takes as much as its objects, within the allowance.
        let listed = super::super::stored(world.home.path()).unwrap();
        let in_bucket: usize = objects
            .iter()
            .filter(|name| name.contains("chunk"))
            .map(|name| world.get(name).len())
            .sum();
        let said: u64 = listed.iter().map(|upload| upload.bytes).sum();
        assert!(said >= in_bucket as u64 && said < in_bucket as u64 * 5 / 4);
    }

    #[test]
    fn contributions_from_before_the_bucket_are_read_where_they_lie() {
        let world = World::new();
        let store = Store::open(world.home.path()).unwrap();
        commit(&store, begin(1, 1), anna());
        let before = rows(&store);
        drop(store);
        let store = world.open(0);
        assert_eq!(rows(&store), before);
        commit(&store, begin(2, 2), anna());
        assert_eq!(world.chunks_at_home(), 3);
        assert_eq!(rows(&store).len(), 2 * before.len());
        // And without it nothing of what is in it is lost or taken for damaged.
        drop(store);
        let store = Store::open(world.home.path()).unwrap();
        let err = store.tables(Some("shapes"), None).unwrap_err().to_string();
        assert!(err.contains("bucket") && err.contains("url"), "{err}");
    }

    #[test]
    fn an_upload_that_cannot_be_put_whole_is_not_committed_and_leaves_no_object() {
        let world = World::new();
        let store = world.open(0);
        let Found::Staged(mut staging) = store.begin(begin(1, 1), anna()).unwrap() else {
            panic!("it is new");
        };
        for number in 0..3 {
            staging.stage(chunk(number, 40 + number as u8)).unwrap();
        }
        // The last of its files cannot be read while it is put.
        let last = chunk_path(staging.folder(), 2);
        let aside = last.with_extension("aside");
        fs::rename(&last, &aside).unwrap();
        assert!(store.commit(&staging, [7; 32]).is_err());
        assert_eq!(store.dataset("shapes").unwrap().train_rows, 0);
        assert_eq!(world.listed("p0").len(), 1);
        // Again, when it can.
        fs::rename(&aside, &last).unwrap();
        store.commit(&staging, [7; 32]).unwrap();
        assert_eq!(world.listed("p0").len(), 1 + 4);
        assert_eq!(rows(&store).len(), 2_500 * 6);
    }

    #[test]
    fn an_object_that_was_changed_is_found_and_named() {
        let world = World::new();
        let store = world.open(u64::MAX);
        commit(&store, begin(1, 1), anna());
        commit(&store, begin(2, 2), anna());
        let objects = world.listed("p0");
        let chunks: Vec<&String> = objects
            .iter()
            .filter(|name| name.contains("chunk"))
            .collect();
        let good = world.get(chunks[0]);
        let mut bad = good.clone();
        *bad.last_mut().unwrap() ^= 1;
        // A changed byte, another chunk of the same size, a shorter one, none.
        let other = world.get(chunks[1]);
        for content in [bad, other, good[..100].to_vec(), Vec::new()] {
            world.put(chunks[0], content);
            let err = store.tables(Some("shapes"), None).unwrap_err().to_string();
            let name = chunks[0].replacen("p0", URL, 1);
            assert!(err.contains(&name), "{err}");
        }
        let key = Key::from(chunks[0].as_str());
        world.runtime.block_on(world.objects.delete(&key)).unwrap();
        let err = store.tables(Some("shapes"), None).unwrap_err().to_string();
        assert!(err.contains("not in the bucket"), "{err}");
        world.put(chunks[0], good);
        assert_eq!(rows(&store).len(), 2 * 2_500 * 6);
    }

    #[test]
    fn what_is_withdrawn_leaves_no_object_even_if_it_is_interrupted() {
        let world = World::new();
        let store = world.open(u64::MAX);
        commit(&store, begin(1, 1), anna());
        commit(&store, begin(2, 1), bernd());
        rows(&store);
        let gone = store.withdraw("shapes", anna(), Withdrawal::Below(2), |_| Ok(()));
        assert_eq!(gone.unwrap().committed, [1]);
        // The machine goes down before anything is deleted, and comes back.
        drop(store);
        assert_eq!(world.listed(&format!("p0/{}", anna())).len(), 4);
        let store = world.open(u64::MAX);
        assert_eq!(world.listed(&format!("p0/{}", anna())), [""; 0]);
        assert_eq!(world.listed(&format!("p0/{}", bernd())).len(), 4);
        let copies = file::list(&world.home.path().join(CACHE)).unwrap();
        assert_eq!(copies.len(), 1, "{copies:?}");
        assert_eq!(rows(&store).len(), 2_500 * 6);
    }

    #[test]
    fn copies_stay_within_their_bound_as_long_as_no_job_needs_more() {
        let world = World::new();
        let store = world.open(0);
        commit(&store, begin(1, 1), anna());
        let copies = || file::list(&world.home.path().join(CACHE)).unwrap();
        let open = store.tables(Some("shapes"), None).unwrap();
        assert_eq!(copies().len(), 1);
        let other = |name, number| trefoil_consortium::wire::UploadBegin {
            dataset: "others".into(),
            ..begin(name, number)
        };
        commit(&store, other(2, 1), anna());
        drop(store.tables(Some("others"), None).unwrap());
        assert_eq!(copies().len(), 2, "the first one's job still runs");
        drop(open);
        drop(store.tables(Some("others"), None).unwrap());
        assert_eq!(copies().len(), 1, "nothing reads the first any more");
        commit(&store, other(3, 2), anna());
        drop(store.tables(Some("others"), None).unwrap());
        assert_eq!(copies().len(), 2, "a job has all that it reads");
    }

    #[test]
    fn a_prefix_belongs_to_one_party() {
        let world = World::new();
        let bucket = world.bucket();
        bucket.claim(Pin::from_bytes([9; 32])).unwrap();
        bucket.probe().unwrap();
        let err = bucket
            .claim(Pin::from_bytes([8; 32]))
            .unwrap_err()
            .to_string();
        assert!(err.contains("belongs to the party"), "{err}");
        assert_eq!(world.listed("p0"), ["p0/party"]);
    }

    #[test]
    fn a_configuration_that_names_no_place_is_refused() {
        let open = |url: &str, endpoint: Option<&str>| {
            let config = StoreConfig {
                url: Some(url.into()),
                endpoint: endpoint.map(str::to_owned),
                ..StoreConfig::default()
            };
            Bucket::open(&config, anna()).unwrap_err().to_string()
        };
        for url in [
            "s3://",
            "s3://bucket",
            "s3://bucket/",
            "s3:///p0",
            "https://bucket/p0",
            "p0",
        ] {
            assert!(open(url, None).contains("s3://BUCKET/PREFIX"), "{url}");
        }
        let err = open("s3://bucket/p0", Some("http://127.0.0.1:1"));
        assert!(err.contains("plain_http"), "{err}");
    }
}
