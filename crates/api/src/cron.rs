//! Schedules of cron jobs: five fields, descriptors (`@daily`), `@every <duration>`; in a time zone.
//!
//! The fields are read by the `cronexpr` crate; what it knows beyond cron's own (`L`, `W`, `#`) Kubernetes does
//! not and is refused.

use cronexpr::Crontab;
use jiff::{SignedDuration, Timestamp, tz::TimeZone};

/// When a cron job runs.
#[derive(Debug, Clone)]
pub enum Schedule {
    Fields(Box<Crontab>),
    /// So long after the last time.
    Every(SignedDuration),
}

const DESCRIPTORS: &[(&str, &str)] = &[
    ("@yearly", "0 0 1 1 *"),
    ("@annually", "0 0 1 1 *"),
    ("@monthly", "0 0 1 * *"),
    ("@weekly", "0 0 * * 0"),
    ("@daily", "0 0 * * *"),
    ("@midnight", "0 0 * * *"),
    ("@hourly", "0 * * * *"),
];

impl Schedule {
    /// Reads a schedule. Without a time zone it is meant in that of this machine, as upstream's in that of its
    /// controller manager. The error says what is wrong with it.
    pub fn parse(schedule: &str, time_zone: Option<&str>) -> Result<Schedule, String> {
        let schedule = schedule.trim();
        if let Some(every) = schedule.strip_prefix("@every ") {
            return every_of(every);
        }
        let fields = match DESCRIPTORS.iter().find(|(name, _)| *name == schedule) {
            Some((_, fields)) => fields,
            None if schedule.starts_with('@') => return Err(format!("unrecognized descriptor: {schedule}")),
            None => schedule,
        };
        let count = fields.split_whitespace().count();
        if count != 5 {
            return Err(format!("expected exactly 5 fields, found {count}: [{schedule}]"));
        }
        // Weekdays and months are words of three letters; only there may letters stand.
        let plain = |field: &str| field.bytes().all(|b| b.is_ascii_digit() || b"*/-,?".contains(&b));
        let named = |field: &str| field.bytes().all(|b| b.is_ascii_alphanumeric() || b"*/-,?".contains(&b));
        let words = |field: &str| {
            field.split(|c: char| !c.is_ascii_alphabetic()).all(|word| word.is_empty() || word.len() == 3)
        };
        let parts: Vec<&str> = fields.split_whitespace().collect();
        let fine = parts[..3].iter().all(|f| plain(f)) && parts[3..].iter().all(|f| named(f) && words(f));
        if !fine {
            return Err(format!("failed to parse the fields of [{schedule}]"));
        }
        let zone = match time_zone {
            Some(zone) => zone.to_owned(),
            None => TimeZone::system().iana_name().unwrap_or("UTC").to_owned(),
        };
        let fields = format!("{} {zone}", fields.replace('?', "*"));
        let crontab = cronexpr::parse_crontab(&fields).map_err(|error| error.to_string())?;
        Ok(Schedule::Fields(Box::new(crontab)))
    }

    /// The first time after `after`; `None` for a schedule that never comes, such as the 31st of February.
    pub fn next(&self, after: Timestamp) -> Option<Timestamp> {
        match self {
            Schedule::Fields(crontab) => crontab.find_next(after).ok().map(|time| time.timestamp()),
            Schedule::Every(delay) => {
                let whole = Timestamp::from_second(after.as_second()).ok()?;
                whole.checked_add(*delay).ok()
            }
        }
    }
}

/// Go's durations: `1h30m`, in whole seconds, at least one.
fn every_of(text: &str) -> Result<Schedule, String> {
    let wrong = || format!("failed to parse duration @every {text}");
    let delay: SignedDuration = text.trim().parse().map_err(|_| wrong())?;
    if delay.is_negative() {
        return Err(wrong());
    }
    Ok(Schedule::Every(SignedDuration::from_secs(delay.as_secs().max(1))))
}

/// Whether a time zone is known here.
pub fn is_time_zone(name: &str) -> bool {
    !name.is_empty() && !name.eq_ignore_ascii_case("local") && TimeZone::get(name).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn next(schedule: &str, zone: &str, after: &str) -> String {
        let schedule = Schedule::parse(schedule, Some(zone)).unwrap();
        schedule.next(after.parse().unwrap()).map_or("never".to_owned(), |time| time.to_string())
    }

    #[test]
    fn the_next_time_is_found() {
        for (schedule, zone, after, expected) in [
            ("*/1 * * * *", "UTC", "2026-01-01T00:00:30Z", "2026-01-01T00:01:00Z"),
            ("0 22 * * 1-5", "UTC", "2026-01-02T23:00:00Z", "2026-01-05T22:00:00Z"),
            ("0 0 13 * FRI", "UTC", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
            ("@hourly", "UTC", "2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"),
            ("0 9 * * *", "Asia/Tokyo", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
            ("@every 1h30m", "UTC", "2026-01-01T00:00:00.5Z", "2026-01-01T01:30:00Z"),
            ("0 0 ? * *", "UTC", "2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"),
        ] {
            assert_eq!(next(schedule, zone, after), expected, "{schedule}");
        }
    }

    #[test]
    fn what_is_no_schedule_is_refused() {
        for wrong in
            ["", "* * * *", "* * * * * *", "61 * * * *", "@sometimes", "0 0 L * *", "0 0 * * 5#3", "@every x"]
        {
            assert!(Schedule::parse(wrong, None).is_err(), "{wrong:?}");
        }
    }
}
