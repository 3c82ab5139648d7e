//! Sizes ("10GiB") and durations ("5s") as people write them.
//!
//! Pure. Owns the spelling and the ranges' messages; knows no key.

use std::ops::RangeInclusive;
use std::time::Duration;

const SIZES: [(&str, u64); 5] =
    [("B", 1), ("KiB", 1 << 10), ("MiB", 1 << 20), ("GiB", 1 << 30), ("TiB", 1 << 40)];

/// Parses a number of bytes: `512`, `64KiB`, `1.5 GiB`, `10G`, `10 gb`. Units are always powers of 1024.
pub fn parse_size(text: &str, range: RangeInclusive<u64>) -> Result<u64, String> {
    let (number, unit) = split(text).ok_or_else(|| {
        format!("{text:?} is not a size; write a number and a unit, such as \"64KiB\", \"10GiB\"")
    })?;
    let scale = match unit.to_ascii_lowercase().as_str() {
        "" | "b" => 1_u64,
        "k" | "kb" | "kib" => 1 << 10,
        "m" | "mb" | "mib" => 1 << 20,
        "g" | "gb" | "gib" => 1 << 30,
        "t" | "tb" | "tib" => 1 << 40,
        "p" | "pb" | "pib" => 1 << 50,
        _ => return Err(format!("{text:?} has the unknown unit {unit:?}; use B, KiB, MiB, GiB or TiB")),
    };
    let bytes = number * scale as f64;
    // The comparison also catches what does not fit, before the cast could saturate.
    if !(*range.start() as f64..=*range.end() as f64).contains(&bytes) {
        return Err(format!(
            "{text:?} is out of range; it must lie between {} and {}",
            exact_size(*range.start()),
            exact_size(*range.end())
        ));
    }
    Ok(bytes as u64)
}

/// Parses a time: `500ms`, `5s`, `1.5m`, `2h`, `1d`; a bare number is seconds.
pub fn parse_duration(text: &str, range: RangeInclusive<Duration>) -> Result<Duration, String> {
    let (number, unit) = split(text).ok_or_else(|| {
        format!("{text:?} is not a duration; write a number and a unit, such as \"500ms\", \"5s\", \"2m\"")
    })?;
    let scale = match unit.to_ascii_lowercase().as_str() {
        "ms" => 0.001,
        "" | "s" | "sec" => 1.0,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err(format!("{text:?} has the unknown unit {unit:?}; use ms, s, m, h or d")),
    };
    let seconds = number * scale;
    if !(range.start().as_secs_f64()..=range.end().as_secs_f64()).contains(&seconds) {
        return Err(format!(
            "{text:?} is out of range; it must lie between {} and {}",
            exact_duration(*range.start()),
            exact_duration(*range.end())
        ));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// The shortest spelling that loses nothing: `1MiB`, `1000B`.
#[must_use]
pub fn exact_size(bytes: u64) -> String {
    let (name, scale) = SIZES
        .into_iter()
        .rev()
        .find(|(_, scale)| bytes != 0 && bytes.is_multiple_of(*scale))
        .unwrap_or(("B", 1));
    format!("{}{name}", bytes / scale)
}

/// The shortest spelling that loses nothing down to milliseconds: `5s`, `2m`, `100ms`.
#[must_use]
pub fn exact_duration(time: Duration) -> String {
    let ms = time.as_millis();
    for (name, scale) in [("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000)] {
        if ms != 0 && ms.is_multiple_of(scale) {
            return format!("{}{name}", ms / scale);
        }
    }
    format!("{ms}ms")
}

fn split(text: &str) -> Option<(f64, &str)> {
    let text = text.trim();
    let end = text.find(|c: char| !(c.is_ascii_digit() || c == '.' || c == '_')).unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    Some((number.replace('_', "").parse().ok()?, unit.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANY: RangeInclusive<u64> = 0..=u64::MAX;

    #[test]
    fn sizes_are_powers_of_1024_in_every_spelling() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("64KiB", 65536),
            ("64k", 65536),
            ("1.5 GiB", 3 << 29),
            ("10gb", 10 << 30),
            ("1_000_000", 1_000_000),
            (" 2 T ", 2 << 40),
        ] {
            assert_eq!(parse_size(text, ANY), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn wrong_sizes_say_what_is_wrong() {
        let error = |text: &str| parse_size(text, 1 << 20..=1 << 30).unwrap_err();
        assert_eq!(
            error("big"),
            "\"big\" is not a size; write a number and a unit, such as \"64KiB\", \"10GiB\""
        );
        assert_eq!(
            error("-1"),
            "\"-1\" is not a size; write a number and a unit, such as \"64KiB\", \"10GiB\""
        );
        assert_eq!(
            error("5 parsec"),
            "\"5 parsec\" has the unknown unit \"parsec\"; use B, KiB, MiB, GiB or TiB"
        );
        assert_eq!(error("1KiB"), "\"1KiB\" is out of range; it must lie between 1MiB and 1GiB");
        assert_eq!(
            error("9999999999999TiB"),
            "\"9999999999999TiB\" is out of range; it must lie between 1MiB and 1GiB"
        );
    }

    #[test]
    fn durations_in_every_unit() {
        let range = Duration::ZERO..=Duration::from_secs(1_000_000);
        for (text, ms) in [
            ("500ms", 500),
            ("5s", 5000),
            ("5", 5000),
            ("1.5m", 90_000),
            ("2h", 7_200_000),
            ("1d", 86_400_000),
        ] {
            assert_eq!(parse_duration(text, range.clone()), Ok(Duration::from_millis(ms)), "{text}");
        }
    }

    #[test]
    fn wrong_durations_say_what_is_wrong() {
        let error = |text: &str| {
            parse_duration(text, Duration::from_millis(100)..=Duration::from_secs(120)).unwrap_err()
        };
        assert_eq!(
            error("soon"),
            "\"soon\" is not a duration; write a number and a unit, such as \"500ms\", \"5s\", \"2m\""
        );
        assert_eq!(error("5 weeks"), "\"5 weeks\" has the unknown unit \"weeks\"; use ms, s, m, h or d");
        assert_eq!(error("3m"), "\"3m\" is out of range; it must lie between 100ms and 2m");
        assert_eq!(error("0s"), "\"0s\" is out of range; it must lie between 100ms and 2m");
    }

    #[test]
    fn exact_spellings_come_back() {
        for bytes in [0, 1, 1000, 1024, 3 << 29, 10 << 30] {
            assert_eq!(parse_size(&exact_size(bytes), ANY), Ok(bytes));
        }
        assert_eq!(exact_size(10 << 30), "10GiB");
        assert_eq!(exact_duration(Duration::from_millis(1500)), "1500ms");
        assert_eq!(exact_duration(Duration::from_secs(90)), "90s");
    }
}
