//! The image of a sandbox's first process, for runtimes that want one (containerd): it holds the pod's namespaces
//! and does nothing. A program of a page, written here byte by byte, so that no registry and no compiler is
//! needed.

use super::build::{Entry, Image};
use crate::error::{Error, Result};

/// Where the program is loaded.
const BASE: u64 = 0x40_0000;
const HEADERS_LEN: u64 = 64 + 56;

/// Ignores SIGCHLD, so that the kernel reaps what is left to it where a pod shares its process namespace, then
/// waits for ever.
const CODE_X86_64: [u8; 72] = [
    0xb8, 0x0d, 0, 0, 0, // mov eax, 13 (rt_sigaction)
    0xbf, 0x11, 0, 0, 0, // mov edi, 17 (SIGCHLD)
    0x48, 0x8d, 0x35, 0x17, 0, 0, 0, // lea rsi, [rip + 23] (the action below)
    0x31, 0xd2, // xor edx, edx
    0x41, 0xba, 8, 0, 0, 0, // mov r10d, 8 (bytes in a signal set)
    0x0f, 0x05, // syscall
    0xb8, 0x22, 0, 0, 0, // again: mov eax, 34 (pause)
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp again
    0, 0, 0, 0, // to a multiple of 8
    1, 0, 0, 0, 0, 0, 0, 0, // handler: SIG_IGN
    0, 0, 0, 0, 0, 0, 0, 0, // flags
    0, 0, 0, 0, 0, 0, 0, 0, // restorer
    0, 0, 0, 0, 0, 0, 0, 0, // mask
];

/// The image, under the name the runtime knows it by.
///
/// # Errors
/// The machine's architecture is one the program was not written for.
pub fn image(name: &str) -> Result<Image> {
    if std::env::consts::ARCH != "x86_64" {
        return Err(Error::unsupported(format!(
            "there is no built-in pause image for {}; import one under the name {name}",
            std::env::consts::ARCH
        )));
    }
    Ok(Image {
        names: vec![name.to_owned()],
        files: vec![Entry::bytes("/pause", program(), 0o755)],
        entrypoint: vec!["/pause".to_owned()],
        user: "65535:65535".to_owned(),
        ..Image::default()
    })
}

/// A static ELF executable with one segment.
fn program() -> Vec<u8> {
    let length = HEADERS_LEN + CODE_X86_64.len() as u64;
    let mut out = Vec::with_capacity(length as usize);
    // Class 64 bit, little endian, version 1, System V.
    out.extend([0x7f, b'E', b'L', b'F', 2, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let half = |out: &mut Vec<u8>, value: u16| out.extend(value.to_le_bytes());
    let word = |out: &mut Vec<u8>, value: u32| out.extend(value.to_le_bytes());
    let long = |out: &mut Vec<u8>, value: u64| out.extend(value.to_le_bytes());
    // Executable, x86-64, version 1.
    half(&mut out, 2);
    half(&mut out, 62);
    word(&mut out, 1);
    // Entry, program headers, no section headers, no flags.
    long(&mut out, BASE + HEADERS_LEN);
    long(&mut out, 64);
    long(&mut out, 0);
    word(&mut out, 0);
    // Sizes of the headers: one program header, no section headers.
    for value in [64, 56, 1, 0, 0, 0] {
        half(&mut out, value);
    }
    // The program header: loadable, readable and executable, the whole file.
    word(&mut out, 1);
    word(&mut out, 5);
    for value in [0, BASE, BASE, length, length, 0x1000] {
        long(&mut out, value);
    }
    out.extend(CODE_X86_64);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn the_program_runs_and_waits() {
        if std::env::consts::ARCH != "x86_64" {
            eprintln!("SKIPPED: the program is for x86-64");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pause");
        std::fs::write(&path, program()).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        let mut child = std::process::Command::new(&path).spawn().unwrap();
        // It shows in /proc when it has come to its pause.
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let waits = loop {
            let call = std::fs::read_to_string(format!("/proc/{}/syscall", child.id())).unwrap_or_default();
            if call.starts_with("34 ") || std::time::Instant::now() > deadline {
                break call;
            }
            std::thread::yield_now();
        };
        let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        if waits.is_empty() {
            eprintln!("SKIPPED: this kernel does not show system calls");
            return;
        }
        assert!(waits.starts_with("34 "), "it waits in pause: {waits:?}");
        let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap().trim();
        let ignored = u64::from_str_radix(ignored, 16).unwrap();
        assert!(ignored & (1 << 16) != 0, "SIGCHLD is ignored: {ignored:x}");
    }
}
