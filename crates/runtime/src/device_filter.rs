//! Which devices a container may use, on cgroup v2: there it is a small BPF program attached to the group (v1 has
//! files for it). The program walks the rules and allows what one of them allows.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use crate::cgroup::DeviceRule;
use crate::error::{Context, Result};

const BPF_PROG_LOAD: libc::c_long = 5;
const BPF_PROG_ATTACH: libc::c_long = 8;
const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
const BPF_CGROUP_DEVICE: u32 = 6;
/// Several programs may sit on one group; all must allow.
const BPF_F_ALLOW_MULTI: u32 = 2;

/// Attaches a filter for `rules` to the group at `dir`.
pub fn attach(dir: &Path, rules: &[DeviceRule]) -> Result<()> {
    let program = load(&assemble(rules)).step(|| "load the device filter".into())?;
    let group = std::fs::File::open(dir).step(|| format!("open control group {}", dir.display()))?;
    let attributes = AttachAttributes {
        target: group.as_raw_fd() as u32,
        program: program.as_raw_fd() as u32,
        kind: BPF_CGROUP_DEVICE,
        flags: BPF_F_ALLOW_MULTI,
    };
    bpf(BPF_PROG_ATTACH, &attributes).step(|| format!("attach the device filter to {}", dir.display()))?;
    Ok(())
}

/// One BPF instruction, as the kernel reads it.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Instruction {
    code: u8,
    registers: u8,
    offset: i16,
    immediate: i32,
}

#[repr(C)]
struct LoadAttributes {
    kind: u32,
    count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

#[repr(C)]
struct AttachAttributes {
    target: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

fn op(code: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> Instruction {
    Instruction { code, registers: source << 4 | destination, offset, immediate }
}

/// r2 type, r3 access, r4 major, r5 minor; r1 (the context) is scratch after that.
fn assemble(rules: &[DeviceRule]) -> Vec<Instruction> {
    const LOAD_WORD: u8 = 0x61;
    const MOV: u8 = 0xbf;
    const MOV_IMM: u8 = 0xb7;
    const AND_IMM: u8 = 0x57;
    const SHIFT_RIGHT_32: u8 = 0x74;
    const JUMP_NOT_EQUAL_IMM: u8 = 0x55;
    const JUMP_NOT_EQUAL: u8 = 0x5d;
    const EXIT: u8 = 0x95;
    let mut program = vec![
        op(LOAD_WORD, 2, 1, 0, 0),
        op(AND_IMM, 2, 0, 0, 0xffff),
        op(LOAD_WORD, 3, 1, 0, 0),
        op(SHIFT_RIGHT_32, 3, 0, 0, 16),
        op(LOAD_WORD, 4, 1, 4, 0),
        op(LOAD_WORD, 5, 1, 8, 0),
    ];
    for rule in rules {
        let access = access_bits(&rule.access);
        let mut block = vec![op(JUMP_NOT_EQUAL_IMM, 2, 0, 0, if rule.kind == 'b' { 1 } else { 2 })];
        block.push(op(MOV, 1, 3, 0, 0));
        block.push(op(AND_IMM, 1, 0, 0, access));
        block.push(op(JUMP_NOT_EQUAL, 1, 3, 0, 0));
        for (register, number) in [(4, rule.major), (5, rule.minor)] {
            if let Some(number) = number {
                block.push(op(JUMP_NOT_EQUAL_IMM, register, 0, 0, number as i32));
            }
        }
        block.push(op(MOV_IMM, 0, 0, 0, 1));
        block.push(op(EXIT, 0, 0, 0, 0));
        let len = block.len();
        for (index, instruction) in block.iter_mut().enumerate() {
            if matches!(instruction.code, JUMP_NOT_EQUAL_IMM | JUMP_NOT_EQUAL) {
                instruction.offset = (len - index - 1) as i16;
            }
        }
        program.extend(block);
    }
    program.push(op(MOV_IMM, 0, 0, 0, 0));
    program.push(op(EXIT, 0, 0, 0, 0));
    program
}

fn access_bits(access: &str) -> i32 {
    access.chars().fold(0, |bits, letter| {
        bits | match letter {
            'm' => 1,
            'r' => 2,
            'w' => 4,
            _ => 0,
        }
    })
}

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let attributes = LoadAttributes {
        kind: BPF_PROG_TYPE_CGROUP_DEVICE,
        count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
    };
    let fd = bpf(BPF_PROG_LOAD, &attributes)?;
    // SAFETY: the kernel has just made this descriptor for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<libc::c_long> {
    // SAFETY: `attributes` is a C struct of the size told; the pointers inside live through the call.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, std::mem::size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::DeviceRules;

    #[test]
    fn jumps_lead_to_the_next_rule() {
        let rule = DeviceRule { kind: 'c', major: Some(1), minor: None, access: "rwm".into() };
        let program = assemble(&[rule]);
        assert_eq!(program.len(), 6 + 7 + 2);
        assert_eq!(program[6].offset, 6);
        assert_eq!(program[6].immediate, 2);
        assert_eq!(program[8].immediate, 7);
    }

    #[test]
    fn the_kernel_takes_the_standard_filter() {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: loading BPF programs needs root");
            return;
        }
        match load(&assemble(&DeviceRules::standard().allow)) {
            Ok(_) => {}
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOSYS | libc::EINVAL)) => {
                eprintln!("skipped: this kernel does not take cgroup device programs: {error}");
            }
            Err(error) => panic!("{error}"),
        }
    }
}
