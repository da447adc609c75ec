//! The rim: where the process gets time and randomness from. While a simulation runs, the two functions of the C
//! library that all of Rust asks (`clock_gettime` for every clock, `getrandom` for hash maps, uids, jitter and the
//! choices of `select!`) are answered from virtual time and the seed. So whatever code is simulated, today's or
//! tomorrow's, of ours or of a library, runs the same way again.
//!
//! This works because a program's own definition of a symbol comes before the library's. A simulation has a process
//! of its own, so that nothing is left over from another one.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering::SeqCst};
use std::time::Duration;

/// When every simulation begins: Monday, 2 March 2026, 10:00 UTC.
const BEGIN_SECONDS: i64 = 1_772_445_600;
/// What monotonic clocks show at the beginning: late enough to subtract from.
const UPTIME_SECONDS: u64 = 1_000_000;

static SIMULATING: AtomicBool = AtomicBool::new(false);
static RANDOM: AtomicU64 = AtomicU64::new(0);
static ELAPSED_NANOS: AtomicU64 = AtomicU64::new(0);
static WALL_OFFSET_SECONDS: AtomicI64 = AtomicI64::new(0);

/// From here on, time stands still until [`set_elapsed`] and randomness comes from `seed`.
pub fn enter(seed: u64) {
    RANDOM.store(seed, SeqCst);
    SIMULATING.store(true, SeqCst);
}

/// Virtual time since the beginning.
pub fn set_elapsed(elapsed: Duration) {
    ELAPSED_NANOS.store(u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX), SeqCst);
}

pub fn elapsed() -> Duration {
    Duration::from_nanos(ELAPSED_NANOS.load(SeqCst))
}

/// Sets the wall clock forward or back. Monotonic clocks go on.
pub fn jump(seconds: i64) {
    WALL_OFFSET_SECONDS.fetch_add(seconds, SeqCst);
}

/// The real time, for limits on the simulation itself.
pub fn real_seconds() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    real_clock(libc::CLOCK_MONOTONIC, &mut time);
    u64::try_from(time.tv_sec).unwrap_or(0)
}

/// SplitMix64: every step is good enough for hash keys and names.
fn next_random() -> u64 {
    const STEP: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut z = RANDOM.fetch_add(STEP, SeqCst).wrapping_add(STEP);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn real_clock(clock: libc::clockid_t, time: &mut libc::timespec) -> libc::c_int {
    // SAFETY: the pointer is to a timespec of ours; an unknown clock only makes the call fail.
    let result = unsafe { libc::syscall(libc::SYS_clock_gettime, clock, time as *mut libc::timespec) };
    libc::c_int::try_from(result).unwrap_or(-1)
}

/// Takes the place of the C library's function; the contract is `clock_gettime(2)`'s.
///
/// # Safety
/// `time` points to a timespec that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: libc::clockid_t, time: *mut libc::timespec) -> libc::c_int {
    // SAFETY: the caller promises it.
    let time = unsafe { &mut *time };
    let cpu_time = matches!(clock, libc::CLOCK_PROCESS_CPUTIME_ID | libc::CLOCK_THREAD_CPUTIME_ID);
    if cpu_time || !SIMULATING.load(SeqCst) {
        return real_clock(clock, time);
    }
    let nanos = ELAPSED_NANOS.load(SeqCst);
    let seconds = i64::try_from(nanos / 1_000_000_000).unwrap_or(i64::MAX);
    let begin = match clock {
        libc::CLOCK_REALTIME | libc::CLOCK_REALTIME_COARSE => {
            BEGIN_SECONDS + WALL_OFFSET_SECONDS.load(SeqCst)
        }
        _ => UPTIME_SECONDS as i64,
    };
    time.tv_sec = begin + seconds;
    time.tv_nsec = (nanos % 1_000_000_000) as libc::c_long;
    0
}

/// Takes the place of the C library's function; the contract is `getrandom(2)`'s.
///
/// # Safety
/// `buffer` points to `length` bytes that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn getrandom(
    buffer: *mut libc::c_void,
    length: libc::size_t,
    flags: libc::c_uint,
) -> libc::ssize_t {
    if !SIMULATING.load(SeqCst) {
        // SAFETY: the caller's buffer and length are passed on as they are.
        return unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) as libc::ssize_t };
    }
    if length == 0 {
        return 0;
    }
    // SAFETY: the caller promises that so many bytes may be written there.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
    for chunk in bytes.chunks_mut(8) {
        chunk.copy_from_slice(&next_random().to_le_bytes()[..chunk.len()]);
    }
    length as libc::ssize_t
}
