//! Signals by name and number, for x86-64 and arm64 Linux (signal(7)).

const NAMED: [(&str, i32); 36] = [
    ("HUP", 1),
    ("INT", 2),
    ("QUIT", 3),
    ("ILL", 4),
    ("TRAP", 5),
    ("ABRT", 6),
    ("IOT", 6),
    ("BUS", 7),
    ("FPE", 8),
    ("KILL", 9),
    ("USR1", 10),
    ("SEGV", 11),
    ("USR2", 12),
    ("PIPE", 13),
    ("ALRM", 14),
    ("TERM", 15),
    ("STKFLT", 16),
    ("CHLD", 17),
    ("CLD", 17),
    ("CONT", 18),
    ("STOP", 19),
    ("TSTP", 20),
    ("TTIN", 21),
    ("TTOU", 22),
    ("URG", 23),
    ("XCPU", 24),
    ("XFSZ", 25),
    ("VTALRM", 26),
    ("PROF", 27),
    ("WINCH", 28),
    ("IO", 29),
    ("POLL", 29),
    ("PWR", 30),
    ("SYS", 31),
    ("RTMIN", 34),
    ("RTMAX", 64),
];

/// Number of "SIGTERM", "TERM", "SIGRTMIN+3", "SIGRTMINPLUS3" (as the CRI spells it) or "15"; None if there is none.
pub fn number(name: &str) -> Option<i32> {
    if let Ok(n) = name.parse::<i32>() {
        return (1..=64).contains(&n).then_some(n);
    }
    let upper = name.to_ascii_uppercase().replace("PLUS", "+").replace("MINUS", "-");
    let bare = upper.strip_prefix("SIG").unwrap_or(&upper);
    let from = |base: &str, base_number: i32| {
        let offset: i32 = bare.strip_prefix(base)?.parse().ok()?;
        Some(base_number + offset)
    };
    if let Some((_, n)) = NAMED.iter().find(|(n, _)| *n == bare) {
        return Some(*n);
    }
    from("RTMIN", 34).or_else(|| from("RTMAX", 64)).filter(|n| (34..=64).contains(n))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_numbers_and_real_time() {
        for (name, n) in
            [("SIGTERM", 15), ("quit", 3), ("9", 9), ("SIGRTMIN+3", 37), ("SIGRTMAX-14", 50), ("RTMINPLUS15", 49)]
        {
            assert_eq!(number(name), Some(n), "{name}");
        }
        for bad in ["", "SIG", "0", "65", "NOPE", "RTMIN+99", "-1"] {
            assert_eq!(number(bad), None, "{bad}");
        }
    }
}
