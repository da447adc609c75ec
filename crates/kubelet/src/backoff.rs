//! How long to wait before trying a failing thing again: 10 s, doubling to 5 minutes, forgotten after 10 quiet
//! minutes (client-go's `flowcontrol.Backoff`, as the kubelet uses it for crashes and image pulls).

use std::time::Duration;
use tokio::time::Instant;

pub const INITIAL: Duration = Duration::from_secs(10);
pub const MAX: Duration = Duration::from_secs(300);

/// One failing thing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    delay: Duration,
    last: Option<Instant>,
}

impl Backoff {
    /// How long it still has to wait, if it failed at `failed_at`; `None` when it may be tried now.
    pub fn remaining(&self, failed_at: Instant, now: Instant) -> Option<Duration> {
        let last = self.last?;
        if failed_at.saturating_duration_since(last) > 2 * MAX {
            return None;
        }
        let until = failed_at + self.delay;
        (until > now).then(|| until - now)
    }

    /// Counts a try that follows the failure at `failed_at`.
    pub fn next(&mut self, failed_at: Instant, now: Instant) {
        let quiet = self.last.is_none_or(|last| failed_at.saturating_duration_since(last) > 2 * MAX);
        self.delay = if quiet { INITIAL } else { (self.delay * 2).min(MAX) };
        self.last = Some(now);
    }

    /// The present delay, as messages tell it.
    pub fn delay(&self) -> Duration {
        self.delay
    }
}

/// A duration as Go prints it: `10s`, `2m40s`, `5m0s`.
pub fn go_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match (seconds / 3600, seconds / 60 % 60, seconds % 60) {
        (0, 0, _) if duration.subsec_millis() > 0 => format!("{}s", duration.as_secs_f64()),
        (0, 0, seconds) => format!("{seconds}s"),
        (0, minutes, seconds) => format!("{minutes}m{seconds}s"),
        (hours, minutes, seconds) => format!("{hours}h{minutes}m{seconds}s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_to_five_minutes_and_are_forgotten_after_ten_quiet_minutes() {
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        assert_eq!(backoff.remaining(now, now), None, "the first failure is tried again at once");
        for want in [10, 20, 40, 80, 160, 300, 300] {
            backoff.next(now, now);
            assert_eq!(backoff.remaining(now, now), Some(Duration::from_secs(want)));
            now += Duration::from_secs(want);
            assert_eq!(backoff.remaining(now - Duration::from_secs(want), now), None);
        }
        now += Duration::from_secs(601);
        assert_eq!(backoff.remaining(now, now), None);
        backoff.next(now, now);
        assert_eq!(backoff.delay(), INITIAL);
    }

    #[test]
    fn durations_are_printed_like_gos() {
        let cases = [(10, "10s"), (160, "2m40s"), (300, "5m0s"), (3600, "1h0m0s")];
        for (seconds, want) in cases {
            assert_eq!(go_duration(Duration::from_secs(seconds)), want);
        }
    }
}
