//! Sending a log: the last lines, from a time on, with time stamps, up to a number of bytes, and what is yet to be
//! written. Following waits for inotify events, also of the directory, so that a rotated log goes on.

use super::{Line, parse};
use bytes::Bytes;
use jiff::Timestamp;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use tokio::fs::File;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncSeekExt, SeekFrom};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Read at once.
const CHUNK_BYTES: usize = 64 * 1024;
/// An entry longer than this is cut: runtimes split lines at 16 KiB.
const ENTRY_BYTES_MAX: usize = 1 << 20;

/// What of a log is wanted (`PodLogOptions`).
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub follow: bool,
    pub timestamps: bool,
    pub tail_lines: Option<u64>,
    pub since: Option<Timestamp>,
    pub limit_bytes: Option<u64>,
    /// Only standard output (`false`) or errors (`true`).
    pub only_stderr: Option<bool>,
}

/// Where the lines go; bounded, so that a slow reader slows the reading.
pub type Sink = mpsc::Sender<io::Result<Bytes>>;

/// Sends what is wanted of the log. `ended` is cancelled when the container has ended: then what is left is sent
/// and following stops.
pub async fn send(path: &Path, options: &Options, sink: &Sink, ended: CancellationToken) -> io::Result<()> {
    // Before reading: what is written in between wakes the follower.
    let mut watch = if options.follow { Some(Watch::new(path)?) } else { None };
    let mut file = File::open(path).await?;
    if let Some(lines) = options.tail_lines {
        let from = tail_offset(&mut file, lines, options).await?;
        file.seek(SeekFrom::Start(from)).await?;
    }
    let mut out = Out { options, sink, left: options.limit_bytes, carry: Vec::new(), line_open: false };
    loop {
        let over = ended.is_cancelled();
        if !out.drain(&mut file).await? {
            return Ok(());
        }
        let Some(watch) = &mut watch else { return Ok(()) };
        if let Some(next) = rotated(&file, path).await? {
            // The rest of the old file was written before it was renamed.
            out.drain(&mut file).await?;
            file = next;
            continue;
        }
        if over {
            return Ok(());
        }
        tokio::select! {
            result = watch.changed() => result?,
            () = ended.cancelled() => {}
            () = sink.closed() => return Ok(()),
        }
    }
}

/// The new file, if another one has the name now.
async fn rotated(file: &File, path: &Path) -> io::Result<Option<File>> {
    use std::os::unix::fs::MetadataExt;
    let old = file.metadata().await?;
    match File::open(path).await {
        Ok(new) => {
            let same = new.metadata().await?.ino() == old.ino();
            Ok((!same).then_some(new))
        }
        // In the middle of a rotation, or removed with its pod.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

struct Out<'a> {
    options: &'a Options,
    sink: &'a Sink,
    left: Option<u64>,
    /// The beginning of an entry whose end is not written yet.
    carry: Vec<u8>,
    /// The last entry was a part: the next one carries on without a time stamp.
    line_open: bool,
}

impl Out<'_> {
    /// Sends everything written so far. False when nothing more is wanted.
    async fn drain(&mut self, file: &mut File) -> io::Result<bool> {
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            let count = file.read(&mut chunk).await?;
            if count == 0 {
                return Ok(true);
            }
            self.carry.extend_from_slice(&chunk[..count]);
            if !self.flush().await {
                return Ok(false);
            }
        }
    }

    async fn flush(&mut self) -> bool {
        let carry = std::mem::take(&mut self.carry);
        let mut out = Vec::new();
        let mut rest = &carry[..];
        while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
            if let Some(line) = parse(&rest[..end]) {
                self.print(&line, &mut out);
            }
            rest = &rest[end + 1..];
        }
        self.carry = if rest.len() > ENTRY_BYTES_MAX { Vec::new() } else { rest.to_vec() };
        if let Some(left) = &mut self.left {
            out.truncate(usize::try_from(*left).unwrap_or(usize::MAX));
            *left -= out.len() as u64;
        }
        if !out.is_empty() && self.sink.send(Ok(out.into())).await.is_err() {
            return false;
        }
        self.left != Some(0)
    }

    fn print(&mut self, line: &Line<'_>, out: &mut Vec<u8>) {
        if !wanted(line, self.options) {
            return;
        }
        if self.options.timestamps && !self.line_open {
            out.extend_from_slice(line.time_text.as_bytes());
            out.push(b' ');
        }
        out.extend_from_slice(line.text);
        if !line.partial {
            out.push(b'\n');
        }
        self.line_open = line.partial;
    }
}

fn wanted(line: &Line<'_>, options: &Options) -> bool {
    options.since.is_none_or(|since| line.time >= since)
        && options.only_stderr.is_none_or(|only| only == line.stderr)
}

/// Where the last `lines` wanted lines begin.
async fn tail_offset(file: &mut File, lines: u64, options: &Options) -> io::Result<u64> {
    let mut end = file.seek(SeekFrom::End(0)).await?;
    if lines == 0 {
        return Ok(end);
    }
    let (mut found, mut tail) = (0u64, Vec::<u8>::new());
    while end > 0 {
        let size = end.min(CHUNK_BYTES as u64);
        let from = end - size;
        file.seek(SeekFrom::Start(from)).await?;
        let mut chunk = vec![0; size as usize];
        file.read_exact(&mut chunk).await?;
        chunk.extend_from_slice(&tail);
        // The first entry of the chunk may begin before it, unless the file does.
        let mut stop = chunk.len();
        while let Some(at) = chunk[..stop.saturating_sub(1)].iter().rposition(|byte| *byte == b'\n') {
            let entry = &chunk[at + 1..stop];
            let line = parse(entry.strip_suffix(b"\n").unwrap_or(entry));
            let counts = line.is_some_and(|line| !line.partial && wanted_stream(&line, options));
            found += u64::from(counts);
            if found > lines {
                return Ok(from + stop as u64);
            }
            stop = at + 1;
        }
        tail = chunk[..stop].to_vec();
        end = from;
    }
    Ok(0)
}

fn wanted_stream(line: &Line<'_>, options: &Options) -> bool {
    options.only_stderr.is_none_or(|only| only == line.stderr)
}

/// Tells when a file was written, or its directory changed.
struct Watch {
    inotify: AsyncFd<Events>,
}

struct Events(Inotify);

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watch {
    fn new(path: &Path) -> io::Result<Watch> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let dir = path.parent().map(PathBuf::from).unwrap_or_default();
        // Writes to files of a directory are told to watches of the directory.
        let flags = AddWatchFlags::IN_MODIFY
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVED_TO
            | AddWatchFlags::IN_DELETE_SELF;
        inotify.add_watch(&dir, flags)?;
        // SAFETY: the descriptor is `Events`' own, always the same one, and open for as long as `Events` lives.
        let inotify = unsafe { AsyncFd::register(Events(inotify)) }?;
        Ok(Watch { inotify })
    }

    async fn changed(&mut self) -> io::Result<()> {
        loop {
            let mut ready = self.inotify.readable().await?;
            match ready.get_inner().0.read_events() {
                Ok(_) => return Ok(()),
                Err(nix::Error::EAGAIN) => ready.clear_ready(),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn log(dir: &Path) -> PathBuf {
        let path = dir.join("0.log");
        let mut text = String::new();
        for second in 0..5 {
            let stream = if second % 2 == 0 { "stdout" } else { "stderr" };
            text += &format!("2026-01-02T03:04:0{second}.5Z {stream} F line {second}\n");
        }
        std::fs::write(
            &path,
            text + "2026-01-02T03:04:06Z stdout P par\n2026-01-02T03:04:07Z stdout F tial\n",
        )
        .unwrap();
        path
    }

    async fn read(path: &Path, options: Options) -> String {
        let (sink, mut lines) = mpsc::channel(16);
        send(path, &options, &sink, CancellationToken::new()).await.unwrap();
        drop(sink);
        let mut out = Vec::new();
        while let Some(chunk) = lines.recv().await {
            out.extend_from_slice(&chunk.unwrap());
        }
        String::from_utf8(out).unwrap()
    }

    #[tokio::test]
    async fn options_choose_lines() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let of = Options::default;
        let cases = [
            (of(), "line 0\nline 1\nline 2\nline 3\nline 4\npartial\n"),
            (Options { tail_lines: Some(2), ..of() }, "line 4\npartial\n"),
            (Options { tail_lines: Some(0), ..of() }, ""),
            (Options { tail_lines: Some(99), limit_bytes: Some(9), ..of() }, "line 0\nli"),
            (Options { since: Some("2026-01-02T03:04:04Z".parse().unwrap()), ..of() }, "line 4\npartial\n"),
            (Options { only_stderr: Some(true), ..of() }, "line 1\nline 3\n"),
            (Options { only_stderr: Some(true), tail_lines: Some(1), ..of() }, "line 3\n"),
        ];
        for (options, want) in cases {
            assert_eq!(read(&path, options.clone()).await, want, "{options:?}");
        }
        let stamped = read(&path, Options { timestamps: true, tail_lines: Some(1), ..of() }).await;
        assert_eq!(stamped, "2026-01-02T03:04:06Z partial\n");
    }

    #[tokio::test]
    async fn following_survives_rotation_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = log(dir.path());
        let (sink, mut lines) = mpsc::channel(16);
        let ended = CancellationToken::new();
        let options = Options { follow: true, tail_lines: Some(1), ..Options::default() };
        let task = tokio::spawn({
            let (path, ended) = (path.clone(), ended.clone());
            async move { send(&path, &options, &sink, ended).await }
        });
        assert_eq!(lines.recv().await.unwrap().unwrap(), "partial\n");
        let mut file = std::fs::OpenOptions::new().append(true).open(&path).unwrap();
        file.write_all(b"2026-01-02T03:05:00Z stdout F more\n").unwrap();
        assert_eq!(lines.recv().await.unwrap().unwrap(), "more\n");
        std::fs::rename(&path, dir.path().join("0.log.old")).unwrap();
        std::fs::write(&path, "2026-01-02T03:06:00Z stdout F new file\n").unwrap();
        assert_eq!(lines.recv().await.unwrap().unwrap(), "new file\n");
        ended.cancel();
        task.await.unwrap().unwrap();
        assert!(lines.recv().await.is_none());
    }
}
