//! `pull`: fetches an image, or takes it from a file.

use std::io::IsTerminal;

use anyhow::{Result, anyhow, ensure};
use clap::{Arg, ArgMatches};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use super::client::{Client, Keys, called, is_file_source};
use super::output::print;
use super::{Command, Context, required, string, switch};
use crate::api::local;

/// A layer that is fetched, and one that is in the store.
const FETCHING: &str = "{prefix:12} [{bar:30}] {bytes:>10}/{total_bytes:10} {bytes_per_sec} {msg}";
const THERE: &str = "{prefix:12} {msg}";

pub(super) struct Pull;

#[async_trait::async_trait]
impl Command for Pull {
    fn name(&self) -> &'static str {
        "pull"
    }
    fn about(&self) -> &'static str {
        "Fetch an image from a registry, or take it from oci:DIR, oci-archive:FILE, docker-archive:FILE or bfc:FILE"
    }
    fn arguments(&self) -> Vec<Arg> {
        let [key, password] = Keys::arguments();
        vec![
            required("IMAGE", "Reference or file"),
            Arg::new("as").long("as").value_name("REFERENCE").help("Name for an image from a file"),
            key,
            password,
            switch("quiet", Some('q'), "No bars: the image's id alone"),
        ]
    }
    async fn run(&self, context: &Context, matches: &ArgMatches) -> Result<u8> {
        let mut client = Client::connect(&context.local_socket).await?;
        let (image, keys) = (string(matches, "IMAGE"), Keys::of(matches));
        if is_file_source(&image) {
            let loaded = client.load(&image, &string(matches, "as"), keys).await?;
            print(&format!("{}  {}\n", loaded.id, loaded.repo_tags.join(" ")))?;
            return Ok(0);
        }
        ensure!(!matches.contains_id("as"), "--as names an image from a file");
        ensure!(keys.is_empty(), "--keyfile and --password-file are for containers (bfc:FILE)");
        let shown = std::io::stderr().is_terminal() && !matches.get_flag("quiet");
        let mut bars = shown.then(Bars::default);
        let mut messages = called(client.local.pull_image(local::PullImageRequest { image }).await)?;
        let mut pulled = None;
        while let Some(message) = messages.message().await.map_err(|s| anyhow!("{}", s.message()))? {
            if let Some(bars) = &mut bars {
                bars.show(&message.layers);
            }
            pulled = message.image.or(pulled);
        }
        let pulled = pulled.ok_or_else(|| anyhow!("the daemon ended the pull without a result"))?;
        print(&format!("{}\n", pulled.id))?;
        Ok(0)
    }
}

/// A bar for each layer.
#[derive(Default)]
struct Bars {
    all: MultiProgress,
    layers: Vec<ProgressBar>,
}

impl Bars {
    fn show(&mut self, layers: &[local::LayerFetch]) {
        let style = |template| ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        for (n, layer) in layers.iter().enumerate() {
            if self.layers.len() <= n {
                let bar = self.all.add(ProgressBar::new(layer.total).with_style(style(FETCHING)));
                let digits = layer.digest.trim_start_matches("sha256:");
                bar.set_prefix(digits[..digits.len().min(12)].to_owned());
                self.layers.push(bar);
            }
            let bar = &self.layers[n];
            if bar.is_finished() {
                continue;
            }
            bar.set_position(layer.fetched);
            match (layer.done, layer.fetched) {
                (false, fetched) if fetched == layer.total && fetched > 0 => bar.set_message("unpacking"),
                (false, _) => {}
                (true, 0) => {
                    bar.set_style(style(THERE));
                    bar.finish_with_message("there already");
                }
                (true, _) => bar.finish_with_message("done"),
            }
        }
    }
}
