//! How many bytes per second may go to or come from a replica, by the time of the week, and who has to wait for that.
//!
//! Pure. Owns the spelling of rates and timetables and the arithmetic of a bucket of tokens; knows no clock and no network.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

const DAYS: [&str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
const MINUTES_OF_DAY: u32 = 24 * 60;
/// The smallest and the largest rate, in bytes per second.
const RATES: (f64, f64) = (1024.0, (1u64 << 40) as f64);
/// The time whose worth of bytes an idle direction may send at once.
const BURST: Duration = Duration::from_secs(1);

/// A minute of the week, local time: 0 is Monday 00:00.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct WeekMinute(u32);

impl WeekMinute {
    /// The minute `hour`:`minute` of a day, 0 being Monday. What is out of range goes round.
    #[must_use]
    pub fn new(day: u32, hour: u32, minute: u32) -> Self {
        Self((day * MINUTES_OF_DAY + hour * 60 + minute) % (7 * MINUTES_OF_DAY))
    }
}

/// Bytes per second at each time of the week; `None` is no limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Timetable {
    /// From this minute on. Empty: never a limit.
    entries: BTreeMap<WeekMinute, Option<u64>>,
}

impl Timetable {
    /// The same limit at all times.
    #[must_use]
    pub fn always(rate: Option<u64>) -> Self {
        Self { entries: [(WeekMinute(0), rate)].into() }
    }

    /// Reads `1MiB`, `500KiB/s`, `off`, or entries `[DAY-]HH:MM,RATE` separated by blanks or `;`, in any order. An entry without
    /// a day is for every day, and one with a day counts more. The last entry before a moment holds, round the week.
    ///
    /// The error says what is wrong and what would be right.
    pub fn parse(text: &str) -> Result<Self, String> {
        let words: Vec<&str> =
            text.split(|c: char| c.is_whitespace() || c == ';').filter(|w| !w.is_empty()).collect();
        let timed = words.iter().any(|w| w.contains(','));
        if !timed {
            // A rate may be written with a blank before its unit.
            return Ok(Self::always(parse_rate(text)?));
        }
        let (mut daily, mut dated) = (BTreeMap::new(), BTreeMap::new());
        for word in words {
            let (when, rate) = word.split_once(',').ok_or_else(|| {
                format!("{word:?} is not an entry of a timetable; write it like \"08:00,1MiB\" or \"Sat-00:00,off\"")
            })?;
            let rate = parse_rate(rate)?;
            let (day, time) = match when.split_once('-') {
                Some((day, time)) => (Some(parse_day(day)?), time),
                None => (None, when),
            };
            let minute = parse_time(time)?;
            let before = match day {
                Some(day) => dated.insert(day * MINUTES_OF_DAY + minute, rate),
                None => daily.insert(minute, rate),
            };
            if before.is_some() {
                return Err(format!("{when} occurs twice"));
            }
        }
        let every_day =
            (0..7).flat_map(|d| daily.iter().map(move |(m, r)| (WeekMinute(d * MINUTES_OF_DAY + m), *r)));
        let dated = dated.iter().map(|(m, r)| (WeekMinute(*m), *r));
        Ok(Self { entries: every_day.chain(dated).collect() })
    }

    /// The limit at a time.
    #[must_use]
    pub fn at(&self, now: WeekMinute) -> Option<u64> {
        let before = self.entries.range(..=now).next_back();
        // Before the first entry of the week the last one of the former week holds.
        before.or_else(|| self.entries.iter().next_back()).and_then(|(_, rate)| *rate)
    }

    /// Whether there is no limit at any time.
    #[must_use]
    pub fn is_off(&self) -> bool {
        self.entries.values().all(Option::is_none)
    }
}

/// Reads bytes per second: `1MiB`, `500 KiB/s`, `2M`; units are powers of 1024. `off` is no limit.
pub fn parse_rate(text: &str) -> Result<Option<u64>, String> {
    let given = text.trim();
    if given.eq_ignore_ascii_case("off") {
        return Ok(None);
    }
    let like = "write it like \"1MiB\", \"500KiB/s\" or \"off\"";
    let amount = given.strip_suffix("/s").unwrap_or(given);
    let end = amount.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(amount.len());
    let (number, unit) = amount.split_at(end);
    let number: f64 = number.parse().map_err(|_| format!("{text:?} is not a rate; {like}"))?;
    let scale = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" | "kib" => 1024.0,
        "m" | "mb" | "mib" => 1024.0 * 1024.0,
        "g" | "gb" | "gib" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("{text:?} is not a rate: its unit is none of KiB, MiB and GiB; {like}")),
    };
    let rate = number * scale;
    if !(RATES.0..=RATES.1).contains(&rate) {
        return Err(format!(
            "{text:?} is not between 1KiB and 1024GiB per second; for no limit write \"off\", to stop uploads pause the replica"
        ));
    }
    Ok(Some(rate as u64))
}

fn parse_day(text: &str) -> Result<u32, String> {
    let day = DAYS.iter().position(|d| text.eq_ignore_ascii_case(d));
    day.map(|d| d as u32)
        .ok_or_else(|| format!("{text:?} is no day; write Mon, Tue, Wed, Thu, Fri, Sat or Sun"))
}

fn parse_time(text: &str) -> Result<u32, String> {
    let number = |part: &str, most: u32| {
        let plain = (1..=2).contains(&part.len()) && part.bytes().all(|b| b.is_ascii_digit());
        part.parse::<u32>().ok().filter(|n| plain && *n <= most)
    };
    text.split_once(':')
        .and_then(|(hour, minute)| Some(number(hour, 23)? * 60 + number(minute, 59)?))
        .ok_or_else(|| format!("{text:?} is no time of the day; write it like 08:00 or 23:30"))
}

/// Tokens for bytes. They come at the rate of the moment, up to one second's worth; a taker may run into debt by all that it takes,
/// and the next one waits until the debt is paid. So any size gets through, and the average holds.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    tokens: f64,
    at: Option<Instant>,
}

impl Default for Bucket {
    fn default() -> Self {
        Self { tokens: f64::INFINITY, at: None }
    }
}

impl Bucket {
    /// Takes tokens for `len` bytes, or says how long until they may be asked for again at this rate. Never zero.
    pub fn take(&mut self, len: u64, rate: Option<u64>, now: Instant) -> Result<(), Duration> {
        let wait = self.wait(rate, now);
        if wait > Duration::ZERO {
            return Err(wait);
        }
        self.charge(len, rate, now);
        Ok(())
    }

    /// How long until something may be taken.
    pub fn wait(&mut self, rate: Option<u64>, now: Instant) -> Duration {
        let Some(rate) = rate else { return Duration::ZERO };
        self.refill(Some(rate), now);
        if self.tokens >= 0.0 {
            return Duration::ZERO;
        }
        let seconds = -self.tokens / rate as f64;
        // Not by a rounding error too short, again and again.
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX).max(Duration::from_millis(1))
    }

    /// Takes tokens without asking, for what cannot wait or turned out larger.
    pub fn charge(&mut self, len: u64, rate: Option<u64>, now: Instant) {
        self.refill(rate, now);
        if rate.is_some() {
            self.tokens -= len as f64;
        }
    }

    /// Gives tokens back for bytes that were not moved.
    pub fn give_back(&mut self, len: u64) {
        self.tokens += len as f64;
    }

    fn refill(&mut self, rate: Option<u64>, now: Instant) {
        let Some(rate) = rate else {
            // While there is no limit, debts are forgotten.
            *self = Self { tokens: f64::INFINITY, at: Some(now) };
            return;
        };
        let rate = rate as f64;
        let passed = self.at.map_or(Duration::ZERO, |at| now.saturating_duration_since(at));
        self.at = Some(self.at.map_or(now, |at| at.max(now)));
        self.tokens = (self.tokens + passed.as_secs_f64() * rate).min(BURST.as_secs_f64() * rate);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(table: &str, day: u32, hour: u32, minute: u32) -> Option<u64> {
        Timetable::parse(table).unwrap().at(WeekMinute::new(day, hour, minute))
    }

    #[test]
    fn rates_in_every_spelling() {
        for (text, rate) in [
            ("1MiB", Some(1 << 20)),
            ("500KiB/s", Some(500 << 10)),
            (" 2 M ", Some(2 << 20)),
            ("1.5gb/s", Some(3 << 29)),
            ("4096", Some(4096)),
            ("off", None),
            ("OFF", None),
        ] {
            assert_eq!(parse_rate(text), Ok(rate), "{text}");
            assert_eq!(Timetable::parse(text), Ok(Timetable::always(rate)), "{text}");
        }
        for (text, part) in [
            ("", "is not a rate"),
            ("fast", "is not a rate"),
            ("-1MiB", "is not a rate"),
            ("1.2.3M", "is not a rate"),
            ("1MiB/m", "its unit is none"),
            ("0", "not between 1KiB"),
            ("9999999999G", "not between 1KiB"),
        ] {
            let error = parse_rate(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn the_last_entry_of_the_day_holds_until_the_first_of_the_next() {
        for table in ["08:00,1MiB 23:00,off", " 23:00,off;8:00,1MiB/s ;"] {
            for day in 0..7 {
                assert_eq!(at(table, day, 0, 0), None, "{table}");
                assert_eq!(at(table, day, 7, 59), None);
                assert_eq!(at(table, day, 8, 0), Some(1 << 20));
                assert_eq!(at(table, day, 22, 59), Some(1 << 20));
                assert_eq!(at(table, day, 23, 0), None);
            }
        }
        assert_eq!(at("12:00,1M", 3, 11, 59), Some(1 << 20), "one entry holds always");
        assert!(Timetable::parse("12:00,off").unwrap().is_off() && Timetable::default().is_off());
        assert_eq!(Timetable::default().at(WeekMinute::new(6, 23, 59)), None);
    }

    #[test]
    fn a_day_of_the_week_counts_more() {
        let table = "Fri-18:00,off mon-06:00,1M";
        for (day, hour, limit) in
            [(0, 5, None), (0, 6, Some(1 << 20)), (4, 17, Some(1 << 20)), (4, 18, None), (6, 12, None)]
        {
            assert_eq!(at(table, day, hour, 0), limit, "{day} {hour}");
        }
        let table = "08:00,1M 20:00,2M Sun-08:00,off";
        assert_eq!(at(table, 5, 9, 0), Some(1 << 20));
        assert_eq!(at(table, 6, 9, 0), None);
        assert_eq!(at(table, 6, 20, 0), Some(2 << 20));
        assert_eq!(at(table, 0, 1, 0), Some(2 << 20), "from Sunday into Monday");
    }

    #[test]
    fn wrong_timetables_say_what_would_be_right() {
        for (text, part) in [
            ("08:00,1MiB 23:00", "\"23:00\" is not an entry"),
            ("24:00,1MiB", "is no time"),
            ("8,1MiB", "is no time"),
            ("08:60,1MiB", "is no time"),
            ("+8:00,1MiB", "is no time"),
            ("Foo-08:00,1MiB", "\"Foo\" is no day"),
            ("08:00,much", "is not a rate"),
            ("08:00,1M 8:00,2M", "occurs twice"),
            ("Mon-08:00,1M mon-08:00,2M", "occurs twice"),
        ] {
            let error = Timetable::parse(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    /// What a taker of `len` bytes at a time gets through within `time`, without ever looking more often than told.
    fn through(bucket: &mut Bucket, len: u64, rate: u64, start: Instant, time: Duration) -> u64 {
        let (mut now, mut done) = (start, 0);
        while now < start + time {
            match bucket.take(len, Some(rate), now) {
                Ok(()) => done += len,
                Err(wait) => now += wait,
            }
        }
        done
    }

    #[test]
    fn the_average_holds_for_any_size() {
        let start = Instant::now();
        for len in [1000, 64 << 10, 16 << 20] {
            let mut bucket = Bucket::default();
            let done = through(&mut bucket, len, 1 << 20, start, Duration::from_secs(100));
            let (low, high) = (100 << 20, (101 << 20) + len);
            assert!(done >= low - len && done <= high, "{len}: {done}");
            // After a pause of any length there is one second's worth at once, not more.
            let later = start + Duration::from_secs(10_000);
            let burst = through(&mut bucket, len, 1 << 20, later, Duration::from_millis(1));
            assert!(burst <= (1 << 20) + len + 2000, "{len}: {burst}");
        }
    }

    #[test]
    fn a_change_of_the_rate_takes_effect_while_waiting() {
        let start = Instant::now();
        let mut bucket = Bucket::default();
        assert_eq!(bucket.take(101 << 20, Some(1 << 20), start), Ok(()));
        let wait = bucket.take(1, Some(1 << 20), start).unwrap_err();
        assert_eq!(wait, Duration::from_secs(100));
        let later = start + Duration::from_secs(50);
        assert_eq!(bucket.wait(Some(1 << 20), later), Duration::from_secs(50));
        assert_eq!(bucket.wait(Some(10 << 20), later), Duration::from_secs(5), "ten times as fast");
        assert_eq!(bucket.take(1 << 30, None, later), Ok(()), "no limit now");
        assert_eq!(bucket.take(1, Some(1 << 20), later), Ok(()), "what was taken then is no debt");
    }

    #[test]
    fn tokens_can_be_given_back_and_time_may_stand_still() {
        let now = Instant::now() + Duration::from_secs(5);
        let mut bucket = Bucket::default();
        bucket.charge(10 << 20, Some(1 << 20), now);
        bucket.give_back(10 << 20);
        assert_eq!(bucket.take(0, Some(1 << 20), now - Duration::from_secs(3)), Ok(()));
        bucket.give_back(1 << 40);
        assert_eq!(bucket.take(2 << 20, Some(1 << 20), now), Ok(()));
        assert!(bucket.take(1, Some(1 << 20), now).is_err(), "given back too much is not kept");
    }
}
