//! What time it is, passed in. Waiting is `tokio::time`'s business; this is only for timestamps that end up in
//! objects or are compared with timestamps from objects.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, Time};
use std::time::Duration;
use tokio::time::Instant;

/// Tells the wall-clock time.
#[derive(Clone, Debug)]
pub enum Clock {
    /// The machine's clock.
    System,
    /// `base` plus what tokio's clock advanced since `start`: stands still when a test pauses tokio's time, and
    /// moves with `tokio::time::advance`.
    Virtual { base: Timestamp, start: Instant },
}

impl Clock {
    /// A clock that starts at `base` and then follows tokio's (pausable) time.
    pub fn starting_at(base: Timestamp) -> Self {
        Clock::Virtual { base, start: Instant::now() }
    }

    /// The present moment.
    pub fn now(&self) -> Timestamp {
        match self {
            Clock::System => Timestamp::now(),
            Clock::Virtual { base, start } => {
                let elapsed = SignedDuration::try_from(start.elapsed()).unwrap_or(SignedDuration::MAX);
                base.saturating_add(elapsed).unwrap_or(Timestamp::MAX)
            }
        }
    }

    /// The present moment as the API writes it: whole seconds.
    pub fn time(&self) -> Time {
        Time(whole_seconds(self.now()))
    }

    /// The present moment with microseconds.
    pub fn micro_time(&self) -> MicroTime {
        let now = self.now();
        MicroTime(Timestamp::from_microsecond(now.as_microsecond()).unwrap_or(now))
    }

    /// How long ago `then` was; zero when it lies in the future.
    pub fn since(&self, then: Timestamp) -> Duration {
        Duration::try_from(self.now().duration_since(then)).unwrap_or(Duration::ZERO)
    }

    /// How long until `then`; zero when it has passed.
    pub fn until(&self, then: Timestamp) -> Duration {
        Duration::try_from(then.duration_since(self.now())).unwrap_or(Duration::ZERO)
    }
}

fn whole_seconds(timestamp: Timestamp) -> Timestamp {
    Timestamp::from_second(timestamp.as_second()).unwrap_or(timestamp)
}
