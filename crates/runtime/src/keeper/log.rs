//! The CRI log format: `2026-01-01T00:00:00.000000000Z stdout F line`, one line per line of output; longer lines are
//! split, all but the last piece tagged `P`. Appending and reopening only; rotation is the kubelet's.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use jiff::Timestamp;

/// A line longer than this is split, as containerd and CRI-O do.
pub const LINE_BYTES_MAX: usize = 16 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    Stdout,
    Stderr,
}

impl Stream {
    fn name(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

/// Turns chunks of one stream into log lines. Holds at most one unfinished line, in at most
/// [`LINE_BYTES_MAX`] bytes, and no memory between lines.
#[derive(Debug)]
pub struct Splitter {
    stream: Stream,
    rest: Vec<u8>,
}

impl Splitter {
    pub fn new(stream: Stream) -> Self {
        Self { stream, rest: Vec::new() }
    }

    pub fn stream(&self) -> Stream {
        self.stream
    }

    /// Appends to `out` what `chunk` completes.
    pub fn push(&mut self, now: Timestamp, mut chunk: &[u8], out: &mut Vec<u8>) {
        while let Some(end) = chunk.iter().position(|byte| *byte == b'\n') {
            self.fill(now, &chunk[..end], out);
            let line = std::mem::take(&mut self.rest);
            self.line(now, b'F', &line, out);
            chunk = &chunk[end + 1..];
        }
        self.fill(now, chunk, out);
    }

    /// Appends what is left at the end of the stream: a last line without its newline.
    pub fn finish(&mut self, now: Timestamp, out: &mut Vec<u8>) {
        if !self.rest.is_empty() {
            let line = std::mem::take(&mut self.rest);
            self.line(now, b'P', &line, out);
        }
    }

    /// Adds to the unfinished line, letting full pieces go.
    fn fill(&mut self, now: Timestamp, mut bytes: &[u8], out: &mut Vec<u8>) {
        while self.rest.len() + bytes.len() > LINE_BYTES_MAX {
            let (head, tail) = bytes.split_at(LINE_BYTES_MAX - self.rest.len());
            self.rest.extend_from_slice(head);
            let piece = std::mem::take(&mut self.rest);
            self.line(now, b'P', &piece, out);
            bytes = tail;
        }
        self.rest.extend_from_slice(bytes);
    }

    fn line(&self, now: Timestamp, tag: u8, line: &[u8], out: &mut Vec<u8>) {
        // Writing to a Vec cannot fail.
        let _ = write!(out, "{now:.9} {} {} ", self.stream.name(), tag as char);
        out.extend_from_slice(line);
        out.push(b'\n');
    }
}

/// A container's log file, or none.
#[derive(Debug)]
pub struct LogFile {
    path: Option<PathBuf>,
    file: Option<File>,
    /// Bytes that could not be written (disk full). Told once per burst.
    lost: u64,
}

impl LogFile {
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let file = path.map(open).transpose()?;
        Ok(Self { path: path.map(Path::to_owned), file, lost: 0 })
    }

    pub fn is_open(&self) -> bool {
        self.file.is_some()
    }

    pub fn reopen(&mut self) -> io::Result<()> {
        self.file = self.path.as_deref().map(open).transpose()?;
        Ok(())
    }

    /// Writes whole lines. A full disk must not stop containers: what does not fit is counted and dropped.
    pub fn write(&mut self, lines: &[u8]) {
        let Some(file) = &mut self.file else { return };
        match file.write_all(lines) {
            Ok(()) if self.lost > 0 => {
                eprintln!("log {:?} takes lines again, {} bytes were lost", self.path, self.lost);
                self.lost = 0;
            }
            Ok(()) => {}
            Err(error) => {
                if self.lost == 0 {
                    eprintln!("write log {:?}: {error}", self.path);
                }
                self.lost += lines.len() as u64;
            }
        }
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o640).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn split(chunks: &[&str], end: bool) -> String {
        let now: Timestamp = "2026-01-01T00:00:00.5Z".parse().unwrap();
        let mut splitter = Splitter::new(Stream::Stdout);
        let mut out = Vec::new();
        for chunk in chunks {
            splitter.push(now, chunk.as_bytes(), &mut out);
        }
        if end {
            splitter.finish(now, &mut out);
        }
        String::from_utf8(out).unwrap().replace("2026-01-01T00:00:00.500000000Z stdout ", "")
    }

    #[test]
    fn lines_carry_time_stream_and_tag() {
        let now: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let mut out = Vec::new();
        Splitter::new(Stream::Stderr).push(now, b"line\n", &mut out);
        assert_eq!(String::from_utf8(out).unwrap(), "2026-01-01T00:00:00.000000000Z stderr F line\n");
    }

    #[test]
    fn output_is_split_into_lines_however_it_arrives() {
        let cases: [(&[&str], bool, &str); 6] = [
            (&["a\nb\n"], false, "F a\nF b\n"),
            (&["a", "b", "\n"], false, "F ab\n"),
            (&["\n\n"], false, "F \nF \n"),
            (&["open"], false, ""),
            (&["open"], true, "P open\n"),
            (&["a\nopen"], true, "F a\nP open\n"),
        ];
        for (chunks, end, want) in cases {
            assert_eq!(split(chunks, end), want, "{chunks:?}");
        }
    }

    #[test]
    fn long_lines_come_in_pieces() {
        let long = "x".repeat(LINE_BYTES_MAX * 2 + 3);
        let piece = "x".repeat(LINE_BYTES_MAX);
        assert_eq!(split(&[&long, "\n"], false), format!("P {piece}\nP {piece}\nF xxx\n"));
        let exact = "x".repeat(LINE_BYTES_MAX);
        assert_eq!(split(&[&exact, "\n"], false), format!("F {exact}\n"));
    }
}
