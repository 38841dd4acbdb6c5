//! Staged uploads over streams, restarts and time; with the uploads that the store's other tests use.

use std::time::{Duration, SystemTime};

use trefoil_consortium::wire::Share;

use super::super::Store;
use super::places::STAGED_MAX;
use super::*;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
const HOUR: Duration = Duration::from_secs(60 * 60);

pub(in super::super) fn anna() -> Pin {
    Pin::from_bytes([1; 32])
}

pub(in super::super) fn bernd() -> Pin {
    Pin::from_bytes([2; 32])
}

/// Three chunks.
pub(in super::super) fn begin(name: u8, number: u64) -> UploadBegin {
    UploadBegin {
        upload: [name; 16],
        dataset: "shapes".into(),
        part: Part::Train,
        schema: Schema {
            shape: vec![1, 2, 2],
            classes: 2,
        },
        rows: 2_500,
        number,
    }
}

pub(in super::super) fn chunk(number: u32, sharing: u8) -> wire::Chunk {
    wire::Chunk {
        chunk: number,
        sharing: [sharing; 16],
        images: Share::Seed([sharing; 16]),
        labels: Some(Share::Seed([sharing + 1; 16])),
    }
}

fn staging(found: Result<Found, StoreError>) -> Staging {
    match found.unwrap() {
        Found::Staged(staging) => staging,
        other => panic!("{other:?}"),
    }
}

/// The first chunks of an upload, each with a sharing of its own.
pub(in super::super) fn stage(
    store: &Store,
    begin: UploadBegin,
    chunks: u32,
) -> Vec<StagedReceipt> {
    let mut staging = staging(store.begin(begin, anna()));
    let all = (0..chunks).map(|number| staging.stage(chunk(number, 10 * number as u8)));
    all.collect::<Result<_, _>>().unwrap()
}

/// A complete upload, committed.
pub(in super::super) fn commit(store: &Store, begin: UploadBegin, owner: Pin) {
    let mut staging = staging(store.begin(begin, owner));
    for number in 0..3 {
        staging.stage(chunk(number, 40 + number as u8)).unwrap();
    }
    store.commit(&staging, [7; 32]).unwrap();
}

fn home() -> (tempfile::TempDir, Store) {
    let home = tempfile::tempdir().unwrap();
    let store = Store::open(home.path()).unwrap();
    (home, store)
}

fn refused(found: Result<Found, StoreError>) -> String {
    match found {
        Err(StoreError::Refused(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_is_staged_outlives_the_stream_and_the_process() {
    let (home, store) = home();
    let receipts = stage(&store, begin(1, 1), 2);
    assert_eq!(receipts[1].sharing, [10; 16]);
    assert_ne!(receipts[0].digest, receipts[1].digest);
    let again = staging(store.begin(begin(1, 1), anna()));
    assert_eq!(again.receipts(), receipts);
    drop((again, store));

    // A file that was being written when the process was killed.
    let folder = folder(home.path(), &(anna(), [1; 16]));
    std::fs::write(folder.join("chunk-00002.tmp"), b"half").unwrap();
    let store = Store::open(home.path()).unwrap();
    let mut again = staging(store.reopen(&[1; 16], anna()));
    assert_eq!(again.receipts(), receipts);
    assert_eq!(again.stage(chunk(2, 20)).unwrap().rows, 500);
    drop((again, store));

    let damaged = chunk_path(&folder, 1);
    let mut bytes = std::fs::read(&damaged).unwrap();
    bytes[1_000] ^= 1;
    std::fs::write(&damaged, bytes).unwrap();
    let store = Store::open(home.path()).unwrap();
    let again = staging(store.begin(begin(1, 1), anna()));
    assert_eq!(again.receipts(), receipts[..1]);
}

#[test]
fn a_chunk_is_replaced_and_those_after_it_are_forgotten() {
    let (_home, store) = home();
    let receipts = stage(&store, begin(1, 1), 2);
    let mut staging = staging(store.begin(begin(1, 1), anna()));
    let anew = staging.stage(chunk(1, 99)).unwrap();
    assert_eq!((anew.chunk, anew.sharing), (1, [99; 16]));
    assert_ne!(anew.digest, receipts[1].digest);
    assert_eq!(staging.receipts(), [receipts[0].clone(), anew]);
    let first = staging.stage(chunk(0, 98)).unwrap();
    assert_eq!(staging.receipts(), [first]);
    let err = staging.stage(chunk(2, 97)).unwrap_err().to_string();
    assert!(err.contains("chunk 2 came where 1 of 3"), "{err}");
}

#[test]
fn another_sharing_of_equal_shares_has_another_digest() {
    let (_home, store) = home();
    let mut staging = staging(store.begin(begin(1, 1), anna()));
    let one = staging.stage(chunk(0, 5)).unwrap();
    let mut other = chunk(0, 5);
    other.sharing = [6; 16];
    assert_ne!(staging.stage(other).unwrap().digest, one.digest);
}

#[test]
fn what_nobody_commits_is_removed_a_day_after_its_last_change() {
    let (home, store) = home();
    let now = SystemTime::now();
    stage(&store, begin(1, 1), 3);
    store.sweep(now + DAY - HOUR);
    let open = staging(store.begin(begin(1, 1), anna()));
    store.sweep(now + DAY + HOUR);
    assert_eq!(open.receipts().len(), 3, "a stream works on it");
    drop(open);
    drop(staging(store.reopen(&[1; 16], anna())));
    store.sweep(now + DAY + HOUR);
    let reason = refused(store.reopen(&[1; 16], anna()));
    assert!(reason.contains("24 hours"), "{reason}");
    let left = || file::list(&home.path().join("staging")).unwrap().len();
    assert_eq!(left(), 0);

    stage(&store, begin(2, 1), 1);
    drop(store);
    let folder = folder(home.path(), &(anna(), [2; 16]));
    let about = std::fs::File::open(&folder).unwrap();
    about.set_modified(now - DAY + HOUR).unwrap();
    drop(Store::open(home.path()).unwrap());
    assert_eq!(left(), 1);
    about.set_modified(now - DAY - HOUR).unwrap();
    drop(Store::open(home.path()).unwrap());
    assert_eq!(left(), 0);
}

#[test]
fn a_commit_is_found_again_by_its_owner_and_takes_no_more_chunks() {
    let (home, store) = home();
    let receipts = stage(&store, begin(1, 1), 3);
    let part = stage(&store, begin(2, 2), 2);
    let open = staging(store.reopen(&[2; 16], anna()));
    assert!(store.commit(&open, [7; 32]).is_err(), "a chunk is missing");
    assert_eq!(open.receipts(), part);
    drop(open);

    // Killed after the record was written and before the folder was renamed.
    let folder = folder(home.path(), &(anna(), [1; 16]));
    std::fs::write(folder.join(super::super::upload::COMMIT_FILE), b"half").unwrap();
    drop(store);
    let store = Store::open(home.path()).unwrap();
    let open = staging(store.reopen(&[1; 16], anna()));
    store.commit(&open, [7; 32]).unwrap();
    drop(open);
    let snapshot = store.dataset("shapes").unwrap();
    assert_eq!(snapshot.train_rows, 2_500);

    for store in [store, Store::open(home.path()).unwrap()] {
        for found in [
            store.reopen(&[1; 16], anna()),
            store.begin(begin(1, 1), anna()),
        ] {
            let Found::Committed {
                receipts: theirs,
                digest,
            } = found.unwrap()
            else {
                panic!("it is staged");
            };
            assert_eq!((theirs, digest), (receipts.clone(), [7; 32]));
        }
        refused(store.begin(begin(1, 2), anna()));
        refused(store.reopen(&[1; 16], bernd()));
        assert_eq!(store.dataset("shapes").unwrap(), snapshot);
    }
}

#[test]
fn a_members_upload_is_unknown_to_others() {
    let (_home, store) = home();
    let receipts = stage(&store, begin(1, 1), 2);
    let known = refused(store.reopen(&[1; 16], bernd())).replace(&"01".repeat(16), "X");
    let unknown = refused(store.reopen(&[3; 16], bernd())).replace(&"03".repeat(16), "X");
    assert_eq!(known, unknown);
    // The same name is another upload.
    let theirs = staging(store.begin(begin(1, 1), bernd()));
    assert_eq!(theirs.receipts(), []);
    drop(theirs);
    let own = staging(store.begin(begin(1, 1), anna()));
    assert_eq!(own.receipts(), receipts);
    drop(own);
    refused(store.begin(begin(1, 2), anna()));
}

#[test]
fn images_to_predict_are_found_by_their_owner_only() {
    let (_home, store) = home();
    let mut begin = begin(1, 1);
    (begin.part, begin.dataset, begin.schema.classes) = (Part::Predict, String::new(), 0);
    begin.rows = 10;
    let mut open = staging(store.begin(begin.clone(), anna()));
    let mut images = chunk(0, 1);
    images.labels = None;
    open.stage(images).unwrap();
    store.commit(&open, [7; 32]).unwrap();
    drop(open);
    let found = store.begin(begin.clone(), anna()).unwrap();
    assert!(matches!(found, Found::Committed { .. }), "{found:?}");
    refused(store.reopen(&[1; 16], bernd()));
    begin.number = 2;
    refused(store.begin(begin, anna()));
}

#[test]
fn no_two_uploads_of_one_hospital_to_one_data_set_have_one_number() {
    let (home, store) = home();
    let next = |store: &Store, pin| store.next_number("shapes", pin).unwrap();
    assert_eq!(next(&store, anna()), 1);
    stage(&store, begin(1, 1), 3);
    assert_eq!((next(&store, anna()), next(&store, bernd())), (2, 1));
    let taken = |store: &Store, number| {
        let err = store.begin(begin(2, number), anna()).unwrap_err();
        assert!(matches!(err, StoreError::NumberTaken(_)), "{err}");
    };
    taken(&store, 1);
    stage(&store, begin(3, 5), 1);
    drop(store);
    let store = Store::open(home.path()).unwrap();
    assert_eq!(next(&store, anna()), 6);
    taken(&store, 5);
    let open = staging(store.reopen(&[1; 16], anna()));
    store.commit(&open, [7; 32]).unwrap();
    drop(open);
    taken(&store, 1);
    drop(staging(store.begin(begin(1, 1), bernd())));
    refused(store.begin(begin(4, 0), anna()));
    refused(store.begin(begin(4, NUMBERS_END), anna()));
}

#[test]
fn an_upload_without_a_chunk_leaves_nothing() {
    let (home, store) = home();
    drop(staging(store.begin(begin(1, 1), anna())));
    let folder = folder(home.path(), &(anna(), [1; 16]));
    assert!(!folder.exists());
    assert_eq!(store.next_number("shapes", anna()).unwrap(), 1);
    // Killed before the first chunk.
    std::mem::forget(staging(store.begin(begin(1, 1), anna())));
    assert!(folder.join(BEGIN_FILE).exists());
    let store = Store::open(home.path()).unwrap();
    assert!(!folder.exists());
    assert_eq!(store.next_number("shapes", anna()).unwrap(), 1);
}

#[test]
fn one_stream_works_on_an_upload_and_a_member_on_two() {
    let (_home, store) = home();
    let busy = |found| match found {
        Err(StoreError::Busy(reason)) => reason,
        other => panic!("{other:?}"),
    };
    let one = staging(store.begin(begin(1, 1), anna()));
    let reason = busy(store.begin(begin(1, 1), anna()));
    assert!(reason.contains("another stream"), "{reason}");
    busy(store.reopen(&[1; 16], anna()));
    let _two = staging(store.begin(begin(2, 2), anna()));
    let reason = busy(store.begin(begin(3, 3), anna()));
    assert!(reason.contains("under way"), "{reason}");
    assert_eq!(store.next_number("shapes", anna()).unwrap(), 3);
    drop(staging(store.begin(begin(1, 1), bernd())));
    drop(one);
    drop(staging(store.begin(begin(3, 3), anna())));
}

#[test]
fn a_member_may_have_some_uploads_staged_and_no_more() {
    let (_home, store) = home();
    for number in 1..=STAGED_MAX as u8 {
        stage(&store, begin(number, number.into()), 1);
    }
    let reason = refused(store.begin(begin(200, 200), anna()));
    assert!(reason.contains("are staged"), "{reason}");
    stage(&store, begin(1, 1), 3);
    let open = staging(store.reopen(&[1; 16], anna()));
    store.commit(&open, [7; 32]).unwrap();
    drop(open);
    stage(&store, begin(200, 200), 1);
}
