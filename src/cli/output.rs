//! What verbs print: tables for people, JSON and YAML for programs.
//!
//! All of it goes through [`print`], which fails where standard output does: a pipe that is closed early ends a verb quietly.

use std::io::Write;

use anyhow::{Context as _, Result, bail};
use clap::{Arg, ArgMatches};
use serde::Serialize;

/// `--output`, with what is printed when nobody says.
pub fn argument(default: &'static str) -> Arg {
    let forms: &[&'static str] = if default == "table" { &["table", "json", "yaml"] } else { &["json", "yaml"] };
    let arg = Arg::new("output").long("output").short('o').value_name("FORM").default_value(default);
    arg.value_parser(clap::builder::PossibleValuesParser::new(forms)).help("How it is printed")
}

/// Prints `value` in the form that was asked for; None: a table, which is the caller's.
pub fn structured(matches: &ArgMatches, value: &impl Serialize) -> Result<Option<()>> {
    let text = match matches.get_one::<String>("output").map(String::as_str) {
        Some("json") => serde_json::to_string_pretty(value)?,
        Some("yaml") => serde_saphyr::to_string(value)?,
        _ => return Ok(None),
    };
    print(&format!("{}\n", text.trim_end())).map(Some)
}

/// Rows below a header, in columns as wide as they have to be; the last columns that are `numbers` are to the right.
pub fn table(header: &[&str], rows: &[Vec<String>], numbers: usize) -> String {
    let mut widths: Vec<usize> = header.iter().map(|h| h.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut out = String::new();
    let first_number = header.len() - numbers;
    let header: Vec<String> = header.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&header).chain(rows) {
        let cells = row.iter().zip(&widths).enumerate().map(|(n, (cell, width))| match n >= first_number {
            true => format!("{cell:>width$}"),
            false => format!("{cell:<width$}"),
        });
        out.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
        out.push('\n');
    }
    out
}

/// `println!`, by way of [`print`].
macro_rules! say {
    ($($what:tt)*) => { $crate::cli::output::print(&format!("{}\n", format_args!($($what)*))) };
}
pub(crate) use say;

/// Writes to standard output.
pub fn print(text: &str) -> Result<()> {
    print_more(text).map(|_| ())
}

/// The same for what goes on and on; false: nobody reads any more.
pub fn print_more(text: &str) -> Result<bool> {
    if crate::utils::stdout::was_closed() && !text.is_empty() {
        bail!("writing to standard output: it is closed");
    }
    let mut out = std::io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        written => written.map(|()| true).context("writing to standard output"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_they_have_to_be() {
        let rows = [vec!["a".into(), "long name".into(), "1".into()], vec!["b".into(), String::new(), "200".into()]];
        let text = table(&["X", "NAME", "N"], &rows, 1);
        assert_eq!(text, "X  NAME         N\na  long name    1\nb             200\n");
    }
}
