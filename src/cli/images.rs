//! `images` and `inspect`: what is in the store.

use anyhow::{Context as _, Result};
use clap::{Arg, ArgMatches};
use serde::Serialize;

use super::client::{Client, called};
use super::output::{argument, print, structured, table};
use super::{Command, Context, required, string, switch};
use crate::api::v1;

/// Digits of an id that are shown.
const SHORT: usize = 13;
/// What an image without a name is called.
const NONE: &str = "<none>";

pub(super) struct Images;

#[derive(Serialize)]
struct Row {
    id: String,
    /// All names with a tag.
    tags: Vec<String>,
    /// All names with a digest.
    digests: Vec<String>,
    /// Bytes in the store.
    size: u64,
    pinned: bool,
}

#[async_trait::async_trait]
impl Command for Images {
    fn name(&self) -> &'static str {
        "images"
    }
    fn about(&self) -> &'static str {
        "List images"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![switch("all", Some('a'), "A line for each name, those with a digest among them"), argument("table")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let images = called(client.image.list_images(v1::ListImagesRequest::default()).await)?.images;
        let row =
            |i: v1::Image| Row { id: i.id, tags: i.repo_tags, digests: i.repo_digests, size: i.size, pinned: i.pinned };
        let mut rows: Vec<Row> = images.into_iter().map(row).collect();
        rows.sort_by(|a, b| (&a.tags, &a.digests, &a.id).cmp(&(&b.tags, &b.digests, &b.id)));
        if structured(matches, &rows)?.is_none() {
            print(&listed(&rows, matches.get_flag("all")))?;
        }
        Ok(0)
    }
}

fn listed(rows: &[Row], all: bool) -> String {
    let mut lines = Vec::new();
    for row in rows {
        let id = row.id.trim_start_matches("sha256:");
        let cells = |name: String| {
            let pinned = if row.pinned { "yes" } else { "" };
            let size = format!("{:.1}", row.size as f64 / f64::from(1 << 20));
            vec![name, id[..id.len().min(SHORT)].to_owned(), pinned.to_owned(), size]
        };
        let names: Vec<&String> = row.tags.iter().chain(&row.digests).collect();
        match (all, names.as_slice()) {
            (_, []) => lines.push(cells(NONE.into())),
            (true, names) => lines.extend(names.iter().map(|name| cells((*name).clone()))),
            (false, [first, ..]) => {
                let more = row.tags.len().saturating_sub(1);
                let more = if more > 0 { format!(" (+{more})") } else { String::new() };
                lines.push(cells(format!("{first}{more}")));
            }
        }
    }
    table(&["IMAGE", "ID", "PINNED", "MIB"], &lines, 1)
}

pub(super) struct Inspect;

#[async_trait::async_trait]
impl Command for Inspect {
    fn name(&self) -> &'static str {
        "inspect"
    }
    fn about(&self) -> &'static str {
        "All that is known of an image: names, layers, how it is run, which containers are made of it"
    }
    fn arguments(&self) -> Vec<Arg> {
        vec![required("IMAGE", "Reference or id"), argument("json")]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let name = string(matches, "IMAGE");
        let spec = v1::ImageSpec { image: name.clone(), ..Default::default() };
        let request = v1::ImageStatusRequest { image: Some(spec), verbose: true };
        let answer = called(client.image.image_status(request).await)?;
        let image = answer.image.with_context(|| format!("image {name} is not here"))?;
        let info = answer.info.get("info").context("the daemon tells nothing of it")?;
        let mut told: serde_json::Value = serde_json::from_str(info).context("what the daemon tells of it")?;
        let used = client.containers().await?.into_iter().filter(|c| c.image_id == image.id);
        told["containers"] = used.map(|c| c.id).collect();
        structured(matches, &told)?;
        Ok(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_told_or_counted() {
        let row = |tags: &[&str], digests: &[&str]| Row {
            id: format!("sha256:{}", "a".repeat(64)),
            tags: tags.iter().map(|t| (*t).to_owned()).collect(),
            digests: digests.iter().map(|t| (*t).to_owned()).collect(),
            size: 3 << 20,
            pinned: tags.is_empty(),
        };
        let rows = [row(&["a:1", "b:2"], &["a@sha256:x"]), row(&[], &["c@sha256:y"]), row(&[], &[])];
        let short = listed(&rows, false);
        assert!(short.contains("a:1 (+1) ") && short.contains("<none>"), "{short}");
        assert_eq!(short.lines().count(), 4);
        let all = listed(&rows, true);
        assert_eq!(all.lines().count(), 6);
        assert!(all.contains("a@sha256:x") && all.contains("yes     3.0"), "{all}");
    }
}
