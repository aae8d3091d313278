//! Numbers that may be strings, booleans that may be numbers: the API's answers as it really sends them.
//!
//! Functions for serde's `deserialize_with`, used by the types of answers. What is no number at all is an error, and null
//! is nothing.

use serde::de::{Deserialize, Deserializer, Error as _};
use serde_json::Value;

/// An integer that is not negative; fractions (the API sends some) are cut off.
pub(super) fn opt_u64<'de, D: Deserializer<'de>>(d: D) -> Result<Option<u64>, D::Error> {
    as_u64(&Value::deserialize(d)?).map_err(D::Error::custom)
}

/// The same; nothing is 0.
pub(super) fn u64<'de, D: Deserializer<'de>>(d: D) -> Result<u64, D::Error> {
    opt_u64(d).map(Option::unwrap_or_default)
}

/// A number.
pub(super) fn opt_f64<'de, D: Deserializer<'de>>(d: D) -> Result<Option<f64>, D::Error> {
    as_f64(&Value::deserialize(d)?).map_err(D::Error::custom)
}

/// The same; nothing is 0.
pub(super) fn f64<'de, D: Deserializer<'de>>(d: D) -> Result<f64, D::Error> {
    opt_f64(d).map(Option::unwrap_or_default)
}

/// A boolean; nothing is false.
pub(super) fn bool<'de, D: Deserializer<'de>>(d: D) -> Result<bool, D::Error> {
    as_bool(&Value::deserialize(d)?).map(Option::unwrap_or_default).map_err(D::Error::custom)
}

/// Text, also of a number or boolean; nothing is "".
pub(super) fn string<'de, D: Deserializer<'de>>(d: D) -> Result<String, D::Error> {
    Ok(as_string(&Value::deserialize(d)?))
}

pub(super) fn as_u64(value: &Value) -> Result<Option<u64>, String> {
    let Some(n) = as_f64(value)? else { return Ok(None) };
    // Above 2^53 a float is not exact: integers are taken as they are.
    let exact = match value {
        Value::Number(n) => n.as_u64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    match exact {
        Some(n) => Ok(Some(n)),
        None if n.is_finite() && n >= 0.0 => Ok(Some(n as u64)),
        None => Err(format!("{value} is not a number of 0 or more")),
    }
}

pub(super) fn as_f64(value: &Value) -> Result<Option<f64>, String> {
    let bad = || format!("{value} is not a number");
    match value {
        Value::Null => Ok(None),
        Value::Bool(b) => Ok(Some(f64::from(u8::from(*b)))),
        Value::Number(n) => n.as_f64().map(Some).ok_or_else(bad),
        Value::String(s) if s.trim().is_empty() => Ok(None),
        Value::String(s) => s.trim().parse().map(Some).map_err(|_| bad()),
        _ => Err(bad()),
    }
}

pub(super) fn as_bool(value: &Value) -> Result<Option<bool>, String> {
    match value {
        Value::Null => Ok(None),
        Value::Bool(b) => Ok(Some(*b)),
        Value::Number(n) => Ok(Some(n.as_f64() != Some(0.0))),
        Value::String(s) => match s.trim().to_lowercase().as_str() {
            "" => Ok(None),
            "1" | "on" | "yes" | "true" => Ok(Some(true)),
            "0" | "off" | "no" | "false" => Ok(Some(false)),
            _ => Err(format!("{value} is neither 1 nor 0")),
        },
        _ => Err(format!("{value} is neither 1 nor 0")),
    }
}

pub(super) fn as_string(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(s) => s.clone(),
        Value::Bool(b) => u8::from(*b).to_string(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    struct Answer {
        #[serde(default, deserialize_with = "opt_u64")]
        n: Option<u64>,
        #[serde(default, deserialize_with = "opt_f64")]
        f: Option<f64>,
        #[serde(default, deserialize_with = "bool")]
        b: bool,
        #[serde(default, deserialize_with = "string")]
        s: String,
    }

    fn answer(text: &str) -> Answer {
        serde_json::from_str(text).expect(text)
    }

    #[test]
    fn every_spelling() {
        let nothing = Answer { n: None, f: None, b: false, s: String::new() };
        assert_eq!(answer("{}"), nothing);
        assert_eq!(answer(r#"{"n":null,"f":null,"b":null,"s":null}"#), nothing);
        let all = Answer { n: Some(100), f: Some(0.5), b: true, s: "1".into() };
        assert_eq!(answer(r#"{"n":"100","f":"0.5","b":"1","s":1}"#), all);
        assert_eq!(answer(r#"{"n":100.7,"f":0.5,"b":true,"s":true}"#), all);
        assert_eq!(answer(r#"{"n":18446744073709551615}"#).n, Some(u64::MAX));
        assert_eq!(answer(r#"{"n":"18446744073709551615"}"#).n, Some(u64::MAX));
        for bad in [r#"{"n":"x"}"#, r#"{"n":-1}"#, r#"{"n":[]}"#, r#"{"b":"maybe"}"#, r#"{"f":{}}"#] {
            assert!(serde_json::from_str::<Answer>(bad).is_err(), "{bad}");
        }
    }
}
