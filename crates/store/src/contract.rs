//! The contract as tests. A back end passes [`check`] with a function that opens it anew on the same data.

use std::sync::Arc;
use std::time::Duration;

use crate::{Change, Digest, Expect, Range, ReadError, Store, Write, WriteError};

/// Opens the store; called again after the previous one was dropped, it must find the same data.
pub trait Backend {
    type Opened: Store + 'static;

    fn open(&self) -> Self::Opened;
}

/// Runs every clause of the contract, each on fresh data from `make`.
pub async fn check<B: Backend>(make: impl Fn() -> B) {
    revisions_grow_by_one_and_are_written_into_values(make().open()).await;
    expectations_are_checked(make().open()).await;
    deletes_leave_a_last_state(make().open()).await;
    lists_page_through_one_moment(make().open()).await;
    watches_miss_nothing_and_repeat_nothing(make().open()).await;
    compaction_ends_old_watches_and_reads(make().open()).await;
    concurrent_writers_all_land_once(make().open()).await;
    everything_survives_a_restart(make()).await;
    digests_let_lists_skip(make()).await;
}

/// A write of `value`, with the revision spliced in after it.
pub fn put(key: &str, expect: Expect, value: &str) -> Write {
    let bytes = format!("{value}@").into_bytes();
    let splice = Some(bytes.len());
    Write {
        partition: "things".into(),
        key: key.into(),
        expect,
        change: Change::Put { bytes, splice, time_to_live: None, digest: Digest::default() },
    }
}

pub fn delete(key: &str, expect: Expect) -> Write {
    Write { partition: "things".into(), key: key.into(), expect, change: Change::Delete { last: None } }
}

async fn revisions_grow_by_one_and_are_written_into_values(store: impl Store) {
    let first = store.commit(put("a", Expect::Absent, "x")).await.expect("creates");
    let second = store.commit(put("b", Expect::Absent, "y")).await.expect("creates");
    assert_eq!(second.revision, first.revision + 1);
    assert_eq!(second.entry.bytes, format!("y@{}", second.revision));
    assert_eq!(store.revision(), second.revision);
    assert_eq!(store.get("things", "b").expect("is there").revision, second.revision);
    assert!(store.get("others", "b").is_none(), "partitions are apart");
}

async fn expectations_are_checked(store: impl Store) {
    let first = store.commit(put("a", Expect::Absent, "1")).await.expect("creates");
    let again = store.commit(put("a", Expect::Absent, "2")).await;
    assert!(matches!(again, Err(WriteError::Exists)));
    let second = store.commit(put("a", Expect::Revision(first.revision), "2")).await.expect("updates");
    let stale = store.commit(put("a", Expect::Revision(first.revision), "3")).await;
    assert!(matches!(stale, Err(WriteError::Changed(entry)) if entry.revision == second.revision));
    assert!(matches!(store.commit(put("b", Expect::Revision(1), "x")).await, Err(WriteError::NotFound)));
    assert!(matches!(store.commit(delete("b", Expect::Any)).await, Err(WriteError::NotFound)));
    assert_eq!(store.revision(), second.revision, "refused writes take no revision");
}

async fn deletes_leave_a_last_state(store: impl Store) {
    let created = store.commit(put("a", Expect::Absent, "1")).await.expect("creates");
    let mut watch = store.watch("things", created.revision).expect("watches");
    let deleted = store.commit(delete("a", Expect::Any)).await.expect("deletes");
    assert!(store.get("things", "a").is_none());
    let events = watch.next().await.expect("delivers");
    let last = events[0].after.as_ref().expect_err("a deletion");
    assert_eq!((last.revision, &last.bytes), (deleted.revision, &created.entry.bytes));
}

async fn lists_page_through_one_moment(store: impl Store) {
    for key in ["ns1/a", "ns1/b", "ns1/c", "ns2/a"] {
        store.commit(put(key, Expect::Absent, key)).await.expect("creates");
    }
    let range = |after: Option<&str>, at| Range {
        prefix: "ns1/".into(),
        after: after.map(str::to_owned),
        limit: 2,
        at,
        ..Range::default()
    };
    let keys = |listing: &crate::Listing| -> Vec<String> {
        listing.entries.iter().map(|e| e.key.to_string()).collect()
    };
    let first = store.list("things", &range(None, None)).expect("lists");
    assert_eq!((keys(&first), first.remaining), (vec!["ns1/a".to_owned(), "ns1/b".to_owned()], 1));
    store.commit(delete("ns1/c", Expect::Any)).await.expect("deletes");
    store.commit(put("ns1/bb", Expect::Absent, "new")).await.expect("creates");
    let second = store.list("things", &range(Some("ns1/b"), Some(first.revision))).expect("lists");
    assert_eq!(keys(&second), ["ns1/c"], "as of the first page");
    let now = store.list("things", &range(Some("ns1/b"), None)).expect("lists");
    assert_eq!(keys(&now), ["ns1/bb"]);
    let future = store.list("things", &range(None, Some(store.revision() + 1)));
    assert!(matches!(future, Err(ReadError::Future { .. })));
}

async fn watches_miss_nothing_and_repeat_nothing(store: impl Store) {
    let mut watch = store.watch("things", store.revision()).expect("watches");
    let mut expected = Vec::new();
    for round in 0..20u32 {
        let key = format!("k{}", round % 3);
        let change = match store.get("things", &key) {
            Some(entry) if round % 4 == 0 => delete(&key, Expect::Revision(entry.revision)),
            Some(entry) => put(&key, Expect::Revision(entry.revision), "again"),
            None => put(&key, Expect::Absent, "new"),
        };
        expected.push(store.commit(change).await.expect("commits").revision);
    }
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        seen.extend(watch.next().await.expect("delivers").iter().map(|e| e.revision));
    }
    assert_eq!(seen, expected);
    let mut late = store.watch("things", expected[9]).expect("watches the past");
    let rest: Vec<u64> = late.next().await.expect("delivers").iter().map(|e| e.revision).collect();
    assert_eq!(rest, expected[10..]);
}

async fn compaction_ends_old_watches_and_reads(store: impl Store) {
    let first = store.commit(put("a", Expect::Absent, "1")).await.expect("creates");
    let second = store.commit(put("a", Expect::Any, "2")).await.expect("updates");
    let mut behind = store.watch("things", first.revision - 1).expect("watches");
    store.compact(second.revision);
    assert!(matches!(behind.next().await, Err(ReadError::Compacted { .. })));
    assert!(matches!(store.watch("things", first.revision), Err(ReadError::Compacted { .. })));
    let past = Range { at: Some(first.revision), ..Range::default() };
    assert!(matches!(store.list("things", &past), Err(ReadError::Compacted { .. })));
    assert!(store.watch("things", second.revision).is_ok());
    assert!(store.get("things", "a").is_some(), "current values stay");
}

async fn concurrent_writers_all_land_once(store: impl Store + 'static) {
    let store = Arc::new(store);
    let writers: Vec<_> = (0..64)
        .map(|i| {
            let store = store.clone();
            tokio::spawn(async move { store.commit(put(&format!("w{i}"), Expect::Absent, "x")).await })
        })
        .collect();
    let mut revisions = Vec::new();
    for writer in writers {
        revisions.push(writer.await.expect("runs").expect("commits").revision);
    }
    revisions.sort_unstable();
    revisions.dedup();
    assert_eq!(revisions.len(), 64, "every writer has a revision of its own");
    assert_eq!(store.count("things"), 64);
}

async fn everything_survives_a_restart<B: Backend>(backend: B) {
    let store = backend.open();
    let kept = store.commit(put("kept", Expect::Absent, "1")).await.expect("creates");
    store.commit(put("gone", Expect::Absent, "1")).await.expect("creates");
    store.commit(put("kept", Expect::Any, "2")).await.expect("updates");
    let last = store.commit(delete("gone", Expect::Any)).await.expect("deletes");
    drop(store);
    let store = reopen(&backend).await;
    assert_eq!(store.revision(), last.revision);
    assert_eq!(store.get("things", "kept").expect("is there").bytes, format!("2@{}", kept.revision + 2));
    assert!(store.get("things", "gone").is_none());
    let mut watch = store.watch("things", kept.revision).expect("history survives");
    assert_eq!(watch.next().await.expect("delivers").len(), 3);
    let next = store.commit(put("new", Expect::Absent, "1")).await.expect("creates");
    assert_eq!(next.revision, last.revision + 1, "revisions go on");
}

/// The dropped store may still be letting go of its files.
async fn reopen<B: Backend>(backend: &B) -> B::Opened {
    tokio::time::sleep(Duration::ZERO).await;
    backend.open()
}

/// Lists leave out what surely is not meant, also after a restart; a digest of another version leaves nothing out.
async fn digests_let_lists_skip<B: Backend>(backend: B) {
    let about = |version: u32, words: &[&str]| {
        let mut digest = Digest::new(version);
        words.iter().for_each(|word| digest.add(&["label", word]));
        digest
    };
    let names = |store: &B::Opened, about: Digest| -> Vec<String> {
        let listing = store.list("things", &Range { about, ..Range::default() }).expect("lists");
        listing.entries.iter().map(|entry| entry.key.to_string()).collect()
    };
    let store = backend.open();
    for (key, its) in [("a", about(1, &["red", "old"])), ("b", about(1, &["blue"])), ("c", Digest::default())]
    {
        let mut write = put(key, Expect::Absent, key);
        if let Change::Put { digest, .. } = &mut write.change {
            *digest = its;
        }
        store.commit(write).await.expect("commits");
    }
    let check = |store: &B::Opened| {
        assert_eq!(names(store, about(1, &["red"])), ["a", "c"]);
        assert_eq!(names(store, about(1, &["red", "blue"])), ["c"]);
        assert_eq!(names(store, about(2, &["red"])), ["a", "b", "c"]);
        assert_eq!(names(store, Digest::default()), ["a", "b", "c"]);
    };
    check(&store);
    drop(store);
    check(&backend.open());
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use parking_lot::Mutex;

    use super::*;
    use crate::engine::{Disk, Memory};
    use crate::{Embedded, Options};

    struct OnDisk(tempfile::TempDir);

    impl Backend for OnDisk {
        type Opened = Embedded;

        fn open(&self) -> Embedded {
            let deadline = std::time::Instant::now() + Duration::from_secs(10);
            loop {
                match Disk::open(self.0.path()) {
                    Ok(disk) => return Embedded::open(disk, Options::default()).expect("loads"),
                    Err(error) if std::time::Instant::now() > deadline => {
                        panic!("waited 10 s for the previous store to close: {error}")
                    }
                    Err(_) => std::thread::yield_now(),
                }
            }
        }
    }

    struct InMemory(Memory);

    impl Backend for InMemory {
        type Opened = Embedded;

        fn open(&self) -> Embedded {
            Embedded::open_inline(self.0.clone(), Options::default()).expect("loads")
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_disk_engine_keeps_the_contract() {
        check(|| OnDisk(tempfile::tempdir().expect("a directory"))).await;
    }

    #[tokio::test]
    async fn the_memory_engine_keeps_the_contract() {
        check(|| InMemory(Memory::default())).await;
    }

    #[tokio::test]
    async fn a_full_disk_refuses_the_write_and_keeps_the_state() {
        let memory = Memory::default();
        let store = Embedded::open_inline(memory.clone(), Options::default()).expect("loads");
        store.commit(put("a", Expect::Absent, "1")).await.expect("creates");
        memory.fail_appends(true);
        assert!(matches!(store.commit(put("a", Expect::Any, "2")).await, Err(WriteError::Disk(_))));
        assert_eq!(store.get("things", "a").expect("is there").bytes, "1@1");
        memory.fail_appends(false);
        assert_eq!(store.commit(put("a", Expect::Any, "3")).await.expect("updates").revision, 2);
    }

    #[tokio::test]
    async fn entries_expire_at_their_time_also_after_a_restart() {
        let now = Arc::new(Mutex::new(SystemTime::UNIX_EPOCH));
        let clock = now.clone();
        let options = Options { clock: Arc::new(move || *clock.lock()), ..Options::default() };
        let memory = Memory::default();
        let store = Embedded::open_inline(memory.clone(), options.clone()).expect("loads");
        let mut write = put("a", Expect::Absent, "1");
        if let Change::Put { time_to_live, .. } = &mut write.change {
            *time_to_live = Some(Duration::from_secs(60));
        }
        store.commit(write).await.expect("creates");
        let store = Embedded::open_inline(memory, options).expect("loads");
        *now.lock() += Duration::from_secs(59);
        store.expire().await;
        assert!(store.get("things", "a").is_some());
        *now.lock() += Duration::from_secs(1);
        store.expire().await;
        assert!(store.get("things", "a").is_none());
    }

    #[tokio::test]
    async fn the_log_keeps_only_what_is_current_or_recent() {
        let options = Options { retention_records_max: 10, ..Options::default() };
        let memory = Memory::default();
        let store = Embedded::open_inline(memory.clone(), options.clone()).expect("loads");
        for _ in 0..200 {
            store.commit(put("a", Expect::Any, "x")).await.expect("updates");
        }
        assert!(memory.records() < 30, "{} records for one key", memory.records());
        let again = Embedded::open_inline(memory, options).expect("loads");
        assert_eq!(again.get("things", "a").expect("is there").revision, 200);
        assert!(matches!(again.watch("things", 1), Err(ReadError::Compacted { .. })));
    }
}
