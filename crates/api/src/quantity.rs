//! Quantities: fixed-point numbers with a suffix (`500m`, `1Gi`, `1e3`), kept in nano units.
//!
//! Parsing, canonical printing and arithmetic follow `k8s.io/apimachinery/pkg/api/resource`.

use std::cmp::Ordering;
use std::fmt;
use std::iter::Sum;
use std::ops::{Add, Sub};
use std::str::FromStr;

/// One unit in nanos: the finest precision Kubernetes keeps.
const NANO: i128 = 1_000_000_000;

/// The message upstream answers for anything that is not a quantity.
pub const FORMAT_ERROR: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

/// A quantity; ordering and equality look at the value only.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quantity {
    nanos: i128,
    format: Format,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
enum Format {
    #[default]
    DecimalSi,
    BinarySi,
    DecimalExponent,
}

#[derive(Debug, Clone, Copy, PartialEq, thiserror::Error)]
#[error("{FORMAT_ERROR}")]
pub struct ParseError;

impl Quantity {
    /// A whole number of units.
    pub fn from_units(units: i64) -> Self {
        Quantity { nanos: i128::from(units) * NANO, format: Format::DecimalSi }
    }

    /// A number of thousandths.
    pub fn from_millis(millis: i64) -> Self {
        Quantity { nanos: i128::from(millis) * (NANO / 1000), format: Format::DecimalSi }
    }

    /// A number of bytes, printed with binary suffixes.
    pub fn from_bytes(bytes: i64) -> Self {
        Quantity { nanos: i128::from(bytes) * NANO, format: Format::BinarySi }
    }

    /// Whole units, rounded up, saturating.
    pub fn units(&self) -> i64 {
        saturate(div_ceil(self.nanos, NANO))
    }

    /// Thousandths, rounded up, saturating.
    pub fn millis(&self) -> i64 {
        saturate(div_ceil(self.nanos, NANO / 1000))
    }

    /// Roughly; for ratios.
    pub fn as_f64(&self) -> f64 {
        self.nanos as f64 / NANO as f64
    }

    pub fn is_zero(&self) -> bool {
        self.nanos == 0
    }

    pub fn is_negative(&self) -> bool {
        self.nanos < 0
    }
}

fn div_ceil(value: i128, by: i128) -> i128 {
    value.div_euclid(by) + i128::from(value.rem_euclid(by) != 0)
}

fn saturate(value: i128) -> i64 {
    value.clamp(i128::from(i64::MIN), i128::from(i64::MAX)) as i64
}

impl FromStr for Quantity {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let number_len = text
            .char_indices()
            .find(|(i, c)| !(c.is_ascii_digit() || *c == '.' || (*i == 0 && matches!(c, '+' | '-'))))
            .map_or(text.len(), |(i, _)| i);
        let (number, suffix) = text.split_at(number_len);
        let (scale, format) = read_suffix(suffix)?;
        let nanos = read_number(number, scale)?;
        Ok(Quantity { nanos, format })
    }
}

/// What one unit of the suffix is worth, as a fraction of nanos.
enum Scale {
    Times(i128),
    PowerOfTen(i32),
}

fn read_suffix(suffix: &str) -> Result<(Scale, Format), ParseError> {
    let power = |n| (Scale::PowerOfTen(n), Format::DecimalSi);
    let binary = |n: u32| (Scale::Times(1i128 << (10 * n)), Format::BinarySi);
    Ok(match suffix {
        "" => power(0),
        "n" => power(-9),
        "u" => power(-6),
        "m" => power(-3),
        "k" => power(3),
        "M" => power(6),
        "G" => power(9),
        "T" => power(12),
        "P" => power(15),
        "E" => power(18),
        "Ki" => binary(1),
        "Mi" => binary(2),
        "Gi" => binary(3),
        "Ti" => binary(4),
        "Pi" => binary(5),
        "Ei" => binary(6),
        other => {
            let digits = other.strip_prefix(['e', 'E']).ok_or(ParseError)?;
            let exponent: i32 = digits.parse().map_err(|_| ParseError)?;
            (Scale::PowerOfTen(exponent), Format::DecimalExponent)
        }
    })
}

/// Reads digits with at most one point and scales them to nanos, rounding away from zero as upstream does.
fn read_number(number: &str, scale: Scale) -> Result<i128, ParseError> {
    let (negative, digits) = match number.as_bytes().first() {
        Some(b'-') => (true, &number[1..]),
        Some(b'+') => (false, &number[1..]),
        _ => (false, number),
    };
    let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
    if (whole.is_empty() && fraction.is_empty()) || fraction.contains('.') {
        return Err(ParseError);
    }
    let (times, power) = match scale {
        Scale::Times(times) => (times, 9),
        Scale::PowerOfTen(power) => (1, 9 + power),
    };
    let mut nanos: i128 = 0;
    let mut exponent = power;
    for digit in whole.bytes().chain(fraction.bytes().take(40)) {
        nanos = nanos.saturating_mul(10).saturating_add(i128::from(digit - b'0'));
    }
    exponent -= fraction.len().min(40) as i32;
    nanos = nanos.saturating_mul(times);
    while exponent > 0 && nanos != 0 && nanos < i128::MAX / 10 {
        nanos *= 10;
        exponent -= 1;
    }
    let mut rounded_up = false;
    while exponent < 0 && nanos != 0 {
        rounded_up |= nanos % 10 != 0;
        nanos /= 10;
        exponent += 1;
    }
    nanos += i128::from(rounded_up);
    // Upstream caps at the largest 64-bit number of units.
    nanos = nanos.min(i128::from(i64::MAX) * NANO);
    Ok(if negative { -nanos } else { nanos })
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = self.nanos / NANO;
        let whole = self.nanos % NANO == 0;
        if self.format == Format::BinarySi && whole && units.abs() >= 1024 {
            let (mantissa, steps) = strip_factor(units, 1024, 6);
            return write!(f, "{mantissa}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][steps]);
        }
        if self.nanos == 0 {
            return f.write_str("0");
        }
        let (mantissa, steps) = strip_factor(self.nanos, 1000, 9);
        match self.format {
            Format::DecimalExponent if steps != 3 => {
                write!(f, "{mantissa}e{}", (steps as i32 - 3) * 3)
            }
            _ => write!(f, "{mantissa}{}", ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"][steps]),
        }
    }
}

/// Divides out `factor` as often as it goes, at most `limit` times.
fn strip_factor(mut value: i128, factor: i128, limit: usize) -> (i128, usize) {
    let mut steps = 0;
    while steps < limit && value != 0 && value % factor == 0 {
        value /= factor;
        steps += 1;
    }
    (value, steps)
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl Add for Quantity {
    type Output = Quantity;

    fn add(self, other: Quantity) -> Quantity {
        // Like upstream, a zero takes on the other's format.
        let format = if self.nanos == 0 { other.format } else { self.format };
        Quantity { nanos: self.nanos.saturating_add(other.nanos), format }
    }
}

impl Sub for Quantity {
    type Output = Quantity;

    fn sub(self, other: Quantity) -> Quantity {
        let format = if self.nanos == 0 { other.format } else { self.format };
        Quantity { nanos: self.nanos.saturating_sub(other.nanos), format }
    }
}

impl Sum for Quantity {
    fn sum<I: Iterator<Item = Quantity>>(items: I) -> Quantity {
        items.fold(Quantity::default(), Add::add)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_canonically() {
        for (given, canonical) in [
            ("1000m", "1"),
            ("0.5", "500m"),
            ("1500m", "1500m"),
            ("1024", "1024"),
            ("1024Ki", "1Mi"),
            ("1000Ki", "1000Ki"),
            ("0.5Gi", "512Mi"),
            ("512Ki", "512Ki"),
            ("1e3", "1e3"),
            ("1E", "1E"),
            ("100k", "100k"),
            ("-5m", "-5m"),
            ("0", "0"),
            ("1.5", "1500m"),
            ("+2", "2"),
            (".5", "500m"),
            ("0.1n", "1n"),
        ] {
            assert_eq!(given.parse::<Quantity>().expect(given).to_string(), canonical, "{given}");
        }
    }

    #[test]
    fn refuses_what_is_not_a_quantity() {
        for given in ["", "abc", "1x", "1.2.3", "1 Gi", "--1", "1ki", "e3"] {
            assert!(given.parse::<Quantity>().is_err(), "{given}");
        }
    }

    #[test]
    fn rounds_up_when_read_coarsely() {
        let quantity: Quantity = "1500u".parse().expect("valid");
        assert_eq!((quantity.millis(), quantity.units()), (2, 1));
    }
}
