//! The time of day as the log and the exit record need it.
//!
//! Pure but for reading the clock; nothing here fails.

use std::time::{SystemTime, UNIX_EPOCH};

/// Unix time in nanoseconds.
pub fn now_ns() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

/// Length of [`rfc3339`]'s text.
pub const RFC3339_LEN: usize = 30;

/// `2026-01-02T03:04:05.123456789Z` of a Unix time in nanoseconds (from 1970 to 9999).
pub fn rfc3339(ns: i64) -> [u8; RFC3339_LEN] {
    let ns = ns.max(0);
    let (seconds, fraction) = (ns / 1_000_000_000, ns % 1_000_000_000);
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let mut text = *b"0000-00-00T00:00:00.000000000Z";
    digits(&mut text[0..4], year);
    digits(&mut text[5..7], month);
    digits(&mut text[8..10], day);
    digits(&mut text[11..13], of_day / 3600);
    digits(&mut text[14..16], of_day / 60 % 60);
    digits(&mut text[17..19], of_day % 60);
    digits(&mut text[20..29], fraction);
    text
}

fn digits(into: &mut [u8], mut value: i64) {
    for place in into.iter_mut().rev() {
        *place = b'0' + (value % 10) as u8;
        value /= 10;
    }
}

/// Year, month and day of a day counted from 1970-01-01 (proleptic Gregorian, in eras of 400 years that begin
/// in March, so that the leap day is a year's last).
fn civil(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (ns, text) in [
            (0, "1970-01-01T00:00:00.000000000Z"),
            (951_782_400_000_000_001, "2000-02-29T00:00:00.000000001Z"),
            (1_709_251_199_999_999_999, "2024-02-29T23:59:59.999999999Z"),
            (1_767_323_045_123_456_789, "2026-01-02T03:04:05.123456789Z"),
            (4_107_542_400_000_000_000, "2100-03-01T00:00:00.000000000Z"),
            (-5, "1970-01-01T00:00:00.000000000Z"),
        ] {
            assert_eq!(std::str::from_utf8(&rfc3339(ns)), Ok(text));
        }
    }

    #[test]
    fn days_follow_each_other() {
        let mut last = civil(-1);
        for day in 0..100_000 {
            let next = civil(day);
            assert!(next.2 == last.2 + 1 || (next.2 == 1 && last.2 >= 28), "{last:?} {next:?}");
            last = next;
        }
    }
}
