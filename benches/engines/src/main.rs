//! Which embedded engine carries the store's log best: redb, fjall or SQLite?
//!
//! The store appends records (`revision → bytes`) in batches, one durable commit a batch, and later
//! removes superseded ones. Measured: durable commits a second and records a second at batch sizes that
//! group commit reaches with 1, 32 and 256 writers, the bytes written to disk, the time to read all back,
//! and resident memory. Run: `cargo run --release [directory]`. Figures: docs/decisions/store-engine.md.

use std::path::Path;
use std::time::Instant;

const RECORD_BYTES: usize = 4096;
const RECORDS: u64 = 20_000;
const COMMITS_MAX: u64 = 2_000;

/// What the store asks of an engine.
trait Engine {
    fn append(&mut self, first: u64, records: &[Vec<u8>]);
    fn remove(&mut self, from: u64, to: u64);
    fn scan(&mut self) -> u64;
}

struct Fjall(fjall::Database, fjall::Keyspace);

impl Fjall {
    fn open(dir: &Path) -> Self {
        let database = fjall::Database::builder(dir).cache_size(8 << 20).open().expect("opens");
        let log = database.keyspace("log", fjall::KeyspaceCreateOptions::default).expect("opens");
        Fjall(database, log)
    }
}

impl Engine for Fjall {
    fn append(&mut self, first: u64, records: &[Vec<u8>]) {
        let mut batch = self.0.batch().durability(Some(fjall::PersistMode::SyncData));
        for (i, record) in records.iter().enumerate() {
            batch.insert(&self.1, (first + i as u64).to_be_bytes(), record);
        }
        batch.commit().expect("commits");
    }

    fn remove(&mut self, from: u64, to: u64) {
        let mut batch = self.0.batch().durability(Some(fjall::PersistMode::SyncData));
        (from..to).for_each(|key| batch.remove(&self.1, key.to_be_bytes()));
        batch.commit().expect("commits");
    }

    fn scan(&mut self) -> u64 {
        self.1.iter().map(|item| item.value().expect("reads").len() as u64).sum()
    }
}

const LOG: redb::TableDefinition<u64, &[u8]> = redb::TableDefinition::new("log");

struct Redb(redb::Database);

impl Redb {
    fn open(dir: &Path) -> Self {
        let database = redb::Builder::new().set_cache_size(8 << 20).create(dir.join("log.redb"));
        Redb(database.expect("opens"))
    }

    fn write(&mut self, change: impl FnOnce(&mut redb::Table<u64, &[u8]>)) {
        let transaction = self.0.begin_write().expect("begins");
        change(&mut transaction.open_table(LOG).expect("opens"));
        transaction.commit().expect("commits");
    }
}

impl Engine for Redb {
    fn append(&mut self, first: u64, records: &[Vec<u8>]) {
        self.write(|table| {
            for (i, record) in records.iter().enumerate() {
                table.insert(first + i as u64, record.as_slice()).expect("inserts");
            }
        });
    }

    fn remove(&mut self, from: u64, to: u64) {
        self.write(|table| {
            for key in from..to {
                table.remove(key).expect("removes");
            }
        });
    }

    fn scan(&mut self) -> u64 {
        use redb::ReadableDatabase;
        use redb::ReadableTable;
        let table = self.0.begin_read().expect("begins").open_table(LOG).expect("opens");
        table.iter().expect("iterates").map(|r| r.expect("reads").1.value().len() as u64).sum()
    }
}

struct Sqlite(rusqlite::Connection);

impl Sqlite {
    fn open(dir: &Path) -> Self {
        let connection = rusqlite::Connection::open(dir.join("log.sqlite")).expect("opens");
        connection
            .execute_batch(
                "PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; PRAGMA cache_size=-8192;
                 CREATE TABLE log (revision INTEGER PRIMARY KEY, record BLOB NOT NULL);",
            )
            .expect("creates");
        Sqlite(connection)
    }
}

impl Engine for Sqlite {
    fn append(&mut self, first: u64, records: &[Vec<u8>]) {
        let transaction = self.0.transaction().expect("begins");
        {
            let mut insert = transaction.prepare_cached("INSERT INTO log VALUES (?1, ?2)").expect("prepares");
            for (i, record) in records.iter().enumerate() {
                insert.execute((first + i as u64, record)).expect("inserts");
            }
        }
        transaction.commit().expect("commits");
    }

    fn remove(&mut self, from: u64, to: u64) {
        self.0.execute("DELETE FROM log WHERE revision >= ?1 AND revision < ?2", (from, to)).expect("deletes");
    }

    fn scan(&mut self) -> u64 {
        self.0.query_row("SELECT SUM(LENGTH(record)) FROM log", (), |row| row.get(0)).expect("reads")
    }
}

fn main() {
    let root = std::env::args().nth(1).unwrap_or_else(|| "target/engines".into());
    println!("engine  batch  commits/s  records/s  cpu-us/record  scan-ms  disk-MB/live-MB  rss-MB");
    for batch in [1u64, 32, 256] {
        for name in ["fjall", "redb", "sqlite"] {
            let dir = Path::new(&root).join(format!("{name}-{batch}"));
            let _ = std::fs::remove_dir_all(&dir);
            std::fs::create_dir_all(&dir).expect("makes the directory");
            let mut engine: Box<dyn Engine> = match name {
                "fjall" => Box::new(Fjall::open(&dir)),
                "redb" => Box::new(Redb::open(&dir)),
                _ => Box::new(Sqlite::open(&dir)),
            };
            measure(name, batch, engine.as_mut(), &dir);
            drop(engine);
            std::fs::remove_dir_all(&dir).expect("cleans up");
        }
    }
}

fn measure(name: &str, batch: u64, engine: &mut dyn Engine, dir: &Path) {
    let records: Vec<Vec<u8>> = (0..batch).map(|i| noise(i, RECORD_BYTES)).collect();
    let commits = (RECORDS / batch).min(COMMITS_MAX);
    let (start, cpu) = (Instant::now(), cpu_micros());
    for commit in 0..commits {
        engine.append(commit * batch, &records);
    }
    let elapsed = start.elapsed().as_secs_f64();
    let written = commits * batch;
    let cpu = (cpu_micros() - cpu) as f64 / written as f64;
    engine.remove(0, written / 2);
    let start = Instant::now();
    let live = engine.scan();
    let scan = start.elapsed().as_secs_f64() * 1000.0;
    assert_eq!(live, (written - written / 2) * RECORD_BYTES as u64, "{name} lost records");
    println!(
        "{name:7} {batch:5}  {:9.0}  {:9.0}  {cpu:13.1}  {scan:7.1}  {:7.0}/{:<7.0}  {:6.0}",
        commits as f64 / elapsed,
        written as f64 / elapsed,
        disk_bytes(dir) as f64 / 1e6,
        live as f64 / 1e6,
        resident_bytes() as f64 / 1e6,
    );
}

/// Bytes no compressor shrinks much, the same on every run.
fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            b"0123456789abcdefghijklmnopqrstuvwxyz{}:\","[(state % 41) as usize]
        })
        .collect()
}

fn disk_bytes(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => disk_bytes(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}

fn proc_field(file: &str, skip: usize) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    text.split_whitespace().nth(skip).and_then(|w| w.parse().ok()).unwrap_or(0)
}

fn resident_bytes() -> u64 {
    proc_field("/proc/self/statm", 1) * 4096
}

fn cpu_micros() -> u64 {
    (proc_field("/proc/self/stat", 13) + proc_field("/proc/self/stat", 14)) * 10_000
}
