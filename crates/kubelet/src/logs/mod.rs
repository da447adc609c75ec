//! Container logs: reading CRI's log format, following without polling, and rotation.
//!
//! A line is `2026-01-02T03:04:05.000000006Z stdout F text`; `P` marks a part of a longer line.

pub mod read;
pub mod rotation;

use jiff::Timestamp;
use std::path::Path;

/// One line, or part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    pub time: Timestamp,
    /// As written, for `timestamps`.
    pub time_text: &'a str,
    pub stderr: bool,
    /// The line goes on in the next entry.
    pub partial: bool,
    pub text: &'a [u8],
}

/// Reads one entry, without its line feed. `None` for what is no entry: it is left out.
pub fn parse(entry: &[u8]) -> Option<Line<'_>> {
    let mut fields = entry.splitn(4, |byte| *byte == b' ');
    let time_text = std::str::from_utf8(fields.next()?).ok()?;
    let time = time_text.parse().ok()?;
    let stderr = match fields.next()? {
        b"stdout" => false,
        b"stderr" => true,
        _ => return None,
    };
    // Tags are separated by colons; the first one says whether the line is complete.
    let partial = fields.next()?.split(|byte| *byte == b':').next() == Some(b"P");
    Some(Line { time, time_text, stderr, partial, text: fields.next().unwrap_or_default() })
}

/// The end of a log as text, at most so many bytes and 80 lines: what a container that failed left to say.
pub fn tail_text(path: &Path, bytes_max: usize) -> String {
    const LINES_MAX: usize = 80;
    // Entries are longer than their text; what is cut in front is no entry any more.
    let raw = read_end(path, bytes_max as u64 * 4 + 4096).unwrap_or_default();
    let entries: Vec<Line<'_>> = raw.split(|byte| *byte == b'\n').filter_map(parse).collect();
    let mut text = Vec::new();
    for line in &entries[entries.len().saturating_sub(LINES_MAX)..] {
        text.extend_from_slice(line.text);
        if !line.partial {
            text.push(b'\n');
        }
    }
    let from = text.len().saturating_sub(bytes_max);
    String::from_utf8_lossy(&text[from..]).into_owned()
}

fn read_end(path: &Path, bytes_max: u64) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek, SeekFrom};
    let mut file = std::fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
    let mut out = Vec::new();
    file.take(bytes_max).read_to_end(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read_and_nonsense_is_left_out() {
        let line = parse(b"2026-01-02T03:04:05.000000006Z stderr P a b  c").unwrap();
        assert_eq!((line.stderr, line.partial, line.text), (true, true, &b"a b  c"[..]));
        assert_eq!(parse(b"2026-01-02T03:04:05Z stdout F ").unwrap().text, b"");
        for bad in [&b"x stdout F a"[..], b"2026-01-02T03:04:05Z std F a", b"", b"2026-01-02T03:04:05Z"] {
            assert_eq!(parse(bad), None);
        }
    }

    #[test]
    fn the_end_of_a_log_is_told_as_text() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let entries: String = (0..100).map(|n| format!("2026-01-02T03:04:05Z stdout F line {n}\n")).collect();
        std::fs::write(file.path(), entries).unwrap();
        let text = tail_text(file.path(), 2048);
        assert!(text.starts_with("line 20\n") && text.ends_with("line 99\n"), "{text}");
        assert_eq!(tail_text(file.path(), 8), "line 99\n");
        assert_eq!(tail_text(Path::new("/nonexistent"), 8), "");
    }
}
