//! Times as Kubernetes prints them: RFC 3339 in UTC, whole seconds (`Time`) or microseconds (`MicroTime`).

use jiff::Timestamp;

/// `2026-01-02T03:04:05Z`, with this many digits after the second.
pub fn print(time: Timestamp, digits: u8) -> String {
    use jiff::fmt::temporal::DateTimePrinter;
    let printer = DateTimePrinter::new().precision(Some(digits));
    printer.timestamp_to_string(&time)
}

/// The age column: two significant units at most, as `duration.HumanDuration` has it.
pub fn age(seconds: i64) -> String {
    let (s, m, h, d) = (seconds, seconds / 60, seconds / 3600, seconds / 86_400);
    let years = d / 365;
    let pair = |whole: i64, unit: &str, rest: i64, rest_unit: &str| {
        if rest == 0 { format!("{whole}{unit}") } else { format!("{whole}{unit}{rest}{rest_unit}") }
    };
    match () {
        _ if s < -1 => "<invalid>".into(),
        _ if s < 0 => "0s".into(),
        _ if s < 120 => format!("{s}s"),
        _ if m < 10 => pair(m, "m", s % 60, "s"),
        _ if m < 180 => format!("{m}m"),
        _ if h < 8 => pair(h, "h", m % 60, "m"),
        _ if h < 48 => format!("{h}h"),
        _ if h < 192 => pair(d, "d", h % 24, "h"),
        _ if d < 730 => format!("{d}d"),
        _ if years < 8 => pair(years, "y", d % 365, "d"),
        _ => format!("{years}y"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_read_as_kubectl_prints_them() {
        for (seconds, text) in [
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (150, "2m30s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (10_860, "3h1m"),
            (28_800, "8h"),
            (172_800, "2d"),
            (180_000, "2d2h"),
            (700_000, "8d"),
            (94_608_000, "3y"),
        ] {
            assert_eq!(age(seconds), text, "{seconds}");
        }
    }
}
